"""The fencer itself: accepts orders, runs one effect at a time, and fences by itself when the lease ends.

Order of things for every accepted order: admission, durable generation, cancel *and await* the running
effect, begin the new one (D7: no older effect after a newer acceptance). The guard needs nobody: when
the deadline passes it does the same with a fence of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
import trio

from harmony_fencer import lease as leases
from harmony_fencer import state as states
from harmony_fencer.admit import Extend, Facts, NewOrder, Peer, Permit, Repeat, admit
from harmony_fencer.clock import NS, boot_id, boot_ns
from harmony_fencer.config import FencerConfig
from harmony_fencer.ladder import Ladder, Outcome
from harmony_fencer.postgres import Postgres, PostgresError
from harmony_fencer.processes import has_ended
from harmony_fencer.protocol import (
    VERSION,
    Accepted,
    Activate,
    Done,
    Follow,
    Generation,
    Latch,
    OperatorFence,
    OrderRecord,
    Refusal,
    Renew,
    Renewed,
    Reply,
    Request,
    SelfFence,
    Status,
    SyncRule,
    Unfence,
)

ASYNC_RULE = SyncRule(0, ())
WATCH_S = 0.05
STRAY_S = 0.2
log = structlog.get_logger("fencer")


class Fencer:
    """One data directory's fencer. `start()` once, then `run()` in a nursery; requests go to `handle()`."""

    def __init__(self, config: FencerConfig, utc_now: Callable[[], str]) -> None:
        self._c = config
        self._utc_now = utc_now
        self._pg = Postgres(config)
        self._boot_id = boot_id()
        self._state_dir = Path(config.state_dir)
        self._lease_path = Path(config.run_dir) / "lease.json"
        self._state, self._untrusted = states.load(self._state_dir)
        self._active: Generation | None = None
        self._deadline_ns = 0
        self._order: OrderRecord | None = self._state.order
        self._self_fence: SelfFence | None = None
        self._fence_proven = False
        self._retiring = False
        self._system_identifier: str | None = None
        self._running = False  # whether a live postmaster was seen
        self._starts = 0
        self._accepting = trio.Lock()
        self._disk = trio.Lock()
        self._scope: trio.CancelScope | None = None
        self._ended: trio.Event | None = None
        self._nursery: trio.Nursery | None = None
        # From before a promotion until a proven fence. A promotion that was cancelled, or whose fencer
        # died, may still complete: standby.signal alone does not prove that nothing can write.
        self._may_write = self._order is not None and self._order.op == "activate"
        self._rearm = trio.Event()
        self.status_line = "starting"

    # ------------------------------------------------------------ life

    async def start(self, nursery: trio.Nursery) -> None:
        """Look at what is there: carry on under a valid lease, else fence what could write."""
        self._nursery = nursery
        self._system_identifier = await self._pg.system_identifier()
        lease = leases.load(
            self._lease_path, boot_id=self._boot_id, now_ns=boot_ns(), lease_ns=self._c.lease_ns
        )
        self._running = self._pg.postmaster() is not None
        writable = self._pg.initialised() and not self._pg.is_standby()
        mine = self._order is not None and self._order.op == "activate" and self._order.state == "done"
        if (
            lease is not None
            and self._running
            and mine
            and not self._untrusted
            and lease.generation == self._state.highest
        ):
            self._active, self._deadline_ns = lease.generation, lease.deadline_boottime_ns
            log.info("carrying on under the lease", generation=str(self._active))
        elif self._untrusted:
            log.error("untrusted state", why=self._untrusted)
            await self._fence_by_itself("the state file cannot be trusted: " + self._untrusted[:200])
        elif self._pg.pids() and (
            writable or self._may_write or not self._running or await self._in_production()
        ):
            await self._fence_by_itself("at start: PostgreSQL could write and there is no valid lease")
        elif not self._running:
            self._pg.mark_standby()
        if self._order is not None and self._order.state == "running":
            self._order = msgspec.structs.replace(
                self._order, state="preempted", detail="the fencer restarted"
            )
        nursery.start_soon(self._guard)
        nursery.start_soon(self._watch)

    async def _in_production(self) -> bool:
        try:
            return await self._pg.control_state() == "in production"
        except PostgresError as e:
            log.warning("pg_controldata failed; assuming the worst", why=str(e))
            return True

    async def shut_down(self) -> None:
        """End what could write: a fence with proof where a lease is active; a standby is left running."""
        self._retiring = True
        if self._active is not None or (self._pg.pids() and not self._pg.is_standby()):
            await self._fence_by_itself("the fencer was asked to stop")
            while self._scope is not None:
                await self._idle()

    def orphaned(self) -> None:
        """The supervisor is dead: no more orders; the lease is kept to its end."""
        self._retiring = True

    async def guard_until_over(self) -> None:
        """For an orphan: returns when nothing here can write any more."""
        while self._active is not None or self._scope is not None:
            await trio.sleep(WATCH_S)

    # ------------------------------------------------------------ requests

    async def handle(self, request: Request, peer: Peer) -> Reply:
        """One request's reply. Nothing of a refused request has any effect."""
        if isinstance(request, Renew):
            return self._renew(request, peer)  # never waits: no disk, no lock
        async with self._accepting:
            verdict = admit(self._facts(), request, peer, boot_ns())
            match verdict:
                case Refusal():
                    log.warning(
                        "refused", op=type(request).__name__, error=verdict.error, detail=verdict.detail
                    )
                    return verdict
                case Repeat():
                    return Accepted(self._order if self._order is not None else verdict.record)
                case NewOrder():
                    return await self._accept(verdict, request)
                case Permit() if isinstance(request, Unfence):
                    return await self._unfence(request)
                case _:
                    return self.status()

    def _facts(self) -> Facts:
        return Facts(
            node=self._c.node,
            members=frozenset(self._c.members),
            trusted=not self._untrusted,
            retiring=self._retiring,
            latched=self._state.latch is not None,
            highest=self._state.highest,
            newest=self._order,
            active=self._active,
            lease_deadline_ns=self._deadline_ns,
        )

    def _renew(self, request: Renew, peer: Peer) -> Reply:
        verdict = admit(self._facts(), request, peer, boot_ns())
        if isinstance(verdict, Refusal):
            log.warning("renewal refused", error=verdict.error, detail=verdict.detail)
            return verdict
        if not isinstance(verdict, Extend):
            raise AssertionError(f"a renewal was admitted as {verdict}")
        self._deadline_ns = max(
            self._deadline_ns, leases.clamp(verdict.deadline_ns, boot_ns(), self._c.lease_ns)
        )
        self._save_lease()
        return Renewed(self._deadline_ns)

    def _save_lease(self) -> None:
        if self._active is None:
            return
        try:
            leases.save(self._lease_path, leases.Lease(self._active, self._deadline_ns, self._boot_id))
        except OSError as e:  # a restarted fencer would fence early: safe
            log.warning("the lease could not be saved", why=str(e))
        self._rearm.set()

    async def _persist(self, change: Callable[[states.State], states.State]) -> None:
        """Durable first, then in memory, one writer at a time, each change made on the newest state (I3)."""
        async with self._disk:
            new = change(self._state)
            if not self._untrusted:  # else there is nothing on disk to keep right
                await trio.to_thread.run_sync(states.write, self._state_dir, new)
            self._state = new

    async def _accept(self, verdict: NewOrder, request: Request) -> Reply:
        record = OrderRecord(verdict.generation, verdict.op, verdict.primary, "running")
        latch = self._state.latch
        if isinstance(request, OperatorFence):
            latch = Latch(request.reason, request.who, self._utc_now())

        def newest(s: states.State) -> states.State:
            return msgspec.structs.replace(s, highest=verdict.generation, order=record, latch=latch)

        try:
            with trio.CancelScope(shield=True):
                await self._persist(newest)
        except OSError as e:
            if verdict.op not in {"fence", "operator_fence"}:
                log.exception("the state could not be made durable; order refused")
                return Refusal("storage_failed", f"{self._state_dir}: {e}", self._state.highest)
            # A fence is never refused for a broken disk; until it is repaired nothing is activated.
            self._untrusted = f"{self._state_dir}: {e}"
            self._state = newest(self._state)
            log.exception("the state could not be made durable; fencing all the same")
        log.info("accepted", op=verdict.op, generation=str(verdict.generation), primary=verdict.primary)
        await self._preempt()
        self._order, self._fence_proven = record, False
        match request:
            case Activate():
                self._active = verdict.generation
                self._deadline_ns = leases.clamp(request.deadline_boottime_ns, boot_ns(), self._c.lease_ns)
                self._save_lease()
                self._begin(lambda: self._activate(record, request))
            case Follow():
                self._drop_lease()
                self._begin(lambda: self._follow(record, request))
            case _:
                self._drop_lease()
                self._begin(lambda: self._fence(record))
        return Accepted(record)

    async def _unfence(self, request: Unfence) -> Reply:
        try:
            await self._persist(lambda s: msgspec.structs.replace(s, latch=None))
        except OSError as e:
            return Refusal("storage_failed", str(e), self._state.highest)
        log.warning("operator's latch removed", who=request.who)
        return Done("the latch is gone; PostgreSQL stays as it is until the next order")

    # ------------------------------------------------------------ effects

    def _drop_lease(self) -> None:
        self._active, self._deadline_ns = None, 0
        leases.clear(self._lease_path)

    async def _preempt(self) -> None:
        """Cancel and await the running effect."""
        while self._scope is not None:
            self._scope.cancel()
            await self._idle()

    async def _idle(self) -> None:
        if self._ended is not None:
            await self._ended.wait()

    def _begin(self, effect: Callable[[], Awaitable[None]]) -> None:
        if self._nursery is None:
            raise AssertionError("start() first")
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._carry_out, effect, self._scope, self._ended)

    async def _carry_out(
        self, effect: Callable[[], Awaitable[None]], scope: trio.CancelScope, ended: trio.Event
    ) -> None:
        try:
            with scope:
                await effect()
            if scope.cancelled_caught and self._order is not None and self._order.state == "running":
                self._order = msgspec.structs.replace(self._order, state="preempted")
        finally:
            self._scope, self._ended = None, None
            ended.set()

    async def _finish(self, record: OrderRecord, began_ns: int) -> None:
        record = msgspec.structs.replace(record, took_ms=(boot_ns() - began_ns) / 1e6)
        following = record.primary if record.op == "follow" and record.state == "done" else None
        self._order = record
        level = log.info if record.state == "done" else log.error
        level(
            "order ended",
            op=record.op,
            generation=str(record.generation),
            state=record.state,
            detail=record.detail,
            took_ms=round(record.took_ms),
        )

        def ended(s: states.State) -> states.State:
            if s.highest != record.generation:
                return s  # a newer order was accepted meanwhile
            return msgspec.structs.replace(s, order=record, following=following)

        try:
            await self._persist(ended)
        except OSError as e:  # the generation is durable; only its outcome is not
            log.warning("the outcome could not be recorded", why=str(e))
            self._state = ended(self._state)

    async def _fence(self, record: OrderRecord) -> None:
        began = boot_ns()
        outcome = await Ladder(self._c, self._pg).run()
        self._note(outcome)
        state = "done" if outcome.proven else "failed"
        await self._finish(
            msgspec.structs.replace(record, state=state, detail=outcome.detail, rungs=outcome.rungs), began
        )

    def _note(self, outcome: Outcome) -> None:
        self._fence_proven = outcome.proven
        self._may_write = self._may_write and not outcome.proven
        self._running = self._pg.postmaster() is not None

    async def _configure(self, primary: str | None, sync: SyncRule) -> None:
        """In a thread: a hung disk must not keep the guard from running."""
        await trio.to_thread.run_sync(self._pg.configure, primary, sync, abandon_on_cancel=True)

    async def _activate(self, record: OrderRecord, request: Activate) -> None:
        began = boot_ns()
        try:
            self._may_write = True
            if self._pg.postmaster() is not None and not self._pg.is_standby():
                # Writable already, under the lease before this one: nothing else could have left it so.
                await self._configure(None, request.sync)
                await self._pg.reload()
            else:
                await self._configure(None, request.sync)
                if self._pg.postmaster() is None:
                    await self._pg.start()
                else:
                    await self._pg.reload()
                if boot_ns() >= self._deadline_ns:
                    raise PostgresError("the lease was over before the promotion")
                await self._pg.promote()
        except (PostgresError, OSError) as e:
            await self._finish(msgspec.structs.replace(record, state="failed", detail=str(e)[:500]), began)
            self._drop_lease()
            outcome = await Ladder(self._c, self._pg).run()
            self._note(outcome)
            return
        self._running = True
        timeline = self._pg.timeline()
        await self._finish(msgspec.structs.replace(record, state="done", timeline=timeline), began)

    async def _follow(self, record: OrderRecord, request: Follow) -> None:
        began = boot_ns()
        try:
            running = self._pg.postmaster() is not None
            if self._pg.pids() and (self._may_write or not running or not self._pg.is_standby()):
                outcome = await Ladder(self._c, self._pg).run()
                self._note(outcome)
                if not outcome.proven:
                    raise PostgresError(f"could not be stopped first: {outcome.detail}")
                self._fence_proven, running = False, False
            await self._configure(request.primary, ASYNC_RULE)
            await (self._pg.reload() if running else self._pg.start())
        except (PostgresError, OSError) as e:
            await self._finish(msgspec.structs.replace(record, state="failed", detail=str(e)[:500]), began)
            return
        self._running = True
        await self._finish(msgspec.structs.replace(record, state="done"), began)

    # ------------------------------------------------------------ the dead-man's switch

    async def _guard(self) -> None:
        """Fence when the lease ends, whatever anybody says."""
        while True:
            self._rearm = trio.Event()
            if self._active is None:
                await self._rearm.wait()
                continue
            left_s = (self._deadline_ns - boot_ns()) / NS
            if left_s > 0:
                # Woken at least every 0.2 s: trio's clock does not count suspend, ours does.
                with trio.move_on_after(min(left_s, 0.2)):
                    await self._rearm.wait()
                continue
            await self._fence_by_itself("the lease is over")

    async def _fence_by_itself(self, reason: str) -> None:
        self._drop_lease()
        await self._preempt()
        if self._active is not None:
            return  # a newer activate was accepted while we waited: its own lease is watched
        log.warning("fencing by itself", reason=reason, generation=str(self._state.highest))
        self._fence_proven = False
        self._self_fence = SelfFence(reason[:300], boot_ns(), "running")
        self._begin(lambda: self._until_proven(reason[:300]))

    async def _until_proven(self, reason: str) -> None:
        """A fence of its own is repeated until proven: nobody else may be there to order it again."""
        began = boot_ns()
        while True:
            outcome = await Ladder(self._c, self._pg).run()
            self._note(outcome)
            self._self_fence = SelfFence(
                reason,
                began,
                "done" if outcome.proven else "failed",
                outcome.detail,
                outcome.took_ms,
                outcome.rungs,
            )
            level = log.warning if outcome.proven else log.error
            level("own fence", proven=outcome.proven, detail=outcome.detail, took_ms=round(outcome.took_ms))
            if outcome.proven:
                return
            await trio.sleep(0.1)

    # ------------------------------------------------------------ watching

    async def _watch(self) -> None:
        """Notice at once when the postmaster ends, soon when one appears."""
        while True:
            pid = self._pg.postmaster()
            self._running = pid is not None
            if pid is None:
                await trio.sleep(WATCH_S)
                continue
            self._starts += 1
            try:
                fd = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                while self._pg.postmaster() == pid and not has_ended(fd):
                    with trio.move_on_after(STRAY_S):
                        await trio.lowlevel.wait_readable(fd)
                    if self._active is None and self._scope is None and not self._pg.is_standby():
                        # Promoted or started by somebody else: it writes, and no lease covers it.
                        await self._fence_by_itself("PostgreSQL is writable without a lease")
            finally:
                os.close(fd)
            self._running = False

    def status(self) -> Status:
        """Everything, as of now."""
        standby = self._pg.is_standby()
        running = self._running
        return Status(
            v=VERSION,
            node=self._c.node,
            fencer_id=self._state.fencer_id,
            boot_id=self._boot_id,
            now_boottime_ns=boot_ns(),
            trusted=not self._untrusted,
            trust_detail=self._untrusted[:400],
            highest=self._state.highest,
            active=self._active,
            lease_deadline_boottime_ns=self._deadline_ns if self._active is not None else None,
            order=self._order,
            self_fence=self._self_fence,
            fence_proven=self._fence_proven and self._scope is None and not running,
            postgres="running" if running else "down",
            postgres_starts=self._starts,
            following=self._state.following if running and standby else None,
            is_standby=standby,
            system_identifier=self._system_identifier,
            latch=self._state.latch,
        )


def emergency(config: FencerConfig, reason: str) -> int:
    """The one-shot fence, beside whatever fencer there is: exit code 0 when proven, else 1."""

    async def run() -> Outcome:
        leases.clear(Path(config.run_dir) / "lease.json")
        return await Ladder(config, Postgres(config)).run()

    outcome = trio.run(run)
    report = {"reason": reason, "proven": outcome.proven, "detail": outcome.detail, "rungs": outcome.rungs}
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    return 0 if outcome.proven else 1
