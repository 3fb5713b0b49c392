"""What every format gives for every topology, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from detectron2.config import get_cfg
from models import EVERY_FORMAT, tiny_subject
from networks import CASES
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone
from fpn_plugin.compat import EXPORT, require_torch
from fpn_plugin.export.formats import FORMATS, IntegerPaddedConv, Shape, with_integer_padding
from fpn_plugin.export.model import ExportModel, export_backbone
from fpn_plugin.export.verify import TOLERANCE, make_inputs, verify


def check(subject: ExportModel, name: str, folder: Path, shape: Shape | None = None) -> None:
    """Write the file, and compare it at sizes and batches other than it was made with."""
    shape = shape or Shape(None, 0, (160, 224))
    path = folder / f"model{FORMATS[name].suffix}"
    FORMATS[name].write(subject, shape, path)
    least = subject.least
    sizes = [(least + 62, least + 94), (least + 31, least + 69), (least, least + 33)]
    sizes = [shape.size] * 2 if shape.size else sizes
    images = make_inputs(subject, sizes, shape.batch, ())
    differences = verify(subject, FORMATS[name].load(path), images)
    assert [difference.shape for difference in differences] == [x.shape for x in images]
    assert max(difference.relative for difference in differences) < TOLERANCE["backbone"] / 10


# tests/pyramid scripts and exports every topology, test_export.py makes a file of an FPN in every
# format, and tools/export_table.py of all; here go learned fusions, a single map, and deformable
# convolution
@pytest.mark.parametrize(
    "name, topology",
    [("torchscript", "bifpn"), ("torchscript", "simple"), ("torch_export", "fapn")],
)
def test_topologies(name: str, topology: str, tmp_path: Path) -> None:
    check(tiny_subject(topology), name, tmp_path)


def test_operators_with_a_counterpart_in_onnx(tmp_path: Path) -> None:
    operators = {"block": "deformable", "upsample": "dysample", "downsample": "scdown"}
    check(tiny_subject("hybrid", levels=2, **operators), "onnx", tmp_path)
    names = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert names >= {"DeformConv", "GridSample", "Softmax"}


def with_network(name: str) -> ExportModel:
    case = next(case for case in CASES if case.name == name)
    pyramid = PyramidBackbone(case.build(), in_features=list(case.maps)[-2:], out_channels=8)
    return export_backbone(get_cfg(), SimpleNamespace(backbone=pyramid))


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_windows_at_any_size_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--format {name}: 'bottom_up.*give --fixed-size HxW"):
        write = FORMATS[name].write
        write(with_network("build_swin_backbone"), Shape(None, 0, (128, 160)), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_windows_at_one_size(tmp_path: Path) -> None:
    """As a trace; tests/bottom_up/test_networks.py has torch.export's program."""
    shape = Shape((64, 96), 1, (64, 96))
    check(with_network("build_swin_backbone"), "torchscript", tmp_path, shape)


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (5, 3, 1), (3, 1, 2), (4, 4, 1)])
def test_padding_by_whole_numbers_is_the_same(size, kernel, stride, dilation) -> None:
    layers = pytest.importorskip("timm.layers")
    conv = layers.Conv2dSame(4, 8, kernel, stride, dilation=dilation, groups=2)
    network = nn.Sequential(conv)
    other = with_integer_padding(network)
    assert isinstance(other[0], IntegerPaddedConv) and network[0] is conv
    x = torch.randn(2, 4, *size)
    assert torch.equal(network(x), other(x))


class OwnOperator(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fpn_test.twice(super().forward(x))


def test_an_operator_without_a_counterpart_is_named_with_its_node(tmp_path: Path) -> None:
    require_torch(EXPORT, "--format onnx", "")

    @torch.library.custom_op("fpn_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)
    subject = tiny_subject()
    pyramid = subject.module
    pyramid.fpn_output3 = OwnOperator(16, 16, 3, padding=1)
    with pytest.raises(ValueError, match=r"node 'fpn_output3': fpn_test\.twice: .*torchscript"):
        FORMATS["onnx"].write(subject, Shape((128, 160), 1, (128, 160)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


ENDLESS = """
import sys
from pathlib import Path
from models import EVERY_FORMAT, tiny_subject
from fpn_plugin.export.formats import FORMATS, Shape
from fpn_plugin.export.errors import time_limit

with time_limit(1, "a hint"):
    while True:
        FORMATS["torch_export"].write(tiny_subject(), Shape(None, 0, (128, 160)), Path(sys.argv[1]))
"""


def test_a_time_limit_ends_an_export_and_not_what_catches_exceptions(tmp_path: Path) -> None:
    """In a process of its own: torch is left in the middle of a trace."""
    require_torch(EXPORT, "--format torch_export", "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "model.pt2")]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "TimeoutError: the export did not end in 1 s (--time-limit); a hint"


def test_another_model_is_not_taken_for_this_one() -> None:
    subject = tiny_subject()
    images = make_inputs(subject, [(128, 160)], 1, ())
    with pytest.raises(ValueError, match=r"1x3x128x160: largest difference .*\(p\d\).*Nothing"):
        verify(subject, lambda x: [y * 1.01 for y in subject.run(x)], images)
    with pytest.raises(ValueError, match="the exported model gives"):
        verify(subject, lambda x: [y[:, :, 1:] for y in subject.run(x)], images)
    with pytest.raises(ValueError, match="differs"):
        verify(subject, lambda x: [y * float("nan") for y in subject.run(x)], images)


def test_detections_of_one_score_may_change_places() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 40]])
    classes, scores = torch.tensor([0, 1, 0]), torch.tensor([0.9, 0.8, 0.8])
    names = ("pred_boxes", "pred_classes", "scores")
    wanted = [boxes, classes, scores]
    subject = dataclasses.replace(tiny_subject(), what="detector", outputs=names)
    object.__setattr__(subject, "run", lambda image: wanted)
    image = torch.zeros(3, 8, 8)
    swapped = [y[[0, 2, 1]] for y in wanted]
    assert verify(subject, lambda x: swapped, [image])[0].relative == 0
    with pytest.raises(ValueError, match="differs"):
        verify(subject, lambda x: [boxes, 1 - classes, scores], [image])
    wanted[1] = torch.tensor([1200, 5, 7])  # a large id makes no other class the same
    with pytest.raises(ValueError, match="differs.*pred_classes"):
        verify(subject, lambda x: [boxes, torch.tensor([1200, 6, 7]), scores], [image])
    with pytest.raises(ValueError, match="nothing is detected"):
        none = [y[:0] for y in wanted]
        object.__setattr__(subject, "run", lambda image: none)
        verify(subject, lambda x: none, [image])
