"""All of it together: one queue of events, one clock, and a stream of random numbers for each thing.

Deterministic from a seed. First the phase of faults; then all is healed, operators included, and within
`Setting.calm_ns` one writable primary must be there. The invariants are checked at every change (checks.py).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec

import msgspec

from harmony.core.timing import NS
from harmony.core.view import distrust
from harmony_fencer.protocol import Unfence
from tests.sim import faults, setting
from tests.sim.checks import Checks
from tests.sim.database import Branch
from tests.sim.faults import Fault
from tests.sim.network import Network
from tests.sim.node import Host
from tests.sim.setting import Setting
from tests.sim.store import Store

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Rules:
    """What the model keeps on the real system's side; a test breaks one on purpose."""

    fencer_checks_lease: bool = True
    fencer_proves: bool = True
    fencer_first: bool = True  # after a pause of the host, before PostgreSQL
    store_checks_revision: bool = True
    timelines_reserved: bool = True  # else a promotion takes the next that its own node knows of
    spent_never_runs: bool = (
        True  # else what a fence has left, and calls dead to the world, runs on after a while
    )
    standbys_hold: bool = True  # no commit of a standby that is promoted goes without a rule
    waiting_is_seen: bool = True  # that commits wait again is seen, not assumed
    dated_from_send: bool = True  # else a heartbeat counts from its acknowledgement


class World:
    """Of one seed. `run()` or `script()` once; both raise Violation."""

    def __init__(
        self,
        seed: int,
        *,
        rules: Rules = Rules(),
        drift: float | None = None,
        known: Setting | None = None,
        done: Sequence[Fault] | None = None,
    ) -> None:
        self._seed = seed
        self.rules = rules
        self.setting = known if known is not None else setting.draw(seed, drift)
        self.faults = list(done) if done is not None else faults.draw(seed, self.setting)
        self.now = 0
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._serial = 0
        self.trace: list[str] = []
        self.rows: dict[int, int] = {}
        self.wishes = 0
        self.rejoins = 0  # done
        self.orphans = 0  # faults: the source of a rejoin leads no more before it ends
        self.rolled = False  # the store has lost history
        self.checks = Checks(self)
        names = self.setting.names
        self.member_set = frozenset(names)
        self.network = Network(names, self.setting.latency_ns)
        self.store = Store(self)
        self._clients = self.stream("clients")
        root = Branch(1, None, 0, "initdb")
        self.hosts = {n: Host(self, n, root) for n in names}

    def stream(self, name: str) -> random.Random:
        """Random numbers of its own for each thing: what happens to one does not change those of another."""
        return random.Random(f"{self._seed} {name}")

    def at(self, delay_ns: int, do: Callable[P, None], *args: P.args, **named: P.kwargs) -> None:
        """Call it after so much real time."""
        self._serial += 1
        call: Callable[[], None] = partial(do, *args, **named)
        heapq.heappush(self._queue, (self.now + delay_ns, self._serial, call))

    def say(self, text: str) -> None:
        self.trace.append(f"{self.now / NS:10.3f} {text}")

    def run(self) -> None:
        """Faults, healing, liveness."""
        s = self.setting
        self.at(s.faults_ns, self._heal)
        self._go(s.faults_ns + s.calm_ns)
        self.checks.at_the_end()
        end_ns = self.now + s.back_ns
        while not self.checks.all_back() and self.now < end_ns:
            self._on(self.now + s.timing.failover_ns)
        self.checks.back_at_the_end()
        self._on(self.now + s.calm_ns)
        self.checks.writes_go_on()

    def script(self, end_s: float) -> None:
        """The faults alone, until then."""
        self._go(round(end_s * NS))

    def _go(self, end_ns: int) -> None:
        for f in self.faults:
            self.at(f.at_ns, faults.begin, self, f)
        for host in self.hosts.values():
            host.switch_on()
        self.at(self.setting.timing.interval_ns, self._client)
        self._on(end_ns)

    def _on(self, end_ns: int) -> None:
        queue = self._queue
        while queue and queue[0][0] <= end_ns:
            self.now, _, do = heapq.heappop(queue)
            do()
        self.now = end_ns

    @property
    def hours(self) -> float:
        """Simulated."""
        return self.now / NS / 3600

    # ------------------------------------------------------------ clients and operators

    def _client(self) -> None:
        """Clients write wherever they can."""
        self.at(int(self.setting.timing.interval_ns * (0.2 + self._clients.random())), self._client)
        for host in self.hosts.values():
            if host.pg.mode == "primary":
                host.pg.write()

    def acknowledge(self) -> None:
        """The changes of leadership so far have been looked into."""
        cluster, control = self.store.cluster, self.store.control
        if cluster is not None and not self.store.down and control.acknowledged < cluster.term:
            self.wishes += 1
            self.store.wish(
                msgspec.structs.replace(control, attempt=f"w{self.wishes}", acknowledged=cluster.term)
            )

    def accept_soon(self) -> None:
        """An operator has looked at all nodes, and accepts a store that has lost something."""
        distrusted = any(distrust(h.view) for h in self.hosts.values())
        if self.store.down or not (self.rolled or distrusted):
            return
        # Lost claims are lost commits: whoever accepts the store as it is, accepts that.
        if self.store.lost_claims:
            self.store.lost_claims = False
            self.checks.acked.clear()
        founder = None
        if self.store.cluster is None:
            whole = [h for h in self.hosts.values() if h.up and not h.foreign and h.may_found()]
            able = [h for h in whole if self.checks.lacks(h) is None]
            # As docs/store.md says: the newest data of those that are up, by the timeline and then the LSN.
            able.sort(
                key=lambda h: (h.name not in self.checks.writing, -h.pg.branch.timeline, -h.pg.end, h.name)
            )
            founder = able[0] if able else None
        for host in self.hosts.values():
            host.accept(create=host is founder)

    def _heal(self) -> None:
        self.say("HEAL all faults are over; operators lift latches, look into changes and accept the store")
        self.store.doomed = False
        self._care()

    def _care(self) -> None:
        for host in self.hosts.values():
            if host.fencer.latched and host.up:
                host.fencer.asked(Unfence(who="operator"), "root")
        self.acknowledge()
        self.accept_soon()
        self.at(self.setting.timing.failover_ns, self._care)
