"""All processes of one data directory as one thing that can be halted, killed, and proven gone.

Two holds on them, always both: the cgroup (PostgreSQL's own, or the systemd unit's), which is instant and
misses nobody inside; and the process tree by data directory, for what somebody else started elsewhere.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from harmony_fencer import cgroup, processes
from harmony_fencer.cgroup import Cgroup
from harmony_fencer.durable import read_small

FREEZE_WAIT_S = 0.02
EMPTY = 0


class Tree:
    """Of `data_dir`. `unit`: the systemd unit that PostgreSQL runs in, or "". `own`: use a cgroup of its own.
    `owner`, `notes`: see processes.Place."""

    def __init__(
        self,
        data_dir: str,
        *,
        unit: str = "",
        own: bool = True,
        owner: int | None = None,
        notes: Path | None = None,
    ) -> None:
        self._path = data_dir
        self._data = processes.Place(data_dir, owner, notes)
        self._unit = unit
        self.own: Cgroup | None = None
        why = "switched off"
        if own and not unit:
            self.own, why = cgroup.make(data_dir)
        if self.own is not None:
            self.where = f"cgroup {self.own}"
        else:
            self.where = f"cgroup of {unit}" if unit else f"process tree ({why})"
        self._pinned = processes.Pinned()
        self._groups: list[Cgroup] = []
        # An earlier fencer's fence that was cut short left them frozen: that is finished, not carried on.
        self.halted = self.own is not None and self.own.frozen()
        self.halted_how = ""

    # ------------------------------------------------------------ looking

    def postmaster(self) -> int | None:
        return processes.postmaster(self._data)

    def pids(self) -> list[int]:
        """Live PostgreSQL processes of the data directory, wherever they are."""
        return processes.of_data_dir(self._data)

    def everybody(self) -> list[int]:
        """pids() and what else is held, such as an archive_command; as far as it can be told. Never raises."""
        found: dict[int, None] = {}
        with contextlib.suppress(OSError):
            found = dict.fromkeys(self.pids())
        found.update(dict.fromkeys(self._pinned.left()))
        for group in self._held():
            found.update(dict.fromkeys(group.pids()))
        return list(found)

    def quiet(self) -> bool:
        """Cheap: nothing that was held lives any more. Not yet the proof: gone() looks everywhere."""
        return not self._pinned.left() and not any(g.populated() for g in self._held())

    def gone(self) -> bool:
        """The proof: nothing held lives, and no process of the data directory is found on this host."""
        try:
            return self.quiet() and not self.pids()
        except OSError:  # no descriptor, no memory: nothing is proven by what could not be seen
            return False

    def spent(self) -> bool:
        """Whether all that is left waits in the kernel with SIGKILL pending: it writes nothing and says nothing more.

        Who is found by the second look and was not judged by the first speaks against it.
        """
        try:
            left = {*self.pids(), *self.everybody()}
            return all(processes.spent(pid) for pid in left) and left >= {*self.pids(), *self.everybody()}
        except OSError:  # cannot tell
            return False

    def _held(self) -> list[Cgroup]:
        return self._groups if self.own is None else [self.own, *self._groups]

    # ------------------------------------------------------------ acting

    def halt(self) -> None:
        """Stop them all where they are; never raises. What is already halted stays so, newcomers are added."""
        self.halted = True
        frozen = self.own is not None and self.own.freeze(FREEZE_WAIT_S)
        with contextlib.suppress(OSError):
            self._find_groups()
        also = [g for g in self._groups if g.freeze(FREEZE_WAIT_S)]
        stopped = 0
        with contextlib.suppress(OSError):
            stopped = self._pinned.stop(self._data, skip=self._inside())
        places = ([str(self.own)] if frozen else []) + [str(g) for g in also]
        parts = [f"cgroup {p} frozen" for p in places] + ([f"SIGSTOP to {stopped}"] if stopped else [])
        self.halted_how = ", ".join(parts) or "nobody was there"

    def _inside(self) -> set[int]:
        """Who is in a frozen cgroup needs no SIGSTOP."""
        return {pid for g in self._held() if g.frozen() for pid in g.pids()}

    def _find_groups(self) -> None:
        """Cgroups that hold its processes though this fencer did not make them: an earlier fencer's, a unit's."""
        names = [cgroup.name_for(self._path), *([self._unit] if self._unit else [])]
        master = self.postmaster()
        for pid in [master] if master is not None else self.pids()[:1]:
            for name in names:
                found = cgroup.around(pid, name)
                known = {g.path for g in self._held()}
                if found is not None and found.path not in known:
                    self._groups.append(found)

    def watch(self) -> None:
        """Pin what is there while it shuts down by itself: what it leaves behind is found by that. Never raises."""
        with contextlib.suppress(OSError):
            master = self.postmaster()
            self._pinned.catch(self._data, [master] if master is not None else self.pids())

    def watched(self) -> None:
        """The last look: what helpers left in the background. Never raises."""
        with contextlib.suppress(OSError):
            self._pinned.catch_left_behind(self._data)

    def signal_postmaster(self, number: signal.Signals) -> bool:
        """Through a pidfd, verified. False when there is none, or that cannot be told. Never raises."""
        with contextlib.suppress(OSError):
            master = self.postmaster()
            return master is not None and processes.send(master, number, self._data)
        return False

    def kill(self) -> None:
        """SIGKILL to all that can be found, stopped or not. Never raises."""
        for group in self._held():
            if not group.kill():
                group.signal(signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._pinned.catch(self._data, self.pids())
            self._pinned.catch_left_behind(self._data)
        self._pinned.send(signal.SIGKILL)

    def released(self) -> None:
        """All are proven gone: let newcomers run again."""
        self._pinned.close()
        self._data.forget()
        for group in self._held():
            with contextlib.suppress(OSError):
                group.thaw()
        self._groups = []
        self.halted, self.halted_how = False, ""

    def ready_to_start(self) -> Cgroup | None:
        """The cgroup to start in, running. Raises OSError."""
        if not self.pids():
            self._data.forget()
        if self.own is not None:
            if not self.own.path.exists():
                self.own.path.mkdir()
                self.own.hold()
            self.own.thaw()
        return self.own

    def clear_stale_lock(self, port: int, socket_dir: str) -> list[str]:
        """Remove lock files with which PostgreSQL would refuse to start though nobody is here; which ones.

        postmaster.pid where kill(pid, 0) says "alive" of a postmaster that is dead: its pid is another program's
        now, or nobody has reaped it yet. Its socket's lock file likewise. Either where it is empty: its
        postmaster was killed between making it and writing it. Any other stale file is left to PostgreSQL,
        which checks more. Raises OSError.
        """
        path = Path(self._path) / "postmaster.pid"
        if self.pids():
            return []
        cleared, was = [], _lock(path)
        if was == EMPTY or (was is not None and Path(f"/proc/{was}").exists()):
            aside = path.with_name("postmaster.pid.stale")
            path.rename(aside)  # first aside, then looked at: a file that is new since is put back
            if _lock(aside) != was:
                aside.rename(path)
                return []
            aside.unlink()
            cleared.append(str(path))
        lock = Path(socket_dir.split(",", maxsplit=1)[0].strip()) / f".s.PGSQL.{port}.lock"
        of_socket = _lock(lock)
        # PostgreSQL listens before it makes this file: an empty one of somebody else's is not taken for ours.
        if (of_socket == EMPTY and not processes.listening(port)) or (cleared and of_socket == was != EMPTY):
            lock.unlink()
            cleared.append(str(lock))
        return cleared

    def remove(self) -> None:
        """Take the empty cgroup away (at the fencer's end)."""
        if self.own is not None:
            self.own.remove()


def _lock(path: Path) -> int | None:
    """The pid in a lock file, or EMPTY; None where there is no such file, or it says something else."""
    try:
        first = read_small(path, 64).split(b"\n", 1)[0].strip()
        return int(first) if first else EMPTY
    except (OSError, ValueError):
        return None
