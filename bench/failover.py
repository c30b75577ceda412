"""Failures of Harmony and of Patroni, measured alike: by what clients outside and inside of the hosts saw acknowledged.

    python -m bench.failover [--peer harmony|patroni|both] [--scenario NAME …] [--runs N] [--preset fast|standard]
                             [--sync on|off|quorum] [--stores 1|3] [--failsafe] [--out FILE.json]
    python -m bench.failover --report FILE.json --markdown FILE.md --plot FILE.svg

Each repeat builds three database hosts, the store's and a client's (tests/hosts/lab.py), starts the peer in them as in
production, breaks something (bench/ha/scenarios.py), mends it, and looks for every acknowledged row. The results grow
in FILE.json; a campaign that is ended leaves what it has, and nothing running. Exit code 1: a repeat failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path

from bench.ha import report
from bench.ha.harmony import installed
from bench.ha.patroni import programs
from bench.ha.peer import Options
from bench.ha.repeat import Limits, Repeat, carry_out
from bench.ha.scenarios import SCENARIOS
from harmony.demo.parts import SetupError
from tests.hosts.host import HostError
from tests.hosts.lab import why_not


def say(text: str) -> None:
    """To the person watching."""
    sys.stderr.write(text + "\n")


def described(repeat: Repeat) -> str:
    """One repeat in one line."""
    if repeat.figures is None:
        return f"failed: {repeat.error}"
    f = repeat.figures
    return (
        f"outage {report.seconds(f.outage_s)}, old stopped {report.seconds(f.old_stopped_s)}, "
        f"new {report.seconds(f.new_first_s)}, overlap {f.overlap_s:.2f} s ({f.late_rows} rows), lost "
        f"{f.lost_client}+{f.lost_local} of {f.acknowledged}, rejoin {report.seconds(repeat.rejoin_s)}, "
        f"primary now {repeat.final_primary}{' — ' + repeat.error if repeat.error else ''}"
    )


def machine(peers: list[str]) -> dict[str, str]:
    """Where and with what it is measured."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": str(os.cpu_count()),
        "cpu": cpu,
        "linux": platform.release(),
        "python": platform.python_version(),
        "peers": ", ".join(peers),
    }


def campaign(given: argparse.Namespace, peers: list[str]) -> int:
    """All repeats, one after the other; the number that failed."""
    results = (
        report.load(given.out) if given.out.exists() and given.append else report.Results(machine(peers), [])
    )
    failed = 0
    limits = Limits(given.rejoin_limit, given.store_down)
    for number in range(1, given.runs + 1):  # outermost: a campaign cut short has as much of each scenario
        for scenario in given.scenario or list(SCENARIOS):
            for peer in peers:
                options = Options(
                    peer, given.preset, given.sync, given.stores, given.failsafe and peer == "patroni"
                )
                say(f"{scenario} {number}/{given.runs} {peer} {given.preset} sync {given.sync}")
                repeat = carry_out(scenario, options, limits, say)
                say(f"    {described(repeat)}")
                failed += bool(repeat.error)
                results.repeats.append(repeat)
                report.save(results, given.out)
    sys.stdout.write(report.markdown(results))
    return failed


def missing(peers: list[str]) -> str | None:
    """What this machine lacks for them, in words; also what is built once for all repeats."""
    try:
        if reason := why_not():
            return reason
        if "patroni" in peers:
            programs()
        if "harmony" in peers:
            installed()
    except (HostError, SetupError) as error:
        return str(error)
    return None


def main() -> None:
    """Measure, or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["harmony", "patroni", "both"], default="harmony")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--preset", choices=["fast", "standard"], default="fast")
    parser.add_argument("--sync", choices=["on", "off", "quorum"], default="on")
    parser.add_argument("--stores", type=int, choices=[1, 3], default=1)
    parser.add_argument("--failsafe", action="store_true", help="Patroni's failsafe_mode")
    parser.add_argument(
        "--store-down", type=float, default=None, metavar="S", help="shorten the 60 s of store-down"
    )
    parser.add_argument("--rejoin-limit", type=float, default=45.0, metavar="S")
    parser.add_argument("--out", type=Path, default=Path("build/bench/failover.json"))
    parser.add_argument("--append", action="store_true", help="add to what --out has")
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if given.report is not None:
        results = report.load(given.report)
        if given.markdown is not None:
            given.markdown.write_text(f"{report.circumstances(results)}\n{report.markdown(results)}")
        if given.plot is not None:
            report.plot(results, given.plot)
        return
    peers = ["harmony", "patroni"] if given.peer == "both" else [given.peer]
    if reason := missing(peers):
        sys.exit(reason)
    sys.exit(1 if campaign(given, peers) else 0)


if __name__ == "__main__":
    main()
