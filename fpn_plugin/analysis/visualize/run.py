"""What `tools/visualize.py` does: a picture per image, one of the graph, one page with all."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

from PIL import Image

from fpn_plugin.analysis.draw import draw_graph
from fpn_plugin.analysis.fusion_weights import fusion_weights
from fpn_plugin.analysis.report.bar import Bar
from fpn_plugin.analysis.report.page import html_figure, html_page, html_table, paragraph
from fpn_plugin.analysis.report.table import Table
from fpn_plugin.analysis.visualize.detector import Detector, load_detector, read_config
from fpn_plugin.analysis.visualize.images import (
    class_names,
    dataset_records,
    find_images,
    records_of,
)
from fpn_plugin.analysis.visualize.look import Record, look
from fpn_plugin.analysis.visualize.picture import Shown, choose, draw_image, save_png
from fpn_plugin.analysis.visualize.rows import rows_of
from fpn_plugin.analysis.visualize.sizes import sizes_table
from fpn_plugin.pyramid.pyramid import GraphExecutor

GRAPH, PAGE, SIZES = "graph.png", "index.html", "sizes.md"


@dataclass(frozen=True)
class Settings:
    """What to look at.

    Attributes:
        config_file: of the model.
        output: a folder; it is made if it does not exist.
        weights: its checkpoint; "" for `MODEL.WEIGHTS`.
        inputs: images, folders, patterns; or none, and a dataset.
        dataset: a registered dataset's name.
        num: of its images, at most.
        score: detections below it are not shown.
        html: whether to write the page too.
        pictures: whether to draw at all, or only to count which level finds which sizes.
        overwrite: whether files of an earlier call may be replaced.
        opts: `KEY VALUE` pairs for the config.
    """

    config_file: str
    output: Path
    weights: str = ""
    inputs: Sequence[str] = ()
    dataset: str = ""
    num: int = 4
    score: float = 0.5
    html: bool = False
    pictures: bool = True
    overwrite: bool = False
    opts: Sequence[str] = ()


def visualize(settings: Settings, bar: Bar) -> list[Path]:
    """Write the pictures, the table of sizes and levels where the truth is known, and the page if
    it is asked for.

    Returns:
        the files.

    Raises:
        FileExistsError: if one of them is there already, unless `overwrite`.
        ValueError: (FileNotFoundError, KeyError) for a bad argument, naming it.
    """
    if not 0 <= settings.score <= 1:
        raise ValueError(f"--score: {settings.score} is not from 0 to 1")
    cfg = read_config(settings.config_file, settings.weights, settings.opts)
    datasets = [settings.dataset] if settings.dataset else list(cfg.DATASETS.TEST)
    if settings.dataset:
        records = dataset_records(settings.dataset, settings.num)
    else:
        records = records_of(find_images(settings.inputs), datasets)
    pictures = dict(zip(_names(records), records))
    others = [*([GRAPH] if settings.pictures else []), SIZES, *([PAGE] if settings.html else [])]
    _check_output(settings, [*(pictures if settings.pictures else ()), *others])
    bar.say(f"Loading {cfg.MODEL.WEIGHTS}")
    detector = load_detector(cfg)
    shown = _draw_images(detector, pictures, class_names(datasets), settings, bar)
    names = [Path(record["file_name"]).name for record in records]
    drawn = {settings.output / file: name for file, name in zip(pictures, names)}
    drawn = drawn if settings.pictures else {}
    backbone = detector.model.backbone
    if settings.pictures and isinstance(backbone, GraphExecutor):
        drawn[settings.output / GRAPH] = "the pyramid"
        draw_graph(backbone, settings.output / GRAPH, weights=fusion_weights(backbone))
    tables = [_table(names, shown)]
    written = list(drawn)
    sizes = sizes_table(shown)
    if sizes is not None:
        tables.append(sizes)
        written.append(settings.output / SIZES)
        written[-1].write_text(f"{sizes.text('github')}\n\n{sizes.note}\n", encoding="utf-8")
    if settings.html:
        written.append(settings.output / PAGE)
        written[-1].write_text(_page(cfg.MODEL.WEIGHTS, drawn, tables, settings), encoding="utf-8")
    return written


def _names(records: Sequence[Record]) -> list[str]:
    digits = len(str(len(records)))
    return [
        f"{number:0{digits}}_{Path(record['file_name']).stem}.png"
        for number, record in enumerate(records, 1)
    ]


def _check_output(settings: Settings, names: Sequence[str]) -> None:
    if settings.output.exists() and not settings.output.is_dir():
        raise NotADirectoryError(f"--output {str(settings.output)!r} is a file, not a folder")
    present = [name for name in names if (settings.output / name).exists()]
    if present and not settings.overwrite:
        raise FileExistsError(
            f"--output {str(settings.output)!r} holds {', '.join(present[:3])}"
            f"{', …' if len(present) > 3 else ''}; give --overwrite, or another folder"
        )
    settings.output.mkdir(parents=True, exist_ok=True)


def _draw_images(
    detector: Detector,
    pictures: Mapping[str, Record],
    names: Sequence[str],
    settings: Settings,
    bar: Bar,
) -> list[Shown]:
    found = []
    bar.begin("Images", len(pictures))
    for number, (name, record) in enumerate(pictures.items(), 1):
        seen = look(detector.model, detector.mapper, record)
        found.append(choose(seen, names, settings.score))
        if settings.pictures:
            rows = rows_of(detector.model.backbone, seen.maps)
            save_png(draw_image(seen, found[-1], rows, settings.score), settings.output / name)
        bar.step(number)
    bar.end()
    return found


def _page(
    weights: str, titles: Mapping[Path, str], tables: Sequence[Table], settings: Settings
) -> str:
    """The page; pictures are in it as JPEG, a fifth of the PNG's size."""
    parts = [paragraph(f"{settings.config_file}, {weights}"), *map(html_table, tables)]
    with tempfile.TemporaryDirectory() as folder:
        for path, title in titles.items():
            small = Path(folder) / f"{path.stem}.jpg"
            with Image.open(path) as picture:
                picture.convert("RGB").save(small, quality=85)
            parts.append(html_figure(title, path if path.name == GRAPH else small))
    return html_page("What the detector sees", parts)


def _table(names: Sequence[str], shown: Sequence[Shown]) -> Table:
    levels = sorted({level for item in shown for level in item.levels if level is not None})
    header = ["image", "ground truth", "found", *(f"level {level}" for level in levels)]
    rows = []
    for name, item in zip(names, shown):
        truth = "?" if item.truth is None else str(len(item.truth))
        counts = [str(list(item.levels).count(level)) for level in levels]
        rows.append([name, truth, str(len(item.found)), *counts])
    return Table("Objects", header, rows, "By the level that each detection was made from.")
