"""Seeded simulation of three nodes: I1 to I4 at every change, I5 after healing.

Replay one seed: `python -m tests.sim.test_sim SEED` from the top folder prints its trace.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests.sim.world import Rules, Violation, World

SEEDS = int(os.environ.get("SEEDS", "1200"))
CHUNKS = 16


def explain(seed: int, world: World, e: Violation) -> str:
    tail = "\n".join(world.trace[-60:])
    return f"seed {seed}: {e}\nreplay: python -m tests.sim.test_sim {seed}\n{tail}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_violation(chunk: int) -> None:
    """I1 to I5, D1, D5 to D7, D9, W4, W6, W8, W9 under lost and late writes, cuts, freezes, crashes, clock jumps."""
    for seed in range(chunk * SEEDS // CHUNKS, (chunk + 1) * SEEDS // CHUNKS):
        world = World(seed)
        try:
            world.run()
        except Violation as e:
            pytest.fail(explain(seed, world, e))


def first_violation(rules: Rules, drift: float = 1e-3, seeds: int = 400) -> str:
    for seed in range(seeds):
        try:
            World(seed, rules=rules, drift=drift).run()
        except Violation as e:
            if not str(e).startswith("I5"):
                return str(e)
    return ""


@pytest.mark.parametrize(
    "rules",
    [
        Rules(fencer_checks_lease=False),
        Rules(store_checks_revision=False),
        Rules(fencer_proves=False),
    ],
    ids=["no lease check", "no compare-and-set", "no proof of the fence"],
)
def test_broken_assumption_is_found(rules: Rules) -> None:
    """The checker can fail: each assumption that is broken on purpose is found out."""
    assert first_violation(rules)


def test_drift_beyond_the_margin_is_found() -> None:
    """I1 rests on bounded clock drift: beyond the margin the simulation must find two primaries."""
    assert first_violation(Rules(), drift=0.95)


if __name__ == "__main__":
    w = World(int(sys.argv[1]))
    try:
        w.run()
    finally:
        sys.stdout.write("\n".join(w.trace) + "\n")
