"""`DATALOADER.ON_ERROR`: a broken image is named, or replaced, counted and listed."""

from __future__ import annotations

import errno
import io
import itertools
import json
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch
from crash_child import OVERRIDES
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from PIL import Image
from test_resume import assert_same, final_state
from tiny import TRAIN, VAL, register, tiny_config, write_dataset

from fpn_plugin.data import DatasetError, check_config_datasets
from fpn_plugin.engine.data import SampleKey, SeededDataset, build_train_loader
from fpn_plugin.engine.faults.skipping import CountedLoader, ImageError, SkipCounter
from fpn_plugin.engine.trainer import Trainer

BROKEN = (3, 4)  # one ends too early, one has another size than the JSON says
MakeConfig = Callable[..., CfgNode]


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Iterator[Path]:
    """A dataset with two broken images, registered under the usual names."""
    folder = tmp_path_factory.mktemp("bad")
    json_file = write_dataset(folder)
    picture, jpeg = Image.open(folder / "3.png"), io.BytesIO()
    picture.save(jpeg, "JPEG")
    (folder / "3.png").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    Image.new("RGB", (10, 10)).save(folder / "4.png")
    register(json_file)
    yield folder
    register(dataset)


def files(batches: list[Any]) -> list[str]:
    return [Path(sample["file_name"]).name for batch in batches for sample in batch]


def loaded(cfg: CfgNode, count: int) -> tuple[list[Any], list[tuple[str, str]]]:
    counter = SkipCounter(cfg.OUTPUT_DIR)
    batches = list(itertools.islice(CountedLoader(build_train_loader(cfg), counter), count))
    return batches, counter.pending


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_the_image(workers: int, bad_data: Path, make_config: MakeConfig) -> None:
    cfg = make_config(DATALOADER__NUM_WORKERS=workers)
    message = r"(?s)training image .*/[34].png \(index [34] of.*DATALOADER.ON_ERROR"
    with pytest.raises(ImageError, match=message):
        loaded(cfg, 10)


def test_skip_does_not_depend_on_workers(bad_data: Path, make_config: MakeConfig) -> None:
    batches, skipped = loaded(make_config(DATALOADER__ON_ERROR="skip"), 20)
    assert {Path(file).name for file, _ in skipped} == {"3.png", "4.png"} and len(skipped) > 4
    assert not {"3.png", "4.png"} & set(files(batches))
    faults = dict(skipped)
    assert "OSError: image file is truncated" in faults[str(bad_data / "3.png")]
    assert "SizeMismatchError: Mismatched image shape" in faults[str(bad_data / "4.png")]
    by_workers = make_config(DATALOADER__ON_ERROR="skip", DATALOADER__NUM_WORKERS=2)
    others, others_skipped = loaded(by_workers, 20)
    assert others_skipped == skipped and files(others) == files(batches)
    for sample, other in zip(itertools.chain(*batches), itertools.chain(*others)):
        assert torch.equal(sample["image"], other["image"]) and sample.keys() == other.keys()


class Stop(HookBase):
    """Ends a run with an error."""

    def before_step(self) -> None:
        if self.trainer.iter == 5:
            raise InterruptedError


def train(output: Path, stop: bool = False) -> None:
    torch.manual_seed(0)
    keys = {**OVERRIDES, "DATALOADER__ON_ERROR": "skip", "DATASETS__TEST": ()}
    trainer = Trainer(tiny_config(output, **keys))
    trainer.register_hooks([Stop()] if stop else [])
    trainer.resume_or_load(resume=True)
    trainer.train()


def test_a_run_counts_what_it_trained_on_also_when_resumed(
    bad_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, one_order: None
) -> None:
    train(tmp_path / "whole")
    report = json.loads((tmp_path / "whole" / "skipped.json").read_text())
    positions = build_train_loader(tiny_config(tmp_path, **OVERRIDES)).dataset.sampler
    drawn = [key.image for key in itertools.islice(positions, 16)]
    # what is drawn in the place of one may be broken as well
    counts = {int(Path(file).stem): entry["times"] for file, entry in report.items()}
    assert set(counts) == set(BROKEN) and all(counts[i] >= drawn.count(i) for i in BROKEN)
    assert f"2 training images were replaced, {sum(counts.values())} times in all" in caplog.text
    with pytest.raises(InterruptedError):
        train(tmp_path / "broken", stop=True)
    assert json.loads((tmp_path / "broken" / "skipped.json").read_text()) != report
    train(tmp_path / "broken")  # from the checkpoint after its fourth iteration, not its fifth
    assert json.loads((tmp_path / "broken" / "skipped.json").read_text()) == report
    assert_same(final_state(tmp_path / "broken"), final_state(tmp_path / "whole"))


def test_nothing_but_bad_images(dataset: Path) -> None:
    def refuse(record: dict) -> None:
        raise OSError("broken data stream")

    samples = SeededDataset([{"file_name": "a.jpg"}], refuse, 7, skip=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="100 images.*index 0 .a.jpg: OSError: broken data"):
        samples[SampleKey(0, 0)]


@pytest.mark.parametrize(
    "error",
    [KeyError("annotations"), TypeError("no"), MemoryError(), OSError(errno.EMFILE, "too many")],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_the_images_fault_is_never_skipped(error: Exception) -> None:
    def fail(record: dict) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        SeededDataset([{"file_name": "a"}], fail, 7, skip=True)[SampleKey(0, 0)]  # type: ignore
    assert caught.value is error


def test_unknown_value(bad_data: Path, make_config: MakeConfig) -> None:
    with pytest.raises(KeyError, match="DATALOADER.ON_ERROR.*'warn'.*raise.*skip"):
        build_train_loader(make_config(DATALOADER__ON_ERROR="warn"))


def test_a_test_image_is_never_skipped(bad_data: Path, make_config: MakeConfig) -> None:
    cfg = make_config(DATALOADER__ON_ERROR="skip", DATASETS__TEST=(VAL,))
    with pytest.raises(ImageError, match=f"test image .*/3.png of {VAL} .DATASETS.TEST"):
        list(Trainer.build_test_loader(cfg, VAL))


def test_the_checks_leave_skipped_images_alone(bad_data: Path, make_config: MakeConfig) -> None:
    skip = {"DATALOADER__ON_ERROR": "skip"}
    assert check_config_datasets(make_config(**skip))[0].level == "annotations"
    for config in (make_config(), make_config(**skip, DATASETS__TEST=(VAL,))):
        with pytest.raises(DatasetError, match="3.png"):
            check_config_datasets(config)
    assert len(DatasetCatalog.get(TRAIN)) == 10
