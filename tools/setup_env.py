#!/usr/bin/env python3
"""Set up the environment that `make` uses: the locked requirements, Detectron2 and this plugin.

Uses the standard library alone, because it runs before anything is installed. It writes inside the
environment only, and does nothing when the last set-up still fits.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.txt"
UV_LOCK = ROOT / "tools" / "requirements-uv.txt"
REPUBLICATION = ROOT / "tools" / "detectron2_wheel"
LOCK_HEADER = "# Made by `make lock` from setup.py and tools/detectron2_wheel/pyproject.toml.\n"
GITHUB = "detectron2 @ git+https://github.com/facebookresearch/detectron2.git@main"
# What the CPU builds of torch do without
GPU_ONLY = ("nvidia-", "cuda-", "triton==")
THEIRS = "theirs"  # the environment came with a Detectron2
INPUTS = [LOCK, UV_LOCK, ROOT / "setup.py", *sorted(REPUBLICATION.glob("*.*"))]


def run(*command: object) -> None:
    """Run a command; end with its exit code and its name when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words)
    if done.returncode:
        sys.exit(f"setup_env: failed with exit code {done.returncode}: {' '.join(words)}")


def fingerprint(detectron2: str, torch: str = "") -> str:
    """A digest of everything that the set-up depends on."""
    digest = hashlib.sha256(f"{detectron2} {torch} {sys.version}".encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def has_detectron2(python: Path) -> bool:
    code = "import importlib.util as u, sys; sys.exit(not u.find_spec('detectron2'))"
    return python.exists() and subprocess.run([str(python), "-c", code]).returncode == 0


def choose(asked: str, python: Path, state: list[str]) -> str:
    """Which Detectron2 the environment gets: asked for, there already, or the republication.

    Args:
        asked: "pinned", "git", or "" for the one that is there.
        state: what the last set-up noted, the choice first.
    """
    before = state[0] if state else THEIRS if has_detectron2(python) else "pinned"
    if before == THEIRS and asked:
        sys.exit(
            f"setup_env: DETECTRON2={asked}: {python.parent.parent} came with a Detectron2 of its"
            " own, which is kept. Choose another VENV, or leave DETECTRON2 out"
        )
    return asked or before


def installer(python: Path) -> list[str]:
    """The command that installs: uv where its wheel can be had (four times faster), else pip."""
    pip = [str(python), "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check"]
    boot = subprocess.run([*pip, "--quiet", "--require-hashes", "--requirement", str(UV_LOCK)])
    if boot.returncode:
        print("setup_env: uv cannot be installed here; going on with pip", flush=True)
        return [*pip, "--progress-bar", "off"]
    uv = str(python.with_name("uv"))
    return [uv, "pip", "install", "--python", str(python), "--no-cache", "--compile-bytecode"]


def install(args: argparse.Namespace, python: Path, detectron2: str) -> None:
    """Install what is missing. A user's own environment keeps every version that it has."""
    if detectron2 == THEIRS:
        print(f"setup_env: keeping the Detectron2 of {args.venv}; only this plugin is installed")
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
        run(*pip, "--editable", f"{ROOT}[dev]")
        return
    command = installer(python)
    constraint = str(write_build_constraint(args))
    os.environ["PIP_CONSTRAINT"] = os.environ["UV_BUILD_CONSTRAINT"] = constraint
    if args.oldest:
        return install_oldest(python, command)
    if args.torch == "cpu":
        install_for_cpu(args.venv, command)
    else:
        run(*command, "--require-hashes", "--requirement", LOCK)
    if detectron2 == "git":
        run(*command, "--no-deps", "--no-build-isolation", GITHUB)
    else:
        run(*command, "--no-deps", REPUBLICATION)
    run(*command, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    run(python, "-m", "pip", "check", "--disable-pip-version-check")


def install_oldest(python: Path, command: list[str]) -> None:
    """Install the lower bounds of setup.py, and what Detectron2 needs beside them."""
    if is_pip(command):
        sys.exit("setup_env: --oldest needs uv, which cannot be installed here")
    # built apart: the oldest setuptools has no wheel package
    run(*command, "--resolution", "lowest-direct", "--editable", f"{ROOT}[dev]")
    run(*command, REPUBLICATION)
    run(python, "-m", "pip", "check", "--disable-pip-version-check")


def is_pip(command: list[str]) -> bool:
    """Whether packages are installed by pip, in the place of uv."""
    return command[1:3] == ["-m", "pip"]


def install_for_cpu(venv: Path, command: list[str]) -> None:
    """Install the lock with the CPU builds of torch, which come from an index of their own.

    That index has no hashes in the lock: the versions are the lock's, everything else is checked.
    """
    if is_pip(command):
        sys.exit("setup_env: TORCH=cpu needs uv, which cannot be installed here: leave TORCH out")
    entries = re.split(r"\n(?=[a-z0-9])", LOCK.read_text())
    builds = [entry for entry in entries if entry.startswith(("torch==", "torchvision=="))]
    others = [entry for entry in entries if entry not in builds]
    rest, torch = venv / "requirements-cpu.txt", venv / "requirements-torch.txt"
    rest.write_text("\n".join(entry for entry in others if not entry.startswith(GPU_ONLY)) + "\n")
    torch.write_text("".join(build.split(" \\\n")[0] + "\n" for build in builds))
    run(*command, "--require-hashes", "--no-deps", "--requirement", rest)
    print(
        "setup_env: fetching torch for the CPU, from its own index; without TORCH=cpu it comes"
        " with the other packages",
        flush=True,
    )
    run(*command, "--torch-backend", "cpu", "--no-deps", "--requirement", torch)


def write_build_constraint(args: argparse.Namespace) -> Path:
    """The few requirements without a wheel are built with the setuptools that the lock pins."""
    pinned = next(line for line in LOCK.read_text().splitlines() if line.startswith("setuptools=="))
    path = args.venv.resolve() / "build-constraint.txt"
    path.write_text(pinned.split(" ")[0] + "\n")
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment to use")
    parser.add_argument(
        "--detectron2",
        choices=["", "pinned", "git"],
        default="",
        help="the republication, or upstream main; default: the one that is there, else pinned",
    )
    parser.add_argument(
        "--torch",
        choices=["", "cpu", "default"],
        default="",
        help="cpu: builds without CUDA; default: as the package index has them; else as before",
    )
    text = "with the oldest versions that setup.py allows, instead of the lock"
    parser.add_argument("--oldest", action="store_true", help=text)
    parser.add_argument("--lock", action="store_true", help="work out requirements.txt again")
    return parser.parse_args()


def lock(python: Path) -> None:
    """Write requirements.txt: exact versions with hashes, for every platform and Python."""
    command = [
        python.with_name("uv"),
        "pip",
        "compile",
        "setup.py",
        REPUBLICATION / "pyproject.toml",
    ]
    command += ["--extra", "dev", "--universal", "--python-version", "3.10", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--quiet", "--no-cache", "--output-file", LOCK]
    os.chdir(ROOT)
    run(*command)
    LOCK.write_text(LOCK_HEADER + LOCK.read_text())


def main() -> None:
    args = parse()
    if sys.version_info < (3, 10):
        sys.exit(f"setup_env: Python 3.10 or later is needed, this is {sys.version.split()[0]}")
    python = args.venv / "bin" / "python"
    if args.lock:
        return lock(python)
    stamp = args.venv / "fpn-plugin-setup"  # which Detectron2, the fingerprint, which torch
    state = stamp.read_text().split() if stamp.exists() else []
    detectron2 = choose(args.detectron2, python, state)
    args.torch = args.torch or (state[2] if len(state) > 2 else "default")
    wanted = [detectron2, fingerprint(detectron2, args.torch), args.torch]
    if state == wanted:
        return
    start = time.time()
    gigabytes = 2 if args.torch == "cpu" else 6
    size = "" if detectron2 == THEIRS else f", about {gigabytes} GB; this happens once"
    print(f"setup_env: setting up {args.venv}{size}", flush=True)
    if not python.exists():
        run(sys.executable, "-m", "venv", args.venv)
    # so that an interrupted set-up is known as our own, with its choices
    stamp.write_text(f"{detectron2} unfinished {args.torch}")
    install(args, python, detectron2)
    stamp.write_text(" ".join(wanted))
    print(f"setup_env: done in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
