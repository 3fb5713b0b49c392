"""One small network of each family and source: what all adapters guarantee."""

from __future__ import annotations

from typing import Iterator

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from helpers import assert_same
from networks import CASES, DETECTRON2, Case
from torch import Tensor, nn

from fpn_plugin.bottom_up.detectron2 import register_builders
from fpn_plugin.compat import EXPORT, require_torch
from fpn_plugin.modeling.bottom_up import HOLDERS


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def network(case: Case) -> Iterator[Backbone]:
    """Built once; its stem and first stage are frozen."""
    torch.manual_seed(0)
    built = case.build(BACKBONE__FREEZE_AT=2)
    for parameter in built.parameters():
        if not parameter.any():  # timm starts the last norm of some blocks at 0: no gradient passes
            nn.init.normal_(parameter, std=0.1)
    yield built


def test_every_builder_of_detectron2s_registry_is_here() -> None:
    register_builders()
    registered = {name for name, _ in BACKBONE_REGISTRY} - set(HOLDERS)
    assert {case.name for case in CASES if "/" not in case.name} == registered


def image(case: Case, batch: int = 1) -> Tensor:
    """Of sides as odd as the network takes them."""
    step = case.divisibility or 1
    return torch.randn(batch, 3, (64 // step | 1) * step, (96 // step | 1) * step)


# One network of each kind of graph and map that the adapters meet, beside all of Detectron2's own
EXPORTED = {
    *("timm/test_resnet", "timm/test_efficientnet", "timm/swin_tiny_patch4_window7_224"),
    *("timm/test_vit", "torchvision/shufflenet_v2_x0_5", "torchvision/mobilenet_v3_small"),
    *(case.name for case in DETECTRON2),
}


def test_maps_are_what_was_promised_and_export(case: Case, network: Backbone) -> None:
    assert network.size_divisibility == case.divisibility
    x = image(case)
    shapes = network.output_shape()
    with torch.no_grad():
        maps = network.eval()(x)
    assert list(maps) == list(shapes) == list(case.maps)
    for name, y in maps.items():
        stride = 2 ** int(name[3:])
        assert (y.shape[:2], shapes[name].stride) == ((1, shapes[name].channels), stride)
        for given, side in zip(y.shape[2:], x.shape[2:]):
            assert given in (side // stride, -(-side // stride))
        assert y.isfinite().all()
    if case.name in EXPORTED:
        require_torch(EXPORT, "torch.export", "")
        with torch.no_grad():
            exported = torch.export.export(network, (x,), strict=False).module()
            assert_same(exported(x), maps, 1e-5)


def step(network: nn.Module, x: Tensor) -> None:
    """One of SGD, large enough to be seen."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    network.train()
    sum(y.square().mean() for y in network(x).values()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert not without, "these would stop distributed training"
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    optimizer.step()
    optimizer.zero_grad()


def test_frozen_layers_stay_and_the_others_learn(case: Case, network: Backbone) -> None:
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen
    x = image(case, batch=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        maps = network.eval()(x)
    step(network, x)
    moved = {n for n, value in network.state_dict().items() if not torch.equal(value, before[n])}
    assert moved and not moved & frozen
    with torch.no_grad():
        after = network.eval()(x)
    for name in case.maps:  # weights and statistics: the numbers that they give
        if case.frozen_map and name <= case.frozen_map:
            assert torch.equal(after[name], maps[name])
        if name >= case.first:
            assert not torch.equal(after[name], maps[name])


def test_no_batch_norm_of_a_frozen_layer_learns(network: Backbone) -> None:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(any(p.requires_grad for p in norm.parameters()) for norm in norms)
