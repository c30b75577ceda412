"""The most that this node has ever seen of the store, on the agent's own disk, so that a lost history is noticed.

The order is the promise, as in the fencer: write the new file, fsync it, rename it over the old one, fsync the
folder. A crash between any two steps leaves the old content or the new. A missing file is a first start; one that
cannot be believed is *damage*, never less than was seen; one of another cluster.id keeps this node from taking part
until an operator moves it. It decides nothing, and nobody waits for its disk.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
import trio

from harmony.core.messages import Marks, Remembered
from harmony.decoding import Unreadable, decoded

NAME = "store.json"
SLOW_S = 5.0
LONGEST_BYTES = 65536
log = structlog.get_logger("memory")


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


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's content. Another cluster's marks mean nothing here, but that there are some does."""

    cluster_id: str
    marks: Marks


_stored: msgspec.json.Decoder[Stored] = msgspec.json.Decoder(Stored)


def encode(stored: Stored) -> bytes:
    """One line of CRC-32, one of JSON."""
    body = msgspec.json.encode(stored)
    return b"%08x\n%s\n" % (zlib.crc32(body), body)


def decode(raw: bytes) -> Stored:
    """Raises ValueError when a single byte is missing or another."""
    head, separator, body = raw.partition(b"\n")
    if not separator or not body.endswith(b"\n") or len(head) != 8:
        raise ValueError("it is cut short or empty")
    if head != b"%08x" % zlib.crc32(body[:-1]):
        raise ValueError("its checksum is wrong")
    try:
        return decoded(_stored, body)
    except Unreadable as e:
        raise ValueError(f"it is not of this version: {e}") from e


def save(folder: Path, stored: Stored, *, disk: Disk = REAL) -> None:
    """Durable when it returns. Raises OSError, with the old file intact."""
    path = folder / NAME
    temporary = folder / f"{NAME}.new"
    fd = disk.create(temporary)
    try:
        left = encode(stored)
        while left:
            left = left[disk.write(fd, left) :]
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, path)
    disk.sync_folder(folder)


def load(folder: Path, cluster_id: str) -> Remembered:
    """What the disk holds; `damage` says why it cannot be believed, and where it is."""
    path = folder / NAME
    try:
        stored = decode(_read(path))
    except FileNotFoundError:
        return Remembered(Marks())
    except (OSError, ValueError) as e:
        return Remembered(Marks(), f"{path}: {e}")
    if stored.cluster_id != cluster_id:
        log.warning("what was remembered is of another cluster", path=str(path), cluster=stored.cluster_id)
        return Remembered(Marks(), was_in=stored.cluster_id)
    return Remembered(stored.marks)


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        return os.read(fd, LONGEST_BYTES)
    finally:
        os.close(fd)


class Memory:
    """`keep()` returns at once; `run()` writes, one at a time, only the newest."""

    def __init__(self, folder: Path, cluster_id: str, disk: Disk = REAL) -> None:
        self._folder, self._cluster_id, self._disk = folder, cluster_id, disk
        self._newest: Marks | None = None
        self._wanted = trio.Event()
        self._since: float | None = None
        self._failure = ""

    @property
    def failure(self) -> str:
        """Why the newest marks are not on disk ("" where they are, or soon will be)."""
        if self._since is not None and trio.current_time() - self._since > SLOW_S:
            return f"{self._folder / NAME}: the disk has not answered for {SLOW_S:g} s"
        return self._failure

    def keep(self, marks: Marks) -> None:
        """To be written soon. What was not written yet is replaced."""
        self._newest = marks
        self._wanted.set()

    async def run(self) -> None:
        """For ever. A disk that fails is reported, and tried again with the next marks."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            if self._newest is not None:
                await self._save(Stored(self._cluster_id, self._newest))

    async def _save(self, stored: Stored) -> None:
        before, self._since = self._failure, trio.current_time()
        try:
            work = partial(save, self._folder, stored, disk=self._disk)
            await trio.to_thread.run_sync(work, abandon_on_cancel=True)
            self._failure = ""
        except (OSError, RuntimeError) as e:  # RuntimeError: no thread can be started
            self._failure = f"{self._folder / NAME} cannot be written: {e}"
        finally:
            self._since = None
        if self._failure != before:
            level = log.error if self._failure else log.info
            level("memory of the store", why=self._failure or "kept again")
