"""timm's networks as Detectron2 backbones. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

import re
import socket
from typing import Any, Dict, Mapping, Sequence
from urllib.parse import urlparse
from urllib.request import getproxies

from torch import Tensor, nn

from fpn_plugin.bottom_up.base import (
    AdaptedBackbone,
    MapInfo,
    freeze,
    name_maps,
    number_maps,
    refuse_twins,
    select_maps,
)
from fpn_plugin.bottom_up.norms import convert_norms, freeze_norm_statistics
from fpn_plugin.bottom_up.probe import frozen_names, is_channels_last, probe, unused_names
from fpn_plugin.paths import download_advice
from fpn_plugin.registry import close_name, unknown_name

NAME, ARGS, WEIGHTS = (f"MODEL.BOTTOM_UP.{key}" for key in ("NAME", "ARGS", "WEIGHTS"))
_HUB, _PATIENCE = "https://huggingface.co", 15.0  # seconds for the hub to answer
# With these arguments networks of a fixed image size accept any; each family has its own of them
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}
# Arguments of timm.create_model that other keys or this adapter decide
RESERVED = ("features_only", "out_indices", "in_chans", "pretrained", "feature_cls", "model_name")
OWN_ARGS = ("grad_checkpointing", "norm_maps")  # that this adapter reads itself


class TimmBackbone(AdaptedBackbone):
    """A timm network (`features_only=True`) whose maps are named `res<level>`, where level =
    log2(stride).

    Of several maps with the same stride the last counts, so a plain ViT has one, `res4`. What its
    blocks give has names too: `res4_3` after the third, `res4_6`, ... Layers after the last wanted
    map are dropped; parameters that no wanted map depends on are frozen.

    Args:
        model: timm's name for it, e.g. "tf_efficientnet_lite0" or "resnet50.a1_in1k".
        out_features: the maps to return, e.g. `["res3", "res4", "res5"]`; empty for all.
        freeze_at: 0: train everything; 1: freeze the stem, that is everything before the first
            stage of stride 4 or more; 2: also all that `res2` depends on; and so on, as Detectron2
            counts. For HRNet, whose `res2` depends on nearly everything, it counts stages instead.
        norm: converts its batch norms to this one of `norms.NORMS`; "" keeps them.
        in_channels: of the image.
        args: more arguments for `timm.create_model`, and of the adapter's own
            `grad_checkpointing: True`, and `norm_maps: True`, which passes every map of a ViT
            through the network's last norm, as maps of DINOv2 and DINOv3 are read.
        pretrained: start from the weights that timm publishes for it.

    Raises:
        ImportError: if timm is not installed.
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
        source = f"timm/{model}"
        options = {key: value for key, value in (args or {}).items() if key not in OWN_ARGS}
        # the network with all its maps says which there are and what they depend on ...
        whole, options = _create(model, in_channels, options)
        normed = _normed(source, whole) if (args or {}).get("norm_maps") else {}
        named, choices = _map_indices(source, whole)
        names = select_maps(source, list(choices), out_features or list(named))
        indices = [choices[name] for name in names]
        refuse_twins(source, names, indices)
        if normed or not set(indices) <= set(_indices(whole)):
            all_indices = sorted({*named.values(), *indices})
            whole, options = _create(model, in_channels, options, out_indices=all_indices, **normed)
        info: Any = whole.feature_info
        all_indices = _indices(whole)
        positions = {name: all_indices.index(index) for name, index in named.items()}
        wanted = [all_indices.index(index) for index in indices]
        probed = probe(whole, source, in_channels, options.get("img_size"), wanted)
        frozen = frozen_names(source, whole, probed, positions, freeze_at)
        frozen |= unused_names(whole, [probed.maps[position] for position in wanted])

        # ... and another one is built with the wanted maps alone
        settings = {"out_indices": indices, **normed}
        network = whole
        if pretrained:
            network = _pretrained(model, in_channels, options, settings)
        elif indices != all_indices:
            network = _shorten(_create(model, in_channels, options, **settings)[0])
        channels_last = is_channels_last(whole)
        maps = {
            name: MapInfo(info.channels(index), info.reduction(index), channels_last)
            for name, index in zip(names, indices)
        }
        divisor = probed.divisor if probed.divisor > 1 else 0
        super().__init__(network, maps, divisor, resample=not probed.is_exact)
        convert_norms(network, norm, source)
        freeze(p for name, p in network.named_parameters() if name in frozen)
        freeze_norm_statistics(network)
        if (args or {}).get("grad_checkpointing"):
            _checkpoint_gradients(source, network)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """As in the base class; timm's networks return a list."""
        return self._named(self.model(x), x)


def _create(
    model: str, in_channels: int, args: Mapping[str, Any], **settings: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A feature network, and the arguments that it accepted of `args` and `ANY_SIZE`."""
    timm = require_model(model)
    if clash := sorted(set(args) & set(RESERVED)):
        raise ValueError(f"{ARGS}: {clash} are decided by other keys; they cannot be given here")
    options = {**_any_size(timm, model), **args}
    while True:
        try:
            network = timm.create_model(
                model, features_only=True, in_chans=in_channels, **options, **settings
            )
            return network, options
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused and refused[1] in ANY_SIZE and refused[1] not in args:
                del options[refused[1]]
                continue
            if not args:
                raise
            raise ValueError(f"{ARGS}: {dict(args)} do not fit timm/{model}: {error}") from error
        except (RuntimeError, AttributeError) as error:
            if settings:
                raise
            raise ValueError(
                f"{NAME}: timm/{model} gives no maps for a pyramid (timm: {error})"
            ) from error


def _indices(network: Any) -> list[int]:
    """Which of the network's maps it returns."""
    info = network.feature_info
    return [index % len(info.info) for index in info.out_indices]


def _map_indices(source: str, network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The indices of the network's maps by name: of those that it has for every user, the last of
    each stride, and of all that can be asked for, in the network's order.

    Raises:
        ValueError: if a stride is not a power of two.
    """
    info, indices = network.feature_info, _indices(network)
    advice = _patch_advice(network) if len(set(info.reduction())) == 1 else ""
    positions = name_maps(source, info.reduction(), advice)
    named = {name: indices[position] for name, position in positions.items()}
    choices = {**number_maps([each["reduction"] for each in info.info]), **named}
    return named, dict(sorted(choices.items(), key=lambda pair: pair[1]))


def _patch_advice(network: Any) -> str:
    """What to do about patches of 14 pixels, as DINOv2's."""
    patches = getattr(getattr(network, "model", network), "patch_embed", None)
    if not hasattr(patches, "patch_size"):
        return ""
    return (
        f"; with {ARGS}: {{patch_size: 16}} it has patches of 16 pixels, and timm resamples the"
        " weights that it publishes to them"
    )


def _normed(source: str, network: Any) -> dict[str, Any]:
    """Settings with which a plain ViT's maps pass its last norm.

    Raises:
        ValueError: naming the argument, for any other network.
    """
    getter: Any = type(network)
    if getter.__name__ != "FeatureGetterNet" or len(set(network.feature_info.reduction())) > 1:
        raise ValueError(f"{ARGS}.norm_maps: {source} is no plain ViT, whose maps share a norm")

    class Normed(getter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, norm=True, **kwargs)

    return {"feature_cls": Normed}


def _any_size(timm: Any, model: str) -> dict[str, bool]:
    published = timm.models.get_pretrained_cfg(model)
    return dict(ANY_SIZE) if getattr(published, "fixed_input_size", False) else {}


def require_model(model: str) -> Any:
    """timm, if it has this model, and the weights of the tag after a dot in its name.

    Raises:
        ImportError: if timm is not installed.
        KeyError: for an unknown model, with the nearest.
        ValueError: for an unknown tag, with the nearest.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{NAME}: timm/... needs timm: pip install 'fpn_plugin[timm]'") from error
    if not timm.is_model(model):
        close = close_name(model, timm.list_models())
        family = timm.list_models(f"*{(close or model).split('_')[0]}*") or timm.list_models()
        raise unknown_name(
            NAME,
            f"timm/{model}",
            [f"timm/{name}" for name in family[:20]],
            f"timm/{close}" if close else "",
        )
    try:
        timm.models.get_pretrained_cfg(model)
    except RuntimeError as error:  # for an unknown tag
        tags = timm.list_pretrained(f"{model.partition('.')[0]}.*")
        close = close_name(model, tags, 0.3)
        hint = f"; did you mean 'timm/{close}'?" if close else ""
        raise ValueError(f"{NAME}: timm/{model}: {error}{hint}") from error
    return timm


def _pretrained(
    model: str, in_channels: int, args: Mapping[str, Any], settings: Mapping[str, Any]
) -> nn.Module:
    where = f"{WEIGHTS}: 'timm': the weights of timm/{model}"
    published = require_model(model).models.get_pretrained_cfg(model)
    if not getattr(published, "has_weights", False):
        raise ValueError(f"{where} do not exist: timm publishes none; give a file")
    address = published.url or f"{_HUB}/{published.hf_hub_id}/tree/main"
    advice = download_advice(address, WEIGHTS, "", "")
    try:
        if not any(name.startswith("pretrained_cfg") for name in args):  # a file of the user's
            _require_hub(published)
        network, _ = _create(model, in_channels, args, pretrained=True, **settings)
    except Exception as error:  # of the hub's client, its cache or the network connection
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} could not be had: {reason}\n{advice}") from error
    return _shorten(network)


def _require_hub(published: Any) -> None:
    """Fail at once where the hub cannot be reached, which its client retries for most of a minute.

    Raises:
        OSError: unless the weights are in its cache, or a proxy leads to it.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    repository = published.hf_hub_id
    if not repository or getproxies() or constants.HF_HUB_OFFLINE:
        return
    for name in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(try_to_load_from_cache(repository, name), str):
            return
    address = urlparse(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    with socket.create_connection((address.hostname, port), timeout=_PATIENCE):
        pass


def _shorten(network: Any) -> nn.Module:
    """Drop the blocks after the last map where timm does not (EfficientNet, MobileNetV3)."""
    last = network.feature_info.get_dicts()[-1]
    if isinstance(getattr(network, "blocks", None), nn.Sequential) and "stage" in last:
        network.blocks = network.blocks[: last["stage"]]
    return network


def _checkpoint_gradients(source: str, network: Any) -> None:
    inner = getattr(network, "model", network)  # timm's wrapper of a ViT lacks the method
    try:
        inner.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        reason = f"{source} has no gradient checkpointing"
        raise ValueError(f"{ARGS}.grad_checkpointing: {reason}") from error
