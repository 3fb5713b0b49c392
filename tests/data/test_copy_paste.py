"""Copy-paste by hand-made images: which pixels, masks and boxes a sample has then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

from fpn_plugin.data.copy_paste import CopyPaste, CopyPasteMapper

Box = tuple[int, int, int, int]  # x0, y0, x1, y1


def sample(size: tuple[int, int], gray: int, *boxes: Box) -> dict[str, Any]:
    """An image in one gray, of rectangles that fill their boxes; their classes count from `gray`."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    instances = Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.arange(gray, gray + len(boxes)),
    )
    if boxes:  # as Detectron2's mapper has it
        instances.gt_masks = BitMasks(masks)
    image = torch.full((3, *size), gray, dtype=torch.uint8)
    return {"image": image, "instances": instances, "sem_seg": torch.full(size, gray)}


def areas(instances: Instances) -> list[int]:
    masks: Tensor = instances.gt_masks.tensor
    return masks.sum(dim=(1, 2)).tolist()


def test_what_is_pasted_hides_what_is_below() -> None:
    # a 4×4 object without a corner is pasted over a part of one, a pixel of one, and one whole
    ours = sample((12, 10), 10, (0, 0, 4, 2), (4, 4, 8, 8), (2, 2, 4, 4), (8, 10, 10, 12))
    theirs = sample((20, 20), 90, (2, 1, 6, 5))
    theirs["instances"].gt_masks.tensor[0, 4, 5] = False
    pasted = CopyPaste(min_visible=0.1)(ours, theirs)
    instances = pasted["instances"]
    assert instances.image_size == (12, 10)
    assert instances.gt_classes.tolist() == [10, 11, 13, 90]
    assert instances.gt_boxes.tensor.tolist() == [
        *([0, 0, 4, 2], [4, 4, 8, 8], [8, 10, 10, 12], [2, 1, 6, 5])
    ]
    assert areas(instances) == [6, 15, 4, 15]
    hidden = instances.gt_masks.tensor[-1]
    assert torch.equal(pasted["image"] == 90, hidden.expand(3, -1, -1))
    assert set(pasted["image"].unique().tolist()) == {10, 90}
    assert torch.equal(pasted["sem_seg"] == 90, hidden)
    assert not (instances.gt_masks.tensor[:-1] & hidden).any()


def test_boxes_shrink_and_little_that_is_left_is_no_object() -> None:
    ours = sample((8, 8), 10, (0, 0, 8, 2), (0, 4, 5, 8))
    theirs = sample((8, 8), 90, (0, 0, 3, 8))
    cut = CopyPaste(min_visible=0.4)(dict(ours), theirs)["instances"]
    assert cut.gt_classes.tolist() == [10, 11, 90] and areas(cut) == [10, 8, 24]
    assert cut.gt_boxes.tensor[:2].tolist() == [[3, 0, 8, 2], [3, 4, 5, 8]]
    cut = CopyPaste(min_visible=0.5)(dict(ours), theirs)["instances"]
    assert cut.gt_classes.tolist() == [10, 90]
    whole = sample((8, 8), 10, (0, 0, 2, 2))
    cut = CopyPaste(min_visible=0)(whole, theirs)["instances"]
    assert cut.gt_classes.tolist() == [90], "nothing of it is visible"


def test_objects_are_cut_at_the_border_of_a_smaller_image() -> None:
    theirs = sample((10, 20), 90, (4, 2, 8, 4), (7, 0, 9, 2), (19, 9, 20, 10))
    moved = []
    for seed in range(20):
        np.random.seed(seed)
        pasted = CopyPaste(min_visible=0.6)(sample((6, 7), 10), theirs)["instances"]
        moved += list(zip(pasted.gt_classes.tolist(), pasted.gt_boxes.tensor.tolist()))
    # the second is outside, the third too
    assert {(label, tuple(box)) for label, box in moved} == {(90, (4.0, 2.0, 7.0, 4.0))}


def test_numbers_of_objects_and_shares_of_images() -> None:
    np.random.seed(0)
    theirs = sample((4, 40), 90, *((x, 0, x + 1, 4) for x in range(40)))
    counts = [
        len(CopyPaste(max_objects=5)(sample((4, 40), 1), theirs)["instances"]) for _ in range(99)
    ]
    assert set(counts) == {1, 2, 3, 4, 5}
    drawn = [CopyPaste(0.25).draw_partner(3) for _ in range(2000)]
    assert set(drawn) == {None, 0, 1, 2} and 400 < len(drawn) - drawn.count(None) < 600
    nothing = sample((4, 4), 1, (0, 0, 2, 2))
    assert CopyPaste()(nothing, sample((4, 4), 2)) is nothing


def test_mapper_of_python_configs() -> None:
    np.random.seed(0)
    records = [{"box": (0, 0, 2, 2)}, {"box": (4, 4, 8, 8)}]
    mapper = CopyPasteMapper(lambda record: sample((8, 8), 10, record["box"]), records)
    counts = {len(mapper(records[0])["instances"]) for _ in range(20)}
    assert counts == {1, 2}  # on itself, or beside the other


def test_mistakes() -> None:
    for options in ({"prob": 1.5}, {"min_visible": -0.1}, {"max_objects": 0}):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=rf"{name}={value}"):
            CopyPaste(**options)  # type: ignore[arg-type]
    polygons = sample((8, 8), 10, (0, 0, 4, 4))
    polygons["instances"].gt_masks = PolygonMasks([[np.array([0.0, 0, 4, 0, 4, 4])]])
    with pytest.raises(ValueError, match="not PolygonMasks.* instance_mask_format='bitmask'"):
        CopyPaste()(sample((8, 8), 10), polygons)
