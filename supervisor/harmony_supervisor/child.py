"""One supervised child: started, pinged, killed when it hangs, started again with back-off.

It knows nothing of what the child does. Death is seen through a pidfd, liveness by pongs on a socketpair.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import trio

EXIT_CONFIG = 78
NO_START_S = 0.2
KILLED_S = 0.2
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 5.0
STEADY_S = 30.0
AGENT_NICE = -10
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
log = structlog.get_logger("supervisor")


@dataclass(frozen=True)
class Spec:
    """What to start and how. `die_with_us`: the kernel kills it when the supervisor dies.

    `steady`: it inherits our real-time scheduling; else it gets ordinary scheduling, somewhat favoured.
    Killed and started again when it has not answered for `ping_timeout_s`.
    """

    name: str
    argv: Sequence[str]
    ping_interval_s: float
    ping_timeout_s: float
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    die_with_us: bool = False
    steady: bool = False
    ready_timeout_s: float = 30.0
    again_timeout_s: float = 30.0  # the same, when an earlier one of ours has ended


def heard_at(last_pong: float, now: float, overslept_s: float) -> float:
    """When the child's silence began. While we did not run ourselves (a paused host, a busy one) it proves nothing."""
    return min(now, last_pong + overslept_s)


@dataclass
class Child:
    """`run()` keeps it alive until `stop()`; `on_change` is called when readiness or status changes."""

    spec: Spec
    on_change: Callable[[], None]
    ready: bool = False
    status: str = "starting"
    deaths: list[float] = field(default_factory=list)
    starts: int = 0  # that have come to an end
    stuck: bool = False  # killed, and not dead: it waits in the kernel, for a hung disk
    last_pong: float = 0.0
    _process: subprocess.Popen[bytes] | None = None
    _stopping: bool = False
    _has_started: trio.Event = field(default_factory=trio.Event)

    @property
    def answering(self) -> bool:
        """Ready, and it has answered a ping within the timeout."""
        return self.ready and time.monotonic() - self.last_pong < self.spec.ping_timeout_s

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def wait_started(self) -> None:
        await self._has_started.wait()

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        environment = {k: os.environ[k] for k in ("PATH", "LANG", "LC_ALL", "TZ") if k in os.environ}
        die_with_us, steady = self.spec.die_with_us, self.spec.steady
        mine = os.getpid()

        def before_exec() -> None:
            # Popen is called from the main thread, which lives as long as we do: the death signal is
            # sent when the thread that forked ends. libc's handle was made before the fork.
            if die_with_us:
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != mine:
                    os._exit(1)
            if not steady:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

        try:
            process = subprocess.Popen(
                [*self.spec.argv, "--supervisor-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd="/",
                user=self.spec.uid,
                group=self.spec.gid,
                extra_groups=list(self.spec.groups) if self.spec.uid is not None else None,
                start_new_session=True,
                preexec_fn=before_exec,  # noqa: PLW1509 (one thread, two system calls)
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if not steady and os.geteuid() == 0:
            with contextlib.suppress(OSError):  # favoured where that is allowed; it may be dead already
                os.setpriority(os.PRIO_PROCESS, process.pid, AGENT_NICE)
                # Where its session is a group of its own to the scheduler (outside of systemd's units), that counts.
                Path(f"/proc/{process.pid}/autogroup").write_text(str(AGENT_NICE))
        return process, ours

    async def run(self) -> int:
        """Until stopped (0), or the child says that a restart will not help (78)."""
        backoff = 0.0
        while not self._stopping:
            began = time.monotonic()
            self.ready, self.status, self.stuck = False, "starting", False
            self.on_change()
            try:
                process, sock = self._start()
            except (OSError, subprocess.SubprocessError) as e:  # no process, descriptor or memory is left
                log.critical("cannot be started", child=self.spec.name, why=str(e))
                self._count_death()
                await trio.sleep(NO_START_S)
                continue
            self._process = process
            self._has_started.set()
            log.info("started", child=self.spec.name, pid=process.pid)
            code = await self._tend(process, sock)
            self._process, self.ready = None, False
            self.on_change()
            if self._stopping:
                break
            lived = time.monotonic() - began
            log.error("child died", child=self.spec.name, exit_code=code, lived_s=round(lived, 2))
            if code == EXIT_CONFIG:
                return EXIT_CONFIG
            self._count_death()
            if lived > STEADY_S:
                backoff = 0.0
            if backoff:
                await trio.sleep(backoff)
            backoff = min(BACKOFF_MOST_S, max(BACKOFF_FIRST_S, backoff * 2)) if lived < 10 else 0.0
        return 0

    def _count_death(self) -> None:
        self.starts += 1
        self.deaths = [t for t in self.deaths if t > time.monotonic() - STEADY_S] + [time.monotonic()]

    async def _tend(self, process: subprocess.Popen[bytes], sock: socket.socket) -> int:
        """Until the process has ended; its exit code."""
        fd = os.pidfd_open(process.pid)
        try:
            async with trio.open_nursery() as nursery:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
                nursery.start_soon(self._listen, stream)
                nursery.start_soon(self._ping, stream, process)
                await trio.lowlevel.wait_readable(fd)
                nursery.cancel_scope.cancel()
        finally:
            os.close(fd)
            sock.close()
        return process.wait()

    async def _listen(self, stream: trio.SocketStream) -> None:
        buffer = b""
        try:
            async for chunk in stream:
                *lines, buffer = (buffer + chunk)[-4096:].split(b"\n")
                for line in lines:
                    self._heard(line[:256].decode("ascii", "replace"))
        except trio.BrokenResourceError:
            return

    def _heard(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        self.last_pong = time.monotonic()
        if word == "ready":
            self.ready = True
            log.info("ready", child=self.spec.name, pid=self.pid)
        elif word == "status":
            self.status = rest
        self.on_change()

    async def _ping(self, stream: trio.SocketStream, process: subprocess.Popen[bytes]) -> None:
        interval_s, timeout_s = self.spec.ping_interval_s, self.spec.ping_timeout_s
        number, began = 0, time.monotonic()
        while True:
            number += 1
            try:
                with trio.move_on_after(interval_s):
                    await stream.send_all(b"ping %d\n" % number)
            except trio.BrokenResourceError:
                pass  # its death is seen through the pidfd
            asleep = time.monotonic()
            await trio.sleep(interval_s)
            now = time.monotonic()
            self.last_pong = heard_at(self.last_pong, now, now - asleep - interval_s)
            await trio.lowlevel.checkpoint()  # what it has said meanwhile is read first
            if self.ready:
                late, what = now - self.last_pong > timeout_s, f"no answer to pings for {timeout_s:g} s"
            else:
                patience_s = self.spec.ready_timeout_s if self.starts == 0 else self.spec.again_timeout_s
                late, what = now - began > patience_s, f"not ready within {patience_s:g} s"
            if late:
                log.error("killing a child that hangs", child=self.spec.name, pid=process.pid, why=what)
                process.kill()
                await trio.sleep(KILLED_S)  # ended by then: this task is cancelled
                log.critical("killed, and not dead", child=self.spec.name, pid=process.pid)
                self.stuck = True
                return

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL after `timeout_s`; returns when it has ended."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        process.terminate()
        with trio.move_on_after(timeout_s):
            while process.poll() is None:
                await trio.sleep(0.02)
        if process.poll() is None:
            log.error("did not stop in time; killing", child=self.spec.name, pid=process.pid)
            process.kill()
            while process.poll() is None:
                await trio.sleep(0.02)
