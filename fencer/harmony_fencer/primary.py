"""Leading: what `activate` has PostgreSQL do, and `sync`, which has its commits wait by another rule.

It accepts no order and holds no lease: fencer.py does.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from harmony_fencer.engine import Engine
from harmony_fencer.log import log
from harmony_fencer.programs import PostgresError
from harmony_fencer.protocol import Activate, SyncTold
from harmony_fencer.timelines import Newest


class Primary:
    """Of one data directory. `sync`: the rule of the active generation; `save` is called when it has changed."""

    def __init__(self, engine: Engine, save: Callable[[], None]) -> None:
        self._engine, self._save = engine, save
        self.sync: SyncTold | None = None

    async def lead(self, request: Activate, testimony: bytes, allowed: Callable[[], bool]) -> Newest:
        """Make it writable, in its timeline, which is returned. Raises PostgresError, OSError.

        `allowed()` is asked right before the promotion, which nothing takes back.
        """
        engine = self._engine
        await engine.found(testimony)
        await engine.configure(None, request.sync, testimony)
        if engine.postmaster() is None:
            await engine.start()
        else:
            await engine.reload()
        if not engine.is_standby():
            timeline = engine.timeline()  # writable already, under the lease before this one
        elif allowed():
            timeline = await engine.promote(request.timeline)
        else:
            raise PostgresError("before the promotion the lease was over, or an operator fenced this node")
        self._told()
        return timeline

    async def tell(self, told: SyncTold, testimony: bytes) -> None:
        """Have its commits wait by this rule. Where that fails nothing is certain, and whoever wants it asks again."""
        try:
            await self._engine.configure(None, told.rule, testimony)
            await self._engine.reload()
        except (PostgresError, OSError) as e:
            log.warning("PostgreSQL could not be told whom to wait for", number=told.number, why=str(e))
        else:
            self._told()

    def _told(self) -> None:
        if self.sync is not None:
            self.sync = msgspec.structs.replace(self.sync, done=True)
            self._save()
