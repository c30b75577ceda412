"""The dead-man's switch: three watches that need nobody, not the agent, not the store, not the supervisor.

guard: when the lease ends, fence. watch: notice PostgreSQL's death at once, and fence one that is writable
without a lease. pet: keep the watchdog device from resetting the host while, and only while, the fencer
keeps its promise.
"""

from __future__ import annotations

import trio

from harmony_fencer.clock import NS, Clock
from harmony_fencer.fencer import Fencer
from harmony_fencer.log import log
from harmony_fencer.watchdog import WatchdogError, may_pet

WATCH_S = 0.05
STRAY_S = 0.2
SURE_S = 1.0  # where nothing has to be found by looking, or changes tell by themselves
MARK_AGAIN_S = 1.0
NEVER_SPIN_S = 0.01  # a postmaster.pid that changes all the time must not starve the guard


async def guard(fencer: Fencer, clock: Clock) -> None:
    """Fence when the lease ends, whatever anybody says. On CLOCK_BOOTTIME, suspend included."""
    while True:
        deadline_ns = fencer.deadline_ns
        if deadline_ns is None:
            await fencer.rearmed()
        elif clock.now_ns() >= deadline_ns:
            await fencer.fence_by_itself("the lease is over")
        else:
            async with trio.open_nursery() as nursery:

                async def until(scope: trio.CancelScope, when_ns: int) -> None:
                    await clock.sleep_until(when_ns)
                    scope.cancel()

                nursery.start_soon(until, nursery.cancel_scope, deadline_ns)
                await fencer.rearmed()
                nursery.cancel_scope.cancel()


async def watch(fencer: Fencer) -> None:
    """Notice at once when the postmaster ends, soon when one appears."""
    while True:
        try:
            await _watch_one(fencer)
        except OSError as e:  # no descriptor or memory: nothing is known; the guard needs neither
            log.seldom("cannot look for PostgreSQL", why=str(e))
        await trio.sleep(NEVER_SPIN_S)


async def _watch_one(fencer: Fencer) -> None:
    engine = fencer.engine
    pid = engine.postmaster()
    fencer.saw(running=pid is not None, started=pid is not None)
    if pid is None:
        await _while_down(fencer)
        return
    # Under a lease nobody else's writability is looked for, only the end.
    while not await engine.ended(
        pid, SURE_S if fencer.deadline_ns is not None or engine.notices else STRAY_S
    ):
        unguarded = fencer.deadline_ns is None and not fencer.engaged
        if unguarded and engine.could_write() and not fencer.adopting:
            # Promoted or started by somebody else: it writes, and no lease covers it.
            await fencer.fence_by_itself("PostgreSQL is writable without a lease")
    fencer.saw(running=False)


async def _while_down(fencer: Fencer) -> None:
    """A fence lasts: where standby.signal is missing (a full or hung disk, a careless hand) it is written again."""
    engine = fencer.engine
    waited = 0.0
    while engine.postmaster() is None:
        await trio.sleep(WATCH_S)
        waited += WATCH_S
        if waited >= MARK_AGAIN_S and not fencer.busy and engine.initialised() and not engine.is_standby():
            waited = 0.0
            log.warning("standby.signal is missing: writing it again")
            await fencer.mark_standby()


async def pet(fencer: Fencer, clock: Clock, interval_s: float) -> None:
    """Keep the host from being reset, while the promise holds (watchdog.may_pet has the rule)."""
    watchdog = fencer.watchdog.device
    if watchdog is None:
        return
    told = False
    while True:
        if watchdog.armed:
            kept = may_pet(
                now_ns=clock.now_ns(), lease_deadline_ns=fencer.deadline_ns, could_write=fencer.could_write
            )
            try:
                if kept:
                    watchdog.pet()
                elif not told:
                    log.critical("the watchdog is not petted: the lease is over and no fence is proven")
            except WatchdogError as e:
                log.seldom("the watchdog could not be petted: this host may be reset", why=str(e))
            told = not kept
        await clock.sleep_until(clock.now_ns() + round(interval_s * NS))
