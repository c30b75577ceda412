"""One node for tests of the fencer: a data directory, a fencer process, and short ways to ask both."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import psycopg

from harmony.demo.databases import give_back_memory
from harmony.demo.parts import Postgres, environment, run_as
from harmony.fencer_client import call
from harmony_fencer import cgroup, processes, protocol
from tests import pace

LEASE_S, FENCE_S = 2.0, 1.0


def ids_of(user: str | None) -> dict[str, object] | None:
    """Whom PostgreSQL runs as, for fencer.json."""
    if user is None:
        return None
    entry = pwd.getpwnam(user)
    return {"uid": entry.pw_uid, "gid": entry.pw_gid, "groups": [entry.pw_gid]}


@dataclass(frozen=True)
class Template:
    data: Path
    postgres: Postgres
    user: str | None


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


PAUSE_S = 0.002  # between a client's writes: without one, each of them takes a core from all other tests


class Writer:
    """A client that inserts row after row, and notes when (CLOCK_BOOTTIME) each was acknowledged.

    It connects again whenever it is thrown out. The notes are what a promise about writes is held against.
    """

    def __init__(self, node: Node, pause_s: float) -> None:
        self._node, self._pause_s = node, pause_s
        self.acks: list[int] = []
        self._over = threading.Event()
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # it notes when a write was acknowledged, not when it got to run
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        while not self._over.wait(0.01):
            with contextlib.suppress(psycopg.Error), self._node.connect() as c:
                self._connection = c
                c.execute("CREATE TABLE IF NOT EXISTS acks (x int)")
                while not self._over.wait(self._pause_s):
                    c.execute("INSERT INTO acks VALUES (1)")
                    self.acks.append(boot_ns())

    @property
    def last_ns(self) -> int:
        return self.acks[-1] if self.acks else 0

    def longest_gap_s(self, since_ns: int, until_ns: int) -> float:
        """The longest time without an acknowledged write between two moments."""
        marks = [since_ns, *(a for a in self.acks if since_ns <= a <= until_ns), until_ns]
        return max(b - a for a, b in pairwise(marks)) / 1e9

    def wait_for_more(self) -> None:
        """Until something is acknowledged that was not yet when this was called: writes have not ended."""
        now_ns = boot_ns()
        self._node.wait(lambda: self.last_ns > now_ns, "writes go on")

    def stop(self) -> None:
        self._over.set()
        with contextlib.suppress(psycopg.Error, OSError, ValueError):
            if self._connection is not None and self._thread.is_alive():
                with socket.fromfd(self._connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as s:
                    s.shutdown(socket.SHUT_RDWR)  # it may wait for a PostgreSQL that is frozen
        self._thread.join(10)
        assert not self._thread.is_alive(), "the writer hangs"


class Node:
    def __init__(self, top: Path, template: Template) -> None:
        self.top, self.template = top, template
        self.data, self.run, self.state = top / "data", top / "run", top / "state"
        for folder in (self.run, self.state, top / "s"):
            folder.mkdir()
        subprocess.run(["cp", "-a", str(template.data), str(self.data)], check=True)
        if template.user is not None:
            shutil.chown(top / "s", template.user)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.config = self.run / "fencer.json"
        library = template.postgres.library_dir
        self.config.write_text(
            json.dumps(
                {
                    "node": "n1",
                    "agent_uid": os.getuid(),
                    "agent_gid": os.getgid(),
                    "postgres_ids": ids_of(template.user),
                    "data_dir": str(self.data),
                    "config_file": str(self.data / "postgresql.conf"),
                    "run": "pg_ctl",
                    "unit": "",
                    "cgroup": True,
                    "bin_dir": str(template.postgres.bin_dir),
                    "library_dir": str(library) if library else None,
                    "port": self.port,
                    "listen_addresses": "127.0.0.1",
                    "socket_dir": str(top / "s"),
                    "members": {
                        "n1": {"host": "127.0.0.1", "port": self.port},
                        "n2": {"host": "127.0.0.1", "port": 1},
                    },
                    "replication_user": "postgres",
                    "replication_passfile": None,
                    "lease_s": LEASE_S,
                    "fence_timeout_s": FENCE_S,
                    "start_timeout_s": 20,
                    "watchdog_mode": "off",
                    "watchdog_device": "/dev/watchdog",
                    "watchdog_timeout_s": 1.0,
                    "state_dir": str(self.state),
                    "run_dir": str(self.run),
                    "log_format": "json",
                }
            )
        )

        self.hands: list[subprocess.Popen[bytes]] = []  # what was started by hand and runs in the foreground

    def configure(self, **changes: object) -> None:
        """Other values in fencer.json, before the fencer is started."""
        self.config.write_text(json.dumps(json.loads(self.config.read_text()) | changes))

    def set_postgres(self, **settings: str) -> None:
        """More lines in postgresql.conf."""
        with (self.data / "postgresql.conf").open("a") as f:
            f.writelines(f"{key} = '{value}'\n" for key, value in settings.items())

    # -------------------------------------------------------- the fencer

    def argv(self, *more: str) -> list[str]:
        return [sys.executable, "-I", "-m", "harmony_fencer", "--config", str(self.config), *more]

    def start(self, inside: Path | None = None) -> None:
        """A fencer, in the cgroup `inside` (made where it is missing); it answers when this returns."""
        argv = self.argv()
        if inside is not None:
            inside.mkdir(exist_ok=True)
            argv = ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', f"{inside}/cgroup.procs", *argv]
        with (self.top / "fencer.log").open("ab") as log:
            self.process = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL, cwd="/")
        self.wait(lambda: (self.run / "fencer.sock").exists() and self._answers(), "the fencer answers")

    def _answers(self) -> bool:
        try:
            return isinstance(self.ask(protocol.StatusRequest()), protocol.Status)
        except Exception:  # noqa: BLE001 (not yet)
            return False

    def kill_fencer(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)

    def ask(self, request: protocol.Request) -> protocol.Reply:
        return call(str(self.run / "fencer.sock"), request, timeout_s=pace.wait_s(5))

    def status(self) -> protocol.Status:
        reply = self.ask(protocol.StatusRequest())
        assert isinstance(reply, protocol.Status)
        return reply

    def activate(self, term: int, order: int, seconds: float = LEASE_S, timeline: int = 0) -> protocol.Reply:
        return self.ask(
            protocol.Activate(
                generation=protocol.Generation(term, order),
                deadline_boottime_ns=boot_ns() + round(seconds * 1e9),
                sync=protocol.SyncRule(0, ()),
                timeline=timeline,
            )
        )

    def renew(self, term: int, order: int) -> protocol.Reply:
        return self.ask(
            protocol.Renew(
                generation=protocol.Generation(term, order), deadline_boottime_ns=boot_ns() + 10 * 10**9
            )
        )

    def fence(self, term: int, order: int, *, clean: bool = False) -> protocol.OrderRecord:
        """Ordered, and what became of it."""
        generation = protocol.Generation(term, order)
        reply = self.ask(protocol.Fence(generation=generation, reason="test", clean=clean))
        assert isinstance(reply, protocol.Accepted), reply
        return self.outcome()

    def follow(self, term: int, order: int) -> None:
        reply = self.ask(protocol.Follow(generation=protocol.Generation(term, order), primary=None))
        assert isinstance(reply, protocol.Accepted), reply
        record = self.outcome()
        assert record.state == "done", (record, self.log())

    def outcome(self, *, renewing: bool = False) -> protocol.OrderRecord:
        """The newest order's record once it has ended."""
        until = time.monotonic() + pace.wait_s(20)
        while time.monotonic() < until:
            record = self.status().order
            assert record is not None
            if record.state != "running":
                return record
            if renewing:
                self.renew(record.generation.term, record.generation.order)
            time.sleep(0.02)
        raise AssertionError(f"still running: {self.log()}")

    def make_writable(self, term: int = 1, order: int = 1) -> None:
        reply = self.activate(term, order)
        assert isinstance(reply, protocol.Accepted), reply
        record = self.outcome(renewing=True)
        assert record.state == "done", (record, self.log())

    def log(self) -> str:
        return (self.top / "fencer.log").read_text()[-3000:]

    # -------------------------------------------------------- PostgreSQL

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            dbname="postgres",
            autocommit=True,
            connect_timeout=2,
        )

    def writable(self) -> bool:
        try:
            with self.connect() as c:
                c.execute("CREATE TABLE IF NOT EXISTS t (x int)")
        except psycopg.Error:
            return False
        return True

    def start_by_hand(self) -> None:
        """What systemd at boot or an operator would do (PostgreSQL waits for a dead postmaster to be reaped)."""
        dead = processes.pid_file(str(self.data))
        self.wait(lambda: dead is None or not Path(f"/proc/{dead}").exists(), "the dead postmaster is reaped")
        argv = [f"{self.template.postgres.bin_dir}/pg_ctl", "start", "-w", "-D", str(self.data)]
        options = f"-p {self.port} -c unix_socket_directories={self.top}/s -c listen_addresses=127.0.0.1"
        log = str(self.data / "hand.log")
        run_as(self.template.user, [*argv, "-l", log, "-o", options], self.template.postgres.library_dir, 30)

    def hand(
        self, how: Literal["pg_ctl", "postgres", "PGDATA"] = "postgres", data: Path | None = None
    ) -> None:
        """Start PostgreSQL as somebody would who knows nothing of Harmony, and do not wait for it."""
        self.tidy()
        where = str(data or self.data)
        options = ["-p", str(self.port), "-c", f"unix_socket_directories={self.top}/s"]
        options += ["-c", "listen_addresses=127.0.0.1"]
        bin_dir, variables = self.template.postgres.bin_dir, environment(self.template.postgres.library_dir)
        if how == "pg_ctl":
            argv = [f"{bin_dir}/pg_ctl", "start", "-W", "-D", where, "-l", f"{where}/hand.log"]
            argv += ["-o", " ".join(options)]
        elif how == "postgres":
            argv = [f"{bin_dir}/postgres", "-D", where, *options]
        else:
            argv, variables = [f"{bin_dir}/postgres", *options], variables | {"PGDATA": where}
        entry = pwd.getpwnam(self.template.user) if self.template.user is not None else None
        with (self.top / "hand.log").open("ab") as log:
            process = subprocess.Popen(
                argv,
                user=entry.pw_uid if entry else None,
                group=entry.pw_gid if entry else None,
                extra_groups=[] if entry else None,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=variables,
                start_new_session=True,
            )
        self.hands.append(process)

    def tidy(self) -> None:
        """Before a start by hand: a dead postmaster that nobody has reaped yet would be taken for alive.

        (PID 1 may take its time. At a start of its own the fencer does the same.)
        """
        self.hands = [p for p in self.hands if p.poll() is None]
        for path in (self.data / "postmaster.pid", self.top / "s" / f".s.PGSQL.{self.port}.lock"):
            with contextlib.suppress(OSError):
                pid = (path.read_text().split() or ["0"])[0]
                if pid == "0" and self.pids():
                    continue  # it is being written
                if pid == "0" or (Path(f"/proc/{pid}").exists() and not processes._alive(int(pid))):
                    path.unlink()

    def in_recovery(self) -> bool | None:
        """Whether it is a read-only standby; None: nobody answers."""
        try:
            with self.connect() as c:
                row = c.execute("SELECT pg_is_in_recovery()").fetchone()
        except psycopg.Error:
            return None
        return bool(row and row[0])

    def cluster_state(self) -> str:
        """As pg_controldata has it."""
        return self.control("Database cluster state")

    def control(self, field: str) -> str:
        """One line of pg_controldata."""
        argv = [f"{self.template.postgres.bin_dir}/pg_controldata", "-D", str(self.data)]
        out = run_as(self.template.user, argv, self.template.postgres.library_dir, 10).stdout
        return next(line.split(":", 1)[1].strip() for line in out.splitlines() if line.startswith(field))

    @contextlib.contextmanager
    def writing(self, pause_s: float = PAUSE_S) -> Iterator[Writer]:
        """A Writer that has written."""
        writer = Writer(self, pause_s)
        try:
            self.wait(lambda: writer.acks, "the writer writes")
            yield writer
        finally:
            writer.stop()

    def send(self, pid: int, number: signal.Signals) -> None:
        assert processes.send(pid, number, str(self.data)), f"{pid} is not PostgreSQL's any more"

    def postmaster(self) -> int:
        found = processes.postmaster(str(self.data))
        assert found is not None
        return found

    def kill_postgres(self) -> None:
        """SIGKILL to all of it, as the OOM killer or an operator's killall would.

        Until they have ended: one that is ending is no longer found, but may still hold the port.
        """
        killed: set[int] = set()
        while (pids := self.pids()) or any(processes._alive(pid) for pid in killed):
            for pid in pids:
                processes.send(pid, signal.SIGKILL, str(self.data))
            killed.update(pids)
            time.sleep(0.005)
        self.tidy()

    def promote_by_hand(self) -> None:
        argv = [f"{self.template.postgres.bin_dir}/pg_ctl", "promote", "-D", str(self.data)]
        run_as(self.template.user, argv, self.template.postgres.library_dir, 30)

    def pids(self) -> list[int]:
        return processes.of_data_dir(str(self.data))

    def wait(self, condition: object, what: str, seconds: float = 15.0) -> None:
        until = time.monotonic() + pace.wait_s(seconds)
        while time.monotonic() < until:
            if condition():  # type: ignore[operator]
                return
            time.sleep(0.05)  # a condition may look at every process of the machine
        by_hand = self.top / "hand.log"
        said = f"\nBy hand:\n{by_hand.read_text()[-2000:]}" if by_hand.exists() else ""
        raise AssertionError(f"not within {seconds:g} s: {what}\n{self.log()}{said}")

    def destroy(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        until = time.monotonic() + pace.wait_s(10)
        while self.pids() and time.monotonic() < until:
            for pid in self.pids():
                processes.send(pid, signal.SIGKILL, str(self.data))
            time.sleep(0.02)
        for process in self.hands:
            process.kill()
            process.wait()
        self._remove_cgroup()
        if os.geteuid() != 0:  # root's tests have shared memory of their own: tests/conftest.py
            give_back_memory(self.template.postgres, None, self.data)

    def _remove_cgroup(self) -> None:
        """The one that a fencer made for the data directory as fencer.json names it; what is in it is killed."""
        mount, mine = cgroup.mount_point(), cgroup.path_of("self")
        if mount is None or mine is None:
            return
        data_dir = str(json.loads(self.config.read_text())["data_dir"])
        path = mount / mine.lstrip("/") / cgroup.name_for(data_dir)
        until = time.monotonic() + pace.wait_s(10)
        while path.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):
                (path / "cgroup.kill").write_text("1")
            with contextlib.suppress(OSError):
                path.rmdir()
            time.sleep(0.005)
