"""What the agent remembers of the store survives, whole or not at all (I2, I4: no promotion by less than was seen)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import trio

from harmony.agent import memory
from harmony.agent.memory import REAL, Memory, Stored
from harmony.core.messages import Marks, Remembered

OLD, NEW = Marks(3, 70, "a-1", "KV_x of t1"), Marks(4, 99, "b-7", "KV_x of t1")
NOTHING = Remembered(Marks())


class Crash(BaseException):
    """The host lost its power at this system call."""


class CrashingDisk:
    """Real, up to a crash before `before`; a crash at `write` leaves half of it. `fail`: EIO instead."""

    def __init__(self, before: str, *, fail: bool = False) -> None:
        self._before, self._fail = before, fail

    def _pass(self, call: str) -> None:
        if call == self._before:
            raise OSError(errno.EIO, "broken by the test") if self._fail else Crash(call)

    def create(self, path: Path) -> int:
        self._pass("create")
        return REAL.create(path)

    def write(self, fd: int, data: bytes) -> int:
        if self._before == "write":
            REAL.write(fd, data[: len(data) // 2])
        self._pass("write")
        return REAL.write(fd, data[:7])  # piece by piece

    def fsync(self, fd: int) -> None:
        self._pass("fsync")

    def close(self, fd: int) -> None:
        REAL.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        self._pass("rename")
        REAL.rename(old, new)

    def sync_folder(self, folder: Path) -> None:
        self._pass("sync_folder")


CALLS = ["create", "write", "fsync", "rename", "sync_folder"]


def test_a_first_start_is_no_damage(tmp_path: Path) -> None:
    assert memory.load(tmp_path, "c") == NOTHING
    assert memory.load(tmp_path / "not yet made", "c") == NOTHING


def test_round_trip(tmp_path: Path) -> None:
    memory.save(tmp_path, Stored("c", OLD))
    memory.save(tmp_path, Stored("c", NEW))
    assert memory.load(tmp_path, "c") == Remembered(NEW)
    assert (tmp_path / memory.NAME).stat().st_mode & 0o077 == 0


def test_the_cluster_that_the_data_was_in_is_remembered(tmp_path: Path) -> None:
    """I1: another cluster.id is no first start: nothing is founded, and no bucket is made."""
    memory.save(tmp_path, Stored("main", NEW))
    found = memory.load(tmp_path, "mian")
    assert found == Remembered(Marks(), was_in="main")
    assert not found.of_nothing
    assert memory.load(tmp_path, "main") == Remembered(NEW)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fail", [False, True])
def test_a_crash_between_any_two_steps_leaves_the_old_or_the_new(
    tmp_path: Path, call: str, fail: bool
) -> None:
    """I2: and the next write works over what was left behind."""
    memory.save(tmp_path, Stored("c", OLD))
    with pytest.raises((Crash, OSError)):
        memory.save(tmp_path, Stored("c", NEW), disk=CrashingDisk(call, fail=fail))
    expected = NEW if call == "sync_folder" else OLD
    assert memory.load(tmp_path, "c") == Remembered(expected)
    memory.save(tmp_path, Stored("c", NEW))
    assert memory.load(tmp_path, "c") == Remembered(NEW)


def test_torn_at_every_length_is_damage(tmp_path: Path) -> None:
    """What cannot be believed is never taken for a first start, and the file is left as evidence."""
    whole = memory.encode(Stored("c", NEW))
    for length in range(len(whole)):
        (tmp_path / memory.NAME).write_bytes(whole[:length])
        found = memory.load(tmp_path, "c")
        assert str(tmp_path / memory.NAME) in found.damage, length
        assert found.marks == Marks()
        assert (tmp_path / memory.NAME).read_bytes() == whole[:length]


def test_any_other_byte_is_damage(tmp_path: Path) -> None:
    whole = memory.encode(Stored("c", NEW))
    for position in range(len(whole)):
        raw = bytearray(whole)
        raw[position] ^= 0x01
        (tmp_path / memory.NAME).write_bytes(raw)
        assert memory.load(tmp_path, "c").damage, position


def test_a_file_of_another_version_is_damage(tmp_path: Path) -> None:
    body = memory.encode(Stored("c", NEW)).split(b"\n")[1].replace(b'"term":4', b'"team":4')
    (tmp_path / memory.NAME).write_bytes(b"%08x\n%s\n" % (zlib.crc32(body), body))
    assert "not of this version" in memory.load(tmp_path, "c").damage


@pytest.mark.parametrize("what", ["folder", "fifo", "symlink"])
def test_what_is_no_plain_file_is_damage(tmp_path: Path, what: str) -> None:
    path = tmp_path / memory.NAME
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        (tmp_path / "elsewhere").write_bytes(memory.encode(Stored("c", NEW)))  # whole, and not ours
        path.symlink_to(tmp_path / "elsewhere")
    assert memory.load(tmp_path, "c").damage


def test_another_users_file_is_damage(tmp_path: Path) -> None:
    """A node.state_dir that was copied as root, an agent.user that was changed: no first start."""
    memory.save(tmp_path, Stored("c", NEW))
    if os.geteuid() != 0:
        (tmp_path / memory.NAME).chmod(0)
        assert "ermission" in memory.load(tmp_path, "c").damage
        return
    script = (
        "import os, sys, pathlib\n"
        "from harmony.agent import memory\n"
        "os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(memory.load(pathlib.Path('.'), 'c').damage)\n"
    )
    tmp_path.chmod(0o755)
    argv = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "Permission denied" in done.stdout


async def until(condition: object) -> None:
    with trio.fail_after(5):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.005)


async def test_the_newest_wins_and_nobody_waits(tmp_path: Path) -> None:
    """The loop goes on while the disk hangs; what was not written yet is replaced by what is newer."""
    gate, written = threading.Event(), list[str]()

    class HungDisk(CrashingDisk):
        def create(self, path: Path) -> int:
            gate.wait(10)
            written.append(path.name)
            return super().create(path)

    kept = Memory(tmp_path, "c", HungDisk(""))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.run)
        for term in range(1, 50):
            kept.keep(Marks(term, term))
            if term == 1:
                await trio.sleep(0.05)
        gate.set()
        await until(lambda: memory.load(tmp_path, "c").marks.term == 49)
        assert len(written) == 2
        nursery.cancel_scope.cancel()


async def test_a_disk_that_fails_is_reported_and_tried_again(tmp_path: Path) -> None:
    """O5: shown in the status; the next marks are written when the disk is back."""
    kept = Memory(tmp_path / "missing", "c")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.run)
        kept.keep(OLD)
        await until(lambda: kept.failure)
        assert "cannot be written" in kept.failure
        (tmp_path / "missing").mkdir()
        kept.keep(NEW)
        await until(lambda: not kept.failure)
        assert memory.load(tmp_path / "missing", "c") == Remembered(NEW)
        nursery.cancel_scope.cancel()


def test_the_real_disk_is_asked() -> None:
    """A descriptor or folder that is none is an error: it is not only said to be durable."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        REAL.fsync(10**6)
    with pytest.raises(FileNotFoundError):
        REAL.sync_folder(Path("/nowhere/at/all"))


async def test_a_disk_that_does_not_answer_is_told(tmp_path: Path) -> None:
    """O5: nobody waits for it, and the status says so."""
    kept = Memory(tmp_path, "c")
    kept._since = trio.current_time() - memory.SLOW_S - 0.1
    assert "has not answered for 5 s" in kept.failure
    kept._since = trio.current_time()
    assert kept.failure == ""
