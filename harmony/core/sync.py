"""For whom commits wait, and how that is changed while clients write. Pure rules; ruling.py applies them to a View.

A rule is (count, voters): a commit is acknowledged once `count` of `voters` have flushed it. Two rules matter. What
PostgreSQL was *told* decides what is acknowledged; what is *recorded* in cluster_state decides who may promote: a
candidate must have heard len(voters) - count + 1 of its voters, itself included (candidate.py).

Invariant (I2): every commit that was ever acknowledged is flushed on at least `count` of the voters of the recorded
rule. (Then those a candidate has heard include one that holds it, and the one with the most WAL holds all.)

A reload reaches PostgreSQL's processes one after the other. Each walsender counts with the number it has loaded, over
all standbys that are voters by what *their* walsenders have loaded; and while there was no rule at all, commits go
on waiting for nobody until the checkpointer has loaded the new one, however long its fsync takes. So until a rule is
seen in force, the worst mixture of it and those before must keep the invariant. A higher number cannot be
seen in a walsender; that nobody at all is a voter any more can be. So a number is raised by way of HOLD.

Four steps, one at a time, each begun when the one before is certain:

* record a rule that the recorded one implies: more voters, a lower count. What held for the one holds for the other.
* tell a rule, if its worst mixture with what may still be in force implies the recorded one.
* tell HOLD, under which every commit waits, before a rule with a higher count.
* record the rule that is in force, once `count` of its voters have flushed all that was written until it was. What
  was acknowledged before may be on others only; what is acknowledged from then on is not; WAL is a prefix.

A recorded count of 0 with voters is a primary whose commits wait for nobody *now*: nobody may promote but who is
complete, or the last primary itself. No voters at all is asynchronous replication as configured.

Source: two rules that overlap, and waiting until voters have caught up, are Patroni's (quorum.py, postgresql/sync.py);
how a mixture comes about: PostgreSQL's syncrep.c, SyncRepGetCandidateStandbys and SyncRepUpdateSyncStandbysDefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

Mode = Literal["off", "on", "quorum", "strict"]


class Rule(msgspec.Struct, frozen=True):
    """`voters` by name, sorted; 0 <= count <= len(voters), but for HOLD."""

    count: int
    voters: tuple[str, ...]

    def __str__(self) -> str:
        if self == HOLD:
            return "nobody confirms, commits wait"
        if not self.count:
            return f"nobody (of {', '.join(self.voters)})" if self.voters else "nobody"
        return f"any {self.count} of {', '.join(self.voters)}"


HOLD = Rule(32, ())  # every commit waits, for whatever rule comes next
NOBODY = Rule(0, ())


class Pulse(msgspec.Struct, frozen=True):
    """What is known of a standby as one that confirms: its flush position, when it last moved on or had nothing to
    wait for, and since when it has kept up without a break (0: it has not). Boot clock, ns."""

    flushed: int = 0
    good_ns: int = 0
    since_ns: int = 0


class Ruling(msgspec.Struct, frozen=True):
    """How far the newest rule has come, in one leadership.

    `worst` is the weakest mixture that may be in force; equal to `told`: that certainly is. `lsn`: all that was
    written until then (bytes; 0: not known yet). `taken_ns`: when the fencer was first seen to have carried it out.
    """

    number: int
    told: Rule
    worst: Rule
    sure: bool  # `worst` is known; an agent that found the rule in force has to look first
    began_ns: int
    sent_ns: int = 0
    taken_ns: int = 0
    lsn: int = 0
    nudged: bool = False  # a commit of our own was begun, to be seen waiting
    refused: bool = False
    raise_from_ns: int = 0  # no higher count before
    pulses: Mapping[str, Pulse] = msgspec.field(default_factory=dict)
    seen_ns: int = 0  # of the newest answer of the database
    seen_lsn: int = 0  # and how far it had written then

    @property
    def in_force(self) -> bool:
        return self.sure and self.worst == self.told and self.lsn > 0


@dataclass(frozen=True, slots=True)
class Record:
    """Write it into cluster_state, and go on when that is acknowledged."""

    rule: Rule


@dataclass(frozen=True, slots=True)
class Tell:
    """Have PostgreSQL take it; what may be in force from then on is the mixture."""

    rule: Rule


def wanted(
    mode: Mode, count: int, able: frozenset[str], configured: frozenset[str], recorded: frozenset[str]
) -> Rule:
    """The rule for the standbys that can confirm commits now. `able`: keep up, and would be a good successor;
    `recorded`: the voters so far, who are kept where only some are needed (mode on)."""
    if mode == "off" or not count:
        return NOBODY
    if mode == "strict" and len(able) < count:
        # Whoever comes back first counts again; until then commits wait.
        return Rule(min(count, len(configured)), tuple(sorted(configured)))
    if not able:
        return Rule(0, tuple(sorted(configured)))  # not (), which would let whoever lags little promote
    if mode == "on":
        able = frozenset(sorted(able, key=lambda n: (n not in recorded, n))[:count])
    return Rule(min(count, len(able)), tuple(sorted(able)))


def told_as(rule: Rule) -> Rule:
    """What PostgreSQL is told of it: where commits wait for nobody, no names."""
    return rule if rule.count else NOBODY


def mixed(a: Rule, b: Rule) -> Rule:
    """The weakest that can be in force while some processes have loaded the one and some the other."""
    return Rule(min(a.count, b.count), tuple(sorted({*a.voters, *b.voters})))


def implies(applied: Rule, recorded: Rule) -> bool:
    """Whether each set of voters that `applied` waits for has `recorded.count` of the recorded voters in it."""
    strangers = len(set(applied.voters) - set(recorded.voters))
    return applied.count - strangers >= recorded.count


def next_step(
    recorded: Rule, ruling: Ruling, target: Rule, flushed: Mapping[str, int]
) -> Record | Tell | None:
    """What is next on the way to `target`; None: nothing, or nothing yet. `flushed`: by standby, bytes."""
    goal, worst = told_as(target), ruling.worst
    raises = goal.count > worst.count
    if ruling.told != goal or raises:
        reached = goal if raises else mixed(worst, goal)
        if not implies(reached, recorded):
            voters = tuple(sorted({*recorded.voters, *reached.voters, *target.voters}))
            return Record(Rule(min(recorded.count, reached.count), voters))
        if raises:
            return Tell(HOLD) if ruling.told != HOLD else None
        return Tell(goal)
    if not ruling.in_force or recorded == target:
        return None
    have = sum(flushed.get(n, -1) >= ruling.lsn for n in target.voters)
    return Record(target) if have >= target.count else None
