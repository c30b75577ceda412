"""Generation, lease and latch over SIGKILL at every instruction, power loss, and older copies (I3, issue item 5).

Run as a program, this file is the helper that forks and kills its children: `test_crash.py CASE FOLDER`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
import trio

from harmony.demo.cluster import memory_folder
from harmony.errors import HarmonyError
from harmony_fencer import durable, protocol
from harmony_fencer import lease as leases
from harmony_fencer import state as states
from harmony_fencer.config import FencerConfig
from harmony_fencer.ledger import Ledger, load_state
from harmony_fencer.protocol import Generation, Latch, OrderRecord
from tests import disk as disks
from tests import pace
from tests.fencer.fakes import HeldDisk, configuration
from tests.fencer.node import FENCE_S, LEASE_S, Node

OWN = {str(Path(m.__file__)) for m in (durable, states, leases)} | {Path.write_bytes.__code__.co_filename}


def state(term: int, order: int, state_: protocol.OrderState = "done") -> states.State:
    g = Generation(term, order)
    return states.State("us", g, OrderRecord(g, "activate", None, state_), None)


OLD, NEW = state(7, 3), state(8, 1, "running")
OLD_LEASE = leases.Lease(Generation(7, 3), 1_500, "boot")
NEW_LEASE = leases.Lease(Generation(8, 1), 1_900, "boot")
OLD_LATCH, NEW_LATCH = Latch("old", "me", "then"), Latch("new", "me", "now")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder whose fsync costs nothing: what is lost in it, the tests say."""
    folder = Path(tempfile.mkdtemp(prefix="crash-", dir=memory_folder()))
    yield folder
    shutil.rmtree(folder)


# ---------------------------------------------------------------- SIGKILL at every instruction


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Do `work` in a fork, killed before its `number`th instruction in our modules (and pathlib); whether it was."""
    pid = os.fork()
    if pid == 0:
        left = number

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in OWN:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys._getframe().f_trace_opcodes = (
                True  # Python 3.12 tells of opcodes only if asked before settrace
            )
            sys.settrace(trace)
            work()
            sys.settrace(None)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


def put(folder: Path, which: str, *, new: bool) -> None:
    """The write whose every instruction is tried."""
    match which:
        case "state":
            states.write(folder, NEW if new else OLD)
        case "lease":
            leases.save(folder / leases.NAME, NEW_LEASE if new else OLD_LEASE)
        case "latch":
            states.set_latch(folder, NEW_LATCH if new else OLD_LATCH)
        case "lift":
            states.lift_latch(folder) if new else states.set_latch(folder, OLD_LATCH)
        case "witness":
            w = states.Witness("n1", "us", (NEW if new else OLD).highest)
            states.testify(folder / states.WITNESS, w)


def found(folder: Path, which: str) -> object:
    """What a fencer would believe."""
    match which:
        case "state":
            return states.load(folder)
        case "lease":
            return leases.load(folder / leases.NAME, boot_id="boot", now_ns=1_000, lease_ns=1_000)
        case "latch" | "lift":
            return states.latch(folder)
        case _:
            return states.witness(folder / states.WITNESS, "n1")


def every_instruction(which: str, folder: Path) -> int:
    """How many instructions were tried. Raises AssertionError with the one that broke it."""
    put(folder, which, new=False)
    old = found(folder, which)
    put(folder, which, new=True)
    new = found(folder, which)
    assert old != new
    turned, number = False, 0
    while True:
        put(folder, which, new=False)
        killed = killed_at(number, lambda: put(folder, which, new=True))
        now = found(folder, which)
        assert now in (old, new), f"killed at instruction {number}: {now}"
        assert now == new or (killed and not turned), f"killed at instruction {number}: not durable"
        turned = now == new
        if not killed:
            return number
        number += 1


def series(folder: Path) -> int:
    """Generation after generation, killed anywhere, loaded, and on: what was written is never lost again."""
    dice = random.Random(5)
    last, kills = Generation(0, 0), 0
    states.load(folder)
    for _ in range(150):
        read_end, write_end = os.pipe()
        begin = last

        def work() -> None:
            for step in range(1, 4):
                g = Generation(begin.term + step, 0)  # noqa: B023 (done before the next)
                states.write(folder, states.State("us", g, None, None))
                os.write(write_end, b".")  # noqa: B023 (accepted: now it may be acted on)

        kills += killed_at(dice.randrange(700), work)
        os.close(write_end)
        accepted = len(os.read(read_end, 10))
        os.close(read_end)
        now, why = states.load(folder)
        assert not why
        assert begin.term + accepted <= now.highest.term <= begin.term + accepted + 1
        last = now.highest
    return kills


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("which", "least"), [("state", 100), ("lease", 20), ("latch", 100), ("lift", 10), ("witness", 100)]
)
def test_killed_at_any_instruction_it_is_the_old_or_the_new(which: str, least: int, memory: Path) -> None:
    """I3, W9: SIGKILL before each single instruction of the write; once it is the new one it stays the new."""
    assert helper(which, memory) >= least


def test_a_series_of_generations_survives_kills_anywhere(memory: Path) -> None:
    """I3: never lower than what was accepted, never higher than what was asked for."""
    assert helper("series", memory) >= 100


def helper(case: str, folder: Path) -> int:
    """In a process of its own, without our threads: it forks."""
    argv = [sys.executable, __file__, case, str(folder)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


# ---------------------------------------------------------------- power loss


class Crash(Exception):
    """Before one system call."""


@dataclass
class Inode:
    cache: bytes = b""
    disk: bytes = b""

    def contents(self) -> Iterator[bytes]:
        """What may be on disk: what was synced, and any part of what was written since, or zeros for it."""
        yield self.disk
        if self.cache != self.disk:
            for length in range(len(self.cache) + 1):
                yield self.cache[:length]
            for length in {0, min(9, len(self.cache)), len(self.cache) // 2, max(0, len(self.cache) - 1)}:
                yield self.cache[:length] + bytes(len(self.cache) - length)


@dataclass
class CrashDisk:
    """A durable.Disk between page cache and medium, whose power goes before system call number `at`.

    A folder's changes reach the medium in any combination until it is synced. `lies`: fsync and the folder's
    sync return at once, and nothing was done.
    """

    at: int
    lies: bool = False
    calls: list[str] = field(default_factory=list)
    names: dict[str, Inode] = field(default_factory=dict)  # on the medium
    changes: list[tuple[str, str | None, Inode]] = field(default_factory=list)  # (name, old name, inode)
    open: dict[int, Inode] = field(default_factory=dict)

    def holding(self, name: str, content: bytes) -> CrashDisk:
        self.names[name] = Inode(content, content)
        return self

    def _call(self, name: str) -> None:
        if len(self.calls) == self.at:
            raise Crash(name)
        self.calls.append(name)

    def _now(self) -> dict[str, Inode]:
        return self._applied(self.changes)

    def _applied(self, changes: list[tuple[str, str | None, Inode]]) -> dict[str, Inode]:
        names = dict(self.names)
        for name, old, inode in changes:
            if old is not None:
                names.pop(old, None)
            names[name] = inode
        return names

    def create(self, path: Path) -> int:
        self._call("create")
        inode = self._now().get(path.name)
        if inode is None:
            inode = Inode()
            self.changes.append((path.name, None, inode))
        inode.cache = b""
        self.open[3] = inode
        return 3

    def write(self, fd: int, data: bytes) -> int:
        self._call("write")
        part = data[: max(1, len(data) // 2)]  # short writes are allowed
        self.open[fd].cache += part
        return len(part)

    def fsync(self, fd: int) -> None:
        self._call("fsync")
        if not self.lies:
            self.open[fd].disk = self.open[fd].cache

    def close(self, fd: int) -> None:
        del self.open[fd]

    def rename(self, old: Path, new: Path) -> None:
        self._call("rename")
        self.changes.append((new.name, old.name, self._now()[old.name]))

    def sync_folder(self, folder: Path) -> None:
        self._call("sync_folder")
        if not self.lies:
            self.names, self.changes = self._now(), []

    def after_power_loss(self) -> Iterator[dict[str, bytes]]:
        """Every folder that may be found: name -> content."""
        for chosen in range(1 << len(self.changes)):
            taken = [c for i, c in enumerate(self.changes) if chosen >> i & 1]
            whole = [(n, old if not old or old in self._applied(taken[:i]) else None, inode)
                     for i, (n, old, inode) in enumerate(taken)]  # fmt: skip
            names = self._applied(whole)
            plain = {name: inode.disk for name, inode in names.items()}
            for name, inode in names.items():
                for content in inode.contents():
                    yield plain | {name: content}


def crashed(
    write: Callable[[CrashDisk], None], start: Callable[[int], CrashDisk]
) -> Iterator[tuple[CrashDisk, bool]]:
    """The disk after a crash before each system call, and at last after them all: (disk, whether it returned)."""
    for at in range(30):
        disk = start(at)
        try:
            write(disk)
        except Crash:
            yield disk, False
        else:
            yield disk, True
            return
    raise AssertionError("it never came to its end")


def materialise(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "rest", [None, b"", states.encode(OLD)[:40]], ids=["clean", "empty .new", "torn .new"]
)
def test_power_lost_at_any_system_call(memory: Path, rest: bytes | None) -> None:
    """I3: the old state or the new, both whole; from the moment that the write returned only the new."""

    def start(at: int) -> CrashDisk:
        disk = CrashDisk(at).holding(states.NAME, states.encode(OLD))
        return disk if rest is None else disk.holding(states.NAME + ".new", rest)

    seen = 0
    for disk, returned in crashed(lambda d: states.write(memory, NEW, disk=d), start):
        for files in disk.after_power_loss():
            materialise(memory, files)
            loaded, why = states.load(memory)
            assert (loaded, why) == (NEW, "") or ((loaded, why) == (OLD, "") and not returned), disk.calls
            seen += 1
    assert seen > 200


def test_power_lost_while_the_first_state_is_written(memory: Path) -> None:
    """I3: a new node's first generation: nothing, or all of it."""
    for disk, returned in crashed(lambda d: states.write(memory, NEW, disk=d), CrashDisk):
        for files in disk.after_power_loss():
            materialise(memory, files)
            loaded, why = states.load(memory)
            assert not why
            assert loaded == NEW or (not returned and loaded.highest == Generation(0, 0))


def test_power_lost_while_the_latch_is_set(memory: Path) -> None:
    """A latch that was set is in force after any power loss; a torn one is in force too."""
    for disk, returned in crashed(lambda d: states.set_latch(memory, NEW_LATCH, disk=d), CrashDisk):
        for files in disk.after_power_loss():
            materialise(memory, files)
            assert states.latch(memory) == NEW_LATCH or (not returned and states.latch(memory) is None)


def test_a_disk_that_lies_is_given_away_by_a_witness(memory: Path) -> None:
    """I3: fsync did nothing, power was lost: torn is noticed by the seal, an older copy by either witness."""
    witness = memory / "witness"
    states.testify(witness, states.Witness("n1", "us", NEW.highest))
    folder = memory / "state"
    folder.mkdir()

    def start(at: int) -> CrashDisk:
        return CrashDisk(at, lies=True).holding(states.NAME, states.encode(OLD))

    verdicts = set()
    for disk, returned in crashed(lambda d: states.write(folder, NEW, disk=d), start):
        for files in disk.after_power_loss():
            materialise(folder, files)
            loaded, why = states.load(folder, node="n1", witnesses=(memory / "none", witness))
            alone, unseen = states.load(folder, node="n1")
            if returned:
                verdicts.add((loaded.highest, bool(why), alone.highest, bool(unseen)))
    old, new, none = OLD.highest, NEW.highest, Generation(0, 0)
    assert verdicts == {
        (new, False, new, False),  # it was on disk all the same
        (new, True, old, False),  # lost: only the witness knows
        (new, True, none, True),  # torn
    }


# ---------------------------------------------------------------- older copies, by table

OTHERS = states.Witness("n2", "them", Generation(99, 1))  # in a data directory cloned from another node
BEFORE_RESET = states.Witness("n1", "we before --reset-state", Generation(9, 9))
OURS = states.Witness("n1", "us", NEW.highest)
BEHIND = states.Witness("n1", "us", OLD.highest)
FILES = {
    "newest": states.encode(NEW),
    "older": states.encode(OLD),
    "missing": None,
    "zeroed": bytes(len(states.encode(NEW))),
    "truncated": states.encode(NEW)[:-1],
    "empty": b"",
}
TRUSTED, FENCED = "", "fenced"
#   file        in run_dir    in data_dir   verdict  highest generation
VERDICTS = [
    ("newest",    OURS,         OURS,         TRUSTED, (8, 1)),
    ("newest",    BEHIND,       None,         TRUSTED, (8, 1)),
    ("newest",    None,         OTHERS,       TRUSTED, (8, 1)),
    ("newest",    BEFORE_RESET, BEFORE_RESET, TRUSTED, (8, 1)),
    ("older",     OURS,         None,         "an older copy", (8, 1)),
    ("older",     None,         OURS,         "an older copy", (8, 1)),  # after a reboot: run_dir is empty
    ("older",     BEHIND,       OURS,         "an older copy", (8, 1)),
    ("older",     None,         None,         TRUSTED, (7, 3)),  # nobody knows better: the limit of it
    ("older",     BEHIND,       BEHIND,       TRUSTED, (7, 3)),
    ("older",     OTHERS,       OTHERS,       TRUSTED, (7, 3)),
    ("missing",   None,         None,         TRUSTED, (0, 0)),  # a new node
    ("missing",   None,         OTHERS,       TRUSTED, (0, 0)),  # a new node, cloned
    ("missing",   OURS,         None,         "is gone", (8, 1)),
    ("missing",   None,         OURS,         "is gone", (8, 1)),
    ("missing",   None,         BEFORE_RESET, "is gone", (9, 9)),
    ("zeroed",    None,         None,         "cut short", (0, 0)),
    ("zeroed",    OURS,         OURS,         "cut short", (8, 1)),
    ("truncated", None,         None,         "cut short", (0, 0)),
    ("truncated", OTHERS,       BEHIND,       "cut short", (7, 3)),
    ("empty",     None,         OURS,         "empty", (8, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("file", "run", "data", "verdict", "highest"), VERDICTS)
def test_what_cannot_be_trusted(
    tmp_path: Path,
    file: str,
    run: states.Witness | None,
    data: states.Witness | None,
    verdict: str,
    highest: tuple[int, int],
) -> None:
    """I3: an older copy, a lost or a damaged file is never trusted where anything on this host knows better."""
    content = FILES[file]
    if content is not None:
        (tmp_path / states.NAME).write_bytes(content)
    places = (tmp_path / "run.witness", tmp_path / "data.witness")
    for place, w in zip(places, (run, data), strict=True):
        if w is not None:
            states.testify(place, w)
    loaded, why = states.load(tmp_path, node="n1", witnesses=places)
    assert loaded.highest == Generation(*highest)
    assert bool(why) == bool(verdict)
    assert verdict in why
    if verdict:
        assert "--reset-state --term" in why
        assert (
            content is None or (tmp_path / states.NAME).read_bytes() == content
        )  # the evidence is left alone


def test_a_damaged_witness_says_nothing(tmp_path: Path) -> None:
    states.write(tmp_path, OLD)
    states.testify(tmp_path / "w", OURS)
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-3])
    assert states.load(tmp_path, node="n1", witnesses=(tmp_path / "w",)) == (OLD, "")


def test_a_new_node_that_cannot_write_is_untrusted_and_can_still_be_fenced(tmp_path: Path) -> None:
    """I6: the fence at boot (--if-unguarded) reads the state first: it must not die of a full or missing disk."""
    _, why = states.load(tmp_path / "not mounted")
    assert "cannot be written" in why


@pytest.mark.parametrize("content", [b"", b"junk", bytes(100), states.encode(NEW)])
def test_a_damaged_latch_is_a_latch(tmp_path: Path, content: bytes) -> None:
    (tmp_path / states.LATCH).write_bytes(content)
    latch = states.latch(tmp_path)
    assert latch is not None
    assert "taken for a latch" in latch.reason


# ---------------------------------------------------------------- the ledger and a slow disk


@pytest.fixture
def config(memory: Path) -> FencerConfig:
    for name in ("state", "run", "data"):
        (memory / name).mkdir()
    return configuration(memory)


def accept(term: int) -> Callable[[states.State], states.State]:
    return lambda s: msgspec.structs.replace(s, highest=Generation(term, 0))


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


async def test_an_abandoned_older_write_never_lands_after_a_newer(config: FencerConfig) -> None:
    """I3, D7: preemption abandons the thread that writes an outcome; the next generation waits for it."""
    disk = HeldDisk()
    ledger = Ledger(config, "boot", disk=disk)
    disk.hold = frozenset({"write"})
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            async def preempt() -> None:
                await until(lambda: disk.waiting)
                scope.cancel()

            nursery.start_soon(preempt)
            await ledger.persist(accept(1))
        assert scope.cancelled_caught
        disk.hold = frozenset()
        nursery.start_soon(ledger.persist, accept(2))
        await until(lambda: ledger._writing.statistics().tasks_waiting)  # the older one has the disk
        assert ledger.state.highest == Generation(0, 0)
        disk.release()
    on_disk, why = states.load(Path(config.state_dir))
    assert (on_disk.highest, why) == (Generation(2, 0), "")
    assert ledger.state.highest == Generation(2, 0)


async def test_a_hung_disk_fails_each_write_within_its_patience(config: FencerConfig) -> None:
    """I6: nobody waits for a disk longer than a quarter of fence_timeout; an unfence neither."""
    states.set_latch(Path(config.state_dir), OLD_LATCH)
    disk = HeldDisk()
    ledger = Ledger(config, "boot", disk=disk)
    disk.hold = frozenset({"create", "sync_folder"})
    begun = trio.current_time()
    with pytest.raises(TimeoutError):
        await ledger.lift_latch()
    with pytest.raises(TimeoutError):
        await ledger.persist(accept(1))
    with pytest.raises(TimeoutError):
        await ledger.set_latch(NEW_LATCH)
    assert trio.current_time() - begun < 3 * FENCE_S * 0.25 + 0.5
    assert ledger.latched
    assert ledger.state.highest == Generation(0, 0)
    disk.kill()
    await until(lambda: not ledger._writing.borrowed_tokens)


async def test_an_abandoned_unfence_does_not_take_a_newer_latch_away(config: FencerConfig) -> None:
    """The operator fences again while the removal of the older latch hangs: the newer one stands."""
    folder = Path(config.state_dir)
    states.set_latch(folder, OLD_LATCH)
    disk = HeldDisk()
    ledger = Ledger(config, "boot", disk=disk)
    disk.hold = frozenset({"sync_folder"})
    with pytest.raises(TimeoutError):
        await ledger.lift_latch()
    disk.hold = frozenset()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.set_latch, NEW_LATCH)
        await trio.sleep(0.02)
        disk.release()
    assert ledger.latched
    assert states.latch(folder) == NEW_LATCH


FENCE = OrderRecord(Generation(9, 4), "operator_fence", None, "running")


@pytest.mark.parametrize(
    ("latch", "call"), [(None, "write"), (NEW_LATCH, "create"), (NEW_LATCH, "sync_folder")]
)
async def test_a_disk_that_was_slow_for_a_fence_is_trusted_when_it_has_it(
    config: FencerConfig, latch: Latch | None, call: str
) -> None:
    """I3, I6: the fence does not wait for it. No node stays out because its disk once took a second to answer."""
    disk, told = HeldDisk(), trio.Event()
    ledger = Ledger(config, "boot", disk=disk)
    disk.hold = frozenset({call})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.catch_up, told.set)
        assert await ledger.accept(FENCE, latch, None) == ""
        assert "trusted again when" in ledger.untrusted
        await trio.sleep(0.05)
        assert not told.is_set()
        assert (ledger.state.highest, ledger.latch) == (FENCE.generation, latch)
        newer = msgspec.structs.replace(FENCE, generation=Generation(9, 5))
        assert await ledger.accept(newer, None, None) == "", "nor does the next one"
        disk.hold = frozenset()
        disk.release()
        with trio.fail_after(5):
            await told.wait()
        nursery.cancel_scope.cancel()
    assert ledger.untrusted == ""
    on_disk, why = load_state(config)
    assert (on_disk.order, why) == (newer, "")
    assert states.latch(Path(config.state_dir)) == latch == ledger.latch


async def test_a_latch_that_came_to_nothing_is_set_before_the_disk_is_trusted(config: FencerConfig) -> None:
    """Its first write was given up and has failed since, unseen."""

    class FailsOnce(HeldDisk):
        broken = True

        def create(self, path: Path) -> int:
            fd = super().create(path)
            if self.broken:
                self.broken = False
                os.close(fd)
                raise OSError(errno.EIO, "broken by the test")
            return fd

    disk = FailsOnce()
    ledger = Ledger(config, "boot", disk=disk)
    disk.hold = frozenset({"create"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.catch_up, lambda: None)
        assert await ledger.accept(FENCE, NEW_LATCH, None) == ""
        disk.hold = frozenset()
        disk.release()
        await until(lambda: not ledger.untrusted)
        nursery.cancel_scope.cancel()
    assert not disk.broken
    assert states.latch(Path(config.state_dir)) == NEW_LATCH


async def test_a_disk_that_fails_after_it_was_slow_is_not_trusted(config: FencerConfig) -> None:
    """Until a restart: who knows what else it has lost."""
    disk = HeldDisk()
    ledger = Ledger(config, "boot", disk=disk)
    disk.hold = frozenset({"write"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.catch_up, lambda: None)
        assert await ledger.accept(FENCE, None, None) == ""
        disk.fail = frozenset({"create", "write"})
        disk.release()
        await until(lambda: "restart Harmony" in ledger.untrusted)
        disk.fail = disk.hold = frozenset()
        await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert "restart Harmony" in ledger.untrusted


async def test_a_fence_that_overtakes_a_slow_write_is_not_forgotten(config: FencerConfig) -> None:
    """I3: what the slow one brings is a change of what is newest when it lands."""
    disk = HeldDisk()
    ledger = Ledger(config, "boot", disk=disk)
    disk.hold = frozenset({"fsync"})

    def ended(s: states.State) -> states.State:
        return msgspec.structs.replace(s, following="n2")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.catch_up, lambda: None)
        nursery.start_soon(ledger.persist, ended, trio.CancelScope())
        await until(lambda: disk.waiting)
        assert await ledger.accept(FENCE, None, None) == ""
        disk.hold = frozenset()
        disk.release()
        await until(lambda: not ledger.untrusted)
        nursery.cancel_scope.cancel()
    on_disk, _ = load_state(config)
    assert (on_disk.highest, on_disk.following) == (FENCE.generation, "n2")
    assert ledger.state == on_disk


# ---------------------------------------------------------------- real processes


def refused(reply: protocol.Reply) -> str:
    assert isinstance(reply, protocol.Refusal), reply
    return reply.error


@pytest.mark.real
@pytest.mark.skipif(bool(disks.why_not()), reason=disks.why_not())
def test_a_node_whose_disk_was_slow_is_back_by_itself(node: Node) -> None:
    """The disk of state_dir hangs for a moment: fenced all the same, and activated when it answers."""
    with disks.mended_at_the_end(node.state):
        disks.make(node.top / "state.img", node.state, 16)
        try:
            node.start()
            node.make_writable(5, 1)
            disks.freeze(node.state, True)
            assert node.fence(5, 2).state == "done"
            assert not node.pids()
            assert "did not answer in time" in node.status().trust_detail
            assert refused(node.activate(6, 1)) == "untrusted_state"
            disks.freeze(node.state, False)
            node.wait(lambda: node.status().trusted, "trusted again")
            node.make_writable(6, 1)
            node.kill_fencer()
            node.start()
            assert node.status().highest == Generation(6, 1)
        finally:
            node.destroy()


def fenced_and_untrusted(node: Node, *words: str) -> None:
    node.wait(lambda: node.status().fence_proven, "fenced", FENCE_S + 5)
    assert not node.pids()
    status = node.status()
    assert not status.trusted
    for word in (*words, "--reset-state --term"):
        assert word in status.trust_detail
    assert refused(node.activate(99, 1)) == "untrusted_state"


@pytest.mark.real
@pytest.mark.parametrize("reboot", [False, True], ids=["run_dir's witness", "data_dir's witness"])
def test_an_older_copy_put_back_is_fenced(node: Node, *, reboot: bool) -> None:
    """I3: PostgreSQL runs under a valid lease; the state that the fencer finds is of an earlier time."""
    node.start()
    file = node.state / states.NAME
    node.make_writable(5, 1)
    older = file.read_bytes()
    node.make_writable(6, 1)
    node.kill_fencer()
    file.write_bytes(older)
    if reboot:
        (node.run / states.WITNESS).unlink()
    assert node.writable()
    node.start()
    fenced_and_untrusted(node, "an older copy", "6.1", str(node.data if reboot else node.run))
    assert node.status().highest == Generation(6, 1)
    node.kill_fencer()
    low = subprocess.run(
        node.argv("--reset-state", "--term", "5"), check=False, capture_output=True, text=True
    )
    assert low.returncode == 78
    assert "below the term 6" in low.stderr
    subprocess.run(node.argv("--reset-state", "--term", "6"), check=True, capture_output=True)
    node.start()
    assert node.status().trusted
    assert node.status().highest >= Generation(6, 1), "no order of this term is accepted a second time"
    node.make_writable(7, 1)


@pytest.mark.real
def test_a_deleted_state_is_fenced(node: Node) -> None:
    """I3: a file that is gone is no new node's where a witness stands."""
    node.start()
    node.make_writable(5, 1)
    node.kill_fencer()
    (node.state / states.NAME).unlink()
    node.start()
    fenced_and_untrusted(node, "is gone", "5.1", str(node.run))
    assert isinstance(node.ask(protocol.Fence(generation=Generation(5, 2), reason="")), protocol.Accepted)


@pytest.mark.real
def test_the_latch_survives_a_kill_and_its_own_damage(node: Node) -> None:
    """An operator's fence lasts until unfence, whatever happens to the fencer or to the file."""
    node.start()
    node.make_writable(1, 1)
    assert isinstance(node.ask(protocol.OperatorFence(reason="mine", who="me")), protocol.Accepted)
    node.kill_fencer()
    node.start()
    assert refused(node.activate(9, 1)) == "latched"
    node.kill_fencer()
    file = node.state / states.LATCH
    file.write_bytes(file.read_bytes()[:-4])
    node.start()
    latch = node.status().latch
    assert latch is not None
    assert "taken for a latch" in latch.reason
    assert refused(node.activate(9, 1)) == "latched"
    assert isinstance(node.ask(protocol.Unfence(who="me")), protocol.Done)
    assert not file.exists()
    node.make_writable(9, 1)


@pytest.fixture
def small_disk(node: Node) -> Iterator[Node]:
    """state_dir is a file system of its own, of 64 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "harmony-test", str(node.state)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield node
    finally:
        node.destroy()
        subprocess.run(["umount", "-l", str(node.state)], check=True)


@pytest.mark.real
def test_a_full_disk_refuses_activate_and_fences_all_the_same(small_disk: Node) -> None:
    """I3, I6: no generation without a disk; a fence is never refused, and never forgotten after it."""
    node = small_disk
    node.start()
    node.make_writable(1, 1)
    filler = node.state / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))
    reply = node.activate(2, 1)
    assert refused(reply) == "storage_failed"
    assert isinstance(reply, protocol.Refusal)
    assert os.strerror(errno.ENOSPC) in reply.detail
    assert node.status().trusted
    assert isinstance(node.renew(1, 1), protocol.Renewed)  # it goes on under the lease it has
    assert node.writable()
    fence = protocol.Fence(generation=Generation(2, 2), reason="test")
    assert isinstance(node.ask(fence), protocol.Accepted)
    record = node.outcome()
    assert (record.op, record.state) == ("fence", "done"), record
    assert not node.pids()
    assert refused(node.activate(3, 1)) == "untrusted_state"
    node.kill_fencer()
    filler.unlink()
    node.start()
    status = node.status()
    assert (status.highest, status.trusted) == (Generation(2, 2), False)


@contextlib.contextmanager
def hung(path: Path) -> Iterator[None]:
    """Whoever opens `path` for writing hangs in the kernel, until we are done (a lease: fcntl(2), F_SETLEASE)."""
    path.touch()
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as e:
        os.close(fd)
        pytest.skip(f"no leases on this file system: {e}")
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(fd)
        signal.signal(signal.SIGIO, before)


@pytest.mark.real
def test_a_hung_disk_does_not_hold_up_a_fence(node: Node) -> None:
    """I6, W5: the state's disk hangs in open(2): the fence is done and proven within its budget."""
    node.start()
    node.make_writable(1, 1)
    with hung(node.state / (states.NAME + ".new")):
        begun = time.monotonic()
        assert isinstance(node.ask(protocol.Fence(generation=Generation(1, 2), reason="")), protocol.Accepted)
        node.wait(lambda: not node.pids(), "stopped", FENCE_S)
        record = node.outcome()
        assert (record.op, record.state) == ("fence", "done"), record
        assert time.monotonic() - begun <= FENCE_S + 0.5 + pace.SLACK_S
        assert refused(node.activate(2, 1)) == "untrusted_state"
        node.kill_fencer()
    node.start()
    assert node.status().highest == Generation(1, 2)


@contextlib.contextmanager
def activating(node: Node, term: int) -> Iterator[None]:
    """An activate waits for its answer meanwhile, on another connection."""

    def ask() -> None:
        with contextlib.suppress(HarmonyError):
            node.activate(term, 1)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    try:
        yield
    finally:
        thread.join()


@pytest.mark.real
def test_the_dead_mans_switch_does_not_wait_for_a_hung_disk(node: Node) -> None:
    """W9: an activate hangs in its disk; the lease of the one before it ends; writes end all the same."""
    node.start()
    node.make_writable(1, 1)
    with hung(node.state / (states.NAME + ".new")):
        node.renew(1, 1)
        begun = time.monotonic()
        with activating(node, 2):
            node.wait(lambda: not node.pids(), "stopped", LEASE_S + FENCE_S - (time.monotonic() - begun))
            node.wait(lambda: node.status().fence_proven, "proven", FENCE_S)


@pytest.mark.real
def test_a_fence_does_not_wait_for_an_activate_that_hangs(node: Node) -> None:
    """I6, W5: whoever orders a fence does not wait behind an activate whose generation the disk does not take."""
    node.start()
    node.make_writable(1, 1)
    with hung(node.state / (states.NAME + ".new")), activating(node, 2):
        begun = time.monotonic()
        assert isinstance(node.ask(protocol.Fence(generation=Generation(3, 1), reason="")), protocol.Accepted)
        node.wait(lambda: not node.pids(), "stopped", FENCE_S)
        assert time.monotonic() - begun <= FENCE_S + 0.5 + pace.SLACK_S


if __name__ == "__main__":
    case, where = sys.argv[1:]
    print(series(Path(where)) if case == "series" else every_instruction(case, Path(where)))
