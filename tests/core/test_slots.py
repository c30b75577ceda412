"""The core's part of replication slots: through which one to follow, and whose duty they are."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from harmony.core import slots
from harmony.core.fold import fold
from harmony.core.messages import Order, Surveyed
from harmony.core.node import _generation, member_record, step
from harmony.core.states import State
from harmony.core.timing import NS
from harmony.core.view import SentOrder, View
from harmony.records import slot_name
from tests.core.helpers import FAST, T0, cluster, fencer, identity, member, standby

ME = identity()
MINE = slot_name("n2")


def survey(streams_by: str = "", asked_ns: int = T0) -> Surveyed:
    return Surveyed(asked_ns, {"harmony_member_n1": 5}, streams_by, {"max_connections": 100}, ("note",))


def watching(primary_slots: dict[str, int] | None, **changes: object) -> View:
    """A standby of n1 that streams."""
    v = View(
        state=State.WATCHING,
        read_ok=True,
        cluster=cluster(),
        revision=50,
        members={
            "n1": member("n1", db="primary", slots=primary_slots, limits={"max_connections": 7}),
            "n3": member("n3"),
        },
        member_changed_ns={"n1": T0, "n3": T0},
        fencer=fencer().view,
        fencer_silent="",
        db=standby(T0),
        db_ns=T0,
        streams=5,
        first_seen_ns=T0,
        silent_from_ns=T0,
        last_step_ns=T0,
        survey=survey(),
    )
    return replace(v, **changes)


def test_a_slot_is_taken_up_as_soon_as_it_is_there() -> None:
    """Not before: a slot that is missing keeps a standby from streaming."""
    assert not slots.change(watching(None), ME, FAST, T0)
    assert not slots.change(watching({}), ME, FAST, T0)
    assert not slots.change(watching({"harmony_member_n3": 1}), ME, FAST, T0)
    assert slots.change(watching({MINE: 1}), ME, FAST, T0)
    assert not slots.change(watching({MINE: 1}, survey=survey(MINE)), ME, FAST, T0)
    assert not slots.change(watching({MINE: 1}, survey=None), ME, FAST, T0)
    assert not slots.change(watching({MINE: 1}, survey=survey("by_alter_system")), ME, FAST, T0), (
        "no order helps"
    )


def test_a_slot_that_is_gone_is_given_up_only_where_nothing_streams() -> None:
    silent = {"survey": survey(MINE), "streams": 0, "unstreamed_ns": T0 - slots.TURNED_AWAY_NS}
    assert slots.change(watching({}, **silent), ME, FAST, T0)
    assert not slots.change(watching(None, **silent), ME, FAST, T0), (
        "not known: an agent that has just started"
    )
    assert not slots.change(watching({MINE: 1}, **silent), ME, FAST, T0), "it is there: another reason"
    assert not slots.change(watching({}, survey=survey(MINE)), ME, FAST, T0), "it streams: left alone"
    assert not slots.change(watching({}, **silent | {"unstreamed_ns": T0 - 1}), ME, FAST, T0)


def test_not_one_order_after_the_other() -> None:
    """Each restarts the WAL receiver; and PostgreSQL needs a moment until it says what it was told."""
    sent = SentOrder((3, 1), "follow", T0, primary="n1", done_ns=T0 + NS)
    v = watching({MINE: 1}, order=sent)
    later = T0 + slots.BEATS * FAST.interval_ns
    early, fresh = survey(asked_ns=T0 + 2 * NS - 1), survey(asked_ns=T0 + 2 * NS)
    assert not slots.change(replace(v, survey=early), ME, FAST, later)
    assert slots.change(replace(v, survey=fresh), ME, FAST, later)
    assert not slots.change(replace(v, survey=fresh), ME, FAST, later - 1)


def test_the_order_says_whether_the_slot_is_there() -> None:
    """Also the first one after a failover, and that of a rejoin: by the new primary's own record."""
    for there, expected in (({MINE: 1}, True), ({}, False), (None, False)):
        v = watching(there, fencer=fencer(following="n3").view)
        _, commands = step(v, [], ME, FAST, T0)
        (order,) = [c for c in commands if isinstance(c, Order)]
        assert (order.op, order.primary, order.slot) == ("follow", "n1", expected)
    _, commands = step(watching({MINE: 1}), [], ME, FAST, T0)
    (order,) = [c for c in commands if isinstance(c, Order)]
    assert (order.op, order.slot, order.reason[:7]) == ("follow", True, "row 717")


def test_who_follows_the_same_node_through_another_slot_stays_a_standby() -> None:
    """PostgreSQL only reads a setting anew: a switchover to it is not refused meanwhile."""
    now = T0 + NS // 100
    for following, expected in (("n1", "standby"), ("n3", "unknown")):
        v, commands = step(watching({MINE: 1}, fencer=fencer(following=following).view), [], ME, FAST, T0)
        (order,) = [c for c in commands if isinstance(c, Order)]
        for state in ("running", "done"):
            told = fencer(following=following, order=order.generation, order_op="follow", order_state=state)
            v = fold(v, told, ME, FAST, now)
            assert (member_record(v, ME, FAST, now, "a").db, v.streams) == (expected, 0), (following, state)
        down = fold(v, fencer(order=order.generation, postgres_up=False), ME, FAST, now)
        assert member_record(down, ME, FAST, now, "a").db == "down", "it was restarted for it"


def test_who_becomes_a_standby_of_nobody_is_not_yet_known_to_be_one() -> None:
    """Where the place is vacant PostgreSQL follows nobody, before the order and after it: that is not the same."""
    before = fencer(following=None, is_standby=False).view
    vacant = watching({}, cluster=cluster(primary=None), fencer=before)
    v, commands = step(vacant, [], dataclasses.replace(ME, nofailover=True), FAST, T0)
    (order,) = [c for c in commands if isinstance(c, Order)]
    assert (order.op, order.primary, v.db) == ("follow", None, None)


def test_an_order_with_another_slot_is_another_order() -> None:
    untaken = SentOrder((3, 2), "follow", T0, primary="n1")
    v = watching({}, order=untaken)
    assert _generation(v, "follow", "n1", clean=False, slot=False) == (3, 2)
    assert _generation(v, "follow", "n1", clean=False, slot=True) == (3, 3)


def test_after_a_rejoin_nothing_is_known_of_the_slots() -> None:
    """A rewind and a copy leave none: the others must not be told of those of before."""
    sent = SentOrder((3, 2), "rejoin", T0, primary="n1")
    v = watching({}, order=sent)
    running = fencer(order=(3, 2), order_op="rejoin", order_state="running")
    assert fold(replace(v, survey=None), running, ME, FAST, T0).survey is None
    during = fold(fold(v, running, ME, FAST, T0), survey("", T0 + 1), ME, FAST, T0 + 1)
    assert during.survey == v.survey
    failed = fencer(order=(3, 2), order_op="rejoin", order_state="failed")
    assert fold(v, failed, ME, FAST, T0).survey == v.survey
    done = fold(v, fencer(order=(3, 2), order_op="rejoin", order_state="done"), ME, FAST, T0 + 5)
    assert done.survey is None
    assert fold(done, survey("", T0 + 4), ME, FAST, T0 + 6).survey is None, "asked before its end"
    assert fold(done, survey("", T0 + 6), ME, FAST, T0 + 7).survey is not None


def leading(**changes: object) -> View:
    v = watching(None, state=State.LEADER, cluster=cluster(primary="n2", primary_fencer_id="id-n2"))
    primary = standby(T0)
    fields = {f: getattr(primary, f) for f in primary.__dataclass_fields__} | {"db": "primary"}
    v = replace(v, db=type(primary)(**fields), lease_until_ns=T0 + NS)
    return replace(v, **changes)


def test_whose_duty_it_is() -> None:
    """The primary's under its lease, and a standby's that streams from it; nobody else makes or moves anything."""
    duty = slots.duty(leading(), ME, FAST, T0)
    assert duty is not None
    assert (duty.role, duty.heard, duty.until_ns) == ("primary", {"n1", "n3"}, T0 + NS)
    follower = slots.duty(watching({MINE: 9}), ME, FAST, T0)
    assert follower is not None
    assert (follower.role, follower.primary, follower.theirs) == ("standby", "n1", {MINE: 9})
    assert follower.limits == {"max_connections": 7}
    assert slots.duty(watching({}), ME, FAST, T0 + FAST.failover_ns + 1).heard == set()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "v",
    [
        leading(lease_until_ns=T0),
        leading(lost=True),
        leading(state=State.DEMOTING),
        leading(cluster=cluster()),
        leading(distrust="rolled back"),
        watching({}, streams=1),
        watching({}, db=None),
        watching({}, fencer=fencer(following="n3").view),
        watching({}, distrust="rolled back"),
        watching({}, state=State.YIELDING),
        watching({}, fencer=fencer(order=(3, 1), order_op="rejoin", order_state="running").view),
        watching({}, cluster=cluster(primary=None)),
    ],
    ids=[
        "lease over",
        "lost",
        "demoting",
        "another leads",
        "leads by a distrusted store",
        "does not stream",
        "silent",
        "follows another",
        "follows by a distrusted store",
        "yielding",
        "rejoining",
        "vacancy",
    ],
)
def test_nobody_elses(v: View) -> None:
    assert slots.duty(v, ME, FAST, T0) is None


def test_the_record_tells_what_was_found() -> None:
    """And, of an agent that has not looked yet, that nothing is known."""
    m = member_record(watching({}), ME, FAST, T0, "a")
    assert (m.slots, m.limits, m.notes) == ({"harmony_member_n1": 5}, {"max_connections": 100}, ("note",))
    assert member_record(watching({}, survey=None), ME, FAST, T0, "a").slots is None
