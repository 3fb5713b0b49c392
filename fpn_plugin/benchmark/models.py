"""The models of a benchmark: built with the same weights wherever names and shapes agree, run as
their configs ask, and taken apart into pyramid and network. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, ContextManager, Dict, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.resnet import CNNBlockBase
from detectron2.structures import ImageList
from torch import Tensor, nn

from fpn_plugin.benchmark.configs import BASELINE, BenchmarkConfig
from fpn_plugin.benchmark.inputs import Inputs
from fpn_plugin.checkpoint.fit import find_misfits, require_fit
from fpn_plugin.checkpoint.load import read_state_dict
from fpn_plugin.modeling.build import build_model
from fpn_plugin.modeling.precision import Autocast, amp_dtype, device_type
from fpn_plugin.modeling.python_config import attached
from fpn_plugin.modeling.speed import compile_part, prepare_for_inference, prepare_for_training

WEIGHTS = "--weights"
_RESIDUAL_SCALE = 0.25  # the weight of the last norm of a residual branch
# what Detectron2's FPN and this plugin's pyramid, and Detectron2's SimpleFeaturePyramid, call it
_BELOW = ("bottom_up", "net")
# keys of MODEL.FPN that may change what is computed and not the weights
_EQUATIONS = ("FUSE_TYPE", "UPSAMPLE", "DOWNSAMPLE", "BLOCK")


@dataclass
class BenchmarkModel:
    """A config with its model.

    Attributes:
        model: on the CPU, in float32, as built: it is copied before anything is done to it.
        weights: where its weights come from, in words.
        trained: whether a checkpoint has all of them.
        score_threshold: for inference in place of the config's own, if it is not None.
    """

    config: BenchmarkConfig
    model: Any
    weights: str = ""
    trained: bool = False
    score_threshold: float | None = None

    @property
    def name(self) -> str:
        return self.config.name

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The shape of each weight of a part: "neck", "backbone" or "model"."""
        prefix = "" if part == "model" else "backbone."
        below = tuple(f"backbone.{name}." for name in _BELOW) if part == "neck" else ()
        return {
            name: tuple(value.shape)
            for name, value in self.model.state_dict().items()
            if name.startswith(prefix) and not (below and name.startswith(below))
        }


def difference_by_design(model: BenchmarkModel, other: BenchmarkModel, part: str) -> str:
    """Why a part's outputs differ: other weights, a key of the pyramid; "" if they must not."""
    if model.shapes(part) != other.shapes(part):
        return "other weights"
    cfgs = [each.config.cfg for each in (model, other)]
    if any(attached(cfg) is not None for cfg in cfgs):
        return ""
    mine, others = (cfg.MODEL.FPN for cfg in cfgs)
    keys = [key for key in _EQUATIONS if mine[key] != others[key]]
    return f"other MODEL.FPN.{keys[0]}" if keys else ""


def build_models(
    configs: Sequence[BenchmarkConfig],
    inputs: Inputs,
    weights: str = "",
    allow_partial: bool = False,
) -> dict[str, BenchmarkModel]:
    """Build the model of every config from one seed.

    The first model that has a weight of a name and shape decides its value for all that follow.
    Nothing is downloaded. Running statistics that no checkpoint gives are measured on the inputs,
    so that features stay in the range of a trained network's: with norms that start as identities,
    a ResNet-50's grow a thousandfold and half precision overflows.

    Args:
        weights: a checkpoint whose weights come before all others.
        allow_partial: whether it may lack weights of a model, or have others.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, or is not of each of the models.
    """
    checkpoint = read_state_dict(weights, WEIGHTS) if weights else {}
    pool, given = dict(checkpoint), set(checkpoint)
    models, used = {}, 0
    for config in configs:
        torch.manual_seed(inputs.seed)
        cfg = config.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        model: Any = build_model(cfg).eval()
        loaded = _load_matching(model, pool)
        used += len(loaded & given)
        misfits = find_misfits(model, checkpoint)
        if weights:
            title = f"{WEIGHTS} {weights!r} ({config.name})"
            try:
                require_fit(title, model, misfits, allow_partial=allow_partial)
            except ValueError as error:
                if config.role != "baseline":
                    raise
                raise ValueError(f"{error}; to leave the baseline out: {BASELINE} none") from None
        _set_statistics(model, loaded, inputs)
        for name, value in model.state_dict().items():
            pool.setdefault(name, value)
        source = f"{len(loaded & given)} tensors of {weights}" if weights else f"seed {inputs.seed}"
        trained = bool(weights) and not misfits.missing and not misfits.shapes
        models[config.name] = BenchmarkModel(config, model, source, trained)
    if weights and not used:
        raise ValueError(f"{WEIGHTS}: nothing in {weights} matches any of the models")
    return models


def _load_matching(model: nn.Module, pool: Mapping[str, Tensor]) -> set[str]:
    """Copy what agrees in name and shape; returns the names."""
    state = model.state_dict()
    matching = {
        name: pool[name]
        for name, value in state.items()
        if name in pool and pool[name].shape == value.shape
    }
    model.load_state_dict(matching, strict=False)
    return set(matching)


@torch.no_grad()
def _set_statistics(model: Any, loaded: set[str], inputs: Inputs) -> None:
    """Set each norm's running mean and variance to those of its input, in one forward."""

    def measure(norm: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].float()
        norm.running_mean.copy_(x.mean((0, 2, 3)))
        # a map of one pixel has no variance
        variance = x.var((0, 2, 3)) if x[:, 0].numel() > 1 else torch.ones(x.shape[1])
        norm.running_var.copy_(variance.clamp(min=1e-3))

    _damp_residuals(model, loaded)
    hooks = [
        norm.register_forward_pre_hook(measure)
        for name, norm in model.backbone.named_modules()
        if isinstance(getattr(norm, "running_var", None), Tensor)
        and f"backbone.{name}.running_var" not in loaded
    ]
    if hooks:
        model.backbone(image_tensor(model, inputs.images(len(model.pixel_mean))))
    for hook in hooks:
        hook.remove()


def _damp_residuals(model: nn.Module, loaded: set[str]) -> None:
    """Let each residual branch of a ResNet add little to its shortcut, as trained ones do.

    Branches as large as their shortcuts amplify rounding a hundredfold from the first stage to the
    last, and no precision would seem to agree with another.
    """
    for name, block in model.named_modules():
        if isinstance(block, CNNBlockBase) and hasattr(block, "conv2"):
            last = "conv3" if hasattr(block, "conv3") else "conv2"
            norm = getattr(block.get_submodule(last), "norm", None)
            if norm is not None and f"{name}.{last}.norm.weight" not in loaded:
                norm.weight.data.fill_(_RESIDUAL_SCALE)


@dataclass(frozen=True)
class PreparedModel:
    """A model that is about to be timed.

    Attributes:
        model: without any autocast around it.
        device: its kind: "cuda", "cpu".
        dtype: what autocast computes in; None for full precision.
        compiled: the part that `torch.compile` has: `MODEL.COMPILE`.
    """

    model: Any
    device: str
    dtype: torch.dtype | None
    compiled: str = ""

    def precision(self) -> str:
        """The name of the type that it computes in."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self) -> ContextManager[None]:
        """The context of its forward. Weights are cast anew each time, as in use."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def neck(self) -> nn.Module:
        """The model's pyramid, compiled if it is compiled there."""
        neck = neck_of(self.model.backbone)
        holder = nn.Module()
        holder.add_module("backbone", neck)
        compile_part(holder, self.compiled)  # a copy is not compiled any more
        return neck


def prepare(model: nn.Module, cfg: CfgNode, training: bool) -> PreparedModel:
    """A copy of `model` on the config's device, in the mode and with the levers it asks for."""
    ready = copy.deepcopy(model).to(cfg.MODEL.DEVICE).train(training)
    ready = prepare_for_training(ready, cfg) if training else prepare_for_inference(ready, cfg)
    dtype = amp_dtype(cfg)
    if isinstance(ready, Autocast):
        dtype, ready = ready.dtype, ready.model
    return PreparedModel(ready, device_type(cfg), dtype, cfg.MODEL.COMPILE)


class GivenMaps(Backbone):
    """In place of a network: passes on the maps that it is called with.

    Args:
        shapes: of the maps.
        like: the network, whose padding it asks for.
    """

    def __init__(self, shapes: Mapping[str, ShapeSpec], like: Backbone) -> None:
        super().__init__()
        self._shapes = dict(shapes)
        self._divisibility = like.size_divisibility
        self._padding = like.padding_constraints

    @property
    def size_divisibility(self) -> int:
        return self._divisibility

    @property
    def padding_constraints(self) -> Dict[str, int]:
        return self._padding

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes

    def forward(self, x: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return x


class FixedMaps(GivenMaps):
    """In place of a backbone: always the same maps, whatever the image."""

    def __init__(self, maps: Mapping[str, Tensor], like: Backbone) -> None:
        super().__init__(like.output_shape(), like)
        self._maps = dict(maps)

    def forward(self, x: Any) -> Dict[str, Tensor]:
        return dict(self._maps)


def find_below(backbone: nn.Module) -> str:
    """The attribute of a backbone that is the network below its pyramid; "" if it has none."""
    names = (name for name in _BELOW if isinstance(getattr(backbone, name, None), nn.Module))
    return next(names, "")


def below_name(backbone: nn.Module) -> str:
    """The attribute of a backbone that is the network below its pyramid.

    Raises:
        ValueError: if it has none.
    """
    name = find_below(backbone)
    if not name:
        raise ValueError(
            f"MODEL.BACKBONE.NAME: a {type(backbone).__name__} has no network underneath a pyramid"
            f" (no attribute {' or '.join(_BELOW)}): its neck cannot be measured alone"
        )
    return name


def neck_of(backbone: nn.Module) -> nn.Module:
    """The pyramid of a backbone, called with a dict of bottom-up maps; parameters are shared.

    It is the backbone itself, run on maps that are there already, so that what was done to the
    backbone (a layout, a compiled part) holds for it too. Of a recursive pyramid it is the first
    run: the others read the image.

    Raises:
        ValueError: if the backbone has no network underneath.
    """
    name = below_name(backbone)
    network = getattr(backbone, name)
    neck = copy.copy(backbone)
    neck._modules = dict(backbone._modules)  # a shallow copy shares the dict of submodules
    neck.add_module(name, GivenMaps(network.output_shape(), network))
    if getattr(neck, "rfp", None) is not None:
        neck.add_module("rfp", None)
    return neck


@torch.no_grad()
def maps_below(backbone: Any, image: Tensor) -> dict[str, Tensor]:
    """The maps of the network below that its pyramid reads.

    Args:
        image: of a padded size, `(N, 3, H, W)`.
    """
    maps = getattr(backbone, below_name(backbone))(image)
    # Detectron2's FPN, its SimpleFeaturePyramid, and this plugin's pyramid
    names = getattr(backbone, "in_features", None) or getattr(backbone, "in_feature", None)
    if names is None:
        names = list(backbone.graph.inputs)
    return {name: maps[name].detach() for name in ([names] if isinstance(names, str) else names)}


def image_tensor(model: Any, images: list[dict[str, Any]]) -> Tensor:
    """Images as a detector's backbone gets them: normalised, padded, in one tensor."""
    normalised = [
        (image["image"].to(model.pixel_mean) - model.pixel_mean) / model.pixel_std
        for image in images
    ]
    backbone = model.backbone
    return ImageList.from_tensors(
        normalised, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
    ).tensor
