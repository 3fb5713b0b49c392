"""What a run is, in ten lines and its pyramid; and where it left what, in its last lines."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from fpn_plugin.checkpoint.run_folder import CONFIG, METRICS
from fpn_plugin.config.defaults import OWN_BUILDERS
from fpn_plugin.config.heads import head_features
from fpn_plugin.engine.log import ENVIRONMENT, MODULES
from fpn_plugin.modeling.backbone import PyramidBackbone
from fpn_plugin.modeling.precision import amp_dtype
from fpn_plugin.visualize.complexity import node_table, pyramid_names, settings_text

logger = logging.getLogger(__name__)

_WIDTH = 10  # of the names of lines
_SHOWN = 6  # names of classes


def log_summary(cfg: CfgNode, model: nn.Module, counts: Mapping[str, Sequence[int]]) -> None:
    """Log the settings that matter, and the pyramid as `fpn show` prints it.

    Args:
        model: the model itself, not a wrapper.
        counts: images and objects of the datasets that were checked, by name.
    """
    lines = {
        "model": _model(cfg, model),
        "network": _network(cfg),
        "heads": _heads(cfg),
        "train on": _datasets(cfg.DATASETS.TRAIN, counts),
        "test on": _datasets(cfg.DATASETS.TEST, counts) + _evaluations(cfg),
        "images": _images(cfg),
        "batch": _batch(cfg),
        "schedule": _schedule(cfg, counts),
        "device": _device(cfg),
        "output": f"{cfg.OUTPUT_DIR} (all settings: {CONFIG}; {MODULES}, {ENVIRONMENT})",
    }
    text = "".join(f"\n  {name.ljust(_WIDTH)}{value}" for name, value in lines.items())
    logger.info("The run:%s", text)
    log_pyramid(model, pyramid_names(cfg))


def log_pyramid(model: nn.Module, names: Mapping[str, str] | None = None) -> None:
    """Log the pyramid of a model as `fpn show` prints it; nothing for a model without one.

    Args:
        names: of :func:`pyramid_names`; None for those of the settings.
    """
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, PyramidBackbone):
        names = {"topology": backbone.settings.topology} if names is None else names
        settings = settings_text(backbone, names)
        logger.info("The pyramid:\n%s\n\n%s", settings, node_table(backbone))


def log_end(folder: str, dataset: str = "") -> None:
    """Say where the results, the checkpoint and the log of a run are, and what to do next.

    Args:
        dataset: to draw detections of; "" for none.
    """
    root = Path(folder)
    final = root / "model_final.pth"
    source = ["--dataset", dataset] if dataset else ["--input", "photo.jpg"]
    visualize = ["fpn", "visualize", "--config-file", str(root / CONFIG), "--weights", str(final)]
    visualize += [*source, "--output", str(root / "pictures")]
    predict = ["fpn", "predict", "--weights", str(final), "--input", "photo.jpg"]
    predict += ["--output", str(root / "predictions")]
    logger.info(
        "Done.\n  results     %s\n  checkpoint  %s\n  log         %s\nNext:\n  %s\n  %s",
        *(root / METRICS, final, root / "log.txt", shlex.join(visualize), shlex.join(predict)),
    )


def _model(cfg: CfgNode, model: nn.Module) -> str:
    heads = [name for name, is_on in (("boxes", True), ("masks", cfg.MODEL.MASK_ON)) if is_on]
    heads += ["keypoints"] if cfg.MODEL.KEYPOINT_ON else []
    name = cfg.MODEL.META_ARCHITECTURE
    if name in ("GeneralizedRCNN", "PanopticFPN"):
        name += f" with {cfg.MODEL.ROI_HEADS.NAME} ({', '.join(heads)})"
    sizes = [(x.numel(), x.requires_grad) for x in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    text = f"{name}, {total / 1e6:.2f} M parameters"
    return text if total == trained else f"{text}, {trained / 1e6:.2f} M of them trained"


def _network(cfg: CfgNode) -> str:
    """The backbone, and what it starts from."""
    model, name = cfg.MODEL, cfg.MODEL.BACKBONE.NAME
    if name in OWN_BUILDERS:
        name = f"{name}: {model.BOTTOM_UP.NAME}"
    weights = [f"{key} {value}" for key, value in _weights(cfg) if value]
    parts = [", ".join(weights) or "without weights"]
    parts += [f"norms {model.BOTTOM_UP.NORM}"] if model.BOTTOM_UP.NORM else []
    parts += [f"FREEZE_AT {model.BACKBONE.FREEZE_AT}"] if model.BACKBONE.FREEZE_AT else []
    return f"{name}, {', '.join(parts)}"


def _weights(cfg: CfgNode) -> list[tuple[str, str]]:
    return [
        ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS),
        ("MODEL.BOTTOM_UP.WEIGHTS", cfg.MODEL.BOTTOM_UP.WEIGHTS),
    ]


def _heads(cfg: CfgNode) -> str:
    reads = [
        f"{key.split('.')[1]} on {' '.join(names)}" for key, names in head_features(cfg).items()
    ]
    names = list(cfg.DATASETS.CLASSES.NAMES)
    classes = f"{len(names)} class{'es' * (len(names) != 1)}: {', '.join(names[:_SHOWN])}"
    return "; ".join([*reads, classes + (", …" if len(names) > _SHOWN else "")] if names else reads)


def _datasets(names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> str:
    texts = []
    for name in names:
        images, objects = counts.get(name, (0, 0))
        texts.append(f"{name} ({images:,} images, {objects:,} objects)" if images else name)
    return ", ".join(texts) or "nothing"


def _evaluations(cfg: CfgNode) -> str:
    period = cfg.TEST.EVAL_PERIOD
    if not cfg.DATASETS.TEST:
        return ""
    return f", every {period} iterations and at the end" if period > 0 else ", at the end"


def _images(cfg: CfgNode) -> str:
    inputs = cfg.INPUT
    train, test = inputs.MIN_SIZE_TRAIN, inputs.MIN_SIZE_TEST
    train = [train] if isinstance(train, int) else list(train)
    how = " to " if inputs.MIN_SIZE_TRAIN_SAMPLING == "range" else ", "
    sizes = f"shorter side {how.join(map(str, train))} (at most {inputs.MAX_SIZE_TRAIN})"
    tested = f"for tests {test} (at most {inputs.MAX_SIZE_TEST})"
    if inputs.LSJ.ENABLED:
        jitter = inputs.LSJ
        sizes = (
            f"{jitter.MIN_SCALE:g} to {jitter.MAX_SCALE:g} times a square of {jitter.IMAGE_SIZE}"
        )
        tested = f"for tests shorter side {test} (at most {inputs.MAX_SIZE_TEST})"
    pasted = ", with pasted objects" if inputs.COPY_PASTE.ENABLED else ""
    return f"{inputs.FORMAT}, {sizes}{pasted}; {tested}"


def _batch(cfg: CfgNode) -> str:
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    parts = cfg.SOLVER.ACCUMULATE
    shared = f", {batch // processes} in each of {processes} processes" if processes > 1 else ""
    shared += f", in {parts} parts of {batch // processes // parts}" if parts > 1 else ""
    workers = cfg.DATALOADER.NUM_WORKERS
    return f"{batch} images{shared}; {workers} data worker{'s' * (workers != 1)}"


def _schedule(cfg: CfgNode, counts: Mapping[str, Sequence[int]]) -> str:
    solver = cfg.SOLVER
    images = sum(counts.get(name, (0, 0))[0] for name in cfg.DATASETS.TRAIN)
    rounds = solver.MAX_ITER * solver.IMS_PER_BATCH / images if images else 0
    epochs = f" ({rounds:.3g} times all images)" if rounds else ""
    parts = [f"{solver.OPTIMIZER} at {solver.BASE_LR:g}", f"warm-up {solver.WARMUP_ITERS}"]
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
        parts += [f"× {solver.GAMMA:g} at {', '.join(map(str, steps))}"] if steps else []
    else:
        parts.append(solver.LR_SCHEDULER_NAME)
    if cfg.MODEL.EMA.ENABLED:
        parts.append(f"weights averaged (MODEL.EMA.DECAY {cfg.MODEL.EMA.DECAY:g})")
    return f"{solver.MAX_ITER} iterations{epochs}, {', '.join(parts)}, SEED {cfg.SEED}"


def _device(cfg: CfgNode) -> str:
    amp, device = cfg.SOLVER.AMP, cfg.MODEL.DEVICE
    dtype: Any = amp_dtype(cfg)
    precision = str(dtype).removeprefix("torch.") if dtype else "float32"
    if amp.PRECISION != "auto" and not amp.ENABLED:
        precision += f" (SOLVER.AMP.PRECISION {amp.PRECISION} needs SOLVER.AMP.ENABLED)"
    if torch.device(device).type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(torch.device(device))})"
    else:
        name = f"{device} ({torch.get_num_threads()} threads)"
    return f"{name}, {precision}, torch {torch.__version__}"
