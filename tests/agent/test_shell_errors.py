"""What the shell makes of a store that refuses, is silent, is of no use or shows what nobody can read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from harmony.agent import shell as shells
from harmony.agent.main import identity
from harmony.agent.memory import Memory
from harmony.agent.shell import Shell, World
from harmony.config import Config
from harmony.core.messages import (
    Checkpoint,
    CheckpointDone,
    ClusterSeen,
    Connected,
    DbSilent,
    Marks,
    Nudge,
    Read,
    ReadFailed,
    Refresh,
    RefreshDone,
    Remembered,
    StoreSeen,
    Write,
    WriteDone,
)
from harmony.core.timing import NS
from harmony.errors import FatalError, StoreMisconfigured, StoreUnavailable
from harmony.records import CLUSTER_STATE, CONTROL, encode
from harmony.store.interface import Entry
from harmony.store.memory import MemoryServer, MemoryStore
from tests.agent.test_shell import LEADS, NoHealth, config, no_survey
from tests.core.helpers import fencer

assert config  # the fixture


class Asked(MemoryStore):
    """Notes the keys that are read; `fails` at them."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server, "c1")
        self.read: list[str] = []
        self.fails: set[str] = set()
        self.misconfigured = False
        self.during: object = None

    async def get(self, key: str, *, timeout_s: float) -> Entry | None:
        self.read.append(key)
        if self.misconfigured:
            raise StoreMisconfigured("of no use")
        if key in self.fails:
            raise StoreUnavailable(f"fails at {key}")
        if callable(self.during):
            self.during()
        return await super().get(key, timeout_s=timeout_s)


class Database:
    """The probe, with what is asked of it besides."""

    def __init__(self) -> None:
        self.did: list[tuple[str, float]] = []

    async def ask(self, now_ns: int, timeout_s: float) -> DbSilent:
        return DbSilent("no database in this test")

    async def checkpoint(self, timeout_s: float) -> str:
        self.did.append(("checkpoint", timeout_s))
        return "it failed"

    async def nudge(self, timeout_s: float) -> str:
        self.did.append(("nudge", timeout_s))
        return ""


class Rig:
    def __init__(self, config: Config, folder: Path) -> None:
        self.store, self.database = Asked(MemoryServer()), Database()
        none = str(folder / "none")
        world = World(
            self.store, self.database, NoHealth(), no_survey, Memory(folder, "c1"), Remembered(Marks()), none,
            lambda text: None,
        )  # type: ignore[arg-type]  # fmt: skip
        self.shell = Shell(config, identity(config), world)
        self.shell._events.clear()

    @property
    def posted(self) -> list[object]:
        return list(self.shell._events)


@pytest.fixture
def rig(config: Config, tmp_path: Path) -> Rig:
    return Rig(config, tmp_path)


def write(revision: int, timeout_ns: int = 20 * NS) -> Write:
    return Write(key=CLUSTER_STATE, record=LEADS, revision=revision, attempt="a-1", timeout_ns=timeout_ns)


async def test_refused_is_told_from_unknown(rig: Rig) -> None:
    """D1, D6: who was refused has lost; who does not know must look."""
    await rig.shell._write(write(0))
    await rig.shell._write(write(0))
    await rig.shell._write(write(7))
    rig.store.faults.lost_ack = 1
    await rig.shell._write(write(1))
    rig.store.faults.disconnected = True
    await rig.shell._write(write(2))
    assert rig.posted == [
        WriteDone(CLUSTER_STATE, "a-1", "acked", 1),
        WriteDone(CLUSTER_STATE, "a-1", "refused"),
        WriteDone(CLUSTER_STATE, "a-1", "refused"),
        WriteDone(CLUSTER_STATE, "a-1", "unknown"),
        WriteDone(CLUSTER_STATE, "a-1", "unknown"),
    ]


async def test_each_call_has_its_own_deadline(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    """The core's: a heartbeat must not wait for a store longer than its timeout."""
    rig.store.faults.delay_s = 1000
    for task in (
        lambda: rig.shell._write(write(0, 2 * NS)),
        lambda: rig.shell._read(Read(CLUSTER_STATE, 2 * NS)),
        lambda: rig.shell._refresh(Refresh(2 * NS)),
    ):
        began = trio.current_time()
        await task()
        assert trio.current_time() - began == pytest.approx(2)
    assert rig.posted == [
        WriteDone(CLUSTER_STATE, "a-1", "unknown"),
        ReadFailed(CLUSTER_STATE),
        RefreshDone(ok=False),
    ]


async def test_a_refresh_that_is_slow_as_a_whole_is_none(
    rig: Rig, autojump_clock: trio.testing.MockClock
) -> None:
    """Each of four reads is in time, all of them are not."""
    rig.store.faults.delay_s = 0.9
    began = trio.current_time()
    await rig.shell._refresh(Refresh(2 * NS))
    assert trio.current_time() - began == pytest.approx(2)
    assert rig.posted[-1] == RefreshDone(ok=False)


async def test_a_refresh_reads_its_own_record_first(rig: Rig) -> None:
    """What is read of the primary is then newer than our own stamp."""
    await rig.shell._refresh(Refresh(20 * NS))
    assert rig.store.read == ["member.n2", CLUSTER_STATE, "member.n1", CONTROL]
    assert rig.posted[-1] == RefreshDone(ok=True)


@pytest.mark.parametrize("key", ["member.n2", CLUSTER_STATE, "member.n1", CONTROL])
async def test_a_refresh_that_misses_one_is_none(rig: Rig, key: str) -> None:
    rig.store.fails = {key}
    await rig.shell._refresh(Refresh(20 * NS))
    assert rig.posted[-1] == RefreshDone(ok=False)


@pytest.mark.parametrize(("key", "ok"), [(CLUSTER_STATE, False), ("member.n1", False), (CONTROL, True)])
async def test_what_cannot_be_understood_is_no_answer(rig: Rig, key: str, ok: bool) -> None:
    """But what operators ask for keeps nobody from deciding."""
    await rig.store.create(key, b'{"from": "the future"}', timeout_s=1)
    await rig.shell._refresh(Refresh(20 * NS))
    assert rig.posted[-1] == RefreshDone(ok=ok)


async def test_what_is_read_is_dated_from_before_it_was_asked_for(rig: Rig) -> None:
    """I2: what was seen meanwhile explains an answer that shows less."""
    await rig.store.create(CLUSTER_STATE, encode(LEADS), timeout_s=1)
    marks = rig.shell._view.marks

    def later() -> None:
        rig.shell._view = msgspec.structs.replace(
            rig.shell._view, marks=Marks(marks.term, 99, marks.attempt, marks.lineage)
        )

    rig.shell._view = msgspec.structs.replace(rig.shell._view, marks=Marks(0, 42, "", ""))
    rig.store.during = later
    await rig.shell._read(Read(CLUSTER_STATE, 20 * NS))
    (seen,) = rig.posted
    assert isinstance(seen, ClusterSeen)
    assert (seen.by_read, seen.revision, seen.asked_at) == (True, 1, 42)


async def test_a_store_of_no_use_ends_the_agent(rig: Rig) -> None:
    """78 by way of main(): a restart does not help."""
    rig.store.misconfigured = True
    with trio.fail_after(30), pytest.raises(BaseExceptionGroup) as raised:
        await rig.shell.run()
    assert raised.group_contains(FatalError, match="of no use")


def test_events_are_bounded(rig: Rig) -> None:
    for _ in range(shells.MAX_EVENTS):
        rig.shell.post(Connected())
    with pytest.raises(RuntimeError, match="does not keep up"):
        rig.shell.post(Connected())


def test_what_changes_about_the_store_is_told_once(rig: Rig) -> None:
    for _ in range(3):
        rig.shell._look_at_store()
    assert rig.posted == [Connected(), StoreSeen("memory-1", "")]
    rig.store._server.problem = "weak"
    rig.shell._look_at_store()
    assert rig.posted[2:] == [StoreSeen("memory-1", "weak")]


async def test_what_is_asked_of_the_database(rig: Rig) -> None:
    async with trio.open_nursery() as nursery:
        rig.shell._carry_out(Checkpoint("a test"), nursery)
        rig.shell._carry_out(Nudge(), nursery)
    assert sorted(rig.database.did) == [
        ("checkpoint", shells.CHECKPOINT_S),
        ("nudge", rig.shell._timing.lease_s),
    ]
    assert rig.posted == [CheckpointDone("it failed")]


class Hanging(MemoryStore):
    """Its answers never come."""

    async def get(self, key: str, *, timeout_s: float) -> Entry | None:
        await trio.sleep_forever()

    async def create(self, key: str, value: bytes, *, timeout_s: float) -> int:
        await trio.sleep_forever()

    async def update(self, key: str, value: bytes, revision: int, *, timeout_s: float) -> int:
        await trio.sleep_forever()


async def test_what_a_new_state_calls_for_is_not_left_to_the_tick(
    rig: Rig, mock_clock: trio.testing.MockClock
) -> None:
    """Time stands still, and no answer comes: from the first look to watching, and at once the order to follow."""
    rig.shell._store = Hanging(MemoryServer(), "c1")
    rig.shell._look_at_store()  # else its first word would be an event in between
    rig.shell.post(fencer(following=None, system_identifier=None))
    rig.shell.post(ClusterSeen(LEADS, 1, 1, by_read=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.shell._deciding, nursery)
        await trio.testing.wait_all_tasks_blocked()
        order = rig.shell._view.order
        assert rig.shell._view.state == "replica/watching"
        assert order is not None
        assert (order.op, order.primary) == ("follow", "n1")
        nursery.cancel_scope.cancel()
