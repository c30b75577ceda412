"""Scenario texts: above the line what happens and when, below it what the nodes decide and why.

The world is the simulator's with nothing lost and nothing late; `--rewrite` writes what is seen. A line above is
`SECONDS KIND [NAME] [OTHER] [for SECONDS] [by AMOUNT]`, with the kinds of faults.py; `end SECONDS`; or a `# remark`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harmony.core.timing import NS
from tests.sim.faults import Fault
from tests.sim.setting import plain
from tests.sim.world import World

FOLDER = Path(__file__).parent / "scenarios"


def parsed(line: str) -> Fault:
    """One line of a scenario's head."""
    at, kind, *rest = line.split()
    span = amount = 0.0
    if len(rest) > 1 and rest[-2] == "by":
        amount, rest = float(rest[-1]), rest[:-2]
    if len(rest) > 1 and rest[-2] == "for":
        span, rest = float(rest[-1]), rest[:-2]
    name, other = (*rest, "", "")[:2]
    return Fault(round(float(at) * NS), kind, name, other, round(span * NS), amount)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda p: p.stem)
def test_scenario(path: Path, rewrite: bool) -> None:
    """W1 to W9 as a person reads them: failover, flap, zombie, hand-over, outage, distrust, restart."""
    head, _, expected = path.read_text().partition("----\n")
    lines = [line for line in head.splitlines() if line.strip() and not line.startswith("#")]
    ends = [float(line.split()[1]) for line in lines if line.startswith("end ")]
    events = [parsed(line) for line in lines if not line.startswith("end ")]
    world = World(1, known=plain(), done=events)
    world.script(ends[0])
    seen = "\n".join(line.rstrip() for line in world.trace) + "\n"
    if rewrite:
        path.write_text(f"{head}----\n{seen}")
    else:
        assert seen == expected
