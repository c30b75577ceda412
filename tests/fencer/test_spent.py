"""When what a fence has left may count as one that never runs again: SIGKILL is pending, and it waits in the kernel."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony_fencer import processes
from harmony_fencer.processes import _killed_in_kernel
from harmony_fencer.tree import Tree

KILL = f"{1 << 8:016x}"


@pytest.mark.parametrize(
    ("state", "pending", "spent"),
    [
        ("D (disk sleep)", KILL, True),
        ("D (disk sleep)", f"{(1 << 8) | (1 << 14):016x}", True),
        ("D (disk sleep)", "0" * 16, False),  # it only waits for its disk, and will go on
        ("D (disk sleep)", f"{1 << 14:016x}", False),  # SIGTERM: it may be caught
        ("R (running)", KILL, False),
        ("S (sleeping)", KILL, False),
        ("T (stopped)", KILL, False),
        ("Z (zombie)", "0" * 16, True),
    ],
)
def test_by_the_kernels_word(state: str, pending: str, spent: bool) -> None:
    """I1, I6: both, or nothing is given up."""
    text = f"Name:\tpostgres\nState:\t{state}\nPid:\t7\nSigPnd:\t{pending}\nShdPnd:\t{KILL}\nSigBlk:\t0\n"
    assert _killed_in_kernel(text) is spent


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_of_a_process_that_is_there(sleeper: subprocess.Popen[bytes]) -> None:
    """Asleep or stopped: it could run on. Dead, a zombie or gone: not."""
    assert not processes.spent(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert not processes.spent(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert processes.spent(sleeper.pid)
    sleeper.wait()
    assert processes.spent(sleeper.pid)


class Two(Tree):
    """Who is left is what the test says, look by look."""

    looks: list[list[int]]

    def pids(self) -> list[int]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def everybody(self) -> list[int]:
        return []


def test_who_comes_while_it_is_looked_at(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """A newcomer was not judged: nothing is given up."""
    tree = Two(str(tmp_path), own=False)
    gone = 2**22 + 1
    tree.looks = [[gone]]
    assert tree.spent()
    tree.looks = [[gone], [gone, sleeper.pid]]
    assert not tree.spent()
    tree.looks = [[gone, sleeper.pid]]
    assert not tree.spent()
