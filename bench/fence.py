"""How fast writes end: each way of stopping PostgreSQL under pgbench, and the fencer's own fence, in one run.

    python bench/fence.py [--runs 5] [--backends 5,50,200] [--ways …] [--json FILE]

Two parts. *Ways*: the harness itself stops a busy PostgreSQL of the given number of backends and looks at
two moments after the order: the last acknowledged commit, and no process left. *Fencer*: a real fencer
process leads with a lease that is renewed for a while; measured from the lease's deadline (and, for an
order, from its sending) to the last acknowledged commit and to the proof.

The clients are pgbench's (prepared single-row INSERTs, `--log`): each acknowledged commit has its moment in
microseconds. They share the machine's cores with PostgreSQL and the fencer; an acknowledgement that waits for
its client to be scheduled counts from there, so the figures are upper bounds.
Exit code 1: a fencer run broke its promise (an acknowledgement after deadline + fence_timeout, or no proof).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from harmony.demo.parts import environment, find_parts
from harmony_fencer import cgroup, processes, protocol
from harmony_fencer.tree import Tree
from tests.fencer.conftest import make_template
from tests.fencer.node import FENCE_S, LEASE_S, Node, Template, boot_ns

LEASED_FOR_S = 3.0
WARM_UP_S = 2.5


@dataclass(frozen=True)
class Sample:
    """One run, milliseconds: from the order or deadline to the last acknowledgement, and to nobody left."""

    last_ack_ms: float
    proof_ms: float
    processes: int
    rate: float  # acknowledged commits a second before the order


class Load:
    """pgbench with `clients` connections, each commit logged."""

    def __init__(self, node: Node, clients: int) -> None:
        self._folder = node.top / "acks"
        self._folder.mkdir()
        script = node.top / "insert.sql"
        script.write_text("INSERT INTO bench (x) VALUES (1);\n")
        postgres = node.template.postgres
        argv = [f"{postgres.bin_dir}/pgbench", "-n", "-M", "prepared", "-c", str(clients), "-j", "2"]
        argv += ["-T", "60", "-f", str(script), "-l", f"--log-prefix={self._folder}/log"]
        argv += ["-h", "127.0.0.1", "-p", str(node.port), "-U", "postgres", "postgres"]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(postgres.library_dir),
        )

    def stop(self) -> list[int]:
        """CLOCK_BOOTTIME of all acknowledgements, sorted. pgbench ends by itself when its server is gone."""
        self._process.wait(30)
        offset = boot_ns() - time.time_ns()
        found = []
        for path in self._folder.iterdir():
            for line in path.read_text().splitlines():
                fields = line.split()
                if len(fields) >= 6 and fields[2].isdigit():  # not a failed one
                    found.append(int(fields[4]) * 1_000_000_000 + int(fields[5]) * 1000 + offset)
        return sorted(found)


def sample(acks: list[int], from_ns: int, proof_ns: int, count: int) -> Sample:
    last = max(acks, default=from_ns)
    recent = [a for a in acks if from_ns - 1_000_000_000 <= a < from_ns]
    return Sample((last - from_ns) / 1e6, (proof_ns - from_ns) / 1e6, count, float(len(recent)))


# ---------------------------------------------------------------- the ways


def _signal_all(tree: Tree, number: signal.Signals, data: str) -> None:
    for pid in tree.pids():
        processes.send(pid, number, data)


def way_cgroup_freeze_kill(tree: Tree, data: str) -> None:
    assert tree.own is not None
    tree.own.freeze(0.05)
    tree.own.kill()


def way_cgroup_kill(tree: Tree, data: str) -> None:
    assert tree.own is not None
    tree.own.kill()


def way_sigstop_kill(tree: Tree, data: str) -> None:
    pinned = processes.Pinned()
    pinned.stop(data, skip=set())
    pinned.send(signal.SIGKILL)
    pinned.close()


def way_sigkill_scan(tree: Tree, data: str) -> None:
    _signal_all(tree, signal.SIGKILL, data)


def way_immediate(tree: Tree, data: str) -> None:
    tree.signal_postmaster(signal.SIGQUIT)


def way_fast(tree: Tree, data: str) -> None:
    tree.signal_postmaster(signal.SIGINT)


WAYS: dict[str, Callable[[Tree, str], None]] = {
    "cgroup.freeze, kill": way_cgroup_freeze_kill,
    "cgroup.kill": way_cgroup_kill,
    "SIGSTOP tree, SIGKILL": way_sigstop_kill,
    "SIGKILL each": way_sigkill_scan,
    "immediate (SIGQUIT)": way_immediate,
    "fast (SIGINT)": way_fast,
}


@contextlib.contextmanager
def fresh(template: Template) -> Iterator[Node]:
    top = Path(tempfile.mkdtemp(prefix="hb-"))
    top.chmod(0o755)
    node = Node(top, template)
    try:
        with (node.data / "postgresql.conf").open("a") as f:
            f.write("max_connections = 260\nfsync = on\nshared_buffers = 64MB\n")
        yield node
    finally:
        node.destroy()
        shutil.rmtree(top)


def measure_way(template: Template, way: str, clients: int) -> Sample:
    """PostgreSQL is started by a fencer (so that it sits in its cgroup), whose lease is kept alive."""
    with fresh(template) as node, leading(node) as keep:
        tree = Tree(str(node.data))
        load = Load(node, clients)
        keep(WARM_UP_S)
        assert node.process is not None
        node.process.send_signal(signal.SIGSTOP)  # it must not help
        count, begun = len(tree.pids()), boot_ns()
        WAYS[way](tree, str(node.data))
        while tree.pids():
            time.sleep(0.001)
        proof = boot_ns()
        time.sleep(0.3)
        acks = load.stop()
        if tree.own is not None:
            tree.own.thaw()
    return sample(acks, begun, proof, count)


@contextlib.contextmanager
def leading(node: Node) -> Iterator[Callable[[float], None]]:
    """A fencer that leads; the yielded function renews its lease for so many seconds."""
    node.start()
    node.make_writable()
    with node.connect() as c:
        c.execute("CREATE TABLE bench (id bigserial PRIMARY KEY, x int)")

    def keep(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            node.renew(1, 1)
            time.sleep(0.1)

    keep(0.1)
    yield keep


# ---------------------------------------------------------------- the fencer


def measure_fencer(template: Template, what: str, clients: int, own_cgroup: bool) -> Sample:
    """`what`: "lease" (from its deadline) or "order" (from sending a fence)."""
    with fresh(template) as node:
        config = json.loads(node.config.read_text())
        node.config.write_text(json.dumps(config | {"cgroup": own_cgroup}))
        with leading(node) as keep:
            load = Load(node, clients)
            keep(WARM_UP_S)
            count = len(node.pids())
            if what == "lease":
                reply = node.renew(1, 1)
                assert isinstance(reply, protocol.Renewed), reply
                begun = reply.deadline_boottime_ns
            else:
                begun = boot_ns()
                fence = protocol.Fence(generation=protocol.Generation(1, 2), reason="bench")
                assert isinstance(node.ask(fence), protocol.Accepted)
            node.wait(lambda: node.status().fence_proven, "proof", LEASE_S + FENCE_S + 10)
            status = node.status()
            if what == "lease":
                assert status.self_fence is not None
                proof = status.self_fence.at_boottime_ns + round(status.self_fence.took_ms * 1e6)
            else:
                assert status.order is not None
                proof = begun + round(status.order.took_ms * 1e6)
            time.sleep(0.3)
            acks = load.stop()
    return sample(acks, begun, proof, count)


# ---------------------------------------------------------------- the table


def row(name: str, clients: int, samples: list[Sample]) -> dict[str, object]:
    acks = [s.last_ack_ms for s in samples]
    proofs = [s.proof_ms for s in samples]
    return {
        "way": name,
        "clients": clients,
        "processes": round(statistics.median(s.processes for s in samples)),
        "commits_per_s": round(statistics.median(s.rate for s in samples)),
        "runs": len(samples),
        "last_ack_ms": [round(f(acks), 1) for f in (statistics.median, min, max)],
        "proof_ms": [round(f(proofs), 1) for f in (statistics.median, min, max)],
    }


def table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| way | clients | processes | commits/s before | last acknowledgement, ms | nobody left, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        ack, proof = r["last_ack_ms"], r["proof_ms"]
        assert isinstance(ack, list)
        assert isinstance(proof, list)
        lines.append(
            f"| {r['way']} | {r['clients']} | {r['processes']} | {r['commits_per_s']} | "
            f"{ack[0]} ({ack[1]} to {ack[2]}) | {proof[0]} ({proof[1]} to {proof[2]}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, choices=range(1, 101), metavar="1..100")
    parser.add_argument("--backends", default="5,50,200", help="numbers of writing clients")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    has_cgroup = cgroup.mount_point() is not None and os.geteuid() == 0
    rows, broken = [], []
    with tempfile.TemporaryDirectory(prefix="hb-") as scratch:
        top = Path(scratch)
        top.chmod(0o755)
        (top / "parts").mkdir(mode=0o755)
        template = make_template(top, find_parts(top / "parts"))
        print(f"PostgreSQL {template.postgres.version}, {os.cpu_count()} cores, Linux {platform.release()}")
        jobs: list[tuple[str, Callable[[int], Sample], bool]] = []
        for way in WAYS:
            if has_cgroup or "cgroup" not in way:
                jobs.append((way, partial(measure_way, template, way), False))
        for what in ("lease", "order"):
            for own in (True, False):
                if own and not has_cgroup:
                    continue
                name = f"fencer, {what}, {'cgroup' if own else 'process tree'}"
                jobs.append((name, partial(measure_fencer, template, what, own_cgroup=own), True))
        for name, run, promised in jobs:
            if options.only not in name:
                continue
            for clients in (int(b) for b in options.backends.split(",")):
                samples = []
                for number in range(1, options.runs + 1):
                    s = run(clients)
                    samples.append(s)
                    sys.stderr.write(
                        f"{name}, {clients} clients, {number}/{options.runs}: last ack {s.last_ack_ms:.1f} ms, "
                        f"proof {s.proof_ms:.1f} ms, {s.rate:.0f} commits/s\n"
                    )
                    if promised and s.last_ack_ms > FENCE_S * 1000:
                        broken.append(f"{name}, {clients}: acknowledged {s.last_ack_ms:.0f} ms after")
                rows.append(row(name, clients, samples))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if broken:
        sys.exit("PROMISE BROKEN: " + "; ".join(broken))


if __name__ == "__main__":
    main()
