"""One repeat of a scenario, from an empty machine to its figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import msgspec
import psycopg

from bench.ha.peer import Options
from bench.ha.records import NS, Figures, figures
from bench.ha.scenarios import AFTER_S, SCENARIOS, Act, Scenario, Step
from bench.ha.stage import Stage, State
from tests.hosts.host import HostError

RECOVER_TIMEOUT_S = 60.0
STORE_DOWN = "store-down"
QUIET_S = 2.0


class Repeat(msgspec.Struct, frozen=True):
    """What one repeat gave. `error`: it could not be carried out, or something never came; figures may be missing."""

    scenario: str
    options: Options
    figures: Figures | None
    fault_lasted_s: float
    rejoin_s: (
        float | None
    )  # after the fault was undone the host that was hit has new rows again; None: not in time
    rejoin_limit_s: float
    final_primary: str
    load: tuple[float, float, float]  # os.getloadavg() before it began: others may have used the machine
    error: str
    versions: dict[str, str] = {}


class Limits(msgspec.Struct, frozen=True):
    """What a campaign shortens."""

    rejoin_s: float = 45.0
    store_down_s: float | None = None


def carry_out(scenario: str, options: Options, limits: Limits, say: Callable[[str], None]) -> Repeat:
    """Never raises HostError: what went wrong is in the repeat."""
    what = SCENARIOS[scenario]
    load = os.getloadavg()
    wanted = msgspec.structs.replace(options, stores=max(options.stores, what.stores))
    try:
        with Stage(wanted, disks=what.disks, say=say) as stage:
            return _play(stage, scenario, what, limits, load)
    except (HostError, OSError, psycopg.Error) as error:
        return Repeat(
            scenario=scenario,
            options=wanted,
            figures=None,
            fault_lasted_s=0.0,
            rejoin_s=None,
            rejoin_limit_s=limits.rejoin_s,
            final_primary="",
            load=load,
            error=f"{type(error).__name__}: {error}"[:2000],
        )


def _play(
    stage: Stage, name: str, what: Scenario, limits: Limits, load: tuple[float, float, float]
) -> Repeat:
    state = stage.state()
    if state is None:
        raise HostError("nobody is the primary just before the fault")
    act = Act(stage, state.primary, state.primary)
    fault_ns = stage.now_ns()
    what.strike(act)
    lasts_s = limits.store_down_s if name == STORE_DOWN and limits.store_down_s else what.lasts_s
    _last(act, what.keep, lasts_s, fault_ns)
    healed_ns = stage.now_ns()
    what.heal(act)
    rejoined = stage.comes(lambda: stage.rejoined(act.victim, healed_ns), limits.rejoin_s)
    rejoin_s = (stage.now_ns() - healed_ns) / NS if rejoined else None
    if not rejoined:
        stage.keep_logs()
    wrote = stage.comes(lambda: stage.client_wrote_since(healed_ns), RECOVER_TIMEOUT_S)
    final = _final(stage)
    time.sleep(QUIET_S)
    return Repeat(
        scenario=name,
        options=stage.options,
        figures=_figures(stage, act, fault_ns, final),
        fault_lasted_s=(healed_ns - fault_ns) / NS,
        rejoin_s=rejoin_s,
        rejoin_limit_s=limits.rejoin_s,
        final_primary=final.primary,
        load=load,
        versions={**stage.peer.versions(), "postgresql": stage.parts.postgres.version},
        error="" if wrote else f"the client could not write within {RECOVER_TIMEOUT_S:g} s after the fault",
    )


def _last(act: Act, keep: Step, lasts_s: float | None, fault_ns: int) -> None:
    """Let the fault last so long, or until another host has acknowledged for a while."""
    stage = act.stage
    until = time.monotonic() + (lasts_s if lasts_s is not None else stage.peer.takeover_s)
    seen = lasts_s is not None
    while time.monotonic() < until:
        keep(act)
        if not seen and stage.another_wrote_since(fault_ns, act.old):
            seen = True
            until = time.monotonic() + AFTER_S
        time.sleep(0.05)


def _final(stage: Stage) -> State:
    found: list[State] = []

    def look() -> bool:
        state = stage.state()
        found.extend([state] if state is not None else [])
        return bool(found)

    stage.wait_until(look, "a primary at the end", RECOVER_TIMEOUT_S)
    return found[-1]


def _figures(stage: Stage, act: Act, fault_ns: int, final: State) -> Figures:
    for recorder in stage.recorders():
        recorder.stop()
    assert stage.client is not None
    return figures(
        stage.named(stage.client.acks),
        {name: recorder.acks for name, recorder in stage.local.items()},
        stage.stored(final.primary),
        fault_ns=fault_ns,
        old=act.old,
        last=final.primary,
    )
