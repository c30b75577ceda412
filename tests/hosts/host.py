"""A host for tests: real systemd in a container, over a throw-away copy of this machine's own root.

The disk (a layer on a tmpfs) lasts as long as the Host object: over reboots and power cuts. Everything runs in one
cgroup and vanishes with the test process, even a SIGKILLed one (keeper.py sees to that).

It refuses to be more than it is: the kernel and its clock are this machine's, fsync on its disk proves nothing, and
negative OOMScoreAdjust, MemoryMax and devices of this machine are not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests import pace
from tests.hosts import cgroups, processes
from tests.hosts.disk import IDENTIFY, MASKED, PREPARE, WRITE
from tests.hosts.processes import Process

KEEPER = Path(__file__).with_name("keeper.py")
VENV = "/opt/test-venv"  # inside: this run's virtual environment, read-only
PYTHON = "/opt/test-python"  # inside: its base Python, read-only
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 90.0
RUN_TIMEOUT_S = 30.0


class HostError(AssertionError):
    """The host, or a command in it, did not do what was asked; the message carries what it said."""


def wait_until(condition: Callable[[], object], what: str, timeout: float = 30.0) -> None:
    """Look again and again until it holds. Raises HostError saying `what` never came."""
    deadline = time.monotonic() + pace.wait_s(timeout)
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(f"not within {timeout:g} s: {what}")
        time.sleep(0.02)


def why_not() -> str | None:
    """What this machine lacks for such hosts, as a reason to skip; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "hosts need root"
    for program, package in (("systemd-nspawn", "systemd-container"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"hosts need {program} (Debian's {package})"
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        return "hosts need overlayfs (/proc/filesystems has none)"
    if not cgroups.usable():
        return "hosts need a writable cgroup v2 with cgroup.kill (Linux 5.14)"
    return None


class Caged:
    """What any host can do whose processes are all in one cgroup, `cgroup`."""

    name: str
    cgroup: Path

    def freeze(self) -> None:
        """The whole host stands still, as a paused virtual machine does; clocks go on."""
        self._freeze(True)

    def thaw(self) -> None:
        """And goes on."""
        self._freeze(False)

    def _freeze(self, frozen: bool) -> None:
        cgroups.freeze(self.cgroup, frozen)
        if not cgroups.wait(self.cgroup, "frozen", "1" if frozen else "0", 10):
            raise HostError(f"{self.name} could not be {'frozen' if frozen else 'thawed'}")

    def _end_everything(self) -> None:
        cgroups.kill(self.cgroup)
        if not cgroups.wait(self.cgroup, "populated", "0", 20):
            raise HostError(f"{self.name}: {cgroups.pids(self.cgroup)} outlive a power cut")


class Host(Caged):
    """One host. Entering it boots it, leaving it destroys it. With Harmony on it: harmony_host.HarmonyHost.

    `netns` is a network namespace that the host joins, by name (in /run/netns) or path; without one it has a loopback.
    `wanted` are units that are enabled although hosts have them masked otherwise ("postgresql.service").
    `like` is a host that is switched off: this one gets a copy of its disk, with a name and machine-id of its own.
    """

    def __init__(
        self,
        name: str = "host",
        *,
        netns: str | None = None,
        wanted: Sequence[str] = (),
        like: Host | None = None,
    ) -> None:
        if like is not None and like.running:
            raise HostError(f"{like.name} must be switched off before its disk is copied")
        top = cgroups.mount_point()
        assert top is not None
        self.name: str = f"{name}-{secrets.token_hex(4)}"
        self.wanted = tuple(wanted)
        self._base = Path(tempfile.mkdtemp(prefix=f"harmony-host-{self.name}-", dir="/tmp"))
        self._base.chmod(0o755)
        self._root = self._base / "disk" / "root"
        self.cgroup = top / f"harmony-host-{self.name}"
        shadow = cgroups.shadow_mount_point()
        self._leader: int | None = None
        self._runs = 0
        asked = {
            "base": str(self._base),
            "cgroup": str(self.cgroup),
            "shadow": str(shadow / self.cgroup.name) if shadow else None,
            "like": f"/proc/{like._keeper.pid}/root{like._base}/disk/upper" if like else None,
            "parent": os.getpid(),
            "nspawn": self._nspawn(netns),
        }
        argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-I", str(KEEPER)]
        self._keeper: subprocess.Popen[bytes] = subprocess.Popen(
            [*argv, json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the tests, which then destroy in order
        )
        try:
            self._answer("ready")
            if like is None:
                masked = [unit for unit in MASKED if unit not in self._unmasked()]
                self.run(["sh", "-c", PREPARE, " ".join(masked), " ".join(self.wanted)])
            self.run(["sh", "-c", IDENTIFY, self.name, secrets.token_hex(16)])
        except BaseException:
            self.destroy()
            raise

    def _nspawn(self, netns: str | None) -> list[str]:
        network = f"--network-namespace-path={Path('/run/netns') / netns}" if netns else "--private-network"
        binds = [f"--bind-ro={sys.prefix}:{VENV}"]
        if not sys.base_prefix.startswith("/usr"):  # else the host has it already
            binds.append(f"--bind-ro={sys.base_prefix}:{PYTHON}")
        return [
            *("systemd-nspawn", "--quiet", f"--directory={self._root}", f"--machine={self.name}", "--boot"),
            *("--register=no", "--keep-unit", "--notify-ready=yes", "--console=read-only", network, *binds),
            *("--link-journal=no", "--resolv-conf=off", "--timezone=off"),
            # As on real hosts, where nspawn is careful by default: mlockall, rules of a firewall, and device
            # policies of units, which systemd keeps by bpf.
            "--capability=CAP_IPC_LOCK,CAP_NET_ADMIN,CAP_BPF",
            "--system-call-filter=bpf",
            "systemd.unit=multi-user.target",
        ]

    def _unmasked(self) -> set[str]:
        templates = {f"{unit.partition('.')[0]}@.service" for unit in self.wanted}
        return {*self.wanted, *templates}

    def _answer(self, expected: str, timeout_s: float = 20.0) -> str:
        """The keeper's next line. Raises HostError with its last words when it is another one."""
        assert self._keeper.stdout is not None
        assert self._keeper.stderr is not None
        ready, _, _ = select.select([self._keeper.stdout], [], [], timeout_s)
        line = self._keeper.stdout.readline().decode().strip() if ready else ""
        if not line.startswith(expected):
            ended = self._keeper.poll() is not None
            said = self._keeper.stderr.read().decode() if ready or ended else "(nothing)"
            raise HostError(f"{self.name}: the keeper said {line!r}, not {expected!r}: {said}")
        return line

    @property
    def leader(self) -> int | None:
        """Its systemd, as this machine numbers it, while it runs: what enters its namespaces enters by this."""
        return self._leader

    # ------------------------------------------------------------ power

    @property
    def running(self) -> bool:
        """Whether it is switched on: booting, running, frozen or shutting down."""
        return self.cgroup.exists() and cgroups.state(self.cgroup, "populated") == "1"

    def boot(self, timeout: float = BOOT_TIMEOUT_S) -> None:
        """Switch it on and wait until systemd says that it is running (or degraded)."""
        if self.running:
            raise HostError(f"{self.name} runs already")
        cgroups.freeze(self.cgroup, False)
        cgroups.remove_below(self.cgroup)
        deadline = time.monotonic() + pace.wait_s(timeout)
        notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notified.bind(str(self._base / "notify"))
        try:
            assert self._keeper.stdin is not None
            self._keeper.stdin.write(b"boot\n")
            self._keeper.stdin.flush()
            manager = os.pidfd_open(int(self._answer("started").split()[1]))
            try:
                self._leader = self._await_ready(notified, manager, deadline)
            finally:
                os.close(manager)
        finally:
            # Nobody reads it from here on: with its queue full nspawn, and then the host's systemd, would wait.
            notified.close()
            (self._base / "notify").unlink()
        left = max(1.0, deadline - time.monotonic())
        state = self.systemctl("is-system-running", "--wait", check=False, timeout=left).stdout.strip()
        if state not in {"running", "degraded"}:
            raise HostError(f"{self.name} is {state!r} after its boot: {self.console()}")

    def _await_ready(self, notified: socket.socket, manager: int, deadline: float) -> int:
        """The leader's pid, once the host's systemd has notified its readiness through nspawn."""
        leader = 0
        poller = select.poll()
        poller.register(notified, select.POLLIN)
        poller.register(manager, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            found = [fd for fd, _ in poller.poll(left * 1000)]
            if notified.fileno() in found:
                said = dict(line.partition("=")[::2] for line in notified.recv(65536).decode().splitlines())
                leader = int(said.get("X_NSPAWN_LEADER_PID", leader))
                if said.get("READY") == "1" and leader:
                    return leader
            elif manager in found:
                raise HostError(f"{self.name} ended while booting: {self.console()}")
        raise HostError(f"{self.name} has not booted in time: {self.console()}")

    def power_off(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """`systemctl poweroff`, until nothing of the host runs any more."""
        self.systemctl("poweroff", check=False)
        if not cgroups.wait(self.cgroup, "populated", "0", timeout):
            raise HostError(f"{self.name} has not shut down within {timeout:g} s: {self.console()}")
        self._switched_off()

    def reboot(self) -> None:
        """A clean one: shutdown by systemd, then a new boot from the same disk."""
        self.power_off()
        self.boot()

    def power_cut(self) -> None:
        """Everything stops at once, without a word; the disk stays as it is. `boot` follows."""
        self._end_everything()
        self._switched_off()

    def _switched_off(self) -> None:
        self._leader = None
        cgroups.freeze(self.cgroup, False)

    def destroy(self) -> None:
        """Remove it: processes, cgroup, mounts, disk. May be called twice."""
        for stream in (self._keeper.stdin, self._keeper.stdout, self._keeper.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._keeper.wait(40)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        left = [str(path) for path in (self.cgroup, self._base) if path.exists()]
        if left:
            raise HostError(f"{self.name} left behind: {', '.join(left)}")

    def __enter__(self) -> Self:
        """Boot it (a host that does not boot is destroyed)."""
        try:
            self.boot()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    # ------------------------------------------------------------ commands and files

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = RUN_TIMEOUT_S,
        user: str | None = None,
        stdin: bytes = b"",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host, as root or `user`, in a clean environment and in no unit.

        On a host that is switched off it runs on the bare disk (no /proc, nothing mounted). Raises HostError with
        the command's words when it fails (unless check=False) or is not done in time; then all it started is killed.
        """
        self._runs += 1
        cgroup = self.cgroup / f"run-{self._runs}"
        cgroup.mkdir()
        inside = [*("env", "-i", f"PATH={PATH}", "HOME=/", "LANG=C.UTF-8"), *argv]
        if user is not None:
            as_user = 'exec setpriv --reuid "$0" --regid "$(id -g "$0")" --init-groups -- "$@"'
            inside = ["sh", "-c", as_user, user, *inside]
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        with subprocess.Popen(
            ["sh", "-c", join, str(cgroup), *self._enter(), *inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        ) as process:
            try:
                out, err = process.communicate(stdin, timeout)
            except BaseException as error:
                cgroups.kill(cgroup)
                out, err = process.communicate()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                said = (out + err).decode(errors="replace")[-2000:]
                raise HostError(
                    f"{self.name}: {_short(argv)}: not done within {timeout:g} s: {said}"
                ) from None
        with contextlib.suppress(OSError):  # what the command left running stays
            cgroup.rmdir()
        done = subprocess.CompletedProcess(
            list(argv), process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
        )
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise HostError(f"{self.name}: {_short(argv)}: exited {done.returncode}: {said}")
        return done

    def _enter(self) -> list[str]:
        if self._leader is not None:
            return ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        return ["nsenter", "-t", str(self._keeper.pid), "-m", "--", "chroot", str(self._root)]

    def systemctl(
        self, *arguments: str, check: bool = True, timeout: float = RUN_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """systemctl in the host."""
        return self.run(["systemctl", "--no-pager", *arguments], check=check, timeout=timeout)

    def show(self, unit: str, key: str) -> str:
        """One property of a unit: show("harmony", "MainPID")."""
        return self.systemctl("show", "--value", f"--property={key}", unit).stdout.strip()

    def journal(self, unit: str, lines: int = 60) -> str:
        """The end of a unit's log, for messages."""
        argv = ["journalctl", "--no-pager", "--quiet", "--output=short-precise", f"--lines={lines}"]
        return self.run([*argv, f"--unit={unit}"], check=False).stdout

    def console(self) -> str:
        """The end of what the container's manager and its console said."""
        return (self._base / "console.log").read_text(errors="replace")[-3000:]

    def write(self, path: str, content: str | bytes, mode: int = 0o644, owner: str = "root:root") -> None:
        """Write a file whole (made beside it, then renamed), folders included; also while it is switched off."""
        data = content.encode() if isinstance(content, str) else content
        self.run(["sh", "-c", WRITE, path, f"{mode:o}", owner], stdin=data)

    def read(self, path: str) -> str:
        """A file's text; also while the host is switched off."""
        return self.run(["cat", "--", path]).stdout

    # ------------------------------------------------------------ processes

    def processes(self, name: str) -> list[Process]:
        """The processes that go by this name: the program's, or the script's or module's that Python runs."""
        return processes.find(self.cgroup / "payload", name)

    def pids(self, name: str) -> list[int]:
        """Their numbers as the host sees them: `run(["kill", …])`, /proc inside."""
        return [process.pid for process in self.processes(name)]

    def signal(self, name: str, number: signal.Signals) -> int:
        """Signal every process of that name; returns how many there were."""
        found = self.processes(name)
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.outside_pid, number)
        return len(found)


def _short(argv: Sequence[str]) -> str:
    return " ".join(argv)[:200].replace("\n", "; ")
