"""What clusters cost the store: messages, bytes, CPU and memory of one nats-server for 1, 10, 100 and 300 of them.

    python -m bench.scale [--clusters 1 10 100 300] [--preset standard] [--slower 1] [--seconds 30] [--nodes 3]
                          [--out FILE.json]

One real nats-server (JetStream on disk, every write synced). Each node of each cluster is a connection of the real
store code (harmony.store.nats) that does what an agent does in each interval (core/node.py): it writes its own record
by compare-and-set, the first one also cluster_state; it reads its own record, cluster_state, the others' and control;
it watches the bucket. Records have the size of real ones. The generator is not free: its own CPU is told, and the share
of what is due that it gets done. Where it has too few cores for so many clusters, `--slower 10` has each do it all ten
times more seldom: as many connections, streams and consumers, a tenth of the messages. `--agents` measures real agents
instead: a demo cluster, idle, in the same terms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import Popen

import msgspec
import psutil
import trio
import trio_asyncio
from msgspec.structs import replace

from harmony.core.timing import PRESETS, Timing
from harmony.demo.cluster import Cluster, free_ports, make_base, remove_base
from harmony.demo.databases import HOST
from harmony.demo.parts import find_nats
from harmony.errors import SequenceMismatch, StoreUnavailable
from harmony.records import CLUSTER_STATE, CONTROL, MEMBER_PREFIX
from harmony.store.interface import Entry
from harmony.store.nats import NatsStore

SETTLE_S = 5.0  # after the last connection, before anything is counted
CONNECT_S = 120.0
CONNECT_PAUSE_S = 0.03
SIZES = {CLUSTER_STATE: 620, MEMBER_PREFIX: 560}  # bytes of real records (of a demo cluster of three)


class Done(msgspec.Struct):
    """What a worker's nodes did while it counted. Times in ms."""

    due: int = 0  # writes begun, and rounds of reads
    writes: int = 0
    reads: int = 0
    told: int = 0  # by the watch
    failed: int = 0
    write_ms: list[float] = []


class Cost(msgspec.Struct, frozen=True):
    """Per second, of the server; `*_ms` of a write, as a node sees it."""

    clusters: int
    nodes: int
    connections: int
    messages_in: float
    messages_out: float
    kb_in: float
    kb_out: float
    disk_kb: float
    cpu_percent: float
    rss_mb: float
    streams: int
    consumers: int
    share_done: float = 1.0
    failed: int = 0
    write_median_ms: float = 0.0
    write_p99_ms: float = 0.0
    write_max_ms: float = 0.0
    generator_cpu_percent: float = 0.0


# ---------------------------------------------------------------- the generator


class Node:
    """One agent's share of the store's work."""

    def __init__(
        self, store: NatsStore, name: str, others: list[str], timing: Timing, *, leads: bool
    ) -> None:
        self._store, self._timing = store, timing
        self._writes = [MEMBER_PREFIX + name, *([CLUSTER_STATE] if leads else [])]
        self._reads = [MEMBER_PREFIX + name, CLUSTER_STATE, *(MEMBER_PREFIX + o for o in others), CONTROL]
        self.done = Done()
        store.watch(self._told)

    def _told(self, _: Entry) -> None:
        self.done.told += 1

    async def run(self, after_s: float) -> None:
        """For ever: writes and reads side by side, each in its own rhythm, as the agent's."""
        await trio.sleep(after_s)
        async with trio.open_nursery() as nursery:
            for key in self._writes:
                nursery.start_soon(self._every, partial(self._write, key, [0]))
            nursery.start_soon(self._every, self._refresh)

    async def _every(self, what: Callable[[], Awaitable[None]]) -> None:
        due = trio.current_time()
        while True:
            self.done.due += 1
            await what()
            due = max(due + self._timing.heartbeat_interval_s, trio.current_time())
            await trio.sleep_until(due)

    async def _write(self, key: str, revision: list[int]) -> None:
        value = os.urandom(SIZES.get(key, SIZES[MEMBER_PREFIX]) // 2).hex().encode()
        began = time.monotonic()
        try:
            revision[0] = await self._store.update(
                key, value, revision[0], timeout_s=self._timing.heartbeat_timeout_s
            )
        except (StoreUnavailable, SequenceMismatch):
            self.done.failed += 1
            with_it = await self._read(key)
            revision[0] = with_it.revision if with_it is not None else 0
            return
        self.done.writes += 1
        self.done.write_ms.append(1e3 * (time.monotonic() - began))

    async def _read(self, key: str) -> Entry | None:
        try:
            found = await self._store.get(key, timeout_s=self._timing.heartbeat_timeout_s)
        except StoreUnavailable:
            self.done.failed += 1
            return None
        self.done.reads += 1
        return found

    async def _refresh(self) -> None:
        for key in self._reads:
            await self._read(key)


async def _generate(
    url: str, clusters: list[int], nodes: int, timing: Timing, pipe: Connection[str | list[Done], str]
) -> None:
    """Tells the pipe when all are connected; nobody begins before. Counts between its last two questions."""
    names = [f"n{i}" for i in range(1, nodes + 1)]
    made: list[Node] = []
    async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
        for number in clusters:
            for name in names:
                store = NatsStore([url], f"scale{number}", 1, None)
                nursery.start_soon(store.run)
                others = [n for n in names if n != name]
                node = Node(store, name, others, timing, leads=name == names[0])
                made.append(node)
                await trio.sleep(CONNECT_PAUSE_S)
        with trio.fail_after(CONNECT_S):
            while not all(n._store.connected for n in made):  # noqa: SLF001
                await trio.sleep(0.1)
        for answer in ("connected", "running", "counting"):
            pipe.send(answer)
            await trio.to_thread.run_sync(pipe.recv)
            for number, n in enumerate(made):
                if answer == "connected":
                    nursery.start_soon(n.run, timing.heartbeat_interval_s * number / len(made))
                elif answer == "running":
                    n.done = Done()
        pipe.send([n.done for n in made])
        nursery.cancel_scope.cancel()


def _worker(
    url: str, clusters: list[int], nodes: int, timing: Timing, pipe: Connection[str | list[Done], str]
) -> None:
    trio.run(_generate, url, clusters, nodes, timing, pipe)


# ---------------------------------------------------------------- the server


class Server:
    """A nats-server of this run, and what it has counted."""

    def __init__(self, pid: int, monitor: str) -> None:
        self.process, self._monitor = psutil.Process(pid), monitor

    def ask(self, what: str) -> dict[str, int]:
        """/varz or /jsz."""
        with urllib.request.urlopen(f"{self._monitor}/{what}", timeout=10) as answer:  # noqa: S310
            found: dict[str, int] = json.load(answer)
            return found

    def counted(self) -> dict[str, float]:
        v = self.ask("varz")
        cpu = sum(self.process.cpu_times()[:2])
        written = self.process.io_counters().write_bytes
        keys = ("in_msgs", "out_msgs", "in_bytes", "out_bytes")
        return {"at": time.monotonic(), "cpu": cpu, "written": written, **{k: v[k] for k in keys}}

    def cost(self, before: dict[str, float], after: dict[str, float], clusters: int, nodes: int) -> Cost:
        took = after["at"] - before["at"]
        rate = {k: (after[k] - before[k]) / took for k in before}
        jetstream = self.ask("jsz")
        return Cost(
            clusters=clusters,
            nodes=clusters * nodes,
            connections=self.ask("varz")["connections"],
            messages_in=rate["in_msgs"],
            messages_out=rate["out_msgs"],
            kb_in=rate["in_bytes"] / 1e3,
            kb_out=rate["out_bytes"] / 1e3,
            disk_kb=rate["written"] / 1e3,
            cpu_percent=100 * rate["cpu"],
            rss_mb=self.process.memory_info().rss / 1e6,
            streams=jetstream["streams"],
            consumers=jetstream["consumers"],
        )


@contextmanager
def a_server(folder: Path) -> Iterator[tuple[str, Server]]:
    """As docs/store.md wants one, with a monitoring port."""
    port, monitor = free_ports(2)
    (folder / "nats.conf").write_text(
        f'listen: "{HOST}:{port}"\nhttp: "{HOST}:{monitor}"\nmax_connections: 65536\n'
        f'jetstream {{ store_dir: "{folder}/jetstream", sync_interval: always }}\n'
    )
    with (folder / "log").open("wb") as log:
        process = Popen([find_nats([]), "-c", folder / "nats.conf"], stdout=log, stderr=log)
    try:
        server = Server(process.pid, f"http://{HOST}:{monitor}")
        until = time.monotonic() + 10
        while True:
            try:
                server.ask("healthz")
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield f"nats://{HOST}:{port}", server
    finally:
        process.kill()
        process.wait()


def measure(clusters: int, nodes: int, timing: Timing, seconds: float) -> Cost:
    """With a fresh server, and a generator process for each core."""
    workers = min(clusters, os.cpu_count() or 1)
    with (
        tempfile.TemporaryDirectory(prefix="harmony-scale-") as folder,
        a_server(Path(folder)) as (url, server),
    ):
        pipes, processes = [], []
        for w in range(workers):
            ours, theirs = multiprocessing.Pipe()
            some = list(range(w, clusters, workers))
            process = multiprocessing.Process(target=_worker, args=(url, some, nodes, timing, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            for p in pipes:
                p.recv()
            for p in pipes:
                p.send("begin")
                p.recv()
            time.sleep(SETTLE_S)
            generators = [psutil.Process(p.pid) for p in processes]
            for p in pipes:
                p.send("count")
            spent = sum(sum(g.cpu_times()[:2]) for g in generators)
            before = server.counted()
            time.sleep(seconds)
            after = server.counted()
            found = server.cost(before, after, clusters, nodes)
            spent = sum(sum(g.cpu_times()[:2]) for g in generators) - spent
            for p in pipes:
                p.recv()
                p.send("tell")
            done: list[Done] = [d for p in pipes for d in p.recv()]
        finally:
            for process in processes:
                process.terminate()
                process.join()
        due = clusters * (2 * nodes + 1) * (after["at"] - before["at"]) / timing.heartbeat_interval_s
        times = sorted(t for d in done for t in d.write_ms)
        return replace(
            found,
            share_done=min(1.0, sum(d.due for d in done) / due),
            failed=sum(d.failed for d in done),
            write_median_ms=statistics.median(times),
            write_p99_ms=times[len(times) * 99 // 100],
            write_max_ms=times[-1],
            generator_cpu_percent=100 * spent / (after["at"] - before["at"]),
        )


class Watched(Cluster):
    """A demo cluster whose store was there before it."""

    def start_nats(self) -> None:
        """It runs."""


def measure_agents(preset: str, seconds: float) -> Cost:
    """Three real agents on an idle cluster: what the generator has to be held against."""
    base = make_base()
    cluster = Watched.prepare(preset, base)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="harmony-scale-") as folder,
            a_server(Path(folder)) as (url, server),
        ):
            cluster.nats_port = int(url.rpartition(":")[2])
            cluster.start(lambda text: sys.stderr.write(f"{text}\n"))
            time.sleep(SETTLE_S)
            before = server.counted()
            time.sleep(seconds)
            return server.cost(before, server.counted(), 1, len(cluster.nodes))
    finally:
        cluster.stop()
        remove_base(base)


# ---------------------------------------------------------------- the table

COLUMNS = (
    ("clusters", "{0.clusters}"),
    ("connections", "{0.connections}"),
    ("messages/s in", "{0.messages_in:,.0f}"),
    ("out", "{0.messages_out:,.0f}"),
    ("kB/s in", "{0.kb_in:,.0f}"),
    ("out", "{0.kb_out:,.0f}"),
    ("disk kB/s", "{0.disk_kb:,.0f}"),
    ("server CPU %", "{0.cpu_percent:.0f}"),
    ("server RSS MB", "{0.rss_mb:.0f}"),
    ("of what is due", "{1}"),
    ("write, median ms", "{0.write_median_ms:.1f}"),
    ("99 %", "{0.write_p99_ms:.1f}"),
    ("worst", "{0.write_max_ms:.0f}"),
    ("failed", "{0.failed}"),
    ("generator CPU %", "{0.generator_cpu_percent:.0f}"),
)


def table(costs: list[Cost]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "| ---: " * len(COLUMNS) + "|"]
    for c in costs:
        cells = [form.format(c, f"{100 * c.share_done:.0f} %") for _, form in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clusters", type=int, nargs="+", default=[1, 10, 100, 300])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--preset", choices=[*PRESETS], default="standard")
    parser.add_argument("--slower", type=float, default=1.0, help="each interval is so many times longer")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument(
        "--agents", action="store_true", help="real agents of one cluster instead of the generator"
    )
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    options = parser.parse_args()
    costs = []
    if options.agents:
        costs.append(measure_agents(options.preset, options.seconds))
    else:
        timing = PRESETS[options.preset]
        every_s = timing.heartbeat_interval_s * options.slower
        timing = msgspec.structs.replace(timing, heartbeat_interval_s=every_s)
        for clusters in options.clusters:
            costs.append(measure(clusters, options.nodes, timing, options.seconds))
            sys.stderr.write(f"{costs[-1]}\n")
    print(table(costs))
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=1) + b"\n")


if __name__ == "__main__":
    main()
