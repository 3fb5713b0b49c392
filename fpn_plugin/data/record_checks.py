"""Checks of Detectron2's dataset dicts, as a user's own function gives them: one pass over them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from .classes import Classes
from .coco_json import Findings

__all__ = ["check_records"]

# What Detectron2 reads from every annotation, without a default
_KEYS = ("bbox", "bbox_mode", "category_id")


def check_records(
    records: list[dict[str, Any]], classes: Classes, masks: bool, findings: Findings
) -> int:
    """Check the annotations of dataset dicts and return how many there are.

    Args:
        masks: whether the model has a mask head, so that every annotation needs a mask.
    """
    annotations = list(chain.from_iterable(record.get("annotations") or () for record in records))
    count, keys = len(classes.names), (*_KEYS, "segmentation") if masks else _KEYS
    if {type(annotation.get("category_id")) for annotation in annotations} <= {int}:
        present = {annotation["category_id"] for annotation in annotations}
        if all(0 <= index < count for index in present) and all(
            key in annotation for annotation in annotations for key in keys
        ):
            return len(annotations)
    for record in records:
        for annotation in record.get("annotations") or ():
            where = f"annotation of {record.get('file_name')!r}"
            for key in keys:
                if key not in annotation:
                    findings.error(f"{where}: {key!r} is missing")
            index = annotation.get("category_id", 0)
            if not isinstance(index, (int, np.integer)) or not 0 <= index < count:
                findings.error(
                    f"{where}: 'category_id' is {index!r}, but must be from 0 to {count - 1}, the"
                    f" index of a name in {classes.source} ({', '.join(classes.names[:10])}"
                    f"{', …' if count > 10 else ''})"
                )
    return len(annotations)
