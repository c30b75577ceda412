"""One stage of a chaos campaign: rounds of faults at a running cluster, and what its clients then say.

Each round strikes, undoes everything, waits for the bounds of recovery, and reads every host. It trusts nothing that
the peer says: who is the primary, it asks of PostgreSQL; what was lost, of the clients' records.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psycopg

from bench.ha import checker, merged
from bench.ha.checker import Bounds, Violation
from bench.ha.faults import FAULTS, STORE, Fault
from bench.ha.peer import DATABASES, Options
from bench.ha.plan import Event, Role, Round
from bench.ha.records import NS, Ack
from bench.ha.scenarios import Act
from bench.ha.stage import Stage
from tests.hosts.host import HostError

GRACE_S = 60.0  # beyond the bound: late, or never?
LEVEL_S = 20.0  # for standbys to replay the same, when nobody writes any more
TICK_S = 0.02


class Played(msgspec.Struct, frozen=True):
    """One round: what struck (fault and host), and seconds from the end of all faults; None: never."""

    number: int
    shape: str
    struck: tuple[str, ...]
    lasted_s: float
    outage_s: float  # the client's longest pause from then on
    back_s: (
        float | None
    )  # until a new row could be read on every host, and no lease from before could still end
    timelines: int  # begun in this round: how often the primary was replaced, or began anew
    violations: tuple[Violation, ...]
    load: float  # os.getloadavg()[0] in its end: a late recovery may be the machine's


@dataclass
class Strike:
    """A fault and its host."""

    event: Event
    fault: Fault
    act: Act

    @property
    def at(self) -> str:
        return self.act.store or (STORE if self.fault.at_store else self.act.victim)


@dataclass
class Chaos:
    """Rounds on one stage. `told` is what was done and when (CLOCK_BOOTTIME), for the timeline."""

    stage: Stage
    bounds: Bounds
    say: Callable[[str], None]
    told: list[tuple[int, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def tell(self, words: str) -> None:
        """Into the timeline."""
        self.told.append((self.stage.now_ns(), words))

    def primary(self) -> str:
        """Who it is, by PostgreSQL; a switchover may still be under way. Raises HostError when nobody is."""
        found: list[str] = []

        def look() -> bool:
            state = self.stage.state()
            found.extend([state.primary] if state is not None else [])
            return bool(found)

        self.stage.wait_until(look, "a primary", self.bounds.writes_s)
        return found[0]

    def attend(self) -> None:
        """Failover does not stay stopped from earlier rounds (failover.maximum_changes). Raises HostError."""

        def attended() -> bool:
            try:
                self.stage.peer.attend()
            except HostError as error:
                self.tell(f"the operator's command came to nothing: {error}"[:300])
                return False
            return True

        self.stage.wait_until(attended, "what the operator acknowledges", self.bounds.writes_s)

    # ------------------------------------------------------------ a round

    def play(self, what: Round, load: Callable[[], float]) -> Played:
        """Raises HostError when the lab itself cannot go on."""
        primary = self.primary()
        self.tell(f"round {what.number} ({what.shape}), the primary is {primary}")
        self.attend()
        began_ns = self.stage.now_ns()
        before = self._timeline()
        struck = self._strike_all(what, primary)
        healed_ns = self.stage.now_ns()
        self.tell("all healed")
        back_s = self._back(healed_ns)
        end_ns = self.stage.now_ns()
        self.tell(f"back after {back_s:.1f} s" if back_s is not None else "NOT BACK")
        self.poll()
        assert self.stage.client is not None
        outage_s = checker.outage_s(self.stage.client.acks, healed_ns, end_ns)
        waited_s = (end_ns - healed_ns) / NS
        found = checker.slow(outage_s, self.bounds.writes_s, "the client had nothing acknowledged", healed_ns)
        found += checker.slow(waited_s, self.bounds.back_s, "not every host could read new rows", healed_ns)
        found += checker.overlaps(self.acks())
        found += self.read_back() if back_s is not None else []
        for violation in found:
            self.tell(f"VIOLATION {violation.kind}: {violation.what}")
        return Played(
            number=what.number,
            shape=what.shape,
            struck=tuple(struck),
            lasted_s=(healed_ns - began_ns) / NS,
            outage_s=outage_s,
            back_s=back_s,
            timelines=self._timeline() - before,
            violations=tuple(found),
            load=load(),
        )

    def _strike_all(self, what: Round, old: str) -> list[str]:
        """Strike and heal by the round's clock; heals everything whatever happens."""
        began = time.monotonic()
        waiting = sorted(what.events, key=lambda event: event.at_s)
        active: list[Strike] = []
        struck: list[str] = []
        try:
            while waiting or active:
                now_s = time.monotonic() - began
                while waiting and waiting[0].at_s <= now_s:
                    strike = self._strike(waiting.pop(0), old, active)
                    if strike is not None:
                        active.append(strike)
                        struck.append(f"{strike.event.fault} {strike.at}")
                for strike in [s for s in active if s.event.until_s <= now_s]:
                    active.remove(strike)
                    self._heal(strike)
                for strike in active:
                    strike.fault.keep(strike.act)
                time.sleep(TICK_S)
        finally:
            for strike in active:
                self._heal(strike)
        return struck

    def _strike(self, event: Event, old: str, active: list[Strike]) -> Strike | None:
        fault = FAULTS[event.fault]
        victim = self._victim(event.role, old)
        names = [STORE] if fault.at_store else sorted(DATABASES, key=lambda name: name != victim)
        taken = {(s.at if not s.fault.at_store else STORE, part) for s in active for part in s.fault.takes}
        free = [name for name in names if not any((name, part) in taken for part in fault.takes)]
        if not free:
            self.tell(f"{event.fault}: no host is free for it")
            return None
        act = Act(self.stage, old, victim if fault.at_store else free[0], pick=event.pick)
        strike = Strike(event, fault, act)
        self.tell(f"strike {event.fault} at {strike.at} for {event.lasts_s:g} s (pick {event.pick:g})")
        try:
            fault.strike(act)
        except (HostError, OSError) as error:
            self.tell(f"{event.fault} at {strike.at} came to nothing: {error}"[:300])
            return None
        self.counts[event.fault] += 1
        return strike

    def _victim(self, role: Role, old: str) -> str:
        others = [name for name in DATABASES if name != old]
        now = self.stage.latest_writer() or old
        return {"primary": old, "standby": others[0], "other": others[1], "leading": now}[role]

    def _heal(self, strike: Strike) -> None:
        strike.fault.heal(strike.act)
        self.tell(f"healed {strike.event.fault} at {strike.at}")

    # ------------------------------------------------------------ what the clients say

    def acks(self) -> list[Ack]:
        """Everybody's."""
        return self.stage.named([ack for recorder in self.stage.recorders() for ack in recorder.acks])

    def _promised(self) -> list[Ack]:
        """Of the writers whose commits wait for a standby, where the mode is synchronous."""
        assert self.stage.client is not None
        waiting = [self.stage.client, *self.stage.local.values()]
        return self.stage.named([ack for recorder in waiting for ack in recorder.acks])

    def poll(self) -> None:
        for recorder in self.stage.recorders():
            recorder.poll()

    def _timeline(self) -> int:
        self.poll()
        return max((ack.timeline for ack in self.acks()), default=0)

    def _everywhere(self, since_ns: int) -> bool:
        return all(self.stage.rejoined(name, since_ns) for name in DATABASES)

    def _back(self, healed_ns: int) -> float | None:
        settled_ns = healed_ns + round(self.bounds.settle_s * NS)
        came = self.stage.comes(lambda: self._everywhere(settled_ns), self.bounds.back_s + GRACE_S)
        return (self.stage.now_ns() - healed_ns) / NS if came else None

    def read_back(self) -> list[Violation]:
        """Every row that was acknowledged before now, on every host; the writers go on meanwhile."""
        acks = self._promised()
        now_ns = self.stage.now_ns()
        if not self.stage.comes(lambda: self._everywhere(now_ns), LEVEL_S):
            return [
                Violation("slow", f"a host fell behind again for {LEVEL_S:g} s after all were back", now_ns)
            ]
        try:
            return self._lost(acks, self._stored())
        except psycopg.Error as error:
            return [Violation("slow", f"could not be read after all were back: {error}", now_ns)]

    def _lost(self, acks: list[Ack], stored: dict[str, list[int]]) -> list[Violation]:
        """Asynchronous replication promises nothing: then it is told only."""
        found = checker.lost_rows(acks, stored)
        if self.stage.options.sync != "off":
            return found
        for violation in found:
            self.tell(f"asynchronous: {violation.what}")
        return []

    def _stored(self) -> dict[str, list[int]]:
        return {name: self.stage.listed(name) for name in DATABASES}

    def last_look(self, patience_s: float = LEVEL_S) -> list[Violation]:
        """When the writers have been ended: every host has the same rows, and none that nobody sent."""
        for recorder in self.stage.recorders():
            recorder.stop()
        overlapping = checker.overlaps(self.acks())
        sent: set[int] = set().union(*(recorder.sent() for recorder in self.stage.recorders()))
        acks = self._promised()
        found: list[Violation] = []

        def level() -> bool:
            try:
                stored = self._stored()
            except psycopg.Error as error:
                found[:] = [Violation("slow", f"could not be read in the end: {error}")]
                return False
            found[:] = [*checker.inconsistent(stored, sent), *self._lost(acks, stored)]
            return not found

        self.stage.comes(level, patience_s)
        found += overlapping
        for violation in found:
            self.tell(f"VIOLATION {violation.kind}: {violation.what}")
        return found

    # ------------------------------------------------------------ evidence

    def keep(self, words: str) -> Path:
        """All logs and records, and the timeline made of them; `words` stand on its top. Returns the folder."""
        kept = self.stage.keep_logs()
        offset_ns = time.time_ns() - self.stage.now_ns()
        done = [(at_ns + offset_ns, said) for at_ns, said in [*self.told, *self._reigns()]]
        text = merged.merged(merged.read(kept, list(self.stage.lab.hosts)), done)
        (kept / "timeline.txt").write_text(f"{words}\n{text}")
        return kept

    def _reigns(self) -> list[tuple[int, str]]:
        """First and last acknowledgement of each host on each timeline."""
        spans: dict[tuple[int, str], list[int]] = {}
        for ack in self.acks():
            spans.setdefault((ack.timeline, ack.host), []).append(ack.acked_ns)
        return [
            (edge(times), f"clients: {which} acknowledgement by {host} on timeline {timeline}")
            for (timeline, host), times in spans.items()
            for edge, which in ((min, "first"), (max, "last"))
        ]


def options(peer: str, preset: str, sync: str) -> Options:
    """What a stage of chaos has: three stores, PostgreSQL's logs, and writers that see every writable host."""
    return Options(peer, preset, sync, stores=3, logs=True, probes=True)
