"""A primary that runs since before Harmony: founded for, waited with, taken over; and nobody else leads meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.core.messages import (
    Command,
    DbSeen,
    DbSilent,
    Event,
    FencerSeen,
    MemberSeen,
    Order,
    RefreshDone,
    Walsender,
    Write,
    WriteDone,
)
from harmony.core.node import initial, step
from harmony.core.observe import stale
from harmony.core.states import State
from harmony.core.timing import NS
from harmony.core.view import View
from harmony.records import CLUSTER_STATE, ClusterState
from tests.core.helpers import EPOCH, FAST, T0, cluster, fencer, identity, member, seen

TICK = NS // 10


class Node:
    """One node on a store that acknowledges everything, with a PostgreSQL that runs as a primary."""

    def __init__(self, name: str, *, sync: int = 1, **fencer_: object) -> None:
        self.me = identity(name, sync=sync)
        self.view: View = initial(self.me)
        self.now, self.revision = T0, 10
        new: dict[str, object] = {"highest": (0, 0), "following": None, "is_standby": False}
        self.fencer = fencer(name, **new | {"adopting": True} | fencer_)
        self.db = DbSeen("primary", 7, 5000, 0, False, "sys", T0)
        self.silent = False  # the database does not answer
        self.pending: list[Event] = [seen(None, 0)]
        self.orders: list[Order] = []
        self.records: list[ClusterState] = []

    def run(self, ticks: int) -> None:
        for _ in range(ticks):
            self.now += TICK
            db = DbSilent("") if self.silent else replace(self.db, asked_ns=self.now)
            events = [*self.pending, self.fencer, db, RefreshDone(ok=True)]
            self.view, commands = step(self.view, events, self.me, FAST, self.now)
            self.pending = []
            for c in commands:
                self._carry_out(c)

    def _carry_out(self, c: Command) -> None:
        if isinstance(c, Order):
            self.orders.append(c)
        if isinstance(c, Write):
            self.revision += 1
            self.pending.append(WriteDone(c.key, c.attempt, "acked", self.revision))
            if c.key == CLUSTER_STATE:
                assert isinstance(c.record, ClusterState)
                self.records.append(c.record)

    def shows(self, **changes: object) -> None:
        self.fencer = FencerSeen(replace(self.fencer.view, **changes))  # type: ignore[arg-type]

    def streaming(self, *names: str, synchronous: bool = False) -> None:
        found = tuple(Walsender(name, True, 5000) for name in names)
        self.db = replace(self.db, walsenders=found, names='ANY 1 ("n2", "n3")' if synchronous else "")


@pytest.mark.parametrize("name", ["n1", "n2"])
def test_an_adoption(name: str) -> None:
    """Founded with the mark; led only when enough standbys stream under their names; the mark goes with the lease."""
    node = Node(name)
    other = "n3"
    node.run(40)
    assert node.view.state is State.ADOPTING
    assert node.orders == [], "a commit would wait for standbys that nobody has taken over yet"
    assert all(r.adopting for r in node.records)
    assert len(node.records) > 3, "it says that it lives"
    node.streaming(other)
    node.run(5)
    (order,) = node.orders
    assert (order.op, order.generation, order.sync_count) == ("activate", (1, 1), 1)
    assert order.deadline_ns > node.now
    done = {
        "order": (1, 1),
        "order_op": "activate",
        "order_state": "done",
        "highest": (1, 1),
        "active": (1, 1),
    }
    node.shows(**done, adopting=False, lease_deadline_ns=node.now + FAST.lease_ns)
    node.run(5)
    assert node.view.state is State.ADOPTING, "the synchronous rule is not in force yet"
    assert node.records[-1].adopting, "a commit could still be acknowledged that only this node has"
    node.streaming(other, synchronous=True)
    node.run(10)
    assert node.view.state is State.HEALTHY
    assert (node.records[-1].adopting, node.records[-1].timeline, node.records[-1].term) == (False, 7, 1)


def test_without_synchronous_replication_no_standby_is_waited_for() -> None:
    node = Node("n1", sync=0)
    node.run(40)
    assert {o.op for o in node.orders} == {"activate"}, "one that the fencer does not take is sent again"
    assert {o.generation for o in node.orders} == {(1, 1)}


def test_a_store_that_fails_meanwhile_stops_nothing() -> None:
    """Until the lease PostgreSQL runs as before, whatever becomes of the store."""
    node = Node("n1")
    node.run(10)
    assert node.view.state is State.ADOPTING
    node._carry_out = lambda _: None  # type: ignore[method-assign]  # nothing is answered any more
    node.streaming("n2", "n3")
    node.run(200)
    assert (node.view.state, node.orders) == (State.ADOPTING, [])


def test_a_new_agent_takes_an_adoption_up() -> None:
    for name in ("n1", "n2"):
        node = Node(name)
        mine = {"primary": name, "primary_fencer_id": f"id-{name}", "last_primary": name, "term": 1}
        node.pending = [seen(cluster(**mine, adopting=True, status=State.ADOPTING), 50)]
        node.run(3)
        assert (node.view.state, node.orders) == (State.ADOPTING, [])


def test_without_the_permit_it_is_fenced_as_any_other() -> None:
    """The postmaster that was permitted is gone: what runs now has no right to write."""
    node = Node("n1")
    node.run(10)
    node.shows(adopting=False)
    node.run(2)
    assert (node.view.state, [o.op for o in node.orders]) == (State.P_FAILED, ["fence"])


def test_nobody_takes_over_from_what_holds_no_lease() -> None:
    """It would not stop when its heartbeats do."""
    for adopting in (True, False):
        me = identity("n2")
        events: list[Event] = [fencer(), seen(cluster(adopting=adopting), 50)]
        v, commands = step(initial(me), [*events, MemberSeen("n2", member("n2"), 60, EPOCH)], me, FAST, T0)
        for i in range(1, 100):
            events = [WriteDone(c.key, c.attempt, "acked", 60 + i) for c in commands if isinstance(c, Write)]
            events += [MemberSeen("n2", member("n2"), 60 + i, EPOCH + i * TICK), RefreshDone(ok=True)]
            v, commands = step(v, events, me, FAST, T0 + i * TICK)
        assert stale(v, FAST, T0 + 100 * TICK) is not adopting


def test_a_standby_of_an_unknown_primary_founds_nothing() -> None:
    """Started on the standbys first, Harmony must not make one of them a second primary."""
    standby = {"adopting": False, "is_standby": True}
    node = Node("n1", **standby)
    node.db = DbSeen("standby", 7, 5000, 5000, True, "sys", T0)
    node.run(30)
    assert (node.view.state, node.records, node.orders) == (State.P_INITIALIZING, [], [])
    assert "harmonyctl adopt" in node.view.why
