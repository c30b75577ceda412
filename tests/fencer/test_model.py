"""Any interleaving of orders, effects, failures, time and restarts, against a model (issue item 8).

The fencer, its dead-man's switch and its ledger are the real ones; PostgreSQL, the clock and the disk are those
of fakes.py, driven step by step by hypothesis. After each step the invariants of `Bench.check()` must hold.
MODEL_EXAMPLES=5000 runs longer, and with other examples each time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from harmony.demo.cluster import memory_folder
from harmony_fencer import lease as leases
from harmony_fencer import state as states
from harmony_fencer.fencer import Fencer, Parts
from harmony_fencer.guard import STRAY_S, WATCH_S, guard, watch
from harmony_fencer.ledger import Ledger
from harmony_fencer.programs import PostgresError
from harmony_fencer.protocol import (
    Accepted,
    Activate,
    Done,
    Fence,
    Follow,
    Generation,
    Latch,
    OperatorFence,
    OrderRecord,
    Refusal,
    Rejoin,
    Renew,
    Renewed,
    Reply,
    Request,
    Status,
    StatusRequest,
    SyncRule,
    Unfence,
)
from tests import pace, sampling
from tests.fencer.fakes import NS, DrivenClock, HeldDisk, Killed, SteppedEngine, World, configuration
from tests.fencer.node import FENCE_S, LEASE_S

LEASE_NS, FENCE_NS = round(LEASE_S * NS), round(FENCE_S * NS)
MS = 1_000_000
TICK_NS = 25 * MS
STRAY_NS = round((STRAY_S + WATCH_S + 0.1) * NS)
MARK_NS = round(0.15 * FENCE_NS)
RULE = SyncRule(0, ())
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "0"))
T = TypeVar("T")


@dataclass(eq=False)
class Ticket:
    """One request under way on its own connection."""

    request: Request
    sent_ns: int
    latched: bool  # when it was sent, and ever since
    alone: bool  # nothing else was under way
    healthy: bool  # nor was anything wrong with the disk, or with trust
    leads: bool  # a lease was in force then
    unfinished: bool  # and a rejoin was
    files: dict[str, bytes]
    began: int
    reply: Reply | None = None
    repeat: bool = False
    writes: bool = False  # whether PostgreSQL could write at the moment of the reply


@dataclass
class Known:
    """The model: what clients have been told, and what follows from it."""

    highest: Generation = Generation(0, 0)  # noqa: RUF009 (frozen)
    newest: tuple[str, str | None] | None = None  # (op, primary) of the order that has it
    request: Request | None = None
    finished: dict[Generation, OrderRecord] = field(default_factory=dict)
    deadline_ns: int | None = None
    clean_ns: int = 0  # until when a planned demotion may take
    latched: bool = False
    fenced: bool = False  # by the newest order, at once
    untrusted: bool = False
    on_disk: Generation = Generation(0, 0)  # noqa: RUF009 (durable: no power cut takes it)
    newest_on_disk: tuple[str, str | None] | None = None
    latch_on_disk: bool = False


class Bench:
    """A fencer in a trio loop of its own thread, and short synchronous ways to drive it."""

    def __init__(self, seed: int = 0) -> None:
        self.turns = seed << 16  # whose turn it is, where several tasks could run
        self.top = Path(tempfile.mkdtemp(prefix="model-", dir=memory_folder()))
        for name in ("state", "run", "data"):
            (self.top / name).mkdir()
        self.config = configuration(self.top)
        self.clock = DrivenClock()
        self.trio_clock = trio.testing.MockClock()
        self.world = World(self.top / "data")
        self.boot = 1
        self.known = Known()
        self.problems: list[str] = []
        self.pending: list[Ticket] = []
        # Sent to a fencer that died before it answered, or to one whose disk failed: it may be on disk.
        self.lost: list[Request] = []
        # Numbers of an activate or follow that was refused for a hung disk, and may be on it all the same: another
        # order that was accepted under the same number may find it there after a restart, and is then refused.
        self.twice = set[Generation]()
        self.stray_ns = 0
        self.seen = Generation(0, 0)
        self.fencer: Fencer | None = None
        self.stopping = self.stopped = False  # asked to end; it has ended, and its process would be gone
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    # ------------------------------------------------------------ the loop

    def _run(self, ready: threading.Event) -> None:
        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            self._over = trio.Event()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                ready.set()
                await self._over.wait()
                nursery.cancel_scope.cancel()

        trio.run(main, clock=self.trio_clock)

    def close(self) -> None:
        if self.fencer is not None:
            self.kill()
        self._in_loop(self._over.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        shutil.rmtree(self.top)

    def _in_loop(self, do: Callable[[], T]) -> T:
        return trio.from_thread.run_sync(do, trio_token=self._token)

    def do(self, what: Callable[[], T]) -> T:
        """Do it in the loop, and return when nothing moves any more."""

        async def doing() -> T:
            self.turns += 1
            trio._core._run._r.seed(self.turns)  # type: ignore[attr-defined]
            result = what()
            await self._settled()
            return result

        return trio.from_thread.run(doing, trio_token=self._token)

    async def _settled(self) -> None:
        until = time.monotonic() + pace.wait_s(20)
        while True:
            await trio.testing.wait_all_tasks_blocked()
            if self.fencer is None or not self._writing():
                return
            if time.monotonic() > until:
                raise AssertionError("the disk's thread does not end")
            time.sleep(0.00005)  # noqa: ASYNC251 (its thread runs: let it)

    def _writing(self) -> bool:
        """Whether a thread is writing, and not held by us."""
        return self.ledger._writing.borrowed_tokens > self.disk.waiting

    # ------------------------------------------------------------ the fencer's life

    def start(self) -> None:
        """A fencer's process starts."""

        def go() -> None:
            self.disk = HeldDisk()
            self.engine = SteppedEngine(self.world, self.clock, FENCE_S)
            self.engine.before_effect = self._before_effect
            parts = Parts(self.engine, self.clock, f"boot-{self.boot}", lambda: "now")
            fencer = Fencer(self.config, parts)
            self.ledger = fencer._ledger = Ledger(self.config, parts.boot_id, disk=self.disk)
            self.fencer, self.stopping, self.stopped = fencer, False, False
            self._gone, self._serving = trio.Event(), trio.Event()
            self._nursery.start_soon(self._life, fencer)

        self.do(go)
        self._reconcile()
        self.check()

    async def _life(self, fencer: Fencer) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._process = nursery
                nursery.start_soon(guard, fencer, self.clock)  # in main.run()'s order
                await fencer.start(nursery)
                nursery.start_soon(watch, fencer)
                self._serving.set()
                await trio.sleep_forever()
        except* Killed:
            pass
        except* Exception as group:  # noqa: BLE001 (any is a finding)
            self.problems.append(f"the fencer died of {group.exceptions!r}")
        finally:
            self._gone.set()

    def kill(self) -> None:
        """SIGKILL: nothing of it goes on."""

        async def go() -> None:
            self.lost += [t.request for t in self.pending]
            self.pending.clear()
            self.engine.kill()
            self.disk.kill()
            self._process.cancel_scope.cancel()
            await self._gone.wait()
            while self.ledger._writing.borrowed_tokens:
                await trio.testing.wait_all_tasks_blocked()
                time.sleep(0.00005)  # noqa: ASYNC251
            await trio.testing.wait_all_tasks_blocked()

        trio.from_thread.run(go, trio_token=self._token)
        self.fencer = None

    def shut_down(self) -> None:
        """SIGTERM."""

        async def go() -> None:
            await fencer.shut_down()
            w = self.world
            if not w.by_hand and (w.writes or (w.promoting and not w.frozen)):
                self.problems.append("O1: it ended, and PostgreSQL may write")
            self.stopped = True

        fencer = self.fencer
        assert fencer is not None
        self.stopping = True
        if self.known.deadline_ns is not None:
            self.known.clean_ns = max(self.known.deadline_ns, self.clock.now_ns() + MARK_NS)
        self.do(lambda: self._process.start_soon(go))
        self.check()

    def _reconcile(self) -> None:
        """What died with an unanswered request may have been accepted or not: both are right."""
        assert self.fencer is not None
        status = self.fencer.status()
        k, order = self.known, status.order
        if status.trusted and order is not None and (order.op, order.primary) != k.newest:
            same = [r for r in self.lost if self._is_order(r, order)]
            if order.generation < k.highest or not same:
                self.problems.append(f"I3: {order} is on disk, not {k.highest} {k.newest}; {self.lost}")
            else:
                k.highest, k.newest, k.request = order.generation, (order.op, order.primary), same[0]
                k.deadline_ns, k.fenced = None, False
        elif status.trusted and status.highest > k.highest:
            same = [r for r in self.lost if order is not None and self._is_order(r, order)]
            k.highest, k.deadline_ns, k.fenced = status.highest, None, False
            k.request = same[0] if same else None
            if not same:
                self.problems.append(f"I3: {status.highest} is on disk and nobody sent it: {self.lost}")
        if self.lost or not k.latch_on_disk:
            k.latched = k.latch_on_disk = status.latch is not None
        k.untrusted = not status.trusted
        if status.trusted:
            k.on_disk, k.newest_on_disk = k.highest, k.newest
            self.lost.clear()

    @staticmethod
    def _is_order(r: Request, order: OrderRecord) -> bool:
        match r:
            case OperatorFence():
                return order.op == "operator_fence"
            case Activate() | Fence() | Follow() | Rejoin():
                op = type(r).__name__.lower()
                return (r.generation, op, getattr(r, "primary", None)) == (
                    order.generation,
                    order.op,
                    order.primary,
                )
        return False

    # ------------------------------------------------------------ requests

    def files(self) -> dict[str, bytes]:
        return {
            str(p): p.read_bytes()
            for name in ("state", "run")
            for p in (self.top / name).iterdir()
            if not p.name.endswith(".new")
        }

    def ask(self, request: Request) -> Ticket:
        """On a connection of its own, as root."""
        fencer, k = self.fencer, self.known
        assert fencer is not None
        healthy = not self.disk.fail and not self.disk.hold and not k.untrusted and fencer.status().trusted
        ticket = Ticket(
            request,
            self.clock.now_ns(),
            k.latched,
            alone=not self.pending,
            healthy=healthy,
            leads=fencer.status().active is not None,
            unfinished=self.world.unfinished,
            files=self.files(),
            began=self.engine.began,
        )
        for other in self.pending:
            other.alone = False
        self.pending.append(ticket)

        async def connection() -> None:
            await self._serving.wait()
            ticket.reply = await fencer.handle(request, "root")
            ticket.writes = self.world.writes
            if ticket in self.pending:
                self.pending.remove(ticket)
                self._told(ticket, ticket.reply)

        self.do(lambda: self._process.start_soon(connection))
        r = ticket.reply
        refused = isinstance(r, Refusal) and r.error != "storage_failed" and ticket.alone
        if refused and (self.files(), self.engine.began) != (ticket.files, ticket.began):
            self.problems.append(f"a refused {request} changed something")
        if ticket.repeat and ticket.alone and self.engine.began != ticket.began:
            self.problems.append(f"a repeat started something: {request}")
        self.check()
        return ticket

    def _told(self, ticket: Ticket, reply: Reply) -> None:
        """A client reads a reply: it must fit all that clients were told before."""
        problems: list[str] = []
        match reply:
            case Accepted():
                if reply.record.generation > self.known.highest:
                    problems = self._accepted(ticket, reply.record)
                else:
                    problems = self._repeated(ticket, reply.record)
            case Renewed():
                problems = self._renewed(ticket, reply)
            case Refusal():
                problems = self._refused(ticket, reply)
            case Done():  # unless the one-shot set another meanwhile
                self.known.latched = (self.top / "state" / states.LATCH).exists()
                self.known.latch_on_disk = self.known.latched
                for other in self.pending:
                    other.latched = self.known.latched
            case Status():
                pass
        self.problems += [f"{p}: {ticket.request} -> {reply}" for p in problems]

    def _accepted(self, ticket: Ticket, record: OrderRecord) -> list[str]:
        k, r, now_ns = self.known, ticket.request, self.clock.now_ns()
        fencer = self.fencer
        assert fencer is not None
        bad = []
        if isinstance(r, OperatorFence):
            k.latched = True
            if not k.untrusted and record.generation != Generation(k.highest.term, k.highest.order + 1):
                bad.append("an operator's fence is numbered next")
        elif not isinstance(r, Activate | Fence | Follow | Rejoin) or r.generation != record.generation:
            bad.append("another order's record")
        if isinstance(r, Activate | Follow | Rejoin) and ticket.latched:
            bad.append("accepted on a latched node")
        if isinstance(r, Activate | Follow | Rejoin) and k.untrusted:
            bad.append("accepted on an untrusted node")
        if isinstance(r, Rejoin) and ticket.alone and ticket.leads:
            bad.append("I2: a leader is rejoined")
        if isinstance(r, Activate) and ticket.alone and ticket.unfinished:
            bad.append("I2: what is unfinished is to lead")
        if isinstance(r, Activate) and r.deadline_boottime_ns <= ticket.sent_ns:
            bad.append("W9: accepted for a lease that is over")
        if left := [c.name for c in self.engine.calls if c.name != "mark"]:
            bad.append(f"D7: {left} of an older order goes on after the reply")
        if record.state != "running":
            bad.append("a new order begins as running")
        status = fencer.status()
        if status.highest != record.generation or status.order != record:
            bad.append(f"status says {status.highest} {status.order}")
        on_disk, why = states.load(self.top / "state")
        if status.trusted and (on_disk.order != record or on_disk.highest != record.generation or why):
            bad.append(f"I3: accepted before it was durable (on disk: {on_disk.order}{why})")
        if not status.trusted and isinstance(r, Activate | Follow | Rejoin):
            bad.append("I3: accepted though it could not be made durable")
        if isinstance(r, Activate):
            k.deadline_ns = min(r.deadline_boottime_ns, now_ns + LEASE_NS)
            self.world.by_hand = False
        else:
            if status.active is not None or (self.top / "run" / leases.NAME).exists():
                bad.append("W9: the lease goes on after an order that ends it")
            if k.deadline_ns is not None:  # without a lease no more time either
                k.clean_ns = max(k.deadline_ns or 0, now_ns + FENCE_NS // 2 + MARK_NS)
            k.deadline_ns = None
        k.fenced = isinstance(r, Fence | OperatorFence) and not r.clean
        if k.fenced and self.world.writes:
            bad.append("I1: a fence was answered before writes had ended")
        k.highest, k.newest, k.request = record.generation, (record.op, record.primary), r
        if status.trusted:
            k.on_disk, k.newest_on_disk, k.latch_on_disk = k.highest, k.newest, k.latched
        else:
            self.lost.append(r)
        return bad

    def _repeated(self, ticket: Ticket, record: OrderRecord) -> list[str]:
        k, r = self.known, ticket.request
        bad = []
        if not isinstance(r, Activate | Fence | Follow | Rejoin) or r.generation != k.highest:
            bad.append("I3: accepted below the highest")
        if (record.op, record.primary) != k.newest or record.generation != k.highest:
            bad.append(f"a repeat is answered with another's outcome, not {k.newest}")
        ticket.repeat = True
        return bad

    def _renewed(self, ticket: Ticket, reply: Renewed) -> list[str]:
        k, r, now_ns = self.known, ticket.request, self.clock.now_ns()
        assert isinstance(r, Renew)
        bad = []
        if k.newest is None or k.newest[0] != "activate" or r.generation != k.highest:
            bad.append("W9: renewed, and it is not the newest activate")
        elif k.deadline_ns is None or now_ns >= k.deadline_ns:
            bad.append("W9: an expired lease was revived")
        else:
            wanted = min(r.deadline_boottime_ns, now_ns + LEASE_NS)
            if not wanted <= reply.deadline_boottime_ns <= max(wanted, k.deadline_ns):
                bad.append(f"W9: the deadline should be {wanted}, or {k.deadline_ns} as before")
            k.deadline_ns = reply.deadline_boottime_ns
        return bad

    def _refused(self, ticket: Ticket, reply: Refusal) -> list[str]:
        """What is right must be accepted, or a fencer that refuses everything would pass."""
        k, r = self.known, ticket.request
        if reply.error in {"storage_failed", "retiring"}:
            self.lost.append(r)
            if isinstance(r, Activate | Follow | Rejoin):
                self.twice.add(r.generation)
        healthy = ticket.healthy and not self.disk.fail and not self.disk.hold
        if reply.error == "retiring" or not ticket.alone or not healthy:
            return []
        match r:
            case Activate() | Fence() | Follow() | Rejoin() if (
                r == k.request and r.generation not in self.twice
            ):
                return ["a repeat is answered with the outcome"]
            case OperatorFence():
                return ["refused an operator's fence"]
            case Fence() if r.generation > k.highest:
                return ["refused a newer fence"]
            case Follow() if r.generation > k.highest and not k.latched and r.primary != "n1":
                return ["refused a newer follow"]
            case Rejoin() if r.generation > k.highest and not k.latched and not ticket.leads:
                return ["refused a newer rejoin"]
            case Activate() if r.generation > k.highest and not k.latched and not ticket.unfinished:
                return ["refused a newer activate"] if r.deadline_boottime_ns > self.clock.now_ns() else []
            case Unfence() if k.latched:
                return ["the latch was not lifted"]
        return []

    # ------------------------------------------------------------ the invariants

    def _before_effect(self, name: str) -> None:
        """I3: durable before it acts."""
        fencer = self.fencer
        if fencer is None or self.ledger.untrusted:
            return
        on_disk, why = states.load(self.top / "state")
        if why or on_disk.highest < fencer._ledger.state.highest:
            self.problems.append(f"I3: {name} begins, and only {on_disk.highest} is on disk {why}")

    def check(self) -> None:
        """What must hold whenever nothing moves."""
        problems = self.problems + self.engine.fouls
        if self.fencer is not None and not self.stopped:
            problems += self._in_loop(self._look)
        assert not problems, "\n".join(problems)

    def _look(self) -> list[str]:
        k, w, now_ns = self.known, self.world, self.clock.now_ns()
        fencer = self.fencer
        assert fencer is not None
        status, bad = fencer.status(), []
        if status.trusted and status.highest < max(self.seen, k.highest):
            bad.append(
                f"I3: the highest generation fell from {max(self.seen, k.highest)} to {status.highest}"
            )
        self.seen = max(self.seen, status.highest)
        if k.untrusted and status.trusted:  # its disk was slow, and has all of it now
            k.on_disk, k.newest_on_disk, k.latch_on_disk = k.highest, k.newest, k.latched
            self.lost.clear()
        k.untrusted = not status.trusted
        deadline_ns = status.lease_deadline_boottime_ns
        if deadline_ns is not None and deadline_ns > now_ns + LEASE_NS:
            bad.append(f"W9: a lease of {(deadline_ns - now_ns) / NS:g} s is longer than allowed")
        if k.latched and status.latch is None and not self.pending:
            bad.append("the operator's latch is gone")
        bad += self._outcome(status.order)
        if w.writes or (w.promoting and not w.frozen):
            bad += self._writes(fencer, now_ns)
        if w.unfinished and (w.lives or not status.unfinished):
            bad.append("I2: what a rejoin has left unfinished runs, or looks whole")
        if status.fence_proven and w.writes and not w.by_hand:
            bad.append("I6: a fence counts as proven, and PostgreSQL writes")
        if status.shutdown_lsn is not None and not status.fence_proven:
            bad.append("a shutdown checkpoint is told without a proven fence")
        return bad

    def _outcome(self, order: OrderRecord | None) -> list[str]:
        """What was told as ended, and is on disk, stays so for ever."""
        if order is None:
            return []
        before = self.known.finished.get(order.generation)
        if before is not None and before != order:
            return [f"the outcome {before} has become {order}"]
        if order.state in {"done", "failed"} and states.load(self.top / "state")[0].order == order:
            self.known.finished[order.generation] = order
        return []

    def _writes(self, fencer: Fencer, now_ns: int) -> list[str]:
        k, w = self.known, self.world
        bad = []
        if not fencer.could_write:
            bad.append("I6: it says that nothing here could write, and PostgreSQL does, or soon may")
        if w.writes and not w.by_hand:
            leased = k.deadline_ns is not None and now_ns < k.deadline_ns
            planned = now_ns < k.clean_ns
            if k.fenced:
                bad.append("I1: PostgreSQL writes after an accepted fence")
            elif not leased and not planned:
                late = "never" if k.deadline_ns is None else f"{(now_ns - k.deadline_ns) / NS:g} s ago"
                bad.append(f"W9, I1: PostgreSQL writes and no lease covers it (it ended: {late})")
        if w.by_hand and self.stray_ns > STRAY_NS:
            bad.append(f"I1: writable by hand, without a lease, for {self.stray_ns / NS:g} s")
        return bad

    # ------------------------------------------------------------ time

    def advance(self, ns: int) -> None:
        """Little by little: everything gets to run in time."""
        while ns > 0:
            step = min(ns, TICK_NS)
            ns -= step
            self._tick(step)
            fencer = self.fencer
            if fencer is not None and self.world.by_hand and self.world.writes:
                watched = self._serving.is_set()  # at start: after a second at most, the disk may hang
                marking = any(c.name == "mark" for c in self.engine.calls)  # likewise
                covered = fencer.engaged or fencer.deadline_ns is not None or not watched or marking
                self.stray_ns = 0 if covered else self.stray_ns + step
            else:
                self.stray_ns = 0
            self.check()

    def pause(self, ns: int) -> None:
        """All at once: the process, or the whole host, stood still."""
        self._tick(ns)
        self.check()

    def _tick(self, ns: int) -> None:
        def go() -> None:
            self.clock.advance(ns)
            self.trio_clock.jump(ns / NS)

        self.do(go)

    # ------------------------------------------------------------ the world

    def let_all(self) -> None:
        """Every effect goes on to its end."""
        for _ in range(40):
            if not self.engine.steps:
                return
            self.do(lambda: self.engine.let(0))
            self.check()

    def reboot(self) -> None:
        """Power lost and back: the fencer dies, PostgreSQL too, run_dir is empty."""
        if self.fencer is not None:
            self.kill()
        self._in_loop(self.world.gone)
        for path in (self.top / "run").iterdir():
            path.unlink()
        self.boot += 1
        k = self.known
        k.deadline_ns = None
        self.seen = k.on_disk
        if k.highest != k.on_disk:  # a fence on a disk that failed: run_dir knew, and is gone
            k.highest = k.on_disk
            k.newest, k.request = k.newest_on_disk, None
            k.finished = {g: o for g, o in k.finished.items() if g <= k.on_disk}


def activate(b: Bench, term: int, order: int = 0, ahead_ns: int = LEASE_NS) -> Ticket:
    deadline_ns = b.clock.now_ns() + ahead_ns
    return b.ask(Activate(generation=Generation(term, order), deadline_boottime_ns=deadline_ns, sync=RULE))


def fence(b: Bench, term: int, order: int = 0, *, clean: bool = False) -> Ticket:
    return b.ask(Fence(generation=Generation(term, order), reason="", clean=clean))


def follow(b: Bench, term: int, order: int = 0) -> Ticket:
    return b.ask(Follow(generation=Generation(term, order), primary="n2"))


def rejoin(b: Bench, term: int, order: int = 0, *, clone: bool = False) -> Ticket:
    g = Generation(term, order)
    return b.ask(Rejoin(generation=g, primary="n2", system_identifier="7", clone=clone))


def renew(b: Bench, g: Generation, ahead_ns: int = LEASE_NS) -> Ticket:
    return b.ask(Renew(generation=g, deadline_boottime_ns=b.clock.now_ns() + ahead_ns))


# ---------------------------------------------------------------- the machine

UP = precondition(lambda self: self.up)
KINDS = st.sampled_from(["next", "next", "next", "term", "same", "older", "old term"])
AHEAD = st.sampled_from([LEASE_NS, LEASE_NS, LEASE_NS // 4, 100 * LEASE_NS, 0, -LEASE_NS])
CALLS = st.sampled_from(["create", "rename", "sync_folder"])
LIFE = ["killed and started", "killed", "killed and started", "rebooted", "asked to stop", "orphaned"]


class Machine(RuleBasedStateMachine):
    """Each rule is one thing that a client, PostgreSQL, the disk, time, or an operator does."""

    @initialize(seed=st.integers(0, 2**16), settled=st.booleans())
    def begin(self, seed: int, settled: bool) -> None:
        self.b = Bench(seed)
        self.start(settled)

    def start(self, settled: bool) -> None:
        self.b.start()
        if settled:
            self.b.let_all()

    def teardown(self) -> None:
        if hasattr(self, "b"):
            self.b.close()

    @property
    def up(self) -> bool:
        return self.b.fencer is not None and not self.b.stopped

    # ------------------------------------------------------------ orders

    def generation(self, kind: str) -> Generation:
        g = self.b.known.highest
        return {
            "next": Generation(g.term, g.order + 1),
            "term": Generation(g.term + 1, 0),
            "same": g,
            "older": Generation(g.term, max(0, g.order - 1)),
            "old term": Generation(max(0, g.term - 1), 99),
        }[kind]

    @UP
    @rule(kind=KINDS, ahead=AHEAD)
    def activate(self, kind: str, ahead: int) -> None:
        g = self.generation(kind)
        activate(self.b, g.term, g.order, ahead)

    @UP
    @rule(kind=KINDS, clean=st.booleans())
    def fence(self, kind: str, clean: bool) -> None:
        g = self.generation(kind)
        fence(self.b, g.term, g.order, clean=clean)

    @UP
    @rule(kind=KINDS, primary=st.sampled_from(["n2", "n2", None, "n1"]))
    def follow(self, kind: str, primary: str | None) -> None:
        self.b.ask(Follow(generation=self.generation(kind), primary=primary))

    @UP
    @rule(kind=KINDS, clone=st.booleans())
    def rejoin(self, kind: str, clone: bool) -> None:
        g = self.generation(kind)
        rejoin(self.b, g.term, g.order, clone=clone)

    @UP
    @rule(kind=st.sampled_from(["same", "same", "next", "older"]), ahead=AHEAD)
    def renew(self, kind: str, ahead: int) -> None:
        renew(self.b, self.generation(kind), ahead)

    @UP
    @rule(kind=st.sampled_from(["next", "term"]))
    def becomes_primary(self, kind: str) -> None:
        self.activate(kind, LEASE_NS)
        self.b.let_all()

    @UP
    @rule(kind=st.sampled_from(["next", "term"]))
    def becomes_standby(self, kind: str) -> None:
        self.follow(kind, "n2")
        self.b.let_all()

    @UP
    @precondition(lambda self: self.b.known.request is not None)
    @rule()
    def the_same_again(self) -> None:
        request = self.b.known.request
        assert request is not None
        if not isinstance(request, OperatorFence):
            self.b.ask(request)

    @UP
    @rule(what=st.sampled_from(["fence", "clean fence", "unfence", "unfence", "one-shot"]))
    def an_operator(self, what: str) -> None:
        if what == "unfence":
            self.b.ask(Unfence(who=""))
        elif what == "one-shot":  # --once --latch, beside the fencer
            states.set_latch(self.b.top / "state", Latch("one-shot", "me", "now"))
            self.b.known.latched = self.b.known.latch_on_disk = True
            self.b.ask(StatusRequest())
        else:
            self.b.ask(OperatorFence(reason="", who="", clean=what == "clean fence"))

    # ------------------------------------------------------------ effects

    @UP
    @precondition(lambda self: self.b.engine.steps)
    @rule(number=st.integers(0, 1))
    def one_step(self, number: int) -> None:
        number = min(number, len(self.b.engine.steps) - 1)
        self.b.do(lambda: self.b.engine.let(number))
        self.b.check()

    @UP
    @precondition(lambda self: self.b.engine.steps)
    @rule()
    def to_the_end(self) -> None:
        self.b.let_all()

    @UP
    @precondition(lambda self: any(s.name != "ending" for s in self.b.engine.steps))
    @rule()
    def a_step_fails(self) -> None:
        steps = self.b.engine.steps
        number = next(i for i, s in enumerate(steps) if s.name != "ending")
        broken = OSError(28, "full") if steps[number].name == "standby.signal" else PostgresError("broken")
        self.b.do(lambda: self.b.engine.let(number, broken))
        self.b.check()

    @UP
    @rule(sticky=st.booleans())
    def cancelled_effects_take_their_time(self, sticky: bool) -> None:
        self.b.engine.sticky = sticky

    # ------------------------------------------------------------ the disk

    @UP
    @rule(call=CALLS, how=st.sampled_from(["hold", "fail"]))
    def the_disk(self, call: str, how: str) -> None:
        if how == "hold":
            self.b.disk.hold = frozenset({call})
        else:
            self.b.disk.fail = frozenset({call})

    @UP
    @precondition(lambda self: self.b.disk.hold or self.b.disk.fail)
    @rule()
    def the_disk_is_well(self) -> None:
        def go() -> None:
            self.b.disk.hold = self.b.disk.fail = frozenset()
            self.b.disk.release()

        self.b.do(go)
        self.b.check()

    # ------------------------------------------------------------ time

    @rule(ms=st.sampled_from([1, 30, 100, 300, 600, 1100]))
    def time_goes_by(self, ms: int) -> None:
        self.b.advance(ms * MS)

    @precondition(lambda self: self.b.known.deadline_ns is not None)
    @rule(short_by=st.sampled_from([0, 1]))
    def the_lease_ends(self, short_by: int) -> None:
        assert self.b.known.deadline_ns is not None
        left = self.b.known.deadline_ns - self.b.clock.now_ns() - short_by
        self.b.advance(max(1, left))

    @rule(ms=st.sampled_from([50, 500, 5000]))
    def the_host_stood_still(self, ms: int) -> None:
        self.b.pause(ms * MS)

    # ------------------------------------------------------------ PostgreSQL

    def happens(self, what: Callable[[], object]) -> None:
        self.b.do(what)
        self.b.check()

    @precondition(lambda self: self.b.world.alive and not self.b.world.by_hand)
    @rule(orphans=st.booleans())
    def the_postmaster_dies(self, orphans: bool) -> None:
        self.happens(lambda: self.b.world.postmaster_dies(orphans=orphans))

    @precondition(lambda self: not (self.b.world.lives or self.b.world.unfinished))
    @rule()
    def started_by_hand(self) -> None:
        self.happens(lambda: self.b.world.launch(by_hand=True))

    @precondition(lambda self: self.b.world.alive and self.b.world.recovery and not self.b.world.frozen)
    @rule()
    def promoted_by_hand(self) -> None:
        self.happens(lambda: self.b.world.promoted(by_hand=True))

    @precondition(lambda self: self.b.world.promoting and not self.b.world.frozen)
    @rule()
    def the_promotion_completes(self) -> None:
        self.happens(self.b.world.promoted)

    # ------------------------------------------------------------ processes

    @UP
    @rule(what=st.sampled_from(LIFE), settled=st.booleans())
    def the_fencer(self, what: str, settled: bool) -> None:
        if what == "orphaned":
            assert self.b.fencer is not None
            self.happens(self.b.fencer.orphaned)
        elif what == "asked to stop":
            if not self.b.stopping:
                self.b.shut_down()
        elif what == "rebooted":
            self.b.reboot()
            self.start(settled)
        else:
            self.b.kill()
            if what != "killed":
                self.start(settled)

    @precondition(lambda self: self.b.fencer is None or self.b.stopped or self.b.stopping)
    @rule(settled=st.booleans())
    def a_fencer_starts(self, settled: bool) -> None:
        if self.b.fencer is not None:
            self.b.kill()
        self.start(settled)


# Whole, the same 500 each time; in a sample (tests/sampling.py), others each time: a failing one is printed.
Machine.TestCase.settings = settings(
    max_examples=EXAMPLES or (500 if sampling.turn() is None else 100),
    stateful_step_count=40,
    derandomize=not EXAMPLES and sampling.turn() is None,
    print_blob=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyInterleaving = pytest.mark.computes(Machine.TestCase)


# ---------------------------------------------------------------- single stories


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A fencer that has just started; PostgreSQL is down. Its checks run after every step."""
    made = Bench()
    made.start()
    made.let_all()
    yield made
    try:
        made.check()
    finally:
        made.close()


def made_writable(b: Bench, term: int = 1) -> None:
    activate(b, term)
    b.let_all()
    assert b.world.writes


def let_until(b: Bench, name: str) -> None:
    """Let steps happen until the next would be `name`."""
    for _ in range(20):
        if b.engine.steps and b.engine.steps[0].name == name:
            return
        b.do(lambda: b.engine.let(0))
        b.check()
    raise AssertionError(f"no step {name}")


def state_of(ticket: Ticket) -> str:
    return ticket.reply.record.state if isinstance(ticket.reply, Accepted) else repr(ticket.reply)


def test_writes_end_with_the_lease_whatever_else_takes_its_time(bench: Bench) -> None:
    """W9: a re-activation's pg_ctl does not end when it is cancelled; all is halted at the deadline even so."""
    made_writable(bench)
    activate(bench, 2)
    let_until(bench, "reload")
    bench.engine.sticky = True
    bench.advance(LEASE_NS - 1)
    assert bench.world.writes
    bench.advance(1)
    assert not bench.world.writes


def test_a_restarted_fencer_guards_the_lease_that_it_finds(bench: Bench) -> None:
    """W8, W9: it goes on under the lease, and ends with it."""
    made_writable(bench)
    bench.kill()
    bench.start()
    assert bench.world.writes
    bench.advance(LEASE_NS)
    assert not bench.world.writes


def test_a_lease_of_another_order_is_no_lease(bench: Bench) -> None:
    """I3, W9: killed between the newer generation and the removal of the older lease: fenced at start."""
    made_writable(bench)
    lease = (bench.top / "run" / leases.NAME).read_bytes()
    follow(bench, 2)
    bench.kill()
    (bench.top / "run" / leases.NAME).write_bytes(lease)
    bench.start()
    assert not bench.world.writes


def test_a_fence_ends_what_an_activate_began_before_it_is_answered(bench: Bench) -> None:
    """D7: pg_ctl promote takes its time to end; writes are cut off at once, the answer waits."""
    activate(bench, 1)
    let_until(bench, "promoted")
    bench.engine.sticky = True
    ticket = fence(bench, 2)
    assert ticket.reply is None
    assert bench.world.frozen
    bench.let_all()
    assert state_of(ticket) == "running"
    assert not bench.world.lives


def test_an_older_fence_never_ends_after_a_newer_activate(bench: Bench) -> None:
    """D7: the fence is half done when the activate comes; nothing of it happens any more."""
    made_writable(bench)
    fence(bench, 2)
    activate(bench, 3)
    bench.let_all()
    assert bench.world.writes
    bench.advance(LEASE_NS // 2)
    assert bench.world.writes


def test_a_promotion_under_way_outlives_neither_order_nor_fencer(bench: Bench) -> None:
    """I1: it was asked for, then a follow was accepted, then the fencer was killed: fenced at start."""
    activate(bench, 1)
    let_until(bench, "promoted")
    follow(bench, 2)
    bench.kill()
    bench.start()
    bench.do(bench.world.promoted)
    bench.check()
    assert not bench.world.writes


def test_a_fence_on_a_broken_disk_is_not_forgotten(bench: Bench) -> None:
    """I3: accepted though it could not be made durable; the next fencer neither trusts nor reuses its number."""
    made_writable(bench)
    bench.disk.fail = frozenset({"create"})
    assert state_of(fence(bench, 5)) == "running"
    bench.let_all()
    bench.kill()
    bench.start()
    assert isinstance(activate(bench, 6).reply, Refusal)
    assert isinstance(fence(bench, 5).reply, Refusal)


def test_nobody_renews_what_a_fence_has_ended(bench: Bench) -> None:
    """W9."""
    made_writable(bench)
    fence(bench, 1, 1)
    deadline_ns = bench.clock.now_ns() + LEASE_NS
    for order in (0, 1):
        ticket = bench.ask(Renew(generation=Generation(1, order), deadline_boottime_ns=deadline_ns))
        assert isinstance(ticket.reply, Refusal)


def test_asked_to_stop_while_an_order_is_accepted(bench: Bench) -> None:
    """O1: the activate is on its way to the disk; when the fencer ends, nothing here can write."""
    made_writable(bench)
    bench.disk.hold = frozenset({"create"})
    activate(bench, 2)
    bench.shut_down()
    bench.disk.hold = frozenset()
    bench.do(bench.disk.release)
    bench.let_all()
    bench.advance(LEASE_NS)
    bench.let_all()
    assert bench.stopped
    assert not bench.world.lives


def test_a_repeat_is_answered_and_starts_nothing(bench: Bench) -> None:
    """D7: while it runs, when it has ended, and after a restart."""
    fence(bench, 1)

    def repeated() -> str:
        began = bench.engine.began
        state = state_of(fence(bench, 1))
        assert bench.engine.began == began
        return state

    assert repeated() == "running"
    bench.let_all()
    assert repeated() == "done"
    bench.kill()
    bench.start()
    bench.let_all()
    assert repeated() == "done"


def test_another_order_under_the_same_generation_is_refused(bench: Bench) -> None:
    """I3: whoever was second in a race for a number does not get the first one's outcome for its own."""
    made_writable(bench)
    ticket = fence(bench, 1)
    assert isinstance(ticket.reply, Refusal)
    assert ticket.reply.error == "conflicting_order"
    assert bench.world.writes


def test_no_lease_is_longer_than_allowed(bench: Bench) -> None:
    """W9: neither a new one nor a renewed one."""
    activate(bench, 1, ahead_ns=100 * LEASE_NS)
    bench.let_all()
    bench.advance(LEASE_NS // 2)
    reply = renew(bench, Generation(1, 0), 100 * LEASE_NS).reply
    assert isinstance(reply, Renewed)
    assert reply.deadline_boottime_ns == bench.clock.now_ns() + LEASE_NS
    bench.advance(LEASE_NS)
    assert not bench.world.writes


def test_what_somebody_promotes_is_fenced(bench: Bench) -> None:
    """I1: a standby that somebody else made writable, without a lease."""
    follow(bench, 1)
    bench.let_all()
    bench.do(lambda: bench.world.promoted(by_hand=True))
    bench.advance(STRAY_NS)
    assert not bench.world.writes


def test_a_lease_of_an_older_activate_is_no_lease(bench: Bench) -> None:
    """W9: the file of generation 1 under generation 2, both activates, both done: fenced at start."""
    made_writable(bench)
    lease = (bench.top / "run" / leases.NAME).read_bytes()
    made_writable(bench, 2)
    bench.kill()
    (bench.top / "run" / leases.NAME).write_bytes(lease)
    bench.start()
    assert not bench.world.writes


def test_an_activation_that_was_interrupted_is_fenced_at_start(bench: Bench) -> None:
    """I1: its lease is valid, and whether its promotion completes nobody knows."""
    activate(bench, 1)
    let_until(bench, "promoted")
    bench.kill()
    bench.start()
    assert bench.world.frozen


def test_marked_and_writable_it_is_fenced_at_start(bench: Bench) -> None:
    """I1: standby.signal tells of the next start; what the control file says counts."""
    bench.kill()
    bench.world.standby = False
    bench.world.launch(by_hand=True)
    bench.world.standby = True
    bench.start()
    assert not bench.world.writes


@pytest.mark.parametrize("turn", range(6))
def test_an_own_fence_and_a_newer_order_wait_for_the_same_effect(bench: Bench, turn: int) -> None:
    """D7: whoever gets on first, the newer order is not cancelled by the older fence, and nothing writes unleased."""
    made_writable(bench)
    activate(bench, 2)
    let_until(bench, "reload")
    bench.engine.sticky = True
    bench.advance(LEASE_NS)  # the guard waits for pg_ctl to end
    bench.turns = turn << 16
    ticket = activate(bench, 3)
    bench.let_all()
    assert state_of(ticket) == "running"
    assert bench.fencer is not None
    order = bench.fencer.status().order
    assert order is not None
    assert (order.generation, order.state) == (Generation(3, 0), "done")
    assert bench.world.writes


def test_an_outcome_never_overwrites_a_newer_order(bench: Bench) -> None:
    """I3, D7: the activation ends while the fence is on its way to the disk; what is on disk is the fence."""
    activate(bench, 1)
    let_until(bench, "promoted")
    bench.disk.hold = frozenset({"create"})
    ticket = fence(bench, 2)
    bench.do(lambda: bench.engine.let(0))
    bench.disk.hold = frozenset()
    bench.do(bench.disk.release)
    assert state_of(ticket) == "running"
    on_disk, _ = states.load(bench.top / "state")
    assert on_disk.order is not None
    assert (on_disk.highest, on_disk.order.op) == (Generation(2, 0), "fence")


def test_an_activation_that_fails_is_fenced_at_once(bench: Bench) -> None:
    """I1: pg_ctl promote says that it failed; the promotion may complete all the same."""
    activate(bench, 1)
    let_until(bench, "promoted")
    bench.do(lambda: bench.engine.let(0, PostgresError("broken")))
    assert bench.world.frozen
    bench.let_all()
    assert not bench.world.lives


def test_an_own_fence_is_repeated_until_it_is_proven(bench: Bench) -> None:
    """I6, W5: nobody may be there to order it again."""
    made_writable(bench)
    bench.advance(LEASE_NS)
    for _ in range(3):
        let_until(bench, "kill")
        bench.do(lambda: bench.engine.let(0, PostgresError("in state D")))
        assert bench.world.frozen
        bench.advance(110 * MS)  # sooner than the watch, which would find what could write as well
    bench.let_all()
    assert bench.fencer is not None
    assert bench.fencer.status().fence_proven
    assert not bench.world.lives


def test_nothing_is_started_while_halted(bench: Bench) -> None:
    """I1, D7: a fence that had nothing to stop is preempted; what the follow starts must not count as halted."""
    fence(bench, 1)
    follow(bench, 1, 1)
    bench.let_all()
    assert bench.world.alive
    assert not bench.engine.halted


def test_started_by_hand_while_it_is_being_marked(bench: Bench) -> None:
    """I1: systemd starts PostgreSQL at boot; standby.signal comes too late for it, and hides that it writes."""
    bench.kill()
    bench.world.standby = False
    bench.start()
    bench.do(lambda: bench.world.launch(by_hand=True))
    bench.let_all()
    bench.advance(2 * STRAY_NS)
    assert not bench.world.writes


def test_promoted_by_hand_while_a_demotion_marks_it(bench: Bench) -> None:
    """I1: a clean fence of a standby; it is promoted; the mark comes after it; a follow preempts the rest."""
    follow(bench, 1)
    bench.let_all()
    fence(bench, 2, clean=True)
    bench.do(lambda: bench.world.promoted(by_hand=True))
    bench.do(lambda: bench.engine.let(0))
    follow(bench, 3)
    bench.let_all()
    bench.advance(2 * STRAY_NS)
    assert not bench.world.writes


def test_a_fence_halts_what_came_up_while_its_disk_was_slow(bench: Bench) -> None:
    """I1: halted, then the disk is slow; an older activate proves all gone, which ends the halt, and starts anew."""
    made_writable(bench)
    fence(bench, 2)
    activate(bench, 3)
    bench.disk.hold = frozenset({"create"})
    ticket = fence(bench, 4)
    bench.let_all()
    bench.disk.hold = frozenset()
    bench.do(bench.disk.release)
    bench.check()
    assert state_of(ticket) == "running"
    assert not ticket.writes


def test_no_agent_can_buy_time_with_planned_demotions(bench: Bench) -> None:
    """I1, W9: one clean order after another, each within half of fence_timeout: the first one's time counts."""
    made_writable(bench)
    bench.advance(LEASE_NS - MS)
    for order in range(1, 8):
        fence(bench, 1, order, clean=True)
        bench.advance(100 * MS)
    assert not bench.world.writes


def test_the_shutdown_checkpoint_is_told_until_a_start(bench: Bench) -> None:
    """I2: all the WAL there will ever be ends with it; whoever takes over must have it."""

    def told() -> int | None:
        assert bench.fencer is not None
        return bench.fencer.status().shutdown_lsn

    made_writable(bench)
    assert told() is None
    fence(bench, 2, clean=True)
    bench.let_all()
    assert told() == bench.world.checkpoint is not None
    fence(bench, 2, 1, clean=True)
    bench.let_all()
    assert told() == bench.world.checkpoint is not None
    bench.do(bench.world.launch)  # by hand
    bench.advance(STRAY_NS)
    bench.do(bench.world.gone)
    bench.advance(STRAY_NS)
    assert told() is None
    follow(bench, 3)
    bench.let_all()
    assert told() is None
    fence(bench, 4, clean=True)  # of a standby: its checkpoint is an older one
    bench.let_all()
    assert bench.fencer is not None
    assert bench.fencer.status().fence_proven
    assert told() is None


def test_an_outcome_is_told_when_it_is_durable(bench: Bench) -> None:
    """What was told as done must not be another thing after a restart."""
    activate(bench, 1)
    let_until(bench, "promoted")
    bench.disk.hold = frozenset({"rename"})
    bench.do(lambda: bench.engine.let(0))
    assert bench.fencer is not None
    order = bench.fencer.status().order
    assert order is not None
    assert order.state == "running"
    bench.do(bench.disk.release)
    order = bench.fencer.status().order
    assert order is not None
    assert order.state == "done"


def test_a_fence_does_not_wait_behind_an_activate_that_hangs(bench: Bench) -> None:
    """I6: the disk does not take the activate's generation; the fence behind it is carried out in its time."""
    made_writable(bench)
    bench.disk.hold = frozenset({"create"})
    activate(bench, 2, ahead_ns=10 * LEASE_NS)
    ticket = fence(bench, 3)
    bench.advance(FENCE_NS)
    assert state_of(ticket) == "running"
    assert not bench.world.writes


# ---------------------------------------------------------------- rejoin


def test_a_rejoin_that_was_interrupted_is_only_ended_by_another(bench: Bench) -> None:
    """I2: what holds half of two histories neither leads nor runs, whoever dies and whatever is ordered."""
    follow(bench, 1)
    bench.let_all()
    rejoin(bench, 2)
    let_until(bench, "rewound")
    bench.kill()
    bench.start()
    bench.let_all()
    assert bench.fencer is not None
    assert bench.fencer.status().unfinished
    refused = activate(bench, 3).reply
    assert isinstance(refused, Refusal)
    assert refused.error == "unfinished"
    follow(bench, 3)
    bench.let_all()
    order = bench.fencer.status().order
    assert order is not None
    assert (order.op, order.state) == ("follow", "failed")
    rejoin(bench, 3, 1)
    bench.let_all()
    order = bench.fencer.status().order
    assert order is not None
    assert (order.op, order.state, bench.world.alive) == ("rejoin", "done", True)


def test_an_activate_that_crosses_a_rejoin_leaves_nothing_writable(bench: Bench) -> None:
    """I2: admitted before the directory steps aside, begun after it."""
    rejoin(bench, 1)
    let_until(bench, "aside")
    bench.disk.hold = frozenset({"rename"})
    activate(bench, 2)
    bench.do(lambda: bench.engine.let(0))
    assert bench.world.unfinished
    bench.disk.hold = frozenset()
    bench.do(bench.disk.release)
    bench.let_all()
    assert not bench.world.lives


def test_what_could_write_is_stopped_before_a_rejoin_looks_around(bench: Bench) -> None:
    """I1: a demotion that a rejoin preempts leaves a primary that writes."""
    made_writable(bench)
    fence(bench, 2, clean=True)
    let_until(bench, "clean shutdown")
    assert bench.world.writes
    rejoin(bench, 3)
    bench.let_all()
    assert bench.world.alive
    assert bench.world.recovery


def test_a_stray_primary_is_fenced_while_a_copy_is_made(bench: Bench) -> None:
    """I1: a copy takes hours, and the guard looks meanwhile: somebody starts the old directory and promotes it."""
    rejoin(bench, 1, clone=True)
    let_until(bench, "copied")
    bench.do(lambda: bench.world.launch(by_hand=True))
    bench.do(lambda: bench.world.promoted(by_hand=True))
    assert bench.world.writes
    bench.advance(STRAY_NS)
    assert not bench.world.writes
    bench.let_all()
    assert not bench.world.lives


def test_asked_to_stop_it_does_not_wait_for_a_copy(bench: Bench) -> None:
    """O1."""
    rejoin(bench, 1, clone=True)
    let_until(bench, "copied")
    bench.shut_down()
    assert bench.stopped
