"""The rules that bench/mutate.py breaks, by area: one module for each part of the tree."""

from __future__ import annotations

from bench.mutants import agent, cli, comeback, core, fencer, host, shells, store, supervisor, timing, verdict
from bench.mutants.rule import Rule

AREAS: dict[str, list[Rule]] = {
    "core": core.RULES,
    "fencer": fencer.RULES,
    "shells": shells.RULES,
    "agent": agent.RULES,
    "cli": cli.RULES,
    "store": store.RULES,
    "supervisor": supervisor.RULES,
    "timing": timing.RULES,
    "host": host.RULES,
    "comeback": comeback.RULES,
    "verdict": verdict.RULES,
}
RULES: list[Rule] = [rule for rules in AREAS.values() for rule in rules]
