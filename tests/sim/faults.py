"""What is done to hosts, links, the store and by operators, and when: drawn ahead as a list, so that it can be shrunk.

Every fault ends by itself within the phase of faults. What a kind does stands in `_begin` and `_end`; whom a cut of the
leader hits is known when it begins, and when a source is orphaned the rejoin says.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from harmony.core.messages import Symptom
from harmony.core.timing import NS
from harmony.records import Switchover
from harmony_fencer.protocol import OperatorFence, Unfence
from tests.sim.setting import Setting, log_uniform

if TYPE_CHECKING:
    from tests.sim.node import Host
    from tests.sim.world import World


@dataclass(frozen=True, slots=True)
class Fault:
    """`name`: the host ("": the store or the cluster); `other`: the other end; `amount`: as the kind has it."""

    at_ns: int
    kind: str
    name: str = ""
    other: str = ""
    span_ns: int = 0
    amount: float = 0.0

    def __str__(self) -> str:
        words = [self.kind, self.name, self.other]
        if self.span_ns:
            words.append(f"for {self.span_ns / NS:.3f} s")
        if self.amount:
            words.append(f"by {self.amount:.3g}")
        return " ".join(w for w in words if w)


# How often each kind is drawn; those of one line are about as likely together as the most likely alone.
HOST = {
    "host-lost": 5, "host-paused": 6, "agent-frozen": 6, "agent-killed": 6, "agent-retired": 3, "harmony-stopped": 3,
    "fencer-killed": 5, "postgres-killed": 6, "postgres-restarted": 2, "postgres-clings": 5, "postgres-fails": 3,
    "promotion-fails": 3, "probe-silent": 4, "host-slow": 3, "foreign": 2, "latch": 3, "fencer-brittle": 3,
    "agent-stalls": 5, "disk-slow": 3, "fsync": 5, "postgres-hangs": 6, "disk-hangs": 3, "backends-crash": 3,
    "promotion-hangs": 3,
}  # fmt: skip
LINK = {
    "cut": 8, "requests-lost": 5, "answers-lost": 5, "watch-dead": 4, "lossy": 6, "acks-lost": 5, "late-writes": 5,
    "slow-link": 5, "stale-reads": 5, "apart": 5,
}  # fmt: skip
STORE = {"election": 9, "store-down": 4, "clock-jump": 6, "switchover": 9, "acknowledge": 2}
SYMPTOMS: tuple[Symptom, ...] = ("silent", "closed", "stopped", "stalled")
LOSSES = {"rolled-back": 3, "made-anew": 2}


def draw(seed: int, s: Setting) -> list[Fault]:
    """The faults of a seed. Each run has some kinds only, so that rare ones meet each other (swarm testing)."""
    r = random.Random(f"faults {seed}")
    share = r.choice((0.25, 0.5, 1.0))
    kinds = {k: w for k, w in (HOST | LINK | STORE).items() if r.random() < share}
    if r.random() < 0.15:
        kinds |= LOSSES
        kinds |= {"postgres-fails": 6, "latch": 4}  # who is accepting then is not leading or following yet
    if not kinds:
        kinds = {"cut": 1}
    t = s.timing
    pause_ns = t.failover_ns * r.choice((0.3, 0.7, 1.5))
    hard = r.choice((0.1, 0.4))
    clinging = r.random() < 0.3
    found: list[Fault] = []
    if r.random() < 0.05:
        found.append(Fault(1, "latch", s.names[0], span_ns=round(t.failover_ns * r.random()) + 1))
    found += _successions(seed, s)
    at = round(t.interval_ns * r.uniform(0, 6))
    while True:
        kind = r.choices(list(kinds), list(kinds.values()))[0]
        name = r.choice(s.names)
        span = round(log_uniform(r, t.interval_ns * 0.1, t.failover_ns * 2.5))
        other = r.choice([n for n in s.names if n != name])
        if kind == "election":
            span = round(r.uniform(4, 9) * max(1.0, t.failover_timeout_s / 15) * NS)
        if kind in {"agent-killed", "foreign"}:
            span = round(span * 0.3)
        if kind not in _SPANS:
            span = 0
        if kind in STORE and kind != "switchover":
            name = ""
        if kind in {"switchover", "apart"}:
            name, other = (r.choice((*s.names, "")), "") if kind == "switchover" else (name, other)
        else:
            other = ""
        if kind in LOSSES:
            name = ""
        amount = _amount(r, kind, s)
        at += 1 + round(r.expovariate(1 / pause_ns))
        if at + span >= s.faults_ns:
            return found
        found.append(Fault(at, kind, name, other, span, amount))
        if kind in LOSSES and r.random() < 0.4:  # while the preferred primary is fenced and waits
            span = t.failover_ns + 3 * t.lease_ns
            before = max(1, at - t.failover_ns)
            if before + span < s.faults_ns:
                found.append(Fault(before, "latch", s.names[0], span_ns=span))
        if kind == "switchover" and clinging:  # whoever demotes then cannot prove it
            span = round(r.uniform(2, 8) * t.interval_ns) + t.stop_ns
            found += [
                Fault(at, "postgres-clings", n, span_ns=span) for n in s.names if at + span < s.faults_ns
            ]
        if r.random() < hard:  # a second one hard upon it
            at -= round(pause_ns * r.random() * 0.2)
            at = max(0, at)


def _successions(seed: int, s: Setting) -> list[Fault]:
    """Aimed, in some runs: who leads is cut off, has to be rejoined once back, and who leads then is lost meanwhile."""
    r = random.Random(f"successions {seed}")
    if r.random() >= 0.1:
        return []
    most = s.timing.failover_ns
    cuts = [(r.uniform(8, s.faults_ns / most), r.uniform(1.1, 2.5)) for _ in range(3)]
    found = [Fault(round(at * most), "leader-cut", span_ns=round(span * most)) for at, span in cuts]
    found.append(Fault(1, "orphans", span_ns=s.faults_ns - 3 * most))
    return [f for f in found if f.at_ns + f.span_ns < s.faults_ns]


def orphan(world: World, source: str) -> int:
    """A rejoin from `source` is at work, which has but a while to lead; ns that the rejoin takes beyond its usual."""
    if not world.orphans or world.network.links[source].requests:
        return 0
    span = 2 * world.setting.timing.failover_ns
    begin(world, Fault(world.now, "requests-lost", source, span_ns=span))
    return span


def _amount(r: random.Random, kind: str, s: Setting) -> float:
    match kind:
        case "lossy" | "acks-lost" | "late-writes":
            return r.choice((0.1, 0.3, 0.7))
        case "slow-link":
            return s.timing.timeout_ns / s.latency_ns * r.uniform(0.2, 1.2)
        case "stale-reads":
            return s.timing.failover_timeout_s * r.uniform(0.1, 1.5)
        case "clock-jump":
            return s.timing.failover_timeout_s * r.uniform(-2.5, 2.5)
        case "host-slow":
            return r.uniform(1.5, 5)
        case "disk-slow":
            return s.timing.fence_timeout_s * r.uniform(0.3, 2)
        case "agent-stalls":
            return s.timing.failover_timeout_s * r.uniform(0.9, 2.2)
        case "postgres-hangs":
            return float(r.randrange(len(SYMPTOMS)))
        case "agent-retired" | "foreign" | "made-anew":
            return r.choice((0.0, 1.0))
        case "rolled-back":
            return float(r.randrange(1, 50))
        case _:
            return 0.0


_SPANS = frozenset(
    {"host-lost", "host-paused", "agent-frozen", "agent-killed", "postgres-clings", "postgres-fails",
     "promotion-fails", "probe-silent", "host-slow", "foreign", "latch", "fencer-brittle", "agent-stalls", "disk-slow",
     "fsync", "postgres-hangs", "promotion-hangs", "disk-hangs", "backends-crash", "election",
     "store-down", *LINK}
)  # fmt: skip


def begin(world: World, f: Fault) -> None:
    """It happens; its end is put down for later."""
    if f.kind == "leader-cut":
        cluster = world.store.cluster
        if cluster is None or cluster.primary is None:
            return
        f = replace(f, kind="cut", name=cluster.primary)
    world.say(f"FAULT {f}")
    end = _begin(world, f)
    if end and f.span_ns:
        world.at(f.span_ns, _over, world, f)


def _over(world: World, f: Fault) -> None:
    world.say(f"      {f.kind} {f.name} {f.other}".rstrip() + " is over")
    _end(world, f)


def _begin(world: World, f: Fault) -> bool:
    """Whether it has begun: there is an end to come."""
    if f.kind in LINK:
        _link(world, f, 1)
    elif f.name and f.kind != "switchover":
        return _host(world, f)
    else:
        _store(world, f)
    return True


def _end(world: World, f: Fault) -> None:
    if f.kind in LINK:
        _link(world, f, -1)
        return
    if f.kind in {"election", "store-down"}:
        world.store.down -= 1
        world.store.reconnect()
        return
    if f.kind == "orphans":
        world.orphans -= 1
        return
    host = world.hosts[f.name]
    fencer, pg = host.fencer, host.pg
    match f.kind:
        case "host-lost":
            host.back()
        case "host-paused":
            host.resume()
        case "agent-frozen" | "agent-killed":
            host.let_agent_go()
        case "postgres-clings":
            host.pg.clinging -= 1
        case "postgres-fails":
            host.pg_fails -= 1
        case "promotion-fails":
            host.promotion_fails -= 1
        case "probe-silent":
            host.probe_silent -= 1
        case "postgres-hangs":
            pg.suffer("")
        case "promotion-hangs":
            host.promotion_hangs -= 1
            pg.suffer("")
        case "disk-hangs":
            _hang_disk(host, -1)
        case "backends-crash":
            host.crash_loop -= 1
        case "fencer-brittle":
            fencer.brittle -= 1
        case "agent-stalls":
            host.stall_ns = 0
        case "fsync":
            host.fsync -= 1
        case "host-slow":
            host.slow /= f.amount
        case "disk-slow":
            host.disk_ns -= round(f.amount * NS)
        case "foreign":
            host.foreign -= 1
            fencer.bell()
            host.later(0, host.start_agent, host.life)
        case "latch":
            if host.up and not host.paused:
                fencer.asked(Unfence(who="operator"), "root")
        case _:
            raise ValueError(f"unknown fault {f.kind!r}")


def _host(world: World, f: Fault) -> bool:
    host = world.hosts[f.name]
    pg, fencer = host.pg, host.fencer
    here = host.up and not host.paused
    match f.kind:
        case "host-lost":
            host.lose()
        case "host-paused":
            if not (here and fencer.alive):  # a host without its fencer must not fall asleep: an assumption
                return False
            host.pause()
        case "agent-frozen":
            host.hold_agent(end=False)
        case "agent-killed":
            host.hold_agent(end=True)
        case "agent-retired":
            host.retire(hand_over=f.amount == 0, fencer_too=False)
        case "harmony-stopped":
            host.retire(hand_over=True, fencer_too=True)
        case "fencer-killed":
            host.kill_fencer()
        case "postgres-killed":
            if here:
                host.pg_die(pg.run)
        case "postgres-restarted":  # by a careless hand: as a standby, as the fence left it
            if here and pg.mode == "primary" and not (pg.halted or fencer.busy):
                pg.die()
                pg.start(None)
        case "postgres-clings":
            pg.clinging += 1
        case "postgres-fails":
            host.pg_fails += 1
        case "promotion-fails":
            host.promotion_fails += 1
        case "probe-silent":
            host.probe_silent += 1
        case "postgres-hangs":
            if pg.gone:
                return False
            pg.suffer(SYMPTOMS[round(f.amount)])
        case "promotion-hangs":  # what becomes writable hangs at once, before anybody has asked it anything
            host.promotion_hangs += 1
        case "disk-hangs":
            _hang_disk(host, 1)
        case "backends-crash":
            host.crash_loop += 1
        case "fencer-brittle":  # it dies right after each fence that it has proven
            fencer.brittle += 1
        case "agent-stalls":  # it is stopped, for some time, right when it has its promotion ordered
            host.stall_ns = round(f.amount * NS)
        case "host-slow":
            host.slow *= f.amount
        case "disk-slow":  # for what the fencer keeps of an order, ahead of carrying it out
            host.disk_ns += round(f.amount * NS)
        case "fsync":  # of a checkpoint; so long it learns of no new configuration
            host.fsync += 1
        case "foreign":  # a data directory that was put in place of the right one, while nothing wrote
            if pg.mode == "primary" or fencer.active is not None or world.store.cluster is None:
                return False  # whose data founds the cluster is no stranger's: the others' would be
            host.foreign += 1
            fencer.bell()
            if f.amount:
                host.end_agent()
                host.later(0, host.start_agent, host.life)
        case "latch":
            if here:
                fencer.asked(OperatorFence(reason="drill", who="operator"), "root")
        case _:
            raise ValueError(f"unknown fault {f.kind!r}")
    return True


def _hang_disk(host: Host, by: int) -> None:
    """Begin (1) or end (-1): nothing is written, nothing can be killed or started."""
    if host.pg.accepting:
        host.pg.write()
    host.disk_hangs += by
    host.pg.clinging += by
    host.pg_fails += by
    host.world.checks.look(host)


def _link(world: World, f: Fault, by: int) -> None:
    """Begin (1) or end (-1) what is done to a link."""
    link = world.network.links[f.name]
    match f.kind:
        case "cut":
            link.requests += by
            link.answers += by
            for other in world.hosts[f.name].others:
                world.network.part(f.name, other, by)
        case "requests-lost":
            link.requests += by
        case "answers-lost":
            link.answers += by
        case "watch-dead":
            link.watch += by
        case "lossy":
            link.lost = max(0.0, link.lost + by * f.amount)
        case "acks-lost":
            link.acks_lost = max(0.0, link.acks_lost + by * f.amount)
        case "late-writes":
            link.late = max(0.0, link.late + by * f.amount)
            link.late_ns = 2 * world.setting.timing.failover_ns
        case "slow-link":
            link.slow = f.amount if by > 0 else 1.0
        case "stale-reads":
            link.stale_ns = round(f.amount * NS) if by > 0 else 0
        case "apart":
            world.network.part(f.name, f.other, by)
    if by < 0:
        world.store.connected(world.hosts[f.name])


def _store(world: World, f: Fault) -> None:
    store = world.store
    match f.kind:
        case "election" | "store-down":
            store.down += 1
        case "orphans":  # a rejoin's source loses the store, and the rejoin takes longer than that
            world.orphans += 1
        case "clock-jump":
            store.jump_ns += round(f.amount * NS)
        case "switchover":
            cluster = store.cluster
            if cluster is not None and not store.down:
                world.wishes += 1
                name = f"w{world.wishes}"
                wish = Switchover(id=name, to=f.name or None, term=cluster.term, who="operator")
                store.wish(msgspec.structs.replace(store.control, attempt=name, switchover=wish))
        case "acknowledge":
            world.acknowledge()
        case "rolled-back":
            store.roll_back(round(f.amount))
            world.at(2 * world.setting.timing.lease_ns, world.accept_soon)
        case "made-anew":
            if f.amount:  # at the worst moment
                store.doomed = True
            else:
                store.make_anew()
            world.at(2 * world.setting.timing.lease_ns, world.accept_soon)
        case _:
            raise ValueError(f"unknown fault {f.kind!r}")
