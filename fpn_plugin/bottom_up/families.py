"""Detectron2's RegNet, Swin, MViT and ViT: arguments, strides, stages, and how to shorten them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Dict, Iterable, Mapping, Sequence

import torch
from detectron2.modeling.backbone import MViT, RegNet, SwinTransformer, ViT, regnet
from detectron2.modeling.backbone.utils import get_abs_pos
from torch import Tensor, nn

from fpn_plugin.bottom_up.image_channels import set_image_channels
from fpn_plugin.registry import unknown_name

ARGS = "MODEL.BOTTOM_UP.ARGS"


class Family(ABC):
    """How to build, freeze and shorten the networks of one Detectron2 class.

    A stage computes the maps of one stride. Its name is the class's own, e.g. `s1` or `p0`.

    Attributes:
        network_class: Detectron2's class.
        defaults: arguments for a well-known size.
        reserved: arguments that other keys decide, or that no config file can hold.
    """

    network_class: Any
    defaults: Mapping[str, Any]
    reserved: Sequence[str]

    def arguments(self, given: Mapping[str, Any], channels: int) -> dict[str, Any]:
        """All arguments of the class.

        Args:
            given: `MODEL.BOTTOM_UP.ARGS`.
            channels: of the image.
        """
        return {**self.defaults, **given, "in_chans": channels}

    def construct(self, arguments: Mapping[str, Any]) -> Any:
        """Build the network with all its maps."""
        return self.network_class(**arguments)

    def strides(self, model: Any) -> dict[str, int]:
        """The stride of each stage, in pixels, from high to low resolution."""
        return dict(model._out_feature_strides)

    @abstractmethod
    def shorten(self, model: Any, wanted: Sequence[str], last: int) -> None:
        """Return only the wanted maps, and drop all stages after number `last`, in place."""

    def stem(self, model: Any) -> Iterable[nn.Parameter]:
        """The parameters before the first stage."""
        position = [] if model.pos_embed is None else [model.pos_embed]
        return [*model.patch_embed.parameters(), *position]

    @abstractmethod
    def stage(self, model: Any, number: int) -> Iterable[nn.Parameter]:
        """The parameters of a stage, without the norm on its map, which is never pretrained."""

    def pad_to(self, model: Any) -> int:
        """The multiple of pixels that images are padded to."""
        return 1


class RegNetFamily(Family):
    network_class = RegNet
    # RegNetX-4GF, of Detectron2's new_baselines
    defaults = {
        "stem_class": "SimpleStem",
        "stem_width": 32,
        "block_class": "ResBottleneckBlock",
        "depth": 23,
        "w_a": 38.65,
        "w_0": 96,
        "w_m": 2.43,
        "group_width": 40,
    }
    reserved = ("activation_class", "freeze_at", "norm", "out_features")
    CLASSES = {
        "stem_class": ("SimpleStem", "ResStem"),
        "block_class": ("ResBottleneckBlock", "ResBasicBlock", "VanillaBlock"),
    }

    def arguments(self, given: Mapping[str, Any], channels: int) -> dict[str, Any]:
        arguments = super().arguments(given, channels)
        for key, choices in self.CLASSES.items():
            if arguments[key] not in choices:
                raise unknown_name(f"{ARGS}.{key}", arguments[key], choices)
            arguments[key] = getattr(regnet, arguments[key])
        return arguments

    def construct(self, arguments: Mapping[str, Any]) -> Any:
        """The class itself knows three channels alone."""
        channels = arguments["in_chans"]
        model = super().construct({k: x for k, x in arguments.items() if k != "in_chans"})
        if channels != 3:
            set_image_channels(model, channels, "build_regnet_backbone")
        return model

    def shorten(self, model: Any, wanted: Sequence[str], last: int) -> None:
        model._out_features = list(wanted)
        for _, name in model.stages_and_names[last:]:
            delattr(model, name)
        model.stages_and_names = model.stages_and_names[:last]

    def stem(self, model: Any) -> Iterable[nn.Parameter]:
        return model.stem.parameters()

    def stage(self, model: Any, number: int) -> Iterable[nn.Parameter]:
        # the stem is number 0
        return model.stages_and_names[number - 1][0].parameters() if number else self.stem(model)


class SwinFamily(Family):
    network_class = SwinTransformer
    defaults: Mapping[str, Any] = {}  # the class's own are Swin-T's
    reserved = ("frozen_stages", "in_chans", "norm_layer", "out_indices")

    def arguments(self, given: Mapping[str, Any], channels: int) -> dict[str, Any]:
        arguments = super().arguments(given, channels)
        stages = len(arguments["depths"]) if "depths" in arguments else 4
        return {**arguments, "out_indices": tuple(range(stages))}

    def construct(self, arguments: Mapping[str, Any]) -> Any:
        model = super().construct(arguments)
        if arguments.get("use_checkpoint"):
            # checkpointed blocks get no gradients if their input requires none: after a frozen stem
            model.patch_embed.register_forward_hook(_require_gradient)
        return model

    def strides(self, model: Any) -> dict[str, int]:
        # the class itself claims stride 4 for the first map, whatever the size of its patches
        patch = model.patch_embed.patch_size[0]
        return {f"p{i}": patch * 2**i for i in range(model.num_layers)}

    def shorten(self, model: Any, wanted: Sequence[str], last: int) -> None:
        for i in model.out_indices:
            if f"p{i}" not in wanted:
                delattr(model, f"norm{i}")
        model.out_indices = tuple(i for i in model.out_indices if f"p{i}" in wanted)
        model.layers = model.layers[: last + 1]
        model.layers[-1].downsample = None
        model.num_layers = last + 1

    def stem(self, model: Any) -> Iterable[nn.Parameter]:
        position = [model.absolute_pos_embed] if model.ape else []
        return [*model.patch_embed.parameters(), *position]

    def stage(self, model: Any, number: int) -> Iterable[nn.Parameter]:
        """Includes the patch merging before it, which the class's own `frozen_stages` counts to the
        previous stage."""
        merging = model.layers[number - 1].downsample.parameters() if number else []
        return [*merging, *model.layers[number].blocks.parameters()]


class MViTFamily(Family):
    network_class = MViT
    # MViTv2-T, of Detectron2's projects/MViTv2
    defaults = {
        "embed_dim": 96,
        "depth": 10,
        "num_heads": 1,
        "last_block_indexes": (0, 2, 7, 9),
        "residual_pooling": True,
        "drop_path_rate": 0.2,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    reserved = ("act_layer", "in_chans", "norm_layer", "out_features")

    def arguments(self, given: Mapping[str, Any], channels: int) -> dict[str, Any]:
        arguments = super().arguments(given, channels)
        stages = len(arguments["last_block_indexes"])
        return {**arguments, "out_features": tuple(f"scale{i + 2}" for i in range(stages))}

    def shorten(self, model: Any, wanted: Sequence[str], last: int) -> None:
        for name in model._out_features:
            if name not in wanted:
                delattr(model, f"{name}_norm")
        model._out_features = tuple(wanted)
        model.blocks = model.blocks[: model._last_block_indexes[last] + 1]

    def stage(self, model: Any, number: int) -> Iterable[nn.Parameter]:
        ends = (-1, *model._last_block_indexes)
        return model.blocks[ends[number] + 1 : ends[number + 1] + 1].parameters()


class BlockMapsViT(ViT):
    """Detectron2's ViT, which can give the map after each of its blocks, as `block<number>`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (last,) = self.output_shape().values()
        self._out_features = [f"block{number}" for number, _ in enumerate(self.blocks, start=1)]
        self._out_feature_channels = dict.fromkeys(self._out_features, last.channels)
        self._out_feature_strides = dict.fromkeys(self._out_features, last.stride)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """The wanted maps, from the first block on."""
        x = self.patch_embed(x)  # (N, H/16, W/16, C)
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + get_abs_pos(self.pos_embed, self.pretrain_use_cls_token, size)
        maps: Dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks):
            x = block(x)
            name = f"block{number + 1}"
            if name in self._out_features:
                maps[name] = x.permute(0, 3, 1, 2)
        return maps


class ViTFamily(Family):
    network_class = ViT
    # ViT-B, of Detectron2's common/models/mask_rcnn_vitdet.py: blocks 2, 5, 8 and 11 see the whole
    # image
    defaults = {
        "img_size": 1024,
        "patch_size": 16,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "drop_path_rate": 0.1,
        "window_size": 14,
        "window_block_indexes": (0, 1, 3, 4, 6, 7, 9, 10),
        "use_rel_pos": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    reserved = ("act_layer", "in_chans", "norm_layer", "out_feature")

    def construct(self, arguments: Mapping[str, Any]) -> Any:
        return BlockMapsViT(**arguments)

    def shorten(self, model: Any, wanted: Sequence[str], last: int) -> None:
        model._out_features = list(wanted)
        model.blocks = model.blocks[: last + 1]

    def stage(self, model: Any, number: int) -> Iterable[nn.Parameter]:
        return model.blocks[number].parameters()

    def pad_to(self, model: Any) -> int:
        return model.patch_embed.proj.stride[0]


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
