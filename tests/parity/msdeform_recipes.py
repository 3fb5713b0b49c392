"""Mask2Former's pixel decoder of transformers, and Deformable DETR's levels by its parameters."""

from __future__ import annotations

import re
from typing import Any, Mapping, Sequence

from references import Maps, Reference, State, recipe
from torch import Tensor, nn

from fpn_plugin.pyramid.compose import build_graph
from fpn_plugin.pyramid.pyramid import Pyramid
from fpn_plugin.pyramid.resolve import Defaults

HEADS, POINTS = 8, 4
PARTS = {
    "self_attn": "attention",
    "sampling_offsets": "offsets",
    "attention_weights": "logits",
    "value_proj": "value",
    "output_proj": "out",
    "self_attn_layer_norm": "norm1",
    "final_layer_norm": "norm2",
    "fc1": "linear1",
    "fc2": "linear2",
}


def ours(channels: Mapping[int, int], width: int, inner_levels: int = 0) -> Pyramid:
    levels = {f"res{level}": level for level in channels}
    graph = build_graph("msdeform", levels, inner_levels=inner_levels)
    widths = {f"res{level}": count for level, count in channels.items()}
    return Pyramid(graph, widths, Defaults(width, norm="GN"))


def mask2former(channels: Mapping[int, int], width: int) -> Any:
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

    settings = {"feature_size": width, "mask_feature_size": width, "num_attention_heads": HEADS}
    settings |= {"feature_strides": [2**level for level in channels], "dropout": 0.0}
    config = Mask2FormerConfig(**settings, common_stride=2 ** min(channels))
    decoder = Mask2FormerPixelDecoder(config, list(channels.values()))
    decoder.mask_projection = nn.Identity()  # it follows the pyramid
    if decoder.level_embed.device.type != "meta":
        nn.init.normal_(decoder.level_embed)  # it is not filled there
    return decoder


def run(theirs: nn.Module, maps: Maps) -> Sequence[Tensor]:
    result = theirs(list(maps.values()))
    finest = [result.mask_features] if theirs.num_fpn_levels else []
    return [*finest, *reversed(result.multi_scale_features)]


def convert(state: State) -> Maps:
    """Its levels go from coarse to fine, in the laterals, the embedding, and the attention."""
    maps: Maps = {}
    for name, x in state.items():
        if name == "level_embed":
            maps["msdeform_encoder.level_embedding"] = x.flip(0)
        elif name.startswith("encoder."):
            for old, new in PARTS.items():
                name = name.replace(f".{old}.", f".{new}.")
            flipped = ".offsets." in name or ".logits." in name
            maps[f"msdeform_{name}"] = flip_levels(x) if flipped else x
        else:  # a convolution, 0, or its norm, 1
            part, index, leaf = re.findall(r"(\D+)(\d+)\.(.+)", name)[0]
            level = {"input_projections.": 5 - int(index)}.get(part, 2)
            kind = "output" if part == "layer_" else "lateral"
            leaf = leaf.replace("0.", "").replace("1.", "norm.")
            maps[f"msdeform_{kind}{level}.{leaf}"] = x
    return maps


def flip_levels(x: Tensor) -> Tensor:
    """The weights or biases of the points, `(heads · levels · points · …, …)`."""
    levels = 3
    return x.reshape(HEADS, levels, -1, *x.shape[1:]).flip(1).reshape(x.shape)


# its last 1x1, to what masks are compared with, is no part of the pyramid
@recipe("msdeform", levels=(2, 3, 4, 5), parameters=6_035_904 - (256 * 256 + 256))
def finest_too(channels: Mapping[int, int], width: int) -> Reference:
    return Reference(ours(channels, width), mask2former(channels, width), run, convert)


@recipe("msdeform from level 3", sizes=((7, 11),), parameters=919_808 + 4_393_920)
def encoder_alone(channels: Mapping[int, int], width: int) -> Reference:
    return Reference(ours(channels, width), mask2former(channels, width), run, convert)
