"""Replication slots, as far as the decision core knows of them. Pure; what is done in the database is the agent's.

A member streams through its own slot only where its primary's own record says that the slot is there: a slot that is
missing must never keep a standby from streaming, least of all right after a failover. Who may make and move slots
here, and for whom, is told by `duty`: the primary under its lease, and a standby that streams from it. Nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harmony.core.states import WRITABLE_STATES, State
from harmony.core.timing import NS, Timing
from harmony.core.view import Identity, View, alive, distrust, is_leading, leads, rejoining, target
from harmony.records import slot_name

BEATS = 10  # heartbeat intervals between two looks at the slots, and between two orders for their sake
RELOAD_NS = NS  # after an order's end, before PostgreSQL's word on its settings counts
TURNED_AWAY_NS = 2 * NS  # without streaming, before a slot that is gone is given up


@dataclass(frozen=True, slots=True)
class Duty:
    """What this node is, for its slots. `until_ns`: of a primary, its lease's end; a standby has none (0)."""

    role: Literal["primary", "standby"]
    primary: str
    heard: frozenset[str]  # the other members that are alive
    theirs: Mapping[
        str, int
    ]  # the slots that the primary keeps, and from where each holds WAL; its own is empty
    limits: Mapping[str, int]  # and its settings of which we must not have less
    until_ns: int


def there(v: View, me: Identity) -> bool:
    """Whether the primary, by its own record, has a slot for this node."""
    source = v.members.get(target(v, me) or "")
    return source is not None and slot_name(me.node) in (source.slots or {})


def change(v: View, me: Identity, t: Timing, now_ns: int) -> bool:
    """Whether to follow the same primary anew, for the slot's sake.

    To take it up as soon as it is there; to do without it only where it is gone and nothing streams. A name that is
    neither ours nor empty is somebody's ALTER SYSTEM: no order would change it, and the agent's notes tell of it.
    """
    s, o, name = v.survey, v.order, slot_name(me.node)
    if s is None:
        return False
    if o is not None:
        early = s.asked_ns < max(o.sent_ns, o.done_ns) + RELOAD_NS
        if early or now_ns - o.sent_ns < BEATS * t.interval_ns:  # each restarts the WAL receiver
            return False
    if there(v, me):
        return s.streams_by == ""
    silent = v.unstreamed_ns != 0 and now_ns - v.unstreamed_ns >= TURNED_AWAY_NS
    source = v.members.get(target(v, me) or "")
    return s.streams_by == name and silent and source is not None and source.slots is not None


def duty(v: View, me: Identity, t: Timing, now_ns: int) -> Duty | None:
    """What may be made and moved here now; None: nothing, as it is not certain what this node is."""
    c, f, db = v.cluster, v.fencer, v.db
    if c is None or f is None or db is None or c.primary is None or distrust(v) or rejoining(v):
        return None
    heard = frozenset(n for n in me.members if n != me.node and alive(v, n, t, now_ns))
    if db.db == "primary":
        leading = is_leading(v, me) and v.state in WRITABLE_STATES and now_ns < v.lease_until_ns
        return Duty("primary", me.node, heard, {}, {}, v.lease_until_ns) if leading else None
    source = v.members.get(c.primary)
    follows = leads(v, me) == "other" and f.following == c.primary and v.streams > 1
    if v.state is not State.WATCHING or not follows or source is None:
        return None
    return Duty("standby", c.primary, heard, source.slots or {}, source.limits, 0)
