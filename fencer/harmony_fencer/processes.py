"""Finding and signalling the processes of one PostgreSQL data directory, without pid races.

A process is PostgreSQL's when its executable is named postgres or postmaster and its working directory
*is* the data directory (device and inode: PostgreSQL changes into it at once, backends inherit it), or,
while it is just starting, when its -D names it. Nobody else's process is ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

NAMES = {"postgres", "postmaster"}


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def _belongs(pid: int, identity: tuple[int, int], data_dir: str) -> bool:
    """Whether `pid` is, at this moment, a live PostgreSQL process of the data directory."""
    try:
        exe = Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
        if exe not in NAMES:
            return False
        cwd = Path(f"/proc/{pid}/cwd").stat()
        if (cwd.st_dev, cwd.st_ino) == identity:
            return _alive(pid)
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"-D" in argv[:-1]:
            named = Path(os.fsdecode(argv[argv.index(b"-D") + 1]))
            there = named.stat()
            return named.is_absolute() and (there.st_dev, there.st_ino) == identity and _alive(pid)
    except (OSError, ValueError):
        return False
    else:
        return data_dir in {os.fsdecode(a) for a in argv[1:]} and _alive(pid)


def of_data_dir(data_dir: str) -> list[int]:
    """Live pids of the data directory's PostgreSQL, the postmaster first where there is one."""
    try:
        found = Path(data_dir).stat()
    except OSError:
        return []
    identity = (found.st_dev, found.st_ino)
    pids = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and _belongs(int(name), identity, data_dir)
    ]
    master = postmaster(data_dir)
    return sorted(pids, key=lambda p: (p != master, p))


def postmaster(data_dir: str) -> int | None:
    """The live postmaster's pid by postmaster.pid, verified; a stale file's pid is nobody's business."""
    try:
        first = (Path(data_dir) / "postmaster.pid").read_text().split("\n", 1)[0]
        pid = int(first)
        found = Path(data_dir).stat()
    except (OSError, ValueError):
        return None
    return pid if pid > 0 and _belongs(pid, (found.st_dev, found.st_ino), data_dir) else None


def send(pid: int, number: signal.Signals, data_dir: str) -> bool:
    """Signal `pid` through a pidfd, after verifying it again: True when it was sent."""
    try:
        found = Path(data_dir).stat()
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not _belongs(pid, (found.st_dev, found.st_ino), data_dir):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)
            return True
        return False
    finally:
        os.close(fd)


def has_ended(fd: int) -> bool:
    """Whether the process behind a pidfd has ended (zombies included)."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


def listening(port: int) -> bool:
    """Whether anything in our network namespace listens on the TCP port."""
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), Path(table).open() as lines:
            next(lines, None)
            for line in lines:
                fields = line.split()
                if fields[1].endswith(wanted) and fields[3] == "0A":
                    return True
    return False
