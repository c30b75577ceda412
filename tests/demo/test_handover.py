"""Leadership handed over between real nodes: on an operator's wish, when a node is stopped, and back again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from harmony.demo import measure, procs
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster, ask_status, make_base
from harmony.demo.databases import Node
from harmony.demo.recorder import Recorders
from harmony.records import ClusterState

pytestmark = pytest.mark.real


class Polite(Cluster):
    """As nodes are installed: the one that is stopped hands over, and the preferred primary is given its place back."""

    def settings(self, node: Node) -> dict[str, object]:
        more = {"on_stop": "handover", "failback": "automatic", "failback_after_s": 3.0}
        return super().settings(node) | {"failover": {"maximum_changes": 0} | more}


class Running:
    """A cluster under load."""

    def __init__(self, cluster: Cluster, recorders: Recorders) -> None:
        self.cluster, self.recorders = cluster, recorders

    def until(self, what: str, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(
            f"{n}: {self.cluster.tail(node.folder / 'node.log', 3000)}"
            for n, node in self.cluster.nodes.items()
        )

    def acks_by(self, name: str, since_ns: int) -> int:
        return self.recorders.acked_at(self.cluster.nodes[name].port, since_ns)

    def record(self, name: str) -> ClusterState:
        reply = ask_status(self.cluster.nodes[name].folder / "run" / "agent" / "agent.sock", 2.0)
        assert reply is not None
        assert reply.cluster is not None
        return reply.cluster

    def harmonyctl(self, asker: str, *arguments: str) -> tuple[int, str]:
        config = ("--config", str(self.cluster.nodes[asker].config))
        argv = [sys.executable, "-I", "-m", "harmony", *arguments, *config]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    def check(self, since_ns: int, at: str) -> float:
        """Nothing lost, never two; the longest pause of the client since then, in seconds."""
        self.recorders.stop()
        with psycopg.connect(self.cluster.conninfo(at) + " connect_timeout=5", autocommit=True) as link:
            stored = [int(row[0]) for row in link.execute("SELECT id FROM harmony_demo").fetchall()]
        acks = [a.id for a in self.recorders.writer.acks]
        assert acks
        assert measure.lost_rows(acks, stored) == ()
        recordings = {name: r.recording for name, r in self.recorders.probers.items()}
        assert measure.dual_primary_s(recordings) == 0
        return measure.outage_s(self.recorders.writer.acks, since_ns)


@pytest.fixture
def running() -> Iterator[Running]:
    base = make_base()
    cluster = Polite.prepare("fast", base)
    recorders = None
    try:
        cluster.start(lambda _: None)
        probes = {name: cluster.conninfo(name) for name in cluster.nodes}
        recorders = Recorders(base / "clients", cluster.writer_conninfo, probes)
        found = Running(cluster, recorders)
        found.until("n1 accepts writes", lambda: found.acks_by("n1", 0) > 20)
        yield found
    finally:
        if recorders is not None:
            recorders.stop()
        left = cluster.stop()
        shutil.rmtree(base, ignore_errors=True)
        assert left == []


def test_a_switchover_and_the_way_back(running: Running) -> None:
    """W1, W3, W7: named, confirmed, demoted cleanly, and back to the preferred primary when it has caught up."""
    code, text = running.harmonyctl("n3", "switchover", "--dry-run")
    assert (code, "n2: could take over" in text, "n3: could take over" in text) == (0, True, True), text
    for to, why in (("n1", "the primary already"), ("n9", "not a member")):
        code, text = running.harmonyctl("n3", "switchover", "--to", to)
        assert code == 1, text
        assert why in text
    assert running.record("n3").term == 1, "nothing of that has done anything"
    began = boottime_ns()
    code, text = running.harmonyctl("n3", "switchover", "--to", "n2")
    assert (code, "n2 leads in term 2" in text) == (0, True), text
    running.until("n2 accepts writes", lambda: running.acks_by("n2", began) > 20)
    log = (running.cluster.nodes["n1"].folder / "node.log").read_text()
    assert log.index("checkpoint ahead of the hand-over") < log.index("demoting for n2")
    assert running.record("n3").primary == "n2"
    assert running.record("n3").changes == (), "a hand-over is no failover"
    back = boottime_ns()
    running.until("the preferred primary leads again", lambda: running.acks_by("n1", back) > 20, 60)
    # Both pauses together are far below what a failover would take: nobody waited for staleness.
    assert running.check(began, "n1") < 4.0


def test_a_node_that_is_stopped_hands_over_first(running: Running) -> None:
    """O1, W7: `systemctl stop harmony` on the primary: no staleness is waited for, nothing is lost."""
    began = boottime_ns()
    supervisor = running.cluster.supervisors["n1"]
    procs.send(supervisor, signal.SIGTERM)
    others = ("n2", "n3")
    running.until("another accepts writes", lambda: any(running.acks_by(n, began) > 20 for n in others))
    assert supervisor.wait(timeout=15) == 0
    assert procs.postgres_of(running.cluster.nodes["n1"].data_dir) == []
    record = running.record("n2")
    assert record.primary in others
    assert record.changes == (), "a hand-over is no failover"
    running.cluster.start_supervisor("n1")
    back = boottime_ns()
    running.until("it comes back and is given its place", lambda: running.acks_by("n1", back) > 20, 90)
    assert running.check(began, "n1") < 4.0
    assert Path(running.cluster.nodes["n1"].data_dir, "postmaster.pid").exists()
