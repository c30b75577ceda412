"""Hand-over, failback and retirement: the handshake step by step, and every way back from it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from harmony.core.candidate import Standing, judge
from harmony.core.messages import (
    Checkpoint,
    CheckpointDone,
    ControlSeen,
    Event,
    MemberSeen,
    Order,
    Retiring,
    Stop,
    Write,
    WriteDone,
)
from harmony.core.node import HURRY_PAUSE_NS, initial, step
from harmony.core.observe import confirms
from harmony.core.states import State
from harmony.core.table import decide
from harmony.core.timing import NS
from harmony.core.view import Identity, Policy, View
from harmony.records import CLUSTER_STATE, ClusterState, Control, Member, Switchover
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


class Leading:
    """n1 leads on a store that acknowledges at once; n2 and n3 stream. `do` carries time on."""

    def __init__(self, policy: Policy | None = None, node: str = "n1") -> None:
        self.me: Identity = replace(identity(node), policy=policy or Policy())
        self.record: ClusterState = cluster(
            primary=node,
            primary_fencer_id=f"id-{node}",
            last_primary=node,
            sync_voters=tuple(n for n in self.me.members if n != node),
        )
        self.revision, self.now = 50, T0
        self.view: View = initial(self.me)
        self.members = {n: member(n) for n in self.me.members if n != node}
        self.fencer = fencer(
            node,
            active=(3, 1),
            lease_deadline_ns=T0 + 10**6 * NS,
            following=None,
            is_standby=False,
        )
        self.orders: list[Order] = []
        self.stop: Stop | None = None
        self.writable = True
        self.deaf = False  # nothing is answered
        self.checkpoints, self.checkpointed = 0, True
        self.early = False  # no checkpoint on its timeline yet
        self.own: Member | None = None
        self.do(0.1, seen(self.record, 50), MemberSeen(node, None, 0, 0))

    def at_each_tick(self) -> list[Event]:
        """What is seen besides."""
        return []

    def do(self, seconds: float, *events: Event) -> None:
        queue = list(events)
        for _ in range(max(1, round(seconds * NS) // TICK)):
            self.now += TICK
            self.revision += 1
            queue += [MemberSeen(n, m, self.revision, EPOCH + self.now) for n, m in self.members.items()]
            db = standby(self.now)
            if self.writable:
                db = replace(db, db="primary", streaming=False, early=self.early)
                queue += [self.fencer, db]
            else:
                queue.append(self.fencer)
            queue += self.at_each_tick()
            self.view, commands = step(self.view, queue, self.me, FAST, self.now)
            queue = []
            for c in commands:
                match c:
                    case Write(record=record, key=key) if not self.deaf:
                        self.revision += 1
                        queue.append(WriteDone(key, c.attempt, "acked", self.revision))
                        if key == CLUSTER_STATE:
                            assert isinstance(record, ClusterState)
                            self.record = record
                        else:
                            assert isinstance(record, Member)
                            self.own = record
                    case Order():
                        self.orders.append(c)
                    case Checkpoint():
                        self.checkpoints += 1
                        queue += [CheckpointDone()] if self.checkpointed else []
                    case Stop():
                        self.stop = self.stop or c
                    case _:
                        pass

    def say(self, node: str, **changes: object) -> None:
        self.members[node] = msgspec.structs.replace(self.members[node], **changes)

    def ask(self, to: str | None, term: int = 3, number: str = "s1") -> None:
        control = Control(attempt="x", switchover=Switchover(number, to, term, "me"))
        self.do(0.1, ControlSeen(control, 70))

    def fenced(self, *, clean: bool = True) -> None:
        """The fencer carries the newest order out."""
        g = self.orders[-1].generation
        self.writable = False
        self.fencer = fencer(
            self.me.node,
            highest=g,
            order=g,
            order_op="fence",
            order_state="done",
            fence_proven=True,
            postgres_up=False,
            following=None,
            shutdown_lsn=2000 if clean else None,
        )


def test_a_switchover_step_by_step() -> None:
    """W1, W3: named, confirmed, demoted cleanly, and only then the vacancy with the final WAL position."""
    c = Leading()
    c.ask("n3")
    c.do(1)
    assert (c.record.successor, c.record.primary, c.record.request) == ("n3", "n1", "s1")
    assert not c.orders  # it has not confirmed
    c.say("n3", confirms=3)
    c.do(0.2)
    assert [(o.op, o.clean) for o in c.orders] == [("fence", True)]
    assert c.view.state is State.YIELDING
    c.do(0.5)
    assert c.record.primary == "n1"  # the fence is not proven: the term is held
    c.fenced()
    c.do(0.3)
    assert c.record.primary is None
    assert (c.record.successor, c.record.clean, c.record.lsn) == ("n3", True, 2000)
    assert c.record.term == 3


def test_a_checkpoint_comes_before_the_demotion() -> None:
    """W3: else the shutdown writes all that is dirty while nobody can write. The leader leads on meanwhile."""
    c = Leading()
    c.checkpointed = False
    c.ask("n3")
    c.say("n3", confirms=3)
    c.do(5 * FAST.failover_timeout_s)
    assert (c.checkpoints, c.orders, c.record.successor) == (1, [], "n3")
    c.do(0.2, CheckpointDone("permission denied"))
    assert [o.op for o in c.orders] == ["fence"]


def test_the_first_checkpoint_on_a_timeline_is_hurried_for_who_waits_for_it() -> None:
    """Nothing is rewound to a leader without one, and PostgreSQL takes up to checkpoint_timeout for it."""
    c = Leading()
    c.early = True
    c.do(2)
    assert c.own is not None
    assert c.own.early
    assert c.checkpoints == 0, "nobody waits for it, and it costs the disk"
    c.say("n3", unable=True, streaming=False)
    c.do(HURRY_PAUSE_NS / NS - 1)
    assert c.checkpoints == 1
    c.do(2)
    assert c.checkpoints == 2, "it came to nothing"
    c.early = False
    c.do(2 * HURRY_PAUSE_NS / NS)
    assert c.checkpoints == 2
    assert not c.own.early
    assert not c.orders


def test_a_successor_has_its_time_after_the_checkpoint() -> None:
    """W3."""
    c = Leading()
    c.checkpointed = False
    c.ask("n3")
    c.do(2 * FAST.failover_timeout_s)
    assert c.record.successor == "n3"
    c.do(FAST.failover_timeout_s - 0.2, CheckpointDone())
    assert c.record.successor == "n3"
    c.do(1)
    assert c.record.successor is None


def test_who_is_stopped_waits_for_no_checkpoint() -> None:
    """O1: systemd does not wait for ever."""
    c = Leading()
    c.checkpointed = False
    c.do(0.2, Retiring(hand_over=True))
    c.say(str(c.record.successor), confirms=3)
    c.do(0.3)
    assert [o.op for o in c.orders] == ["fence"]


def test_whoever_confirms_and_lags_is_waited_for() -> None:
    """W3: commits would have to wait, or be lost, for as long as it takes to catch up."""
    c = Leading()
    c.ask("n3")
    c.do(0.5)
    c.say("n3", confirms=3, received_lsn=1000 - c.me.maximum_lag_bytes - 1)
    c.do(0.5)
    assert not c.orders
    c.say("n3", received_lsn=1000)
    c.do(0.2)
    assert [o.op for o in c.orders] == ["fence"]


def test_the_best_is_chosen_where_nobody_is_named() -> None:
    """W1: the most WAL, then priority."""
    c = Leading()
    c.say("n3", priority=200)
    c.ask(None)
    c.do(0.5)
    assert c.record.successor == "n3"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"latched": True}, "latched"),
        ({"nofailover": True}, "nofailover"),
        ({"streaming": False}, "stream"),
        ({"received_lsn": -5000}, "behind"),
        ({"db": "down"}, "standby"),
        ({"distrust": "x"}, "distrusts"),
        ({"retiring": True}, "being stopped"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_switchover_that_cannot_be_is_refused_with_its_reason(change: dict[str, object], word: str) -> None:
    """W1: refused in cluster_state, by its number, and the leader leads on."""
    c = Leading()
    c.say("n3", **change)
    c.ask("n3")
    c.do(1)
    assert c.record.refused is not None
    assert c.record.refused[0] == "s1"
    assert word in c.record.refused[1]
    assert c.view.state is State.HEALTHY
    assert not c.orders


def test_a_request_of_another_term_is_not_ours() -> None:
    """W1: a switchover that was asked of an earlier leader dies with its term."""
    c = Leading()
    c.ask("n3", term=2)
    c.do(1)
    assert c.record.successor is None
    assert c.record.refused is None


def test_a_successor_that_does_not_confirm_is_given_up() -> None:
    """W3: the deadline of the step; the way back is to go on leading."""
    c = Leading()
    c.ask("n3")
    c.do(FAST.failover_timeout_s + 1)
    assert c.record.successor is None
    assert c.record.refused is not None
    assert c.record.refused[1].endswith("n3 has not said that it is ready")
    assert c.view.state is State.HEALTHY
    assert not c.orders


def test_a_successor_that_is_lost_after_the_demotion() -> None:
    """W3, W6: until the vacancy is written the old leader takes the place again."""
    c = Leading()
    c.ask("n3")
    c.say("n3", confirms=3)
    c.do(1)
    c.say("n3", latched=True)
    c.fenced()
    c.do(0.2)
    assert c.record.primary == "n1"
    assert c.view.state is State.FENCED
    c.do(2)
    assert [o.op for o in c.orders][:2] == ["fence", "activate"]


def test_a_demotion_that_fails_is_fenced_hard() -> None:
    """W5: a clean fence that does not work is a failed primary."""
    c = Leading()
    c.ask("n3")
    c.say("n3", confirms=3)
    c.do(0.5)
    g = c.orders[-1].generation
    c.fencer = fencer("n1", highest=g, order=g, order_op="fence", order_state="failed", following=None)
    c.do(0.5)
    assert c.view.state is State.P_FAILED
    assert (c.orders[-1].op, c.orders[-1].clean) == ("fence", False)
    assert c.record.primary == "n1"


def test_an_unclean_vacancy_says_so() -> None:
    """I2: without the shutdown checkpoint nobody is told that all WAL has been shipped."""
    c = Leading()
    c.ask("n3")
    c.say("n3", confirms=3)
    c.do(0.5)
    c.fenced(clean=False)
    c.do(0.3)
    assert c.record.primary is None
    assert not c.record.clean


def test_failback_only_after_it_has_held() -> None:
    """W7: the preferred primary is handed its place back once it has been fit for failback_after_s."""
    c = Leading(Policy(preferred_primary="n1", failback="automatic", failback_after_s=5), node="n2")
    assert c.view.state is State.LEADER
    c.do(4)
    assert c.record.successor is None
    c.say("n1", streaming=False)
    c.do(0.2)
    c.say("n1", streaming=True)
    c.do(4)
    assert c.record.successor is None  # it begins anew
    c.do(2)
    assert c.record.successor == "n1"
    c.say("n1", confirms=3)
    c.do(0.2)
    assert c.view.state is State.DEMOTING
    assert c.orders[-1].clean
    c.fenced()
    c.do(0.3)
    assert (c.record.primary, c.record.successor) == (None, "n1")


def test_no_failback_unless_configured() -> None:
    """W7."""
    c = Leading(Policy(preferred_primary="n1", failback="off", failback_after_s=1), node="n2")
    c.do(5)
    assert c.record.successor is None


def test_retirement_hands_over_first() -> None:
    """O1: the agent that was asked to stop waits for its hand-over, and for nothing else."""
    c = Leading()
    c.do(0.1, Retiring(hand_over=True))
    c.do(0.5)
    assert c.stop is None
    assert c.record.successor in {"n2", "n3"}
    c.say(str(c.record.successor), confirms=3)
    c.do(0.3)
    assert c.stop is None
    c.fenced()
    c.do(0.3)
    assert c.record.primary is None
    assert c.stop is not None


@pytest.mark.parametrize("hand_over", [True, False])
def test_retirement_without_a_successor_does_not_wait(hand_over: bool) -> None:
    """O1."""
    c = Leading()
    if hand_over:
        c.say("n2", latched=True)
        c.say("n3", nofailover=True)
    c.do(0.1, Retiring(hand_over=hand_over))
    c.do(0.1)
    assert c.stop is not None
    assert not c.orders


def test_who_is_stopped_waits_for_a_standby_that_catches_up() -> None:
    """O1: at the moment of SIGTERM nobody is within maximum_lag_bytes; a moment later n3 is."""
    c = Leading()
    c.say("n2", streaming=False, received_lsn=500)
    c.say("n3", received_lsn=0)
    c.do(0.1, Retiring(hand_over=True))
    c.do(1.0)
    assert (c.stop, c.record.successor, c.orders) == (None, "n3", [])
    c.say("n3", received_lsn=1000, confirms=3)
    c.do(0.3)
    assert c.orders[0].clean
    assert c.stop is None


def test_who_is_stopped_waits_for_one_standby_and_not_for_ever() -> None:
    """O1: failover_timeout, even where its own checkpoint does not end."""
    c = Leading()
    c.checkpointed = False
    c.do(0.1, Retiring(hand_over=True))
    c.do(FAST.failover_timeout_s - 0.5)
    assert c.stop is None
    c.do(1.0)
    assert c.stop is not None
    assert c.orders == []


def test_who_is_stopped_turns_to_another_when_the_named_one_is_lost() -> None:
    """O1."""
    c = Leading()
    c.do(0.3, Retiring(hand_over=True))
    first = str(c.record.successor)
    c.say(first, latched=True)
    c.do(0.3)
    assert {first, c.record.successor} == {"n2", "n3"}
    assert c.stop is None


def test_who_is_stopped_says_so_first() -> None:
    """O1: so that no leader names it; where the store is gone it waits a heartbeat's timeout and no longer."""
    c = Leading()
    c.do(0.2, Retiring(hand_over=False))
    assert c.own is not None
    assert c.own.retiring
    assert c.stop is not None
    alone = Leading()
    alone.deaf = True
    alone.do(0.1, Retiring(hand_over=False))
    assert alone.stop is None
    alone.do(2 * FAST.heartbeat_timeout_s)
    assert alone.stop is not None


def test_no_demotion_while_heartbeats_fail_or_the_store_is_distrusted() -> None:
    """O4: a hand-over is begun and carried on only on firm ground."""
    for state in (State.HEALTHY, State.LEADER):
        ready = {"named": "n3", "confirmed": True, "successor_fit": True}
        assert decide(observation(state, **ready)).do == ("demote",)
        assert "demote" not in decide(observation(state, **ready, failures=1)).do
        assert "demote" not in decide(observation(state, **ready, distrust="x")).do
        assert decide(observation(state, wanted="n3")).do == ("name",)
        assert decide(observation(state, wanted="n3", failures=1)).do == ()
        assert decide(observation(state, wanted="n3", distrust="x")).do == ()


def test_the_successor_confirms_only_what_it_can_keep() -> None:
    """W1: named, standby, trusted, not latched, its own heartbeats good."""
    me = identity("n2")
    named = cluster(successor="n2")
    v, _ = step(initial(me), [fencer(), seen(named, 50), standby(T0)], me, FAST, T0)
    assert confirms(v, me, FAST, T0) == 3
    r = msgspec.structs.replace
    assert confirms(r(v, failures=1), me, FAST, T0) == 0
    assert confirms(r(v, fencer=fencer(latched="x").view), me, FAST, T0) == 0
    assert confirms(r(v, fencer=fencer(trusted=False).view), me, FAST, T0) == 0
    assert confirms(r(v, distrust="x"), me, FAST, T0) == 0
    assert confirms(r(v, retiring=True), me, FAST, T0) == 0
    assert confirms(r(v, db=None), me, FAST, T0) == 0
    assert confirms(r(v, cluster=cluster(successor="n3")), me, FAST, T0) == 0
    assert confirms(v, replace(me, nofailover=True), FAST, T0) == 0


# ---------------------------------------------------------------- who takes the vacancy

VACANCY = cluster(primary=None, primary_fencer_id=None, successor="n2", clean=True, lsn=2000)


def claims(node: str, lsn: int, record: ClusterState, *others: Member, patient: bool = True) -> bool:
    me = Standing(node, True, 4, lsn, 0, False, False, 100, True)
    return judge(
        me,
        record,
        50,
        {m.node: m for m in others},
        settle_ns=0,
        maximum_lag_bytes=64,
        barred="",
        patient=patient,
    ).ok


def test_the_successor_goes_first_and_needs_nobody() -> None:
    """I2, W1: who has the shutdown checkpoint has all; it asks for no quorum of positions."""
    assert claims("n2", 2001, VACANCY)
    assert not claims("n3", 2001, VACANCY)
    assert claims("n3", 2001, VACANCY, patient=False)


def test_the_successor_without_the_final_wal_is_no_successor() -> None:
    """I2: not before it has the checkpoint; without it the quorum of positions counts as ever."""
    assert not claims("n2", 2000, VACANCY)
    assert not claims("n2", 2000, VACANCY, patient=False)
    heard = member("n3", received_lsn=1999)
    assert claims("n2", 2000, VACANCY, heard, patient=False)
    assert not claims("n2", 2000, VACANCY, member("n3", received_lsn=2001), patient=False)


def test_another_timeline_is_not_complete() -> None:
    """I2: a higher position on another timeline is other WAL."""
    other = msgspec.structs.replace(VACANCY, timeline=3)
    assert not claims("n2", 2001, other, patient=False)


def test_an_unclean_vacancy_asks_for_positions() -> None:
    """I2: named or not."""
    dirty = msgspec.structs.replace(VACANCY, clean=False)
    assert not claims("n2", 2001, dirty)
    assert claims("n2", 2001, dirty, member("n3", received_lsn=2001))
