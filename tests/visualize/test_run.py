"""`tools/visualize.py`: which images, which files, and the page."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import scene_data
import torch
from browser import inspect
from PIL import Image

from fpn_plugin.cli.main import main
from fpn_plugin.report.progress import Bar
from fpn_plugin.visualize.detector import load_detector, read_config
from fpn_plugin.visualize.images import (
    class_names,
    dataset_records,
    find_images,
    inspect_image,
    records_of,
)
from fpn_plugin.visualize.levels import FIELD
from fpn_plugin.visualize.objects import ImageObject
from fpn_plugin.visualize.picture import Selection
from fpn_plugin.visualize.run import (
    GRAPH,
    MISSED,
    PAGE,
    SIZES,
    Settings,
    matched_levels,
    sizes_table,
    visualize,
)


def settings(folder: Path, output: Path, **changes: Any) -> Settings:
    values = {"inputs": [str(folder / "val0.png")], "score": 0.0, **changes}
    return Settings(
        str(folder / "config.yaml"), output, weights=str(folder / "model.pth"), **values
    )


def test_files_folders_and_patterns(folder: Path) -> None:
    pattern = str(folder / "val*.png")
    found = find_images([pattern, str(folder / "val0.png"), str(folder / "other")])
    assert [path.name for path in found] == ["val0.png", "val1.png", "strange.PNG"]
    (folder / "empty").mkdir(exist_ok=True)
    for name in ("empty", "nothing-*.jpg", "no.jpg"):
        with pytest.raises(FileNotFoundError, match=f"--input .*{re.escape(name)}"):
            find_images([str(folder / name)])


def test_the_truth_of_a_file_that_a_dataset_has(folder: Path) -> None:
    paths = [folder / "other" / ".." / "val1.png", folder / "other" / "strange.PNG"]
    known, unknown = records_of(paths, ["heads_val", "coco_2017_val"])
    assert len(known["annotations"]) >= 3 and "annotations" not in unknown


def test_records_of_a_dataset(folder: Path) -> None:
    assert len(dataset_records("heads_val", 9)) == scene_data.IMAGES
    with pytest.raises(ValueError, match="--num: 0"):
        dataset_records("heads_val", 0)
    with pytest.raises(KeyError, match="--dataset.*'no_such'"):
        dataset_records("no_such", 1)


def test_a_checkpoint_of_another_pyramid_is_not_drawn(folder: Path, tmp_path: Path) -> None:
    given = settings(folder, tmp_path, opts=["MODEL.FPN.TOPOLOGY", "pafpn"])
    with pytest.raises(ValueError, match="model.pth' does not .*pafpn.*MODEL.FPN,.*--allow-parti"):
        visualize(given, Bar(quiet=True))
    assert not list(tmp_path.iterdir())


def test_the_truth_has_the_classes_of_the_model(folder: Path, tmp_path: Path) -> None:
    names = str(["arrow", "box", "car", "dog", "egg", "fan"])
    opts = ["DATASETS.CLASSES.NAMES", names]
    for source in ({"inputs": (), "dataset": "heads_val"}, {}):
        given = settings(folder, tmp_path, opts=opts, **source)
        with pytest.raises(ValueError, match="class 0 is 'arrow' in the model and .* in heads_val"):
            visualize(given, Bar(quiet=True))
    cfg = read_config(str(folder / "config.yaml"), str(folder / "model.pth"), opts)
    assert class_names(["heads_val"], cfg)[0] == "arrow"
    (record,) = records_of([folder / "other" / "strange.PNG"], ["heads_val"], cfg)
    assert "annotations" not in record, "no truth is drawn"


def test_inspecting_leaves_the_model_and_the_random_numbers_alone(folder: Path) -> None:
    detector = load_detector(
        read_config(str(folder / "config.yaml"), str(folder / "model.pth"), [])
    )
    model = detector.model.train()
    model.backbone.bottom_up.eval()
    modes = [module.training for module in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    record = dataset_records("heads_val", 1)[0]
    seen = inspect_image(model, detector.mapper, record)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    height, width = seen.pixels.shape[:2]
    assert (height, width) == (80, 96) and seen.size == (120, 144)
    assert seen.detections.image_size == (80, 96) and seen.detections.has(FIELD)
    assert (
        seen.detections.pred_masks.shape[1:] == (80, 96)
        and seen.annotations == record["annotations"]
    )
    assert seen.levels() == seen.detections.get(FIELD).tolist()


@pytest.fixture(scope="module")
def pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    """The files of a call with a page, and what the bar said."""
    output, out = tmp_path_factory.mktemp("pictures") / "new" / "folder", io.StringIO()
    asked = settings(folder, output, inputs=[str(folder / "val*.png")], html=True)
    return visualize(asked, Bar(stream=out)), out.getvalue()


def test_pictures_and_page(folder: Path, pictures: tuple[list[Path], str]) -> None:
    written, said = pictures
    output = written[0].parent
    assert [path.name for path in written] == ["1_val0.png", "2_val1.png", GRAPH, SIZES, PAGE]
    assert set(output.iterdir()) == set(written)
    assert said.splitlines() == [f"Loading {folder / 'model.pth'}", "Images …"]
    for path in written[:3]:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 800
    page = written[-1].read_text()
    assert page.count("<img") == 3 and page.count("data:image/jpeg") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page) and len(page) < 5e6
    assert "<td>val0.png</td>" in page and "level 2" in page


def test_files_of_an_earlier_call(folder: Path, pictures: tuple[list[Path], str]) -> None:
    output, out = pictures[0][0].parent, io.StringIO()
    again = settings(folder, output, inputs=[str(folder / "val*.png")], html=True)
    with pytest.raises(FileExistsError, match="1_val0.png, 2_val1.png, graph.png, ….*--overwrite"):
        visualize(again, Bar(quiet=True))
    inputs = [str(folder / "other")]
    changed = settings(folder, output, inputs=inputs, pictures=False, overwrite=True)
    assert visualize(changed, Bar(True, out)) == [] and out.getvalue() == ""


def test_a_broken_picture_is_named_and_the_others_are_drawn(folder: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    whole = (folder / "val0.png").read_bytes()
    (inputs / "b.png").write_bytes(whole)
    (inputs / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (inputs / "empty.jpg").touch()
    (inputs / "text.png").write_text("no picture")
    asked = settings(folder, tmp_path / "out", inputs=[str(inputs)], html=True)
    message = "3 images cannot be read: .*empty.jpg.*text.png.*truncated.png.*; the other 1 are in"
    with pytest.raises(ValueError, match=message):
        visualize(asked, Bar(quiet=True))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"1_b.png", GRAPH, PAGE}
    only = settings(folder, tmp_path / "none", inputs=[str(inputs / "text.png")])
    with pytest.raises(ValueError, match="1 images cannot be read: .*text.png"):
        visualize(only, Bar(quiet=True))


def test_the_page_in_a_browser(pictures: tuple[list[Path], str]) -> None:
    inspection = inspect(pictures[0][-1], 390)
    assert inspection.needed <= 390 and not inspection.complaints
    assert len(inspection.images) == 3 and min(inspection.images) > 800


def test_sizes_only(folder: Path, tmp_path: Path) -> None:
    made = settings(folder, tmp_path, dataset="heads_val", pictures=False, score=0.0)
    assert visualize(made, Bar(quiet=True)) == [tmp_path / SIZES]
    assert [path.name for path in tmp_path.iterdir()] == [SIZES]
    text = (tmp_path / SIZES).read_text()
    assert text.startswith("| size") and "True objects of 2 images" in text


def test_the_tool_and_a_backbone_without_a_graph(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    args = [
        "--config-file",
        folder / "config.yaml",
        "--weights",
        folder / "model.pth",
        "--quiet",
        "--allow-partial",
    ]
    args += ["--dataset", "heads_val", "--num", 1, "--output", tmp_path]
    args += ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.FUSE_TYPE", "sum"]
    args += ["MODEL.BOTTOM_UP.WEIGHTS", ""]
    monkeypatch.setattr(logging, "disable", lambda level: None)  # would stay in this process
    main(["visualize", *map(str, args)])
    assert capsys.readouterr().out == f"{tmp_path / '1_val1.png'}\n{tmp_path / SIZES}\n"


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"weights": ""}, ValueError, "no weights.*--weights or MODEL.WEIGHTS"),
        ({"weights": "no.pth"}, FileNotFoundError, "--weights .MODEL.WEIGHTS. 'no.pth'"),
        ({"score": 1.5}, ValueError, "--score: 1.5"),
        ({"config_file": "no.yaml"}, FileNotFoundError, "--config-file 'no.yaml'"),
        ({"output": Path(__file__)}, NotADirectoryError, "--output"),
    ],
)
def test_mistakes(changes: Any, error: Any, text: str, folder: Path, tmp_path: Path) -> None:
    values = {**vars(settings(folder, tmp_path)), **changes}
    with pytest.raises(error, match=text):
        visualize(Settings(**values), Bar(quiet=True))


def an_object(x: float, side: float, category: int = 0, score: float = 1.0) -> ImageObject:
    return ImageObject((x, 0.0, x + side, side), category=category, score=score)


SMALL, OTHER, LARGE = an_object(0, 20), an_object(40, 20), an_object(100, 100)
FOUND = [
    an_object(101, 100, score=0.9),  # LARGE, from level 4
    an_object(1, 20, score=0.5),  # SMALL, from level 2
    an_object(0, 20, score=0.4),  # SMALL again: it has been found
    an_object(40, 20, category=1, score=0.8),  # another class than OTHER
    an_object(48, 20, score=0.7),  # its IoU with OTHER is 12 / 28
]
SELECTION = Selection(FOUND, [4, 2, 3, 2, 2], [SMALL, OTHER, LARGE])


def test_each_object_is_found_once_by_the_best_of_its_class() -> None:
    assert matched_levels(SELECTION) == [2, MISSED, 4]
    assert matched_levels(Selection([], [], [SMALL])) == [MISSED]
    assert matched_levels(Selection(FOUND, [None] * 5, [LARGE])) == [None]


def test_the_table_counts_by_the_size_of_the_true_object() -> None:
    table = sizes_table([SELECTION, Selection(FOUND, [4] * 5, None), Selection([], [], [LARGE])])
    assert table is not None and "2 images" in table.note
    assert list(table.header) == ["size", "objects", "level 2", "level 4", "missed"]
    assert [list(row) for row in table.rows] == [
        ["16 to 32 px", "2", "1", "0", "1"],
        ["64 to 128 px", "2", "0", "1", "1"],
    ]


def test_levels_and_truths_that_nobody_knows() -> None:
    table = sizes_table([SELECTION, Selection(FOUND[:1], [None], [LARGE])])
    assert table is not None
    assert list(table.header)[2:] == ["level 2", "level 4", "level unknown", "missed"]
    # without a known truth there is no table
    assert sizes_table([Selection(FOUND, [4] * 5, None)]) is None
