"""Detectron2's Python configs (LazyConfig): reading them, building from them, and parts for them.

A Python config is code, which is run when it is read. The config.yaml in the folder of its run
names code too (`_target_`), and such a file may come from a stranger: it is read as plain data, and
only those targets are called that :func:`require_trusted` knows.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any, Iterator, Mapping, Sequence

import torch
import yaml
from detectron2.config import CfgNode, LazyCall, LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import Backbone
from detectron2.modeling import build_backbone as build_detectron2_backbone
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from fpn_plugin import plugins
from fpn_plugin.bottom_up.timm import TimmBackbone
from fpn_plugin.checkpoint.load import load_weights
from fpn_plugin.config.files import find_config_file
from fpn_plugin.data.mapper import Mapper
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.yaml_files import read_yaml

logger = logging.getLogger(__name__)

TARGET, IMPORTS = "_target_", "train.imports"
PARTS = ("model", "optimizer", "lr_multiplier", "dataloader", "train")
# what the tools beside the trainer build, from a config.yaml that names code
TOOLS_PARTS = ("model", "optimizer", "dataloader.test.mapper")
_SUFFIXES = (".yaml", ".yml")
# as a class, and by the names that a dumped config may have
_DETECTRON2_MAPPER = (
    DatasetMapper,
    "detectron2.data.DatasetMapper",
    "detectron2.data.dataset_mapper.DatasetMapper",
)
# Modules that only build models, loaders, optimizers and evaluators. What a name leads to must be
# defined in one of them: `torch.nn.os.system` is not.
_TRUSTED_MODULES = (
    *("detectron2.modeling.", "detectron2.layers.", "detectron2.data.", "detectron2.solver."),
    *("detectron2.evaluation.", "detectron2.structures.", "fvcore.common.param_scheduler."),
    *("torch.nn.", "torch.optim."),
)
_OWN = "fpn_plugin."
_ATTACHED = "_fpn_plugin_python_config"


def put_pyramid(model: DictConfig, **settings: Any) -> None:
    """Replace the FPN in one of Detectron2's Python configs by a pyramid on the same network.

    Args:
        model: a config's `model`, whose `backbone` has a `bottom_up`; changed in place.
        settings: of :class:`PyramidBackbone`.

    Raises:
        ValueError: if there is no such network.

    Example:
        >>> model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
        >>> put_pyramid(model, topology="bifpn", repeats=3, fuse_type="fast_normalized")
    """
    network = OmegaConf.select(model, "backbone.bottom_up")
    if network is None:
        raise ValueError(
            "put_pyramid: the model has no backbone.bottom_up, the network that the pyramid goes"
            " on: set model.backbone = LazyCall(PyramidBackbone)(bottom_up=…, …) instead"
        )
    model.backbone = LazyCall(PyramidBackbone)(
        bottom_up=network,
        in_features="${.bottom_up.out_features}",
        **{"out_channels": 256, **settings},
    )


def pretrained_timm(
    model: str, weights: str = "", out_features: Sequence[str] = (), **settings: Any
) -> TimmBackbone:
    """A timm network with the weights of a file, for a config's `bottom_up`.

    Args:
        model: timm's name for it.
        weights: the file; "" starts from the initialisation.
        out_features: and `settings`: of :class:`TimmBackbone`.
    """
    backbone = TimmBackbone(model, list(out_features), **settings)
    if weights:
        load_weights(backbone.model, weights, "bottom_up.weights")
    return backbone


_OWN_FUNCTIONS = (pretrained_timm,)


def is_python_config(path: str) -> bool:
    """Whether a file is a Python config, or what a run wrote down of one."""
    if path.endswith(".py"):
        return True
    if not path.endswith(_SUFFIXES) or not os.path.isfile(path):
        return False
    with PathManager.open(path, "r") as stream:
        try:
            root = yaml.compose(stream, yaml.SafeLoader)
        except (ValueError, RecursionError, yaml.YAMLError):
            return False  # whoever reads it says what is wrong
    return TARGET in _keys(_keys(root).get("model"))


def _keys(node: yaml.Node | None) -> dict[str, yaml.Node]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return {str(key.value): value for key, value in pairs}


def read_python_config(
    path: str, overrides: Sequence[str] = (), parts: Sequence[str] = PARTS
) -> DictConfig:
    """A Python config, which is run, or what a run wrote down of one; with overrides.

    After :func:`fpn_plugin.plugins.trust`, what a run wrote down may name any code. What is listed
    in `train.imports` is imported, as `IMPORTS` of a YAML config is.

    Args:
        overrides: `path.key=value` each.
        parts: what will be built of it: see :func:`require_trusted`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if the config lacks one of its parts, if a YAML file has a key
            twice or names other code, or for a bad override.
    """
    path = find_config_file(path)
    is_code = not path.endswith(_SUFFIXES)
    if is_code or plugins.is_trusted():
        cfg = LazyConfig.load(path)
    else:
        content = read_yaml(path, objects=True)
        cfg = OmegaConf.create(content, flags={"allow_objects": True})
    if names := list(OmegaConf.select(cfg, IMPORTS) or ()):
        if is_code:
            plugins.load(names, f"{path}: {IMPORTS}")
        cfg.train.imports = plugins.require(names, f"{path} ({IMPORTS})")
    for part in () if is_code or plugins.is_trusted() else parts:
        require_trusted(cfg, part, path)
    _replace_mappers(cfg)
    apply_overrides(cfg, overrides)
    if missing := [part for part in PARTS if part not in cfg]:
        raise ValueError(f"{path}: the config lacks {', '.join(missing)}")
    return cfg


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Enter `path.key=value` texts into a config, in place.

    Raises:
        ValueError: naming the text, if it is none.
    """
    for text in overrides:
        if text.startswith("--"):
            raise ValueError(f"{text} stands after an override: flags go first")
        if "=" not in text:
            raise ValueError(
                f"{text!r}: a Python config takes overrides as path.key=value, such as"
                " model.backbone.topology=bifpn (KEY VALUE is for YAML configs)"
            )
        try:
            LazyConfig.apply_overrides(cfg, [text])
        except Exception as error:  # of the grammar, of OmegaConf, or a path through a value
            raise ValueError(f"override {text!r}: {str(error).partition(chr(10))[0]}") from error


def is_override(text: str) -> bool:
    """Whether a text is `path.key=value`, and no part of a `KEY VALUE` pair."""
    return re.match(r"[~+]*[\w.\[\]]+=", text) is not None


def require_trusted(cfg: DictConfig, part: str, path: str) -> None:
    """Refuse a part of a YAML file that would call code beside what builds detectors.

    Raises:
        ValueError: naming the file, the key and the name.
    """
    node = OmegaConf.select(cfg, part)
    if not isinstance(node, (DictConfig, ListConfig)):
        return
    try:
        content = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).partition(chr(10))[0]}") from error
    for key, target in _targets(content, part):
        if not isinstance(target, str) or not _is_trusted(target):
            raise ValueError(
                f"{path}: {key}: {target!r} is other code than that of Detectron2, torch and this"
                " plugin, and a YAML file must not say what is run: give the Python config itself"
                " (FILE.py), --import MODULE for what the module defines, or --trust-imports if"
                " you trust the whole file"
            )


def _targets(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """What is called, by the keys that say so."""
    if isinstance(value, Mapping):
        if TARGET in value:
            yield f"{key}.{TARGET}", value[TARGET]
        for name, entry in value.items():
            yield from _targets(entry, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from _targets(entry, f"{key}[{i}]")


def _is_trusted(target: str) -> bool:
    named = tuple(f"{module}." for module in plugins.named_modules())
    roots = {module.partition(".")[0] for module in (*_TRUSTED_MODULES, _OWN, *named)}
    if target.partition(".")[0] not in roots:
        return False  # and nothing of it is imported
    try:
        found = locate(target)
    except Exception:  # whatever an import raises
        return False
    module = f"{getattr(found, '__module__', '')}."
    if module.startswith(_OWN):
        return isinstance(found, type) or found in _OWN_FUNCTIONS
    return callable(found) and module.startswith((*_TRUSTED_MODULES, *named))


def _replace_mappers(cfg: DictConfig) -> None:
    """Let loaders have our mapper in the place of Detectron2's, of which it is a subclass."""
    for split in ("train", "test"):
        mapper = OmegaConf.select(cfg, f"dataloader.{split}.mapper")
        while isinstance(mapper, DictConfig):
            if mapper.get(TARGET) in _DETECTRON2_MAPPER:
                mapper[TARGET] = f"{Mapper.__module__}.{Mapper.__qualname__}"
            mapper = mapper.get("mapper")  # that of a CopyPasteMapper


def device_of(cfg: DictConfig) -> str:
    """`train.device`; the CPU in place of its default, cuda, where there is no GPU."""
    is_missing = cfg.train.device == "cuda" and not torch.cuda.is_available()
    return "cpu" if is_missing else str(cfg.train.device)


def dataset_names(cfg: DictConfig, split: str) -> list[str]:
    """The registered datasets of a split: train or test."""
    dataset = OmegaConf.select(cfg, f"dataloader.{split}.dataset")
    if not isinstance(dataset, DictConfig):
        return []
    names = dataset.get("names") or dataset.get("dataset_name") or []  # of load_coco_json
    return [names] if isinstance(names, str) else list(names)


# A config in YAML's keys, which a Python config is attached to


def attach(cfg: CfgNode, python: DictConfig) -> None:
    """Let a model be built from a Python config, wherever one is built from `cfg`.

    It stands beside the keys: copies of `cfg` have it, its dump does not.
    """
    vars(cfg)[_ATTACHED] = python


def attached(cfg: CfgNode) -> DictConfig | None:
    """The Python config that :func:`attach` has put beside a config; None without one."""
    python: DictConfig | None = vars(cfg).get(_ATTACHED)
    return python


def build_part(cfg: DictConfig, key: str, network_weights: bool = True) -> Any:
    """What a part of a Python config stands for.

    Args:
        key: of the part, with dots.
        network_weights: whether the network underneath reads its file of weights.

    Raises:
        ValueError: naming the part, for an argument that its code does not take.
    """
    node = cfg
    if not network_weights:
        node = cfg.copy()
        for network in pretrained_networks(node):
            network.weights = ""
    try:
        return instantiate(OmegaConf.select(node, key))
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{key}: {error}") from error


def pretrained_networks(node: Any) -> Iterator[DictConfig]:
    """The parts of a Python config that are networks with a file of weights."""
    names = {f"{f.__module__}.{f.__qualname__}" for f in _OWN_FUNCTIONS}
    names.add("fpn_plugin.engine.lazy.pretrained_timm")  # in configs of before
    if isinstance(node, DictConfig):
        if node.get(TARGET) in (*_OWN_FUNCTIONS, *names):
            yield node
        values = [node._get_node(name) for name in node]
    else:
        values = list(node._iter_ex(resolve=False)) if isinstance(node, ListConfig) else []
    for value in values:
        yield from pretrained_networks(value)


def build_backbone(cfg: CfgNode) -> nn.Module:
    """The backbone alone, as the config or the attached Python config says."""
    python = attached(cfg)
    if python is None:
        backbone: Backbone = build_detectron2_backbone(cfg)
        return backbone
    if OmegaConf.select(python, f"model.backbone.{TARGET}") is not None:
        return build_part(python, "model.backbone", bool(cfg.MODEL.BOTTOM_UP.WEIGHTS))
    return build_part(python, "model", bool(cfg.MODEL.BOTTOM_UP.WEIGHTS)).backbone


def test_mapper(cfg: CfgNode) -> Mapper:
    """The mapper of an evaluation: from a record to the model's input."""
    python = attached(cfg)
    mapper = build_part(python, "dataloader.test.mapper") if python is not None else None
    return mapper if isinstance(mapper, Mapper) else Mapper(cfg, is_train=False)
