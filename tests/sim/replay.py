"""Replay one seed: `python -m tests.sim.replay SEED` shrinks it and prints its trace; `--all` leaves all its faults.

`python -m tests.sim.replay --hours 200000` runs that many simulated hours over all cores (`make sim-long`).
"""

from __future__ import annotations

import argparse
import sys

from tests.sim.campaign import explain, fails, run_all, seeds_for
from tests.sim.world import Rules, World


def main() -> int:
    """The exit code: 1 when an invariant was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.replay", description=__doc__)
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--all", action="store_true", help="leave all faults of the seed")
    parser.add_argument("--hours", type=float, help="run so many simulated hours from seed --first on")
    parser.add_argument("--first", type=int, default=0)
    o = parser.parse_args()
    if o.hours is not None:
        count = seeds_for(o.hours, o.first)
        tally = run_all(o.first, count, told_every_s=60.0)
        sys.stdout.write(tally.text() + "\n")
        for seed, _ in sorted(tally.failures)[:1]:
            sys.stdout.write(explain(seed) + "\n")
        return 1 if tally.failures else 0
    if o.seed is None:
        parser.error("a seed, or --hours")
    why, world = fails(o.seed, World(o.seed).faults, Rules())
    if why and not o.all:
        sys.stdout.write(explain(o.seed) + "\n")
        return 1
    sys.stdout.write("\n".join((*world.trace, why or "no invariant was broken")) + "\n")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
