# Tree crowns in aerial photos, the twin of configs/quickstart/faster_rcnn_trees_FPN.yaml
# Data and ImageNet weights: fpn demo trees --data-only
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from fpn_plugin import put_pyramid
from fpn_plugin.modeling.python_config import pretrained_timm

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up = L(pretrained_timm)(
    model="tf_efficientnet_lite0",
    weights="weights/tf_efficientnet_lite0.pth",
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=3,
    norm="FrozenBN",
)
put_pyramid(model, topology="fpn", out_channels=96, norm="GN", extra_levels="maxpool")
model.update(pixel_mean=[127.0] * 3, pixel_std=[128.0] * 3, input_format="RGB")
_rpn, _roi_heads = model.proposal_generator, model.roi_heads
_rpn.head.in_channels = 96
_rpn.anchor_generator.sizes = [[12], [24], [48], [96], [192]]
_rpn.update(pre_nms_topk=(1000, 500), post_nms_topk=(500, 300))
_roi_heads.update(num_classes=1, batch_size_per_image=128)
_roi_heads.box_head.update(input_shape=ShapeSpec(channels=96, height=7, width=7), fc_dims=[512] * 2)
_roi_heads.box_predictor.input_shape = ShapeSpec(channels=512)
for _name in ("mask_in_features", "mask_pooler", "mask_head"):
    del _roi_heads[_name]

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "trees_train"
dataloader.train.mapper.update(image_format="RGB", use_instance_mask=False)
dataloader.train.mapper.augmentations[0].short_edge_length = (320, 352, 384, 416, 448, 480)
dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.test.dataset.names = "trees_val"
dataloader.test.mapper.augmentations[0].short_edge_length = 400
dataloader.test.num_workers = 1

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.update(lr=0.0004, weight_decay=0.05)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[300, 370], num_updates=400
    ),
    warmup_length=50 / 400,
    warmup_factor=0.001,
)
train = model_zoo.get_config("common/train.py").train
train.update(output_dir="output/lazy/faster_rcnn_trees_FPN", max_iter=400, eval_period=0)
train.update(channels_last=True, seed=0)
train.checkpointer.period = 200
