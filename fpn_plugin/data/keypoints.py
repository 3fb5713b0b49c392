"""What a model's keypoints mean: names, what a flip swaps and what a line joins, from its data.

COCO's JSON has the names and the skeleton at its categories. Which of them a horizontal flip swaps
follows from the names. A run writes them into its config, `DATASETS.KEYPOINTS`.
"""

from __future__ import annotations

import colorsys
import logging
import re
from itertools import zip_longest
from typing import Any, Iterable, NamedTuple, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import (
    COCO_PERSON_KEYPOINT_NAMES,
    KEYPOINT_CONNECTION_RULES,
)

from fpn_plugin.checkpoint.record import read_record

from .coco_json import Findings

__all__ = [
    "OWN_NAMES",
    "Keypoints",
    "adopt_keypoints",
    "check_keypoints",
    "dataset_keypoints",
    "fit_num_keypoints",
    "flip_pairs",
    "model_keypoints",
    "read_keypoints",
    "require_keypoints",
    "set_keypoints",
]

KEY = "DATASETS.KEYPOINTS"
COUNT_KEY = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
OWN_NAMES = ("own_train", "own_val")
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_SHOWN = 20

logger = logging.getLogger(__name__)


class Keypoints(NamedTuple):
    """The keypoints of a dataset or of a model, in the order of the model's outputs.

    Attributes:
        names: of the points.
        flips: pairs of names that a horizontal flip swaps.
        skeleton: pairs of names that a line joins in drawings.
        owner: whose they are, for messages: a dataset's name, or the model.
        source: what says so: a file, metadata or a config key.
    """

    names: tuple[str, ...]
    flips: tuple[tuple[str, str], ...]
    skeleton: tuple[tuple[str, str], ...]
    owner: str
    source: str

    def __str__(self) -> str:
        more = ", …" if len(self.names) > _SHOWN else ""
        return f"{self.source} has {len(self.names)}: {', '.join(self.names[:_SHOWN])}{more}"


def flip_pairs(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of names that differ in their side alone: `left_eye` and `right_eye`, `L-eye` and
    `R-eye`, `eyeLeft` and `eyeRight`, `leye` and `reye`, …

    Of COCO's persons it gives Detectron2's `COCO_PERSON_KEYPOINT_FLIP_MAP`.
    """
    words = [_words(name) for name in names]
    places = {part: i for i, part in reversed(list(enumerate(words)))}
    mirrored = [places.get(_mirror(part), i) for i, part in enumerate(words)]
    return tuple((names[i], names[j]) for i, j in enumerate(mirrored) if i < j)


def _mirror(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words with their sides swapped."""
    mirrored = tuple(_SIDES.get(word, word) for word in words)
    if mirrored == words and words and words[0][0] in "lr" and len(words[0]) > 1:
        return (_SIDES[words[0][0]] + words[0][1:], *words[1:])  # lshoulder
    return mirrored


def _words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, of which sides are words of their own."""
    name = re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()
    parts = re.findall(r"[^\W\d_]+|\d+", name)
    return tuple(word for part in parts for word in re.split("(left|right)", part) if word)


def read_keypoints(content: dict[str, Any], findings: Findings, owner: str) -> Keypoints | None:
    """The keypoints that a COCO JSON's categories name; faults are errors.

    Where they name none, but annotations have keypoints, the names are "keypoint_1", …

    Returns:
        None if the file has no keypoints, or faulty ones.
    """
    lists: dict[str, list[Any]] = {}
    skeletons: list[Any] = []
    categories = content.get("categories")
    for category in categories if isinstance(categories, list) else ():
        if isinstance(category, dict) and (names := category.get("keypoints")):
            label = f"category {category.get('name')!r}"
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                findings.error(f"{label}: 'keypoints' must be a list of names, but is {names!r}")
                return None
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                findings.error(f"{label}: 'keypoints' has the name {twice!r} more than once")
                return None
            lists[label] = names
            skeletons.append(category.get("skeleton") or [])
    if len(set(map(tuple, lists.values()))) > 1:
        first, *others = lists
        other = next(label for label in others if lists[label] != lists[first])
        findings.error(
            f"{first} and {other} have different keypoints, but a model has one list for all"
            f" classes: {', '.join(lists[first])}; and {', '.join(lists[other])}. Train a model for"
            " each, or give all categories the same list"
        )
        return None
    if lists:
        names = next(iter(lists.values()))
        skeleton = _skeleton(max(skeletons, key=len), names, findings)
    else:
        names, skeleton = _numbered(content), ()
    if not names:
        return None
    return Keypoints(tuple(names), flip_pairs(names), skeleton, owner, findings.source)


def _numbered(content: dict[str, Any]) -> list[str]:
    """Names for the keypoints of the first annotation that has some."""
    annotations = content.get("annotations")
    for annotation in annotations if isinstance(annotations, list) else ():
        points = annotation.get("keypoints") if isinstance(annotation, dict) else None
        if isinstance(points, list) and points:
            return [f"keypoint_{i + 1}" for i in range(len(points) // 3)]
    return []


def _skeleton(pairs: Any, names: Sequence[str], findings: Findings) -> tuple[tuple[str, str], ...]:
    """Pairs of names for COCO's pairs of numbers, which count from 1, or from 0 if one is 0."""
    sound = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
        for pair in pairs
    )
    first = 0 if sound and any(0 in pair for pair in pairs) else 1
    if not sound or not all(first <= i < first + len(names) for pair in pairs for i in pair):
        findings.warn(
            "skeleton that is no list of pairs of keypoints' numbers (not drawn)",
            1,
            lambda i: str(pairs)[:100],
        )
        return ()
    return tuple((names[i - first], names[j - first]) for i, j in pairs)


def dataset_keypoints(name: str) -> Keypoints | None:
    """The keypoints of a registered dataset by its metadata, or None where that has none."""
    metadata = MetadataCatalog.get(name)
    names = tuple(map(str, metadata.get("keypoint_names") or ()))
    if not names:
        return None
    rules = metadata.get("keypoint_connection_rules") or ()
    flips = metadata.get("keypoint_flip_map")
    flips = flip_pairs(names) if flips is None else _pairs(flips)
    source = f"MetadataCatalog.get({name!r}).keypoint_names"
    return Keypoints(names, flips, _pairs(rules), name, source)


def _pairs(values: Iterable[Sequence[Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(value[0]), str(value[1])) for value in values)


def model_keypoints(cfg: CfgNode) -> Keypoints | None:
    """The keypoints of a trained model by its config, or None where that does not know them."""
    node = cfg.DATASETS.get("KEYPOINTS", None)  # a config without our keys has none
    if not node or not node.NAMES:
        return None
    pairs = _pairs(node.FLIP_MAP), _pairs(node.SKELETON)
    return Keypoints(tuple(node.NAMES), *pairs, "the model", f"{KEY}.NAMES")


def adopt_keypoints(cfg: CfgNode, checkpoint: str) -> None:
    """Let the config say the keypoints that a checkpoint's run recorded in it, in place."""
    recorded = read_record(checkpoint).get("config", {}).get("DATASETS", {}).get("KEYPOINTS", {})
    if recorded.get("NAMES"):
        for key in ("NAMES", "FLIP_MAP", "SKELETON"):
            cfg.DATASETS.KEYPOINTS[key] = [
                value if isinstance(value, str) else list(value) for value in recorded.get(key, ())
            ]


def set_keypoints(cfg: CfgNode, keypoints: Keypoints | None) -> None:
    """Let the config say the keypoints, in place, and the metadata of its datasets without any."""
    node = cfg.DATASETS.KEYPOINTS
    before = model_keypoints(cfg)
    if keypoints is None:
        node.NAMES, node.FLIP_MAP, node.SKELETON = [], [], []
        return
    node.NAMES = list(keypoints.names)
    node.FLIP_MAP = [list(pair) for pair in keypoints.flips]
    node.SKELETON = [list(pair) for pair in keypoints.skeleton]
    if before is None or before.names != keypoints.names:
        swapped = ", ".join(f"{left} and {right}" for left, right in keypoints.flips[:_SHOWN])
        logger.info("%s: %s", KEY, keypoints)
        if swapped:
            logger.info("%s.FLIP_MAP: a flipped image swaps %s", KEY, swapped)
        else:
            logger.warning(
                "%s.FLIP_MAP: no two names differ in left and right alone, so that a flipped image"
                " (INPUT.RANDOM_FLIP) swaps no keypoints",
                KEY,
            )
    values = {
        "keypoint_names": keypoints.names,
        "keypoint_flip_map": keypoints.flips,
        "keypoint_connection_rules": connection_rules(keypoints),
    }
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        for key, value in values.items():
            if name in OWN_NAMES or metadata.get(key) is None:
                # not by `set`, which refuses what has changed since the last run of a notebook
                vars(metadata)[key] = value


def connection_rules(keypoints: Keypoints) -> list[tuple[str, str, tuple[int, int, int]]]:
    """The skeleton for Detectron2's `Visualizer`, a colour for each line."""
    if keypoints.names == COCO_PERSON_KEYPOINT_NAMES:
        return KEYPOINT_CONNECTION_RULES
    rules = []
    for i, (one, other) in enumerate(keypoints.skeleton):
        red, green, blue = colorsys.hsv_to_rgb(i / len(keypoints.skeleton), 0.7, 1.0)
        rules.append((one, other, (int(255 * red), int(255 * green), int(255 * blue))))
    return rules


def fit_num_keypoints(cfg: CfgNode, keypoints: Keypoints) -> None:
    """Set the model's number of keypoints to that of the data, in place."""
    node, count = cfg.MODEL.ROI_KEYPOINT_HEAD, len(keypoints.names)
    if node.NUM_KEYPOINTS != count:
        values = (COUNT_KEY, node.NUM_KEYPOINTS, count, keypoints.source)
        logger.info("%s: %d -> %d, as in %s", *values)
        node.NUM_KEYPOINTS = count


def require_keypoints(cfg: CfgNode) -> None:
    """Check that Detectron2 finds the names and flips of the training data's keypoints.

    Raises:
        ValueError: naming the dataset and what to set.
    """
    for name in cfg.DATASETS.TRAIN if cfg.MODEL.KEYPOINT_ON else ():
        if dataset_keypoints(name) is None:
            raise ValueError(
                f"MODEL.KEYPOINT_ON: dataset {name!r} of DATASETS.TRAIN does not name its"
                f" keypoints; give names to its JSON (categories[].keypoints), or call"
                f" MetadataCatalog.get({name!r}).set(keypoint_names=[…], keypoint_flip_map=[…])"
            )


def check_keypoints(cfg: CfgNode, keypoints: Sequence[Keypoints]) -> None:
    """Compare the keypoints of datasets with the model's number and with each other.

    Args:
        keypoints: the model's, where they are known and it is not trained, and those of each
            dataset.

    Raises:
        ValueError: with the key to change, or with both lists.
    """
    expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    for one in keypoints:
        first = keypoints[0]
        if len(first.names) != expected:
            raise ValueError(
                f"{COUNT_KEY} is {expected}, but {first.owner} has {len(first.names)} keypoints:"
                f" set it to {len(first.names)}. {first}"
            )
        named = not (_is_numbered(one) or _is_numbered(first))
        if len(one.names) != expected or (named and one.names != first.names):
            pairs = enumerate(zip_longest(first.names, one.names))
            index, names = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            here, there = ("nothing" if name is None else repr(name) for name in names)
            raise ValueError(
                f"keypoint {index} is {here} in {first.owner} and {there} in {one.owner}, but all"
                f" data of a model must have the same keypoints in the same order:\n  {first}\n"
                f"  {one}"
            )
        strangers = {name for pair in one.flips for name in pair} - set(one.names)
        if strangers:
            raise ValueError(
                f"keypoint_flip_map of {one.owner} names {', '.join(sorted(strangers))}, which is"
                f" none of its keypoints: {one}"
            )


def _is_numbered(keypoints: Keypoints) -> bool:
    """Whether nobody has named the keypoints."""
    return keypoints.names[0] == "keypoint_1"
