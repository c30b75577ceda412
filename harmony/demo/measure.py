"""What the demo claims, computed from what was recorded: lost rows, outage, time with two writable primaries.

Pure functions over recorded times (CLOCK_BOOTTIME, nanoseconds); they read no clock and no database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

NS = 1_000_000_000
SPAN_BREAK_NS = NS  # a node that acknowledged nothing for this long is not assumed writable in between


@dataclass(frozen=True)
class Ack:
    """One write that a client saw acknowledged, sent and answered at these CLOCK_BOOTTIME nanoseconds."""

    id: int
    sent_ns: int
    acked_ns: int
    port: int


@dataclass(frozen=True)
class Recording:
    """One recorder's file: acknowledged writes in order, and when it was refused (read-only, no server)."""

    acks: tuple[Ack, ...] = ()
    refused_ns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Span:
    """From the send of a node's first to the answer of its last write in a row: it was writable in it."""

    start_ns: int
    end_ns: int


def parse(lines: Iterable[str]) -> Recording:
    """Read `A id sent acked port` and `R time` lines; a last line cut short is left out."""
    acks: list[Ack] = []
    refused: list[int] = []
    for line in lines:
        if not line.endswith("\n"):
            break
        match line.split():
            case ["A", number, sent, acked, port]:
                acks.append(Ack(int(number), int(sent), int(acked), int(port)))
            case ["R", at]:
                refused.append(int(at))
            case _:
                pass
    return Recording(tuple(acks), tuple(refused))


def lost_rows(acknowledged: Iterable[int], stored: Iterable[int]) -> tuple[int, ...]:
    """Ids that a client saw acknowledged and that are not in the database, ascending."""
    return tuple(sorted(set(acknowledged) - set(stored)))


def outage_s(acks: Sequence[Ack], fault_ns: int) -> float:
    """The longest time between two consecutive acknowledgements of which the later comes after the fault.

    With no acknowledgement after the fault it is infinite.
    """
    times = sorted(ack.acked_ns for ack in acks)
    gaps = [later - earlier for earlier, later in pairwise(times) if later >= fault_ns]
    return max(gaps) / NS if gaps else float("inf")


def spans(recording: Recording) -> tuple[Span, ...]:
    """A node's writable spans: broken where it refused in between, or was silent for SPAN_BREAK_NS."""
    found: list[Span] = []
    refused = sorted(recording.refused_ns)
    position = 0
    for ack in sorted(recording.acks, key=lambda a: a.sent_ns):
        if found:
            last = found[-1]
            while position < len(refused) and refused[position] <= last.end_ns:
                position += 1
            broken = position < len(refused) and refused[position] <= ack.sent_ns
            if not broken and ack.sent_ns - last.end_ns <= SPAN_BREAK_NS:
                found[-1] = Span(last.start_ns, max(last.end_ns, ack.acked_ns))
                continue
        found.append(Span(ack.sent_ns, ack.acked_ns))
    return tuple(found)


def dual_primary_s(nodes: Mapping[str, Recording]) -> float:
    """Seconds in which two or more nodes were inside one of their writable spans.

    Spans run from the first send to the last answer, so it errs towards reporting more, never less.
    """
    edges: list[tuple[int, int]] = []
    for recording in nodes.values():
        for span in spans(recording):
            edges += [(span.start_ns, 1), (span.end_ns, -1)]
    total = writable = 0
    previous = 0
    for at, change in sorted(edges, key=lambda edge: (edge[0], -edge[1])):
        if writable >= 2:
            total += at - previous
        writable += change
        previous = at
    return total / NS


def last_ack_s(recording: Recording, fault_ns: int, until_ns: int | None = None) -> float:
    """Seconds from the fault to the node's last acknowledged write (before `until_ns`, where given).

    0.0 when none was acknowledged after the fault.
    """
    after = [a.acked_ns for a in recording.acks if until_ns is None or a.acked_ns < until_ns]
    return max(0.0, (max(after) - fault_ns) / NS) if after else 0.0
