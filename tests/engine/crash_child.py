"""Training in a process that can be killed, and a parent that hears what it is doing."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from bad import RETINA
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tiny import VAL, register, tiny_config
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from fpn_plugin.checkpoint.checkpointer import StrictCheckpointer
from fpn_plugin.engine.faults.skipping import SkipCounter
from fpn_plugin.engine.folder_lock import hold
from fpn_plugin.engine.hooks import MetricsWriter, TolerantWriter
from fpn_plugin.engine.trainer import Trainer

# forked from a process that has imported everything: a start takes no seconds
CONTEXT = multiprocessing.get_context("forkserver")
# By names that need no path of the tests': the server of Python 3.11 and before has not got it.
CONTEXT.set_forkserver_preload(
    ["fpn_plugin.engine.trainer", "detectron2.model_zoo", "torch.utils.tensorboard"]
)

# a tiny run with AMP, workers and evaluations
OVERRIDES: dict[str, Any] = {
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 16,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 32,
    "SOLVER__MAX_ITER": 8,
    "SOLVER__CHECKPOINT_PERIOD": 2,
    "SOLVER__AMP__ENABLED": True,
    "TEST__EVAL_PERIOD": 4,
    "DATASETS__TEST": (VAL,),
    "DATALOADER__NUM_WORKERS": 2,
}
# a tiny Mask R-CNN that detects whatever it sees
MASKS: dict[str, Any] = {
    "MODEL__MASK_ON": True,
    "MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead",
    "MODEL__ROI_MASK_HEAD__NUM_CONV": 1,
    "MODEL__ROI_MASK_HEAD__CONV_DIM": 8,
    "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
    "DATASETS__TEST": (VAL,),
    "SOLVER__BASE_LR": 0.01,
    "SOLVER__MAX_ITER": 3,
    "TEST__EVAL_PERIOD": 0,
}
PATIENCE = 60.0  # seconds, on a busy machine; what is waited for takes a few


class Reporter(HookBase):
    """Tells the parent about each step."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def before_step(self) -> None:
        self.tell("step")


class ReportingTrainer(Trainer):
    """Says when it trains, saves and evaluates; writes metrics.json in each iteration."""

    tell: Callable[[str], None]

    def build_hooks(self) -> list[Any]:
        hooks = super().build_hooks()
        for hook in hooks:
            if isinstance(hook, PeriodicWriter):
                hook._period = 1
        return [*hooks, Reporter(self.tell)]

    @classmethod
    def test(cls, *args: Any, **kwargs: Any) -> Any:
        cls.tell("evaluating")
        results = super().test(*args, **kwargs)
        cls.tell("step")
        return results


def reporting_trainer(pipe: Connection, output: str, overrides: dict[str, Any]) -> Trainer:
    """The trainer of the tiny detector, from always the same first weights."""

    def tell(phase: str) -> None:
        pipe.send((phase, [child.pid for child in multiprocessing.active_children()]))

    torch.manual_seed(0)
    ReportingTrainer.tell = staticmethod(tell)
    trainer = ReportingTrainer(tiny_config(Path(output), **overrides))
    save = trainer.checkpointer.save

    def reported_save(name: str, **kwargs: Any) -> None:
        tell("saving")
        save(name, **kwargs)
        tell("step")

    trainer.checkpointer.save = reported_save  # type: ignore[method-assign]
    return trainer


def run(
    pipe: Connection,
    json_file: str,
    output: str,
    overrides: dict[str, Any],
    prepare: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Train, or go on where an earlier one was killed; an error's text goes to the parent."""
    # as in a run of its own: else the loader's workers would come from another fork server
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner may ignore it
    register(Path(json_file))
    try:
        trainer = reporting_trainer(pipe, output, overrides)
        prepare(trainer)
        trainer.resume_or_load(resume=True)
        trainer.train()
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        raise


class Before(HookBase):
    """Does something before an iteration."""

    def __init__(self, iteration: int, action: Callable[[], None]) -> None:
        self.iteration, self.action = iteration, action

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.action()


def run_killed(pipe: Connection, *args: Any) -> None:
    """:func:`run` that ends by SIGKILL in training: no handler and no `finally` runs."""
    kill = Before(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run(pipe, *args, prepare=lambda trainer: trainer.register_hooks([kill]))


def run_out_of_room(pipe: Connection, *args: Any) -> None:
    """:func:`run` in which no file becomes as large as the second checkpoint would be."""
    size = (2 * 10**6, 2 * 10**6)
    fill = Before(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, size))
    run(pipe, *args, prepare=lambda trainer: trainer.register_hooks([fill]))


def run_with_little_memory(pipe: Connection, *args: Any) -> None:
    """:func:`run` that may take only 500 MiB more than what it has before it trains."""

    def limit(trainer: Trainer) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, hard))

    run(pipe, *args, prepare=limit)


def write_metrics(pipe: Connection, path: str) -> None:
    """Write lines of metrics, the second of three while there is no room for it."""
    writer = TolerantWriter(MetricsWriter(path))
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventStorage() as storage:
        for number in range(3):
            storage.iter = number
            storage.put_scalar("loss", float(number))
            room = 40 if number == 1 else limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit))
            writer.write()
            pipe.send((Path(path).read_text(), []))
        writer.close()


def hold_folder(pipe: Connection, folder: str) -> None:
    """Hold a folder's lock in a process that has a child, as one with a data loader's worker."""
    hold(folder, "OUTPUT_DIR")
    worker = os.fork()
    if worker:
        pipe.send(("held", [worker]))
    time.sleep(PATIENCE)


def train_together(json_file: str, folder: str) -> None:
    """One of two processes: trains, and again from its checkpoint, as if killed after that.

    Leaves the weights that both runs end with.
    """
    register(Path(json_file))
    whole, broken = Path(folder, "whole"), Path(folder, "broken")
    for output, start in ((whole, 0), (broken, 2)):
        torch.manual_seed(0)
        keys = {"SOLVER__MAX_ITER": 3, "SOLVER__CHECKPOINT_PERIOD": 2, "MODEL__EMA__ENABLED": True}
        trainer = Trainer(tiny_config(output, **keys))
        trainer.resume_or_load(resume=start > 0)
        assert trainer.start_iter == start
        trainer.train()
        weights = trainer.checkpointer.model.state_dict()
        averages = {f"average.{name}": x for name, x in trainer.ema._averages.items()}
        torch.save({**weights, **averages}, output / f"rank{comm.get_rank()}.pth")
        if start == 0 and comm.is_main_process():
            broken.mkdir()
            shutil.copy(whole / "model_0000001.pth", broken)
        comm.synchronize()


# What two processes exchange gradients by: the keys of `SOLVER`
EXCHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {
        "DDP__GRADIENT_AS_BUCKET_VIEW": True,
        "DDP__STATIC_GRAPH": True,
        "DDP__BUCKET_MB": 1,
    },
    "parts": {"ACCUMULATE": 2, "DDP__GRADIENT_AS_BUCKET_VIEW": True},
    "fp16": {"DDP__COMPRESS": "fp16"},
    "bf16": {"DDP__COMPRESS": "bf16"},
}


def exchange_gradients(json_file: str, folder: str) -> None:
    """One of two processes: trains with each of `EXCHANGES`.

    Leaves the weights before and after, and how many buckets were sent uncompressed.
    """
    register(Path(json_file))
    small = {key: value for key, value in OVERRIDES.items() if key.startswith("MODEL")}
    for name, keys in EXCHANGES.items():
        solver = {f"SOLVER__{key}": value for key, value in keys.items()}
        settings = {**small, **RETINA, **solver, "SOLVER__IMS_PER_BATCH": 4, "SOLVER__MAX_ITER": 2}
        settings |= {"MODEL__RESNETS__NORM": "FrozenBN", "TEST__EVAL_PERIOD": 0}
        torch.manual_seed(0)
        trainer = Trainer(tiny_config(Path(folder, name), **settings))
        before = {key: x.clone() for key, x in trainer.checkpointer.model.state_dict().items()}
        sent: list[int] = []

        def send(state, bucket):  # DDP would read annotations, which are texts here
            sent.append(bucket.index())
            return allreduce_hook(None, bucket)

        if name in ("plain", "parts"):
            trainer.model.register_comm_hook(None, send)
        trainer.train()
        if comm.is_main_process():
            state = before, trainer.checkpointer.model.state_dict(), len(sent)
            torch.save(state, Path(folder, f"{name}.pth"))


def evaluate_together(json_file: str, folder: str, weights: str) -> None:
    """One of several processes: trains and evaluates, or evaluates weights."""
    torch.set_num_threads(1)  # oneDNN's 1×1 convolutions round by the number of threads
    register(Path(json_file))
    torch.manual_seed(0)
    cfg = tiny_config(Path(folder), **MASKS)
    if weights:
        model = Trainer.build_model(cfg)
        StrictCheckpointer(model, "", False, "MODEL.WEIGHTS").load(weights)
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.train()
        results = trainer._last_eval_results
        statistics = {k: v for k, v in trainer.model.state_dict().items() if "running" in k}
        assert (
            len({str(x) for x in comm.all_gather(sum(v.sum() for v in statistics.values()))}) == 1
        )
    if comm.is_main_process():
        Path(folder, "results.json").write_text(json.dumps(results))


def lose_a_rank(folder: str) -> None:
    """One of two processes: both skip images, then one is killed and the other waits for it."""
    counter = SkipCounter(folder)
    rank = comm.get_rank()
    counter.pending = [("both.jpg", "broken"), (f"{rank}.jpg", "broken")]
    counter.after_step()
    comm.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()
    time.sleep(PATIENCE)


class Child:
    """A process of :func:`run`, or of another function of its signature, seen by its parent."""

    running: list[Child] = []  # all that were started; see `stop_children`

    def __init__(self, *args: Any, target: Callable[..., None] = run) -> None:
        self._pipe, other = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=target, args=(other, *args))
        self.process.start()
        other.close()
        self.running.append(self)
        self.phase, self.error = "starting", ""
        self.workers: set[int] = set()

    def hear(self, timeout: float = PATIENCE) -> bool:
        """Take in the next message; False if there is none in time, or none any more."""
        try:
            if not self._pipe.poll(timeout):
                return False
            phase, detail = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            return False
        if phase == "error":
            self.error = detail
        else:
            self.phase = phase
            self.workers |= set(detail)
        return True

    def wait_for(self, phase: str, times: int) -> bool:
        """Hear until it says this for so many times; False if it ends before."""
        for _ in waits(step=0):
            if self.hear(0.02):
                times -= self.phase == phase
            elif self.process.exitcode is not None:
                return False
            if not times:
                return True
        return False

    def kill(self, number: int = signal.SIGKILL) -> int | None:
        """Send a signal; its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return self.end()

    def end(self) -> int | None:
        """Wait for its end; its exit code."""
        # Not until the pipe ends: the workers of a killed process hold it open for a while.
        for _ in waits():
            if self.process.exitcode is not None and not self.hear(0):
                break
            self.hear(0.02)
        return self.process.exitcode


def stop_children() -> None:
    """Kill what a test left running: at its end Python waits for its children, however long."""
    while Child.running:
        child = Child.running.pop()
        if child.process.exitcode is None:
            child.kill()


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not dead and merely not yet collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def waits(seconds: float = PATIENCE, step: float = 0.02) -> Iterator[float]:
    """The seconds that have passed, again and again, until the time is over."""
    start = time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        yield passed
        time.sleep(step)
