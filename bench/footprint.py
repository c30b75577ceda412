"""What a node costs when nothing happens: memory and CPU of each Harmony process, beside Patroni's agent.

    python bench/footprint.py [--seconds 60] [--preset fast] [--patroni VENV]

A cluster of three runs idle; each process's resident memory (RSS), its own share of it (USS) and its CPU time
over `seconds` in percent of a core: the median over the nodes. With --patroni: one Patroni (from that virtual
environment, `pip install 'patroni[etcd3]' psycopg[binary]`) with an etcd (`etcd` on the PATH, Debian's
etcd-server) leading an idle PostgreSQL of its own, at loop_wait 1, ttl 20, retry_timeout 3.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

from harmony.demo import procs
from harmony.demo.cluster import Cluster, free_ports, make_base, remove_base
from harmony.demo.parts import environment, find_parts

KINDS = {"fencer": "harmony_fencer", "agent": "harmony.agent", "supervisor": "harmony_supervisor"}
Cost = tuple[float, float, float]  # RSS MB, USS MB, percent of a core


def cost(processes: dict[str, list[psutil.Process]], seconds: float) -> dict[str, Cost]:
    """Of each kind, the median over its processes."""
    before = {p.pid: sum(p.cpu_times()[:2]) for found in processes.values() for p in found}
    begun = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - begun
    result = {}
    for kind, found in processes.items():
        memory = [p.memory_full_info() for p in found]
        cpu = [100 * (sum(p.cpu_times()[:2]) - before[p.pid]) / took for p in found]
        result[kind] = (
            statistics.median(m.rss for m in memory) / 1e6,
            statistics.median(m.uss for m in memory) / 1e6,
            statistics.median(cpu),
        )
    return result


def harmony(preset: str, seconds: float) -> dict[str, Cost]:
    base = make_base()
    cluster = Cluster.prepare(preset, base)
    try:
        cluster.start(lambda text: sys.stderr.write(f"{text}\n"))
        time.sleep(5)
        return cost({kind: procs.with_argument(base, (module,)) for kind, module in KINDS.items()}, seconds)
    finally:
        cluster.stop()
        remove_base(base)


def patroni(venv: Path, seconds: float) -> dict[str, Cost]:
    top = Path(tempfile.mkdtemp(prefix="patroni-", dir="/tmp"))
    top.chmod(0o777)
    (top / "parts").mkdir()
    parts = find_parts(top / "parts")
    client, peer, rest, port = free_ports(4)
    etcd_argv = [
        "etcd",
        "--data-dir",
        str(top / "etcd"),
        "--listen-client-urls",
        f"http://127.0.0.1:{client}",
    ]
    etcd_argv += ["--advertise-client-urls", f"http://127.0.0.1:{client}"]
    etcd_argv += ["--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-cluster-state", "new"]
    etcd_argv += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"]
    etcd_argv += ["--initial-cluster", f"default=http://127.0.0.1:{peer}"]
    config = top / "patroni.yml"
    config.write_text(
        f"""scope: demo
name: p1
restapi: {{listen: 127.0.0.1:{rest}, connect_address: 127.0.0.1:{rest}}}
etcd3: {{host: 127.0.0.1:{client}}}
bootstrap:
  dcs: {{ttl: 20, loop_wait: 1, retry_timeout: 3}}
  initdb: [encoding: UTF8]
postgresql:
  listen: 127.0.0.1:{port}
  connect_address: 127.0.0.1:{port}
  data_dir: {top}/data
  pgpass: {top}/pgpass
  bin_dir: {parts.postgres.bin_dir}
  authentication: {{superuser: {{username: postgres}}, replication: {{username: replicator}}}}
  pg_hba: [local all all trust, host all all 127.0.0.1/32 trust, host replication all 127.0.0.1/32 trust]
  parameters: {{unix_socket_directories: {top}}}
"""
    )
    owner = parts.users.postgres or ""
    user = ["setpriv", "--reuid", owner, "--regid", owner, "--init-groups"]
    prefix = user if owner else []
    started = []
    with (top / "log").open("ab") as log:
        env = environment(parts.postgres.library_dir)
        try:
            started.append(subprocess.Popen(etcd_argv, stdout=log, stderr=log, env=env))
            _wait_for_port(client)
            argv = [*prefix, str(venv / "bin" / "patroni"), str(config)]
            started.append(subprocess.Popen(argv, stdout=log, stderr=log, env=env))
            _wait_for_primary(rest, top / "log")
            time.sleep(5)
            return cost({"Patroni": [psutil.Process(started[1].pid)]}, seconds)
        finally:
            for process in reversed(started):
                family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                for one in family:  # Patroni has been seen to outlive its SIGTERM by more than a minute
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                process.wait(20)
            shutil.rmtree(top, ignore_errors=True)


def _wait_for_port(port: int) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("etcd did not start")


def _wait_for_primary(port: int, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/primary", timeout=2) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"Patroni did not lead: {log.read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--patroni", type=Path, help="a virtual environment with Patroni in it")
    options = parser.parse_args()
    found = harmony(options.preset, options.seconds)
    if options.patroni is not None:
        found |= patroni(options.patroni.resolve(), options.seconds)
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {options.seconds:g} s idle")
    print("| process | RSS | of its own (USS) | CPU, % of a core |")
    print("| --- | --- | --- | --- |")
    for kind, (rss, uss, cpu) in found.items():
        print(f"| {kind} | {rss:.1f} MB | {uss:.1f} MB | {cpu:.2f} |")


if __name__ == "__main__":
    main()
