"""Whether a cluster broke its promises, from what its clients recorded and read back, and from nothing else.

Pure functions over CLOCK_BOOTTIME nanoseconds (one machine, one clock). PostgreSQL committed a row somewhere between
`sent` and `acked`; only what holds wherever that was is called a violation. They know no peer, and excuse nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import msgspec

from bench.ha.records import NS, Ack, lost
from harmony.core.timing import Timing

ELECTION_S = 10.0  # JetStream's, of a stream's leader: 4.4 to 8.3 s were seen, etcd is faster
RESTART_S = 10.0  # a supervisor's longest back-off, and PostgreSQL's crash recovery
COPY_S = 20.0  # pg_rewind or pg_basebackup of the small databases here, with the starts around it
MOST_ROWS = 5  # named in one violation; their number is told


class Violation(msgspec.Struct, frozen=True):
    """A promise that was broken: which one, what was seen, when (nanoseconds; 0: only seen at the end)."""

    kind: str
    what: str
    at_ns: int = 0


class Bounds(msgspec.Struct, frozen=True):
    """Seconds after the last fault was undone: until the client writes, and until every host has its rows."""

    writes_s: float
    back_s: float
    settle_s: float  # by then every lease from before has ended, and its fence is done


def bounds(timing: Timing, rejoin_after_s: float) -> Bounds:
    """Derived from a preset (docs/chaos.md): an election, a restart, two silences that do not quite meet; a rejoin.

    `rejoin_after_s`: how long a standby waits before it is rewound; its second try comes after a pause of 5 s.
    """
    writes_s = ELECTION_S + RESTART_S + 2 * timing.failover_timeout_s
    settle_s = timing.lease_s + timing.stop_s
    return Bounds(writes_s, writes_s + settle_s + rejoin_after_s + 2 * COPY_S + 5.0, settle_s)


def lost_rows(acks: Iterable[Ack], stored: Mapping[str, Collection[int]]) -> list[Violation]:
    """Acknowledged rows that a host does not have. Give only rows that every host must have replayed by now."""
    known = list(acks)
    found: list[Violation] = []
    for host, ids in stored.items():
        gone = lost(known, ids)
        if gone:
            shown = ", ".join(f"{a.id} (by {a.host}, timeline {a.timeline})" for a in gone[:MOST_ROWS])
            what = f"{len(gone)} acknowledged rows are not on {host}: {shown}"
            found.append(Violation("lost", what, gone[0].acked_ns))
    return found


def overlaps(acks: Iterable[Ack]) -> list[Violation]:
    """Two writable primaries: by timelines, which each promotion begins anew and higher.

    Two hosts that acknowledge on the same timeline; or a row that was *sent* on a timeline after one on a higher
    timeline had been *acknowledged* by another host.
    """
    found: list[Violation] = []
    spans: dict[tuple[int, str], tuple[Ack, Ack]] = {}  # first acknowledged, last sent
    for ack in acks:
        first, last = spans.get((ack.timeline, ack.host), (ack, ack))
        spans[ack.timeline, ack.host] = (
            min(first, ack, key=lambda a: a.acked_ns),
            max(last, ack, key=lambda a: a.sent_ns),
        )
    ordered = sorted(spans.items())
    for at, ((timeline, host), (_, last)) in enumerate(ordered):
        for (newer, other), (first, _) in ordered[at + 1 :]:
            if host == other:
                continue
            if timeline == newer:
                what = f"{host} and {other} both acknowledged on timeline {timeline}"
                found.append(Violation("overlap", what, first.acked_ns))
            elif last.sent_ns > first.acked_ns:
                late_s = (last.sent_ns - first.acked_ns) / NS
                what = (
                    f"{host} took row {last.id} on timeline {timeline}, sent {late_s:.3f} s after {other} had"
                )
                found.append(
                    Violation("overlap", f"{what} acknowledged {first.id} on {newer}", first.acked_ns)
                )
    return found


def inconsistent(stored: Mapping[str, Sequence[int]], sent: Collection[int]) -> list[Violation]:
    """What was read back when nobody wrote any more: each id once, none that nobody sent, the same on all hosts."""
    found: list[Violation] = []
    whole: set[int] = set().union(*stored.values())
    for host, ids in stored.items():
        there = set(ids)
        for rows, what in (
            (there - set(sent), "rows that nobody sent"),
            (whole - there, "rows missing that another host has"),
        ):
            if rows:
                found.append(Violation("inconsistent", f"{host}: {what}: {_some(rows)}"))
        if len(ids) > len(there):
            found.append(Violation("inconsistent", f"{host}: {len(ids) - len(there)} rows are there twice"))
    return found


def outage_s(client: Sequence[Ack], healed_ns: int, end_ns: int) -> float:
    """The client's longest time without an acknowledgement between the end of all faults and `end_ns`.

    A fault's effect may come after its end: a lease that was nearly over ends then. Give it that time.
    """
    after = sorted(a.acked_ns for a in client if a.sent_ns > healed_ns and a.acked_ns <= end_ns)
    return max(later - earlier for earlier, later in pairwise([healed_ns, *after, end_ns])) / NS


def slow(waited_s: float, bound_s: float, what: str, healed_ns: int) -> list[Violation]:
    """A recovery that took longer than it may."""
    if waited_s <= bound_s:
        return []
    told = f"{what} for {waited_s:.1f} s although all was healed; the bound is {bound_s:g} s"
    return [Violation("slow", told, healed_ns)]


def _some(rows: Collection[int]) -> str:
    return f"{len(rows)} ({', '.join(map(str, sorted(rows)[:MOST_ROWS]))})"
