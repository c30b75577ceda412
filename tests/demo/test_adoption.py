"""A primary with standbys that runs since before Harmony is taken over: no restart, no error; then it fails over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from harmony.demo import procs
from harmony.demo.cluster import HOST, Cluster, ask_status
from harmony.demo.databases import Node, make_databases
from harmony.demo.parts import run_as
from tests import pace
from tests.demo.running import Running, under_load

pytestmark = [pytest.mark.real, pytest.mark.sampled(1, group="a running cluster is adopted")]


class ByHand(Cluster):
    """A primary and two standbys as a DBA runs them, by pg_ctl and with their own settings. Harmony is not started."""

    def start(self, _: Callable[[str], object]) -> None:
        self.start_nats()
        self.lay_out()
        make_databases(self.parts, list(self.nodes.values()))
        for node in self.nodes.values():
            self._write_config(node)
            if node.name != "n1":
                self.add(
                    node, f"primary_conninfo = 'host={HOST} port={self.nodes['n1'].port} user=replicator'"
                )
            if node.name != "n3":  # one is forgotten
                self.read_ours(node)
            self.pg_ctl(node, "start", "-l", str(node.data_dir / "dba.log"))

    def add(self, node: Node, line: str) -> None:
        with (node.data_dir / "postgresql.conf").open("a") as file:
            file.write(line + "\n")

    def read_ours(self, node: Node) -> None:
        self.add(node, f"include_if_exists '{node.data_dir}/harmony.included.conf'")

    def pg_ctl(self, node: Node, *arguments: str) -> None:
        pg = self.parts.postgres
        argv = [str(pg.bin_dir / "pg_ctl"), *arguments, "-w", "-D", str(node.data_dir)]
        done = run_as(self.parts.users.postgres, argv, pg.library_dir, 60)
        assert done.returncode == 0, done

    def postmaster(self, name: str) -> int:
        return int((self.nodes[name].data_dir / "postmaster.pid").read_text().split()[0])


class Client:
    """Writes all the time on one connection; `error` is what it saw, `slowest_s` its longest wait."""

    def __init__(self, conninfo: str) -> None:
        self.error, self.slowest_s, self.rows = "", 0.0, 0
        self._conninfo, self._over = conninfo, threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as link:
                while not self._over.is_set():
                    began = time.monotonic()
                    link.execute("INSERT INTO harmony_demo_probe VALUES (%s)", (self.rows,))
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                    self.rows += 1
                    time.sleep(0.005)
        except psycopg.Error as e:
            self.error = str(e)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)


@pytest.fixture
def running() -> Iterator[Running]:
    with under_load(ByHand) as found:
        yield found


def _line(running: Running, name: str) -> str:
    """What `harmonyctl status` of n2 says of a member."""
    _, text = running.harmonyctl("n2", "status", "--json")
    return next((part for part in text.split('"name":') if part.startswith(f'"{name}"')), "")


def test_a_running_cluster_is_adopted(running: Running) -> None:
    """Issue 5: the same postmasters before and after, a client that sees no error, standbys that stream on."""
    cluster = running.cluster
    assert isinstance(cluster, ByHand)
    before = {name: cluster.postmaster(name) for name in cluster.nodes}
    client = Client(cluster.conninfo("n1"))
    code, text = running.harmonyctl("n2", "adopt", "--yes", "--no-wait")
    assert (code, "run adopt where the primary runs" in text, "TWO" in text) == (1, True, False), text
    for name in ("n2", "n3"):
        cluster.start_supervisor(name)
    running.until("Harmony runs beside the standbys", lambda: "founding" not in _line(running, "n3") != "")

    code, text = running.harmonyctl("n1", "adopt", "--dry-run")
    assert (code, "does not read Harmony's settings" in text) == (0, False), text
    code, text = running.harmonyctl("n1", "adopt", "--yes", "--no-wait")
    assert (code, "permitted" in text, "streaming now" in text) == (0, True, True), text
    cluster.start_supervisor("n1")
    running.until("who cannot be taken over is named", lambda: "add as its last line" in _line(running, "n3"))
    cluster.read_ours(cluster.nodes["n3"])
    running.until("it is led", lambda: _led(running))
    assert {name: cluster.postmaster(name) for name in cluster.nodes} == before, "nobody was restarted"

    running.until("both stream under their names", lambda: _standbys(cluster) == ["n2", "n3"])
    time.sleep(1)
    client.stop()
    assert client.error == ""
    assert client.rows > 100
    assert client.slowest_s < 2.0 + pace.SLACK_S
    assert {name: cluster.postmaster(name) for name in cluster.nodes} == before
    assert running.harmonyctl("n2", "status")[0] == 0, "as a cluster that Harmony made"

    leader, fault_ns = running.fail_over()
    running.check(fault_ns, leader)


def _led(running: Running) -> bool:
    reply = ask_status(running.cluster.nodes["n2"].admin_socket, 2.0)
    record = reply.cluster if reply is not None else None
    return (
        record is not None
        and record.primary == "n1"
        and not record.adopting
        and record.status == "primary/healthy"
    )


def _standbys(cluster: Cluster) -> list[str]:
    with psycopg.connect(cluster.conninfo("n1", "harmony"), autocommit=True) as link:
        rows = link.execute(
            "SELECT application_name FROM pg_stat_replication WHERE state = 'streaming'"
        ).fetchall()
    return sorted(str(row[0]) for row in rows)


def test_an_interrupted_adoption_leaves_the_primary_running(running: Running) -> None:
    """Stopped, killed, without a store: until the lease nothing stops it, and it can be repeated. Without a permit it
    is stopped, as any primary without a lease."""
    cluster = running.cluster
    assert isinstance(cluster, ByHand)
    before = cluster.postmaster("n1")
    cluster.start_supervisor("n2")
    running.until("Harmony runs beside one standby", lambda: _line(running, "n2") != "")
    code, text = running.harmonyctl("n1", "adopt", "--dry-run", "--without", "n9")
    assert (code, "n9: not another configured member" in text) == (1, True), text
    assert running.harmonyctl("n1", "adopt", "--yes", "--no-wait")[0] == 0
    cluster.kill_nats()
    cluster.start_supervisor("n1")
    log = cluster.nodes["n1"].folder / "node.log"
    running.until("the fencer guards nothing yet", lambda: "is to be adopted" in log.read_text())
    time.sleep(3.5)  # longer than lease and fence
    for module in ("harmony_fencer", "harmony.agent"):
        for process in procs.with_argument(cluster.nodes["n1"].folder, (module,)):
            procs.send(process, signal.SIGKILL)
    running.until("a new fencer", lambda: log.read_text().count("is to be adopted") > 1)
    supervisor = cluster.supervisors["n1"]
    procs.send(supervisor, signal.SIGTERM)
    assert supervisor.wait(timeout=15) == 0
    assert cluster.postmaster("n1") == before
    os.kill(before, 0)
    cluster.start_nats()
    cluster.start_supervisor("n1")
    running.until("it is led", lambda: _led(running), 60)
    assert cluster.postmaster("n1") == before
    assert Path(f"/proc/{before}").exists()
