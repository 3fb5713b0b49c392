"""What `fpn predict` does: run a trained detector on photos, videos or a camera, and write pictures
with names and scores, and the detections in COCO's result format."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Callable, Mapping, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata, MetadataCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import AugInput
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from fpn_plugin.data.classes import (
    check_test_classes,
    dataset_classes,
    has_classes,
    model_classes,
)
from fpn_plugin.data.coco_format import needed_splits
from fpn_plugin.data.deep_images import read_image
from fpn_plugin.data.image_checks import READ_ERRORS, read_fault
from fpn_plugin.modeling.build import score_threshold
from fpn_plugin.modeling.speed import prepare_for_inference
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import Detector, load_detector, read_config
from fpn_plugin.visualize.images import (
    SUFFIXES,
    all_records,
    class_names,
    detections_of,
    find_images,
    skeleton,
)
from fpn_plugin.visualize.objects import class_name, nothing_found, objects_of_instances
from fpn_plugin.visualize.picture import as_pixels
from fpn_plugin.visualize.results import class_colours, photo_figure
from fpn_plugin.visualize.run import check_output
from fpn_plugin.visualize.video import VIDEO_SUFFIXES, Video, VideoWriter, camera_of, wall_clock

RESULTS = "coco_instances_results.json"  # as an evaluation calls it
_LEAST_PIXELS = 800  # of a picture's longer side: a smaller photo is enlarged, for its labels
_INTERRUPTED = 130  # the exit code of a shell's programs after ctrl-C


@dataclass(frozen=True)
class Settings:
    """What to predict.

    Attributes:
        weights: a checkpoint; "" for `MODEL.WEIGHTS`.
        config_file: of the model; "" for that of the run that wrote the weights.
        inputs: images, videos, folders, patterns, cameras; or none, and a dataset.
        dataset: a registered dataset's name.
        output: a folder; it is created if it does not exist.
        score: detections below it are not drawn.
        json: whether to write `RESULTS`.
        json_only: whether to write nothing else.
        overwrite: whether files of an earlier call may be replaced.
        allow_partial: whether the checkpoint may lack weights of the model, or have others.
        opts: `KEY VALUE` pairs for the config.
    """

    weights: str = ""
    config_file: str = ""
    inputs: Sequence[str] = ()
    dataset: str = ""
    output: Path = Path("predictions")
    score: float = 0.5
    json: bool = False
    json_only: bool = False
    overwrite: bool = False
    allow_partial: bool = False
    opts: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """Something to look at.

    Attributes:
        record: of an image, as in a dataset; of others with the `file_name` alone.
        output: the name of the file that is written of it.
        camera: its number; None for a file.
    """

    record: Mapping[str, Any]
    output: str
    camera: int | None = None

    @property
    def name(self) -> str:
        """Of the file or camera."""
        return str(self.record["file_name"])

    @property
    def is_video(self) -> bool:
        """Whether it has frames."""
        return self.camera is not None or Path(self.output).suffix == ".mp4"


class Predictor:
    """A detector as an evaluation runs it, on one image at a time.

    Args:
        detector: of :func:`fpn_plugin.visualize.detector.load_detector`.
    """

    def __init__(self, detector: Detector) -> None:
        self.mapper = detector.mapper
        self._model = prepare_for_inference(detector.model, detector.cfg).eval()

    @torch.no_grad()
    def predict(self, model_input: Mapping[str, Any]) -> dict[str, Any]:
        """Detectron2's output for one input of the model."""
        output: dict[str, Any] = self._model([model_input])[0]
        return output

    def frame_input(self, pixels: np.ndarray) -> dict[str, Any]:
        """The model's input for an image in memory: what the mapper makes of one in a file.

        Args:
            pixels: `(H, W, 3)`, RGB, 0 to 255.
        """
        image = AugInput(convert_PIL_to_numpy(Image.fromarray(pixels), self.mapper.image_format))
        self.mapper.augmentations(image)
        tensor = torch.from_numpy(np.ascontiguousarray(image.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": pixels.shape[0], "width": pixels.shape[1]}


@dataclass
class Tally:
    """What was found so far; its size does not grow with the images.

    Attributes:
        images: and frames.
        counts: detections that reach the score, by class.
        best: the highest score of all detections; none or one.
        faults: a line for each file that could not be read.
        lines: the files that were written.
    """

    images: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    best: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, instances: Instances, score: float) -> int:
        """Count the detections of an image; returns how many reach the score."""
        scores = instances.scores.float()
        self.images += 1
        self.best = [max([*self.best, *scores.tolist()])] if len(scores) else self.best
        shown = instances.pred_classes[scores >= score].tolist()
        self.counts.update(shown)
        return len(shown)


class ResultFile:
    """COCO's results, written while they come; use it in a `with`, which puts it in its place.

    Args:
        path: None to write nothing.
        ids: the dataset's id of each class; a class without one keeps its number.
    """

    def __init__(self, path: Path | None, ids: Sequence[int]) -> None:
        self._path, self._ids, self._empty = path, ids, True
        self._part = path.with_name(f".{path.name}.part") if path else None
        self._file: IO[str] | None = None

    def add(self, instances: Instances, image_id: Any, **more: Any) -> None:
        """Append the detections of an image, as COCO's evaluator has them, and `more` of each."""
        if self._file is None:
            return
        results = instances_to_coco_json(instances, image_id)
        for result in results:
            if result["category_id"] < len(self._ids):
                result["category_id"] = self._ids[result["category_id"]]
        if results:
            text = ", ".join(json.dumps({**result, **more}) for result in results)
            self._file.write(f"{'[' if self._empty else ', '}{text}")  # at once, for ctrl-C
            self._empty = False

    def __enter__(self) -> ResultFile:
        self._file = open(self._part, "w", encoding="utf-8") if self._part else None
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._file and self._part and self._path:
            self._file.write("[]" if self._empty else "]")
            self._file.close()
            if error:
                self._part.unlink()
            else:
                os.replace(self._part, self._path)


def predict(settings: Settings, bar: Bar, show: Callable[[str], object]) -> int:
    """Write the pictures, videos and results.

    Args:
        show: gets the names of the files, and of those that could not be read.

    Returns:
        the exit code: 1 if a file could not be read, 130 after ctrl-C (which is how a camera ends).

    Raises:
        FileExistsError: if a file is there already, unless `overwrite`.
        FileNotFoundError: if the weights, their config or an input does not exist.
        KeyError: for an unknown dataset or config key.
        ValueError: for another bad argument, naming it; or if the checkpoint is of another model.
    """
    if not 0 <= settings.score <= 1:
        raise ValueError(f"--score: {settings.score} is not from 0 to 1")
    needed = needed_splits(settings.dataset)
    cfg = read_config(settings.config_file, settings.weights, settings.opts, needed)
    writes = settings.json or settings.json_only
    if writes and not has_classes(cfg):
        name = cfg.MODEL.META_ARCHITECTURE
        raise ValueError(f"--json: a {name} finds no objects of classes; leave it out")
    sources = find_sources(settings, cfg)
    names = [] if settings.json_only else [source.output for source in sources]
    _keep_inputs(sources, names, settings.output)
    files = [*names, *([RESULTS] if writes else [])]
    check_output(settings.output, files, settings.overwrite)
    key, threshold = score_threshold(cfg)
    if settings.score < threshold:
        bar.say(
            f"The model drops all below {key} {threshold:g}, whatever --score: override the key"
        )
    bar.say(f"Loading {cfg.MODEL.WEIGHTS}")
    predictor = Predictor(load_detector(cfg, allow_partial=settings.allow_partial))
    artist = Artist(cfg, settings)
    results = ResultFile(settings.output / RESULTS if writes else None, artist.ids)
    tally, code = Tally(), 0
    with results, contextlib.closing(_Stages(bar, sources)) as stages:
        run = _Run(predictor, artist, results, tally, stages)
        try:
            for source in sources:
                run.predict(source)
        except KeyboardInterrupt:
            code = 0 if sources[-1].camera is not None else _INTERRUPTED
    for line in [*tally.lines, *([str(settings.output / RESULTS)] if writes else [])]:
        show(line)
    _summarize(tally, artist, settings.score, f"{key} {threshold:g}", bar)
    if tally.faults:
        show(f"Not read: {'; '.join(tally.faults)}")
    return code or int(bool(tally.faults))


def find_sources(settings: Settings, cfg: CfgNode) -> list[Source]:
    """The images first, then the videos, then the cameras; no two write the same file.

    Raises:
        FileNotFoundError: naming the input that is or has no image and no video.
        KeyError: for an unknown dataset.
        ValueError: for a dataset with other classes than the model, or more than one camera.
    """
    cameras = [n for n in map(camera_of, settings.inputs) if n is not None]
    if len(cameras) > 1:
        raise ValueError(f"--input: {len(cameras)} cameras are given; one runs until ctrl-C")
    if settings.dataset:
        records: list[dict[str, Any]] = all_records(settings.dataset)
        check_test_classes(cfg, settings.dataset)
    else:
        names = [name for name in settings.inputs if camera_of(name) is None]
        paths = find_images(names, (*SUFFIXES, *VIDEO_SUFFIXES))
        paths.sort(key=lambda path: path.suffix.lower() in VIDEO_SUFFIXES)  # a stable sort
        records = [{"file_name": str(path)} for path in paths]
    taken: Counter[str] = Counter()
    sources = []
    for record in records:
        path = Path(record["file_name"])
        suffix = ".mp4" if path.suffix.lower() in VIDEO_SUFFIXES else ".jpg"
        name = path.stem
        while taken[f"{name}{suffix}".lower()]:  # of another folder, or with another suffix
            taken[f"{path.stem}{suffix}".lower()] += 1
            name = f"{path.stem}_{taken[f'{path.stem}{suffix}'.lower()]}"
        taken[f"{name}{suffix}".lower()] += 1
        sources.append(Source(record, f"{name}{suffix}"))
    for number in cameras:
        sources.append(Source({"file_name": f"camera:{number}"}, f"camera_{number}.mp4", number))
    return sources


def _keep_inputs(sources: Sequence[Source], names: Sequence[str], output: Path) -> None:
    """Refuse to write over an input, even with `--overwrite`."""
    inputs = {os.path.realpath(source.name): source.name for source in sources}
    for name in names:
        if original := inputs.get(os.path.realpath(output / name)):
            raise ValueError(f"--output {str(output)!r}: would replace the input {original}")


class Artist:
    """Draws what was found, in the model's class names.

    Attributes:
        ids: the dataset's id of each class.
        names: of the classes.
    """

    def __init__(self, cfg: CfgNode, settings: Settings) -> None:
        self.settings = settings
        self._datasets = [settings.dataset] if settings.dataset else list(cfg.DATASETS.TEST)
        self.names = class_names(self._datasets, cfg)
        self._lines = skeleton(self._datasets, cfg)
        known = [dataset_classes(name) for name in self._datasets[:1]]
        classes = (
            known[0] if settings.dataset and known else model_classes(cfg) or (*known, None)[0]
        )
        self.ids = list(classes.ids) if classes else []
        self._deep_images = cfg.INPUT.DEEP_IMAGES

    def read(self, path: str) -> np.ndarray:
        """A photo to draw on, RGB."""
        return read_image(path, "RGB", self._deep_images)

    def draw(
        self, pixels: np.ndarray, output: Mapping[str, Any], instances: Instances, least: int = 0
    ) -> np.ndarray:
        """The photo with what was found on it.

        Args:
            instances: on the CPU.
            least: the longer side of the result, if the photo's is shorter.
        """
        segments = self._draw_segments(pixels, output)
        if "panoptic_seg" in output:
            instances = instances[:0]  # they are among the segments
        shown = instances[instances.scores >= self.settings.score]
        objects = objects_of_instances(shown, self.names, self._lines)
        figure = photo_figure(segments, objects, class_colours(objects, self._datasets), least)
        return as_pixels(figure, figure.dpi)

    def _draw_segments(self, pixels: np.ndarray, output: Mapping[str, Any]) -> np.ndarray:
        """The photo with the regions of semantic or panoptic segmentation, by Detectron2."""
        if "panoptic_seg" not in output and "sem_seg" not in output:
            return pixels
        stuff: Sequence[str] = ()
        for name in self._datasets:
            stuff = stuff or MetadataCatalog.get(name).get("stuff_classes") or ()
        numbers = [f"class {i}" for i in range(1000)]
        named = [[*known, *numbers[len(known) :]] for known in (self.names, list(stuff))]
        visualizer = Visualizer(pixels, Metadata(thing_classes=named[0], stuff_classes=named[1]))
        if "panoptic_seg" in output:
            panoptic, segments = output["panoptic_seg"]
            return visualizer.draw_panoptic_seg(panoptic.cpu(), segments).get_image()
        return visualizer.draw_sem_seg(output["sem_seg"].argmax(0).cpu()).get_image()


class _Stages:
    """A stage of the bar for the images, and one for each video."""

    def __init__(self, bar: Bar, sources: Sequence[Source]) -> None:
        self._bar, self._done = bar, 0
        if images := sum(not source.is_video for source in sources):
            bar.begin("Images", images)

    def begin(self, name: str, total: int) -> None:
        self._bar.begin(name, max(total, 1))
        self._done = 0

    def step(self) -> None:
        self._done += 1
        self._bar.step(self._done)

    def close(self) -> None:
        self._bar.end()


@dataclass(frozen=True)
class _Run:
    """What all sources of a call go through."""

    predictor: Predictor
    artist: Artist
    results: ResultFile
    tally: Tally
    stages: _Stages

    def predict(self, source: Source) -> None:
        """On an image, or on all frames of a video; a file that cannot be read is noted."""
        if source.is_video:
            try:
                video = Video(Path(source.name) if source.camera is None else source.camera)
            except ValueError as error:
                self.tally.faults.append(f"{source.name} ({error})")
            else:
                self._predict_video(video, source)
            return
        try:
            model_input = self.predictor.mapper(dict(source.record))
            pixels = None if self.artist.settings.json_only else self.artist.read(source.name)
        except READ_ERRORS as error:
            self.tally.faults.append(f"{source.name} ({read_fault(error)})")
            self.stages.step()
            return
        output = self.predictor.predict(model_input)
        instances = detections_of(output, (model_input["height"], model_input["width"]))
        found = self.tally.add(instances, self.artist.settings.score)
        if pixels is not None:
            path = self.artist.settings.output / source.output
            drawn = self.artist.draw(pixels, output, instances, _LEAST_PIXELS)
            Image.fromarray(drawn).save(path, quality=90)
            self.tally.lines.append(f"{path}: {found} found")
        names = {} if "image_id" in source.record else {"file_name": source.name}
        self.results.add(instances, source.record.get("image_id", self.tally.images), **names)
        self.stages.step()

    def _predict_video(self, video: Video, source: Source) -> None:
        """On all frames; ctrl-C leaves a whole file."""
        settings, found = self.artist.settings, 0
        path = settings.output / source.output
        clock = wall_clock if video.is_camera else None
        with video, VideoWriter(path, video.rate, clock) as writer:
            self.stages.begin(Path(source.name).name, video.count)
            try:
                for number, pixels in enumerate(video):
                    output = self.predictor.predict(self.predictor.frame_input(pixels))
                    instances = detections_of(output, pixels.shape[:2])
                    found += self.tally.add(instances, settings.score)
                    if not settings.json_only:
                        writer.write(self.artist.draw(pixels, output, instances))
                    images = self.tally.images
                    self.results.add(instances, images, file_name=source.name, frame=number)
                    self.stages.step()
            finally:
                if not settings.json_only:
                    self.tally.lines.append(f"{path}: {found} found in {video.read} frames")
        if fault := video.fault():
            self.tally.faults.append(f"{source.name} ({fault})")


def _summarize(tally: Tally, artist: Artist, score: float, threshold: str, bar: Bar) -> None:
    """Say what was found in all, or how near to it anything came."""
    if not tally.images:
        return
    if not tally.counts:
        bar.say(nothing_found(tally.best, score, threshold))
        return
    classes = [f"{count} {class_name(i, artist.names)}" for i, count in tally.counts.most_common()]
    total = sum(tally.counts.values())
    bar.say(
        f"{total} objects with score ≥ {score:g} in {tally.images} images: {', '.join(classes)}"
    )
