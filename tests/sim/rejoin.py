"""A model of one rejoin: looked at, stopped, rewound or copied from the primary, started as its standby.

A rewind leaves nothing that can be started while it is under way, whoever dies meanwhile; a copy leaves the old
directory until it is whole. Both take time, and fail when the primary cannot be reached; a rewind may be impossible
and end as a copy. Crash recovery before a rewind runs as a standby of nobody, and answers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from harmony_fencer import protocol
from harmony_fencer.protocol import OrderRecord
from tests.sim.faults import orphan

if TYPE_CHECKING:
    from tests.sim.fencer import Fencer

RECOVERS, IMPOSSIBLE = 0.5, 0.3  # how often PostgreSQL has to recover first; that only a copy helps


class Rejoin:
    """Of one effect."""

    def __init__(self, fencer: Fencer, effect: int, record: OrderRecord, request: protocol.Rejoin) -> None:
        self._fencer, self._record, self._request = fencer, record, request
        self._host, self._pg, self._rng = fencer.host, fencer.host.pg, fencer.host.rng
        self._effect, self._life = effect, fencer.life
        self._clone = request.clone or self._rng.random() < IMPOSSIBLE

    def run(self) -> None:
        """Begin. What could write, or is half stopped, is stopped before anything is looked at."""
        if self._fencer.could_write:
            self._fencer.stop(self._effect, self._fencer.clean_until_ns, self._stopped_first)
        else:
            self._later(0.2, self._check)

    def _later(self, share: float, do: Callable[[], None], longer_ns: int = 0) -> None:
        self._host.later(self._fencer.while_(share) + longer_ns, partial(self._go_on, do))

    def _go_on(self, do: Callable[[], None]) -> None:
        if self._fencer.current(self._life, self._effect):
            do()

    def _failed(self, why: str) -> None:
        self._host.world.say(f"{self._host.name} rejoin {self._record.generation} failed: {why}")
        self._fencer.ended(self._record, "failed", why)

    def _stopped_first(self, proven: bool, _: int | None) -> None:
        if proven:
            self._fencer.proven = False
            self._later(0.2, self._check)
        else:
            self._failed("could not be stopped first")

    @property
    def _reachable(self) -> bool:
        """Whether the primary's PostgreSQL answers."""
        source = self._host.world.hosts[self._request.primary]
        up = source.up and not source.paused and source.pg.mode != "down" and not source.pg.frozen
        return up and self._host.world.network.replicates(self._host.name, source.name)

    def _check(self) -> None:
        if self._host.system_identifier != self._request.system_identifier:
            self._failed("the data directory is another cluster's")
        elif not self._reachable:
            self._failed("the primary cannot be used as a source")
        elif self._pg.gone:
            self._stopped(True, None)
        else:
            until = self._host.boot() + 4 * self._fencer.t.stop_ns
            self._fencer.stop(self._effect, until, self._stopped)

    def _stopped(self, proven: bool, _: int | None) -> None:
        if not proven:
            self._failed("could not be stopped first")
            return
        self._fencer.proven = False
        if not (self._clone or self._pg.unfinished) and self._rng.random() < RECOVERS:
            self._pg.start(None)
            self._fencer.bell()
            self._later(0.4, self._recovered)
        else:
            self._work()

    def _recovered(self) -> None:
        if not self._pg.gone:
            self._pg.die()
        self._work()

    def _work(self) -> None:
        if not self._clone:
            self._pg.unfinished = True
        self._fencer.bell()
        self._later(3.0, self._whole, orphan(self._host.world, self._request.primary))

    def _whole(self) -> None:
        source = self._host.world.hosts[self._request.primary]
        if not self._reachable:
            self._failed("the primary is gone")
        elif source.system_identifier != self._request.system_identifier:
            self._failed("the primary is another cluster's")
        elif self._host.pg_fails:
            self._failed("the disk is too small")
        elif not self._clone and source.pg.early:
            self._host.world.say(f"{self._host.name} rewound to the wrong timeline: a copy is made instead")
            self._clone = True
            self._later(3.0, self._whole)
        else:
            self._pg.checkpointed = source.pg.checkpointed
            self._pg.branch, self._pg.end, self._pg.unfinished = source.pg.branch, source.pg.end, False
            self._later(0.4, self._start)

    def _start(self) -> None:
        if self._pg.gone:
            self._pg.start(self._request.primary)
        self._host.world.rejoins += 1
        self._host.world.say(f"{self._host.name} rejoin {self._record.generation} is done")
        self._fencer.ended(self._record, "done")
