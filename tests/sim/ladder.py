"""A model of one fence: a clean shutdown while time allows, then frozen, then killed, then proven or not.

It stops PostgreSQL and says what came of it; who wanted that, and what follows, is the fencer's (fencer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.fencer import Fencer

SPENT = 0.7  # how often what cannot be killed is seen to be in the kernel for good
KILL_SHARE = 0.9  # of fence_timeout: the longest that a kill takes to be proven
Then = Callable[[bool, int | None], None]


class Ladder:
    """Of one effect. `then(proven, shutdown_lsn)` once, unless the effect is cancelled."""

    def __init__(self, fencer: Fencer, effect: int, then: Then) -> None:
        self._fencer, self._effect, self._then = fencer, effect, then
        self._host, self._pg, self._life = fencer.host, fencer.host.pg, fencer.life
        self._over = False

    def run(self, clean_until_ns: int) -> None:
        """Begin."""
        host, pg, stop_ns = self._host, self._pg, self._fencer.t.stop_ns
        if not host.world.rules.fencer_proves:  # it believes its own orders
            host.later(1, self._ended, True, None)
            host.later(4 * stop_ns, host.pg_die, pg.run)
            return
        left_ns = clean_until_ns - host.boot()
        if pg.gone:
            host.later(self._fencer.while_(0.02), self._ended, True, None)
        elif left_ns > 0 and not pg.halted:
            self._shut_down(left_ns)
        else:
            self._kill()

    def _ended(self, proven: bool, lsn: int | None) -> None:
        if not self._over and self._fencer.current(self._life, self._effect):
            self._over = True
            self._then(proven, lsn)

    def _shut_down(self, left_ns: int) -> None:
        """PostgreSQL's own, while time allows; it may be slow, and it goes on when nobody waits for it any more."""
        host, pg, rng = self._host, self._pg, self._host.rng
        host.later(min(left_ns, self._fencer.while_(0.1)), host.pg_close, pg.run)
        took = self._fencer.while_(0.5) + (left_ns if rng.random() < 0.1 else 0)
        host.later(took, self._is_down, pg.run)
        host.later(left_ns, self._is_late)

    def _is_down(self, run: int) -> None:
        pg = self._pg
        if pg.run != run or pg.halted:
            return
        if pg.clinging or pg.suffers:  # it ends when that is over, whether or not anybody still waits for it
            self._host.later(self._fencer.t.interval_ns, self._is_down, run)
        else:
            self._ended(True, pg.shut_down())
            self._fencer.bell()  # it is watched, whoever has wanted that

    def _runs_on(self, run: int) -> None:
        if self._pg.run == run and not self._pg.gone:
            self._pg.frozen = False
            self._host.world.checks.look(self._host)

    def _is_late(self) -> None:
        if not self._over and self._fencer.current(self._life, self._effect):
            self._kill()

    def _kill(self) -> None:
        if self._pg.gone:
            self._ended(True, None)
            return
        budget = int(self._fencer.t.stop_ns * KILL_SHARE * self._host.rng.random() ** 2) + 1
        self._host.later(max(self._host.pg_halt(), budget), self._killed)

    def _killed(self) -> None:
        if self._over or not self._fencer.current(self._life, self._effect):
            return
        if self._pg.clinging and not self._pg.gone:
            self._pg.spent = self._pg.spent or self._host.rng.random() < SPENT  # killed is killed
            if self._pg.spent and not self._host.world.rules.spent_never_runs:
                self._host.later(8 * self._fencer.t.stop_ns, self._runs_on, self._pg.run)
            self._host.later(int(self._fencer.t.stop_ns * 0.2) + 1, self._ended, False, None)
            return
        if not self._pg.gone:
            self._pg.die()
        self._ended(True, None)
