"""Wakes up when a file of a folder is made, removed, renamed or written and closed (inotify).

It saves looking all the time, and is never the only way to notice: it says nothing of a folder that was moved
away, or once the kernel's queue ran over. Whoever waits looks again now and then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import trio

_CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _ONLYDIR = 0x8, 0x40, 0x80, 0x100, 0x200, 0x1000000
_MASK = _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _ONLYDIR
PAUSE_S = 0.01  # a folder in which something changes all the time must not take a processor
_libc = ctypes.CDLL(None, use_errno=True)


class Changes:
    """Of one folder, from now on. Close it when done."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError: this host, folder or user can have none (fs.inotify.max_user_instances)."""
        fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "inotify_init1")
        self._fd: int = fd
        if _libc.inotify_add_watch(fd, os.fsencode(folder), ctypes.c_uint32(_MASK)) < 0:
            number = ctypes.get_errno()
            os.close(fd)
            raise OSError(number, os.strerror(number), str(folder))

    async def wait(self) -> None:
        """Until something has changed since the last call."""
        await trio.lowlevel.wait_readable(self._fd)
        await trio.sleep(PAUSE_S)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 65536):
                pass

    def close(self) -> None:
        os.close(self._fd)
