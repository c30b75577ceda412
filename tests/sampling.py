"""What repeats itself is sampled in `make test` and whole in `make test-all`; samples move on from run to run.

A turn is a number of the run (minutes since 1970, unless TESTS_TURN says another). Without one everything runs, so
that a test which is asked for by its name runs whole. `@pytest.mark.sampled(n)` on a parametrised test keeps n of its
cases at a turn; below 1, that share of them; 0: it runs in `make test-all` alone. Tests with `group="NAME"` are sampled
as the cases of one. The window moves on with the turn, so that every case has its day.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import pytest

TURN = "TESTS_TURN"
T = TypeVar("T")


def turn() -> int | None:
    """This run's number; None: everything runs. Raises ValueError where the variable holds no number."""
    said = os.environ.get(TURN)
    return int(said) if said else None


def chosen(cases: Sequence[T], count: float) -> Sequence[T]:
    """`count` of the cases (below 1: that share, at least one) at this turn; all of them without one."""
    at = turn()
    count = math.ceil(len(cases) * count) if count < 1 else int(count)
    if at is None or count >= len(cases):
        return cases
    first = at * count % len(cases)
    return [cases[(first + i) % len(cases)] for i in range(count)]


def drop(items: Iterable[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(what runs at this turn, what is left to others), in their order."""
    items = list(items)
    groups: dict[str, list[pytest.Item]] = {}
    counts: dict[str, float] = {}
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None:
            name = mark.kwargs.get("group") or item.nodeid.partition("[")[0]
            groups.setdefault(name, []).append(item)
            counts[name] = mark.args[0]
    left = {i for name, group in groups.items() for i in set(group) - set(chosen(group, counts[name]))}
    return [i for i in items if i not in left], [i for i in items if i in left]
