"""A fencer with its PostgreSQL, as values: the real `admit` decides, the effects are reduced to their outcomes.

PostgreSQL is worse than it is: it goes on writing from the acceptance of a fence to its proof, which may come
at any time within fence_timeout, and a promotion that was cancelled may still complete until then.
"""

from __future__ import annotations

from typing import NamedTuple

from harmony.core.messages import FencerView, Gen, Order, Renew
from harmony.core.timing import Timing
from harmony_fencer.admit import Extend, Facts, NewOrder, admit
from harmony_fencer.lease import clamp
from harmony_fencer.protocol import Generation, OrderRecord, Refusal
from tests.exhaustive.normal import NOW
from tests.orders import request

NODES = ("n1", "n2")


class Violation(AssertionError):
    """An invariant was broken; the message names it."""


class Accepted(NamedTuple):
    """The newest order and what became of it."""

    generation: Gen
    op: str
    primary: str | None
    state: str


class Host(NamedTuple):
    """Times are relative to NOW. `highest` and `newest` are durable; the rest dies with the host."""

    highest: Gen = (0, 0)
    newest: Accepted | None = None
    active: Gen | None = None
    deadline_ns: int = 0
    proven: bool = False
    clean: bool = False  # the proven fence was a clean shutdown of a primary
    effect: str = ""  # fence, clean, self, activate, follow
    gone_by_ns: int = 0  # when what could write must be proven gone; 0: nothing must
    postgres: str = "down"  # down, standby, primary
    promoting: bool = False  # PostgreSQL may become writable without anything more
    following: str | None = None

    @property
    def could_write(self) -> bool:
        return self.promoting or self.postgres == "primary"


def fencer_view(h: Host, node: str) -> FencerView:
    """What the fencer's status says."""
    n = h.newest
    return FencerView(
        fencer_id=f"id-{node}",
        trusted=True,
        detail="",
        highest=h.highest,
        active=h.active,
        lease_deadline_ns=h.deadline_ns if h.active is not None else None,
        order=n.generation if n is not None else None,
        order_op=n.op if n is not None else "",
        order_state=n.state if n is not None else "",  # type: ignore[arg-type]
        order_detail="",
        fence_proven=h.proven and h.effect == "" and h.postgres == "down",
        postgres_up=h.postgres != "down",
        following=h.following if h.postgres == "standby" else None,
        is_standby=h.postgres != "primary",
        system_identifier="sys",
        latched=None,
        shutdown_lsn=1000 if h.proven and h.clean else None,
    )


def _facts(h: Host, node: str) -> Facts:
    n = h.newest
    record = None
    if n is not None:
        record = OrderRecord(Generation(*n.generation), n.op, n.primary, n.state)  # type: ignore[arg-type]
    return Facts(
        node=node,
        members=frozenset(NODES),
        trusted=True,
        retiring=False,
        latched=False,
        highest=Generation(*h.highest),
        newest=record,
        active=Generation(*h.active) if h.active is not None else None,
        lease_deadline_ns=h.deadline_ns,
    )


def receive(
    h: Host, node: str, c: Order | Renew, t: Timing, *, checks_generation: bool = True
) -> tuple[Host, str]:
    """The host after a request, and the refusal's name ("": admitted). Never runs twice in one call."""
    verdict = admit(_facts(h, node), request(c), "agent", NOW)
    refused = verdict.error if isinstance(verdict, Refusal) else ""
    if isinstance(verdict, Extend):
        return h._replace(deadline_ns=max(h.deadline_ns, clamp(verdict.deadline_ns, NOW, t.lease_ns))), ""
    stale = refused in {"stale_generation", "conflicting_order"} and not checks_generation
    if isinstance(c, Order) and (stale or isinstance(verdict, NewOrder)):
        return _begin(h, c, t), ""
    return h, refused


def _begin(h: Host, c: Order, t: Timing) -> Host:
    """Carry out a new order: durable first, what ran is cancelled, then its effect."""
    if c.generation < h.highest:
        raise Violation(f"I3: the fencer's highest generation goes back from {h.highest} to {c.generation}")
    h = h._replace(
        highest=c.generation,
        newest=Accepted(c.generation, c.op, c.primary, "running"),
        proven=False,
        clean=False,
        effect=c.op,
    )
    if c.op == "activate":
        deadline_ns = clamp(c.deadline_ns, NOW, t.lease_ns)
        promoting = h.postgres != "primary"
        return h._replace(active=c.generation, deadline_ns=deadline_ns, promoting=promoting, gone_by_ns=0)
    planned = c.op == "follow" or c.clean
    if h.could_write:
        by = (max(h.deadline_ns, NOW) if planned else NOW) + t.stop_ns
        h = h._replace(gone_by_ns=min(h.gone_by_ns or by, by))
    h = h._replace(active=None, deadline_ns=0)
    if c.op == "fence" and c.clean and h.postgres == "primary":
        h = h._replace(effect="clean")
    # What could not write is stopped, or follows, in no time: there is nothing to wait for.
    return h if h.could_write else ended(h)


def ended(h: Host) -> Host:
    """The running effect has done what it is for."""
    done = h.newest
    if done is not None and h.effect != "self":
        done = done._replace(state="done")
    gone = h._replace(effect="", newest=done, gone_by_ns=0, promoting=False)
    match h.effect:
        case "activate":
            return gone._replace(postgres="primary", following=None)
        case "follow":
            following = done.primary if done is not None else None
            return gone._replace(postgres="standby", following=following)
        case _:
            clean = h.effect == "clean"
            return gone._replace(postgres="down", following=None, proven=True, clean=clean)


def _by_itself(h: Host, by_ns: int, state: str) -> Host:
    """The fencer begins a fence of its own; a running order ends as `state`."""
    newest = h.newest
    if newest is not None and newest.state == "running":
        newest = newest._replace(state=state)
    by_ns = min(h.gone_by_ns or by_ns, by_ns) if h.could_write else 0
    h = h._replace(
        active=None, deadline_ns=0, proven=False, clean=False, effect="self", newest=newest, gone_by_ns=by_ns
    )
    return h if h.could_write else ended(h)


def failed(h: Host, t: Timing) -> Host:
    """An activation fails: what it began is fenced."""
    return _by_itself(h, NOW + t.stop_ns, "failed")


def promoted_late(h: Host) -> Host:
    """A promotion that was cancelled completes all the same."""
    return h._replace(postgres="primary", promoting=False, following=None)


def died(h: Host) -> Host:
    """PostgreSQL ends by itself."""
    return h._replace(postgres="down", promoting=False, following=None, gone_by_ns=0)


def restarted(h: Host, t: Timing) -> Host:
    """Another fencer process: it carries on under a lease in force, or fences what could write."""
    n = h.newest
    finished = n is not None and (n.op, n.state) == ("activate", "done")
    if h.active is not None and finished and h.postgres != "down":
        return h
    suspect = n is not None and (n.op == "activate" or n.state != "done")
    if h.could_write or (suspect and h.postgres != "down"):
        return _by_itself(h, NOW + t.stop_ns, "preempted")
    if n is not None and n.state == "running":
        n = n._replace(state="preempted")
    return h._replace(
        active=None, deadline_ns=0, proven=False, clean=False, effect="", newest=n, gone_by_ns=0
    )


def lost(h: Host, t: Timing) -> Host:
    """The host loses power and comes back: only what is durable is left, and nothing is started at boot."""
    return restarted(died(h)._replace(active=None, deadline_ns=0, effect=""), t)


def overdue(h: Host) -> bool:
    """Whether PostgreSQL must be proven gone before time goes on."""
    return h.gone_by_ns != 0 and h.gone_by_ns <= NOW


def later(h: Host, ns: int, t: Timing, *, fences_itself: bool = True) -> Host:
    """Time has passed; a lease that is over is fenced at once: the dead-man's switch."""
    if h.gone_by_ns:
        h = h._replace(gone_by_ns=h.gone_by_ns - ns)
    if h.active is None:
        return h
    h = h._replace(deadline_ns=h.deadline_ns - ns)
    return (
        h
        if h.deadline_ns > NOW or not fences_itself
        else _by_itself(h, h.deadline_ns + t.stop_ns, "preempted")
    )
