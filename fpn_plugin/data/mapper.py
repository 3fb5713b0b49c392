"""Detectron2's mapper, from a dataset dict to a model's input, for more kinds of images."""

from __future__ import annotations

import copy
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError, annotations_to_instances
from fvcore.transforms.transform import PadTransform

from .deep_images import check_rule, readable

__all__ = ["Mapper"]


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """The augmentations of `INPUT.LSJ`, Detectron2's."""
    jitter = cfg.INPUT.LSJ
    side = jitter.IMAGE_SIZE
    return [
        T.ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, side, side),
        T.FixedSizeCrop(crop_size=(side, side)),
    ]


class Mapper(DatasetMapper):
    """Detectron2's mapper, which also reads images of more than 8 bits per channel.

    What it makes of other images is the same bit for bit. Without training it needs nothing of the
    training data.

    Args:
        is_train: as in Detectron2's.
        deep_images: `INPUT.DEEP_IMAGES`.
        options: Detectron2's other arguments.

    Raises:
        KeyError: for an unknown `INPUT.DEEP_IMAGES`.
    """

    @configurable
    def __init__(self, is_train: bool, *, deep_images: str = "percentile", **options: Any) -> None:
        super().__init__(is_train, **options)
        self.deep_images = check_rule(deep_images)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The arguments that a config stands for."""
        if cfg.MODEL.KEYPOINT_ON and not is_train:
            # Detectron2 would look up the flips of DATASETS.TRAIN, and drop the annotations later
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False
        options = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.LSJ.ENABLED:
            options["augmentations"][:1] = large_scale_jitter(cfg)  # in the place of the resizing
            options["recompute_boxes"] = cfg.MODEL.MASK_ON
        if is_train and cfg.INPUT.COPY_PASTE.ENABLED:
            options["instance_mask_format"] = "bitmask"
        return {**options, "deep_images": cfg.INPUT.DEEP_IMAGES}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Detectron2's, with the file's name as it was given."""
        name = dataset_dict["file_name"]
        path = readable(name, self.deep_images)
        if path == name:
            return super().__call__(dataset_dict)
        try:
            sample = super().__call__({**dataset_dict, "file_name": path})
        except SizeMismatchError as error:
            raise SizeMismatchError(str(error).replace(path, name)) from None
        return {**sample, "file_name": name}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        """Detectron2's; an object without keypoints beside others has points without a label, an
        image without objects may be cropped, and what pads an image is part of no mask."""
        objects = [x for x in dataset_dict["annotations"] if x.get("iscrowd", 0) == 0]
        if self.recompute_boxes and not objects:  # Detectron2 would look for their masks
            del dataset_dict["annotations"]
            dataset_dict["instances"] = annotations_to_instances([], image_shape)
            return
        if self.use_keypoint and self.keypoint_hflip_indices is not None:
            points = [0.0] * (3 * len(self.keypoint_hflip_indices))
            for annotation in dataset_dict["annotations"]:
                annotation.setdefault("keypoints", points)
        super()._transform_annotations(dataset_dict, _for_masks(transforms), image_shape)


def _for_masks(transforms: Any) -> T.TransformList:
    """Transforms that pad masks with nothing.

    Detectron2 applies those of semantic labels, which pad with 255 (ignored), to masks of pixels
    too, where that is the object.
    """
    changed = [copy.copy(each) for each in T.TransformList([transforms]).transforms]
    for each in changed:
        if isinstance(each, PadTransform):
            each.seg_pad_value = 0
    return T.TransformList(changed)
