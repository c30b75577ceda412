"""Finds the processes of a test host, by name, in its cgroup; it looks nowhere else. And kills an owner of hosts.

A process goes by its program's name, or by that of the script or module that Python runs: `postgres`,
`harmony-supervisor`, `harmony_fencer`, `harmony.agent`.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import cgroups

TOP = Path(__file__).parents[2]


@dataclass(frozen=True)
class Process:
    """A process of the host: its number inside and outside, its arguments, its cgroup as the host names it."""

    pid: int
    outside_pid: int
    argv: tuple[str, ...]
    cgroup: str


def find(cgroup: Path, name: str) -> list[Process]:
    """Every process of that name in the host's cgroup and below."""
    found: list[Process] = []
    for outside in cgroups.pids(cgroup):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            process, comm = _look(outside, cgroup.name)
            if name in {comm, *_names(process.argv)}:
                found.append(process)
    return found


def _look(outside: int, top: str) -> tuple[Process, str]:
    folder = Path(f"/proc/{outside}")
    argv = tuple((folder / "cmdline").read_text(errors="replace").rstrip("\0").split("\0"))
    numbers = _line(folder / "status", "NSpid:").split()
    inside = "/" + _line(folder / "cgroup", "0::").partition(f"/{top}/")[2]
    return Process(int(numbers[-1]), outside, argv, inside), (folder / "comm").read_text().rstrip("\n")


def _line(file: Path, start: str) -> str:
    return next((line for line in file.read_text().splitlines() if line.startswith(start)), start + " 0")


def _names(argv: tuple[str, ...]) -> set[str]:
    program = Path(argv[0]).name
    if program.startswith("python"):
        script = next((argument for argument in argv[1:] if not argument.startswith("-")), "")
        return {program, Path(script).name}
    return {program}


@contextlib.contextmanager
def killed_owner(script: str) -> Iterator[list[str]]:
    """Run a program that prints its keeper's pid and more words, and waits; yields them; kills it on leaving.

    Returns when the keeper has ended. Raises AssertionError when it has not within 30 s.
    """
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TOP
    ) as child:
        assert child.stdout is not None
        keeper, *words = child.stdout.readline().split()
        watched = os.pidfd_open(int(keeper))
        yield words
        child.kill()
    gone, _, _ = select.select([watched], [], [], 30)
    os.close(watched)
    assert gone, "the keeper is still there"
