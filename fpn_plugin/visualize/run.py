"""What `fpn visualize` does: a picture per image and one of the graph, a table of which level
finds objects of which size, one page with all; or pictures of an evaluation's results."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou
from PIL import Image

from fpn_plugin.checkpoint.run_folder import CONFIG, recorded_config
from fpn_plugin.data.classes import (
    Classes,
    check_test_classes,
    compare_classes,
    dataset_classes,
    model_classes,
    recorded_classes,
)
from fpn_plugin.data.coco_format import needed_splits, register_own
from fpn_plugin.data.deep_images import check_rule
from fpn_plugin.modeling.build import score_threshold
from fpn_plugin.modeling.described import load_model_config
from fpn_plugin.pyramid.pyramid import GraphExecutor
from fpn_plugin.report.page import html_figure, html_page, html_table, paragraph
from fpn_plugin.report.progress import Bar
from fpn_plugin.report.tables import Table
from fpn_plugin.visualize.detector import Detector, load_detector, read_config
from fpn_plugin.visualize.draw import draw_graph
from fpn_plugin.visualize.fusion_weights import fusion_weights
from fpn_plugin.visualize.images import (
    Record,
    all_records,
    class_names,
    dataset_records,
    find_images,
    inspect_image,
    records_of,
    report_unreadable,
    skeleton,
    without_unreadable,
)
from fpn_plugin.visualize.maps import map_rows
from fpn_plugin.visualize.objects import ImageObject, nothing_found
from fpn_plugin.visualize.picture import (
    Level,
    Selection,
    draw_image,
    octave,
    select_objects,
)
from fpn_plugin.visualize.results import draw_results

GRAPH, PAGE, SIZES = "graph.png", "index.html", "sizes.md"
MISSED = -1  # the level of a true object that no detection matches
_IOU = 0.5
_DPI = 130


@dataclass(frozen=True)
class Settings:
    """What to draw.

    Attributes:
        config_file: of the model; with `results` only needed for `DATASETS.OWN`.
        output: a folder; it is created if it does not exist.
        weights: a checkpoint; "" for `MODEL.WEIGHTS`.
        inputs: images, folders, patterns; or none, and a dataset.
        dataset: a registered dataset's name.
        results: a file of an evaluation's detections on `dataset`, to draw in place of a model's.
        num: of the dataset's images, at most.
        score: detections below it are not shown.
        html: whether to write the page too.
        pictures: whether to draw at all, or only to count which level finds which sizes.
        overwrite: whether files of an earlier call may be replaced.
        allow_partial: whether the checkpoint may lack weights of the model, or have others.
        opts: `KEY VALUE` pairs for the config.
    """

    config_file: str
    output: Path
    weights: str = ""
    inputs: Sequence[str] = ()
    dataset: str = ""
    results: str = ""
    num: int = 4
    score: float = 0.5
    html: bool = False
    pictures: bool = True
    overwrite: bool = False
    allow_partial: bool = False
    opts: Sequence[str] = ()


def visualize(settings: Settings, bar: Bar) -> list[Path]:
    """Write the pictures, the table of sizes and levels where the truth is known, and the page if
    it is asked for; with `results` only the pictures of these.

    Returns:
        the files.

    Raises:
        FileExistsError: if one of them is there already, unless `overwrite`; pictures of results
            are replaced.
        FileNotFoundError: if the config, the weights, the results or an input does not exist.
        KeyError: for an unknown dataset or config key.
        ValueError: for another bad argument, naming it; at the end, if some images cannot be read.
    """
    if settings.results:
        return _draw_results(settings, bar)
    if not 0 <= settings.score <= 1:
        raise ValueError(f"--score: {settings.score} is not from 0 to 1")
    needed = needed_splits(settings.dataset)
    cfg = read_config(settings.config_file, settings.weights, settings.opts, needed)
    datasets = [settings.dataset] if settings.dataset else list(cfg.DATASETS.TEST)
    if settings.dataset:
        records = dataset_records(settings.dataset, settings.num)
        check_test_classes(cfg, settings.dataset)
    else:
        records = records_of(find_images(settings.inputs), datasets, cfg)
    pictures = dict(zip(_names(records), records)) if settings.pictures else {}
    others = [*([GRAPH] if settings.pictures else []), SIZES, *([PAGE] if settings.html else [])]
    check_output(settings.output, [*pictures, *others], settings.overwrite)
    bar.say(f"Loading {cfg.MODEL.WEIGHTS}")
    detector = load_detector(cfg, allow_partial=settings.allow_partial)
    records, faults = without_unreadable(records, lambda record: detector.mapper(dict(record)))
    kept = set(map(id, records))
    pictures = {file: record for file, record in pictures.items() if id(record) in kept}
    if not records:
        report_unreadable(faults, 0, settings.output)
    selections = _draw_images(
        *(detector, records, list(pictures), class_names(datasets, cfg)),
        *(skeleton(datasets, cfg), settings, bar),
    )
    names = [Path(record["file_name"]).name for record in records]
    titles = {settings.output / file: name for file, name in zip(pictures, names)}
    backbone = detector.model.backbone
    if settings.pictures and isinstance(backbone, GraphExecutor):
        titles[settings.output / GRAPH] = "the pyramid"
        draw_graph(backbone, settings.output / GRAPH, weights=fusion_weights(backbone))
    written = list(titles)
    tables = [_objects_table(names, selections)]
    sizes = sizes_table(selections)
    if sizes is not None:
        tables.append(sizes)
        written.append(settings.output / SIZES)
        written[-1].write_text(f"{sizes.text('github')}\n\n{sizes.note}\n", encoding="utf-8")
    if settings.html:
        written.append(settings.output / PAGE)
        page = _page(cfg.MODEL.WEIGHTS, titles, tables, settings)
        written[-1].write_text(page, encoding="utf-8")
    report_unreadable(faults, len(records), settings.output)
    return written


def _draw_results(settings: Settings, bar: Bar) -> list[Path]:
    """The ground truth beside the detections of an evaluation; no model is built."""
    deep_images = "percentile"
    if settings.config_file:
        # the weights need not be there any more
        no_weights = ["MODEL.WEIGHTS", ""]
        cfg = load_model_config(settings.config_file, settings.opts, no_weights)
        register_own(cfg, needed=needed_splits(settings.dataset))
        classes, deep_images = model_classes(cfg), check_rule(cfg.INPUT.DEEP_IMAGES)
    else:
        classes = _classes_beside(Path(settings.results))
    all_records(settings.dataset)  # most datasets name their classes when they are loaded
    compare_classes([each for each in (classes, dataset_classes(settings.dataset)) if each])
    return draw_results(
        settings.results,
        settings.dataset,
        settings.output,
        settings.num,
        settings.score,
        deep_images,
        bar.say,
    )


def _classes_beside(results: Path) -> Classes | None:
    """The model's classes by the config.yaml of the run that wrote an evaluation's results."""
    for folder in results.resolve().parents[1:3]:  # above inference/, or its folder for a dataset
        with contextlib.suppress(ValueError):  # another program's file
            if classes := recorded_classes(recorded_config(str(folder)), str(folder / CONFIG)):
                return classes
    return None


def _names(records: Sequence[Record]) -> list[str]:
    digits = len(str(len(records)))
    return [
        f"{number:0{digits}}_{Path(record['file_name']).stem}.png"
        for number, record in enumerate(records, 1)
    ]


def check_output(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Make the folder of `--output`, where none of the files may be.

    Raises:
        FileExistsError: if one is there, unless `overwrite`.
        NotADirectoryError: if the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {str(folder)!r} is a file, not a folder")
    present = [name for name in names if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"--output {str(folder)!r} holds {', '.join(present[:3])}"
            f"{', …' if len(present) > 3 else ''}; give --overwrite, or another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _draw_images(
    detector: Detector,
    records: Sequence[Record],
    files: Sequence[str],
    names: Sequence[str],
    lines: Sequence[tuple[int, int]],
    settings: Settings,
    bar: Bar,
) -> list[Selection]:
    """Draw the images into files; without `files` only find their objects."""
    selections = []
    scores: list[float] = []
    bar.begin("Images", len(records))
    for number, record in enumerate(records):
        image = inspect_image(detector.model, detector.mapper, record)
        selections.append(select_objects(image, names, settings.score, lines))
        scores += image.detections.scores.tolist()
        if files:
            rows = map_rows(detector.model.backbone, image.maps)
            figure = draw_image(image, selections[-1], rows, settings.score)
            figure.savefig(settings.output / files[number], dpi=_DPI)
        bar.step(number + 1)
    bar.end()
    if max(scores, default=-1.0) < settings.score:
        threshold = "{} {:g}".format(*score_threshold(detector.cfg))
        bar.say(nothing_found(scores, settings.score, threshold))
    return selections


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


def _objects_table(names: Sequence[str], selections: Sequence[Selection]) -> Table:
    """A row per image: how many true objects and detections it has, and from which levels."""
    levels = sorted(
        {level for selection in selections for level in selection.levels if level is not None}
    )
    header = ["image", "ground truth", "found", *(f"level {level}" for level in levels)]
    rows = []
    for name, selection in zip(names, selections):
        truth = "?" if selection.truth is None else str(len(selection.truth))
        counts = [str(list(selection.levels).count(level)) for level in levels]
        rows.append([name, truth, str(len(selection.detections)), *counts])
    return Table("Objects", header, rows, "By the level that each detection was made from.")


def sizes_table(selections: Sequence[Selection]) -> Table | None:
    """Which level finds objects of which size, over many images.

    A row per octave of sizes of the true objects (the square root of the box's area, in pixels of
    the image): how many there are, and how many were found from each level; None if the truth is
    known for no image.
    """
    known = [selection for selection in selections if selection.truth is not None]
    if not known:
        return None
    counts: Counter[tuple[int, Level]] = Counter()
    for selection in known:
        for obj, level in zip(selection.truth or (), matched_levels(selection)):
            counts[octave(obj.size), level] += 1
    levels = sorted(
        {level for _, level in counts if level != MISSED}, key=lambda level: (level is None, level)
    )
    rows = []
    for place in sorted({place for place, _ in counts}):
        total = sum(number for (other, _), number in counts.items() if other == place)
        cells = [str(counts[place, level]) for level in (*levels, MISSED)]
        rows.append([f"{2**place} to {2**(place + 1)} px", str(total), *cells])
    names = ["level unknown" if level is None else f"level {level}" for level in levels]
    note = (
        f"True objects of {len(known)} images by the square root of their box's area, and the"
        f" level that the detection came from that found them (IoU ≥ {_IOU}, the same class)."
    )
    return Table("Sizes and levels", ["size", "objects", *names, "missed"], rows, note)


def matched_levels(selection: Selection) -> list[Level]:
    """The level of the detection that matches each true object of an image, or MISSED.

    Detections choose in the order of their scores, as in COCO's evaluation: each takes the object
    of its class that it overlaps most, by an IoU of 0.5 or more, among those that are still free.
    """
    truth, detections = selection.truth or (), selection.detections
    levels: list[Level] = [MISSED] * len(truth)
    free = set(range(len(truth)))
    overlaps = pairwise_iou(_boxes(detections), _boxes(truth))  # (detections, objects)
    for i in sorted(range(len(detections)), key=lambda i: -detections[i].score):
        candidates = [
            j
            for j in free
            if overlaps[i, j] >= _IOU and truth[j].category == detections[i].category
        ]
        if candidates:
            best = max(candidates, key=lambda j: float(overlaps[i, j]))
            free.remove(best)
            levels[best] = selection.levels[i]
    return levels


def _boxes(objects: Sequence[ImageObject]) -> Boxes:
    return Boxes(torch.tensor([obj.box for obj in objects], dtype=torch.float32).reshape(-1, 4))
