"""Frames of a video file or a camera, and a file of frames; pixels are `(H, W, 3)`, RGB."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import cv2
import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_CAMERA = re.compile(r"(?:camera:)?(\d+)|camera")
_CODEC, _RATE = "mp4v", 25.0  # MPEG-4, which every build of OpenCV writes; frames a second
_UNSURE = 0.02  # the part of the frames that a file's header may be wrong about


def camera_of(name: str) -> int | None:
    """The camera that an `--input` means, `camera`, `camera:1` or `1`; None for a file."""
    match = _CAMERA.fullmatch(name)
    return None if match is None or os.path.exists(name) else int(match[1] or 0)


class Video:
    """The frames of a video file or a camera; use it in a `with`.

    Attributes:
        rate: frames a second.
        count: of the frames as the file says; 0 where it does not, and for a camera.
        read: how many were read.

    Raises:
        ValueError: if it cannot be opened, or has no frame.
    """

    def __init__(self, source: Path | int) -> None:
        self.is_camera = isinstance(source, int)
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        self._first = self._capture.read()[1] if self._capture.isOpened() else None
        if self._first is None:
            self._capture.release()
            raise ValueError(
                f"there is no camera {source}, or another program has it"
                if self.is_camera
                else "OpenCV reads no video from it"
            )
        self.rate = self._number(cv2.CAP_PROP_FPS) or _RATE
        self.count = 0 if self.is_camera else round(self._number(cv2.CAP_PROP_FRAME_COUNT))
        self.read = 0

    def _number(self, property: int) -> float:
        value = self._capture.get(property)
        return value if 0 < value < 1e9 else 0.0

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        frame = self._first
        while frame is not None:
            self.read += 1
            yield np.ascontiguousarray(frame[:, :, ::-1])
            ok, frame = self._capture.read()
            frame = frame if ok else None

    def fault(self) -> str:
        """What is wrong where fewer frames came than the file says; "" if nothing is."""
        missing = self.count - self.read
        if self.is_camera or missing <= max(1, _UNSURE * self.count):
            return ""
        return f"only {self.read} of its {self.count} frames can be read"


class VideoWriter:
    """Writes frames to an MP4 file, which is put in its place whole at the end; use it in a `with`.

    Args:
        rate: frames a second.
        clock: of a camera's frames: each stands for the seconds since the one before, however long
            the model took. None for frames at that rate.
    """

    def __init__(self, path: Path, rate: float, clock: Callable[[], float] | None = None) -> None:
        self.path, self._rate, self._clock = path, rate, clock
        self._part = path.with_name(f".{path.stem}.part{path.suffix}")
        self._writer: Any = None
        self._start, self._written = 0.0, 0

    def write(self, pixels: np.ndarray) -> None:
        """Append a frame; all have the size of the first.

        Raises:
            OSError: if OpenCV cannot write the file.
        """
        if self._writer is None:
            size = pixels.shape[1::-1]
            codec = cv2.VideoWriter_fourcc(*_CODEC)  # type: ignore[attr-defined]
            self._writer = cv2.VideoWriter(str(self._part), codec, self._rate, size)
            if not self._writer.isOpened():
                raise OSError(f"{self.path}: this build of OpenCV cannot write MP4 ({_CODEC})")
            self._start = self._clock() if self._clock else 0.0
        copies = 1
        if self._clock:
            seconds = self._clock() - self._start
            copies = max(round(seconds * self._rate) + 1 - self._written, 0)
        for _ in range(copies):
            self._writer.write(np.ascontiguousarray(pixels[:, :, ::-1]))
        self._written += copies

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Also after an error or ctrl-C: what there is, is whole."""
        if self._writer is not None:
            self._writer.release()
            os.replace(self._part, self.path)


def wall_clock() -> float:
    """Seconds."""
    return time.monotonic()
