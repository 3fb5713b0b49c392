"""The recursive feature pyramid of DetectoRS (arXiv:2006.02334): a further network reads the image
and the pyramid's maps, and the same pyramid runs again. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List, Mapping, MutableMapping, Sequence

import torch
from detectron2.modeling import Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.pyramid.fusion import Gate
from fpn_plugin.registry import bad_argument

_STEPS = "rfp_steps"
# Blocks that end in ReLU(branch + shortcut), by their forward, which a subclass may replace
_FORWARDS = (BasicBlock.forward, BottleneckBlock.forward, DeformBottleneckBlock.forward)
# The finest level whose map is fed back, as in the authors' code
_FINEST = 3

Maps = Dict[str, Tensor]


class RecursivePyramid(nn.Module):
    """Feeds a pyramid's maps back to further networks, each of which the pyramid then runs on.

    ::

        p⁰ = pyramid(network(image))
        p' = pyramid(networkᵢ(image, ASPP(pⁱ⁻¹)))
        pⁱ = σ(1×1(p'))·p' + (1 − σ(1×1(p')))·pⁱ⁻¹

    The networks begin as copies of the one below the pyramid. What is fed back is added in the
    first block of each stage from level 3 on whose level the pyramid has. The convolutions on it,
    and that of the gate, begin at zero: so at first the whole computes `p⁰`. Networks, and the
    convolutions on what is fed back, are each step's own; ASPP and gate are shared by all steps and
    levels, and the pyramid by all steps: its norms, if they keep statistics, see two distributions.

    Args:
        network: below the pyramid.
        steps: how often the pyramid runs: 2 or more.
        channels: of the pyramid's maps; divisible by 4.
        inputs: the network's maps that the pyramid reads, by name.
        outputs: the pyramid's maps, with their levels.

    Raises:
        ValueError: naming `rfp_steps`, for a network whose blocks take no feedback, or a pyramid
            that gives no level of its later stages.
    """

    def __init__(
        self,
        network: Backbone,
        steps: int,
        channels: int,
        inputs: Sequence[str],
        outputs: Mapping[str, int],
    ) -> None:
        super().__init__()
        _check_network(network, steps)
        self.sources = _sources(network, steps, inputs, outputs)
        self.networks = nn.ModuleList(
            FeedbackResNet(network, inputs, self.sources, channels) for _ in range(1, steps)
        )
        self.aspp = ASPP(channels)
        self.gate = Gate(channels, 2)

    def forward(self, image: Tensor, maps: Maps, pyramid: Callable[[Maps], Maps]) -> Maps:
        """Run the networks.

        Args:
            maps: of the pyramid on the first network.
            pyramid: from a network's maps.
        """
        for network in self.networks:
            fed_back = {name: self.aspp(maps[name]) for name in sorted({*self.sources.values()})}
            new = pyramid(network(image, fed_back))
            maps = {name: self.gate([new[name], maps[name]]) for name in maps}
        return maps

    def copy_weights(self, state: MutableMapping[str, Tensor], prefix: str, network: str) -> None:
        """Give networks of which a state dict has nothing the weights of the one below the pyramid,
        in place.

        Args:
            prefix: before this module's names in it.
            network: before that network's.
        """
        copied: Any
        for i, copied in enumerate(self.networks):
            first = f"{prefix}networks.{i}.stages."
            if not any(name.startswith(first) for name in state):
                for number, stage in enumerate(copied.names):
                    old, new = f"{network}{stage}.", f"{first}{number}."
                    names = [name for name in state if name.startswith(old)]
                    state.update({new + name[len(old) :]: state[name] for name in names})


class FeedbackResNet(nn.Module):
    """A copy of a ResNet, with its weights, to the stages of which maps of a pyramid are fed back.

    The stages have numbers in place of their names: Detectron2 finds the weights of ImageNet by how
    names end, and refuses a file that could be meant for two networks.

    Args:
        network: a ResNet of blocks that take feedback.
        outputs: the maps that it returns.
        sources: the pyramid's map that a stage takes, by the stage's name.
        channels: of the pyramid's maps.
    """

    def __init__(
        self, network: Any, outputs: Sequence[str], sources: Mapping[str, str], channels: int
    ) -> None:
        super().__init__()
        self.names, self.outputs, self.sources = _stages(network, outputs), outputs, sources
        self.stages = nn.ModuleList(
            copy.deepcopy(network.get_submodule(name)) for name in self.names
        )
        self.feedback = nn.ModuleDict()
        for name, source in sources.items():
            conv = nn.Conv2d(channels, network.get_submodule(name)[0].out_channels, 1)
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)
            self.feedback[name] = conv

    def forward(self, image: Tensor, fed_back: Maps) -> Maps:
        """Run the stages that the outputs need.

        Args:
            fed_back: what is made of the pyramid's maps, by their names.
        """
        x, maps = image, {}
        stage: Any
        for name, stage in zip(self.names, self.stages):
            if name in self.sources:
                first, *others = stage
                x = _run_block(first, x, self.feedback[name](fed_back[self.sources[name]]))
                for block in others:
                    x = block(x)
            else:
                x = stage(x)
            if name in self.outputs:
                maps[name] = x
        return maps


class ASPP(nn.Module):
    """What is fed back of a map: `ReLU(cat[1×1(x), 3×3(x), 3×3(x), 1×1(GAP(x))])` with C/4 channels
    each and dilations of 3 and 6.

    Args:
        channels: of the map and of the result; divisible by 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 4
        self.point = nn.Conv2d(channels, width, 1)
        self.near = nn.Conv2d(channels, width, 3, padding=3, dilation=3)
        self.far = nn.Conv2d(channels, width, 3, padding=6, dilation=6)
        self.whole = nn.Conv2d(channels, width, 1)
        for conv in self.children():
            weight_init.c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        parts: List[Tensor] = [self.point(x), self.near(x), self.far(x)]
        whole = self.whole(x.mean(dim=[2, 3], keepdim=True))  # (N, C/4, 1, 1)
        parts.append(whole.expand_as(parts[0]))
        return torch.relu(torch.cat(parts, dim=1))


def _run_block(block: Any, x: Tensor, fed_back: Tensor) -> Tensor:
    """`ReLU(branch(x) + shortcut(x) + fed_back)`, with the branch and the shortcut of a block."""
    y = F.relu_(block.conv1(x))
    if not isinstance(block, DeformBottleneckBlock):
        y = block.conv2(y)
    elif block.deform_modulated:
        first, second, mask = torch.chunk(block.conv2_offset(y), 3, dim=1)
        y = block.conv2(y, torch.cat((first, second), dim=1), mask.sigmoid())
    else:
        y = block.conv2(y, block.conv2_offset(y))
    if not isinstance(block, BasicBlock):
        y = block.conv3(F.relu_(y))
    y = y + (x if block.shortcut is None else block.shortcut(x))
    return F.relu_(y + fed_back)


def _stages(network: Any, outputs: Sequence[str]) -> tuple[str, ...]:
    """The stem and the stages of a ResNet, up to the last that gives one of these maps."""
    names = ("stem", *network.stage_names)
    return names[: 1 + max(names.index(name) for name in outputs)]


def _sources(
    network: Any, steps: int, inputs: Sequence[str], outputs: Mapping[str, int]
) -> dict[str, str]:
    """The pyramid's map that each stage takes, by the stage's name."""
    by_level = {level: name for name, level in outputs.items() if level >= _FINEST}
    strides = {name: network._out_feature_strides[name] for name in _stages(network, inputs)[1:]}
    levels = {name: stride.bit_length() - 1 for name, stride in strides.items()}
    sources = {name: by_level[level] for name, level in levels.items() if level in by_level}
    if not sources:
        raise bad_argument(
            _STEPS,
            f"{steps} feeds the maps of level {_FINEST} and coarser back into the stages of those"
            f" levels, but the pyramid gives {', '.join(outputs)}, and the network's stages are of"
            f" the levels {', '.join(map(str, levels.values()))}: read coarser maps, or take 1",
        )
    return sources


def _check_network(network: Backbone, steps: int) -> None:
    """Refuse a network whose blocks take no feedback."""
    is_resnet = isinstance(network, ResNet) and type(network).forward is ResNet.forward
    kind = type(getattr(network, "model", network)).__name__  # of what an adapter holds
    if isinstance(network, ResNet) and is_resnet:
        blocks = [stage[0] for stage in network.stages[1:]]
        other = [type(block).__name__ for block in blocks if type(block).forward not in _FORWARDS]
        if not other:
            return
        kind += f" of {other[0]}"
    raise bad_argument(
        _STEPS,
        f"{steps} feeds the pyramid's maps back into the residual blocks of Detectron2's ResNet,"
        f" but the network is a {kind}, whose blocks take none: take build_resnet_backbone"
        " (MODEL.BOTTOM_UP.NAME), or 1",
    )
