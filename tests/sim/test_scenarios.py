"""Scenario texts: above the line what happens to the hosts, below it what the nodes decide and why.

The world is the simulator's with nothing lost and nothing late; `--rewrite` writes what is seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.world import World

FOLDER = Path(__file__).parent / "scenarios"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda p: p.stem)
def test_scenario(path: Path, rewrite: bool) -> None:
    """W1 to W9 as a person reads them: failover, flap, zombie, outage, restart."""
    head, _, expected = path.read_text().partition("----\n")
    events: list[tuple[float, str, str]] = []
    end_s = 0.0
    for line in head.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        at, what, *name = line.split()
        if at == "end":
            end_s = float(what)
        else:
            events.append((float(at), what, name[0] if name else ""))
    world = World(1)
    world.script(events, end_s)
    seen = "\n".join(world.trace) + "\n"
    if rewrite:
        path.write_text(f"{head}----\n{seen}")
    else:
        assert seen == expected
