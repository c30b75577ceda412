"""A standby that cannot follow: when it is rejoined, when it waits, and what is never believed meanwhile."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest

from harmony.core.messages import DbSeen, MemberSeen, Order, Read, Refresh, RefreshDone, Write, WriteDone
from harmony.core.node import initial, step
from harmony.core.observe import observe, standing
from harmony.core.rejoin import FOLLOW_TRIES, MOST_PAUSE_NS, REJOIN_PATIENCE, due, unable
from harmony.core.states import State
from harmony.core.table import decide
from harmony.core.timing import NS
from harmony.core.view import Identity, Policy, View, database
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, Member
from tests.core.helpers import EPOCH, FAST, T0, cluster, fencer, identity, member, observation, seen

TICK = NS // 10
AFTER_S = Policy().rejoin_after_s


class Following:
    """n2 follows n1, which leads on timeline 4; a store that acknowledges at once. `do` carries time on."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.me: Identity = replace(identity("n2"), policy=policy or Policy())
        self.record = cluster(timeline=4, lsn=1000)
        self.primary = member("n1", db="primary", status=State.HEALTHY)
        self.revision, self.now = 50, T0
        self.view: View = initial(self.me)
        self.fencer = fencer()
        self.beating = True  # the primary
        self.primary_talks = False  # its own record goes on, whatever becomes of its heartbeat
        self.timeline, self.lsn, self.streaming = 4, 1000, True
        self.held = False
        self.up = True
        self.orders: list[Order] = []
        self.own: Member | None = None
        self.answers: list[WriteDone | RefreshDone | MemberSeen] = []
        self.kept = 0  # the revision of `own` in the store
        self.do(3)
        assert self.view.state is State.WATCHING
        assert not self.orders

    def do(self, seconds: float) -> None:
        for _ in range(max(1, round(seconds * NS) // TICK)):
            self.now += TICK
            events: list[object] = [*self.answers, self.fencer]
            self.answers.clear()
            if self.beating:
                self.revision += 1
                events.append(msgspec_seen(self.record, self.revision, self.now))
            if self.beating or self.primary_talks:
                self.revision += 1
                events.append(MemberSeen("n1", self.primary, self.revision, EPOCH + self.now))
            if self.up:
                db = DbSeen("standby", self.timeline, self.lsn, self.lsn, self.streaming, "sys", self.now)
                events.append(replace(db, held=self.held))
            self.view, commands = step(self.view, events, self.me, FAST, self.now)  # type: ignore[arg-type]
            for c in commands:
                match c:
                    case Write(record=record, key=key):
                        assert key != CLUSTER_STATE
                        assert isinstance(record, Member)
                        self.own = record
                        self.revision += 1
                        self.kept = self.revision
                        self.answers.append(WriteDone(key, c.attempt, "acked", self.revision))
                        stamp_ns = EPOCH + self.now
                        self.answers.append(
                            MemberSeen(key[len(MEMBER_PREFIX) :], record, self.revision, stamp_ns)
                        )
                    case Read(key=key) if key == MEMBER_PREFIX + "n2":
                        self.answers.append(MemberSeen("n2", self.own, self.kept, EPOCH + self.now))
                    case Refresh():
                        self.answers.append(RefreshDone(ok=True))
                    case Order():
                        self.orders.append(c)
                        self.ordered(c)
                    case _:
                        pass

    def ordered(self, o: Order) -> None:
        """The fencer takes it, and is at work."""
        self.set(
            highest=o.generation, order=o.generation, order_op=o.op, order_state="running", following=None
        )
        self.up = False

    def ended(self, state: str, *, up: bool, why: str = "", **more: object) -> None:
        following = self.orders[-1].primary if state == "done" else None
        self.set(order_state=state, order_detail=why, postgres_up=up, following=following, **more)
        self.up = up

    def set(self, **changes: object) -> None:
        self.fencer = replace(self.fencer, view=replace(self.fencer.view, **changes))  # type: ignore[arg-type]

    @property
    def ops(self) -> list[str]:
        return [o.op for o in self.orders]

    @property
    def row(self) -> int:
        return self.view.row

    def diverges(self) -> None:
        """The primary's place went to another timeline, and this standby's receiver finds nothing."""
        self.record = msgspec.structs.replace(self.record, timeline=5)
        self.streaming = False


def msgspec_seen(record: object, revision: int, now_ns: int) -> object:
    return seen(record, revision, now_ns / NS)  # type: ignore[arg-type]


def test_a_diverged_standby_is_rejoined_with_the_clusters_identity() -> None:
    """O5: after its time, from the primary of this term, with what the fencer needs to refuse another cluster's."""
    c = Following()
    c.diverges()
    c.do(AFTER_S - 1)
    assert not c.orders
    c.do(2)
    assert c.ops == ["rejoin"]
    (order,) = c.orders
    assert (order.primary, order.system_identifier, order.clone) == ("n1", "sys", False)
    assert order.generation == (3, 2)
    c.do(1)
    assert "a rejoin is under way" in c.view.why


@pytest.mark.parametrize("kind", ["held", "replays"])
def test_a_standby_that_has_not_come_to_the_end_of_its_wal_is_not_astray(kind: str) -> None:
    """F10: a delayed one was copied anew after each failover. Until it has replayed what is there it asks for nothing;
    nor does one that replays long. Once it asks, in vain, it is rejoined."""
    c = Following()
    c.diverges()
    c.lsn, c.held = 100, kind == "held"
    for _ in range(round(3 * AFTER_S)):
        c.do(1)
        c.lsn += kind == "replays"
    c.do(AFTER_S / 2)
    assert c.ops == []
    c.held = False
    c.do(AFTER_S + 1)
    assert c.ops == ["rejoin"]


def test_what_is_certain_is_not_waited_for() -> None:
    """It has replayed more than the primary had when it began its timeline: no time will make it stream."""
    c = Following(Policy(rejoin_after_s=3600))
    c.diverges()
    c.record = msgspec.structs.replace(c.record, begins=c.lsn - 1)
    c.do(1)
    assert c.ops == ["rejoin"]
    c = Following(Policy(rejoin="off"))
    c.diverges()
    c.record = msgspec.structs.replace(c.record, begins=c.lsn - 1)
    c.do(1)
    assert "replayed more of timeline 4 than n1 had when it began 5" in c.view.why


@pytest.mark.parametrize(("begins", "timeline"), [(1000, 4), (2000, 4), (0, 4), (999, 5)])
def test_what_may_still_stream_is_waited_for(begins: int, timeline: int) -> None:
    """All of it is in the primary's history, or where that begins is not known, or it is on the same timeline."""
    c = Following()
    c.diverges()
    c.record, c.timeline = msgspec.structs.replace(c.record, begins=begins), timeline
    c.do(AFTER_S - 1)
    assert c.ops == []


@pytest.mark.parametrize("certain", [True, False])
def test_nothing_is_rewound_to_who_has_no_checkpoint_on_its_timeline(certain: bool) -> None:
    """Seen in the bench: pg_rewind takes it for one of the timeline that it left, and PostgreSQL does not start."""
    c = Following()
    c.diverges()
    if certain:
        c.record = msgspec.structs.replace(c.record, begins=c.lsn - 1)
    c.primary = msgspec.structs.replace(c.primary, timeline=5, early=True)
    c.do(3 * AFTER_S)
    assert c.ops == []
    assert "waiting for n1's first checkpoint on its timeline" in c.view.why
    assert c.own is not None
    assert c.own.unable, "the primary has to know"
    c.primary = msgspec.structs.replace(c.primary, early=False)
    c.do(1)
    assert c.ops == ["rejoin"]


def test_a_copy_into_nothing_waits_for_no_checkpoint() -> None:
    """pg_basebackup has one made."""
    c = Following()
    c.diverges()
    c.primary = msgspec.structs.replace(c.primary, timeline=5, early=True)
    c.set(empty="copy", following=None, postgres_up=False)
    c.up = False
    c.do(1)
    assert c.ops == ["rejoin"]


def test_a_receiver_that_tries_again_and_again_does_not_put_off_the_rejoin() -> None:
    """Seen in chaos: it streams for moments, several a second, and a probe meets two of them in a row now and then."""
    c = Following()
    c.diverges()
    began_ns = c.now
    while not c.orders:
        assert c.now - began_ns < (AFTER_S + 2) * NS, "put off"
        c.streaming = True
        c.do(0.3)
        c.streaming = False
        c.do(0.7)
    assert c.ops == ["rejoin"]


def test_who_catches_up_on_the_timeline_that_was_left_is_not_rejoined() -> None:
    """The new primary has the old timeline's WAL, too, and sends that first."""
    c = Following()
    c.lsn = 100
    c.record = msgspec.structs.replace(c.record, timeline=5)
    for _ in range(round(3 * AFTER_S * NS) // TICK):
        c.lsn += 1
        c.do(0.1)
    assert c.orders == []


@pytest.mark.parametrize(
    ("broken", "value"),
    [
        ("primary", {"db": "standby"}),
        ("primary", {"db": "unknown"}),
        ("record", {"status": State.FENCED}),
        ("record", {"status": State.PROMOTING}),
        ("record", {"system_identifier": ""}),
        ("fencer", {"highest": (4, 1)}),
        ("view", {"distrust": "it lost history"}),
        ("policy", {"rejoin": "off"}),
    ],
    ids=str,
)
def test_never_from_who_is_not_seen_leading(broken: str, value: dict[str, object]) -> None:
    """I2: it destroys what only this node has, so there must be no doubt of the primary, its term, or the store."""
    c = Following(Policy(rejoin="off") if broken == "policy" else None)
    c.diverges()
    match broken:
        case "primary":
            c.primary = msgspec.structs.replace(c.primary, **value)
        case "record":
            c.record = msgspec.structs.replace(c.record, **value)
        case "fencer":
            c.set(**value)
        case "view":
            c.view = msgspec.structs.replace(c.view, **value)
        case _:
            pass
    c.do(8 * AFTER_S)
    assert c.ops == []


def test_from_a_term_before_the_fencers_where_an_operator_has_given_that_history_up() -> None:
    """The store was accepted with less than this node knew: its fencer's term is of what is given up, up to there."""
    for overruled, ops in ((4, ["rejoin"]), (3, [])):
        c = Following()
        c.diverges()
        c.set(highest=(4, 1))
        c.view = msgspec.structs.replace(
            c.view, marks=msgspec.structs.replace(c.view.marks, overruled=overruled)
        )
        c.do(8 * AFTER_S)
        assert c.ops == ops  # and what was begun is not ended for its number


def test_never_when_a_heartbeat_of_the_primary_is_overdue() -> None:
    """W10, I2: it may be dead, and who looks at its data for that long is no candidate, and not heard."""
    policy = Policy(rejoin_after_s=FAST.failover_timeout_s * 0.6)  # over before anything is stale
    node = Following(policy)
    node.diverges()
    node.do(0.2)
    node.beating = False
    node.do(FAST.failover_timeout_s * 0.9)
    assert not node.orders
    node.beating = True
    node.do(1)
    assert node.ops == ["rejoin"]


def test_never_while_the_primary_is_stale() -> None:
    c = Following()
    c.diverges()
    c.do(AFTER_S - FAST.failover_timeout_s - 1)
    c.beating, c.primary_talks = False, True
    c.do(6 * AFTER_S)
    assert "rejoin" not in c.ops


def test_a_standby_that_is_ahead_of_a_writing_primary_or_silent_for_long() -> None:
    """Other WAL on the same timeline number; and where nothing but silence tells."""
    c = Following()
    c.lsn, c.streaming = 2000, False
    c.do(AFTER_S + 1)
    assert c.ops == ["rejoin"]
    c = Following()
    c.streaming = False
    c.do((REJOIN_PATIENCE - 1) * AFTER_S)
    assert c.ops == []
    c.do(2 * AFTER_S)
    assert c.ops == ["rejoin"]


def test_a_primary_that_recovers_has_not_told_yet_what_it_has() -> None:
    """A standby may have got what the primary wrote after its last heartbeat, and the crash took neither's."""
    c = Following()
    c.record = msgspec.structs.replace(c.record, status=State.FENCED)
    c.lsn, c.streaming = 2000, False
    c.do(AFTER_S + 1)
    assert unable(c.view, c.me, c.now) == ""
    c.record = msgspec.structs.replace(c.record, status=State.HEALTHY)
    c.do(1)
    assert c.ops == ["rejoin"]


def test_the_pause_doubles_and_a_rewind_that_did_not_help_is_followed_by_a_copy() -> None:
    c = Following()
    c.diverges()
    c.do(AFTER_S + 1)
    c.ended("done", up=True)
    c.do(2)
    assert c.ops == ["rejoin"], "it may stream yet"
    c.do(AFTER_S + 5)
    assert c.ops == ["rejoin", "rejoin"]
    assert c.orders[-1].clone
    sent = c.now
    c.ended("failed", up=True, why="wrong password")
    c.set(following="n1")
    c.do(2)
    assert "wrong password" in c.view.why
    pauses = []
    for _ in range(12):
        count = len(c.orders)
        while len(c.orders) == count:
            c.do(1)
        pauses.append((c.now - sent) / NS)
        sent = c.now
        assert c.ops[-1] == "rejoin"
        c.ended("failed", up=True, why="wrong password")
        c.set(following="n1")
    assert pauses == sorted(pauses)
    assert pauses[-1] <= MOST_PAUSE_NS / NS + 3
    assert pauses[-1] > 4 * pauses[0]


def test_a_failed_rejoin_is_told_until_it_streams_again() -> None:
    """Never a zombie that looks healthy: the reason stands in the status though PostgreSQL answers."""
    c = Following()
    c.diverges()
    c.do(AFTER_S + 1)
    c.ended("failed", up=True, why="password authentication failed")
    c.set(following="n1")
    c.do(1)
    assert c.row == 719
    assert "password authentication failed" in c.view.why
    assert c.own is not None
    assert not c.own.streaming
    c.timeline, c.streaming = 5, True
    c.do(3)
    assert c.row != 719
    assert c.view.rejoin_why == ""


def test_crash_recovery_within_a_rejoin_is_no_standby() -> None:
    """I2: PostgreSQL answers, and what it has is about to be thrown away: no candidate, no voter to be heard."""
    c = Following()
    c.diverges()
    c.do(AFTER_S + 1)
    c.up = True
    c.do(1)
    assert database(c.view, FAST, c.now) == "down"
    assert c.own is not None
    assert c.own.db == "down"
    assert not standing(c.view, c.me, FAST, c.now).db_standby
    c.ended("failed", up=True, unfinished=True)
    c.do(1)
    assert c.own.db == "down"


def test_what_is_unfinished_is_only_rejoined() -> None:
    """I2: not followed, and never promoted, whoever leads, or nobody."""
    c = Following()
    c.set(unfinished=True, postgres_up=False, following=None)
    c.up = False
    c.do(1)
    assert c.ops == ["rejoin"]
    c.ended("failed", up=False, why="the disk is too small")
    c.record = msgspec.structs.replace(c.record, primary=None, primary_fencer_id=None)
    c.do(20)
    assert c.ops == ["rejoin"]
    assert "a rejoin was interrupted here" in c.view.why
    assert "the disk is too small" in c.view.why


@pytest.mark.parametrize("how", ["vacancy", "new term", "stale", "the same number"])
def test_a_rejoin_ends_when_its_primary_leads_no_more(how: str) -> None:
    """I2: it would hang, or end in a history that is no longer the cluster's."""
    c = Following()
    c.diverges()
    if how == "the same number":  # the fencer's term is of a history that was given up, and is reached again
        c.set(highest=(4, 1))
        c.view = msgspec.structs.replace(c.view, marks=msgspec.structs.replace(c.view.marks, overruled=4))
    c.do(AFTER_S + 1)
    assert c.ops == ["rejoin"]
    c.do(30)
    assert c.ops == ["rejoin"], "as long as it takes"
    match how:
        case "vacancy":
            c.record = msgspec.structs.replace(c.record, primary=None, primary_fencer_id=None)
        case "new term" | "the same number":
            c.record = msgspec.structs.replace(c.record, primary="n3", primary_fencer_id="id-n3", term=4)
        case _:
            c.beating = False
    c.do(6)
    assert c.ops[:2] == ["rejoin", "follow"]
    assert c.orders[1].generation > c.orders[0].generation
    assert c.orders[1].primary == {"vacancy": None, "stale": "n1"}.get(how, "n3")


def test_a_restarted_agent_leaves_a_rejoin_alone() -> None:
    """C2: a copy of hours is not thrown away; and after it there is a pause, as for one of its own."""
    c = Following()
    c.diverges()
    c.do(AFTER_S + 1)
    c.view = initial(replace(c.me, instance="another"))
    c.do(20)
    assert c.ops == ["rejoin"]
    assert "a rejoin is under way" in c.view.why
    c.ended("failed", up=True, why="no room")
    c.set(following="n1")
    c.do(1)
    assert "no room" in c.view.why
    assert not due(c.view, c.me, FAST, c.now)


def test_a_standby_that_cannot_start_is_not_ordered_to_for_ever() -> None:
    """Named, with a pause that doubles, and then rejoined: it may be its data."""
    c = Following()
    c.set(postgres_up=False, following=None)
    c.up = False
    sent: list[int] = []
    while "rejoin" not in c.ops:
        count = len(c.orders)
        while len(c.orders) == count:
            c.do(0.1)
            assert c.now - T0 < 60 * NS
        sent.append(c.now)
        if c.ops[-1] == "follow":
            c.ended("failed", up=False, why="PANIC: could not locate a valid checkpoint record")
            c.do(0.1)
            assert "could not locate a valid checkpoint record" in c.view.why
    assert c.ops == ["follow"] * FOLLOW_TRIES + ["rejoin"]
    pauses = [b - a for a, b in pairwise(sent)][: FOLLOW_TRIES - 1]
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 2 * NS - TICK


def test_a_pause_after_follows_in_vain_holds_off_nothing_else() -> None:
    """I1: a fence is never late for it."""
    o = observation(State.DEMOTING, order="failed", order_op="follow", may_follow=False)
    assert decide(o).do == ("fence",)
    o = observation(
        State.WATCHING, leads="vacant", eligible=True, order="failed", order_op="follow", may_follow=False
    )
    assert decide(o).do == ("claim",)


def test_a_pause_between_follows_ends_when_postgresql_answers() -> None:
    c = Following()
    c.set(postgres_up=False, following=None)
    c.up = False
    c.do(0.5)
    c.ended("failed", up=False, why="x")
    c.do(2)
    assert c.view.follows == 2
    c.ended("done", up=True)
    c.do(1)
    assert c.view.follows == 0
    assert observe(c.view, c.me, FAST, c.now).may_follow
