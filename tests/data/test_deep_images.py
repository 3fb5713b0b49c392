"""Images of more than 8 bits per channel are scaled by a rule, whatever stores them; others are
read as Detectron2 reads them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Callable

import cv2
import numpy as np
import pytest
from coco_data import config
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.detection_utils import read_image as detectron2_read_image
from PIL import Image

from fpn_plugin.data import DatasetError, check_dataset, register_coco_format
from fpn_plugin.data.deep_images import RULES, read_image
from fpn_plugin.data.image_checks import upright_size
from fpn_plugin.data.mapper import Mapper

HEIGHT, WIDTH = 48, 64
GRAY = np.linspace(0, 4095, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
COLOURS = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], -1)
OPAQUE = np.full_like(GRAY, 65535)

Write = Callable[[Path], Any]


def pillow(values: np.ndarray, **options: Any) -> Write:
    return lambda path: Image.fromarray(values).save(path, **options)


def opencv(values: np.ndarray) -> Write:
    return lambda path: cv2.imwrite(str(path), values)


# what writes a file, its suffix, its values and those that the "full" rule maps to 0 and 255
FILES: dict[str, tuple[Write, str, np.ndarray, float, float]] = {
    "16-bit PNG": (pillow(GRAY), "png", GRAY, 0, 65535),
    "16-bit TIFF": (pillow(GRAY), "tif", GRAY, 0, 65535),
    "16-bit PGM": (opencv(GRAY), "pgm", GRAY, 0, 65535),
    "big-endian TIFF": (pillow(GRAY.astype(">u2")), "tif", GRAY, 0, 65535),
    "32-bit integers": (pillow(GRAY.astype(np.int32)), "tif", GRAY, -(2**31), 2**31 - 1),
    "floats": (pillow(GRAY.astype(np.float32) / 4095), "tif", GRAY / 4095, 0, 1),
    "16-bit colours, PNG": (opencv(COLOURS[..., ::-1]), "png", COLOURS, 0, 65535),
    "16-bit colours, TIFF": (opencv(COLOURS[..., ::-1]), "tif", COLOURS, 0, 65535),
    "16-bit colours and alpha": (
        opencv(np.dstack([COLOURS[..., ::-1], OPAQUE])),
        "png",
        COLOURS,
        0,
        65535,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_the_full_range_is_read(name: str, tmp_path: Path) -> None:
    write, suffix, values, low, high = FILES[name]
    path = str(tmp_path / f"a.{suffix}")
    write(Path(path))
    ends = {"percentile": np.percentile(values, (0.1, 99.9)), "full": (low, high)}
    for rule, (start, end) in ends.items():
        expected = np.rint(255 * np.clip((values.astype(float) - start) / (end - start), 0, 1))
        pixels = read_image(path, "RGB", rule)
        assert pixels.dtype == np.uint8 and pixels.shape == (HEIGHT, WIDTH, 3)
        expected = expected if expected.ndim == 3 else expected[..., None]
        assert np.abs(pixels - expected).max() <= 1  # rounding at .5
    assert read_image(path, "L", "percentile").shape == (HEIGHT, WIDTH, 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0, 0, 9], [0, 0, 0, 255]),  # few bright pixels
        ([-9999, 1, 2, 3], [0, 0, 128, 255]),  # no data, by GeoTIFF's tag
        ([np.nan, 1, np.inf, 3], [0, 0, 0, 255]),
        ([7, 7, 7, 7], [0, 0, 0, 0]),
    ],
)
def test_values_that_are_no_pixels(values: Any, expected: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "a.tif")
    many = np.repeat(np.array(values, np.float32)[:, None], 2, 1)
    Image.fromarray(many).save(path, tiffinfo={42113: "-9999"})
    pixels = read_image(path, "L", "percentile")[:, 0, 0]
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_are_those_of_detectron2(mode: str, tmp_path: Path) -> None:
    path = str(tmp_path / "a.tif")
    picture = Image.fromarray((COLOURS / 16).astype(np.uint8)).convert(
        "P" if mode == "PA" else mode
    )
    (picture.convert("PA") if mode == "PA" else picture).save(path)
    for rule in RULES:
        assert (read_image(path, "BGR", rule) == detectron2_read_image(path, "BGR")).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_orientation_counts_once(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = str(tmp_path / "a.jpg")
    Image.fromarray(GRAY.astype(np.uint8) & 0).save(jpeg, exif=exif)
    shape = detectron2_read_image(jpeg, "L").shape
    bits = [(GRAY / 16).astype(np.uint8), GRAY]
    pixels = []
    for number, values in enumerate(bits):
        path = str(tmp_path / f"{number}.{suffix}")
        Image.fromarray(values).save(path, exif=exif)
        with Image.open(path) as file:
            assert upright_size(file) == shape[1::-1]
        pixels.append(read_image(path, "L", "percentile"))
        assert pixels[-1].shape == shape
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() <= 2


def test_the_mapper_keeps_names_and_other_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep, plain = str(tmp_path / "deep.png"), str(tmp_path / "plain.png")
    Image.fromarray(GRAY).save(deep)
    Image.fromarray((COLOURS / 16).astype(np.uint8)).save(plain)
    cfg = config()
    mapper = Mapper(cfg, is_train=False)
    sample = mapper({"file_name": deep, "width": WIDTH, "height": HEIGHT})
    assert sample["file_name"] == deep
    assert sample["image"].min() == 0 and sample["image"].max() == 255
    assert sample["image"].unique().numel() > 200
    expected = DatasetMapper(cfg, is_train=False)({"file_name": plain})["image"]
    assert (mapper({"file_name": plain})["image"] == expected).all()
    with pytest.raises(SizeMismatchError, match=f"image {deep}, got"):
        mapper({"file_name": deep, "width": 1, "height": 1})
    cfg.INPUT.DEEP_IMAGES = "full"
    assert Mapper(cfg, is_train=False)({"file_name": deep})["image"].max() == 16
    cfg.INPUT.DEEP_IMAGES = "none"
    with pytest.raises(KeyError, match="INPUT.DEEP_IMAGES.*'none'.*percentile"):
        Mapper(cfg, is_train=False)


def test_evaluation_needs_no_keypoints_of_training_data() -> None:
    cfg = config()
    cfg.MODEL.KEYPOINT_ON = True
    assert not Mapper(cfg, is_train=False).use_keypoint
    assert cfg.MODEL.KEYPOINT_ON


@pytest.mark.usefixtures("registry")
def test_the_check_says_what_images_are(
    sound: Any, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["deep.png", "flat.png", "pages.tif", "alpha.png", "dim.png"]
    sound["images"] = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(names, 1)
    ]
    json_file, folder = write(sound)
    pixels = Image.fromarray((COLOURS / 16).astype(np.uint8))
    Image.fromarray(GRAY).save(Path(folder, "deep.png"))
    Image.fromarray(GRAY // 64).save(Path(folder, "dim.png"))
    pixels.point(lambda value: 9).save(Path(folder, "flat.png"))
    pixels.save(Path(folder, "pages.tif"), save_all=True, append_images=[pixels])
    pixels.convert("RGBA").point(lambda value: value // 2).save(Path(folder, "alpha.png"))
    register_coco_format("t", json_file, folder)
    with caplog.at_level(logging.WARNING):
        counts = check_dataset("t", "full", deep_images="full").warnings
    assert "'deep.png'; 'dim.png'" in caplog.text
    assert list(counts.values()) == [2, 2, 1, 1], counts
    assert [key for key in counts if "INPUT.DEEP_IMAGES: full" in key]
    assert counts["image whose pixels all have one value"] == 2  # flat, and dim by this rule
    assert set(check_dataset("t", "headers").warnings.values()) == {2, 1}


@pytest.mark.usefixtures("registry")
def test_an_image_that_is_too_large_comes_with_a_remedy(
    sound: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_coco_format("t", *write(sound))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DatasetError, match="a.jpg.*tiles.*PIL.Image.MAX_IMAGE_PIXELS"):
        check_dataset("t", "headers")
