"""Finding and signalling the processes of one PostgreSQL data directory, without pid races.

A process is PostgreSQL's when its executable is named postgres or postmaster and its working directory
*is* the data directory (device and inode: PostgreSQL changes into it at once, backends inherit it), or,
while it is just starting, when its arguments or PGDATA name it; and so are the descendants of such a
process (an archive_command, a COPY … PROGRAM) and what these left in its session. Every signal goes
through a pidfd that was opened before the process was verified: a pid that has passed to another program
is never signalled.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec

from harmony_fencer.clock import boot_id
from harmony_fencer.decoding import decoded
from harmony_fencer.durable import read_small, seal, unseal

NAMES = {"postgres", "postmaster"}
MAX_PASSES = 50
EXEC_S = 0.03
EXEC_POLL_S = 0.0002
LISTENERS_S = 0.05  # whose name comes later stays unknown: no message is worth a late fence
GONE = (FileNotFoundError, ProcessLookupError, NotADirectoryError)
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # of the host or of us: nothing is known by a failure


class Identity(NamedTuple):
    """Directories by (device, inode), the same through every symlink and bind mount, and whom PostgreSQL runs as."""

    places: frozenset[tuple[int, int]]
    owner: int


class Notes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where PostgreSQL of the data directory `path` may live, in this boot."""

    boot_id: str
    path: str
    places: tuple[tuple[int, int], ...]


class Place:
    """A data directory by its path, and every directory that has stood there since the last proof that nobody
    lives in it: one that was renamed or replaced under a running PostgreSQL is still its own.

    `owner`: PostgreSQL's uid (None: the directory's). `notes`: a file in which the next fencer, and a one-shot
    beside us, find what we saw. It means nothing in another boot.
    """

    def __init__(self, path: str, owner: int | None = None, notes: Path | None = None) -> None:
        self.path, self._owner, self._notes = path, owner, notes
        self._known: set[tuple[int, int]] = self._noted()
        self.identity()

    def identity(self) -> Identity | None:
        """All that was seen there; None while nothing was."""
        found = identity(self.path)
        if found is not None:
            self._owner = found.owner if self._owner is None else self._owner
            if not found.places <= self._known:
                self._known |= found.places
                self._note()
        if not self._known or self._owner is None:
            return None
        return Identity(frozenset(self._known), self._owner)

    def forget(self) -> None:
        """Nobody lives in any of them: a directory that is gone may leave its number to another program's."""
        found = identity(self.path)
        now = set(found.places) if found is not None else set[tuple[int, int]]()
        if now != self._known:
            self._known = now
            self._note()

    def _noted(self) -> set[tuple[int, int]]:
        if self._notes is None:
            return set()
        try:
            notes = decoded(msgspec.json.Decoder(Notes), unseal(read_small(self._notes)))
        except (OSError, ValueError):
            return set()
        return set(notes.places) if (notes.boot_id, notes.path) == (boot_id(), self.path) else set()

    def _note(self) -> None:
        if self._notes is None:
            return
        raw = seal(msgspec.json.encode(Notes(boot_id(), self.path, tuple(sorted(self._known)))))
        temporary = self._notes.with_name(f"{self._notes.name}.{os.getpid()}.new")
        with contextlib.suppress(OSError):  # without them only a directory that is moved later is not found
            temporary.write_bytes(raw)
            temporary.rename(self._notes)


Data = str | Place


def _path(data: Data) -> str:
    return data.path if isinstance(data, Place) else data


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat after the name: state, ppid, …; [] when it is gone. Raises OSError: cannot tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except GONE:
        return []


def _alive(pid: int) -> bool:
    """Not ended: PID 1 may reap an orphan late, a zombie is dead all the same."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in {"Z", "X"}


def spent(pid: int) -> bool:
    """Whether every thread of it is in uninterruptible sleep, and SIGKILL is pending for it.

    Such a thread never returns to user mode (signal(7): a fatal signal is acted upon before that). Only what it is
    in the middle of in the kernel may still end: a write to the disk that it waits for. Raises OSError: cannot tell.
    """
    try:
        tasks = [Path(f"/proc/{pid}/task/{name}/status") for name in os.listdir(f"/proc/{pid}/task")]
        return all(_killed_in_kernel(task.read_text()) for task in tasks)
    except GONE:
        return not _alive(pid)


def _killed_in_kernel(status: str) -> bool:
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    state, kill = fields["State"].split()[0], 1 << (signal.SIGKILL - 1)
    return state in {"Z", "X"} or (state == "D" and bool(int(fields["SigPnd"], 16) & kill))


def identity(data: Data) -> Identity | None:
    """None when there is no such directory."""
    if isinstance(data, Place):
        return data.identity()
    try:
        found = Path(data).stat()
    except OSError:
        return None
    return Identity(frozenset({(found.st_dev, found.st_ino)}), found.st_uid)


def _arguments(pid: int, until: float) -> bytes:
    """/proc/PID/cmdline. In the middle of an exec the new executable is seen before its arguments: wait for them."""
    while not (raw := Path(f"/proc/{pid}/cmdline").read_bytes()) and _alive(pid) and time.monotonic() < until:
        time.sleep(EXEC_POLL_S)  # not a mere yield: at real-time priority that lets nobody run
    return raw


def _named(pid: int, until: float) -> list[str]:
    """The data directory that a starting postgres was told, before it has changed into it."""
    argv = [os.fsdecode(a) for a in _arguments(pid, until).split(b"\0")]
    found = [b for a, b in pairwise(argv) if a == "-D"]
    for argument in argv[1:]:
        if argument.startswith("-D"):
            found.append(argument[2:])
        elif argument.startswith("--data") and "=" in argument:
            found.append(argument.partition("=")[2])
    if not found:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found = [os.fsdecode(e[7:]) for e in environment if e.startswith(b"PGDATA=")]
    return [f for f in found if f]


def belongs(pid: int, wanted: Identity, until: float | None = None) -> bool:
    """Whether `pid` is, at this moment, a live PostgreSQL process of the data directory.

    Raises OSError where that cannot be told (no descriptor or memory is left): never a "no".

    `until` (monotonic): how long one in the middle of its exec is waited for; one look has one such time, or
    any user could hold a fence up with many processes called postgres that have no arguments.
    """
    try:
        # PostgreSQL runs as the owner and nobody else; root stands here for a process that is not dumpable.
        uid = Path(f"/proc/{pid}").stat().st_uid
        if uid not in {wanted.owner, 0}:
            return False
        exe = Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
        if exe not in NAMES:
            return False
        cwd = Path(f"/proc/{pid}/cwd")
        there = cwd.stat()
        if (there.st_dev, there.st_ino) in wanted.places:
            return _alive(pid)
        base, until = cwd.readlink(), until or time.monotonic() + EXEC_S
        named = [identity(str(base / name)) for name in _named(pid, until)]
        return any(n is not None and n.places & wanted.places for n in named) and _alive(pid)
    except GONE:
        return False
    except PermissionError:
        if os.geteuid() == 0 and uid == wanted.owner != 0:
            raise
        return False  # nobody of PostgreSQL's user: a host's process 1 may be closed even to root


def of_data_dir(data: Data) -> list[int]:
    """Live pids of the data directory's PostgreSQL, the postmaster first. Raises OSError: cannot tell."""
    wanted = identity(data)
    if wanted is None:
        return []
    until = time.monotonic() + EXEC_S
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and belongs(int(name), wanted, until)]
    master = postmaster(data)
    return sorted(pids, key=lambda p: (p != master, p))


def pid_file(data: Data) -> int | None:
    """What postmaster.pid says, true or stale. Raises OSError where we are too exhausted to read it."""
    try:
        pid = int(read_small(Path(_path(data)) / "postmaster.pid", 64).split(b"\n", 1)[0])
    except OSError as e:
        if e.errno in EXHAUSTED:
            raise
        return None
    except ValueError:
        return None
    return pid if pid > 0 else None


def postmaster(data: Data) -> int | None:
    """The live postmaster's pid by postmaster.pid, verified; a stale file's pid is nobody's business.

    Raises OSError: cannot tell.
    """
    wanted, pid = identity(data), pid_file(data)
    return pid if pid is not None and wanted is not None and belongs(pid, wanted) else None


def children(pid: int) -> list[int]:
    """Direct children (CONFIG_PROC_CHILDREN; [] where the kernel does not tell, or it has ended)."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(c) for c in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def in_sessions(leaders: Iterable[int], data: Data) -> list[int]:
    """Who is in the session of one of `leaders`, as the data directory's owner: what a helper left behind in the
    background when it ended (its parent is PID 1 by then)."""
    wanted, found, whose = {str(pid) for pid in leaders}, [], identity(data)
    if not wanted or whose is None:
        return []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit() and wanted.intersection(_stat(int(name))[3:4]):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{name}").stat().st_uid == whose.owner:
                        found.append(int(name))
    return found


def describe(pid: int) -> str:
    """For the operator: what it is, its state, and where in the kernel it waits. Never raises."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        title = ""
    fields, where = ["?"], ""
    with contextlib.suppress(OSError):
        fields = _stat(pid)
        where = Path(f"/proc/{pid}/wchan").read_text().strip("0\n")
    state = fields[0] if fields else "gone"
    return f"{pid} {' '.join(title.split())[:60]!r} (state {state}{', in ' + where if where else ''})"


class Pinned:
    """Processes held by pidfds, so that what is signalled is what was verified. Close it when done."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._sessions: set[int] = set()  # of backends and workers: each leads one of its own

    def catch(self, data: Data, pids: Iterable[int]) -> list[int]:
        """Pin those of `pids` that belong to the data directory, and their descendants; the new ones.

        A zombie is pinned, for its session, but new to nobody: it is let go of at once, as it has ended, and would
        be new in each look until its parent reaps it. A frozen postmaster does not, and PID 1 may take seconds.
        """
        wanted, master = identity(data), pid_file(data)
        self._forget_ended()
        new: list[int] = []
        waiting = [(pid, 0) for pid in pids]
        while waiting:
            pid, parent = waiting.pop(0)
            if pid not in self._fds and self._pin(pid, parent, wanted) and _alive(pid):
                new.append(pid)
            if pid in self._fds:
                waiting += [(child, pid) for child in children(pid)]
        if master is not None:
            self._sessions.discard(master)  # it may be the session of a shell that somebody works in
        return new

    def catch_left_behind(self, data: Data) -> list[int]:
        """Pin what helpers of pinned processes left in the background; the new ones."""
        found = [p for p in in_sessions(self._sessions, data) if p not in self._fds]
        new = [pid for pid in found if self._pin(pid, 0, None, self._sessions) and _alive(pid)]
        return new + self.catch(data, new)

    def adopt(self, pid: int) -> bool:
        """Pin a child of this very process."""
        return pid in self._fds or self._pin(pid, os.getpid(), None)

    def _pin(self, pid: int, parent: int, wanted: Identity | None, sessions: Iterable[int] = ()) -> bool:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            fields = _stat(pid)
            if (
                (parent and fields[1:2] == [str(parent)])
                or (wanted is not None and belongs(pid, wanted))
                or (fields[3:4] and int(fields[3]) in sessions)
            ):
                self._fds[pid] = fd
                if fields[3:4] == [str(pid)]:
                    self._sessions.add(pid)
                return True
            return False
        finally:
            if pid not in self._fds:
                os.close(fd)

    def _forget_ended(self) -> None:
        """Their numbers may come back as other processes of PostgreSQL, which must be pinned anew."""
        left = set(self.left())
        for pid in [p for p in self._fds if p not in left]:
            os.close(self._fds.pop(pid))

    def send(self, number: signal.Signals, only: Iterable[int] | None = None) -> int:
        """Signal all, or `only` those; how many were there to take it."""
        sent = 0
        for pid in list(self._fds) if only is None else only:
            with contextlib.suppress(OSError, KeyError):  # gone, or it has become another user's
                signal.pidfd_send_signal(self._fds[pid], number)
                sent += 1
        return sent

    def stop(self, data: Data, skip: set[int]) -> int:
        """SIGSTOP to the whole tree until a look finds nobody new: a stopped process forks no more.

        The postmaster and its children first, which needs no look at all of /proc; then orphans. Those in
        `skip` are pinned and get no signal (their cgroup is frozen). Returns how many were sent.
        """
        master = postmaster(data)

        def near() -> list[int]:
            return self.catch(data, [master] if master is not None else [])

        def far() -> list[int]:
            return self.catch(data, [*of_data_dir(data), *self._fds]) + self.catch_left_behind(data)

        return self._stop_new(skip, near) + self._stop_new(skip, far)

    def _stop_new(self, skip: set[int], look: Callable[[], list[int]]) -> int:
        total = 0
        for _ in range(MAX_PASSES):
            new = look()
            total += self.send(signal.SIGSTOP, [p for p in new if p not in skip])
            if not new:
                break
        return total

    def left(self) -> list[int]:
        """Those that have not ended (a zombie has), as far as it can be told. Never raises."""
        poller = select.poll()
        for fd in self._fds.values():
            poller.register(fd, select.POLLIN)
        try:
            ended = {fd for fd, _ in poller.poll(0)}
        except OSError:
            ended = set()
        return [pid for pid, fd in self._fds.items() if fd not in ended]

    def close(self) -> None:
        """Let go of all."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._sessions.clear()


def end_starter(pid: int, data: Data) -> None:
    """SIGKILL to our child `pid` (pg_ctl) and what it has begun and is not PostgreSQL yet: in the moment
    between its fork and PostgreSQL's exec, nobody would find that later, and it would start after all.

    What is PostgreSQL already is left as it is. Never raises.
    """
    wanted, pinned = identity(data), Pinned()
    try:
        with contextlib.suppress(OSError):
            pinned.adopt(pid)
            pinned.send(signal.SIGSTOP)
            for _ in range(MAX_PASSES):
                held = list(pinned._fds)  # noqa: SLF001
                below = [
                    (child, parent) for parent in held for child in children(parent) if child not in held
                ]
                new = [
                    child
                    for child, parent in below
                    if not (wanted is not None and belongs(child, wanted))
                    and pinned._pin(child, parent, None)  # noqa: SLF001
                ]
                pinned.send(signal.SIGSTOP, new)
                if not new:
                    break
        pinned.send(signal.SIGKILL)
    finally:
        pinned.close()


def send(pid: int, number: signal.Signals, data: Data) -> bool:
    """Signal one process of the data directory, after verifying it again: True when it was sent."""
    pinned, wanted = Pinned(), identity(data)
    try:
        return pinned._pin(pid, 0, wanted) and pinned.send(number) == 1  # noqa: SLF001
    finally:
        pinned.close()


def has_ended(fd: int) -> bool:
    """Whether the process behind a pidfd has ended (zombies included)."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


def listening(port: int) -> bool:
    """Whether anything in our network namespace listens on the TCP port. Raises OSError: cannot tell."""
    return bool(_sockets(port))


def _sockets(port: int) -> set[str]:
    wanted, found = f":{port:04X}", set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), Path(table).open() as lines:
            next(lines, None)
            for line in lines:
                fields = line.split()
                if fields[1].endswith(wanted) and fields[3] == "0A":
                    found.add(f"socket:[{fields[9]}]")
    return found


def listeners(port: int) -> str:
    """Who listens on the port, in words; looks at every process: for the failure's message only. Never raises."""
    try:
        wanted, names = _sockets(port), os.listdir("/proc")
    except OSError as e:
        return f"it cannot be told who, or whether at all ({e})"
    found, until = [], time.monotonic() + LISTENERS_S
    for name in names:
        if name.isdigit() and time.monotonic() < until:
            with contextlib.suppress(OSError):
                if any(str(fd.readlink()) in wanted for fd in Path(f"/proc/{name}/fd").iterdir()):
                    found.append(describe(int(name)))
    return ", ".join(found) or "a process that cannot be seen from here (another pid or user namespace?)"
