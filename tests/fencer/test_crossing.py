"""Orders, leases and ends that cross each other: one moment each, in which an older version did the wrong thing.

The fencer and its dead-man's switch are the real ones; PostgreSQL, the clock and the disk go on when told to.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from harmony_fencer import state as states
from harmony_fencer.admit import Facts, admit
from harmony_fencer.fencer import Fencer, Parts
from harmony_fencer.files import Change, Files
from harmony_fencer.guard import guard, watch
from harmony_fencer.ledger import Ledger
from harmony_fencer.programs import PostgresError
from harmony_fencer.protocol import (
    Accepted,
    Activate,
    Fence,
    Generation,
    OrderOp,
    OrderRecord,
    OrderState,
    Refusal,
    Renew,
    Reply,
    Request,
    SyncRule,
)
from tests.fencer.fakes import NS, DrivenClock, HeldDisk, SteppedEngine, World, configuration
from tests.fencer.node import FENCE_S, LEASE_S

LEASE_NS = round(LEASE_S * NS)
ROUNDS = 12  # where it depends on whose turn it is, which trio leaves to chance


class Bench:
    """A fencer over a model, in this very loop."""

    def __init__(self, top: Path, engine: type[SteppedEngine] = SteppedEngine) -> None:
        for name in ("state", "run", "data"):
            (top / name).mkdir(exist_ok=True)
        self.config = configuration(top)
        self.clock, self.disk, self.world = DrivenClock(), HeldDisk(), World(top / "data", standby=True)
        self.engine = engine(self.world, self.clock, FENCE_S)
        self.engine.auto = True
        self.replies: list[Reply] = []

    def remember(self, order: OrderRecord) -> None:
        """What the fencer before this one left on disk."""
        new = msgspec.structs.replace(states.fresh(), highest=order.generation, order=order)
        states.write(Path(self.config.state_dir), new)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Fencer]:
        """In main.run()'s order."""
        self.fencer = Fencer(self.config, Parts(self.engine, self.clock, "boot", lambda: "now"))
        self.fencer._ledger = Ledger(self.config, "boot", disk=self.disk)
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(guard, self.fencer, self.clock)
            await self.fencer.start(nursery)
            nursery.start_soon(watch, self.fencer)
            try:
                with trio.fail_after(20):
                    yield self.fencer
            finally:
                self.disk.kill()
                self.all_by_itself()
                nursery.cancel_scope.cancel()

    def send(self, request: Request) -> None:
        """Without waiting for its reply."""

        async def ask() -> None:
            self.replies.append(await self.fencer.handle(request, "agent"))

        self.nursery.start_soon(ask)

    def activate(self, order: int, lease_ns: int = LEASE_NS) -> Activate:
        deadline_ns = self.clock.now_ns() + lease_ns
        return Activate(
            generation=Generation(1, order), deadline_boottime_ns=deadline_ns, sync=SyncRule(0, ())
        )

    async def lead(self) -> None:
        """Writable under 1.1; from then on nothing happens by itself."""
        assert isinstance(await self.fencer.handle(self.activate(1), "agent"), Accepted)
        await until(lambda: self.order_state() == "done")
        assert self.world.writes
        self.engine.auto = False

    def order_state(self) -> str:
        order = self.fencer.status().order
        return order.state if order is not None else ""

    async def step(self, name: str, failure: Exception | None = None) -> None:
        """Wait until something waits for this step, and let it happen."""
        await until(lambda: any(s.name == name for s in self.engine.steps))
        self.engine.let(next(i for i, s in enumerate(self.engine.steps) if s.name == name), failure)
        await settled()

    def all_by_itself(self) -> None:
        self.engine.auto = True
        for number in range(len(self.engine.steps)):
            self.engine.let(number)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.002)


async def settled() -> None:
    """Whoever could run has run; what threads do is not waited for."""
    for _ in range(5):
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(0.001)


# ---------------------------------------------------------------- ends


async def test_an_activate_that_is_made_durable_when_the_end_comes_is_refused(tmp_path: Path) -> None:
    """W9, I3: SIGTERM between an activate's admission and its beginning: the fencer ends with nothing writable."""
    bench = Bench(tmp_path)
    async with bench.running() as fencer:
        await bench.lead()
        bench.all_by_itself()
        bench.disk.hold = frozenset({"rename"})
        bench.send(bench.activate(2))
        await until(lambda: bench.disk.waiting == 1)
        ended = trio.Event()

        async def end() -> None:
            await fencer.shut_down()
            ended.set()

        bench.nursery.start_soon(end)
        await settled()
        assert not ended.is_set()
        bench.disk.hold = frozenset()
        bench.disk.release()
        await ended.wait()
        await settled()
        assert [r.error for r in bench.replies if isinstance(r, Refusal)] == ["retiring"]
        assert not bench.world.lives
        assert fencer.deadline_ns is None


async def test_an_order_begun_before_the_end_is_ended_with_it(tmp_path: Path) -> None:
    """W9: the same a moment later: it was accepted, and is fenced before the fencer ends."""
    bench = Bench(tmp_path)
    async with bench.running() as fencer:
        await bench.lead()
        await fencer.handle(bench.activate(2), "agent")
        await until(lambda: bool(bench.engine.steps))
        bench.all_by_itself()
        await fencer.shut_down()
        await settled()
        assert not bench.world.lives
        assert not fencer.busy


async def test_the_lease_is_watched_while_a_clean_end_waits_for_an_older_effect(tmp_path: Path) -> None:
    """W9: SIGTERM, and pg_ctl hangs in the kernel: the lease's end stops writes all the same."""
    bench = Bench(tmp_path)
    async with bench.running() as fencer:
        await bench.lead()
        bench.engine.sticky = True
        await fencer.handle(bench.activate(2), "agent")
        await bench.step("configure")
        await until(lambda: any(s.name == "reload" for s in bench.engine.steps))
        bench.nursery.start_soon(fencer.shut_down)
        await until(lambda: any(s.name == "ending" for s in bench.engine.steps))
        assert bench.world.writes, "a clean end stops nothing before its turn"
        assert fencer.deadline_ns is not None
        bench.clock.advance(LEASE_NS)
        await settled()
        assert not bench.world.writes
        bench.all_by_itself()
        await until(lambda: not bench.world.lives)


async def test_the_guard_cancels_no_newer_activate(tmp_path: Path) -> None:
    """D7: it and an accepted activate wait for the same older effect; whoever's turn comes first, 1.2 is done."""
    for n in range(ROUNDS):
        (tmp_path / str(n)).mkdir()
        bench = Bench(tmp_path / str(n))
        async with bench.running() as fencer:
            bench.engine.auto, bench.engine.sticky = False, True
            await fencer.handle(bench.activate(1), "agent")
            await bench.step("configure")
            await bench.step("standby.signal")  # of the start
            bench.disk.hold = frozenset({"rename"})
            bench.send(bench.activate(2, 10 * LEASE_NS))
            await until(lambda b=bench: b.disk.waiting == 1)
            bench.clock.advance(LEASE_NS)  # 1.1 is over
            await until(lambda b=bench: any(s.name == "ending" for s in b.engine.steps))
            bench.disk.hold = frozenset()
            bench.disk.release()
            await until(lambda b=bench: b.fencer.status().highest == Generation(1, 2))
            await settled()
            bench.all_by_itself()
            await until(lambda b=bench: bool(b.replies) and b.order_state() == "done")
            await settled()
            status = fencer.status()
            assert status.order is not None
            assert (status.active, status.order.op, status.order.state) == (
                Generation(1, 2),
                "activate",
                "done",
            )
            assert bench.world.writes
            assert not bench.engine.fouls


# ---------------------------------------------------------------- fences


async def test_an_ordered_fence_that_failed_is_repeated_until_proven(tmp_path: Path) -> None:
    """I6: its order has ended, "failed"; the agent may be dead: the fencer goes on by itself."""
    bench = Bench(tmp_path)
    async with bench.running() as fencer:
        await bench.lead()
        await fencer.handle(Fence(generation=Generation(1, 2), reason=""), "agent")
        assert bench.world.frozen
        for _ in range(2):
            await bench.step("standby.signal")
            await bench.step("kill", PostgresError("it does not die"))
        await until(lambda: bench.order_state() == "failed")
        assert not fencer.status().fence_proven
        bench.all_by_itself()
        await until(lambda: fencer.status().fence_proven)
        assert not bench.world.lives


@pytest.mark.parametrize(
    ("op", "state", "fenced"),
    [
        ("fence", "running", True),
        ("fence", "failed", True),
        ("follow", "running", True),
        ("activate", "done", True),
        ("fence", "done", False),
        ("follow", "done", False),
    ],
)
async def test_who_may_still_be_promoted_is_fenced_after_a_restart(
    tmp_path: Path, op: OrderOp, state: OrderState, fenced: bool
) -> None:
    """I1, I3: the fencer died between a fence's (or follow's) acceptance and its proof; standby.signal is no
    proof, a promotion may be under way. A standby whose newest order was carried out is left running."""
    bench = Bench(tmp_path)
    bench.world.launch()
    bench.world.promoting = fenced
    bench.remember(OrderRecord(Generation(1, 3), op, None, state))
    async with bench.running() as fencer:
        await until(lambda: not fencer.busy)
        await settled()
        assert bench.world.lives != fenced
        if fenced:
            assert fencer.status().fence_proven


# ---------------------------------------------------------------- renewals


async def test_an_old_lease_is_not_renewed_when_a_newer_order_is_on_its_way(tmp_path: Path) -> None:
    """I1: 1.2 is durable and waits for the effect of 1.1 to end: nobody gets more time for 1.1."""
    bench = Bench(tmp_path)
    async with bench.running() as fencer:
        await bench.lead()
        bench.engine.sticky = True
        await fencer.handle(bench.activate(2), "agent")
        await bench.step("configure")
        await until(lambda: any(s.name == "reload" for s in bench.engine.steps))
        before_ns = fencer.deadline_ns
        bench.send(Fence(generation=Generation(1, 3), reason="", clean=True))
        await until(lambda: any(s.name == "ending" for s in bench.engine.steps))
        bench.clock.advance(LEASE_NS // 4)
        later = Renew(generation=Generation(1, 2), deadline_boottime_ns=bench.clock.now_ns() + LEASE_NS)
        reply = await fencer.handle(later, "agent")
        assert isinstance(reply, Refusal)
        assert reply.error == "not_active"
        assert fencer.deadline_ns == before_ns
        bench.all_by_itself()
        await until(lambda: bench.order_state() == "done")


def test_renewals_are_for_the_highest_generation() -> None:
    """I1: the same, of admission alone."""
    active, members = Generation(1, 1), frozenset({"n1", "n2"})
    for highest, refused in ((Generation(1, 1), False), (Generation(1, 2), True)):
        facts = Facts("n1", members, True, False, False, highest, None, active, LEASE_NS)
        verdict = admit(facts, Renew(generation=active, deadline_boottime_ns=2 * LEASE_NS), "agent", 1)
        assert isinstance(verdict, Refusal) == refused


# ---------------------------------------------------------------- the watch over the postmaster


class Restless(SteppedEngine):
    """Somebody writes another pid into postmaster.pid all the time."""

    looks = 0

    def postmaster(self) -> int | None:
        self.looks += 1
        return self.looks

    async def ended(self, pid: int, within_s: float) -> bool:
        await trio.lowlevel.checkpoint()
        return True


async def test_a_postmaster_that_always_changes_takes_no_processor(tmp_path: Path) -> None:
    """W9: the watch looks a hundred times a second at most, whatever stands in PostgreSQL's folder."""
    bench = Bench(tmp_path, Restless)
    bench.remember(OrderRecord(Generation(1, 1), "follow", None, "done"))
    async with bench.running():
        assert isinstance(bench.engine, Restless)
        before, waited_s = bench.engine.looks, 0.5
        await trio.sleep(waited_s)
        assert bench.engine.looks - before < waited_s * 100 * 1.5


class Exhausted(SteppedEngine):
    """For a while there is no descriptor left to look with."""

    exhausted = False

    def postmaster(self) -> int | None:
        if self.exhausted:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().postmaster()

    async def ended(self, pid: int, within_s: float) -> bool:
        if self.exhausted:
            raise OSError(errno.EMFILE, "Too many open files")
        return await super().ended(pid, min(within_s, 0.01))


async def test_a_postmaster_that_cannot_be_looked_at_is_not_said_to_be_down(tmp_path: Path) -> None:
    """O5: nothing is learnt without a descriptor, and the lease's end is kept all the same (W9)."""
    bench = Bench(tmp_path, Exhausted)
    async with bench.running() as fencer:
        assert isinstance(bench.engine, Exhausted)
        await bench.lead()
        bench.all_by_itself()
        bench.engine.exhausted = True
        await trio.sleep(0.1)
        assert fencer.status().postgres == "running"
        bench.engine.exhausted = False
        await trio.sleep(0.1)
        assert fencer.status().postgres == "running"
        bench.engine.exhausted = True
        bench.clock.advance(LEASE_NS)
        await until(lambda: not bench.world.lives)


# ---------------------------------------------------------------- files


class LateAtFirst:
    """A lock whose first caller does not get to run until it is told to."""

    def __init__(self) -> None:
        self.lock, self.go_on, self.late, self.calls = (
            threading.Lock(),
            threading.Event(),
            threading.Event(),
            0,
        )

    def acquire(self, timeout: float) -> bool:
        self.calls += 1
        if self.calls == 1:
            self.late.set()
            self.go_on.wait(10)
        return self.lock.acquire(timeout=timeout)

    def release(self) -> None:
        self.lock.release()


async def test_changes_are_numbered_in_the_order_of_their_calls(tmp_path: Path) -> None:
    """D7: an older order's thread that gets to run after the newer one's has written changes nothing."""
    path, files, lock = tmp_path / "conf", Files(None), LateAtFirst()
    files._lock = lock  # type: ignore[assignment]
    ended = threading.Event()

    def older(change: Change) -> None:
        try:
            change.write(path, b"older")
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.change, older)
        await until(lock.late.is_set)
        nursery.cancel_scope.cancel()
    await files.change(lambda change: change.write(path, b"newer"))
    lock.go_on.set()
    await until(ended.is_set)
    assert path.read_bytes() == b"newer"
