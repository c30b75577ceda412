"""The five faults: what each does to a running demo cluster, what is expected, and what was measured.

Faults go only to processes found by the demo's own directories; nothing is decided here about the database.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec
import psutil
import psycopg

from harmony.core.timing import PRESETS
from harmony.demo import measure, procs
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster
from harmony.demo.comeback import await_back
from harmony.demo.parts import SetupError
from harmony.demo.recorder import Recorders

BEFORE_S = 4.0
AFTER_S = 3.0
STORE_DOWN_S = 10.0
FIRST_ACK_TIMEOUT_S = 30.0
READ_BACK_TIMEOUT_S = 30.0
BACK_TIMEOUT_S = 90.0
TICK_S = 0.05
Say = Callable[[str], None]
Tick = Callable[[int], None]


class Scenario(StrEnum):
    """Names as on the command line."""

    NODE_KILLED = "node-killed"
    POSTGRES_KILLED = "postgres-killed"
    AGENT_FROZEN = "agent-frozen"
    AGENT_KILLED = "agent-killed"
    STORE_DOWN = "store-down"


WHAT = {
    Scenario.NODE_KILLED: "SIGKILL to the whole node {old}: PostgreSQL, agent, fencer and supervisor",
    Scenario.POSTGRES_KILLED: "SIGKILL to the postmaster of {old}; its agent, fencer and supervisor live on",
    Scenario.AGENT_FROZEN: "SIGSTOP to the agent of {old}, and to each replacement its supervisor starts "
    "until another node leads (otherwise a restart would heal it, and there would be nothing to see)",
    Scenario.AGENT_KILLED: "SIGKILL to the agent of {old}, and to each replacement its supervisor starts "
    "until another node leads (otherwise a restart would heal it, and there would be nothing to see)",
    Scenario.STORE_DOWN: "SIGKILL to the only nats-server, for {down:g} s: nobody can lead without the store",
}


class Result(msgspec.Struct, frozen=True):
    """What --json prints. Times in seconds; `outage_s` is null when no write came after the fault.

    `old_primary_back_s`: from the end of the fault, until the old primary streamed from the new one; null: it did not,
    or was the primary again.
    """

    scenario: str
    preset: str
    outage_s: float | None
    lost_rows: int
    dual_primary_s: float
    old_primary_last_ack_s: float
    old_primary_back_s: float | None
    old_primary: str
    new_primary: str | None
    ok: bool
    why: str = ""


@dataclass(frozen=True)
class Measured:
    """The raw outcome that `judge` looks at; `outage_s` is infinite when writes never came back."""

    outage_s: float
    lost: int
    acknowledged: int
    dual_primary_s: float
    last_ack_s: float
    old: str
    new: str | None
    problems: tuple[str, ...] = ()
    back_s: float | None = None  # None: the old primary did not come back as a standby


def store_down_s(preset: str) -> float:
    """How long the store stays away: longer than a primary may go on without it."""
    timing = PRESETS[preset]
    return max(STORE_DOWN_S, timing.lease_s + timing.fence_timeout_s + 5.0)


def judge(scenario: Scenario, preset: str, found: Measured) -> Result:
    """Compare with what Harmony promises; `why` names every promise that was not kept."""
    timing = PRESETS[preset]
    bound = timing.lease_s + timing.fence_timeout_s
    why = list(found.problems)
    if found.acknowledged == 0:
        why.append("no write was acknowledged at all: these figures prove nothing")
    if found.new is None:
        why.append("no write was acknowledged after the fault: nobody took over")
    elif scenario is Scenario.STORE_DOWN and found.new != found.old:
        why.append(f"{found.new} leads after the store's return, expected {found.old} again")
    elif scenario is not Scenario.STORE_DOWN and found.new == found.old:
        why.append(f"{found.old} went on as primary, expected another to take over")
    if found.lost:
        why.append(f"{found.lost} acknowledged rows are lost")
    if found.dual_primary_s > 0:
        why.append(f"two nodes accepted writes for {found.dual_primary_s:.3f} s")
    if scenario is not Scenario.STORE_DOWN and found.new not in {None, found.old} and found.back_s is None:
        why.append(f"{found.old} is not back as a streaming standby within {BACK_TIMEOUT_S:g} s")
    bounded = scenario in {Scenario.AGENT_FROZEN, Scenario.AGENT_KILLED, Scenario.STORE_DOWN}
    if bounded and found.last_ack_s > bound:
        why.append(
            f"{found.old} accepted writes until {found.last_ack_s:.3f} s after the fault, allowed are "
            f"lease {timing.lease_s:g} + fence_timeout {timing.fence_timeout_s:g} = {bound:g} s"
        )
    return Result(
        scenario=scenario.value,
        preset=preset,
        outage_s=None if found.outage_s == float("inf") else round(found.outage_s, 3),
        lost_rows=found.lost,
        dual_primary_s=round(found.dual_primary_s, 6),
        old_primary_last_ack_s=round(found.last_ack_s, 3),
        old_primary_back_s=None if found.back_s is None else round(found.back_s, 1),
        old_primary=found.old,
        new_primary=found.new,
        ok=not why,
        why="; ".join(why),
    )


@dataclass
class Fault:
    """One fault on one node (or the store). `apply` may be repeated; `lift` ends what can be ended."""

    scenario: Scenario
    cluster: Cluster
    old: str

    def __post_init__(self) -> None:
        self._hit: dict[int, psutil.Process] = {}

    def apply(self) -> None:
        """Strike once. Raises SetupError when there is nothing to strike."""
        node = self.cluster.nodes[self.old]
        match self.scenario:
            case Scenario.NODE_KILLED:
                self._kill_node()
            case Scenario.POSTGRES_KILLED:
                postmaster = procs.postmaster_of(node.data_dir)
                if postmaster is None:
                    raise SetupError(f"the postmaster of {self.old} was not found in {node.data_dir}")
                procs.send(postmaster, signal.SIGKILL)
            case Scenario.AGENT_FROZEN | Scenario.AGENT_KILLED:
                self.again()
                if not self._hit:
                    raise SetupError(f"the agent of {self.old} was not found")
            case Scenario.STORE_DOWN:
                self.cluster.kill_nats()

    def again(self) -> None:
        """Strike the agents that the supervisor has started since; nothing for the other faults."""
        if self.scenario not in {Scenario.AGENT_FROZEN, Scenario.AGENT_KILLED}:
            return
        number = signal.SIGSTOP if self.scenario is Scenario.AGENT_FROZEN else signal.SIGKILL
        for process in procs.with_argument(self.cluster.nodes[self.old].folder, ("harmony.agent",)):
            if process not in self._hit.values() and procs.send(process, number):
                self._hit[process.pid] = process

    @property
    def strikes(self) -> int:
        """How many agents were struck so far."""
        return len(self._hit)

    def _kill_node(self) -> None:
        node = self.cluster.nodes[self.old]
        victims = procs.tree(self.cluster.supervisors[self.old].pid) + procs.postgres_of(node.data_dir)
        for process in victims:  # the supervisor first: it must not restart the others
            procs.send(process, signal.SIGKILL)
        left = procs.kill_everything(node.folder, [node.data_dir])
        if left:
            raise SetupError(f"{self.old} could not be killed: {left}")
        self.cluster.supervisors[self.old].wait(timeout=5)

    def lift(self) -> None:
        """Let frozen agents run on, start the killed node, bring the store back; the rest its supervisor does."""
        if self.scenario is Scenario.NODE_KILLED:
            self.cluster.start_supervisor(self.old)
        if self.scenario is Scenario.AGENT_FROZEN:
            for process in self._hit.values():
                procs.send(process, signal.SIGCONT)
        if self.scenario is Scenario.STORE_DOWN:
            self.cluster.start_nats()


class Run:
    """One scenario on a cluster that is up. `tick` is called often, with the writer's count."""

    def __init__(self, cluster: Cluster, scenario: Scenario, say: Say, tick: Tick) -> None:
        self._cluster = cluster
        self._scenario = scenario
        self._say = say
        self._tick = tick
        self._timing = PRESETS[cluster.preset]

    def measure(self) -> Result:
        """Write, strike, wait, read back, judge. Raises SetupError when it could not be carried out."""
        probes = {name: self._cluster.conninfo(name) for name in self._cluster.nodes}
        recorders = Recorders(self._cluster.base / "clients", self._cluster.writer_conninfo, probes)
        try:
            return self._measure(recorders)
        finally:
            recorders.stop()

    def _pause(self, recorders: Recorders) -> None:
        time.sleep(TICK_S)
        recorders.poll()
        self._tick(len(recorders.writer.acks))

    def _measure(self, recorders: Recorders) -> Result:
        self._say(
            "A client writes numbered rows, one per transaction; a prober at each node tries to write, too"
        )
        deadline = time.monotonic() + FIRST_ACK_TIMEOUT_S
        until = time.monotonic() + BEFORE_S
        while time.monotonic() < until or not recorders.writer.acks:
            self._pause(recorders)
            if time.monotonic() > deadline:
                raise SetupError(f"the writer got no row acknowledged within {FIRST_ACK_TIMEOUT_S:g} s")
        old = self._cluster.node_at(recorders.writer.acks[-1].port)
        while not recorders.probers[old].acks and time.monotonic() < deadline:  # a busy machine
            self._pause(recorders)
        if not recorders.probers[old].acks:
            raise SetupError(f"the prober of {old} got no row acknowledged although the writer did")
        fault = Fault(self._scenario, self._cluster, old)
        down_s = store_down_s(self._cluster.preset)
        self._say(f"FAULT: {WHAT[self._scenario].format(old=old, down=down_s)}")
        fault_ns = boottime_ns()
        fault.apply()
        lifted_ns = None
        if self._scenario is Scenario.STORE_DOWN:
            until = time.monotonic() + down_s
            while time.monotonic() < until:
                self._pause(recorders)
            lifted_ns = boottime_ns()
            fault.lift()
            self._say("The store is back")
        new = self._await_takeover(recorders, fault, lifted_ns)
        if new is not None:
            self._say(f"{new} acknowledges the client's writes; going on for {AFTER_S:g} s")
            until = time.monotonic() + AFTER_S
            while time.monotonic() < until:
                self._pause(recorders)
        back_s = None
        if self._scenario is not Scenario.STORE_DOWN:
            fault.lift()
            if new is not None:
                back_s = self._await_back(recorders, old, new)
        problems = tuple(
            f"a measuring client ended by itself: see {self._cluster.base}/clients"
            for recorder in recorders.all()
            if recorder.died
        )
        recorders.stop()
        found = self._found(recorders, fault_ns, lifted_ns, old, new)
        return judge(
            self._scenario,
            self._cluster.preset,
            replace(found, problems=(*problems, *found.problems), back_s=back_s),
        )

    def _await_back(self, recorders: Recorders, old: str, new: str) -> float | None:
        """Seconds from the end of the fault until the old primary is a standby again; None: it is not.

        The client and the probers go on: woken agents must not write either.
        """
        self._say(f"The fault is over; {old} should come back as a standby by itself")
        began = time.monotonic()
        newest = recorders.writer.acks[-1].id
        while recorders.writer.acks[-1].id == newest and time.monotonic() - began < BACK_TIMEOUT_S:
            self._pause(recorders)
        newest = recorders.writer.acks[-1].id
        left_s = BACK_TIMEOUT_S - (time.monotonic() - began)
        if not await_back(self._cluster, old, new, newest, left_s, lambda: self._pause(recorders)):
            return None
        back_s = time.monotonic() - began
        self._say(f"The old primary is back as a streaming standby: {back_s:.1f} s")
        return back_s

    def _await_takeover(self, recorders: Recorders, fault: Fault, lifted_ns: int | None) -> str | None:
        """The node that acknowledges the client's writes after the fault (or the store's return)."""
        limit = 3 * self._timing.failover_timeout_s + 30
        self._say(f"Waiting for writes to be acknowledged again, for at most {limit:g} s")
        deadline = time.monotonic() + limit
        struck = fault.strikes
        while time.monotonic() < deadline:
            fault.again()
            if fault.strikes > struck:
                struck = fault.strikes
                self._say(f"The supervisor has started another agent; struck again ({struck})")
            self._pause(recorders)
            if not recorders.writer.acks:
                continue
            last = recorders.writer.acks[-1]
            name = self._cluster.node_at(last.port)
            if lifted_ns is not None and last.sent_ns > lifted_ns:
                return name
            if lifted_ns is None and name != fault.old:
                return name
        return None

    def _found(
        self, recorders: Recorders, fault_ns: int, lifted_ns: int | None, old: str, new: str | None
    ) -> Measured:
        recordings = {name: recorder.recording for name, recorder in recorders.probers.items()}
        problems: list[str] = []
        last = recorders.writer.acks[-1]
        holder = self._cluster.node_at(last.port) if new is not None else None
        if holder is not None and holder != new:
            problems.append(f"the primary changed again, from {new} to {holder}")
        if new is not None and not any(a.sent_ns > fault_ns for a in recordings[new].acks):
            problems.append(f"the prober of {new} got no row acknowledged although the writer did")
        lost = 0
        stored = self._read_back(holder or old)
        if stored is None:
            problems.append(f"the rows could not be read back from {holder or old}: lost_rows is not known")
        else:
            self._say(
                f"{len(recorders.writer.acks)} rows acknowledged, {len(stored)} rows found in {holder or old}"
            )
            missing = measure.lost_rows((ack.id for ack in recorders.writer.acks), stored)
            lost = len(missing)
            if missing:
                self._say(f"Lost ids: {', '.join(map(str, missing[:20]))}{' …' if lost > 20 else ''}")
        return Measured(
            outage_s=measure.outage_s(recorders.writer.acks, fault_ns) if new is not None else float("inf"),
            lost=lost,
            acknowledged=len(recorders.writer.acks),
            dual_primary_s=measure.dual_primary_s(recordings),
            last_ack_s=measure.last_ack_s(recordings[old], fault_ns, lifted_ns),
            old=old,
            new=holder or new,
            problems=tuple(problems),
        )

    def _read_back(self, name: str) -> list[int] | None:
        deadline = time.monotonic() + READ_BACK_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                with psycopg.connect(
                    self._cluster.conninfo(name) + " connect_timeout=2", autocommit=True
                ) as link:
                    return [int(row[0]) for row in link.execute("SELECT id FROM harmony_demo").fetchall()]
            except psycopg.Error:
                time.sleep(0.5)
        return None
