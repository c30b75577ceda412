"""This host's boot clock and boot id: the only time the fencer believes."""

from __future__ import annotations

import time
from pathlib import Path

NS = 1_000_000_000


def boot_ns() -> int:
    """CLOCK_BOOTTIME in nanoseconds: it counts suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The kernel's id of this boot: times of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
