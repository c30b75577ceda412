"""Many seeds: run them over all cores, add up what was covered, and shrink what fails to a trace that can be read."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from harmony.core.table import TABLE
from tests.sim import setting
from tests.sim.checks import Violation
from tests.sim.faults import Fault
from tests.sim.world import Rules, World

CHUNK = 8
SHRINK_S = 90.0  # the longest that shrinking may take


@dataclass(slots=True)
class Tally:
    """Of many seeds. `failures`: the seed and what was broken."""

    seeds: int = 0
    hours: float = 0.0
    cpu_s: float = 0.0
    beats: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.hours += other.hours
        self.cpu_s += other.cpu_s
        self.beats += other.beats
        self.rows.update(other.rows)
        self.faults.update(other.faults)
        self.failures += other.failures

    def text(self) -> str:
        """The figures, for people."""
        total = sum(self.rows.values()) or 1
        hit = [f"{row.id}: {self.rows[row.id]}" for row in TABLE]
        lines = [
            f"{self.seeds} seeds, {self.hours:.0f} simulated hours, {self.beats} heartbeats of leaders",
            f"{sum(self.faults.values())} faults, {self.hours / max(self.cpu_s, 1e-9):.1f} hours per CPU-second",
            f"rows hit: {sum(self.rows[r.id] > 0 for r in TABLE)} of {len(TABLE)} in {total} turns",
        ]
        lines += ["  " + "  ".join(hit[i : i + 10]) for i in range(0, len(hit), 10)]
        lines.append("faults: " + ", ".join(f"{k} {n}" for k, n in sorted(self.faults.items())))
        return "\n".join(lines)


def seeds_for(hours: float, first: int = 0) -> int:
    """How many seeds it takes from `first` on: a seed's setting says how long it is."""
    count, total = 0, 0.0
    while total < hours:
        s = setting.draw(first + count)
        total += (s.faults_ns + s.calm_ns) / 3600e9
        count += 1
    return count


def run_chunk(seeds: Sequence[int]) -> Tally:
    """In one process, one after the other."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    tally = Tally()
    began = time.process_time()
    for seed in seeds:
        world = World(seed)
        try:
            world.run()
        except Violation as e:
            tally.failures.append((seed, str(e)))
        tally.seeds += 1
        tally.hours += world.hours
        tally.beats += world.store.beats
        tally.rows.update(world.rows)
        tally.faults.update(f.kind for f in world.faults)
    tally.cpu_s = time.process_time() - began
    return tally


def _end_with_parent() -> None:
    """A campaign that is killed leaves nobody behind who computes on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_all(first: int, count: int, *, most_failures: int = 3, told_every_s: float = 0.0) -> Tally:
    """Over all cores. It ends early when enough has failed."""
    tally = Tally()
    chunks = [range(i, min(i + CHUNK, first + count)) for i in range(first, first + count, CHUNK)]
    told = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_end_with_parent) as pool:
        for done in as_completed([pool.submit(run_chunk, chunk) for chunk in chunks]):
            tally.add(done.result())
            if len(tally.failures) >= most_failures:
                pool.shutdown(cancel_futures=True)
                break
            if told_every_s and time.monotonic() - told > told_every_s:
                told = time.monotonic()
                print(f"{tally.seeds} of {count} seeds, {tally.hours:.0f} hours", flush=True)
    return tally


# ---------------------------------------------------------------- one seed


def fails(seed: int, done: Sequence[Fault], rules: Rules, end_s: float | None = None) -> tuple[str, World]:
    """What is broken with these faults only ("": nothing), and the world. `end_s`: look no further, nor at I5."""
    world = World(seed, rules=rules, done=done)
    try:
        if end_s is None:
            world.run()
        else:
            world.script(end_s)
    except Violation as e:
        return str(e), world
    return "", world


def shrink(seed: int, rules: Rules) -> tuple[str, World]:
    """The seed again with as few faults as break the same invariant (ddmin), within SHRINK_S."""
    why, world = fails(seed, World(seed, rules=rules).faults, rules)
    if not why:
        return why, world
    end_s = None if why.startswith("I5") else world.now / 1e9 + 2 * world.setting.timing.failover_timeout_s
    left, parts, end = [f for f in world.faults if f.at_ns <= world.now], 2, time.monotonic() + SHRINK_S
    while len(left) > 1 and time.monotonic() < end:
        size = max(1, len(left) // parts)
        for i in range(0, len(left), size):
            fewer = left[:i] + left[i + size :]
            found, smaller = fails(seed, fewer, rules, end_s)
            if found[:2] == why[:2]:  # the same invariant
                left, world, why, parts = fewer, smaller, found, max(2, parts - 1)
                break
            if time.monotonic() > end:
                break
        else:
            if size == 1:
                break
            parts *= 2
    return why, world


def explain(seed: int) -> str:
    """For whoever has to understand a seed that fails: its shrunk trace and how to have it again."""
    why, world = shrink(seed, Rules())
    s = world.setting
    return "\n".join(
        (
            f"seed {seed}: {why}",
            f"replay: python -m tests.sim.replay {seed} (--all: with all of its faults)",
            f"{s.kind}, {len(s.names)} nodes, {s.sync_count} synchronous, {s.timing}",
            f"{len(world.faults)} faults are left of {len(World(seed).faults)}:",
            *world.trace[-120:],
        )
    )
