"""Detectron2's FPN, reproduced as a graph: the same keys, the other's checkpoints, and bit-equal numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from helpers import zoo_config
from torch import Tensor, nn

from fpn_plugin import PyramidBackbone
from fpn_plugin.compat import EXPORT, require_torch

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
ARCHITECTURES = {
    "mask": MASK,
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "panoptic": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "keypoint": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
}
# random weights may score every class at zero
LOW_SCORES = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0, "MODEL.RETINANET.SCORE_THRESH_TEST", -1.0]
# and an untrained ResNet multiplies its input by ten thousand
LOW_SCORES += ["MODEL.PIXEL_STD", [1e5, 1e5, 1e5]]
SMALL_HEADS = ["MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 64]
SMALL_HEADS += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [32, 32]]
SMALL_HEADS += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64]
SMALL_HEADS += ["MODEL.RPN.POST_NMS_TOPK_TEST", 50]


def depth_keys(depth: int) -> list:
    return ["MODEL.RESNETS.DEPTH", depth] + (
        ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64] if depth == 18 else []
    )


def ours(cfg: CfgNode) -> CfgNode:
    """The same config with nothing but the backbone's name swapped."""
    swapped = cfg.clone()
    swapped.MODEL.BACKBONE.NAME = "build_pyramid_backbone"
    return swapped


def perturb(module: nn.Module) -> None:
    """Move all weights off their initialisation, so that biases and norms count too."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() < 2 else 0.005))


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize(
    "depth, fuse, norm",
    [(18, fuse, norm) for fuse in ("sum", "avg") for norm in ("", "GN", "BN")]
    + [(50, "sum", "GN"), (101, "sum", "")],
)
def test_backbone(depth: int, fuse: str, norm: str) -> None:
    keys = [*depth_keys(depth), "MODEL.FPN.FUSE_TYPE", fuse, "MODEL.FPN.NORM", norm]
    cfg = zoo_config(MASK, *keys)
    theirs, mine = build_backbone(cfg).eval(), build_backbone(ours(cfg)).eval()
    assert isinstance(mine, PyramidBackbone)
    assert list(theirs.state_dict()) == list(
        mine.state_dict()
    )  # the order too: optimizer states fit
    perturb(theirs)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.size_divisibility == mine.size_divisibility == 32
    assert theirs.padding_constraints == mine.padding_constraints
    assert theirs.output_shape() == mine.output_shape()
    x = torch.randn(2, 3, 96, 128)
    assert_equal(theirs(x), mine(x))


def inputs(cfg: CfgNode) -> list[dict]:
    """Two images with two objects each, for any of the meta-architectures."""
    batch = []
    for height, width in [(96, 128), (80, 96)]:
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.tensor([[8.0, 8, 60, 50], [30, 20, 90, 76]]))
        target.gt_classes = torch.tensor([0, 0])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 8:50, 8:60] = masks[1, 20:76, 30:90] = True
        target.gt_masks = BitMasks(masks)
        points = torch.rand(2, 17, 3) * 40 + 20
        points[..., 2] = 2
        target.gt_keypoints = Keypoints(points)
        record = {
            "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8),
            "instances": target,
            "sem_seg": torch.randint(0, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, (height, width)),
        }
        batch.append(record)
    return batch


def losses(model: nn.Module, batch: list[dict]) -> dict[str, Tensor]:
    torch.manual_seed(7)  # the heads sample their boxes
    with EventStorage(0):
        return model.train()(batch)


def fields(results: list[dict]) -> dict[str, Tensor]:
    """All tensors of a model's output, flat."""
    flat: dict[str, Tensor] = {}
    for index, result in enumerate(results):
        for name, value in result.items():
            if isinstance(value, Instances):
                for field, data in value.get_fields().items():
                    flat[f"{index}.{field}"] = data.tensor if isinstance(data, Boxes) else data
            elif isinstance(value, Tensor):
                flat[f"{index}.{name}"] = value
            else:
                flat[f"{index}.{name}"] = value[0]  # panoptic: the map, and a list of segments
    return flat


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_model(name: str, tmp_path: Path) -> None:
    cfg = zoo_config(ARCHITECTURES[name], *LOW_SCORES, *SMALL_HEADS, *depth_keys(18))
    theirs, mine = build_model(cfg), build_model(ours(cfg))
    assert list(theirs.state_dict()) == list(mine.state_dict())
    perturb(theirs)

    # Detectron2's checkpoint into our model, through Detectron2's own checkpointer
    DetectionCheckpointer(theirs, str(tmp_path)).save("theirs")
    mine.load_state_dict(
        torch.load(tmp_path / "theirs.pth", weights_only=False)["model"], strict=True
    )
    perturb(mine)
    assert not torch.equal(mine.backbone.fpn_output3.weight, theirs.backbone.fpn_output3.weight)
    DetectionCheckpointer(mine).load(str(tmp_path / "theirs.pth"))
    assert_equal(theirs.state_dict(), mine.state_dict())

    batch = inputs(cfg)
    assert_equal(losses(theirs, batch), losses(mine, batch))
    with torch.no_grad():
        expected, detected = fields(theirs.eval()(batch)), fields(mine.eval()(batch))
    assert sum(value.numel() for value in expected.values()) > 1000
    assert_equal(expected, detected)

    # and ours into Detectron2's
    perturb(mine)
    DetectionCheckpointer(mine, str(tmp_path)).save("mine")
    DetectionCheckpointer(theirs).load(str(tmp_path / "mine.pth"))
    assert_equal(theirs.state_dict(), mine.state_dict())


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("name", ["mask", "retinanet"])
def test_the_same_seed_gives_the_same_weights(name: str, norm: str) -> None:
    cfg = zoo_config(ARCHITECTURES[name], "MODEL.FPN.NORM", norm)
    torch.manual_seed(3)
    theirs = build_backbone(cfg).state_dict()
    after = torch.rand(1)  # what follows draws the same numbers too
    torch.manual_seed(3)
    mine = build_backbone(ours(cfg)).state_dict()
    assert torch.equal(torch.rand(1), after)
    assert_equal(theirs, mine)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_from_scratch_is_detectron2s(name: str) -> None:
    cfg = zoo_config(ARCHITECTURES[name], *LOW_SCORES, *SMALL_HEADS, *depth_keys(18))
    runs = []
    # once more before, as TorchScript, which RetinaNet's loss is in, optimises after its first calls
    for config in (cfg, cfg, ours(cfg)) if name == "retinanet" else (cfg, ours(cfg)):
        torch.manual_seed(3)
        model = build_model(config)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        run = {f"start.{key}": value.clone() for key, value in model.state_dict().items()}
        for iteration in range(2):
            step = losses(model, inputs(cfg))
            optimizer.zero_grad()
            sum(step.values()).backward()
            optimizer.step()
            run |= {f"{iteration}.{key}": value.detach() for key, value in step.items()}
        runs.append({**run, **model.state_dict()})
    assert_equal(*runs[-2:])
    assert not torch.equal(runs[0]["0.loss_cls"], runs[0]["1.loss_cls"])


@torch.no_grad()
def test_backbone_scripts_traces_and_exports() -> None:
    cfg = zoo_config(MASK, *depth_keys(18))
    backbone = build_backbone(ours(cfg)).eval()
    x, other = torch.randn(1, 3, 128, 192), torch.randn(1, 3, 256, 160)
    assert_equal(torch.jit.trace(backbone, (x,), strict=False)(other), backbone(other))
    require_torch(EXPORT, "torch.export", "")
    side = {dim: 32 * torch.export.Dim(name, min=2, max=40) for dim, name in ((2, "h"), (3, "w"))}
    exported = torch.export.export(backbone, (x,), dynamic_shapes=(side,)).module()
    for name, value in backbone(other).items():
        assert torch.allclose(exported(other)[name], value, atol=1e-4), name
    # last, because Detectron2's ResNet cannot be scripted twice
    scripted = torch.jit.script(backbone)
    assert_equal(scripted(other), backbone(other))
    assert scripted.size_divisibility == 32
    assert scripted.padding_constraints == {"square_size": 0}


def test_lazy_config() -> None:
    """All arguments are the constructor's own, also through omegaconf, which wraps lists and dicts."""
    cfg = zoo_config(MASK, *depth_keys(18))
    nodes = [
        {"name": "top", "level": 5, "inputs": ["res5"], "block": "conv1x1", "output": True},
        {"name": "low", "level": 3, "inputs": ["res3", {"source": "top"}], "output": True},
    ]
    bottom_up = LazyCall(build_resnet_backbone)(cfg=cfg, input_shape=ShapeSpec(channels=3))
    lazy = LazyCall(PyramidBackbone)(
        bottom_up=bottom_up, in_features=["res3", "res4", "res5"], out_channels=16
    )
    lazy.extra_levels = "conv_p5"
    lazy.fuse_type = {"name": "fast_normalized", "eps": 0.01}
    backbone = instantiate(lazy)
    assert backbone.output_shape() == {
        f"p{level}": ShapeSpec(channels=16, stride=2**level) for level in range(3, 8)
    }
    assert backbone.get_submodule("fpn_merge3_fuse").eps == 0.01
    lazy.update({"graph": nodes, "in_features": ["res3", "res5"], "extra_levels": "none"})
    assert list(instantiate(lazy).output_shape()) == ["p3", "p5"]
