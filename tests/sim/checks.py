"""The invariants, checked at every change: who writes, what was acknowledged, who claimed, what is on which disk.

It sees the world from outside, in real time, as no node can. It changes nothing; a broken invariant is a Violation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harmony.records import CLUSTER_STATE, ClusterState, Control, Member
from harmony_fencer.protocol import Generation

if TYPE_CHECKING:
    from tests.sim.database import Branch
    from tests.sim.node import Host
    from tests.sim.world import World


class Violation(AssertionError):
    """An invariant was broken; the message names it."""


class Checks:
    """Of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.writing: dict[str, Host] = {}
        self.claims: dict[int, set[str]] = {}
        self.acked: dict[Branch, int] = {}
        self.acked_ns = 0  # when a client was last told so
        self.begins: dict[int, Branch] = {}
        self.highest: dict[str, Generation] = {}

    def says_why(self, host: Host) -> None:
        """Called at each decision: people read it in the log, and wait for what it says."""
        if host.view.why.endswith((":", ";", ",")):
            raise Violation(f"why: {host.name} row {host.view.row} gives no reason: {host.view.why}")

    # ------------------------------------------------------------ I1, I2, I4: who accepts commits

    def look(self, host: Host) -> None:
        """Called at everything that may change whether PostgreSQL on `host` accepts a commit now."""
        accepts = host.pg.accepting
        if accepts == (host.name in self.writing):
            return
        if not accepts:
            del self.writing[host.name]
            return
        self.writing[host.name] = host
        if len(self.writing) > 1:
            raise Violation(f"I1: {' and '.join(sorted(self.writing))} accept commits at the same time")

    def activated(self, host: Host, term: int) -> None:
        """PostgreSQL on `host` has become writable under a generation of `term`."""
        claimed = self.claims.get(term, set())
        if host.name not in claimed:
            who = ", ".join(sorted(claimed)) or "nobody"
            raise Violation(f"I4: {host.name} is activated in term {term}, which {who} has claimed")
        self.holds_all(host)

    def begun(self, branch: Branch) -> None:
        """A promotion has begun a timeline: a number means one history, or no position could be compared."""
        other = self.begins.setdefault(branch.timeline, branch)
        if other is not branch and not self._world.rolled:
            raise Violation(
                f"I2: timeline {branch.timeline} begins twice, by {other.who} and by {branch.who}"
            )

    def holds_all(self, host: Host) -> None:
        """I2: every acknowledged commit is here."""
        missing = self.lacks(host)
        if missing is not None:
            branch, lsn = missing, self.acked[missing]
            raise Violation(
                f"I2: {host.name} is the primary without an acknowledged commit of {branch.who} "
                f"(timeline {branch.timeline}, position {lsn}; it is at {host.pg.where})"
            )

    def lacks(self, host: Host) -> Branch | None:
        """Where the commits are that were acknowledged and are not here; None: nothing is missing."""
        return next((b for b, lsn in self.acked.items() if not host.pg.has(b, lsn)), None)

    def acknowledged(self, branch: Branch, lsn: int) -> None:
        """A client was told that its commit is safe."""
        if lsn > self.acked.get(branch, 0):
            self.acked[branch] = lsn
            self.acked_ns = self._world.now

    # ------------------------------------------------------------ I4, I6: what is in the store

    def stored(self, key: str, before: object, record: ClusterState | Member | Control) -> None:
        """The store has committed `record`."""
        if key != CLUSTER_STATE or not isinstance(record, ClusterState):
            return
        assert before is None or isinstance(before, ClusterState)
        if record.primary is None:
            host = self._world.hosts[record.last_primary]
            if (
                host.pg.mode == "primary" and not host.pg.spent
            ):  # a late one may find it running again, as a standby
                raise Violation(f"I6: a vacancy of {host.name} is stored, and its PostgreSQL is a primary")
            return
        fresh = before is None or record.term > before.term
        # A store that lost history counts its revisions anew: a late write of before may fit. Nothing trusts it.
        if before is not None and before.term > record.term and not self._world.rolled:
            raise Violation(f"I4: the term went back from {before.term} to {record.term}")
        if fresh:
            claimed = self.claims.setdefault(record.term, set())
            claimed.add(record.primary)
            if len(claimed) > 1 and not self._world.rolled:
                raise Violation(f"I4: term {record.term} was claimed by {' and by '.join(sorted(claimed))}")

    def proven(self, host: Host) -> None:
        """The fencer of `host` says that its fence is proven."""
        if self._world.rules.fencer_proves and not host.pg.gone:
            raise Violation(f"I6: {host.name} calls its fence proven, and PostgreSQL is not gone")

    # ------------------------------------------------------------ I3: what is on the disk

    def durable(self, host: Host, generation: Generation) -> None:
        """What the disk of `host` holds as the highest accepted generation."""
        seen = self.highest.get(host.name)
        if seen is not None and generation < seen:
            raise Violation(
                f"I3: the highest generation of {host.name} went back from {seen} to {generation}"
            )
        self.highest[host.name] = generation

    # ------------------------------------------------------------ I5, and I2 at the end

    def at_the_end(self) -> None:
        """Everything was healed for long enough."""
        if len(self.writing) != 1:
            raise Violation(
                f"I5: {self._world.setting.calm_ns / 1e9:.0f} s after healing the writable primaries are "
                f"{sorted(self.writing)}"
            )
        self.holds_all(next(iter(self.writing.values())))

    # ------------------------------------------------------------ O5: everybody is back

    def writes_go_on(self) -> None:
        """I5: whatever the rule is now, somebody is there to confirm, or nobody is waited for."""
        s = self._world.setting
        if s.sync_mode != "off" and self._world.now - self.acked_ns > s.timing.failover_ns:
            host = next(iter(self.writing.values()))
            raise Violation(
                f"I5: all are back, and no commit has been acknowledged since {self.acked_ns / 1e9:.3f} s "
                f"({host.view.ruling}, recorded {host.view.cluster})"
            )

    def _apart(self) -> list[str]:
        """Who does not stream from the primary, and could."""
        names = set(self._world.hosts) - set(self.writing)
        return sorted(n for n in names if not self._world.hosts[n].pg.streaming)

    def all_back(self) -> bool:
        return len(self.writing) == 1 and not self._apart()

    def back_at_the_end(self) -> None:
        """After the time for that."""
        apart = [f"{n} ({self._world.hosts[n].view.why})" for n in self._apart()]
        if len(self.writing) != 1 or apart:
            raise Violation(
                f"O5: {sorted(self.writing)} lead, and these are not back as standbys: {', '.join(apart)}"
            )
