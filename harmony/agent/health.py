"""Whether PostgreSQL here is hung, or only busy: what an unprivileged process on its host can see of that.

Beside the probe's question (probe.py): does the postmaster answer a greeting on its socket, is it stopped, does WAL get
to the disk that somebody waits for, does the disk answer who asks for a file, has it crashed and recovered by itself,
is there room left. It decides nothing, and how long a symptom must last is the core's (core/sickness.py). Where allowed
it writes a message into the WAL.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import trio

from harmony.agent.probe import Probe, Target, Vitals
from harmony.core.messages import DbSeen, DbSilent, HealthSeen, Symptom
from harmony.core.timing import NS

Greeting = Literal["answered", "full", "starting", "silent", "gone"]
WriteProbe = Literal["off", "suspicion", "always"]
GREET_S = 2.0  # between greetings while the probe's own session is answered: each costs PostgreSQL a fork
DISK_S = 10.0
STUCK_LOOKS = 2  # in a row with no WAL flushed that somebody waits for, before it is a symptom
WAITING_LOOKS = 4  # in a row before the message is written, and before a wait for a standby is told
IDLE_LOOKS = 10  # likewise where nobody waits for anything
HELD_S = 5.0  # in one and the same wait for a file: no disk is that busy
# The wire protocol's SSLRequest and StartupMessage, and an ErrorResponse's field C: SQLSTATEs, in no language.
_SSL_REQUEST = struct.pack("!II", 8, 80877103)
_PROTOCOL = 196608
_CODES: dict[bytes, Greeting] = {b"53300": "full", b"57P03": "starting"}
_PEER = struct.Struct("3i")
_LONGEST_ERROR = 8192
T = TypeVar("T")


class Errand:
    """A blocking call in a thread that is left behind where it does not come back; then no other is begun."""

    def __init__(self) -> None:
        self.away = False

    async def run(self, do: Callable[[], T], timeout_s: float) -> T | None:
        """None: it did not come back in time, or another has not yet."""
        if self.away:
            return None

        def call() -> T:
            try:
                return do()
            finally:
                self.away = False

        self.away = True
        with trio.move_on_after(timeout_s):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
        return None


def switches(pid: int) -> str:
    """How often the process has left its core so far; "": not known, or it is not in an uninterruptible sleep now."""
    if process_state(pid) != "D":
        return ""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        return " ".join(line for line in status if "ctxt_switches" in line)
    return ""


class Held:
    """Who waits for a disk in one and the same system call: who has slept in between has got something from it."""

    def __init__(self, look: Callable[[int], str] = switches) -> None:
        self._look = look
        self._since: dict[int, tuple[str, int]] = {}

    def longest_s(self, pids: Iterable[int], now_ns: int) -> float:
        """The longest such wait of these, as far as it was seen."""
        before, self._since = self._since, {}
        for pid in pids:
            now = self._look(pid)
            if now:
                then, since_ns = before.get(pid, ("", now_ns))
                self._since[pid] = (now, since_ns if then == now else now_ns)
        return max(((now_ns - since) / NS for _, since in self._since.values()), default=0.0)


class Greeter:
    """Says hello to the postmaster, as a client does. One that is not answered is waited for, never repeated:
    a stopped postmaster's queue must not fill with what nobody waits for."""

    def __init__(self, target: Target) -> None:
        self._path = str(Path(target.socket_dir.split(",", maxsplit=1)[0]) / f".s.PGSQL.{target.port}")
        words = (b"user", target.user.encode(), b"database", target.dbname.encode(), b"")
        body = struct.pack("!I", _PROTOCOL) + b"\0".join(words) + b"\0"
        self._startup = struct.pack("!I", len(body) + 4) + body
        self._socket: socket.socket | None = None
        self.postmaster = 0  # its pid; 0: not known

    def greet(self, timeout_s: float, *, named: bool) -> Greeting:
        """`named`: ask for a session, and so learn why there is none. Else for encryption: cheaper, never refused."""
        try:
            if self._socket is None:
                self._connect(timeout_s, self._startup if named else _SSL_REQUEST)
            answer = self._answer(timeout_s)
        except (FileNotFoundError, ConnectionRefusedError):
            return "gone"
        except (TimeoutError, BlockingIOError):
            return "silent"
        except OSError:  # whoever had it in hand died
            answer = b""
        self.close()
        return _CODES.get(_sqlstate(answer), "answered")

    def _connect(self, timeout_s: float, hello: bytes) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout_s)
            made.connect(self._path)
            self.postmaster = _PEER.unpack(
                made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )[0]
            made.sendall(hello)
        except OSError:
            made.close()
            raise
        self._socket = made

    def _answer(self, timeout_s: float) -> bytes:
        assert self._socket is not None  # noqa: S101 (for the type checker)
        self._socket.settimeout(timeout_s)
        answer = b""
        while not answer or (answer[:1] == b"E" and len(answer) < _LONGEST_ERROR):
            more = self._socket.recv(4096)
            if not more:
                break
            answer += more
        return answer

    def close(self) -> None:
        """Forget the greeting under way."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _sqlstate(answer: bytes) -> bytes:
    if answer[:1] != b"E":
        return b""
    fields = (f for f in answer[5:].split(b"\0") if f)
    return next((f[1:] for f in fields if f[:1] == b"C"), b"")


def process_state(pid: int) -> str:
    """The state of PostgreSQL's process `pid` (proc(5): T stopped, D waits for a disk); "": not known."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    except OSError:
        return ""
    return tail.split()[0] if head.partition("(")[2] in {"postgres", "postmaster"} else ""


def waiting_for_disk(postmaster: int) -> bool:
    """Whether it or one of its processes is in uninterruptible sleep now; False where that cannot be seen."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        return any(process_state(int(pid)) == "D" for pid in [str(postmaster), *children])
    return False


@dataclass(frozen=True)
class Signs:
    """What one look has found. `vitals` None: the probe's question was not answered, or (`refused`) by an error.
    `greeting` "": none was due."""

    vitals: Vitals | None
    refused: str = ""
    greeting: Greeting | Literal[""] = ""
    process: str = ""
    disk_wait: bool = False
    notes: tuple[str, ...] = ()
    held_s: float = 0.0  # the longest wait for a file that is still the same


class Diagnosis:
    """Makes of one look after the other what the core is told. No I/O."""

    def __init__(self) -> None:
        self._flushed = -1
        self._born: tuple[str, str] | None = None
        self.still = 0  # looks in a row that have seen the same WAL position
        self.stuck = 0  # of them, the newest in which somebody waited for it to be flushed
        self.waited = 0  # likewise for a standby

    def judge(self, s: Signs, asked_ns: int) -> HealthSeen:
        """One look's symptom, with the evidence. What is told of a symptom never changes while it is the same."""
        crashed = self._count(s.vitals)
        notes = list(s.notes)
        if s.vitals is not None and s.vitals.sessions >= s.vitals.limit > 0:
            notes.append(f"all {s.vitals.limit} connections are used up: no client gets in")
        if self.waited >= WAITING_LOOKS and not self.stuck:
            notes.append("sessions wait for a synchronous standby; the WAL itself gets to the disk")
        symptom, why = self._symptom(s)
        if s.vitals is None and (
            s.greeting == "full" or (s.refused and not symptom and s.greeting != "gone")
        ):
            notes.append(f"the probe is refused: {s.refused or 'all connections are used up'}")
        if symptom and s.disk_wait:
            why += "; some of its processes wait for a disk (state D)"
        blind = s.vitals is None and not symptom and s.greeting != "gone"
        return HealthSeen(asked_ns, symptom, why, blind, crashed, "; ".join(notes))

    def _symptom(self, s: Signs) -> tuple[Symptom, str]:
        if s.process in {"T", "t"}:
            return "stopped", "its postmaster was stopped by a signal (state T) and lets nobody in"
        if s.vitals is None:
            if s.greeting == "starting":
                return "closed", "it starts, recovers or shuts down, and lets nobody in (57P03)"
            # An error is an answer: connections used up, a wrong password. And what is gone is the fencer's to see.
            if s.greeting in {"full", "gone"} or (s.greeting == "answered" and s.refused):
                return "", ""
            new = "takes a new session" if s.greeting == "answered" else "nor a new session"
            return "silent", f"the probe's question is not answered, {new}"
        if s.greeting == "silent":
            return "closed", "old sessions are answered, and its postmaster lets no new one in"
        if self.stuck >= STUCK_LOOKS:
            return "stalled", "sessions wait for WAL to be flushed, and its position stands still"
        if s.held_s >= HELD_S:
            return "hung", f"one of its files was asked for, and the disk has not answered for {HELD_S:g} s"
        return "", ""

    def _count(self, vitals: Vitals | None) -> bool:
        """Whether it has crashed and recovered since: another checkpointer below the same postmaster."""
        if vitals is None:
            self.still = self.stuck = self.waited = 0
            return False
        same = vitals.flushed == self._flushed
        self._flushed = vitals.flushed
        self.still = self.still + 1 if same else 0
        self.stuck = self.stuck + 1 if same and vitals.wal_waiters else 0
        self.waited = self.waited + 1 if same and vitals.sync_waiters else 0
        born, before = (vitals.postmaster_born, vitals.checkpointer_born), self._born
        if not all(born):  # it is about to have one, or the probe may not see it
            return False
        self._born = born
        return before is not None and before[0] == born[0] and before[1] != born[1]


class Health:
    """`await look(asked_ns, answer)` after each question of the probe."""

    def __init__(
        self, probe: Probe, target: Target, data_dir: str, *, write_probe: WriteProbe, disk_free_mb: int
    ) -> None:
        self._probe = probe
        self._greeter = Greeter(target)
        self._diagnosis = Diagnosis()
        self._held = Held()
        self._data_dir = Path(data_dir)
        self._write_probe: WriteProbe = write_probe
        self._disk_free_mb = disk_free_mb
        self._greeting, self._writing, self._room = Errand(), Errand(), Errand()
        self._greeted_ns = self._roomed_ns = 0
        self._low = self._failed = ""
        self._last: Greeting = "answered"

    async def look(self, asked_ns: int, answer: DbSeen | DbSilent, timeout_s: float) -> HealthSeen:
        """What is seen now; takes no longer than `timeout_s` for each of three things."""
        vitals = self._probe.vitals if isinstance(answer, DbSeen) else None
        greeting: Greeting | Literal[""] = ""
        due = asked_ns - self._greeted_ns >= GREET_S * NS or self._last == "silent"
        if vitals is None or due:
            named = vitals is None
            found = await self._greeting.run(
                lambda: self._greeter.greet(timeout_s, named=named), 2 * timeout_s
            )
            greeting = self._last = found or "silent"
            self._greeted_ns = asked_ns
        if self._disk_free_mb and asked_ns - self._roomed_ns >= DISK_S * NS:
            self._roomed_ns = asked_ns
            low = await self._room.run(self._measure, timeout_s)
            self._low = "the disk does not tell how much room it has" if low is None else low
        postmaster = self._greeter.postmaster
        process = process_state(postmaster) if postmaster else ""
        disk_wait = (vitals is None or self._diagnosis.stuck > 0) and waiting_for_disk(postmaster)
        notes = tuple(n for n in (self._low, self._failed) if n)
        refused = self._probe.refused if vitals is None else ""
        held_s = self._held.longest_s(vitals.file_waiters if vitals is not None else (), asked_ns)
        signs = Signs(vitals, refused, greeting, process, disk_wait, notes, held_s)
        seen = self._diagnosis.judge(signs, asked_ns)
        if isinstance(answer, DbSeen) and answer.db == "primary" and self._suspicious():
            failed = await self._writing.run(self._probe.write, timeout_s)
            self._failed = failed if failed is not None else self._failed
        return seen

    def _suspicious(self) -> bool:
        """Whether a write is worth its while: then there is somebody for certain who waits for the disk alone."""
        d = self._diagnosis
        if self._write_probe == "off":
            return False
        return max(d.stuck, d.waited) >= WAITING_LOOKS or (
            self._write_probe == "always" and d.still >= IDLE_LOOKS
        )

    def _measure(self) -> str:
        low = []
        for place in (self._data_dir, self._data_dir / "pg_wal"):
            with contextlib.suppress(OSError):  # below the data directory it may not be allowed to look
                found = os.statvfs(place)
                free_mb = found.f_bavail * found.f_frsize // 2**20
                if free_mb < self._disk_free_mb:
                    low.append(
                        f"less than {self._disk_free_mb} MB free on the disk of {place} (sickness.disk_free_mb)"
                    )
        return "; ".join(dict.fromkeys(low))
