"""Gives the agent's folders, and what lies in them, to whom the agent runs as; a corrected agent.user locks nobody out.

Root works here in folders that an unprivileged user can write to, so nothing is reached by its path: each entry is
opened by its folder's descriptor, never through a symbolic link, and changed by its own. Left alone are sockets, FIFOs
and devices (the agent makes its socket anew), files with a second name (they may be anybody's, linked in), and files
of others than root and the folder's owner before.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

DEEPEST = 8
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def give(folder: Path, uid: int, gid: int) -> None:
    """`folder` and all below it to this user. Raises OSError where the folder itself cannot be given."""
    fd = os.open(folder, _FLAGS | os.O_DIRECTORY)
    try:
        _give_all(fd, uid, gid, {0, os.fstat(fd).st_uid}, DEEPEST)
    finally:
        os.close(fd)


def _give_all(folder: int, uid: int, gid: int, before: set[int], deeper: int) -> None:
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):  # gone meanwhile, a link, a socket: not ours to give
            fd = os.open(name, _FLAGS, dir_fd=folder)
            try:
                _give(fd, uid, gid, before, deeper)
            finally:
                os.close(fd)
    os.fchown(folder, uid, gid)  # last: until then it says whose the files in it may be


def _give(fd: int, uid: int, gid: int, before: set[int], deeper: int) -> None:
    found = os.fstat(fd)
    if (found.st_uid, found.st_gid) != (uid, gid) and found.st_uid not in before | {uid}:
        return
    if stat.S_ISDIR(found.st_mode) and deeper:
        _give_all(fd, uid, gid, before, deeper - 1)
    elif stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        os.fchown(fd, uid, gid)
