"""Replication slots in a whole cluster on real parts: kept up everywhere, used, bounded, there after a failover."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster, ask_status
from harmony.demo.comeback import is_back
from harmony.demo.databases import Node
from harmony.demo.scenarios import Fault, Scenario
from harmony.records import slot_name
from tests.demo.running import Running, under_load

pytestmark = pytest.mark.real
KEEP_MB = 64


class WithSlots(Cluster):
    """A permanent slot, and a bound that is soon reached."""

    def settings(self, node: Node) -> dict[str, object]:
        made = super().settings(node)
        replication = {"slot_wal_keep_mb": KEEP_MB, "permanent_slots": {"backup": {"type": "physical"}}}
        return made | {"replication": {"mode": "quorum", "synchronous_count": 1} | replication}


@pytest.fixture
def running() -> Iterator[Running]:
    with under_load(WithSlots) as found:
        yield found


class Slots:
    """What the nodes' databases have."""

    def __init__(self, running: Running) -> None:
        self.running, self.cluster = running, running.cluster

    def ask(self, name: str, sql: str) -> list[tuple[object, ...]]:
        try:
            with psycopg.connect(
                self.cluster.conninfo(name, "postgres") + " connect_timeout=2", autocommit=True
            ) as link:
                done = link.execute(sql.encode())
                return done.fetchall() if done.description else []
        except psycopg.OperationalError:
            return []

    def names(self, name: str) -> set[str]:
        return {str(r[0]) for r in self.ask(name, "SELECT slot_name FROM pg_replication_slots")}

    def active(self, name: str) -> set[str]:
        return {str(r[0]) for r in self.ask(name, "SELECT slot_name FROM pg_replication_slots WHERE active")}

    def lsn(self, name: str, slot: str) -> int:
        sql = "SELECT slot_name, COALESCE(restart_lsn, '0/0') - '0/0'::pg_lsn FROM pg_replication_slots"
        return next((int(str(lsn)) for found, lsn in self.ask(name, sql) if found == slot), 0)

    def notes(self, name: str) -> str:
        reply = ask_status(self.cluster.nodes[name].admin_socket, 2.0)
        found = [n.member for n in reply.nodes if n.name == name] if reply is not None else []
        return " ".join(found[0].notes) if found and found[0] is not None else ""

    def fill(self, name: str, segments: int) -> None:
        for _ in range(segments):
            self.ask(name, "SELECT pg_logical_emit_message(false, 'x', 'x')")
            self.ask(name, "SELECT pg_switch_wal()")
        self.ask(name, "CHECKPOINT")


def test_slots_through_a_failover(running: Running) -> None:
    """Made, used and moved on every member; at a failover nobody waits for one; the old primary's hold nothing back."""
    s, cluster = Slots(running), running.cluster
    old = cluster.node_at(running.recorders.writer.acks[-1].port)
    others = sorted(set(cluster.nodes) - {old})
    for name in cluster.nodes:
        wanted = {slot_name(n) for n in cluster.nodes if n != name} | {"backup"}
        running.until(f"{name} has {wanted}", lambda n=name, w=wanted: s.names(n) == w)  # type: ignore[misc]
    running.until("both stream through theirs", lambda: s.active(old) == {slot_name(n) for n in others}, 40)
    for name in (old, others[0]):  # somebody's own
        s.ask(name, "SELECT pg_create_physical_replication_slot('mine', true)")
    first, second = others
    was = {slot: s.lsn(first, slot) for slot in (slot_name(second), slot_name(old), "mine")}
    s.fill(old, 3)
    s.ask(
        first, "CHECKPOINT"
    )  # what a rewind of the primary would need moves on with this one's restartpoints
    s.ask(old, "SELECT pg_replication_slot_advance('backup', pg_current_wal_lsn())")
    running.until(
        "the standby moves them on",
        lambda: (
            all(s.lsn(first, slot_name(n)) > was[slot_name(n)] for n in (second, old))
            and all(s.lsn(n, "backup") >= s.lsn(old, "backup") > 0 for n in others)
        ),
    )
    assert s.lsn(first, "mine") == was["mine"], "somebody's own is left alone"
    backup = s.lsn(old, "backup")

    fault_ns = boottime_ns()
    Fault(Scenario.NODE_KILLED, cluster, old).apply()
    running.until("another accepts writes", lambda: any(running.acks_by(n, fault_ns) > 20 for n in others))
    new = next(n for n in others if running.acks_by(n, fault_ns))
    left = next(n for n in others if n != new)
    running.until("it streams through its slot at once", lambda: s.active(new) == {slot_name(left)}, 5)
    assert {slot_name(old), "backup"} <= s.names(new)
    assert s.lsn(new, "backup") >= backup, "a permanent slot is not set back"

    # Beyond the bound: the slot of who is away is given up, and made anew when it is back, by a copy.
    for name in others:
        s.ask(name, "ALTER SYSTEM SET wal_keep_size = 0")
        s.ask(name, "SELECT pg_reload_conf()")
    s.fill(new, KEEP_MB // 16 + 8)
    s.fill(new, 2)
    running.until("what holds too much is dropped", lambda: slot_name(old) not in s.names(new), 25)
    cluster.start_supervisor(old)
    row = running.recorders.writer.acks[-1].id
    running.until("it is back, copied", lambda: is_back(cluster, old, new, row), 60)
    running.until("and streams through its slot", lambda: slot_name(old) in s.active(new), 40)
    wanted = {slot_name(n) for n in others}
    running.until("with the slots of the others, and none of before", lambda: s.names(old) == wanted, 30)
    assert "slot backup is lost" in s.notes(new), (
        "nobody moved it for long: that is its owner's loss, and told"
    )
    running.check(fault_ns, new)
