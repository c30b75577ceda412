"""The composed model: two nodes, their messages and the store; from each state, every next one.

A state is a tuple of small numbers, each the name of a value in a table: so equal parts are computed once.
What is checked in each state (`check`) and at each write stands beside the invariants' names.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from msgspec.structs import replace

from harmony.core.messages import Event, OrderRefused, WriteDone
from harmony.core.timing import Timing
from harmony.records import CLUSTER_STATE, ClusterState, Control, Switchover
from tests.exhaustive import host as hosts
from tests.exhaustive import normal
from tests.exhaustive.agent import (
    Node,
    Pending,
    Request,
    Setting,
    Stepped,
    Store,
    act,
    changed,
    check_claimed,
    cluster_seen,
    fresh_view,
    ranked,
)
from tests.exhaustive.host import NODES, Violation
from tests.exhaustive.normal import NEWEST, NOW, UNIT

T = TypeVar("T", bound=Hashable)
FAULTS = frozenset(
    {"late", "unknown", "pause", "crash", "host", "cut", "postgres", "fencer", "activation", "ask"}
)


class Answer(NamedTuple):
    """Of the store to a write of cluster_state, on its way back to the node that still waits for it."""

    attempt: Pending
    outcome: str
    revision: int


class Net(NamedTuple):
    """Of one node: its newest write on its way, an older one that may still land, and an answer."""

    request: Request | None = None
    ghost: Request | None = None
    answer: Answer | None = None


class State(NamedTuple):
    """Numbers of Nodes, Nets and the Store; how many faults may still happen."""

    nodes: tuple[int, int]
    nets: tuple[int, int]
    store: int
    faults: int


class Table(Generic[T]):
    """Values by number."""

    def __init__(self) -> None:
        self.values: list[T] = []
        self._numbers: dict[T, int] = {}

    def number(self, value: T) -> int:
        found = self._numbers.get(value)
        if found is None:
            found = self._numbers[value] = len(self.values)
            self.values.append(value)
        return found


Next = tuple[str, State]


class Model:
    """All tables of one exploration."""

    def __init__(self, setting: Setting, faults: int, kinds: frozenset[str], terms: int = 2) -> None:
        self.s, self.faults, self.kinds, self.terms = setting, faults, kinds, terms
        self.nodes: Table[Node] = Table()
        self.nets: Table[Net] = Table()
        self.stores: Table[Store] = Table()
        self.steps: dict[tuple[int, int, int, bool, str, bool], Stepped] = {}
        self._stepped: dict[int, int] = {}
        self._moved: dict[tuple[str, int, int], int] = {}
        self.beyond = 0  # writes of a term beyond `terms` that were not carried out

    @property
    def timing(self) -> Timing:
        return self.s.timing

    def empty(self) -> State:
        """An empty store, both agents just started, no PostgreSQL running."""
        nodes = [self.nodes.number(Node(fresh_view(n, self.timing))) for n in NODES]
        net = self.nets.number(Net())
        return State((nodes[0], nodes[1]), (net, net), self.stores.number(Store()), self.faults)

    # ------------------------------------------------------------ invariants

    def check(self, s: State) -> None:
        """I1 and I6, in every state."""
        writable = [
            n for n, i in zip(NODES, s.nodes, strict=True) if self.nodes.values[i].host.postgres == "primary"
        ]
        if len(writable) > 1:
            raise Violation(f"I1: two writable primaries: {writable}")
        record = self.stores.values[s.store].record
        if writable and record is not None and record.primary is None:
            raise Violation(f"I6: a vacancy of term {record.term} is stored while {writable[0]} can write")

    def _check_write(self, before: Store, record: ClusterState, node: str) -> None:
        """I4: terms never go back, and each has one holder."""
        if before.record is not None and record.term < before.record.term:
            raise Violation(f"I4: the term goes back from {before.record.term} to {record.term}")
        if record.term <= len(before.owners) and before.owners[record.term - 1][0] != node:
            owner = before.owners[record.term - 1][0]
            raise Violation(f"I4: {node} writes in term {record.term}, which {owner} has claimed")

    # ------------------------------------------------------------ parts that move

    def _map(self, kind: str, number: int, by: int, do: Callable[[], int]) -> int:
        key = (kind, number, by)
        found = self._moved.get(key)
        if found is None:
            found = self._moved[key] = do()
        return found

    def _node_behind(self, number: int, i: int) -> int:
        """Node i after a write of cluster_state."""

        def do() -> int:
            node = self.nodes.values[number]
            return self.nodes.number(node._replace(view=normal.view(node.view, NODES[i], self.timing, by=1)))

        return self._map("behind", number, i, do)

    def _peer_written(self, number: int, i: int) -> int:
        """Node i after the other has written its member record."""

        def do() -> int:
            node = self.nodes.values[number]
            revisions = normal.Fixed(dict.fromkeys(node.view.member_revision, NEWEST - 1))
            return self.nodes.number(node._replace(view=replace(node.view, member_revision=revisions)))

        return self._map("peer", number, i, do)

    def _node_later(self, number: int, i: int) -> int:
        def do() -> int:
            node = self.nodes.values[number]
            late = node.late
            if late is not None:
                late = changed(late, late.generation, max(NOW, late.deadline_ns - UNIT))
            after = Node(
                view=normal.view(node.view, NODES[i], self.timing, shift_ns=UNIT),
                host=hosts.later(node.host, UNIT, self.timing, fences_itself=self.s.fences_itself),
                late=late,
                cut=node.cut,
                paused=node.paused,
            )
            return self.nodes.number(after)

        return self._map("later", number, i, do)

    def _store_later(self, number: int) -> int:
        def do() -> int:
            store = self.stores.values[number]
            wait = self.timing.failover_ns // UNIT + 1
            ages = tuple(min(a + 1, 2 * wait) for a in store.member_ages)
            return self.stores.number(store._replace(age=min(store.age + 1, 4 * wait), member_ages=ages))

        return self._map("store", number, 0, do)

    def _renamed(self, store: int, net: Net, node: str, names: dict[str, str]) -> tuple[int, Net]:
        """Give the attempts of `node` that still are pending their new names; the others mean nothing now."""

        value = self.stores.values[store]
        if value.attempt is not None and value.attempt.node == node:
            attempt = self._new(value.attempt, names)
            if attempt != value.attempt:
                store = self.stores.number(value._replace(attempt=attempt))
        request, ghost, answer = net
        if request is not None:
            attempt = self._new(request.attempt, names)
            if attempt is None:
                request, ghost = None, self._ghost(request) or ghost
            elif attempt != request.attempt:
                request = request._replace(attempt=attempt)
        if answer is not None:
            attempt = self._new(answer.attempt, names)
            answer = answer._replace(attempt=attempt) if attempt is not None else None
        return store, Net(request, ghost, answer)

    def _new(self, p: Pending | None, names: dict[str, str]) -> Pending | None:
        return Pending(p.node, names[p.id]) if p is not None and p.id in names else None

    def _ghost(self, r: Request | None) -> Request | None:
        """A write that nobody waits for any more matters while it can still be stored."""
        if r is None or not (r.fresh or not self.s.checks_revision):
            return None
        return r._replace(attempt=None)

    # ------------------------------------------------------------ an agent acts

    def _act(
        self, s: State, i: int, what: str, event: Event | None, *, late: bool = False
    ) -> tuple[str, State, bool]:
        """Node i's agent acts on `event`, which `what` names uniquely for the memory of steps."""
        me, other = self.nodes.values[s.nodes[i]].host, self.nodes.values[s.nodes[1 - i]].host
        streams = other.postgres == "primary" and me.following == NODES[1 - i]
        key = (s.nodes[i], i, s.store, streams, what, late)
        done = self.steps.get(key)
        if done is None:
            events = [event] if event is not None else []
            store, node = self.stores.values[s.store], self.nodes.values[s.nodes[i]]
            done = act(node, NODES[i], store, events, self.s, streams=streams, late=late)
            self.steps[key] = done
        label = f"{NODES[i]} {what}" + (f": {done.label}" if done.label else "")
        return label, self._after(s, i, done), done.ordered

    def _after(self, s: State, i: int, done: Stepped) -> State:
        store_number, net = self._renamed(s.store, self.nets.values[s.nets[i]], NODES[i], dict(done.names))
        if done.request is not None:
            ghost = self._ghost(net.request) or net.ghost
            net = net._replace(request=done.request, ghost=ghost)
            if done.request.attempt is None:
                net = net._replace(request=None, ghost=self._ghost(done.request) or ghost)
        other = s.nodes[1 - i]
        if done.member is not None:
            store = self.stores.values[store_number]
            members = (done.member, store.members[1]) if i == 0 else (store.members[0], done.member)
            ages = (0, store.member_ages[1]) if i == 0 else (store.member_ages[0], 0)
            store_number = self.stores.number(store._replace(members=members, member_ages=ages))
            other = self._peer_written(other, 1 - i)
        node_number = self.nodes.number(done.node)
        net_number = self.nets.number(net)
        return State(
            nodes=(node_number, other) if i == 0 else (other, node_number),
            nets=(net_number, s.nets[1]) if i == 0 else (s.nets[0], net_number),
            store=store_number,
            faults=s.faults,
        )

    # ------------------------------------------------------------ the store writes

    def _stores(self, s: State, i: int, r: Request, rest: Net, what: str) -> Next | None:
        """The store's compare-and-set of node i's write; None: beyond the bound on terms."""
        store = self.stores.values[s.store]
        nodes, nets = s.nodes, [self.nets.values[n] for n in s.nets]
        nets[i] = rest
        if not (r.fresh or not self.s.checks_revision):
            if r.attempt is not None:
                nets[i] = rest._replace(answer=Answer(r.attempt, "refused", 0))
            return f"the store refuses {NODES[i]}'s {what}", self._with(s, nodes, nets, s.store)
        if r.record.term > self.terms:
            self.beyond += 1
            return None
        self._check_write(store, r.record, NODES[i])
        owners = store.owners
        if r.record.term > len(owners):
            old = store.record
            how = "founded" if old is None else "stale" if old.primary is not None else "vacancy"
            if old is not None and old.primary is None and old.successor == NODES[i]:
                how = "handed over"
            owners = (*owners, *[("nobody", "")] * (r.record.term - len(owners) - 1), (NODES[i], how))
        first, second = store.members
        store = store._replace(
            record=r.record,
            attempt=r.attempt,
            age=0,
            members=(normal.behind(first, 1), normal.behind(second, 1)),
            owners=owners,
        )
        nodes = (self._node_behind(nodes[0], 0), self._node_behind(nodes[1], 1))
        for n, net in enumerate(nets):
            request = net.request._replace(fresh=False) if net.request is not None else None
            answer = net.answer
            if answer is not None and answer.revision:
                answer = answer._replace(revision=normal.moved(answer.revision, 1))
            ghost = net.ghost._replace(fresh=False) if net.ghost is not None else None
            nets[n] = Net(request, self._ghost(ghost), answer)
        if r.attempt is not None:
            nets[i] = nets[i]._replace(answer=Answer(r.attempt, "acked", NEWEST))
        said = f"term {r.record.term} {r.record.primary or 'vacant'}"
        after = self._with(s, nodes, nets, self.stores.number(store))
        return f"the store takes {NODES[i]}'s {what}: {said}", after

    def _with(self, s: State, nodes: tuple[int, int], nets: list[Net], store: int) -> State:
        numbers = (self.nets.number(nets[0]), self.nets.number(nets[1]))
        return State(nodes, numbers, store, s.faults)

    # ------------------------------------------------------------ all that may happen next

    def next(self, s: State) -> Iterator[Next]:
        for i in (0, 1):
            yield from self._of_agent(s, i)
            yield from self._of_net(s, i)
            yield from self._of_host(s, i)
            if s.faults:
                yield from self._faults(s, i)
        if s.faults and "ask" in self.kinds:
            yield from self._asks(s)
        if not any(self.s.proves and hosts.overdue(self.nodes.values[n].host) for n in s.nodes):
            nodes = (self._node_later(s.nodes[0], 0), self._node_later(s.nodes[1], 1))
            yield from self._told(
                "-- a second passes", s._replace(nodes=nodes, store=self._store_later(s.store)), (0, 1)
            )

    def _told(self, label: str, s: State, who: tuple[int, ...]) -> Iterator[Next]:
        """The agents that run act at once on what has happened; as a fault their order waits in the socket."""
        states = [(label, s)]
        for i in who:
            states = [after for before in states for after in self._acts(*before, i, "steps", None)]
        yield from states

    def _acts(self, label: str, s: State, i: int, what: str, event: Event | None) -> list[Next]:
        """One agent acts, in each way it can."""
        node = self.nodes.values[s.nodes[i]]
        if node.paused:
            return [(label, s)]
        said, after, ordered = self._act(s, i, what, event)
        states = [(f"{label}; {said}" if label else said, after)]
        if ordered and s.faults and "late" in self.kinds and node.late is None:
            said, after, _ = self._act(s, i, what, event, late=True)
            states.append((f"{label}; {said}" if label else said, after._replace(faults=s.faults - 1)))
        return states

    def _of_agent(self, s: State, i: int) -> Iterator[Next]:
        node, net = self.nodes.values[s.nodes[i]], self.nets.values[s.nets[i]]
        if node.paused:
            again = self._node(s, i, node._replace(paused=False))
            yield from self._told(f"{NODES[i]}'s agent runs again", again, (i,))
            return
        if node.cut:
            yield f"{NODES[i]} reaches the store again", self._node(s, i, node._replace(cut=False))
            return
        store = self.stores.values[s.store]
        if node.view.revision != NEWEST and store.record is not None:
            yield from self._acts(
                "", s, i, "is told by the watch", cluster_seen(store, NODES[i], by_read=False)
            )
        if net.answer is not None:
            a = net.answer
            event = WriteDone(CLUSTER_STATE, a.attempt.id, a.outcome, a.revision)  # type: ignore[arg-type]
            what = f"hears that its write was {a.outcome}"
            key = f"{what} {a.attempt.id} {NEWEST - a.revision}"
            yield from self._acts("", self._net(s, i, net._replace(answer=None)), i, key, event)
        pending = net.request.attempt if net.request is not None else None
        pending = net.answer.attempt if net.answer is not None else pending
        if s.faults and "unknown" in self.kinds and pending is not None:
            rest = self._net(s._replace(faults=s.faults - 1), i, net._replace(answer=None))
            event = WriteDone(CLUSTER_STATE, pending.id, "unknown")
            yield from self._acts("", rest, i, f"hears nothing of its write {pending.id}", event)

    def _node(self, s: State, i: int, node: Node, cost: int = 0) -> State:
        number = self.nodes.number(ranked(node))
        nodes = (number, s.nodes[1]) if i == 0 else (s.nodes[0], number)
        return s._replace(nodes=nodes, faults=s.faults - cost)

    def _net(self, s: State, i: int, net: Net) -> State:
        number = self.nets.number(net)
        return s._replace(nets=(number, s.nets[1]) if i == 0 else (s.nets[0], number))

    def _of_net(self, s: State, i: int) -> Iterator[Next]:
        net = self.nets.values[s.nets[i]]
        if net.request is not None:
            found = self._stores(s, i, net.request, net._replace(request=None), "write")
            if found is not None:
                yield found
        if net.ghost is not None:
            found = self._stores(
                s, i, net.ghost, net._replace(ghost=None), "old write, which nobody waits for"
            )
            if found is not None:
                yield found

    def _of_host(self, s: State, i: int) -> Iterator[Next]:
        node, name = self.nodes.values[s.nodes[i]], NODES[i]
        h = node.host
        if h.effect:
            ended = self._node(s, i, node._replace(host=hosts.ended(h)))
            yield from self._told(f"{name}'s fencer has done its {h.effect}", ended, (i,))
        if h.promoting and h.effect != "activate":
            late = self._node(s, i, node._replace(host=hosts.promoted_late(h)))
            yield from self._told(f"{name}'s cancelled promotion completes", late, (i,))
        if node.late is not None:
            check_claimed(node.late, name, self.stores.values[s.store])
            checks = self.s.checks_generation
            after, refused = hosts.receive(h, name, node.late, self.timing, checks_generation=checks)
            generation = node.late.generation
            label = f"{name}'s fencer receives what waited in the socket: {refused or 'admitted'}"
            event = OrderRefused(generation, refused, "") if refused else None
            told = self._node(s, i, node._replace(host=after, late=None))
            yield from self._acts(label, told, i, f"is refused {generation}" if refused else "steps", event)

    def _faults(self, s: State, i: int) -> Iterator[Next]:
        node, net, name = self.nodes.values[s.nodes[i]], self.nets.values[s.nets[i]], NODES[i]
        h, kinds = node.host, self.kinds
        if "pause" in kinds and not node.paused:
            yield f"FAULT {name}'s agent stands still", self._node(s, i, node._replace(paused=True), 1)
        if "crash" in kinds:
            yield f"FAULT {name}'s agent is killed", self._crashed(s, i, node, net)
        if "host" in kinds:
            gone = node._replace(host=hosts.lost(h, self.timing), late=None)
            yield f"FAULT {name} loses power", self._crashed(s, i, gone, net)
        if "cut" in kinds and not node.cut:
            yield f"FAULT {name} is cut from the store", self._node(s, i, node._replace(cut=True), 1)
        if "postgres" in kinds and h.postgres != "down" and not h.effect:
            died = self._node(s, i, node._replace(host=hosts.died(h)), 1)
            yield from self._told(f"FAULT {name}'s PostgreSQL dies", died, (i,))
        if "fencer" in kinds:
            again = self._node(s, i, node._replace(host=hosts.restarted(h, self.timing)), 1)
            yield from self._told(f"FAULT {name}'s fencer is restarted", again, (i,))
        if "activation" in kinds and h.effect == "activate":
            failed = self._node(s, i, node._replace(host=hosts.failed(h, self.timing)), 1)
            yield from self._told(f"FAULT {name}'s activation fails", failed, (i,))

    def _crashed(self, s: State, i: int, node: Node, net: Net) -> State:
        """Another agent process will start; what the old one has sent is still on its way."""
        node = node._replace(view=fresh_view(NODES[i], self.timing), paused=True)
        store, net = self._renamed(s.store, net, NODES[i], {})
        return self._node(self._net(s._replace(store=store), i, net), i, node, 1)

    def _asks(self, s: State) -> Iterator[Next]:
        store = self.stores.values[s.store]
        c = store.record
        if store.control is None and c is not None and c.primary is not None:
            to = NODES[1 - NODES.index(c.primary)]
            wish = Control(attempt="", switchover=Switchover("s1", to, c.term, "operator"))
            number = self.stores.number(store._replace(control=wish))
            label = f"an operator asks for a switchover to {to}"
            yield label, s._replace(store=number, faults=s.faults - 1)
