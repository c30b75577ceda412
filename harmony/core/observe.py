"""What a decision may depend on, made from the View at one moment. Pure, and it changes nothing.

The two-clock rule, the fate of an order, who may take over and whether leadership should be handed over.
"""

from __future__ import annotations

from harmony.core import candidate, rejoin, sickness, slots
from harmony.core.states import WRITABLE_STATES
from harmony.core.table import Observation, Order
from harmony.core.timing import Timing
from harmony.core.view import (
    Identity,
    View,
    alive,
    database,
    distrust,
    highest,
    leads,
    rejoining,
    target,
)
from harmony.records import ClusterState, Member, Switchover

FENCE_PAUSE_NS = 200_000_000
ORDER_PAUSE_NS = 1_000_000_000
ORDER_LOST_NS = 1_000_000_000  # an order that the fencer has not shown after this is sent anew


def stale(v: View, t: Timing, now_ns: int) -> bool:
    """The two-clock rule: by the store's stamps *and* by our own boot clock. Not of a primary without a lease yet:
    it would not stop."""
    if v.cluster is not None and v.cluster.adopting:
        return False
    by_store = v.stamp_ns > 0 and v.own_stamp_ns - v.stamp_ns > t.failover_ns
    by_boot = stale_here(v, t, now_ns)
    return by_store and by_boot


def stale_here(v: View, t: Timing, now_ns: int) -> bool:
    """The half of it by our own boot clock: nothing newer of the primary was seen here for failover_timeout."""
    return now_ns - v.silent_from_ns > t.failover_ns


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
        if f.order_state == "done" and o.op == "activate" and v.db is not None and v.db.db == "standby":
            return "failed", "PostgreSQL was restarted right after it, by somebody else, as a standby"
        return ("done" if f.order_state == "done" else "running"), ""
    if f is not None and f.highest > o.generation:
        return "failed", "superseded by a newer order"
    if now_ns - o.sent_ns > ORDER_LOST_NS:
        return "failed", "the fencer did not take it: " + (v.fencer_silent or "no answer")
    return "running", ""


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
    if here is not None and c.system_identifier and here != c.system_identifier:
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


# ---------------------------------------------------------------- anti-flap


def losses(v: View, me: Identity, now_ns: int) -> int:
    """How often leadership was lost by a failure of ours within the flap window."""
    return sum(now_ns - at <= me.policy.flap_window_ns for at in v.losses)


def needed(v: View, me: Identity, t: Timing, now_ns: int) -> int:
    """Good heartbeats before leading again: success_threshold, twice as many after each loss but the first."""
    return int(t.success_threshold * 2 ** min(4, max(0, losses(v, me, now_ns) - 1)))


def steady(v: View, me: Identity, t: Timing, now_ns: int) -> bool:
    """Whether the last heartbeats were good, as many as it takes to lead again."""
    return v.failures == 0 and v.successes >= needed(v, me, t, now_ns)


def _beats(v: View, me: Identity, t: Timing, now_ns: int) -> str:
    count = needed(v, me, t, now_ns)
    return f"leading again takes {'a good heartbeat' if count == 1 else f'{count} good heartbeats in a row'}"


def again(v: View, me: Identity, t: Timing, now_ns: int, *, recovered: bool, db: str) -> str:
    """Why we, who are recorded as the primary and have stopped leading, do not begin again yet."""
    if not recovered:
        return _beats(v, me, t, now_ns)
    if db != "standby":
        return candidate.NO_STANDBY
    return "the claim of a new term is under way, or is made in a moment"


def stopped(v: View, me: Identity) -> str:
    """Why automatic failover is stopped: too many changes of leadership that nobody has looked into."""
    c, p = v.cluster, me.policy
    if c is None or not p.maximum_changes:
        return ""
    seen = v.control.acknowledged if v.control is not None else 0
    now = max(v.own_stamp_ns, v.stamp_ns)
    recent = [term for term, at in c.changes if term > seen and now - at <= p.changes_window_ns]
    if len(recent) < p.maximum_changes:
        return ""
    changes = "1 change" if len(recent) == 1 else f"{len(recent)} changes"
    return (
        f"{changes} of leadership within {p.changes_window_s:g} s (failover.maximum_changes "
        f"{p.maximum_changes}): automatic failover is stopped until harmonyctl acknowledge"
    )


# ---------------------------------------------------------------- hand-over


def unfit(v: View, name: str, t: Timing, now_ns: int) -> str:
    """Why `name` cannot take leadership over from us, the leader, now; empty: it can."""
    return unfit_by(v.cluster, v.members.get(name) if alive(v, name, t, now_ns) else None, name)


def unfit_by(c: ClusterState | None, m: Member | None, name: str) -> str:
    """The same by the records; `m` None: it is not alive."""
    if c is None or m is None:
        return f"{name} is not alive"
    if m.retiring:
        return f"{name} is being stopped"
    if m.latched or m.nofailover:
        return f"{name} is {'latched by an operator' if m.latched else 'tagged nofailover'}"
    if m.sick:
        return f"{name} is sick: {m.sick}"
    if m.distrust or not m.fencer_ok:
        return f"{name} {'distrusts the store' if m.distrust else 'has no fencer'}"
    if m.db != "standby" or m.timeline < c.timeline:
        return f"{name} does not run as a standby on timeline {c.timeline}"
    if c.sync_voters and not c.sync_count:
        return f"commits wait for nobody now, and {name} may lack some"
    if c.sync_voters and name not in c.sync_voters:
        return f"{name} is not one of the recorded synchronous standbys"
    return ""


def behind(v: View, name: str, me: Identity) -> str:
    """Why `name`, fit as it is, has not caught up; empty: it has."""
    return behind_by(v.cluster, v.members.get(name), name, me.maximum_lag_bytes)


def behind_by(c: ClusterState | None, m: Member | None, name: str, maximum_lag_bytes: int) -> str:
    """The same by the records."""
    if c is None or m is None or not m.streaming:
        return f"{name} does not stream from the primary"
    lag = c.lsn - m.received_lsn
    return "" if lag <= maximum_lag_bytes else f"{name} is {lag} bytes behind"


def _ready(v: View, name: str, me: Identity, t: Timing, now_ns: int) -> str:
    return unfit(v, name, t, now_ns) or behind(v, name, me)


def asked(v: View) -> Switchover | None:
    """The operators' switchover request that is about this term and has not come to nothing."""
    c = v.cluster
    wish = v.control.switchover if v.control is not None else None
    if c is None or wish is None or wish.term != c.term:
        return None
    return None if any(r is not None and r[0] == wish.id for r in (v.refused, c.refused)) else wish


def best_of(fit: list[Member]) -> str | None:
    """Who of them goes first: the most WAL, then the priority, then the name."""
    ahead = sorted(fit, key=lambda m: (-m.received_lsn, -m.priority, m.node))
    return ahead[0].node if ahead else None


def preferred_fit(v: View, me: Identity, t: Timing, now_ns: int) -> bool:
    """Whether the preferred primary, another than we who lead, could take over."""
    name = me.policy.preferred_primary
    leading = v.state in WRITABLE_STATES and name not in {"", me.node}
    return leading and not _ready(v, name, me, t, now_ns)


def wanted(v: View, me: Identity, t: Timing, now_ns: int) -> tuple[str | None, str]:
    """To whom leadership should be handed over, and why a switchover that was asked for cannot be."""
    if v.state not in WRITABLE_STATES:
        return None, ""
    wish = asked(v)
    if wish is not None or (v.retiring and v.hand_over):
        reasons = {n: _ready(v, n, me, t, now_ns) for n in me.members if n != me.node}
        fit = [n for n, why in reasons.items() if not why]
        if wish is None:
            return _heir(v, fit, me, t, now_ns), ""
        best = best_of([v.members[n] for n in fit])
        to = wish.to or best
        if to in fit:
            return to, ""
        if to is None:
            return None, "; ".join(reasons.values()) or "there is no other member"
        return None, reasons.get(to, f"{to} is {'leading already' if to == me.node else 'no member'}")
    if me.policy.failback == "automatic" and not distrust(v) and not stopped(v, me):
        held = v.preferred_fit_ns and now_ns - v.preferred_fit_ns >= me.policy.failback_after_ns
        if held and now_ns >= v.handover_pause_until_ns:
            return me.policy.preferred_primary, ""
    return None, ""


def _heir(v: View, fit: list[str], me: Identity, t: Timing, now_ns: int) -> str | None:
    """To whom a node that is being stopped hands over: who is ready, else who streams and may catch up in time."""
    others = [n for n in me.members if n != me.node and not unfit(v, n, t, now_ns)]
    catching_up = [n for n in others if v.members[n].streaming]
    return best_of([v.members[n] for n in fit or catching_up])


def confirms(v: View, me: Identity, t: Timing, now_ns: int) -> int:
    """The term in which we, named as the successor, are ready to lead; 0: not named, or not ready."""
    c, f = v.cluster, v.fencer
    if c is None or c.successor != me.node or c.primary in {None, me.node} or f is None or v.fencer_silent:
        return 0
    fit = (
        f.trusted
        and f.latched is None
        and not (me.nofailover or distrust(v) or v.retiring or v.sick.ill)
        and v.failures == 0
        and database(v, t, now_ns) == "standby"
    )
    return c.term if fit else 0


def _successor(v: View, me: Identity, t: Timing, now_ns: int) -> tuple[bool, bool, str]:
    """Of the successor that we have named: whether it could take over, has said so, and what is missing."""
    c, name = v.cluster, v.successor
    if c is None or name is None:
        return False, False, ""
    why = unfit(v, name, t, now_ns)
    if why:
        return False, False, why
    said = c.successor == name and v.members[name].confirms == c.term
    # Without it the shutdown would write all that is dirty while nobody can write. Who is stopped has no time for it.
    ready = v.checkpoint == "done" or v.retiring
    lag = behind(v, name, me)
    waiting = lag or ("" if said else f"{name} has not said that it is ready")
    return True, said and ready and not lag, waiting


# ---------------------------------------------------------------- founding and adoption


def cannot_found(v: View, *, permitted: bool = False) -> str:
    """Why nothing is founded with the data here; "": it may be. A standby's is behind a primary that may still run. And
    where nothing stands at data_dir, other members' data would be another cluster's from then on. What a rejoin has
    left half done starts nowhere. `permitted`: an operator lets it found."""
    f = v.fencer
    if f is not None and f.unfinished:
        return "a rejoin was interrupted here, so this data directory is not whole: another node's data has to found"
    if f is not None and f.was_standby and not (permitted or v.may_found or f.adopting):
        advice = "harmonyctl adopt where it runs; or, where none does and this is the newest data, store accept --found"
        return f"what ran here last was the standby of some primary: {advice}"
    if f is None or f.system_identifier is not None:
        return ""
    if f.empty not in {"initdb", "command"}:
        return (
            "there is no data directory here, and bootstrap.method makes no new cluster"
            if f.empty
            else "unknown yet"
        )
    data = [f"{n} ({m.system_identifier})" for n, m in v.members.items() if m.system_identifier]
    return (
        f"other members have data: {', '.join(data)}; found the cluster there, or move it away"
        if data
        else ""
    )


def not_ready(v: View, me: Identity) -> str:
    """Why what is to be adopted is not led yet: commits would wait for standbys that stream under other names."""
    found = {w.name for w in v.db.walsenders} if v.db is not None else set()
    others = [n for n in me.members if n != me.node]
    missing = [n for n in others if n not in found]
    if len(others) - len(missing) >= me.sync_count:
        return ""
    return f"{me.sync_count} of these must stream under their names first: {', '.join(missing)}"


# ---------------------------------------------------------------- all of it


def observe(v: View, me: Identity, t: Timing, now_ns: int) -> Observation:
    """What a decision at `now_ns` may depend on."""
    f = v.fencer
    who = leads(v, me)
    db = database(v, t, now_ns)
    fate, fate_why = order_fate(v, now_ns)
    pause = FENCE_PAUSE_NS if v.order is not None and v.order.op == "fence" else ORDER_PAUSE_NS
    if v.order is not None and fate == "done" and v.order.op == "follow" and v.order.primary != target(v, me):
        pause = 0  # it is not that order which is sent anew: another leads now
    term = v.cluster.term if v.cluster is not None else 0
    is_stale = stale(v, t, now_ns)
    fit = _fit(v, me, t, now_ns)
    recovered = steady(v, me, t, now_ns)
    flapping = losses(v, me, now_ns) > 1
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
            barred=barred(v, me, t, now_ns),
            patient=quiet < 2 * (t.interval_ns + t.timeout_ns),
        )
    elif who == "me":
        verdict = candidate.Verdict(ok=False, why=again(v, me, t, now_ns, recovered=recovered, db=db))
    up = f is not None and f.postgres_up
    to, why_not = wanted(v, me, t, now_ns)
    successor_fit, confirmed, successor_why = _successor(v, me, t, now_ns)
    return Observation(
        state=v.state,
        leads=who,
        lost=v.lost,
        failures=v.failures,
        failing=v.failures >= t.failure_threshold,
        recovered=recovered,
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
        peer_ready=bool(fit),
        flapping=flapping,
        term_behind=highest(v)[0] > term,
        latched=f is not None and f.latched is not None,
        trusted=f is not None and f.trusted,
        identified=f is not None and (f.system_identifier is not None or not cannot_found(v)),
        cannot_found=cannot_found(v),
        reserved=v.reserved > 0,
        virgin=f is not None and f.highest[0] == 0,
        may_claim=now_ns >= v.claim_pause_until_ns,
        writing=v.intent != "beat",
        stale=is_stale,
        eligible=verdict.ok,
        eligible_why=verdict.why,
        foreign=_foreign(v, me),
        distrust=distrust(v),
        adopting=f is not None and f.adopting,
        adoption_waits=not_ready(v, me),
        sync_shown=v.db is not None and (v.db.names != "" or not me.sync_count),
        may_found=f is not None
        and v.may_found != ""
        and f.system_identifier == v.may_found
        and not f.unfinished,
        wanted=to,
        wanted_why=why_not,
        named=v.successor,
        successor_fit=successor_fit,
        confirmed=confirmed,
        successor_why=successor_why,
        named_long=v.successor is not None
        and (v.checkpoint == "done" or v.retiring)
        and now_ns - v.named_ns > t.failover_ns,
        unable=rejoin.unable(v, me, now_ns),
        rejoin_waits=rejoin.waits(v),
        rejoin_due=rejoin.due(v, me, t, now_ns),
        rejoining=rejoining(v),
        astray=rejoin.astray(v, me, is_stale=is_stale),
        rejoin_why=rejoin.why(v, now_ns),
        may_follow=rejoin.may_follow(v, now_ns),
        sick=sickness.verdict(v, me, now_ns),
        unwell=sickness.unwell(v, me, now_ns),
        heir=me.policy.sick_handover and _heard_enough(v, fit, t, now_ns),
        spent=f is not None
        and not v.fencer_silent
        and f.spent
        and f.active is None
        and f.highest >= highest(v),
        untrusted_long=v.untrusted_ns > 0 and now_ns - v.untrusted_ns > t.failover_ns,
        restart_here=v.restart,
        other_slot=slots.change(v, me, t, now_ns),
    )


def _fit(v: View, me: Identity, t: Timing, now_ns: int) -> list[str]:
    """Who else could take over; nobody where automatic failover is stopped. Asynchronous: within the lag allowed."""
    c = v.cluster
    if c is None or stopped(v, me):
        return []
    fit = [n for n in me.members if n != me.node and not unfit(v, n, t, now_ns)]
    return [n for n in fit if c.sync_voters or c.lsn - v.members[n].received_lsn <= me.maximum_lag_bytes]


def _heard_enough(v: View, fit: list[str], t: Timing, now_ns: int) -> bool:
    """Whether one of `fit` will be eligible: with quorum, so many standbys must tell their final positions."""
    c = v.cluster
    if c is None or not c.sync_voters:
        return bool(fit)
    heard = [n for n in c.sync_voters if alive(v, n, t, now_ns) and v.members[n].db == "standby"]
    return bool(fit) and len(heard) > len(c.sync_voters) - c.sync_count


def barred(v: View, me: Identity, t: Timing, now_ns: int) -> str:
    """Why this node may not promote whatever its WAL; empty: it may."""
    c = v.cluster
    if v.retiring:
        return "this agent was asked to stop"
    if distrust(v):
        return f"the store is distrusted: {distrust(v)}"
    if v.sick.ill:
        return f"PostgreSQL is sick here: {sickness.verdict(v, me, now_ns)}"
    if v.losses and not steady(v, me, t, now_ns):
        return f"leadership was lost here: {_beats(v, me, t, now_ns)}"
    planned = c is not None and c.primary is None and c.successor is not None
    return "" if planned else stopped(v, me)
