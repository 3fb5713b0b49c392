"""The multi-scale deformable encoder: its sizes, its start, its place in a stack, its errors. What it
computes is compared with Mask2Former's in tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CHANNELS, LEVELS, assert_same, randomize, small_maps
from torch import nn

from fpn_plugin.pyramid import STEPS, Pyramid
from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.resolve import Defaults
from fpn_plugin.pyramid.steps.msdeform import DeformableEncoder, sine_position

R50 = {"res3": 512, "res4": 1024, "res5": 2048}


def parameters(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def test_parameters() -> None:
    with torch.device("meta"):
        for count, wanted in {3: 4_393_920, 4: 4_542_208, 5: 4_690_496}.items():
            assert parameters(STEPS.get("msdeform")(256, range(count))) == wanted
        levels = {"res3": 3, "res4": 4, "res5": 5}
        graph = build_graph("msdeform", levels, inner_levels=1)
        assert list(graph.output_names()) == ["p3", "p4", "p5", "p6"]
        assert parameters(Pyramid(graph, R50, Defaults(256, norm="GN"))) == 10_181_376


def test_points_start_on_rays() -> None:
    """Point k is k pixels away, in eight directions; all weigh the same, wherever one looks from."""
    attention = DeformableEncoder(32, (3, 4, 5)).layers[0].attention
    assert not attention.offsets.weight.any() and not attention.logits.weight.any()
    offsets = attention.offsets.bias.detach().reshape(8, 3, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for k in range(4):
            wanted = torch.tensor(direction).float().expand(3, 2) * (k + 1)
            assert torch.allclose(offsets[head, :, k], wanted, atol=1e-5)


def test_position_of_a_map_that_is_not_square() -> None:
    """Rows in the first half of the channels, columns in the second."""
    position = sine_position(torch.zeros(1, 16, 3, 5, dtype=torch.float64)).reshape(3, 5, 16)
    tau = 2 * torch.pi
    for y, x, channel, wanted in (
        (0, 4, 0, torch.tensor(tau * 1 / 3).sin()),
        (1, 0, 1, torch.tensor(tau * 2 / 3).cos()),
        (2, 1, 8, torch.tensor(tau * 2 / 5).sin()),
        (2, 3, 11, torch.tensor(tau * 4 / 5 / 10).cos()),
    ):
        assert abs(position[y, x, channel].item() - wanted.item()) < 1e-5


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other() -> None:
    """A coarsest map of one pixel is looked at too."""
    graph = build_graph("msdeform", LEVELS, inner_levels=2)
    pyramid = randomize(Pyramid(graph, CHANNELS, Defaults(32, norm="GN"))).eval()
    maps = small_maps(50, 70, batch=3)
    whole = pyramid(maps)
    assert list(whole) == ["p2", "p3", "p4", "p5", "p6", "p7"] and whole["p7"].shape[2:] == (1, 1)
    second = pyramid({name: x[1:2] for name, x in maps.items()})
    assert_same({name: x[1:2] for name, x in whole.items()}, second, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Places and weights are computed in float32, with autocast and without."""
    pyramid = Pyramid(build_graph("msdeform", LEVELS), CHANNELS, Defaults(32, norm="GN")).eval()
    maps = small_maps(200, 300)
    expected = pyramid(maps)
    with torch.autocast("cpu", dtype):
        automatic = pyramid(maps)
    cast = pyramid.to(dtype)({name: x.to(dtype) for name, x in maps.items()})
    for name, x in expected.items():
        for y in (automatic[name], cast[name]):
            assert y.dtype == dtype and (y.float() - x).abs().max() < 16 * torch.finfo(dtype).eps


def test_in_a_stack_and_with_gaps() -> None:
    stack = build_graph("fpn+msdeform", LEVELS, repeats=2)
    names = {each.name for each in stack.nodes}
    assert {"s2_msdeform_encoder", "r2_s2_msdeform_encoder"} <= names
    assert not any("s2_msdeform_lateral" in name for name in names)  # FPN has projected already
    assert stack.outputs[1] == "r2_s2_msdeform_encoder_p3"
    gaps = build_graph("msdeform", {"res1": 1, "res2": 2, "res4": 4, "res5": 5})
    sources = {each.name: [edge.source for edge in each.inputs] for each in gaps.nodes}
    assert sources["msdeform_output2"] == ["msdeform_lateral2", "msdeform_encoder_p4"]
    assert sources["msdeform_output1"] == ["msdeform_lateral1", "msdeform_output2"]
    fine = build_graph("msdeform", {"res1": 1, "res2": 2})
    assert fine.outputs == ("msdeform_encoder_p1", "msdeform_encoder_p2")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"channels": 36}, r"heads: 8 heads do not divide 36 channels \(`out_channels`\)"),
        ({"channels": 30, "heads": 5}, "out_channels: msdeform needs a multiple of 4 .* not 30"),
        ({"layers": 0}, "layers: 0 is not a whole number from 1"),
        ({"points": 1.5}, "points: 1.5 is not a whole number"),
        ({"heads": True}, "heads: True is not a whole number"),
        ({"inner_activation": "x"}, "inner_activation: unknown name 'x'.*relu"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        DeformableEncoder(**{"channels": 32, "levels": (3, 4), **arguments})


def test_the_error_of_a_width_names_the_step() -> None:
    with pytest.raises(ValueError, match="step 'msdeform_encoder': heads: 8 heads do not divide"):
        Pyramid(build_graph("msdeform", LEVELS), CHANNELS, Defaults(36))
