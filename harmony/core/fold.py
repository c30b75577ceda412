"""How events change the View: one function for each kind of event, and what the end of an exchange means.

Pure: time is an argument. It decides nothing; the lease's arithmetic and the memory of the store are here.
"""

from __future__ import annotations

from msgspec.structs import replace

from harmony.core import register, ruling, sickness
from harmony.core.messages import (
    Accepted,
    CheckpointDone,
    ClusterSeen,
    Connected,
    ControlSeen,
    DbSeen,
    DbSilent,
    Event,
    FencerSeen,
    FencerSilent,
    FencerView,
    HealthSeen,
    Marks,
    MemberSeen,
    OrderRefused,
    ReadFailed,
    RefreshDone,
    Remembered,
    Retiring,
    RuleRefused,
    StoreSeen,
    Surveyed,
    WriteDone,
)
from harmony.core.register import Acked, Failed, Lost, Register
from harmony.core.states import WRITABLE_STATES
from harmony.core.timing import Timing
from harmony.core.view import LEADING, Identity, Sickness, View, highest, is_leading, is_mine, rejoining
from harmony.records import CLUSTER_STATE

LASTING = 10  # answers in a row that say `streaming`: it has come back for good


def fold(v: View, e: Event, me: Identity, t: Timing, now_ns: int) -> View:
    """The view after one event."""
    match e:
        case Connected():
            return replace(v, silent_from_ns=now_ns)
        case ClusterSeen():
            return _cluster_seen(v, e, me, t, now_ns)
        case MemberSeen():
            return _member_seen(v, e, me, t, now_ns)
        case ControlSeen():
            if e.revision < v.control_revision or e.record is None:
                return v
            return replace(v, control=e.record, control_revision=e.revision)
        case StoreSeen():
            return _store_seen(v, e)
        case Remembered():
            return _remembered(v, e)
        case Accepted():
            return _accepted(v, e, me, now_ns)
        case Retiring(hand_over=hand_over):
            return replace(v, retiring=True, hand_over=hand_over)
        case RefreshDone(ok=ok):
            if ok:
                return replace(v, refreshing_until_ns=0, refreshed_ns=now_ns)
            # A store that is not connected fails at once: asked again without a pause, it would spin.
            return replace(v, refreshing_until_ns=now_ns + register.RETRY_NS, silent_from_ns=now_ns)
        case WriteDone():
            if e.key == CLUSTER_STATE:
                r, out = register.write_done(v.lead, e.attempt, e.outcome, e.revision, now_ns)
                return lead_outcome(replace(v, lead=r), out, t, now_ns)
            r, out = register.write_done(v.own, e.attempt, e.outcome, e.revision, now_ns)
            return own_outcome(replace(v, own=r), out, me, t, now_ns)
        case ReadFailed(key=key):
            if key == CLUSTER_STATE:
                return replace(v, lead=register.read_failed(v.lead, now_ns))
            return replace(v, own=register.read_failed(v.own, now_ns))
        case DbSeen():
            if v.order is not None and e.asked_ns < v.order.sent_ns:
                return v  # asked before our newest order: says nothing of what that did
            if v.order is not None and e.db == "standby" and e.asked_ns < v.order.done_ns:
                return v  # asked before the end of a promotion
            if v.ruling is not None and e.db == "primary":
                v = replace(v, ruling=ruling.database_seen(v.ruling, e))
            return _streaming(replace(v, db=e, db_ns=now_ns, follows=0), v.db, e, now_ns)
        case DbSilent():
            return v
        case HealthSeen():
            return sickness.looked(v, e, me, now_ns)
        case Surveyed():
            remade = v.order is not None and v.order.op == "rejoin" and e.asked_ns < v.order.done_ns
            return v if remade or rejoining(v) else replace(v, survey=e)
        case FencerSeen(view=f):
            return _rejoin_seen(_fencer_seen(v, f, me, now_ns), f, now_ns)
        case FencerSilent(reason=reason):
            return replace(v, fencer_silent=reason)
        case CheckpointDone():
            running = v.checkpoint == "running"  # the successor's time is counted from its end
            return replace(v, checkpoint="done", named_ns=now_ns) if running else v
        case OrderRefused():
            if v.order is not None and v.order.generation == e.generation:
                return replace(v, order=replace(v.order, refused=f"{e.error}: {e.detail}"))
            return v
        case RuleRefused(number=number):
            ours = v.ruling is not None and v.ruling.number == number
            return replace(v, ruling=None) if ours else v  # what is in force is looked at anew


def _streaming(v: View, before: DbSeen | None, e: DbSeen, now_ns: int) -> View:
    """One answer proves nothing: the WAL receiver of a diverged standby streams for moments, several a second.

    But these bring nothing new, and stay on a timeline that the primary has left.
    """
    if e.db == "primary":
        return replace(v, streams=0, unstreamed_ns=0, rejoins=0, rejoined=False, rejoin_why="")
    left = v.cluster is not None and e.timeline < v.cluster.timeline
    gains = before is not None and e.received_lsn > before.received_lsn
    streams = v.streams + 1 if e.streaming and (gains or not left) else 0
    if streams >= LASTING:
        v = replace(v, rejoins=0, rejoined=False, rejoin_why="")
    if streams > 1:
        return replace(v, streams=streams, unstreamed_ns=0)
    # Recovery asks for WAL only at the end of what is there: until then its silence proves nothing.
    replays = e.held or (before is not None and e.replayed_lsn > before.replayed_lsn)
    return replace(v, streams=streams, unstreamed_ns=now_ns if replays else v.unstreamed_ns or now_ns)


def _rejoin_seen(v: View, f: FencerView, now_ns: int) -> View:
    """The pause before the next rejoin counts from the end of this one; also of one that an agent before us ordered."""
    if f.order_op != "rejoin" or (v.order is not None and f.order != v.order.generation):
        return v
    if f.order_state == "running":
        return replace(v, rejoin_ns=now_ns)
    why = f.order_detail or f.order_state
    if v.order is None:  # known from the past: once is enough for a pause
        v = replace(v, rejoins=max(v.rejoins, 1), rejoin_ns=v.rejoin_ns or now_ns)
    return replace(v, rejoined=f.order_state == "done", rejoin_why=why)


def _fencer_seen(v: View, f: FencerView, me: Identity, now_ns: int) -> View:
    untrusted_ns = 0 if f.trusted else v.untrusted_ns or now_ns
    v = replace(v, fencer=f, fencer_silent="", untrusted_ns=untrusted_ns)
    if v.ruling is not None:
        v = replace(v, ruling=ruling.fencer_seen(v.ruling, f, now_ns))
    o = v.order
    if o is not None and f.order == o.generation and f.order_state == "done" and not o.done_ns:
        before = v.db is not None and v.db.db == "standby" and not o.again
        v = replace(v, order=replace(o, done_ns=now_ns), db=None if before else v.db)
        if o.op == "rejoin":
            v = replace(v, survey=None)  # neither pg_rewind nor a copy leaves a slot
    if not f.postgres_up:
        # Down while its lease is in force: it died by itself, nobody fenced it.
        died = v.state in WRITABLE_STATES and f.active is not None and not f.fence_proven
        if died and not v.postgres_failed:
            v = sickness.died(v, me, now_ns)
        v = replace(v, db=None, sick=Sickness(), postgres_failed=v.postgres_failed or died)
    return v


def _cluster_seen(v: View, e: ClusterSeen, me: Identity, t: Timing, now_ns: int) -> View:
    v = _compared(v, e, t, now_ns)
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
    return lead_outcome(marked(replace(v, lead=r)), out, t, now_ns)


def _member_seen(v: View, e: MemberSeen, me: Identity, t: Timing, now_ns: int) -> View:
    if e.name == me.node:
        attempt = e.record.attempt if e.record is not None else ""
        r, out = register.read_done(v.own, attempt, e.revision, ours=True, now_ns=now_ns)
        v = own_outcome(replace(v, own=r), out, me, t, now_ns)
        # An answer from before what the watch has told since.
        crossed = e.revision < v.member_revision.get(me.node, 0)
        if e.record is not None and e.stamp_ns != v.own_stamp_ns and not crossed:
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
        case Acked(sent_ns=sent_ns, revision=revision, attempt=attempt):
            record = next((r for r in v.lead_records if r.attempt == attempt), v.cluster)
            if record is not None and v.recording == ruling.recorded(record):
                v = replace(v, recording=None)
            v = replace(v, intent="beat", cluster=record, read_ok=True, unsettled=False)
            v = replace(v, reserved=v.reserving or v.reserved, reserving=0)
            if revision > v.revision or v.first_seen_ns == 0:
                v = replace(v, stamp_ns=0, first_seen_ns=now_ns, silent_from_ns=now_ns)
            v = marked(replace(v, revision=max(revision, v.revision)))
            if intent == "vacate":
                return replace(v, lease_until_ns=0, failures=0, successor=None)
            if intent in {"claim", "create"}:
                v = replace(v, lost=False, postgres_failed=False, may_found="", successor=None, refused=None)
            return replace(
                v,
                lease_until_ns=max(v.lease_until_ns, sent_ns + t.lease_ns),
                failures=0,
                successes=v.successes + 1 if intent == "beat" else 0,
            )
        case Lost():
            pause = now_ns + t.interval_ns if intent != "beat" else v.claim_pause_until_ns
            lost = v.lost or v.state in LEADING
            return replace(v, intent="beat", reserving=0, lost=lost, claim_pause_until_ns=pause)
        case Failed(why=why):
            v = replace(v, reserving=0)
            if intent == "beat":
                return replace(v, failures=v.failures + 1, successes=0, failed_why=why)
            return replace(
                v,
                intent="beat",
                successes=0,
                failed_why=why,
                claim_pause_until_ns=now_ns + t.interval_ns,
            )


def own_outcome(v: View, out: register.Outcome, me: Identity, t: Timing, now_ns: int) -> View:
    """Fold in the end of an exchange on our own member record."""
    leading = is_leading(v, me)
    if v.farewell == "begun" and out is not None:
        v = replace(v, farewell="over")
    match out:
        case Acked():
            v = replace(v, own_back_ns=0)
            return v if leading else replace(v, failures=0, successes=v.successes + 1)
        case Failed(why=why, went_back=went_back):
            v = replace(v, silent_from_ns=now_ns)  # the local half counts only while we are acknowledged
            v = _own_went_back(v, why, t, now_ns) if went_back else replace(v, own_back_ns=0)
            return v if leading else replace(v, failures=v.failures + 1, successes=0, failed_why=why)
        case _:
            return v


# ---------------------------------------------------------------- whether the store is what it was
#
# Invariant (I1, I2): who has seen a term and a revision never promotes by a store that shows less: the
# acknowledged claim of another node, and with it acknowledged commits, could be what is missing.


def marked(v: View) -> View:
    """Raise the marks to what is known now; not while the store is distrusted."""
    c, m = v.cluster, v.marks
    if c is None or v.distrust or v.went_back_ns or v.revision <= m.revision:
        return v
    lineage = v.lineage or m.lineage
    return replace(v, marks=Marks(max(c.term, m.term), v.revision, c.attempt, lineage, m.overruled))


def _compared(v: View, e: ClusterSeen, t: Timing, now_ns: int) -> View:
    """Compare what the store shows with the marks. Less may be an old leader's answer, for a lease's time."""
    m, c = v.marks, e.record
    if v.distrust or not m.revision:
        return v
    if c is not None and e.revision > m.revision and c.term < m.term:
        return _history(
            v, f"its term went back from {m.term} to {c.term}, at the newer revision {e.revision}"
        )
    if c is not None and e.revision == m.revision and m.attempt and c.attempt != m.attempt:
        return _history(v, f"revision {m.revision} is another one than this node has seen: two histories")
    if not e.by_read:
        return v
    if c is not None and e.asked_at is not None and e.asked_at <= e.revision < m.revision:
        return v
    if c is not None and e.revision >= m.revision:
        return replace(v, went_back_ns=0)
    if not v.went_back_ns:
        return replace(v, went_back_ns=now_ns)
    if now_ns - v.went_back_ns <= t.lease_ns:
        return v
    if c is None:
        return _history(v, f"it shows no cluster_state, and this node has seen term {m.term}")
    return _history(
        v, f"it went back from revision {m.revision} (term {m.term}) to {e.revision} (term {c.term})"
    )


def _own_went_back(v: View, why: str, t: Timing, now_ns: int) -> View:
    """Nobody else writes our record: what was acknowledged of it is lost, unless an old leader answers for a while."""
    if v.distrust or not v.own_back_ns:
        return replace(v, own_back_ns=v.own_back_ns or now_ns)
    if now_ns - v.own_back_ns <= t.lease_ns:
        return v
    return _history(v, f"this node's own record: {why}")


def _history(v: View, what: str) -> View:
    return replace(v, distrust=f"the store has lost history: {what}")


def _store_seen(v: View, e: StoreSeen) -> View:
    v = replace(v, lineage=e.lineage, store_problem=e.problem)
    known = v.marks.lineage
    if known and e.lineage and known != e.lineage and not v.distrust:
        return _history(v, f"its stream was made anew ({e.lineage}; this node has seen {known})")
    if v.marks.revision and not known:
        v = replace(v, marks=replace(v.marks, lineage=e.lineage))
    return v


def _remembered(v: View, e: Remembered) -> View:
    if e.was_in:
        why = f"is cluster.id right? This node was in cluster {e.was_in}"
        return replace(
            v, distrust=f"{why}; correct cluster.id, or see docs/store.md on moving a node to another cluster"
        )
    if e.damage:
        return replace(v, distrust=f"what this node remembers of the store cannot be trusted: {e.damage}")
    if e.marks.revision > v.marks.revision:
        return replace(v, marks=e.marks, kept=e.marks)
    if e.marks.term > v.marks.term:  # the store was seen before the disk answered
        return _history(v, f"it shows term {v.marks.term}, and this node has seen term {e.marks.term}")
    return replace(v, marks=replace(v.marks, overruled=max(v.marks.overruled, e.marks.overruled)))


def _accepted(v: View, e: Accepted, me: Identity, now_ns: int) -> View:
    """An operator takes the store as it is. Who writes and renews keeps all; everybody else looks anew.

    So does who is promoting: its claim may be among what the store has lost, and another may found meanwhile.
    """
    here = v.fencer.system_identifier if v.fencer is not None else None
    overruled = max(v.marks.overruled, highest(v)[0])
    may_found = here or "" if e.create else ""
    v = replace(v, distrust="", went_back_ns=0, own_back_ns=0, may_found=may_found, kept=None)
    if v.state in WRITABLE_STATES and is_leading(v, me) and now_ns < v.lease_until_ns:
        return marked(replace(v, marks=Marks(lineage=v.lineage, overruled=overruled), own=Register()))
    return replace(
        v,
        marks=Marks(overruled=overruled),
        read_ok=False,
        cluster=None,
        revision=0,
        stamp_ns=0,
        first_seen_ns=now_ns,
        silent_from_ns=now_ns,
        lead=Register(),
        intent="beat",
        lead_records=(),
        own=Register(),
        own_stamp_ns=0,
        members={},
        member_revision={},
        member_changed_ns={},
        control=None,
        control_revision=0,
        lease_until_ns=0,
    )
