"""A zombie is new to nobody: a look for newcomers ends although nobody reaps it (see Pinned.catch)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony_fencer import processes
from tests import pace

# A session of its own, with one child that has ended and is never reaped.
PARENT = "import os, sys, time\nif os.fork() == 0:\n    os._exit(0)\nprint(flush=True)\ntime.sleep(600)"


@pytest.fixture
def parent() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", PARENT], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + pace.wait_s(5)
        while state(process.pid) != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state(process.pid) == "Z"
        yield process.pid
        process.kill()


def zombie(parent: int) -> int:
    (child,) = processes.children(parent)
    return child


def state(parent: int) -> str:
    return Path(f"/proc/{zombie(parent)}/stat").read_text().rpartition(")")[2].split()[0]


def test_among_the_descendants(parent: int, tmp_path: Path) -> None:
    pinned = processes.Pinned()
    assert pinned.adopt(parent)
    assert [pinned.catch(str(tmp_path), [parent]) for _ in range(2)] == [[], []]
    assert pinned.left() == [parent]
    pinned.close()


def test_in_the_session_of_somebody_pinned(parent: int, tmp_path: Path) -> None:
    pinned = processes.Pinned()
    assert pinned.adopt(parent)
    assert zombie(parent) in processes.in_sessions([parent], str(tmp_path))
    assert [pinned.catch_left_behind(str(tmp_path)) for _ in range(2)] == [[], []]
    pinned.close()


def test_who_lives_is_new_once(tmp_path: Path) -> None:
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo; wait"], stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        (sleeper,) = processes.children(shell.pid)
        pinned = processes.Pinned()
        assert pinned.adopt(shell.pid)
        assert [pinned.catch(str(tmp_path), [shell.pid]) for _ in range(2)] == [[sleeper], []]
        pinned.send(9)
        pinned.close()
