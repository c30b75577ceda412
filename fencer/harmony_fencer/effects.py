"""One effect at a time: a newer one begins only when the older has ended, and nobody cancels a newer one (D7).

Also the bell: who waits for a change of what the fencer shows is told by it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class Bell:
    """A number that grows with every change, and a wait for the next."""

    def __init__(self) -> None:
        self.number = 1
        self._rung = trio.Event()

    def ring(self) -> None:
        self.number += 1
        self._rung.set()
        self._rung = trio.Event()

    async def wait(self, seen: int | None, within_s: float) -> None:
        """Return when the number is not `seen`, at the latest after `within_s`."""
        if seen == self.number:
            with trio.move_on_after(within_s):
                await self._rung.wait()


class Effects:
    """`begin()` one, `end()` it. `on_end(cancelled)` is called when an effect has ended."""

    def __init__(self, on_end: Callable[[bool], None]) -> None:
        self._on_end = on_end
        self._scope: trio.CancelScope | None = None
        self._ended = trio.Event()
        self._nursery: trio.Nursery | None = None

    def run_in(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    @property
    def busy(self) -> bool:
        return self._scope is not None

    def begin(self, effect: Callable[[], Awaitable[None]]) -> None:
        """Only when none runs."""
        if self._nursery is None or self._scope is not None:
            raise AssertionError("an effect was begun before the older one had ended")
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._carry_out, effect, self._scope, self._ended)

    def beside(self, work: Callable[[], Awaitable[None]]) -> None:
        """Start what is no effect: it only looks, and nobody waits for it or ends it."""
        if self._nursery is not None:
            self._nursery.start_soon(work)

    async def _carry_out(
        self, effect: Callable[[], Awaitable[None]], scope: trio.CancelScope, ended: trio.Event
    ) -> None:
        try:
            with scope:
                await effect()
        finally:
            self._scope = None
            self._on_end(scope.cancelled_caught)
            ended.set()

    async def end(self, *, cancel: bool = True) -> None:
        """Cancel (or only await) the effect that runs now. One that somebody begins meanwhile is not touched."""
        scope, ended = self._scope, self._ended
        if scope is not None:
            if cancel:
                scope.cancel()
            await ended.wait()
