"""Running as a standby: the effect of `follow`, and of `rejoin`, which first makes the data directory fit for it.

Whatever could write, or is half stopped, is stopped whole before anything else; a standby that runs is left alone
until there is a reason to stop it. It accepts no order and holds no lease: fencer.py does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from harmony_fencer import bootstrap
from harmony_fencer.clock import NS, Clock
from harmony_fencer.config import FencerConfig
from harmony_fencer.engine import Engine
from harmony_fencer.ledger import Ledger
from harmony_fencer.programs import PostgresError
from harmony_fencer.protocol import Follow, Rejoin
from harmony_fencer.watchdog import Policy

LASTS_S = 2.5  # beyond settings.conninfo's connect_timeout
Stop = Callable[
    [int], Awaitable[None]
]  # until when cleanly (boot clock); raises PostgresError: not proven gone


class Owner(Protocol):
    """What is known of PostgreSQL beyond what it shows."""

    @property
    def could_write(self) -> bool: ...


class Standby:
    """Of one data directory. `rejoining`: nothing that could write was there any more when that began."""

    def __init__(
        self, config: FencerConfig, owner: Owner, engine: Engine, clock: Clock, watchdog: Policy, stop: Stop
    ) -> None:
        self._c, self._owner, self._engine, self._clock = config, owner, engine, clock
        self._watchdog, self._stop = watchdog, stop
        self.rejoining = False

    async def carry_out(self, request: Follow | Rejoin, ledger: Ledger, clean_until_ns: int) -> str:
        """What was done, where that is worth saying. Raises PostgresError, OSError."""
        if isinstance(request, Rejoin):
            return await self._rejoin(request, ledger, clean_until_ns)
        await self._follow(request, ledger, clean_until_ns)
        return ""

    async def _follow(self, request: Follow, ledger: Ledger, clean_until_ns: int) -> None:
        if self._unsafe():
            await self._stop(clean_until_ns)
        running = self._engine.postmaster() is not None
        self._watchdog.disarm()
        await self._engine.configure(request.primary, None, ledger.testimony(), slot=request.slot)
        await (self._engine.reload() if running else self._engine.start())

    async def _rejoin(self, request: Rejoin, ledger: Ledger, clean_until_ns: int) -> str:
        engine, source = self._engine, (request.primary, request.system_identifier)
        if self._unsafe():
            await self._stop_for_good(clean_until_ns)
        self.rejoining = True
        try:
            why_clone = await engine.rejoin.check(*source, clone=request.clone)
            if self._owner.could_write or engine.pids():
                unhurried_ns = self._clock.now_ns() + round(self._c.start_timeout_s * NS)
                await self._stop_for_good(clean_until_ns if self._owner.could_write else unhurried_ns)
            self._watchdog.disarm()
            testimony, slot = ledger.testimony(), request.slot
            return await engine.rejoin.run(*source, testimony, why_clone=why_clone, slot=slot)
        finally:
            self.rejoining = False

    def _unsafe(self) -> bool:
        """Also where nothing runs: that a promotion of before cannot complete any more is proven by a stop only."""
        half_stopped = self._engine.pids() and self._engine.postmaster() is None
        return self._owner.could_write or bool(half_stopped)

    async def _stop_for_good(self, clean_until_ns: int) -> None:
        """And whoever starts it next gets a standby. Raises PostgresError."""
        await self._stop(clean_until_ns)
        if self._owner.could_write:
            bootstrap.check(Path(self._c.data_dir))
            raise PostgresError(
                "standby.signal could not be written: it could be started as a primary meanwhile"
            )


def streams(pids: list[int], seen: dict[int, float], now_s: float) -> bool:
    """Whether a WAL receiver among them streams: by its title once something came, or as it lives longer than a vain
    connection would. `seen`: since when each is known."""
    for pid in pids:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"postgres:") and b"walreceiver" in title:
            return b"streaming" in title or now_s - seen.setdefault(pid, now_s) > LASTS_S
    return False
