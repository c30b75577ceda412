"""The normal form of what an agent knows: two Views that no decision can tell apart become one value.

Times are kept relative to a fixed NOW and cut where no comparison of the core reaches any further; revisions
of cluster_state are kept relative to the newest one in the store; texts for people, counters and what every
step is told anew (the fencer's status, the database's answer) are left out. It models nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from harmony.core.messages import Gen, Marks
from harmony.core.register import Attempt, Register
from harmony.core.rejoin import FOLLOW_PAUSE_NS, FOLLOW_PAUSES
from harmony.core.states import State
from harmony.core.timing import NS, Timing
from harmony.core.view import Occasion, View
from harmony.records import ClusterState, Member

NOW = 1_000 * NS  # every step is made at this time; a tick makes everything known one unit older
UNIT = NS
NEWEST = 50  # the revision of cluster_state, and of each member's record, that the store holds now
OLDEST = NEWEST - 6  # what is further behind is not told apart
COUNTER = 100  # where a step's attempt ids begin: above all that are still pending

K = TypeVar("K")
V = TypeVar("V")


class Fixed(dict[K, V]):
    """A dict that is never changed, and so can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _past(at_ns: int, age: float, shift_ns: int) -> int:
    """A time that counts by its age: nothing asks whether it is older than `age` units. 0: never."""
    return max(at_ns - shift_ns, NOW - round(age * UNIT)) if at_ns else 0


def _future(at_ns: int, shift_ns: int) -> int:
    """A time that counts until it is over."""
    return at_ns - shift_ns if at_ns - shift_ns > NOW else 0


def rank(generations: set[Gen]) -> dict[Gen, Gen]:
    """Keep the order and the terms of generations, count the orders of each term anew from 1."""
    found: dict[Gen, Gen] = {(0, 0): (0, 0)}
    count: dict[int, int] = {}
    for term, order in sorted(generations - {(0, 0)}):
        count[term] = count.get(term, 0) + 1
        found[term, order] = (term, count[term])
    return found


def generations(v: View) -> set[Gen]:
    return {v.renewed[0]} | ({v.order.generation} if v.order is not None else set())


def renumbered(v: View, names: Mapping[Gen, Gen]) -> View:
    order = replace(v.order, generation=names[v.order.generation]) if v.order is not None else None
    return replace(v, order=order, renewed=(names[v.renewed[0]], v.renewed[1]))


def cluster(c: ClusterState) -> ClusterState:
    """Without what no decision of two nodes reads: the attempt is kept beside the record."""
    refused = (c.refused[0], "") if c.refused is not None else None
    return replace(c, attempt="", beat=0, status=State.HEALTHY, changes=(), reserved=0, refused=refused)


def member(m: Member, t: Timing) -> Member:
    """What a rival reads of the final position: only that it is one, and only the node of the first name goes
    first where all else is equal (the model has no WAL, all positions are)."""
    counts = m.node == "n1" and m.db == "standby"
    return replace(
        m,
        attempt="",
        status=State.WATCHING,
        row="",
        why="",
        seen_revision=m.seen_revision if counts else 0,
        silent_ns=t.settle_ns if counts and m.silent_ns >= t.settle_ns else 0,
        generation="",
        lease_left_ms=None,
        barred=False,
        slots=None,
        limits=Fixed(),
    )


def moved(revision: int, by: int) -> int:
    """A revision of cluster_state after `by` newer ones; 0 is no revision."""
    return max(revision - by, OLDEST) if revision else 0


def _seen_moved(m: Member, by: int) -> Member:
    return replace(m, seen_revision=moved(m.seen_revision, by)) if by and m.seen_revision else m


def behind(m: Member | None, by: int) -> Member | None:
    """A member's record in the store after `by` newer revisions of cluster_state."""
    return _seen_moved(m, by) if m is not None else None


def _register(r: Register, shift_ns: int, by: int) -> Register:
    revision = moved(r.revision, by) if r.revision is not None else None
    if not r.running:
        return Register(revision=revision)
    return replace(
        r,
        revision=revision,
        deadline_ns=r.deadline_ns - shift_ns,
        retry_at_ns=_future(r.retry_at_ns, shift_ns),
        pending=tuple(Attempt(a.id, _past(a.sent_ns, 9, shift_ns)) for a in r.pending),
    )


def named(r: Register, prefix: str) -> tuple[Register, dict[str, str]]:
    """Number the pending attempts anew; also old names by new ones."""
    names = {a.id: f"{prefix}{i}" for i, a in enumerate(r.pending)}
    return replace(r, pending=tuple(Attempt(names[a.id], a.sent_ns) for a in r.pending)), names


def numbered(v: View, node: str) -> tuple[View, dict[str, str]]:
    """With the pending attempts numbered anew; also those of cluster_state, old names by new ones."""
    lead, names = named(v.lead, f"{node}-")
    own, _ = named(v.own, "m")
    records = tuple(replace(r, attempt=names[r.attempt]) for r in v.lead_records if r.attempt in names)
    return replace(v, lead=lead, own=own, lead_records=records), names


def _occasion(o: Occasion, by: int) -> Occasion:
    """The number of all but `named`, which has a term, is a revision."""
    kind, number = o
    return o if kind == "named" else (kind, moved(number, by))


def view(v: View, me: str, t: Timing, *, shift_ns: int = 0, by: int = 0) -> View:
    """The normal form `shift_ns` later and `by` revisions of cluster_state later."""
    past = partial(_past, shift_ns=shift_ns)
    wait = t.failover_ns // UNIT + 1
    patience = 2 * (t.interval_ns + t.timeout_ns) // UNIT
    others = [n for n in v.members if n != me]
    own_stamp_ns = past(v.own_stamp_ns, 2 * wait)
    primary = v.cluster.primary if v.cluster is not None else None
    stamp_ns, quiet = 0, 0  # of a vacancy, and of what is our own, nothing is stale
    if primary not in {None, me}:
        # It counts by how far it is behind our own.
        stamp_ns = v.stamp_ns - shift_ns if v.stamp_ns else 0
        stamp_ns = max(stamp_ns, (own_stamp_ns or NOW) - (wait + 1) * UNIT) if stamp_ns else 0
        quiet = wait + patience
    elif primary is None:
        quiet = patience
    order = v.order
    if order is not None:
        longest = max(2, FOLLOW_PAUSE_NS * 2 ** min(v.follows, FOLLOW_PAUSES + 1) // (2 * UNIT))
        order = replace(
            order,
            sent_ns=past(order.sent_ns, longest),
            done_ns=past(order.done_ns, 2) if order.done_ns else 0,
            refused="refused" if order.refused else "",
        )
    records = v.lead_records if v.lead.running else ()
    return replace(
        v,
        row=0,
        why="",
        entered=(0, ""),
        counter=COUNTER,
        last_step_ns=past(v.last_step_ns, t.interval_ns / UNIT + t.timeout_ns / UNIT + 1),
        cluster=cluster(v.cluster) if v.cluster is not None else None,
        revision=moved(v.revision, by),
        stamp_ns=stamp_ns,
        first_seen_ns=past(v.first_seen_ns, t.settle_ns / UNIT),
        silent_from_ns=past(v.silent_from_ns, quiet),
        lead=_register(v.lead, shift_ns, by),
        lead_records=tuple(replace(cluster(r), attempt=r.attempt) for r in records),
        lead_sent_ns=past(v.lead_sent_ns, max(t.interval_ns, t.timeout_ns) / UNIT),
        lease_until_ns=past(v.lease_until_ns, 0),
        reserving=min(v.reserving, 1),
        reserved=min(v.reserved, 1),
        renewed=(v.renewed[0], v.renewed[1] - shift_ns) if v.renewed[1] - shift_ns > NOW else ((0, 0), 0),
        claim_pause_until_ns=_future(v.claim_pause_until_ns, shift_ns),
        members=Fixed({n: _seen_moved(member(v.members[n], t), by) for n in others}),
        member_revision=Fixed({n: v.member_revision[n] for n in others}),
        member_changed_ns=Fixed({n: past(v.member_changed_ns[n], wait) for n in others}),
        own=_register(v.own, shift_ns, 0),
        own_sent_ns=past(v.own_sent_ns, max(t.interval_ns, t.timeout_ns) / UNIT),
        own_stamp_ns=own_stamp_ns,
        occasion=_occasion(v.occasion, by),
        urged_ns=past(v.urged_ns, 1),  # nothing that it waits for takes a unit
        asked_ns=0,
        refreshing_until_ns=_future(v.refreshing_until_ns, shift_ns),
        refreshed_ns=past(v.refreshed_ns, t.interval_ns / UNIT),
        failures=min(v.failures, t.failure_threshold),
        successes=min(v.successes, t.success_threshold),
        failed_why="",
        losses=(),
        crashes=(),  # of them only the newest counts: the budget of the model is 0
        refused=(v.refused[0], "") if v.refused is not None else None,
        named_ns=past(v.named_ns, wait) if v.successor is not None else 0,
        handover_pause_until_ns=0,
        marks=Marks(v.marks.term, moved(v.marks.revision, by)),
        kept=Marks(v.marks.term, moved(v.marks.revision, by)),
        kept_ns=NOW,
        streams=0,  # without WAL nothing diverges, and rejoin.mode is off
        unstreamed_ns=0,
        follows=min(v.follows, FOLLOW_PAUSES + 1),
        own_back_ns=0,
        went_back_ns=past(v.went_back_ns, t.lease_ns / UNIT + 1),
        fencer=None,
        db=None,
        db_ns=0,
        order=order,
    )
