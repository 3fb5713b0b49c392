"""torchvision's classification networks as Detectron2 backbones. Shapes are `(N, C, H, W)`.

A node is a step of the network's traced graph. Its name is the one that
`torchvision.models.feature_extraction` gives it: the path of its module, `layer1.0.relu`.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from fpn_plugin.bottom_up.base import AdaptedBackbone, MapInfo, freeze, name_maps, wanted_maps
from fpn_plugin.bottom_up.norms import convert_norms, freeze_norm_statistics
from fpn_plugin.registry import unknown_name

# Two images whose heights differ by 256 and widths by 128 pixels: what differs in a node's two
# results is its height and width, and by how much is its stride
_IMAGES = ((256, 320), (512, 448))
# SqueezeNet classifies by a convolution: its scores look like a map
_CLASSIFIER = "classifier"
# Both start with weights that took minutes to draw once, and were trained on their own pixel
# values, which they make from everyone's; torchvision sets the second with its weights
_DEFAULTS: dict[str, dict[str, Any]] = {
    name: {"init_weights": False, "transform_input": True} for name in ("googlenet", "inception_v3")
}


class _Node(NamedTuple):
    """A step of the network; `map` is None if its result is no map, or nothing learned made it."""

    name: str
    parameters: Sequence[nn.Parameter]
    map: MapInfo | None

    def scopes(self) -> Iterator[str]:
        """The modules that it is in, outermost first, and itself."""
        parts = self.name.split(".")
        return (".".join(parts[: i + 1]) for i in range(len(parts)))


class TorchvisionBackbone(AdaptedBackbone):
    """A torchvision network whose maps are named `res<level>`, with level = log2(stride).

    The maps, their channels and strides are read from its traced graph: of each stride the last
    one that is no inner step of a module that halves it. What comes after the last map is cut off.

    Args:
        model: torchvision's name for it, e.g. "efficientnet_v2_s".
        out_features: the maps to give, e.g. `["res3", "res4", "res5"]`; empty for all.
        freeze_at: 0: train everything; 1: freeze the stem, that is all before and including
            `res1`, or before the first stage if there is no `res1`; 2: all before and including
            `res2`; and so on, as Detectron2 counts.
        norm: what the network's norms become, see :func:`fpn_plugin.bottom_up.norms.convert_norms`.
        in_channels: of the image; torchvision's networks take 3.
        args: more arguments for the network, by torchvision's names.
        pretrained: whether to start from torchvision's best weights.

    Raises:
        ValueError: (KeyError for an unknown model, map or norm) naming the config key.
    """

    def __init__(
        self,
        model: str,
        out_features: Sequence[str] = (),
        freeze_at: int = 0,
        norm: str = "",
        in_channels: int = 3,
        args: Mapping[str, Any] | None = None,
        pretrained: bool = False,
    ) -> None:
        source = f"torchvision/{model}"
        if in_channels != 3:
            raise ValueError(
                f"MODEL.BOTTOM_UP.NAME: {source} takes images of 3 channels, not {in_channels}"
                " (MODEL.PIXEL_MEAN has one value per channel); timm's networks take others"
            )
        network = _create(model, dict(args or {}), pretrained)
        nodes = _nodes(network, source)
        ends = _stage_ends(nodes, source)
        names = wanted_maps(source, list(ends), out_features)
        freeze(_parameters_to_freeze(nodes, ends, freeze_at))
        extractor = create_feature_extractor(
            network, {ends[name].name: name for name in names}, suppress_diff_warning=True
        )
        super().__init__(extractor, {name: _map(ends[name]) for name in names})
        convert_norms(self.model, norm, source)
        freeze_norm_statistics(self.model)


def _create(model: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    known = models.list_models(module=models)
    if model not in known:
        raise unknown_name("MODEL.BOTTOM_UP.NAME: torchvision/<model>", model, known)
    try:
        if not pretrained:
            return models.get_model(model, weights=None, **{**_DEFAULTS.get(model, {}), **args})
        return models.get_model(model, weights="DEFAULT", **args)
    # NotImplementedError is torchvision's word for arguments that a network cannot have (dilated
    # ResNet-18); it is a RuntimeError too, so it comes first
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"MODEL.BOTTOM_UP.ARGS: {args} is not for torchvision/{model}: {error}"
        ) from error
    except (OSError, RuntimeError) as error:  # the address cannot be reached; a broken file
        if not pretrained:
            raise
        raise ValueError(
            f"MODEL.BOTTOM_UP.WEIGHTS: 'torchvision': the weights of {model} could not be had"
            f" ({error}); give a file"
        ) from error


def _nodes(network: nn.Module, source: str) -> list[_Node]:
    """Every step of the network, in the order in which they run."""
    try:
        train_names, names = get_graph_node_names(network, suppress_diff_warning=True)
        every = create_feature_extractor(
            network,
            train_return_nodes=train_names[:1],
            eval_return_nodes=names,
            suppress_diff_warning=True,
        ).eval()
        one, two = (_results(every, height, width) for height, width in _IMAGES)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        plain_vit = (
            " A plain ViT for a pyramid is timm/vit_base_patch16_224 or build_vit_backbone, with"
            " MODEL.FPN.TOPOLOGY: simple and IN_FEATURES: [res4]"
        )
        raise ValueError(
            f"MODEL.BOTTOM_UP.NAME: {source} gives no maps of an image of any size ({reason})."
            + (plain_vit if "/vit_" in source else "")
        ) from error
    graph_nodes = every.graph.output_node().args[0]
    nodes, learned = [], False
    for name in one:
        parameters = _parameters(every, graph_nodes[name])
        learned = learned or bool(parameters)
        found = _read_map(one[name], two[name]) if learned else None
        nodes.append(_Node(name, parameters, found))
    return nodes


def _results(network: nn.Module, height: int, width: int) -> dict[str, Any]:
    """What each node gives for an image of that size: tensors with a shape and without numbers."""
    state = {**network.state_dict(), **dict(network.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in state.items()}
    image = torch.empty(1, 3, height, width, device="meta")
    with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints an error that it also raises
        return torch.func.functional_call(network, meta, (image,))


def _parameters(network: nn.Module, node: torch.fx.Node) -> list[nn.Parameter]:
    """What is learned in one step."""
    if node.op == "call_module":
        return list(network.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(network.get_submodule(owner), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _read_map(one: Any, two: Any) -> MapInfo | None:
    """What kind of map a node gives, from its results for the two images; None if it is none.

    A difference tells more than a ratio: networks without padding lose some pixels at the border.
    """
    if not (isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim == 4):
        return None
    changed = [i for i in range(4) if one.shape[i] != two.shape[i]]
    if changed not in ([1, 2], [2, 3]):
        return None
    grown = [two.shape[i] - one.shape[i] for i in changed]
    (height, width), (other_height, other_width) = _IMAGES
    stride = (other_height - height) // grown[0]
    if stride < 1 or stride & (stride - 1):
        return None
    if [grown[0] * stride, grown[1] * stride] != [other_height - height, other_width - width]:
        return None
    channels_last = changed == [1, 2]
    return MapInfo(one.shape[3 if channels_last else 1], stride, channels_last)


def _map(node: _Node) -> MapInfo:
    assert node.map is not None  # by _stage_ends; for mypy
    return node.map


def _stride_changes(maps: Sequence[_Node]) -> dict[str, tuple[int, int]]:
    """The strides of the maps that each module takes and gives, by the module's name."""
    changes: dict[str, tuple[int, int]] = {}
    stride = 1
    for node in maps:
        before, stride = stride, _map(node).stride
        for scope in node.scopes():
            changes[scope] = (changes.get(scope, (before, 0))[0], stride)
    return changes


def _stage_ends(nodes: Sequence[_Node], source: str) -> dict[str, _Node]:
    """The node that gives each map: the last of its stage (arXiv:1612.03144).

    A block that halves the map still works on the large one at first, with other channels: a
    MobileNet's widened map, a DenseNet's narrowed one. These belong to the next stage.
    """
    maps = [node for node in nodes if node.map and not node.name.startswith(f"{_CLASSIFIER}.")]
    changes = _stride_changes(maps)
    kept = [
        node
        for node in maps
        if not any(
            changes[scope] == (_map(node).stride, 2 * _map(node).stride) for scope in node.scopes()
        )
    ]
    positions = name_maps(source, [_map(node).stride for node in kept])
    return {name: kept[position] for name, position in positions.items()}


def _parameters_to_freeze(
    nodes: Sequence[_Node], ends: Mapping[str, _Node], freeze_at: int
) -> list[nn.Parameter]:
    if freeze_at < 1:
        return []
    frozen = [end for name, end in ends.items() if 1 <= int(name[3:]) <= freeze_at]
    last = nodes.index(frozen[-1] if frozen else _stem_end(nodes, next(iter(ends.values()))))
    return [parameter for node in nodes[: last + 1] for parameter in node.parameters]


def _stem_end(nodes: Sequence[_Node], first: _Node) -> _Node:
    """Where a network that begins with patches (ConvNeXt, Swin) has its first stage's stride."""
    stride = _map(first).stride
    maps = [node for node in nodes if node.map]
    changes = _stride_changes(maps)
    stem = next(
        scope
        for node in maps
        for scope in node.scopes()
        if changes[scope][0] < stride and changes[scope][1] == stride
    )
    return [node for node in maps if node.name == stem or node.name.startswith(f"{stem}.")][-1]
