"""This host's boot clock and boot id: the only time the fencer believes, and how it waits for a moment of it."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path
from typing import Protocol

import trio

NS = 1_000_000_000
LOOK_S = 0.01
_TFD_TIMER_ABSTIME = 1
_ITIMERSPEC = struct.Struct("@qqqq")
_libc = ctypes.CDLL(None, use_errno=True)


def boot_ns() -> int:
    """CLOCK_BOOTTIME in nanoseconds: it counts suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The kernel's id of this boot: times of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Clock(Protocol):
    """Time as an argument: the real one below, a driven one in the model tests."""

    def now_ns(self) -> int:
        """CLOCK_BOOTTIME, nanoseconds."""

    async def sleep_until(self, when_ns: int) -> None:
        """Return at `when_ns` or as soon as possible after it, never before."""


class BootClock:
    """CLOCK_BOOTTIME through a timerfd.

    trio's own timers count CLOCK_MONOTONIC, which stands still while the host is suspended: with them the
    guard would sleep on after a resume. An absolute timerfd of CLOCK_BOOTTIME fires at once (timerfd_create(2);
    os.timerfd_create exists only from Python 3.13 on).
    """

    def now_ns(self) -> int:
        return boot_ns()

    async def sleep_until(self, when_ns: int) -> None:
        """One timerfd a call. Where none is left the clock is looked at every LOOK_S instead: the end of a lease
        needs no descriptor (W9)."""
        try:
            await self._by_timer(when_ns)
        except OSError:
            while (left_ns := when_ns - boot_ns()) > 0:
                await trio.sleep(min(LOOK_S, left_ns / NS))

    async def _by_timer(self, when_ns: int) -> None:
        """Raises OSError where the kernel has no descriptor or memory for it."""
        fd = _libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        try:
            seconds, nanoseconds = divmod(max(1, when_ns), NS)
            spec = _ITIMERSPEC.pack(0, 0, seconds, nanoseconds)
            if _libc.timerfd_settime(fd, _TFD_TIMER_ABSTIME, spec, None) != 0:
                raise OSError(ctypes.get_errno(), "timerfd_settime")
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
