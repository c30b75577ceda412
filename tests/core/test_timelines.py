"""I2: a timeline is reserved in the store, by compare-and-set, before the promotion that begins it is ordered."""

from __future__ import annotations

import pytest

from harmony.core.messages import DbSeen, Event, FencerSeen, MemberSeen, Order, Write, WriteDone
from harmony.core.node import initial, step
from harmony.core.observe import observe
from harmony.core.states import State
from harmony.core.table import decide
from harmony.core.timing import NS
from harmony.core.view import View
from harmony.records import CLUSTER_STATE, ClusterState, Member
from tests.core.helpers import (
    EPOCH,
    FAST,
    T0,
    cluster,
    fencer,
    identity,
    member,
    observation,
    seen,
    standby,
)

TICK = NS // 20
DOWN = {"fence_proven": True, "postgres_up": False, "following": None}


class Driven:
    """A node, a store that acknowledges unless `deaf`, and a fencer that takes whatever it is ordered to."""

    def __init__(self, node: str, record: ClusterState, *members: Member, **down: object) -> None:
        self.me, self.now, self.revision, self.down = identity(node), T0, 50, down
        self.view: View = initial(self.me)
        self.records: list[ClusterState] = []
        self.orders: list[Order] = []
        self.fencer: FencerSeen = fencer(node, **down)
        self.others, self.deaf, self.found = members, False, 0
        self.writes = 0  # the timeline in which it does; 0: it is a standby
        self._told: list[Event] = [seen(record, 50), MemberSeen(node, None, 0, 0)]

    def until(self, op: str) -> Order:
        """The next order of that kind."""
        for _ in range(400):
            known = len(self.orders)
            self.tick()
            for order in self.orders[known:]:
                if order.op == op:
                    return order
        raise AssertionError(f"no {op}: {self.view.state} {self.view.row} {self.view.why} {self.orders}")

    def tick(self) -> None:
        self.now += TICK
        told, self._told = [*self._told, self.fencer], []
        told += [MemberSeen(m.node, m, self.now, EPOCH + self.now) for m in self.others]
        if not self.down:
            told.append(
                DbSeen("primary", self.writes, 950, 950, False, "sys", self.now)
                if self.writes
                else standby(self.now)
            )
        self.view, commands = step(self.view, told, self.me, FAST, self.now)
        for c in commands:
            match c:
                case Write(key=key, record=record) if not (self.deaf and key == CLUSTER_STATE):
                    self.revision += 1
                    self._told.append(WriteDone(key, c.attempt, "acked", self.revision))
                    self.records += [record] if isinstance(record, ClusterState) else []
                case Order(op="fence", generation=g):
                    self.orders.append(c)
                    done = {"highest": g, "order": g, "order_op": "fence", "order_state": "done", **DOWN}
                    self.fencer = fencer(self.me.node, timeline=self.found, **done)
                case Order():
                    self.orders.append(c)
                case _:
                    pass


def candidate(**record: object) -> Driven:
    vacancy = cluster(primary=None, primary_fencer_id=None, **record)
    settled = member("n3", received_lsn=900)
    return Driven("n2", vacancy, settled)


@pytest.mark.parametrize(("reserved", "timeline", "expected"), [(0, 4, 5), (4, 4, 5), (7, 4, 8), (3, 4, 5)])
def test_a_claim_reserves_what_its_promotion_begins(reserved: int, timeline: int, expected: int) -> None:
    """Newer than any that was reserved before, whether or not anybody has seen it begin."""
    d = candidate(reserved=reserved, timeline=timeline)
    order = d.until("activate")
    assert order.timeline == expected
    assert d.records[0].primary == "n2"
    assert d.records[0].reserved == expected
    assert d.view.reserved == 0  # used up


@pytest.mark.parametrize(
    ("known", "expected"),
    [((5, 900), (5, 900)), ((4, 700), (5, 0)), ((5, 0), (5, 0))],
    ids=["its fencer knows", "of another timeline", "not known"],
)
def test_where_a_timeline_begins_is_recorded_with_it(
    known: tuple[int, int], expected: tuple[int, int]
) -> None:
    """By the fencer's word; what was recorded of the timeline before is not kept."""
    d = candidate(timeline=4, begins=300)
    order = d.until("activate")
    assert (d.records[0].timeline, d.records[0].begins) == (4, 300)
    d.fencer = fencer(
        "n2",
        highest=order.generation,
        active=order.generation,
        lease_deadline_ns=d.now + 100 * NS,
        order=order.generation,
        order_op="activate",
        order_state="done",
        following=None,
        is_standby=False,
        timeline=known[0],
        begins=known[1],
    )
    d.writes = 5
    for _ in range(40):
        d.tick()
    assert (d.records[-1].timeline, d.records[-1].begins) == expected


def test_a_newer_one_that_a_member_shows_counts() -> None:
    """It was promoted by hand: nobody has reserved that."""
    d = Driven(
        "n2", cluster(primary=None, sync_count=0, sync_voters=()), member("n3", timeline=9, latched=True)
    )
    assert d.until("activate").timeline == 10


def test_whoever_leads_anew_in_its_term_reserves_anew() -> None:
    """Its first promotion of the term may have been acknowledged to clients that nobody else knows of."""
    d = Driven("n1", cluster(reserved=4), **DOWN)
    first = d.until("activate")
    for _ in range(15):
        d.tick()
    assert (first.timeline, d.records[-1].reserved) == (5, 5)
    d.fencer = fencer(
        "n1",
        highest=first.generation,
        order=first.generation,
        order_op="activate",
        order_state="failed",
        **DOWN,
    )
    again = d.until("activate")
    assert (again.timeline, d.records[-1].reserved) == (6, 6)


def test_what_is_taken_here_is_not_reserved_again() -> None:
    """The fencer has found WAL of timeline 12: a newer one is needed."""
    d = Driven("n1", cluster(reserved=4), **DOWN)
    g = d.until("activate").generation
    d.fencer = fencer("n1", highest=g, order=g, order_op="activate", order_state="failed", **DOWN)
    d.found = 12
    assert d.until("activate").timeline == 13


def test_nothing_is_activated_on_a_reservation_that_nobody_has_acknowledged() -> None:
    d = Driven("n1", cluster(reserved=4), **DOWN)
    d.until("fence")
    d.deaf = True
    for _ in range(100):
        d.tick()
    assert [o.op for o in d.orders] == ["fence"]
    assert not observe(d.view, d.me, FAST, d.now).reserved


@pytest.mark.parametrize("state", [State.FENCED, State.PROMOTING])
def test_no_activation_without_a_reservation(state: State) -> None:
    quiet = observation(state, leads="me", postgres_up=False, db="down", fence_proven=True)
    assert "activate" in decide(quiet).do
    bare = observation(state, leads="me", postgres_up=False, db="down", fence_proven=True, reserved=False)
    assert "activate" not in decide(bare).do
