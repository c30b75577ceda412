"""The agent's shell around the pure core: gathers events, steps the core, carries out its commands.

It decides nothing. One task steps the core; the others only bring events or carry out one command each.
An exception in any task ends the agent (O2): the supervisor restarts it, the fencer keeps its lease.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import msgspec
import structlog
import trio

from harmony.admin import AcceptReply, ErrorReply, NodeView, SelfView, Shown, StatusReply, StoreView
from harmony.agent.failing import Failing
from harmony.agent.health import Health
from harmony.agent.link import FencerLink
from harmony.agent.memory import Memory
from harmony.agent.probe import Probe
from harmony.config import Config
from harmony.core import slots
from harmony.core.messages import (
    Accepted,
    Ask,
    Checkpoint,
    CheckpointDone,
    ClusterSeen,
    Command,
    Connected,
    ControlSeen,
    DbSeen,
    DbSilent,
    Event,
    Fatal,
    Log,
    MemberSeen,
    Nudge,
    Order,
    Read,
    ReadFailed,
    Refresh,
    RefreshDone,
    Remember,
    Remembered,
    Renew,
    Stop,
    StoreSeen,
    Surveyed,
    TellRule,
    Write,
    WriteDone,
)
from harmony.core.node import initial, member_record, step
from harmony.core.observe import cannot_found, stale, stopped
from harmony.core.slots import Duty
from harmony.core.states import WRITABLE_STATES, State
from harmony.core.timing import NS, Timing
from harmony.core.view import Identity, View, alive, distrust
from harmony.decoding import Unreadable
from harmony.errors import FatalError, SequenceMismatch, StoreMisconfigured, StoreUnavailable
from harmony.records import (
    CLUSTER_STATE,
    CONTROL,
    MEMBER_PREFIX,
    Member,
    decode_cluster,
    decode_control,
    decode_member,
    encode,
)
from harmony.store.interface import Entry, Store, StoreFacts

TICK_S = 0.05
SURVEY_PAUSE_S = 0.5
MAX_EVENTS = 4096
MOST_MOVES = 3  # decisions in a row that nothing but a new state called for; then the tick is waited for
CHECKPOINT_S = 600.0  # a hand-over waits no longer for it, and goes on
log = structlog.get_logger("agent")


def boot_ns() -> int:
    """CLOCK_BOOTTIME in nanoseconds: it counts suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class World:
    """What the agent stands on. `remembered`: what its disk held at start; `say`: its line of status."""

    store: Store
    probe: Probe
    health: Health
    survey: Callable[[Duty | None], Awaitable[Surveyed | None]]
    memory: Memory
    remembered: Remembered
    fencer_socket: str
    say: Callable[[str], None]


def _event(entry: Entry, *, by_read: bool) -> Event | None:
    """What the entry tells; None: nothing of ours. Raises msgspec.DecodeError."""
    if entry.key == CLUSTER_STATE:
        return ClusterSeen(decode_cluster(entry.value), entry.revision, entry.created_ns, by_read)
    if entry.key.startswith(MEMBER_PREFIX):
        name = entry.key.removeprefix(MEMBER_PREFIX)
        return MemberSeen(name, decode_member(entry.value), entry.revision, entry.created_ns)
    if entry.key == CONTROL:
        return ControlSeen(decode_control(entry.value), entry.revision)
    return None


class Shell:
    """The running agent."""

    def __init__(self, config: Config, me: Identity, world: World) -> None:
        self._config = config
        self._me = me
        self._timing: Timing = config.timing
        self._store = world.store
        self._probe = world.probe
        self._health = world.health
        self._survey = world.survey
        self._memory = world.memory
        self._damage = world.remembered.damage
        self._was_in = world.remembered.was_in
        self._say = world.say
        self._view: View = initial(me)
        self._events: list[Event] = [world.remembered]  # before all that the store shows
        self._facts: StoreFacts | None = None
        self._shown: tuple[ClusterSeen, int] | None = None
        self._ended = ""
        self._wake = trio.Event()
        self._asked = trio.Event()  # the core wants the database's answer now
        self._epoch = 0
        self._failing = Failing()
        self._unreadable: dict[str, str] = {}  # key → why, as it was logged
        self._probe_told = ""
        self._fatal: str | None = None
        self._link = FencerLink(world.fencer_socket, self.post)

    def post(self, event: Event) -> None:
        """Add an event for the next step. Bounded: an agent that cannot keep up must not go on."""
        if len(self._events) >= MAX_EVENTS:
            raise RuntimeError(f"{MAX_EVENTS} events wait for the decision loop: it does not keep up")
        self._events.append(event)
        self._wake.set()

    async def run(self) -> None:
        """Until retired or cancelled, or FatalError."""
        unsubscribe = self._store.watch(self._watched)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._link.run)
                nursery.start_soon(self._probing)
                nursery.start_soon(self._surveying)
                await self._deciding(nursery)
                nursery.cancel_scope.cancel()
        finally:
            unsubscribe()

    # ------------------------------------------------------------ events

    def _watched(self, entry: Entry) -> None:
        event = self._decoded(entry, by_read=False)
        if event is not None:
            self.post(event)

    def _decoded(self, entry: Entry, *, by_read: bool) -> Event | None:
        try:
            event = _event(entry, by_read=by_read)
        except Unreadable as e:
            text = f"{entry.key} is not a record of this version: {e}"
            if text != self._unreadable.get(entry.key):  # its revision moves on twice a second
                self._unreadable[entry.key] = text
                log.error("unreadable record", why=text, revision=entry.revision)  # noqa: TRY400 (the text is whole)
            return None
        self._unreadable.pop(entry.key, None)
        return event

    async def _probing(self) -> None:
        while True:
            self._asked = trio.Event()  # before the question: what comes while it is open asks again
            started = boot_ns()
            answer = await self._probe.ask(started, self._timing.heartbeat_timeout_s)
            self.post(answer)
            self._tell_of_probe(answer)
            self.post(await self._health.look(started, answer, self._timing.heartbeat_timeout_s))
            r = self._view.ruling
            pause_s = self._timing.heartbeat_interval_s / 2
            if r is not None and r.taken_ns and r.worst != r.told:
                pause_s = 0.0  # commits may be waiting for the next step
            with trio.move_on_after(max(0.05, pause_s - (boot_ns() - started) / NS)):
                await self._asked.wait()

    def _tell_of_probe(self, answer: DbSeen | DbSilent) -> None:
        """Log why PostgreSQL cannot be asked, where it runs: it is the cause of much that is decided."""
        runs = self._view.fencer is None or self._view.fencer.postgres_up
        why = answer.reason if isinstance(answer, DbSilent) and runs else ""
        if why and why != self._probe_told:
            log.warning("PostgreSQL does not answer the probe", why=why)
        elif self._probe_told and isinstance(answer, DbSeen):
            log.info("PostgreSQL answers the probe again")
        if why or isinstance(answer, DbSeen):
            self._probe_told = why

    async def _nudge(self) -> None:
        why = await self._probe.nudge(self._timing.lease_s)
        if why:
            log.warning("no commit of our own could be begun to see it wait", why=why)

    async def _surveying(self) -> None:
        """Settings and slots: every slots.BEATS, and when who leads, who is there or what was ordered has changed."""
        last: object = None
        due_s = 0.0
        while True:
            v = self._view
            duty = slots.duty(v, self._me, self._timing, boot_ns())
            order = (v.order.generation, v.order.done_ns > 0) if v.order is not None else None
            what = (duty.role, duty.primary, duty.heard) if duty is not None else None
            if v.db is not None and ((what, order) != last or trio.current_time() >= due_s):
                last, due_s = (
                    (what, order),
                    trio.current_time() + slots.BEATS * self._timing.heartbeat_interval_s,
                )
                found = await self._survey(duty)
                if found is not None:
                    self.post(found)
            await trio.sleep(SURVEY_PAUSE_S)

    async def _checkpoint(self, ahead_of: str) -> None:
        started = boot_ns()
        why = await self._probe.checkpoint(CHECKPOINT_S)
        took_s = round((boot_ns() - started) / NS, 3)
        if why:
            log.warning(f"no checkpoint ahead of {ahead_of}, which may take longer", why=why, took_s=took_s)
        else:
            log.info(f"checkpoint ahead of {ahead_of}", took_s=took_s)
        self.post(CheckpointDone(why))

    # ------------------------------------------------------------ the loop

    def _look_at_store(self) -> None:
        """Post what has changed about the store itself."""
        if self._store.connection_epoch != self._epoch:
            self._epoch = self._store.connection_epoch
            self.post(Connected())
        facts = self._store.facts
        if facts is not None and facts != self._facts:
            self._facts = facts
            level = log.error if facts.problem else log.info
            level("the store", lineage=facts.lineage, problem=facts.problem)
            self.post(StoreSeen(facts.lineage, facts.problem))

    async def _deciding(self, nursery: trio.Nursery) -> None:
        moves = 0  # from one state to another without an event between
        while not self._ended:
            with trio.move_on_after(TICK_S if moves in {0, MOST_MOVES} else 0):
                await self._wake.wait()
            self._wake = trio.Event()
            self._look_at_store()
            events, self._events = self._events, []
            before = self._view.state
            self._view, commands = step(self._view, events, self._me, self._timing, boot_ns())
            for command in commands:
                self._carry_out(command, nursery)
            moves = moves % MOST_MOVES + 1 if self._view.state is not before else 0
            if self._fatal is not None:
                raise FatalError(self._fatal)
            self._say(f"{self._view.state}: {self._view.why}")

    def _carry_out(self, command: Command, nursery: trio.Nursery) -> None:
        match command:
            case Log(row=row, before=before, after=after, why=why):
                term = self._view.cluster.term if self._view.cluster is not None else 0
                level = log.info if before == after else log.warning
                level("decision", row=row, before=before, after=after, why=why, term=term)
            case Order() | Renew() | TellRule():
                self._link.send(command)
            case Write():
                nursery.start_soon(self._write, command)
            case Read():
                nursery.start_soon(self._read, command)
            case Refresh():
                nursery.start_soon(self._refresh, command)
            case Checkpoint(ahead_of=ahead_of):
                nursery.start_soon(self._checkpoint, ahead_of)
            case Ask():
                self._asked.set()
            case Nudge():
                nursery.start_soon(self._nudge)
            case Fatal(why=why):
                self._fatal = why
            case Remember(marks=marks):
                self._damage = ""
                self._memory.keep(marks)
            case Stop(why=why):
                log.info("retired", why=why)
                self._ended = why or "retired"

    # ------------------------------------------------------------ commands to the store

    async def _write(self, w: Write) -> None:
        timeout_s = max(0.001, w.timeout_ns / NS)
        try:
            if w.revision == 0:
                revision = await self._store.create(w.key, encode(w.record), timeout_s=timeout_s)
            else:
                revision = await self._store.update(w.key, encode(w.record), w.revision, timeout_s=timeout_s)
        except SequenceMismatch:
            self._failing.worked("write")
            self.post(WriteDone(w.key, w.attempt, "refused"))
        except StoreUnavailable as e:
            self._failing.failed("write", str(e), boot_ns())
            self.post(WriteDone(w.key, w.attempt, "unknown"))
        except StoreMisconfigured as e:
            self._fatal = str(e)
        else:
            self._failing.worked("write")
            self.post(WriteDone(w.key, w.attempt, "acked", revision))

    async def _get(self, key: str, timeout_s: float) -> bool:
        """Read one key and post what is there; False: it could not be read."""
        asked_at = self._view.marks.revision
        try:
            entry = await self._store.get(key, timeout_s=timeout_s)
        except StoreUnavailable as e:
            self._failing.failed("read", str(e), boot_ns())
            return False
        except StoreMisconfigured as e:
            self._fatal = str(e)
            return False
        self._failing.worked("read")
        if entry is not None:
            event = self._decoded(entry, by_read=True)
            if event is None:
                return key == CONTROL  # what operators ask for must not keep anyone from deciding
        elif key == CLUSTER_STATE:
            event = ClusterSeen(None, 0, 0, by_read=True)
        elif key == CONTROL:
            event = ControlSeen(None, 0)
        else:
            event = MemberSeen(key.removeprefix(MEMBER_PREFIX), None, 0, 0)
        if isinstance(event, ClusterSeen):
            event = replace(event, asked_at=asked_at)
            self._shown = (event, boot_ns())
        self.post(event)
        return True

    async def _read(self, r: Read) -> None:
        if not await self._get(r.key, max(0.001, r.timeout_ns / NS)):
            self.post(ReadFailed(r.key))

    async def _refresh(self, r: Refresh) -> None:
        # Own record first, then cluster_state: what is read of the primary is newer than our own stamp.
        ok = True
        with trio.move_on_after(r.timeout_ns / NS) as scope:
            for key in (MEMBER_PREFIX + self._me.node, CLUSTER_STATE):
                ok = ok and await self._get(key, r.timeout_ns / NS)
            others = [MEMBER_PREFIX + name for name in self._me.members if name != self._me.node]
            for key in (*others, CONTROL):
                ok = ok and await self._get(key, r.timeout_ns / NS)
        self.post(RefreshDone(ok and not scope.cancelled_caught))

    # ------------------------------------------------------------ what people ask

    @property
    def leading(self) -> bool:
        """Whether PostgreSQL here is, as far as this agent knows, the writable primary."""
        return self._view.state in WRITABLE_STATES | {State.PROMOTING}

    def accept(self, create: bool, who: str, leave: str) -> AcceptReply | ErrorReply:
        """An operator takes the store as it is: the core is told. Refused where there is nothing to accept.

        Data of another cluster founds or joins this one only where that cluster is named as `leave`.
        """
        v, facts = self._view, self._facts
        why = distrust(v)
        if leave != self._was_in:
            was = (
                f"was in cluster {self._was_in}"
                if self._was_in
                else f"has not been in another than {self._me.cluster_id}"
            )
            return ErrorReply(
                f"is cluster.id right? {self._me.node} {was}, not {leave or self._me.cluster_id}"
            )
        if not why and v.cluster is not None:
            return ErrorReply(f"nothing to accept: {self._me.node} does not distrust the store")
        if create and (why_not := cannot_found(v, permitted=True)):
            return ErrorReply(f"{self._me.node} cannot found the cluster: {why_not}")
        what = f"{facts.lineage or 'no bucket'}" if facts is not None else "not looked at yet"
        seen = f"revision {v.marks.revision}, term {v.marks.term}" if v.marks.revision else "nothing"
        log.warning("an operator accepts the store", who=who, create=create, store=what, seen=seen, why=why)
        self._was_in = ""
        if create:
            self._store.allow_creation()
        self.post(Accepted(create))
        founds = f"; where it is empty, {self._me.node} founds the cluster anew" if create else ""
        return AcceptReply(f"the store as it is now ({what}), although this node has seen {seen}{founds}")

    def _store_view(self, now_ns: int) -> StoreView:
        shown = None
        if self._shown is not None:
            seen, at_ns = self._shown
            term, primary = (seen.record.term, seen.record.primary) if seen.record is not None else (0, None)
            shown = Shown(seen.revision, term, primary, (now_ns - at_ns) / NS)
        facts = self._facts or StoreFacts("", "")
        memory = self._memory.failure or self._damage
        return StoreView(facts.lineage, facts.problem, self._view.marks, shown, memory, self._was_in)

    def _changes(self) -> int:
        v = self._view
        acknowledged = v.control.acknowledged if v.control is not None else 0
        return sum(term > acknowledged for term, _ in v.cluster.changes) if v.cluster is not None else 0

    def _lease_left_ms(self, now_ns: int) -> int | None:
        """Of the lease that the fencer has granted; None: none is in force."""
        v = self._view
        over = v.fencer is not None and not v.fencer_silent and v.fencer.active is None
        left = 0 if over else (v.lease_until_ns - now_ns) // 1_000_000
        return left if left > 0 else None

    def _own_record(self, now_ns: int) -> Member:
        """What this node would record of itself now: the newest record that the store took may be an old one."""
        record = member_record(self._view, self._me, self._timing, now_ns, "")
        return msgspec.structs.replace(record, lease_left_ms=self._lease_left_ms(now_ns))

    def status(self) -> StatusReply:
        """The cluster as this agent sees it now."""
        v, now = self._view, boot_ns()
        nodes = []
        for name, address in self._config.members.items():
            changed = v.member_changed_ns.get(name)
            nodes.append(
                NodeView(
                    name=name,
                    host=address.host,
                    port=address.port,
                    member=v.members.get(name) if name != self._me.node else self._own_record(now),
                    age_s=(now - changed) / NS if changed is not None else None,
                    alive=alive(v, name, self._timing, now),
                )
            )
        f = v.fencer
        failure, failing_s = self._failing.newest(now)
        return StatusReply(
            cluster_id=self._me.cluster_id,
            cluster=v.cluster,
            cluster_revision=v.revision if v.cluster is not None else None,
            cluster_age_s=(now - v.first_seen_ns) / NS if v.cluster is not None else None,
            cluster_stale=v.cluster is not None and stale(v, self._timing, now),
            nodes=tuple(nodes),
            myself=SelfView(
                node=self._me.node,
                state=v.state,
                row=str(v.row),
                why=v.why,
                store_connected=self._store.connected,
                failures=v.failures,
                lease_left_ms=self._lease_left_ms(now),
                fencer_ok=f is not None and not v.fencer_silent,
                fencer_detail=v.fencer_silent or (f.detail if f is not None else ""),
                latched=f.latched if f is not None else None,
                distrust=distrust(v),
                stopped=stopped(v, self._me),
                changes=self._changes(),
                retiring=v.retiring,
                successor=v.successor,
                store=self._store_view(now),
                store_failure=failure,
                store_failing_s=failing_s,
                failure_threshold=self._timing.failure_threshold,
                beat_s=self._timing.heartbeat_interval_s + self._timing.heartbeat_timeout_s,
                lease_s=self._timing.lease_s,
            ),
        )
