"""Which requests the fencer admits. Pure: facts, request, peer and time in; a Refusal or a grant out.

Rows of DESIGN section 5. Whatever is not admitted here is refused by name and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harmony_fencer.protocol import (
    Activate,
    Fence,
    Follow,
    Generation,
    Hello,
    OperatorFence,
    OrderOp,
    OrderRecord,
    Refusal,
    Rejoin,
    Renew,
    Request,
    StatusRequest,
    Sync,
    SyncTold,
    Unfence,
)

Peer = Literal["root", "agent", "other"]

PERMITTED: dict[type, frozenset[Peer]] = {
    Hello: frozenset({"root", "agent"}),
    StatusRequest: frozenset({"root", "agent"}),
    Activate: frozenset({"root", "agent"}),
    Fence: frozenset({"root", "agent"}),
    Follow: frozenset({"root", "agent"}),
    Rejoin: frozenset({"root", "agent"}),
    Renew: frozenset({"root", "agent"}),
    Sync: frozenset({"root", "agent"}),
    OperatorFence: frozenset({"root"}),
    Unfence: frozenset({"root"}),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What admission depends on."""

    node: str
    members: frozenset[str]
    trusted: bool
    retiring: bool
    latched: bool
    highest: Generation
    newest: OrderRecord | None
    active: Generation | None
    lease_deadline_ns: int
    sync: SyncTold | None = None
    unfinished: bool = False  # the data directory is being rewound, or was when that was interrupted


@dataclass(frozen=True, slots=True)
class NewOrder:
    """Accept under this generation: make it durable, then begin."""

    op: OrderOp
    generation: Generation
    primary: str | None = None


@dataclass(frozen=True, slots=True)
class Repeat:
    """The same order once more: answer with its recorded outcome."""

    record: OrderRecord


@dataclass(frozen=True, slots=True)
class Extend:
    """Move the lease to this deadline (not yet clamped)."""

    deadline_ns: int


@dataclass(frozen=True, slots=True)
class NewRule:
    """Have PostgreSQL wait by it from now on."""

    told: SyncTold


@dataclass(frozen=True, slots=True)
class KnownRule:
    """PostgreSQL was told it before."""


@dataclass(frozen=True, slots=True)
class Permit:
    """Nothing to decide (hello, status, unfence)."""


Verdict = Refusal | NewOrder | Repeat | Extend | NewRule | KnownRule | Permit


def admit(f: Facts, request: Request, peer: Peer, now_ns: int) -> Verdict:
    """The verdict on one request at `now_ns` (CLOCK_BOOTTIME)."""
    if peer not in PERMITTED[type(request)]:
        return Refusal("not_permitted", f"{type(request).__name__} is not for this user", f.highest)
    match request:
        case Hello() | StatusRequest():
            return Permit()
        case Unfence():
            return (
                Permit()
                if f.latched
                else Refusal("not_latched", "no operator's fence is in force", f.highest)
            )
        case _ if f.retiring:
            return Refusal(
                "retiring", "the supervisor of this fencer is dead; it only guards the lease", f.highest
            )
        case OperatorFence():
            return NewOrder("operator_fence", Generation(f.highest.term, f.highest.order + 1))
        case Renew():
            return _renew(f, request, now_ns)
        case Sync():
            return _sync(f, request, now_ns)
        case Activate() | Fence() | Follow() | Rejoin():
            return _order(f, request, now_ns)


def _renew(f: Facts, r: Renew, now_ns: int) -> Verdict:
    if f.active is None or r.generation != f.active or f.active != f.highest:  # a newer order is on its way
        return Refusal(
            "not_active", f"generation {r.generation} is not active (active: {f.active})", f.highest
        )
    if now_ns >= f.lease_deadline_ns:
        return Refusal("not_active", "its lease is over; an expired lease is never revived", f.highest)
    if r.deadline_boottime_ns <= now_ns:
        return Refusal("lease_expired", "the deadline asked for is in the past", f.highest)
    return Extend(max(r.deadline_boottime_ns, f.lease_deadline_ns))


def _sync(f: Facts, r: Sync, now_ns: int) -> Verdict:
    newest, told = f.newest, f.sync
    if f.active is None or not r.generation == f.active == f.highest or now_ns >= f.lease_deadline_ns:
        return Refusal(
            "not_active", f"generation {r.generation} is not active (active: {f.active})", f.highest
        )
    if told is None or newest is None or (newest.op, newest.state) != ("activate", "done"):
        return Refusal("not_active", f"the activate {r.generation} is not done yet", f.highest)
    unknown = set(r.rule.voters if r.rule is not None else ()) - (f.members - {f.node})
    if unknown:
        return _cannot_wait(f, unknown)
    if r.number < told.number:
        return Refusal("stale_rule", f"rule number {r.number}, newest accepted {told.number}", f.highest)
    if r.number == told.number and r.rule != told.rule:
        return Refusal("conflicting_order", f"rule number {r.number} was another rule", f.highest)
    if r.number == told.number and told.done:
        return KnownRule()
    return NewRule(SyncTold(r.number, r.rule, done=False))


def _cannot_wait(f: Facts, unknown: set[str]) -> Refusal:
    why = f"cannot wait for {sorted(unknown)}: not other configured members"
    return Refusal("bad_message", why, f.highest)


OPS: dict[type, OrderOp] = {Activate: "activate", Fence: "fence", Follow: "follow", Rejoin: "rejoin"}


def _order(f: Facts, r: Activate | Fence | Follow | Rejoin, now_ns: int) -> Verdict:
    op = OPS[type(r)]
    primary = r.primary if isinstance(r, Follow | Rejoin) else None
    g = r.generation
    if g == f.highest and f.newest is not None and f.newest.generation == g:
        if (f.newest.op, f.newest.primary) == (op, primary):
            return Repeat(f.newest)
        return Refusal("conflicting_order", f"generation {g} was another order: {f.newest.op}", f.highest)
    if g <= f.highest:
        return Refusal("stale_generation", f"generation {g}, highest accepted {f.highest}", f.highest)
    if not isinstance(r, Fence):
        if not f.trusted:
            return Refusal("untrusted_state", "the state file cannot be trusted; see status", f.highest)
        if f.latched:
            return Refusal("latched", "an operator fenced this node; harmonyctl unfence", f.highest)
    if isinstance(r, Activate) and r.deadline_boottime_ns <= now_ns:
        return Refusal("lease_expired", "the lease's deadline is in the past", f.highest)
    if isinstance(r, Activate) and not set(r.sync.voters) <= f.members - {f.node}:
        return _cannot_wait(f, set(r.sync.voters) - (f.members - {f.node}))
    if isinstance(r, Activate) and f.unfinished:
        return Refusal("unfinished", "a rejoin was interrupted here; only another can end it", f.highest)
    if isinstance(r, Rejoin) and f.active is not None:
        return Refusal("active", "this node leads under a lease; fence it first", f.highest)
    if (
        isinstance(r, Follow | Rejoin)
        and primary is not None
        and (primary == f.node or primary not in f.members)
    ):
        return Refusal("bad_message", f"cannot follow {primary}: not another configured member", f.highest)
    return NewOrder(op, g, primary)
