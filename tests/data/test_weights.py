"""The ImageNet weights end up under timm's names, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import prepare_trees as trees
import prepare_weights as weights
import pytest
import timm
import torch
from prepare_weights import prepare_weights, rename_in_order


@pytest.fixture(scope="module")
def file(tmp_path_factory: Any, wheel_cache: Path) -> Path:
    return prepare_weights(tmp_path_factory.mktemp("datasets"), wheel_cache)


def test_every_tensor_is_the_packages(file: Path, wheel_cache: Path) -> None:
    state = torch.load(file, weights_only=True)
    source = weights.load_source(wheel_cache)
    model = timm.create_model(weights.MODEL)
    assert model.load_state_dict(state, strict=True)
    assert len(state) == len(source) == 296
    for (name, tensor), original in zip(model.state_dict().items(), source.values()):
        assert torch.equal(tensor, original), name


@pytest.mark.parametrize("model", [name for name in weights.SOURCES if name != weights.MODEL])
def test_other_networks_get_theirs(model: str, tmp_path: Path, wheel_cache: Path) -> None:
    file = prepare_weights(tmp_path, wheel_cache, model)
    assert file == tmp_path / "weights" / f"{model}.pth"
    state, names = torch.load(file, weights_only=True), weights.state_dict_of(model)
    source = weights.load_source(wheel_cache, model)
    assert list(state) == list(names)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), source.values(), strict=True))
    if weights.SOURCES[model].library == "torchvision":
        assert state.keys() == source.keys()


def test_network_knows_a_photo_from_another(file: Path, wheel_cache: Path) -> None:
    model = timm.create_model(weights.MODEL).eval()
    model.load_state_dict(torch.load(file, weights_only=True))
    wheel = trees.fetch_wheel(trees.REQUIREMENT, trees.SHA256, wheel_cache)
    photos = trees.load_photos(wheel, ["OSBS_029", "SOAP_061"])
    pixels = torch.from_numpy(np.stack([photo.pixels[:224, :224] for photo in photos]))
    images = (pixels.permute(0, 3, 1, 2).float() - 127.5) / 127.5  # (2, 3, 224, 224)
    with torch.no_grad():
        logits = model(images)  # (2, 1000)
    assert logits.shape == (2, 1000) and torch.isfinite(logits).all()
    # Random weights give logits of about the same value for every class and picture.
    assert logits.std(dim=1).min() > 0.5
    assert (logits[0] - logits[1]).abs().max() > 0.5


def test_second_call_keeps_the_file(file: Path) -> None:
    before = file.stat().st_mtime_ns
    assert prepare_weights(file.parents[1], Path("nowhere")) == file
    assert file.stat().st_mtime_ns == before


def test_mismatch_is_named() -> None:
    one, two = {"a.weight": torch.zeros(2, 3)}, {"b.weight": torch.zeros(3, 2)}
    message = r"'a.weight' in the file has shape \(2, 3\), but 'b.weight' .* has \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        rename_in_order(one, two)
    with pytest.raises(ValueError, match="1 tensors, the network 0"):
        rename_in_order(one, {})
    with pytest.raises(KeyError, match="'resnet50' is unknown, choose from tf_.*, mobilenet_v2"):
        prepare_weights(Path("nowhere"), model="resnet50")
