"""Checkpoints of any form load as Detectron2 loads them, and run no code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from fpn_plugin.checkpoint.checkpointer import TAG, Checkpointer, find_checkpoint
from fpn_plugin.checkpoint.files import read_state_dict
from fpn_plugin.checkpoint.plain import read_plain

Write = Callable[[Any, Path], object]


def save(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def dump(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


FORMS: dict[str, tuple[str, Write]] = {
    "zip": ("w.pth", save),
    "before zip": ("w.pth", save_old),
    "pickle": ("w.pkl", dump),
    "zip in .pkl": ("w.pkl", save),
    "pycls": ("w.pyth", save),
    "other ending": ("w.bin", save),
    "plain pickle in .pth": ("w.pth", dump),
}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def load(path: Path) -> Any:
    model = nn.Linear(2, 2)
    Checkpointer(model).load(str(path))
    return model


@pytest.mark.parametrize("place", ["model", "beside"])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_runs_no_code(form: str, place: str, tmp_path: Path) -> None:
    (name, write), marker = FORMS[form], tmp_path / "ran"
    state: dict[str, Any] = {"weight": torch.zeros(2, 2)}
    content = {"model": state, "model_state": state, "__author__": "me"}
    (state if place == "model" else content)["x"] = Payload(marker)  # type: ignore[assignment]
    write(content, tmp_path / name)
    told = f"checkpoint {tmp_path / name} cannot be read as plain weights"
    with pytest.raises(ValueError, match=told) as error:
        load(tmp_path / name)
    if form != "plain pickle in .pth":  # torch finds its head missing first
        assert "it calls posix.mkdir, and no code" in str(error.value)
        assert "load it yourself and save its state dict alone" in str(error.value)
    with pytest.raises(ValueError, match="W: .*cannot be read as plain weights"):
        read_state_dict(str(tmp_path / name), "W")
    assert not marker.exists()
    if write is dump:
        pickle.loads((tmp_path / name).read_bytes())
    else:
        torch.load(tmp_path / name, weights_only=False)
    assert marker.exists()  # it would have


def test_a_run_that_goes_on_from_a_strange_folder_runs_no_code(tmp_path: Path) -> None:
    torch.save({"model": {}, "trainer": Payload(tmp_path / "ran")}, tmp_path / "model_0000001.pth")
    (tmp_path / TAG).write_text("model_0000001.pth")
    with pytest.raises(ValueError, match="model_0000001.pth cannot be read as plain weights"):
        Checkpointer(nn.Linear(2, 2), str(tmp_path)).resume_or_load("", resume=True)
    assert not (tmp_path / "ran").exists()


ARRAYS = {"weight": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
TENSORS = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
SOUND: dict[str, tuple[str, Write, Any]] = {
    "zoo": ("w.pkl", dump, {"model": ARRAYS, "__author__": "me", "matching_heuristics": True}),
    "tensors in a pickle": ("w.pkl", dump, {"model": TENSORS, "__author__": "me"}),
    "caffe2": ("w.pkl", dump, {"blobs": {**ARRAYS, "weight_momentum": ARRAYS["bias"]}}),
    "caffe2 of ImageNet": ("w.pkl", dump, ARRAYS),
    "pycls": ("w.pyth", save, {"model_state": {**TENSORS, "num_batches_tracked": torch.ones(1)}}),
    "run": ("w.pth", save, {"model": TENSORS, "iteration": 5, "optimizer": {"state": {}}}),
    "state": ("w.pth", save, TENSORS),
    "old": ("w.pth", save_old, TENSORS),
    "arrays": ("w.pth", save, {"model": ARRAYS}),
}


class _Theirs(DetectionCheckpointer):
    """What Detectron2 reads from a file; torch's own default refuses arrays."""

    def _torch_load(self, f: str) -> Any:
        return torch.load(f, weights_only=False)


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
@pytest.mark.parametrize("form", SOUND)
def test_every_form_is_read_as_detectron2_reads_it(form: str, query: str, tmp_path: Path) -> None:
    name, write, content = SOUND[form]
    write(content, tmp_path / name)
    mine, theirs = nn.Linear(2, 2), nn.Linear(2, 2)
    rest = Checkpointer(mine).load(f"{tmp_path / name}{query}")
    assert rest == _Theirs(theirs).load(f"{tmp_path / name}{query}")
    assert torch.equal(mine.weight, theirs.weight) and torch.equal(mine.bias, theirs.bias)
    assert mine.weight.eq(1).all()


def test_safetensors_load(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(TENSORS, tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors").weight.eq(1).all()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("w.pth", [1], "holds no state dict"),
        ("w.pth", torch.zeros(2), "holds no state dict"),
        ("w.pth", {"model": [1]}, "holds no state dict"),
        ("w.pth", {1: torch.zeros(2)}, "holds no state dict"),
        ("w.pth", {"model": {"weight": "x"}}, "'weight' is a str, not a tensor"),
        ("w.pkl", {"blobs": 3}, "holds no state dict"),
        ("w.pkl", {"weight": np.array([None])}, "numpy.dtype of objects"),
        ("w.pkl", {"weight": np.array(["a"])}, "'weight' is a ndarray, not a tensor of numbers"),
        ("w.pyth", {"model": {}}, "pycls' files have a 'model_state'"),
    ],
)
def test_what_is_no_checkpoint_is_an_error(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    (dump if name == "w.pkl" else save)(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path / name}.*{message}"):
        load(tmp_path / name)


@pytest.mark.parametrize("text", ["../other/model_final.pth", "/x/model_final.pth", "..", "a\\b"])
def test_last_checkpoint_leads_nowhere_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    torch.save({"model": {}}, tmp_path / "other" / "model_final.pth")
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"model": {}}, run / "model_final.pth")
    (run / TAG).write_text(text)
    with pytest.raises(ValueError, match="last_checkpoint in it says .*no name of a file"):
        find_checkpoint(str(run))
    (run / TAG).write_bytes(b"\xff\xfe")  # a broken one, as after a crash, is not followed
    assert find_checkpoint(str(run)) == str(run / "model_final.pth")


class Forged:
    """Has numpy take bytes for the addresses of objects."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> tuple:
        if self.how == "called":
            return np.ndarray, ((1,), "O", bytes(8))
        state = (1, (1,), np.dtype("O"), False, [None])
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state


@pytest.mark.parametrize("how", ["called", "filled"])
@pytest.mark.parametrize("form", ["zip", "before zip", "pickle"])
def test_no_bytes_are_taken_for_objects(form: str, how: str, tmp_path: Path) -> None:
    name, write = FORMS[form]
    write({"weight": Forged(how)}, tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        read_plain(tmp_path / name, "w")


@pytest.mark.parametrize("form", ["zip", "before zip", "pickle"])
def test_arrays_come_as_they_went(form: str, tmp_path: Path) -> None:
    name, write = FORMS[form]
    arrays = [np.arange(6).astype(kind).reshape(2, 3) for kind in "?bBhHiIlLqQefd"]
    arrays += [np.asfortranarray(arrays[-1]), arrays[-1].astype(">f4"), np.float32(3)]
    write(arrays, tmp_path / name)
    for one, other in zip(arrays, read_plain(tmp_path / name, "w"), strict=True):
        assert type(one) is type(other) and one.dtype.kind == other.dtype.kind
        assert one.itemsize == other.itemsize and (one == other).all()  # numpy may swap bytes
