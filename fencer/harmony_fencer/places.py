"""What a rejoin does with directories: their names exchanged and moved."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

from harmony_fencer import durable
from harmony_fencer.programs import PostgresError

_EXCHANGE, _HERE = 2, -100  # renameat2(2): RENAME_EXCHANGE, AT_FDCWD
_libc = ctypes.CDLL(None, use_errno=True)


STUB = "harmony.rejoin"  # in what takes the data directory's place


def is_stub(data: Path) -> bool:
    """Whether `data` only holds the place of a directory that is being rewound. Never raises."""
    try:
        (data / STUB).stat()
    except OSError:
        return False
    return True


def there(path: Path) -> bool:
    """Also a symlink that leads nowhere."""
    return path.exists() or path.is_symlink()


def unlink(path: Path) -> None:
    """Raises OSError."""
    path.unlink(missing_ok=True)


def move(place: Path, target: Path) -> None:
    """Rename, durably. Raises OSError."""
    place.rename(target)
    durable.REAL.sync_folder(target.parent)


def exchange(a: Path, b: Path) -> None:
    """Swap two names at once. Raises OSError."""
    if _libc.renameat2(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) != 0:
        number = ctypes.get_errno()
        hint = ""
        if number in {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            hint = ": this file system cannot exchange two directories (ext4, xfs, btrfs, zfs 2.2 can)"
        raise OSError(number, f"{os.strerror(number)}{hint}", f"{a} <-> {b}")
    durable.REAL.sync_folder(a.parent)


def must_fit(folder: Path, keep_free_mb: int, total_kb: int, done_kb: int) -> None:
    """Raises PostgresError where the rest of a copy leaves less room than that."""
    found = os.statvfs(folder)
    free_kb = found.f_bavail * found.f_frsize // 1024
    wanted_kb = total_kb - done_kb + keep_free_mb * 1024
    if free_kb < wanted_kb:
        raise PostgresError(
            f"the disk is too small for a copy: {folder} has {free_kb // 1024} MB free, {wanted_kb // 1024} MB are "
            f"needed ({total_kb // 1024} MB of data, rejoin.keep_free_mb {keep_free_mb}): make room; the old directory "
            "is as it was"
        )


def size(place: Path) -> int:
    """Bytes of the files below; what vanishes meanwhile is not counted."""
    total = 0
    for at, _folders, names in os.walk(place):
        for name in names:
            try:
                found = os.lstat(os.path.join(at, name))  # noqa: PTH118 (many files)
            except OSError:
                continue
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total
