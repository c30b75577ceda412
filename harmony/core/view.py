"""What a node knows: the View, and the simple questions that it answers. Pure: nothing is sent, time is an argument.

fold.py changes it at every event, observe.py makes of it what a decision may depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from harmony.core.messages import DbSeen, FencerView, Gen, Marks, OrderOp, Surveyed, Symptom
from harmony.core.register import Register
from harmony.core.states import State
from harmony.core.sync import Mode, Rule, Ruling
from harmony.core.table import Leads
from harmony.core.timing import NS, Timing
from harmony.records import ClusterState, Control, Member

# States in which a node recorded as the primary keeps writing its heartbeat. A failed, fenced or demoted one
# goes on too, saying so: until its fence is proven and the vacancy written, this is what holds the others off.
LEADING = frozenset(
    {
        State.ADOPTING,
        State.HEALTHY,
        State.LEADER,
        State.P_FAILED,
        State.FENCED,
        State.YIELDING,
        State.PROMOTING,
        State.DEMOTING,
    }
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operators want beyond safety. Seconds; 0 changes: no limit."""

    preferred_primary: str = ""
    failback: Literal["off", "automatic"] = "off"
    failback_after_s: float = 60.0
    maximum_changes: int = 0
    changes_window_s: float = 3600.0
    flap_window_s: float = 600.0
    rejoin: Literal["automatic", "off"] = "automatic"
    rejoin_after_s: float = 10.0
    sick_after_s: float = 0.0  # 0: no symptom ever counts as an illness
    sick_handover: bool = True
    restart_budget: int = 0
    restart_window_s: float = 600.0

    @property
    def sick_after_ns(self) -> int:
        return round(self.sick_after_s * NS)

    @property
    def restart_window_ns(self) -> int:
        return round(self.restart_window_s * NS)

    @property
    def failback_after_ns(self) -> int:
        return round(self.failback_after_s * NS)

    @property
    def rejoin_after_ns(self) -> int:
        return round(self.rejoin_after_s * NS)

    @property
    def changes_window_ns(self) -> int:
        return round(self.changes_window_s * NS)

    @property
    def flap_window_ns(self) -> int:
        return round(self.flap_window_s * NS)


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
    policy: Policy = field(default_factory=Policy)
    sync_mode: Mode = "strict"


class SentOrder(msgspec.Struct, frozen=True):
    generation: Gen
    op: OrderOp
    sent_ns: int
    refused: str = ""
    primary: str | None = None
    clean: bool = False
    slot: bool = False
    done_ns: int = 0  # when the fencer was first seen to have carried it out
    again: bool = False  # to follow whom it follows: PostgreSQL stays the standby that it is


class Sickness(msgspec.Struct, frozen=True):
    """What PostgreSQL here suffers from while it is not dead (sickness.py)."""

    symptom: Symptom = ""
    why: str = ""
    since_ns: int = 0  # it has lasted since then, without a sign of progress; 0: there is none
    flowed: int = 0  # the most WAL that another member had received then
    ill: bool = False  # it has outlasted the operators' patience
    well: int = 0  # good looks in a row, while ill


Intent = Literal["beat", "create", "claim", "vacate"]
Occasion = tuple[Literal["", "vacancy", "stale", "named"], int]  # with its revision or term (urgency.py)
NO_OCCASION: Occasion = ("", 0)


class View(msgspec.Struct, frozen=True):
    """Everything folded so far. A msgspec struct, as it is copied at every event: replace() is ten times faster."""

    state: State
    row: int = 0  # the one that speaks now; where none does, the one that led into the state
    why: str = "starting"
    entered: tuple[int, str] = (0, "starting")  # row and why that led into the state
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
    lead_records: tuple[ClusterState, ...] = ()  # of the exchange, each attempt's
    lead_sent_ns: int = 0  # start of the newest heartbeat
    reserving: int = 0  # the timeline that the exchange under way reserves; 0: none
    reserved: int = 0  # that is ours for the next activation; 0: none
    ruling: Ruling | None = None  # the synchronous rule, while we lead
    recording: Rule | None = None  # that the next heartbeat records
    unsettled: bool = False  # one that changes the rule was sent, and what the store holds is not known
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
    occasion: Occasion = NO_OCCASION  # the newest for which the database was asked at once
    urged_ns: int = 0  # when it came; 0: the record that is owed to it was begun
    asked_ns: int = 0  # when the database was last asked for it
    refreshing_until_ns: int = 0
    refreshed_ns: int = 0
    # counters of the heartbeat that matters in the state (leading: the lead, else the own record)
    failures: int = 0
    successes: int = 0
    failed_why: str = ""
    losses: tuple[int, ...] = ()  # when leadership was lost by a failure of ours, newest last
    # what operators ask for
    control: Control | None = None
    control_revision: int = 0
    retiring: bool = False
    hand_over: bool = False  # before retiring
    farewell: Literal["", "begun", "over"] = ""  # the exchange that tells the others so
    # the hand-over that we, the leader, have under way
    successor: str | None = None
    request: str = ""
    refused: tuple[str, str] | None = None
    named_ns: int = 0
    checkpoint: Literal["", "running", "done"] = ""  # ahead of the demotion
    handover_pause_until_ns: int = 0
    preferred_fit_ns: int = 0  # since when the preferred primary could take over; 0: it could not
    # whether the store is what it was
    lineage: str = ""
    store_problem: str = ""
    marks: Marks = Marks()
    kept: Marks | None = Marks()  # what the disk was last asked to keep; None: what it holds counts no more
    kept_rule: Rule | None = None  # recorded then
    kept_ns: int = 0
    own_back_ns: int = 0  # since when our own record is an older one than was acknowledged; 0: it is not
    went_back_ns: int = 0  # since when reads have shown less than the marks; 0: they do not
    distrust: str = ""  # for good, until an operator accepts
    may_found: str = ""  # the system identifier with which an operator lets this node found the cluster anew
    # the world on this host
    fencer: FencerView | None = None
    fencer_silent: str = "not asked yet"
    untrusted_ns: int = 0  # since when the fencer's memory is not trusted; 0: it is
    db: DbSeen | None = None
    db_ns: int = 0
    order: SentOrder | None = None
    survey: Surveyed | None = None  # None: not yet, or the data directory was made anew since
    # whether PostgreSQL follows, as a standby, whom it was told to
    streams: int = 0  # so many answers in a row have said that it streams
    unstreamed_ns: int = 0  # since when it has not; 0: it streams, or has not said
    follows: int = 0  # ordered since PostgreSQL last answered
    rejoins: int = 0  # ordered since it last streamed for long
    rejoined: bool = False  # the newest of them was done, and has not helped yet
    rejoin_ns: int = 0  # when the newest was last seen running, or sent
    hurried: int = 0  # for which timeline of ours a first checkpoint was asked for, and when
    hurried_ns: int = 0
    rejoin_why: str = ""  # what the newest came to; "": there was none since it last streamed for long
    postgres_failed: bool = False
    restart: bool = False  # it died, and is to be restarted here (ADR 015)
    # sickness that is not death
    sick: Sickness = Sickness()
    crashes: tuple[int, ...] = ()  # when PostgreSQL died or crashed under us, newest last
    note: str = ""


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


def highest(v: View) -> Gen:
    """The highest generation that the fencer has accepted or that we have sent."""
    seen = v.fencer.highest if v.fencer is not None else (0, 0)
    return max(seen, v.order.generation) if v.order is not None else seen


def alive(v: View, name: str, t: Timing, now_ns: int) -> bool:
    changed = v.member_changed_ns.get(name)
    return changed is not None and now_ns - changed <= t.failover_ns


def rejoining(v: View) -> bool:
    """Whether a rejoin is at work, ours or one of the agent before us. What runs meanwhile is nobody's standby."""
    return v.fencer is not None and (v.fencer.order_op, v.fencer.order_state) == ("rejoin", "running")


def database(v: View, t: Timing, now_ns: int) -> Literal["down", "standby", "primary", "unknown"]:
    if v.fencer is not None and (v.fencer.unfinished or rejoining(v)):
        return "down"  # crash recovery answers like a standby: it is no candidate, and no voter to be heard
    if v.fencer is not None and not v.fencer_silent and not v.fencer.postgres_up:
        return "down"
    if v.db is None or now_ns - v.db_ns > 2 * (t.interval_ns + t.timeout_ns):
        return "unknown"
    return v.db.db


def target(v: View, me: Identity) -> str | None:
    """Whom PostgreSQL should follow here; None: nobody."""
    if v.cluster is None or v.cluster.primary is None or v.cluster.primary == me.node:
        return None
    return v.cluster.primary


# Timelines that the lost part of a history may have begun since whoever founds anew left it. What is passed over costs
# the next promotion a history file each (harmony_fencer/timelines.py).
LEAP = 64


def founded_from(v: View) -> int:
    """What a founder reserves. Of a cluster that an operator founds anew, nodes that are not heard now may hold
    timelines of a history that is lost: none of theirs may come to stand for a newer one than ours."""
    return next_timeline(v) - 1 + LEAP if v.may_found else v.reserving


def next_timeline(v: View) -> int:
    """A number that no promotion in this cluster has been given, as far as the store and its members tell."""
    c, f = v.cluster, v.fencer
    known = [m.timeline for m in v.members.values()]
    known += [c.reserved, c.timeline] if c is not None else []
    known += [v.db.timeline] if v.db is not None else []
    known += [f.timeline, 1 if f.empty else 0] if f is not None else []  # a new cluster begins with 1
    return max(known, default=0) + 1


def answered_at(v: View) -> int:
    """The cluster_state revision that was the newest when the database was last asked; 0: it has gone on since, and
    the answer is of before: no final position, whatever the newest revision says."""
    return v.revision if v.db is not None and v.db.asked_ns >= v.first_seen_ns else 0


def silence_ns(v: View) -> int:
    """How long the current cluster_state revision was the newest when the database was last asked."""
    return max(0, v.db.asked_ns - v.first_seen_ns) if v.db is not None else 0


def distrust(v: View) -> str:
    """Why the store is not trusted; empty: it is."""
    if v.distrust or not v.went_back_ns:
        return v.distrust or v.store_problem
    return f"the store shows less than revision {v.marks.revision}, which this node has seen"
