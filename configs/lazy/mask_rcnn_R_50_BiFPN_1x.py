# Mask R-CNN with EfficientDet's BiFPN, arXiv:1911.09070; the YAML twin has the same name
from fpn_plugin import put_pyramid

from .mask_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

put_pyramid(
    model,
    topology="bifpn",
    repeats=3,
    fuse_type="fast_normalized",
    block="separable",
    norm="SyncBN",
    norm_eps=0.001,
    norm_momentum=0.01,
)
