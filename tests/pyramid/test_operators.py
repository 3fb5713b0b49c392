"""Fusions, resamplers and blocks against values worked out by hand or by plain torch calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_plugin.pyramid.blocks import ACTIVATIONS, BLOCKS, ORDERS, norm_layer
from fpn_plugin.pyramid.fusion import FUSIONS
from fpn_plugin.pyramid.resample import DOWNSAMPLE, UPSAMPLE

A = torch.tensor([[[[1.0, -2.0]]]])
B = torch.tensor([[[[3.0, 4.0]]]])
C = torch.tensor([[[[-5.0, 0.5]]]])


def fusion(name: str, *weights: float, count: int = 3) -> nn.Module:
    module = FUSIONS.get(name)(1, count)
    if weights:
        module.weights.data = torch.tensor(weights)
    return module


@pytest.mark.parametrize(
    "module, expected",
    [
        (fusion("sum"), [-1.0, 2.5]),
        (fusion("avg"), [-1 / 3, 2.5 / 3]),
        (fusion("max"), [3.0, 4.0]),
        # relu(-1) = 0: the second map is left out
        (fusion("fast_normalized", 2.0, -1.0, 0.5), [-0.5 / 2.5001, -3.75 / 2.5001]),
        (fusion("fast_normalized"), [-1 / 3.0001, 2.5 / 3.0001]),
        # softmax of log(1), log(2), log(5) is 1/8, 2/8, 5/8
        (fusion("softmax", 0.0, 0.6931471806, 1.6094379124), [-18 / 8, 8.5 / 8]),
    ],
)
def test_fusion_by_hand(module: nn.Module, expected: list[float]) -> None:
    assert torch.allclose(module([A, B, C]).flatten(), torch.tensor(expected), atol=1e-6)


def test_concat_is_a_convolution_of_all_maps() -> None:
    maps = [torch.randn(2, 3, 4, 5) for _ in range(2)]
    module = FUSIONS.get("concat")(3, 2)
    weight = module.conv.weight[:, :, 0, 0]  # (3, 6)
    expected = (
        torch.einsum("oi,nihw->nohw", weight, torch.cat(maps, 1)) + module.conv.bias[:, None, None]
    )
    assert torch.allclose(module(maps), expected, atol=1e-6)


@pytest.mark.parametrize("name", FUSIONS.names())
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_fusion_keeps_the_shape_and_its_inputs(name: str, count: int) -> None:
    module = FUSIONS.get(name)(8, count)
    maps = [torch.randn(2, 8, 5, 3, requires_grad=True) for _ in range(count)]
    before = [x.detach().clone() for x in maps]
    result = module(list(maps))
    result.square().sum().backward()
    assert result.shape == (2, 8, 5, 3)
    assert all(torch.equal(x.detach(), y) for x, y in zip(maps, before))
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in maps)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("name", FUSIONS.names())
def test_every_fusion_stays_in_half_precision(name: str) -> None:
    module = FUSIONS.get(name)(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert module([torch.randn(1, 8, 4, 4).bfloat16()] * 2).dtype == torch.bfloat16


X = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", UPSAMPLE.names())
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("size", [None, "exact", "odd"])
def test_every_upsampler_meets_the_size(name: str, steps: int, size: str | None) -> None:
    scale = 2**steps
    exact = [6 * scale, 10 * scale]
    wanted = {None: exact, "exact": exact, "odd": [exact[0] - 1, exact[1] - 1]}[size]
    result = UPSAMPLE.get(name)(4, steps)(X, None if size is None else wanted)
    assert list(result.shape) == [2, 4, *wanted]
    assert result.isfinite().all()


@pytest.mark.parametrize("name", DOWNSAMPLE.names())
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("shape", [(6, 10), (7, 9), (1, 1)])
def test_every_downsampler_rounds_up(name: str, steps: int, shape: tuple[int, int]) -> None:
    x = torch.randn(2, 4, *shape)
    wanted = [-(-side // 2**steps) for side in shape]
    module = DOWNSAMPLE.get(name)(4, steps)
    assert list(module(x, None).shape) == [2, 4, *wanted]
    assert list(module(x, [side + 1 for side in wanted]).shape) == [
        2,
        4,
        *(side + 1 for side in wanted),
    ]


def test_upsamplers_by_hand() -> None:
    x = torch.tensor([[[[0.0, 4.0]]]])
    nearest, bilinear = UPSAMPLE.get("nearest")(1, 1), UPSAMPLE.get("bilinear")(1, 1)
    assert nearest(x, [2, 4]).tolist() == [[[[0, 0, 4, 4], [0, 0, 4, 4]]]]
    assert bilinear(x, [1, 4]).tolist() == [[[[0, 1, 3, 4]]]]
    assert torch.equal(nearest(X, None), F.interpolate(X, scale_factor=2.0, mode="nearest"))


def test_downsamplers_by_hand() -> None:
    x = torch.tensor([[[[1.0, 5.0, 2.0, 0.0, 9.0], [3.0, 4.0, 8.0, 7.0, 6.0]]]])
    assert DOWNSAMPLE.get("maxpool")(1, 1)(x, None).tolist() == [[[[5, 8, 9]]]]
    assert DOWNSAMPLE.get("maxpool_stride")(1, 1)(x, None).tolist() == [[[[5, 8, 9]]]]
    assert DOWNSAMPLE.get("maxpool_stride")(1, 2)(x, None).tolist() == [[[[8, 9]]]]
    assert DOWNSAMPLE.get("subsample")(1, 1)(x, None).tolist() == [[[[1, 2, 9]]]]
    assert DOWNSAMPLE.get("subsample")(1, 2)(x, None).tolist() == [[[[1, 9]]]]


def test_conv_down_is_one_strided_convolution_per_level() -> None:
    module = DOWNSAMPLE.get("conv")(4, 2, activation="relu")
    expected = X
    for conv in module.convs:
        expected = F.relu(F.conv2d(expected, conv.weight, conv.bias, stride=2, padding=1))
    assert torch.equal(module(X, None), expected)


def reference(name: str, block: nn.Module, x: Tensor, stride: int) -> Tensor:
    """The block's convolutions by plain calls."""
    if name == "separable":
        x = F.conv2d(x, block.depthwise.weight, stride=stride, padding=1, groups=x.shape[1])
        return F.conv2d(x, block.pointwise.weight, block.pointwise.bias)
    return F.conv2d(x, block.weight, block.bias, stride=stride, padding=int(name[4]) // 2)


@pytest.mark.parametrize("name", [name for name in BLOCKS.names() if name != "identity"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", ["", "GN"])
def test_every_block_by_plain_calls(name: str, order: str, stride: int, norm: str) -> None:
    block = BLOCKS.get(name)(4, 32, stride=stride, norm=norm, activation="relu", order=order)
    before = X.clone()
    expected = reference(name, block, F.relu(X) if order == ORDERS[1] else X, stride)
    if norm:
        expected = F.group_norm(expected, 32)
    if order == ORDERS[0]:
        expected = F.relu(expected)
    assert torch.allclose(block(X), expected, atol=1e-6)
    assert torch.equal(X, before)
    biases = [key for key in block.state_dict() if key.endswith("bias") and "norm" not in key]
    assert len(biases) == (0 if norm else 1)


def test_identity() -> None:
    assert BLOCKS.get("identity")(4, 4)(X) is X
    with pytest.raises(ValueError, match="identity cannot turn 4 channels into 8"):
        BLOCKS.get("identity")(4, 8)


@pytest.mark.parametrize("name", ACTIVATIONS.names())
def test_every_activation_leaves_its_input_alone(name: str) -> None:
    before = X.clone()
    assert ACTIVATIONS.get(name)()(X).shape == X.shape
    assert torch.equal(X, before)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="MODEL.FPN.NORM: unknown norm 'XN'.*BN, SyncBN"):
        norm_layer("XN", 32)
    with pytest.raises(ValueError, match="'GN' cannot normalise 33 channels.*multiple of 32"):
        norm_layer("GN", 33)
    with pytest.raises(KeyError, match="activation: unknown name 'rlu'.*did you mean 'relu'"):
        BLOCKS.get("conv3x3")(4, 4, activation="rlu")
    with pytest.raises(ValueError, match="order 'norm-conv' is unknown.*conv-norm-act"):
        BLOCKS.get("conv3x3")(4, 4, order="norm-conv")
