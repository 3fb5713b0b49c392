# RetinaNet with the neck and the head's depth of EfficientDet-D0; the YAML twin has the same name
from detectron2 import model_zoo
from detectron2.layers import ShapeSpec

from fpn_plugin import put_pyramid

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
model, dataloader, train = _zoo.model, _zoo.dataloader, _zoo.train
optimizer, lr_multiplier = _zoo.optimizer, _zoo.lr_multiplier

put_pyramid(
    model,
    out_channels=64,
    topology="bifpn",
    repeats=3,
    fuse_type="fast_normalized",
    block="separable",
    norm="SyncBN",
    norm_eps=0.001,
    norm_momentum=0.01,
)
model.head.input_shape = [ShapeSpec(channels=64)] * 5
model.head.conv_dims = [64, 64, 64]
