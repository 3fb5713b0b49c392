# The counterpart of Detectron2's file of the same name: the same model, parameter for parameter
from detectron2 import model_zoo

from fpn_plugin import put_pyramid

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
model, dataloader, train = _zoo.model, _zoo.dataloader, _zoo.train
optimizer, lr_multiplier = _zoo.optimizer, _zoo.lr_multiplier

put_pyramid(model, topology="fpn", extra_levels="maxpool")
