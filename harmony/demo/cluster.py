"""Brings a whole small cluster up on this machine and takes it down: NATS, three nodes, their supervisors.

It makes and removes one temporary directory (and one in memory), and ends only processes that belong to it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil
import psycopg
import tomli_w

from harmony.admin import MAX_LINE_BYTES, StatusReply
from harmony.config import load
from harmony.core.timing import PRESETS
from harmony.decoding import Unreadable, decoded
from harmony.demo import procs
from harmony.demo.databases import HOST, Node, give_back_memory, make_databases
from harmony.demo.parts import Parts, SetupError, environment, find_parts
from harmony.errors import ConfigError

NODES = ("n1", "n2", "n3")
START_TIMEOUT_S = 60.0
MEMORY = Path("/dev/shm")  # noqa: S108 (a tmpfs, as /run is)
MEMORY_NEEDED = 16 << 20  # bytes: PostgreSQL has its shared memory there, too, and a container 64 MB of it
LONGEST_SOCKET_PATH = 107  # bytes in sockaddr_un.sun_path, less the closing NUL
_reply: msgspec.json.Decoder[StatusReply] = msgspec.json.Decoder(StatusReply)
Say = Callable[[str], object]


def free_ports(count: int) -> list[int]:
    """TCP ports free now, below the range that outgoing connections take theirs from."""
    found: list[int] = []
    for _ in range(1000):
        port = random.randint(20_000, 31_999)  # noqa: S311 (no secret)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
        if len(found) == count:
            return found
    raise SetupError(f"no {count} free TCP ports between 20000 and 31999")


def make_base() -> Path:
    """A new private-named directory, short enough for Unix sockets, that other users may enter."""
    wanted = Path(tempfile.gettempdir())
    longest = len(str(wanted / "harmony-demo-12345678" / "n1" / "run" / "agent" / "agent.sock"))
    root = Path("/tmp") if os.geteuid() == 0 or longest > LONGEST_SOCKET_PATH else wanted  # noqa: S108
    base = Path(tempfile.mkdtemp(prefix="harmony-demo-", dir=root))
    base.chmod(0o755)
    return base.resolve()


def memory_folder() -> Path | None:
    """Where writes wait for no disk, as in a real run_dir; None where there is no such folder, or too little room."""
    usable = os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED
    return MEMORY if usable else None


def remove_base(base: Path) -> None:
    """The directory, and what its nodes have in memory."""
    shutil.rmtree(MEMORY / base.name, ignore_errors=True)
    shutil.rmtree(base, ignore_errors=True)


def ask_status(path: Path, timeout_s: float = 0.5) -> StatusReply | None:
    """One status query at an agent's admin socket; None when it does not answer in time or in form."""
    deadline = time.monotonic() + timeout_s
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(timeout_s)
            link.connect(str(path))
            link.sendall(b'{"op":"status"}\n')
            while not answer.endswith(b"\n") and len(answer) <= MAX_LINE_BYTES:
                link.settimeout(max(0.001, deadline - time.monotonic()))
                received = link.recv(65536)
                if not received:
                    break
                answer += received
        return decoded(_reply, answer)
    except (OSError, Unreadable):
        return None


@dataclass
class Cluster:
    """A demo cluster. `start` raises SetupError; `stop` may be called at any time, and twice."""

    base: Path
    preset: str
    parts: Parts
    nodes: dict[str, Node]
    nats_port: int
    cluster_id: str
    nats: psutil.Popen | None = None
    supervisors: dict[str, psutil.Popen] = field(default_factory=dict)
    template: Path | None = None  # for make_databases

    @classmethod
    def prepare(cls, preset: str, base: Path) -> Cluster:
        """Find the parts and lay out the nodes; starts nothing that stays."""
        ports = free_ports(len(NODES) + 1)
        nodes = {name: Node(name, base / name, port) for name, port in zip(NODES, ports[1:], strict=True)}
        return cls(base, preset, find_parts(base), nodes, ports[0], f"demo-{secrets.token_hex(4)}")

    def logs(self) -> dict[str, str]:
        """What each node has logged so far."""
        return {n: (node.folder / "node.log").read_text(errors="replace") for n, node in self.nodes.items()}

    def conninfo(self, name: str, user: str = "app") -> str:
        """libpq's connection string for one node."""
        return f"host={HOST} port={self.nodes[name].port} user={user} dbname=postgres sslmode=disable"

    @property
    def writer_conninfo(self) -> str:
        """The multi-host string that finds the primary by itself, wherever it is."""
        hosts = ",".join(HOST for _ in self.nodes)
        ports = ",".join(str(node.port) for node in self.nodes.values())
        return (
            f"host={hosts} port={ports} user=app dbname=postgres sslmode=disable "
            "target_session_attrs=read-write connect_timeout=2 tcp_user_timeout=2000"
        )

    def node_at(self, port: int) -> str:
        """The name of the node whose PostgreSQL listens on this port."""
        return next(node.name for node in self.nodes.values() if node.port == port)

    def start(self, say: Say) -> None:
        """Bring everything up and wait until it accepts writes and both standbys stream."""
        for note in self.parts.notes:
            say(note)
        say(
            f"PostgreSQL {self.parts.postgres.version} from {self.parts.postgres.bin_dir}, nats-server "
            f"{self.parts.nats_server}, in {self.base}"
        )
        self.start_nats()
        self.lay_out()
        say("Making the database of n1, and copies of it for n2 and n3")
        make_databases(self.parts, list(self.nodes.values()), self.template)
        for node in self.nodes.values():
            self._write_config(node)
            self._check_config(node)
        say("Starting three supervisors, each with its agent, its fencer and its PostgreSQL")
        for name in self.nodes:
            self.start_supervisor(name)
        self._wait_until_replicating(say)

    def lay_out(self) -> None:
        """Make the nodes' folders, with the owners that their processes need; `run` in memory, as in production."""
        user = self.parts.users.postgres
        shared = memory_folder()
        memory = shared / self.base.name if shared is not None else None
        if memory is not None:
            memory.mkdir()  # not one that is there already: it would be somebody else's
            memory.chmod(0o755)
        for node in self.nodes.values():
            node.folder.mkdir(parents=True)
            if memory is not None:
                (memory / node.name).mkdir()
                (node.folder / "run").symlink_to(memory / node.name)
            for folder, mode in (("run", 0o755), ("state", 0o711), ("sock", 0o755)):
                (node.folder / folder).mkdir(exist_ok=True)
                (node.folder / folder).chmod(mode)
            node.folder.chmod(0o755)
            if user is not None:
                shutil.chown(node.socket_dir, user, pwd.getpwnam(user).pw_gid)

    def _spawn(self, argv: list[str], log: Path) -> psutil.Popen:
        with log.open("ab") as out:
            return psutil.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment(),
                start_new_session=True,  # Ctrl-C is for the demo, which then stops all in order
            )

    def start_nats(self) -> None:
        """Start nats-server on its port (again): JetStream on disk, every write synced."""
        config = self.base / "nats.conf"
        name = f"{self.cluster_id}-{secrets.token_hex(4)}"  # the answer must come from this very server
        config.write_text(
            f'server_name: "{name}"\nlisten: "{HOST}:{self.nats_port}"\n'
            f'jetstream {{ store_dir: "{self.base}/jetstream", sync_interval: always }}\n'
        )
        self.nats = self._spawn([str(self.parts.nats_server), "-c", str(config)], self.base / "nats.log")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.nats_port), 0.5) as link:
                link.settimeout(0.5)
                if name.encode() in link.recv(4096):
                    return
            if self.nats.poll() is not None:
                break
            time.sleep(0.02)
        raise SetupError(f"nats-server did not start; it says: {self.tail(self.base / 'nats.log')}")

    def kill_nats(self) -> None:
        """SIGKILL the store."""
        if self.nats is not None:
            procs.send(self.nats, signal.SIGKILL)
            self.nats.wait(timeout=5)

    def start_supervisor(self, name: str) -> None:
        """Start a node's supervisor, which starts the rest of the node."""
        node = self.nodes[name]
        argv = [sys.executable, "-I", "-m", "harmony_supervisor", "--config", str(node.config)]
        self.supervisors[name] = self._spawn(argv, node.folder / "node.log")

    def settings(self, node: Node) -> dict[str, object]:
        """The node's configuration, as it goes into its harmony.toml."""
        postgresql: dict[str, object] = {
            "data_dir": str(node.data_dir),
            "bin_dir": str(self.parts.postgres.bin_dir),
            "listen_addresses": HOST,
            "socket_dir": str(node.socket_dir),
        }
        if self.parts.postgres.library_dir is not None:
            postgresql["library_dir"] = str(self.parts.postgres.library_dir)
        if self.parts.users.postgres is not None:
            postgresql["user"] = self.parts.users.postgres
        made: dict[str, object] = {
            "cluster": {"id": self.cluster_id, "preferred_primary": NODES[0]},
            "node": {
                "name": node.name,
                "state_dir": str(node.folder / "state"),
                "run_dir": str(node.folder / "run"),
            },
            "members": {n.name: {"host": HOST, "port": n.port} for n in self.nodes.values()},
            "store": {"urls": [f"nats://{HOST}:{self.nats_port}"]},
            "timing": {"preset": self.preset},
            "replication": {"mode": "quorum", "synchronous_count": 1},
            # A demo breaks its cluster as often as it likes, and ends it all at once: nobody is left to take over.
            "failover": {"maximum_changes": 0, "on_stop": "fence"},
            # Nobody wants to look at a standby that does not stream for longer than that.
            "rejoin": {"after_s": 3.0},
            "postgresql": postgresql,
        }
        if self.parts.users.agent is not None:
            made["agent"] = {"user": self.parts.users.agent}
        return made

    def _write_config(self, node: Node) -> None:
        node.config.write_text(tomli_w.dumps(self.settings(node)))

    def _check_config(self, node: Node) -> None:
        try:
            load(node.config, {})
        except ConfigError as e:
            raise SetupError(f"the configuration of {node.name} is refused: {e}") from e

    def streaming(self) -> tuple[str, int, bool] | None:
        """(primary, standbys that stream, whether it is recorded that commits wait for one, so that another may take
        over); None when nobody accepts writes."""
        for name in self.nodes:
            try:
                with psycopg.connect(
                    self.conninfo(name, "postgres") + " connect_timeout=2", autocommit=True
                ) as connection:
                    row = connection.execute(
                        "SELECT pg_is_in_recovery(), current_setting('transaction_read_only'),"
                        " (SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming')"
                    ).fetchone()
            except psycopg.Error:
                continue
            if row is not None and row[0] is False and row[1] == "off":
                reply = ask_status(self.nodes[name].admin_socket)
                c = reply.cluster if reply is not None else None
                return name, int(row[2]), c is not None and c.sync_count > 0
        return None

    def _wait_until_replicating(self, say: Say) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        said = ""
        while time.monotonic() < deadline:
            for name, process in self.supervisors.items():
                if process.poll() is not None:
                    log = self.nodes[name].folder / "node.log"
                    raise SetupError(f"{name}'s supervisor ended ({process.returncode}): {self.tail(log)}")
            found = self.streaming()
            if found is None:
                now = "Waiting for a primary"
            else:
                now = f"{found[0]} accepts writes; {found[1]} of {len(self.nodes) - 1} standbys stream"
            if now != said:
                say(now)
                said = now
            if found is not None and found[1] == len(self.nodes) - 1 and found[2]:
                return
            time.sleep(0.1)
        logs = "; ".join(f"{n}: {self.tail(node.folder / 'node.log', 400)}" for n, node in self.nodes.items())
        raise SetupError(
            f"the cluster was not ready after {START_TIMEOUT_S:g} s ({said.lower()}). Logs: {logs}"
        )

    @staticmethod
    def tail(log: Path, characters: int = 1000) -> str:
        """The end of a log file, for an error message."""
        try:
            return log.read_text(errors="replace")[-characters:].strip() or "(nothing)"
        except OSError as error:
            return f"(no log: {error})"

    def stop(self) -> list[psutil.Process]:
        """Stop all that belongs to the demo, in order and then by force; returns what would not end."""
        timing = PRESETS[self.preset]
        data_dirs = [node.data_dir for node in self.nodes.values()]
        for process in procs.with_argument(self.base):  # a frozen agent cannot hear that it should stop
            procs.send(process, signal.SIGCONT)
        running = [p for p in self.supervisors.values() if procs.alive(p)]
        for process in running:
            procs.send(process, signal.SIGTERM)
        psutil.wait_procs(running, timeout=2 * timing.fence_timeout_s + 10)
        standbys = [p for data_dir in data_dirs for p in procs.postgres_of(data_dir)]
        cgroups = procs.cgroups_of(standbys)
        left = procs.kill_everything(self.base, data_dirs)
        if not left:
            for data_dir in data_dirs:
                give_back_memory(self.parts.postgres, self.parts.users.postgres, data_dir)
        for cgroup in cgroups:
            with contextlib.suppress(OSError):
                cgroup.rmdir()
        for child in [*self.supervisors.values(), *([self.nats] if self.nats else [])]:
            with contextlib.suppress(psutil.TimeoutExpired):
                child.wait(timeout=2)
        return left
