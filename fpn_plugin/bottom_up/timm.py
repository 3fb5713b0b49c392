"""timm's networks as Detectron2 backbones. Shapes are `(N, C, H, W)`."""

from __future__ import annotations

from typing import Any, Dict, Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from fpn_plugin.registry import unknown_name

NORMS = ("", "FrozenBN")


class TimmBackbone(Backbone):
    """A timm network (`features_only=True`) whose maps are named `res<level>`, with level =
    log2(stride).

    Args:
        model: timm's name for it, e.g. "tf_efficientnet_lite0".
        out_features: the maps to give, e.g. `["res3", "res4", "res5"]`; empty for all.
        freeze_at: 0: train everything; 1: freeze the stem, that is all before and including the
            first map (`res1`); 2: and up to `res2`; and so on, as Detectron2 counts.
        norm: "FrozenBN" freezes the statistics and the affine parameters of every batch norm; ""
            keeps them.
        in_channels: of the image.

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
    ) -> None:
        super().__init__()
        self.model = _create(model, in_channels)
        info: Any = self.model.feature_info
        names = [f"res{stride.bit_length() - 1}" for stride in info.reduction()]
        if len(set(names)) < len(names):
            raise ValueError(
                f"MODEL.BOTTOM_UP.NAME: timm/{model} gives several maps of one stride"
                f" ({info.reduction()} pixels); a pyramid needs one map per stride"
            )
        for name in out_features:
            if name not in names:
                raise unknown_name(
                    "MODEL.FPN.IN_FEATURES (maps of timm/" + model + ")", name, names
                )
        self._names = names
        # Swin and others give (N, H, W, C)
        self._channels_come_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        self._out_features = [name for name in names if name in out_features or not out_features]
        self._out_feature_channels = dict(zip(names, info.channels()))
        self._out_feature_strides = dict(zip(names, info.reduction()))
        self._freeze(freeze_at, info.module_name())
        if norm not in NORMS:
            raise unknown_name("MODEL.BOTTOM_UP.NORM", norm, NORMS)
        self._freeze_batch_norms(everywhere=norm == "FrozenBN")

    def _freeze(self, freeze_at: int, ends: Sequence[str]) -> None:
        """Stop the gradients of all parameters up to the module that gives level `freeze_at`."""
        levels = [int(name[3:]) for name in self._names]
        frozen = [end for end, level in zip(ends, levels) if level <= freeze_at]
        if not frozen:
            return
        parameters = list(self.model.named_parameters())
        last = max(i for i, (name, _) in enumerate(parameters) if name.startswith(f"{frozen[-1]}."))
        for _, parameter in parameters[: last + 1]:
            parameter.requires_grad = False

    def _freeze_batch_norms(self, everywhere: bool) -> None:
        """Fix statistics and affine parameters, in the frozen layers or everywhere.

        By timm's own function: its batch norms carry the activation, which Detectron2's
        conversion to FrozenBatchNorm2d would lose.
        """
        from timm.layers import freeze_batch_norm_2d

        norms = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.BatchNorm2d)
            and (everywhere or not any(p.requires_grad for p in module.parameters()))
        ]
        for name, module in norms:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, freeze_batch_norm_2d(module))

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """Run the network.

        Args:
            x: images, `(N, 3, H, W)`.

        Returns:
            `{"res2": (N, C2, H/4, W/4), ...}`, the maps of `out_features` from high to low
            resolution.
        """
        maps: Dict[str, Tensor] = {}
        for name, y in zip(self._names, self.model(x)):
            if name in self._out_features:
                maps[name] = y.permute(0, 3, 1, 2) if self._channels_come_last else y
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride in pixels of each map."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }


def _create(model: str, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "MODEL.BOTTOM_UP.NAME: timm/... needs timm: pip install 'fpn_plugin[timm]'"
        ) from error
    if not timm.is_model(model):
        close = timm.list_models(f"*{model.split('_')[0]}*")[:20]
        raise unknown_name(
            "MODEL.BOTTOM_UP.NAME", f"timm/{model}", close or timm.list_models()[:20]
        )
    return timm.create_model(model, pretrained=False, features_only=True, in_chans=in_channels)
