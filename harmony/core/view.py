"""What a node knows (View), how events change it (fold), and what a decision sees of it (observe).

Pure: time is an argument, nothing is sent. The two-clock rule and the lease arithmetic are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec.structs import replace

from harmony.core import candidate, register
from harmony.core.messages import (
    ClusterSeen,
    Connected,
    DbSeen,
    DbSilent,
    Event,
    FencerSeen,
    FencerSilent,
    FencerView,
    Gen,
    MemberSeen,
    OrderOp,
    OrderRefused,
    ReadFailed,
    RefreshDone,
    WriteDone,
)
from harmony.core.register import Acked, Failed, Lost, Register
from harmony.core.states import WRITABLE_STATES, State
from harmony.core.table import Leads, Observation, Order
from harmony.core.timing import Timing
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, ClusterState, Member

# States in which a node recorded as the primary keeps writing its heartbeat. A failed or fenced one goes
# on too, saying so: while its fence is unproven nobody may take over, and this is what holds them off.
LEADING = frozenset(
    {State.HEALTHY, State.LEADER, State.P_FAILED, State.FENCED, State.PROMOTING, State.DEMOTING}
)
FENCE_PAUSE_NS = 200_000_000
ORDER_PAUSE_NS = 1_000_000_000
ORDER_LOST_NS = 1_000_000_000  # an order that the fencer has not shown after this is sent anew


@dataclass(frozen=True, slots=True)
class Identity:
    """What does not change while the agent lives. `instance` makes attempt ids unique per process."""

    node: str
    cluster_id: str
    preferred: bool
    members: tuple[str, ...]
    sync_count: int  # 0: asynchronous
    maximum_lag_bytes: int
    nofailover: bool
    priority: int
    instance: str
    boot_id: str
    version: str


class SentOrder(msgspec.Struct, frozen=True):
    generation: Gen
    op: OrderOp
    sent_ns: int
    refused: str = ""


Intent = Literal["beat", "create", "claim", "vacate"]


class View(msgspec.Struct, frozen=True):
    """Everything folded so far. A msgspec struct, as it is copied at every event: replace() is ten times faster."""

    state: State
    row: int = 0
    why: str = "starting"
    counter: int = 0  # of attempt ids
    last_step_ns: int = 0
    # cluster_state as newest known
    read_ok: bool = False
    cluster: ClusterState | None = None
    revision: int = 0
    stamp_ns: int = 0
    first_seen_ns: int = 0  # when this revision was first seen here
    silent_from_ns: int = 0  # local half of the two-clock rule
    lead: Register = msgspec.field(default_factory=Register)
    intent: Intent = "beat"
    lead_record: ClusterState | None = None
    lead_sent_ns: int = 0  # start of the newest heartbeat
    lost: bool = False
    lease_until_ns: int = 0
    renewed: tuple[Gen, int] = ((0, 0), 0)
    claim_pause_until_ns: int = 0
    # members
    members: Mapping[str, Member] = msgspec.field(default_factory=dict)
    member_revision: Mapping[str, int] = msgspec.field(default_factory=dict)
    member_changed_ns: Mapping[str, int] = msgspec.field(default_factory=dict)
    own: Register = msgspec.field(default_factory=Register)
    own_sent_ns: int = 0
    own_stamp_ns: int = 0
    refreshing_until_ns: int = 0
    refreshed_ns: int = 0
    # counters of the heartbeat that matters in the state (leading: the lead, else the own record)
    failures: int = 0
    successes: int = 0
    failed_why: str = ""
    # the world on this host
    fencer: FencerView | None = None
    fencer_silent: str = "not asked yet"
    db: DbSeen | None = None
    db_ns: int = 0
    order: SentOrder | None = None
    postgres_failed: bool = False


def leads(v: View, me: Identity) -> Leads:
    """What the newest known cluster_state says of leadership."""
    if not v.read_ok:
        return "unread"
    if v.cluster is None:
        return "nobody_yet"
    if v.cluster.primary is None:
        return "vacant"
    return "me" if is_mine(v, me, v.cluster) else "other"


def is_mine(v: View, me: Identity, c: ClusterState) -> bool:
    return c.primary == me.node and v.fencer is not None and c.primary_fencer_id == v.fencer.fencer_id


def is_leading(v: View, me: Identity) -> bool:
    return v.state in LEADING and not v.lost and leads(v, me) == "me"


# ---------------------------------------------------------------- fold


def fold(v: View, e: Event, me: Identity, t: Timing, now_ns: int) -> View:
    """The view after one event."""
    match e:
        case Connected():
            return replace(v, silent_from_ns=now_ns)
        case ClusterSeen():
            return _cluster_seen(v, e, me, t, now_ns)
        case MemberSeen():
            return _member_seen(v, e, me, now_ns)
        case RefreshDone(ok=ok):
            v = replace(v, refreshing_until_ns=0, refreshed_ns=now_ns if ok else v.refreshed_ns)
            return v if ok else replace(v, silent_from_ns=now_ns)
        case WriteDone():
            if e.key == CLUSTER_STATE:
                r, out = register.write_done(v.lead, e.attempt, e.outcome, e.revision, now_ns)
                return lead_outcome(replace(v, lead=r), out, t, now_ns)
            r, out = register.write_done(v.own, e.attempt, e.outcome, e.revision, now_ns)
            return own_outcome(replace(v, own=r), out, me, now_ns)
        case ReadFailed(key=key):
            if key == CLUSTER_STATE:
                return replace(v, lead=register.read_failed(v.lead, now_ns))
            return replace(v, own=register.read_failed(v.own, now_ns))
        case DbSeen():
            if v.order is not None and e.asked_ns < v.order.sent_ns:
                return v  # asked before our newest order: says nothing of what that did
            return replace(v, db=e, db_ns=now_ns)
        case DbSilent():
            return v
        case FencerSeen(view=f):
            v = replace(v, fencer=f, fencer_silent="")
            if not f.postgres_up:
                # Down while its lease is in force: it died by itself, nobody fenced it.
                died = v.state in WRITABLE_STATES and f.active is not None and not f.fence_proven
                v = replace(v, db=None, postgres_failed=v.postgres_failed or died)
            return v
        case FencerSilent(reason=reason):
            return replace(v, fencer_silent=reason)
        case OrderRefused():
            if v.order is not None and v.order.generation == e.generation:
                return replace(v, order=replace(v.order, refused=f"{e.error}: {e.detail}"))
            return v


def _cluster_seen(v: View, e: ClusterSeen, me: Identity, t: Timing, now_ns: int) -> View:
    known = v.read_ok and v.cluster is not None
    before = v
    if not known or e.revision > v.revision:
        backwards = known and e.stamp_ns < v.stamp_ns
        v = replace(
            v,
            cluster=e.record,
            revision=e.revision,
            stamp_ns=e.stamp_ns,
            first_seen_ns=now_ns if not known or e.revision != before.revision else v.first_seen_ns,
            silent_from_ns=now_ns if e.revision != before.revision or backwards else v.silent_from_ns,
            read_ok=v.read_ok or e.by_read or e.record is not None,
        )
    elif e.revision == v.revision and v.stamp_ns == 0:
        v = replace(v, stamp_ns=e.stamp_ns)
    ours = (
        e.record is not None
        and is_mine(v, me, e.record)
        and (before.cluster is None or e.record.term == before.cluster.term)
    )
    if not e.by_read and e.revision <= (v.lead.revision or 0):
        return v
    attempt = e.record.attempt if e.record is not None else ""
    r, out = register.read_done(v.lead, attempt, e.revision, ours=ours, now_ns=now_ns)
    return lead_outcome(replace(v, lead=r), out, t, now_ns)


def _member_seen(v: View, e: MemberSeen, me: Identity, now_ns: int) -> View:
    if e.name == me.node:
        attempt = e.record.attempt if e.record is not None else ""
        r, out = register.read_done(v.own, attempt, e.revision, ours=True, now_ns=now_ns)
        v = own_outcome(replace(v, own=r), out, me, now_ns)
        if e.record is not None and e.stamp_ns != v.own_stamp_ns:
            if e.stamp_ns < v.own_stamp_ns:
                v = replace(v, silent_from_ns=now_ns)  # the store's clock went back
            v = replace(v, own_stamp_ns=e.stamp_ns)
    if e.record is None or e.revision <= v.member_revision.get(e.name, 0):
        return v
    return replace(
        v,
        members={**v.members, e.name: e.record},
        member_revision={**v.member_revision, e.name: e.revision},
        member_changed_ns={**v.member_changed_ns, e.name: now_ns},
    )


def lead_outcome(v: View, out: register.Outcome, t: Timing, now_ns: int) -> View:
    """Fold in the end of an exchange on cluster_state."""
    intent = v.intent
    match out:
        case None:
            return v
        case Acked(sent_ns=sent_ns, revision=revision):
            record = v.lead_record
            v = replace(v, intent="beat", cluster=record, read_ok=True)
            if revision > v.revision or v.first_seen_ns == 0:
                v = replace(v, stamp_ns=0, first_seen_ns=now_ns, silent_from_ns=now_ns)
            v = replace(v, revision=max(revision, v.revision))
            if intent == "vacate":
                return replace(v, lease_until_ns=0, failures=0)
            if intent in {"claim", "create"}:
                v = replace(v, lost=False, postgres_failed=False)
            return replace(
                v,
                lease_until_ns=max(v.lease_until_ns, sent_ns + t.lease_ns),
                failures=0,
                successes=v.successes + 1 if intent == "beat" else 0,
            )
        case Lost():
            pause = now_ns + t.interval_ns if intent != "beat" else v.claim_pause_until_ns
            return replace(v, intent="beat", lost=v.lost or v.state in LEADING, claim_pause_until_ns=pause)
        case Failed(why=why):
            if intent == "beat":
                return replace(v, failures=v.failures + 1, successes=0, failed_why=why)
            return replace(
                v,
                intent="beat",
                successes=0,
                failed_why=why,
                claim_pause_until_ns=now_ns + t.interval_ns,
            )


def own_outcome(v: View, out: register.Outcome, me: Identity, now_ns: int) -> View:
    """Fold in the end of an exchange on our own member record."""
    leading = is_leading(v, me)
    match out:
        case Acked():
            return v if leading else replace(v, failures=0, successes=v.successes + 1)
        case Failed(why=why):
            v = replace(v, silent_from_ns=now_ns)  # the local half counts only while we are acknowledged
            return v if leading else replace(v, failures=v.failures + 1, successes=0, failed_why=why)
        case _:
            return v


# ---------------------------------------------------------------- observe


def stale(v: View, t: Timing, now_ns: int) -> bool:
    """The two-clock rule: by the store's stamps *and* by our own boot clock."""
    by_store = v.stamp_ns > 0 and v.own_stamp_ns - v.stamp_ns > t.failover_ns
    by_boot = now_ns - v.silent_from_ns > t.failover_ns
    return by_store and by_boot


def highest(v: View) -> Gen:
    """The highest generation that the fencer has accepted or that we have sent."""
    seen = v.fencer.highest if v.fencer is not None else (0, 0)
    return max(seen, v.order.generation) if v.order is not None else seen


def alive(v: View, name: str, t: Timing, now_ns: int) -> bool:
    changed = v.member_changed_ns.get(name)
    return changed is not None and now_ns - changed <= t.failover_ns


def database(v: View, t: Timing, now_ns: int) -> Literal["down", "standby", "primary", "unknown"]:
    if v.fencer is not None and not v.fencer_silent and not v.fencer.postgres_up:
        return "down"
    if v.db is None or now_ns - v.db_ns > 2 * (t.interval_ns + t.timeout_ns):
        return "unknown"
    return v.db.db


def order_fate(v: View, now_ns: int) -> tuple[Order, str]:
    """What became of our newest order, and why when it failed."""
    o, f = v.order, v.fencer
    if o is None:
        return "none", ""
    if o.refused:
        return "failed", o.refused
    if f is not None and f.order == o.generation:
        if f.order_state in {"failed", "preempted"}:
            return "failed", f.order_detail or f.order_state
        if f.order_state == "done" and o.op == "activate" and f.active != o.generation:
            return "failed", "its lease ran out"
        if f.order_state == "done" and o.op == "activate" and not f.postgres_up:
            return "failed", "PostgreSQL died right after it"
        return ("done" if f.order_state == "done" else "running"), ""
    if f is not None and f.highest > o.generation:
        return "failed", "superseded by a newer order"
    if now_ns - o.sent_ns > ORDER_LOST_NS:
        return "failed", "the fencer did not take it: " + (v.fencer_silent or "no answer")
    return "running", ""


def target(v: View, me: Identity) -> str | None:
    """Whom PostgreSQL should follow here; None: nobody."""
    if v.cluster is None or v.cluster.primary is None or v.cluster.primary == me.node:
        return None
    return v.cluster.primary


def standing(v: View, me: Identity, t: Timing, now_ns: int) -> candidate.Standing:
    f, db = v.fencer, v.db
    return candidate.Standing(
        node=me.node,
        db_standby=database(v, t, now_ns) == "standby",
        timeline=db.timeline if db is not None else 0,
        received_lsn=db.received_lsn if db is not None else 0,
        silent_ns=db.asked_ns - v.first_seen_ns if db is not None else -1,
        latched=f is not None and f.latched is not None,
        nofailover=me.nofailover,
        priority=me.priority,
        trusted=f is not None and f.trusted,
    )


def _foreign(v: View, me: Identity) -> str | None:
    c, f = v.cluster, v.fencer
    if c is None or f is None:
        return None
    here = f.system_identifier or (v.db.system_identifier if v.db is not None else None)
    if here is not None and here != c.system_identifier:
        return (
            f"the data directory has system identifier {here}, the cluster {c.cluster_id} has "
            f"{c.system_identifier}: it belongs to another cluster. Clone it from the primary, or correct "
            "postgresql.data_dir or cluster.id"
        )
    if c.primary == me.node and c.primary_fencer_id != f.fencer_id:
        return (
            f"the store's primary has this node's name, {me.node}, but another fencer id: another host uses "
            "the name, or this host lost its state_dir. Correct node.name, or wait until another node leads"
        )
    return None


def observe(v: View, me: Identity, t: Timing, now_ns: int) -> Observation:
    """What a decision at `now_ns` may depend on."""
    f = v.fencer
    who = leads(v, me)
    db = database(v, t, now_ns)
    fate, fate_why = order_fate(v, now_ns)
    pause = FENCE_PAUSE_NS if v.order is not None and v.order.op == "fence" else ORDER_PAUSE_NS
    term = v.cluster.term if v.cluster is not None else 0
    is_stale = stale(v, t, now_ns)
    verdict = candidate.Verdict(ok=False, why="")
    if v.cluster is not None and (who == "vacant" or (who == "other" and is_stale)):
        quiet = now_ns - v.silent_from_ns - (t.failover_ns if who == "other" else 0)
        verdict = candidate.judge(
            standing(v, me, t, now_ns),
            v.cluster,
            v.revision,
            v.members,
            settle_ns=t.settle_ns if who == "other" else 0,
            maximum_lag_bytes=me.maximum_lag_bytes,
            patient=quiet < 2 * (t.interval_ns + t.timeout_ns),
        )
    up = f is not None and f.postgres_up
    return Observation(
        state=v.state,
        leads=who,
        lost=v.lost,
        failures=v.failures,
        failing=v.failures >= t.failure_threshold,
        recovered=v.failures == 0 and v.successes >= t.success_threshold,
        lease_left=now_ns < v.lease_until_ns,
        fencer_known=f is not None,
        granted=(
            f is not None
            and f.active is not None
            and f.active[0] == term
            and f.lease_deadline_ns is not None
            and now_ns < max(f.lease_deadline_ns, v.lease_until_ns)
        ),
        fence_proven=f is not None and f.fence_proven and not f.postgres_up and f.highest >= highest(v),
        order=fate,
        order_op=v.order.op if v.order is not None else "",
        order_why=fate_why,
        may_order=v.order is None or now_ns - v.order.sent_ns >= pause,
        postgres_up=up,
        db=db,
        following_right=up
        and f is not None
        and f.is_standby
        and (who != "other" or f.following == target(v, me)),
        postgres_failed=v.postgres_failed,
        peer_ready=any(
            n != me.node and alive(v, n, t, now_ns) and m.db == "standby" and not (m.latched or m.nofailover)
            for n, m in v.members.items()
        ),
        term_behind=highest(v)[0] > term,
        latched=f is not None and f.latched is not None,
        trusted=f is not None and f.trusted,
        identified=f is not None and f.system_identifier is not None,
        virgin=f is not None and f.highest[0] == 0,
        may_claim=now_ns >= v.claim_pause_until_ns,
        writing=v.intent != "beat",
        stale=is_stale,
        eligible=verdict.ok,
        eligible_why=verdict.why,
        foreign=_foreign(v, me),
    )


def silence_ns(v: View) -> int:
    """How long the current cluster_state revision was the newest when the database was last asked."""
    return max(0, v.db.asked_ns - v.first_seen_ns) if v.db is not None else 0


__all__ = ["MEMBER_PREFIX", "Identity", "SentOrder", "View", "fold", "observe"]
