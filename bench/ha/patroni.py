"""Patroni as a peer: its agent as PostgreSQL's user, etcd as its store, settings as its documentation has them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from bench.ha.peer import DATABASES, PORT, SUPERUSER, Options, make_databases, own, stores
from harmony.demo.parts import Parts, version_of
from tests.hosts.host import HostError
from tests.hosts.lab import Lab, Light
from tests.hosts.processes import TOP, Process

VENV = "HARMONY_BENCH_PATRONI"  # a virtual environment with Patroni in it
REST = 8008
ETCD_TIMEOUT_S = 30.0
# "fast" is the fastest that Patroni's validation accepts.
PRESETS: dict[str, dict[str, int]] = {
    "standard": {"ttl": 30, "loop_wait": 10, "retry_timeout": 10},
    "fast": {"ttl": 20, "loop_wait": 1, "retry_timeout": 3, "primary_start_timeout": 0},
}
SYNC: dict[str, bool | str] = {"on": True, "off": False, "quorum": "quorum"}


def programs() -> tuple[Path, Path]:
    """(Patroni's virtual environment's bin, etcd). Raises HostError with how to get what is missing."""
    place = Path(os.environ.get(VENV) or TOP / "build" / "bench" / "patroni") / "bin"
    etcd = shutil.which(
        "etcd", path=f"{os.environ['PATH']}:{TOP / 'build' / 'bench' / 'etcd' / 'usr' / 'bin'}"
    )
    if not (place / "patroni").exists():
        raise HostError(f"no Patroni in {place}: make bench-failover installs it, or name another in {VENV}")
    if etcd is None:
        raise HostError(
            "no etcd on the PATH: make bench-failover gets Debian's, or apt-get install etcd-server"
        )
    return place, Path(etcd)


class Patroni:
    """One cluster."""

    def __init__(self, lab: Lab, parts: Parts, options: Options) -> None:
        self._lab = lab
        self._parts = parts
        self._options = options
        self._bin, self._etcd = programs()
        self._stores = stores(options.stores)
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._user = parts.users.postgres or "postgres"
        times = PRESETS[options.preset]
        self.takeover_s = float(times["ttl"] + 2 * times["loop_wait"] + 10)

    def start(self) -> None:
        for name in self._stores:
            self.start_store(name)
        make_databases(self._lab, self._parts, self._options)
        self._configure_cluster()
        for name in DATABASES:
            host = self._lab.hosts[name]
            own([host.folder / "patroni"], self._user)
            (host.folder / "patroni.yml").write_text(json.dumps(self._settings(host), indent=1))
            self.start_host(name)
            if name == DATABASES[0]:
                self._wait_for_leader(host)

    def _configure_cluster(self) -> None:
        """The cluster's configuration, where Patroni's bootstrap would write it: the databases are there already."""
        dynamic = {
            **PRESETS[self._options.preset],
            "synchronous_mode": SYNC[self._options.sync],
            "failsafe_mode": self._options.failsafe,
            "postgresql": {
                "use_pg_rewind": True,
                "use_slots": True,
                "parameters": {
                    "wal_level": "replica",
                    "wal_log_hints": "on",
                    "hot_standby": "on",
                    "max_wal_senders": 10,
                    "max_replication_slots": 10,
                    "max_connections": 50,
                    "wal_keep_size": "256MB",
                },
            },
        }
        pair = {"key": "/service/bench/config", "value": json.dumps(dynamic)}
        coded = {key: base64.b64encode(value.encode()).decode() for key, value in pair.items()}
        host = self._lab.hosts[self._stores[0]]

        def put() -> bool:
            request = urllib.request.Request(
                f"http://{host.address}:2379/v3/kv/put", json.dumps(coded).encode(), method="POST"
            )
            try:
                with urllib.request.urlopen(request, timeout=5):  # noqa: S310 (a URL of ours)
                    return True
            except OSError:
                return False

        _wait(lambda: host.in_net(put), "etcd that takes a key")

    def _wait_for_leader(self, host: Light) -> None:
        def leads() -> bool:
            try:
                with urllib.request.urlopen(f"http://{host.address}:{REST}/primary", timeout=2):
                    return True
            except OSError:
                return False

        _wait(lambda: host.in_net(leads), f"Patroni leads on {host.name}")

    def _settings(self, host: Light) -> dict[str, object]:
        users = {"superuser": {"username": SUPERUSER}, "replication": {"username": "replicator"}}
        return {
            "scope": "bench",
            "name": host.name,
            "restapi": {"listen": f"{host.address}:{REST}", "connect_address": f"{host.address}:{REST}"},
            "etcd3": {"hosts": [f"{self._lab.hosts[name].address}:2379" for name in self._stores]},
            "postgresql": {
                "listen": f"0.0.0.0:{PORT}",
                "connect_address": f"{host.address}:{PORT}",
                "data_dir": str(host.folder / "disk" / "data"),
                "pgpass": str(host.folder / "patroni" / "pgpass"),
                "bin_dir": str(self._parts.postgres.bin_dir),
                "authentication": {**users, "rewind": {"username": SUPERUSER}},
                "parameters": {"unix_socket_directories": str(host.folder / "disk" / "sock")},
            },
            "watchdog": {"mode": "automatic", "device": "/dev/watchdog", "safety_margin": 5},
        }

    def start_host(self, name: str) -> None:
        host = self._lab.hosts[name]
        library = self._parts.postgres.library_dir
        environment = {"LD_LIBRARY_PATH": str(library)} if library else {}
        argv = [str(self._bin / "patroni"), str(host.folder / "patroni.yml")]
        log = host.folder / "patroni.log"
        self._agents[name] = host.start(argv, log, user=self._user, environment=environment)

    def start_store(self, name: str) -> None:
        host = self._lab.hosts[name]
        cluster = ",".join(f"{other}=http://{self._lab.hosts[other].address}:2380" for other in self._stores)
        argv = [str(self._etcd), "--name", name, "--data-dir", str(host.folder / "etcd")]
        argv += ["--listen-client-urls", "http://0.0.0.0:2379"]
        argv += ["--advertise-client-urls", f"http://{host.address}:2379"]
        argv += ["--listen-peer-urls", f"http://{host.address}:2380"]
        argv += ["--initial-advertise-peer-urls", f"http://{host.address}:2380", "--initial-cluster", cluster]
        host.start(argv, host.folder / "etcd.log")

    def agents(self, host: Light) -> list[Process]:
        return host.processes("patroni")

    def guards(self, _host: Light) -> dict[str, list[Process]]:
        """None: it has no watchdog device here."""
        return {}

    def restart_agent(self, name: str) -> None:
        """As Debian's patroni.service does it (Restart=on-failure); upstream's example has Restart=no."""
        if self._agents[name].poll() is not None:
            self.start_host(name)

    def switch_over(self, old: str, new: str) -> None:
        host = self._lab.hosts[new]
        argv = [str(self._bin / "patronictl"), "-c", str(host.folder / "patroni.yml"), "switchover", "bench"]
        host.run([*argv, "--leader", old, "--candidate", new, "--force"], timeout=120)

    def attend(self) -> None:
        """Nothing: it stops at no number of failovers."""

    def store_leader(self) -> str:
        def ask() -> str:
            for name in self._stores:
                request = urllib.request.Request(
                    f"http://{self._lab.hosts[name].address}:2379/v3/maintenance/status", b"{}", method="POST"
                )
                with urllib.request.urlopen(request, timeout=2) as reply:  # noqa: S310
                    said = json.load(reply)
                if said["leader"] == said["header"]["member_id"]:
                    return name
            raise HostError("no etcd says that it leads")

        return self._lab.hosts[self._stores[0]].in_net(ask)

    def versions(self) -> dict[str, str]:
        said = [
            subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True).stdout
            for program in (self._bin / "patroni", self._etcd)
        ]
        return dict(
            zip(("patroni", "etcd"), (".".join(map(str, version_of(text))) for text in said), strict=True)
        )


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + ETCD_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(f"not within {ETCD_TIMEOUT_S:g} s: {what}")
        time.sleep(0.1)
