"""Pieces of a page: what is text is escaped, what is stressed has its class."""

from __future__ import annotations

import base64
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fpn_plugin.report.figures import new_figure, page_style, save
from fpn_plugin.report.page import (
    html_figure,
    html_page,
    html_svg,
    html_table,
    paragraph,
)
from fpn_plugin.report.tables import Table

TEXT = "a <b> & 'c'"


def test_tables() -> None:
    rows = [["r<1>", "x", "1"], ["r2", "y", "2"]]
    table = ElementTree.fromstring(
        f"<div>{html_table(Table(TEXT, ['name', 'of', 'n'], rows, TEXT, {(1, 2), (0, 1)}, 2))}</div>"
    )
    assert [element.text for element in table.iter("h2")] == [TEXT]
    assert [element.text for element in table.iter("p")] == [TEXT]
    assert [element.text for element in table.iter("td")] == [*rows[0], *rows[1]]
    classes = [element.get("class") for element in table.iter("td")]
    assert classes == [None, "left best", None, None, "left", "best"]
    assert [element.get("class") for element in table.iter("th")] == [None, "left", None]
    plain = html_table(Table("t", ["name"], [["a"]]))
    assert "<p" not in plain and "class" not in plain.replace('class="scroll"', "")


def test_a_page_of_pieces() -> None:
    page = html_page(TEXT, [paragraph(TEXT, "bad"), "<hr>"], ".x > p { color: red }")
    assert page.startswith("<!doctype html>") and page.count("a &lt;b&gt; &amp; &#39;c&#39;") == 3
    assert '<p class="bad">' in page and "<hr>" in page and ".x > p { color: red }" in page


@pytest.mark.parametrize("name, kind", [("a.png", "png"), ("a.JPG", "jpeg")])
def test_figures_carry_their_bytes(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"picture")
    figure = ElementTree.fromstring(html_figure(TEXT, tmp_path / name).replace('">', '"/>'))
    (image,) = figure.iter("img")
    data = base64.b64encode(b"picture").decode()
    assert image.get("src") == f"data:image/{kind};base64,{data}" and image.get("alt") == TEXT
    assert [caption.text for caption in figure.iter("figcaption")] == [TEXT]


def test_vector_figures_take_the_pages_colours(tmp_path: Path) -> None:
    with page_style():
        figure, axes = new_figure(2)
        axes.set_xlabel("label")
        html = html_svg(TEXT, figure)
        assert save(figure, tmp_path / "a.png").stat().st_size > 1000
    assert "var(--text)" in html and "var(--line)" in html and "<metadata" not in html
    (svg,) = (e for e in ElementTree.fromstring(html).iter() if e.tag.endswith("}svg"))
    assert svg.get("aria-label") == TEXT and svg.get("role") == "img"
