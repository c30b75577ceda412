"""PostgreSQL's own cgroup (v2): freeze stops every process of it in about a millisecond, kill ends them all.

Whatever is in that cgroup is PostgreSQL's: backends, workers, an archive_command and its children, also
orphans. It is made beneath the fencer's own cgroup, so that a host's or unit's cgroup holds all of it.
Where there is no writable cgroup v2 this says why, and the process tree is used instead. It decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import time
from pathlib import Path

FREEZE_POLL_S = 0.0005


def mounts(table: Path = Path("/proc/self/mountinfo")) -> list[tuple[str, Path, str]]:
    """(device as major:minor, where, type) of each; [] where they cannot be read. Source: proc_pid_mountinfo(5)."""
    try:
        halves = [line.partition(" - ") for line in table.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    found = [(left.split(" "), right.split(" ", 1)[0]) for left, _, right in halves]
    return [(left[2], Path(left[4].replace("\\040", " ")), kind) for left, kind in found if len(left) > 4]


def mount_point() -> Path | None:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified beside v1. Never assumed."""
    return next((where for _, where, kind in mounts() if kind == "cgroup2"), None)


def path_of(pid: int | str) -> str | None:
    """The cgroup v2 path of a process, as /proc/PID/cgroup has it ("0::/…"), or None."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    return next((line[3:] for line in lines if line.startswith("0::")), None)


class Cgroup:
    """One cgroup directory. Reading and writing it may raise OSError only where said."""

    def __init__(self, path: Path, *, hold: bool = False) -> None:
        """`hold`: keep its files open, so that a host without a free descriptor can still be frozen."""
        self.path = path
        self._held: dict[str, int] = {}
        if hold:
            self.hold()

    def hold(self) -> None:
        """Open its files (again: it may have been made anew). Raises OSError."""
        for fd in self._held.values():
            os.close(fd)
        self._held = {}
        for name, how in (("cgroup.freeze", os.O_WRONLY), ("cgroup.events", os.O_RDONLY)):
            self._held[name] = os.open(self.path / name, how | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # Linux before 5.14 has none
            self._held["cgroup.kill"] = os.open(self.path / "cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)

    def _put(self, name: str, value: bytes) -> None:
        if name in self._held:
            os.pwrite(self._held[name], value, 0)
        else:
            (self.path / name).write_bytes(value)

    def __str__(self) -> str:
        return str(self.path)

    def pids(self) -> list[int]:
        """All processes in it and beneath it; [] when it does not exist."""
        found = []
        for folder in [self.path, *self._beneath()]:
            with contextlib.suppress(OSError):
                found += [int(line) for line in (folder / "cgroup.procs").read_text().split()]
        return found

    def _beneath(self) -> list[Path]:
        return [Path(at) for at, _, _ in os.walk(self.path) if Path(at) != self.path]

    def _event(self, name: str, otherwise: str) -> str:
        try:
            if "cgroup.events" in self._held:
                raw = os.pread(self._held["cgroup.events"], 4096, 0)
            else:
                raw = (self.path / "cgroup.events").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return "0"
        except OSError as e:
            return "0" if e.errno == errno.ENODEV else otherwise  # ENODEV: removed under an open file
        return dict(line.split(" ", 1) for line in raw.decode().splitlines()).get(name, otherwise)

    def populated(self) -> bool:
        """Whether a live process is in it (zombies do not count); True where that cannot be told."""
        return self._event("populated", "1") == "1"

    def frozen(self) -> bool:
        """False where that cannot be told."""
        return self._event("frozen", "0") == "1"

    def freeze(self, within_s: float) -> bool:
        """Stop all of them; True when the kernel has confirmed it within `within_s`."""
        try:
            self._put("cgroup.freeze", b"1")
        except OSError:
            return False
        until = time.monotonic() + within_s
        while not self.frozen():
            if time.monotonic() >= until:
                return False
            time.sleep(FREEZE_POLL_S)
        return True

    def thaw(self) -> None:
        """Let them run. Raises OSError."""
        self._put("cgroup.freeze", b"0")

    def kill(self) -> bool:
        """SIGKILL to all at once, frozen ones too (Linux 5.14). False where the kernel cannot."""
        try:
            self._put("cgroup.kill", b"1")
        except OSError:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """One by one through pidfds, for kernels without cgroup.kill."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(pid)
                try:
                    if pid in self.pids():  # the pidfd pins it: what is in here now is what is signalled
                        signal.pidfd_send_signal(fd, number)
                finally:
                    os.close(fd)

    def remove(self) -> None:
        """Take the empty directory away; a busy or missing one is left."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def name_for(data_dir: str) -> str:
    """The last part of the data directory's cgroup path."""
    return f"harmony-{hashlib.sha256(data_dir.encode()).hexdigest()[:12]}"


def make(data_dir: str) -> tuple[Cgroup | None, str]:
    """(the data directory's cgroup, made where it was missing; "") or (None, why there is none)."""
    mount, own = mount_point(), path_of("self")
    if mount is None:
        return None, "no cgroup v2 is mounted"
    if own is None or ".." in own:
        return None, f"the fencer's own cgroup ({own}) is not visible"
    path = mount / own.lstrip("/") / name_for(data_dir)
    try:
        path.mkdir(exist_ok=True)
    except OSError as e:
        return None, f"{path}: {e.strerror or e}"
    if not all(os.access(path / name, os.W_OK) for name in ("cgroup.procs", "cgroup.freeze")):
        return None, f"{path} is not writable"
    try:
        return Cgroup(path, hold=True), ""
    except OSError as e:
        return None, f"{path}: {e.strerror or e}"


def around(pid: int, name: str) -> Cgroup | None:
    """The cgroup called `name` (ours by an earlier fencer, or a systemd unit) that `pid` is in or beneath."""
    mount, path = mount_point(), path_of(pid)
    parts = Path(path).parts if path is not None else ()
    if mount is None or name not in parts:
        return None
    return Cgroup(mount.joinpath(*parts[1 : parts.index(name) + 1]))
