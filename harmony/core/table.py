"""All transitions, in one table. A newcomer changes a row here, never a branch elsewhere.

`decide` looks for the first row of the current state whose condition holds. A row's `why` is the log line.
Pure: an Observation comes in, a Decision goes out; time is already in the Observation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harmony.core.states import State

Action = Literal[
    "fence",
    "demote",  # a fence that shuts down cleanly, while the lease lasts
    "activate",
    "follow",
    "rejoin",
    "claim",
    "create",
    "vacate",
    "name",  # the successor, in cluster_state
    "unname",  # it: the hand-over is given up
    "refuse",  # a switchover that cannot be
    "fatal",
]
Leads = Literal["nobody_yet", "me", "other", "vacant", "unread"]
Order = Literal["none", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Observation:
    """All that a decision may depend on. See view.observe for how each field is made."""

    state: State
    leads: Leads  # what the newest known cluster_state says (`me`: my name *and* my fencer's id)
    lost: bool  # a read confirmed that another wrote over my leadership
    failures: int  # consecutive failed heartbeats
    failing: bool  # failures >= failure_threshold
    recovered: bool  # success_threshold good heartbeats in a row, the newest after entering the state
    lease_left: bool  # my newest acknowledged heartbeat still entitles me
    fencer_known: bool
    granted: bool  # the fencer's active generation is of this term and its lease runs
    fence_proven: bool  # by a generation not older than any order I sent
    order: Order  # fate of my newest order
    order_op: str
    order_why: str
    may_order: bool  # the pause after a failed order is over
    postgres_up: bool
    db: Literal["down", "standby", "primary", "unknown"]
    following_right: bool  # PostgreSQL runs as the standby of whom it should
    postgres_failed: bool  # PostgreSQL died under us or did not start: the reason for this fence
    peer_ready: bool  # another live node runs as a standby and could take over
    term_behind: bool  # the fencer has accepted a higher term than the store's
    latched: bool
    trusted: bool
    identified: bool  # the fencer has read the data directory's system identifier
    reserved: bool  # a timeline is reserved in the store for our next promotion
    virgin: bool  # this node has never accepted any generation
    may_claim: bool  # the pause after a claim that came to nothing is over
    writing: bool  # a claim, creation or vacancy is being written and its fate is not known
    stale: bool  # two-clock rule: the primary's heartbeat is too old on both clocks
    eligible: bool
    eligible_why: str
    foreign: str | None  # something that must never be: another system id, another host with my name
    flapping: bool = False  # leadership was lost here by a failure of ours, more than once of late
    distrust: str = ""  # why the store is not trusted
    may_found: bool = False  # an operator lets this node found the cluster anew
    cannot_found: str = ""  # why nothing is founded with the data here
    adopting: bool = False  # PostgreSQL ran before Harmony, and an operator lets it be taken over
    adoption_waits: str = ""  # for what that waits
    sync_shown: bool = True  # PostgreSQL shows the synchronous rule of the term
    wanted: str | None = None  # to whom leadership should be handed over
    wanted_why: str = ""  # why a switchover that was asked for cannot be
    named: str | None = None  # the successor that we have named
    successor_fit: bool = False  # it could take over
    confirmed: bool = False  # it has read that it is named, has caught up, and says that it is ready
    successor_why: str = ""  # what it lacks
    named_long: bool = False  # it has had its time
    unable: str = ""  # why PostgreSQL cannot follow the primary as its data directory is
    rejoin_waits: str = ""  # what the primary has still to do before anything is rewound to it
    rejoin_due: bool = False  # a rejoin may be ordered: the primary is seen writing, and the pause is over
    rejoining: bool = False  # one is at work
    astray: bool = False  # and it is from a primary that leads no more
    rejoin_why: str = ""  # why the last one came to nothing
    may_follow: bool = True  # the pause after a follow that came to nothing is over
    sick: str = ""  # why PostgreSQL here must not lead as it is, though it lives
    unwell: str = ""  # a symptom that has not outlasted the patience
    heir: bool = False  # a live standby that is allowed to take over, certainly, once the place is vacant
    spent: bool = False  # what a fence has left of PostgreSQL runs no more, though it is not gone
    untrusted_long: bool = False  # the fencer's memory, for longer than failover_timeout
    restart_here: bool = False  # PostgreSQL died, and is to be restarted in place
    other_slot: bool = False  # PostgreSQL should stream through its slot and does not, or cannot and tries to


@dataclass(frozen=True, slots=True)
class Row:
    id: int
    state: State
    when: Callable[[Observation], bool]
    next: State
    do: tuple[Action, ...]
    why: str
    condition: str  # for people: what `when` says
    detail: Callable[[Observation], str] | None = None  # what is put behind `why`


@dataclass(frozen=True, slots=True)
class Decision:
    row: int  # 0: no row matched, hold
    next: State
    do: tuple[Action, ...]
    why: str


S = State


def _row(
    id_: int,
    state: State,
    condition: str,
    when: Callable[[Observation], bool],
    next_: State,
    why: str,
    *do: Action,
    detail: Callable[[Observation], str] | None = None,
) -> Row:
    return Row(id=id_, state=state, when=when, next=next_, do=do, why=why, condition=condition, detail=detail)


def _no_order(o: Observation) -> bool:
    return o.order in {"none", "failed"} and o.may_order and o.may_follow


def _waits(o: Observation) -> bool:
    """A follow came to nothing, and the next has to wait."""
    waits = o.order == "failed" and o.order_op == "follow" and not (o.may_order and o.may_follow)
    return not o.following_right and waits


def _unproven(o: Observation) -> bool:
    """A fence is wanted, and none of ours is under way."""
    return not o.fence_proven and not (o.order == "running" and o.order_op == "fence") and o.may_order


def _must_vacate(o: Observation) -> bool:
    return (
        o.leads == "me"
        and not o.writing
        and not o.failing
        and not o.distrust
        and (
            o.latched
            or (not o.trusted and (o.untrusted_long or not o.restart_here))
            or o.term_behind
            or (o.peer_ready and (o.flapping or (o.postgres_failed and not o.restart_here)))
        )
    )


def _order_why(o: Observation) -> str:
    return f"({o.order_why})" if o.order_why else ""


def _activated_sick(o: Observation) -> bool:
    """Its first answer does not come: nobody has begun to rely on it."""
    return o.order_op == "activate" and o.order == "done" and o.sick != ""


def _distrusted(o: Observation) -> str:
    return f"({o.distrust})" if o.distrust else ""


def _foreign(o: Observation) -> str:
    return f"{o.foreign} {_distrusted(o)}".rstrip()


def _unproven_why(o: Observation) -> str:
    left = "what is left never runs again" if o.spent else "PostgreSQL may still be writing"
    return f"{left} {_order_why(o)}"


def _rejoins(o: Observation) -> bool:
    settled = o.order != "running" and o.may_order and not o.rejoining
    return o.leads == "other" and not o.stale and o.unable != "" and o.rejoin_due and settled


def _cannot_follow(o: Observation) -> bool:
    under_way = o.rejoining or (o.order == "running" and o.order_op == "rejoin")
    known = o.leads in {"other", "vacant"} and not o.stale and not o.distrust
    return known and (o.unable != "" or under_way)


def _unable_why(o: Observation) -> str:
    if o.rejoining:
        return "a rejoin is under way"
    last = f"; the last rejoin: {o.rejoin_why}" if o.rejoin_why and o.rejoin_why not in o.unable else ""
    waits = f"; {o.rejoin_waits}" if o.rejoin_waits else ""
    return (o.unable or "a rejoin is ordered") + waits + last


def _may_resume(o: Observation) -> bool:
    return o.leads == "me" and o.granted and o.db == "primary" and o.postgres_up


def _hands_over(o: Observation) -> bool:
    """Demoted for a successor that can still take over: the vacancy is its sign to go."""
    may_write = not o.writing and not o.failing and not o.distrust
    return o.leads == "me" and o.fence_proven and o.named is not None and o.successor_fit and may_write


def _leader_rows(base: int, state: State, down: State, aside: State) -> tuple[Row, ...]:
    """A writable primary (Healthy, Leader) differs only in where it falls to, and where it steps aside to."""
    return (
        _row(
            base + 0,
            state,
            "another wrote over our leadership, confirmed",
            lambda o: o.lost or o.leads != "me",
            down,
            "replaced: the store shows another leader; fencing at once",
            "fence",
        ),
        _row(
            base + 2,
            state,
            "fencer's lease gone",
            lambda o: o.fencer_known and not o.granted,
            down,
            "the fencer no longer holds our lease (it fenced by itself or was latched)",
            "fence",
        ),
        _row(
            base + 4,
            state,
            "PostgreSQL died",
            lambda o: o.fencer_known and not o.postgres_up,
            down,
            "PostgreSQL died; fencing what is left of it,",
            "fence",
            detail=lambda o: "then restarting it here" if o.restart_here else "then handing over",
        ),
        _row(
            base + 6,
            state,
            "failures >= failure_threshold",
            lambda o: o.failing,
            down,
            "heartbeats failed up to the threshold: the store may have elected another; fencing",
            "fence",
        ),
        _row(
            base + 8,
            state,
            "own lease over",
            lambda o: not o.lease_left,
            down,
            "our lease ran out (paused or cut off); fencing",
            "fence",
        ),
        _row(
            base + 10,
            state,
            "database is a standby",
            lambda o: o.db == "standby",
            down,
            "PostgreSQL says it is in recovery: it is not our primary; fencing",
            "fence",
        ),
        _row(
            base + 11,
            state,
            "PostgreSQL sick beyond patience, another can lead",
            lambda o: o.sick != "" and o.heir and o.failures == 0 and not o.distrust,
            down,
            "PostgreSQL is sick, and another can lead: fencing, then handing over;",
            "fence",
            detail=lambda o: o.sick,
        ),
        _row(
            base + 12,
            state,
            "successor confirmed",
            lambda o: o.confirmed and o.failures == 0 and not o.distrust,
            aside,
            "the successor has caught up and is ready: demoting for",
            "demote",
            detail=lambda o: str(o.named),
        ),
        _row(
            base + 14,
            state,
            "successor unfit, or silent for failover_timeout",
            lambda o: o.named is not None and (o.named_long or not o.successor_fit),
            state,
            "the hand-over is given up, leading on:",
            "unname",
            detail=lambda o: o.successor_why,
        ),
        _row(
            base + 16,
            state,
            "switchover asked for that cannot be",
            lambda o: o.named is None and o.wanted_why != "",
            state,
            "refusing the switchover:",
            "refuse",
            detail=lambda o: o.wanted_why,
        ),
        _row(
            base + 18,
            state,
            "hand-over wanted",
            lambda o: o.named is None and o.wanted is not None and o.failures == 0 and not o.distrust,
            state,
            "a hand-over is wanted: naming the successor,",
            "name",
            detail=lambda o: str(o.wanted),
        ),
        _row(
            base + 20,
            state,
            "store distrusted",
            lambda o: o.distrust != "",
            state,
            "ALARM, leading on while the lease is renewed:",
            detail=lambda o: o.distrust,
        ),
        _row(
            base + 22,
            state,
            "PostgreSQL sick beyond patience, no hand-over",
            lambda o: o.sick != "",
            state,
            "ALARM, leading on, as a hand-over is not possible for certain, or not wanted; PostgreSQL is sick:",
            detail=lambda o: o.sick,
        ),
        _row(
            base + 24,
            state,
            "PostgreSQL unwell",
            lambda o: o.unwell != "",
            state,
            "PostgreSQL is unwell, which may be nothing but load:",
            detail=lambda o: o.unwell,
        ),
    )


TABLE: tuple[Row, ...] = (
    # -------------------------------------------------------------- primary workflow
    _row(100, S.P_INITIALIZING, "something foreign", lambda o: o.foreign is not None, S.P_INITIALIZING, "must not go on:", "fatal", detail=_foreign),
    _row(102, S.P_INITIALIZING, "fencer silent or store unread", lambda o: not o.fencer_known or o.leads == "unread", S.P_INITIALIZING, "waiting for the fencer and a first look at the store", detail=_distrusted),
    _row(104, S.P_INITIALIZING, "recorded primary is me, lease in force, writable", _may_resume, S.HEALTHY, "restarted as the recorded primary with the lease in force: resuming at once"),
    _row(105, S.P_INITIALIZING, "recorded primary is me, to be adopted", lambda o: o.leads == "me" and o.adopting, S.ADOPTING, "recorded primary, whose running PostgreSQL is to be taken over"),
    _row(106, S.P_INITIALIZING, "recorded primary is me", lambda o: o.leads == "me" and o.db != "unknown", S.P_FAILED, "recorded primary, but not provably writing under a lease: fencing before recovery", "fence"),
    _row(108, S.P_INITIALIZING, "recorded primary is me, database unknown", lambda o: o.leads == "me", S.P_INITIALIZING, "recorded primary: waiting for the database's answer"),
    _row(110, S.P_INITIALIZING, "another leads, or vacancy", lambda o: o.leads in {"other", "vacant"}, S.YIELDING, "another node leads, or the place is vacant: yielding"),
    _row(111, S.P_INITIALIZING, "empty store, distrusted", lambda o: o.leads == "nobody_yet" and o.distrust != "", S.P_INITIALIZING, "ALARM, not founding a cluster:", detail=lambda o: o.distrust),
    _row(112, S.P_INITIALIZING, "empty store, but terms seen here", lambda o: o.leads == "nobody_yet" and not (o.virgin or o.may_found), S.P_INITIALIZING, "is cluster.id right? The store is empty, but this node has accepted terms before: correct cluster.id, or restore the store; the last way out is harmonyctl store accept --found"),
    _row(113, S.P_INITIALIZING, "empty store, no data to found with", lambda o: o.leads == "nobody_yet" and o.cannot_found != "", S.P_INITIALIZING, "new cluster, not founding it:", detail=lambda o: o.cannot_found),
    _row(114, S.P_INITIALIZING, "empty store, latched", lambda o: o.leads == "nobody_yet" and (o.latched or not o.trusted), S.P_INITIALIZING, "new cluster, but this node is latched or its fencer's state untrusted: not claiming it"),
    _row(115, S.P_INITIALIZING, "empty store, PostgreSQL runs", lambda o: o.leads == "nobody_yet" and o.postgres_up and not (o.adopting or o.may_found), S.P_INITIALIZING, "new cluster, and PostgreSQL runs here as somebody's standby: not founding it; harmonyctl adopt where the primary runs, or stop PostgreSQL here"),
    _row(116, S.P_INITIALIZING, "empty store, virgin node or founder", lambda o: o.leads == "nobody_yet" and o.identified and not o.writing and o.may_claim, S.P_INITIALIZING, "new cluster: claiming its first term", "create"),
    _row(150, S.ADOPTING, "something foreign", lambda o: o.foreign is not None, S.ADOPTING, "must not go on:", "fatal", detail=_foreign),
    _row(152, S.ADOPTING, "activate done, writable, rule in force", lambda o: o.order_op == "activate" and o.order == "done" and o.granted and o.db == "primary" and o.sync_shown, S.HEALTHY, "adopted: the running PostgreSQL is led under a lease"),
    _row(154, S.ADOPTING, "activate accepted, and failed", lambda o: o.order_op == "activate" and o.order == "failed" and not o.adopting, S.P_FAILED, "taking over failed; fencing", "fence", detail=_order_why),
    _row(156, S.ADOPTING, "activated", lambda o: o.order_op == "activate" and o.leads == "me" and not (o.lost or o.adopting), S.ADOPTING, "under a lease: waiting until PostgreSQL shows the synchronous rule"),
    _row(158, S.ADOPTING, "not ours, or no permit any more", lambda o: o.leads != "me" or o.lost or not o.adopting, S.P_INITIALIZING, "not to be adopted any more: looking at it anew"),
    _row(160, S.ADOPTING, "waiting for standbys", lambda o: o.adoption_waits != "", S.ADOPTING, "not under a lease yet, PostgreSQL runs on:", detail=lambda o: o.adoption_waits),
    _row(162, S.ADOPTING, "good heartbeats", lambda o: o.recovered and o.lease_left and not o.writing and o.trusted and not o.distrust and not o.term_behind and o.order != "running" and o.may_order, S.ADOPTING, "the store is good: taking the running PostgreSQL over", "activate"),
    *_leader_rows(200, S.HEALTHY, S.P_FAILED, S.YIELDING),
    _row(300, S.P_FAILED, "fence proven", lambda o: o.fence_proven, S.FENCED, "the fence is proven: PostgreSQL is gone"),
    _row(301, S.P_FAILED, "fence not proven, yet nothing left can run, may not resume", lambda o: o.spent and _must_vacate(o), S.P_FAILED, "killed, though not gone: what is left waits in the kernel and never runs again; writing the vacancy", "vacate"),
    _row(302, S.P_FAILED, "fence failed", lambda o: _unproven(o) and o.order == "failed", S.P_FAILED, "the fence is NOT proven: ordering it again;", "fence", detail=_unproven_why),
    _row(304, S.P_FAILED, "no fence under way", _unproven, S.P_FAILED, "ordering a fence", "fence"),
    _row(398, S.FENCED, "nothing known of the store", lambda o: o.leads in {"unread", "nobody_yet"} and o.fence_proven, S.P_INITIALIZING, "the store was accepted as it is: looking at it anew"),
    _row(400, S.FENCED, "term is not ours", lambda o: o.lost or o.leads in {"other", "vacant"}, S.YIELDING, "fenced, and the store shows that the term is no longer ours: yielding"),
    _row(402, S.FENCED, "ours, but may not resume", lambda o: _must_vacate(o) and o.fence_proven, S.FENCED, "fenced for good on this node: writing the vacancy so that another need not wait", "vacate"),
    _row(404, S.FENCED, "activate done, writable", lambda o: o.order_op == "activate" and o.order == "done" and o.granted and o.db == "primary", S.HEALTHY, "PostgreSQL is the writable primary"),
    _row(405, S.FENCED, "activated, and sick beyond patience", _activated_sick, S.P_FAILED, "activated, and PostgreSQL is sick; fencing again:", "fence", detail=lambda o: o.sick),
    _row(406, S.FENCED, "activate failed", lambda o: o.order_op == "activate" and o.order == "failed", S.P_FAILED, "activation failed; fencing again", "fence", detail=_order_why),
    _row(407, S.FENCED, "ours, store distrusted", lambda o: o.leads == "me" and o.distrust != "" and o.fence_proven, S.FENCED, "ALARM, staying fenced:", detail=lambda o: o.distrust),
    _row(408, S.FENCED, "ours, good heartbeats", lambda o: o.leads == "me" and o.recovered and o.lease_left and not o.writing and not o.latched and o.trusted and not o.term_behind and o.fence_proven and o.reserved and o.order_op != "activate" and o.may_order, S.FENCED, "fresh look at the store: the term is still ours; activating", "activate"),
    _row(409, S.FENCED, "ours, heartbeats not good for long enough", lambda o: o.leads == "me" and o.fence_proven and not o.recovered and o.order_op != "activate", S.FENCED, "the term is still ours, not activating yet:", detail=lambda o: o.eligible_why),
    _row(410, S.FENCED, "fence no longer proven", lambda o: not o.fence_proven and o.order_op != "activate", S.P_FAILED, "the fence is not proven any more; fencing again", "fence"),
    _row(490, S.YIELDING, "demotion under way", lambda o: o.leads == "me" and o.order == "running" and o.order_op == "fence", S.YIELDING, "PostgreSQL shuts down and ships its last WAL"),
    _row(492, S.YIELDING, "demoted for a successor", _hands_over, S.YIELDING, "PostgreSQL is gone: writing the vacancy for the successor,", "vacate", detail=lambda o: str(o.named)),
    _row(494, S.YIELDING, "vacancy being written", lambda o: o.leads == "me" and o.writing, S.YIELDING, "the vacancy is being written"),
    _row(496, S.YIELDING, "nothing known of the store", lambda o: o.leads in {"unread", "nobody_yet"}, S.P_INITIALIZING, "the store was accepted as it is: looking at it anew"),
    _row(500, S.YIELDING, "recorded primary is me, fence proven", lambda o: o.leads == "me" and o.fence_proven, S.FENCED, "nobody takes over: leadership is still recorded as ours"),
    _row(502, S.YIELDING, "recorded primary is me", lambda o: o.leads == "me", S.P_FAILED, "leadership is recorded as ours again; proving the fence first", "fence"),
    _row(503, S.YIELDING, "rejoin from who leads no more", lambda o: o.leads in {"other", "vacant"} and o.astray and not o.latched and o.trusted, S.YIELDING, "the rejoin that is under way is from a primary that leads no more: ending it", "follow"),
    _row(504, S.YIELDING, "latched", lambda o: o.latched or not o.trusted, S.YIELDING, "latched by an operator, or the fencer's state is untrusted: staying fenced"),
    _row(505, S.YIELDING, "cannot follow as it is, rejoin due", _rejoins, S.YIELDING, "rewinding or copying anew:", "rejoin", detail=_unable_why),
    _row(506, S.YIELDING, "standby of the right node", lambda o: o.leads in {"other", "vacant"} and o.following_right and o.db == "standby", S.WATCHING, "runs as a standby again: watching"),
    _row(507, S.YIELDING, "cannot follow as it is", _cannot_follow, S.YIELDING, "PostgreSQL cannot follow as it is:", detail=_unable_why),
    _row(508, S.YIELDING, "not following yet", lambda o: o.leads in {"other", "vacant"} and not o.following_right and _no_order(o), S.YIELDING, "rejoining as a standby", "follow", detail=_order_why),
    _row(509, S.YIELDING, "follow failed, pause", lambda o: o.leads in {"other", "vacant"} and _waits(o), S.YIELDING, "PostgreSQL could not be made a standby, which is tried again:", detail=_order_why),
    _row(510, S.YIELDING, "follow done but not running", lambda o: o.leads in {"other", "vacant"} and o.order == "done" and not o.following_right and o.may_order and o.may_follow, S.YIELDING, "not running as a standby: ordering it again", "follow"),
    # -------------------------------------------------------------- replica workflow
    _row(600, S.R_INITIALIZING, "something foreign", lambda o: o.foreign is not None, S.R_INITIALIZING, "must not go on:", "fatal", detail=_foreign),
    _row(602, S.R_INITIALIZING, "fencer silent or store unread", lambda o: not o.fencer_known or o.leads == "unread", S.R_INITIALIZING, "waiting for the fencer and a first look at the store", detail=_distrusted),
    _row(603, S.R_INITIALIZING, "empty store, distrusted", lambda o: o.leads == "nobody_yet" and o.distrust != "", S.R_INITIALIZING, "ALARM, no new cluster is waited for:", detail=lambda o: o.distrust),
    _row(604, S.R_INITIALIZING, "recorded primary is me, lease in force, writable", _may_resume, S.LEADER, "restarted as the recorded primary with the lease in force: resuming at once"),
    _row(605, S.R_INITIALIZING, "recorded primary is me, to be adopted", lambda o: o.leads == "me" and o.adopting, S.ADOPTING, "recorded primary, whose running PostgreSQL is to be taken over"),
    _row(606, S.R_INITIALIZING, "recorded primary is me", lambda o: o.leads == "me" and o.db != "unknown", S.DEMOTING, "recorded primary, but not provably writing under a lease: fencing before recovery", "fence"),
    _row(607, S.R_INITIALIZING, "empty store, to be adopted", lambda o: o.leads == "nobody_yet" and o.adopting and o.identified and not o.distrust and not o.latched and o.trusted and not o.writing and o.may_claim, S.R_INITIALIZING, "new cluster: claiming its first term for the PostgreSQL that runs here", "create"),
    _row(608, S.R_INITIALIZING, "recorded primary is me, database unknown", lambda o: o.leads == "me", S.R_INITIALIZING, "recorded primary: waiting for the database's answer"),
    _row(609, S.R_INITIALIZING, "empty store, founder", lambda o: o.leads == "nobody_yet" and o.may_found and o.identified and not o.distrust and not o.latched and o.trusted and not o.writing and o.may_claim, S.R_INITIALIZING, "an operator lets this node found the cluster anew", "create"),
    _row(610, S.R_INITIALIZING, "empty store", lambda o: o.leads == "nobody_yet", S.R_INITIALIZING, "new cluster: waiting for the preferred primary to claim its first term"),
    _row(612, S.R_INITIALIZING, "another leads, or vacancy", lambda o: o.leads in {"other", "vacant"}, S.WATCHING, "another node leads, or the place is vacant: watching"),
    _row(700, S.WATCHING, "something foreign", lambda o: o.foreign is not None, S.WATCHING, "must not go on:", "fatal", detail=_foreign),
    _row(701, S.WATCHING, "nothing known of the store", lambda o: o.leads in {"unread", "nobody_yet"}, S.R_INITIALIZING, "the store was accepted as it is: looking at it anew"),
    _row(702, S.WATCHING, "heartbeats failing", lambda o: o.failing, S.R_FAILED, "own heartbeats failed up to the threshold: what we know is old; no promotion from here"),
    _row(704, S.WATCHING, "latched", lambda o: o.latched or not o.trusted, S.WATCHING, "latched by an operator, or the fencer's state is untrusted: no promotion"),
    _row(705, S.WATCHING, "rejoin from who leads no more", lambda o: o.astray, S.WATCHING, "the rejoin that is under way is from a primary that leads no more: ending it", "follow"),
    _row(706, S.WATCHING, "recorded primary is me, writable", lambda o: o.leads == "me" and o.db == "primary", S.DEMOTING, "recorded primary without a lease, yet writable: fencing", "fence"),
    _row(707, S.WATCHING, "no primary, store distrusted", lambda o: o.distrust != "" and (o.stale or o.leads in {"me", "vacant"}), S.WATCHING, "ALARM, no promotion:", detail=lambda o: o.distrust),
    _row(708, S.WATCHING, "recorded primary is me", lambda o: o.leads == "me" and o.recovered and o.db == "standby" and not o.writing and o.may_claim, S.PROMOTING, "leadership is recorded as ours: claiming a new term", "claim"),
    _row(710, S.WATCHING, "vacancy, eligible", lambda o: o.leads == "vacant" and o.eligible and not o.writing and o.may_claim, S.PROMOTING, "the place is vacant and we are eligible: claiming", "claim"),
    _row(711, S.WATCHING, "cannot follow as it is, rejoin due", _rejoins, S.WATCHING, "rewinding or copying anew:", "rejoin", detail=_unable_why),
    _row(712, S.WATCHING, "primary stale, eligible", lambda o: o.leads == "other" and o.stale and o.eligible and not o.writing and o.may_claim, S.PROMOTING, "the primary's heartbeat is stale on both clocks and we are eligible: claiming", "claim"),
    _row(713, S.WATCHING, "cannot follow as it is", _cannot_follow, S.WATCHING, "PostgreSQL cannot follow as it is:", detail=_unable_why),
    _row(714, S.WATCHING, "not following the right node", lambda o: not o.following_right and o.fencer_known and _no_order(o), S.WATCHING, "PostgreSQL is not the standby it should be: ordering it", "follow", detail=_order_why),
    _row(715, S.WATCHING, "follow failed, pause", lambda o: o.fencer_known and not o.stale and _waits(o), S.WATCHING, "PostgreSQL is not the standby it should be, which is tried again:", detail=_order_why),
    _row(716, S.WATCHING, "follow done, yet not right", lambda o: not o.following_right and o.fencer_known and o.order == "done" and o.may_order and o.may_follow, S.WATCHING, "PostgreSQL is not the standby it should be: ordering it again", "follow"),
    _row(717, S.WATCHING, "slot there, or gone", lambda o: o.other_slot and o.leads == "other" and not o.stale and not o.distrust and o.following_right and o.order != "running", S.WATCHING, "the primary's slots for this node have changed: ordering to follow it with what is there", "follow"),
    _row(718, S.WATCHING, "vacancy, stale or ours, not eligible", lambda o: o.leads in {"me", "vacant"} or o.stale, S.WATCHING, "no primary, but this node may not promote:", detail=lambda o: o.eligible_why),
    _row(719, S.WATCHING, "last rejoin came to nothing", lambda o: o.rejoin_why != "" and o.following_right and not o.distrust, S.WATCHING, "runs, and does not stream yet; the last rejoin:", detail=lambda o: o.rejoin_why),
    _row(720, S.WATCHING, "store distrusted", lambda o: o.distrust != "", S.WATCHING, "ALARM:", detail=lambda o: o.distrust),
    _row(798, S.PROMOTING, "replaced after activating", lambda o: not o.writing and o.leads != "me" and o.order_op == "activate", S.DEMOTING, "replaced while promoting; fencing", "fence"),
    _row(800, S.PROMOTING, "claim lost", lambda o: not o.writing and o.leads != "me", S.WATCHING, "the claim was not won: another was faster, or the store did not confirm it"),
    _row(802, S.PROMOTING, "latched", lambda o: o.latched, S.DEMOTING, "latched by an operator while promoting; fencing", "fence"),
    _row(804, S.PROMOTING, "lease over or heartbeats failing", lambda o: not o.writing and (o.failing or not o.lease_left), S.DEMOTING, "lost the store while promoting; fencing", "fence"),
    _row(806, S.PROMOTING, "activate done, writable", lambda o: o.order_op == "activate" and o.order == "done" and o.granted and o.db == "primary", S.LEADER, "promoted: PostgreSQL is the writable primary"),
    _row(807, S.PROMOTING, "activated, and sick beyond patience", _activated_sick, S.DEMOTING, "promoted, and PostgreSQL is sick; fencing:", "fence", detail=lambda o: o.sick),
    _row(808, S.PROMOTING, "activate failed", lambda o: o.order_op == "activate" and o.order == "failed", S.DEMOTING, "promotion failed; fencing", "fence", detail=_order_why),
    _row(809, S.PROMOTING, "store distrusted", lambda o: o.leads == "me" and o.distrust != "" and o.order_op != "activate", S.PROMOTING, "ALARM, not activating:", detail=lambda o: o.distrust),
    _row(810, S.PROMOTING, "claim won", lambda o: not o.writing and o.leads == "me" and o.lease_left and not o.term_behind and o.reserved and o.order_op != "activate", S.PROMOTING, "claim won: activating", "activate"),
    *_leader_rows(900, S.LEADER, S.DEMOTING, S.DEMOTING),
    _row(996, S.DEMOTING, "demoted for a successor", _hands_over, S.DEMOTING, "PostgreSQL is gone: writing the vacancy for the successor,", "vacate", detail=lambda o: str(o.named)),
    _row(1000, S.DEMOTING, "fence proven, heartbeats failing", lambda o: o.fence_proven and o.failing and not o.lost, S.R_FAILED, "the fence is proven; the store is out of reach"),
    _row(1002, S.DEMOTING, "fence proven, may not resume", lambda o: o.fence_proven and _must_vacate(o), S.DEMOTING, "fenced for good on this node: writing the vacancy so that another need not wait", "vacate"),
    _row(1003, S.DEMOTING, "fence not proven, yet nothing left can run, may not resume", lambda o: o.spent and _must_vacate(o), S.DEMOTING, "killed, though not gone: what is left waits in the kernel and never runs again; writing the vacancy", "vacate"),
    _row(1004, S.DEMOTING, "fence proven, may go on", lambda o: o.fence_proven and (o.leads != "me" or (o.recovered and not o.writing)), S.WATCHING, "the fence is proven: going back to watching"),
    _row(1006, S.DEMOTING, "fence failed", lambda o: _unproven(o) and o.order == "failed", S.DEMOTING, "the fence is NOT proven: ordering it again;", "fence", detail=_unproven_why),
    _row(1008, S.DEMOTING, "no fence under way", _unproven, S.DEMOTING, "ordering a fence", "fence"),
    _row(1100, S.R_FAILED, "good heartbeats again", lambda o: o.recovered, S.WATCHING, "heartbeats are good again: watching"),
)  # fmt: skip


ROWS_OF = {state: tuple(row for row in TABLE if row.state is state) for state in State}


def decide(o: Observation) -> Decision:
    """The first matching row of the state; none: an explicit hold."""
    for row in ROWS_OF[o.state]:
        if row.when(o):
            return Decision(row.id, row.next, row.do, _explain(row, o))
    return Decision(0, o.state, (), "holding")


def _explain(row: Row, o: Observation) -> str:
    return row.why if row.detail is None else f"{row.why} {row.detail(o)}".rstrip()
