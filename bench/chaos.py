"""Random faults from a seed, at a cluster under load, for a time; promises checked from the clients' records alone.

    python -m bench.chaos [--seed N] [--minutes N | --rounds N] [--preset fast|standard] [--sync on|off]
                          [--peer harmony|patroni] [--first N] [--only FAULT …] [--keep S] [--out FILE.json]

Each round strikes with one fault or two (also during a rejoin, also during a switchover), undoes everything, and waits
for the bounds of recovery (docs/chaos.md). After a violation the seed, all logs, the records and one timeline of all
hosts are kept, and a new cluster is built. Exit code 1: a promise was broken; 2: the lab itself failed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from bench.failover import machine, missing
from bench.ha import chaos, checker, plan, report
from bench.ha.chaos import Chaos, Played
from bench.ha.checker import Bounds, Violation
from bench.ha.faults import FAULTS
from bench.ha.plan import Round
from bench.ha.stage import Stage
from harmony.config import Rejoin
from harmony.core.timing import PRESETS
from tests.hosts.host import HostError

ROUNDS_A_STAGE = 15  # then a new cluster: the table, its WAL and the logs stay small


class Results(msgspec.Struct):
    """A campaign's file."""

    machine: dict[str, str]
    seed: int
    preset: str
    sync: str
    bounds: Bounds
    rounds: list[Played] = []
    last_looks: list[Violation] = []
    faults: dict[str, int] = {}
    failures: list[str] = []  # of the lab, which broke no promise
    kept: list[str] = []
    acknowledged: int = 0
    versions: dict[str, str] = {}

    def violations(self) -> list[Violation]:
        """Of all rounds, and of what was read at each cluster's end."""
        return [violation for played in self.rounds for violation in played.violations] + self.last_looks


def say(text: str) -> None:
    """To the person watching."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


def campaign(given: argparse.Namespace, results: Results) -> None:
    """Rounds until the time is over, on as many clusters as it takes."""
    until = time.monotonic() + given.minutes * 60
    known = [
        name for name in FAULTS if given.peer == "harmony" or not name.startswith(("fencer", "supervisor"))
    ]
    coming = islice(plan.rounds(given.seed, given.only or known), given.first - 1, None)
    coming = islice(coming, given.rounds or None)
    todo = list(islice(coming, 1))
    while todo and time.monotonic() < until:
        try:
            with Stage(chaos.options(given.peer, given.preset, given.sync), disks=True, say=say) as stage:
                results.versions = {**stage.peer.versions(), "postgresql": stage.parts.postgres.version}
                todo = on_stage(
                    Chaos(stage, results.bounds, say), todo, coming, until, results, given.out, given.keep
                )
        except (HostError, OSError) as error:
            say(f"the lab failed: {error}")
            results.failures.append(f"{type(error).__name__}: {error}"[:1000])
            todo = list(islice(coming, 1))
        report.save(results, given.out)


def on_stage(
    acting: Chaos,
    todo: list[Round],
    coming: Iterator[Round],
    until: float,
    results: Results,
    out: Path,
    keep: float,
) -> list[Round]:
    """Rounds on one cluster until its end or a violation; returns the round that comes next, if any."""
    seed, first = results.seed, len(results.rounds)
    for _ in range(ROUNDS_A_STAGE):
        (what,) = todo
        faults = ", ".join(f"{e.fault} {e.role} {e.at_s:g}+{e.lasts_s:g}" for e in what.events)
        say(f"round {what.number} {what.shape}: {faults}")
        try:
            played = acting.play(what, lambda: os.getloadavg()[0])
        except (HostError, OSError) as error:
            acting.tell(f"the lab failed: {error}")
            results.kept.append(
                str(acting.keep(f"seed {seed}, round {what.number}: the lab failed: {error}"))
            )
            raise
        finally:
            results.faults = dict(Counter(results.faults) + acting.counts)
            acting.counts.clear()
        results.rounds.append(played)
        say(
            f"    {'; '.join(played.struck)}: client waited {played.outage_s:.1f} s, back {seconds(played.back_s)}, "
            f"{played.timelines} new timelines, load {played.load:.1f}"
        )
        for violation in played.violations:
            say(f"    VIOLATION {violation.kind}: {violation.what}")
        report.save(results, out)
        todo = list(islice(coming, 1))
        if played.violations or not todo or time.monotonic() > until:
            break
    found = acting.last_look()
    results.last_looks += found
    results.acknowledged += sum(len(recorder.acks) for recorder in acting.stage.recorders())
    for violation in found:
        say(f"    VIOLATION {violation.kind}: {violation.what}")
    slowest = max(r.outage_s for r in results.rounds[first:])
    if found or results.rounds[-1].violations or slowest > keep:
        number = results.rounds[-1].number
        words = (
            f"seed {seed}, round {number} (python -m bench.chaos --seed {seed} --first {number} --rounds 1)"
        )
        results.kept.append(str(acting.keep(words)))
    return todo


def summary(results: Results) -> str:
    """For people, in a few lines."""
    found = results.violations()
    kinds = Counter(violation.kind for violation in found)
    broken = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no promise broken"
    writes = sorted(r.outage_s for r in results.rounds)
    back = sorted(r.back_s for r in results.rounds if r.back_s is not None)
    times = ""
    if writes and back:
        times = (
            f"then the client waited {writes[len(writes) // 2]:.1f} s (at most {writes[-1]:.1f}, bound "
            f"{results.bounds.writes_s:g}), all hosts back after {back[len(back) // 2]:.1f} s (at most "
            f"{back[-1]:.1f}, bound {results.bounds.back_s:g}); "
        )
    return (
        f"seed {results.seed}: {sum(results.faults.values())} faults in {len(results.rounds)} rounds, "
        f"{results.acknowledged} rows acknowledged, {sum(r.timelines for r in results.rounds)} new timelines; "
        f"{times}{broken}; the lab failed {len(results.failures)} times\n"
        + "".join(f"  kept: {folder}\n" for folder in results.kept)
    )


def main() -> None:
    """Play, tell, and judge by the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--rounds", type=int, default=0, help="no more than so many (0: until the time is over)"
    )
    parser.add_argument("--first", type=int, default=1, help="begin with this round of the seed's")
    parser.add_argument("--peer", choices=["harmony", "patroni"], default="harmony")
    parser.add_argument("--preset", choices=["fast", "standard"], default="fast")
    parser.add_argument("--sync", choices=["on", "off"], default="on")
    parser.add_argument("--only", action="append", choices=list(FAULTS), help="these faults alone")
    parser.add_argument(
        "--keep",
        type=float,
        default=float("inf"),
        metavar="S",
        help="the logs also of a cluster whose client waited longer than that (-1: of each)",
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/chaos.json"))
    given = parser.parse_args()
    if reason := missing([given.peer]):
        sys.exit(reason)
    bounds = checker.bounds(PRESETS[given.preset], Rejoin().after_s)
    results = Results(machine([given.peer]), given.seed, given.preset, given.sync, bounds)
    say(f"seed {given.seed}")
    try:
        campaign(given, results)
    finally:
        report.save(results, given.out)
        sys.stdout.write(summary(results))
    sys.exit(1 if results.violations() else 2 if results.failures else 0)


if __name__ == "__main__":
    main()
