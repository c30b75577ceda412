"""One agent beside its host: the real `step` until it has nothing more to do at this moment.

What the agent is told and what it orders at one moment is one transition: the fencer's status, the database's
answer, its own member record's write, the periodic read of all keys. Only its write of cluster_state leaves as
a message of its own, and (as a fault) one order or renewal that waits in the socket.
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from harmony.core.messages import (
    Checkpoint,
    CheckpointDone,
    ClusterSeen,
    Command,
    ControlSeen,
    DbSeen,
    DbSilent,
    Event,
    Fatal,
    FencerSeen,
    Gen,
    Log,
    MemberSeen,
    Order,
    OrderRefused,
    Read,
    ReadFailed,
    Refresh,
    RefreshDone,
    Renew,
    Write,
    WriteDone,
)
from harmony.core.node import initial, step
from harmony.core.register import RETRY_NS
from harmony.core.timing import Timing
from harmony.core.view import Identity, Policy, View
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, ClusterState, Control, Member
from tests.exhaustive import normal
from tests.exhaustive.host import NODES, Host, Violation, fencer_view, receive
from tests.exhaustive.normal import COUNTER, NEWEST, NOW, UNIT

STEPS = 12  # of one agent at one moment, at the most


class Pending(NamedTuple):
    """Which attempt of whom a value is; None in its place: nobody waits for it any more."""

    node: str
    id: str


class Store(NamedTuple):
    """What a read shows. Ages in units."""

    record: ClusterState | None = None
    attempt: Pending | None = None
    age: int = 0
    members: tuple[Member | None, ...] = (None, None)
    member_ages: tuple[int, ...] = (0, 0)
    control: Control | None = None
    owners: tuple[tuple[str, str], ...] = ()  # of each term: who claimed it, and what was there before


class Node(NamedTuple):
    view: View
    host: Host = Host()
    late: Order | Renew | None = None  # waits in the fencer's socket
    cut: bool = False  # from the store
    paused: bool = False


class Request(NamedTuple):
    """A write of cluster_state. `fresh`: the revision that it replaces is still the newest."""

    record: ClusterState
    fresh: bool
    attempt: Pending | None


class Stepped(NamedTuple):
    node: Node
    member: Member | None  # its record as it now is in the store, when it was written
    request: Request | None
    names: tuple[tuple[str, str], ...]  # of the attempts that were and still are pending: old name, new name
    label: str
    ordered: bool


class Setting(NamedTuple):
    """What does not change in one exploration."""

    timing: Timing
    checks_generation: bool = True
    checks_revision: bool = True
    fences_itself: bool = True
    proves: bool = True


def identity(node: str) -> Identity:
    """Asynchronous, and whatever a standby has received is enough: the model has no WAL."""
    policy = Policy(rejoin="off", rejoin_after_s=10**6)  # no WAL: nothing diverges
    return Identity(node, "c1", node == "n1", NODES, 0, 1024, False, 100, node, "boot", "model", policy)


ME = {n: identity(n) for n in NODES}


def fresh_view(node: str, t: Timing) -> View:
    return normal.view(initial(ME[node]), node, t)


def cluster_seen(store: Store, node: str, *, by_read: bool) -> ClusterSeen:
    if store.record is None:
        return ClusterSeen(None, 0, 0, by_read)
    mine = store.attempt is not None and store.attempt.node == node
    attempt = store.attempt.id if mine and store.attempt is not None else "another"
    return ClusterSeen(replace(store.record, attempt=attempt), NEWEST, NOW - store.age * UNIT, by_read)


def _member_seen(store: Store, name: str) -> MemberSeen:
    i = NODES.index(name)
    record = store.members[i]
    if record is None:
        return MemberSeen(name, None, 0, 0)
    return MemberSeen(name, record, NEWEST, NOW - store.member_ages[i] * UNIT)


def read_all(store: Store, node: str) -> list[Event]:
    """As the shell reads: the own record first, then cluster_state, then the others."""
    others = [n for n in NODES if n != node]
    events: list[Event] = [_member_seen(store, node), cluster_seen(store, node, by_read=True)]
    events += [_member_seen(store, n) for n in others]
    if store.control is not None:
        events.append(ControlSeen(store.control, NEWEST))
    return [*events, RefreshDone(ok=True)]


class Moment:
    """Everything that one agent does at one moment."""

    def __init__(self, node: Node, name: str, store: Store, streams: bool, s: Setting, late: bool) -> None:
        self.view, self.host, self.late = node.view, node.host, node.late
        self.name, self.store, self.streams, self.s = name, store, streams, s
        self.cut, self.delay = node.cut, late
        self.member: Member | None = None
        self.request: Request | None = None
        self.ordered = False
        self.said: list[str] = []

    def run(self, events: list[Event]) -> None:
        self.view = replace(self.view, counter=COUNTER)
        queue = events
        for _ in range(STEPS):
            told = [FencerSeen(fencer_view(self.host, self.name)), self._database(), *queue]
            self.view, commands = step(self.view, told, ME[self.name], self.s.timing, NOW)
            queue = [e for c in commands for e in self._carry_out(c)]
            if not queue:
                return
        raise AssertionError(f"{self.name} does not come to rest: {self.view}")

    def _database(self) -> Event:
        match self.host.postgres:
            case "primary":
                return DbSeen("primary", 1, 1000, 1000, False, "sys", NOW)
            case "standby":
                return DbSeen("standby", 1, 1001, 1001, self.streams, "sys", NOW)
            case _:
                return DbSilent("down")

    def _carry_out(self, c: Command) -> list[Event]:
        match c:
            case Log(row=row, before=before, after=after, why=why):
                if before != after:
                    self.said.append(f"{before} -> {after} [{row}] {why}")
                elif row != "0":
                    self.said.append(f"[{row}] {why}")
            case Fatal(why=why):
                raise Violation(f"{self.name} fatal: {why}")
            case Order() | Renew():
                return self._order(c)
            case Write():
                return self._write(c)
            case Read(key=key):
                if self.cut:
                    return [ReadFailed(key)]
                cluster = key == CLUSTER_STATE
                return [
                    cluster_seen(self.store, self.name, by_read=True)
                    if cluster
                    else _member_seen(self.store, self.name)
                ]
            case Checkpoint():
                return [CheckpointDone()]
            case Refresh():
                return [] if self.cut else read_all(self.store, self.name)
            case _:
                pass
        return []

    def _order(self, c: Order | Renew) -> list[Event]:
        self.ordered = True
        what = f"{c.op} {c.generation}" if isinstance(c, Order) else f"renew {c.generation}"
        if self.delay:
            self.delay = False
            self.late = replace(c, reason="") if isinstance(c, Order) else c
            self.said.append(f"orders {what}, which waits in the socket")
            return []
        return self._arrive(c, what)

    def _arrive(self, c: Order | Renew, what: str) -> list[Event]:
        check_claimed(c, self.name, self.store)
        checks = self.s.checks_generation
        self.host, refused = receive(self.host, self.name, c, self.s.timing, checks_generation=checks)
        self.said.append(f"orders {what}" + (f", refused: {refused}" if refused else ""))
        return [OrderRefused(c.generation, refused, "")] if refused and isinstance(c, Order) else []

    def _write(self, w: Write) -> list[Event]:
        if isinstance(w.record, ClusterState):
            if self.cut:
                self.said.append("writes, to nobody")
                return []
            newest = NEWEST if self.store.record is not None else 0
            record = w.record
            who = f"term {record.term} {record.primary or 'vacant'}"
            self.said.append(f"writes {who}" + (f" naming {record.successor}" if record.successor else ""))
            attempt = Pending(self.name, w.attempt)
            self.request = Request(normal.cluster(record), w.revision == newest, attempt)
            return []
        if self.cut:
            return []
        i = NODES.index(self.name)
        self.member = normal.member(w.record, self.s.timing)
        members = (*self.store.members[:i], self.member, *self.store.members[i + 1 :])
        ages = (*self.store.member_ages[:i], 0, *self.store.member_ages[i + 1 :])
        self.store = self.store._replace(members=members, member_ages=ages)
        return [WriteDone(MEMBER_PREFIX + self.name, w.attempt, "acked", NEWEST)]


def changed(c: Order | Renew, generation: Gen, deadline_ns: int) -> Order | Renew:
    """The same message with other numbers."""
    if isinstance(c, Renew):
        return Renew(generation, deadline_ns)
    return replace(c, generation=generation, deadline_ns=deadline_ns)


def check_claimed(c: Order | Renew, node: str, store: Store) -> None:
    """I4: only who has claimed a term in the store may activate in it."""
    term = c.generation[0]
    if isinstance(c, Order) and c.op == "activate":
        owner = store.owners[term - 1][0] if term <= len(store.owners) else "nobody"
        if owner != node:
            raise Violation(f"I4: {node} activates in term {term}, which {owner} has claimed")


def ranked(node: Node) -> Node:
    """Count the generations anew; they are this node's own affair."""
    h, late = node.host, node.late
    used = normal.generations(node.view) | {h.highest}
    used |= {h.newest.generation} if h.newest is not None else set()
    used |= {h.active} if h.active is not None else set()
    used |= {late.generation} if late is not None else set()
    names = normal.rank(used)
    if all(a == b for a, b in names.items()):
        return node
    return node._replace(
        view=normal.renumbered(node.view, names),
        host=h._replace(
            highest=names[h.highest],
            newest=h.newest._replace(generation=names[h.newest.generation]) if h.newest is not None else None,
            active=names[h.active] if h.active is not None else None,
        ),
        late=changed(late, names[late.generation], late.deadline_ns) if late is not None else None,
    )


def act(
    node: Node, name: str, store: Store, events: list[Event], s: Setting, *, streams: bool, late: bool = False
) -> Stepped:
    """The agent's step on `events`, and all that follows from it at this moment."""
    m = Moment(node, name, store, streams, s, late)
    if NOW + RETRY_NS < node.view.refreshing_until_ns <= NOW + s.timing.timeout_ns:
        events = [RefreshDone(ok=False), *events]  # a read that nobody has answered
    m.run(events)
    seen, names = normal.numbered(m.view, name)
    view = normal.view(seen, name, s.timing)
    request = m.request
    if request is not None and request.attempt is not None:
        id_ = names.get(request.attempt.id)
        request = request._replace(attempt=Pending(name, id_) if id_ is not None else None)
    after = ranked(node._replace(view=view, host=m.host, late=m.late))
    kept = tuple((old, new) for old, new in names.items() if int(old.rpartition("-")[2]) < COUNTER)
    return Stepped(after, m.member, request, kept, "; ".join(m.said), m.ordered)
