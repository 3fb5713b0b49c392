"""The loader's speed keys: the same samples, whichever are set."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from PIL import Image

from fpn_plugin.engine.data import build_train_loader, start_at
from fpn_plugin.engine.image_cache import FORMATS, CachedMapper

MakeConfig = Callable[..., CfgNode]


def samples(cfg: CfgNode, start: int = 0, batches: int = 8) -> list[dict[str, Any]]:
    loader = build_train_loader(cfg)
    start_at(loader, start)
    return list(itertools.chain.from_iterable(itertools.islice(loader, batches)))


def assert_same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a["file_name"] == b["file_name"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


LEVERS: dict[str, dict[str, Any]] = {
    "workers": {"NUM_WORKERS": 2, "PERSISTENT_WORKERS": True, "PREFETCH_FACTOR": 3},
    "pinned": {"PIN_MEMORY": True},
    "cache": {"CACHE_IMAGES": 1},
    "small cache": {"CACHE_IMAGES": 1},
    "all": {
        "NUM_WORKERS": 2,
        "PERSISTENT_WORKERS": True,
        "PREFETCH_FACTOR": 1,
        "PIN_MEMORY": True,
        "CACHE_IMAGES": 1,
    },
}


@pytest.mark.parametrize("name", LEVERS)
@pytest.mark.parametrize("start", [0, 3])
def test_samples_are_the_same(name: str, start: int, make_config: MakeConfig) -> None:
    """Also for a run that goes on in the middle; ten images, so that most come from the cache."""
    levers = {f"DATALOADER__{key}": value for key, value in LEVERS[name].items()}
    assert_same(samples(make_config(**levers), start), samples(make_config(), start))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are really opened, in order."""
    opened: list[str] = []
    whole = Image.open

    def count(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(file, "getbuffer"):  # what the cache gives is in memory
            opened.append(str(file.name))
        return whole(file, *args, **kwargs)

    monkeypatch.setattr(Image, "open", count)
    return opened


@pytest.mark.parametrize("room, rereads", [(1, 0), (3 * 64 * 48 * 3 / 2**20 + 0.001, 7)])
def test_each_file_is_read_once_as_long_as_there_is_room(
    room: float, rereads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        names.append(str(tmp_path / f"{number}.png"))

    def mapper(record: dict[str, Any]) -> dict[str, Any]:
        image = detection_utils.read_image(record["file_name"], "BGR")
        return {**record, "image": image}

    cached, opened = CachedMapper(mapper, room), counting(monkeypatch)
    for _ in range(2):
        for number, name in enumerate(names):
            record = {"file_name": name}
            sample = cached(record)
            assert sample["file_name"] == name and record == {"file_name": name}
            if number == 0:
                assert np.array_equal(sample["image"], mapper(record)["image"])
                opened.pop()
    assert len(opened) == 10 + rereads


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pixels_are_those_of_detectron2s_reader(
    image_format: str, mode: str, orientation: int, tmp_path: Path
) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    seen: list[np.ndarray] = []

    def mapper(record: dict[str, Any]) -> None:
        seen.append(detection_utils.read_image(record["file_name"], image_format))

    cached = CachedMapper(mapper, 1, image_format)
    for _ in range(2):
        assert cached({"file_name": str(path)}) is None
    expected = detection_utils.read_image(str(path), image_format)
    assert all(np.array_equal(image, expected) for image in seen)


def test_two_caches_do_not_mix(tmp_path: Path) -> None:
    """The last mapper that reads is answered from its own images."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def mapper(record: dict[str, Any]) -> dict[str, Any]:
        detection_utils.read_image(record["file_name"], "RGB")
        return record

    one, two = CachedMapper(mapper, 1), CachedMapper(mapper, 1)
    for cached in (one, two, one):
        cached({"file_name": str(tmp_path / "a.png")})
    assert one._images is not two._images
    assert len(one._images.images) == len(two._images.images) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"PERSISTENT_WORKERS": True}, "DATALOADER.PERSISTENT_WORKERS True is for workers"),
        ({"PREFETCH_FACTOR": 2}, "DATALOADER.PREFETCH_FACTOR 2 is for workers.*NUM_WORKERS is 0"),
        ({"PREFETCH_FACTOR": -1, "NUM_WORKERS": 1}, "DATALOADER.PREFETCH_FACTOR: -1 is negative"),
        ({"CACHE_IMAGES": -5}, "DATALOADER.CACHE_IMAGES: -5 megabytes"),
    ],
)
def test_mistakes(overrides: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    levers = {f"DATALOADER__{key}": value for key, value in overrides.items()}
    with pytest.raises(ValueError, match=message):
        build_train_loader(make_config(**levers))


def test_a_format_that_is_not_made_from_rgb(make_config: MakeConfig) -> None:
    with pytest.raises(KeyError, match="INPUT.FORMAT for DATALOADER.CACHE_IMAGES.*'L'.*BGR, RGB"):
        build_train_loader(make_config(DATALOADER__CACHE_IMAGES=1, INPUT__FORMAT="L"))
