"""What a Python config says, in the keys of a YAML config, so that every tool takes both.

The keys are read from the built model where it knows (maps that its heads read, classes, pixels),
else from the config. A key that nothing says stays at its default.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from typing import Any, Iterable, Mapping, Sequence

from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.modeling import Backbone
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from fpn_plugin.bottom_up.timm import TimmBackbone
from fpn_plugin.bottom_up.torchvision import TorchvisionBackbone
from fpn_plugin.checkpoint.run_folder import CONFIG, flatten, is_python_record, recorded_config
from fpn_plugin.config import add_fpn_config
from fpn_plugin.config.defaults import PYRAMID_BUILDER
from fpn_plugin.config.files import find_config_file, merge_overrides
from fpn_plugin.config.resolve import choose_device, load_config
from fpn_plugin.config.settings import pyramid_keys, settings_of_python
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.modeling.python_config import (
    TARGET,
    TOOLS_PARTS,
    attach,
    build_part,
    dataset_names,
    is_python_config,
    pretrained_networks,
    read_python_config,
)

_FROM_CONFIG = {
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "MODEL.CHANNELS_LAST": "train.channels_last",
    "MODEL.COMPILE": "train.compile",
    "MODEL.FAST_ROI_ALIGN": "train.fast_roi_align",
    "TEST.FOLD_NORMS": "train.fold_norms",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.PRECISION": "train.amp.precision",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.MAX_LOSS_RATIO": "train.max_loss_ratio",
    "SOLVER.ACCUMULATE": "train.accumulate",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SEED": "train.seed",
    "OUTPUT_DIR": "train.output_dir",
    "INPUT.FORMAT": "dataloader.test.mapper.image_format",
    "INPUT.DEEP_IMAGES": "dataloader.test.mapper.deep_images",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATASETS.CLASSES.NAMES": "train.classes.names",
    "DATASETS.CLASSES.IDS": "train.classes.ids",
}
_FROM_MODEL = {
    "MODEL.MASK_ON": "roi_heads.mask_on",
    "MODEL.KEYPOINT_ON": "roi_heads.keypoint_on",
    "MODEL.ROI_HEADS.NUM_CLASSES": "roi_heads.num_classes",
    "MODEL.ROI_HEADS.IN_FEATURES": "roi_heads.in_features",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "roi_heads.box_predictor.test_score_thresh",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "roi_heads.box_predictor.test_nms_thresh",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "roi_heads.keypoint_head.num_keypoints",
    "MODEL.RPN.IN_FEATURES": "proposal_generator.in_features",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": "sem_seg_head.in_features",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "sem_seg_head.predictor.out_channels",
    "TEST.DETECTIONS_PER_IMAGE": "roi_heads.box_predictor.test_topk_per_image",
}
_FROM_DENSE_MODEL = {
    "NUM_CLASSES": "num_classes",
    "IN_FEATURES": "head_in_features",
    "SCORE_THRESH_TEST": "test_score_thresh",
    "NMS_THRESH_TEST": "test_nms_thresh",
    "TOPK_CANDIDATES_TEST": "test_topk_candidates",
}
_DENSE = ("RETINANET", "FCOS")
# what of a Python config changes no numbers, as OUTER_KEYS of a YAML config, and the seed; each
# stands for all below it
PYTHON_OUTER_KEYS = (
    *("train.seed", "train.output_dir", "train.device", "train.eval_period", "train.log_period"),
    *("train.checkpointer", "train.classes", "train.ddp", "train.imports"),
    *("dataloader.evaluator", "dataloader.train.num_workers", "dataloader.test.num_workers"),
)
# Detectron2's networks, as the builders in MODEL.BOTTOM_UP.NAME call them
_NETWORKS = {
    **{"ResNet": "resnet", "RegNet": "regnet", "SwinTransformer": "swin"},
    **{"MViT": "mvit", "ViT": "vit"},
}


def load_model_config(
    path: str, opts: Sequence[str] = (), keys: Sequence[str] = (), **flags: Any
) -> CfgNode:
    """The config of a model, of a YAML or a Python file; resolved, not frozen.

    A Python config is run. What it says stands in YAML's keys, and its model is built from it.

    Args:
        opts: the user's overrides: `KEY VALUE` pairs, for a Python config `path.key=value`.
        keys: `KEY VALUE` pairs that a tool sets on top.
        flags: further arguments that :func:`fpn_plugin.config.load_config` takes.

    Raises:
        FileNotFoundError, KeyError, ValueError: as :func:`fpn_plugin.config.load_config` and
            :func:`read_python_config` raise them.
    """
    path = find_config_file(path) if path else path
    if not is_python_config(path):
        return load_config(argparse.Namespace(config_file=path, opts=[*opts, *keys], **flags))
    cfg = describe(read_python_config(path, opts, TOOLS_PARTS))
    merge_overrides(cfg, list(keys))
    choose_device(cfg)
    return cfg


def describe(python: DictConfig) -> CfgNode:
    """A Python config in YAML's keys; its model is built from it wherever one is built.

    Raises:
        ValueError: what building the model raises.
    """
    cfg = get_cfg()
    add_fpn_config(cfg)
    model = build_part(python, "model", network_weights=False)
    for key, value in {**_config_keys(python), **_model_keys(model, python)}.items():
        section, _, name = key.rpartition(".")
        node: Any = cfg
        for part in filter(None, section.split(".")):
            node = node[part]
        node[name] = value
    attach(cfg, python)
    return cfg


def _config_keys(python: DictConfig) -> dict[str, Any]:
    keys = {key: _plain(OmegaConf.select(python, place)) for key, place in _FROM_CONFIG.items()}
    keys = {key: value for key, value in keys.items() if value is not None}
    keys["MODEL.BOTTOM_UP.PIXELS"] = "config"
    network = next(pretrained_networks(python.model), None)
    keys["MODEL.BOTTOM_UP.WEIGHTS"] = network.get("weights", "") if network is not None else ""
    for split in ("train", "test"):
        keys[f"DATASETS.{split.upper()}"] = tuple(dataset_names(python, split))
    places = ("model.roi_heads.box_predictor.test_topk_per_image", "model.max_detections_per_image")
    limits = [_plain(OmegaConf.select(python, place)) for place in places]
    keys["TEST.DETECTIONS_PER_IMAGE"] = next((n for n in limits if n is not None), 100)
    return {**keys, **_resize(python)}


def run_keys(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run's config, full and with dots; what it wrote down of a Python config has
    those of YAML configs beside its own, as far as they follow without running it.

    Args:
        recorded: the run's config.yaml.
    """
    if not is_python_record(recorded):
        return flatten(recorded)
    python = OmegaConf.create(dict(recorded), flags={"allow_objects": True})
    keys = json.loads(json.dumps(_config_keys(python)))  # tuples become lists, as YAML has them
    if settings := settings_of_python(recorded):
        keys |= {f"MODEL.FPN.{key}": _plain(x) for key, x in settings.as_keys().items()}
    return {**keys, **flatten(recorded)}


@functools.lru_cache(maxsize=None)
def shared_keys() -> frozenset[str]:
    """The keys that :func:`run_keys` gives for runs of both kinds of configs."""
    data = ("DATASETS.TRAIN", "DATASETS.TEST", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")
    pyramid = [f"MODEL.FPN.{key}" for key in pyramid_keys()]
    return frozenset((*_FROM_CONFIG, *data, *pyramid))


def keys_within(keys: Iterable[str], sections: Sequence[str]) -> list[str]:
    """The keys that are one of the sections, or below it."""
    return [key for key in keys if any(f"{key}.".startswith(f"{each}.") for each in sections)]


def changed_values(
    recorded: Mapping[str, Any],
    python: DictConfig,
    parts: Sequence[str],
    ignore: Sequence[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """The keys in which a run of a Python config differs from one, with both values.

    Args:
        recorded: what the run wrote down.
        parts: those that are compared.
        ignore: keys that are not, and all below them.
    """
    with tempfile.TemporaryDirectory() as folder:  # as a run writes it
        LazyConfig.save(python, os.path.join(folder, CONFIG))
        current = recorded_config(folder)
    before, now = ({part: config.get(part, {}) for part in parts} for config in (recorded, current))
    old, new = flatten(before), flatten(now)
    both = {**old, **new}
    ignored = set(keys_within(both, ignore))
    changes = {key: (old.get(key), new.get(key)) for key in both if key not in ignored}
    return {key: values for key, values in changes.items() if values[0] != values[1]}


def _resize(python: DictConfig) -> dict[str, Any]:
    """The size that an image is shown at in an evaluation: 0 for its own."""
    steps = OmegaConf.select(python, "dataloader.test.mapper.augmentations") or []
    for step in steps:
        target = step.get(TARGET) if isinstance(step, DictConfig) else type(step)
        if str(getattr(target, "__qualname__", target)).endswith("ResizeShortestEdge"):
            read = step.get if isinstance(step, DictConfig) else vars(step).get
            side = _plain(read("short_edge_length"))
            longest = _plain(read("max_size"))
            side = min(side) if isinstance(side, (list, tuple)) else side
            return {
                "INPUT.MIN_SIZE_TEST": int(side),
                "INPUT.MAX_SIZE_TEST": int(min(longest or 1e9, 1e9)),
            }
    return {"INPUT.MIN_SIZE_TEST": 0}


def _model_keys(model: nn.Module, python: DictConfig) -> dict[str, Any]:
    name, backbone = type(model).__name__, getattr(model, "backbone", None)
    keys: dict[str, Any] = {"MODEL.META_ARCHITECTURE": name}
    places = dict(_FROM_MODEL)
    if name.upper() in _DENSE:
        section = f"MODEL.{name.upper()}"
        places = {f"{section}.{key}": place for key, place in _FROM_DENSE_MODEL.items()}
        places["TEST.DETECTIONS_PER_IMAGE"] = "max_detections_per_image"
    found = {key: _plain(_attribute(model, place)) for key, place in places.items()}
    keys |= {key: value for key, value in found.items() if value is not None}
    for key, part in (("PROPOSAL_GENERATOR", "proposal_generator"), ("ROI_HEADS", "roi_heads")):
        if isinstance(getattr(model, part, None), nn.Module):
            keys[f"MODEL.{key}.NAME"] = type(getattr(model, part)).__name__
    for key in ("pixel_mean", "pixel_std"):
        if hasattr(model, key):  # float32 has seven digits
            values = getattr(model, key).flatten().tolist()
            keys[f"MODEL.{key.upper()}"] = [float(f"{value:.6g}") for value in values]
    if isinstance(getattr(model, "input_format", None), str):
        # Detectron2's mapper has no default, and a model's is for pictures alone
        keys.setdefault("INPUT.FORMAT", model.input_format)
    return {**keys, **_backbone_keys(backbone, python)}


def _attribute(model: Any, place: str) -> Any:
    """The value of a dotted path; of a cascade's predictors the last one's; None without it."""
    for part in place.split("."):
        model = model[-1] if isinstance(model, nn.ModuleList) and len(model) else model
        model = getattr(model, part, None)
    return model


def _backbone_keys(backbone: Any, python: DictConfig) -> dict[str, Any]:
    if not isinstance(backbone, PyramidBackbone):
        return {"MODEL.BACKBONE.NAME": type(backbone).__name__}
    keys = {f"MODEL.FPN.{key}": _plain(x) for key, x in backbone.settings.as_keys().items()}
    keys["MODEL.BACKBONE.NAME"] = PYRAMID_BUILDER
    keys["MODEL.FPN.RECOMPUTE"] = backbone.recompute
    keys["MODEL.BOTTOM_UP.NAME"] = _network_name(backbone.bottom_up, python)
    return keys


def _network_name(network: Backbone, python: DictConfig) -> str:
    model = OmegaConf.select(python, "model.backbone.bottom_up.model")
    for kind, library in ((TimmBackbone, "timm"), (TorchvisionBackbone, "torchvision")):
        if isinstance(network, kind) and isinstance(model, str):
            return f"{library}/{model}"
    name = type(network).__name__
    return f"build_{_NETWORKS[name]}_backbone" if name in _NETWORKS else name


def _plain(value: Any) -> Any:
    """A value without OmegaConf's containers."""
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
