"""A primary whose PostgreSQL lives and does nothing: whole clusters on real parts, with a patience of three seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest

from harmony.demo import procs
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster
from harmony.demo.databases import Node
from tests import disk, pace
from tests.demo.running import Running, under_load

pytestmark = pytest.mark.real
ONE_OF_TWO = pytest.mark.sampled(1, group="a sick primary")
needs_a_disk = pytest.mark.skipif(bool(disk.why_not()), reason=disk.why_not())
PATIENCE_S = 3.0


class Impatient(Cluster):
    """Nobody wants to wait for the defaults here."""

    def settings(self, node: Node) -> dict[str, object]:
        return super().settings(node) | {"sickness": {"patience_s": PATIENCE_S, "disk_free_mb": 0}}


class Asynchronous(Impatient):
    """Nobody is waited for."""

    def settings(self, node: Node) -> dict[str, object]:
        more = {"replication": {"mode": "off", "maximum_lag_bytes": 16 << 20}}
        return super().settings(node) | more | {"failover": {"maximum_changes": 0, "restart_budget": 3}}

    def streaming(self) -> tuple[str, int, bool] | None:
        found = super().streaming()
        return (*found[:2], True) if found is not None else None


def leader(running: Running) -> str:
    return running.cluster.node_at(running.recorders.writer.acks[-1].port)


def log(running: Running, name: str) -> str:
    return (running.cluster.nodes[name].folder / "node.log").read_text()


def others_write(running: Running, old: str, since_ns: int) -> bool:
    return any(n != old and running.acks_by(n, since_ns) > 20 for n in running.cluster.nodes)


def streams(running: Running, name: str) -> int:
    found = running.cluster.streaming()
    return found[1] if found is not None and found[0] == name else 0


def kill_a_backend(running: Running, name: str) -> None:
    """As the OOM killer does."""
    with psycopg.connect(running.cluster.conninfo(name, "postgres"), autocommit=True) as link:
        row = link.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'").fetchone()
    assert row is not None
    os.kill(int(row[0]), signal.SIGKILL)


@ONE_OF_TWO
def test_killed_then_stopped_then_crashed() -> None:
    """Without a synchronous standby a death costs a restart in place, and no commit (failover.restart_budget).
    SIGSTOP to every process: handed over after the patience. A few crashes of the new one's: nobody moves."""
    with under_load(Asynchronous) as running:
        old = leader(running)
        data_dir = running.cluster.nodes[old].data_dir
        killed = boottime_ns()
        postmaster = procs.postmaster_of(data_dir)
        assert postmaster is not None
        procs.send(postmaster, signal.SIGKILL)
        running.until("it writes again", lambda: running.acks_by(old, killed) > 20)
        assert leader(running) == old
        running.until("both stream", lambda: streams(running, old) == 2)
        began = boottime_ns()
        for process in procs.postgres_of(data_dir):
            procs.send(process, signal.SIGSTOP)
        running.until("another accepts writes", lambda: others_write(running, old, began), 20)
        assert "PostgreSQL is sick, and another can lead" in log(running, old)
        assert "state T" in log(running, old)
        new = leader(running)
        at = boottime_ns()
        kill_a_backend(running, new)
        running.until("it goes on by itself", lambda: running.acks_by(new, at) > 20)
        assert leader(running) == new
        running.until("the old one is back", lambda: streams(running, new) == 2, 60)


# ---------------------------------------------------------------- a disk that hangs


@dataclass(frozen=True)
class Separate(Node):
    """Its data directory has a file system of its own."""

    @property
    def data_dir(self) -> Path:
        return self.folder / "disk" / "data"


class OnDisk(Impatient):
    """n1's data is on a disk that can hang."""

    @classmethod
    def prepare(cls, preset: str, base: Path) -> Cluster:
        made = super().prepare(preset, base)
        n1 = made.nodes["n1"]
        made.nodes["n1"] = Separate(n1.name, n1.folder, n1.port)
        return made

    def lay_out(self) -> None:
        super().lay_out()
        self.mounted = ExitStack()
        at = self.nodes["n1"].folder / "disk"
        self.mounted.enter_context(disk.mended_at_the_end(at))
        disk.make(self.base / "n1.img", at, 600)

    def stop(self) -> list[psutil.Process]:
        left = super().stop()
        self.mounted.close()
        return left


@contextmanager
def led_on_a_disk() -> Iterator[tuple[Running, Path]]:
    """A cluster whose primary, n1, has a disk of its own, and where that is."""
    with under_load(OnDisk) as running:
        running.until("n1 leads", lambda: leader(running) == "n1")
        yield running, running.cluster.nodes["n1"].folder / "disk"


@needs_a_disk
@ONE_OF_TWO
def test_a_disk_that_hangs() -> None:
    """Who waits for it cannot be killed: no proof, yet nothing of it ever runs again, and another leads meanwhile."""
    with led_on_a_disk() as (running, at):
        began = boottime_ns()
        disk.freeze(at, True)
        try:
            running.until("another accepts writes", lambda: others_write(running, "n1", began), 20)
            assert "killed, though not gone" in log(running, "n1")
            held = [
                p
                for p in procs.postgres_of(running.cluster.nodes["n1"].data_dir)
                if p.status() == "disk-sleep"
            ]
            assert held, "the disk hangs all the while"
        finally:
            disk.freeze(at, False)
        new = leader(running)
        running.until("n1 follows", lambda: streams(running, new) == 2, 60)
        assert running.check(began, new) < PATIENCE_S + 8 + pace.SLACK_S


# ---------------------------------------------------------------- make test-sick: minutes

slow = pytest.mark.skipif(
    os.environ.get("HARMONY_SICK") != "1", reason="takes minutes: make test-sick runs it"
)


@slow
def test_busy_is_not_sick() -> None:
    """W10: VACUUM FULL, checkpoint after checkpoint and bulk loads for 30 s, with a patience of 3 s: nobody moves."""
    with under_load(Impatient) as running:
        old, began = leader(running), boottime_ns()
        where = running.cluster.conninfo(old, "postgres")
        end = time.monotonic() + 30

        def work(*statements: str) -> None:
            with psycopg.connect(where, autocommit=True) as link:
                while time.monotonic() < end:
                    for statement in statements:
                        link.execute(statement.encode())

        work_on_it = "INSERT INTO big SELECT n, repeat('x', 400) FROM generate_series(1, 20000) n"
        with psycopg.connect(where, autocommit=True) as link:
            link.execute("CREATE TABLE big (n int, t text)")
        threads = [
            threading.Thread(target=work, args=statements)
            for statements in (
                (work_on_it,),
                (work_on_it,),
                ("CHECKPOINT",),
                ("VACUUM FULL big", "TRUNCATE big"),
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert running.record(old).term == 1
        assert "PostgreSQL is sick" not in log(running, old)
        running.until("it still writes", lambda: running.acks_by(old, began) > 100)
        running.check(began, old)


@slow
@needs_a_disk
def test_a_disk_that_is_full() -> None:
    """WAL finds no room: PostgreSQL panics. Another leads, and when there is room again the old one follows."""
    with led_on_a_disk() as (running, at):
        began = boottime_ns()
        filler = at / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * (1 << 20))
        with contextlib.suppress(psycopg.Error):
            with psycopg.connect(running.cluster.conninfo("n1", "postgres"), autocommit=True) as link:
                for _ in range(100):
                    link.execute("SELECT pg_switch_wal()")
                    link.execute("SELECT pg_logical_emit_message(true, 'x', repeat('y', 1000000))")
        running.until("another accepts writes", lambda: others_write(running, "n1", began), 60)
        filler.unlink()
        new = leader(running)
        running.until("n1 follows", lambda: streams(running, new) == 2, 90)
        running.check(began, new)
