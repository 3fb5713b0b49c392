"""Runs that a launcher restarts go on by themselves, on hosts that need no common folder.

torchrun restarts all processes of a run when it has lost one, or a host. `.run.json` in the run's
folder says which run it holds, and which agents have started processes of it: where one of these
starts them again, they go on from the newest checkpoint without `--resume`. An agent that is new,
as one that somebody starts later on an old folder, is refused as always.

A host whose folder is not rank 0's has one of its own, with a copy of the last checkpoint and of
metrics.json: the loss of a host, that of rank 0 too, is not the run's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple, Sequence, TypeVar

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from fpn_plugin.checkpoint.checkpointer import TAG, Checkpointer, find_checkpoint, write_atomically
from fpn_plugin.checkpoint.plain import read_plain
from fpn_plugin.checkpoint.record import record_of
from fpn_plugin.checkpoint.run_folder import CONFIG, METRICS, OUTER_KEYS, flatten
from fpn_plugin.checkpoint.transfer import checkpoint_digest, send_files
from fpn_plugin.engine.folder_lock import hold
from fpn_plugin.engine.hooks import LossNormalizerHook, is_checkpoint_due
from fpn_plugin.engine.run_folder import claim_output_dir, remove_old_run

logger = logging.getLogger(__name__)

RUN = ".run.json"
_SHARED = ".shared-"  # a file that rank 0 makes for a moment, to see who shares its folder
# what the config of a checkpoint may differ in from that of another one of the same run
_CHANGEABLE = (*OUTER_KEYS, "SOLVER.MAX_ITER", "train.output_dir", "train.device", "train.max_iter")

Result = TypeVar("Result")


class Saved(NamedTuple):
    """The checkpoint from which a folder's run would go on.

    Attributes:
        iteration: the last one that it has seen.
        digest: equal for equal files.
        made_with: equal for equal configs; 0 if it does not say.
        size: in bytes.
    """

    name: str
    iteration: int
    digest: int
    made_with: int
    size: int


class Found(NamedTuple):
    """What the first process of a host found in its folder.

    Attributes:
        rank: of the process.
        where: its folder and host, for messages.
        agent: see :func:`agent_of`.
        run: the one that `.run.json` names, with its `agents` and how many `processes` began it.
        saved: its last whole checkpoint.
        broken: why none of its checkpoints can be used.
    """

    rank: int
    where: str
    agent: str
    run: str
    agents: tuple[str, ...]
    processes: int
    saved: Saved | None
    broken: str

    @property
    def is_live(self) -> bool:
        """Whether this process's agent has worked on the folder's run before."""
        return bool(self.run) and self.agent in self.agents


@dataclass
class Hosts:
    """The folders of a run whose processes were started by a launcher.

    Attributes:
        found: in the folder of each host that has its own, that of rank 0 first, by their ranks.
        group: of the processes that found it, on the CPU; None where there is one folder for all,
            and in other processes.
        run: the run that was restarted; "" for one that was not.
        resumed: the run that goes on, if `.run.json` names it.
        processes: those that the schedule of a restarted run was made for.
        replaces: whether the command line has `--overwrite`.
        copy: the name of the checkpoint that this process last wrote a copy of.
    """

    found: dict[int, Found]
    group: Any
    run: str = ""
    resumed: str = ""
    processes: int = 0
    replaces: bool = False
    copy: str = ""

    @property
    def mine(self) -> Found | None:
        """What this process found, if it looks after a folder."""
        return self.found.get(comm.get_rank())


_hosts: Hosts | None = None  # of this process's run, as torch's process groups are


def agent_of(environ: Mapping[str, str]) -> str:
    """What started this process and would start it again, by a name that nothing else ever has.

    torchrun's agent has a new folder, for the errors of its processes. SLURM requeues a job under
    its number, and counts its steps from 0 again.

    Returns:
        "" if it is neither.
    """
    host = socket.gethostname()
    if run := environ.get("TORCHELASTIC_RUN_ID"):
        file = Path(environ.get("TORCHELASTIC_ERROR_FILE", ""))  # …/attempt_0/0/error.json
        folder = str(file.parents[2]) if len(file.parents) > 3 else f"process {os.getppid()}"
        return f"torchrun {run} on {host}: {folder}"
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" in environ:
        return f"SLURM step {environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    return ""


def recover(args: Any, folder: str, key: str) -> None:
    """Find out whether the launcher has restarted a run, and bring its last checkpoint to all
    hosts; so too with `--resume`.

    All processes of a launcher call it when they have joined, before the folder is looked at. In a
    run that was restarted `args` become those to go on with: `resume`, and not `overwrite`.

    Args:
        args: of `fpn_plugin.engine.setup.argument_parser`.
        folder: of the run; the path may lead to another one on each host.
        key: the config key of the folder, for messages.

    Raises:
        FolderInUseError: if another run is at work in the folder of a host.
        ValueError: if the hosts have checkpoints of different runs, or none that is whole.
        OSError: if one of them cannot write its copy.
    """
    global _hosts
    _hosts = None
    looks = together(lambda: _look(folder) if comm.get_local_rank() == 0 else None)
    live = [look for look in looks if look and look.is_live and not args.eval_only]
    if not live and not args.resume:
        return
    hosts = _hosts = _find_hosts(folder, key, "" if args.eval_only else key)
    if live:
        hosts.run, hosts.processes = live[0].run, live[0].processes
        hosts.replaces = args.overwrite
        args.resume, args.overwrite = True, False
        logger.info("The launcher has started this run again: going on as with --resume")
        together(lambda: _claim_new_host(hosts, folder, key))
    source = choose_checkpoint(list(hosts.found.values()), hosts.run, key)
    hosts.resumed = hosts.run or (source.run if source else "")
    if source is not None and source.saved is not None:
        size = source.saved.size
        _send_checkpoint(hosts, folder, source, source.saved)
        if hosts.run:
            together(lambda: _require_room(folder, size, key))


def claim(args: Any, folder: str, key: str, weights: Mapping[str, str]) -> None:
    """Claim the folder of a training run on every host that has its own; nothing in it is changed.

    All processes of a launcher call it, after :func:`recover`. The arguments are those of
    :func:`recover` and `claim_output_dir`, which says what is raised.
    """
    global _hosts
    _hosts = hosts = _hosts or _find_hosts(folder, key, key)
    if not hosts.run:
        arguments = (folder, key, weights, args.resume, args.overwrite)
        together(lambda: claim_output_dir(*arguments) if hosts.mine else None)


def start_run(folder: str, overwrite: bool) -> None:
    """Begin to write into a run's folder, as nothing can refuse to start any more.

    All processes call it, with a launcher or without.

    Args:
        folder: of the run.
        overwrite: remove the results of an older run.
    """
    mine = _hosts.mine if _hosts else None
    if overwrite and (mine or comm.is_main_process()):
        remove_old_run(folder)
    if _hosts is None:
        return
    run = comm.all_gather(_hosts.resumed or uuid.uuid4().hex)[0]
    agents = set(comm.all_gather(agent_of(os.environ))) - {""}
    if mine:
        known = set(mine.agents) if mine.run == run else set()
        processes = schedule_processes(comm.get_world_size())
        record = {"run": run, "processes": processes, "agents": sorted(known | agents)}
        content = json.dumps(record, indent=1).encode() + b"\n"
        write_atomically(Path(folder, RUN), lambda file: file.write(content))


def schedule_processes(processes: int) -> int:
    """The number of processes for which `SOLVER.REFERENCE_WORLD_SIZE` scales batch and schedule: a
    run that was restarted with fewer keeps those that it began with.

    Args:
        processes: those that there are.
    """
    return (_hosts.processes if _hosts else 0) or processes


class CopyHook(HookBase):
    """Gives each host that has a folder of its own a copy of every checkpoint.

    It comes after the hook that saves them, in all processes.

    Args:
        folder: of the run.
        period: `SOLVER.CHECKPOINT_PERIOD`.
    """

    def __init__(self, folder: str, period: int) -> None:
        self._folder, self._period = folder, period

    def after_step(self) -> None:
        """Called by the trainer after each iteration."""
        if is_checkpoint_due(self.trainer, self._period):
            copy_checkpoint(self._folder)


def save_now(checkpointer: Checkpointer, normalizer: LossNormalizerHook, iteration: int) -> None:
    """Save a checkpoint outside of the period, with all that one of the period has; all processes
    call it."""
    normalizer.gather()
    checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    copy_checkpoint(checkpointer.save_dir)


def copy_checkpoint(folder: str) -> None:
    """Send the last checkpoint of rank 0 to the hosts with other folders; all processes call it.

    A host that cannot write it is named in an error of the log, and the run goes on.
    """
    hosts = _hosts
    if hosts is None or hosts.group is None:
        return
    names = [_tag(folder), TAG, CONFIG, METRICS]
    failures = send_files(folder, names, 0, hosts.group)
    rank = comm.get_rank()
    if rank > 0 and rank not in failures:
        before, hosts.copy = hosts.copy, _tag(folder)
        if before and before != hosts.copy:
            Path(folder, before).unlink(missing_ok=True)
    if rank == 0:
        for failed, text in failures.items():
            logger.error("No copy of %s in %s: %s", names[0], hosts.found[failed].where, text)


def choose_checkpoint(found: Sequence[Found], run: str, key: str) -> Found | None:
    """The host from whose checkpoint a run goes on: the newest, of rank 0 among equal ones.

    Args:
        run: the run that was restarted, whose folders count; "" for all.
        key: the config key of the folder, for messages.

    Returns:
        None if there is no checkpoint.

    Raises:
        ValueError: if they are of different runs, or none is whole.
    """
    places = [place for place in found if place.run == run] if run else list(found)
    holders = [(place, place.saved) for place in places if place.saved]
    if not holders:
        for place in places:
            if place.broken:
                raise ValueError(f"{place.broken} (on {place.where})")
        return None
    if not run:
        _require_agreement(holders, key)
    return max(holders, key=lambda x: (x[1].iteration, x[0].is_live, -x[0].rank))[0]


def _require_agreement(holders: Sequence[tuple[Found, Saved]], key: str) -> None:
    """Refuse checkpoints of different runs, and different ones of the same iteration."""
    first, one = holders[0]
    for other, two in holders[1:]:
        same_time = one.iteration == two.iteration
        same_run = (
            first.run == other.run
            if first.run and other.run
            else (not one.made_with or not two.made_with or one.made_with == two.made_with)
        )
        if not same_run or (same_time and one.digest != two.digest):
            difference = "not the same" if same_run else "of different runs"
            raise ValueError(
                f"{key}: the hosts have checkpoints that are {difference}: {one.name} in"
                f" {first.where} (iteration {one.iteration}, digest {one.digest:08x}) and"
                f" {two.name} in {other.where} (iteration {two.iteration}, digest"
                f" {two.digest:08x}). Remove the folder of the one that shall not go on, or choose"
                f" another {key}"
            )


def together(action: Callable[[], Result]) -> list[Result]:
    """Do what may fail in one of the processes; then none goes on.

    Returns:
        the results of all.

    Raises:
        OSError, ValueError: the first error, in all processes; of another one it names the host.
    """
    result: Any = None
    failure: OSError | ValueError | None = None
    try:
        result = action()
    except (OSError, ValueError) as error:
        failure = error
    outcomes = comm.all_gather((result, failure and (str(failure), socket.gethostname())))
    failed = [rank for rank, (_, problem) in enumerate(outcomes) if problem]
    if failed and failed[0] == comm.get_rank() and failure:
        raise failure
    if failed:
        text, host = outcomes[failed[0]][1]
        raise ValueError(f"rank {failed[0]} on {host}: {text}")
    return [result for result, _ in outcomes]


def _find_hosts(folder: str, key: str, lock: str) -> Hosts:
    """Find out which processes look after a folder: rank 0, and the first one of each host that
    does not see rank 0's.

    Args:
        lock: the key for which these lock their folders; "" if they do not.
    """
    token = _SHARED + comm.all_gather(uuid.uuid4().hex)[0]
    is_main, is_first = comm.is_main_process(), comm.get_local_rank() == 0

    def mark() -> None:
        if is_main:
            if lock:
                hold(folder, lock)
            os.makedirs(folder, exist_ok=True)
            Path(folder, token).touch()

    def look() -> Found | None:
        if not is_main and (not is_first or Path(folder, token).exists()):
            return None
        if lock:
            hold(folder, lock)
        return _look(folder)

    together(mark)
    try:
        looks = together(look)
    finally:
        if is_main:
            Path(folder, token).unlink(missing_ok=True)
    found = {place.rank: place for place in looks if place is not None}
    group = dist.new_group(list(found), backend="gloo") if len(found) > 1 else None
    return Hosts(found, group if comm.get_rank() in found else None)


def _claim_new_host(hosts: Hosts, folder: str, key: str) -> None:
    """Claim the folder of a host that takes part in a run since its restart."""
    if hosts.mine and hosts.mine.run != hosts.run:
        claim_output_dir(folder, key, {}, False, hosts.replaces)
        if hosts.replaces:
            remove_old_run(folder)


def _look(folder: str) -> Found:
    where = f"{os.path.abspath(folder)} of {socket.gethostname()} (rank {comm.get_rank()})"
    run, processes, saved, broken = "", 0, None, ""
    agents: tuple[str, ...] = ()
    try:
        known = json.loads(Path(folder, RUN).read_text())
        run, agents = str(known["run"]), tuple(map(str, known["agents"]))
        processes = int(known["processes"])
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is broken: it is ignored", Path(folder, RUN))
    try:
        path = find_checkpoint(folder)
        saved = _read_saved(path) if path else None
    except ValueError as error:
        broken = str(error)
    rank, agent = comm.get_rank(), agent_of(os.environ)
    return Found(rank, where, agent, run, agents, processes, saved, broken)


def _read_saved(path: str) -> Saved:
    content = read_plain(Path(path), path, mmap=True)
    state = content.get("trainer", {}) if isinstance(content, dict) else {}
    iteration = state.get("iteration", -1)
    config = flatten(record_of(content).get("config", {}))
    kept = sorted((key, value) for key, value in config.items() if key not in _CHANGEABLE)
    made_with = zlib.crc32(repr(kept).encode()) if kept else 0
    name, size = Path(path).name, os.path.getsize(path)
    return Saved(name, iteration, checkpoint_digest(path), made_with, size)


def _send_checkpoint(hosts: Hosts, folder: str, source: Found, saved: Saved) -> None:
    """Bring a checkpoint, and what belongs to it, to the hosts that have another or none."""
    mine = hosts.mine
    lacking = [x for x in hosts.found.values() if not x.saved or x.saved.digest != saved.digest]
    if not lacking:
        return
    logger.info("%s goes to %s", saved.name, ", ".join(place.where for place in lacking))
    failures: dict[int, str] = {}
    if hosts.group is not None and mine is not None:
        is_lacking = mine in lacking
        if mine == source and _tag(folder) != saved.name:
            write_atomically(Path(folder, TAG), lambda file: file.write(saved.name.encode()))
        names = [saved.name, TAG, CONFIG, METRICS]
        failures = send_files(folder, names, source.rank, hosts.group, is_lacking)
        hosts.copy = saved.name if is_lacking else ""
    for rank, text in comm.all_gather(failures)[0].items():
        raise OSError(f"{saved.name} does not reach {hosts.found[rank].where}: {text}")


def _require_room(folder: str, size: int, key: str) -> None:
    """Refuse to go on where the next checkpoint could not be saved, before the way to it is gone
    again."""
    free = shutil.disk_usage(folder).free if comm.is_main_process() else size
    if free < size:
        raise ValueError(
            f"{key} {folder!r} on {socket.gethostname()}: a checkpoint takes"
            f" {size / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free: make room, then go"
            " on with --resume"
        )


def _tag(folder: str) -> str:
    file = Path(folder, TAG)
    return file.read_text().strip() if file.is_file() else ""
