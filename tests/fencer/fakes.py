"""Stand-ins for what tests of the fencer cannot have: a watchdog whose resets can be seen, a clock that is
driven, a disk that is held or broken between two system calls, a PostgreSQL whose every step waits for us."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from harmony_fencer import durable
from harmony_fencer.config import Address, FencerConfig
from harmony_fencer.engine import Outcome
from harmony_fencer.programs import PostgresError
from harmony_fencer.protocol import Rung, SyncRule
from harmony_fencer.state import WITNESS
from harmony_fencer.timelines import Newest
from harmony_fencer.watchdog import WatchdogError
from tests.fencer.node import FENCE_S, LEASE_S

NS = 1_000_000_000


class FakeClock:
    """A boot clock that stands still until it is set."""

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


class FakeWatchdog:
    """A harmony_fencer.watchdog.Watchdog that notes when it would have reset the host.

    `reset_at_ns` is None, or that moment on `clock`: exactly one timeout after the last pet in time. A pet
    that comes later changes nothing: the host is gone, and its fencer with it.
    """

    def __init__(self, clock: Callable[[], int], *, nowayout: bool = False) -> None:
        self._clock = clock
        self._nowayout = nowayout
        self._timeout_ns = 0
        self._due_ns: int | None = None
        self._reset_at_ns: int | None = None
        self._open = False
        self.pets: list[int] = []
        self.refuse: str | None = None  # arm() and pet() raise WatchdogError with this text

    @property
    def armed(self) -> bool:
        return self._open

    @property
    def reset_at_ns(self) -> int | None:
        if self._reset_at_ns is None and self._due_ns is not None and self._clock() >= self._due_ns:
            self._reset_at_ns = self._due_ns
        return self._reset_at_ns

    def arm(self, timeout_s: float) -> float:
        if self._open or timeout_s < 1 or self.refuse:
            raise WatchdogError(f"fake: {self.refuse or 'armed already, or a timeout under 1 s'}")
        self._timeout_ns = int(timeout_s) * NS
        self._open = True
        self._restart()
        return float(int(timeout_s))

    def pet(self) -> None:
        if not self._open or self.refuse:
            raise WatchdogError(f"fake: {self.refuse or 'not armed'}")
        self.pets.append(self._clock())
        self._restart()

    def disarm(self) -> bool:
        if self._open and self._nowayout:
            return False
        if self.reset_at_ns is None:
            self._due_ns = None
        self._open = False
        return True

    def holder_dies(self) -> None:
        """The process that armed it ends: it ticks on, and the kernel's close counts as one last pet."""
        if self._open:
            self._open = False
            self._restart()

    def _restart(self) -> None:
        if self.reset_at_ns is None:
            self._due_ns = self._clock() + self._timeout_ns


def configuration(top: Path) -> FencerConfig:
    """For a fencer without a PostgreSQL, in `top`'s folders state, run and data."""
    return FencerConfig(
        node="n1",
        agent_uid=os.getuid(),
        agent_gid=os.getgid(),
        postgres_ids=None,
        data_dir=str(top / "data"),
        config_file=str(top / "data" / "postgresql.conf"),
        run="pg_ctl",
        unit="",
        cgroup=False,
        bin_dir="/nonexistent",
        library_dir=None,
        port=1,
        listen_addresses="",
        socket_dir=str(top),
        members={"n1": Address("127.0.0.1", 1), "n2": Address("127.0.0.1", 2)},
        replication_user="postgres",
        replication_passfile=None,
        lease_s=LEASE_S,
        fence_timeout_s=FENCE_S,
        start_timeout_s=20,
        watchdog_mode="off",
        watchdog_device="/nonexistent",
        watchdog_timeout_s=1.0,
        state_dir=str(top / "state"),
        run_dir=str(top / "run"),
        log_format="json",
    )


# ---------------------------------------------------------------- time


class DrivenClock:
    """A harmony_fencer.clock.Clock that goes on only by `advance()`."""

    def __init__(self, now_ns: int = 1_000 * NS) -> None:
        self._now_ns = now_ns
        self._sleepers: list[tuple[int, trio.Event]] = []

    def now_ns(self) -> int:
        return self._now_ns

    async def sleep_until(self, when_ns: int) -> None:
        await trio.lowlevel.checkpoint()
        if when_ns > self._now_ns:
            entry = (when_ns, trio.Event())
            self._sleepers.append(entry)
            try:
                await entry[1].wait()
            finally:
                self._sleepers.remove(entry)

    def advance(self, ns: int) -> None:
        self._now_ns += ns
        for when_ns, event in self._sleepers:
            if when_ns <= self._now_ns:
                event.set()


# ---------------------------------------------------------------- the disk


class Killed(Exception):
    """In a thread or task of a fencer that was killed: nothing of it goes on."""


class HeldDisk:
    """A durable.Disk, real except that it can hold or fail the write at a system call.

    `hold`: the calls before which a writer waits until `release()`. `fail`: the calls that raise EIO.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._dead = False
        self._tickets = 0
        self.hold: frozenset[str] = frozenset()
        self.fail: frozenset[str] = frozenset()
        self.waiting = 0

    def release(self) -> None:
        """Let the writer that waits make its system call."""
        with self._condition:
            self._tickets += self.waiting
            self.waiting = 0
            self._condition.notify_all()

    def kill(self) -> None:
        """Who waits, and who comes, ends here."""
        with self._condition:
            self._dead, self.waiting = True, 0
            self._condition.notify_all()

    def _pass(self, call: str) -> None:
        with self._condition:
            if call in self.hold and not self._dead:
                self.waiting += 1
                while not self._tickets and not self._dead:
                    self._condition.wait()
                self._tickets -= 0 if self._dead else 1
            if self._dead:
                raise Killed(call)
            if call in self.fail:
                raise OSError(errno.EIO, f"{call}: broken by the test")

    def create(self, path: Path) -> int:
        self._pass("create")
        return durable.REAL.create(path)

    def write(self, fd: int, data: bytes) -> int:
        self._pass("write")
        return durable.REAL.write(fd, data)

    def fsync(self, fd: int) -> None:
        self._pass("fsync")

    def close(self, fd: int) -> None:
        durable.REAL.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        self._pass("rename")
        durable.REAL.rename(old, new)

    def sync_folder(self, folder: Path) -> None:
        self._pass("sync_folder")


# ---------------------------------------------------------------- PostgreSQL


@dataclass
class World:
    """The PostgreSQL of one data directory as the host has it: it outlives every fencer."""

    data: Path
    alive: bool = False  # the postmaster
    orphans: bool = False  # backends without their postmaster
    recovery: bool = True  # of what runs: read-only
    frozen: bool = False
    stopping: bool = False  # a clean shutdown is under way
    promoting: bool = False  # a promotion was asked for: it completes when it likes
    standby: bool = False  # standby.signal is there
    production: bool = False  # what the control file says
    checkpoint: int | None = None  # and of a primary that was shut down cleanly: where
    by_hand: bool = False  # somebody else made it writable
    unfinished: bool = False  # what is at data_dir only holds the place of what is being rewound
    primary: str | None = None
    sync: SyncRule | None = None
    pid: int = 100
    ends: dict[int, trio.Event] = field(default_factory=dict)

    @property
    def lives(self) -> bool:
        return self.alive or self.orphans

    @property
    def writes(self) -> bool:
        """Whether a client could commit at this moment."""
        return self.lives and not self.recovery and not self.frozen

    def launch(self, *, by_hand: bool = False) -> None:
        """A postmaster appears: a standby when it is marked so, else a primary."""
        if self.lives:
            raise PostgresError("it runs already, or its backends do")
        if self.unfinished:
            raise PostgresError("there is no database in it")
        self.pid += 1
        self.ends[self.pid] = trio.Event()
        self.alive, self.recovery, self.frozen, self.stopping = True, self.standby, False, False
        self.promoting = False
        self.by_hand = by_hand and not self.standby
        self.production, self.checkpoint = not self.standby, None

    def promoted(self, *, by_hand: bool = False) -> None:
        """The promotion completes."""
        self.promoting = False
        if self.recovery:
            self.recovery, self.standby, self.production = False, False, True
            self.by_hand = by_hand

    def postmaster_dies(self, *, orphans: bool) -> None:
        self.alive, self.promoting, self.stopping = False, False, False
        self.orphans = orphans
        self.ends[self.pid].set()

    def gone(self, *, clean: bool = False) -> None:
        """All of it."""
        if self.alive:
            self.checkpoint = 1000 * self.pid if clean and not self.recovery else None
            self.postmaster_dies(orphans=False)
        self.orphans = self.frozen = False
        if clean:
            self.production = False


@dataclass
class Step:
    """What an effect waits for: that the test lets it happen, or makes it fail."""

    call: Call
    name: str
    event: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = None


@dataclass(eq=False)
class Call:
    """One effect under way."""

    name: str


Effect = Literal["start", "promote", "stop", "configure", "reload", "mark", "check", "rejoin"]


class SteppedRejoin:
    """An engine.Rejoining over a World: looked at, stepped aside, rewound or copied, put in place, started.

    Of a rewind nothing can be started from `aside` to `in place`, whoever dies meanwhile; a copy leaves the old one.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine, self._world = engine, engine.world
        self._working = ""

    cannot_rewind = empty = ""

    async def learn(self) -> None:
        await trio.lowlevel.checkpoint()

    @property
    def unfinished(self) -> bool:
        return self._world.unfinished

    @property
    def progress(self) -> str:
        return self._working or ("interrupted" if self.unfinished else "")

    async def check(self, primary: str, system_identifier: str, *, clone: bool) -> str:
        if self._engine.could_write():
            self._engine.fouls.append("I1: a rejoin looks around while PostgreSQL may write")
        async with self._engine.effect("check") as call:
            await self._engine.step(call, "looked at")
            return "a copy was ordered" if clone else ""

    async def run(
        self, primary: str, system_identifier: str, testimony: bytes, *, why_clone: str, slot: bool
    ) -> str:
        w, engine = self._world, self._engine
        if w.lives or not w.standby:
            engine.fouls.append("I1: a rejoin began on a PostgreSQL that runs, or is not marked as a standby")
        async with engine.effect("rejoin") as call:
            self._working = "rejoining"
            try:
                if not why_clone:
                    await engine.step(call, "aside")
                    self._must_be_alone()
                    w.unfinished = True
                await engine.step(call, "copied" if why_clone else "rewound")
                await engine.step(call, "in place")
                self._must_be_alone()
                durable.replace(w.data / WITNESS, testimony)
                w.unfinished, w.production, w.primary = False, False, primary
            finally:
                self._working = ""
        await engine.start()
        return "done"

    def _must_be_alone(self) -> None:
        if self._world.lives:
            raise PostgresError("somebody has started it meanwhile")


class SteppedEngine:
    """An engine.Engine over a World, of one fencer process. Each effect goes on step by step, as the test lets it.

    `auto`: steps happen at once. `sticky`: a cancelled program (pg_ctl) takes a step more to end. `began` counts
    the effects, and `fouls` notes what no order of events may bring about.
    """

    where = "a model"

    def __init__(self, world: World, clock: DrivenClock, fence_timeout_s: float) -> None:
        self.world = world
        self.rejoin = SteppedRejoin(self)
        self._clock = clock
        self._mark_s = 0.15 * fence_timeout_s
        self._halted = False
        self._dead = False
        self.auto = self.sticky = False
        self.began = 0
        self.calls: list[Call] = []
        self.steps: list[Step] = []
        self.fouls: list[str] = []
        self.before_effect: Callable[[str], None] = lambda name: None

    # ------------------------------------------------------------ what the test does

    def kill(self) -> None:
        """The fencer's process is killed: nothing of its effects goes on."""
        self._dead = True
        for step in self.steps:
            step.event.set()

    def let(self, number: int, failure: Exception | None = None) -> None:
        """Let one step happen, or fail."""
        step = self.steps[number]
        step.failure = failure
        step.event.set()

    async def step(self, call: Call, name: str, *, shield: bool = False) -> None:
        if self._dead:
            raise Killed(name)
        if self.auto:
            await trio.lowlevel.checkpoint()
            return
        step = Step(call, name)
        self.steps.append(step)
        try:
            with trio.CancelScope(shield=shield):
                await step.event.wait()
        finally:
            self.steps.remove(step)
        if self._dead:
            raise Killed(name)
        if step.failure is not None:
            raise step.failure

    @asynccontextmanager
    async def effect(self, name: Effect) -> AsyncIterator[Call]:
        """Note that it runs; where `sticky`, a cancelled one takes its time to end."""
        if self._dead:
            raise Killed(name)
        self.before_effect(name)
        call = Call(name)
        self.began += 1
        self.calls.append(call)
        try:
            yield call
        except trio.Cancelled:
            if self.sticky and name in {"start", "reload", "promote"} and not self._dead:
                await self.step(call, "ending", shield=True)
            raise
        finally:
            self.calls.remove(call)

    # ------------------------------------------------------------ looking

    def initialised(self) -> bool:
        return True

    def is_standby(self) -> bool:
        return self.world.standby

    def could_write(self) -> bool:
        return not self.world.standby or (self.world.alive and not self.world.recovery)

    def pids(self) -> list[int]:
        found = [self.world.pid] if self.world.alive else []
        return [*found, self.world.pid + 10_000] if self.world.lives else found

    def postmaster(self) -> int | None:
        return self.world.pid if self.world.alive else None

    @property
    def halted(self) -> bool:
        return self._halted

    notices = False

    async def ended(self, pid: int, within_s: float) -> bool:
        with trio.move_on_after(within_s):
            await self.world.ends[pid].wait()
        return self.world.ends[pid].is_set()

    async def system_identifier(self) -> str | None:
        await trio.lowlevel.checkpoint()
        return "7"

    async def in_production(self) -> bool:
        await trio.lowlevel.checkpoint()
        return self.world.production

    def timeline(self) -> Newest:
        return Newest(2)

    # ------------------------------------------------------------ acting

    def halt(self) -> None:
        self._halted = True
        self.world.frozen = self.world.lives

    async def mark_standby(self) -> None:
        async with self.effect("mark") as call:
            await self.step(call, "standby.signal")
            self.world.standby = True

    async def _mark(self, call: Call) -> str:
        try:
            with trio.move_on_after(self._mark_s):
                await self.step(call, "standby.signal")
                self.world.standby = True
                return ""
        except OSError as e:
            return f"standby.signal could not be written: {e}"
        return "standby.signal could not be written in time"

    async def stop(self, *, clean_until_ns: int = 0) -> Outcome:
        """As ladder.Ladder climbs."""
        async with self.effect("stop") as call:
            notes, rungs = "", list[Rung]()
            if self.world.lives and clean_until_ns > self._clock.now_ns() and not self._halted:
                notes = await self._mark(call)
                await self._fast(call, clean_until_ns)
                rungs.append(Rung("fast", 0.0, not self.world.lives))
            if self.world.lives:
                self.halt()
                notes = await self._mark(call)
                try:
                    await self.step(call, "kill")
                    self.world.gone()
                except PostgresError as e:
                    notes = str(e)
                rungs.append(Rung("kill", 0.0, not self.world.lives))
            elif not notes:
                notes = await self._mark(call)
            proven = not self.world.lives
            if proven:
                self._halted = False
            told = self.world.checkpoint if proven and clean_until_ns else None
            return Outcome(proven, notes, tuple(rungs), 0.0, told)

    async def _fast(self, call: Call, until_ns: int) -> None:
        self.world.stopping = self.world.alive

        async def shut_down(scope: trio.CancelScope) -> None:
            try:
                await self.step(call, "clean shutdown")
                self.world.gone(clean=True)
                scope.cancel()
            except PostgresError:
                await trio.sleep_forever()  # it hangs

        async with trio.open_nursery() as nursery:
            nursery.start_soon(shut_down, nursery.cancel_scope)
            await self._clock.sleep_until(until_ns)
            nursery.cancel_scope.cancel()

    was_standby = False

    async def found(self, testimony: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def configure(
        self, primary: str | None, sync: SyncRule | None, testimony: bytes, *, slot: bool = False
    ) -> None:
        async with self.effect("configure") as call:
            await self.step(call, "configure")
            if self.world.unfinished:
                raise PostgresError("only a rejoin starts PostgreSQL here")
            durable.replace(self.world.data / WITNESS, testimony)
            self.world.primary, self.world.sync = primary, sync

    async def start(self) -> None:
        async with self.effect("start") as call:
            await self.step(call, "standby.signal")
            self.world.standby = True
            await self.step(call, "launch")
            if self._halted:
                self.fouls.append("started while halted")
            self.world.launch()
            await self.step(call, "ready")
            self._must_run()

    async def reload(self) -> None:
        async with self.effect("reload") as call:
            await self.step(call, "reload")
            self._must_run()

    async def promote(self, reserved: int) -> Newest:
        async with self.effect("promote") as call:
            await self.step(call, "trigger")
            self._must_run()
            self.world.promoting = self.world.recovery
            await self.step(call, "promoted")
            self._must_run()
            self.world.promoted()
            return self.timeline()

    def _must_run(self) -> None:
        if not self.world.alive or self.world.frozen or self.world.stopping:
            raise PostgresError("it does not run")
