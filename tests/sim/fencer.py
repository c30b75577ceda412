"""A model of the fencer around the real admission (`admit`) and the real lease (`clamp`, `load`).

It follows harmony_fencer/fencer.py: admit, make durable, cancel what runs, begin; fence by itself when the lease
ends or when it starts beside a PostgreSQL that could write. The durable state, the latch and the lease survive it.

How late it may be. After the lease's end the guard waits for its turn for at most `Setting.guard_ns`; a fence then
takes at most fence_timeout until PostgreSQL accepts nothing more, by chance much less (the freeze). That envelope,
`last_word_ns`, is what failover_timeout is made for, and nothing that the model draws leaves it: a fencer that
crashed is back, and has frozen PostgreSQL, within fence_timeout (ADR 009).

A host that was paused may wake up outside of the envelope, when others lead. Then the fencer runs before PostgreSQL
does: it waits at real-time priority for a timer that is over. That is an assumption, not a theorem: on many cores a
backend may have its turn in the milliseconds that it takes. `Rules.fencer_first` off shows what it would mean.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harmony.core.messages import FencerView, Order, OrderRefused, Renew, RuleRefused, TellRule
from harmony.core.sync import HOLD, Rule
from harmony_fencer import lease as leases
from harmony_fencer import protocol
from harmony_fencer.admit import Extend, Facts, NewOrder, NewRule, Peer, Permit, admit
from harmony_fencer.protocol import Generation, OrderRecord, OrderState, Refusal, SyncTold
from tests.orders import request
from tests.sim.ladder import Ladder, Then
from tests.sim.rejoin import Rejoin

if TYPE_CHECKING:
    from tests.sim.node import Host

CLEAN_SHARE = 0.5
DISK_NS = 400_000_000  # the longest that its disk takes where it is not slow
RESTART_SHARE = 0.6  # of fence_timeout: how long a dead fencer takes to be there again


class Fencer:
    """One host's."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.t = host.world.setting.timing
        # on disk
        self.fencer_id = f"id-{host.name}"
        self.kept_highest = Generation(0, 0)
        self.kept_order: OrderRecord | None = None
        self.kept_following: str | None = None
        self.latched = False
        self.lease: leases.Lease | None = None  # in run_dir
        self.last_word_ns = 0  # real time until when PostgreSQL could accept writes by the newest lease
        # in memory
        self.brittle = 0  # faults: it dies right after each fence that it has proven
        self.life: int = 0
        self.alive = False
        self.change = 0
        self._forget()

    def _forget(self) -> None:
        self.highest = self.kept_highest
        self.order: OrderRecord | None = self.kept_order
        self.following = self.kept_following
        self.active: Generation | None = None
        self.sync: SyncTold | None = None
        self.deadline_ns = 0
        self.proven = False
        self.shutdown_lsn: int | None = None
        self.retiring = False
        self.may_write = self.order is not None and (
            self.order.op == "activate" or self.order.state != "done"
        )
        self.effect = 0  # number of the newest effect
        self.busy = False
        self.clean_until_ns = 0
        self.accepting: OrderRecord | None = None
        self.waiting: list[tuple[protocol.Request, Peer]] = []

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """A new process: what fencer.py does at its start."""
        self.life += 1
        self.alive = True
        self._forget()
        pg, boot = self.host.pg, self.host.boot()
        lease = self._lease_in_force(boot)
        order = self.order
        mine = (
            lease is not None
            and order is not None
            and (order.op, order.state) == ("activate", "done")
            and lease.generation == order.generation == self.highest
        )
        if lease is not None and mine and not pg.gone and not self.latched:
            self.active, self.deadline_ns = lease.generation, lease.deadline_boottime_ns
            self.sync = lease.sync
            self._arm()
        elif not pg.gone and (self.could_write or pg.halted):
            self.fence_by_itself("at start: PostgreSQL could write and there is no valid lease")
        elif pg.gone:
            pg.signal = True
        if order is not None and order.state == "running":
            self.order = msgspec.structs.replace(order, state="preempted", detail="the fencer restarted")
        self.bell()

    def _lease_in_force(self, boot_ns: int) -> leases.Lease | None:
        if self.lease is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / leases.NAME
            leases.save(path, self.lease)
            return leases.load(path, boot_id=self.host.boot_id, now_ns=boot_ns, lease_ns=self.t.lease_ns)

    def crash(self) -> None:
        """SIGKILL, or a hang that the supervisor ends. A write under way may or may not be on disk."""
        if self.accepting is not None and self.host.rng.random() < 0.5:
            self._keep(self.accepting)
        self.alive = False
        self.life += 1
        self.bell()

    def retire(self) -> None:
        """Asked to stop: ends what could write, cleanly."""
        self.retiring = True
        if self.alive and (self.active is not None or (not self.host.pg.gone and self.could_write)):
            self.fence_by_itself("the fencer was asked to stop", clean=True)

    @property
    def could_write(self) -> bool:
        pg = self.host.pg
        return self.may_write or pg.halted or pg.could_write

    def bell(self) -> None:
        """Something that the agent is shown has changed."""
        self.change += 1
        self.host.wake()

    def view(self) -> FencerView:
        """What the agent is shown."""
        pg, order = self.host.pg, self.order
        believes = self.proven and not self.host.world.rules.fencer_proves
        proven = self.proven and not self.busy and (pg.gone or believes)
        return FencerView(
            fencer_id=self.fencer_id,
            trusted=True,
            detail="",
            highest=(self.highest.term, self.highest.order),
            active=(self.active.term, self.active.order) if self.active is not None else None,
            lease_deadline_ns=self.deadline_ns if self.active is not None else None,
            order=(order.generation.term, order.generation.order) if order is not None else None,
            order_op=order.op if order is not None else "",
            order_state=order.state if order is not None else "",
            order_detail=order.detail if order is not None else "",
            timeline=pg.branch.timeline,
            begins=pg.branch.begin,
            fence_proven=proven,
            postgres_up=not (pg.gone or believes),
            following=self.following if not pg.gone and pg.signal else None,
            is_standby=pg.signal,
            system_identifier=self.host.system_identifier,
            latched="operator" if self.latched else None,
            shutdown_lsn=self.shutdown_lsn if proven else None,
            unfinished=pg.unfinished,
            spent=pg.spent,
            rule=_rule(self.sync),
            rule_number=self.sync.number if self.sync is not None else 0,
            rule_done=self.sync is not None and self.sync.done,
        )

    # ------------------------------------------------------------ requests

    def _facts(self) -> Facts:
        return Facts(
            node=self.host.name,
            members=self.host.world.member_set,
            trusted=True,
            retiring=self.retiring,
            latched=self.latched,
            highest=self.highest,
            newest=self.order,
            active=self.active,
            lease_deadline_ns=self.deadline_ns,
            sync=self.sync,
            unfinished=self.host.pg.unfinished,
        )

    def renew(self, r: Renew) -> None:
        if not self.alive:
            return
        now = self.host.boot()
        verdict = admit(self._facts(), request(r), "agent", now)
        if isinstance(verdict, Extend):
            clamped = leases.clamp(verdict.deadline_ns, now, self.t.lease_ns)
            self.deadline_ns = max(self.deadline_ns, clamped)
            self._save_lease()

    def ordered(self, o: Order | TellRule) -> None:
        """The agent's order arrives."""
        self.asked(request(o), "agent")

    def asked(self, request: protocol.Request, peer: Peer) -> None:
        """One request; those that change something wait for each other."""
        if not self.alive:
            return
        if self.accepting is not None:
            self.waiting.append((request, peer))
            return
        verdict = admit(self._facts(), request, peer, self.host.boot())
        if isinstance(verdict, Refusal):
            if isinstance(request, protocol.Activate | protocol.Fence | protocol.Follow | protocol.Rejoin):
                g = (request.generation.term, request.generation.order)
                self.host.post(self.host.life, OrderRefused(g, verdict.error, verdict.detail))
            if isinstance(request, protocol.Sync):
                self.host.post(self.host.life, RuleRefused(request.number))
        elif isinstance(verdict, NewRule):
            self._wait_by(verdict.told)
        elif isinstance(verdict, NewOrder):
            self._accept(verdict, request)
        elif isinstance(verdict, Permit) and isinstance(request, protocol.Unfence):
            self.latched = False
            self.bell()

    def _accept(self, verdict: NewOrder, request: protocol.Request) -> None:
        record = OrderRecord(verdict.generation, verdict.op, verdict.primary, "running")
        is_fence = isinstance(request, protocol.Fence | protocol.OperatorFence)
        if is_fence and not request.clean:  # type: ignore[union-attr]
            self.host.pg_halt()
        if isinstance(request, protocol.OperatorFence):
            self.latched = True
        self.accepting = record
        disk_ns = int(min(DISK_NS, self.t.stop_ns * 0.1) * self.host.rng.random() ** 2)
        self.host.later(disk_ns + self.host.disk_ns, self._accepted, self.life, record, request)

    def _keep(self, record: OrderRecord) -> None:
        self.kept_highest, self.kept_order = record.generation, record
        self.host.world.checks.durable(self.host, record.generation)

    def _accepted(self, life: int, record: OrderRecord, request: protocol.Request) -> None:
        if life != self.life:
            return
        self._keep(record)
        self.accepting = None
        self.highest = record.generation
        now = self.host.boot()
        if self.active is not None or not self.could_write:
            share = round(self.t.stop_ns * CLEAN_SHARE)
            self.clean_until_ns = max(self.deadline_ns, now + share)
        self._cancel()
        self.order, self.proven = record, False
        effect = self._begin()
        if isinstance(request, protocol.Activate):
            self.active = record.generation
            self.sync = SyncTold(0, request.sync, done=False)
            self.deadline_ns = leases.clamp(request.deadline_boottime_ns, now, self.t.lease_ns)
            self._save_lease()
            self._activate(effect, record, request)
        elif isinstance(request, protocol.Follow):
            self._drop_lease()
            self._follow(effect, record)
        elif isinstance(request, protocol.Rejoin):
            self._drop_lease()
            Rejoin(self, effect, record, request).run()
        else:
            if not getattr(request, "clean", False):
                self.host.pg_halt()
            self._drop_lease()
            until = self.clean_until_ns if getattr(request, "clean", False) else 0
            self._fence(effect, record, until)
        self.bell()
        while self.waiting and self.accepting is None:
            waiting, peer = self.waiting.pop(0)
            self.asked(waiting, peer)

    # ------------------------------------------------------------ the lease

    def _save_lease(self) -> None:
        if self.active is not None:
            self.lease = leases.Lease(self.active, self.deadline_ns, self.host.boot_id, self.sync)
            self._arm()
            self.bell()

    def _drop_lease(self) -> None:
        self.active, self.deadline_ns, self.lease, self.sync = None, 0, None, None
        self.bell()

    def _arm(self) -> None:
        host = self.host
        delay = host.until(self.deadline_ns)
        guard_ns = host.world.setting.guard_ns
        word = host.world.now + delay + guard_ns + host.until(host.boot() + self.t.stop_ns)
        self.last_word_ns = max(self.last_word_ns, word)
        host.later(delay + int(guard_ns * host.rng.random()), self.guard, self.life)

    def guard(self, life: int) -> None:
        """The dead-man's switch."""
        if life != self.life or not self.alive or self.active is None:
            return
        if self.host.boot() >= self.deadline_ns and self.host.world.rules.fencer_checks_lease:
            self.fence_by_itself("the lease is over")

    # ------------------------------------------------------------ effects

    def while_(self, share: float) -> int:
        """A duration: most are short, some are not; all are of this seed's unit."""
        roll = self.host.rng.random()
        return int(self.host.world.setting.unit_ns * share * (roll * roll * 4 + 0.02) * self.host.slow) + 1

    def _begin(self) -> int:
        self.effect += 1
        self.busy = True
        return self.effect

    def _cancel(self) -> None:
        if self.busy and self.order is not None and self.order.state == "running":
            self.order = msgspec.structs.replace(self.order, state="preempted")
        self.busy = False
        self.effect += 1

    def current(self, life: int, effect: int) -> bool:
        return life == self.life and effect == self.effect

    def _finish(self, record: OrderRecord, state: OrderState, detail: str = "") -> None:
        record = msgspec.structs.replace(record, state=state, detail=detail)
        if self.kept_highest == record.generation:
            self.kept_order = record
            self.kept_following = self.following = (
                record.primary if record.op in {"follow", "rejoin"} and state == "done" else None
            )
        self.order = record
        self.bell()

    def ended(self, record: OrderRecord, state: OrderState, detail: str = "") -> None:
        """The effect of an order is over."""
        self.busy = False
        self._finish(record, state, detail)

    def stop(self, effect: int, clean_until_ns: int, then: Then) -> None:
        """The ladder. `then(proven, shutdown_lsn)` when it has an outcome."""
        host, pg = self.host, self.host.pg
        self.may_write = self.could_write
        pg.signal = True

        def ended(proven: bool, lsn: int | None) -> None:
            self.proven, self.shutdown_lsn = proven, lsn
            if proven:
                host.world.checks.proven(host)
                self.may_write = False
            then(proven, lsn)

        Ladder(self, effect, ended).run(clean_until_ns)

    def _fence(self, effect: int, record: OrderRecord, clean_until_ns: int) -> None:
        def then(proven: bool, lsn: int | None) -> None:
            self._finish(record, "done" if proven else "failed", "" if proven else "processes live on")
            if proven:
                self.busy = False
                self.host.world.say(
                    f"{self.host.name} fence {record.generation} is proven: PostgreSQL is gone"
                )
                self.bell()
                if self.brittle:
                    self.host.kill_fencer()
            else:
                self._until_proven(effect, 0)

        self.stop(effect, clean_until_ns, then)

    def _activate(self, effect: int, record: OrderRecord, request: protocol.Activate) -> None:
        host, pg, life, sync = self.host, self.host.pg, self.life, request.sync

        def failed(why: str) -> None:
            host.pg_halt()
            self._drop_lease()
            self._finish(record, "failed", why)
            host.world.say(f"{host.name} activation {record.generation} failed: {why}")
            self._until_proven(effect, 0)

        def configured() -> None:
            if not self.current(life, effect):
                return
            if pg.unfinished:
                failed("only a rejoin starts PostgreSQL here")
                return
            self.may_write = True
            if pg.gone:
                host.later(self.while_(1.0), started)
            else:
                pg.wait_by(Rule(sync.count, sync.voters))
                ready()

        def started() -> None:
            if not self.current(life, effect):
                return
            if host.pg_fails:
                failed("PostgreSQL does not start")
                return
            pg.start(None, Rule(sync.count, sync.voters))
            self.bell()
            host.later(self.while_(0.2), ready)

        def ready() -> None:
            if not self.current(life, effect):
                return
            if pg.gone:
                failed("PostgreSQL ended")
            elif pg.mode == "primary":
                done()
            elif (host.boot() >= self.deadline_ns or self.latched) and host.world.rules.fencer_checks_lease:
                failed("before the promotion the lease was over, or an operator fenced this node")
            elif host.promotion_fails:
                failed("PostgreSQL does not promote")
            elif request.timeline <= pg.branch.timeline and host.world.rules.timelines_reserved:
                failed("the timeline is taken")
            else:
                took = self.while_(0.6)
                host.later(took, host.pg_promote, pg.run, record.generation.term, request)
                host.later(took + self.while_(0.1), promoted)

        def promoted() -> None:
            if not self.current(life, effect):
                return
            if pg.mode != "primary":
                failed("after the promotion PostgreSQL was not writable")
            else:
                done()

        def done() -> None:
            self.busy = False
            self._told()
            self._finish(record, "done")

        if pg.halted:
            self.stop(effect, 0, lambda ok, _: configured() if ok else failed("could not be stopped first"))
        else:
            host.later(self.while_(0.1), configured)

    def _wait_by(self, told: SyncTold) -> None:
        if self.busy:  # an older rule on its way, at most
            self.effect += 1
        self.sync = told
        self._save_lease()
        host, pg, life, effect = self.host, self.host.pg, self.life, self._begin()

        def configured() -> None:
            if not self.current(life, effect):
                return
            self.busy = False
            if not pg.gone:
                pg.wait_by(_rule(told) or HOLD)
                self._told()
            self.bell()

        host.later(self.while_(0.1), configured)

    def _told(self) -> None:
        if self.sync is not None:
            self.sync = msgspec.structs.replace(self.sync, done=True)
            self._save_lease()

    def _follow(self, effect: int, record: OrderRecord) -> None:
        host, pg, life = self.host, self.host.pg, self.life

        def failed(why: str) -> None:
            self.busy = False
            self._finish(record, "failed", why)

        def stopped(proven: bool, _: int | None) -> None:
            if not proven:
                failed("could not be stopped first")
                return
            self.proven = False
            host.later(self.while_(0.6), go)

        def go() -> None:
            if not self.current(life, effect):
                return
            if host.pg_fails or pg.unfinished:
                failed("PostgreSQL does not start")
                return
            if pg.gone:
                pg.start(record.primary)
            else:
                pg.follow(record.primary)
            self.busy = False
            self._finish(record, "done")

        if pg.halted or (not pg.gone and self.could_write):
            self.stop(effect, self.clean_until_ns, stopped)
        else:
            host.later(self.while_(0.6 if pg.gone else 0.1), go)

    # ------------------------------------------------------------ fences of its own

    def fence_by_itself(self, reason: str, *, clean: bool = False) -> None:
        """Nobody ordered it."""
        until = max(self.deadline_ns, self.host.boot()) if clean else 0
        if not clean:
            self.host.pg_halt()
        self._drop_lease()
        self._cancel()
        self.proven = False
        self.host.world.say(f"{self.host.name} fencer fences by itself: {reason}")
        self._until_proven(self._begin(), until)

    def _until_proven(self, effect: int, clean_until_ns: int) -> None:
        life = self.life

        def again() -> None:
            if self.current(life, effect):
                self._until_proven(effect, 0)

        def then(proven: bool, _: int | None) -> None:
            if proven:
                self.busy = False
                self.host.world.say(f"{self.host.name} own fence is proven: PostgreSQL is gone")
                self.bell()
            else:
                self.bell()
                self.host.later(10**8, again)

        self.stop(effect, clean_until_ns, then)


def _rule(told: SyncTold | None) -> Rule | None:
    """As the core has it."""
    if told is None:
        return None
    return Rule(told.rule.count, told.rule.voters) if told.rule is not None else HOLD
