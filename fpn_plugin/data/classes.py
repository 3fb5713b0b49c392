"""What a model's outputs mean: the names and ids of its classes, from its training data.

A run writes them into its config, `DATASETS.CLASSES`, and so into its config.yaml and checkpoints.
The data of an evaluation is matched with them by names.
"""

from __future__ import annotations

import logging
from collections import Counter
from itertools import zip_longest
from typing import Any, NamedTuple, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from fpn_plugin.checkpoint.record import read_record

__all__ = [
    "Classes",
    "adopt_classes",
    "check_test_classes",
    "compare_classes",
    "dataset_classes",
    "has_classes",
    "model_classes",
    "recorded_classes",
    "set_classes",
    "tag_model",
    "unique_names",
    "with_classes_of",
]

KEY = "DATASETS.CLASSES"
_CLASS_AGNOSTIC = ("ProposalNetwork", "SemanticSegmentor")
_TAG = "_fpn_plugin_classes"
_SHOWN = 20
_MODEL = "the model"  # the owner of the classes that a model was trained on
_RULE = (
    "the datasets in DATASETS.TRAIN and DATASETS.TEST must have the same categories in the order of"
    " their ids"
)
_TEST_RULE = (
    "a dataset to evaluate on must have the classes that the model was trained on, in the order of"
    " its ids"
)

logger = logging.getLogger(__name__)


class Classes(NamedTuple):
    """The classes of a dataset or of a model, in the order of the model's outputs.

    Attributes:
        names: of the categories, in the order of their ids.
        ids: of the categories, in the dataset that the names come from.
        owner: whose they are, for messages: a dataset's name, or the model.
        source: what says so: a file, metadata or a config key.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    owner: str
    source: str

    def __str__(self) -> str:
        more = ", …" if len(self.names) > _SHOWN else ""
        return f"{self.source} has {len(self.names)}: {', '.join(self.names[:_SHOWN])}{more}"


def has_classes(cfg: CfgNode) -> bool:
    """Whether the model of a config tells classes apart (those of `thing_classes`)."""
    return cfg.MODEL.META_ARCHITECTURE not in _CLASS_AGNOSTIC


def unique_names(ids: Sequence[Any], names: Sequence[str]) -> list[str]:
    """The names of categories, with the id added to those that several have."""
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} (id {key})"
        for key, name in zip(ids, names, strict=True)
    ]


def dataset_classes(name: str) -> Classes | None:
    """The classes of a registered dataset by its metadata, or None where that has none.

    Many datasets have them only after they were loaded.
    """
    metadata = MetadataCatalog.get(name)
    names = tuple(map(str, metadata.get("thing_classes") or ()))
    if not names:
        return None
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = {index: key for key, index in contiguous.items()}
    source = metadata.get("json_file") or f"MetadataCatalog.get({name!r}).thing_classes"
    return Classes(names, tuple(ids.get(i, i) for i in range(len(names))), name, str(source))


def model_classes(cfg: CfgNode) -> Classes | None:
    """The classes of a trained model by its config, or None where that does not know them."""
    node = cfg.DATASETS.get("CLASSES", None)  # a config without our keys has none
    if not node or not node.NAMES:
        return None
    return Classes(tuple(node.NAMES), tuple(node.IDS), _MODEL, f"{KEY}.NAMES")


def set_classes(cfg: CfgNode, classes: Classes | None) -> None:
    """Let the config say what the training data says, in place; what it said before is stale."""
    node, before = cfg.DATASETS.CLASSES, model_classes(cfg)
    names, ids = (list(classes.names), list(classes.ids)) if classes else ([], [])
    if before and list(before.names) != names:
        now = str(classes) if classes else "DATASETS.TRAIN does not name them"
        logger.warning(
            "%s: the config's classes (%s) give way to those of the training data: %s",
            *(KEY, before, now),
        )
    if (list(node.NAMES), list(node.IDS)) != (names, ids):
        node.NAMES, node.IDS = names, ids


def recorded_classes(config: Any, source: str) -> Classes | None:
    """The classes that a run has recorded, or None if it has not.

    Args:
        config: the run's, as nested dicts.
        source: where it is recorded, for messages.
    """
    node = config
    # of a YAML config, and of a Python config
    section, leaf, keys = "DATASETS", "CLASSES", ("NAMES", "IDS")
    if isinstance(config, dict) and isinstance(config.get("train"), dict):
        section, leaf, keys = "train", "classes", ("names", "ids")
    for key in (section, leaf):
        node = node.get(key) if isinstance(node, dict) else None
    names, ids = [node.get(key) if isinstance(node, dict) else None for key in keys]
    if not isinstance(names, list) or not names:
        return None
    return Classes(tuple(map(str, names)), tuple(ids or ()), _MODEL, source)


def adopt_classes(cfg: CfgNode, checkpoint: str) -> None:
    """Let the config say the classes that a checkpoint's run recorded in it, in place.

    Without such a record the config stays as it is: its own classes count, if it has any.
    """
    config = read_record(checkpoint).get("config")
    recorded, known = recorded_classes(config, f"MODEL.WEIGHTS {checkpoint}"), model_classes(cfg)
    if not recorded or (known and known.names == recorded.names):
        return
    if known:
        logger.warning("%s: not the model's: %s, but %s, which counts", KEY, known, recorded)
    cfg.DATASETS.CLASSES.NAMES, cfg.DATASETS.CLASSES.IDS = list(recorded.names), list(recorded.ids)


def compare_classes(classes: Sequence[Classes]) -> None:
    """Compare classes with the first ones, as a model knows them by their index only.

    Raises:
        ValueError: with the first difference and both lists.
    """
    for other in classes[1:]:
        first = classes[0]
        if other.names == first.names:
            continue
        pairs = enumerate(zip_longest(first.names, other.names))
        index, names = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        here, there = ("no class" if name is None else repr(name) for name in names)
        rule, advice = _RULE, ""
        if first.owner == _MODEL:
            rule = _TEST_RULE
            advice = (
                f"\nChange the categories of {other.source}, or evaluate a model that was trained"
                " on them"
            )
        raise ValueError(
            f"{rule}, but class {index} is {here} in {first.owner} and {there} in {other.owner}:"
            f"\n  {first}\n  {other}{advice}"
        )


def check_test_classes(cfg: CfgNode, dataset: str) -> None:
    """Compare the classes of a loaded dataset with those of the config's model.

    Raises:
        ValueError: with both lists.
    """
    if cfg.DATASETS.get("CHECK", "off") == "off" or not has_classes(cfg):
        return
    known, tested = model_classes(cfg), dataset_classes(dataset)
    if known and tested:
        compare_classes([known, tested])


def tag_model(model: Any, cfg: CfgNode) -> None:
    """Note on a model the classes that it is trained on, for evaluations with another config."""
    setattr(model, _TAG, model_classes(cfg))


def with_classes_of(model: Any, cfg: CfgNode) -> CfgNode:
    """A config that says the classes which :func:`tag_model` noted on a model.

    Returns:
        a copy; the config that was given if nothing is noted, or it says so already.
    """
    classes = getattr(getattr(model, "module", model), _TAG, None)  # within DDP
    if classes is None or model_classes(cfg) == classes:
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    cfg.DATASETS.CLASSES.NAMES, cfg.DATASETS.CLASSES.IDS = list(classes.names), list(classes.ids)
    if frozen:
        cfg.freeze()
    return cfg
