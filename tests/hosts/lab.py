"""A lab: light hosts joined by a switch. Each is a network namespace and a cgroup; processes are started in it.

No systemd boots in them: up in a quarter of a second, where host.Host (a real boot) takes two. A host can be frozen
whole, lose its power (the disk stays), be cut off both ways or one way, and have a slow or lossy cable. All vanishes
with the test process, even a SIGKILLed one (lab_keeper.py sees to that).

It refuses to be more than it is: hosts share this machine's kernel, clock, process numbers, users and root directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from tests.hosts import cgroups, processes
from tests.hosts.host import PATH, Caged, HostError
from tests.hosts.processes import TOP, Process
from tests.hosts.relay import Way

NETWORK = "10.77.0"
READY_TIMEOUT_S = 20.0
RUN_TIMEOUT_S = 60.0
CLONE_NEWNET = 0x40000000
NEEDED = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "bridge": "iproute2",
}
Answer = TypeVar("Answer")


class Held(msgspec.Struct, frozen=True):
    """The keeper's answer: pids of those who hold a network namespace each."""

    switch: int
    hosts: dict[str, int]


def why_not() -> str | None:
    """What this machine lacks for a lab, in words; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "a lab of hosts needs root"
    for program, package in NEEDED.items():
        if shutil.which(program) is None:
            return f"a lab of hosts needs {program} (Debian's {package})"
    if not cgroups.usable():
        return "a lab of hosts needs a writable cgroup v2 with cgroup.kill (Linux 5.14)"
    return None


class Light(Caged):
    """One host of a lab: switched on from the start, with nothing running."""

    def __init__(self, lab: Lab, name: str, address: str, holder: int) -> None:
        self.name = name
        self.address = address
        self.folder = lab.base / name  # its disk; outlives power cuts
        self.cgroup = lab.cgroup / name
        self.holder = holder
        self._lab = lab
        self._relay: subprocess.Popen[bytes] | None = None

    # ------------------------------------------------------------ processes

    def start(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        user: str | None = None,
        environment: Mapping[str, str] | None = None,
        outside: bool = False,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the host; `outside`: in its network only, unmoved by power cuts and freezes."""
        cgroup = self._lab.cgroup / "outside" if outside else self.cgroup
        with log.open("ab") as out:
            process = subprocess.Popen(
                self._argv(argv, cgroup, user, environment),
                stdin=stdin,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=TOP if outside else "/",
                start_new_session=True,
            )
        self._lab.started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = RUN_TIMEOUT_S,
        user: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the host to its end. Raises HostError with its words."""
        full = self._argv(argv, self.cgroup, user, environment)
        try:
            done = subprocess.run(
                full,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout,
                cwd="/",
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise HostError(f"{self.name}: {argv[0]}: not done within {timeout:g} s") from None
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise HostError(f"{self.name}: {' '.join(argv)[:200]}: exited {done.returncode}: {said}")
        return done

    def _argv(
        self, argv: Sequence[str], cgroup: Path, user: str | None, environment: Mapping[str, str] | None
    ) -> list[str]:
        settings = [f"{key}={value}" for key, value in (environment or {}).items()]
        clean = ["env", "-i", f"PATH={PATH}", "HOME=/", "LANG=C.UTF-8", *settings]
        group = str(pwd.getpwnam(user).pw_gid) if user else ""
        as_user = ["setpriv", "--reuid", user, "--regid", group, "--init-groups", "--"] if user else []
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        enter = ["nsenter", "-t", str(self.holder), "-m", "-i", "-n", "--"]
        return ["sh", "-c", join, str(cgroup), *enter, *clean, *as_user, *argv]

    def processes(self, name: str) -> list[Process]:
        """The processes that go by this name: the program's, or the script's or module's that Python runs."""
        return processes.find(self.cgroup, name)

    def signal(self, name: str, number: signal.Signals) -> int:
        """Signal every process of that name; returns how many there were."""
        found = self.processes(name)
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.outside_pid, number)
        return len(found)

    def in_net(self, do: Callable[[], Answer]) -> Answer:
        """Call it in a thread of this process that is in the host's network."""
        with ThreadPoolExecutor(1, initializer=_enter, initargs=(self.holder,)) as pool:
            return pool.submit(do).result()

    # ------------------------------------------------------------ power

    @property
    def running(self) -> bool:
        """Whether anything runs in it, frozen or not."""
        return cgroups.state(self.cgroup, "populated") == "1"

    def power_cut(self) -> None:
        """Everything stops at once and sends nothing more; the disk stays as it is. `power_on` follows."""
        self.cut()
        self._end_everything()

    def power_on(self) -> None:
        """On the network again, with nothing running yet."""
        cgroups.freeze(self.cgroup, False)
        cgroups.remove_below(self.cgroup)
        self.heal()

    # ------------------------------------------------------------ cable and disk

    def cut(self) -> None:
        """Nothing passes, either way, and nobody is told: the cable itself stays up."""
        self._lab.bridge(self._port, "disabled")

    def heal(self) -> None:
        """The plain cable again."""
        self.forget_relay()
        self._lab.bridge(self._port, "forwarding")

    def forget_relay(self) -> None:
        """End the cable's faults; the lab's end does so, too."""
        if self._relay is not None:
            assert self._relay.stdin is not None
            assert self._relay.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._relay.stdin.close()
            self._relay.wait(10)
            self._relay.stdout.close()
            self._relay = None

    @property
    def _port(self) -> str:
        return f"{'p' if self._relay is None else 't'}-{self.name}"

    def shape(self, to: Way | None = None, from_: Way | None = None) -> None:
        """Faults of the cable, by direction as the host sees it: Way(block=True) is a cut one way. Until `heal`."""
        if self._relay is None:
            argv = [sys.executable, "-m", "tests.hosts.relay", self.name]
            join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
            enter = ["nsenter", "-t", str(self._lab.switch), "-n", "--"]
            self._relay = subprocess.Popen(
                ["sh", "-c", join, str(self._lab.cgroup / "outside"), *enter, *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=TOP,
                start_new_session=True,
            )
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        ways = {"to": asdict(to or Way()), "from": asdict(from_ or Way())}
        self._relay.stdin.write(json.dumps(ways).encode() + b"\n")
        self._relay.stdin.flush()
        if self._relay.stdout.readline() != b"ok\n":
            raise HostError(f"{self.name}: its cable's relay has ended: {self._relay.wait(10)}")

    def freeze_disk(self, frozen: bool) -> None:
        """Its own disk hangs: whoever writes to it waits and cannot even be killed. Needs `disks` of the lab."""
        how = "--freeze" if frozen else "--unfreeze"
        argv = ["nsenter", "-t", str(self.holder), "-m", "--", "fsfreeze", how, str(self.folder / "disk")]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode != 0:
            raise HostError(f"{self.name}: fsfreeze {how}: {done.stderr.strip()}")


def _enter(holder: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{holder}/ns/net").open() as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


class Lab:
    """Hosts by name, up to 200. `disks`: those that get a file system of their own (megabytes) at folder/disk."""

    def __init__(self, names: Sequence[str], *, disks: Mapping[str, int] | None = None) -> None:
        top = cgroups.mount_point()
        assert top is not None
        self.hosts: dict[str, Light] = {}
        self.started: list[subprocess.Popen[bytes]] = []
        token = secrets.token_hex(4)
        self.base = Path(tempfile.mkdtemp(prefix=f"harmony-lab-{token}-", dir="/tmp"))
        self.base.chmod(0o755)
        self.cgroup = top / f"harmony-lab-{token}"
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=11)}
        asked = {
            "base": str(self.base),
            "cgroup": str(self.cgroup),
            "parent": os.getpid(),
            "hosts": addresses,
            "disks": dict(disks or {}),
        }
        argv = [
            "unshare",
            "--ipc",
            "--mount",
            "--propagation",
            "private",
            sys.executable,
            "-m",
            "tests.hosts.lab_keeper",
        ]
        self._keeper: subprocess.Popen[bytes] = subprocess.Popen(
            [*argv, json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=TOP,
            start_new_session=True,
        )
        try:
            held = self._answer()
        except BaseException:
            self.close()
            raise
        self.switch = held.switch
        self.hosts = {name: Light(self, name, addresses[name], held.hosts[name]) for name in names}

    def _answer(self) -> Held:
        assert self._keeper.stdout is not None
        assert self._keeper.stderr is not None
        ready, _, _ = select.select([self._keeper.stdout], [], [], READY_TIMEOUT_S)
        line = self._keeper.stdout.readline() if ready else b""
        if not line:
            ended = bool(ready) or self._keeper.poll() is not None
            said = self._keeper.stderr.read().decode() if ended else "(nothing)"
            raise HostError(f"no lab: its keeper said {said}")
        return msgspec.json.decode(line, type=Held)

    def bridge(self, port: str, state: str) -> None:
        """Set the state of a port of the switch: disabled, forwarding."""
        number = {"disabled": "0", "forwarding": "3"}[state]
        argv = [
            "nsenter",
            "-t",
            str(self.switch),
            "-n",
            "bridge",
            "link",
            "set",
            "dev",
            port,
            "state",
            number,
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
        if done.returncode != 0:
            raise HostError(f"bridge {port} {state}: {done.stderr.strip()}")

    def close(self) -> None:
        """Remove it all. May be called twice."""
        for stream in (self._keeper.stdin, self._keeper.stdout, self._keeper.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._keeper.wait(60)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        for process in self.started:
            process.wait(5)
        for host in self.hosts.values():
            host.forget_relay()
        left = [str(path) for path in (self.cgroup, self.base) if path.exists()]
        if left:
            raise HostError(f"the lab left behind: {', '.join(left)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
