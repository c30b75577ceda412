"""What happens to a cluster in the failover bench: each scenario is a fault, how long it lasts, and how it is undone.

They act on hosts, processes, cables and disks; of the peer they ask a switchover, and who leads its store.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from bench.ha.peer import DATABASES, stores
from bench.ha.stage import Stage
from tests.hosts.host import HostError

AFTER_S = 8.0  # a fault lasts so much longer than the new primary's first acknowledgement
STALL_S = 30.0


@dataclass
class Act:
    """A fault under way: the primary when it struck, the host that is hit (often the same), what was hit.

    `pick` (0 to 1) chooses what the fault leaves open.
    """

    stage: Stage
    old: str
    victim: str
    store: str = ""
    pick: float = 0.0

    def __post_init__(self) -> None:
        self.hit: set[int] = set()

    def signal_agents(self, number: signal.Signals) -> None:
        """Signal every agent of the victim that was not signalled before."""
        for process in self.stage.peer.agents(self.stage.lab.hosts[self.victim]):
            if process.outside_pid not in self.hit:
                self.hit.add(process.outside_pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.outside_pid, number)


Step = Callable[[Act], None]


def nothing(_act: Act) -> None:
    """No step."""


@dataclass(frozen=True)
class Scenario:
    """`strike` returns when the fault is there. `keep` is repeated while it lasts, `heal` undoes it.

    `lasts_s`: a fixed time, or None: until AFTER_S after another host has acknowledged, or the peer's takeover_s.
    """

    what: str
    strike: Step
    heal: Step
    keep: Step = nothing
    lasts_s: float | None = None
    stores: int = 1
    disks: bool = False


def kill_postmaster(act: Act) -> None:
    os.kill(act.stage.postmaster(act.victim).outside_pid, signal.SIGKILL)


def lose_host(act: Act) -> None:
    act.stage.lab.hosts[act.victim].power_cut()


def boot_host(act: Act) -> None:
    act.stage.lab.hosts[act.victim].power_on()
    act.stage.peer.start_host(act.victim)


def isolate(act: Act) -> None:
    act.stage.lab.hosts[act.victim].cut()


def join(act: Act) -> None:
    act.stage.lab.hosts[act.victim].heal()


def kill_agent(act: Act) -> None:
    act.signal_agents(signal.SIGKILL)


def freeze_agent(act: Act) -> None:
    act.signal_agents(signal.SIGSTOP)


def restart_agent(act: Act) -> None:
    act.stage.peer.restart_agent(act.victim)


def thaw_agent(act: Act) -> None:
    for process in act.stage.peer.agents(act.stage.lab.hosts[act.victim]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.outside_pid, signal.SIGCONT)
    restart_agent(act)


def freeze_host(act: Act) -> None:
    act.stage.lab.hosts[act.victim].freeze()


def thaw_host(act: Act) -> None:
    act.stage.lab.hosts[act.victim].thaw()


def lose_stores(act: Act) -> None:
    for name in stores(act.stage.options.stores):
        act.stage.lab.hosts[name].power_cut()


def boot_stores(act: Act) -> None:
    for name in stores(act.stage.options.stores):
        act.stage.lab.hosts[name].power_on()
        act.stage.peer.start_store(name)


def lose_store_leader(act: Act) -> None:
    act.store = act.stage.peer.store_leader()
    act.stage.lab.hosts[act.store].power_cut()


def boot_store_leader(act: Act) -> None:
    act.stage.lab.hosts[act.store].power_on()
    act.stage.peer.start_store(act.store)


def lose_store_leader_and_host(act: Act) -> None:
    lose_store_leader(act)
    lose_host(act)


def boot_store_leader_and_host(act: Act) -> None:
    boot_store_leader(act)
    boot_host(act)


def switch_over(act: Act) -> None:
    act.stage.wait_until(act.stage.replicating, "standbys to hand over to", 30)
    state = act.stage.state()
    candidates = sorted((state.synchronous or state.streaming) if state else set(DATABASES) - {act.old})
    act.stage.peer.switch_over(act.old, candidates[0])


def lose_standby(act: Act) -> None:
    state = act.stage.state()
    if state is None:
        raise HostError("no primary says which standby is synchronous")
    act.victim = min(state.synchronous or state.streaming)
    lose_host(act)


def stall_disk(act: Act) -> None:
    act.stage.lab.hosts[act.victim].freeze_disk(True)


def mend_disk(act: Act) -> None:
    act.stage.lab.hosts[act.victim].freeze_disk(False)


SCENARIOS: dict[str, Scenario] = {
    "postmaster-killed": Scenario("SIGKILL to the primary's postmaster", kill_postmaster, nothing),
    "host-lost": Scenario("the primary's host loses its power", lose_host, boot_host),
    "host-isolated": Scenario("the primary's host is cut off, silently, both ways", isolate, join),
    "agent-killed": Scenario(
        "SIGKILL to the primary's agent, once; it is started again", kill_agent, nothing, keep=restart_agent
    ),
    "agent-kept-down": Scenario(
        "SIGKILL to the primary's agent and to every replacement", kill_agent, restart_agent, keep=kill_agent
    ),
    "agent-frozen": Scenario(
        "SIGSTOP to the primary's agent and to every replacement", freeze_agent, thaw_agent, keep=freeze_agent
    ),
    "agent-frozen-once": Scenario(
        "SIGSTOP to the primary's agent, once; its replacements are let be", freeze_agent, thaw_agent
    ),
    "host-frozen": Scenario(
        "the primary's whole host stands still beyond the lease, then goes on", freeze_host, thaw_host
    ),
    "store-down": Scenario(
        "the store's hosts lose their power, for 60 s", lose_stores, boot_stores, lasts_s=60.0
    ),
    "store-leader-lost": Scenario(
        "of three store hosts the leader loses its power",
        lose_store_leader,
        boot_store_leader,
        lasts_s=20.0,
        stores=3,
    ),
    "store-leader-and-host-lost": Scenario(
        "the same, together with the primary's host",
        lose_store_leader_and_host,
        boot_store_leader_and_host,
        stores=3,
    ),
    "switchover": Scenario("a planned change, by the peer's own command", switch_over, nothing),
    "standby-lost": Scenario(
        "the host of a synchronous standby loses its power",
        lose_standby,
        boot_host,
        lasts_s=30.0,
    ),
    "disk-stalled": Scenario(
        f"the primary's disk hangs for {STALL_S:g} s: writers to it wait and cannot be killed",
        stall_disk,
        mend_disk,
        lasts_s=STALL_S,
        disks=True,
    ),
}
