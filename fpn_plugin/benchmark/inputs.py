"""What all models are given: the same images, annotations and maps. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor

OBJECTS = 8
"""Annotated objects in each image: about COCO's mean."""


@dataclass(frozen=True)
class Inputs:
    """What a benchmark runs on, made from a seed.

    Attributes:
        size: of an image, height and width in pixels.
        batch: images at a time.
    """

    size: tuple[int, int]
    batch: int = 1
    device: str = "cpu"
    seed: int = 0

    def images(self, channels: int = 3) -> list[dict[str, Any]]:
        """Noise, as a Detectron2 model takes it for inference: on the CPU, as a loader gives it."""
        height, width = self.size
        generator = self._generator("image")
        return [
            {
                "image": torch.randint(0, 256, (channels, height, width), generator=generator).to(
                    torch.uint8
                ),
                "height": height,
                "width": width,
            }
            for _ in range(self.batch)
        ]

    def annotated(self, cfg: CfgNode) -> list[dict[str, Any]]:
        """The same images with OBJECTS boxes each, and whatever else the config learns from."""
        generator = self._generator("annotations")
        images = self.images(len(cfg.MODEL.PIXEL_MEAN))
        return [{**image, **self._annotations(cfg, generator)} for image in images]

    def maps(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Random maps, not negative, with the same numbers for the same name and shape.

        Args:
            like: maps whose shapes, types and memory formats are wanted.
        """
        maps = {}
        for name, x in like.items():
            noise = torch.randn(x.shape, generator=self._generator(name)).relu_()
            maps[name] = torch.empty_like(x).copy_(noise)  # keeps the strides
        return maps

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))

    def _annotations(self, cfg: CfgNode, generator: torch.Generator) -> dict[str, Any]:
        height, width = self.size
        scale = torch.tensor([width, height, width, height])
        corner = torch.rand(OBJECTS, 2, generator=generator) * 0.7
        extent = 0.05 + torch.rand(OBJECTS, 2, generator=generator) * 0.25
        boxes = torch.cat([corner, corner + extent], 1) * scale
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
            classes = cfg.MODEL.RETINANET.NUM_CLASSES
        instances = Instances(self.size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, classes, (OBJECTS,), generator=generator)
        if cfg.MODEL.MASK_ON:
            instances.gt_masks = self._masks(cfg, boxes)
        if cfg.MODEL.KEYPOINT_ON:
            instances.gt_keypoints = self._keypoints(cfg, boxes, generator)
        extras: dict[str, Any] = {"instances": instances}
        if cfg.MODEL.META_ARCHITECTURE in ("PanopticFPN", "SemanticSegmentor"):
            stuff = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            extras["sem_seg"] = torch.randint(0, stuff, self.size, generator=generator)
        return extras

    def _masks(self, cfg: CfgNode, boxes: Tensor) -> PolygonMasks | BitMasks:
        polygons = [
            # a diamond in each box
            [torch.stack([(a + c) / 2, b, c, (b + d) / 2, (a + c) / 2, d, a, (b + d) / 2]).numpy()]
            for a, b, c, d in boxes.double()
        ]
        if cfg.INPUT.MASK_FORMAT == "bitmask":
            return BitMasks.from_polygon_masks(PolygonMasks(polygons), *self.size)
        return PolygonMasks(polygons)

    def _keypoints(self, cfg: CfgNode, boxes: Tensor, generator: torch.Generator) -> Keypoints:
        count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        places = torch.rand(OBJECTS, count, 2, generator=generator)
        points = boxes[:, None, :2] + places * (boxes[:, None, 2:] - boxes[:, None, :2])
        visible = torch.full((OBJECTS, count, 1), 2.0)
        return Keypoints(torch.cat([points, visible], 2))
