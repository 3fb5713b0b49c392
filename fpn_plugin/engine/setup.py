"""From a command line to a run: the config, the output folder, what each process does first."""

from __future__ import annotations

import argparse
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from fpn_plugin.config.pixels import log_pixels, pixel_notes, read_pixels, write_pixels
from fpn_plugin.config.resolve import DATA_FLAGS, load_config
from fpn_plugin.data.checks import check_config_datasets
from fpn_plugin.data.coco_format import register_own
from fpn_plugin.engine.checkpoint import find_checkpoint
from fpn_plugin.engine.evaluation import check_evaluators
from fpn_plugin.engine.folder_lock import hold
from fpn_plugin.engine.launch import add_rank_timeout
from fpn_plugin.engine.run_folder import claim_eval_dir, claim_output_dir
from fpn_plugin.engine.run_record import recorded_config

logger = logging.getLogger(__name__)


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line with `--overwrite` and the flags for one's own data."""
    parser = default_argument_parser()
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that OUTPUT_DIR holds"
    )
    add_rank_timeout(parser)
    for flag in DATA_FLAGS:
        kind = "COCO-format annotations" if flag.endswith("json") else "folder of the images"
        option, key = "--" + flag.replace("_", "-"), flag.upper()
        parser.add_argument(
            option, default="", metavar="PATH", help=f"your own data, {kind} (DATASETS.OWN.{key})"
        )
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a run, with its output folder claimed; for once, before processes are launched.

    A training run's folder is locked, and else left as it is, also with `--overwrite`.

    Args:
        args: of :func:`argument_parser`.

    Raises:
        FileNotFoundError: if the config file or `MODEL.WEIGHTS` does not exist.
        KeyError: for a config key that does not exist.
        ValueError: for a bad value, no data, or an evaluation without weights.
        FileExistsError: if OUTPUT_DIR holds another run's results, or another run is at work there.
    """
    setup_logger(name="fpn_plugin")
    alone = args.num_gpus * args.num_machines < 2  # the run checks its data in this process
    cfg = register_own(load_config(args), keep_json=alone)
    choose_device(cfg)
    _require_data(cfg, args.eval_only)
    if args.eval_only:
        _prepare_eval(cfg, args.resume, args.machine_rank)
    else:
        # Before a folder is made; both flags are refused below.
        if not (args.resume and (args.overwrite or find_checkpoint(cfg.OUTPUT_DIR))):
            _require_weights(cfg)
        if args.machine_rank == 0:
            hold(cfg.OUTPUT_DIR, "OUTPUT_DIR")  # before anyone looks at what is in it
            claim_output_dir(cfg, args.resume, args.overwrite)
    cfg.freeze()
    return cfg


def choose_device(cfg: CfgNode) -> None:
    """Turn `MODEL.DEVICE` from its default, cuda, to cpu where there is no GPU, in place."""
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.info("MODEL.DEVICE is 'cuda' but no GPU is available: using 'cpu'")


def prepare_launch(cfg: CfgNode, num_processes: int) -> None:
    """Let `detectron2.engine.launch` pick gloo for several processes on the CPU.

    It picks by whether a process sees a GPU, so on a machine with GPUs its children must not.
    """
    if num_processes > 1 and cfg.MODEL.DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def begin(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """What each process does before it trains or evaluates: logs, seed, data and its checks.

    Args:
        cfg: of :func:`setup`.
        args: those that it was given.

    Returns:
        the config with the run's seed in `SEED`, and without what a checkpoint makes needless; the
        folder's config.yaml keeps that.

    Raises:
        ValueError: if the data is bad; what :func:`check_config_datasets` raises.
        ImportError: what :func:`check_evaluators` raises.
    """
    cfg = cfg.clone()
    cfg.defrost()
    # Machine 0 decided where results go, and may alone have a run's folder; the others must agree.
    decided = (cfg.OUTPUT_DIR, read_pixels(cfg), pixel_notes(cfg))
    cfg.OUTPUT_DIR, pixels, lines = comm.all_gather(decided)[0]
    write_pixels(cfg, pixels)
    cfg.SEED = _run_seed(cfg, args.resume)
    register_own(cfg, keep_json=comm.is_main_process())  # again, for a process that was launched
    if args.eval_only:
        cfg.DATASETS.TRAIN = ()  # neither read nor checked
    _share_cores(cfg)
    # In a launched process there is no handler yet; in the one that ran setup() stdout has its own
    # already.
    fresh = not logging.getLogger("fpn_plugin").handlers
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="fpn_plugin", configure_stdout=fresh)
    log_pixels(lines)  # again, so that the log file says which were taken
    cfg.freeze()
    # Before default_setup, which puts this run's config in the place of the last one's.
    if comm.is_main_process():
        check_config_datasets(cfg)
    comm.synchronize()
    check_evaluators(cfg)
    default_setup(cfg, args)
    logger.info("MODEL.DEVICE: %s, SEED: %d", cfg.MODEL.DEVICE, cfg.SEED)
    if not args.eval_only and not args.resume:
        _warn_of_frozen_noise(cfg)
    return _without_first_weights(cfg, args)


def _warn_of_frozen_noise(cfg: CfgNode) -> None:
    """Tell of layers that keep their initial weights, and norms that then do nothing."""
    model = cfg.MODEL
    freezes = model.BACKBONE.FREEZE_AT > 0 or model.BOTTOM_UP.NORM == "FrozenBN"
    if freezes and not (model.WEIGHTS or model.BOTTOM_UP.WEIGHTS):
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT %d and MODEL.BOTTOM_UP.NORM %r keep layers as they are, but"
            " there are no weights to keep (MODEL.BOTTOM_UP.WEIGHTS, MODEL.WEIGHTS): to train from"
            " scratch take 0 and a norm that learns, such as GN",
            *(model.BACKBONE.FREEZE_AT, model.BOTTOM_UP.NORM),
        )


def _prepare_eval(cfg: CfgNode, resume: bool, machine_rank: int) -> None:
    folder = cfg.OUTPUT_DIR
    if resume:
        cfg.MODEL.WEIGHTS = find_checkpoint(folder)
        if not cfg.MODEL.WEIGHTS:
            raise ValueError(
                f"--eval-only --resume: there is no checkpoint in OUTPUT_DIR {folder!r}"
            )
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "--eval-only: MODEL.WEIGHTS is empty; name a checkpoint, or give --resume "
            "for the last one in OUTPUT_DIR"
        )
    _require_weights(cfg)
    if machine_rank == 0:
        cfg.OUTPUT_DIR = claim_eval_dir(folder)
    logger.info("Evaluating %s; the results go to %s", cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)


def _require_data(cfg: CfgNode, eval_only: bool) -> None:
    key, half = ("TEST", "val") if eval_only else ("TRAIN", "train")
    if not cfg.DATASETS[key]:
        raise ValueError(
            f"DATASETS.{key} is empty: name a registered dataset, or give your own data with "
            f"--{half}-json and --{half}-images"
        )


def _require_weights(cfg: CfgNode) -> None:
    """Find a wrong path now, not after the data was read; what has a scheme is left to Detectron2.

    Raises:
        FileNotFoundError: if `MODEL.WEIGHTS` is a plain path of no file.
    """
    path = cfg.MODEL.WEIGHTS.partition("?")[0]  # Detectron2 takes options after it
    if path and "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS!r}: there is no such file (from {os.getcwd()})"
        )


def _without_first_weights(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """The config to build the model from: a checkpoint of all of it has the bottom-up's weights.

    It also says what the pixels are, and did so already.
    """
    checkpoint = find_checkpoint(cfg.OUTPUT_DIR) if args.resume else ""
    checkpoint = cfg.MODEL.WEIGHTS if args.eval_only else checkpoint
    if not checkpoint:
        return cfg
    weights = cfg.MODEL.BOTTOM_UP.WEIGHTS
    if weights:
        logger.info("MODEL.BOTTOM_UP.WEIGHTS %s is not read: %s has them", weights, checkpoint)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BOTTOM_UP.WEIGHTS, cfg.MODEL.BOTTOM_UP.PIXELS = "", "config"
    cfg.freeze()
    return cfg


def _run_seed(cfg: CfgNode, resume: bool) -> int:
    """The config's seed, else that of the run that goes on, else a random one; rank 0's for all."""
    recorded = recorded_config(cfg.OUTPUT_DIR).get("SEED", -1) if resume else -1
    drawn = comm.shared_random_seed()
    seed = next(seed for seed in (cfg.SEED, recorded, drawn) if seed >= 0)
    return comm.all_gather(seed)[0]


def _share_cores(cfg: CfgNode) -> None:
    """Several processes on one CPU: a fair part of its cores for each, unless the user decided."""
    if (
        cfg.MODEL.DEVICE == "cpu"
        and comm.get_local_size() > 1
        and "OMP_NUM_THREADS" not in os.environ
    ):
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
