"""Sickness that is not death: since when, whether it outlasts the patience, and how often PostgreSQL crashed. Pure.

Busy is not sick: one good look ends a symptom that is not yet an illness, WAL that reaches another member is progress
whatever the probe sees, and a pause of this agent proves nothing of PostgreSQL. It decides nothing (the table does).
"""

from __future__ import annotations

from msgspec.structs import replace

from harmony.core.messages import HealthSeen
from harmony.core.states import WRITABLE_STATES
from harmony.core.view import Identity, Sickness, View

WELL_LOOKS = 3  # good ones in a row that end an illness
UNWELL_SHARE = 0.25  # of the patience: before that a symptom is not even told
MAX_CRASHES = 101  # one more than the largest budget
FLOWING = frozenset({"silent", "stalled"})  # WAL that others receive speaks against these


def looked(v: View, e: HealthSeen, me: Identity, now_ns: int) -> View:
    """The view after a look at the database's health."""
    if v.order is not None and e.asked_ns < max(v.order.sent_ns, v.order.done_ns):
        return v  # from before what that order has made of PostgreSQL
    v = replace(v, note=e.note)
    if e.crashed:
        v = crashed(v, now_ns)
    s = v.sick
    if e.blind:
        return v
    if not e.symptom:
        well = s.well + 1
        cured = not s.ill or well >= WELL_LOOKS
        return replace(v, sick=Sickness() if cured else replace(s, since_ns=0, well=well))
    flowed = max((m.received_lsn for n, m in v.members.items() if n != me.node), default=0)
    busy = e.symptom in FLOWING and flowed > s.flowed
    since_ns = now_ns if busy or not s.since_ns else s.since_ns
    patience_ns = me.policy.sick_after_ns
    ill = (s.ill and not busy) or (patience_ns > 0 and now_ns - since_ns >= patience_ns)
    told = s.symptom == e.symptom and s.ill == ill  # what is told again and again must not change
    return replace(v, sick=Sickness(e.symptom, s.why if told else e.why, since_ns, flowed, ill))


def not_running(s: Sickness, now_ns: int) -> Sickness:
    """After a pause of this agent: nobody was there to see it well."""
    return replace(s, since_ns=now_ns) if s.since_ns else s


def crashed(v: View, now_ns: int) -> View:
    """PostgreSQL died or crashed. Only what leads is counted: a standby's crash costs nobody a write."""
    return _counted(v, now_ns) if v.state in WRITABLE_STATES else v


def died(v: View, me: Identity, now_ns: int) -> View:
    """PostgreSQL died under us, or its restart in place failed: whether the next answer to that is a restart in place.

    A synchronous standby takes over at once and loses nothing; an asynchronous one may.
    """
    v = _counted(v, now_ns)
    waited_for = v.cluster is not None and v.cluster.sync_count > 0
    return replace(v, restart=not waited_for and within_budget(v, me, now_ns))


def within_budget(v: View, me: Identity, now_ns: int) -> bool:
    """Whether the crashes so far are not more than may be answered by a restart in place."""
    return _recent(v, me, now_ns) <= me.policy.restart_budget


def _counted(v: View, now_ns: int) -> View:
    return replace(v, crashes=(*v.crashes, now_ns)[-MAX_CRASHES:])


def _recent(v: View, me: Identity, now_ns: int) -> int:
    return sum(now_ns - at <= me.policy.restart_window_ns for at in v.crashes)


def verdict(v: View, me: Identity, now_ns: int) -> str:
    """Why PostgreSQL here must not lead as it is; "": nothing is known against it."""
    if v.sick.ill:
        return f"{v.sick.symptom} for longer than {me.policy.sick_after_s:g} s: {v.sick.why}"
    patience_ns = me.policy.sick_after_ns
    fresh = patience_ns > 0 and v.crashes != () and now_ns - v.crashes[-1] <= patience_ns
    if fresh and not within_budget(v, me, now_ns):
        p = me.policy
        return f"crashed more than {p.restart_budget} times within {p.restart_window_s:g} s (failover.restart_budget)"
    return ""


def unwell(v: View, me: Identity, now_ns: int) -> str:
    """A symptom that lasts, and has not outlasted the patience; "": there is none. Moments are not told."""
    s = v.sick
    lasts = s.since_ns > 0 and now_ns - s.since_ns >= me.policy.sick_after_ns * UNWELL_SHARE
    return f"{s.symptom}: {s.why}" if lasts and not s.ill else ""
