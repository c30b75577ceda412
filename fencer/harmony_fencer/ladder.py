"""The fence: PostgreSQL stopped and proven gone, rung by rung, within its budget.

A fence counts only when no process of the data directory lives and nothing listens on its port (I6).
standby.signal comes first, so that the fence lasts even if this host dies halfway.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

import trio

from harmony_fencer import processes
from harmony_fencer.clock import NS, boot_ns
from harmony_fencer.config import FencerConfig
from harmony_fencer.postgres import Postgres
from harmony_fencer.protocol import Rung

POLL_S = 0.005
MARK_SHARE = 0.10
FAST_SHARE = 0.40
IMMEDIATE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Outcome:
    proven: bool
    detail: str
    rungs: tuple[Rung, ...]
    took_ms: float


class Ladder:
    """One fence of one data directory; `run()` may be cancelled between any two polls."""

    def __init__(self, config: FencerConfig, postgres: Postgres) -> None:
        self._c = config
        self._pg = postgres
        self._started = boot_ns()
        self._end = self._started + round(config.fence_timeout_s * NS)
        self._rungs: list[Rung] = []

    async def run(self) -> Outcome:
        """Climb until proven gone or the budget is spent."""
        note = await self._mark()
        budget = self._c.fence_timeout_s
        if self._pg.pids() and self._pg.postmaster() is not None:
            await self._rung("fast", signal.SIGINT, budget * FAST_SHARE)
            if self._pg.pids():
                await self._rung("immediate", signal.SIGQUIT, budget * IMMEDIATE_SHARE)
        if self._pg.pids():
            await self._kill()
        proven = await self._port_closed()
        left = self._pg.pids()
        took_ms = (boot_ns() - self._started) / 1e6
        if left:
            return Outcome(False, f"{note}processes live on: {left}", tuple(self._rungs), took_ms)
        if not proven:
            detail = f"{note}no process is left, but something listens on port {self._c.port}"
            return Outcome(False, detail, tuple(self._rungs), took_ms)
        return Outcome(True, note, tuple(self._rungs), took_ms)

    async def _mark(self) -> str:
        """A full, broken or hung disk must not keep us from stopping PostgreSQL: what went wrong, or ""."""
        try:
            with trio.move_on_after(self._c.fence_timeout_s * MARK_SHARE):
                await trio.to_thread.run_sync(self._pg.mark_standby, abandon_on_cancel=True)
                return ""
        except OSError as e:
            return f"standby.signal could not be written: {e}; "
        return "standby.signal could not be written in time; "

    async def _rung(self, name: str, number: signal.Signals, seconds: float) -> None:
        begun = boot_ns()
        master = self._pg.postmaster()
        sent = master is not None and processes.send(master, number, self._c.data_dir)
        gone = await self._gone(seconds) if sent else not self._pg.pids()
        detail = f"{number.name} to postmaster {master}" if sent else "no postmaster to tell"
        self._rungs.append(Rung(name, (boot_ns() - begun) / 1e6, gone, detail))

    async def _kill(self) -> None:
        """SIGKILL to every process, again and again: a postmaster may fork between two looks."""
        begun, killed = boot_ns(), set[int]()
        while True:
            pids = self._pg.pids()
            for pid in pids:
                if processes.send(pid, signal.SIGKILL, self._c.data_dir):
                    killed.add(pid)
            if not pids or boot_ns() >= self._end:
                break
            await trio.sleep(POLL_S)
        self._rungs.append(Rung("kill", (boot_ns() - begun) / 1e6, not pids, f"{len(killed)} processes"))

    async def _gone(self, seconds: float) -> bool:
        until = min(self._end, boot_ns() + round(seconds * NS))
        while boot_ns() < until:
            if not self._pg.pids():
                return True
            await trio.sleep(POLL_S)
        return not self._pg.pids()

    async def _port_closed(self) -> bool:
        while processes.listening(self._c.port):
            if boot_ns() >= self._end:
                return False
            await trio.sleep(POLL_S)
        return True
