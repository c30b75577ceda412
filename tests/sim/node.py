"""One host: its clock, its disks, its agent with the real decision core, and what may be done to all of it.

The agent steps only when something has arrived or is due, at most `Setting.wake_ns` late; then it is shown what
its fencer and its database say. What comes to a paused host waits, in order, until it is resumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ParamSpec

import msgspec

from harmony.core.messages import (
    Accepted,
    Ask,
    Checkpoint,
    CheckpointDone,
    Command,
    DbSeen,
    DbSilent,
    Event,
    Fatal,
    FencerSeen,
    FencerSilent,
    HealthSeen,
    Log,
    Marks,
    Nudge,
    Order,
    Read,
    Refresh,
    Remember,
    Remembered,
    Renew,
    Retiring,
    Stop,
    TellRule,
    Write,
)
from harmony.core.node import initial, step
from harmony.core.observe import FENCE_PAUSE_NS, ORDER_LOST_NS, ORDER_PAUSE_NS, cannot_found
from harmony.core.register import Register
from harmony.core.timing import NS
from harmony.core.view import Identity, View, distrust
from harmony.records import CONTROL, MEMBER_PREFIX, Member
from harmony_fencer import protocol
from tests.sim.checks import Violation
from tests.sim.database import Branch, Postgres
from tests.sim.fencer import RESTART_SHARE, Fencer

if TYPE_CHECKING:
    from tests.sim.world import World

P = ParamSpec("P")
SYSTEM = "sys"
DISK_NS = NS // 10  # the longest that the agent's disk takes to keep its marks
TALK_NS = NS // 100  # the longest that an order takes to the fencer
STOP_EXTRA_NS = (
    2 * NS
)  # over fence_timeout: how long the supervisor waits for an agent that was asked to stop


class Host:
    """Of one world."""

    def __init__(self, world: World, name: str, root: Branch) -> None:
        s = world.setting
        self.world, self.name = world, name
        self.rng = world.stream(f"host {name}")
        self.rate = 1 + self.rng.uniform(-s.drift, s.drift)
        self.offset = self.rng.randrange(10**6) * NS
        self.boots = 1
        self.up = True
        self.lost = 0  # faults: what keeps it down
        self.paused = 0  # faults: nothing of it runs
        self.backlog: list[Callable[[], None]] = []
        self.slow = 1.0
        self.disk_ns = 0  # faults: what the fencer's disk takes longer
        self.pg_fails = 0  # faults: PostgreSQL does not start
        self.promotion_fails = 0
        self.promotion_hangs = 0
        self.probe_silent = 0
        self.disk_hangs = 0  # faults: whoever writes waits, and cannot be killed
        self.crash_loop = 0  # faults: its backends crash, and it recovers by itself
        self.fsync = 0  # faults: its checkpointer is in one, and does nothing else
        self.foreign = 0  # faults: the data directory is another cluster's
        self.frozen_at = 0
        self.others = tuple(n for n in s.names if n != name)
        self.other_keys = (*(MEMBER_PREFIX + n for n in self.others), CONTROL)
        self.pg = Postgres(self, root)
        self.fencer = Fencer(self)
        # the agent
        self.me = Identity(
            node=name,
            cluster_id="sim",
            preferred=s.policy.preferred_primary == name,
            members=s.names,
            sync_count=s.sync_count,
            sync_mode=s.sync_mode,
            maximum_lag_bytes=s.maximum_lag_bytes,
            nofailover=name in s.nofailover,
            priority=100,
            instance="",
            boot_id=self.boot_id,
            version="sim",
            policy=s.policy,
        )
        self.kept = Marks()  # on the agent's disk
        self.life = 0
        self.running = False
        self.held = 0  # faults: what keeps the agent from running, ended or stopped (SIGSTOP)
        self.stall_ns = 0  # faults: for how long it is stopped when it orders an activation
        self.stops_fencer = False
        self.view: View = initial(self.me)
        self.events: list[Event] = []
        self.turn_at = 0
        self.shown = -1
        self.probed_ns = 0
        self.asked = False  # the core wants an answer of the database now
        self.answer: tuple[DbSeen | DbSilent, HealthSeen] | None = None

    # ------------------------------------------------------------ time

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    @property
    def system_identifier(self) -> str:
        return "foreign" if self.foreign else SYSTEM

    def boot(self) -> int:
        """CLOCK_BOOTTIME here."""
        return self.offset + int(self.world.now * self.rate)

    def until(self, boot_ns: int) -> int:
        """Real time until the clock here shows that."""
        return max(0, int((boot_ns - self.boot()) / self.rate) + 1)

    def later(self, delay_ns: int, do: Callable[P, None], *args: P.args, **named: P.kwargs) -> None:
        """In this boot; when the host is paused then, after it was resumed."""
        self.world.at(delay_ns, self._due_here, self.boots, partial(do, *args, **named))

    def _due_here(self, boots: int, do: Callable[[], None]) -> None:
        if boots != self.boots or not self.up:
            return
        if self.paused:
            self.backlog.append(do)
        else:
            do()

    # ------------------------------------------------------------ the host

    def switch_on(self) -> None:
        """Boot: the fencer first, then the agent."""
        self.up = True
        self.fencer.start()
        self.later(int(self.world.setting.wake_ns * self.rng.random()), self.start_agent, self.life)

    def lose(self) -> None:
        """Power off."""
        self.lost += 1
        if not self.up:
            return
        self.end_agent()
        self.fencer.crash()
        self.pg.die()
        self.up = False
        self.boots += 1
        self.backlog.clear()
        self.world.checks.look(self)

    def back(self) -> None:
        """Power on, when nothing keeps it off any more; all clocks of before mean nothing."""
        self.lost -= 1
        if self.lost:
            return
        self.offset = self.rng.randrange(10**6) * NS - int(self.world.now * self.rate)
        self.me = replace(self.me, boot_id=self.boot_id)
        self.switch_on()

    def pause(self) -> None:
        """Nothing of it runs, as when a VM is stopped: its clock goes on."""
        self.paused += 1
        self.world.checks.look(self)

    def resume(self) -> None:
        """The fencer is first, at real-time priority, when its timer is over (`Rules.fencer_first`)."""
        self.paused -= 1
        if self.paused or not self.up:
            return
        world, fencer, pg = self.world, self.fencer, self.pg
        over = fencer.active is not None and self.boot() >= fencer.deadline_ns
        late = fencer.busy and fencer.could_write and world.now > fencer.last_word_ns
        if world.rules.fencer_first and not pg.gone and (pg.halted or over or late):
            pg.halted = pg.frozen = True
            self.frozen_at = world.now
        world.checks.look(self)
        backlog, self.backlog = self.backlog, []
        self.fencer.guard(self.fencer.life)
        for do in backlog:
            do()
        self.wake()

    # ------------------------------------------------------------ PostgreSQL, as the fencer has it done

    def pg_halt(self) -> int:
        """Freeze all of it. In how many nanoseconds nothing of it runs any more."""
        pg, now = self.pg, self.world.now
        if pg.gone or not self.world.rules.fencer_proves:
            return 0
        if not pg.halted:
            pg.halted = True
            share = 0.95 if self.rng.random() < 0.15 else 0.2
            took = int(self.world.setting.timing.stop_ns * share * self.rng.random() ** 2)
            took = min(took, max(0, self.fencer.last_word_ns - now))
            self.frozen_at = now + took
            if took:
                self.later(took, self._frozen, pg.run)
            else:
                self._frozen(pg.run)
        return max(0, self.frozen_at - now)

    def _frozen(self, run: int) -> None:
        if self.pg.run == run and not self.pg.gone:
            self.pg.freeze()

    def pg_die(self, run: int) -> None:
        if self.pg.run == run and not self.pg.gone:
            self.pg.die()
            self.fencer.bell()

    def pg_close(self, run: int) -> None:
        if self.pg.run == run and not (self.pg.gone or self.pg.halted):
            self.pg.close()

    def pg_promote(self, run: int, term: int, request: protocol.Activate) -> None:
        pg = self.pg
        if pg.run == run and pg.mode == "standby" and not (pg.frozen or pg.stuck):
            pg.promote(term, request.timeline)
            if self.promotion_hangs:
                pg.suffer("silent")
            self.fencer.bell()

    # ------------------------------------------------------------ the agent's process

    def start_agent(self, life: int) -> None:
        """A new process with what its disk holds; unless there is one, or another was started since."""
        if self.running or self.held or life != self.life:
            return
        self.life += 1
        self.running = True
        self.me = replace(self.me, instance=f"{self.name}-{self.life}")
        self.view = initial(self.me)
        self.events = [Remembered(self.kept)]
        self.turn_at, self.shown, self.probed_ns, self.answer, self.asked = 0, -1, 0, None, False
        self.world.store.connected(self)
        self.wake()

    def end_agent(self) -> None:
        """SIGKILL, or it has ended."""
        self.running = False
        self.life += 1

    def hold_agent(self, *, end: bool) -> None:
        """SIGSTOP, or SIGKILL and no restart, until let go."""
        self.held += 1
        if end:
            self.end_agent()

    def let_agent_go(self) -> None:
        self.held -= 1
        if not self.held and self.up:
            if self.running:
                self.wake()
            else:
                self.later(0, self.start_agent, self.life)

    def retire(self, *, hand_over: bool, fencer_too: bool) -> None:
        """SIGTERM, with SIGKILL later; then a new one is started. With the fencer: all of Harmony is stopped."""
        if not self.up or not self.running or self.paused:
            return
        self.stops_fencer = fencer_too
        self.post(self.life, Retiring(hand_over))
        bound = self.world.setting.timing.stop_ns + STOP_EXTRA_NS
        self.later(bound, self._retired, self.life)

    def _retired(self, life: int) -> None:
        if life != self.life:
            return
        self.end_agent()
        if self.stops_fencer:
            self.stops_fencer = False
            self.fencer.retire()
            self.later(2 * self.world.setting.timing.lease_ns, self._both_again)
        else:
            self.later(self.world.setting.wake_ns, self.start_agent, self.life)

    def _both_again(self) -> None:
        self.fencer.crash()
        self.fencer.start()
        self.start_agent(self.life)

    def kill_fencer(self) -> None:
        """The supervisor starts a new one, within a part of fence_timeout."""
        if self.up and not self.paused and self.fencer.alive:
            self.fencer.crash()
            took = int(self.world.setting.timing.stop_ns * RESTART_SHARE * self.rng.random())
            self.later(took, self._fencer_again, self.fencer.life)

    def _fencer_again(self, life: int) -> None:
        if self.fencer.life == life:
            self.fencer.start()

    def may_found(self) -> bool:
        """Whether the agent would take --found."""
        return self.running and not cannot_found(self.view, permitted=True)

    def accept(self, *, create: bool) -> None:
        """harmonyctl store accept, where there is something to accept."""
        if self.running and (distrust(self.view) or self.view.cluster is None):
            self.world.say(f"{self.name} OPERATOR accepts the store{' and founds' if create else ''}")
            self.post(self.life, Accepted(create))

    # ------------------------------------------------------------ the agent's loop

    def post(self, life: int, event: Event, quiet: bool = False) -> None:
        """Something for its next turn; `quiet`: it is not worth one of its own."""
        if life != self.life or not self.running:
            return
        if self.paused:
            self.backlog.append(partial(self.post, life, event, quiet))
            return
        self.events.append(event)
        if not quiet:
            self.wake()

    def wake(self) -> None:
        """It has something to do."""
        wake_ns = self.world.setting.wake_ns
        if not self.world.now <= self.turn_at <= self.world.now + wake_ns:
            self._turn_in(int(wake_ns * self.rng.random()) + 1)

    def _turn_in(self, delay_ns: int) -> None:
        at = self.world.now + delay_ns
        if self.running and not (self.paused or self.held) and not self.world.now <= self.turn_at <= at:
            self.turn_at = at
            self.world.at(delay_ns, self._turn, self.life, at)

    def _turn(self, life: int, at: int) -> None:
        if life != self.life or at != self.turn_at or self.paused or self.held:
            return
        self.turn_at = -1
        now = self.boot()
        self._look(now)
        events, self.events = self.events, []
        t = self.world.setting.timing
        before = self.view
        self.view, commands = step(before, events, self.me, t, now)
        self.world.rows[self.view.row] = self.world.rows.get(self.view.row, 0) + 1
        self.world.checks.says_why(self)
        if (
            not self.world.rules.dated_from_send
            and before.cluster is not self.view.cluster in before.lead_records
        ):
            commands = self._dated_from_now(commands, now)
        for c in commands:
            self._must_look_it(c)
            self._carry_out(c)
        if self.running:
            due = self._due(self.view, now)
            self._turn_in(self.until(due))

    def _dated_from_now(self, commands: list[Command], now_ns: int) -> list[Command]:
        """A broken rule: the heartbeat entitles from its acknowledgement on."""
        until = now_ns + self.world.setting.timing.lease_ns
        self.view = msgspec.structs.replace(self.view, lease_until_ns=until)
        return [replace(c, deadline_ns=until) if isinstance(c, Renew) else c for c in commands]

    def _look(self, now_ns: int) -> None:
        """What the fencer and the database say. An answer of the database is folded one turn later."""
        fencer = self.fencer
        if fencer.change != self.shown:
            self.shown = fencer.change
            seen = FencerSeen(fencer.view()) if fencer.alive else FencerSilent("the fencer is not there")
            self.events.append(seen)
        if self.answer is not None:
            self.events += self.answer
            self.answer = None
        if self.asked or now_ns - self.probed_ns >= self.world.setting.timing.interval_ns // 2:
            self.probed_ns, self.asked = now_ns, False
            self.answer = self._ask(now_ns), self._examine(now_ns)

    def _ask(self, now_ns: int) -> DbSeen | DbSilent:
        pg = self.pg
        if pg.mode == "down" or self.probe_silent or pg.frozen or pg.closing or pg.suffers == "silent":
            return DbSilent("no answer")
        timeline, system = pg.branch.timeline, self.system_identifier
        seen = DbSeen(pg.mode, timeline, pg.end, pg.end, pg.streaming, system, now_ns, early=pg.early)
        return self._of_a_primary(seen) if pg.mode == "primary" and self.me.sync_count else seen

    def _examine(self, now_ns: int) -> HealthSeen:
        pg = self.pg
        if pg.mode == "down":
            return HealthSeen(now_ns)
        symptom = "silent" if self.probe_silent or pg.frozen else "closed" if pg.closing else pg.suffers
        crashed = self.crash_loop > 0 and self.rng.random() < 0.2
        return HealthSeen(now_ns, symptom, "the model's", crashed=crashed)

    def _of_a_primary(self, seen: DbSeen) -> DbSeen:
        pg, rules = self.pg, self.world.rules
        pg.hear_of_standbys()
        senders = pg.waiting.walsenders()
        waiting = pg.waiting.waiting or not rules.waiting_is_seen
        return replace(seen, names=pg.waiting.names, walsenders=senders, waiting=waiting)

    def _due(self, v: View, now_ns: int) -> int:
        """When it has something to do of its own."""
        t = self.world.setting.timing
        due = min(
            max(v.refreshed_ns + t.interval_ns, v.refreshing_until_ns),
            self.probed_ns + t.interval_ns,
            _beat(v.own, v.own_sent_ns, now_ns, t.interval_ns, t.timeout_ns),
            _beat(v.lead, v.lead_sent_ns, now_ns, t.interval_ns, t.timeout_ns),
        )
        due = max(due, now_ns + 1)
        soon = [v.lease_until_ns, v.silent_from_ns + t.failover_ns, v.claim_pause_until_ns]
        if self.asked or (self.answer is not None and (v.db is None or v.urged_ns)):
            soon.append(now_ns + self.world.setting.wake_ns + 1)
        if v.order is not None:
            pause = FENCE_PAUSE_NS if v.order.op == "fence" else ORDER_PAUSE_NS
            soon += [v.order.sent_ns + pause, v.order.sent_ns + ORDER_LOST_NS + 1]
        for at in soon:
            if now_ns < at < due:
                due = at
        return due + 1

    def _carry_out(self, command: Command) -> None:
        world = self.world
        match command:
            case Log(row=row, before=before, after=after, why=why):
                if before != after:
                    world.say(f"{self.name} {before} -> {after} [{row}] {why}")
                elif row in TOLD:
                    world.say(f"{self.name} {after} [{row}] {why}")
            case Order():
                self.later(int(TALK_NS * self.rng.random()), self.fencer.ordered, command)
                if self.stall_ns and command.op == "activate":
                    self.hold_agent(end=False)
                    world.at(self.stall_ns, self.let_agent_go)
            case Renew():
                self.later(int(TALK_NS * self.rng.random()), self.fencer.renew, command)
            case TellRule(number=number, rule=rule):
                world.say(f"{self.name} tells rule {number}: {rule}")
                self.later(int(TALK_NS * self.rng.random()), self.fencer.ordered, command)
            case Ask():
                self.asked = True
            case Nudge():
                self.later(int(TALK_NS * self.rng.random()), self.pg.write)
            case Write():
                world.store.write(self, command)
            case Read():
                world.store.read(self, command)
            case Refresh():
                world.store.refresh(self, command)
            case Checkpoint():
                took_ns = int(world.setting.unit_ns * 4 * self.rng.random() * self.slow)
                self.later(took_ns, self.pg.checkpoint, self.pg.run)
                self.later(took_ns, self.post, self.life, CheckpointDone())
            case Remember(marks=marks):
                self.later(int(DISK_NS * self.rng.random()), self._keep, marks)
            case Stop():
                world.say(f"{self.name} agent has retired")
                self._retired(self.life)
            case Fatal(why=why):
                if not self.foreign:
                    raise Violation(f"{self.name} ends for good, without a reason: {why}")
                world.say(f"{self.name} agent ends for good: {why}")
                self.end_agent()

    def _must_look_it(self, command: Command) -> None:
        """Never a zombie that looks healthy: who is unfinished says so from the next turn on."""
        if not (self.pg.unfinished and self.fencer.alive and isinstance(command, Write)):
            return
        if isinstance(command.record, Member) and command.record.db != "down":
            raise Violation(f"I2: {self.name} is half rewound, and tells of a {command.record.db}")

    def _keep(self, marks: Marks) -> None:
        self.kept = marks


def _beat(r: Register, sent_ns: int, now_ns: int, interval_ns: int, timeout_ns: int) -> int:
    """When an exchange has to go on, or the next one has to begin."""
    if not r.running:
        at = sent_ns + interval_ns
        return (
            at
            if at > now_ns
            else sent_ns + timeout_ns
            if sent_ns + timeout_ns > now_ns
            else now_ns + interval_ns
        )
    return r.deadline_ns if r.busy else min(r.deadline_ns, max(r.retry_at_ns, now_ns))


# Rows that stay in their state and are worth a line all the same.
TOLD = frozenset(
    str(row)
    for row in (
        *(*range(214, 219), *range(914, 919), 402, 408, 492, 996, 1002, 302, 1006, 718, 810),
        *(222, 922, 301, 1003),
    )
)
