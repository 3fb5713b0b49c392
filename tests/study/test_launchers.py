"""Where a study's runs are trained: parts of a machine, and jobs of SLURM.

There are stand-ins for sbatch and squeue; and submitit runs jobs on this machine."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import own_datasets
from tiny import tiny_config, write_dataset

from fpn_plugin.cli import study as study_command
from fpn_plugin.compare.runs import RECORD, read_record
from fpn_plugin.report.progress import RunsProgress
from fpn_plugin.study import cluster
from fpn_plugin.study.cluster import ClusterLauncher, minutes
from fpn_plugin.study.config import Study, read_study
from fpn_plugin.study.execute import remaining_time, run_study
from fpn_plugin.study.launchers import LocalLauncher, shares
from fpn_plugin.study.plan import PlannedRun, plan_runs
from fpn_plugin.study.session import Share

pytest.importorskip("submitit")

# "trains" a run: what is looked for in the folder of one that is done
DONE = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "model_final.pth").touch()
(folder / "metrics.json").write_text('{"iteration": 5, "bbox/AP": 1.0}\\n')
"""
# keeps the script, and gives the next number
SBATCH = """#!/bin/sh
cp "$1" "$STUB/submission-$(ls "$STUB" | grep -c submission)"
[ -e "$STUB/refuse" ] && { echo "sbatch: error: invalid partition specified: nope" >&2; exit 1; }
echo "Submitted batch job $((6 + $(ls "$STUB" | grep -c submission)))"
"""
SQUEUE = """#!/bin/sh
[ -e "$STUB/down" ] && exit 1
cat "$STUB/queue"
"""


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """Two runs of a study, of which none was started."""
    data = write_dataset(tmp_path, images=1)
    own = {"DATASETS__OWN__" + key: str(data) for key in ("TRAIN_JSON", "VAL_JSON")}
    own |= {"DATASETS__OWN__" + key: str(data.parent) for key in ("TRAIN_IMAGES", "VAL_IMAGES")}
    cfg = tiny_config(tmp_path, DATASETS__TRAIN=(), SEED=-1, **own)
    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    (tmp_path / "train.py").write_text(DONE)
    content = {"output": str(tmp_path / "out"), "base": "tiny.yaml"}
    content["runs"] = {"a": {}, "b": {"MODEL.RPN.NMS_THRESH": 0.6}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with own_datasets():
        study = read_study(tmp_path / "study.yaml")
        yield study, plan_runs(study)


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that says what the stand-ins of SLURM's commands do, and has what they were given."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, code in (("sbatch", SBATCH), ("squeue", SQUEUE), ("srun", "")):
        (folder / name).write_text(code)
        (folder / name).chmod(0o755)
    (folder / "queue").touch()
    monkeypatch.setenv("STUB", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("_LOOK", "_MISSING"):
        monkeypatch.setattr(cluster, name, 0.0)
    return folder


def command(study: Study) -> tuple[str, str]:
    return sys.executable, str(study.output.parent / "train.py")


def test_the_parts_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpus = [0, 1, 4, 5, 6]
    assert shares(1, 0, [], cpus) == [Share()]
    assert shares(2, 0, [], cpus) == [Share(2), Share(2)]
    assert shares(9, 0, [], cpus)[8] == Share(1)
    assert shares(2, 2, [], cpus) == [Share(2, (0, 1)), Share(2, (4, 5))]
    assert shares(2, 0, ["2", "3", "5"], cpus) == [Share(0, (), "2"), Share(0, (), "3")]
    assert shares(1, 0, ["2", "3"], cpus) == [Share()]  # as without a study
    assert shares(2, 1, ["2", "3"], cpus)[1] == Share(1, (1,), "3")
    with pytest.raises(ValueError, match="--jobs 3: each run gets a GPU of its own, .* has 2,"):
        shares(3, 0, ["2", "3"], cpus)
    with pytest.raises(ValueError, match="--jobs 3 with --cores 2 are 6 cores, .* has 5,"):
        shares(3, 2, [], cpus)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert shares(2, 0, [], cpus) == [Share(), Share()]
    environment = Share(3, (), "GPU-1").environment()
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("3", "GPU-1")


def test_several_runs_of_one_gpu_are_refused(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs = planned
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,GPU-a,3")
    runs[1].cfg.MODEL.DEVICE = "cuda"
    launcher = LocalLauncher((), jobs=2)
    launcher.check(runs)
    assert [share.gpu for share in launcher._free] == ["5", "7"]
    runs[1].cfg.MODEL.DEVICE = "cuda:1"
    with pytest.raises(ValueError, match="runs.b: MODEL.DEVICE 'cuda:1': --jobs 2 gives each run"):
        launcher.check(runs)


def test_the_time_that_is_left() -> None:
    assert remaining_time([], [], 1) == 0
    assert remaining_time([5.0], [10, 10], 1) == 25
    assert remaining_time([5.0, 3.0], [10, 10, 10], 2) == 23  # 3 + 10 + 10 and 5 + 10
    assert remaining_time([5.0], [10, 20], 8) == 20


@pytest.mark.parametrize(
    "text, expected",
    [("90", 90), ("90:30", 90), ("1:30:59", 90), ("1-0", 1440), ("1-2:3", 1563), ("1-2:3:4", 1563)],
)
def test_times_are_read_as_sbatch_does(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "4h", "0", "4:59", "1:2:3:4"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--slurm-time: '{text}' is "):
        minutes(text)


def test_the_options_of_the_command(tmp_path: Path) -> None:
    words = ["--slurm-mem=8G", "s.yaml", "--jobs", "3", "--slurm-gpus-per-node", "2"]
    args = study_command.parse_args([*words, "--slurm-exclusive", "SOLVER.MAX_ITER", "9"])
    assert args.slurm == {"mem": "8G", "gpus-per-node": "2", "exclusive": True}
    assert (str(args.study), args.jobs, args.opts) == ("s.yaml", 3, ["SOLVER.MAX_ITER", "9"])
    study = Study(tmp_path, (0,), ())
    with pytest.raises(ValueError, match="--slurm-mem is for --launcher slurm"):
        study_command.launcher_of(args, study)
    for option in ("array", "nodes", "ntasks"):
        with pytest.raises(ValueError, match=f"--slurm-{option} cannot be given: "):
            ClusterLauncher(tmp_path, (), options={option: "2"})
    for wrong in ("0", "x"):
        with pytest.raises(SystemExit, match="2"):
            study_command.parse_args(["s.yaml", "--jobs", wrong])


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--launcher slurm: there is no sbatch here"):
        ClusterLauncher(tmp_path, ())
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'fpn_plugin\[slurm\]'"):
        ClusterLauncher(tmp_path, ())


def test_an_array_of_jobs(planned: Any, stubs: Path) -> None:
    study, runs = planned
    options = {"partition": "gpu", "time": "1-0", "exclusive": True, "setup": "module load cuda"}
    launcher = ClusterLauncher(study.output, command(study), jobs=1, cores=3, options=options)
    jobs = launcher.start(runs, [])
    script = (stubs / "submission-0").read_text()
    for line in ("array=0-1%1", "partition=gpu", "time=1440", "cpus-per-task=3", "exclusive"):
        assert f"#SBATCH --{line}\n" in script
    assert "gpus" not in script and "\nmodule load cuda\n" in script  # the config says cpu
    assert "--cpus-per-task=3" in script.rpartition("srun")[2]
    assert launcher.submitted(jobs).startswith("submitted as 7_0 7_1;")
    assert launcher.farewell.endswith("scancel 7")

    # a study that was interrupted knows them again, as long as they are in the queue
    (stubs / "queue").write_text("7_0|RUNNING|None\n7_1|PENDING|Resources\n99|RUNNING|None\n")
    again = ClusterLauncher(study.output, command(study))
    adopted = again.adopt(runs)
    assert list(adopted) == runs and [job.poll() for job in adopted.values()] == [None, None]
    assert again.notice() == "1 of them in the queue (Resources)"
    (stubs / "queue").write_text("7_1|RUNNING|None\n")
    assert list(ClusterLauncher(study.output, command(study)).adopt(runs)) == runs[1:]
    (stubs / "down").touch()
    assert adopted[runs[1]].poll() is None  # nothing is known
    with pytest.raises(ValueError, match="squeue fails"):
        ClusterLauncher(study.output, command(study)).adopt(runs)


def test_a_gpu_for_each_job_whose_config_wants_one(planned: Any, stubs: Path) -> None:
    study, runs = planned
    for run in runs:
        run.cfg.MODEL.DEVICE = "cuda"
    ClusterLauncher(study.output, command(study)).start(runs, [])
    assert "#SBATCH --gpus-per-node=1\n" in (stubs / "submission-0").read_text()
    ClusterLauncher(study.output, command(study), options={"gres": "gpu:a100:1"}).start(runs, [])
    assert "gpus-per-node" not in (stubs / "submission-1").read_text()
    (stubs / "refuse").touch()
    with pytest.raises(ValueError, match="--launcher slurm: sbatch: error: invalid partition spec"):
        ClusterLauncher(study.output, command(study)).start(runs, [])


def test_a_job_that_left_the_queue_without_a_result_is_submitted_again(
    planned: Any, stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, runs = planned
    launcher = ClusterLauncher(study.output, command(study))
    monkeypatch.setattr(launcher, "pause", 0.01)
    said = io.StringIO()
    (stubs / "queue").write_text("7_1|RUNNING|None\n")
    real = ClusterLauncher.start

    def start(self: Any, runs: list[PlannedRun], keep_open: Any) -> Any:
        """The second time, what the jobs would do is there."""
        jobs = real(self, runs, keep_open)
        if jobs[0].number == "8":
            for job, run in zip([*jobs, "7_1"], [*runs, all_runs[1]]):
                number = str(getattr(job, "number", job))
                finish(run, number, self._folder)
        return jobs

    all_runs = list(runs)
    monkeypatch.setattr(ClusterLauncher, "start", start)
    outcome = run_study(study, runs, RunsProgress(stream=said), launcher)
    assert (outcome.done, outcome.failures) == (runs, {})
    assert "a seed 0: lost at 0: job 7_0 ended without a result" in said.getvalue()
    assert "submitted as 8;" in said.getvalue()


def finish(run: PlannedRun, number: str, folder: Path) -> None:
    """What a job leaves that has trained its run."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.cfg.dump())
    (run.folder / "model_final.pth").touch()
    (run.folder / "metrics.json").write_text('{"iteration": 5, "bbox/AP": 1.0}\n')
    session = {"ended": "done", "job": number, "seconds": 3.0}
    (run.folder / RECORD).write_text(json.dumps({"sessions": [session], "seconds": 3.0}))
    (folder / f"{number}_0_result.pkl").touch()


def test_jobs_of_submitit_on_this_machine(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run is done; the job of the other is asked to leave, and goes on where it was."""
    study, runs = planned
    script = study.output.parent / "train.py"
    wait = "if '/b/' in str(sys.argv) and '--resume' not in sys.argv:\n    import time; time.sleep(60)\n"
    config = f"(folder / 'config.yaml').write_text(Path({str(study.output.parent / 'tiny.yaml')!r}).read_text())\n"
    script.write_text(DONE + config + wait)
    launcher = ClusterLauncher(study.output, command(study), cluster="local")
    jobs = launcher.start(runs, [])
    record, ends = runs[1].folder / RECORD, time.monotonic() + 120
    while not (runs[1].folder / "config.yaml").is_file() and time.monotonic() < ends:
        time.sleep(0.2)
    (session,) = read_record(runs[1].folder)["sessions"]
    assert session["ended"] == "killed" and session["job"] == jobs[1].number
    controller = jobs[1]._job._process.pid
    children = Path(f"/proc/{controller}/task/{controller}/children").read_text()
    os.kill(int(children), signal.SIGUSR2)  # as SLURM does before the time is over
    while None in (endings := [job.poll() for job in jobs]) and time.monotonic() < ends:
        time.sleep(0.2)
    assert endings and [ending.how for ending in endings if ending] == ["done", "done"]
    sessions = json.loads(record.read_text())["sessions"]
    assert [session["ended"] for session in sessions] == ["interrupted", "done"]
    assert sessions[1]["command"][-1] == "--resume"
