"""The fencer's process without a PostgreSQL: lock, supervisor's line, state begun anew, latch, exit codes."""

from __future__ import annotations

import gc
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from harmony_fencer import lease as leases
from harmony_fencer import main
from harmony_fencer import state as states
from harmony_fencer.clock import boot_id, boot_ns
from harmony_fencer.config import FencerConfig
from harmony_fencer.engine import Outcome
from harmony_fencer.protocol import Generation
from harmony_fencer.state import State, Witness
from tests.fencer.fakes import configuration

G = Generation


@pytest.fixture
def config() -> Iterator[FencerConfig]:
    with tempfile.TemporaryDirectory(prefix="hfm") as name:
        for part in ("run", "state", "data"):
            (Path(name) / part).mkdir(mode=0o700)
        yield configuration(Path(name))


def run(config: FencerConfig) -> Path:
    return Path(config.run_dir)


# ---------------------------------------------------------------- one fencer per node


def test_one_holds_the_lock_and_says_who(config: FencerConfig) -> None:
    held = main.lock(config, 0)
    assert held is not None
    path = run(config) / "fencer.lock"
    assert int(path.read_text()) == os.getpid()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not os.get_inheritable(held)
    assert main.lock(config, 0) is None
    os.close(held)
    again = main.lock(config, 0)
    assert again is not None
    os.close(again)


def test_the_successor_shows_itself_and_waits_for_the_lease(config: FencerConfig) -> None:
    """While the lease lasts its holder is waited for, however little patience there is."""
    config = msgspec.structs.replace(config, lease_s=60.0)
    held = main.lock(config, 0)
    assert held is not None
    leases.save(run(config) / leases.NAME, leases.Lease(G(1, 1), boot_ns() + config.lease_ns, boot_id()))
    assert main._lease_left(config)
    got: list[int | None] = []
    thread = threading.Thread(target=lambda: got.append(main.lock(config, 0.01)), daemon=True)
    assert not main._successor_waits(config)
    thread.start()
    while not main._successor_waits(config):
        assert thread.is_alive(), "it has not waited"
    thread.join(0.5)
    assert thread.is_alive(), "its patience begins when the lease is over"
    os.close(held)
    thread.join(60)
    assert got
    assert got[0] is not None, "the holder has gone under its lease"
    assert not main._successor_waits(config)
    os.close(got[0])


def test_a_holder_that_stays_past_its_lease_is_not_waited_for(config: FencerConfig) -> None:
    held = main.lock(config, 0)
    assert held is not None
    got: list[int | None] = []
    thread = threading.Thread(target=lambda: got.append(main.lock(config, 0.05)), daemon=True)
    thread.start()
    thread.join(60)
    assert got == [None]
    os.close(held)


def test_only_a_fencer_without_a_supervisor_is_killed(config: FencerConfig) -> None:
    """What the lock names may be anybody by now."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        for text in (str(process.pid), "nonsense", "", "999999999"):
            (run(config) / "fencer.lock").write_text(text)
            main.end_hung_orphan(config)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    finally:
        process.kill()
        process.wait()
    script = "import time; time.sleep(600)"
    orphan = subprocess.Popen(["python3", "-c", script, "harmony-fencer"], executable=sys.executable)
    (run(config) / "fencer.lock").write_text(str(orphan.pid))
    main.end_hung_orphan(config)
    assert orphan.wait(60) == -9


# ---------------------------------------------------------------- the supervisor's line


class Fencer:
    def __init__(self) -> None:
        self.text, self.idle, self.engaged, self.was_orphaned = "fine", False, False, False

    def brief(self) -> str:
        return self.text

    def orphaned(self) -> None:
        self.was_orphaned = True


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a process closes it by its end
async def test_the_supervisor_is_answered_and_its_end_makes_an_orphan(config: FencerConfig) -> None:
    """Ready, each ping by its number, each status once; without it the lease is guarded to its end."""
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    fencer, done = Fencer(), trio.Event()

    async def line() -> bytes:
        got = b""
        while not got.endswith(b"\n"):
            got += await stream.receive_some(1)
        return got

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(main._supervision, theirs.detach(), config, fencer, done)
            assert await line() == b"ready fencer\n"
            await stream.send_all(b"ping 7\npi")
            assert [await line(), await line()] == [b"pong 7\n", b"status fine\n"]
            await stream.send_all(b"ng 8\n")
            assert await line() == b"pong 8\n", "the status only once"
            fencer.text = "another"
            await stream.send_all(b"ping 9\n")
            assert [await line(), await line()] == [b"pong 9\n", b"status another\n"]
            assert not fencer.was_orphaned
            await stream.aclose()
            while not fencer.was_orphaned:
                await trio.sleep(0.01)
            await trio.sleep(0.05)
            assert not done.is_set(), "there is a lease to be guarded"
            fencer.idle = True
            await done.wait()
    gc.collect()


async def test_an_orphan_goes_for_its_successor_but_not_amid_its_work(config: FencerConfig) -> None:
    fencer = Fencer()
    fencer.engaged = True
    successor = main._flock(config, "fencer.next")
    assert successor is not None
    ended = trio.Event()

    async def orphan() -> None:
        await main._as_orphan(config, fencer)  # type: ignore[arg-type]
        ended.set()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(orphan)
            await trio.sleep(0.1)
            assert not ended.is_set()
            fencer.engaged = False
            await ended.wait()
    os.close(successor)


# ---------------------------------------------------------------- modes for emergencies


def fencer(config: FencerConfig, *argv: str) -> subprocess.CompletedProcess[str]:
    path = run(config) / "fencer.json"
    path.write_bytes(msgspec.json.encode(config))
    command = [sys.executable, "-I", "-m", "harmony_fencer", "--config", str(path), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def accepted(config: FencerConfig, highest: Generation, *places: str) -> None:
    states.write(Path(config.state_dir), State("f", G(1, 0), None, None))
    for place in places:
        states.testify(Path(place) / states.WITNESS, Witness(config.node, "f", highest))


@pytest.mark.real
@pytest.mark.parametrize("place", ["run_dir", "data_dir"])
@pytest.mark.parametrize(("term", "begins"), [(4, None), (5, G(5, 3)), (6, G(6, 0))])
def test_state_is_begun_anew_above_all_that_was_seen(
    config: FencerConfig, place: str, term: int, begins: Generation | None
) -> None:
    """I3: an order that was accepted once must never be accepted again."""
    accepted(config, G(5, 3), getattr(config, place))
    done = fencer(config, "--reset-state", "--term", str(term))
    if begins is None:
        assert done.returncode == 78
        assert "below the term 5" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    state = states.decode((Path(config.state_dir) / states.NAME).read_bytes())
    assert state.highest == begins
    assert list(Path(config.state_dir).glob("*.bad-1")), "the old one is kept"


@pytest.mark.real
@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--reset-state"], 78, "needs --term"),
        (["--reset-state", "--term", "-1"], 78, "needs --term"),
    ],
)
def test_a_term_is_needed(config: FencerConfig, argv: list[str], code: int, text: str) -> None:
    done = fencer(config, *argv)
    assert (done.returncode, text in done.stderr) == (code, True)


@pytest.mark.real
def test_state_is_not_begun_anew_beside_a_fencer(config: FencerConfig) -> None:
    held = main.lock(config, 0)
    assert held is not None
    done = fencer(config, "--reset-state", "--term", "9")
    assert done.returncode == 75
    os.close(held)


@pytest.mark.real
@pytest.mark.parametrize("latch", [True, False])
def test_the_one_shot_latches_only_for_an_operator(config: FencerConfig, latch: bool) -> None:
    """The supervisor's emergency must not keep the node from leading when it is over; an operator's must."""
    (Path(config.data_dir) / "PG_VERSION").write_text("15\n")
    leases.save(run(config) / leases.NAME, leases.Lease(G(1, 1), boot_ns() + config.lease_ns, boot_id()))
    done = fencer(config, "--once", "because", *(["--latch", "me"] if latch else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["proven"] is True
    found = states.latch(Path(config.state_dir))
    assert (found is not None) == latch
    if found is not None:
        assert (found.reason, found.who) == ("because", "me")
    assert not (run(config) / leases.NAME).exists(), "a lease that is over for all"
    assert (Path(config.data_dir) / "standby.signal").exists()


@pytest.mark.parametrize("proven", [True, False])
def test_only_a_proof_is_0(proven: bool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The supervisor believes the exit code, and so does systemd's ExecStopPost."""
    assert main._report("because", Outcome(proven, "what was found", (), 0.0)) == (0 if proven else 1)
    sys.stdout.flush()
    assert json.loads(capfdbinary.readouterr().out)["proven"] is proven


@pytest.mark.real
def test_beside_a_fencer_nothing_unguarded_is_fenced(config: FencerConfig) -> None:
    (Path(config.data_dir) / "PG_VERSION").write_text("15\n")
    held = main.lock(config, 0)
    assert held is not None
    done = fencer(config, "--if-unguarded", "boot")
    assert (done.returncode, "a fencer is there" in done.stdout) == (0, True)
    assert not (Path(config.data_dir) / "standby.signal").exists()
    os.close(held)
    done = fencer(config, "--if-unguarded", "boot")
    assert done.returncode == 0
    assert (Path(config.data_dir) / "standby.signal").exists()


@pytest.mark.real
@pytest.mark.parametrize("text", [None, "nonsense", "{}"])
def test_a_configuration_that_cannot_be_read_is_78(config: FencerConfig, text: str | None) -> None:
    path = run(config) / "other.json"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "-I", "-m", "harmony_fencer", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78
    assert str(path) in done.stderr
