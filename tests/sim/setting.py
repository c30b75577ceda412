"""What a seed decides before anything runs: how many nodes, which times, how late messages are, how wrong clocks.

It draws and nothing else. Whatever it draws keeps the assumptions that the design states: the inequality of
`Timing`, clock drift and scheduling delay inside safety_margin. Tests that break one do it by `Rules`.

The protocol is scale-free but for a few short pauses of the core, so most seeds run with all times scaled up
(log-uniform, 1 to 100): an hour of them costs what a minute costs at the fast preset, and holds as many heartbeats
for each fault. The inequality is drawn tight there, so that every nanosecond of the argument is leant on.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from harmony.core.rejoin import MOST_PAUSE_NS, REJOIN_PATIENCE
from harmony.core.sync import Mode
from harmony.core.timing import NS, PRESETS, Timing
from harmony.core.view import Policy

MS = NS // 1000
GUARD_SHARE = 0.45  # of safety_margin: how late the fencer's guard may wake up
DRIFT_SHARE = 0.45  # of safety_margin: what the rates of two clocks may differ by, over a failover_timeout


@dataclass(frozen=True, slots=True)
class Setting:
    """Of one run. Times in nanoseconds."""

    kind: str  # fast, standard, wan or scaled
    names: tuple[str, ...]
    timing: Timing
    sync_count: int
    sync_mode: Mode
    maximum_lag_bytes: int
    policy: Policy
    nofailover: frozenset[str]
    drift: float  # the rate of a host's clock is within 1 ± drift
    latency_ns: int  # the longest usual one-way delay of a message
    wake_ns: int  # the longest that an agent with something to do waits for its turn
    guard_ns: int  # the longest that the fencer waits for its turn after the lease's end
    unit_ns: int  # what PostgreSQL's starts, stops and promotions are measured in
    faults_ns: int  # the phase with faults; then everything heals

    @property
    def calm_ns(self) -> int:
        """How long after healing one writable primary must be there (I5), for good."""
        t = self.timing
        flap = 16 * t.success_threshold * (t.interval_ns + t.timeout_ns)
        return 8 * t.failover_ns + 20 * self.unit_ns + flap + 30 * NS

    @property
    def back_ns(self) -> int:
        """How long after that every other node must stream from it: the longest pause between rejoins, and some of
        them that are ended by a change of leadership, or do not help."""
        patience = 2 * REJOIN_PATIENCE * self.policy.rejoin_after_ns
        return 3 * (MOST_PAUSE_NS + patience + 40 * self.unit_ns) + 4 * self.timing.failover_ns


def log_uniform(r: random.Random, low: float, high: float) -> float:
    return math.exp(r.uniform(math.log(low), math.log(high)))


def _scaled(r: random.Random) -> Timing:
    """Times of one scale, tight to the inequality more often than not."""
    interval = r.uniform(0.6, 2.0) * log_uniform(r, 1.0, 100.0)
    timeout = interval * r.uniform(0.4, 2.0)
    threshold = r.choice((1, 2, 3, 3, 4, 5))
    fence = interval * r.uniform(0.3, 2.0)
    margin = interval * r.uniform(0.2, 1.2)
    needed = interval + timeout * threshold + fence + margin
    over = 1e-6 if r.random() < 0.6 else r.uniform(0.0, 0.3)
    t = Timing(
        heartbeat_interval_s=interval,
        heartbeat_timeout_s=timeout,
        failure_threshold=threshold,
        success_threshold=r.choice((1, 2, 2, 3)),
        fence_timeout_s=fence,
        safety_margin_s=margin,
        failover_timeout_s=needed * (1 + over) + 1e-6,
    )
    if t.violation() is not None:
        raise AssertionError(t.violation())
    return t


def draw(seed: int, drift: float | None = None) -> Setting:
    """The setting of a seed. `drift` overrides the drawn one: beyond the margin on purpose."""
    r = random.Random(f"setting {seed}")
    kind = r.choices(("fast", "standard", "wan", "scaled"), (8, 6, 6, 80))[0]
    timing = PRESETS[kind] if kind in PRESETS else _scaled(r)
    count = r.choices((2, 3, 4, 5, 6, 7), (14, 52, 12, 14, 4, 4))[0]
    names = tuple(f"n{i + 1}" for i in range(count))
    sync_count = 0 if r.random() < 0.2 else r.choice((1, 1, 1, r.randrange(1, count)))
    mode = (
        random.Random(f"sync {seed}").choices(("quorum", "on", "strict"), (5, 2, 3))[0]
        if sync_count
        else "off"
    )
    interval_s = timing.heartbeat_interval_s
    preferred = names[0]
    sick = random.Random(f"sick {seed}")
    policy = Policy(
        preferred_primary=preferred,
        failback=r.choice(("off", "automatic")),
        failback_after_s=timing.failover_timeout_s * r.uniform(0.2, 3),
        maximum_changes=r.choice((0, 0, 0, 4, 12)),
        changes_window_s=timing.failover_timeout_s * r.uniform(10, 100),
        flap_window_s=timing.failover_timeout_s * r.uniform(2, 20),
        rejoin_after_s=timing.failover_timeout_s * random.Random(f"rejoin {seed}").uniform(0.2, 2),
        sick_after_s=timing.failover_timeout_s * sick.uniform(0.2, 2),
        sick_handover=sick.random() < 0.9,
        restart_budget=sick.choice((0, 1, 3)),
        restart_window_s=timing.failover_timeout_s * sick.uniform(2, 20),
    )
    most = DRIFT_SHARE * timing.safety_margin_s / (2 * timing.failover_timeout_s)
    latency = min(timing.heartbeat_timeout_s / 12, log_uniform(r, 0.001, 0.5) * max(1.0, interval_s))
    return Setting(
        kind=kind,
        names=names,
        timing=timing,
        sync_count=sync_count,
        sync_mode=mode,
        maximum_lag_bytes=r.choice((0, 2000, 10**7)) if sync_count else r.choice((2000, 10**7)),
        policy=policy,
        nofailover=frozenset(n for n in names[2:] if r.random() < 0.08),
        drift=drift if drift is not None else most * r.choice((0.01, 0.3, 1.0, 1.0)),
        latency_ns=max(MS, round(latency * NS)),
        wake_ns=round(interval_s * NS * r.choice((0.002, 0.02, 0.08, 0.15))),
        guard_ns=round(timing.margin_ns * GUARD_SHARE * r.choice((0.02, 0.5, 1.0, 1.0))),
        unit_ns=round(interval_s * NS * r.uniform(0.2, 1.0)),
        faults_ns=round(timing.failover_ns * r.uniform(25, 60)),
    )


def plain() -> Setting:
    """Of the scenario texts: three nodes, the fast preset, nothing lost or late."""
    timing = PRESETS["fast"]
    return Setting(
        kind="fast",
        names=("n1", "n2", "n3"),
        timing=timing,
        sync_count=1,
        sync_mode="quorum",
        maximum_lag_bytes=1000,
        policy=Policy(preferred_primary="n1", sick_after_s=10.0),
        nofailover=frozenset(),
        drift=1e-4,
        latency_ns=4 * MS,
        wake_ns=2 * MS,
        guard_ns=MS,
        unit_ns=300 * MS,
        faults_ns=0,
    )
