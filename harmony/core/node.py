"""One step of a node: fold the events, decide once, and say what to send. Pure.

The order of the commands is the order in which the shell must carry them out: logs, orders to the
fencer, renewals, writes, reads. A fence therefore leaves before anything else of the same step.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from harmony.core import register, rejoin, ruling, sickness, slots, urgency
from harmony.core.fold import fold, lead_outcome, own_outcome
from harmony.core.messages import (
    Checkpoint,
    Command,
    Event,
    Fatal,
    Gen,
    Log,
    Order,
    OrderOp,
    Read,
    Refresh,
    Remember,
    Renew,
    Stop,
    Write,
)
from harmony.core.observe import asked, barred, confirms, observe, preferred_fit
from harmony.core.register import Attempt
from harmony.core.states import WRITABLE_STATES, State
from harmony.core.table import Action, Decision, Observation, decide
from harmony.core.timing import NS, Timing
from harmony.core.view import (
    Identity,
    SentOrder,
    Sickness,
    View,
    alive,
    answered_at,
    database,
    distrust,
    founded_from,
    highest,
    is_leading,
    next_timeline,
    silence_ns,
    target,
)
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, ClusterState, Member

HANDOVER_PAUSES = 10  # times failover_timeout, before a hand-over that nobody asked for is tried again
HURRY_PAUSE_NS = 60 * NS  # before a checkpoint that others wait for is asked for again
KEEP_NS = 10 * NS  # how old the marks on disk may grow; a new term is kept at once
MAX_LOSSES = 8
RESTART_FAILED = 406  # rows
START_FAILED = frozenset({RESTART_FAILED, 808})
SICK = frozenset({211, 405, 807, 911})
MAX_CHANGES = 32


def initial(me: Identity) -> View:
    """The view of an agent that has just started."""
    return View(state=State.P_INITIALIZING if me.preferred else State.R_INITIALIZING)


def step(
    v: View, events: Sequence[Event], me: Identity, t: Timing, now_ns: int
) -> tuple[View, list[Command]]:
    """Fold `events`, decide once, and return the new view with the commands to carry out, in order."""
    if v.last_step_ns and now_ns - v.last_step_ns > t.interval_ns + t.timeout_ns:
        # We were not running: our clock proves no silence, of nobody.
        v = replace(v, silent_from_ns=now_ns, sick=sickness.not_running(v.sick, now_ns))
    v = replace(v, last_step_ns=now_ns)
    for e in events:
        v = fold(v, e, me, t, now_ns)
    r, out = register.tick(v.lead, now_ns)
    v = lead_outcome(replace(v, lead=r), out, t, now_ns)
    r, out = register.tick(v.own, now_ns)
    v = own_outcome(replace(v, own=r), out, me, t, now_ns)
    fit = preferred_fit(v, me, t, now_ns)
    v = replace(v, preferred_fit_ns=(v.preferred_fit_ns or now_ns) if fit else 0)
    o = observe(v, me, t, now_ns)
    v, commands = _apply(v, decide(o), o, me, t, now_ns)
    v = _renew(v, me, commands)
    v = ruling.drive(v, me, t, now_ns, commands)
    v = _hurry(v, t, now_ns, commands)
    v = _lead(v, me, t, now_ns, commands)
    v = urgency.ask(v, me, t, now_ns, commands)
    v = _own(v, me, t, now_ns, commands)
    v = _keep(v, now_ns, commands)
    if v.farewell == "over" and not _handing_over(v, o, me):
        commands.append(Stop(v.why))
    return v, commands


def _hurry(v: View, t: Timing, now_ns: int, commands: list[Command]) -> View:
    """The first checkpoint on the timeline that we began, for who waits for it (rejoin.waits): left to itself,
    PostgreSQL takes up to checkpoint_timeout for it. Nobody else needs it soon, and it costs the disk."""
    db = v.db
    if v.state not in WRITABLE_STATES or db is None or db.db != "primary" or v.checkpoint:
        return v
    if not db.early or (v.hurried == db.timeline and now_ns - v.hurried_ns < HURRY_PAUSE_NS):
        return v
    if not any(m.unable and alive(v, name, t, now_ns) for name, m in v.members.items()):
        return v
    commands.append(Checkpoint("a rewind"))
    return replace(v, hurried=db.timeline, hurried_ns=now_ns)


def _handing_over(v: View, o: Observation, me: Identity) -> bool:
    """Whether an agent that was asked to stop has still to wait for its own hand-over."""
    if v.state in WRITABLE_STATES:
        return v.hand_over and (o.wanted is not None or v.successor is not None)
    return v.successor is not None and is_leading(v, me)


def _keep(v: View, now_ns: int, commands: list[Command]) -> View:
    """Have the marks kept on disk: at once when the term, the rule or the lineage is new, else now and then."""
    rule = ruling.recorded(v.cluster) if v.cluster is not None else None
    new = v.kept is None or (v.marks.term, v.marks.lineage, rule) != (
        v.kept.term,
        v.kept.lineage,
        v.kept_rule,
    )
    if v.marks == v.kept or not (new or now_ns - v.kept_ns >= KEEP_NS):
        return v
    commands.append(Remember(v.marks))
    return replace(v, kept=v.marks, kept_rule=rule, kept_ns=now_ns)


def _apply(
    v: View, d: Decision, o: Observation, me: Identity, t: Timing, now_ns: int
) -> tuple[View, list[Command]]:
    commands: list[Command] = []
    row, why = (d.row, d.why) if d.row else v.entered
    if d.next is not v.state or (row, why) != (v.row, v.why):
        commands.append(Log(str(row), v.state, d.next, why if d.row else f"nothing else any more; {why}"))
    if d.next is not v.state:
        v = replace(v, successes=0, reserved=0)
        if d.next in {State.HEALTHY, State.LEADER}:
            f = v.fencer
            resumed = v.lease_until_ns == 0 and f is not None and f.lease_deadline_ns is not None
            if resumed and f is not None and f.lease_deadline_ns is not None:
                v = replace(v, lease_until_ns=f.lease_deadline_ns)
            v = replace(v, postgres_failed=False, restart=False)
        if d.next in {State.WATCHING, State.YIELDING}:
            crashes = v.crashes if o.leads == "me" else ()
            v = replace(
                v, lost=False, lease_until_ns=0, postgres_failed=False, restart=False, crashes=crashes
            )
        if v.state in WRITABLE_STATES and "demote" not in d.do and not v.restart:
            v = replace(v, losses=(*v.losses, now_ns)[-MAX_LOSSES:])
        if "demote" not in d.do:
            v = replace(v, successor=None, request="", checkpoint="")
        if d.row in START_FAILED | SICK:
            v = replace(v, postgres_failed=True, restart=False)
            if d.row == RESTART_FAILED and o.restart_here:
                v = sickness.died(v, me, now_ns)
    if d.next is not v.state:
        v = replace(v, entered=(row, why))
    v = replace(v, state=d.next, row=row, why=why)
    for action in d.do:
        v = _act(v, action, d, o, me, t, now_ns, commands)
    return v, commands


def _act(
    v: View,
    action: Action,
    d: Decision,
    o: Observation,
    me: Identity,
    t: Timing,
    now_ns: int,
    commands: list[Command],
) -> View:
    match action:
        case "fatal":
            commands.append(Fatal(d.why))
            return v
        case "name":
            wish = asked(v)
            request = wish.id if wish is not None else ""
            commands.append(Checkpoint())
            v = replace(v, named_ns=now_ns, checkpoint="running")
            return replace(v, successor=o.wanted, request=request, lead_sent_ns=0)
        case "unname":
            refused = (v.request, d.why[:500]) if v.request else v.refused
            pause = now_ns + HANDOVER_PAUSES * t.failover_ns
            v = replace(v, refused=refused, handover_pause_until_ns=pause)
            # Who is stopped waits for one successor, not for one after the other.
            again = v.hand_over and not (v.retiring and o.successor_fit)
            return replace(v, successor=None, request="", checkpoint="", lead_sent_ns=0, hand_over=again)
        case "refuse":
            wish = asked(v)
            return replace(v, refused=(wish.id, d.why[:500]) if wish is not None else v.refused)
        case "claim" | "create" | "vacate":
            # Whatever exchange runs gives way; should its write land, this one's revision is refused.
            revision = v.revision if action != "create" else 0
            lead = register.start(replace(v.lead, revision=revision), now_ns, t.timeout_ns)
            reserving = next_timeline(v) if action == "claim" else 0
            v = replace(v, reserving=reserving, lead=lead, intent=action)
            return replace(v, lead_sent_ns=now_ns, lead_records=(), recording=None)
        case "fence" | "demote" | "activate" | "follow" | "rejoin":
            op, clean = "fence" if action == "demote" else action, action == "demote"
            primary = target(v, me) if action in {"follow", "rejoin"} else None
            slot = primary is not None and slots.there(v, me)
            generation = _generation(v, op, primary, clean=clean, slot=slot)
            following = v.fencer.following if v.fencer is not None else None
            again = action == "follow" and following == primary is not None
            sent = SentOrder(generation, op, now_ns, "", primary, clean, slot, again=again)
            order = Order(op, generation, f"row {d.row}: {d.why}"[:500], primary, clean=clean, slot=slot)
            if action == "follow":
                v = replace(v, follows=v.follows + 1)
            if action == "rejoin" and v.cluster is not None:
                order = replace(order, system_identifier=v.cluster.system_identifier, clone=v.rejoined)
                v = replace(v, rejoins=v.rejoins + 1, rejoined=False, rejoin_ns=now_ns)
            if action == "activate" and v.cluster is not None:
                rule = ruling.activated(v.cluster, me)
                order = replace(
                    order,
                    timeline=v.reserved,
                    deadline_ns=v.lease_until_ns,
                    sync_count=rule.count,
                    sync_voters=rule.voters,
                )
                v = replace(v, reserved=0)  # for this promotion, and never again
            commands.append(order)
            v = replace(v, streams=0, unstreamed_ns=0)
            return replace(v, order=sent, db=v.db if again else None, sick=Sickness(), note="")


def _generation(v: View, op: OrderOp, primary: str | None, *, clean: bool, slot: bool) -> Gen:
    """The number of an order: the next one, or that of the same order which the fencer has not taken yet.

    With a higher number each time, a fencer whose disk is slow to keep what it accepts would always be one
    order behind, and no fence of it would ever count as proven.
    """
    term, order = highest(v)
    cluster_term = v.cluster.term if v.cluster is not None else 0
    if cluster_term > term:
        return (cluster_term, 1)
    o, f = v.order, v.fencer
    untaken = o is not None and not o.refused and f is not None and f.highest < o.generation
    if o is not None and untaken and (o.op, o.primary, o.clean, o.slot) == (op, primary, clean, slot):
        return o.generation
    return (term, order + 1)


def _renew(v: View, me: Identity, commands: list[Command]) -> View:
    """Renew what the fencer has granted, to the end of what the newest heartbeat entitles to."""
    f = v.fencer
    if f is None or f.active is None or v.cluster is None or f.active[0] != v.cluster.term:
        return v
    activating = (
        v.state in {State.ADOPTING, State.FENCED, State.PROMOTING}
        and v.order is not None
        and v.order.op == "activate"
    )
    if not (v.state in {State.HEALTHY, State.LEADER} or activating) or not is_leading(v, me):
        return v
    if v.renewed[0] == f.active and v.renewed[1] >= v.lease_until_ns:
        return v
    commands.append(Renew(f.active, v.lease_until_ns))
    return replace(v, renewed=(f.active, v.lease_until_ns))


def _lead(v: View, me: Identity, t: Timing, now_ns: int, commands: list[Command]) -> View:
    """Drive the exchange on cluster_state: the primary's heartbeat, or a claim, creation or vacancy."""
    if v.intent == "beat" and not is_leading(v, me):
        return replace(v, lead=replace(v.lead, deadline_ns=0, busy="", pending=())) if v.lead.running else v
    if v.intent == "beat" and not v.lead.running and now_ns >= _next_beat(v.lead_sent_ns, v.failures, t):
        lead = replace(v.lead, revision=v.revision)
        v = replace(v, reserving=next_timeline(v) if _needs_timeline(v) else 0)
        v = replace(v, lead=register.start(lead, now_ns, t.timeout_ns), lead_sent_ns=now_ns, lead_records=())
    what = register.due(v.lead, now_ns)
    left = v.lead.deadline_ns - now_ns
    if what == "read":
        commands.append(Read(CLUSTER_STATE, left))
        return replace(v, lead=register.sent(v.lead, "read", None))
    if what != "write":
        return v
    v, attempt = _attempt(v, me)
    record = _cluster_record(v, me, attempt)
    commands.append(Write(CLUSTER_STATE, record, v.lead.revision or 0, attempt, left))
    c = v.cluster
    same = c is None or ruling.recorded(c) == ruling.recorded(record)
    v = replace(v, lead_records=(*v.lead_records, record), unsettled=v.unsettled or not same)
    return replace(v, lead=register.sent(v.lead, "write", Attempt(attempt, now_ns)))


def _needs_timeline(v: View) -> bool:
    """Whether we may lead anew in our old term: another promotion, another timeline."""
    activating = v.order is not None and v.order.op == "activate"
    return v.state is State.FENCED and not v.reserved and not activating


def _next_beat(sent_ns: int, failures: int, t: Timing) -> int:
    """A pause between heartbeats; none after a failed one (the lease counts on that)."""
    return sent_ns + (t.interval_ns if failures == 0 else t.timeout_ns)


def _own(v: View, me: Identity, t: Timing, now_ns: int, commands: list[Command]) -> View:
    """Drive the exchange on our own member record, and the periodic read of everything."""
    next_ns = _next_beat(v.own_sent_ns, 0 if is_leading(v, me) else v.failures, t)
    urgent = urgency.answered(v, now_ns)
    if not v.own.running and (now_ns >= next_ns or urgent or (v.retiring and not v.farewell)):
        v = replace(v, own=register.start(v.own, now_ns, t.timeout_ns), own_sent_ns=now_ns)
        v = replace(v, urged_ns=0 if urgent else v.urged_ns)
        if v.retiring and not v.farewell:
            v = replace(v, farewell="begun")
    what = register.due(v.own, now_ns)
    left = v.own.deadline_ns - now_ns
    key = MEMBER_PREFIX + me.node
    if what == "read":
        commands.append(Read(key, left))
        v = replace(v, own=register.sent(v.own, "read", None))
    elif what == "write":
        v, attempt = _attempt(v, me)
        record = member_record(v, me, t, now_ns, attempt)
        commands.append(Write(key, record, v.own.revision or 0, attempt, left))
        v = replace(v, own=register.sent(v.own, "write", Attempt(attempt, now_ns)))
    if now_ns >= v.refreshing_until_ns and now_ns >= v.refreshed_ns + t.interval_ns:
        commands.append(Refresh(t.timeout_ns))
        v = replace(v, refreshing_until_ns=now_ns + 2 * t.timeout_ns)
    return v


def _attempt(v: View, me: Identity) -> tuple[View, str]:
    return replace(v, counter=v.counter + 1), f"{me.instance}-{v.counter + 1}"


def _cluster_record(v: View, me: Identity, attempt: str) -> ClusterState:
    c, f, db = v.cluster, v.fencer, v.db
    if f is None:
        raise AssertionError("no fencer: nothing may be claimed or beaten")
    if v.intent in {"claim", "create"} or c is None:
        term = max(c.term if c is not None else 0, highest(v)[0]) + 1
        rule = ruling.claimed(c, me)
        return ClusterState(
            cluster_id=me.cluster_id,
            system_identifier=c.system_identifier if c is not None else f.system_identifier or "",
            term=term,
            primary=me.node,
            primary_fencer_id=f.fencer_id,
            last_primary=me.node,
            beat=0,
            attempt=attempt,
            boot_id=me.boot_id,
            status=v.state,
            timeline=c.timeline if c is not None else 0,
            lsn=c.lsn if c is not None else 0,
            sync_count=rule.count,
            sync_voters=rule.voters,
            begins=c.begins if c is not None else 0,
            reserved=max(v.reserving, c.reserved) if c is not None else founded_from(v),
            changes=_changes(v, c, term),
            adopting=v.intent == "create" and f.adopting,
        )
    vacate = v.intent == "vacate"
    rule = v.recording if v.recording is not None and not vacate else ruling.recorded(c)
    clean = vacate and f.shutdown_lsn is not None
    writing = db is not None and db.db == "primary"
    timeline = max(c.timeline, db.timeline) if db is not None and writing else c.timeline
    return ClusterState(
        cluster_id=c.cluster_id,
        system_identifier=c.system_identifier or f.system_identifier or "",
        term=c.term,
        primary=None if vacate else me.node,
        primary_fencer_id=None if vacate else f.fencer_id,
        last_primary=me.node,
        beat=c.beat + 1,
        attempt=attempt,
        boot_id=me.boot_id,
        status=v.state,
        timeline=timeline,
        lsn=f.shutdown_lsn
        if clean and f.shutdown_lsn is not None
        else (max(c.lsn, db.received_lsn) if db is not None and writing else c.lsn),
        sync_count=rule.count,
        sync_voters=rule.voters,
        successor=v.successor,
        request=v.request,
        clean=clean,
        refused=v.refused or c.refused,
        begins=f.begins if f.timeline == timeline and f.begins else c.begins if c.timeline == timeline else 0,
        reserved=max(v.reserving, c.reserved),
        changes=c.changes,
        adopting=c.adopting and v.state is State.ADOPTING,
    )


def _changes(v: View, c: ClusterState | None, term: int) -> tuple[tuple[int, int], ...]:
    """The record's list of leadership taken without a hand-over, with the claim that is being written."""
    if c is None:
        return ()
    planned = c.primary is None and c.successor is not None
    stamp = max(v.stamp_ns, v.own_stamp_ns)
    return c.changes if planned else (*c.changes, (term, stamp))[-MAX_CHANGES:]


def member_record(v: View, me: Identity, t: Timing, now_ns: int, attempt: str) -> Member:
    """Our own record as it would be written now."""
    f, db = v.fencer, v.db
    left = v.lease_until_ns - now_ns
    return Member(
        node=me.node,
        attempt=attempt,
        boot_id=me.boot_id,
        status=v.state,
        row=str(v.row),
        why=v.why,
        db=database(v, t, now_ns),
        timeline=db.timeline if db is not None else 0,
        received_lsn=db.received_lsn if db is not None else 0,
        replayed_lsn=db.replayed_lsn if db is not None else 0,
        streaming=db is not None and db.streaming,
        seen_revision=answered_at(v),
        silent_ns=silence_ns(v),
        latched=f is not None and f.latched is not None,
        nofailover=me.nofailover,
        priority=me.priority,
        generation="{}.{}".format(*(f.highest if f is not None else (0, 0))),
        lease_left_ms=left // 1_000_000 if left > 0 and is_leading(v, me) else None,
        fencer_id=f.fencer_id if f is not None else "",
        fencer_ok=f is not None and not v.fencer_silent,
        system_identifier=f.system_identifier if f is not None else None,
        version=me.version,
        confirms=confirms(v, me, t, now_ns),
        distrust=distrust(v),
        retiring=v.retiring,
        progress=f.progress if f is not None else "",
        cannot_rewind=f.cannot_rewind if f is not None else "",
        unable=rejoin.unable(v, me, now_ns) != "",
        early=db is not None and db.early,
        barred=barred(v, me, t, now_ns) != "",
        sick=sickness.verdict(v, me, now_ns),
        note=v.note,
        slots=dict(v.survey.slots) if v.survey is not None else None,
        limits=dict(v.survey.limits) if v.survey is not None else {},
        notes=v.survey.notes if v.survey is not None else (),
    )
