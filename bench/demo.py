"""Runs the demo's scenarios N times each and prints the medians as a Markdown table, then as JSON.

It measures nothing itself: every number comes from `harmonyctl demo --json`. Exit code 1: a run was not ok.

    python bench/demo.py --runs 5 --preset fast [--scenario node-killed ...]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import msgspec

from harmony.core.timing import PRESETS
from harmony.demo.scenarios import Result, Scenario


class Median(msgspec.Struct, frozen=True):
    """One scenario's runs put together: medians in seconds, the worst of what must be zero."""

    scenario: str
    preset: str
    runs: int
    failed: int
    outage_s: float | None
    outage_min_s: float | None
    outage_max_s: float | None
    old_primary_last_ack_s: float | None
    lost_rows: int
    dual_primary_s: float


def run_once(scenario: str, preset: str, timeout_s: float) -> Result | None:
    """One run; None (and what it said on stderr) when it could not be carried out."""
    argv = [
        sys.executable,
        "-I",
        "-m",
        "harmony",
        "demo",
        "--scenario",
        scenario,
        "--preset",
        preset,
        "--json",
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:  # the demo stops its own processes on SIGTERM: let it
            process.terminate()
            process.wait(timeout=60)
            raise
    lines = out.splitlines()
    if not lines:
        sys.stderr.write(err)
        return None
    result = msgspec.json.decode(lines[-1].encode(), type=Result)
    if not result.ok:
        sys.stderr.write(err)
    return result


def put_together(scenario: str, preset: str, results: list[Result | None]) -> Median:
    """Medians over the runs that gave a result."""
    found = [r for r in results if r is not None]
    outages = [r.outage_s for r in found if r.outage_s is not None]
    return Median(
        scenario=scenario,
        preset=preset,
        runs=len(results),
        failed=sum(1 for r in results if r is None or not r.ok),
        outage_s=round(statistics.median(outages), 2) if outages else None,
        outage_min_s=min(outages, default=None),
        outage_max_s=max(outages, default=None),
        old_primary_last_ack_s=(
            round(statistics.median(r.old_primary_last_ack_s for r in found), 2) if found else None
        ),
        lost_rows=sum(r.lost_rows for r in found),
        dual_primary_s=max((r.dual_primary_s for r in found), default=0.0),
    )


def table(medians: list[Median]) -> str:
    """Markdown."""
    rows = [
        "| scenario | preset | runs (failed) | outage (min to max) | last old write | lost | two wrote |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {m.scenario} | {m.preset} | {m.runs} ({m.failed}) | {m.outage_s} s ({m.outage_min_s} to "
        f"{m.outage_max_s}) | {m.old_primary_last_ack_s} s | {m.lost_rows} | {m.dual_primary_s:g} s |"
        for m in medians
    ]
    return "\n".join(rows)


def main() -> None:
    """Parse, run one after the other, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, choices=range(1, 101), metavar="1..100")
    parser.add_argument("--preset", choices=list(PRESETS), default="fast")
    parser.add_argument("--scenario", action="append", choices=[s.value for s in Scenario])
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one run")
    arguments = parser.parse_args()
    medians = []
    for scenario in arguments.scenario or [s.value for s in Scenario]:
        results = []
        for number in range(1, arguments.runs + 1):
            result = run_once(scenario, arguments.preset, arguments.timeout)
            said = f"outage {result.outage_s} s, ok {result.ok} {result.why}" if result else "no result"
            sys.stderr.write(f"{scenario} {number}/{arguments.runs}: {said}\n")
            results.append(result)
        medians.append(put_together(scenario, arguments.preset, results))
    print(table(medians))
    print(msgspec.json.encode(medians).decode())
    sys.exit(1 if any(m.failed for m in medians) else 0)


if __name__ == "__main__":
    main()
