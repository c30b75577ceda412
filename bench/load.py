"""A cluster under a load that starves it: is it fenced needlessly, and is a needed fence late?

    python bench/load.py [--minutes 10] [--busy 4] [--spare-mb 1500] [--rounds 5] [--preset fast]

`busy` endless loops a core, and memory taken until only `spare-mb` are left (touched over and over), beside a
cluster of three under writes. First part: for `minutes`, any change of term, any fence that a fencer began by
itself and any restart of a child counts as needless. Second part, `rounds` times: the primary's supervisor
and agent are stopped (SIGSTOP), so that only its fencer is left; measured from the lease's deadline, as the
fencer gives it, to the last commit that a local client saw acknowledged. Exit code 1: a needless fence, or
one later than fence_timeout. The store runs on the same machine and starves as well: it gets nice -15 (it
is elsewhere in production), and so do the observing clients.
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
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import psutil
import psycopg

from harmony.core.timing import PRESETS
from harmony.demo import procs
from harmony.demo.cluster import Cluster, ask_status, make_base, remove_base
from harmony.errors import FencerUnavailable
from harmony.fencer_client import call, protocol

BUSY = "while True: pass"
MEMORY = (
    "import sys, time\n"
    "b = bytearray(int(sys.argv[1]))\n"
    "while True:\n"
    "    b[::4096] = bytes(len(b[::4096]))\n"
    "    time.sleep(0.2)\n"
)


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@contextlib.contextmanager
def load(busy_per_core: int, spare_mb: int) -> Iterator[str]:
    """Started, and ended with everything in it; yields what it is, in words."""
    cores = os.cpu_count() or 1
    started = [subprocess.Popen([sys.executable, "-I", "-c", BUSY]) for _ in range(busy_per_core * cores)]
    take = psutil.virtual_memory().available - spare_mb * 1024 * 1024
    if take > 0:
        started.append(subprocess.Popen([sys.executable, "-I", "-c", MEMORY, str(take)]))
    try:
        yield f"{busy_per_core} endless loops a core, {max(0, take) >> 20} MiB of memory taken"
    finally:
        for process in started:
            process.kill()
            process.wait()


class Writer(threading.Thread):
    """Commits one row after another at one node; `last_ns` is the newest acknowledgement's CLOCK_BOOTTIME."""

    def __init__(self, conninfo: str) -> None:
        super().__init__(daemon=True)
        self._conninfo = conninfo + " connect_timeout=2"
        self.last_ns = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                with psycopg.connect(self._conninfo, autocommit=True) as c:
                    while not self.over.is_set():
                        c.execute("INSERT INTO harmony_demo_probe (id) VALUES (1)")
                        self.last_ns = boot_ns()
            except psycopg.Error:
                time.sleep(0.02)


class Watch:
    """What has changed in the cluster since it was made."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.first = self.look()
        self.least_lease_ms: float | None = None
        self.failures = 0
        self._silent = set[str]()  # nodes whose fencer does not answer
        self.silences: list[str] = []

    def look(self) -> dict[str, object]:
        """Term and primary; each node's fencer and agent processes; each fencer's own fences."""
        seen: dict[str, object] = {}
        for name, node in self._cluster.nodes.items():
            status = self.fencer(name)
            seen[f"{name} self-fence"] = status.self_fence.at_boottime_ns if status.self_fence else None
            seen[f"{name} starts"] = status.postgres_starts
            seen[f"{name} generation"] = str(status.highest)
            for module in ("harmony_fencer", "harmony.agent"):
                found = procs.with_argument(node.folder, (module,))
                seen[f"{name} {module}"] = tuple(p.pid for p in found)
        return seen

    def fencer(self, name: str) -> protocol.Status:
        path = str(self._cluster.nodes[name].folder / "run" / "fencer.sock")
        reply = call(path, protocol.StatusRequest(), timeout_s=5)
        if not isinstance(reply, protocol.Status):
            raise TypeError(f"{name}: {reply}")
        return reply

    def tick(self) -> None:
        """Called about twice a second."""
        for name, node in self._cluster.nodes.items():
            try:
                status = self.fencer(name)
            except FencerUnavailable as e:
                if name not in self._silent:
                    self.silences.append(
                        f"{datetime.now(UTC):%H:%M:%S.%f} the fencer of {name} is silent: {e}"
                    )
                self._silent.add(name)
                continue
            self._silent.discard(name)
            if status.active is not None and status.lease_deadline_boottime_ns is not None:
                left = (status.lease_deadline_boottime_ns - status.now_boottime_ns) / 1e6
                self.least_lease_ms = min(left, self.least_lease_ms or left)
            agent = ask_status(node.admin_socket, timeout_s=2)
            self.failures = max(self.failures, agent.myself.failures if agent is not None else 0)

    def changed(self) -> list[str]:
        """Each change, and each time a fencer did not answer. Raises FencerUnavailable: one still does not."""
        now = self.look()
        return [f"{k}: {v} -> {now[k]}" for k, v in self.first.items() if now[k] != v] + self.silences


def needed_fence(cluster: Cluster, watch: Watch) -> float:
    """Milliseconds from the lease's deadline to the last acknowledged local commit of the old primary."""
    found = cluster.streaming()
    if found is None:
        raise SystemExit("no primary to begin with")
    primary, node = found[0], cluster.nodes[found[0]]
    writer = Writer(cluster.conninfo(primary))
    writer.start()
    stopped = [
        *procs.with_argument(node.folder, ("harmony_supervisor",)),
        *procs.with_argument(node.folder, ("harmony.agent",)),
    ]
    time.sleep(1.0)
    for process in stopped:
        process.suspend()
    try:
        deadline_ns = 0
        until = time.monotonic() + 30
        while time.monotonic() < until:
            status = watch.fencer(primary)
            deadline_ns = status.lease_deadline_boottime_ns or deadline_ns
            if status.active is None and status.fence_proven:
                break
            time.sleep(0.05)
        else:
            raise SystemExit(f"{primary} was not fenced within 30 s")
        time.sleep(0.5)
        writer.over.set()
        late_ms = (writer.last_ns - deadline_ns) / 1e6
    finally:
        for process in stopped:
            process.resume()
    until = time.monotonic() + 90
    while time.monotonic() < until:
        again = cluster.streaming()
        if again is not None and again[1] == len(cluster.nodes) - 1:
            return late_ms
        time.sleep(0.5)
    raise SystemExit("the cluster did not come back to three nodes within 90 s")


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--busy", type=int, default=4, help="endless loops a core")
    parser.add_argument("--spare-mb", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", choices=list(PRESETS), default="fast")
    options = parser.parse_args()
    timing = PRESETS[options.preset]
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    base = make_base()
    cluster = Cluster.prepare(options.preset, base)
    late: list[float] = []
    try:
        cluster.start(say)
        time.sleep(3)
        watch = Watch(cluster)
        with load(options.busy, options.spare_mb) as words:
            for pid in [p.pid for p in psutil.process_iter() if p.ppid() == os.getpid()]:
                if cluster.nats is None or pid != cluster.nats.pid:
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, pid, 0)
            for supervisor in cluster.supervisors.values():
                say(f"supervisor {supervisor.pid}: policy {os.sched_getscheduler(supervisor.pid)}")
            writer = Writer(cluster.writer_conninfo)
            writer.start()
            until = time.monotonic() + 60 * options.minutes
            while time.monotonic() < until:
                watch.tick()
                time.sleep(0.5)
            needless = watch.changed()
            writer.over.set()
            for number in range(options.rounds):
                late.append(needed_fence(cluster, watch))
                say(f"round {number + 1}: last acknowledgement {late[-1]:.1f} ms after the deadline")
    finally:
        cluster.stop()
        remove_base(base)
    print(f"{platform.release()}, {os.cpu_count()} cores, preset {options.preset}: {words}")
    print(f"{options.minutes:g} minutes: {len(needless)} needless changes {needless or ''}")
    print(f"least lease left as seen: {watch.least_lease_ms:.0f} ms of {timing.lease_s * 1000:.0f}; ", end="")
    print(f"most heartbeats missed in a row: {watch.failures} (fenced at {timing.failure_threshold})")
    if late:
        print(
            f"needed fences, last acknowledgement after the deadline: median {statistics.median(late):.1f} ms, "
            f"{min(late):.1f} to {max(late):.1f} ms ({len(late)} rounds; budget {timing.fence_timeout_s:g} s)"
        )
    if needless or any(m > timing.fence_timeout_s * 1000 for m in late):
        sys.exit(1)


def end(*_: object) -> None:
    """SIGTERM ends a bench as Ctrl-C does, with all that it has started."""
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    main()
