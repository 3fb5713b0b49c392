"""Reading weight files: every kind, what is refused, and that no code of a file runs."""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from fpn_plugin.checkpoint.checkpointer import Checkpointer
from fpn_plugin.checkpoint.files import read_state_dict, read_weights


def arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def a_state() -> dict[str, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()


def assert_read(file: Path, state: dict[str, Tensor]) -> None:
    loaded = read_state_dict(str(file))
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "wrapper",
    ["", "model", "state_dict", "module", "model_state", "model_ema", "state_dict_ema"],
)
def test_a_state_dict_is_read_wrapped_or_not(wrapper: str, tmp_path: Path) -> None:
    state = a_state()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    assert_read(tmp_path / "w.pth", state)


@pytest.mark.parametrize("name, is_zip", [("w.pth", False), ("w.pkl", True)])
def test_the_legacy_torch_format_and_a_torch_file_called_pkl(
    name: str, is_zip: bool, tmp_path: Path
) -> None:
    state = a_state()
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    assert_read(tmp_path / name, state)


def test_averaged_weights_go_before_the_raw_ones_as_the_libraries_save_them(
    tmp_path: Path,
) -> None:
    raw, averaged = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    for checkpoint in (
        {"state_dict": raw, "state_dict_ema": averaged},  # timm
        {"model": raw, "model_ema": {"module.a": averaged["a"]}},  # torchvision
        {"state_dict": averaged, "ema_state_dict": raw},  # MMEngine swaps them
    ):
        torch.save(checkpoint, tmp_path / "w.pth")
        assert list(read_state_dict(str(tmp_path / "w.pth")).values()) == [torch.ones(1)]


def test_plain_data_beside_the_weights_is_fine(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
        "history": np.arange(3.0),
        "meta": {"epoch": 1, "CLASSES": ("cat",)},
    }
    torch.save({**beside, "state_dict": {"a": torch.ones(1)}}, tmp_path / "w.pth")
    assert list(read_state_dict(str(tmp_path / "w.pth"))) == ["a"]


def test_safetensors_load(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = a_state()
    save_file(state, tmp_path / "w.safetensors")
    assert_read(tmp_path / "w.safetensors", state)
    (tmp_path / "w.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="MODEL.BOTTOM_UP.WEIGHTS.*cannot be read as safetensors"):
        read_state_dict(str(tmp_path / "w.safetensors"))


def test_safetensors_that_are_not_installed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="MODEL.BOTTOM_UP.WEIGHTS.*pip install safetensors"):
        read_state_dict(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_detectron2s_pickles_load(protocol: int, tmp_path: Path) -> None:
    state = a_state()
    content = {"model": arrays(state), "__author__": "me", "matching_heuristics": True}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_read(tmp_path / "w.pkl", state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda blobs: {"blobs": blobs},
        lambda blobs: blobs,
        lambda blobs: {"model": blobs, "__author__": "Caffe2"},
    ],
)
def test_caffe2s_names_become_detectron2s(wrap: Any, tmp_path: Path) -> None:
    names = ["conv1_w", "res_conv1_bn_s", "res_conv1_bn_rm", "res2_0_branch2a_w"]
    names += ["res2_0_branch2a_bn_b", "res2_0_branch1_w", "pred_w", "conv1_w_momentum"]
    blobs = {name: np.full(2, i, np.float32) for i, name in enumerate(names)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(wrap(blobs), 2))
    state = read_state_dict(str(tmp_path / "w.pkl"))
    assert {name: int(value[0]) for name, value in state.items()} == {
        "stem.conv1.weight": 0,
        "stem.conv1.norm.weight": 1,
        "stem.conv1.norm.running_mean": 2,
        "res2.0.conv1.weight": 3,
        "res2.0.conv1.norm.bias": 4,
        "res2.0.shortcut.weight": 5,
        "linear.weight": 6,
    }


@pytest.mark.parametrize(
    "content, call",
    [
        (b"cbuiltins\neval\n.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"cos\nsystem\n.", "os.system"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"c_codecs\nencode\n(Vx\nVutf-8\ntR.", "encode with 'utf-8'"),
    ],
)
def test_a_pickle_may_name_only_arrays_and_containers(
    content: bytes, call: str, tmp_path: Path
) -> None:
    (tmp_path / "w.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=f"it calls {call}"):
        read_state_dict(str(tmp_path / "w.pkl"))


@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
def test_a_broken_file_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(ValueError, match=f"{name} cannot be read as plain weights: .") as error:
        read_state_dict(str(tmp_path / name))
    assert "trust" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {"model": {"a": 1}}])
def test_other_contents_are_an_error(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    for name in ("w.pth", "w.pkl"):
        with pytest.raises(ValueError, match=f"{name} holds no state dict"):
            read_state_dict(str(tmp_path / name))


def test_a_missing_file_names_the_key_and_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere")
    message = "MODEL.BOTTOM_UP.WEIGHTS.*'w.pth'.*/somewhere/w.pth"
    with pytest.raises(FileNotFoundError, match=message):
        read_state_dict("w.pth")


def test_a_file_below_the_datasets_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(a_state(), tmp_path / "w.pth")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert "0.weight" in read_state_dict("w.pth")


def test_an_address_goes_through_detectron2s_path_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(a_state(), tmp_path / "w.pth")
    asked: list[str] = []

    def local_path(path: str) -> str:
        asked.append(path)
        return str(tmp_path / "w.pth")

    monkeypatch.setattr(PathManager, "get_local_path", local_path)
    assert "0.weight" in read_state_dict("detectron2://X/R.pkl?matching_heuristics=True")
    assert asked == ["detectron2://X/R.pkl"]


@pytest.mark.parametrize("path", ["foo://x.pth", "catalog://ImageNetPretrained/no/such"])
def test_an_address_that_cannot_be_fetched_names_the_key(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"MODEL.BOTTOM_UP.WEIGHTS: '{path}'"):
        read_state_dict(path)


def test_a_download_that_fails_names_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: str) -> str:
        raise OSError("Name or service not known")

    monkeypatch.setattr(PathManager, "get_local_path", refuse)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    for path, address in (
        ("https://x.org/a/w.pth", "https://x.org/a/w.pth"),
        ("detectron2://A/R-50.pkl?b=1", "https://dl.fbaipublicfiles.com/detectron2/A/R-50.pkl"),
    ):
        for load in (
            read_state_dict,
            lambda path, key: Checkpointer(nn.Linear(1, 1), key=key).load(path),
        ):
            with pytest.raises(FileNotFoundError) as error:
                load(path, "KEY")
            first, second, third = str(error.value).splitlines()
            assert first.startswith(f"KEY: {path!r} cannot be fetched: Name or service not known")
            assert second == f"Download {address} elsewhere and give the path of the file as KEY,"
            assert f"{tmp_path}/{urlparse(address).path[1:]} (" in third


def test_a_file_that_is_not_there_is_looked_for_once_if_its_path_is_absolute(
    tmp_path: Path,
) -> None:
    with pytest.raises(FileNotFoundError) as error:
        read_state_dict(str(tmp_path / "w.pth"))
    assert f"looked at {tmp_path}/w.pth (" in str(error.value)


@pytest.mark.parametrize("author", ["torchvision", "Caffe2", "me"])
def test_the_author_of_a_file_in_detectron2s_format(author: str, tmp_path: Path) -> None:
    content = {"model": arrays(a_state()), "__author__": author}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    assert read_weights(str(tmp_path / "w.pkl")).author == author
    torch.save(a_state(), tmp_path / "w.pth")
    assert read_weights(str(tmp_path / "w.pth")).author == ""
