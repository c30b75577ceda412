"""What the failover bench claims, computed from what its clients recorded, and from nothing else.

Pure functions over CLOCK_BOOTTIME nanoseconds (one machine, one clock). An acknowledgement counts at the moment when
the client read it. They judge no peer and read neither clock nor database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import msgspec

NS = 1_000_000_000
SILENCE_NS = (
    NS // 2
)  # a host that acknowledged nothing for longer is not taken to have been writable in between


class Ack(msgspec.Struct, frozen=True):
    """One row that a client saw acknowledged by `host`."""

    id: int
    sent_ns: int
    acked_ns: int
    host: str
    timeline: int = 0  # PostgreSQL's, where the row was written; 0: not noted


class Figures(msgspec.Struct, frozen=True):
    """One repeat. Seconds from the fault, None where it did not happen; counts of rows."""

    outage_s: (
        float | None
    )  # the client's longest pause that ended after the fault; None: it never wrote again
    old_stopped_s: (
        float | None
    )  # the old primary's last acknowledgement; None: it stayed, or came back, as primary
    new_first_s: float | None  # the first acknowledgement by another host; None: the primary was not replaced
    overlap_s: float  # two hosts acknowledged local writes
    late_rows: int  # acknowledged by the old primary after the new one's first acknowledgement
    acknowledged: int
    lost_client: int
    lost_local: int


def parse(text: str) -> list[Ack]:
    """`A id sent acked host [timeline]` lines; other lines, and a last one cut short, are left out."""
    found: list[Ack] = []
    for line in text.splitlines(keepends=True):
        words = line.split()
        if line.endswith("\n") and len(words) in {5, 6} and words[0] == "A":
            timeline = int(words[5]) if len(words) == 6 else 0
            found.append(Ack(int(words[1]), int(words[2]), int(words[3]), words[4], timeline))
    return found


def parse_unknown(text: str) -> set[int]:
    """`R time id` lines: rows that were sent, and not acknowledged. They may be in the database, or not."""
    lines = (line.split() for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return {int(words[2]) for words in lines if len(words) == 3 and words[0] == "R"}


def outage_s(client: Sequence[Ack], fault_ns: int) -> float | None:
    """The longest time between two consecutive acknowledgements of which the later comes after the fault."""
    times = sorted(ack.acked_ns for ack in client)
    gaps = [later - earlier for earlier, later in pairwise(times) if later > fault_ns]
    return max(gaps) / NS if gaps else None


def intervals(acks: Iterable[Ack]) -> list[tuple[int, int]]:
    """When a host acknowledged: from one to the next, broken by silence. A lone one has no length."""
    found: list[tuple[int, int]] = []
    for at in sorted(ack.acked_ns for ack in acks):
        if found and at - found[-1][1] <= SILENCE_NS:
            found[-1] = (found[-1][0], at)
        else:
            found.append((at, at))
    return found


def overlap_s(hosts: Mapping[str, Iterable[Ack]]) -> float:
    """Seconds in which two or more hosts were inside one of their intervals."""
    edges = sorted(
        (
            edge
            for acks in hosts.values()
            for span in intervals(acks)
            for edge in ((span[0], 1), (span[1], -1))
        ),
        key=lambda edge: (edge[0], -edge[1]),
    )
    total = inside = previous = 0
    for at, change in edges:
        if inside >= 2:
            total += at - previous
        inside += change
        previous = at
    return total / NS


def lost(acks: Iterable[Ack], stored: Iterable[int]) -> list[Ack]:
    """Rows that were acknowledged and are not in the database."""
    there = set(stored)
    return [ack for ack in acks if ack.id not in there]


def figures(
    client: Sequence[Ack],
    local: Mapping[str, Sequence[Ack]],
    stored: Iterable[int],
    *,
    fault_ns: int,
    old: str,
    last: str,
) -> Figures:
    """Everything about one repeat: `old` was the primary at the fault, `last` is it at the end."""
    everything = [*client, *(ack for acks in local.values() for ack in acks)]
    after = [ack for ack in everything if ack.acked_ns > fault_ns]
    new_ns = min((ack.acked_ns for ack in after if ack.host != old), default=None)
    stopped_ns = max([fault_ns, *(ack.acked_ns for ack in after if ack.host == old)])
    there = set(stored)
    return Figures(
        outage_s=outage_s(client, fault_ns),
        old_stopped_s=(stopped_ns - fault_ns) / NS if last != old else None,
        new_first_s=(new_ns - fault_ns) / NS if new_ns is not None else None,
        overlap_s=overlap_s(local),
        late_rows=sum(
            new_ns is not None and last != old and a.host == old and a.acked_ns > new_ns for a in after
        ),
        acknowledged=len(everything),
        lost_client=len(lost(client, there)),
        lost_local=sum(len(lost(acks, there)) for acks in local.values()),
    )
