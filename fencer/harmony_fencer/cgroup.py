"""PostgreSQL's own cgroup (v2): freeze stops every process of it in about a millisecond, kill ends them all.

Whatever is in that cgroup is PostgreSQL's: backends, workers, an archive_command and its children, also
orphans. It is made beneath the fencer's own cgroup, so that a host's or unit's cgroup holds all of it.
Where there is no writable cgroup v2 this says why, and the process tree is used instead. It decides nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

FREEZE_POLL_S = 0.0005


def mount_point() -> Path | None:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified beside v1. Never assumed."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        if right.split(" ", 1)[0] == "cgroup2":
            return Path(left.split(" ")[4].replace("\\040", " "))
    return None


def path_of(pid: int | str) -> str | None:
    """The cgroup v2 path of a process, as /proc/PID/cgroup has it ("0::/…"), or None."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    return next((line[3:] for line in lines if line.startswith("0::")), None)


class Cgroup:
    """One cgroup directory. Reading and writing it may raise OSError only where said."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

    def _event(self, name: str) -> str:
        try:
            for line in (self.path / "cgroup.events").read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == name:
                    return value
        except OSError:
            pass
        return ""

    def populated(self) -> bool:
        """Whether a live process is in it (zombies do not count)."""
        return self._event("populated") == "1"

    def frozen(self) -> bool:
        return self._event("frozen") == "1"

    def freeze(self, within_s: float) -> bool:
        """Stop all of them; True when the kernel has confirmed it within `within_s`."""
        try:
            (self.path / "cgroup.freeze").write_text("1")
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
        (self.path / "cgroup.freeze").write_text("0")

    def kill(self) -> bool:
        """SIGKILL to all at once, frozen ones too (Linux 5.14). False where the kernel cannot."""
        try:
            (self.path / "cgroup.kill").write_text("1")
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
    return Cgroup(path), ""


def around(pid: int, name: str) -> Cgroup | None:
    """The cgroup called `name` (ours by an earlier fencer, or a systemd unit) that `pid` is in or beneath."""
    mount, path = mount_point(), path_of(pid)
    parts = Path(path).parts if path is not None else ()
    if mount is None or name not in parts:
        return None
    return Cgroup(mount.joinpath(*parts[1 : parts.index(name) + 1]))
