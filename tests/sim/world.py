"""A model of hosts, fencers, PostgreSQL, network and store around the *real* decision core.

Deterministic from a seed: one event queue, one random.Random, no wall clock. The invariants I1 to I4
are checked at every change; after `heal_at` everything works again and I5 (liveness) is checked.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from harmony.core.messages import (
    ClusterSeen,
    Command,
    Connected,
    DbSeen,
    DbSilent,
    Event,
    Fatal,
    FencerSeen,
    FencerSilent,
    FencerView,
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
from harmony.core.timing import NS, PRESETS, Timing
from harmony.core.view import Identity, View
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, ClusterState, Member

MS = NS // 1000
NAMES = ("n1", "n2", "n3")


class Violation(AssertionError):
    """An invariant was broken; the message names it."""


@dataclass(frozen=True)
class Rules:
    """What the model enforces on the real system's side; a test breaks one on purpose."""

    fencer_checks_generation: bool = True
    fencer_checks_lease: bool = True
    fencer_proves: bool = True
    store_checks_revision: bool = True


@dataclass
class Postgres:
    mode: str = "down"  # down, standby, primary
    wal: list[int] = field(default_factory=list)
    timeline: int = 1
    forks: dict[int, int] = field(default_factory=dict)  # timeline -> position where it began
    following: str | None = None
    signal: bool = False  # standby.signal


@dataclass
class Fencer:
    highest: tuple[int, int] = (0, 0)
    active: tuple[int, int] | None = None
    deadline: int = 0
    order: Order | None = None
    state: str = ""
    detail: str = ""
    proven: bool = False
    job: int = 0
    self_fencing: bool = False


@dataclass
class Host:
    name: str
    me: Identity
    rate: float
    offset: int
    view: View
    pg: Postgres = field(default_factory=Postgres)
    fencer: Fencer = field(default_factory=Fencer)
    events: list[Event] = field(default_factory=list)
    up: bool = True
    frozen: bool = False
    cut: bool = False  # from the store
    life: int = 0


class World:
    """Three hosts and a store. `run()` returns the trace; raises Violation."""

    def __init__(
        self, seed: int, *, rules: Rules = Rules(), timing: Timing = PRESETS["fast"], drift: float = 1e-3
    ) -> None:
        self.random = random.Random(seed)
        self.rules, self.t = rules, timing
        self.now = 0
        self.queue: list[tuple[int, int, Callable[[], None]]] = []
        self.serial = 0
        self.data: dict[str, tuple[ClusterState | Member, int, int]] = {}
        self.revision = 0
        self.store_up = True
        self.store_jump = 0
        self.claims: set[tuple[int, str]] = set()
        self.acked: list[int] = []
        self.next_row = 0
        self.trace: list[str] = []
        self.healing = False
        self.rows_hit: set[int] = set()
        self.hosts: dict[str, Host] = {}
        for n in NAMES:
            me = Identity(n, "sim", n == "n1", NAMES, 1, 0, False, 100, f"{n}a", "boot", "sim")
            r = self.random
            self.hosts[n] = Host(n, me, 1 + r.uniform(-drift, drift), r.randrange(10**6) * NS, initial(me))
            self.at(r.randrange(50) * MS, lambda n=n: self.tick(n))

    # -------------------------------------------------------- machinery

    def at(self, delay: int, what: Callable[[], None]) -> None:
        self.serial += 1
        heapq.heappush(self.queue, (self.now + delay, self.serial, what))

    def say(self, text: str) -> None:
        self.trace.append(f"{self.now / NS:8.3f} {text}")

    def boot(self, h: Host) -> int:
        return h.offset + int(self.now * h.rate)

    def local(self, h: Host, at_boot: int) -> int:
        """Real delay until this host's boot clock shows `at_boot`."""
        return max(0, int((at_boot - self.boot(h)) / h.rate) + 1)

    def script(self, events: list[tuple[float, str, str]], end_s: float) -> None:
        """Run without chance: only the given faults (seconds, what, node), nothing lost or late."""
        self.healing = True
        self.at(20 * MS, self.client)
        for at_s, what, name in events:
            self.at(round(at_s * NS), lambda what=what, name=name: self.scripted(what, name))
        while self.queue and self.queue[0][0] <= end_s * NS:
            self.now, _, do = heapq.heappop(self.queue)
            do()

    def scripted(self, what: str, name: str) -> None:
        self.say(f"FAULT {what} {name}".rstrip())
        h = self.hosts.get(name, next(iter(self.hosts.values())))
        match what:
            case "host-lost":
                h.up, h.pg.mode = False, "down"
            case "host-back":
                self.reboot(h)
            case "agent-frozen":
                h.frozen = True
            case "agent-thawed":
                h.frozen = False
            case "agent-restarted":
                self.restart_agent(h)
            case "cut":
                h.cut = True
            case "uncut":
                self.uncut(h)
            case "postgres-killed":
                h.pg.mode = "down"
            case "store-down":
                self.store_up = False
            case "store-back":
                self.store_back()
            case _:
                raise ValueError(f"unknown fault {what!r}")

    def run(self, faults_s: float = 14.0, heal_s: float = 26.0) -> None:
        self.at(20 * MS, self.client)
        self.at(3 * NS, self.fault)
        self.at(int(faults_s * NS), self.heal)
        end = int((faults_s + heal_s) * NS)
        while self.queue and self.queue[0][0] <= end:
            self.now, _, what = heapq.heappop(self.queue)
            what()
        writable = [h.name for h in self.hosts.values() if h.pg.mode == "primary"]
        if len(writable) != 1:
            raise Violation(f"I5: {heal_s} s after healing the writable primaries are {writable}")

    # -------------------------------------------------------- the agent

    def tick(self, n: str) -> None:
        h = self.hosts[n]
        self.at(100 * MS, lambda: self.tick(n))
        if not h.up or h.frozen:
            return
        self.step(h)

    def step(self, h: Host) -> None:
        h.events.append(self.seen_fencer(h))
        if h.pg.mode == "down":
            h.events.append(DbSilent("down"))
        else:
            h.events.append(
                DbSeen(
                    h.pg.mode,
                    h.pg.timeline,
                    len(h.pg.wal),
                    len(h.pg.wal),
                    self.streams(h),
                    "sys",
                    self.boot(h),
                )
            )
        events, h.events = h.events, []
        h.view, commands = step(h.view, events, h.me, self.t, self.boot(h))
        self.rows_hit.add(h.view.row)
        for c in commands:
            self.carry_out(h, c)

    def carry_out(self, h: Host, c: Command) -> None:
        life = h.life
        match c:
            case Log(row=row, before=before, after=after, why=why):
                if before != after:
                    self.say(f"{h.name} {before} -> {after} [{row}] {why}")
            case Fatal(why=why):
                raise Violation(f"{h.name} fatal: {why}")
            case Order():
                self.at(self.random.randrange(1, 10) * MS, lambda: self.order(h, c, life))
            case Renew():
                self.at(self.random.randrange(1, 10) * MS, lambda: self.renew(h, c))
            case Write():
                self.write(h, c, life)
            case Read(key=key):
                self.exchange(h, life, lambda: self.seen(key), ReadFailed(key))
            case Refresh():
                self.refresh(h, life)

    def post(self, h: Host, life: int, e: Event) -> None:
        if h.life != life or not h.up:
            return
        h.events.append(e)
        if not h.frozen:
            self.step(h)

    def latency(self) -> int:
        return self.random.randrange(1, 8) * MS

    def exchange(self, h: Host, life: int, ask: Callable[[], Event], failed: Event) -> None:
        lost = h.cut or not self.store_up or (not self.healing and self.random.random() < 0.02)
        if lost:
            self.at(500 * MS, lambda: self.post(h, life, failed))
            return
        go, back = self.latency(), self.latency()

        def arrive() -> None:
            if self.store_up:
                answer = ask()
                self.at(back, lambda: self.post(h, life, answer))
            else:
                self.at(400 * MS, lambda: self.post(h, life, failed))

        self.at(go, arrive)

    def seen(self, key: str) -> Event:
        found = self.data.get(key)
        if key == CLUSTER_STATE:
            if found is None:
                return ClusterSeen(None, 0, 0, by_read=True)
            assert isinstance(found[0], ClusterState)
            return ClusterSeen(found[0], found[1], found[2], by_read=True)
        name = key.removeprefix(MEMBER_PREFIX)
        if found is None:
            return MemberSeen(name, None, 0, 0)
        assert isinstance(found[0], Member)
        return MemberSeen(name, found[0], found[1], found[2])

    def refresh(self, h: Host, life: int) -> None:
        keys = [MEMBER_PREFIX + h.name, CLUSTER_STATE, *(MEMBER_PREFIX + n for n in NAMES if n != h.name)]
        if h.cut or not self.store_up or (not self.healing and self.random.random() < 0.02):
            self.at(500 * MS, lambda: self.post(h, life, RefreshDone(ok=False)))
            return
        delay = 0
        for key in keys:
            delay += self.latency()
            self.at(delay, lambda key=key: self.post(h, life, self.seen(key)))
        self.at(delay + 1, lambda: self.post(h, life, RefreshDone(ok=True)))

    def write(self, h: Host, w: Write, life: int) -> None:
        def failed() -> None:
            self.post(h, life, WriteDone(w.key, w.attempt, "unknown"))

        roll = 1.0 if self.healing else self.random.random()
        timeout = max(1, w.timeout_ns)
        if h.cut or not self.store_up or roll < 0.02:  # never arrives
            self.at(min(timeout, 500 * MS), failed)
        elif roll < 0.04:  # arrives late, long after it was given up
            self.at(min(timeout, 500 * MS), failed)
            self.at(self.random.randrange(100, 3000) * MS, lambda: self.store_write(w))
        elif roll < 0.06:  # stored, but the acknowledgement is lost
            self.at(self.latency(), lambda: self.store_write(w))
            self.at(min(timeout, 500 * MS), failed)
        else:

            def arrive() -> None:
                revision = self.store_write(w)
                answer = WriteDone(w.key, w.attempt, "acked" if revision else "refused", revision)
                self.at(self.latency(), lambda: self.post(h, life, answer))

            self.at(self.latency(), arrive)

    def store_write(self, w: Write) -> int:
        """The store's compare-and-set: the new revision, or 0 (refused, or the store is down)."""
        current = self.data[w.key][1] if w.key in self.data else 0
        if not self.store_up or (current != w.revision and self.rules.store_checks_revision):
            return 0
        self.revision += 1
        stamp = 10**18 + self.now + self.store_jump
        self.data[w.key] = (w.record, self.revision, stamp)
        if isinstance(w.record, ClusterState) and w.record.primary is not None:
            self.claims.add((w.record.term, w.record.primary))
        for h in self.hosts.values():  # the watch; sometimes it says nothing
            if h.up and not h.cut and self.random.random() < 0.9:
                event = self.seen(w.key)
                if isinstance(event, ClusterSeen):
                    event = replace(event, by_read=False)
                self.at(self.latency(), lambda h=h, event=event, life=h.life: self.post(h, life, event))
        return self.revision

    # -------------------------------------------------------- the fencer and PostgreSQL

    def seen_fencer(self, h: Host) -> Event:
        f = h.fencer
        if not h.up:
            return FencerSilent("down")
        return FencerSeen(
            FencerView(
                fencer_id=f"id-{h.name}",
                trusted=True,
                detail="",
                highest=f.highest,
                active=f.active,
                lease_deadline_ns=f.deadline if f.active else None,
                order=f.order.generation if f.order else None,
                order_op=f.order.op if f.order else "",
                order_state=f.state,  # type: ignore[arg-type]
                order_detail=f.detail,
                fence_proven=f.proven,
                postgres_up=h.pg.mode != "down",
                following=h.pg.following if h.pg.mode == "standby" else None,
                is_standby=h.pg.signal,
                system_identifier="sys",
                latched=None,
            )
        )

    def order(self, h: Host, o: Order, life: int) -> None:
        f = h.fencer
        if not h.up:
            return
        refusal = ""
        if self.rules.fencer_checks_generation and o.generation <= f.highest:
            refusal = "stale_generation"
        elif o.op == "activate" and self.rules.fencer_checks_lease and o.deadline_ns <= self.boot(h):
            refusal = "lease_expired"
        if refusal:
            self.post(h, life, OrderRefused(o.generation, refusal, "model"))
            return
        if f.job and f.state == "running":
            f.state = "preempted"
        f.highest = max(f.highest, o.generation)
        f.order, f.state, f.detail, f.proven = o, "running", "", False
        f.job += 1
        job = f.job
        if o.op != "activate":
            f.active = None
        if o.op == "activate":
            term = o.generation[0]
            if (term, h.name) not in self.claims:
                raise Violation(f"I4: {h.name} activates term {term} that it never won")
            f.active = o.generation
            f.deadline = min(o.deadline_ns, self.boot(h) + self.t.lease_ns)
            self.arm(h)
            self.at(self.random.randrange(50, 500) * MS, lambda: self.activated(h, job))
        elif o.op == "fence":
            self.teardown(h, job, lambda: self.fenced(h, job))
        elif h.pg.mode == "primary":
            self.teardown(h, job, lambda: self.follow(h, job, o))
        else:
            self.at(self.random.randrange(50, 300) * MS, lambda: self.follow(h, job, o))

    def teardown(self, h: Host, job: int, then: Callable[[], None]) -> None:
        """PostgreSQL goes on writing until the ladder has it: at the latest at the end of its budget."""

        def gone() -> None:
            if h.up and h.fencer.job == job:
                h.pg.mode, h.pg.signal = "down", True
                then()

        if not self.rules.fencer_proves:  # a fencer that believes its own orders
            then()
            self.at(
                self.t.stop_ns * 4, lambda: setattr(h.pg, "mode", "down") if h.fencer.job == job else None
            )
            return
        self.at(self.random.randrange(10, int(self.t.fence_timeout_s * 1000)) * MS, gone)

    def fenced(self, h: Host, job: int) -> None:
        f = h.fencer
        if f.job == job:
            f.proven, f.self_fencing = True, False
            if f.state == "running":
                f.state = "done"

    def follow(self, h: Host, job: int, o: Order) -> None:
        if h.up and h.fencer.job == job:
            h.pg.mode, h.pg.signal, h.pg.following = "standby", True, o.primary
            h.fencer.state = "done"

    def activated(self, h: Host, job: int) -> None:
        f = h.fencer
        if not h.up or f.job != job or f.active is None:
            return
        missing = [row for row in self.acked if row not in set(h.pg.wal)]
        if missing:
            raise Violation(f"I2: {h.name} becomes primary without acknowledged rows {missing[:5]}")
        h.pg.timeline = max(x.pg.timeline for x in self.hosts.values()) + 1
        h.pg.mode, h.pg.signal, h.pg.following = "primary", False, None
        f.state = "done"
        self.say(f"{h.name} WRITABLE, generation {f.active}, timeline {h.pg.timeline}")
        self.check_single()

    def check_single(self) -> None:
        writable = [h.name for h in self.hosts.values() if h.pg.mode == "primary"]
        if len(writable) > 1:
            raise Violation(f"I1: two writable primaries: {writable}")

    def renew(self, h: Host, r: Renew) -> None:
        f = h.fencer
        if not h.up or f.active != r.generation or self.boot(h) >= f.deadline:
            return
        f.deadline = max(f.deadline, min(r.deadline_ns, self.boot(h) + self.t.lease_ns))
        self.arm(h)

    def arm(self, h: Host) -> None:
        self.at(self.local(h, h.fencer.deadline), lambda: self.expire(h))

    def expire(self, h: Host) -> None:
        f = h.fencer
        if not h.up or f.active is None or self.boot(h) < f.deadline or not self.rules.fencer_checks_lease:
            return
        self.say(f"{h.name} lease over: the fencer fences by itself")
        f.active, f.self_fencing = None, True
        if f.state == "running":
            f.state = "preempted"
        f.job += 1
        job = f.job
        self.teardown(h, job, lambda: self.fenced(h, job))

    # -------------------------------------------------------- replication and the client

    def streams(self, h: Host) -> bool:
        """A standby streams when its primary writes and its own WAL is a prefix of the primary's."""
        p = self.hosts.get(h.pg.following or "")
        if h.pg.mode != "standby" or p is None or not p.up or p.pg.mode != "primary":
            return False
        return p.pg.wal[: len(h.pg.wal)] == h.pg.wal

    def client(self) -> None:
        self.at(self.random.randrange(100, 300) * MS, self.client)
        for h in self.hosts.values():
            if h.up and h.pg.mode == "primary":
                self.next_row += 1
                row = self.next_row
                h.pg.wal.append(row)
                for s in self.hosts.values():
                    if s is not h and s.up and self.streams(s) and self.random.random() < 0.8:
                        self.at(
                            self.random.randrange(1, 30) * MS,
                            lambda h=h, s=s, row=row: self.shipped(h, s, row),
                        )

    def shipped(self, h: Host, s: Host, row: int) -> None:
        if not (h.up and s.up and self.streams(s) and s.pg.following == h.name):
            return
        s.pg.wal, s.pg.timeline = list(h.pg.wal), h.pg.timeline
        for r in s.pg.wal[s.pg.wal.index(row) :]:
            if r not in self.acked:
                self.acked.append(r)  # one of two voters has flushed it: the client sees the commit

    # -------------------------------------------------------- faults

    def fault(self) -> None:
        if self.healing:
            return
        r = self.random
        self.at(r.randrange(500, 4000) * MS, self.fault)
        h = self.hosts[r.choice(NAMES)]
        kind = r.choice(["cut", "freeze", "agent", "host", "postgres", "store", "clock"])
        long = r.randrange(200, 7000) * MS
        self.say(f"FAULT {kind} {h.name} for {long / NS:.1f} s")
        if kind == "cut":
            h.cut = True
            self.at(long, lambda: self.uncut(h))
        elif kind == "freeze":
            h.frozen = True
            self.at(long, lambda: setattr(h, "frozen", False))
        elif kind == "agent":
            self.restart_agent(h)
        elif kind == "host" and h.up:
            h.up = False
            h.pg.mode = "down"
            self.at(long, lambda: self.reboot(h))
        elif kind == "postgres" and h.pg.mode != "down" and h.fencer.state != "running":
            h.pg.mode = "down"
        elif kind == "store":
            self.store_up = False
            self.at(long, self.store_back)
        elif kind == "clock":
            self.store_jump += r.randrange(-8000, 8000) * MS

    def uncut(self, h: Host) -> None:
        h.cut = False
        h.events.append(Connected())

    def store_back(self) -> None:
        self.store_up = True
        for h in self.hosts.values():
            h.events.append(Connected())

    def restart_agent(self, h: Host) -> None:
        h.life += 1
        h.me = replace(h.me, instance=f"{h.name}-{h.life}")
        h.view, h.events, h.frozen = initial(h.me), [], False

    def reboot(self, h: Host) -> None:
        if h.up:
            return
        h.up = True
        h.offset = self.random.randrange(10**6) * NS
        f = h.fencer
        f.active, f.deadline, f.state, f.order, f.proven = None, 0, "", None, False
        f.job += 1
        h.pg.signal = True
        self.restart_agent(h)

    def heal(self) -> None:
        self.say("HEAL")
        self.healing = True
        self.store_back()
        for h in self.hosts.values():
            h.frozen = False
            self.uncut(h)
            self.reboot(h)


def diverged(world: World) -> bool:
    """Whether some node holds rows that the primary lacks: it needs pg_rewind, which comes later."""
    primaries = [h for h in world.hosts.values() if h.pg.mode == "primary"]
    return any(h.pg.wal != p.pg.wal[: len(h.pg.wal)] for p in primaries for h in world.hosts.values())
