"""What the failover bench asks of a peer: a system that keeps one PostgreSQL of three writable. It measures nothing."""

from __future__ import annotations

import json
import pwd
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from harmony.demo.parts import Parts
from tests.hosts.lab import NETWORK, Lab, Light
from tests.hosts.processes import Process

DATABASES = ("n1", "n2", "n3")
CLIENT = "c1"
PORT = 5432
SUPERUSER = "postgres"
# Both peers get the same three data directories: the first a primary's, the others cold copies of it.
MAKE_DATABASES = """
import json, pathlib, sys
from harmony.demo.databases import Node, make_databases
from harmony.demo.parts import Parts, Postgres, Users
asked = json.loads(sys.argv[1])
postgres = Postgres(pathlib.Path(asked["bin"]), pathlib.Path(asked["lib"]) if asked["lib"] else None, "")
nodes = [Node(name, pathlib.Path(folder), asked["port"]) for name, folder in asked["folders"].items()]
make_databases(Parts(pathlib.Path("/"), postgres, Users(asked["user"], None), ()), nodes)
for node in nodes:
    for name, lines in asked["more"].items():
        with (node.data_dir / name).open("a") as file:
            file.write(lines)
"""
# Writers ask standbys, too, and are refused: that is not worth a line each in PostgreSQL's log.
MORE = {
    "postgresql.conf": "log_min_messages = fatal\nlog_min_error_statement = panic\n",
    "pg_hba.conf": f"host all all {NETWORK}.0/24 trust\nhost replication all {NETWORK}.0/24 trust\n",
}
LOGS = """
logging_collector = on
log_directory = '../log'
log_filename = 'postgres.log'
log_rotation_age = 0
log_timezone = 'UTC'
log_min_messages = log
"""


class Options(msgspec.Struct, frozen=True):
    """What a campaign varies. `sync`: on (one standby has each commit), quorum (any one; Patroni only), off."""

    peer: str
    preset: str
    sync: str
    stores: int = 1
    failsafe: bool = False  # Patroni's failsafe_mode
    logs: bool = False  # PostgreSQL's own, at disk/log/postgres.log
    probes: bool = False  # writers in each database host that wait for no standby


class Peer(Protocol):
    """One cluster of a peer, in a lab. Hosts are named DATABASES, s1… (the store) and CLIENT."""

    takeover_s: float  # by when a lost primary is replaced at the latest, by the peer's own settings

    def start(self) -> None:
        """Databases, store and all hosts; returns when they have been started, not when they are ready."""

    def start_host(self, name: str) -> None:
        """What a database host starts at boot."""

    def start_store(self, name: str) -> None:
        """What a store's host starts at boot."""

    def agents(self, host: Light) -> list[Process]:
        """The processes that decide about PostgreSQL, without those that guard them."""

    def guards(self, host: Light) -> dict[str, list[Process]]:
        """The processes that guard PostgreSQL or the agents, by what they are: "fencer", "supervisor"."""

    def restart_agent(self, name: str) -> None:
        """What systemd, or an operator, does where the peer itself does not: a dead agent is started again."""

    def switch_over(self, old: str, new: str, /) -> None:
        """A planned change, by the peer's own command."""

    def attend(self) -> None:
        """An operator has looked into what happened so far: what was stopped because too much did, goes on."""

    def store_leader(self) -> str:
        """The store's host whose loss costs an election."""

    def versions(self) -> dict[str, str]:
        """Of all that is measured."""


def stores(count: int) -> list[str]:
    """Names of the store's hosts."""
    return [f"s{number}" for number in range(1, count + 1)]


def names(options: Options) -> list[str]:
    """All hosts of a lab."""
    return [*DATABASES, *stores(options.stores), CLIENT]


def make_databases(lab: Lab, parts: Parts, options: Options) -> None:
    """Three data directories at folder/disk/data, none running."""
    first = lab.hosts[DATABASES[0]]
    for name in DATABASES:
        (lab.hosts[name].folder / "disk").mkdir(exist_ok=True)
    folders = {name: str(lab.hosts[name].folder / "disk") for name in DATABASES}
    user = parts.users.postgres
    pg = parts.postgres
    asked = {
        "bin": str(pg.bin_dir),
        "lib": str(pg.library_dir) if pg.library_dir else "",
        "port": PORT,
        "folders": folders,
        "more": {**MORE, "postgresql.conf": MORE["postgresql.conf"] + (LOGS if options.logs else "")},
        "user": user,
    }
    made = 'mkdir -p "$folder/sock" "$folder/log"; chown "$0": "$folder/sock" "$folder/log"'
    ready = f'for folder in "$@"; do chmod 755 "$folder"; {made}; done'
    first.run(["sh", "-c", ready, user or "root", *folders.values()])
    first.run([sys.executable, "-I", "-c", MAKE_DATABASES, json.dumps(asked)], timeout=120)


def own(paths: Iterable[Path], user: str) -> None:
    """Give folders to a user, made where they are missing."""
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        shutil.chown(path, user, pwd.getpwnam(user).pw_gid)
