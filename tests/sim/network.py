"""Links: from each host to the store, one for each direction, and between hosts for replication.

Faults nest: a way is open when nothing blocks it. It carries nothing itself; the store and PostgreSQL ask it.
"""

from __future__ import annotations

import random


class Link:
    """One host's way to the store. The shares are of 1; `late_ns` is by how much a late request comes too late."""

    __slots__ = ("acks_lost", "answers", "late", "late_ns", "lost", "requests", "slow", "stale_ns", "watch")

    def __init__(self) -> None:
        self.requests = 0  # what blocks the way there
        self.answers = 0  # what blocks the way back
        self.watch = 0  # what silences the watch
        self.lost = self.acks_lost = self.late = 0.0
        self.late_ns = 0
        self.slow = 1.0
        self.stale_ns = 0  # reads are answered by a follower that is so far behind, at the most


class Network:
    """All links of a world."""

    def __init__(self, names: tuple[str, ...], latency_ns: int) -> None:
        self.links = {n: Link() for n in names}
        self._latency_ns = latency_ns
        self._apart: dict[frozenset[str], int] = {}

    def delay(self, link: Link, rng: random.Random) -> int:
        """One way, in nanoseconds."""
        return int((0.05 + 0.95 * rng.random()) * self._latency_ns * link.slow) + 1

    def replicates(self, one: str, other: str) -> bool:
        return not self._apart or not self._apart.get(frozenset((one, other)))

    def part(self, one: str, other: str, by: int) -> None:
        """Block (1) or open (-1) the way between two hosts."""
        pair = frozenset((one, other))
        self._apart[pair] = self._apart.get(pair, 0) + by
        if not self._apart[pair]:
            del self._apart[pair]
