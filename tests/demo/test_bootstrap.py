"""A cluster from nothing: the founder by initdb, the standbys by a copy; and one that lost its disk."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from harmony.demo import procs
from harmony.demo.cluster import Cluster
from harmony.demo.comeback import is_back
from harmony.demo.databases import CONTENT, Node
from tests.demo.running import Running, under_load

pytestmark = pytest.mark.real


class FromNothing(Cluster):
    """No data directory anywhere. The founder's fencer is killed in its first initdb."""

    def settings(self, node: Node) -> dict[str, object]:
        file = self.base / "roles.sql"
        me = self.parts.users.postgres or pwd.getpwuid(os.geteuid()).pw_name
        other = f'CREATE ROLE "{me}" LOGIN SUPERUSER;' if me != "postgres" else ""
        file.write_text(f"-- roles and tables\n\n{CONTENT}\n{other}\n")
        made = {
            "method": "initdb",
            "initdb_options": [
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "-k",
                "-N",
            ],
            "hba": [
                "local all all trust",
                "host all all 127.0.0.1/32 trust",
                "host replication all 127.0.0.1/32 trust",
            ],
            "sql_file": str(file),
        }
        return super().settings(node) | {"bootstrap": made}

    def start(self, say: Callable[[str], object]) -> None:
        self.start_nats()
        self.lay_out()
        for node in self.nodes.values():
            if self.parts.users.postgres is not None:
                shutil.chown(node.folder, self.parts.users.postgres)
            self._write_config(node)
        nodes = list(self.nodes.values())
        (nodes[1].data_dir).mkdir(mode=0o700)  # empty, where the others have none
        if self.parts.users.postgres is not None:
            shutil.chown(nodes[1].data_dir, self.parts.users.postgres)
        for name in self.nodes:
            self.start_supervisor(name)
        new, data = nodes[0].folder / "data.harmony-new", nodes[0].data_dir
        until = time.monotonic() + 30
        while not (new / "PG_VERSION").exists():
            assert time.monotonic() < until, self.tail(nodes[0].folder / "node.log")
            time.sleep(0.005)
        for process in procs.with_argument(nodes[0].folder, ("harmony_fencer",)):
            procs.send(process, signal.SIGKILL)
        assert not (data / "PG_VERSION").exists(), "what was interrupted is no cluster"
        self._wait_until_replicating(say)


def identifier(cluster: Cluster, name: str) -> str:
    try:
        with psycopg.connect(cluster.conninfo(name, "harmony"), autocommit=True) as link:
            row = link.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    except psycopg.Error:
        return ""
    return str(row[0]) if row is not None else ""


@pytest.fixture
def running() -> Iterator[Running]:
    with under_load(FromNothing) as found:
        yield found


def test_a_cluster_from_nothing(running: Running) -> None:
    """One founder, its roles, two copies; a failover; and a node with an empty disk comes back by itself."""
    cluster = running.cluster
    log = (cluster.nodes["n1"].folder / "node.log").read_text()
    assert "making a new cluster" in log or "put in place" in log
    identifiers = set()
    for name in cluster.nodes:
        running.until(f"{name} answers", lambda name=name: identifier(cluster, name) != "", 30)  # type: ignore[misc]
        identifiers.add(identifier(cluster, name))
        left = sorted(p.name for p in cluster.nodes[name].folder.glob("data*"))
        assert left == ["data"], "nothing is left beside it"
    assert len(identifiers) == 1

    leader, fault_ns = running.fail_over()
    shutil.rmtree(cluster.nodes["n1"].data_dir)
    cluster.start_supervisor("n1")
    newest = running.recorders.writer.acks[-1].id
    running.until("a new disk is filled", lambda: is_back(cluster, "n1", leader, newest), 90)
    running.check(fault_ns, leader)
