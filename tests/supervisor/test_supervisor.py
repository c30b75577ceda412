"""The supervisor with real child processes: small scripts in the places of agent and fencer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from harmony_supervisor.child import Spec
from harmony_supervisor.main import _folders as folders
from harmony_supervisor.notify import Notifier
from harmony_supervisor.supervisor import Settings, Supervisor
from tests import pace

pytestmark = pytest.mark.real

CHILD = textwrap.dedent("""
    import os, signal, socket, sys, time
    name, folder, mode = sys.argv[1:4]
    fd = int(sys.argv[sys.argv.index("--supervisor-fd") + 1])
    def note(text):
        with open(f"{folder}/{name}", "a") as f:
            f.write(f"{text} {os.getpid()} {time.monotonic()}\\n")
    def end(*_):
        note("term")
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    note("start")
    if mode == "dies":
        sys.exit(3)
    if mode == "config":
        while not os.path.exists(f"{folder}/fencer"):  # on a busy machine it starts later: it is to be seen ending
            time.sleep(0.01)
        sys.exit(78)
    s = socket.socket(fileno=fd)
    s.sendall(b"ready x\\nstatus fine\\n")
    while True:
        data = s.recv(1000)
        if not data:
            note("eof")
            time.sleep(60 if mode == "stays" else 0)
            sys.exit(0)
        for line in data.split(b"\\n"):
            if line.startswith(b"ping "):
                s.sendall(b"pong" + line[4:] + b"\\n")
""")


class Run:
    """One supervisor over scripts; `notes(name)` is what a child wrote down: (what, pid)."""

    def __init__(self, folder: Path, *, fencer: str = "", agent: str = "", emergency: int = 0) -> None:
        self.folder = folder
        script = folder / "child.py"
        script.write_text(CHILD)
        once = folder / "once.py"
        once.write_text(f"open({str(folder / 'once')!r}, 'a').write('x')\nraise SystemExit({emergency})\n")

        def spec(name: str, mode: str) -> Spec:
            argv = [sys.executable, "-I", str(script), name, str(folder), mode]
            return Spec(name, argv, 0.05, 0.5, die_with_us=name == "agent", ready_timeout_s=5)

        self.supervisor = Supervisor(
            Settings("n1", 0.5, 1.0),
            spec("fencer", fencer),
            spec("agent", agent),
            [sys.executable, "-I", str(once)],
            Notifier(),
        )

    def notes(self, name: str) -> list[tuple[str, int]]:
        path = self.folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]

    def time_of(self, name: str, what: str) -> float:
        return next(
            float(line.split()[2])
            for line in (self.folder / name).read_text().splitlines()
            if line.startswith(what)
        )

    async def run_until(self, condition: Callable[[], bool], then: Callable[[], None] | None = None) -> int:
        """Run; once `condition` holds, stop it as systemd would."""

        async def watch(scope: trio.CancelScope) -> None:
            with trio.fail_after(20):
                while not condition():
                    await trio.sleep(0.02)
            if then is not None:
                then()
            else:
                os.kill(os.getpid(), signal.SIGTERM)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            return await self.supervisor.run()
        raise AssertionError("unreachable")

    def ready(self) -> bool:
        return self.supervisor.fencer.ready and self.supervisor.agent.ready


async def test_starts_in_order_and_stops_in_order(tmp_path: Path) -> None:
    """O1: the fencer first at the start, last at the end."""
    run = Run(tmp_path)
    assert await run.run_until(run.ready) == 0
    started = {name: run.notes(name)[0][1] for name in ("fencer", "agent")}
    assert started["fencer"] < started["agent"], (
        "by their pids: whose first line runs first is the host's business"
    )
    assert run.time_of("agent", "term") < run.time_of("fencer", "term")


@pytest.mark.parametrize("name", ["agent", "fencer"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_hung_child_is_replaced(tmp_path: Path, name: str, number: signal.Signals) -> None:
    """W9: killed and started again; a hung one after ping_timeout."""
    run = Run(tmp_path)
    hit = False

    def again() -> bool:
        nonlocal hit
        if run.ready() and not hit:
            hit = True
            os.kill(run.notes(name)[0][1], number)
        starts = [n for n in run.notes(name) if n[0] == "start"]
        return len(starts) == 2 and run.ready()

    assert await run.run_until(again) == 0


async def test_configuration_errors_end_everything(tmp_path: Path) -> None:
    """78 is not restarted."""
    run = Run(tmp_path, agent="config")
    with trio.fail_after(30):
        assert await run.supervisor.run() == 78
    assert len([n for n in run.notes("agent") if n[0] == "start"]) == 1
    assert ("term") in {n[0] for n in run.notes("fencer")}


async def test_a_fencer_that_keeps_dying_leads_to_the_emergency_fence(tmp_path: Path) -> None:
    """Proven by the one-shot: exit 1, systemd starts everything anew."""
    run = Run(tmp_path, fencer="dies")
    with trio.fail_after(20):
        assert await run.supervisor.run() == 1
    assert (tmp_path / "once").exists()


async def test_an_unproven_emergency_fence_is_tried_again(tmp_path: Path) -> None:
    """I6: never given up while not proven."""
    run = Run(tmp_path, fencer="dies", emergency=1)
    tries = tmp_path / "once"
    assert await run.run_until(lambda: tries.exists() and len(tries.read_text()) >= 2) == 0


async def test_a_fencer_that_refuses_its_configuration_is_fenced_for_before_the_end(tmp_path: Path) -> None:
    """W9, O1: nobody guards PostgreSQL when everything stops: 78 comes after the one-shot's proof."""
    run = Run(tmp_path, fencer="config")
    with trio.fail_after(20):
        assert await run.supervisor.run() == 78
    assert (tmp_path / "once").exists()


async def test_without_that_proof_it_does_not_end(tmp_path: Path) -> None:
    """I6: it tries again and again, until it is asked to stop."""
    run = Run(tmp_path, fencer="config", emergency=1)
    tries = tmp_path / "once"
    assert await run.run_until(lambda: tries.exists() and len(tries.read_text()) >= 2) == 0


async def test_a_fencer_that_cannot_be_started_leads_to_the_emergency_fence(tmp_path: Path) -> None:
    """W9: no process, descriptor or memory is left for it: as if it had died."""
    run = Run(tmp_path)
    fencer = run.supervisor.fencer
    fencer.spec = replace(fencer.spec, argv=["/nonexistent/fencer"])
    with trio.fail_after(20):
        assert await run.supervisor.run() == 1
    assert (tmp_path / "once").exists()


async def test_an_agent_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    """W9: the fencer stays, and is not fenced for."""
    run = Run(tmp_path)
    agent, argv = run.supervisor.agent, run.supervisor.agent.spec.argv
    agent.spec = replace(agent.spec, argv=["/nonexistent/agent"])

    def repaired() -> bool:
        if agent.starts == 4:
            agent.spec = replace(agent.spec, argv=argv)
        return run.ready()

    assert await run.run_until(repaired) == 0
    assert not (tmp_path / "once").exists()
    assert len([n for n in run.notes("fencer") if n[0] == "start"]) == 1


async def test_an_emergency_fence_that_cannot_be_run_is_tried_again(tmp_path: Path) -> None:
    """W9: the supervisor does not end by it; once it can be run, it is."""
    run = Run(tmp_path, fencer="dies")
    once = list(run.supervisor._emergency)
    run.supervisor._emergency = ["/nonexistent/once"]

    async def repair() -> None:
        await trio.sleep(1.5)
        assert not (tmp_path / "once").exists()
        run.supervisor._emergency = once

    async with trio.open_nursery() as nursery:
        nursery.start_soon(repair)
        with trio.fail_after(20):
            assert await run.supervisor.run() == 1
    assert (tmp_path / "once").exists()


class Unkillable:
    """A process can be made to wait in the kernel, where SIGKILL does not end it (as in state D for a hung disk):
    by cgroup v1's freezer."""

    def __init__(self) -> None:
        self._group = Path(f"/sys/fs/cgroup/freezer/harmony-test-{os.getpid()}")
        try:
            self._group.mkdir()
        except OSError as e:
            pytest.skip(f"needs cgroup v1's freezer: {e}")

    def __enter__(self) -> Unkillable:
        self._at_last = threading.Timer(15, self.thaw)  # a test that fails must come to its end
        self._at_last.start()
        return self

    def freeze(self, pid: int) -> None:
        (self._group / "cgroup.procs").write_text(str(pid))
        (self._group / "freezer.state").write_text("FROZEN")

    def thaw(self) -> None:
        (self._group / "freezer.state").write_text("THAWED")

    def __exit__(self, *_: object) -> None:
        self._at_last.cancel()
        self.thaw()
        until = time.monotonic() + pace.wait_s(5)
        while time.monotonic() < until and (self._group / "cgroup.procs").read_text():
            time.sleep(0.01)
        self._group.rmdir()


async def test_a_fencer_that_is_killed_and_does_not_die_is_fenced_for(tmp_path: Path) -> None:
    """W9: it hangs in the kernel with the lease: the one-shot fences beside it, again and again, and the
    supervisor does not end (a new one's fencer would wait for the lock). When it dies it is replaced."""
    run, tries = Run(tmp_path), tmp_path / "once"
    once = tmp_path / "once.py"  # so slow that the fencer dies during the second one
    slow = "import time\ntime.sleep(0.7)\n"
    once.write_text(once.read_text().replace("raise", f"{slow}raise"))
    with Unkillable() as hung:
        phases = iter(["hang", "fenced", "replaced"])
        phase = next(phases)

        def through_it_all() -> bool:
            nonlocal phase
            stuck = run.supervisor.fencer.stuck
            if phase == "hang" and run.ready():
                hung.freeze(run.notes("fencer")[0][1])
                phase = next(phases)
            elif phase == "fenced" and stuck and tries.exists() and len(tries.read_text()) >= 2:
                hung.thaw()
                phase = next(phases)
            starts = [n for n in run.notes("fencer") if n[0] == "start"]
            if phase != "replaced" or len(starts) < 2 or not run.ready() or stuck:
                return False
            return time.time() - tries.stat().st_mtime > 1  # the one-shot has ended, too

        assert await run.run_until(through_it_all) == 0


async def test_an_error_of_its_own_ends_the_supervisor(tmp_path: Path) -> None:
    """O1: not for ever in waiting for children that nobody looks after any more; systemd starts it again."""
    run = Run(tmp_path)

    class Unexpected(Exception):
        pass

    class Failing(Notifier):
        def send(self, text: str) -> None:
            if text == "READY=1":
                raise Unexpected

    run.supervisor._notifier = Failing()
    with trio.fail_after(15), pytest.raises(BaseExceptionGroup) as raised:
        await run.supervisor.run()
    assert raised.group_contains(Unexpected)
    assert not any(alive(pid) for name in ("agent", "fencer") for _, pid in run.notes(name))


async def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """READY only with both; the watchdog only while both answer."""
    address = str(tmp_path / "n.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        told: list[str] = []

        def drain() -> list[str]:
            while True:
                try:
                    told.append(sock.recv(4096).decode())
                except BlockingIOError:
                    return told

        run = Run(tmp_path)
        assert "NOTIFY_SOCKET" not in os.environ
        assert await run.run_until(lambda: run.ready() and drain().count("WATCHDOG=1") > 3) == 0
        drain()
        assert told.count("READY=1") == 1
        assert any(line.startswith("STATUS=n1: agent fine; fencer fine") for line in told)
        assert told[-1] == "STOPPING=1" or "STOPPING=1" in told


def test_a_killed_supervisor_takes_the_agent_with_it_and_not_the_fencer(tmp_path: Path) -> None:
    """The kernel kills the agent; the fencer sees the end of the line and stays."""
    code = (
        "import sys, trio; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from tests.supervisor.test_supervisor import Run\n"
        "trio.run(Run(Path(sys.argv[2]), fencer='stays', agent='stays').supervisor.run)\n"
    )
    top = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code, top, str(tmp_path)], cwd=top, stderr=subprocess.DEVNULL
    )
    fencer = 0
    try:
        until = time.monotonic() + pace.wait_s(15)
        while time.monotonic() < until and not (
            (tmp_path / "agent").exists() and (tmp_path / "agent").read_text()
        ):
            time.sleep(0.02)
        time.sleep(0.3)
        agent = int((tmp_path / "agent").read_text().split()[1])
        fencer = int((tmp_path / "fencer").read_text().split()[1])
        process.kill()
        process.wait()
        until = time.monotonic() + pace.wait_s(5)
        while time.monotonic() < until and (alive(agent) or "eof" not in (tmp_path / "fencer").read_text()):
            time.sleep(0.02)
        assert not alive(agent)
        assert alive(fencer)
        assert "eof" in (tmp_path / "fencer").read_text()
    finally:
        process.kill()
        process.wait()
        if fencer and alive(fencer):
            os.kill(fencer, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_agent_gets_a_folder_that_only_it_may_read(tmp_path: Path) -> None:
    """What it remembers of the store survives reboots; the fencer's folder may be entered and not listed."""
    owner = (65534, 65534) if os.geteuid() == 0 else None
    for _ in range(2):  # also over what is there
        folders(tmp_path / "run", tmp_path / "state", owner)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o711
    made = (tmp_path / "state" / "agent").stat()
    assert made.st_mode & 0o777 == 0o700
    assert made.st_uid == (owner[0] if owner is not None else os.geteuid())
