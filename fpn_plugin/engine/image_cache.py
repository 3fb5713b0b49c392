"""Decoded images kept in memory, for sets that are small enough.

Detectron2's mapper opens an image by its file name through iopath, and so does any mapper that is
built on `read_image`. A name that begins with `decoded://` is answered from memory, by the same
pixels in a format that takes no decoding.
"""

from __future__ import annotations

import io
from typing import Any, Callable

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from fpn_plugin.registry import unknown_name

FORMATS = ("BGR", "RGB", "YUV-BT.601")
"""The values of `INPUT.FORMAT` that Detectron2 makes from an image's RGB."""

PREFIX = "decoded://"
"""Of the names that are answered from memory; they show in errors."""


class _DecodedImages(PathHandler):
    """Opens `decoded://<file>` as a PPM of that file's upright RGB pixels.

    Attributes:
        room: how many bytes more it may keep. What is once kept stays: in a shuffled order any
            other choice would throw out what comes next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.room = 0
        self.images: dict[str, bytes] = {}

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", *args: Any, **kwargs: Any) -> io.BytesIO:
        name = path[len(PREFIX) :]
        found = self.images.get(name)
        if found is None:
            pixels = read_image(name, "RGB")
            height, width = pixels.shape[:2]
            found = b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()
            if len(found) <= self.room:
                self.room -= len(found)
                self.images[name] = found
        return io.BytesIO(found)


class CachedMapper:
    """A mapper that reads each image's file once, as long as there is room.

    Each process has a cache of its own: with workers, each keeps the images that it has read.

    Args:
        mapper: reads `file_name` through Detectron2's `read_image`.
        megabytes: how much of decoded pixels to keep.
        image_format: `INPUT.FORMAT`.

    Raises:
        ValueError: if `megabytes` is negative.
        KeyError: if the format is not made from RGB.
    """

    def __init__(
        self, mapper: Callable[[dict], Any], megabytes: float, image_format: str = "BGR"
    ) -> None:
        if megabytes < 0:
            raise ValueError(f"DATALOADER.CACHE_IMAGES: {megabytes} megabytes are less than none")
        if image_format not in FORMATS:
            raise unknown_name("INPUT.FORMAT for DATALOADER.CACHE_IMAGES", image_format, FORMATS)
        self.mapper = mapper
        self._bytes = int(megabytes * 2**20)
        self._images: _DecodedImages | None = None  # made in the process that reads

    def __call__(self, record: dict) -> Any:
        if self._images is None:
            self._images = _DecodedImages()
            self._images.room = self._bytes
        # one handler serves the prefix: that of the mapper which is reading
        PathManager.register_handler(self._images, allow_override=True)
        name = record["file_name"]
        sample = self.mapper({**record, "file_name": PREFIX + name})
        if sample is not None:
            sample["file_name"] = name
        return sample
