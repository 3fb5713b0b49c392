"""From a command line to a run: the config, the output folder, and the start of each process."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from fpn_plugin.checkpoint.checkpointer import find_checkpoint, write_atomically
from fpn_plugin.checkpoint.fit import PARTIAL_HELP
from fpn_plugin.checkpoint.run_folder import CONFIG, recorded_config
from fpn_plugin.config.learning import check_learning, check_schedule
from fpn_plugin.config.pixels import log_pixels, pixel_notes, read_pixels, write_pixels
from fpn_plugin.config.resolve import (
    DATA_FLAGS,
    as_recorded,
    choose_device,
    load_config,
    resolve_imports,
)
from fpn_plugin.config.unread import refuse_unread_keys
from fpn_plugin.data.checks import (
    check_config_datasets,
    check_federated_loss,
    training_classes,
    training_keypoints,
)
from fpn_plugin.data.classes import Classes, adopt_classes, set_classes
from fpn_plugin.data.coco_format import register_own
from fpn_plugin.data.keypoints import Keypoints, adopt_keypoints, require_keypoints, set_keypoints
from fpn_plugin.engine import elastic
from fpn_plugin.engine.agreement import compare_machines, settings_of
from fpn_plugin.engine.folder_lock import hold
from fpn_plugin.engine.launch import add_rank_timeout, check_processes
from fpn_plugin.engine.log import begin_log, set_up_logger
from fpn_plugin.engine.parallel import read_exchange
from fpn_plugin.engine.peers import peers_of, rank_of
from fpn_plugin.engine.preflight import check_model, check_reference, check_weights, silence
from fpn_plugin.engine.run_folder import (
    claim_eval_dir,
    claim_output_dir,
    warn_of_changes,
)
from fpn_plugin.evaluation.build import check_evaluators

logger = logging.getLogger(__name__)

_BEGUN = "_fpn_plugin_begun"
_COUNTS = "_fpn_plugin_counts"
# Keys of MODEL.BOTTOM_UP that a checkpoint of the whole model replaces, and their values then
_FIRST_WEIGHTS = {"WEIGHTS": "", "PIXELS": "config"}


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's command line with `--overwrite`, `--allow-partial`, `--rank-timeout`, and flags
    for own datasets."""
    parser = default_argument_parser()
    parser.epilog = None  # examples that call this process's file, whatever that is
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that OUTPUT_DIR holds"
    )
    parser.add_argument("--allow-partial", action="store_true", help=f"--eval-only: {PARTIAL_HELP}")
    add_rank_timeout(parser)
    for flag in DATA_FLAGS:
        content = "COCO-format annotations" if flag.endswith("json") else "folder of the images"
        text = f"your own data, {content} (DATASETS.OWN.{flag.upper()})"
        parser.add_argument("--" + flag.replace("_", "-"), default="", metavar="PATH", help=text)
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a run, with its output folder claimed; call it before launching processes.

    The folder of a training run is locked but not changed, even with `--overwrite`. Where another
    launcher has started the processes, each calls it: they join here, before the first of them
    claims the folder.

    Args:
        args: of :func:`argument_parser`; `peers`, if it is there, of
            :func:`fpn_plugin.engine.peers.meet`.

    Raises:
        FileNotFoundError: if the config file or `MODEL.WEIGHTS` does not exist.
        KeyError: for a config key that does not exist.
        ValueError: for a bad value, no data, or an evaluation without weights.
        FileExistsError: if OUTPUT_DIR holds another run's results, or another run is at work there.
    """
    setup_logger(name="fpn_plugin", distributed_rank=rank_of(args))
    check_flags(args)
    cfg = load_config(args)
    if peers := peers_of(args):
        peers.join(cfg.MODEL.DEVICE, settings_of(cfg))
        elastic.recover(args, cfg.OUTPUT_DIR, "OUTPUT_DIR")
    alone = processes_of(args) < 2  # the run checks its data in this process
    if args.resume and not args.overwrite:
        _refuse_moved(cfg.OUTPUT_DIR, args.config_file)
    if args.eval_only:
        _find_eval_weights(cfg, args.resume)
        adopt_classes(cfg, cfg.MODEL.WEIGHTS)
        adopt_keypoints(cfg, cfg.MODEL.WEIGHTS)
        register_own(cfg, alone, needed=("VAL",))
        _require_data(cfg, eval_only=True)
        _preflight(cfg, args)
        if is_first(args):
            cfg.OUTPUT_DIR = claim_eval_dir(cfg.OUTPUT_DIR)
        logger.info("Evaluating %s; the results go to %s", cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR)
    else:
        register_own(cfg, alone)
        _require_data(cfg, eval_only=False)
        # checked before the folder is created; --resume with --overwrite is refused below
        if not (args.resume and (args.overwrite or find_checkpoint(cfg.OUTPUT_DIR))):
            require_file("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
        _preflight(cfg, args)
        weights = {
            "MODEL.WEIGHTS": cfg.MODEL.WEIGHTS,
            "MODEL.BOTTOM_UP.WEIGHTS": cfg.MODEL.BOTTOM_UP.WEIGHTS,
        }
        if peers:
            elastic.claim(args, cfg.OUTPUT_DIR, "OUTPUT_DIR", weights)
        elif is_first(args):
            hold(cfg.OUTPUT_DIR, "OUTPUT_DIR")  # before its content is looked at
            claim_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR", weights, args.resume, args.overwrite)
        if args.resume and is_first(args):
            warn_of_changes(cfg)
    cfg.freeze()
    return cfg


def _preflight(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check what would fail only in the processes of a run."""
    check_processes(args, cfg.MODEL.DEVICE)
    processes = processes_of(args)
    if not args.eval_only:
        check_schedule(cfg)
        check_reference(cfg, processes, elastic.schedule_processes(processes))
        exchange = read_exchange(cfg)
        if processes > 1:
            exchange.check(cfg.SOLVER.ACCUMULATE)
    cfg = cfg.clone()
    cfg.defrost()
    if (
        args.resume
        and not args.eval_only
        and not args.overwrite
        and find_checkpoint(cfg.OUTPUT_DIR)
    ):
        cfg.MODEL.WEIGHTS = ""  # the checkpoint has them
    with silence():
        cfg = _without_first_weights(cfg, args)
    check_weights(cfg, args)
    if processes > 1 and comm.is_main_process():
        check_model(cfg, args)


def processes_of(args: argparse.Namespace) -> int:
    """How many processes a run has: those that have joined, or that are to be launched."""
    return max(1, args.num_gpus * args.num_machines, comm.get_world_size())


def is_first(args: argparse.Namespace) -> bool:
    """Whether this process is the one of the run, before any is launched, that may write."""
    return args.machine_rank == 0 and comm.is_main_process()


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that mean nothing together.

    Raises:
        ValueError: naming the flags.
    """
    if args.resume and args.overwrite:
        raise ValueError(
            "--resume keeps the run that is there and --overwrite removes it: choose one"
        )
    if args.allow_partial and not args.eval_only:
        raise ValueError("--allow-partial is for --eval-only: training may start from any part")


def begin(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """Set up a process of the run before it trains or evaluates: its log, seed and checked data.

    Args:
        cfg: of :func:`setup`.
        args: the same as for :func:`setup`.

    Returns:
        the config with the run's seed in `SEED`, and without the keys that a checkpoint replaces;
        they stay in the folder's config.yaml.

    Raises:
        ValueError: if the data is bad, as :func:`check_config_datasets` says.
        ImportError: if a package for the evaluation is missing, as :func:`check_evaluators` says.
    """
    cfg = cfg.clone()
    cfg.defrost()
    compare_machines(args, cfg, cfg.MODEL.DEVICE)
    # Machine 0 chose the folder, and may be the only one that sees it: the others follow.
    chosen = (cfg.OUTPUT_DIR, read_pixels(cfg), pixel_notes(cfg))
    cfg.OUTPUT_DIR, pixels, lines = comm.all_gather(chosen)[0]
    write_pixels(cfg, pixels)
    cfg.SEED = _run_seed(cfg, args.resume)
    prepare_process(cfg.OUTPUT_DIR, cfg.MODEL.DEVICE)
    log_pixels(lines, again=True)
    check_data(cfg, args.eval_only)  # before the config.yaml of the last run is replaced
    cfg.freeze()
    begin_log(cfg.OUTPUT_DIR, cfg.SEED, not args.eval_only and cfg.CUDNN_BENCHMARK)
    # that of a run to be resumed stays until it goes on, as the trainer may refuse
    resumes = args.resume and bool(find_checkpoint(cfg.OUTPUT_DIR))
    if comm.is_main_process() and not resumes:
        write_config(cfg)
    if not args.eval_only and not args.resume:
        _warn_of_frozen_noise(cfg)
    cfg = _without_first_weights(cfg, args)
    vars(cfg)[_BEGUN] = cfg.dump()
    return cfg


def has_begun(cfg: CfgNode) -> bool:
    """Whether a config is as :func:`begin` has returned it: its data is checked, and its folder is
    this run's."""
    return vars(cfg).get(_BEGUN) == cfg.dump()


def prepare_config(cfg: CfgNode) -> CfgNode:
    """A config for a trainer without a command line, as in a notebook: on a device that is there,
    with checked data and its classes.

    Raises:
        ValueError, ImportError: as :func:`check_data` does.
    """
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    resolve_imports(cfg)
    refuse_unread_keys(cfg)
    check_learning(cfg)
    choose_device(cfg)
    check_data(cfg)
    _require_data(cfg, eval_only=False)
    if frozen:
        cfg.freeze()
    return cfg


def write_config(cfg: CfgNode, first_weights: bool = False) -> None:
    """Write the config.yaml of a run.

    Args:
        first_weights: whether those keys that a checkpoint replaces, and that :func:`begin` has
            emptied, stay as they are in the file.
    """
    cfg = as_recorded(cfg).clone()
    cfg.defrost()
    if first_weights:
        recorded = recorded_config(cfg.OUTPUT_DIR).get("MODEL", {}).get("BOTTOM_UP", {})
        for key in _FIRST_WEIGHTS:
            cfg.MODEL.BOTTOM_UP[key] = recorded.get(key, cfg.MODEL.BOTTOM_UP[key])
    content = cfg.dump().encode()
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(cfg.OUTPUT_DIR, CONFIG), lambda file: file.write(content))


def check_data(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check all that a run reads and that its evaluators need, before it starts.

    `DATASETS.OWN` is registered, and the classes and keypoints of the training data, which the main
    process has read, become those of the config, in place.

    Args:
        eval_only: whether `DATASETS.TRAIN` is neither read nor checked, and becomes empty (unless
            the federated loss of the model needs its metadata).

    Raises:
        ValueError: if the data is bad, as :func:`check_config_datasets` says.
        ImportError: if a package for the evaluation is missing, as :func:`check_evaluators` says.
    """
    needed = ("VAL",) if eval_only else None
    register_own(cfg, comm.is_main_process(), needed)  # again, for a process that was launched
    check_federated_loss(cfg)
    checked = cfg
    if eval_only:
        checked = cfg.clone()
        checked.DATASETS.TRAIN = ()
        if not cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS:  # which the model reads its frequencies for
            cfg.DATASETS.TRAIN = ()
    outputs: tuple[Classes | None, Keypoints | None] = (None, None)
    if comm.is_main_process():
        reports = check_config_datasets(checked)
        outputs = training_classes(checked, reports), training_keypoints(checked, reports)
        vars(cfg)[_COUNTS] = {r.name: (r.num_images, r.num_annotations) for r in reports}
    classes, keypoints = comm.all_gather(outputs)[0]
    if not eval_only:
        set_classes(cfg, classes)
        set_keypoints(cfg, keypoints)
        require_keypoints(cfg)
    check_evaluators(cfg)


def data_counts(cfg: CfgNode) -> dict[str, tuple[int, int]]:
    """The images and annotations of the datasets that :func:`check_data` has checked, by name, in
    the main process; {} elsewhere."""
    return vars(cfg).get(_COUNTS, {})


def prepare_process(folder: str, device: str) -> None:
    """Set up the plugin's log in a run's folder, and the process's share of the CPU's cores.

    Several processes on one CPU divide its cores, unless the user has set `OMP_NUM_THREADS`.
    """
    processes = comm.get_local_size()
    if device == "cpu" and processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    # A launched process has no handler yet; the one that ran setup() has one for stdout.
    is_new = not logging.getLogger("fpn_plugin").handlers
    set_up_logger("fpn_plugin", folder, on_terminal=is_new)


def _warn_of_frozen_noise(cfg: CfgNode) -> None:
    """Warn of layers that are frozen with their random weights."""
    model = cfg.MODEL
    freezes = model.BACKBONE.FREEZE_AT > 0 or model.BOTTOM_UP.NORM == "FrozenBN"
    if freezes and not (model.WEIGHTS or model.BOTTOM_UP.WEIGHTS):
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT %d and MODEL.BOTTOM_UP.NORM %r keep layers as they are, but"
            " there are no weights to keep (MODEL.BOTTOM_UP.WEIGHTS, MODEL.WEIGHTS): to train from"
            " scratch take 0 and a norm that learns, such as GN",
            *(model.BACKBONE.FREEZE_AT, model.BOTTOM_UP.NORM),
        )


def _refuse_moved(folder: str, config_file: str) -> None:
    """Refuse to start over where `--resume` names the config of a run that was moved."""
    beside = str(Path(config_file).parent)
    if Path(config_file).name != CONFIG or find_checkpoint(folder) or not find_checkpoint(beside):
        return
    raise ValueError(
        f"--resume: there is no checkpoint in OUTPUT_DIR {folder!r}, but there is one beside"
        f" --config-file {config_file!r}: give OUTPUT_DIR {beside!r} too"
    )


def _find_eval_weights(cfg: CfgNode, resume: bool) -> None:
    """Set `MODEL.WEIGHTS` to what `--eval-only` evaluates, in place."""
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
    require_file("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)


def _require_data(cfg: CfgNode, eval_only: bool) -> None:
    key, half = ("TEST", "val") if eval_only else ("TRAIN", "train")
    if not cfg.DATASETS[key]:
        raise ValueError(
            f"DATASETS.{key} is empty: name a registered dataset, or give your own data with "
            f"--{half}-json and --{half}-images"
        )


def require_file(key: str, weights: str) -> None:
    """Check a path of weights before the data is read; Detectron2 handles those with a scheme.

    Args:
        key: the config key, for messages.

    Raises:
        FileNotFoundError: if it is the plain path of no file.
    """
    path = weights.partition("?")[0]  # Detectron2 takes options after it
    if path and "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"{key} {weights!r}: there is no such file (from {os.getcwd()})")


def _without_first_weights(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """The config to build the model from, without what a checkpoint of the whole model replaces:
    the bottom-up network's weights, and the source of the pixel statistics."""
    checkpoint = find_checkpoint(cfg.OUTPUT_DIR) if args.resume else ""
    checkpoint = cfg.MODEL.WEIGHTS if args.eval_only else checkpoint
    if not checkpoint or args.allow_partial:
        return cfg
    weights = cfg.MODEL.BOTTOM_UP.WEIGHTS
    if weights:
        logger.info("MODEL.BOTTOM_UP.WEIGHTS %s is not read: %s has them", weights, checkpoint)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BOTTOM_UP.update(_FIRST_WEIGHTS)
    cfg.freeze()
    return cfg


def _run_seed(cfg: CfgNode, resume: bool) -> int:
    """The config's seed, else that of the resumed run, else a random one; rank 0's for all."""
    recorded = recorded_config(cfg.OUTPUT_DIR).get("SEED", -1) if resume else -1
    drawn = comm.shared_random_seed()
    seed = next(seed for seed in (cfg.SEED, recorded, drawn) if seed >= 0)
    return comm.all_gather(seed)[0]
