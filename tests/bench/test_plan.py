"""A chaos campaign's plan: the same for the same seed, everything comes, and it overlaps as its shapes say."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from bench.ha.faults import FAULTS
from bench.ha.plan import SHAPES, SWITCHOVER, rounds

MANY = 400


def test_the_seed_decides_everything() -> None:
    names = list(FAULTS)
    assert list(islice(rounds(7, names), 50)) == list(islice(rounds(7, names), 50))
    assert list(islice(rounds(7, names), 50)) != list(islice(rounds(8, names), 50))


def test_every_fault_comes_as_often_as_another() -> None:
    counts = Counter(
        e.fault for r in islice(rounds(1, list(FAULTS)), MANY) for e in r.events if e.fault != SWITCHOVER
    )
    assert set(counts) == set(FAULTS) - {SWITCHOVER}
    assert (
        max(counts.values()) - min(counts.values()) <= 2
    )  # a deck's rest, and a hand-over's switchover from it


def test_shapes() -> None:
    found = list(islice(rounds(2, list(FAULTS)), MANY))
    assert {r.shape for r in found} == set(SHAPES)
    assert {e.role for r in found for e in r.events} == {"primary", "leading", "standby", "other"}
    for r in found:
        first, *more = r.events
        assert len(more) == (0 if r.shape == "alone" else 1)
        assert all(0.1 <= e.lasts_s <= 12.0 and 0 <= e.pick <= 1 for e in r.events)
        if r.shape == "together":
            assert more[0].at_s <= first.until_s  # both at once
        if r.shape == "rejoin":
            assert first.until_s <= more[0].at_s <= first.until_s + 5.0  # while what was hit comes back
        if r.shape == "handover":
            assert first.fault == SWITCHOVER
            assert abs(more[0].at_s - first.at_s) <= 3.0
