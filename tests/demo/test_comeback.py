"""An old primary that is not what the new one is comes back by itself: the whole cluster, on real parts (O5)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from harmony.demo import procs
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster, ask_status
from harmony.demo.comeback import is_back
from harmony.demo.databases import Node
from harmony.demo.parts import run_as
from harmony.demo.scenarios import Fault, Scenario
from tests.demo.running import Running, under_load

pytestmark = [pytest.mark.real, pytest.mark.sampled(3, group="an old primary comes back")]
LOST = 900_000_000  # ids that only the old primary has


@pytest.fixture
def running() -> Iterator[Running]:
    with under_load(Cluster) as found:
        yield found


def as_postgres(node: Node) -> psycopg.Connection[tuple[object, ...]]:
    """The superuser, by the socket: also of one that listens nowhere else."""
    where = f"host={node.socket_dir} port={node.port} user=postgres dbname=postgres"
    return psycopg.connect(where, autocommit=True)


class Old:
    """The primary, killed, and started by hand beside Harmony as one that nobody has fenced: it diverges."""

    def __init__(self, running: Running) -> None:
        self.running, self.cluster = running, running.cluster
        self.name = self.cluster.node_at(running.recorders.writer.acks[-1].port)
        self.node = self.cluster.nodes[self.name]
        self.fault_ns = boottime_ns()
        Fault(Scenario.NODE_KILLED, self.cluster, self.name).apply()
        running.until("another accepts writes", lambda: self.leader(60) != "")

    def leader(self, acks: int = 0) -> str:
        names = [
            n for n in self.cluster.nodes if n != self.name and self.running.acks_by(n, self.fault_ns) > acks
        ]
        return names[-1] if names else ""

    def _pg_ctl(self, *arguments: str) -> None:
        pg, user = self.cluster.parts.postgres, self.cluster.parts.users.postgres
        argv = [str(pg.bin_dir / "pg_ctl"), *arguments, "-w", "-D", str(self.node.data_dir)]
        done = run_as(user, argv, pg.library_dir, 60)
        assert done.returncode == 0, done

    def diverge(self, *, segments: int = 0) -> None:
        """Write rows that no other node has; `segments` of WAL more, and what is before the last of them is gone."""
        data = self.node.data_dir
        for name in ("standby.signal", "postmaster.pid"):
            (data / name).unlink(missing_ok=True)
        hidden = f"-c listen_addresses='' -c unix_socket_directories={self.node.socket_dir}"
        self._pg_ctl("start", "-l", str(data / "by-hand.log"), "-o", hidden)
        with as_postgres(self.node) as link:
            link.execute(
                "INSERT INTO harmony_demo SELECT %s::bigint + n FROM generate_series(1, 5000) n", (LOST,)
            )
            for _ in range(segments):
                link.execute("INSERT INTO harmony_demo_probe SELECT n FROM generate_series(1, 10) n")
                link.execute("SELECT pg_switch_wal()")
            link.execute("CHECKPOINT")
        self._pg_ctl("stop", "-m", "fast")
        if segments:
            found = sorted(p for p in (data / "pg_wal").iterdir() if len(p.name) == 24)
            needed = self._control("Latest checkpoint's REDO WAL file")
            for file in found:
                if file.name < needed:
                    file.unlink()

    def _control(self, field: str) -> str:
        pg, user = self.cluster.parts.postgres, self.cluster.parts.users.postgres
        argv = [str(pg.bin_dir / "pg_controldata"), "-D", str(self.node.data_dir)]
        out = run_as(user, argv, pg.library_dir, 10).stdout
        return next(line.split(":", 1)[1].strip() for line in out.splitlines() if line.startswith(field))

    def log(self) -> str:
        return (self.node.folder / "node.log").read_text()

    def rejoins(self) -> int:
        """How many the fencer has accepted."""
        return self.log().count('"event":"accepted","op":"rejoin"')

    def kill(self, module: str) -> None:
        found = procs.with_argument(self.node.folder, (module,))
        assert found
        for process in found:
            procs.send(process, signal.SIGKILL)

    def copies(self, process: psutil.Process) -> bool:
        try:
            line = process.cmdline()
        except psutil.Error:
            return False
        return "pg_basebackup" in line[0] and str(self.node.folder) in " ".join(line) if line else False

    def status(self) -> str:
        """What `harmonyctl status` at the leader says of this node: its row, and what is below the table."""
        _, text = self.running.harmonyctl(self.leader(), "status")
        mine = (f":{self.node.port} ", f" {self.name} does not stream")
        return "\n".join(line for line in text.splitlines() if any(words in line for words in mine))

    def progress(self) -> str:
        reply = ask_status(self.node.admin_socket, 1.0)
        found = [n.member.progress for n in reply.nodes if n.name == self.name and n.member] if reply else []
        return "".join(found)

    def back(self) -> bool:
        self.running.recorders.poll()
        newest = self.running.recorders.writer.acks[-1].id
        return is_back(self.cluster, self.name, self.leader(), newest)

    def lost_rows(self) -> int:
        with psycopg.connect(self.cluster.conninfo(self.name), autocommit=True) as link:
            row = link.execute("SELECT count(*) FROM harmony_demo WHERE id > %s", (LOST,)).fetchone()
        assert row is not None
        return int(row[0])

    def kept(self) -> list[Path]:
        return sorted(self.node.folder.glob("data.harmony-old-*"))


class Patient(Cluster):
    """Nothing is rejoined here that could still be hoped for."""

    def settings(self, node: Node) -> dict[str, object]:
        return super().settings(node) | {"rejoin": {"after_s": 3600.0}}


def test_a_diverged_old_primary_is_rewound_at_once() -> None:
    """What only it had is gone; nothing that a client saw acknowledged is; never two primaries."""
    with under_load(Patient) as running:
        old = Old(running)
        old.diverge()
        running.cluster.start_supervisor(old.name)
        running.until("it is back as a streaming standby", old.back, 90)
        running.until("it was rewound", lambda: "rewound to" in old.log())
        assert old.lost_rows() == 0
        assert old.kept() == []
        running.until("nothing is under way any more", lambda: old.progress() == "")
        running.check(old.fault_ns, old.leader())


def test_it_is_rewound_once_the_new_primary_has_a_checkpoint_on_its_timeline() -> None:
    """pg_rewind before 16 takes an earlier source for one of the timeline that it left: it is waited for, told, and
    hurried. Later ones do not, and nothing is waited for."""
    with under_load(Patient) as running:
        primary = running.cluster.nodes[running.cluster.node_at(running.recorders.writer.acks[-1].port)]
        with as_postgres(primary) as link:
            # So many dirty pages that PostgreSQL by itself takes minutes for the checkpoint after the promotion.
            link.execute("CREATE TABLE dirty AS SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g")
        old = Old(running)
        old.diverge()
        running.cluster.start_supervisor(old.name)
        running.until("it is back as a streaming standby", old.back, 60)
        early = int(running.cluster.parts.postgres.version.split(".")[0]) < 16
        led = (running.cluster.nodes[old.leader()].folder / "node.log").read_text()
        assert (f"waiting for {old.leader()}'s first checkpoint on its timeline" in old.log()) is early
        assert ("checkpoint ahead of a rewind" in led) is early
        running.until("it was rewound", lambda: "rewound to" in old.log())
        assert old.kept() == []
        running.check(old.fault_ns, old.leader())


def test_without_the_wal_for_a_rewind_it_is_copied_and_the_old_one_kept(running: Running) -> None:
    """After a rewind that cannot be."""
    old = Old(running)
    old.diverge(segments=3)
    running.cluster.start_supervisor(old.name)
    copying: list[psutil.Process] = []

    def held() -> bool:
        copying.extend(p for p in psutil.process_iter() if old.copies(p) and procs.send(p, signal.SIGSTOP))
        return copying != []

    running.until("it copies", held, 60)
    running.until("that can be read at another node", lambda: "copying" in old.status(), 30)
    assert "down" in old.status()
    for process in copying:
        procs.send(process, signal.SIGCONT)
    running.until("it is back as a streaming standby", old.back, 120)
    running.until("it was copied", lambda: "copied anew from" in old.log())
    assert old.lost_rows() == 0
    (kept,) = old.kept()
    assert (kept / "by-hand.log").exists(), "it is the old one"
    assert (kept / "global" / "pg_control").exists()
    running.check(old.fault_ns, old.leader())


def test_an_agent_and_a_fencer_that_are_killed_meanwhile(running: Running) -> None:
    """C2: the agent after its order, the fencer while it copies, the agent at the next order: it ends all the same."""
    old = Old(running)
    old.diverge(segments=3)
    running.cluster.start_supervisor(old.name)
    running.until("a rejoin is ordered", lambda: old.rejoins() == 1, 60)
    old.kill("harmony.agent")
    running.until("it copies", (old.node.folder / "data.harmony-new").exists, 60)
    old.kill("harmony_fencer")
    running.until("another is ordered", lambda: old.rejoins() == 2, 60)
    old.kill("harmony.agent")
    running.until("it is back as a streaming standby", old.back, 120)
    assert old.lost_rows() == 0
    running.check(old.fault_ns, old.leader())


def test_a_standby_that_cannot_start_is_copied(running: Running) -> None:
    """Its WAL is gone: named, tried again with a longer and longer pause, then copied; the old one is kept."""
    old = Old(running)
    for file in (old.node.data_dir / "pg_wal").iterdir():
        if file.is_file():
            file.unlink()
    running.cluster.start_supervisor(old.name)
    running.until("it is back as a streaming standby", old.back, 120)
    told = [line for line in old.log().splitlines() if '"event": "decision"' in line]
    assert any("valid checkpoint record" in line for line in told)  # what status shows as well, for a moment
    running.until("it was copied", lambda: "copied anew from" in old.log())
    assert len(old.kept()) == 1
    running.check(old.fault_ns, old.leader())
