"""What a chaos campaign does, from its seed alone: rounds of faults, each with when, how long and where.

Pure. Where a fault strikes is a role; which host that is, the cluster decides as it runs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

Shape = Literal["alone", "together", "rejoin", "handover"]
SHAPES: dict[Shape, int] = {"alone": 2, "together": 4, "rejoin": 3, "handover": 2}  # how often each comes
Role = Literal["primary", "standby", "other", "leading"]  # leading: whoever acknowledges when it strikes
ROLES: tuple[Role, ...] = ("primary", "primary", "leading", "standby", "other")
TOGETHER_S, REJOIN_S, HANDOVER_S = 3.0, 5.0, 1.5
SWITCHOVER = "switchover"


class Event(msgspec.Struct, frozen=True):
    """One fault. Seconds from the round's begin; `pick` (0 to 1) chooses what the fault leaves open."""

    fault: str
    role: Role
    at_s: float
    lasts_s: float
    pick: float

    @property
    def until_s(self) -> float:
        return self.at_s + self.lasts_s


class Round(msgspec.Struct, frozen=True):
    """Faults that strike a healthy cluster; all of them are undone in its end."""

    number: int
    shape: Shape
    events: tuple[Event, ...]


def rounds(seed: int, faults: Sequence[str]) -> Iterator[Round]:
    """For ever. Every fault comes once before one comes again."""
    chance = random.Random(seed)
    deck: list[str] = []
    number = 0

    def event(at_s: float, fault: str = "") -> Event:
        if not fault and not deck:
            deck.extend(faults)
            chance.shuffle(deck)
        return Event(
            fault=fault or deck.pop(),
            role=chance.choice(ROLES),
            at_s=round(at_s, 3),
            # Blinks, about a failover, and beyond it: what is hard lies at the edges of timeouts.
            lasts_s=round(chance.uniform(*chance.choice([(0.1, 2.0), (2.0, 7.0), (5.0, 12.0)])), 3),
            pick=round(chance.random(), 3),
        )

    while True:
        number += 1
        shape = chance.choices(list(SHAPES), list(SHAPES.values()))[0]
        if shape == "handover":
            first = event(chance.uniform(0.0, HANDOVER_S), SWITCHOVER)
            events = (first, event(chance.uniform(0.0, 2 * HANDOVER_S)))
        else:
            first = event(0.0)
            after = {"together": min(first.lasts_s, TOGETHER_S), "rejoin": REJOIN_S}
            start = first.until_s if shape == "rejoin" else 0.0
            more = () if shape == "alone" else (event(start + chance.uniform(0.0, after[shape])),)
            events = (first, *more)
        yield Round(number, shape, events)
