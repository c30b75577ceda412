"""I2: no order of steps, losses, reloads and commits leaves an acknowledged commit on too few recorded voters."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import msgspec
import pytest

from harmony.core import ruling, sync
from harmony.core.messages import DbSeen
from harmony.core.sync import (
    HOLD,
    NOBODY,
    Record,
    Rule,
    Ruling,
    Tell,
    implies,
    mixed,
    next_step,
    told_as,
    wanted,
)
from tests.sim.waiting import CHECKPOINTER, MAIN, Waiting

NODES = ("n2", "n3", "n4", "n5")


class Primary:
    """Streams to NODES; each process of it has loaded a rule of its own. `broken` leaves a rule of the module out."""

    def __init__(self, seed: int, broken: str = "") -> None:
        self.r, self.broken = random.Random(seed), broken
        start = self.r.choice((Rule(1, NODES), Rule(2, NODES), NOBODY))
        self.recorded = start if start.count else Rule(0, NODES)
        self.pg = Waiting(start)
        self.to_load: list[str] = []
        self.flushed = dict.fromkeys(NODES, 0)
        self.able = set(NODES)
        self.clock = 1
        self.ruling = Ruling(0, start, start, sure=True, began_ns=0, taken_ns=1)

    def safe(self) -> bool:
        """Each candidate that may promote by the recorded rule, the best of those it has heard, has all."""
        if not self.recorded.count:
            return self.recorded.voters != ()  # nobody may
        needed = len(self.recorded.voters) - self.recorded.count + 1
        heard = combinations(self.recorded.voters, needed)
        return all(max(self.flushed[n] for n in some) >= self.pg.acked for some in heard)

    def holders(self) -> int:
        return sum(self.flushed[n] >= self.pg.acked for n in self.recorded.voters)

    def tick(self, mode: sync.Mode, count: int) -> None:
        self.clock += 1
        match self.r.randrange(9):
            case 0 | 1:
                self.pg.wrote(self.pg.end + self.r.randrange(1, 9))
            case 2 | 3 | 4:
                n = self.r.choice(sorted(self.able) or NODES)
                if n in self.able:
                    self.flushed[n] = self.r.randint(self.flushed[n], self.pg.end)
                    self.pg.confirm(n, 1, self.flushed[n])
            case 5:
                self.able ^= {self.r.choice(NODES)}
            case 6 if self.to_load:
                self.load(self.r.choice(self.to_load))
            case _:
                self.look()
                self.act(
                    wanted(
                        mode, count, frozenset(self.able), frozenset(NODES), frozenset(self.recorded.voters)
                    )
                )

    def signal(self, processes: tuple[str, ...]) -> None:
        self.to_load += [p for p in processes if p not in self.to_load]

    def load(self, process: str) -> None:
        self.to_load.remove(process)
        self.signal(self.pg.load(process))

    def look(self) -> None:
        senders = self.pg.walsenders()
        if self.broken == "voters are not looked at":
            senders = tuple(replace(w, voter=False) for w in senders)
        waiting = self.pg.waiting or self.broken == "not seen to wait"
        seen = DbSeen("primary", 1, self.pg.end, 0, False, "s", self.clock, self.pg.names, senders, waiting)
        self.ruling = ruling.database_seen(self.ruling, seen)

    def act(self, target: Rule) -> None:
        told = self.ruling.told
        step = next_step(self.recorded, self.ruling, target, self.flushed)
        if self.broken == "no wait" and told == told_as(target):
            step = Record(target)
        if self.broken == "told first" and told != told_as(target) and told != HOLD:
            step = Tell(told_as(target))
        if self.broken == "no hold" and step == Tell(HOLD):
            step = Tell(told_as(target))
        if self.broken == "recorded first" and self.recorded != target:
            step = Record(target)
        match step:
            case Record(rule=rule):
                self.recorded = rule
            case Tell(rule=rule):
                worst = mixed(self.ruling.worst, rule)
                self.ruling = msgspec.structs.replace(
                    self.ruling, told=rule, worst=worst, taken_ns=self.clock, lsn=0
                )
                self.pg.file = rule
                self.signal((MAIN,))
            case None:
                pass


def first_loss(broken: str, seeds: int = 300) -> int | None:
    for seed in range(seeds):
        p = Primary(seed, broken)
        mode: sync.Mode = ("quorum", "strict", "on")[seed % 3]
        for _ in range(500):
            p.tick(mode, 1 + seed % 4 % 3)
            if not p.safe():
                return seed
            assert broken or p.holders() >= p.recorded.count, seed
    return None


def test_no_acknowledged_commit_can_be_lost() -> None:
    assert first_loss("") is None


@pytest.mark.parametrize(
    "broken",
    ["no wait", "told first", "recorded first", "no hold", "not seen to wait", "voters are not looked at"],
)
def test_each_step_in_the_wrong_order_is_found(broken: str) -> None:
    assert first_loss(broken) is not None


def test_every_target_is_reached() -> None:
    """Once everybody is there and everything is loaded; so no step waits for what never comes."""
    for seed in range(200):
        p = Primary(seed)
        for _ in range(100):
            p.tick("quorum", 2)
        p.able = set(NODES)
        for _ in range(20):
            p.clock += 1
            while p.to_load:
                p.load(p.to_load[0])
            p.pg.wrote(p.pg.end + 1)
            for n in NODES:
                p.flushed[n] = p.pg.end
                p.pg.confirm(n, 1, p.pg.end)
            p.look()
            p.act(Rule(2, NODES))
        assert p.recorded == p.ruling.told == Rule(2, NODES), seed
        assert p.pg.acked == p.pg.end


@pytest.mark.parametrize(
    ("applied", "recorded", "expected"),
    [
        (Rule(1, ("n2",)), Rule(1, ("n2", "n3")), True),
        (Rule(1, ("n2", "n3")), Rule(1, ("n2",)), False),
        (Rule(2, ("n2", "n3")), Rule(1, ("n2",)), True),
        (Rule(2, ("n2", "n3", "n4")), Rule(1, ("n2", "n3")), True),
        (Rule(2, ("n2", "n3", "n4")), Rule(1, ("n2",)), False),
        (NOBODY, Rule(0, ("n2",)), True),
        (NOBODY, Rule(1, ("n2",)), False),
        (HOLD, Rule(3, NODES), True),
    ],
)
def test_what_a_rule_says_of_another(applied: Rule, recorded: Rule, expected: bool) -> None:
    assert implies(applied, recorded) is expected
    if applied != HOLD:  # by enumeration: each acknowledging set against each number of recorded voters in it
        sets = combinations(applied.voters, applied.count)
        assert all(len(set(s) & set(recorded.voters)) >= recorded.count for s in sets) is expected


def walk(recorded: Rule, target: Rule, flushed: dict[str, int], lsn: int = 5) -> list[str]:
    """Each step, carried out at once."""
    r, steps = Ruling(0, told_as(recorded), told_as(recorded), sure=True, began_ns=0, lsn=lsn), list[str]()
    while (step := next_step(recorded, r, target, flushed)) is not None:
        steps.append(f"{type(step).__name__.lower()} {step.rule}")
        if isinstance(step, Record):
            recorded = step.rule
        else:
            r = msgspec.structs.replace(r, told=step.rule, worst=step.rule)
        assert len(steps) < 6
    return steps


def test_a_lost_standby_is_dropped() -> None:
    """Told at once, so that nobody waits; recorded when the other has all that was acknowledged by the lost one."""
    both, one = Rule(1, ("n2", "n3")), Rule(1, ("n2",))
    assert walk(both, one, {"n2": 5}) == ["tell any 1 of n2", "record any 1 of n2"]
    assert walk(both, one, {"n2": 4}) == ["tell any 1 of n2"]


def test_the_last_one_is_lost() -> None:
    """First nobody may promote any more, then nobody is waited for."""
    alone = wanted("on", 1, frozenset(), frozenset(NODES), frozenset())
    assert walk(Rule(1, ("n2",)), alone, {}) == [
        "record nobody (of n2, n3, n4, n5)",
        "tell nobody",
    ]


def test_the_first_one_is_back() -> None:
    """Every commit waits for a moment: from then on none can be acknowledged by fewer."""
    one = Rule(1, ("n2",))
    steps = ["tell nobody confirms, commits wait", "tell any 1 of n2", "record any 1 of n2"]
    assert walk(Rule(0, NODES), one, {"n2": 5}) == steps


def test_switched_off_by_configuration() -> None:
    """Only then may whoever lags little promote, and only when nobody is waited for any more."""
    off = wanted("off", 1, frozenset(NODES), frozenset(NODES), frozenset())
    assert walk(Rule(1, ("n2",)), off, {}) == ["record nobody (of n2)", "tell nobody", "record nobody"]


def test_strict_waits_for_whoever_comes_back() -> None:
    def strict(*able: str) -> Rule:
        return wanted("strict", 2, frozenset(able), frozenset(NODES), frozenset())

    assert strict("n2") == Rule(2, NODES)
    assert strict("n2", "n3") == Rule(2, ("n2", "n3"))


def test_on_keeps_whom_it_has() -> None:
    """One chosen standby, not always the first of the alphabet: a change costs a round of steps."""
    chosen = wanted("on", 1, frozenset(NODES), frozenset(NODES), frozenset({"n4"}))
    assert chosen == Rule(1, ("n4",))


def test_one_more_confirms() -> None:
    """It is recorded before a commit may rest on it alone."""
    one, both = Rule(1, ("n2",)), Rule(1, ("n2", "n3"))
    assert walk(one, both, {"n2": 9, "n3": 9}) == ["record any 1 of n2, n3", "tell any 1 of n2, n3"]


def test_a_process_that_has_not_loaded_the_rule_keeps_it_from_being_in_force() -> None:
    """A walsender of whom is not waited for any more, the session that answers, and commits that nobody saw wait."""
    pg = Waiting(NOBODY)
    pg.confirm("n2", 1, 1)
    r = Ruling(1, HOLD, NOBODY, sure=True, began_ns=0, taken_ns=1)

    def seen(at: int) -> bool:
        senders, waiting = pg.walsenders(), pg.waiting
        e = DbSeen("primary", 1, pg.end, 0, False, "s", at, pg.names, senders, waiting)
        return ruling.database_seen(r, e).worst == HOLD

    pg.file = HOLD
    assert not seen(2)
    pg.load(MAIN)
    pg.load("n2")
    pg.wrote(10)
    assert not seen(3), "acknowledged by nobody: the checkpointer is in an fsync"
    pg.load(CHECKPOINTER)
    pg.wrote(20)
    assert seen(4)
    assert not seen(1), "asked before PostgreSQL was told"
