"""What the Python configs of this folder share."""

from detectron2.config import LazyCall as L

from fpn_plugin import PyramidBackbone


def put_pyramid(model, **settings):
    """Replace the FPN of one of Detectron2's models by a pyramid on the same bottom-up network.

    Args:
        settings: of PyramidBackbone.
    """
    model.backbone = L(PyramidBackbone)(
        bottom_up=model.backbone.bottom_up,
        in_features="${.bottom_up.out_features}",
        **{"out_channels": 256, **settings},
    )
