"""What every format gives for every topology, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from models import tiny_subject
from networks import CASES
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone
from fpn_plugin.export.compare import TOLERANCE, compare, make_inputs
from fpn_plugin.export.formats import FORMATS, Shape
from fpn_plugin.export.refuse import time_limit
from fpn_plugin.export.subject import Subject, backbone_subject
from fpn_plugin.pyramid.blocks import BLOCKS
from fpn_plugin.pyramid.topologies import TOPOLOGIES

SIZES = [(256, 320), (301, 135), (130, 259)]
# ONNX takes torch 5 to 30 s per topology, so here go a chain, the repeated cell, deformable
# convolution with a learned selection, and transposed convolution; torch.export, which comes
# before it, takes all of them
TO_ONNX = ["bifpn", "fapn", "fpn", "simple"]


def check(subject: Subject, name: str, folder: Path, shape: Shape | None = None) -> None:
    """Write the file, and compare it at sizes and batches other than it was made with."""
    shape = shape or Shape(None, 0, (288, 416))
    path = folder / f"model{FORMATS[name].suffix}"
    FORMATS[name].write(subject, shape, path)
    sizes = [shape.size] * 2 if shape.size else SIZES
    images = make_inputs(subject, sizes, shape.batch, ())
    found = compare(subject, FORMATS[name].load(path), images)
    assert [item.shape for item in found] == [tuple(image.shape) for image in images]
    assert max(item.relative for item in found) < TOLERANCE / 10


@pytest.mark.parametrize("topology", TOPOLOGIES.names())
@pytest.mark.parametrize("name", ["torchscript", "torch_export"])
def test_every_topology(topology: str, name: str, tmp_path: Path) -> None:
    check(tiny_subject(topology), name, tmp_path)


@pytest.mark.parametrize("topology", TO_ONNX)
def test_onnx(topology: str, tmp_path: Path) -> None:
    check(tiny_subject(topology), "onnx", tmp_path)


def swin() -> Subject:
    case = next(case for case in CASES if case.name == "build_swin_backbone")
    pyramid = PyramidBackbone(case.build(), list(case.maps), 8)
    return backbone_subject(get_cfg(), SimpleNamespace(backbone=pyramid))


@pytest.mark.parametrize("name", ["torch_export", "onnx"])
def test_windows_at_any_size_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--format {name}: 'bottom_up.*give --fixed-size HxW"):
        FORMATS[name].write(swin(), Shape(None, 0, (288, 416)), tmp_path / "model.pt2")


def test_windows_at_one_size(tmp_path: Path) -> None:
    check(swin(), "torch_export", tmp_path, Shape((128, 160), 1, (128, 160)))


@torch.library.custom_op("fpn_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class OwnOperator(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return twice(super().forward(x))


def test_an_operator_without_a_counterpart_is_named_with_its_node(tmp_path: Path) -> None:
    subject = tiny_subject()
    pyramid = subject.module
    pyramid.fpn_output3 = OwnOperator(16, 16, 3, padding=1)
    with pytest.raises(ValueError, match=r"node 'fpn_output3': fpn_test\.twice.*torch_export"):
        FORMATS["onnx"].write(subject, Shape((128, 160), 1, (128, 160)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_ends_what_does_not_end() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="did not end in 1 s.*a hint"):
        with time_limit(1, "a hint"):
            for _ in range(400):
                time.sleep(0.05)
    assert time.monotonic() - begun < 10


def test_another_model_is_not_taken_for_this_one() -> None:
    subject = tiny_subject()
    images = make_inputs(subject, SIZES[:1], 1, ())
    with pytest.raises(ValueError, match=r"1x3x256x320: largest difference .*\(p\d\).*Nothing"):
        compare(subject, lambda x: [y * 1.01 for y in subject.run(x)], images)
    with pytest.raises(ValueError, match="the exported model gives"):
        compare(subject, lambda x: [y[:, :, 1:] for y in subject.run(x)], images)
    with pytest.raises(ValueError, match="differs"):
        compare(subject, lambda x: [y * float("nan") for y in subject.run(x)], images)


def test_deformable_is_among_the_blocks_that_are_exported(tmp_path: Path) -> None:
    assert "deformable" in BLOCKS.names()
    check(tiny_subject(block="deformable"), "onnx", tmp_path)
