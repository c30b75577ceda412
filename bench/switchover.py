"""The pause that a client sees when leadership is handed over, between three real nodes on this machine.

    python bench/switchover.py [--runs 10] [--preset fast] [--dirty MB]

One cluster; `harmonyctl switchover` again and again while one client writes, each to the next node. A pause is the
longest time between two acknowledgements of that switchover. With --dirty, a second client rewrites a table of that
size before each one, so that the shutdown finds something to write. Every acknowledged row is looked for at the end,
and two writable primaries at once are an error. Prints each pause, the median and the worst, as Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import psycopg

from harmony.demo import measure
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import NODES, Cluster, make_base, remove_base
from harmony.demo.recorder import Recorders


def switch(cluster: Cluster, to: str) -> None:
    """Raises RuntimeError with what harmonyctl said."""
    argv = [sys.executable, "-I", "-m", "harmony", "switchover", "--yes", "--to", to]
    argv += ["--config", str(cluster.nodes[to].config)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"switchover to {to}: {done.stdout}{done.stderr}")


def make_dirty(conninfo: str, megabytes: int) -> None:
    """Rewrite that much, committed here without waiting for a standby."""
    with psycopg.connect(conninfo, autocommit=True) as link:
        link.execute("SET synchronous_commit = local")
        link.execute("CREATE TABLE IF NOT EXISTS dirty (filler text)")
        link.execute("TRUNCATE dirty")
        link.execute(
            "INSERT INTO dirty SELECT repeat('x', 1000) FROM generate_series(1, %s)", (megabytes * 1000,)
        )


def measured(preset: str, runs: int, dirty: int) -> list[float]:
    """The pauses in seconds. Raises RuntimeError where anything was lost, or two accepted writes."""
    base = make_base()
    cluster = Cluster.prepare(preset, base)
    recorders = None
    try:
        cluster.start(lambda text: sys.stderr.write(f"{text}\n"))
        found = cluster.streaming()
        at = found[0] if found is not None else NODES[0]
        probes = {name: cluster.conninfo(name) for name in cluster.nodes}
        recorders = Recorders(base / "clients", cluster.writer_conninfo, probes)
        pauses = []
        for _ in range(runs):
            to = NODES[(NODES.index(at) + 1) % len(NODES)]
            if dirty:
                make_dirty(cluster.conninfo(at, "postgres"), dirty)
            wait_until_streaming(cluster)
            begun = boottime_ns()
            switch(cluster, to)
            until = time.monotonic() + 30
            while recorders.acked_at(cluster.nodes[to].port, begun) < 50:
                if time.monotonic() > until:
                    raise RuntimeError(f"{to} accepts no writes")
                time.sleep(0.05)
            pauses.append(measure.outage_s(recorders.writer.acks, begun))
            sys.stderr.write(f"{at} -> {to}: {pauses[-1]:.3f} s\n")
            at = to
        recorders.stop()
        with psycopg.connect(cluster.conninfo(at), autocommit=True) as link:
            stored = [int(row[0]) for row in link.execute("SELECT id FROM harmony_demo").fetchall()]
        lost = measure.lost_rows([a.id for a in recorders.writer.acks], stored)
        both = measure.dual_primary_s({n: r.recording for n, r in recorders.probers.items()})
        if lost or both:
            raise RuntimeError(f"{len(lost)} acknowledged rows lost, two primaries for {both:.3f} s")
        return pauses
    finally:
        if recorders is not None:
            recorders.stop()
        cluster.stop()
        remove_base(base)


def wait_until_streaming(cluster: Cluster) -> None:
    """Both standbys stream: else the switchover would be refused, as it should."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = cluster.streaming()
        if found is not None and found[1] == len(NODES) - 1:
            time.sleep(2)  # the members' records say so too
            return
        time.sleep(0.2)
    raise RuntimeError("the standbys do not stream")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--dirty", type=int, default=0, metavar="MB")
    options = parser.parse_args()
    pauses = measured(options.preset, options.runs, options.dirty)
    sys.stdout.write("| preset | dirty | runs | median | worst |\n| --- | --- | --- | --- | --- |\n")
    sys.stdout.write(
        f"| {options.preset} | {options.dirty} MB | {len(pauses)} | {statistics.median(pauses):.2f} s "
        f"| {max(pauses):.2f} s |\n"
    )


if __name__ == "__main__":
    main()
