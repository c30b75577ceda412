"""Breadth-first exploration: the first violation found is at the end of a shortest path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.exhaustive.host import Violation
from tests.exhaustive.model import Model, State

Goal = Callable[[Model, State], bool]
PASSES = "-- a second passes"


@dataclass
class Result:
    """What an exploration has seen. `complete`: nothing was left to explore within the bounds of the model."""

    states: int = 0
    transitions: int = 0
    depth: int = 0
    complete: bool = False
    violation: str = ""
    trace: list[str] = field(default_factory=list)
    goals: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        size = f"{self.states} states, {self.transitions} transitions, depth {self.depth}"
        ends = "complete" if self.complete else "bounded"
        return "\n".join([f"{size}, {ends}", *self.trace])


class _Paths:
    """Where each state was first reached from, and by what."""

    def __init__(self, starts: list[State]) -> None:
        self.seen: dict[State, int] = {s: n for n, s in enumerate(starts)}
        self._parents: list[tuple[int, str]] = [(-1, "")] * len(self.seen)

    def add(self, after: State, before: State, label: str) -> bool:
        """False: it was known."""
        if after in self.seen:
            return False
        self.seen[after] = len(self._parents)
        self._parents.append((self.seen[before], label))
        return True

    def to(self, s: State) -> list[str]:
        """One line for each transition, with the seconds since the start."""
        labels = []
        number = self.seen[s]
        while number >= 0:
            number, label = self._parents[number]
            labels.append(label)
        lines, at = [], 0
        for label in labels[-2::-1]:
            at += label.startswith(PASSES)
            lines.append(f"{at:3} s  {label}")
        return lines


def explore(
    model: Model, starts: list[State], *, depth: int = 1000, goals: dict[str, Goal] | None = None
) -> Result:
    """All states reachable from `starts` by at most `depth` transitions, or up to the first violation.

    `goals` names what must be reachable; the result has a shortest path to each that was found.
    """
    result, paths = Result(), _Paths(starts)
    frontier, wanted = list(starts), dict(goals or {})
    while frontier and result.depth < depth:
        result.depth += 1
        following: list[State] = []
        for s in frontier:
            at = s
            try:
                for label, after in model.next(s):
                    result.transitions += 1
                    if not paths.add(after, s, label):
                        continue
                    at = after
                    model.check(after)
                    at = s
                    following.append(after)
                    for name in [n for n, goal in wanted.items() if goal(model, after)]:
                        result.goals[name] = paths.to(after)
                        del wanted[name]
            except Violation as e:
                result.violation = str(e)
                result.trace = [*paths.to(at), f"VIOLATION {e}"]
                result.states = len(paths.seen)
                return result
        result.states = len(paths.seen)
        frontier = following
    result.complete = not frontier
    return result


def calm(model: Model, seconds: int = 12) -> State:
    """n1 leads in term 1, n2 follows: reached from the empty store when every message arrives at once."""
    s = model.empty()._replace(faults=0)
    for _ in range(seconds):
        for _ in range(20):
            prompt = [after for label, after in model.next(s) if not label.startswith(PASSES) and after != s]
            if not prompt:
                break
            s = prompt[0]
        s = next(after for label, after in model.next(s) if label.startswith(PASSES))
    return s._replace(faults=model.faults)
