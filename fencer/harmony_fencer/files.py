"""Files in directories that belong to PostgreSQL's user: written as that user, and never by a latecomer.

Root must not write in a folder of somebody else's: a symlink there would lead it anywhere. So the writing
thread takes the owner's file system identity (setfsuid(2), which is a thread's own).

A disk may hang, and nobody waits for a thread in it (W9). Should it wake up when newer orders have been carried
out, its rename must not happen any more: a late standby.signal would mark a primary that was promoted since.
Each change gets a number; a rename happens only under the lock and only while its number is the newest (D7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from harmony_fencer.durable import REAL, Disk, in_thread

T = TypeVar("T")
BUSY_S = 1.0
_KEEP = ctypes.c_uint32(0xFFFFFFFF)  # an id that is none: the call changes nothing and tells the one in force
_libc = ctypes.CDLL(None, use_errno=True)


class Superseded(OSError):
    """A newer change has begun since: this one is not made."""


@contextlib.contextmanager
def as_user(ids: tuple[int, int] | None) -> Iterator[None]:
    """This thread's file accesses are those of (uid, gid); None: our own. Raises OSError when not allowed."""
    if ids is None:
        yield
        return
    uid, gid = ids
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    try:
        if (_libc.setfsuid(_KEEP), _libc.setfsgid(_KEEP)) != (uid, gid):
            raise OSError(f"no permission to act as uid {uid}, gid {gid} (CAP_SETUID, CAP_SETGID)")
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


class Change:
    """One numbered change, in its thread."""

    def __init__(self, files: Files, number: int) -> None:
        self._files, self._number = files, number

    def write(self, path: Path, content: bytes, mode: int = 0o600) -> None:
        """Replace a file, durably. Raises Superseded, OSError."""
        disk = self._files.disk
        temporary = path.with_name(f".{path.name}.{self._number}.new")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            os.fchmod(fd, mode)
            left = content
            while left:
                left = left[disk.write(fd, left) :]
            disk.fsync(fd)
        finally:
            disk.close(fd)
        with self._files.newest(self._number, temporary):
            disk.rename(temporary, path)
            disk.sync_folder(path.parent)

    def act(self, work: Callable[[], None]) -> None:
        """Another short change of names, under the same rule. Raises Superseded, OSError."""
        with self._files.newest(self._number):
            work()


class Files:
    """Of one data directory; `ids`: (uid, gid) of its owner, None for our own."""

    def __init__(self, ids: tuple[int, int] | None, disk: Disk = REAL) -> None:
        self._ids, self.disk = ids, disk
        self._lock = threading.Lock()
        self._number = 0

    async def change(self, work: Callable[[Change], T], *, own: bool = False) -> T:
        """Run `work` in a thread; when cancelled, leave it behind. Raises what it raises, and OSError.

        `own`: as ourselves, for a folder that is not the owner's.
        """
        self._number += 1  # here, in the order of the calls: a thread may be scheduled late
        change = Change(self, self._number)

        def as_owner() -> T:
            with self._held():
                pass  # an earlier rename under way ends first, or the disk hangs
            with as_user(None if own else self._ids):
                return work(change)

        return await in_thread(as_owner)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=BUSY_S):
            raise OSError(f"an earlier write has hung for {BUSY_S:g} s: the disk does not answer")
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def newest(self, number: int, temporary: Path | None = None) -> Iterator[None]:
        """Held while the change `number` is the newest. Raises Superseded."""
        with self._held():
            if number != self._number:
                if temporary is not None:
                    temporary.unlink(missing_ok=True)
                raise Superseded("a newer order has changed these files since")
            yield
