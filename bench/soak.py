"""An hour of a busy cluster at its shortest timing: changes that nobody needed, heartbeats missed, memory, cost.

    python -m bench.soak [--minutes 60] [--idle-minutes 3] [--preset fast] [--out FILE.json]

Three nodes, the store and the whole load share this machine: pgbench with four clients (own writers where there is no
pgbench), VACUUM FULL and CHECKPOINT in turn, and for each core a compression job that never ends. Once a minute the CPU
time and the memory of each process are looked at; first for `idle-minutes` without the load. The store gets nice -15:
it is elsewhere in production. A change of term, an own fence, a restarted child or PostgreSQL, a fencer that
does not answer is needless: exit code 1, and what all nodes have logged is kept. Nothing else may run beside it: what
that causes looks alike.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import psycopg

from bench.footprint import KINDS
from bench.ha.merged import merged
from bench.load import Watch, Writer, end
from harmony.core.timing import PRESETS
from harmony.demo import procs
from harmony.demo.cluster import Cluster, make_base, remove_base
from harmony.demo.parts import environment

COMPRESS = "import os, zlib\nb = os.urandom(1 << 20) * 4\nwhile True:\n    zlib.compress(b, 9)"
SAMPLE_S = 60.0
WARM_SHARE = 0.2  # of the samples, before growth is counted: caches fill


class Sample(msgspec.Struct, frozen=True):
    """Of one process at one time: CPU seconds so far, own memory in bytes."""

    at_s: float
    node: str
    kind: str
    pid: int
    cpu_s: float
    uss: int


class Outcome(msgspec.Struct):
    """Everything that was seen."""

    minutes: float
    preset: str
    needless: list[str] = []
    missed: int = 0  # heartbeats in a row, the most
    silences: int = 0  # how often a node's store did not answer in time, by its log
    kept: str = ""  # where the log of all nodes is, if something needless has happened
    least_lease_ms: float | None = None
    transactions: int = 0
    idle: list[Sample] = []
    loaded: list[Sample] = []


def sample(cluster: Cluster) -> list[Sample]:
    """All of Harmony's processes now."""
    found = []
    for name, node in cluster.nodes.items():
        for kind, module in KINDS.items():
            for process in procs.with_argument(node.folder, (module,)):
                with contextlib.suppress(psutil.Error):
                    cpu = sum(process.cpu_times()[:2])
                    uss = process.memory_full_info().uss
                    found.append(Sample(time.monotonic(), name, kind, process.pid, cpu, uss))
    return found


def series(samples: list[Sample], kind: str) -> list[list[Sample]]:
    """One for each process of this kind."""
    found: dict[int, list[Sample]] = {}
    for s in samples:
        if s.kind == kind:
            found.setdefault(s.pid, []).append(s)
    return [one for one in found.values() if len(one) > 1]


def percent(samples: list[Sample], kind: str) -> float:
    """Of a core: the median over the nodes."""
    found = [100 * (s[-1].cpu_s - s[0].cpu_s) / (s[-1].at_s - s[0].at_s) for s in series(samples, kind)]
    return statistics.median(found) if found else float("nan")


def growth(samples: list[Sample], kind: str) -> tuple[float, float]:
    """MB at the end, and MB per hour by linear regression after the warm-up: the node that grows most."""
    found = []
    for one in series(samples, kind):
        kept = one[round(len(one) * WARM_SHARE) :]
        if len(kept) > 2:
            slope = statistics.linear_regression([s.at_s for s in kept], [s.uss for s in kept]).slope
            found.append((slope * 3600 / 1e6, kept[-1].uss / 1e6))
    if not found:
        return float("nan"), float("nan")
    worst = max(found)
    return worst[1], worst[0]


class Load:
    """Started, and ended with everything in it."""

    def __init__(self, cluster: Cluster, primary: str) -> None:
        self._cluster, self._where = cluster, cluster.conninfo(primary, "postgres")
        self._over = threading.Event()
        self._pgbench = cluster.parts.postgres.bin_dir / "pgbench"
        self._env = environment(cluster.parts.postgres.library_dir)
        self.what = f"pgbench -c 4, VACUUM FULL, CHECKPOINT, {os.cpu_count()} compression jobs"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        started = [
            subprocess.Popen([sys.executable, "-I", "-c", COMPRESS]) for _ in range(os.cpu_count() or 1)
        ]
        writers, workers = [], [threading.Thread(target=self._upkeep, daemon=True)]
        if self._pgbench.exists():
            workers.append(threading.Thread(target=self._bench, daemon=True))
        else:
            self.what = self.what.replace("pgbench -c 4", "4 writers")
            writers = [Writer(self._cluster.writer_conninfo) for _ in range(4)]
        for thread in (*writers, *workers):
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for writer in writers:
                writer.over.set()
            for process in started:
                process.kill()
                process.wait()
            for thread in workers:
                thread.join(60)

    def _bench(self) -> None:
        """It ends with its first connection that is lost, and begins anew."""
        argv = [str(self._pgbench), "-n", "-c", "4", "-j", "2", "-T", "86400", self._where]
        while not self._over.is_set():
            quiet = subprocess.DEVNULL
            with subprocess.Popen(argv, stdout=quiet, stderr=quiet, env=self._env) as process:
                while process.poll() is None and not self._over.wait(0.2):
                    pass
                process.kill()
            self._over.wait(0.5)

    def prepare(self) -> None:
        """pgbench's tables, a hundred and fifty megabytes of them."""
        if self._pgbench.exists():
            argv = [str(self._pgbench), "-i", "-q", "-s", "10", self._where]
            done = subprocess.run(
                argv, capture_output=True, text=True, env=self._env, timeout=600, check=False
            )
            if done.returncode:
                raise SystemExit(f"pgbench -i failed: {done.stderr.strip()[-500:]}")

    def _upkeep(self) -> None:
        while not self._over.is_set():
            try:
                with psycopg.connect(self._where, autocommit=True) as link:
                    while not self._over.is_set():
                        for statement in ("VACUUM FULL", "CHECKPOINT"):
                            link.execute(statement)
                        self._over.wait(5)
            except psycopg.Error:
                self._over.wait(1)


def committed(where: str) -> int:
    """Transactions so far, by PostgreSQL."""
    with psycopg.connect(where, autocommit=True) as link:
        row = link.execute("SELECT sum(xact_commit) FROM pg_stat_database").fetchone()
    return int(row[0]) if row is not None else 0


def silences(cluster: Cluster) -> int:
    """How often a node has logged that the store did not answer."""
    return sum(text.count('"event": "store unavailable"') for text in cluster.logs().values())


def keep(cluster: Cluster) -> str:
    """What all nodes have logged, in one file that stays: where."""
    with tempfile.NamedTemporaryFile("w", prefix="harmony-soak-", suffix=".log", delete=False) as kept:
        kept.write(merged(cluster.logs(), []))
    return kept.name


def watch_for(seconds: float, watch: Watch, cluster: Cluster, into: list[Sample]) -> None:
    """Look twice a second, and take a sample each minute, at the beginning and at the end."""
    begun = time.monotonic()
    due = begun
    while time.monotonic() - begun < seconds:
        if time.monotonic() >= due:
            into.extend(sample(cluster))
            due += min(SAMPLE_S, seconds / 5)
        watch.tick()
        time.sleep(0.5)
    into.extend(sample(cluster))


def table(o: Outcome) -> str:
    """Markdown."""
    lines = [
        "| process | idle, % of a core | loaded | own memory at the end, MB | growth, MB per hour |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        memory, slope = growth(o.loaded, kind)
        lines.append(
            f"| {kind} | {percent(o.idle, kind):.2f} | {percent(o.loaded, kind):.2f} | {memory:.1f} | {slope:+.2f} |"
        )
    return "\n".join(lines)


def soak(options: argparse.Namespace) -> tuple[Outcome, str]:
    """The whole of it; and what the load was, in words."""
    outcome = Outcome(options.minutes, options.preset)
    base = make_base()
    cluster = Cluster.prepare(options.preset, base)
    try:
        cluster.start(lambda text: sys.stderr.write(f"{text}\n"))
        if cluster.nats is not None:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, cluster.nats.pid, -15)
        found = cluster.streaming()
        if found is None:
            raise SystemExit("no primary to begin with")
        load = Load(cluster, found[0])
        load.prepare()
        time.sleep(5)
        watch = Watch(cluster)
        watch_for(60 * options.idle_minutes, watch, cluster, outcome.idle)
        where = cluster.conninfo(found[0], "postgres")
        before, silent = committed(where), silences(cluster)
        with load.running():
            watch_for(60 * options.minutes, watch, cluster, outcome.loaded)
        outcome.needless, outcome.silences = watch.changed(), silences(cluster) - silent
        outcome.missed, outcome.least_lease_ms = watch.failures, watch.least_lease_ms
        if outcome.needless:
            outcome.kept = keep(cluster)
        with contextlib.suppress(psycopg.Error):  # it may lead no more, which is told as needless
            outcome.transactions = committed(where) - before
    except Exception:
        sys.stderr.write(f"what all nodes have logged: {keep(cluster)}\n")
        raise
    finally:
        cluster.stop()
        remove_base(base)
    return outcome, load.what


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--idle-minutes", type=float, default=3.0)
    parser.add_argument("--preset", choices=list(PRESETS), default="fast")
    parser.add_argument("--out", type=Path, help="every sample, as JSON")
    options = parser.parse_args()
    outcome, what = soak(options)
    if options.out is not None:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=1) + b"\n")
    timing = PRESETS[options.preset]
    print(
        f"{platform.release()}, {os.cpu_count()} cores, preset {options.preset}, {options.minutes:g} min of {what}"
    )
    print(
        f"{outcome.transactions} transactions; {len(outcome.needless)} needless changes "
        f"{outcome.needless or ''} {outcome.kept}"
    )
    lease = "not seen" if outcome.least_lease_ms is None else f"{outcome.least_lease_ms:.0f} ms"
    print(
        f"the store silent for a node: {outcome.silences} times; most heartbeats missed in a row: {outcome.missed} "
        f"(fenced at {timing.failure_threshold}); "
        f"least lease left as seen: {lease} of {timing.lease_s * 1000:.0f} ms\n\n{table(outcome)}"
    )
    sys.exit(1 if outcome.needless else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    main()
