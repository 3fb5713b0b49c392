"""Simple copy-paste (arXiv:2012.07177): objects of one training image on another.

What is mapped already is pasted: both images have been resized, cropped and flipped, each by
itself. They lie on each other with their top left corners together. All that is random is drawn
from numpy's generator.

Shapes: N objects, C channels, height H and width W in pixels.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

__all__ = ["CopyPaste", "CopyPasteMapper"]

Sample = dict[str, Any]


class CopyPaste:
    """Pastes objects of a mapped image on another.

    Args:
        prob: `INPUT.COPY_PASTE.PROB`; the others likewise.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, prob: float = 1.0, max_objects: int = 100, min_visible: float = 0.1) -> None:
        for name, value in (("prob", prob), ("min_visible", min_visible)):
            if not 0 <= value <= 1:
                raise ValueError(f"CopyPaste({name}={value!r}): choose a share from 0 to 1")
        if max_objects < 1:
            raise ValueError(f"CopyPaste(max_objects={max_objects!r}): choose a number from 1 on")
        self.prob = prob
        self.max_objects = max_objects
        self.min_visible = min_visible

    def draw_partner(self, images: int) -> int | None:
        """The index of the image whose objects the next one gets, or None if it gets none.

        Args:
            images: how many there are.
        """
        return int(np.random.randint(images)) if np.random.random() < self.prob else None

    def __call__(self, sample: Sample, partner: Sample) -> Sample:
        """A sample with some of the objects of another, as training takes it.

        Args:
            sample: of a mapper, with an `image` `(C, H, W)` and `instances` with `gt_masks`; it is
                changed.
            partner: likewise, of any size; its objects are cut at the sample's borders.

        Raises:
            ValueError: if the masks are polygons.
        """
        theirs = partner["instances"]
        if not len(theirs):
            return sample
        most = min(len(theirs), self.max_objects)
        chosen = np.random.permutation(len(theirs))[: np.random.randint(1, most + 1)]
        size = tuple(sample["image"].shape[-2:])
        pasted = self._move(theirs[torch.as_tensor(chosen)], size)
        if not len(pasted):
            return sample
        hidden = pasted.gt_masks.tensor.any(dim=0)
        for key in ("image", "sem_seg"):
            if key in sample and key in partner:
                moved = _on_canvas(partner[key], size)
                sample[key] = torch.where(hidden, moved, sample[key])
        ours = sample["instances"]
        if len(ours):  # else it has no masks, maybe
            ours = self._cut(ours, _masks(ours).tensor & ~hidden)
            pasted = Instances.cat([ours, pasted]) if len(ours) else pasted
        return {**sample, "instances": pasted}

    def _move(self, objects: Instances, size: tuple[int, ...]) -> Instances:
        """Objects of the partner on a canvas, those that are visible there."""
        masks = _on_canvas(_masks(objects).tensor, size)
        areas = _masks(objects).tensor.sum(dim=(1, 2))
        moved = Instances(size, **objects.get_fields())
        return self._cut(moved, masks, areas)

    def _cut(self, objects: Instances, masks: Tensor, areas: Tensor | None = None) -> Instances:
        """Objects with smaller masks `(N, H, W)`, without those of which too little is left.

        Boxes shrink where masks do.

        Args:
            areas: of the masks before, in pixels, if they are not those of the objects.
        """
        areas = objects.gt_masks.tensor.sum(dim=(1, 2)) if areas is None else areas
        left = masks.sum(dim=(1, 2))
        boxes, shrunk = objects.gt_boxes.tensor.clone(), left < areas
        boxes[shrunk] = BitMasks(masks[shrunk]).get_bounding_boxes().tensor
        fields = {"gt_masks": BitMasks(masks), "gt_boxes": Boxes(boxes)}
        cut = Instances(objects.image_size, **{**objects.get_fields(), **fields})
        return cut[(left > 0) & (left >= self.min_visible * areas)]


class CopyPasteMapper:
    """A mapper that pastes objects of other images, for Python configs, whose loaders have no key
    for it.

    Args:
        mapper: for training, with `use_instance_mask` and `instance_mask_format="bitmask"`.
        dataset: the dataset dicts that objects are taken from: those of the loader.
        prob: and the others as in :class:`CopyPaste`.

    Example:
        >>> train = dataloader.train
        >>> train.mapper = LazyCall(CopyPasteMapper)(mapper=train.mapper, dataset=train.dataset)
    """

    def __init__(
        self,
        mapper: Callable[[Sample], Sample],
        dataset: Sequence[Sample],
        prob: float = 1.0,
        max_objects: int = 100,
        min_visible: float = 0.1,
    ) -> None:
        self.mapper = mapper
        self.dataset = dataset
        self.paste = CopyPaste(prob, max_objects, min_visible)

    def __call__(self, record: Sample) -> Sample:
        """The sample of a dataset dict."""
        sample = self.mapper(record)
        partner = self.paste.draw_partner(len(self.dataset))
        if partner is None:
            return sample
        return self.paste(sample, self.mapper(self.dataset[partner]))


def _masks(objects: Instances) -> BitMasks:
    masks = objects.get("gt_masks") if objects.has("gt_masks") else None
    if not isinstance(masks, BitMasks):
        raise ValueError(
            f"copy-paste needs masks of pixels, not {type(masks).__name__}, as gt_masks: give the"
            " mapper use_instance_mask=True and instance_mask_format='bitmask'"
        )
    return masks


def _on_canvas(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The top left of `(…, H, W)` in another size; zeros where it is smaller."""
    height, width = (min(pair) for pair in zip(x.shape[-2:], size))
    canvas = x.new_zeros((*x.shape[:-2], *size))
    canvas[..., :height, :width] = x[..., :height, :width]
    return canvas
