"""Short ways to build observations and views for tests of the core. No clock, no fakes: plain data."""

from __future__ import annotations

from dataclasses import replace

from harmony.core.messages import ClusterSeen, DbSeen, FencerSeen, FencerView
from harmony.core.states import State
from harmony.core.table import Observation
from harmony.core.timing import NS, PRESETS
from harmony.core.view import Identity
from harmony.records import ClusterState, Member

FAST = PRESETS["fast"]
T0 = 1_000 * NS
EPOCH = 10**18


def identity(node: str = "n2", *, sync: int = 1) -> Identity:
    return Identity(
        node, "c1", node == "n1", ("n1", "n2", "n3"), sync, 1024, False, 100, f"{node}i", "boot", "t"
    )


def observation(state: State, **changes: object) -> Observation:
    """A quiet world in which nothing is wrong and nothing is to be done."""
    base = Observation(
        state=state,
        leads="me" if state.startswith("primary") or state in {State.LEADER, State.PROMOTING} else "other",
        lost=False,
        failures=0,
        failing=False,
        recovered=True,
        lease_left=True,
        fencer_known=True,
        granted=True,
        fence_proven=False,
        order="none",
        order_op="",
        order_why="",
        may_order=True,
        postgres_up=True,
        db="primary",
        following_right=True,
        postgres_failed=False,
        peer_ready=True,
        term_behind=False,
        latched=False,
        trusted=True,
        identified=True,
        reserved=True,
        virgin=False,
        may_claim=True,
        writing=False,
        stale=False,
        eligible=False,
        eligible_why="",
        foreign=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def cluster(**changes: object) -> ClusterState:
    base = ClusterState(
        cluster_id="c1",
        system_identifier="sys",
        term=3,
        primary="n1",
        primary_fencer_id="id-n1",
        last_primary="n1",
        beat=7,
        attempt="n1i-7",
        boot_id="boot",
        status=State.HEALTHY,
        timeline=4,
        lsn=1000,
        sync_count=1,
        sync_voters=("n2", "n3"),
    )
    fields = {f: getattr(base, f) for f in base.__struct_fields__} | changes
    return ClusterState(**fields)  # type: ignore[arg-type]


def member(node: str, **changes: object) -> Member:
    base = Member(
        node=node,
        attempt=f"{node}i-1",
        boot_id="boot",
        status=State.WATCHING,
        row="0",
        why="",
        db="standby",
        timeline=4,
        received_lsn=1000,
        replayed_lsn=1000,
        streaming=True,
        seen_revision=50,
        silent_ns=FAST.settle_ns,
        latched=False,
        nofailover=False,
        priority=100,
        generation="3.1",
        lease_left_ms=None,
        fencer_id=f"id-{node}",
        fencer_ok=True,
        system_identifier="sys",
        version="t",
    )
    fields = {f: getattr(base, f) for f in base.__struct_fields__} | changes
    return Member(**fields)  # type: ignore[arg-type]


def fencer(node: str = "n2", **changes: object) -> FencerSeen:
    base = FencerView(
        fencer_id=f"id-{node}",
        trusted=True,
        detail="",
        highest=(3, 1),
        active=None,
        lease_deadline_ns=None,
        order=None,
        order_op="",
        order_state="",
        order_detail="",
        fence_proven=False,
        postgres_up=True,
        following="n1",
        is_standby=True,
        system_identifier="sys",
        latched=None,
    )
    return FencerSeen(replace(base, **changes))  # type: ignore[arg-type]


def seen(
    record: ClusterState | None, revision: int, stamp_s: float = 0.0, *, by_read: bool = True
) -> ClusterSeen:
    return ClusterSeen(record, revision, EPOCH + round(stamp_s * NS), by_read)


def standby(asked_ns: int, lsn: int = 1000, timeline: int = 4) -> DbSeen:
    return DbSeen("standby", timeline, lsn, lsn, True, "sys", asked_ns)
