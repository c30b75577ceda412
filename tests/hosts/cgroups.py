"""The few things that test hosts ask of cgroup v2: where it is, who is in it, freeze, kill, and waiting for events.

It refuses to use cgroup v1, and to look outside the cgroup that it is given.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path


def _mounted(kind: str, option: str) -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == kind and option in after:
            return Path(before.split()[4])
    return None


def mount_point() -> Path | None:
    """Where the v2 hierarchy is mounted (on hybrid machines not /sys/fs/cgroup); None without one."""
    return _mounted("cgroup2", "")


def shadow_mount_point() -> Path | None:
    """Where systemd's own v1 hierarchy is, on hybrid machines; None elsewhere."""
    return _mounted("cgroup", "name=systemd")


def usable() -> bool:
    """Whether a cgroup made here can be killed at once (`cgroup.kill` came with Linux 5.14)."""
    top = mount_point()
    if top is None:
        return False
    probe = top / f"harmony-probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError:
        return False
    try:
        return (probe / "cgroup.kill").exists() and (probe / "cgroup.freeze").exists()
    finally:
        probe.rmdir()


def state(cgroup: Path, key: str) -> str:
    """`populated` or `frozen` of cgroup.events: "0" or "1"."""
    return dict(line.split() for line in (cgroup / "cgroup.events").read_text().splitlines())[key]


def wait(cgroup: Path, key: str, value: str, timeout_s: float) -> bool:
    """Wait for a change of cgroup.events (the kernel wakes us); False when it did not come in time."""
    deadline = time.monotonic() + timeout_s
    with (cgroup / "cgroup.events").open() as events:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while True:
            events.seek(0)
            if f"{key} {value}\n" in events.read():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poller.poll(left * 1000)


def pids(cgroup: Path) -> list[int]:
    """Every process in it and below, as this process numbers them."""
    found: list[int] = []
    for folder, _folders, _files in os.walk(cgroup):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split()]
    return found


def kill(cgroup: Path) -> None:
    """SIGKILL everything in it and below, frozen or not; returns before they are gone."""
    (cgroup / "cgroup.kill").write_text("1")


def freeze(cgroup: Path, frozen: bool) -> None:
    """Stop (or let run) everything in it and below; returns before it is so."""
    (cgroup / "cgroup.freeze").write_text("1" if frozen else "0")


def remove_below(cgroup: Path) -> None:
    """Remove the empty cgroups below it; what is populated stays."""
    for folder, _folders, _files in os.walk(cgroup, topdown=False):
        if Path(folder) != cgroup:
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
