"""Every config key that this plugin adds to Detectron2's, with its default and its meaning, and the
keys that are gone.

The defaults reproduce Detectron2: a zoo config whose `MODEL.BACKBONE.NAME` is
`build_pyramid_backbone` builds the model that it built before, parameter for parameter.
`python -m fpn_plugin.config > docs/config.md` writes the page of keys.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any, Iterator, NamedTuple

from detectron2.config import CfgNode, get_cfg

from fpn_plugin.config import settings
from fpn_plugin.config.learning import EMASettings

# The values of MODEL.BACKBONE.NAME that this plugin adds
PYRAMID_BUILDER = "build_pyramid_backbone"
OWN_BUILDERS = (PYRAMID_BUILDER, "build_bottom_up_backbone")
# Arguments of the bottom-up network, which take any name
ARGS = "MODEL.BOTTOM_UP.ARGS"


class Key(NamedTuple):
    """A config key.

    Attributes:
        name: with dots.
        default: a dict for a section that takes any key.
        meaning: in Markdown.
    """

    name: str
    default: Any
    meaning: str


class GoneKey(NamedTuple):
    """A key of earlier versions.

    Attributes:
        default: the value that an earlier version recorded where nobody had set it.
        reason: why the key is gone, and what to do.
    """

    default: Any
    reason: str


GONE = {
    "MODEL.FPN.TRITON": GoneKey(
        False,
        "the hand-written Triton kernel went, as torch.compile (MODEL.COMPILE: pyramid) emits one",
    ),
    "MODEL.FPN.MERGE_PROJECTIONS": GoneKey(
        False, "running 1x1 convolutions as one gained nothing that could be measured"
    ),
    "DATALOADER.CACHE_IMAGES": GoneKey(
        0, "caching decoded images went; take more workers (DATALOADER.NUM_WORKERS) instead"
    ),
}

_KEYS = [
    Key(
        "IMPORTS",
        [],
        "modules and files with topologies, fusions, datasets, ... [of your own](extending.md). A"
        " run fills in what `--import` names. What a file has here is imported only with"
        " `--import` of the same or `--trust-imports`; relative paths are relative to the file",
    ),
    Key(
        "MODEL.FPN.WARM_START",
        False,
        "starts from `MODEL.WEIGHTS`, a checkpoint with another pyramid or width, and at first"
        " computes what that computed: its pyramid is built too, and on every level the new one is"
        " blended in by a learned weight that starts at 0. The structure follows from the config:"
        " leave it on to resume and to evaluate",
    ),
    Key(
        "MODEL.FPN.WARM_START_FROM",
        {},
        "that checkpoint's pyramid, by the names of the keys of `MODEL.FPN` (`TOPOLOGY: none`: it"
        " has none); filled from the config.yaml beside the checkpoint, or from the names in it"
        " where it is Detectron2's FPN",
    ),
    Key(
        "MODEL.FPN.RECOMPUTE",
        False,
        "computes nodes whose fusion has weights, and steps, again in the backward pass, from their"
        " inputs, instead of keeping what they computed: less memory, more time, the same"
        " gradients",
    ),
    Key(
        "MODEL.BOTTOM_UP.NAME",
        "build_resnet_backbone",
        "the network underneath: a builder of Detectron2's registry (`build_resnet_backbone`,"
        " `build_regnet_backbone`, `build_swin_backbone`, `build_mvit_backbone`,"
        " `build_vit_backbone`, ...), `timm/<model>` or `torchvision/<model>`",
    ),
    Key(
        "MODEL.BOTTOM_UP.WEIGHTS",
        "",
        "weights for that network alone: a file (torch, safetensors, Detectron2's `.pkl`; with the"
        " names of torchvision, timm or Detectron2, also a whole detector's), `detectron2://` or a"
        " URL, or `timm`/`torchvision` for those that they publish",
    ),
    Key(
        "MODEL.BOTTOM_UP.NORM",
        "",
        "what the network's batch norms become, where that is possible: `FrozenBN`, `BN`,"
        ' `SyncBN`, `GN`; `""`: they stay as they are',
    ),
    Key(
        ARGS,
        {},
        "more arguments for the network, by its library's names: `{drop_path_rate: 0.1}` (on a"
        " command line `MODEL.BOTTOM_UP.ARGS.drop_path_rate 0.1`); for timm also"
        " `grad_checkpointing: True`, and for a plain ViT `norm_maps: True` (its maps pass the"
        " network's last norm) and `sta: {blocks: [4, 8, 12], channels: 16, norm: BN}` (DEIMv2's"
        " spatial tuning adapter on the maps after these blocks: it gives `res3`, `res4`, `res5`)",
    ),
    Key(
        "MODEL.BOTTOM_UP.PIXELS",
        "auto",
        "`auto`: `MODEL.PIXEL_MEAN`, `MODEL.PIXEL_STD` and `INPUT.FORMAT` follow the weights where"
        " all three stand at Detectron2's defaults, and a checkpoint's are those of the run that"
        " made it (its config.yaml); `config`: as they stand. The log says which were taken",
    ),
    Key("MODEL.FCOS.NUM_CLASSES", 80, "for `META_ARCHITECTURE: FCOS`: the number of classes"),
    Key(
        "MODEL.FCOS.IN_FEATURES",
        ["p3", "p4", "p5", "p6", "p7"],
        "the maps that the head reads. Here as in all heads' `IN_FEATURES`, and in"
        " `MODEL.ANCHOR_GENERATOR.SIZES`, `[auto]` stands for what follows from the pyramid",
    ),
    Key("MODEL.FCOS.NUM_CONVS", 4, "convolutions of each of the head's two branches"),
    Key("MODEL.FCOS.NORM", "GN", "of these convolutions"),
    Key(
        "MODEL.FCOS.CENTER_SAMPLING_RADIUS",
        1.5,
        "a place is positive within this many strides of a box's centre",
    ),
    Key("MODEL.FCOS.FOCAL_LOSS_ALPHA", 0.25, "of the focal loss"),
    Key("MODEL.FCOS.FOCAL_LOSS_GAMMA", 2.0, "of the focal loss"),
    Key("MODEL.FCOS.PRIOR_PROB", 0.01, "the score that an untrained head gives"),
    Key("MODEL.FCOS.SCORE_THRESH_TEST", 0.2, "the lowest score of a detection"),
    Key("MODEL.FCOS.TOPK_CANDIDATES_TEST", 1000, "candidates of each level before NMS"),
    Key("MODEL.FCOS.NMS_THRESH_TEST", 0.6, "the largest overlap of two detections"),
    Key(
        "MODEL.EMA.ENABLED",
        False,
        "averages the weights over the iterations (D2Go's `MODEL_EMA`); the averages are what is"
        " evaluated, drawn and saved as the model of a checkpoint",
    ),
    Key("MODEL.EMA.DECAY", EMASettings().decay, "the share of the old average in the next one"),
    Key(
        "MODEL.EMA.DECAY_WARM_UP_FACTOR",
        EMASettings().decay_warm_up_factor,
        "the n-th average takes at most (1 + n) / (this + n) of the one before, so that short runs"
        " forget the weights that they began with; `-1`: `DECAY` from the start, D2Go's default",
    ),
    Key(
        "MODEL.CHANNELS_LAST",
        False,
        "keeps weights in channels-last memory format: faster convolutions on most devices, the"
        " same numbers",
    ),
    Key(
        "MODEL.COMPILE",
        "",
        '`torch.compile` of the `pyramid`, or of the whole `backbone`, which takes long; `""`: of'
        " nothing",
    ),
    Key(
        "MODEL.FAST_ROI_ALIGN",
        False,
        "on the CPU, pools boxes by torch's own gather instead of torchvision's kernel, which uses"
        " one core: the same up to rounding, several times faster",
    ),
    Key(
        "SOLVER.AMP.PRECISION",
        "auto",
        "the type that `SOLVER.AMP.ENABLED` computes in: `fp16`, `bf16`, or `auto` (`fp16` on CUDA,"
        " `bf16` on the CPU)",
    ),
    Key(
        "SOLVER.ACCUMULATE",
        1,
        "in how many parts each process runs its share of a batch, one after the other, for batches"
        " larger than memory: `SOLVER.IMS_PER_BATCH`, the schedule and the step stay those of the"
        " batch; [what is equal](training.md#batches-larger-than-memory)",
    ),
    Key(
        "SOLVER.DDP.GRADIENT_AS_BUCKET_VIEW",
        False,
        "of several processes (`SOLVER.DDP` says how torch's DistributedDataParallel exchanges"
        " their gradients): gradients live in the buffers that are sent, which saves a copy and"
        " that much memory",
    ),
    Key(
        "SOLVER.DDP.STATIC_GRAPH",
        False,
        "promises that each step uses the same parameters; not with `SOLVER.ACCUMULATE`",
    ),
    Key(
        "SOLVER.DDP.BUCKET_MB",
        0,
        "MiB of gradients that are sent at once; `0`: torch's own numbers, 25 and first 1",
    ),
    Key(
        "SOLVER.DDP.COMPRESS",
        "",
        "sends gradients in half precision: `bf16` (needs a torch built with CUDA) or `fp16`"
        " (overflows beyond 65504)",
    ),
    Key("SOLVER.OPTIMIZER", "SGD", "`SGD` (Detectron2's) or `AdamW`"),
    Key("SOLVER.FUSED", False, "the optimizer's step in one kernel"),
    Key(
        "SOLVER.MAX_LOSS_RATIO",
        10000,
        "stops training when the loss exceeds so many times its usual value (the lowest median of"
        " 20 iterations in a row so far, at least 1), and names the part of the model where that"
        " begins; `0`: never. A loss that is not finite always stops training",
    ),
    Key(
        "TEST.FOLD_NORMS",
        False,
        "evaluates (and `fpn export` writes) a copy of the model whose batch norms are folded into"
        " the convolutions before them, and whose parallel convolutions (the block `rep` and those"
        " of it) are one: the same up to rounding",
    ),
    Key(
        "TEST.FAST_COCO_EVAL",
        False,
        "COCO's metrics by the package faster-coco-eval (`.[fast_eval]`): the same numbers, several"
        " times faster",
    ),
    Key(
        "TEST.SIZE_BINS",
        [],
        "sides in pixels, such as `[8, 16, 32, 64, 128, 256]`: COCO's evaluator gives AP by these"
        " size bins too (`bbox/AP@8-16` in metrics.json)",
    ),
    Key(
        "TEST.VIS_PERIOD",
        0,
        "every so many iterations, pictures of what the detector sees in a few images of"
        " `DATASETS.TEST`, and each node's gradient norm, in TensorBoard; with it, the fusions'"
        " weights every 20 iterations; `0`: none of it",
    ),
    Key(
        "INPUT.DEEP_IMAGES",
        "percentile",
        "how images of more than 8 bits per channel (16-bit, 32-bit, float) become 0...255:"
        " `percentile` (from the 0.1st percentile of each image to its 99.9th, all channels alike)"
        " or `full` (the full range of the file's type, of floats 0 to 1); images of 8 bits stay as"
        " they are",
    ),
    Key(
        "INPUT.LSJ.ENABLED",
        False,
        "large-scale jitter in the place of `INPUT.MIN_SIZE_TRAIN`: an image is resized to fit into"
        " a random multiple of a square, and cropped or padded to that square; Detectron2's"
        " `ResizeScale` and `FixedSizeCrop`, as in its new baselines",
    ),
    Key("INPUT.LSJ.IMAGE_SIZE", 1024, "the square's side in pixels"),
    Key("INPUT.LSJ.MIN_SCALE", 0.1, "the least multiple"),
    Key("INPUT.LSJ.MAX_SCALE", 2.0, "the largest multiple"),
    Key(
        "INPUT.COPY_PASTE.ENABLED",
        False,
        "pastes objects of another training image, cut out along their masks, on each image"
        " ([simple copy-paste](https://arxiv.org/abs/2012.07177)); the masks and boxes of what they"
        " hide shrink. Best with `INPUT.LSJ`. For models with masks",
    ),
    Key("INPUT.COPY_PASTE.PROB", 1.0, "the share of images that get objects"),
    Key(
        "INPUT.COPY_PASTE.MAX_OBJECTS",
        100,
        "at most so many, from one on, each number up to all of the other image as likely",
    ),
    Key(
        "INPUT.COPY_PASTE.MIN_VISIBLE",
        0.1,
        "an object of which a smaller share stays visible is none any more; `0`: only one that is"
        " hidden whole",
    ),
    Key("DATALOADER.PERSISTENT_WORKERS", False, "keeps worker processes between epochs"),
    Key("DATALOADER.PIN_MEMORY", False, "batches in pinned memory, from which a GPU copies faster"),
    Key(
        "DATALOADER.PREFETCH_FACTOR",
        0,
        "batches that each worker prepares ahead; `0`: torch's own number, 2",
    ),
    Key(
        "DATALOADER.ON_ERROR",
        "raise",
        "a training image that cannot be read: `raise` (an error that names it) or `skip` (another"
        " one in its place, drawn from the seed; `OUTPUT_DIR`/skipped.json lists and counts them)",
    ),
    Key(
        "DATASETS.OWN.TRAIN_JSON",
        "",
        "your own data in COCO's format, as the datasets `own_train` and `own_val`: the training"
        " annotations. In a file, paths of `DATASETS.OWN` are relative to that file (all others are"
        " relative to the current folder, as on a command line)",
    ),
    Key("DATASETS.OWN.TRAIN_IMAGES", "", "the folder of the training images"),
    Key("DATASETS.OWN.VAL_JSON", "", "the annotations to evaluate on"),
    Key("DATASETS.OWN.VAL_IMAGES", "", "the folder of the images to evaluate on"),
    Key(
        "DATASETS.CLASSES.NAMES",
        [],
        "the names of the model's classes in the order of its outputs. A run fills them in from its"
        " training data, and its config.yaml and checkpoints keep them; the data of an evaluation"
        " is compared with them",
    ),
    Key("DATASETS.CLASSES.IDS", [], "their category ids in the training data"),
    Key(
        "DATASETS.KEYPOINTS.NAMES",
        [],
        "the names of the model's keypoints in the order of its outputs, likewise filled in",
    ),
    Key("DATASETS.KEYPOINTS.FLIP_MAP", [], "pairs of them that a horizontal flip swaps"),
    Key("DATASETS.KEYPOINTS.SKELETON", [], "pairs of them that are joined by a line"),
    Key(
        "DATASETS.OUTSIDE_FILES",
        False,
        "whether a dataset's JSON may name files outside of its image folder (absolute, or with"
        " `..`)",
    ),
    Key(
        "DATASETS.CHECK",
        "auto",
        "how thoroughly data is checked before training: `full` (decode every image), `headers`"
        " (existence and size), `annotations` (the JSON alone), `off`; `auto`: by the number of"
        " images",
    ),
]
# Keys that Detectron2's samplers read, but that its released defaults lack
_DETECTRON2_KEYS = {
    "DATASETS.TRAIN_REPEAT_FACTOR": [],
    "DATALOADER.RANDOM_SUBSET_RATIO": 1.0,
}

_PAGE = """\
# Config keys

What this plugin adds to Detectron2's keys, and what it reads of `MODEL.FPN`. With the defaults a
zoo config builds the model that Detectron2 builds.

<!-- Written by `python -m fpn_plugin.config > docs/config.md`; edit fpn_plugin/config instead. -->

| key | default | meaning |
|---|---|---|
"""


def add_fpn_config(cfg: CfgNode) -> None:
    """Add the keys of this plugin to `cfg`, in place."""
    settings.add_pyramid_keys(cfg.MODEL.FPN)
    for key in _KEYS:
        _add(cfg, key.name, key.default)
    for name, default in _DETECTRON2_KEYS.items():
        section, _, leaf = name.rpartition(".")
        if leaf not in cfg[section]:
            _add(cfg, name, default)
    for name in GONE:  # for yacs itself, which then ignores them in the config.yaml of an old run
        vars(cfg)[CfgNode.DEPRECATED_KEYS].add(name)


def _add(cfg: CfgNode, name: str, default: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        cfg = cfg.setdefault(section, CfgNode())
    if isinstance(default, dict):
        cfg[leaf] = CfgNode(default, new_allowed=True)
    else:
        cfg[leaf] = list(default) if isinstance(default, list) else default


@functools.lru_cache(maxsize=1)
def plugin_keys() -> tuple[str, ...]:
    """The names of all keys that a config has after :func:`add_fpn_config`, with dots."""
    pyramid = (f"{settings.SECTION}.{key}" for key in settings.pyramid_keys())
    return (*pyramid, *(key.name for key in _KEYS))


def documented_keys() -> Iterator[Key]:
    """All keys of the page, those of the pyramid's settings first."""
    detectron2 = get_cfg().MODEL.FPN
    for each in fields(settings.PyramidSettings):
        name, facts = each.name.upper(), each.metadata
        meaning, registry = facts["doc"], facts["registry"]
        if registry is not None and each.name != "topology":
            names = ", ".join(f"`{choice}`" for choice in registry.names() if choice)
            meaning = f"{meaning}: {names}"
        is_theirs = name in detectron2
        meaning = f"{meaning} (Detectron2's key)" if is_theirs else meaning
        default = detectron2[name] if is_theirs else facts["key_default"]
        yield Key(f"{settings.SECTION}.{name}", default, meaning)
    yield from _KEYS


def page() -> str:
    """The page of keys, docs/config.md."""
    rows = [
        f"| `{key.name}` | `{_shown(key.default)}` | {key.meaning.replace('|', chr(92) + '|')} |\n"
        for key in documented_keys()
    ]
    return _PAGE + "".join(rows)


def _shown(default: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(default, str):
        return default or '""'
    return str(default).replace("'", "")
