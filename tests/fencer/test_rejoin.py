"""A node that cannot follow comes back: real pg_rewind and pg_basebackup, and a fencer killed at each step."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from harmony.demo.parts import run_as
from harmony_fencer import processes, protocol
from tests.fencer.node import Node, Template, free_port, memory_folder

pytestmark = pytest.mark.real


class Primary:
    """Another node's PostgreSQL, without a fencer: the one to follow."""

    def __init__(self, top: Path, template: Template) -> None:
        self.top, self._template = top, template
        self.data, self.port = top / "data", free_port()
        (top / "s").mkdir()
        if template.user is not None:
            shutil.chown(top / "s", template.user)

    def copy(self, source: Path) -> None:
        """A cold copy of what does not run (or of an empty initdb)."""
        subprocess.run(["cp", "-a", str(source), str(self.data)], check=True)
        for name in ("standby.signal", "postmaster.pid"):
            (self.data / name).unlink(missing_ok=True)
        with (self.data / "postgresql.conf").open("a") as f:
            f.write("wal_keep_size = 256MB\nwal_log_hints = on\n")

    def _pg_ctl(self, *arguments: str) -> None:
        pg = self._template.postgres
        done = run_as(
            self._template.user,
            [f"{pg.bin_dir}/pg_ctl", *arguments, "-D", str(self.data)],
            pg.library_dir,
            30,
        )
        assert done.returncode == 0, done

    def start(self, *options: str) -> None:
        more = f"-p {self.port} -c unix_socket_directories={self.top}/s -c listen_addresses=127.0.0.1 "
        self._pg_ctl("start", "-w", "-l", str(self.data / "log"), "-o", more + " ".join(options))

    def stop(self) -> None:
        if processes.of_data_dir(str(self.data)):
            self._pg_ctl("stop", "-w", "-m", "immediate")

    def run(self, sql: str) -> list[tuple[object, ...]]:
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True
        ) as c:
            done = c.execute(sql.encode())
            return done.fetchall() if done.description else []


class Pair:
    """n1, whose fencer is tested, and n2, which was promoted while n1 still wrote."""

    def __init__(self, node: Node, primary: Primary) -> None:
        self.node, self.primary, self.order = node, primary, 10
        node.configure(
            members={
                "n1": {"host": "127.0.0.1", "port": node.port},
                "n2": {"host": "127.0.0.1", "port": primary.port},
            },
            start_timeout_s=20,
        )
        node.set_postgres(wal_keep_size="64MB", wal_log_hints="on")

    @property
    def beside(self) -> dict[str, Path]:
        """What stands beside the data directory, by the end of its name."""
        top = self.node.data.parent
        return {re.sub(r"\d{8}T.*", "", p.name[5:]): p for p in top.glob("data.*")}

    def diverge(self, *, crash: bool = False, promote: bool = False) -> None:
        """n2 is a copy of n1 that leads on a new timeline; n1 then writes what nobody else has.

        `promote`: on a new timeline of the same number.
        """
        node = self.node
        node.start()
        node.make_writable()
        with node.connect() as c:
            c.execute("CREATE TABLE rows (x text)")
            c.execute("INSERT INTO rows VALUES ('common')")
        node.fence(1, 2, clean=True)
        self.primary.copy(node.data)
        (self.primary.data / "standby.signal").touch()
        if self.node.template.user is not None:
            shutil.chown(self.primary.data / "standby.signal", self.node.template.user)
        self.primary.start()
        self.primary._pg_ctl("promote", "-w")
        self.primary.run("INSERT INTO rows SELECT 'new primary' FROM generate_series(1, 1000)")
        self.primary.run("CHECKPOINT")
        if promote:
            node.make_writable(2, 1)
        else:  # as one that was cut off and never stopped
            node.kill_fencer()
            (node.data / "standby.signal").unlink()
            node.start_by_hand()
        with node.connect() as c:
            c.execute("INSERT INTO rows SELECT 'lost' FROM generate_series(1, 1000)")
        if crash:
            node.kill_postgres()
        elif not promote:
            argv = [f"{node.template.postgres.bin_dir}/pg_ctl", "stop", "-w", "-D", str(node.data)]
            run_as(node.template.user, argv, node.template.postgres.library_dir, 30)
        if not promote:
            node.start()
        node.fence(2, 2, clean=not crash)

    def logs(self) -> str:
        """PostgreSQL's own, of n1; and the fencer's."""
        return (self.node.data / "harmony-postgres.log").read_text()[-2500:] + self.node.log()

    def system(self) -> str:
        return str(self.primary.run("SELECT system_identifier FROM pg_control_system()")[0][0])

    def send(self, *, clone: bool = False, system: str | None = None) -> protocol.Reply:
        self.order += 1
        return self.node.ask(
            protocol.Rejoin(
                generation=protocol.Generation(2, self.order),
                primary="n2",
                system_identifier=system or self.system(),
                clone=clone,
            )
        )

    def rejoin(self, *, clone: bool = False, system: str | None = None) -> protocol.OrderRecord:
        reply = self.send(clone=clone, system=system)
        assert isinstance(reply, protocol.Accepted), reply
        return self.node.outcome()

    def rows(self) -> set[str]:
        with self.node.connect() as c:
            return {str(r[0]) for r in c.execute("SELECT DISTINCT x FROM rows").fetchall()}

    def healthy(self) -> None:
        """A standby of n2 that has what n2 has, and nothing else; and what n2 writes now arrives."""
        self.primary.run("INSERT INTO rows VALUES ('after')")
        node = self.node
        node.wait(lambda: node.in_recovery() and "after" in self.rows(), "what the primary writes arrives")
        assert self.rows() == {"common", "new primary", "after"}
        status = node.status()
        assert (status.is_standby, status.unfinished, status.progress) == (True, False, "")
        assert status.following == "n2"
        assert not node.writable()
        assert f"port = '{node.port}'" in (node.data / "harmony.postgresql.conf").read_text()


@pytest.fixture
def pair(template: Template) -> Iterator[Pair]:
    tops = [Path(tempfile.mkdtemp(prefix="hf-", dir=memory_folder())) for _ in range(2)]
    for top in tops:
        top.chmod(0o755)
    node, primary = Node(tops[0], template), Primary(tops[1], template)
    yield Pair(node, primary)
    primary.stop()
    node.destroy()
    for top in tops:
        shutil.rmtree(top)


def test_a_diverged_standby_is_rewound(pair: Pair) -> None:
    """O5: what only the old primary had is gone, its own configuration is kept, nothing is left beside."""
    pair.diverge()
    with (pair.node.data / "pg_hba.conf").open("a") as f:
        f.write("# mine\n")
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "rewound to n2" in record.detail
    assert "it streams" in record.detail, pair.logs()
    pair.healthy()
    assert pair.beside == {}
    assert "# mine" in (pair.node.data / "pg_hba.conf").read_text()


def test_a_crashed_primary_recovers_first(pair: Pair) -> None:
    """O5: standby.signal is never taken away for it."""
    pair.diverge(crash=True)
    assert pair.node.cluster_state() == "in production"
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "rewound" in record.detail
    pair.healthy()


def test_two_timelines_of_one_number_are_not_mistaken_for_one(pair: Pair) -> None:
    """O5: pg_rewind sees no fork there, and the standby would stream what does not fit."""
    pair.diverge(promote=True)
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "have both led on one timeline" in record.detail
    pair.healthy()


def test_a_running_diverged_standby_is_looked_at_before_it_is_stopped(pair: Pair) -> None:
    """An unreachable source costs no reader anything, and is named."""
    pair.diverge()
    pair.node.follow(2, 5)
    system = pair.system()
    pair.primary.stop()
    record = pair.rejoin(system=system)
    assert record.state == "failed"
    assert "the primary n2 cannot be used as a source" in record.detail
    assert pair.node.in_recovery()
    pair.primary.start()
    assert pair.rejoin().state == "done"
    pair.healthy()


def test_without_the_wal_it_is_copied_and_the_old_one_kept(pair: Pair) -> None:
    """O5: re-cloned after a failed rewind, with the old data kept; a second time, only the newest is."""
    pair.diverge()
    for file in (pair.node.data / "pg_wal").glob("0*"):
        if file.is_file():
            file.write_bytes(b"\0" * 100)
    record = pair.rejoin()
    assert record.state == "done", (record, pair.node.log())
    assert "copied anew from n2 (pg_rewind failed" in record.detail
    pair.healthy()
    (old,) = pair.beside.values()
    assert old.name.startswith("data.harmony-old-")
    assert (old / "PG_VERSION").exists()
    time.sleep(1.1)
    record = pair.rejoin(clone=True)
    assert record.state == "done", record
    assert f"removed {old.name}" in record.detail
    (newer,) = pair.beside.values()
    assert newer != old


def test_another_clusters_primary_is_refused(pair: Pair, template: Template) -> None:
    """Neither rewound to nor copied: by the id in the order, and by what the source says."""
    pair.diverge()
    assert "another cluster's" in pair.rejoin(system="4711").detail
    system = pair.system()
    pair.primary.stop()
    shutil.rmtree(pair.primary.data)
    bin_dir, user = template.postgres.bin_dir, template.user
    pair.primary.data.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(pair.primary.data, user)
    argv = [f"{bin_dir}/initdb", "-D", str(pair.primary.data), "-U", "postgres", "-A", "trust", "--no-sync"]
    run_as(user, argv, template.postgres.library_dir, 60)
    pair.primary.start()
    record = pair.rejoin(system=system)
    assert record.state == "failed"
    assert "different systems" in record.detail
    record = pair.rejoin(system=system, clone=True)
    assert record.state == "failed"
    assert "thrown away" in record.detail
    assert pair.node.status().is_standby
    assert not (pair.node.data.parent / "data.harmony-new").exists()


def test_a_disk_too_small_is_named(pair: Pair) -> None:
    """Before anything is thrown away; with room it goes on."""
    pair.node.configure(rejoin={"keep_free_mb": 100_000_000})
    pair.diverge()
    record = pair.rejoin(clone=True)
    assert record.state == "failed"
    assert "the disk is too small for a copy" in record.detail
    assert (pair.node.data / "PG_VERSION").exists()
    pair.node.kill_fencer()
    pair.node.configure(rejoin={})
    pair.node.start()
    assert pair.rejoin(clone=True).state == "done"
    pair.healthy()


def test_no_copy_where_none_is_wanted(pair: Pair) -> None:
    pair.node.configure(rejoin={"clone": False})
    pair.diverge()
    record = pair.rejoin(clone=True)
    assert "rejoin.clone is false" in record.detail


def test_a_leader_is_not_rejoined(pair: Pair) -> None:
    """I2: it would destroy what only this node has."""
    pair.diverge()
    pair.node.make_writable(2, 3)
    reply = pair.send()
    assert isinstance(reply, protocol.Refusal)
    assert reply.error == "active"
    assert pair.node.writable()


def is_aside(p: Pair) -> bool:
    return (p.node.data / "harmony.rejoin").exists()


def is_copying(p: Pair) -> bool:
    new = p.node.data.parent / "data.harmony-new"
    return (new / "PG_VERSION").exists()


def runs(program: str) -> Callable[[Pair], bool]:
    def found(p: Pair) -> bool:
        return any(
            program.encode() in (line := _command(pid)) and os.fsencode(str(p.node.data)) in line
            for pid in os.listdir("/proc")
            if pid.isdigit()
        )

    return found


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_rewound(p: Pair) -> bool:
    return (p.node.data.parent / "data.harmony-rewind" / "harmony.whole").exists()


def is_put_in_place(p: Pair) -> bool:
    return (p.node.data / "harmony.whole").exists()


@pytest.mark.parametrize(
    ("clone", "moment"),
    [
        (False, runs("pg_rewind")),
        (False, is_aside),
        (False, is_rewound),
        (False, is_put_in_place),
        (True, runs("pg_basebackup")),
        (True, is_copying),
        (True, is_put_in_place),
    ],
    ids=["rewind-runs", "stub-in-place", "rewound", "back-in-place", "copy-runs", "copying", "copy-in-place"],
)
def test_a_fencer_killed_at_any_step_is_taken_up(
    pair: Pair, clone: bool, moment: Callable[[Pair], bool]
) -> None:
    """C2: whatever it left can be started as nothing but a standby, and the next order ends the work."""
    pair.diverge()
    node = pair.node
    assert isinstance(pair.send(clone=clone), protocol.Accepted)
    until = time.monotonic() + 20
    while not moment(pair):
        order = node.status().order
        assert order is not None
        if order.state != "running":
            break  # it was too fast for us: killed at its end, then
        assert time.monotonic() < until
    node.kill_fencer(signal.SIGKILL)
    node.start()
    status = node.status()
    assert status.is_standby
    assert status.unfinished == (node.data / "harmony.rejoin").exists()
    if status.unfinished:
        assert "interrupted" in status.progress
        node.hand()
        time.sleep(0.5)
        assert not node.writable()
        node.tidy()
        reply = node.ask(protocol.Follow(generation=protocol.Generation(2, 9999), primary="n2"))
        assert isinstance(reply, protocol.Accepted)
        pair.order = 10_000
        record = node.outcome()
        assert record.state == "failed"
        assert "only a rejoin" in record.detail
    record = pair.rejoin(clone=clone)
    assert record.state == "done", (record, node.log())
    pair.healthy()
    assert set(pair.beside) <= {"harmony-old-"}
