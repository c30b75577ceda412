"""Store distrust and anti-flap: what a node remembers against what it is shown, and what it then refuses."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from harmony.core.fold import fold
from harmony.core.messages import (
    Accepted,
    ClusterSeen,
    Command,
    ControlSeen,
    Event,
    Marks,
    MemberSeen,
    Order,
    Read,
    RefreshDone,
    Remember,
    Remembered,
    StoreSeen,
    Write,
    WriteDone,
)
from harmony.core.node import initial, step
from harmony.core.observe import cannot_found, needed, observe, stopped
from harmony.core.states import State
from harmony.core.table import Observation, decide
from harmony.core.timing import NS
from harmony.core.view import LEAP, Policy, View, distrust
from harmony.records import CLUSTER_STATE, ClusterState, Control
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

ME = identity("n2")
KNOWN = Marks(term=3, revision=50, attempt="n1i-7", lineage="L")
TICK = NS // 10


def run(v: View, seconds: float, *each: Event, start: int = T0, once: tuple[Event, ...] = ()) -> View:
    """Each tick: `each` again, and every write of before acknowledged."""
    acks: list[Event] = []
    for i in range(max(1, round(seconds * NS) // TICK)):
        now = start + i * TICK
        v, commands = step(v, [*(once if i == 0 else ()), *acks, *each], ME, FAST, now)
        acks = [WriteDone(c.key, c.attempt, "acked", 500 + i) for c in commands if isinstance(c, Write)]
    return v


def first(*events: Event) -> View:
    return step(initial(ME), list(events), ME, FAST, T0)[0]


@pytest.mark.parametrize(
    ("shown", "word"),
    [
        (seen(cluster(term=2), 51), "term went back from 3 to 2"),
        (seen(cluster(attempt="else"), 50), "two histories"),
    ],
    ids=["term", "two histories"],
)
def test_what_no_late_answer_explains_is_distrusted_at_once(shown: ClusterSeen, word: str) -> None:
    """I2, I4: the term gone back at a newer revision, or another value under a known revision."""
    v = first(Remembered(KNOWN), shown)
    assert word in distrust(v)


@pytest.mark.parametrize(
    "shown",
    [seen(None, 0), seen(cluster(term=2), 40), seen(cluster(), 49)],
    ids=["empty", "term", "revision"],
)
def test_less_than_was_seen(shown: ClusterSeen) -> None:
    """I2: distrusted from the first read; for good when it lasts longer than a lease, even if it recovers."""
    v = first(Remembered(KNOWN), shown)
    assert distrust(v)
    assert not distrust(run(v, 0.5, seen(cluster(), 50)))  # an old leader's answer
    v = run(v, FAST.lease_s + 0.5, shown)
    assert "lost history" in distrust(v)
    assert distrust(run(v, 1, seen(cluster(), 60), start=T0 + 10 * NS))


def test_a_stream_made_anew() -> None:
    """I2: its revisions may look right, its history is another."""
    v = first(Remembered(KNOWN), StoreSeen("M", ""), seen(cluster(), 60))
    assert "made anew" in distrust(v)
    assert not distrust(first(Remembered(KNOWN), StoreSeen("L", ""), seen(cluster(), 60)))


def own_record_at(v: View, revision: int, seconds: float, start: int) -> View:
    """The store refuses to replace what we know of our own record, and shows it at `revision`, each time anew."""
    commands: list[Command] = []
    for i in range(round(seconds * NS) // TICK):
        events: list[Event] = [fencer(), seen(cluster(), 50)]
        for c in commands:
            if isinstance(c, Write) and c.key == "member.n2":
                events.append(WriteDone(c.key, c.attempt, "refused"))
            if isinstance(c, Read) and c.key == "member.n2":
                events.append(MemberSeen("n2", member("n2"), revision, EPOCH))
        v, commands = step(v, events, ME, FAST, start + i * TICK)
    return v


def test_an_own_record_that_went_back_is_distrust() -> None:
    """I2: only member records were lost, cluster_state not: acknowledged writes are gone all the same.

    Else no heartbeat of this node would ever succeed again, nobody would say why, and there were nothing to accept.
    """
    v = run(first(), 0.5, fencer(), seen(cluster(), 50), MemberSeen("n2", None, 0, 0))
    known = msgspec.structs.replace(v, own=msgspec.structs.replace(v.own, revision=70))
    v = own_record_at(known, 60, FAST.lease_s - 0.5, T0 + NS)
    assert not distrust(v), "an old leader may answer for that long"
    v = own_record_at(v, 60, 3, T0 + 4 * NS)
    assert "own record: the store went back from revision 70 to 60" in distrust(v)
    v, _ = step(v, [Accepted(create=False)], ME, FAST, T0 + 10 * NS)
    v = run(
        v, 1, fencer(), seen(cluster(), 50), MemberSeen("n2", member("n2"), 60, EPOCH), start=T0 + 10 * NS
    )
    assert not distrust(v)
    assert v.failures == 0


@pytest.mark.parametrize("name", ["n1", "n2"], ids=["preferred", "standby"])
@pytest.mark.parametrize("shown", [None, cluster()], ids=["empty store", "somebody's store"])
def test_data_of_another_cluster_says_so_on_every_node(name: str, shown: ClusterState | None) -> None:
    """I1: a mistyped cluster.id founds nothing and promotes nothing, and each node asks for it first."""
    me = identity(name)
    v, commands = initial(me), []
    first_turn: list[Event] = [Remembered(Marks(), was_in="main"), seen(shown, 60 if shown else 0), fencer()]
    for events in (first_turn, []):
        v, more = step(v, events, me, FAST, T0)
        commands += more
    assert distrust(v).startswith("is cluster.id right? This node was in cluster main")
    assert "This node was in cluster main" in v.why
    assert not [c for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]


def test_damaged_memory_is_distrust() -> None:
    """I2: who cannot tell what it has seen does not guess."""
    assert "torn" in distrust(first(Remembered(Marks(), "torn"), seen(cluster(), 60)))


def test_a_problem_of_the_store_lasts_as_long_as_it_lasts() -> None:
    """D4: too few replicas and the like: no promotion until it is corrected, and nothing to accept."""
    v = first(StoreSeen("L", "replicas is 1, must be 3"), seen(cluster(), 60))
    assert "replicas" in distrust(v)
    assert not distrust(run(v, 0.1, StoreSeen("L", "")))


def test_what_is_remembered() -> None:
    """I2: a new term at once, everything else now and then, and nothing while the store is distrusted."""
    v, commands = step(initial(ME), [StoreSeen("L", ""), seen(cluster(), 50)], ME, FAST, T0)
    assert [c.marks for c in commands if isinstance(c, Remember)] == [KNOWN]
    v, commands = step(v, [seen(cluster(), 55)], ME, FAST, T0 + NS)
    assert not [c for c in commands if isinstance(c, Remember)]
    v, commands = step(v, [seen(cluster(term=4), 60)], ME, FAST, T0 + 2 * NS)
    assert [(c.marks.term, c.marks.revision) for c in commands if isinstance(c, Remember)] == [(4, 60)]
    v, commands = step(v, [seen(cluster(term=2), 70)], ME, FAST, T0 + 3 * NS)
    assert distrust(v)
    assert v.marks.revision == 60


def test_an_answer_that_crossed_something_newer_is_no_store_that_went_back() -> None:
    """A read was sent at revision 50, the watch told of 60 meanwhile, and the answer (55) comes after it."""
    crossed = replace(seen(cluster(), 55), asked_at=50)
    v = first(StoreSeen("L", ""), seen(cluster(), 50), seen(cluster(), 60, by_read=False))
    v = step(v, [crossed], ME, FAST, T0)[0]
    assert not distrust(v)
    assert v.revision == v.marks.revision == 60
    v = step(v, [replace(seen(cluster(), 55), asked_at=60)], ME, FAST, T0)[0]
    assert "less than revision 60" in distrust(v)
    v = step(v, [crossed], ME, FAST, T0)[0]
    assert distrust(v)  # nor does it take a doubt away


def test_what_the_fencer_knew_of_a_history_is_overruled_with_it() -> None:
    """An accepted store: remembered on disk, raised with each acceptance, and kept by a node that restarts."""
    ahead = fencer(highest=(7, 2))
    v = first(StoreSeen("L", ""), seen(cluster(term=5), 50), ahead, Accepted(create=False))
    assert v.marks == v.kept == Marks(overruled=7)
    assert Remembered(v.marks).of_nothing
    v, commands = step(v, [seen(cluster(term=5), 60)], ME, FAST, T0 + NS)
    assert [c.marks for c in commands if isinstance(c, Remember)] == [Marks(5, 60, "n1i-7", "L", 7)]
    for disk in (Marks(5, 60, "n1i-7", "L", 7), Marks(5, 90, "n1i-7", "L", 7)):
        again = first(seen(cluster(term=5), 80), StoreSeen("L", ""), Remembered(disk))
        assert again.marks.overruled == 7


@pytest.mark.parametrize("state", list(State))
def test_nothing_is_promoted_by_a_distrusted_store(state: State) -> None:
    """I1, I4: no claim, no activation, no founding, no vacancy, whatever else holds."""
    for leads in ("me", "other", "vacant", "nobody_yet"):
        for proven in (True, False):
            o = observation(
                state,
                leads=leads,
                distrust="x",
                stale=True,
                eligible=True,
                virgin=True,
                may_found=True,
                fence_proven=proven,
                db="standby" if leads != "me" else "primary",
                named="n3",
                successor_fit=True,
                latched=True,
            )
            forbidden = {"claim", "create", "activate", "vacate", "demote", "name"}
            for o_ in (o, replace(o, latched=False), replace(o, latched=False, db="down", postgres_up=False)):
                assert not forbidden & set(decide(o_).do), (state, leads, decide(o_))


def test_no_candidate_by_a_distrusted_store() -> None:
    """I2: the judgement says it as well, not only the table."""
    vacant = cluster(primary=None, primary_fencer_id=None, lsn=0, sync_count=0, sync_voters=())
    now = T0 + 100 * NS

    def after(*events: Event) -> Observation:
        v = first(seen(vacant, 50), *events)
        v, _ = step(v, [fencer(), standby(now)], ME, FAST, now)
        return observe(v, ME, FAST, now)

    assert after().eligible
    o = after(StoreSeen("L", "replicas is 1, must be 3"))
    assert not o.eligible
    assert "distrusted" in o.eligible_why


@pytest.mark.parametrize("state", [State.HEALTHY, State.LEADER])
def test_a_primary_that_renews_is_left_alone(state: State) -> None:
    """W10: distrust alone fences nobody; it is said as an alarm."""
    d = decide(observation(state, distrust="replicas is 1"))
    assert (d.next, d.do) == (state, ())
    assert "replicas is 1" in d.why


def test_what_is_over_is_not_shown_any_more() -> None:
    """O2: the status names the row that speaks now, else the one that led into the state, never "nothing"."""
    mine = (fencer(), MemberSeen("n2", None, 0, 0))
    v = run(first(seen(cluster(), 50)), 0.2, seen(cluster(), 50), *mine)
    entered = (v.row, v.why)
    assert v.row
    assert v.state is State.WATCHING
    assert v.entered == entered
    v = run(v, 0.2, StoreSeen("L", "replicas is 1"), seen(cluster(), 50), *mine, start=T0 + NS)
    assert (v.state, v.row) == (State.WATCHING, 720)
    assert "replicas is 1" in v.why
    v = run(v, 0.2, StoreSeen("L", ""), seen(cluster(), 50), *mine, start=T0 + 2 * NS)
    assert (v.row, v.why) == entered


def test_a_restarted_primary_resumes_under_its_lease_in_a_distrusted_store() -> None:
    """W8, W10."""
    assert decide(observation(State.P_INITIALIZING, distrust="x")).next is State.HEALTHY


def test_acceptance_forgets_and_looks_anew() -> None:
    """I2: the way out: the marks are gone, the store is read from nothing, and what it shows counts."""
    mine = MemberSeen("n2", None, 0, 0)
    v = run(first(Remembered(KNOWN), seen(cluster(term=2), 40)), 4, seen(cluster(term=2), 40), mine)
    assert distrust(v)
    v = run(v, 0.2, once=(Accepted(create=False),), start=T0 + 9 * NS)
    assert not distrust(v)
    assert v.cluster is None
    v = run(v, 1, seen(cluster(term=2), 40), fencer(), mine, start=T0 + 10 * NS)
    assert not distrust(v)
    assert (v.marks.term, v.marks.revision) == (2, 40)
    assert v.state is State.WATCHING


@pytest.mark.parametrize("create", [True, False])
def test_an_acceptance_is_kept_on_disk_also_where_there_is_nothing_to_keep(create: bool) -> None:
    """I2: else the damaged memory, or the old marks, would be distrusted again after the next restart."""
    v = first(Remembered(Marks(), "torn"), seen(None, 0), fencer())
    v, commands = step(v, [Accepted(create=create)], ME, FAST, T0 + NS)
    assert [c.marks for c in commands if isinstance(c, Remember)] == [Marks(overruled=3)]
    _, commands = step(v, [], ME, FAST, T0 + 2 * NS)
    assert not [c for c in commands if isinstance(c, Remember)]


@pytest.mark.parametrize("state", [State.PROMOTING, State.LEADER])
def test_acceptance_while_promoting_forgets_the_claim(state: State) -> None:
    """I1: the store may have lost the claim, and another found meanwhile; only who writes already keeps all.

    Seed 170 of the simulation: n3 activated its lost claim after the acceptance, beside the founder.
    """
    v = first(fencer(), seen(cluster(term=2, primary="n2", primary_fencer_id="id-n2"), 40))
    v = msgspec.structs.replace(v, state=state, lease_until_ns=T0 + 9 * NS, distrust="made anew")
    v = fold(v, Accepted(create=False), ME, FAST, T0 + NS)
    assert not distrust(v)
    assert (v.cluster is None, v.lease_until_ns == 0) == (state is State.PROMOTING, state is State.PROMOTING)


def test_founding_anew_takes_an_operators_word() -> None:
    """I3: an empty store after a history: only who was told founds it, above every term that it has seen."""
    quiet = {"leads": "nobody_yet", "granted": False, "db": "standby"}
    for state in (State.P_INITIALIZING, State.R_INITIALIZING):
        assert decide(observation(state, **quiet)).do == ()
        assert decide(observation(state, **quiet, may_found=True)).do == ("create",)
        assert decide(observation(state, **quiet, may_found=True, latched=True)).do == ()
    v = first(Remembered(KNOWN), seen(None, 0), fencer(highest=(7, 2)))
    v = run(v, 3, seen(None, 0), fencer(highest=(7, 2)))
    v, _ = step(v, [Accepted(create=True)], ME, FAST, T0 + 9 * NS)
    written: list[ClusterState] = []
    for i in range(10):
        events = [seen(None, 0), fencer(highest=(7, 2))]
        v, commands = step(v, events, ME, FAST, T0 + 9 * NS + i * TICK)
        written += [c.record for c in commands if isinstance(c, Write) and isinstance(c.record, ClusterState)]
    assert {r.term for r in written} == {8}


# ---------------------------------------------------------------- anti-flap


def lost(times: int, apart_s: float = 1) -> tuple[View, int]:
    """A view whose leadership was lost `times`, and the moment of the last loss."""
    at = [T0 + round(i * apart_s * NS) for i in range(times)]
    return msgspec.structs.replace(initial(ME), losses=tuple(at)), at[-1] if at else T0


def test_good_heartbeats_needed_double_with_each_loss() -> None:
    """W10: hysteresis against a latency just above the timeout; the window forgives."""
    for times, factor in ((0, 1), (1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (9, 16)):
        v, now = lost(times)
        assert needed(v, ME, FAST, now) == FAST.success_threshold * factor
    v, now = lost(4)
    assert needed(v, ME, FAST, now + 601 * NS) == FAST.success_threshold


def test_a_flapping_primary_leaves_the_place_to_a_peer() -> None:
    """W10: fenced for the second time of late, and a peer could lead: the vacancy. Without a peer it goes on."""
    quiet = {"fence_proven": True, "postgres_up": False, "db": "down", "granted": False, "flapping": True}
    for state in (State.FENCED, State.DEMOTING):
        assert decide(observation(state, leads="me", **quiet)).do == ("vacate",)
        assert "vacate" not in decide(observation(state, leads="me", peer_ready=False, **quiet)).do
    for times, flaps in ((0, False), (1, False), (2, True), (3, True)):
        v, now = lost(times)
        assert observe(v, ME, FAST, now).flapping is flaps
    v, now = lost(3)
    assert not observe(v, ME, FAST, now + 601 * NS).flapping


def test_who_led_and_may_not_yet_says_why() -> None:
    """Recorded as the primary, and its own heartbeats have not been good for long enough: no line without a reason."""
    me = identity("n1")
    for state, row in ((State.WATCHING, 718), (State.FENCED, 409)):
        gone = state is State.FENCED
        follows = fencer("n1", highest=(3, 2), following=None, fence_proven=gone, postgres_up=not gone)
        losses = (T0 - 3 * NS, T0 - 2 * NS, T0 - NS)
        v = msgspec.structs.replace(initial(me), state=state, losses=losses)
        for event in (follows, seen(cluster(), 50), standby(T0)):
            v = fold(v, event, me, FAST, T0)
        decided = decide(observe(v, me, FAST, T0))
        assert (decided.row, decided.next, decided.do) == (row, state, ())
        assert decided.why.endswith(
            f"leading again takes {4 * FAST.success_threshold} good heartbeats in a row"
        )
        one = observe(v, me, msgspec.structs.replace(FAST, success_threshold=1), T0 + 601 * NS)
        assert decide(one).why.endswith("leading again takes a good heartbeat")
    v = msgspec.structs.replace(v, state=State.WATCHING, losses=(), successes=FAST.success_threshold)
    assert observe(v, me, FAST, T0).eligible_why == "PostgreSQL is not running here as a standby"


def test_each_way_of_failing_counts_as_a_loss() -> None:
    """W10: counted where a leader falls, not where it hands over."""
    me = identity("n1")
    grant = fencer("n1", active=(3, 1), lease_deadline_ns=T0 + NS, following=None, is_standby=False)
    primary = type(standby(T0))("primary", 4, 1000, 1000, False, "sys", T0)
    v, _ = step(initial(me), [grant, seen(cluster(), 50), primary], me, FAST, T0)
    assert v.state is State.HEALTHY
    v, commands = step(v, [], me, FAST, T0 + 30 * NS)
    assert [c.op for c in commands if isinstance(c, Order)] == ["fence"]
    assert v.losses == (T0 + 30 * NS,)
    assert not observe(v, me, FAST, T0 + 30 * NS).flapping


CHANGED = tuple((term, EPOCH + term * NS) for term in range(1, 4))


def test_too_many_changes_stop_automatic_failover_until_acknowledged() -> None:
    """W10: counted by the store's own time; an operator's acknowledgement starts the count again."""
    me = replace(ME, policy=Policy(maximum_changes=3, changes_window_s=60))
    v = first(seen(cluster(changes=CHANGED), 50, 4))
    assert "harmonyctl acknowledge" in stopped(v, me)
    assert not stopped(v, ME)  # no limit
    assert not stopped(first(seen(cluster(changes=CHANGED[1:]), 50, 4)), me)
    assert not stopped(first(seen(cluster(changes=CHANGED), 50, 4 + 60)), me)
    assert not stopped(step(v, [ControlSeen(Control("x", acknowledged=3), 9)], me, FAST, T0)[0], me)
    assert stopped(step(v, [ControlSeen(Control("x", acknowledged=0), 9)], me, FAST, T0)[0], me)


def replica(policy: Policy, record: ClusterState, seconds: float) -> list[ClusterState]:
    """What n2 writes to cluster_state while the primary is silent."""
    me = replace(ME, policy=policy)
    v, commands = step(initial(me), [fencer(), seen(record, 50), standby(T0)], me, FAST, T0)
    written: list[ClusterState] = []
    for i in range(1, round(seconds * NS) // TICK):
        now = T0 + i * TICK
        events: list[Event] = [fencer(), standby(now), RefreshDone(ok=True)]
        events += [
            MemberSeen("n2", member("n2"), 60 + i, EPOCH + i * TICK),
            MemberSeen("n3", member("n3"), 400 + i, EPOCH + i * TICK),
        ]
        events += [WriteDone(c.key, c.attempt, "acked", 1000 + i) for c in commands if isinstance(c, Write)]
        v, commands = step(v, events, me, FAST, now)
        written += [c.record for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]  # type: ignore[misc]
    return written


def test_a_stopped_cluster_does_not_fail_over() -> None:
    """W10: the same silence with and without the limit; a claim carries the list on."""
    record = cluster(changes=CHANGED)
    assert not replica(Policy(maximum_changes=3), record, 8)
    taken = replica(Policy(maximum_changes=4), record, 8)
    assert taken
    assert taken[0].changes[:-1] == CHANGED
    assert taken[0].changes[-1][0] == taken[0].term


def test_a_hand_over_is_no_change_and_is_never_stopped() -> None:
    """W10: what an operator asks for is not what the limit is about."""
    vacancy = cluster(
        primary=None, primary_fencer_id=None, successor="n2", clean=True, lsn=999, changes=CHANGED
    )
    taken = replica(Policy(maximum_changes=3), vacancy, 1)
    assert taken
    assert taken[0].changes == CHANGED


def test_a_founder_founds_with_the_data_that_the_operator_looked_at() -> None:
    """I2: found by simulation (seed 30959): a foreign data directory was put in its place meanwhile."""
    v, _ = step(initial(ME), [fencer(), StoreSeen("L", ""), seen(None, 0)], ME, FAST, T0)
    v, _ = step(v, [Accepted(create=True)], ME, FAST, T0 + 1)
    here = [fencer(), seen(None, 0)]
    v, _ = step(v, here, ME, FAST, T0 + 2)
    assert observe(v, ME, FAST, T0 + 3).may_found
    v, commands = step(v, [fencer(system_identifier="foreign"), seen(None, 0)], ME, FAST, T0 + 3)
    assert not observe(v, ME, FAST, T0 + 3).may_found
    assert not [c for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]


@pytest.mark.parametrize("state", [State.P_INITIALIZING, State.R_INITIALIZING])
def test_data_that_is_not_whole_founds_nothing(state: State) -> None:
    """I5: found by simulation (seed 29934911074): a cluster was founded by a copy that had broken off, for good."""
    me = ME if state is State.R_INITIALIZING else identity("n1")
    broken = fencer(unfinished=True)
    v, _ = step(initial(me), [broken, StoreSeen("L", ""), seen(None, 0)], me, FAST, T0)
    assert v.state is state
    assert "interrupted" in cannot_found(v)
    v, _ = step(v, [Accepted(create=True)], me, FAST, T0 + 1)
    v, commands = step(v, [broken, seen(None, 0)], me, FAST, T0 + 2)
    assert not [c for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]
    v, commands = step(v, [fencer(), seen(None, 0)], me, FAST, T0 + 3)  # whole: it founds
    assert [c for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]


def test_who_founds_anew_leaps_over_the_timelines_of_the_lost_history() -> None:
    """I2: found by simulation (seed 29934910040): another node was on timeline 8 of a history that the store had
    lost, the founder began 7 anew, and 8 was then taken for more than 7."""
    v, _ = step(initial(ME), [fencer(timeline=7), StoreSeen("L", ""), seen(None, 0)], ME, FAST, T0)
    v, _ = step(v, [Accepted(create=True)], ME, FAST, T0 + 1)
    v, commands = step(v, [fencer(timeline=7), seen(None, 0)], ME, FAST, T0 + 2)
    written = [c for c in commands if isinstance(c, Write) and c.key == CLUSTER_STATE]
    assert written
    record = written[0].record
    assert isinstance(record, ClusterState)
    assert record.reserved == 7 + LEAP
