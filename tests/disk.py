"""A file system of a test's own that can hang: an image on a loop device, frozen by fsfreeze. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def why_not() -> str:
    """What is missing here; "": nothing."""
    if os.geteuid() != 0:
        return "a disk that hangs needs root"
    return "" if shutil.which("fsfreeze") else "no fsfreeze (util-linux)"


def run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def make(image: Path, disk: Path, megabytes: int) -> None:
    """The folder `disk`, made where it is missing, has a file system of its own."""
    disk.mkdir(exist_ok=True)
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(image)])
    run(["mount", "-o", "loop", str(image), str(disk)])


def freeze(disk: Path, frozen: bool) -> None:
    """Who writes there waits, in state D, until it is thawed."""
    run(["fsfreeze", "--freeze" if frozen else "--unfreeze", str(disk)])


@contextmanager
def mended_at_the_end(disk: Path) -> Iterator[None]:
    """Thawed and unmounted when this process leaves or dies, by one that outlives it."""
    script = 'cat >/dev/null; fsfreeze --unfreeze "$0"; umount -l "$0"'
    keeper = subprocess.Popen(
        ["sh", "-c", script, str(disk)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(20)
