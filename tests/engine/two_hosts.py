"""Two machines on one: network namespaces with host names of their own, joined by a veth pair, and
each with its own files at the same path."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, Sequence

NAMES = ("alpha", "beta")
PATIENCE = 120.0  # seconds, on a busy machine
# names and files of a machine's own, then the command; its signals reach it, as all is exec
_ENTER = """set -e
mount --make-rprivate /
hostname "$NAME"
mount --bind "$HOSTS" /etc/hosts
mount --bind "$DISK" "$FOLDER"
cd "$FOLDER"
exec "$@" """


def missing() -> str:
    """What keeps this machine from having such hosts; "" if nothing does."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    for tool in ("ip", "tc", "unshare", "mount"):
        if not shutil.which(tool):
            return f"there is no `{tool}` (Debian: iproute2, util-linux, mount)"
    name = f"fpn-probe-{os.getpid()}"
    tried = _sudo(f"ip netns add {name}", check=False)
    if tried.returncode == 0:
        tried = _sudo(f"ip netns exec {name} unshare --uts --mount true", check=False)
        _sudo(f"ip netns del {name}", check=False)
    return tried.stderr.strip() and f"no network namespaces: {tried.stderr.strip()}"


def _sudo(command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(shlex.split(command), check=check, capture_output=True, text=True)


class Host:
    """A machine of its own network and files.

    Attributes:
        name: "alpha" or "beta", which both machines resolve.
        disk: where its files really are; its commands see them in `Hosts.folder`.
    """

    def __init__(
        self, name: str, namespace: str, address: str, environment: dict[str, str]
    ) -> None:
        self.name, self.namespace, self.address = name, namespace, address
        self.disk = Path(environment["DISK"])
        self._environment = environment

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start a command, in a session of its own; its output is in `disk/out.txt`."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        with open(self.disk / "out.txt", "a", encoding="utf-8") as out:
            return subprocess.Popen(
                [*enter, "sh", "-c", _ENTER, "sh", *command],
                env={**os.environ, **self._environment, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What its commands have printed."""
        path = self.disk / "out.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def processes(self) -> list[int]:
        """All that run there."""
        return [int(pid) for pid in _sudo(f"ip netns pids {self.namespace}").stdout.split()]

    def kill_all(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Hosts:
    """Both machines, and what is between them.

    Attributes:
        folder: the path at which each sees its own files.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "disk"
        self.folder.mkdir(parents=True)
        names = root / "hosts"
        tag = f"fpn{os.getpid() % 100000}"
        net = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
        addresses = {name: f"{net}.{i}" for i, name in enumerate(NAMES, 1)}
        lines = ["127.0.0.1 localhost", *(f"{addresses[name]} {name}" for name in NAMES)]
        names.write_text("\n".join(lines) + "\n")
        self.both = []
        for name in NAMES:
            disk = root / f"disk-of-{name}"
            disk.mkdir()
            environment = {"NAME": name, "HOSTS": str(names), "DISK": str(disk)}
            environment |= {"FOLDER": str(self.folder), "GLOO_SOCKET_IFNAME": f"{tag}{name[0]}"}
            self.both.append(Host(name, f"{tag}-{name}", addresses[name], environment))
        self.alpha, self.beta = self.both
        self._devices = [f"{tag}{name[0]}" for name in NAMES]

    def open(self) -> None:
        """Make the namespaces and the link."""
        for host in self.both:
            _sudo(f"ip netns add {host.namespace}")
        first, second = self._devices
        _sudo(
            f"ip link add {first} netns {self.alpha.namespace} type veth"
            f" peer name {second} netns {self.beta.namespace}"
        )
        for host, device in zip(self.both, self._devices):
            self._run(host, f"ip addr add {host.address}/24 dev {device}")
            self._run(host, f"ip link set {device} up")
            self._run(host, "ip link set lo up")

    def cut(self) -> None:
        """Let no packet pass any more, and tell neither side: all go to a card that is nowhere."""
        for host, device, other in self._sides():
            self._run(host, f"ip neigh replace {other} lladdr 02:00:00:00:00:99 dev {device}")

    def mend(self) -> None:
        """Undo :meth:`cut`."""
        for host, device, other in self._sides():
            self._run(host, f"ip neigh del {other} dev {device}")

    def pull(self, host: Host) -> None:
        """Take a machine's network card down."""
        self._run(host, f"ip link set {self._devices[self.both.index(host)]} down")

    def slow(self, host: Host) -> str:
        """Make what a machine sends late and lossy, or a trickle where the kernel cannot do that.

        Returns:
            how.
        """
        device = self._devices[self.both.index(host)]
        for how in ("netem delay 80ms 20ms loss 2%", "tbf rate 20mbit burst 16kb latency 400ms"):
            if self._run(host, f"tc qdisc add dev {device} root {how}", check=False) == 0:
                return how
        raise RuntimeError("this kernel has neither netem nor tbf")

    def close(self) -> None:
        """Kill what runs there, and remove it all."""
        for host in self.both:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.kill_all()
            _sudo(f"ip netns del {host.namespace}", check=False)

    def _sides(self) -> Iterator[tuple[Host, str, str]]:
        addresses = [host.address for host in self.both]
        yield from zip(self.both, self._devices, reversed(addresses))

    def _run(self, host: Host, command: str, check: bool = True) -> int:
        return _sudo(f"ip netns exec {host.namespace} {command}", check=check).returncode


@contextlib.contextmanager
def two_hosts(root: Path) -> Iterator[Hosts]:
    """Two machines whose files are below a folder, until the end of the body."""
    hosts = Hosts(root)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


def wait_until(is_so, seconds: float = PATIENCE) -> float:  # type: ignore[no-untyped-def]
    """Wait until a function gives something true; how long that took.

    Raises:
        TimeoutError: if it does not.
    """
    start = time.monotonic()
    while not is_so():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"nothing in {seconds:g} seconds")
        time.sleep(0.1)
    return time.monotonic() - start
