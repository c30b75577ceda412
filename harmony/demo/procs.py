"""Finds and ends the demo's own processes: by data directory, by child tree, by arguments under its folder.

It never goes by a bare name: whatever does not lead back to the demo's own random directory is left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil

OUR_MODULES = ("harmony_supervisor", "harmony_fencer", "harmony.agent", "harmony.demo.client")
GONE = (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)


def alive(process: psutil.Process) -> bool:
    """True while it runs; a zombie that nobody has reaped yet counts as gone."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except GONE:
        return False


def _is_postgres(process: psutil.Process) -> bool:
    try:
        return Path(process.exe().removesuffix(" (deleted)")).name in {"postgres", "postmaster"}
    except (*GONE, OSError):
        return False


def _cwd(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd"))  # noqa: PTH115 (Path.readlink reads the same)
    except OSError:
        return None


def postgres_of(data_dir: Path) -> list[psutil.Process]:
    """Every process of the PostgreSQL whose data directory this is: postmaster and backends, orphans too."""
    return [p for p in psutil.process_iter() if _cwd(p.pid) == data_dir and _is_postgres(p) and alive(p)]


def postmaster_of(data_dir: Path) -> psutil.Process | None:
    """The postmaster, by postmaster.pid, checked against the processes that really are of that directory."""
    try:
        pid = int((data_dir / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None
    return next((p for p in postgres_of(data_dir) if p.pid == pid), None)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; [] when it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except GONE:
        return []


def with_argument(folder: Path, modules: tuple[str, ...] = OUR_MODULES) -> list[psutil.Process]:
    """Our Python modules (or nats-server) started with a path inside `folder`; never this process."""
    found = []
    prefix = f"{folder}/"
    for process in psutil.process_iter():
        try:
            argv = process.cmdline()
        except GONE:
            continue
        if process.pid == os.getpid() or not any(a.startswith(prefix) for a in argv) or not alive(process):
            continue
        if any(m in argv for m in modules) or (modules is OUR_MODULES and argv[0].endswith("nats-server")):
            found.append(process)
    return found


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Signal it, unless it is gone (psutil checks that the pid still is the same process)."""
    with contextlib.suppress(*GONE):
        process.send_signal(number)
        return True
    return False


def everything_under(base: Path, data_dirs: list[Path]) -> list[psutil.Process]:
    """All that belongs to a demo: our modules and nats-server by argument, PostgreSQL by data directory."""
    return with_argument(base) + [p for data_dir in data_dirs for p in postgres_of(data_dir)]


def kill_everything(base: Path, data_dirs: list[Path], wait_s: float = 10.0) -> list[psutil.Process]:
    """SIGKILL until nothing of the demo is left, for at most `wait_s`; returns what would not die."""
    deadline = time.monotonic() + wait_s
    while left := everything_under(base, data_dirs):
        for process in left:
            send(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def stop(process: psutil.Popen, wait_s: float) -> bool:
    """SIGTERM and wait; False when it was still there after `wait_s` seconds."""
    send(process, signal.SIGCONT)
    send(process, signal.SIGTERM)
    try:
        process.wait(timeout=wait_s)
    except psutil.TimeoutExpired:
        return False
    return True


def cgroups_of(processes: list[psutil.Process]) -> list[Path]:
    """The cgroups (v2) of their own that fencers have made for these processes."""
    mounts = [p.mountpoint for p in psutil.disk_partitions(all=True) if p.fstype == "cgroup2"]
    found = set[Path]()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines():
                path = Path(line[3:])
                if mounts and line.startswith("0::") and path.name.startswith("harmony-"):
                    found.add(Path(mounts[0]) / path.relative_to("/"))
    return sorted(found)
