"""Breadth-first exploration: the first violation found is at the end of a shortest path."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.exhaustive.host import Violation
from tests.exhaustive.model import Model, State


@dataclass
class Result:
    """What an exploration has seen. `complete`: nothing was left to explore within the bounds."""

    states: int = 0
    transitions: int = 0
    complete: bool = False
    depth: int = 0
    violation: str = ""
    trace: list[str] = field(default_factory=list)
    goals: dict[str, list[str]] = field(default_factory=dict)


Goal = Callable[[Model, State], bool]


def explore(
    model: Model, starts: list[State], goals: dict[str, Goal], *, depth: int, states: int
) -> Result:
    """All states reachable from `starts` by at most `depth` transitions; no more than about `states`."""
    result = Result()
    seen: dict[State, int] = {s: n for n, s in enumerate(starts)}
    parents: list[tuple[int, str]] = [(-1, "")] * len(seen)
    frontier = list(seen)
    open_goals = dict(goals)

    def path(number: int) -> list[str]:
        steps = []
        while number >= 0:
            number, label = parents[number]
            steps.append(label)
        return steps[-2::-1]

    for result.depth in range(depth):
        following: list[State] = []
        for s in frontier:
            number = seen[s]
            label = ""
            try:
                for label, after in model.next(s):  # noqa: B007 (it is told when the next one breaks)
                    result.transitions += 1
                    if after in seen:
                        continue
                    seen[after] = len(parents)
                    parents.append((number, label))
                    following.append(after)
                    model.check(after)
                    for name in [n for n, goal in open_goals.items() if goal(model, after)]:
                        result.goals[name] = path(seen[after])
                        del open_goals[name]
            except Violation as e:
                result.violation = str(e)
                broken = len(parents) - 1 if parents[-1][0] == number and str(e)[:2] in {"I1", "I6"} else number
                result.trace = [*path(broken), f"VIOLATION {e}"]
                result.states = len(seen)
                return result
        result.states = len(seen)
        frontier = following
        if not frontier:
            result.complete = True
            return result
        if len(seen) >= states:
            return result
    return result


def main() -> None:
    """For development."""
    import sys

    from harmony.core.timing import Timing
    from tests.exhaustive.agent import Setting

    faults, kinds, depth, states = int(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])
    t = Timing(
        heartbeat_interval_s=1, heartbeat_timeout_s=1, failure_threshold=1, success_threshold=1,
        fence_timeout_s=1, safety_margin_s=0, failover_timeout_s=float(sys.argv[5]) if len(sys.argv) > 5 else 3.001,
    )
    m = Model(Setting(t), faults, frozenset(kinds), int(sys.argv[6]) if len(sys.argv) > 6 else 3)
    start = time.process_time()
    goals: dict[str, Goal] = {
        "founded": lambda m, s: len(m.stores.values[s.store].owners) == 1,
        "leads": lambda m, s: any(m.nodes.values[n].host.postgres == "primary" for n in s.nodes),
        "calm": lambda m, s: m.nodes.values[s.nodes[0]].view.state == "primary/healthy" and m.nodes.values[s.nodes[1]].view.state == "replica/watching" and m.nodes.values[s.nodes[1]].host.postgres == "standby",
        "fence": lambda m, s: any(m.nodes.values[n].host.proven for n in s.nodes),
    }
    for how in ("stale", "vacancy", "handed over"):
        goals[how] = lambda m, s, how=how: m.nodes.values[s.nodes[1]].host.postgres == "primary" and m.stores.values[s.store].owners[-1] == ("n2", how)
    r = explore(m, [m.empty()], goals, depth=depth, states=states)
    print(r.states, r.transitions, "depth", r.depth, "complete", r.complete, "beyond", m.beyond, f"{time.process_time() - start:.1f} s")
    print("nodes", len(m.nodes.values), "nets", len(m.nets.values), "stores", len(m.stores.values), "steps", len(m._steps))
    for g, p in r.goals.items():
        print("GOAL", g, len(p), sum(x.startswith("--") for x in p))
        if "-v" in sys.argv:
            print("\n".join(p))
    print(r.violation, *r.trace, sep="\n")


if __name__ == "__main__":
    main()
