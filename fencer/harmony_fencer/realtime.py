"""Gets to run when it matters: real-time scheduling, locked memory. And gives neither to its children.

Each is tried and none is needed: what is not granted is named in the log. The lowest real-time priorities
are above every ordinary process and below everything of the kernel's that matters.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

from harmony_fencer.cgroup import mounts

PRIORITY = 5
NICE = -10
IN_MEMORY = {"tmpfs", "ramfs"}
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_libc = ctypes.CDLL(None, use_errno=True)


def steady() -> list[str]:
    """Raise our own priority and lock our memory; what could not be had, in words. Threads made later inherit.

    ONFAULT: only pages that were touched are locked, not the eight megabytes of each thread's stack.
    """
    missing = []
    try:
        if os.sched_getscheduler(0) not in {os.SCHED_RR, os.SCHED_FIFO}:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    except OSError as e:
        missing.append(f"real-time scheduling ({e.strerror})")
        try:
            if os.getpriority(os.PRIO_PROCESS, 0) > NICE:
                os.setpriority(os.PRIO_PROCESS, 0, NICE)
        except OSError as error:
            missing.append(f"nice {NICE} ({error.strerror})")
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        missing.append(f"locked memory ({os.strerror(ctypes.get_errno())})")
    return missing


def on_a_disk(folder: Path, table: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """That `folder` is not in memory, in words; [] where it is. Each renewal writes there, in the event loop: on a disk
    that others keep busy it waits for them, for a tenth of a second and more."""
    number = ""
    with contextlib.suppress(OSError):
        device = folder.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
    kind = next((kind for at, _, kind in mounts(table) if at == number), "a disk")
    return [] if kind in IN_MEMORY else [f"a run_dir in memory ({folder} is on {kind}, not on tmpfs)"]


def ordinary() -> list[str]:
    """A prefix of argv that gives a child ordinary scheduling (memory locks are not inherited)."""
    prefix = []
    if os.sched_getscheduler(0) in {os.SCHED_RR, os.SCHED_FIFO}:
        prefix += ["chrt", "--other", "0"]
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return prefix + (["nice", "-n", str(-nice)] if nice < 0 else [])
