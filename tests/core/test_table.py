"""The table itself: well formed, and each rule that safety rests on, by its row."""

from __future__ import annotations

from collections import Counter

import pytest

from harmony.core.states import State
from harmony.core.table import TABLE, decide
from tests.core.helpers import observation


def test_rows_are_well_formed() -> None:
    """Ids are unique and ascend, states are contiguous, every state has rows."""
    ids = [row.id for row in TABLE]
    assert ids == sorted(ids)
    assert max(Counter(ids).values()) == 1
    assert [row.state for row in TABLE] == sorted((r.state for r in TABLE), key=list(State).index)
    assert {row.state for row in TABLE} == set(State)
    assert all(row.why and row.condition for row in TABLE)


def test_writable_only_through_proof() -> None:
    """W4, I4: the writable states are entered only where the database was seen writable under a grant."""
    for row in TABLE:
        if row.next in {State.HEALTHY, State.LEADER} and row.state is not row.next:
            for broken in ({"granted": False}, {"db": "standby"}):
                o = observation(row.state, leads="me", order="done", order_op="activate", **broken)
                assert decide(o).next not in {State.HEALTHY, State.LEADER}, (row.id, broken)


@pytest.mark.parametrize("state", [State.HEALTHY, State.LEADER])
@pytest.mark.parametrize(
    "change",
    [
        {"lost": True},
        {"leads": "other"},
        {"leads": "vacant"},
        {"granted": False},
        {"postgres_up": False, "db": "down"},
        {"failing": True},
        {"lease_left": False},
        {"db": "standby"},
    ],
    ids=str,
)
def test_a_leader_falls_with_a_fence(state: State, change: dict[str, object]) -> None:
    """D6, W9: each way of losing leadership fences at once, one SequenceMismatch included."""
    d = decide(observation(state, **change))
    assert d.next in {State.P_FAILED, State.DEMOTING}
    assert d.do == ("fence",)


@pytest.mark.parametrize("state", [State.HEALTHY, State.LEADER])
@pytest.mark.parametrize(
    "change", [{"failures": 2}, {"db": "unknown"}, {"stale": True}, {"peer_ready": False}]
)
def test_a_leader_stays(state: State, change: dict[str, object]) -> None:
    """O4, W10: what is no proof of anything changes nothing."""
    assert decide(observation(state, **change)).next is state


@pytest.mark.parametrize("state", [State.P_FAILED, State.DEMOTING])
def test_failed_lasts_until_the_fence_is_proven(state: State) -> None:
    """W4, W5, I6: no proof, no leaving; a failed fence is ordered again."""
    running = decide(observation(state, order="running", order_op="fence"))
    assert (running.next, running.do) == (state, ())
    failed = decide(observation(state, order="failed", order_op="fence", order_why="pid 7 lives"))
    assert (failed.next, failed.do) == (state, ("fence",))
    assert "pid 7 lives" in failed.why
    proven = decide(observation(state, fence_proven=True, postgres_up=False, db="down"))
    assert proven.next is not state


def test_fenced_needs_a_fresh_look() -> None:
    """W3: out of Fenced only after good heartbeats; to Yielding when the term is another's."""
    quiet = {"fence_proven": True, "postgres_up": False, "db": "down", "granted": False}
    assert decide(observation(State.FENCED, recovered=False, **quiet)).do == ()
    assert decide(observation(State.FENCED, **quiet)).do == ("activate",)
    assert decide(observation(State.FENCED, lease_left=False, **quiet)).do == ()
    assert decide(observation(State.FENCED, leads="other", **quiet)).next is State.YIELDING
    assert decide(observation(State.FENCED, leads="vacant", **quiet)).next is State.YIELDING
    assert decide(observation(State.FENCED, leads="unread", **quiet)).do == ()


def test_vacancy_only_after_proof() -> None:
    """I6: the vacancy is written only after the fence is proven."""
    quiet = {"postgres_up": False, "db": "down", "granted": False, "postgres_failed": True}
    for state in (State.FENCED, State.DEMOTING):
        assert decide(observation(state, leads="me", fence_proven=True, **quiet)).do == ("vacate",)
        assert "vacate" not in decide(observation(state, leads="me", fence_proven=False, **quiet)).do


def test_promotion_conditions() -> None:
    """I4, W2: only stale or vacant, and eligible; never from Failed, never while latched."""
    quiet = {"db": "standby", "granted": False}
    assert decide(observation(State.WATCHING, stale=True, eligible=True, **quiet)).do == ("claim",)
    assert decide(observation(State.WATCHING, leads="vacant", eligible=True, **quiet)).do == ("claim",)
    assert decide(observation(State.WATCHING, stale=False, eligible=True, **quiet)).do == ()
    refused = decide(observation(State.WATCHING, stale=True, eligible_why="n3 has more WAL", **quiet))
    assert refused.do == ()
    assert "n3 has more WAL" in refused.why
    latched = observation(State.WATCHING, stale=True, eligible=True, latched=True, **quiet)
    assert decide(latched).do == ()
    failed = observation(State.R_FAILED, recovered=False, stale=True, eligible=True, **quiet)
    assert decide(failed).do == ()


def test_activation_only_after_the_claim_is_won() -> None:
    """I4: Promoting orders nothing while the claim's fate is unknown."""
    quiet = {"db": "standby", "granted": False}
    assert decide(observation(State.PROMOTING, writing=True, leads="other", **quiet)).do == ()
    assert decide(observation(State.PROMOTING, leads="other", **quiet)).next is State.WATCHING
    assert decide(observation(State.PROMOTING, **quiet)).do == ("activate",)
    replaced = observation(State.PROMOTING, leads="other", order_op="activate", order="running", **quiet)
    assert decide(replaced).do == ("fence",)


def test_restart_as_the_recorded_primary() -> None:
    """W8: resumes at once with the lease in force, else fences first; a deposed one yields."""
    assert decide(observation(State.P_INITIALIZING)).next is State.HEALTHY
    assert decide(observation(State.R_INITIALIZING, leads="me")).next is State.LEADER
    assert decide(observation(State.P_INITIALIZING, granted=False)).do == ("fence",)
    assert decide(observation(State.P_INITIALIZING, leads="other")).next is State.YIELDING
    assert decide(observation(State.R_INITIALIZING)).next is State.WATCHING


def test_an_empty_store_is_distrusted_by_a_node_with_a_past() -> None:
    """I3: who has accepted a term never makes a new cluster."""
    new = {"leads": "nobody_yet", "granted": False, "db": "down", "postgres_up": False}
    assert decide(observation(State.P_INITIALIZING, virgin=True, **new)).do == ("create",)
    assert decide(observation(State.P_INITIALIZING, virgin=False, **new)).do == ()
    assert decide(observation(State.R_INITIALIZING, virgin=True, **new)).do == ()


def test_a_foreign_data_directory_is_fatal() -> None:
    """Another system identifier: named, and the node does not go on."""
    d = decide(observation(State.R_INITIALIZING, foreign="belongs to another cluster"))
    assert d.do == ("fatal",)
    assert "another cluster" in d.why


def test_both_workflows_recover() -> None:
    """W2, W6: good heartbeats lead out of Failed, in both workflows."""
    assert decide(observation(State.R_FAILED)).next is State.WATCHING
    assert decide(observation(State.P_FAILED, fence_proven=True)).next is State.FENCED
