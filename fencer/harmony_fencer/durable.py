"""Files that must survive: sealed by a checksum, replaced whole, durable when the call returns.

The order is the promise: write the new file, fsync it, rename it over the old one, fsync the folder. A
crash between any two steps leaves the old content or the new, and a torn or foreign file does not unseal.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Protocol


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
