"""When a standby that cannot follow is rewound or copied anew, and when that is ended. Pure, and it changes nothing.

A rejoin destroys what only this node has. So it waits until the primary is seen writing, and never one is ordered by
what is stale or distrusted.
"""

from __future__ import annotations

from harmony.core.states import WRITABLE_STATES
from harmony.core.timing import Timing
from harmony.core.view import Identity, View, alive, distrust, highest, leads, rejoining

FOLLOW_PAUSE_NS = 1_000_000_000  # doubled with each follow that came to nothing
FOLLOW_PAUSES = 6  # how often the pause doubles after a follow that came to nothing
FOLLOW_TRIES = 3  # in vain, before PostgreSQL counts as one that cannot start from its data
REJOIN_PATIENCE = 6  # times rejoin.after_s, where nothing but silence speaks for a rejoin
REJOIN_PAUSE_NS = 2_500_000_000  # doubled with each that did not help
UNHELPED_NS = (
    2_000_000_000  # without streaming after a rejoin, before its outcome is told as one that did not help
)
MOST_PAUSE_NS = 300_000_000_000


def unable(v: View, me: Identity, now_ns: int) -> str:
    """Why PostgreSQL here cannot follow the primary as its data directory is; "": it can, or it is not known."""
    c, f, db, who = v.cluster, v.fencer, v.db, leads(v, me)
    if c is None or f is None or who not in {"other", "vacant"}:
        return ""
    if f.unfinished:
        return "a rejoin was interrupted here"
    if f.empty:
        return "there is no data directory here yet"
    if who == "vacant":
        return ""
    if (
        v.follows >= FOLLOW_TRIES
        and (f.order_op, f.order_state) == ("follow", "failed")
        and not f.postgres_up
    ):
        return f"PostgreSQL does not start: {f.order_detail}"
    asked_long = v.unstreamed_ns and now_ns - v.unstreamed_ns >= me.policy.rejoin_after_ns
    if db is None or db.db != "standby" or f.following != c.primary:
        return ""
    if db.timeline < c.timeline and 0 < c.begins < db.replayed_lsn:  # certain: no time will make it stream
        return (
            f"it has replayed more of timeline {db.timeline} than {c.primary} had when it began {c.timeline}"
        )
    if not asked_long:
        return ""
    if db.timeline < c.timeline:
        return f"it stays on timeline {db.timeline}, {c.primary} is on {c.timeline}"
    if db.received_lsn > c.lsn and c.status in WRITABLE_STATES:  # else the primary has not told what it has
        return f"it has WAL that {c.primary} does not have"
    if now_ns - v.unstreamed_ns >= REJOIN_PATIENCE * me.policy.rejoin_after_ns:
        return f"it does not stream from {c.primary}"
    return ""


def waits(v: View) -> str:
    """What the primary has still to do before anything is rewound to it; "": nothing that it has told.

    pg_rewind (before PostgreSQL 16) takes the source's timeline from the newest checkpoint in its control file. Shortly
    after a promotion that is the one that was left: it finds the wrong fork or none, and what it makes does not start.
    """
    c, f = v.cluster, v.fencer
    source = v.members.get(c.primary or "") if c is not None else None
    if f is None or f.empty or source is None or not source.early:
        return ""
    return f"waiting for {source.node}'s first checkpoint on its timeline"


def due(v: View, me: Identity, t: Timing, now_ns: int) -> bool:
    """Whether a rejoin, which destroys what only this node has, may be ordered now; a row sees to staleness.

    Only for a primary that is seen writing, in a term that this node's fencer has not gone beyond (but in a history
    that an operator has given up). Its newest heartbeat must be a new one: else it may be dead, and this standby is
    wanted as a candidate, or to be heard.
    """
    c, f = v.cluster, v.fencer
    if c is None or f is None or me.policy.rejoin != "automatic" or leads(v, me) != "other":
        return False
    source = v.members.get(c.primary or "")
    sure = (
        not distrust(v)
        and now_ns - v.first_seen_ns <= t.interval_ns + t.timeout_ns
        and v.failures == 0
        and highest(v)[0] <= max(c.term, v.marks.overruled)
        and f.active is None
        and c.status in WRITABLE_STATES
        and c.system_identifier != ""
        and source is not None
        and alive(v, source.node, t, now_ns)
        and source.db == "primary"
        and not waits(v)
    )
    pause_ns = min(REJOIN_PAUSE_NS * 2 ** min(v.rejoins, 20), MOST_PAUSE_NS) if v.rejoins else 0
    return sure and now_ns - v.rejoin_ns >= pause_ns


def astray(v: View, me: Identity, *, is_stale: bool) -> bool:
    """Whether a rejoin is at work from a primary that leads no more: it can only hang, or end in the wrong history."""
    c, f = v.cluster, v.fencer
    if c is None or f is None or f.order is None or not rejoining(v):
        return False
    given_up = c.term < f.order[0] <= v.marks.overruled  # orders go on in the term that the fencer is at
    another = v.order is not None and v.order.op == "rejoin" and v.order.primary != c.primary
    return leads(v, me) == "vacant" or is_stale or another or (c.term != f.order[0] and not given_up)


def why(v: View, now_ns: int) -> str:
    """What the last rejoin said, where it failed, or was done and PostgreSQL does not stream all the same; ""."""
    if v.rejoined and not (v.unstreamed_ns and now_ns - v.unstreamed_ns > UNHELPED_NS):
        return ""
    return v.rejoin_why


def may_follow(v: View, now_ns: int) -> bool:
    """Whether the pause after a follow is over: it doubles with each that came to nothing."""
    if v.order is None or v.order.op != "follow" or v.follows < 2:
        return True
    return now_ns - v.order.sent_ns >= FOLLOW_PAUSE_NS << min(v.follows - 1, FOLLOW_PAUSES)
