"""The fencer itself: accepts orders, runs one effect at a time, and fences by itself when the lease ends.

Order of things for every accepted order: admission, durable generation, cancel *and await* the running
effect, begin the new one (D7: no older effect after a newer acceptance). The dead-man's switch (guard.py)
needs nobody: when the deadline passes it does the same with a fence of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from msgspec.structs import replace

from harmony_fencer import durable
from harmony_fencer import lease as leases
from harmony_fencer import state as states
from harmony_fencer.admit import Extend, Facts, KnownRule, NewOrder, NewRule, Peer, Permit, Repeat, admit
from harmony_fencer.clock import NS
from harmony_fencer.config import FencerConfig
from harmony_fencer.effects import Bell, Effects
from harmony_fencer.engine import Engine, Outcome, Parts, look
from harmony_fencer.ledger import UNHURRIED_S, Ledger
from harmony_fencer.log import log
from harmony_fencer.primary import Primary
from harmony_fencer.programs import PostgresError, explain
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
    OrderState,
    Refusal,
    Rejoin,
    Renew,
    Renewed,
    Reply,
    Request,
    SelfFence,
    Status,
    StatusRequest,
    Sync,
    SyncTold,
    Unfence,
)
from harmony_fencer.standby import Standby
from harmony_fencer.telling import Memory, status
from harmony_fencer.timelines import Newest, TimelineTakenError
from harmony_fencer.watchdog import Policy, WatchdogError

CLEAN_SHARE = 0.5  # of fence_timeout: what a clean shutdown gets even without a lease left


class Fencer:
    """One data directory's fencer. `start()` once, in a nursery that runs on; requests go to `handle()`."""

    def __init__(self, config: FencerConfig, parts: Parts) -> None:
        self._c = config
        self._parts, self._engine, self._clock = parts, parts.engine, parts.clock
        marker = Path(config.run_dir) / "watchdog.armed"
        mode, timeout_s = config.watchdog_mode, config.watchdog_timeout_s
        self.watchdog = Policy(mode, timeout_s, parts.watchdog, marker)
        self._ledger = Ledger(config, parts.boot_id)
        self._active: Generation | None = None
        self._deadline_ns = self._clean_until_ns = 0
        self._order: OrderRecord | None = self._ledger.state.order
        self._self_fence: SelfFence | None = None
        self._fence_proven = self._spent = False
        self._shutdown_lsn: int | None = None
        self._retiring = False
        self._system_identifier: str | None = None
        self._timeline = Newest(0)  # that is known of
        self._running, self._starts = False, 0  # whether a live postmaster was seen, and how many
        self._accepting = trio.Lock()
        self._effects = Effects(self._effect_ended)
        self._primary = Primary(self._engine, self._save_lease)
        self._standby = Standby(config, self, self._engine, self._clock, self.watchdog, self._must_be_gone)
        # From before a promotion until a proven fence: one that was cancelled, or whose fencer died, may still
        # complete, whatever standby.signal says; so may one before a newer order that was never carried out.
        order = self._order
        self._may_write = order is not None and (order.op == "activate" or order.state != "done")
        self._rearm = trio.Event()
        self._bell = Bell()
        self._patience: trio.CancelScope | None = None  # of an activate or follow with the disk

    # ------------------------------------------------------------ life

    async def start(self, nursery: trio.Nursery) -> None:
        """Look at what is there: carry on under a valid lease, else fence what could write. Reads no slow disk."""
        self._effects.run_in(nursery)
        lease = self._ledger.lease(self._clock.now_ns())
        pids, self._running = look(self._engine)
        order = self._order
        if lease is not None and self._running and self._ledger.is_mine(lease) and not self._ledger.latched:
            self._active, self._deadline_ns = lease.generation, lease.deadline_boottime_ns
            self._primary.sync = lease.sync
            await self._carry_on()
        elif self._ledger.untrusted:
            await self.fence_by_itself("the state file cannot be trusted: " + self._ledger.untrusted)
        elif self.adopting:
            log.warning("PostgreSQL is to be adopted: it runs on, and no lease guards it yet")
        elif pids and (self.could_write or not self._running or await self._engine.in_production()):
            await self.fence_by_itself("at start: PostgreSQL could write and there is no valid lease")
        elif not pids:
            await self.mark_standby()
        if order is not None and order.state == "running":
            self._order = replace(order, state="preempted", detail="the fencer restarted")
        nursery.start_soon(self._learn)
        nursery.start_soon(self._ledger.catch_up, self._bell.ring)

    async def _carry_on(self) -> None:
        log.info("carrying on under the lease", generation=str(self._active))
        try:
            self.watchdog.arm()
        except WatchdogError as e:
            await self.fence_by_itself(f"the watchdog is required and cannot be armed: {e}")

    async def mark_standby(self) -> None:
        """What is down must start as a standby. One that began meanwhile may not have seen the mark."""
        try:
            with trio.fail_after(1.0):
                await self._engine.mark_standby()
        except (OSError, trio.TooSlowError) as e:
            log.error("standby.signal could not be written", why=str(e) or "not in time: is the disk hung?")
        if not self.busy and look(self._engine)[0]:
            await self.fence_by_itself("PostgreSQL was started while it was being marked as a standby")

    async def _learn(self) -> None:
        """Not before the guard runs: pg_controldata may wait for a hung disk."""
        try:
            self._timeline = max(self._timeline, await durable.in_thread(self._engine.timeline))
        except OSError as e:
            log.warning("the newest timeline here could not be read", why=str(e))
        self._system_identifier = await self._engine.system_identifier()
        await self._engine.rejoin.learn()
        self._bell.ring()

    async def shut_down(self) -> None:
        """End what could write, cleanly while the lease lasts; a standby is left running. Orders end here, too."""
        self._retiring = True
        async with self._accepting:
            while self._active or (look(self._engine)[0] and self.could_write and not self.adopting):
                await self.fence_by_itself("the fencer was asked to stop", clean=True)
                await self._effects.end(cancel=False)
            await self._effects.end(cancel=not self.engaged)
        self.watchdog.disarm()

    def orphaned(self) -> None:
        """The supervisor is dead: no more orders; the lease is kept to its end."""
        self._retiring = True

    @property
    def idle(self) -> bool:
        """No lease and nothing under way: an orphan may end."""
        return self._active is None and not self.engaged and not self._accepting.locked()

    # ------------------------------------------------------------ what the guard looks at

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def deadline_ns(self) -> int | None:
        """Until when PostgreSQL may write; None: it may not."""
        return self._deadline_ns if self._active is not None else None

    @property
    def could_write(self) -> bool:
        """Whether PostgreSQL here may write, or could begin to, as far as it is not proven otherwise."""
        return self._may_write or self._engine.halted or self._engine.could_write()

    @property
    def adopting(self) -> bool:
        """What may write without a lease, for now: an operator's permit is in force (adopt.py)."""
        return self._ledger.permits(self._engine)

    @property
    def busy(self) -> bool:
        return self._effects.busy

    @property
    def engaged(self) -> bool:
        """At work on what has to come to its end. A rejoin may take hours, and may be left at any moment."""
        return self._effects.busy and not self._standby.rejoining

    def saw(self, *, running: bool, started: bool = False) -> None:
        """What the watch over the postmaster has seen."""
        if started or running != self._running:
            self._running = running
            self._starts += started
            self._shutdown_lsn = None
            self._bell.ring()

    async def rearmed(self) -> None:
        """Return when the lease has changed."""
        await self._rearm.wait()
        self._rearm = trio.Event()

    # ------------------------------------------------------------ requests

    async def handle(self, request: Request, peer: Peer) -> Reply:
        """One request's reply. Nothing of a refused request has any effect."""
        if isinstance(request, Renew):
            return self._renew(request, peer)  # never waits: no disk but run_dir's, no lock
        if not isinstance(request, Activate | Fence | Follow | Rejoin | Sync | OperatorFence | Unfence):
            verdict = admit(self._facts(), request, peer, self._clock.now_ns())
            if isinstance(request, StatusRequest) and request.wait_ms:
                await self._bell.wait(request.unless, request.wait_ms / 1000)
            return verdict if isinstance(verdict, Refusal) else self.status()
        verdict = admit(self._facts(), request, peer, self._clock.now_ns())
        is_fence = isinstance(request, Fence | OperatorFence) and isinstance(verdict, NewOrder)
        if is_fence and self._patience is not None:
            self._patience.cancel()  # no fence waits for the disk of another order
        async with self._accepting:
            verdict = admit(self._facts(), request, peer, self._clock.now_ns())
            match verdict:
                case Refusal():
                    log.seldom(
                        "refused", op=type(request).__name__, error=verdict.error, detail=verdict.detail
                    )
                    return verdict
                case Repeat():
                    return Accepted(self._order if self._order is not None else verdict.record)
                case NewOrder():
                    return await self._accept(verdict, request)
                case NewRule(told=told):
                    return await self._wait_by(told)
                case Permit() if isinstance(request, Unfence):
                    return await self._unfence(request)
                case KnownRule():
                    return Done("PostgreSQL was told this rule before")
                case _:
                    raise AssertionError(f"{request} was admitted as {verdict}")

    def _facts(self) -> Facts:
        return Facts(
            node=self._c.node,
            members=frozenset(self._c.members),
            trusted=not self._ledger.untrusted,
            retiring=self._retiring,
            latched=self._ledger.latched,
            highest=self._ledger.state.highest,
            newest=self._order,
            active=self._active,
            lease_deadline_ns=self._deadline_ns,
            sync=self._primary.sync,
            unfinished=self._engine.rejoin.unfinished,
        )

    def _renew(self, request: Renew, peer: Peer) -> Reply:
        now_ns = self._clock.now_ns()
        verdict = admit(self._facts(), request, peer, now_ns)
        if isinstance(verdict, Refusal):
            log.seldom("renewal refused", error=verdict.error, detail=verdict.detail)
            return verdict
        assert isinstance(verdict, Extend), verdict  # noqa: S101 (for the type checker)
        clamped = leases.clamp(verdict.deadline_ns, now_ns, self._c.lease_ns)
        self._deadline_ns = max(self._deadline_ns, clamped)
        self._save_lease()
        return Renewed(self._deadline_ns)

    def _save_lease(self) -> None:
        if self._active is not None:
            self._ledger.save_lease(self._active, self._deadline_ns, self._primary.sync)
            self._rearm.set()

    async def _accept(self, verdict: NewOrder, request: Request) -> Reply:
        record = OrderRecord(verdict.generation, verdict.op, verdict.primary, "running")
        is_fence = isinstance(request, Fence | OperatorFence)
        urgent = is_fence and not getattr(request, "clean", False)
        if urgent:
            self._engine.halt()  # before anything else: writes end here, no disk is waited for
        latch = None
        if isinstance(request, OperatorFence):
            latch = Latch(request.reason, request.who, self._parts.utc_now())
        self._patience = None if is_fence else trio.move_on_after(UNHURRIED_S)
        with trio.CancelScope(shield=True):
            refused = await self._ledger.accept(record, latch, self._patience)
        if refused:
            return Refusal("storage_failed", refused, self._ledger.state.highest)
        if self._retiring and not is_fence:
            return Refusal("retiring", "the fencer ends", self._ledger.state.highest)
        told = {"generation": str(verdict.generation), "reason": getattr(request, "reason", "")}
        log.info("accepted", op=verdict.op, primary=verdict.primary, **told)
        clean_until_ns = self._clean_until(now_ns := self._clock.now_ns())
        while self._effects.busy:  # also a fence of its own that the guard began meanwhile
            await self._effects.end()
        if urgent:
            self._engine.halt()  # what an older activate has started meanwhile
        self._order, self._fence_proven, self._spent = record, False, False
        match request:
            case Activate():
                self._active = verdict.generation
                self._primary.sync = SyncTold(0, request.sync, done=False)
                self._deadline_ns = leases.clamp(request.deadline_boottime_ns, now_ns, self._c.lease_ns)
                self._save_lease()
                self._begin(lambda: self._activate(record, request))
            case Follow() | Rejoin():
                self._drop_lease()
                self._begin(lambda: self._follow(record, request, clean_until_ns))
            case _:
                self._drop_lease()
                until_ns = clean_until_ns if getattr(request, "clean", False) else 0
                self._begin(lambda: self._fence(record, until_ns))
        return Accepted(record)

    def _clean_until(self, now_ns: int) -> int:
        """How long a planned demotion that begins now may take. What could write and has no lease any more gets
        no more time than the first one had: no agent can buy time with one order after another."""
        if self._active is not None or not self.could_write:
            share_ns = round(self._c.fence_timeout_s * CLEAN_SHARE * NS)
            self._clean_until_ns = max(self._deadline_ns, now_ns + share_ns)
        return self._clean_until_ns

    async def _unfence(self, request: Unfence) -> Reply:
        try:
            await self._ledger.lift_latch()
        except OSError as e:
            return Refusal("storage_failed", str(e), self._ledger.state.highest)
        self._bell.ring()
        log.warning("operator's latch removed", who=request.who)
        return Done("the latch is gone; PostgreSQL stays as it is until the next order")

    # ------------------------------------------------------------ effects

    def _drop_lease(self) -> None:
        self._active, self._deadline_ns, self._primary.sync = None, 0, None
        self._ledger.drop_lease()
        self._bell.ring()

    def _effect_ended(self, cancelled: bool) -> None:
        if cancelled and self._order is not None and self._order.state == "running":
            self._order = replace(self._order, state="preempted")
        if cancelled and self._self_fence is not None and self._self_fence.state == "running":
            self._self_fence = replace(self._self_fence, state="preempted")
        self._bell.ring()

    def _begin(self, effect: Callable[[], Awaitable[None]]) -> None:
        self._effects.begin(effect)
        self._bell.ring()

    async def _finish(self, record: OrderRecord, began_ns: int) -> None:
        record = replace(record, took_ms=(self._clock.now_ns() - began_ns) / 1e6)
        following = record.primary if record.op in {"follow", "rejoin"} and record.state == "done" else None
        level = log.info if record.state == "done" else log.error
        told = {"op": record.op, "generation": str(record.generation), "state": record.state}
        level("order ended", **told, detail=record.detail, took_ms=round(record.took_ms))

        def ended(s: states.State) -> states.State:
            if s.highest != record.generation:
                return s  # a newer order was accepted meanwhile
            return replace(s, order=record, following=following)

        try:
            await self._ledger.persist(ended)
        except OSError as e:  # the generation is durable; only its outcome is not
            log.warning("the outcome could not be recorded", why=str(e))
            self._ledger.state = ended(self._ledger.state)
        self._order = record  # told when it is durable: it is the same after a restart
        self._bell.ring()
        if (self._engine.rejoin.cannot_rewind or not self._system_identifier) and record.state == "done":
            self._effects.beside(self._learn)

    async def _stop(self, clean_until_ns: int = 0) -> Outcome:
        self._may_write = self.could_write  # standby.signal comes first, and proves nothing from then on
        outcome = await self._engine.stop(clean_until_ns=clean_until_ns)
        self._fence_proven, self._spent = outcome.proven, outcome.spent
        self._shutdown_lsn = outcome.shutdown_lsn
        self._may_write = self._may_write and not outcome.proven
        self._running = look(self._engine)[1]
        if outcome.proven:
            self.watchdog.disarm()
        return outcome

    async def _fence(self, record: OrderRecord, clean_until_ns: int) -> None:
        began = self._clock.now_ns()
        outcome = await self._stop(clean_until_ns)
        state = "done" if outcome.proven else "failed"
        told = replace(record, state=state, detail=outcome.detail, rungs=outcome.rungs)
        await self._finish(told, began)
        if not outcome.proven:
            await self._until_proven(f"the fence {record.generation} was not proven", 0)

    async def _must_be_gone(self, clean_until_ns: int = 0) -> None:
        """Before a start: what is half stopped, orphaned or writable is stopped whole. Raises PostgresError."""
        outcome = await self._stop(clean_until_ns)
        if not outcome.proven:
            raise PostgresError(f"could not be stopped first: {outcome.detail}")
        self._fence_proven = False

    async def _activate(self, record: OrderRecord, request: Activate) -> None:
        began = self._clock.now_ns()
        try:
            self.watchdog.arm()
            if self._engine.halted or (self._engine.pids() and self._engine.postmaster() is None):
                await self._must_be_gone()
            self._may_write = True
            testimony = self._ledger.testimony()
            self._timeline = await self._primary.lead(request, testimony, self._may_promote)
        except Exception as e:  # noqa: BLE001 (whatever it is: nothing here may write, and it is in the outcome)
            self._engine.halt()
            self._drop_lease()
            if isinstance(e, TimelineTakenError):
                self._timeline = max(self._timeline, Newest(e.timeline))
            await self._finish(replace(record, state="failed", detail=explain(e)), began)
            await self._until_proven(f"the activation {record.generation} failed", 0)
            return
        self._running = True
        await self._finish(replace(record, state="done", timeline=self._timeline.number), began)

    def _may_promote(self) -> bool:
        return self._clock.now_ns() < self._deadline_ns and not self._ledger.latched

    async def _wait_by(self, told: SyncTold) -> Reply:
        await self._effects.end()  # at most an older rule on its way
        if self._active is None or self._effects.busy:
            return Refusal("not_active", "the fencer fences", self._ledger.state.highest)
        self._primary.sync = told
        self._save_lease()
        self._begin(lambda: self._primary.tell(told, self._ledger.testimony()))
        return Done(f"PostgreSQL is being told rule {told.number}")

    async def _follow(self, record: OrderRecord, request: Follow | Rejoin, clean_until_ns: int) -> None:
        began = self._clock.now_ns()
        try:
            detail = await self._standby.carry_out(request, self._ledger, clean_until_ns)
        except Exception as e:  # noqa: BLE001 (a standby that cannot be started is an outcome, not our end)
            await self._finish(replace(record, state="failed", detail=explain(e)), began)
            return
        self._running = True
        await self._finish(replace(record, state="done", detail=detail), began)

    # ------------------------------------------------------------ fences of its own

    async def fence_by_itself(self, reason: str, *, clean: bool = False) -> None:
        """Nobody ordered it. Writes end before this waits for anything, unless it is `clean` (planned)."""
        clean_until_ns = max(self._deadline_ns, self._clock.now_ns()) if clean else 0
        if not clean:
            self._engine.halt()
            self._drop_lease()
        await self._effects.end()  # where it is clean, the guard still watches the lease meanwhile
        if self._effects.busy or (self._active is not None and not clean):
            return  # a newer order was accepted while we waited: it does, or its own lease is watched
        self._drop_lease()
        log.warning("fencing by itself", reason=reason, generation=str(self._ledger.state.highest))
        self._fence_proven = self._spent = False
        self._self_fence = SelfFence(reason[:300], self._clock.now_ns(), "running")
        self._begin(lambda: self._until_proven(reason[:300], clean_until_ns))

    async def _until_proven(self, reason: str, clean_until_ns: int) -> None:
        """A fence of its own is repeated until proven: nobody else may be there to order it again."""
        began = self._clock.now_ns()
        while True:
            o = await self._stop(clean_until_ns)
            state: OrderState = "done" if o.proven else "failed"
            self._self_fence = SelfFence(reason, began, state, o.detail, o.took_ms, o.rungs)
            self._bell.ring()
            level = log.warning if o.proven else log.error
            level("own fence", proven=o.proven, detail=o.detail, took_ms=round(o.took_ms))
            if o.proven:
                return
            await trio.sleep(0.1)

    # ------------------------------------------------------------ telling

    def brief(self) -> str:
        """For the supervisor's status line. Looks at nothing: it goes with every answer to a ping."""
        up, lease = "running" if self._running else "down", "leased" if self._active else "no lease"
        return f"postgres {up}, generation {self._ledger.state.highest}, {lease}"

    def status(self) -> Status:
        """Everything, as of now."""
        return status(
            self._c,
            self._ledger,
            self._parts,
            self.watchdog,
            Memory(
                active=self._active,
                deadline_ns=self.deadline_ns,
                order=self._order,
                self_fence=self._self_fence,
                sync=self._primary.sync,
                proven=self._fence_proven and not self.busy and not self._running,
                shutdown_lsn=self._shutdown_lsn,
                running=self._running,
                starts=self._starts,
                system_identifier=self._system_identifier,
                timeline=self._timeline,
                change=self._bell.number,
                spent=self._spent,
            ),
        )
