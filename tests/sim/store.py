"""A model of the JetStream bucket: one total order of compare-and-set writes, and all that may happen to a message.

Requests and answers may be lost, each way by itself; a write may be applied long after its sender gave it up; an
acknowledgement may come too late; while the stream elects a leader nothing is answered; a read may show what was
true some time ago (asked of an old leader); stamps are of a clock that jumps; a watch may die silently. Behind a
flag the newest revisions can be rolled back.

It never stores anything unconditionally, unless `Rules.store_checks_revision` is off.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from harmony.core.messages import (
    ClusterSeen,
    Connected,
    ControlSeen,
    Event,
    MemberSeen,
    Read,
    ReadFailed,
    Refresh,
    RefreshDone,
    StoreSeen,
    Write,
    WriteDone,
)
from harmony.core.ruling import recorded
from harmony.records import CLUSTER_STATE, CONTROL, MEMBER_PREFIX, ClusterState, Control, Member

if TYPE_CHECKING:
    from tests.sim.node import Host
    from tests.sim.world import World

EPOCH_NS = 1_700_000_000 * 10**9
HISTORY = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One revision of a key. `at_ns` is real time, `stamp_ns` the store's clock."""

    record: ClusterState | Member | Control
    revision: int
    stamp_ns: int
    at_ns: int


def _same(a: ClusterState | Member | Control, b: ClusterState | Member | Control) -> bool:
    """A heartbeat that says nothing new."""
    if isinstance(a, ClusterState) and isinstance(b, ClusterState):
        return (a.term, a.primary, a.successor, recorded(a)) == (b.term, b.primary, b.successor, recorded(b))
    return isinstance(a, Member) and isinstance(b, Member) and (a.confirms, a.db) == (b.confirms, b.db)


def _leader(record: ClusterState | Member | Control) -> str | None:
    return record.primary if isinstance(record, ClusterState) else None


@dataclass(frozen=True, slots=True)
class Question:
    """Of one agent: groups of keys, one after the other; `failed` is what it is told when no answer comes."""

    host: Host
    life: int
    gives_up: int
    failed: Event
    keys: tuple[tuple[str, ...], ...]
    asked_at: int = 0  # the newest revision that it had seen then


class Store:
    """Of one world. `down` counts what keeps it from answering."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.stream("store")
        self.data: dict[str, deque[Entry]] = {}
        self.revision = 0
        self.down = 0
        self.jump_ns = 0
        self.lineage = "lineage-1"
        self.beats = 0  # of leaders
        self.doomed = False  # faults: made anew right after the next claim
        self.lost_claims = False  # by a roll-back that no operator has accepted yet

    # ------------------------------------------------------------ the truth

    def newest(self, key: str) -> Entry | None:
        entries = self.data.get(key)
        return entries[-1] if entries else None

    @property
    def cluster(self) -> ClusterState | None:
        """cluster_state as it is."""
        entry = self.newest(CLUSTER_STATE)
        if entry is None:
            return None
        assert isinstance(entry.record, ClusterState)
        return entry.record

    def commit(self, key: str, record: ClusterState | Member | Control, revision: int) -> int:
        """The compare-and-set: the new revision, or 0 (refused)."""
        newest = self.newest(key)
        current = newest.revision if newest is not None else 0
        if current != revision and self._world.rules.store_checks_revision:
            return 0
        now = self._world.now
        self.revision += 1
        entry = Entry(record, self.revision, EPOCH_NS + now + self.jump_ns, now)
        if newest is None:
            self.data[key] = deque((entry,), HISTORY)
        else:
            self.data[key].append(entry)
        self._world.checks.stored(key, newest.record if newest is not None else None, record)
        if isinstance(record, ClusterState):
            self.beats += 1
            if self.doomed and newest is not None and record.primary not in {None, _leader(newest.record)}:
                self.doomed = False
                self._world.at(1, self.make_anew)
            self._tell(newest.record if newest is not None else None, record)
        event = self.event(key, entry, by_read=False)
        network = self._world.network
        quiet = newest is not None and _same(newest.record, record)
        for host in self._world.hosts.values():
            link = network.links[host.name]
            if not (link.watch or link.answers) and host.up:
                if quiet:  # seen at its next turn: not worth one of its own
                    host.post(host.life, event, quiet=True)
                else:
                    self._world.at(network.delay(link, host.rng), self._watched, host, host.life, event)
        return entry.revision

    def _tell(self, before: object, record: ClusterState) -> None:
        assert before is None or isinstance(before, ClusterState)
        if record.primary is None:
            self._world.say(
                f"store: {record.last_primary} leaves the place vacant (after term {record.term})"
            )
        elif before is None or before.term != record.term:
            self._world.say(f"store: term {record.term} is {record.primary}'s")
        elif record.successor != before.successor:
            self._world.say(f"store: {record.primary} names {record.successor or 'no successor any more'}")

    @staticmethod
    def event(key: str, entry: Entry | None, *, by_read: bool) -> Event:
        """What a node is shown of it."""
        record = entry.record if entry is not None else None
        revision = entry.revision if entry is not None else 0
        stamp_ns = entry.stamp_ns if entry is not None else 0
        if key == CLUSTER_STATE:
            assert record is None or isinstance(record, ClusterState)
            return ClusterSeen(record, revision, stamp_ns, by_read)
        if key == CONTROL:
            assert record is None or isinstance(record, Control)
            return ControlSeen(record, revision)
        assert record is None or isinstance(record, Member)
        return MemberSeen(key.removeprefix(MEMBER_PREFIX), record, revision, stamp_ns)

    def _watched(self, host: Host, life: int, event: Event) -> None:
        link = self._world.network.links[host.name]
        if not (link.watch or link.answers):
            host.post(life, event)

    def reconnect(self) -> None:
        """All nodes anew."""
        for host in self._world.hosts.values():
            self.connected(host)

    def connected(self, host: Host) -> None:
        """A new connection, where there can be one: the watch begins anew, with what is there."""
        link = self._world.network.links[host.name]
        if self.down or link.requests or link.answers:
            return
        host.post(host.life, Connected())
        host.post(host.life, StoreSeen(self.lineage, ""))
        for key in sorted(self.data):
            host.post(host.life, self.event(key, self.newest(key), by_read=False))

    def roll_back(self, revisions: int) -> None:
        """The newest revisions are lost, as after a power cut with a lax sync_interval.

        An assumption: a change of leadership, or of the synchronous rule, is lost only when every node remembers it.
        Who has not seen it and finds itself the recorded primary again would go on while the one that is forgotten
        still writes.
        """
        world = self._world
        to = max(0, self.revision - revisions)
        remembered = min(h.kept.term for h in world.hosts.values())
        seen = min(h.kept.revision for h in world.hosts.values())
        for before, e in pairwise(self.data.get(CLUSTER_STATE, ())):
            assert isinstance(e.record, ClusterState)
            assert isinstance(before.record, ClusterState)
            if (before.record.term, before.record.primary) == (e.record.term, e.record.primary):
                if recorded(before.record) == recorded(e.record):
                    continue
                if e.revision > seen:
                    to = max(to, e.revision)
                elif e.revision > to:
                    self.lost_claims = True
                continue
            if e.record.term > remembered or e.record.primary is None:
                to = max(to, e.revision)
            elif e.revision > to:
                self.lost_claims = True
        self._lose(to)

    def make_anew(self) -> None:
        """Somebody deletes the bucket and makes another one."""
        self.lineage += "+"
        self._lose(0)

    def _lose(self, to: int) -> None:
        self._world.rolled = True
        self.revision = to
        for key in list(self.data):
            kept = [e for e in self.data[key] if e.revision <= self.revision]
            if kept:
                self.data[key] = deque(kept, HISTORY)
            else:
                del self.data[key]
        self.reconnect()

    # ------------------------------------------------------------ writes

    def write(self, host: Host, w: Write) -> None:
        world = self._world
        link = world.network.links[host.name]
        rng = host.rng
        gives_up = world.now + max(1, w.timeout_ns)
        roll = rng.random() if link.lost or link.late else 1.0
        if link.requests or roll < link.lost:
            self._no_answer(host, w, gives_up)
        elif roll < link.lost + link.late:
            self._no_answer(host, w, gives_up)
            world.at(w.timeout_ns + rng.randrange(1, link.late_ns + 2), self._late, w)
        else:
            world.at(world.network.delay(link, rng), self._write_arrives, host, host.life, w, gives_up)

    def _late(self, w: Write) -> None:
        if not self.down:
            self.commit(w.key, w.record, w.revision)

    def _no_answer(self, host: Host, w: Write, gives_up: int) -> None:
        event = WriteDone(w.key, w.attempt, "unknown")
        self._world.at(max(0, gives_up - self._world.now), host.post, host.life, event)

    def _write_arrives(self, host: Host, life: int, w: Write, gives_up: int) -> None:
        world = self._world
        if self.down:
            if host.life == life:
                self._no_answer(host, w, gives_up)
            if self._rng.random() < 0.2:  # it waits in a server, and is applied by the next leader
                world.at(self._rng.randrange(4 * world.setting.timing.failover_ns), self._late, w)
            return
        revision = self.commit(w.key, w.record, w.revision)
        if host.life != life:
            return
        link = world.network.links[host.name]
        delay = world.network.delay(link, host.rng)
        lost = link.answers or (link.acks_lost and host.rng.random() < link.acks_lost)
        if lost or world.now + delay > gives_up:
            self._no_answer(host, w, gives_up)
        else:
            event = WriteDone(w.key, w.attempt, "acked" if revision else "refused", revision)
            world.at(delay, host.post, life, event)

    # ------------------------------------------------------------ reads

    def _look_up(self, host: Host, key: str) -> Entry | None:
        stale_ns = self._world.network.links[host.name].stale_ns
        if not stale_ns or host.rng.random() < 0.5:
            return self.newest(key)
        at_ns = self._world.now - host.rng.randrange(stale_ns)
        older = [e for e in self.data.get(key, ()) if e.at_ns <= at_ns]
        return older[-1] if older else None

    def read(self, host: Host, r: Read) -> None:
        self._ask(Question(host, host.life, self._world.now + r.timeout_ns, ReadFailed(r.key), ((r.key,),)))

    def refresh(self, host: Host, r: Refresh) -> None:
        """Own record, then cluster_state, then the others': one after the other, as the shell does."""
        keys = ((MEMBER_PREFIX + host.name,), (CLUSTER_STATE,), host.other_keys)
        self._ask(Question(host, host.life, self._world.now + r.timeout_ns, RefreshDone(ok=False), keys))

    def _ask(self, q: Question) -> None:
        link = self._world.network.links[q.host.name]
        if link.requests or (link.lost and q.host.rng.random() < link.lost):
            self._unanswered(q)
        else:
            q = replace(q, asked_at=q.host.view.marks.revision)
            self._world.at(self._world.network.delay(link, q.host.rng), self._asked, q)

    def _unanswered(self, q: Question) -> None:
        self._world.at(max(0, q.gives_up - self._world.now), q.host.post, q.life, q.failed)

    def _asked(self, q: Question) -> None:
        if q.host.life != q.life:
            return
        link = self._world.network.links[q.host.name]
        delay = self._world.network.delay(link, q.host.rng)
        lost = self.down or link.answers or (link.acks_lost and q.host.rng.random() < link.acks_lost)
        if lost or self._world.now + delay > q.gives_up:
            self._unanswered(q)
        else:
            self._world.at(delay, self._answered, q, [self._look_up(q.host, key) for key in q.keys[0]])

    def _answered(self, q: Question, found: list[Entry | None]) -> None:
        """It may cross what was written meanwhile, and told by the watch."""
        if q.host.life != q.life:
            return
        periodic = isinstance(q.failed, RefreshDone)
        for key, entry in zip(q.keys[0], found, strict=True):
            e = self.event(key, entry, by_read=True)
            if isinstance(e, ClusterSeen):
                e = replace(e, asked_at=q.asked_at)
            known = q.host.view.cluster
            news = isinstance(e, ClusterSeen) and (not known or not e.record or not _same(known, e.record))
            q.host.post(q.life, e, quiet=periodic and not news)
        if not periodic:
            return
        if q.keys[1:]:
            self._ask(replace(q, keys=q.keys[1:]))
        else:
            q.host.post(q.life, RefreshDone(ok=True), quiet=True)

    # ------------------------------------------------------------ operators

    def wish(self, record: Control) -> None:
        """harmonyctl writes `control`, by compare-and-set on what it has just read."""
        newest = self.newest(CONTROL)
        self.commit(CONTROL, record, newest.revision if newest is not None else 0)

    @property
    def control(self) -> Control:
        entry = self.newest(CONTROL)
        if entry is None:
            return Control(attempt="none")
        assert isinstance(entry.record, Control)
        return entry.record
