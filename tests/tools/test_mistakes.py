"""A mistake ends in its message and exit code 2, an unexpected error in its traceback."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Callable

import pytest
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset

from fpn_plugin.cli import train
from fpn_plugin.cli.main import main
from fpn_plugin.cli.mistakes import mistakes
from fpn_plugin.engine import launch
from fpn_plugin.registry import Registry
from fpn_plugin.report.mistakes import mistake_in, printed_mistake

MESSAGE = "fusion: unknown name 'sun' (did you mean 'sum'?); choose from: sum"
FUSIONS: Registry[str] = Registry("fusion")
FUSIONS.register("sum")("sum")


class Photos(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> str:
        return FUSIONS.get("sun")


def mistake() -> None:
    FUSIONS.get("sun")  # a KeyError, whose message would stand in quotes


def converted() -> None:
    try:
        mistake()
    except KeyError as error:
        raise RuntimeError("a test's own, so it is none of ours") from error


def in_a_worker() -> None:
    list(DataLoader(Photos(), num_workers=1))


def no_such_file() -> None:
    open("no/such.json")


def unexpected() -> None:
    {}["sun"]  # type: ignore[index]


def asserted() -> None:
    assert not FUSIONS, "not by our code"


@pytest.mark.parametrize(
    "run, message",
    [
        (mistake, MESSAGE),
        (in_a_worker, MESSAGE),
        (no_such_file, "[Errno 2] No such file or directory: 'no/such.json'"),
    ],
)
def test_mistakes(
    run: Callable[[], None], message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop, mistakes("train"):
        run()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed == f"fpn train: error: {message}\n"
    assert printed_mistake(f"a log\nfpn train: error: first\n{printed}") == message
    with pytest.raises((KeyError, OSError)), mistakes("train", traceback=True):
        run()
    try:
        run()
    except Exception:
        assert mistake_in(traceback.format_exc()) == message  # as a launched process says it


@pytest.mark.parametrize("run", [unexpected, converted, asserted])
def test_what_is_unexpected_keeps_its_traceback(run: Callable[[], None]) -> None:
    with pytest.raises((KeyError, RuntimeError, AssertionError)), mistakes("train"):
        run()
    try:
        run()
    except Exception:
        assert not mistake_in(traceback.format_exc())


def test_an_interruption(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop, mistakes("train"):
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err == "Interrupted\n"


@pytest.mark.parametrize("run", [mistake, unexpected])
def test_in_a_launched_process(
    run: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def launched(*args: object, **options: object) -> None:
        try:
            run()
        except Exception:
            raise ProcessRaisedException(traceback.format_exc(), 1, 77)

    monkeypatch.setattr(launch, "launch", launched)
    args = train.parse_args(["--num-gpus", "2"])
    with pytest.raises((SystemExit, launch.RankError)) as stop, mistakes("train"):
        launch.launch_ranks(print, args, (), "cpu")
    if run is mistake:
        assert stop.value.code == 2  # type: ignore[union-attr]
        assert capsys.readouterr().err == f"fpn train: error: {MESSAGE}\n"
    else:
        assert "Traceback" in str(stop.value.__cause__)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config-file", "gone.yaml"],
        ["show", "--config-file", "gone.yaml"],
        ["compare", "gone", "--report", "page"],
        ["study", "gone.yaml"],
        ["benchmark", "--config-file", "gone.yaml"],
        ["train", "MODEL.FPN.TOPOLGY", "fpn"],
        ["visualize", "--config-file", "a.yaml", "--input", "a.jpg", "--output", "b"],
        ["convert", "--to", "detectron2", "--weights", "gone.pth", "--output", "new.pth"],
    ],
)
def test_commands(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and f"fpn {words[0]}: error: " in text
    assert "Traceback" not in text and text.count("\n") == 1
