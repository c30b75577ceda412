"""Seeded simulation of 2 to 7 nodes: I1 to I4 and I6 at every change, I5 after healing; every row of the table.

HOURS (of simulated time) or SEEDS in the environment say how much, from seed FIRST on. Whole, it begins at seed 0 and
holds 2,000 hours; in a sample (tests/sampling.py) it is a fifth of that, of seeds that no run before has had.
One seed: `python -m tests.sim.replay SEED`.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from harmony.core.table import TABLE
from harmony.core.timing import NS, Timing
from tests import sampling
from tests.sim.campaign import explain, run_all, seeds_for, shrink
from tests.sim.checks import Violation
from tests.sim.faults import Fault
from tests.sim.setting import MS, Setting, plain
from tests.sim.world import Rules, World

pytestmark = pytest.mark.computes

WHOLE_H, SAMPLE_H = 2000, 400
SEEDS_A_TURN = 1000  # more than a sample's: no seed comes twice
HOURS = float(os.environ.get("HOURS", str(WHOLE_H if sampling.turn() is None else SAMPLE_H)))
SEEDS = int(os.environ.get("SEEDS", "0"))
FIRST = int(os.environ.get("FIRST", str((sampling.turn() or 0) * SEEDS_A_TURN)))

# Rows that the simulator cannot reach, and why.
UNREACHED = {
    208: "202 comes first: the lease that the fencer holds ends, or is dropped, no later than our own",
    706: "whoever reads an old leader's answer when its agent starts is shown the truth by the watch in the same turn",
    908: "902 comes first: the lease that the fencer holds ends, or is dropped, no later than our own",
    113: "every host of the model has data from the start: tests/core/test_founding.py, tests/demo/test_bootstrap.py",
    603: "no host of the model was in another cluster before: tests/core/test_distrust.py, tests/agent/test_shell.py",
    717: "the model has no slots: tests/core/test_slots.py, tests/demo/test_slots.py",
    **dict.fromkeys(
        (105, 115, 150, 152, 154, 156, 158, 160, 162, 605, 607),
        "nothing runs in the model before Harmony does: tests/core/test_adoption.py, tests/demo/test_adoption.py",
    ),
}


def test_no_violation() -> None:
    """I1 to I6, D1, D5 to D7, D9, W1 to W9 under everything that faults.py can do; every row is taken, and says why."""
    tally = run_all(FIRST, SEEDS or seeds_for(HOURS, FIRST))
    print(tally.text())
    if tally.failures:
        pytest.fail(explain(min(tally.failures)[0]))
    if not SEEDS:
        assert tally.hours >= HOURS
    if tally.hours >= WHOLE_H:
        assert {row.id for row in TABLE if not tally.rows[row.id]} == set(UNREACHED)


def first_violation(rules: Rules, known: int, seeds: int = 400) -> int | None:
    """A seed that breaks I1 to I4 or I6: `known`, which did when this was written, else the first."""
    for seed in (known, *range(seeds)):
        world = World(seed, rules=rules)
        try:
            world.run()
        except Violation as e:
            if not str(e).startswith("I5"):
                return seed
    return None


# Each with a seed that finds it: a search from seed 0 takes up to a minute, and is made when that one finds it no more.
BROKEN = {
    "no lease check": (Rules(fencer_checks_lease=False), 10),
    "timelines not reserved": (Rules(timelines_reserved=False), 132),
    "no compare-and-set": (Rules(store_checks_revision=False), 3),
    "no proof of the fence": (Rules(fencer_proves=False), 0),
    "PostgreSQL runs before the fencer after a pause": (Rules(fencer_first=False), 30),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_assumption_is_found(name: str) -> None:
    """The checker can fail: each assumption that is broken on purpose is found out."""
    seed = first_violation(*BROKEN[name])
    assert seed is not None
    print(f"{name}: seed {seed}")


def tight(**times: float) -> Timing:
    """Times that leave nothing over what the inequality asks for."""
    return Timing(failure_threshold=1, success_threshold=1, **times)


def test_drift_beyond_the_margin_is_found() -> None:
    """I1 rests on bounded clock drift: beyond the margin the simulation must find two primaries, within it none."""
    timing = tight(
        heartbeat_interval_s=0.2,
        heartbeat_timeout_s=1.8,
        fence_timeout_s=0.3,
        safety_margin_s=0.1,
        failover_timeout_s=2.4001,
    )
    found = {0.01: 0, 0.6: 0}
    for drift in found:
        known = replace(plain(), timing=timing, drift=drift, unit_ns=30 * MS)
        for seed in range(24):
            try:
                World(seed, known=known, done=[Fault(5 * NS, "cut", "n1", span_ns=9 * NS)]).script(14.0)
            except Violation:
                found[drift] += 1
    assert found[0.01] == 0
    assert found[0.6] > 0


def late_acknowledgements(seed: int) -> tuple[Setting, list[Fault]]:
    """Answers take nearly heartbeat_timeout, then no request comes through, then the agent is stopped."""
    timing = tight(
        heartbeat_interval_s=0.5,
        heartbeat_timeout_s=6.0,
        fence_timeout_s=0.3,
        safety_margin_s=0.3,
        failover_timeout_s=7.1001,
    )
    quick = replace(
        plain(), sync_count=0, sync_mode="off", maximum_lag_bytes=10**7
    )  # whoever is alive may lead
    known = replace(quick, timing=timing, latency_ns=10 * MS, unit_ns=30 * MS, guard_ns=130 * MS)
    at = (200 + 2 * seed) * NS // 10
    return known, [
        Fault(5 * NS, "watch-dead", "n1", span_ns=90 * NS),
        Fault(9 * NS, "slow-link", "n1", span_ns=90 * NS, amount=290.0),
        Fault(at, "requests-lost", "n1", span_ns=40 * NS),
        Fault(at + 58 * NS // 10, "agent-frozen", "n1", span_ns=40 * NS),
    ]


def test_a_lease_counted_from_the_acknowledgement_is_found() -> None:
    """D5: it must count from the send of the heartbeat that was acknowledged."""
    found = {True: 0, False: 0}
    for dated in found:
        for seed in range(12):
            known, done = late_acknowledgements(seed)
            try:
                World(seed, rules=Rules(dated_from_send=dated), known=known, done=done).script(45.0)
            except Violation:
                found[dated] += 1
    assert found[True] == 0
    assert found[False] > 0


def test_what_is_called_spent_and_runs_on_is_found() -> None:
    """I1 rests on that: nothing with SIGKILL pending in the kernel acknowledges a commit ever again (ADR 015)."""
    hung = [
        Fault(5 * NS, "postgres-clings", "n1", span_ns=60 * NS),
        Fault(5 * NS, "postgres-hangs", "n1", span_ns=12 * NS),
    ]
    found = {True: 0, False: 0}
    for rule in found:
        for seed in range(12):
            try:
                World(seed, rules=Rules(spent_never_runs=rule), known=plain(), done=hung).script(40.0)
            except Violation:
                found[rule] += 1
    assert found[True] == 0
    assert found[False] > 0


def lost_one_after_the_other(*more: Fault) -> list[Fault]:
    """n2 stops getting WAL, and the primary n1 loses its power a second later, for good."""
    return [
        *more,
        Fault(39 * NS, "apart", "n2", "n1", span_ns=90 * NS),
        Fault(40 * NS, "host-lost", "n1", span_ns=90 * NS),
    ]


def breaks(known: Setting, done: list[Fault], **rules: bool) -> int:
    """In how many of some seeds an acknowledged commit is lost."""
    found = 0
    for seed in range(12):
        try:
            World(seed, rules=Rules(**rules), known=known, done=done).script(60.0)
        except Violation as e:
            found += str(e).startswith("I2")
    return found


def test_commits_that_do_not_wait_yet_are_not_taken_for_synchronous() -> None:
    """I2: the only standby is back, and the checkpointer is in an fsync: until it has ended commits wait for nobody."""
    known = replace(plain(), names=("n1", "n2"))
    done = lost_one_after_the_other(
        Fault(20 * NS, "host-lost", "n2", span_ns=10 * NS), Fault(28 * NS, "fsync", "n1", span_ns=60 * NS)
    )
    assert breaks(known, done) == 0
    assert breaks(known, done, waiting_is_seen=False) > 0


def test_a_standby_without_a_rule_would_acknowledge_too_early() -> None:
    """I2: n3 is promoted while its checkpointer is in an fsync, and lost soon after."""
    done = [
        Fault(18 * NS, "fsync", "n2", span_ns=60 * NS),
        Fault(18 * NS, "fsync", "n3", span_ns=60 * NS),
        Fault(20 * NS, "host-lost", "n1", span_ns=8 * NS),
    ]
    for n in ("n2", "n3"):  # whichever leads by then
        done += [Fault(30 * NS, "apart", n, "n1", span_ns=90 * NS)]
    done += [
        Fault(30 * NS, "apart", "n2", "n3", span_ns=90 * NS),
        Fault(31 * NS, "host-lost", "n2", span_ns=90 * NS),
    ]
    assert breaks(plain(), done) == 0
    assert breaks(plain(), done, standbys_hold=False) > 0


def test_a_failing_seed_is_shrunk() -> None:
    """Few faults are left, and the trace names what was broken and can be had again."""
    rules, known = BROKEN["no lease check"]
    seed = first_violation(rules, known)
    assert seed is not None
    why, world = shrink(seed, rules)
    assert why.startswith("I")
    assert len(world.faults) < len(World(seed).faults) / 2
    assert len(world.faults) <= 8
    again = World(seed, rules=rules, done=world.faults)
    with pytest.raises(Violation):
        again.run()
    assert again.trace == world.trace
