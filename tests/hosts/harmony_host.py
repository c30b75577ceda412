"""A test host with Harmony, as a user would install it: wheel, system user, units, database, configuration, start.

Nothing comes from the network: dependencies, nats-server and pip are those of the virtual environment that runs the
tests, read-only inside. It refuses to start anything but by systemd.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import tomli_w

from harmony.demo.databases import Node
from harmony.fencer_client import protocol
from tests import pace
from tests.hosts.host import PYTHON, VENV, Host, HostError

# What is installed; another tree (an older version, a clean checkout) by the environment.
TREE = Path(os.environ.get("HARMONY_TEST_TREE") or Path(__file__).parents[2])
PREFIX = "/opt/harmony"
CONFIG = "/etc/harmony/harmony.toml"
HOME = Path("/srv/harmony")  # on the host: the database (data) and its socket (sock)
SCRIPTS = ("harmonyctl", "harmony-supervisor", "harmony-agent", "harmony-fencer")
UNIT_SUFFIXES = {".service", ".socket", ".slice", ".target", ".timer", ".path", ".mount", ".scope"}
PRIMARY_TIMEOUT_S = 60.0
NATS_UNIT = """
[Unit]
Description=The store of the tests
[Service]
Type=exec
DynamicUser=yes
StateDirectory=nats
ExecStart=/usr/local/bin/nats-server -c /etc/nats.conf
Restart=always
RestartSec=100ms
[Install]
WantedBy=multi-user.target
"""
# On the host, as root: initdb, roles and tables of the demo; says where PostgreSQL's programs are.
MAKE_DATABASE = """
import json, pathlib, sys, tempfile
from harmony.demo.databases import Node, make_databases
from harmony.demo.parts import Parts, Users, find_postgres
folder, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
scratch = pathlib.Path(tempfile.mkdtemp(dir="/opt"))
scratch.chmod(0o755)
postgres = find_postgres("postgres", scratch, [])
parts = Parts(pathlib.Path("/usr/local/bin/nats-server"), postgres, Users("postgres", None), ())
make_databases(parts, [Node("n1", folder, port)])
print(json.dumps([str(postgres.bin_dir), str(postgres.library_dir) if postgres.library_dir else None]))
"""
SQL = """
import json, sys
import psycopg
with psycopg.connect(sys.argv[1], autocommit=True, connect_timeout=5) as connection:
    cursor = connection.execute(sys.argv[2])
    print(json.dumps(cursor.fetchall() if cursor.description else [], default=str))
"""
ASK_FENCER = """
import socket, struct, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(5)
    sock.connect("/run/harmony/fencer.sock")
    sock.sendall(sys.stdin.buffer.read())
    file = sock.makefile("rb")
    print(file.read(struct.unpack(">I", file.read(4))[0]).decode())
"""


@dataclass(frozen=True)
class Cluster:
    """What one member needs to know. `settings` go over the configuration made here, section by section."""

    node: str = "n1"
    members: Mapping[str, tuple[str, int]] = field(default_factory=lambda: {"n1": ("127.0.0.1", 5432)})
    store_urls: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """Where this member's PostgreSQL listens."""
        return self.members[self.node][1]


@functools.cache
def wheel(tree: Path = TREE) -> Path:
    """The tree's wheel, built once per test process (hatchling comes from the index unless it is installed)."""
    folder = Path(tempfile.mkdtemp(prefix="harmony-wheel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if find_spec("hatchling") is not None:
        argv.append("--no-build-isolation")
    done = subprocess.run(
        [*argv, "--wheel-dir", str(folder), str(tree)],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    if done.returncode != 0:
        raise HostError(f"the wheel was not built: {(done.stderr or done.stdout)[-2000:]}")
    return next(folder.glob("harmony_ha-*.whl"))


def _inside(path: Path) -> str:
    """A file of the virtual environment, as the host sees it."""
    return f"{VENV}/{path.relative_to(sys.prefix)}"


class HarmonyHost(Host):
    """A host that can be given Harmony: `install_harmony`, then `make_cluster` (or its steps, for more members)."""

    def install_harmony(self, *, tree: Path = TREE, user: str = "harmony") -> None:
        """Harmony in /opt/harmony, the agent's user, all units of systemd/; nothing is started."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        base = sys.base_prefix
        if not base.startswith("/usr"):
            base = PYTHON
            self.write(
                "/etc/ld.so.conf.d/test-python.conf", f"{PYTHON}/lib\n"
            )  # its libpython, in nobody's home
            self.run(["ldconfig"])
        self.add_user(user)
        self.run([f"{base}/bin/{version}", "-m", "venv", "--without-pip", PREFIX])
        packages = f"{PREFIX}/lib/{version}/site-packages"
        self.write(f"{packages}/dependencies.pth", _inside(Path(sysconfig.get_path("purelib"))) + "\n")
        built = wheel(tree)
        self.write(f"/opt/{built.name}", built.read_bytes())
        pip = [f"{PREFIX}/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        self.run([*pip, "--no-cache-dir", "--ignore-installed", f"/opt/{built.name}"], timeout=60)
        for script in SCRIPTS:
            self.run(["test", "-x", f"{PREFIX}/bin/{script}"])
        self.install_units(tree / "systemd")

    def install_units(self, folder: Path) -> None:
        """The units (and drop-ins) of a folder, into /etc/systemd/system."""
        for path in sorted(folder.rglob("*")):
            if path.suffix in UNIT_SUFFIXES or (path.suffix == ".conf" and path.parent.suffix == ".d"):
                self.write(f"/etc/systemd/system/{path.relative_to(folder)}", path.read_bytes())
        self.systemctl("daemon-reload")

    def add_user(self, user: str) -> None:
        """A system user with a group of its own, unless there is one."""
        if self.run(["id", user], check=False).returncode != 0:
            options = ["--system", "--user-group", "--no-create-home", "--shell", "/bin/false"]
            self.run(["useradd", *options, user])

    def start_nats(self, listen: str = "127.0.0.1:4222", more: Iterable[str] = ()) -> None:
        """nats-server as a unit of its own, enabled: JetStream on disk, every write synced."""
        lines = [
            f'listen: "{listen}"',
            'jetstream { store_dir: "/var/lib/nats", sync_interval: always }',
            *more,
        ]
        program = _inside(Path(sys.prefix) / "bin" / "nats-server")
        self.run(["ln", "-sf", program, "/usr/local/bin/nats-server"])
        self.write("/etc/nats.conf", "\n".join(lines) + "\n")
        self.write("/etc/systemd/system/nats.service", NATS_UNIT)
        self.systemctl("daemon-reload")
        self.systemctl("enable", "--now", "nats")

    def make_database(self, cluster: Cluster) -> tuple[str, str | None]:
        """The first member's database in /srv/harmony; returns PostgreSQL's (bin_dir, library_dir)."""
        self.add_user("postgres")
        node = Node(cluster.node, HOME, cluster.port)
        for folder in (HOME, node.socket_dir):
            self.run(["install", "-d", "-m", "0755", str(folder)])
        self.run(["chown", "postgres:", str(node.socket_dir)])
        argv = [f"{PREFIX}/bin/python", "-I", "-c", MAKE_DATABASE, str(HOME), str(cluster.port)]
        bin_dir, library_dir = json.loads(self.run(argv, timeout=90).stdout.splitlines()[-1])
        return str(bin_dir), str(library_dir) if library_dir else None

    def configure(self, cluster: Cluster, programs: tuple[str, str | None], user: str = "harmony") -> None:
        """Write /etc/harmony/harmony.toml, and have harmonyctl check it."""
        node = Node(cluster.node, HOME, cluster.port)
        bin_dir, library_dir = programs
        made: dict[str, dict[str, object]] = {
            "cluster": {"id": "test", "preferred_primary": next(iter(cluster.members))},
            "node": {"name": cluster.node},
            "members": {name: {"host": at, "port": port} for name, (at, port) in cluster.members.items()},
            "store": {"urls": list(cluster.store_urls)},
            "timing": {"preset": "fast"},
            "replication": {"mode": "quorum" if len(cluster.members) > 1 else "off"},
            "postgresql": {
                "data_dir": str(node.data_dir),
                "bin_dir": bin_dir,
                "user": "postgres",
                "listen_addresses": cluster.members[cluster.node][0],
                "socket_dir": str(node.socket_dir),
            },
            "agent": {"user": user},
        }
        if library_dir is not None:
            made["postgresql"]["library_dir"] = library_dir
        for section, values in cluster.settings.items():
            made[section] = {**made.get(section, {}), **values}
        self.write(CONFIG, tomli_w.dumps(made))
        self.run([f"{PREFIX}/bin/harmonyctl", "config", "check", CONFIG])

    def make_cluster(self, cluster: Cluster | None = None) -> None:
        """Store, database and configuration of a cluster of one; Harmony enabled, started, primary."""
        wanted = cluster or Cluster()
        self.start_nats()
        self.configure(wanted, self.make_database(wanted))
        self.systemctl("enable", "harmony")
        self.start()
        self.wait_for_primary()

    def start(self, unit: str = "harmony", timeout: float = 60.0) -> None:
        """`systemctl start`, with the unit's log in the error."""
        try:
            self.systemctl("start", unit, timeout=timeout)
        except HostError as error:
            raise HostError(f"{error}\n{self.journal(unit)}") from None

    def status(self) -> tuple[int, str]:
        """`harmonyctl status --json`: its exit code, and what it said."""
        done = self.run([f"{PREFIX}/bin/harmonyctl", "status", "--json"], check=False)
        return done.returncode, done.stdout or done.stderr

    def wait_for_primary(self, timeout: float = PRIMARY_TIMEOUT_S) -> str:
        """Ask harmonyctl until it says 0 or 1 (there is a primary); returns the primary's name."""
        deadline = time.monotonic() + pace.wait_s(timeout)
        while True:
            code, said = self.status()  # each answer takes a process's start: pause enough
            if code in {0, 1}:
                return str(json.loads(said)["cluster"]["primary"])
            if time.monotonic() > deadline:
                log = self.journal("harmony")
                raise HostError(f"{self.name}: no primary within {timeout:g} s: {said}\n{log}")

    def sql(self, statement: str, *, role: str = "app", port: int = 5432) -> list[list[object]]:
        """Run one statement in the host, over TCP on its loopback; rows as JSON makes them. Raises HostError."""
        conninfo = f"host=127.0.0.1 port={port} user={role} dbname=postgres sslmode=disable"
        done = self.run([f"{PREFIX}/bin/python", "-I", "-c", SQL, conninfo, statement])
        rows: list[list[object]] = json.loads(done.stdout)
        return rows

    def ask_fencer(self, request: protocol.Request) -> protocol.Reply:
        """Ask the fencer something, as root, and return its reply."""
        argv = [f"{PREFIX}/bin/python", "-I", "-c", ASK_FENCER]
        done = self.run(argv, stdin=protocol.frame(request))
        return protocol.decode_reply(done.stdout.strip().encode())

    def fencer(self) -> protocol.Status:
        """All that the fencer says about itself."""
        reply = self.ask_fencer(protocol.StatusRequest())
        if not isinstance(reply, protocol.Status):
            raise HostError(f"{self.name}: the fencer answered {reply}")
        return reply
