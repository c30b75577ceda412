"""One node for tests of the fencer: a data directory, a fencer process, and short ways to ask both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg

from harmony.demo.parts import Postgres, run_as
from harmony.fencer_client import call
from harmony_fencer import cgroup, processes, protocol

LEASE_S, FENCE_S = 2.0, 1.0


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
                    "postgres_user": template.user,
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

    # -------------------------------------------------------- the fencer

    def argv(self, *more: str) -> list[str]:
        return [sys.executable, "-I", "-m", "harmony_fencer", "--config", str(self.config), *more]

    def start(self) -> None:
        with (self.top / "fencer.log").open("ab") as log:
            self.process = subprocess.Popen(self.argv(), stderr=log, stdin=subprocess.DEVNULL, cwd="/")
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
        return call(str(self.run / "fencer.sock"), request, timeout_s=5)

    def status(self) -> protocol.Status:
        reply = self.ask(protocol.StatusRequest())
        assert isinstance(reply, protocol.Status)
        return reply

    def activate(self, term: int, order: int, seconds: float = LEASE_S) -> protocol.Reply:
        return self.ask(
            protocol.Activate(
                generation=protocol.Generation(term, order),
                deadline_boottime_ns=boot_ns() + round(seconds * 1e9),
                sync=protocol.SyncRule(0, ()),
            )
        )

    def renew(self, term: int, order: int) -> protocol.Reply:
        return self.ask(
            protocol.Renew(
                generation=protocol.Generation(term, order), deadline_boottime_ns=boot_ns() + 10 * 10**9
            )
        )

    def outcome(self, *, renewing: bool = False) -> protocol.OrderRecord:
        """The newest order's record once it has ended."""
        until = time.monotonic() + 20
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

    def promote_by_hand(self) -> None:
        argv = [f"{self.template.postgres.bin_dir}/pg_ctl", "promote", "-D", str(self.data)]
        run_as(self.template.user, argv, self.template.postgres.library_dir, 30)

    def pids(self) -> list[int]:
        return processes.of_data_dir(str(self.data))

    def wait(self, condition: object, what: str, seconds: float = 15.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if condition():  # type: ignore[operator]
                return
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds:g} s: {what}\n{self.log()}")

    def destroy(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        until = time.monotonic() + 10
        while self.pids() and time.monotonic() < until:
            for pid in self.pids():
                processes.send(pid, signal.SIGKILL, str(self.data))
            time.sleep(0.02)
        made, _ = cgroup.make(str(self.data))
        if made is not None:
            made.remove()
