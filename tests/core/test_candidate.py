"""Who may promote (I2), and each refusal's reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.core.candidate import Standing, Verdict, judge
from harmony.records import ClusterState, Member
from tests.core.helpers import FAST, cluster, member

ME = Standing("n2", True, 4, 1000, FAST.settle_ns, False, False, 100, True)


def verdict(
    me: Standing = ME,
    record: ClusterState | None = None,
    *members: Member,
    patient: bool = True,
    barred: str = "",
) -> Verdict:
    others = {m.node: m for m in (members or (member("n3"),))}
    return judge(
        me,
        record or cluster(),
        50,
        others,
        settle_ns=FAST.settle_ns,
        maximum_lag_bytes=64,
        barred=barred,
        patient=patient,
    )


def test_the_best_standby_may() -> None:
    assert verdict().ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latched": True}, "latches"),
        ({"trusted": False}, "trusted"),
        ({"nofailover": True}, "nofailover"),
        ({"db_standby": False}, "not running"),
        ({"timeline": 3}, "timeline"),
        ({"silent_ns": FAST.settle_ns - 1}, "certainly stopped"),
        ({"received_lsn": 999}, "more WAL"),
        ({"priority": 50}, "goes first"),
        ({"node": "n9"}, "not one of the recorded"),
    ],
)
def test_refusals_say_why(change: dict[str, object], reason: str) -> None:
    """Each condition refuses, by name, also when its rivals are no longer waited for (but for rank)."""
    v = verdict(replace(ME, **change))  # type: ignore[arg-type]
    assert not v.ok
    assert reason in v.why


@pytest.mark.parametrize(
    "change", [{"silent_ns": FAST.settle_ns - 1}, {"seen_revision": 49}, {"db": "unknown"}]
)
def test_a_position_that_is_not_final_does_not_count(change: dict[str, object]) -> None:
    """I2: the other voter's position must have been read after the primary had certainly stopped."""
    v = verdict(ME, cluster(), member("n3", **change))
    assert not v.ok
    assert "not heard: n3" in v.why


def test_a_nofailover_voter_with_more_wal_still_forbids() -> None:
    """I2: who may not promote may still hold the newest commit."""
    assert not verdict(ME, cluster(), member("n3", nofailover=True, received_lsn=2000), patient=False).ok


def test_two_of_three_voters_hold_any_commit() -> None:
    """I2: with ANY 2 of 3, two voters heard are enough, one is not."""
    record = cluster(sync_count=2, sync_voters=("n2", "n3", "n4"))
    assert verdict(ME, record).ok
    assert not verdict(ME, record, member("n9")).ok


def test_asynchronous_lag_limit() -> None:
    """Mode off: within the allowed lag of the primary's last heartbeat."""
    record = cluster(sync_count=0, sync_voters=(), lsn=1064)
    assert verdict(ME, record).ok
    assert "behind" in verdict(replace(ME, received_lsn=999), record).why


def test_who_left_the_vacancy_waits_first_but_may_come_back() -> None:
    """I5: a vacancy that nobody takes goes back to who left it; it has every commit."""
    vacancy = cluster(primary=None, last_primary="n2", sync_voters=("n1", "n3"))
    assert not verdict(ME, vacancy, member("n3", silent_ns=0)).ok
    assert verdict(ME, vacancy, member("n3", silent_ns=0), patient=False).ok


def test_equal_rivals_are_ordered_by_name_and_waited_for_only_so_long() -> None:
    third = replace(ME, node="n3")
    assert not verdict(third, cluster(), member("n2")).ok
    assert verdict(third, cluster(), member("n2"), patient=False).ok


def test_nobody_waits_for_a_node_that_will_not_promote() -> None:
    """D10: it has flapped, is being stopped, or distrusts; whoever waited for it would wait in vain."""
    record = cluster(sync_count=0, sync_voters=())
    assert "goes first" in verdict(ME, record, member("n3", received_lsn=1001)).why
    assert verdict(ME, record, member("n3", received_lsn=1001, barred=True)).ok
    assert "more WAL" in verdict(ME, cluster(), member("n3", received_lsn=1001, barred=True)).why
