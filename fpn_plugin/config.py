"""Every config key that this plugin adds to Detectron2's, with its default, and the checks on their
values.

The defaults reproduce Detectron2: a zoo config whose `MODEL.BACKBONE.NAME` is
`build_pyramid_backbone` builds the model that it built before, parameter for parameter.
Detectron2's own `MODEL.FPN.IN_FEATURES`, `OUT_CHANNELS`, `NORM` and `FUSE_TYPE` keep their meaning;
`FUSE_TYPE` takes every fusion of the registry.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from fpn_plugin.registry import unknown_name

_MAX_CHANNELS = 8192  # one 3x3 convolution of so many takes 2.4 GB
# Detectron2's own choices: build_retinanet_resnet_fpn_backbone, and its FCOS config
_EXTRA_LEVELS = {"RetinaNet": "conv_c5", "FCOS": "conv_p5"}


def add_fpn_config(cfg: CfgNode) -> None:
    """Add the keys of this plugin to `cfg`, in place."""
    _add_pyramid_keys(cfg)
    _add_bottom_up_keys(cfg)
    _add_head_keys(cfg)
    _add_training_keys(cfg)
    _add_data_keys(cfg)
    _add_speed_keys(cfg)
    _add_visual_keys(cfg)


def _add_pyramid_keys(cfg: CfgNode) -> None:
    fpn = cfg.MODEL.FPN
    # How maps of different levels are joined: a name of the TOPOLOGIES registry, or several joined
    # by "+", each on the maps that the one before gives ("fpn+bfp")
    fpn.TOPOLOGY = "fpn"
    # How often the topology runs, each time on the maps that the last one gave
    fpn.REPEATS = 1
    # How many coarser levels the topologies that fuse them (bifpn, nas_fpn, ...) make from the top
    # bottom-up map; -1: what it takes to have five
    fpn.INNER_LEVELS = -1
    # Levels coarser than the last of these, made at the end: none; maxpool (one: the top output,
    # subsampled); conv_c5 or conv_p5 (two: 3x3 stride 2 from the top bottom-up or output map).
    # auto: none for an inline GRAPH and for the topologies that make levels of their own, else as
    # Detectron2 does it, conv_c5 for RetinaNet, conv_p5 for FCOS and maxpool for everything else
    fpn.EXTRA_LEVELS = "auto"
    # How a coarser map is brought to a finer level: a name of the UPSAMPLE registry
    fpn.UPSAMPLE = "nearest"
    # How a finer map is brought to a coarser level: a name of the DOWNSAMPLE registry
    fpn.DOWNSAMPLE = "maxpool"
    # The block on each bottom-up map, and the block of each output: names of the BLOCKS registry
    fpn.LATERAL = "conv1x1"
    fpn.BLOCK = "conv3x3"
    # The activation of the blocks: a name of the ACTIVATIONS registry, or "" for none
    fpn.ACTIVATION = ""
    # Of all norms in the pyramid; 0 is the layer's own (EfficientDet: 0.001 and 0.01)
    fpn.NORM_EPS = 0.0
    fpn.NORM_MOMENTUM = 0.0
    # Start from MODEL.WEIGHTS, a checkpoint with another pyramid or width: its pyramid is built,
    # too, and on every level the new one comes in by a learned weight from 0: the model begins
    # by computing what the checkpoint computed. The structure follows from the config: leave it on
    # to resume and to evaluate
    fpn.WARM_START = False
    # What the checkpoint's pyramid is, by the names of the keys here (TOPOLOGY none: it has none).
    # Filled from the config.yaml beside the checkpoint, or from the names in it where it is
    # Detectron2's FPN
    fpn.WARM_START_FROM = CfgNode(new_allowed=True)
    # A pyramid of one's own: a list of nodes ({name, level, inputs, fuse, block, output}) instead
    # of TOPOLOGY. LATERAL, BLOCK and REPEATS do not apply to it: a node names its own block
    fpn.GRAPH = []


def _add_bottom_up_keys(cfg: CfgNode) -> None:
    cfg.MODEL.BOTTOM_UP = CfgNode()
    # The network underneath: a builder of Detectron2's BACKBONE_REGISTRY (build_resnet_backbone,
    # build_regnet_backbone, build_swin_backbone, build_mvit_backbone, build_vit_backbone, ...),
    # timm/<model> or torchvision/<model>
    cfg.MODEL.BOTTOM_UP.NAME = "build_resnet_backbone"
    # Weights for that network alone: a file, a URL or detectron2://, or "timm" or "torchvision" for
    # the ones that those libraries publish; "" starts from its initialisation (or MODEL.WEIGHTS)
    cfg.MODEL.BOTTOM_UP.WEIGHTS = ""
    # What the network's norms become, where that is possible: FrozenBN, BN, SyncBN, GN; "" leaves
    # them as they are
    cfg.MODEL.BOTTOM_UP.NORM = ""
    # More arguments for the network, by its library's names: {drop_path_rate: 0.1}. For timm also
    # {grad_checkpointing: True}
    cfg.MODEL.BOTTOM_UP.ARGS = CfgNode(new_allowed=True)
    # auto: where MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT stand at Detectron2's defaults, they
    # become what the weights were trained with; config: they are always taken as they stand
    cfg.MODEL.BOTTOM_UP.PIXELS = "auto"


def _add_head_keys(cfg: CfgNode) -> None:
    # FCOS (arXiv:1904.01355), which Detectron2 has for its Python configs alone; the values are its
    # own. META_ARCHITECTURE: FCOS. As in all of the heads' IN_FEATURES, and ANCHOR_GENERATOR.SIZES,
    # [auto] stands for what follows from the pyramid
    cfg.MODEL.FCOS = CfgNode()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of the head, and their norm
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # A place is positive within this many strides of a box's centre
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def _add_training_keys(cfg: CfgNode) -> None:
    # Keep the weights in channels-last memory format (faster convolutions on most devices, the same
    # numbers)
    cfg.MODEL.CHANNELS_LAST = False
    # The type that SOLVER.AMP.ENABLED computes in: fp16, bf16, or auto (fp16 on CUDA, bf16 on the
    # CPU)
    cfg.SOLVER.AMP.PRECISION = "auto"
    # SGD (Detectron2's) or AdamW
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Stop when the loss exceeds so many times its usual value: the lowest median of 20 iterations
    # in a row so far, but at least 1. 0: never. A loss that is not finite always stops training
    cfg.SOLVER.MAX_LOSS_RATIO = 10000
    # The sides in pixels between the size bins by which COCO's evaluator gives AP as well, such as
    # [8, 16, 32, 64, 128, 256]; []: none
    cfg.TEST.SIZE_BINS = []


def _add_data_keys(cfg: CfgNode) -> None:
    # Your own data in COCO's format; the names are own_train and own_val
    cfg.DATASETS.OWN = CfgNode()
    cfg.DATASETS.OWN.TRAIN_JSON = ""
    cfg.DATASETS.OWN.TRAIN_IMAGES = ""
    cfg.DATASETS.OWN.VAL_JSON = ""
    cfg.DATASETS.OWN.VAL_IMAGES = ""
    # Whether a dataset's JSON may name files outside of its image folder (absolute, or with ..)
    cfg.DATASETS.OUTSIDE_FILES = False
    # Two keys that Detectron2's samplers read but the republication's defaults lack
    if "TRAIN_REPEAT_FACTOR" not in cfg.DATASETS:
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = []
    if "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0
    # How thoroughly a dataset is checked before training: full (decode every image), headers
    # (existence and size), annotations (the JSON alone), off; auto: by the number of images
    cfg.DATASETS.CHECK = "auto"


def _add_speed_keys(cfg: CfgNode) -> None:
    # What torch.compile gets: "" (nothing), pyramid (what runs on the bottom-up maps) or backbone
    # (the network underneath too, which takes long to compile)
    cfg.MODEL.COMPILE = ""
    # On the CPU, pool boxes from the maps by torch's own gather instead of torchvision's kernel:
    # the same numbers up to rounding, several times faster
    cfg.MODEL.FAST_ROI_ALIGN = False
    # Compute nodes whose fusion has weights again in the backward pass, from their inputs, instead
    # of keeping what they computed: less memory, more time, the same gradients
    cfg.MODEL.FPN.RECOMPUTE = False
    # Evaluate a copy of the model whose batch norms are folded into the convolutions before them:
    # the same up to rounding
    cfg.TEST.FOLD_NORMS = False
    # Compute COCO's metrics by the faster-coco-eval package: the same numbers, several times faster
    cfg.TEST.FAST_COCO_EVAL = False
    # Let torch update all parameters in one kernel
    cfg.SOLVER.FUSED = False
    # Keep the loader's worker processes when it is iterated anew
    cfg.DATALOADER.PERSISTENT_WORKERS = False
    # Put batches into pinned memory, from which a GPU copies faster
    cfg.DATALOADER.PIN_MEMORY = False
    # How many batches each worker prepares ahead; 0: torch's own number, 2
    cfg.DATALOADER.PREFETCH_FACTOR = 0
    # A training image that cannot be read: raise (an error that names it) or skip (another one in
    # its place; OUTPUT_DIR/skipped.json lists and counts them)
    cfg.DATALOADER.ON_ERROR = "raise"


def _add_visual_keys(cfg: CfgNode) -> None:
    # Every so many iterations put pictures of what the detector sees in a few images of
    # DATASETS.TEST, and each node's gradient norm, into TensorBoard, and the fusions' weights
    # whenever it is written (every 20 iterations); 0: none of it
    cfg.TEST.VIS_PERIOD = 0


def extra_levels_for(cfg: CfgNode) -> str:
    """`MODEL.FPN.EXTRA_LEVELS` with "auto" worked out as Detectron2 would."""
    from fpn_plugin.pyramid.compose import stages
    from fpn_plugin.pyramid.topologies import INNER_LEVELS

    if cfg.MODEL.FPN.EXTRA_LEVELS != "auto":
        return cfg.MODEL.FPN.EXTRA_LEVELS
    first = stages(cfg.MODEL.FPN.TOPOLOGY)[0]
    if cfg.MODEL.FPN.GRAPH or first in INNER_LEVELS:
        return "none"
    extra = _EXTRA_LEVELS.get(cfg.MODEL.META_ARCHITECTURE, "maxpool")
    # the simple pyramid's own levels go beyond the one map that it reads
    return "conv_p5" if extra == "conv_c5" and first == "simple" else extra


def size_divisibility_for(cfg: CfgNode) -> int:
    """What the heads need the image's sides to be divisible by, in pixels; 0 for nothing.

    Detectron2's semantic head brings its maps to one size by doubling them.
    """
    if cfg.MODEL.META_ARCHITECTURE not in ("PanopticFPN", "SemanticSegmentor"):
        return 0
    levels = [name[1:] for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES if name[1:].isdigit()]
    return max((2 ** int(level) for level in levels), default=0)


def require_names(key: str, value: object) -> None:
    """Refuse what is no list of words.

    Raises:
        ValueError: naming the key and the value.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key}: {value!r} is no list of names")


def validate_config(cfg: CfgNode) -> None:
    """Check the keys of `MODEL.FPN` that can be checked without building anything.

    Raises:
        ValueError: (KeyError for an unknown name) naming the key, the value and the choices.
    """
    from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, norm_layer
    from fpn_plugin.pyramid.compose import EXTRA_LEVELS, stages
    from fpn_plugin.pyramid.pyramid import REGISTRIES

    fpn = cfg.MODEL.FPN
    if fpn.EXTRA_LEVELS not in ("auto", *EXTRA_LEVELS):
        raise unknown_name("MODEL.FPN.EXTRA_LEVELS", fpn.EXTRA_LEVELS, ("auto", *EXTRA_LEVELS))
    stages(fpn.TOPOLOGY)
    ACTIVATIONS.get(fpn.ACTIVATION, "MODEL.FPN.ACTIVATION")
    for key, registry in {
        "FUSE_TYPE": REGISTRIES["fuse"],
        "UPSAMPLE": REGISTRIES["up"],
        "DOWNSAMPLE": REGISTRIES["down"],
        "LATERAL": BLOCKS,
        "BLOCK": BLOCKS,
    }.items():
        registry.get(fpn[key], f"MODEL.FPN.{key}")
    if type(fpn.OUT_CHANNELS) is not int or not 1 <= fpn.OUT_CHANNELS <= _MAX_CHANNELS:
        raise ValueError(
            f"MODEL.FPN.OUT_CHANNELS: {fpn.OUT_CHANNELS!r} is not a whole number from 1 to"
            f" {_MAX_CHANNELS}"
        )
    require_names("MODEL.FPN.IN_FEATURES", fpn.IN_FEATURES)
    for key in ("NORM_EPS", "NORM_MOMENTUM"):
        if type(fpn[key]) not in (int, float) or not 0 <= fpn[key] <= 1:
            raise ValueError(f"MODEL.FPN.{key}: {fpn[key]!r} is not a number from 0 to 1")
    norm_layer(fpn.NORM, fpn.OUT_CHANNELS)
    if fpn.GRAPH and fpn.REPEATS != 1:
        raise ValueError(
            f"MODEL.FPN.REPEATS: {fpn.REPEATS} repeats a TOPOLOGY, but MODEL.FPN.GRAPH is given:"
            " write its nodes as often as they shall run"
        )
