"""A whole cluster under load, for tests that do something to it and look at what comes of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg

from bench.ha.merged import merged
from harmony.demo import measure
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster, ask_status, make_base, remove_base
from harmony.demo.recorder import Recorders
from harmony.demo.scenarios import Fault, Scenario
from harmony.records import ClusterState
from tests import pace

T = TypeVar("T")
TEMPLATES = tempfile.TemporaryDirectory(prefix="harmony-template-")  # for as long as Python runs


class Running:
    """A cluster under load."""

    def __init__(self, cluster: Cluster, recorders: Recorders) -> None:
        self.cluster, self.recorders = cluster, recorders

    def until(self, what: str, condition: Callable[[], T], seconds: float = 60.0) -> T:
        """What the condition gave when it held."""
        deadline = time.monotonic() + pace.wait_s(seconds)
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.logs()}"
            time.sleep(0.05)
        return found

    def logs(self) -> str:
        """The last lines of all nodes, in the order of time."""
        lines = merged(self.cluster.logs(), []).splitlines()
        return "\n".join(line[:400] for line in lines[-150:])

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

    def fail_over(self) -> tuple[str, int]:
        """n1, which leads, is killed whole: who leads then, and when it was (boot clock, ns)."""
        self.until("what commits wait for is recorded", lambda: self.record("n2").sync_count == 1, 60)
        fault_ns, others = boottime_ns(), ("n2", "n3")
        Fault(Scenario.NODE_KILLED, self.cluster, "n1").apply()
        self.until("another accepts writes", lambda: any(self.acks_by(n, fault_ns) > 20 for n in others))
        return next(n for n in others if self.acks_by(n, fault_ns)), fault_ns

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


@contextmanager
def under_load(kind: type[Cluster]) -> Iterator[Running]:
    """Three nodes, one of them leading, and clients that write; all gone afterwards."""
    base = make_base()
    cluster = kind.prepare("fast", base)
    cluster.template = Path(TEMPLATES.name) / cluster.parts.postgres.version
    recorders = None
    try:
        cluster.start(lambda _: None)
        probes = {name: cluster.conninfo(name) for name in cluster.nodes}
        recorders = Recorders(base / "clients", cluster.writer_conninfo, probes)
        found = Running(cluster, recorders)
        found.until("one accepts writes", lambda: any(found.acks_by(n, 0) > 20 for n in cluster.nodes))
        yield found
    finally:
        if recorders is not None:
            recorders.stop()
        left = cluster.stop()
        remove_base(base)
        assert left == []
