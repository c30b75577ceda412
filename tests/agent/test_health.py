"""What is seen of a PostgreSQL that hangs, and of one that is only busy: a real one, stopped, starved, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import trio

from harmony.agent.health import (
    HELD_S,
    IDLE_LOOKS,
    STUCK_LOOKS,
    WAITING_LOOKS,
    Diagnosis,
    Errand,
    Greeter,
    Health,
    Held,
    Signs,
    WriteProbe,
    process_state,
)
from harmony.agent.probe import Probe, Target, Vitals
from harmony.agent.shell import boot_ns
from harmony.core.messages import HealthSeen
from harmony.core.timing import NS
from harmony.demo import procs
from harmony.demo.cluster import Cluster, make_base, remove_base
from harmony.demo.databases import _program, make_databases
from tests import disk

TIMEOUT_S = 0.5
WELL = Vitals(1000, postmaster_born="p1", checkpointer_born="c1")

# ---------------------------------------------------------------- the diagnosis alone


def test_a_stall_is_told_from_a_wait_for_a_standby_and_from_idleness() -> None:
    """Nobody waits for WAL: nothing stalls. Sessions wait for a standby: told, and no symptom."""
    for vitals, symptom, note in (
        (WELL, "", ""),
        (replace(WELL, sync_waiters=3), "", "wait for a synchronous standby"),
        (replace(WELL, wal_waiters=1, sync_waiters=3), "stalled", ""),
    ):
        d = Diagnosis()
        seen = [d.judge(Signs(vitals), 0) for _ in range(WAITING_LOOKS + 1)]
        assert {s.symptom for s in seen[:STUCK_LOOKS]} == {""}
        assert seen[-1].symptom == symptom
        assert note in seen[-1].note


def test_a_stall_takes_two_looks_that_are_answered() -> None:
    """W10: one look may fall between two flushes, and what was seen before a silence says nothing of after it."""
    waits = Signs(replace(WELL, wal_waiters=1))
    d = Diagnosis()
    assert [d.judge(waits, 0).symptom for _ in range(3)] == ["", "", "stalled"]
    d = Diagnosis()
    looks = (waits, waits, Signs(None, "wrong password", "answered"), waits)
    assert [d.judge(signs, 0).symptom for signs in looks] == [""] * 4


def test_wal_that_moves_is_no_stall() -> None:
    """W10: however many wait for it at each look."""
    d = Diagnosis()
    for n in range(20):
        assert d.judge(Signs(replace(WELL, flushed=n, wal_waiters=50)), 0).symptom == ""


@pytest.mark.parametrize(
    ("signs", "symptom"),
    [
        (Signs(None, "", "silent"), "silent"),
        (Signs(None, "", "answered"), "silent"),
        (Signs(None, "wrong password", "answered"), ""),
        (Signs(None, "wrong password", "silent"), "silent"),
        (Signs(None, "starting up", "starting"), "closed"),
        (Signs(None, "too many clients", "full"), ""),
        (Signs(None, "no such socket", "gone"), ""),
        (Signs(WELL, "", "silent"), "closed"),
        (Signs(WELL, "", "answered", "S"), ""),
        (Signs(WELL, "", "answered", "T"), "stopped"),
        (Signs(None, "", "silent", "T"), "stopped"),
        (Signs(WELL, held_s=HELD_S - 0.1), ""),
        (Signs(WELL, held_s=HELD_S), "hung"),
    ],
)
def test_symptoms(signs: Signs, symptom: str) -> None:
    """One look, one word; its evidence stays the same as long as it does."""
    d = Diagnosis()
    first, second = d.judge(signs, 0), d.judge(signs, 1)
    assert (first.symptom, first.why) == (second.symptom, second.why)
    assert first.symptom == symptom
    assert bool(first.why) == bool(symptom)
    # B22: what is gone refuses nobody; the fencer knows why it is.
    assert ("refused" in first.note) is (
        signs.vitals is None
        and symptom == ""
        and signs.greeting != "gone"
        and bool(signs.refused or signs.greeting == "full")
    )
    assert first.blind is (signs.vitals is None and symptom == "" and signs.greeting != "gone")


def test_a_crash_that_was_recovered_from_is_seen_once() -> None:
    """Another checkpointer below the same postmaster; a new postmaster is a restart, and the fencer's to see."""
    d = Diagnosis()
    births = [("p1", "c1"), ("p1", "c1"), ("p1", ""), ("p1", "c2"), ("p1", "c2"), ("p2", "c3"), ("", "")]
    seen = [
        d.judge(Signs(replace(WELL, postmaster_born=p, checkpointer_born=c)), 0).crashed for p, c in births
    ]
    assert seen == [False, False, False, True, False, False, False]


def test_used_up_connections_are_told() -> None:
    """Busy: no symptom."""
    found = Diagnosis().judge(Signs(replace(WELL, sessions=97, limit=97)), 0)
    assert (found.symptom, "all 97 connections" in found.note) == ("", True)


def test_who_has_slept_in_between_was_answered() -> None:
    """W10: a process that is found waiting at every look is busy, unless it is the same wait each time."""
    seen = {7: "1", 8: "1"}
    held = Held(lambda pid: seen[pid])
    assert held.longest_s((7, 8), 0) == 0.0
    assert held.longest_s((7, 8), 3 * NS) == 3.0
    seen[7] = "2"
    assert held.longest_s((7,), 4 * NS) == 0.0
    assert held.longest_s((7,), 6 * NS) == 2.0
    assert held.longest_s((7, 8), 7 * NS) == 3.0, "8 was not waiting at the look before"
    seen[7] = ""
    assert held.longest_s((7,), 8 * NS) == 0.0, "it runs"


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[Target, socket.socket]]:
    """What a postmaster's socket is, in the hands of the test."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / ".s.PGSQL.5432"))
        server.listen(8)
        yield Target(str(tmp_path), 5432, "harmony", "postgres"), server


def error(code: bytes) -> bytes:
    body = b"SFATAL\0C" + code + b"\0MDesole, trop de clients\0\0"
    return b"E" + struct.pack("!I", len(body) + 4) + body


@pytest.mark.parametrize(
    ("answer", "greeting"),
    [
        (error(b"53300"), "full"),
        (error(b"57P03"), "starting"),
        (error(b"28000"), "answered"),
        (b"R\0\0\0\x08\0\0\0\0", "answered"),
        (b"N", "answered"),
        (b"", "answered"),
    ],
    ids=["full", "starting", "not allowed", "session", "no encryption", "closed"],
)
def test_a_greeting_is_understood_in_no_language(
    listening: tuple[Target, socket.socket], answer: bytes, greeting: str
) -> None:
    """By the SQLSTATE; whatever is answered, somebody has answered."""
    target, server = listening

    def serve() -> None:
        link, _ = server.accept()
        link.recv(4096)
        link.sendall(answer)
        link.close()

    thread = threading.Thread(target=serve)
    thread.start()
    greeter = Greeter(target)
    assert greeter.greet(2.0, named=True) == greeting
    thread.join()
    assert greeter.postmaster == os.getpid()


def test_a_greeting_that_is_not_answered_is_not_repeated(listening: tuple[Target, socket.socket]) -> None:
    """A stopped postmaster finds one when it goes on, not hundreds."""
    target, server = listening
    greeter = Greeter(target)
    assert [greeter.greet(0.02, named=False) for _ in range(20)] == ["silent"] * 20
    with server.accept()[0] as link:
        link.sendall(b"N")
        assert greeter.greet(1.0, named=False) == "answered"
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_nobody_there(tmp_path: Path) -> None:
    """The fencer's to see: no symptom."""
    assert Greeter(Target(str(tmp_path), 5432, "harmony", "postgres")).greet(0.1, named=False) == "gone"


async def test_one_errand_at_a_time() -> None:
    """What does not come back takes one thread with it, not one at each look."""
    errand, begun, held = Errand(), [], threading.Event()

    def do() -> str:
        begun.append(1)
        held.wait(5)
        return "back"

    assert await errand.run(do, 0.05) is None
    assert await errand.run(do, 0.05) is None
    assert len(begun) == 1
    held.set()
    with trio.fail_after(2):
        while errand.away:
            await trio.sleep(0.01)
    assert await errand.run(do, 1.0) == "back"


# ---------------------------------------------------------------- a real one


class Patient:
    """A PostgreSQL of its own, and what is seen of it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.node = cluster, cluster.nodes["n1"]
        self.where = f"host={self.node.socket_dir} port={self.node.port} dbname=postgres"
        self.target = Target(str(self.node.socket_dir), self.node.port, "harmony", "postgres")
        self.probe = Probe(self.target)
        self.health = self.doctor()

    def close(self) -> None:
        """Nothing of it is left open."""
        self.probe.close()
        self.health._greeter.close()
        if self.probe._writer is not None:
            self.probe._writer.close()

    def doctor(self, write_probe: WriteProbe = "off", disk_free_mb: int = 0) -> Health:
        data = str(self.node.data_dir)
        return Health(self.probe, self.target, data, write_probe=write_probe, disk_free_mb=disk_free_mb)

    async def look(self) -> HealthSeen:
        now = boot_ns()
        return await self.health.look(now, await self.probe.ask(now, TIMEOUT_S), TIMEOUT_S)

    async def until(self, condition: Callable[[HealthSeen], bool], seconds: float = 60.0) -> HealthSeen:
        end = time.monotonic() + seconds
        while not condition(seen := await self.look()):
            assert time.monotonic() < end, seen
            await trio.sleep(0.1)
        return seen

    async def always(self, condition: Callable[[HealthSeen], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert condition(seen := await self.look()), seen
            await trio.sleep(0.1)

    def sql(self, *statements: str, user: str = "postgres") -> list[tuple[object, ...]]:
        with psycopg.connect(f"{self.where} user={user}", autocommit=True) as link:
            cursor = None
            for statement in statements:
                cursor = link.execute(statement.encode())
            return cursor.fetchall() if cursor is not None and cursor.description else []

    @contextlib.contextmanager
    def told(self, setting: str, value: str) -> Iterator[None]:
        """With a setting of PostgreSQL changed by a reload."""
        self.sql(f"ALTER SYSTEM SET {setting} = {value}", "SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self.sql(f"ALTER SYSTEM RESET {setting}", "SELECT pg_reload_conf()")

    def beside(self, *statements: str) -> threading.Thread:
        """In a thread; whatever becomes of it."""

        def work() -> None:
            with contextlib.suppress(psycopg.Error):
                self.sql(*statements)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    @property
    def postmaster(self) -> int:
        found = procs.postmaster_of(self.node.data_dir)
        assert found is not None
        return int(found.pid)


@pytest.fixture(scope="module")
def started() -> Iterator[Cluster]:
    base = make_base()
    cluster = Cluster.prepare("fast", base)
    data = cluster.nodes["n1"].data_dir
    try:
        cluster.lay_out()
        make_databases(cluster.parts, [cluster.nodes["n1"]])
        _program(cluster.parts, "pg_ctl", "-D", str(data), "-w", "-l", f"{data}/log", "start")
        yield cluster
    finally:
        cluster.stop()
        remove_base(base)


@pytest.fixture
def patient(started: Cluster) -> Iterator[Patient]:
    found = Patient(started)
    yield found
    found.close()


async def until_stopped(pid: int) -> None:
    """kill(2) returns before the process, on another core, has seen the signal."""
    with trio.fail_after(30):
        while process_state(pid) != "T":
            await trio.sleep(0.001)


@pytest.mark.real
async def test_a_stopped_postmaster(patient: Patient) -> None:
    """kill -STOP: old sessions are answered, a client that comes waits for ever."""
    await patient.until(lambda s: s.symptom == "")
    os.kill(patient.postmaster, signal.SIGSTOP)
    try:
        await until_stopped(patient.postmaster)
        seen = await patient.look()
        assert seen.symptom == "stopped"
        await patient.always(lambda s: s.symptom == "stopped", 1.0)
    finally:
        os.kill(patient.postmaster, signal.SIGCONT)
    await patient.until(lambda s: s.symptom == "")


@pytest.mark.real
async def test_a_server_that_stands_still(patient: Patient) -> None:
    """Everything of it but the postmaster, and the greeting goes through: its own session is what hangs."""
    await patient.until(lambda s: s.symptom == "")
    children = [p for p in procs.postgres_of(patient.node.data_dir) if p.pid != patient.postmaster]
    for p in children:
        procs.send(p, signal.SIGSTOP)
    try:
        seen = await patient.until(lambda s: s.symptom != "")
        assert (seen.symptom, "takes a new session" in seen.why) == ("silent", True)
    finally:
        for p in children:
            procs.send(p, signal.SIGCONT)
    await patient.until(lambda s: s.symptom == "")


@pytest.mark.real
async def test_connections_used_up(patient: Patient) -> None:
    """Busy, not sick: told while the probe has its session, and when it has lost it."""
    assert (await patient.look()).note == ""
    links = []
    try:
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                links.append(psycopg.connect(f"{patient.where} user=app"))
        seen = await patient.look()
        assert (seen.symptom, "connections are used up" in seen.note) == ("", True)
        blind = Patient(patient.cluster)
        seen = await blind.look()
        blind.close()
        assert (seen.symptom, "the probe is refused: " in seen.note) == ("", True)
    finally:
        for link in links:
            link.close()
    await patient.until(lambda s: s.note == "")


@pytest.mark.real
async def test_a_probe_that_may_not_come_in(patient: Patient) -> None:
    """A role that is not there, or no right to log in, is no reason to fail over."""
    stranger = Patient(patient.cluster)
    stranger.target = replace(stranger.target, user="stranger")
    stranger.probe = Probe(stranger.target)
    stranger.health = stranger.doctor()
    seen = await stranger.look()
    assert (seen.symptom, 'role "stranger" does not exist' in seen.note) == ("", True)
    stranger.close()


@pytest.mark.real
async def test_a_killed_backend(patient: Patient) -> None:
    """SIGKILL, as by the OOM killer: all sessions end, it recovers by itself; that is a crash, seen once."""
    await patient.until(lambda s: s.symptom == "")
    (pid,) = patient.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")[0]
    os.kill(int(str(pid)), signal.SIGKILL)
    await patient.until(lambda s: s.crashed, 60)
    well = 0
    with trio.fail_after(60):  # it may be some looks until it has recovered
        while well < 5:
            seen = await patient.look()
            assert not seen.crashed, seen
            well = well + 1 if seen.symptom == "" else 0
            await trio.sleep(0.1)


@pytest.mark.real
async def test_busy_is_not_sick(patient: Patient) -> None:
    """W10: VACUUM FULL of a big table, checkpoint after checkpoint, and writers, at once."""
    patient.sql("CREATE TABLE big AS SELECT n, repeat('x', 200) AS t FROM generate_series(1, 150000) n")
    storm = [
        patient.beside("VACUUM FULL big"),
        patient.beside(*["UPDATE big SET t = repeat('y', 200) WHERE n % 10 = 0", "CHECKPOINT"] * 3),
        *[patient.beside(*["INSERT INTO big SELECT 0, repeat('z', 500)"] * 200) for _ in range(4)],
    ]
    while any(t.is_alive() for t in storm):
        seen = await patient.look()
        assert seen.symptom in {"", "stalled"}, seen  # a moment, never for long:
        await patient.until(lambda s: s.symptom == "", 5)
    patient.sql("DROP TABLE big")


@pytest.mark.real
async def test_a_wait_for_a_standby_is_told_from_a_disk_that_hangs(patient: Patient) -> None:
    """Commits wait for a standby that is not there; a message that waits for the disk alone gets through."""
    # This machine's own disk may be busy: WAL that waits for it is not what is looked for here.
    with patient.told("fsync", "off"), patient.told("synchronous_standby_names", "'nobody'"):
        patient.health = patient.doctor("suspicion")
        thread = patient.beside("INSERT INTO harmony_demo_probe VALUES (1)")
        await patient.until(lambda s: "wait for a synchronous standby" in s.note)
        flushed = patient.probe.vitals
        await patient.always(lambda s: s.symptom == "", 2.0)
        now = patient.probe.vitals
        assert flushed is not None
        assert now is not None
        assert now.flushed > flushed.flushed, "the write probe has proven that the disk takes WAL"
    thread.join(5)


@pytest.mark.real
async def test_an_idle_server_is_written_to_only_where_that_is_wanted(patient: Patient) -> None:
    """sickness.write_probe."""
    patient.sql("CHECKPOINT")

    async def grows(write_probe: WriteProbe) -> bool:
        patient.health = patient.doctor(write_probe)
        await patient.look()
        before = patient.probe.vitals
        for _ in range(IDLE_LOOKS + 3):
            await patient.look()
        after = patient.probe.vitals
        assert before is not None
        assert after is not None
        return after.flushed > before.flushed

    assert not await grows("off")
    assert not await grows("suspicion")
    assert await grows("always")


@pytest.mark.real
@pytest.mark.skipif(bool(disk.why_not()), reason=disk.why_not())
async def test_a_disk_of_data_that_hangs(patient: Patient) -> None:
    """That of the WAL is well, the probe is answered, others write: and one session gets nothing from its file."""
    at = patient.node.folder / "disk"
    with patient.told("fsync", "off"), disk.mended_at_the_end(at):  # WAL waits for no disk of this machine
        disk.make(patient.cluster.base / "slow.img", at, 200)
        os.chown(at, patient.node.data_dir.stat().st_uid, -1)
        patient.sql(f"CREATE TABLESPACE slow LOCATION '{at}'")
        patient.sql("CREATE TABLE there (n int) TABLESPACE slow")
        fill = "INSERT INTO there SELECT generate_series(1, 20000)"
        with psycopg.connect(f"{patient.where} user=postgres") as gate:
            gate.execute("SELECT pg_advisory_lock(7)")
            thread = patient.beside(fill, "SELECT pg_advisory_lock(7)", fill)  # its files are open
            await patient.until(lambda _: patient.sql("SELECT 1 FROM pg_locks WHERE NOT granted") != [])
            disk.freeze(at, True)
        began = time.monotonic()
        seen = await patient.until(lambda s: s.symptom != "", 20)
        assert (seen.symptom, "has not answered" in seen.why) == ("hung", True)
        assert time.monotonic() - began > HELD_S
        other = patient.beside("INSERT INTO harmony_demo_probe VALUES (1)")
        await patient.always(lambda s: s.symptom == "hung", 1.0)
        assert not other.is_alive()
        disk.freeze(at, False)
        thread.join(20)
        await patient.until(lambda s: s.symptom == "")
        patient.sql("DROP TABLE there", "DROP TABLESPACE slow")


@pytest.mark.real
async def test_little_room_is_told(patient: Patient) -> None:
    """sickness.disk_free_mb."""
    patient.health = patient.doctor(disk_free_mb=10**9)
    seen = await patient.until(lambda s: s.symptom == "" and s.note != "")
    assert str(patient.node.data_dir) in seen.note


@pytest.mark.real
async def test_a_shutdown_that_takes_long(patient: Patient) -> None:
    """A smart shutdown waits for old sessions: the probe's own is answered, nobody else gets in."""
    await patient.until(lambda s: s.symptom == "")
    data = str(patient.node.data_dir)
    _program(patient.cluster.parts, "pg_ctl", "-D", data, "-W", "-m", "smart", "stop")
    blind = Patient(patient.cluster)
    try:
        seen = await blind.until(lambda s: s.symptom != "")
        assert (seen.symptom, "57P03" in seen.why) == ("closed", True)
    finally:
        patient.close()
        with contextlib.suppress(AssertionError):
            await blind.until(lambda _: procs.postmaster_of(patient.node.data_dir) is None)
        blind.close()
        _program(patient.cluster.parts, "pg_ctl", "-D", data, "-w", "-l", f"{data}/log", "start")
