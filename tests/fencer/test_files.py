"""Files in the data directory: as its owner, durable, and never by a thread that wakes up too late."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from harmony_fencer.durable import RealDisk
from harmony_fencer.files import Change, Files, as_user

NOBODY = (65534, 65534)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


class Hanging(RealDisk):
    """A disk whose fsync waits until it is told to go on."""

    def __init__(self) -> None:
        self.hangs = threading.Event()
        self.go_on = threading.Event()
        self.first = True

    def fsync(self, fd: int) -> None:
        if self.first:
            self.first = False
            self.hangs.set()
            self.go_on.wait(10)
        super().fsync(fd)


async def test_a_thread_that_wakes_up_too_late_changes_nothing(tmp_path: Path) -> None:
    """D7: a standby.signal that hung in its disk must not appear after a newer order has promoted."""
    disk = Hanging()
    files = Files(None, disk)
    late: list[BaseException] = []

    def mark(change: Change) -> None:
        try:
            change.write(tmp_path / "standby.signal", b"")
        except OSError as e:
            late.append(e)

    with trio.move_on_after(0.2) as scope:
        await files.change(mark)
    assert scope.cancelled_caught
    assert disk.hangs.is_set()
    await files.change(lambda change: change.write(tmp_path / "conf", b"newer"))
    disk.go_on.set()
    with trio.fail_after(5):
        while not late:
            await trio.sleep(0.01)
    assert "newer order" in str(late[0])
    assert not (tmp_path / "standby.signal").exists()
    assert os.listdir(tmp_path) == ["conf"]


async def test_a_rename_that_hangs_is_named_and_not_overtaken(tmp_path: Path) -> None:
    """W9: the newer order fails, saying why, instead of running beside the older one."""

    class Stuck(RealDisk):
        go_on = threading.Event()

        def rename(self, old: Path, new: Path) -> None:
            self.go_on.wait(10)
            super().rename(old, new)

    disk = Stuck()
    files = Files(None, disk)
    with trio.move_on_after(0.2):
        await files.change(lambda change: change.write(tmp_path / "standby.signal", b""))
    with pytest.raises(OSError, match="the disk does not answer"):
        await files.change(lambda change: change.write(tmp_path / "conf", b""))
    disk.go_on.set()


def stat_of(path: Path) -> os.stat_result:
    return path.stat()


def link(to: Path, path: Path) -> None:
    path.symlink_to(to)


def open_folders(top: Path) -> tuple[Path, Path]:
    """One that belongs to nobody, and one that only root may enter."""
    for folder in [top, *(p for p in top.parents if p.name.startswith(("pytest-", "popen-")))]:
        folder.chmod(0o755)
    data, secret = top / "data", top / "secret"
    data.mkdir()
    secret.mkdir(mode=0o700)
    os.chown(data, *NOBODY)
    return data, secret


@as_root
async def test_written_as_the_owner_and_through_no_symlink(tmp_path: Path) -> None:
    """Root writes nothing where the owner of the folder could not: a symlink leads nowhere."""
    data, secret = open_folders(tmp_path)
    files = Files(NOBODY)
    await files.change(lambda change: change.write(data / "x", b"1"))
    found = stat_of(data / "x")
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (*NOBODY, 0o600)
    link(secret, data / "folder")
    with pytest.raises(PermissionError):
        await files.change(lambda change: change.write(data / "folder" / "x", b"1"))
    assert not os.listdir(secret)


@as_root
def test_the_thread_is_root_again_afterwards(tmp_path: Path) -> None:
    _, secret = open_folders(tmp_path)

    def touch() -> int:
        with pytest.raises(PermissionError), as_user(NOBODY):
            (secret / "a").touch()
        (secret / "c").touch()
        return (secret / "c").stat().st_uid

    with ThreadPoolExecutor(1) as own:  # the identity is a thread's own: pytest's stays what it is
        assert own.submit(touch).result() == 0


async def test_a_file_has_its_mode_and_is_on_the_disk_before_its_name(tmp_path: Path) -> None:
    """D8: whatever the umask; what lies in the temporary's place, a link too, is not written through."""
    done = []

    class Noting(RealDisk):
        def fsync(self, fd: int) -> None:
            done.append("fsync")
            super().fsync(fd)

        def rename(self, old: Path, new: Path) -> None:
            done.append("rename")
            super().rename(old, new)

    (tmp_path / "victim").write_bytes(b"as it was")
    link(tmp_path / "victim", tmp_path / ".conf.1.new")
    files = Files(None, Noting())
    before = os.umask(0o077)
    try:
        await files.change(lambda change: change.write(tmp_path / "conf", b"new", 0o644))
    finally:
        os.umask(before)
    assert (tmp_path / "victim").read_bytes() == b"as it was"
    assert ((tmp_path / "conf").read_bytes(), stat_of(tmp_path / "conf").st_mode & 0o777) == (b"new", 0o644)
    assert done == ["fsync", "rename"]
