"""RT-DETR's attention within a map against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize

from fpn_plugin.pyramid.aifi import sine_positions
from fpn_plugin.pyramid.blocks import BLOCKS

S1, C1, S2, C2 = math.sin(1), math.cos(1), math.sin(2), math.cos(2)


def test_positions_of_a_map_that_is_not_square() -> None:
    """Rows first: the authors' code takes width for height here."""
    held = [(0, 1, 0, 1), (0, 1, S1, C1), (0, 1, S2, C2)]
    held += [(S1, C1, 0, 1), (S1, C1, S1, C1), (S1, C1, S2, C2)]
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-6), (torch.half, 1e-3)):
        positions = sine_positions(2, 3, 4, torch.empty(0, dtype=dtype))
        assert positions.dtype == dtype
        expected = torch.tensor(held, dtype=torch.float64)
        assert torch.allclose(positions.double(), expected, rtol=0, atol=tolerance)
    # the slower sines follow in each quarter: w_i = 10000^(-i / (C/4))
    wide = sine_positions(2, 40, 12, torch.empty(0, dtype=torch.float64))
    for i in range(3):
        angle = 39 * 10000 ** (-i / 3)
        assert math.isclose(wide[39, 6 + i], math.sin(angle), abs_tol=1e-12)
        assert math.isclose(wide[39, 9 + i], math.cos(angle), abs_tol=1e-12)
    half = sine_positions(1, 300, 4, torch.empty(0, dtype=torch.bfloat16))
    exact = sine_positions(1, 300, 4, torch.empty(0, dtype=torch.float64))
    assert (half.double() - exact).abs().max() < 0.005  # 299 itself is no bfloat16


@torch.no_grad()
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 1), (1, 6)])
def test_aifi_is_a_post_norm_transformer_layer(shape: tuple[int, int]) -> None:
    block = randomize(BLOCKS.get("aifi")(16, 16, heads=4, hidden_channels=24))
    x = torch.randn(2, 16, *shape)
    t = x.flatten(2).transpose(1, 2)
    placed = t + sine_positions(*shape, 16, t)
    w, b = block.query_key.weight, block.query_key.bias
    seen, _ = F.multi_head_attention_forward(
        *(placed.transpose(0, 1), placed.transpose(0, 1), t.transpose(0, 1), 16, 4),
        *(torch.cat([w, block.value.weight]), torch.cat([b, block.value.bias]), None, None),
        *(False, 0.0, block.out.weight, block.out.bias),
    )
    t = F.layer_norm(t + seen.transpose(0, 1), [16], block.norm1.weight, block.norm1.bias)
    hidden = F.gelu(F.linear(t, block.linear1.weight, block.linear1.bias))
    t = t + F.linear(hidden, block.linear2.weight, block.linear2.bias)
    t = F.layer_norm(t, [16], block.norm2.weight, block.norm2.bias)
    expected = t.transpose(1, 2).reshape(x.shape)
    assert torch.allclose(block(x), expected, atol=1e-5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(block(last), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(block(x), expected, atol=0.1)
        assert block(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(block.half()(x.half()).float(), expected, atol=0.02)


def test_aifi_checks_its_channels() -> None:
    assert sum(p.numel() for p in BLOCKS.get("aifi")(256, 256).parameters()) == 789_760
    for arguments, message in (
        ((8, 16), "aifi cannot turn 8 channels into 16"),
        ((20, 20), "heads: 8 heads do not divide 20 channels; take a multiple of 8"),
        ((16, 16, 0), "heads: 0 heads do not divide 16 channels"),
        ((6, 6, 2), "aifi .* 6 is not a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            BLOCKS.get("aifi")(*arguments)
    with pytest.raises(KeyError, match="inner_activation.*'glu'.*did you mean 'gelu'"):
        BLOCKS.get("aifi")(8, 8, inner_activation="glu")
