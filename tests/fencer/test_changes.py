"""What wakes up the watch: real files, the real kernel."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from harmony_fencer import changes
from harmony_fencer.changes import Changes


def rename(folder: Path) -> None:
    (folder / "old").rename(folder / "new")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "made").touch(),
        lambda folder: (folder / "old").unlink(),
        lambda folder: (folder / "old").write_bytes(b"ready"),
        rename,
    ],
    ids=["made", "removed", "written", "renamed"],
)
async def test_each_change_wakes_once(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """I1: a promotion removes standby.signal and rewrites postmaster.pid."""
    (tmp_path / "old").touch()
    seen = Changes(tmp_path)
    change(tmp_path)
    with trio.fail_after(5):
        await seen.wait()
    with trio.move_on_after(0.1) as quiet:
        await seen.wait()
    assert quiet.cancelled_caught
    seen.close()


async def test_reading_wakes_nobody(tmp_path: Path) -> None:
    """The fencer's own looks must not wake it up."""
    (tmp_path / "old").touch()
    seen = Changes(tmp_path)
    (tmp_path / "old").read_bytes()
    (tmp_path / "old").stat()
    with trio.move_on_after(0.1) as quiet:
        await seen.wait()
    assert quiet.cancelled_caught
    seen.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere") as e:
        Changes(tmp_path / "nowhere")
    assert e.value.errno == errno.ENOENT


async def test_a_restless_folder_costs_a_hundred_looks_a_second(tmp_path: Path) -> None:
    """W9: the fencer runs at real-time priority."""
    seen, looks = Changes(tmp_path), 0
    with trio.move_on_after(20 * changes.PAUSE_S):
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                while True:
                    (tmp_path / "busy").touch()
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(write)
            while True:
                await seen.wait()
                looks += 1
    assert 1 <= looks <= 20
    seen.close()
