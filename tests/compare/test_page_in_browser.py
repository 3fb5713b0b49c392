"""The page in a real browser: it is drawn, asks for nothing, and fits a narrow window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from browser import inspect, screenshot
from comparing import Study
from PIL import Image


def pixels(page: Path, out: Path, dark: bool) -> np.ndarray:
    screenshot(page, out, 1200, 2000, dark)
    return np.asarray(Image.open(out).convert("RGB"))


def test_the_page_is_drawn_light_and_dark(study: Study, tmp_path: Path) -> None:
    page = study.report / "compare.html"
    light = pixels(page, tmp_path / "light.png", dark=False)
    dark = pixels(page, tmp_path / "dark.png", dark=True)
    assert light.shape == dark.shape == (2000, 1200, 3)
    assert light[-1, 0].tolist() == [255, 255, 255]
    assert dark[-1, 0].max() < 60
    for picture in (light, dark):
        written = (np.abs(picture.astype(int) - picture[-1, 0]).max(axis=2) > 40).mean()
        assert 0.02 < written < 0.5, "neither blank nor a blot"
        # the first two configs' colours, of cards and plots
        for colour in ((0x3D, 0x7C, 0xC9), (0xD9, 0x8A, 0x1F)):
            assert (np.abs(picture.astype(int) - colour).max(axis=2) < 6).sum() > 2000
    # what is written in plots is light on dark
    assert (dark.min(axis=2) > 200).mean() > 0.003


@pytest.mark.parametrize("width", [1200, 420])
def test_the_page_fits_and_asks_for_nothing(study: Study, width: int) -> None:
    inspection = inspect(study.report / "compare.html", width)
    assert inspection.complaints == []
    assert inspection.needed <= inspection.width == width
    assert len(inspection.drawings) == 5
    assert all(200 < drawing <= width for drawing in inspection.drawings)
    assert inspection.height > 2000


def test_a_page_that_asks_for_something_is_found_out(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><html><head></head><body style='width:600px'>"
        "<img src='https://example.com/a.png'><script>fail()</script></body></html>"
    )
    inspection = inspect(page, 420)
    assert len(inspection.complaints) == 2 and inspection.images == [0]
    assert inspection.needed > 600 > inspection.width
