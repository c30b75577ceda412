"""One rejoin at a time: a program of an earlier fencer's, which outlived it, is ended before the next begins."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import trio

from harmony_fencer.programs import PostgresError

ORPHAN_S = 10.0
PAUSE_S = 0.05


async def only_one(lock: Path, places: Iterable[Path]) -> int:
    """A lock's descriptor, for our programs to inherit: it is free when all of them have ended.

    Who holds it else works on one of `places` for a fencer that was killed, and is killed, too (two that rewind one
    directory would ruin it). Raises PostgresError, OSError.
    """
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with trio.move_on_after(ORPHAN_S):
            while not _locked(fd):
                _end(set(map(os.fsencode, places)))
                await trio.sleep(PAUSE_S)
            return fd
        raise PostgresError(
            "a pg_rewind or pg_basebackup of an earlier fencer still runs and cannot be ended"
        )
    except BaseException:
        os.close(fd)
        raise


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in {errno.EAGAIN, errno.EACCES}:
            raise
        return False
    return True


def _end(places: set[bytes]) -> None:
    """SIGKILL to all that names one of `places` as an argument."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(int(name))
            try:
                if places & set(Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)
