"""Files that must survive: sealed by a checksum, replaced whole, durable when the call returns.

The order is the promise: write the new file, fsync it, rename it over the old one, fsync the folder. A
crash between any two steps leaves the old content or the new, and a torn or foreign file does not unseal.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")


class Disk(Protocol):
    """The system calls of a replacement, one by one, so that tests can crash between them."""

    def create(self, path: Path) -> int: ...
    def write(self, fd: int, data: bytes) -> int: ...
    def fsync(self, fd: int) -> None: ...
    def close(self, fd: int) -> None: ...
    def rename(self, old: Path, new: Path) -> None: ...
    def sync_folder(self, folder: Path) -> None: ...


class RealDisk:
    """The real ones. All raise OSError."""

    def create(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o600)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


REAL = RealDisk()


def replace(path: Path, data: bytes, *, disk: Disk = REAL) -> None:
    """Durable when it returns. Raises OSError, with the old file intact. In folders of our own only."""
    temporary = path.with_name(path.name + ".new")
    fd = disk.create(temporary)
    try:
        left = data
        while left:
            left = left[disk.write(fd, left) :]
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, path)
    disk.sync_folder(path.parent)


def remove(path: Path, *, disk: Disk = REAL) -> None:
    """Gone for good when it returns; a missing file is gone already. Raises OSError."""
    path.unlink(missing_ok=True)
    disk.sync_folder(path.parent)


def read_small(path: Path, limit: int = 65536, *, tail: bool = False) -> bytes:
    """The first (or last) `limit` bytes of a plain file; what else stands there is not opened into a trap.

    For folders that belong to somebody else: a FIFO would hang its reader, a device or a huge file eat its
    memory, a symlink lead elsewhere. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        return os.pread(fd, limit, max(0, found.st_size - limit) if tail else 0)
    finally:
        os.close(fd)


async def in_thread(work: Callable[[], T], limiter: trio.CapacityLimiter | None = None) -> T:
    """Run `work` in a thread that is left behind when we are cancelled. Raises OSError where none can be started."""
    try:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except RuntimeError as e:  # "can't start new thread": the host's or the unit's limit of tasks
        raise OSError(errno.EAGAIN, str(e)) from e


def seal(body: bytes) -> bytes:
    """One line of CRC-32, one of content."""
    return b"%08x\n%s\n" % (zlib.crc32(body), body)


def unseal(raw: bytes) -> bytes:
    """Raises ValueError when a single byte is missing or another."""
    head, separator, body = raw.partition(b"\n")
    if not separator or not body.endswith(b"\n") or len(head) != 8:
        raise ValueError("it is cut short or empty")
    try:
        right = int(head, 16) == zlib.crc32(body[:-1])
    except ValueError:
        right = False
    if not right:
        raise ValueError("its checksum is wrong")
    return body[:-1]
