"""The faults of a chaos campaign: the failover bench's, and more of them, each also where another may be under way.

They act on hosts, processes, cables and disks; of the peer they ask which process is what, a switchover, and who leads
its store. One that finds nothing to break says so by HostError, and has broken nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bench.ha import scenarios
from bench.ha.peer import DATABASES, stores
from bench.ha.plan import SWITCHOVER
from bench.ha.scenarios import Act, Step, nothing
from tests.hosts.host import HostError
from tests.hosts.lab import Light
from tests.hosts.processes import Process
from tests.hosts.relay import Way

STORE = "store"  # stands for all of the store's hosts where a fault's host is named


@dataclass(frozen=True)
class Fault:
    """`takes` names the parts of its host that no second fault may have meanwhile: some cannot be broken twice."""

    what: str
    strike: Step
    heal: Step = nothing
    keep: Step = nothing
    takes: frozenset[str] = field(default_factory=frozenset)
    at_store: bool = False


def _host(act: Act) -> Light:
    return act.stage.lab.hosts[act.victim]


def _signal(processes: Iterable[Process], number: signal.Signals) -> int:
    count = 0
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.outside_pid, number)
            count += 1
    return count


def _guard(name: str, number: signal.Signals) -> Step:
    def strike(act: Act) -> None:
        if not _signal(act.stage.peer.guards(_host(act)).get(name, ()), number):
            raise HostError(f"{act.victim} has no {name}")

    return strike


def _agents(number: signal.Signals) -> Step:
    def strike(act: Act) -> None:
        act.signal_agents(number)
        if not act.hit:
            raise HostError(f"{act.victim} has no agent")

    return strike


def _thaw_guard(name: str) -> Step:
    def heal(act: Act) -> None:
        _signal(act.stage.peer.guards(_host(act)).get(name, ()), signal.SIGCONT)

    return heal


def _kept(name: str, number: signal.Signals) -> Step:
    def keep(act: Act) -> None:
        _signal(act.stage.peer.guards(_host(act)).get(name, ()), number)

    return keep


def kill_backend(act: Act) -> None:
    """As the kernel does when memory is short: any of PostgreSQL's processes but the postmaster."""
    found = sorted(
        (p for p in _host(act).processes("postgres") if "-D" not in p.argv), key=lambda p: p.outside_pid
    )
    if not found:
        raise HostError(f"{act.victim} has no backend")
    _signal([found[int(act.pick * len(found))]], signal.SIGKILL)


def _shape(ways: Callable[[Act], tuple[Way, Way]]) -> Step:
    def strike(act: Act) -> None:
        to, from_ = ways(act)
        _host(act).shape(to=to, from_=from_)

    return strike


def _addresses(act: Act, names: Iterable[str]) -> list[str]:
    return [act.stage.lab.hosts[name].address for name in names if name != act.victim]


def _from_store(act: Act) -> tuple[Way, Way]:
    away = Way(block=True, peers=_addresses(act, stores(act.stage.options.stores)))
    return away, away


def _from_peers(act: Act) -> tuple[Way, Way]:
    away = Way(block=True, peers=_addresses(act, DATABASES))
    return away, away


def _lossy(act: Act) -> tuple[Way, Way]:
    way = Way(loss=0.1 + 0.6 * act.pick)
    return way, way


def _delayed(act: Act) -> tuple[Way, Way]:
    way = Way(delay_ms=10 + 600 * act.pick**2)
    return way, way


def _store_host(act: Act) -> str:
    """The leader where one is known, else any."""
    with contextlib.suppress(HostError, OSError):
        return act.stage.peer.store_leader()
    names = stores(act.stage.options.stores)
    return names[int(act.pick * len(names))]


def freeze_store(act: Act) -> None:
    act.store = _store_host(act)
    act.stage.lab.hosts[act.store].freeze()


def thaw_store(act: Act) -> None:
    act.stage.lab.hosts[act.store].thaw()


def cut_store(act: Act) -> None:
    act.store = _store_host(act)
    act.stage.lab.hosts[act.store].cut()


def join_store(act: Act) -> None:
    act.stage.lab.hosts[act.store].heal()


def lose_store(act: Act) -> None:
    act.store = _store_host(act)
    act.stage.lab.hosts[act.store].power_cut()


def switch_over(act: Act) -> None:
    """Asked for beside everything else: it may be refused, or come to nothing."""
    others = [name for name in DATABASES if name != act.old]
    new = others[int(act.pick * len(others))]

    def ask() -> None:
        try:
            act.stage.peer.switch_over(act.old, new)
        except (HostError, OSError) as error:
            act.stage.say(f"    switchover to {new}: {error}"[:300])

    threading.Thread(target=ask, daemon=True).start()


CABLE, POWER, DISK = frozenset({"cable"}), frozenset({"power"}), frozenset({"disk"})
KILL, STOP = signal.SIGKILL, signal.SIGSTOP

FAULTS: dict[str, Fault] = {
    "postmaster-killed": Fault("SIGKILL to the postmaster", scenarios.kill_postmaster),
    "backend-killed": Fault("SIGKILL to one of PostgreSQL's other processes", kill_backend),
    "host-lost": Fault(
        "a power cut, and back", scenarios.lose_host, scenarios.boot_host, takes=CABLE | POWER | DISK
    ),
    "host-frozen": Fault(
        "the whole host stands still, then goes on",
        scenarios.freeze_host,
        scenarios.thaw_host,
        takes=POWER | DISK,
    ),
    "isolated": Fault("cut off both ways, silently", scenarios.isolate, scenarios.join, takes=CABLE),
    "deaf": Fault(
        "nothing comes in", _shape(lambda _: (Way(block=True), Way())), scenarios.join, takes=CABLE
    ),
    "mute": Fault(
        "nothing goes out", _shape(lambda _: (Way(), Way(block=True))), scenarios.join, takes=CABLE
    ),
    "cut-from-store": Fault(
        "only the store is out of reach", _shape(_from_store), scenarios.join, takes=CABLE
    ),
    "cut-from-peers": Fault(
        "only the other databases are out of reach", _shape(_from_peers), scenarios.join, takes=CABLE
    ),
    "lossy": Fault("10 to 70 % of all frames are lost", _shape(_lossy), scenarios.join, takes=CABLE),
    "delayed": Fault("10 to 610 ms are added each way", _shape(_delayed), scenarios.join, takes=CABLE),
    "agent-killed": Fault(
        "SIGKILL to the agent, once",
        _agents(KILL),
        nothing,
        scenarios.restart_agent,
        takes=frozenset({"agent"}),
    ),
    "agent-kept-down": Fault(
        "SIGKILL to the agent and each replacement",
        _agents(KILL),
        scenarios.restart_agent,
        scenarios.kill_agent,
        takes=frozenset({"agent"}),
    ),
    "agent-frozen": Fault(
        "SIGSTOP to the agent and each replacement",
        _agents(STOP),
        scenarios.thaw_agent,
        scenarios.freeze_agent,
        takes=frozenset({"agent"}),
    ),
    "agent-frozen-once": Fault(
        "SIGSTOP to the agent, once",
        _agents(STOP),
        scenarios.thaw_agent,
        takes=frozenset({"agent"}),
    ),
    "fencer-killed": Fault("SIGKILL to the fencer, once", _guard("fencer", KILL)),
    "fencer-kept-down": Fault(
        "SIGKILL to the fencer and each replacement", _guard("fencer", KILL), nothing, _kept("fencer", KILL)
    ),
    "fencer-frozen": Fault("SIGSTOP to the fencer, once", _guard("fencer", STOP), _thaw_guard("fencer")),
    "supervisor-killed": Fault("SIGKILL to the supervisor", _guard("supervisor", KILL)),
    "supervisor-frozen": Fault(
        "SIGSTOP to the supervisor", _guard("supervisor", STOP), _thaw_guard("supervisor")
    ),
    "store-down": Fault(
        "all store hosts lose their power",
        scenarios.lose_stores,
        scenarios.boot_stores,
        takes=POWER,
        at_store=True,
    ),
    "store-leader-lost": Fault(
        "the stream leader's host loses its power",
        lose_store,
        scenarios.boot_store_leader,
        takes=POWER,
        at_store=True,
    ),
    "store-leader-frozen": Fault(
        "the stream leader's host stands still", freeze_store, thaw_store, takes=POWER, at_store=True
    ),
    "store-leader-cut": Fault(
        "the stream leader's host is cut off", cut_store, join_store, takes=POWER, at_store=True
    ),
    SWITCHOVER: Fault("a planned change, by the peer's own command", switch_over),
    "disk-stalled": Fault(
        "the disk hangs: who writes to it waits, and cannot be killed",
        scenarios.stall_disk,
        scenarios.mend_disk,
        takes=DISK | POWER,
    ),
}
