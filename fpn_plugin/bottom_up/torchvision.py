"""torchvision's classification networks as Detectron2 backbones. Shapes are `(N, C, H, W)`.

A step is a node of the network's traced graph, with the name that
`torchvision.models.feature_extraction` gives it: the path of its module, e.g. `layer1.0.relu`.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from fpn_plugin.bottom_up.base import AdaptedBackbone, MapInfo, freeze, name_maps, select_maps
from fpn_plugin.bottom_up.image_channels import set_image_channels
from fpn_plugin.bottom_up.norms import convert_norms, freeze_norm_statistics
from fpn_plugin.bottom_up.probe import find_divisor, log_misfit
from fpn_plugin.paths import download_advice
from fpn_plugin.registry import unknown_name

# Two images whose heights differ by 256 and widths by 128 pixels: the dimensions in which a step's
# two results differ are its height and width, and the differences give its stride
_IMAGE_SIZES = ((256, 320), (512, 448))
# SqueezeNet's classifier is a convolution: its scores look like a map
_CLASSIFIER = "classifier."
# torchvision's own initial weights of these two take minutes to draw. They were trained on other
# pixel values, which they compute from the usual ones; torchvision turns that on with its weights
_DEFAULTS: dict[str, dict[str, Any]] = {
    name: {"init_weights": False, "transform_input": True} for name in ("googlenet", "inception_v3")
}


class _Step(NamedTuple):
    """A step; `map` is None if it returns no map, or if no step up to it has parameters."""

    name: str
    parameters: Sequence[nn.Parameter]
    map: MapInfo | None

    @property
    def stride(self) -> int:
        """The stride of its map, in pixels."""
        assert self.map is not None  # for mypy: asked only of steps that return a map
        return self.map.stride

    def modules(self) -> Iterator[str]:
        """The names of the modules that contain it, outermost first, and its own."""
        words = self.name.split(".")
        return (".".join(words[: i + 1]) for i in range(len(words)))


class TorchvisionBackbone(AdaptedBackbone):
    """A torchvision network whose maps are named `res<level>`, where level = log2(stride).

    The maps, their channels and strides are read from its traced graph: of each stride the last
    one that is no inner step of a module that halves it. Layers after the last map are dropped.

    Args:
        model: torchvision's name for it, e.g. "efficientnet_v2_s".
        out_features: the maps to return, e.g. `["res3", "res4", "res5"]`; empty for all.
        freeze_at: 0: train everything; 1: freeze the stem, that is everything up to `res1`, or up
            to the first stage if there is no `res1`; 2: everything up to `res2`; and so on, as
            Detectron2 counts.
        norm: converts its norms, see :func:`fpn_plugin.bottom_up.norms.convert_norms`.
        in_channels: of the image; torchvision's own are for 3.
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
        network = _create(model, dict(args or {}), pretrained)
        if in_channels != 3:
            if model in _DEFAULTS:  # they compute other pixel values from red, green and blue
                raise ValueError(
                    f"MODEL.BOTTOM_UP.NAME: {source} takes images of 3 channels, not {in_channels}"
                    " (MODEL.PIXEL_MEAN has one value per channel); others take any"
                )
            set_image_channels(network, in_channels, source)
        steps = _trace(network, source, in_channels)
        ends = _stage_ends(steps, source)
        names = select_maps(source, list(ends), out_features)
        freeze(_parameters_to_freeze(steps, ends, freeze_at))
        extractor = create_feature_extractor(
            network, {ends[name].name: name for name in names}, suppress_diff_warning=True
        )
        maps = {name: info for name in names if (info := ends[name].map)}
        divisor = find_divisor(
            lambda *size: _map_sizes(extractor, maps, in_channels, *size),
            [info.stride for info in maps.values()],
        )
        if not divisor:
            log_misfit(source)
        super().__init__(extractor, maps, divisor if divisor > 1 else 0, resample=divisor != 1)
        convert_norms(self.model, norm, source)
        freeze_norm_statistics(self.model)


def has_model(model: str) -> bool:
    """Whether torchvision has a classification network of that name."""
    return model in models.list_models(module=models)


def require_model(model: str) -> None:
    """Refuse a name that torchvision does not have.

    Raises:
        KeyError: with the nearest.
    """
    if not has_model(model):
        known = [f"torchvision/{name}" for name in models.list_models(module=models)]
        raise unknown_name("MODEL.BOTTOM_UP.NAME", f"torchvision/{model}", known)


def _create(model: str, args: dict[str, Any], pretrained: bool) -> nn.Module:
    require_model(model)
    try:
        if not pretrained:
            return models.get_model(model, weights=None, **{**_DEFAULTS.get(model, {}), **args})
        return models.get_model(model, weights="DEFAULT", **args)
    # for arguments that a network cannot have (a dilated ResNet-18) torchvision raises
    # NotImplementedError; it is a RuntimeError, so it comes first
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"MODEL.BOTTOM_UP.ARGS: {args} is not for torchvision/{model}: {error}"
        ) from error
    except (OSError, RuntimeError) as error:  # no connection, or a broken file
        if not pretrained:
            raise
        key, address = "MODEL.BOTTOM_UP.WEIGHTS", models.get_model_weights(model).DEFAULT.url
        place = os.path.join(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2])
        raise ValueError(
            f"{key}: 'torchvision': the weights of torchvision/{model} could not be had: {error}\n"
            + download_advice(address, key, place, "TORCH_HOME")
        ) from error


def _trace(network: nn.Module, source: str, channels: int) -> list[_Step]:
    """All steps of the network, in the order of their execution."""
    try:
        train_names, names = get_graph_node_names(network, suppress_diff_warning=True)
        extractor = create_feature_extractor(
            network,
            train_return_nodes=train_names[:1],
            eval_return_nodes=names,
            suppress_diff_warning=True,
        ).eval()
        small, large = (_run_on_meta(extractor, channels, *size) for size in _IMAGE_SIZES)
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
    nodes: Any = list(extractor.graph.nodes)[-1].args[0]  # what the graph returns
    steps, is_learned = [], False
    for name in small:
        parameters = _parameters(extractor, nodes[name])
        is_learned = is_learned or bool(parameters)
        info = _map_info(small[name], large[name]) if is_learned else None
        steps.append(_Step(name, parameters, info))
    return steps


def _run_on_meta(network: nn.Module, channels: int, height: int, width: int) -> dict[str, Any]:
    """The result of each step for an image of that size: shapes without data."""
    state = {**network.state_dict(), **dict(network.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in state.items()}
    image = torch.empty(1, channels, height, width, device="meta")
    with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints an error that it also raises
        return torch.func.functional_call(network, meta, (image,))


def _map_sizes(
    network: nn.Module, maps: Mapping[str, MapInfo], channels: int, height: int, width: int
) -> list[torch.Size]:
    """The heights and widths of the maps of an image of that size."""
    results = _run_on_meta(network, channels, height, width)
    return [
        results[name].shape[1:3] if info.channels_last else results[name].shape[2:]
        for name, info in maps.items()
    ]


def _parameters(network: nn.Module, node: torch.fx.Node) -> list[nn.Parameter]:
    """The parameters of a step."""
    if node.op == "call_module":
        return list(network.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(network.get_submodule(owner), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def _map_info(small: Any, large: Any) -> MapInfo | None:
    """The properties of a step's map, from its results for the two images; None if it is no map.

    The stride follows from the difference, not from the ratio: networks without padding lose some
    pixels at the border.
    """
    if not (isinstance(small, Tensor) and isinstance(large, Tensor)):
        return None
    if not small.ndim == large.ndim == 4:
        return None
    changed = [i for i in range(4) if small.shape[i] != large.shape[i]]
    if changed not in ([1, 2], [2, 3]):
        return None
    growth = [large.shape[i] - small.shape[i] for i in changed]
    image_growth = [b - a for a, b in zip(*_IMAGE_SIZES)]
    stride = image_growth[0] // growth[0]
    if stride < 1 or stride & (stride - 1):
        return None
    if [side * stride for side in growth] != image_growth:
        return None
    channels_last = changed == [1, 2]
    return MapInfo(small.shape[3 if channels_last else 1], stride, channels_last)


def _module_strides(steps: Sequence[_Step]) -> dict[str, tuple[int, int]]:
    """The strides of each module's input and output map, by its name; `steps` return maps."""
    strides: dict[str, tuple[int, int]] = {}
    stride = 1
    for step in steps:
        previous, stride = stride, step.stride
        for module in step.modules():
            entry, _ = strides.get(module, (previous, stride))
            strides[module] = (entry, stride)
    return strides


def _stage_ends(steps: Sequence[_Step], source: str) -> dict[str, _Step]:
    """The step that returns each map, by the map's name: the last of its stage (arXiv:1612.03144).

    A block that halves the map first works on the large one, with other channels: a MobileNet's
    widened map, a DenseNet's narrowed one. These belong to the next stage.
    """
    candidates = [step for step in steps if step.map and not step.name.startswith(_CLASSIFIER)]
    strides = _module_strides(candidates)
    kept = [
        step
        for step in candidates
        if all(strides[module] != (step.stride, 2 * step.stride) for module in step.modules())
    ]
    positions = name_maps(source, [step.stride for step in kept])
    return {name: kept[position] for name, position in positions.items()}


def _parameters_to_freeze(
    steps: Sequence[_Step], ends: Mapping[str, _Step], freeze_at: int
) -> list[nn.Parameter]:
    if freeze_at < 1:
        return []
    frozen = [end for name, end in ends.items() if 1 <= int(name[3:]) <= freeze_at]
    first_stride = next(iter(ends.values())).stride
    last = steps.index(frozen[-1] if frozen else _stem_end(steps, first_stride))
    return [parameter for step in steps[: last + 1] for parameter in step.parameters]


def _stem_end(steps: Sequence[_Step], stride: int) -> _Step:
    """The last step of the module that first reaches a stride: ConvNeXt's or Swin's patches."""
    map_steps = [step for step in steps if step.map]
    strides = _module_strides(map_steps)
    stem = next(
        module
        for step in map_steps
        for module in step.modules()
        if strides[module][0] < stride == strides[module][1]
    )
    return [step for step in map_steps if stem in step.modules()][-1]
