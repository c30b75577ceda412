"""A model of PostgreSQL on one host, of streaming replication, and of the clients that write inside each host.

WAL is a tree of branches: a promotion begins a branch. Left alone, PostgreSQL takes the next timeline *number* that its
node knows of, so that two nodes can begin two branches with one number; nothing compares branches but this model.
A position on a branch stands for all before it.

An acknowledged commit (synchronous) is one that PostgreSQL's processes call so, by the rules that each of them has
loaded (waiting.py), while the primary still runs. It decides nothing and fences nothing: who starts, stops and
promotes it is the fencer's model.
Who has WAL that its primary does not have cannot stream until it is rejoined (rejoin.py), by a rewind only once that
has a checkpoint on its timeline. A standby makes no restartpoints.
What a real PostgreSQL could also do and this one does not: lose what it has flushed, or stream from a standby.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from harmony.core.messages import Symptom
from harmony.core.sync import HOLD, NOBODY, Rule
from tests.sim.checks import Violation
from tests.sim.waiting import CHECKPOINTER, MAIN, Waiting

if TYPE_CHECKING:
    from tests.sim.node import Host

Mode = Literal["down", "standby", "primary"]
CHECKPOINT_TIMEOUTS = 20  # times failover_timeout, at most, until the first checkpoint after a promotion
CHECKPOINT = 120  # bytes of a shutdown checkpoint's record


class Branch:
    """WAL from `begin` on, written by one primary after one promotion."""

    __slots__ = ("begin", "parent", "timeline", "who")

    def __init__(self, timeline: int, parent: Branch | None, begin: int, who: str) -> None:
        self.timeline, self.parent, self.begin, self.who = timeline, parent, begin, who


def reaches(branch: Branch | None, end: int, other: Branch, lsn: int) -> bool:
    """Whether WAL that ends on `branch` at `end` holds `other` up to `lsn`."""
    while branch is not None:
        if branch is other:
            return end >= lsn
        end = min(end, branch.begin)
        branch = branch.parent
    return False


class Postgres:
    """One data directory and, unless it is down, its processes."""

    def __init__(self, host: Host, root: Branch) -> None:
        self.host = host
        self.mode: Mode = "down"
        self.branch, self.end = root, 1000
        self.following: str | None = None
        self.signal = False  # standby.signal
        self.run = 0  # of its processes: what was begun for older ones means nothing
        self.halted = False  # told to freeze
        self.frozen = False  # and frozen
        self.closing = False  # a clean shutdown has ended its sessions
        self.clinging = 0  # faults: its processes cannot be killed
        self.hung: Symptom = ""  # faults: what these processes suffer from
        self.spent = False  # frozen and killed, and not gone: none of them runs another instruction
        self.waiting = Waiting(NOBODY)
        self.connection = 0  # number of the newest to a primary
        self.checkpointed = root.timeline  # of its newest checkpoint, by its control file
        self.term = 0  # of the generation that made it writable
        self.unfinished = (
            False  # a rewind is under way here, or was: it has neither its own data nor another's
        )

    @property
    def gone(self) -> bool:
        """No process is left."""
        return self.mode == "down"

    @property
    def suffers(self) -> Symptom:
        """What a look at it would see."""
        return "silent" if self.host.disk_hangs else self.hung

    @property
    def stuck(self) -> bool:
        """Whether nothing of it gets anywhere. Old sessions do below a stopped postmaster."""
        return self.suffers in {"silent", "stalled"}

    @property
    def accepting(self) -> bool:
        """Whether a client that is here can commit something at this moment."""
        stands = self.frozen or self.closing or self.stuck or self.host.paused
        return self.mode == "primary" and not stands and self.host.up

    def suffer(self, symptom: Symptom) -> None:
        """From now on; "": no more."""
        if self.accepting:
            self.write()
        self.hung = symptom
        self.host.world.checks.look(self.host)

    @property
    def early(self) -> bool:
        """A primary without a checkpoint on its timeline."""
        return self.mode == "primary" and self.checkpointed < self.branch.timeline

    @property
    def could_write(self) -> bool:
        return not self.signal or self.mode == "primary"

    @property
    def where(self) -> str:
        return f"timeline {self.branch.timeline} of {self.branch.who}, position {self.end}"

    def has(self, branch: Branch, lsn: int) -> bool:
        return reaches(self.branch, self.end, branch, lsn)

    # ------------------------------------------------------------ what is done to it

    def start(self, following: str | None, rule: Rule | None = None) -> None:
        """As a standby: it never starts otherwise (ADR 002). Without a `rule` of its own it confirms no commit."""
        self.run += 1
        self.connection += 1
        holds = self.host.world.setting.sync_mode != "off" and self.host.world.rules.standbys_hold
        self.waiting = Waiting(rule if rule is not None else HOLD if holds else NOBODY)
        self.mode, self.following, self.signal = "standby", following, True
        self.halted = self.frozen = self.closing = self.spent = False
        self.hung = ""
        self.must_be_whole()
        self.host.world.checks.look(self.host)

    def follow(self, name: str | None) -> None:
        """As it runs, a standby of somebody else; and nobody's voter itself."""
        if name != self.following:
            self.connection += 1
        self.following = name
        if self.host.world.setting.sync_mode != "off" and self.host.world.rules.standbys_hold:
            self.wait_by(HOLD)

    def die(self) -> None:
        """All of its processes end."""
        self.run += 1
        if self.mode == "primary" and self.accepting:
            self.write()
        self.mode, self.hung = "down", ""
        self.halted = self.frozen = self.closing = self.spent = False
        self.host.world.checks.look(self.host)

    def promote(self, term: int, timeline: int) -> None:
        """It becomes writable."""
        self.must_be_whole()
        if not self.host.world.rules.timelines_reserved:
            timeline = self.branch.timeline + 1
        self.branch = Branch(timeline, self.branch, self.end, self.host.name)
        self.end += 100
        self.mode, self.signal, self.following = "primary", False, None
        self.term = term
        world = self.host.world
        world.checks.activated(self.host, term)
        world.checks.begun(self.branch)
        world.checks.look(self.host)
        world.say(f"{self.host.name} WRITABLE in term {term}, timeline {self.branch.timeline}")
        unhurried_ns = int(CHECKPOINT_TIMEOUTS * world.setting.timing.failover_ns * self.host.rng.random())
        self.host.later(unhurried_ns, self.checkpoint, self.run)
        self.write()

    def checkpoint(self, run: int) -> None:
        """One has ended, of those processes."""
        if run == self.run and self.mode == "primary" and not (self.frozen or self.stuck):
            self.checkpointed = self.branch.timeline

    def freeze(self) -> None:
        """No process of it runs any more."""
        if self.accepting:
            self.write()
            self.host.world.say(f"{self.host.name} PostgreSQL accepts no more writes (frozen)")
        self.frozen = True
        self.host.world.checks.look(self.host)

    def close(self) -> None:
        """A clean shutdown has ended all sessions."""
        if self.accepting:
            self.write()
            self.host.world.say(f"{self.host.name} PostgreSQL accepts no more writes (shutting down)")
        self.closing = True
        self.host.world.checks.look(self.host)

    def shut_down(self) -> int | None:
        """A clean shutdown ends: what streams from it gets all. Where its checkpoint begins, of a primary."""
        lsn: int | None = None
        if self.mode == "primary":
            lsn = self.end
            self.end += CHECKPOINT
            for other in self.host.world.hosts.values():
                if other.pg.streams_from(self):
                    other.pg.receive(self, self.branch, self.end)
        self.die()
        return lsn

    # ------------------------------------------------------------ replication and clients

    def streams_from(self, primary: Postgres) -> bool:
        """Whether WAL can flow at this moment."""
        here, there = self.host, primary.host
        return (
            self.mode == "standby"
            and self.following == there.name
            and not (self.frozen or self.stuck)
            and primary.mode == "primary"
            and not (primary.frozen or primary.stuck)
            and here.up
            and there.up
            and not (here.paused or there.paused)
            and here.world.network.replicates(here.name, there.name)
            and reaches(primary.branch, primary.end, self.branch, self.end)
        )

    @property
    def streaming(self) -> bool:
        source = self.host.world.hosts.get(self.following or "")
        return source is not None and self.streams_from(source.pg)

    def receive(self, primary: Postgres, branch: Branch, end: int) -> None:
        """WAL up to `end` was flushed here; the primary learns it if it still runs."""
        if self.mode != "standby" or self.following != primary.host.name or self.frozen or self.stuck:
            return
        if not reaches(branch, end, self.branch, self.end):
            return
        self.branch, self.end = branch, end
        if primary.branch is branch and primary.accepting:
            primary.waiting.confirm(self.host.name, self.connection, end)
            primary.tell_clients()

    def write(self) -> None:
        """A client here commits, and the WAL goes out to whoever streams."""
        host = self.host
        if not self.accepting:
            return
        world = host.world
        self.end += host.rng.randrange(40, 400)
        self.waiting.wrote(self.end)
        self.tell_clients()
        for other in world.hosts.values():
            if other is not host and other.pg.streams_from(self):
                delay = host.rng.randrange(1 + world.setting.latency_ns * 2)
                world.at(delay, self._arrive, other, other.boots, self.branch, self.end)

    def tell_clients(self) -> None:
        """What is acknowledged by now. Asynchronous as configured, that means nothing."""
        if self.host.world.setting.sync_mode != "off" and self.waiting.acked:
            self.host.world.checks.acknowledged(self.branch, self.waiting.acked)

    def wait_by(self, rule: Rule) -> None:
        """Its configuration names another rule, and a reload goes round: to each process when it comes to it."""
        self.waiting.file = rule
        self._signal(MAIN)

    def _signal(self, process: str) -> None:
        world, rng = self.host.world, self.host.rng
        delay = world.setting.unit_ns * 0.1 * rng.random() ** 2
        self.host.later(int(delay) + 1, self._loads, self.run, process)

    def _loads(self, run: int, process: str) -> None:
        if run != self.run or self.frozen or self.mode == "down":
            return
        if process == CHECKPOINTER and self.host.fsync:
            self.host.later(self.host.world.setting.timing.interval_ns, self._loads, run, process)
            return
        for other in self.waiting.load(process):
            self._signal(other)
        if self.accepting:
            self.tell_clients()

    def hear_of_standbys(self) -> None:
        """Connections that have ended, where the end of a connection can be heard of."""
        for name, other in self.host.world.hosts.items():
            there = other.up and not other.paused and self.host.world.network.replicates(name, self.host.name)
            if name in self.waiting.senders and there and not other.pg.streams_from(self):
                self.waiting.gone(name)

    def _arrive(self, other: Host, boots: int, branch: Branch, end: int) -> None:
        if other.boots != boots or not other.up:
            return
        if other.paused:
            other.backlog.append(partial(other.pg.receive, self, branch, end))
        elif other.world.network.replicates(other.name, self.host.name):
            other.pg.receive(self, branch, end)

    def must_be_whole(self) -> None:
        """I2: what holds half of two histories is never started, and never leads."""
        if self.unfinished:
            raise Violation(f"I2: {self.host.name} is started or promoted, and its data is half rewound")
