"""Stand-ins for what tests of the fencer cannot have: a watchdog whose resets can be seen."""

from __future__ import annotations

from collections.abc import Callable

from harmony_fencer.watchdog import WatchdogError

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
