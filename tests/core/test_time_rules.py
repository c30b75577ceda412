"""The two-clock rule, the send-time rule, pauses and the timing inequality."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from harmony.core.fold import fold
from harmony.core.messages import (
    Connected,
    Event,
    FencerSeen,
    MemberSeen,
    Order,
    Refresh,
    RefreshDone,
    Renew,
    Write,
    WriteDone,
)
from harmony.core.node import initial, step
from harmony.core.observe import observe, stale
from harmony.core.register import RETRY_NS
from harmony.core.states import State
from harmony.core.timing import NS, PRESETS, Timing
from harmony.core.view import SentOrder, View
from harmony.records import CLUSTER_STATE
from tests.core.helpers import EPOCH, FAST, T0, cluster, fencer, identity, member, seen, standby

ME = identity("n2")


def own(stamp_s: float, revision: int) -> MemberSeen:
    return MemberSeen("n2", member("n2"), revision, EPOCH + round(stamp_s * NS))


def watched(after_s: float, *extra: Event, stamp_s: float | None = None) -> tuple[View, bool]:
    """A replica that saw the primary's beat at T0 and then only its own, for `after_s`."""
    v, commands = step(
        initial(ME), [fencer(), seen(cluster(), 50, 0.0), own(0.0, 60), standby(T0)], ME, FAST, T0
    )
    steps = int(after_s / 0.1)
    for i in range(1, steps + 1):
        now = T0 + i * NS // 10
        events: list[Event] = [fencer(), own(i / 10 if stamp_s is None else stamp_s, 60 + i), standby(now)]
        events += [WriteDone(c.key, c.attempt, "acked", 60 + i) for c in commands if isinstance(c, Write)]
        events += [e for e in extra if i == steps // 2]
        events.append(RefreshDone(ok=True))
        v, commands = step(v, events, ME, FAST, now)
    return v, stale(v, FAST, T0 + steps * NS // 10)


def test_stale_on_both_clocks() -> None:
    """D2, D3: the metadata of the stored heartbeat decides, together with our own clock."""
    assert not watched(3.9)[1]
    assert watched(4.2)[1]


def test_not_stale_by_the_store_alone() -> None:
    """A store clock that jumps ahead hastens nothing: our own clock must agree."""
    assert not watched(2.0, stamp_s=100.0)[1]


def test_not_stale_by_our_clock_alone() -> None:
    """A store clock that stands still delays, never hastens."""
    assert not watched(9.0, stamp_s=1.0)[1]


@pytest.mark.parametrize("event", [Connected(), RefreshDone(ok=False)], ids=["reconnect", "missed read"])
def test_the_local_half_starts_again(event: Event) -> None:
    assert not watched(5.0, event)[1]


def test_a_stamp_that_goes_backwards_starts_the_local_half_again() -> None:
    assert not watched(5.0, MemberSeen("n2", member("n2"), 86, EPOCH))[1]


def test_an_answer_that_crossed_our_newer_record_is_no_clock_that_went_back() -> None:
    """Else a read that crosses each of our own heartbeats would keep this node from ever seeing anyone stale."""
    assert watched(5.0, MemberSeen("n2", member("n2"), 80, EPOCH))[1]


def test_a_pause_of_our_own_proves_no_silence() -> None:
    """W10: whoever did not run has not watched."""
    v, _ = watched(0.9)
    assert not v.own.running  # no exchange whose failure would start the local half again as well
    now = T0 + 30 * NS
    v, commands = step(v, [fencer(), own(30.0, 99), standby(now)], ME, FAST, now)
    assert not stale(v, FAST, now)
    assert not [c for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]


def test_a_refresh_that_fails_at_once_is_not_asked_again_at_once() -> None:
    """Found by tests/exhaustive: a store that is not connected fails without delay, and the agent would spin."""
    v, commands = step(initial(ME), [fencer()], ME, FAST, T0)
    assert Refresh(FAST.timeout_ns) in commands
    v, commands = step(v, [RefreshDone(ok=False)], ME, FAST, T0 + 1)
    assert Refresh(FAST.timeout_ns) not in commands
    _, commands = step(v, [], ME, FAST, T0 + 1 + RETRY_NS)
    assert Refresh(FAST.timeout_ns) in commands


def leader() -> View:
    """n1, recorded primary with the lease in force, resumed at T0 with its first beat sent."""
    me = identity("n1")
    grant = fencer("n1", active=(3, 1), lease_deadline_ns=T0 + NS, following=None, is_standby=False)
    mine = cluster()
    primary = standby(T0)
    events: list[Event] = [grant, seen(mine, 50), type(primary)("primary", 4, 1000, 1000, False, "sys", T0)]
    v, _ = step(initial(me), events, me, FAST, T0)
    assert v.state is State.HEALTHY
    return v


def test_a_lease_is_counted_from_the_send() -> None:
    """W9: the renewal's deadline is the *send* of the acknowledged heartbeat plus the lease."""
    me = identity("n1")
    v = leader()
    (attempt,) = v.lead.pending
    assert attempt.sent_ns == T0
    late = T0 + 400_000_000
    v, commands = step(v, [WriteDone(CLUSTER_STATE, attempt.id, "acked", 51)], me, FAST, late)
    (renewal,) = [c for c in commands if isinstance(c, Renew)]
    assert renewal.deadline_ns == T0 + FAST.lease_ns


def test_after_a_pause_the_deadline_is_checked_before_anything_is_sent() -> None:
    """W9, W10: a leader that wakes after its lease orders a fence and renews nothing."""
    me = identity("n1")
    v = leader()
    (attempt,) = v.lead.pending
    v, commands = step(v, [WriteDone(CLUSTER_STATE, attempt.id, "acked", 51)], me, FAST, T0 + 30 * NS)
    assert v.state is State.P_FAILED
    assert isinstance(commands[1], Order)
    assert commands[1].op == "fence"
    assert not [c for c in commands if isinstance(c, Renew)]


def test_one_confirmed_mismatch_is_fatal_to_leadership() -> None:
    """D6: seen once, fenced at once, whatever the counters say."""
    v, commands = step(
        leader(),
        [seen(cluster(term=4, primary="n2", primary_fencer_id="id-n2"), 51)],
        identity("n1"),
        FAST,
        T0 + 1,
    )
    assert v.state is State.P_FAILED
    assert [c.op for c in commands if isinstance(c, Order)] == ["fence"]


def test_a_fenced_node_never_says_healthy() -> None:
    """D5: the heartbeat carries the workflow's real status."""
    me = identity("n1")
    v = leader()
    now = T0 + 600_000_000
    gone: FencerSeen = fencer("n1", active=None, fence_proven=True, postgres_up=False)
    v, _ = step(v, [gone], me, FAST, now)
    v, commands = step(v, [gone], me, FAST, now + NS)
    records = [c.record for c in commands if isinstance(c, Write)]
    assert records
    assert {r.status for r in records} <= {State.P_FAILED, State.FENCED}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_hold_the_inequality(name: str) -> None:
    """C1."""
    assert PRESETS[name].violation() is None


def test_the_inequality_names_every_number() -> None:
    """C1: refused with each number in the message."""
    t = Timing(
        heartbeat_interval_s=0.5,
        heartbeat_timeout_s=0.7,
        failure_threshold=3,
        success_threshold=2,
        fence_timeout_s=1.1,
        safety_margin_s=0.3,
        failover_timeout_s=4.0,
    )
    text = t.violation()
    assert text is not None
    for number in ("4", "2.6", "0.5", "0.7", "3", "1.1", "0.3"):
        assert number in text


def test_postgres_that_dies_right_after_its_activation_is_fenced() -> None:
    """I5: found by simulation (seed 333): nobody must wait for a database that is no more."""
    me = identity("n1")
    gone = fencer("n1", fence_proven=True, postgres_up=False, following=None)
    v, commands = step(initial(me), [gone, seen(cluster(), 50)], me, FAST, T0)
    now = T0
    for _ in range(200):
        now += NS // 20
        acks: list[Event] = [
            WriteDone(c.key, c.attempt, "acked", 50 + now // NS) for c in commands if isinstance(c, Write)
        ]
        v, commands = step(v, [gone, *acks], me, FAST, now)
        order = next((c for c in commands if isinstance(c, Order)), None)
        if order is not None and order.op == "activate":
            break
        if order is not None:
            gone = fencer(
                "n1", highest=order.generation, fence_proven=True, postgres_up=False, following=None
            )
    else:
        pytest.fail(f"never activated: {v.state} {v.row} {v.why} {v.failures} {v.successes} {v.order}")
    assert order is not None
    dead = fencer(
        "n1",
        highest=order.generation,
        active=order.generation,
        lease_deadline_ns=now + NS,
        order=order.generation,
        order_op="activate",
        order_state="done",
        postgres_up=False,
    )
    v, commands = step(v, [dead], me, FAST, now + NS // 20)
    assert v.state is State.P_FAILED
    assert [c.op for c in commands if isinstance(c, Order)] == ["fence"]


def test_postgres_that_is_restarted_as_a_standby_right_after_its_activation_is_fenced() -> None:
    """I5: found by simulation (seed 20818): it waited for ever for its standby to be the primary."""
    me = identity("n2")
    won = cluster(term=4, primary="n2", primary_fencer_id="id-n2", last_primary="n2")
    v, _ = step(initial(me), [fencer(), seen(won, 60)], me, FAST, T0)
    v = msgspec.structs.replace(v, state=State.PROMOTING, order=SentOrder((4, 1), "activate", T0))
    v = msgspec.structs.replace(v, lease_until_ns=T0 + 60 * NS)
    running = {"highest": (4, 1), "active": (4, 1), "lease_deadline_ns": T0 + 60 * NS, "order": (4, 1)}
    running |= {"order_op": "activate", "following": None}
    v, _ = step(v, [fencer(order_state="running", **running), standby(T0 + 1)], me, FAST, T0 + 2)
    done = fencer(order_state="done", **running)
    v, commands = step(v, [done, standby(T0 + 3)], me, FAST, T0 + 10)
    assert v.state is State.PROMOTING  # both answers are from before its end
    assert not [c for c in commands if isinstance(c, Order)]
    v, commands = step(v, [done, standby(T0 + 11)], me, FAST, T0 + 12)
    assert v.state is State.DEMOTING
    assert [c.op for c in commands if isinstance(c, Order)] == ["fence"]


def test_a_proof_is_of_the_newest_order() -> None:
    """I1, W3: a fence that is older than an activate on its way proves nothing: that could still be carried out."""
    down = fencer(highest=(3, 4), fence_proven=True, postgres_up=False)
    v, _ = step(initial(ME), [down, seen(cluster(), 50)], ME, FAST, T0)
    assert observe(v, ME, FAST, T0).fence_proven
    later = msgspec.structs.replace(v, order=SentOrder((3, 5), "activate", T0))
    assert not observe(later, ME, FAST, T0).fence_proven


def test_a_fencer_whose_disk_is_slow_gets_the_same_order_again() -> None:
    """W3: a higher number each time, and it would always be one order behind: its fence would never be the newest."""
    me, v, now = identity("n1"), leader(), T0
    alone = fencer("n1", active=(3, 1), lease_deadline_ns=T0 + NS, is_standby=False, following=None)
    sent: list[Order] = []
    while now < T0 + 10 * NS:
        now += NS // 20
        v, commands = step(v, [alone], me, FAST, now)
        sent += [c for c in commands if isinstance(c, Order)]
    assert len(sent) > 3
    assert {(c.op, c.generation) for c in sent} == {("fence", (3, 2))}
    proven = fencer(
        "n1",
        highest=(3, 2),
        order=(3, 2),
        order_op="fence",
        order_state="done",
        fence_proven=True,
        postgres_up=False,
    )
    v, _ = step(v, [proven], me, FAST, now + 1)
    assert v.state is State.FENCED


def test_another_order_or_one_that_was_refused_gets_a_number_of_its_own() -> None:
    """W3: a number is one order, for ever."""
    v = leader()
    v = msgspec.structs.replace(v, order=SentOrder((3, 5), "follow", T0 - 20 * NS, primary="n2"))
    other = fencer("n1", active=None, is_standby=False, following=None)
    later, commands = step(v, [other], identity("n1"), FAST, T0)
    assert [(c.op, c.generation) for c in commands if isinstance(c, Order)] == [("fence", (3, 6))]
    soft = msgspec.structs.replace(v, order=SentOrder((3, 5), "fence", T0 - 20 * NS, clean=True))
    _, commands = step(soft, [other], identity("n1"), FAST, T0)
    assert [(c.op, c.generation) for c in commands if isinstance(c, Order)] == [("fence", (3, 6))]
    refused = msgspec.structs.replace(later.order, refused="no")  # type: ignore[type-var]
    again = msgspec.structs.replace(later, order=refused)
    _, commands = step(again, [other], identity("n1"), FAST, T0 + 2 * NS)
    assert [(c.op, c.generation) for c in commands if isinstance(c, Order)] == [("fence", (3, 7))]


def test_an_answer_from_before_an_order_says_nothing_of_what_it_did() -> None:
    """W4: "primary", asked before the fence, is not the state after it."""
    v, _ = step(initial(ME), [fencer(), seen(cluster(), 50)], ME, FAST, T0)
    v = msgspec.structs.replace(v, db=None, order=SentOrder((3, 5), "fence", T0 + 5))
    assert fold(v, standby(T0 + 4), ME, FAST, T0 + 9).db is None
    assert fold(v, standby(T0 + 6), ME, FAST, T0 + 9).db is not None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_position_is_final_only_after_the_lease_and_the_stop(name: str) -> None:
    """I2: until then the primary may have written, and shipped, more."""
    t = PRESETS[name]
    assert t.settle_ns >= t.lease_ns + t.stop_ns


def test_no_pause_between_failed_heartbeats() -> None:
    """D1: the lease is interval + timeout x threshold: with a pause between them not all would fit into it."""
    me, v = identity("n1"), leader()
    (attempt,) = v.lead.pending
    v, _ = step(v, [WriteDone(CLUSTER_STATE, attempt.id, "acked", 51)], me, FAST, T0 + 1)
    now, sent = T0, [T0]
    while v.state is State.HEALTHY:
        now += NS // 100
        v, commands = step(v, [], me, FAST, now)
        sent += [now for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]
    gaps = [round((b - a) / NS, 2) for a, b in pairwise(sent)]
    assert gaps[: FAST.failure_threshold] == [FAST.heartbeat_interval_s] + [FAST.heartbeat_timeout_s] * (
        FAST.failure_threshold - 1
    )
    assert now - T0 <= FAST.lease_ns
