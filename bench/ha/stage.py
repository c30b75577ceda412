"""A cluster of a peer in a lab with its writers: what scenarios act on. Roles and rows it asks of PostgreSQL only."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import psycopg

from bench.ha.harmony import Harmony
from bench.ha.patroni import Patroni
from bench.ha.peer import CLIENT, DATABASES, PORT, SUPERUSER, Options, Peer, names
from bench.ha.records import Ack, parse, parse_unknown
from harmony.demo.client import boottime_ns
from harmony.demo.parts import find_parts
from tests.hosts.host import HostError
from tests.hosts.lab import Lab, Light
from tests.hosts.processes import Process

READY_TIMEOUT_S = 120.0
SETTLE_S = 3.0
LOCAL_PATIENCE_S = 300.0  # a local writer waits for what its primary may yet say, as long as that lives
SCHEMA = """
CREATE TABLE bench (id bigint PRIMARY KEY, written timestamptz DEFAULT clock_timestamp());
GRANT SELECT, INSERT ON bench TO app;
"""
STATE = """
SELECT NOT pg_is_in_recovery(),
       array(SELECT host(client_addr) FROM pg_stat_replication WHERE state = 'streaming'),
       array(SELECT host(client_addr) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum'))
"""


class Recorder:
    """One writer's process and its file, read as it grows."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, first: int) -> None:
        self.acks: list[Ack] = []
        self.unknown: set[int] = set()  # sent, and not acknowledged
        self._first = first
        self._process = process
        self._out = out
        self._read = 0

    def poll(self) -> list[Ack]:
        """All acknowledgements up to now."""
        with contextlib.suppress(FileNotFoundError), self._out.open("rb") as file:
            file.seek(self._read)
            fresh = file.read()
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read += len(whole)
            self.acks += parse(whole.decode())
            self.unknown |= parse_unknown(whole.decode())
        if self._process.poll() is not None:
            raise HostError(f"a writer ended by itself: {self._out.with_suffix('.log').read_text()[-1000:]}")
        return self.acks

    def stop(self) -> None:
        """End it, and read to the end."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(HostError):
            self.poll()

    def sent(self) -> set[int]:
        """Every row that may have reached a database; the last may be under way."""
        known = {ack.id for ack in self.acks} | self.unknown
        return known | {max(known, default=self._first) + 1}


@dataclass(frozen=True)
class State:
    """What a primary says: the hosts that stream from it, and those that its commits wait for."""

    primary: str
    streaming: set[str]
    synchronous: set[str]


class Stage:
    """Entered: running, replicating, written to. Left: nothing of it exists."""

    def __init__(self, options: Options, *, disks: bool, say: Callable[[str], None]) -> None:
        self.options = options
        self.say = say
        self.lab = Lab(names(options), disks=dict.fromkeys(DATABASES, 1500) if disks else None)
        self.client: Recorder | None = None
        self.local: dict[str, Recorder] = {}
        self.probes: dict[str, Recorder] = {}  # what they wrote may be lost: they see who is writable
        try:
            (self.lab.base / "parts").mkdir(mode=0o755)
            self.parts = find_parts(self.lab.base / "parts")
            made = Harmony if options.peer == "harmony" else Patroni
            self.peer: Peer = made(self.lab, self.parts, options)
        except BaseException:
            self.lab.close()
            raise

    def __enter__(self) -> Self:
        try:
            self.peer.start()
            self.wait_until(self.replicating, "three nodes that replicate", READY_TIMEOUT_S)
            state = self.state()
            assert state is not None
            self.execute(state.primary, SCHEMA)
            self._start_writers()
            self.wait_until(self.written_everywhere, "the writers' first rows", 30)
            time.sleep(SETTLE_S)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):  # not where somebody pressed Ctrl-C
            self.keep_logs()
        self.close()

    def close(self) -> None:
        """End the writers and remove the lab."""
        for recorder in self.recorders():
            recorder.stop()
        self.lab.close()

    def recorders(self) -> list[Recorder]:
        return [*([self.client] if self.client else []), *self.local.values(), *self.probes.values()]

    def keep_logs(self) -> Path:
        """Where a repeat went wrong its logs are worth more than the space they take. Returns their folder."""
        kept = self.lab.base.with_name(self.lab.base.name.replace("harmony-lab", "harmony-bench-logs"))
        for name in [*self.lab.hosts, "outside"]:
            (kept / name).mkdir(parents=True, exist_ok=True)
            for file in [*(self.lab.base / name).glob("*.log"), *(self.lab.base / name).glob("*.txt")]:
                shutil.copy(file, kept / name)
        for name in DATABASES:  # a disk is mounted where only the lab sees it
            host = self.lab.hosts[name]
            log = Path(f"/proc/{host.holder}/root{host.folder}/disk/log/postgres.log")
            if log.exists():
                shutil.copy(log, kept / name)
        self.say(f"logs are in {kept}")
        return kept

    # ------------------------------------------------------------ writers

    def _start_writers(self) -> None:
        hosts = [self.lab.hosts[name] for name in DATABASES]
        user = f"port={PORT} user=app dbname=postgres sslmode=disable gssencmode=disable"
        many = f"host={','.join(h.address for h in hosts)} {user} connect_timeout=1 target_session_attrs=read-write"
        self.client = self._writer(self.lab.hosts[CLIENT], many, 0, [])
        for number, host in enumerate(hosts, start=1):
            options = ["--at", host.name, "--patience", str(LOCAL_PATIENCE_S), "--pause", "0.01"]
            one = f"host=127.0.0.1 {user} connect_timeout=2"
            self.local[host.name] = self._writer(host, one, number * 10**12, options)
            if self.options.probes:
                alone = f"{one} options='-c synchronous_commit=local'"
                first = (len(hosts) + number) * 10**12
                self.probes[host.name] = self._writer(
                    host, alone, first, [*options, "--pause", "0.05"], "-probe"
                )

    def _writer(
        self, host: Light, conninfo: str, first: int, options: list[str], suffix: str = ""
    ) -> Recorder:
        out = self.lab.base / "outside" / f"{host.name}{suffix}.txt"
        argv = [
            sys.executable,
            "-m",
            "bench.ha.client",
            "--out",
            str(out),
            "--first",
            str(first),
            *options,
            conninfo,
        ]
        return Recorder(host.start(argv, out.with_suffix(".log"), outside=True), out, first)

    def named(self, acks: list[Ack]) -> list[Ack]:
        """With hosts by name, where libpq knows addresses."""
        by_address = {host.address: name for name, host in self.lab.hosts.items()}
        return [msgspec.structs.replace(a, host=by_address.get(a.host, a.host)) for a in acks]

    def written_everywhere(self) -> bool:
        """The client and one local writer have rows acknowledged."""
        assert self.client is not None
        return len(self.client.poll()) > 20 and any(len(r.poll()) > 20 for r in self.local.values())

    def client_wrote_since(self, since_ns: int, rows: int = 20) -> bool:
        """The client has that many rows acknowledged that it sent after `since_ns`."""
        assert self.client is not None
        return sum(ack.sent_ns > since_ns for ack in self.client.poll()[-1000:]) >= rows

    def latest_writer(self) -> str:
        """The host that acknowledged last; "" before any has."""
        latest = [recorder.poll()[-1] for recorder in self.recorders() if recorder.acks]
        found = self.named([max(latest, key=lambda ack: ack.acked_ns)]) if latest else []
        return found[0].host if found else ""

    def another_wrote_since(self, since_ns: int, old: str) -> bool:
        """Some other host than `old` has acknowledged since."""
        assert self.client is not None
        found = self.named(self.client.poll()[-500:])
        for recorder in self.local.values():
            found += recorder.poll()[-500:]
        return any(ack.host != old and ack.acked_ns > since_ns for ack in found)

    # ------------------------------------------------------------ PostgreSQL

    def _ask(self, name: str, statement: str) -> list[tuple[object, ...]]:
        address = self.lab.hosts[name].address
        conninfo = (
            f"host={address} port={PORT} user={SUPERUSER} dbname=postgres sslmode=disable connect_timeout=2"
        )
        conninfo += " options='-c statement_timeout=5s'"

        def do() -> list[tuple[object, ...]]:
            with psycopg.connect(conninfo, autocommit=True) as link:
                cursor = link.execute(statement.encode())
                return cursor.fetchall() if cursor.description else []

        return self.lab.hosts[CLIENT].in_net(do)

    def execute(self, name: str, statement: str) -> None:
        """As the superuser, at one host."""
        self._ask(name, statement)

    def state(self) -> State | None:
        """Of the host that says it is the primary (with most standbys, should two say so); None: nobody does."""
        by_address = {host.address: name for name, host in self.lab.hosts.items()}
        best: State | None = None
        for name in DATABASES:
            if not self.lab.hosts[name].running:
                continue
            try:
                ((writable, streaming, synchronous),) = self._ask(name, STATE)
            except psycopg.Error:
                continue
            assert isinstance(streaming, list)
            assert isinstance(synchronous, list)
            if writable:
                found = State(name, {by_address[a] for a in streaming}, {by_address[a] for a in synchronous})
                if best is None or len(found.streaming) > len(best.streaming):
                    best = found
        return best

    def replicating(self) -> bool:
        """A primary, two standbys that stream, and as many synchronous ones as there should be."""
        state = self.state()
        if state is None or len(state.streaming) < len(DATABASES) - 1:
            return False
        return self.options.sync == "off" or bool(state.synchronous)

    def rejoined(self, name: str, since_ns: int) -> bool:
        """A row that the client wrote elsewhere since then can be read on this host; or it is the only primary.

        What pg_stat_replication says comes and goes with a host that has diverged, and proves nothing.
        """
        assert self.client is not None
        late = [ack for ack in self.named(self.client.poll()[-1000:]) if ack.sent_ns > since_ns]
        elsewhere = next((ack for ack in late if ack.host != name), None)
        if elsewhere is None:
            state = self.state() if late else None
            return state is not None and state.primary == name
        try:
            return bool(self._ask(name, f"SELECT 1 FROM bench WHERE id = {elsewhere.id}"))  # noqa: S608 (a number)
        except psycopg.Error:
            return False

    def stored(self, name: str) -> set[int]:
        """All rows of the table, at one host."""
        return set(self.listed(name))

    def listed(self, name: str) -> list[int]:
        """The same as the table has them: an index alone would hide a row that is there twice."""
        every = "SELECT id FROM bench WHERE written IS DISTINCT FROM 'infinity'"
        return [int(str(row[0])) for row in self._ask(name, every)]

    def postmaster(self, name: str) -> Process:
        """Raises HostError when there is none."""
        found = [p for p in self.lab.hosts[name].processes("postgres") if "-D" in p.argv]
        if not found:
            raise HostError(f"{name} has no postmaster")
        return found[0]

    # ------------------------------------------------------------ waiting

    @staticmethod
    def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
        """Raises HostError saying `what` never came."""
        if not Stage.comes(condition, timeout_s):
            raise HostError(f"not within {timeout_s:g} s: {what}")

    @staticmethod
    def comes(condition: Callable[[], object], timeout_s: float) -> bool:
        """Whether it holds within that time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    @staticmethod
    def now_ns() -> int:
        """The writers' clock."""
        return boottime_ns()
