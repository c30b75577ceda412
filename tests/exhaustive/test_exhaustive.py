"""Every state of two nodes and the store within small bounds: I1, I3, I4 and I6 hold in each of them.

EXHAUSTIVE=large explores more (docs/checking.md has the numbers). A violation is printed as a shortest path.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from harmony.core.states import State as Workflow
from harmony.core.timing import Timing
from tests.exhaustive.agent import Setting
from tests.exhaustive.explore import Goal, Result, calm, explore
from tests.exhaustive.model import FAULTS, Model, State

pytestmark = pytest.mark.computes

LARGE = os.environ.get("EXHAUSTIVE") == "large"


def timing(threshold: int = 1, failover: float | None = None) -> Timing:
    """Units of a second. The lease is 1 + threshold, the fence takes 1: anything less than that is too short."""
    return Timing(
        heartbeat_interval_s=1,
        heartbeat_timeout_s=1,
        failure_threshold=threshold,
        success_threshold=1,
        fence_timeout_s=1,
        safety_margin_s=0,
        failover_timeout_s=threshold + 2.001 if failover is None else failover,
    )


def _leads(node: int, how: str) -> Goal:
    """That node's PostgreSQL is the writable primary of the newest term, which it took in this way."""

    def reached(m: Model, s: State) -> bool:
        owners = m.stores.values[s.store].owners
        postgres = m.nodes.values[s.nodes[node]].host.postgres
        return postgres == "primary" and owners[-1:] == ((f"n{node + 1}", how),)

    return reached


def _calm(m: Model, s: State) -> bool:
    first, second = (m.nodes.values[n] for n in s.nodes)
    states = (first.view.state, second.view.state)
    return states == (Workflow.HEALTHY, Workflow.WATCHING) and second.host.postgres == "standby"


def _fenced(m: Model, s: State) -> bool:
    return any(n.host.proven and n.host.newest is not None for n in (m.nodes.values[i] for i in s.nodes))


FOUNDED = _leads(0, "founded")
TAKEN = _leads(1, "stale")
VACANCY = _leads(1, "vacancy")
HANDED = _leads(1, "handed over")


@dataclass(frozen=True)
class Bounds:
    """Of one exploration. `floor`: fewer states would mean that it has silently become empty."""

    floor: int
    goals: dict[str, Goal]
    start: str = "empty"
    faults: int = 0
    kinds: frozenset[str] = frozenset()
    terms: int = 2
    depth: int = 1000
    complete: bool = False
    threshold: int = 1


EVERY_GOAL = {"elected": FOUNDED, "calm": _calm, "fenced": _fenced, "failover": TAKEN, "vacancy": VACANCY}
ASKED = {"handed over": HANDED}
ASK = frozenset({"ask"})
SMALL = {
    "messages": Bounds(100_000, EVERY_GOAL, terms=3, complete=True),
    "longer leases": Bounds(65_000, EVERY_GOAL, threshold=2, complete=True),
    "faults": Bounds(110_000, {"fenced": _fenced}, start="calm", faults=1, kinds=FAULTS, depth=12),
    "hand-over": Bounds(35_000, ASKED, start="calm", faults=1, kinds=ASK, depth=21),
}
MORE = {
    "hand-over, whole": Bounds(250_000, ASKED, faults=1, kinds=ASK, complete=True),
    "faults, deeper": Bounds(500_000, {"failover": TAKEN}, start="calm", faults=1, kinds=FAULTS, depth=16),
    "two faults": Bounds(370_000, {"fenced": _fenced}, start="calm", faults=2, kinds=FAULTS, depth=9),
}
ALL = SMALL | (MORE if LARGE else {})


def run(b: Bounds, setting: Setting | None = None) -> Result:
    model = Model(setting or Setting(timing(b.threshold)), b.faults, b.kinds, b.terms)
    start = calm(model) if b.start == "calm" else model.empty()
    result = explore(model, [start], depth=b.depth, goals=b.goals)
    print(f"{result}\n{model.beyond} writes of a term beyond {b.terms} were left out")
    return result


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ALL)
def test_no_violation(name: str) -> None:
    """I1, I3, I4, I6, in every state within the bounds; and these are neither empty nor without events."""
    b = ALL[name]
    result = run(b)
    assert not result.violation, str(result)
    assert result.states >= b.floor
    assert set(result.goals) == set(b.goals)
    assert result.complete or not b.complete


def test_the_timing_is_tight() -> None:
    """A unit less, and the configuration would be refused."""
    for threshold in (1, 2):
        assert timing(threshold).violation() is None
        assert timing(threshold, failover=threshold + 2).violation() is not None


def test_the_calm_start_is_calm() -> None:
    model = Model(Setting(timing()), 0, frozenset())
    s = calm(model)
    assert _calm(model, s)
    assert model.stores.values[s.store].owners == (("n1", "founded"),)


RIGHT = timing()
BROKEN = {
    "no compare-and-set": (Setting(RIGHT, checks_revision=False), "I4", frozenset[str]()),
    "no check of the generation": (Setting(RIGHT, checks_generation=False), "I3", frozenset({"late"})),
    "failover too early": (Setting(timing(failover=2.0)), "I1", frozenset[str]()),
    "no dead-man's switch": (Setting(RIGHT, fences_itself=False), "I1", frozenset({"pause"})),
    "no proof of the fence": (Setting(RIGHT, proves=False), "I", frozenset({"postgres"})),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str) -> None:
    """The check can fail: each assumption that is broken on purpose is found out, by a path that can be read."""
    setting, invariant, kinds = BROKEN[name]
    b = Bounds(0, {}, faults=len(kinds), kinds=kinds, depth=20)
    result = run(b, setting)
    assert result.violation.startswith(invariant), str(result)
    assert result.trace[-1].startswith("VIOLATION")
