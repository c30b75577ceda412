"""The supervisor with real child processes: small scripts in the places of agent and fencer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from harmony_supervisor.child import Spec
from harmony_supervisor.notify import Notifier
from harmony_supervisor.supervisor import Settings, Supervisor

pytestmark = pytest.mark.real

CHILD = textwrap.dedent("""
    import os, signal, socket, sys, time
    name, folder, mode = sys.argv[1:4]
    fd = int(sys.argv[sys.argv.index("--supervisor-fd") + 1])
    def note(text):
        with open(f"{folder}/{name}", "a") as f:
            f.write(f"{text} {os.getpid()} {time.monotonic()}\\n")
    note("start")
    if mode == "dies":
        sys.exit(3)
    if mode == "config":
        sys.exit(78)
    def end(*_):
        note("term")
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
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
    assert run.time_of("fencer", "start") < run.time_of("agent", "start")
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
        "trio.run(Run(Path(sys.argv[2]), fencer='stays').supervisor.run)\n"
    )
    top = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code, top, str(tmp_path)], cwd=top, stderr=subprocess.DEVNULL
    )
    fencer = 0
    try:
        until = time.monotonic() + 15
        while time.monotonic() < until and not (
            (tmp_path / "agent").exists() and (tmp_path / "agent").read_text()
        ):
            time.sleep(0.02)
        time.sleep(0.3)
        agent = int((tmp_path / "agent").read_text().split()[1])
        fencer = int((tmp_path / "fencer").read_text().split()[1])
        process.kill()
        process.wait()
        until = time.monotonic() + 5
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
