"""One example for each row of the table: in this state, with this seen, that is decided, and by that row.

Read beside docs/states.md it says what happens in state X on event Y without running anything. Whoever changes a
row, or puts one before it, sees here what else changes (`python bench/mutate.py rows` takes each away in turn).
"""

from __future__ import annotations

import pytest

from harmony.core.states import State
from harmony.core.table import TABLE, Action, decide
from tests.core.helpers import observation

S = State
Example = tuple[int, S, dict[str, object], S, tuple[Action, ...]]

GONE: dict[str, object] = {"fence_proven": True, "postgres_up": False, "db": "down"}
ACTIVATED: dict[str, object] = {"order": "done", "order_op": "activate"}
NAMED: dict[str, object] = {"named": "n3", "successor_fit": True}
EMPTY: dict[str, object] = {"leads": "nobody_yet", "granted": False, "db": "down", "postgres_up": False}
ADOPT: dict[str, object] = {"granted": False, "adopting": True, "virgin": True}
STANDBY: dict[str, object] = {"granted": False, "db": "standby"}
STRAY: dict[str, object] = {"granted": False, "db": "down", "postgres_up": False, "following_right": False}


ASTRAY: dict[str, object] = STRAY | {"leads": "other", "rejoining": True, "astray": True}
IN_VAIN: dict[str, object] = {"leads": "other", "order": "failed", "order_op": "follow", "may_follow": False}
UNABLE: dict[str, object] = {"leads": "other", "unable": "it stays on timeline 2, n1 is on 3"}


def leader(base: int, state: S, down: S, aside: S) -> list[Example]:
    """Healthy and Leader."""
    return [
        (base + 0, state, {"leads": "other"}, down, ("fence",)),
        (base + 2, state, {"granted": False}, down, ("fence",)),
        (base + 4, state, {"postgres_up": False}, down, ("fence",)),
        (base + 6, state, {"failing": True, "failures": 3}, down, ("fence",)),
        (base + 8, state, {"lease_left": False}, down, ("fence",)),
        (base + 10, state, {"db": "standby"}, down, ("fence",)),
        (base + 11, state, {"sick": "silent", "heir": True}, down, ("fence",)),
        (base + 12, state, NAMED | {"confirmed": True}, aside, ("demote",)),
        (base + 14, state, NAMED | {"named_long": True}, state, ("unname",)),
        (base + 16, state, {"wanted_why": "n3 is not alive"}, state, ("refuse",)),
        (base + 18, state, {"wanted": "n3"}, state, ("name",)),
        (base + 20, state, {"distrust": "replicas is 1"}, state, ()),
        (base + 22, state, {"sick": "silent"}, state, ()),
        (base + 24, state, {"unwell": "silent"}, state, ()),
    ]


EXAMPLES: list[Example] = [
    (100, S.P_INITIALIZING, {"foreign": "another system id"}, S.P_INITIALIZING, ("fatal",)),
    (102, S.P_INITIALIZING, {"fencer_known": False}, S.P_INITIALIZING, ()),
    (104, S.P_INITIALIZING, {}, S.HEALTHY, ()),
    (105, S.P_INITIALIZING, ADOPT, S.ADOPTING, ()),
    (106, S.P_INITIALIZING, {"granted": False}, S.P_FAILED, ("fence",)),
    (108, S.P_INITIALIZING, {"db": "unknown"}, S.P_INITIALIZING, ()),
    (110, S.P_INITIALIZING, {"leads": "other"}, S.YIELDING, ()),
    (111, S.P_INITIALIZING, EMPTY | {"distrust": "x", "virgin": True}, S.P_INITIALIZING, ()),
    (112, S.P_INITIALIZING, EMPTY, S.P_INITIALIZING, ()),
    (113, S.P_INITIALIZING, EMPTY | {"virgin": True, "cannot_found": "it was a standby"}, S.P_INITIALIZING, ()),
    (114, S.P_INITIALIZING, EMPTY | {"virgin": True, "latched": True}, S.P_INITIALIZING, ()),
    (115, S.P_INITIALIZING, EMPTY | {"virgin": True, "postgres_up": True, "db": "standby"}, S.P_INITIALIZING, ()),
    (116, S.P_INITIALIZING, EMPTY | {"virgin": True}, S.P_INITIALIZING, ("create",)),
    (150, S.ADOPTING, {"foreign": "another system id"}, S.ADOPTING, ("fatal",)),
    (152, S.ADOPTING, ACTIVATED, S.HEALTHY, ()),
    (154, S.ADOPTING, {"order": "failed", "order_op": "activate"}, S.P_FAILED, ("fence",)),
    (156, S.ADOPTING, ACTIVATED | {"sync_shown": False}, S.ADOPTING, ()),
    (158, S.ADOPTING, {"granted": False}, S.P_INITIALIZING, ()),
    (160, S.ADOPTING, ADOPT | {"adoption_waits": "n2"}, S.ADOPTING, ()),
    (162, S.ADOPTING, ADOPT, S.ADOPTING, ("activate",)),
    *leader(200, S.HEALTHY, S.P_FAILED, S.YIELDING),
    (300, S.P_FAILED, GONE, S.FENCED, ()),
    (301, S.P_FAILED, {"spent": True, "postgres_failed": True}, S.P_FAILED, ("vacate",)),
    (302, S.P_FAILED, {"order": "failed", "order_op": "fence"}, S.P_FAILED, ("fence",)),
    (304, S.P_FAILED, {}, S.P_FAILED, ("fence",)),
    (398, S.FENCED, GONE | {"leads": "unread"}, S.P_INITIALIZING, ()),
    (400, S.FENCED, GONE | {"leads": "other"}, S.YIELDING, ()),
    (402, S.FENCED, GONE | {"postgres_failed": True}, S.FENCED, ("vacate",)),
    (404, S.FENCED, ACTIVATED, S.HEALTHY, ()),
    (405, S.FENCED, ACTIVATED | {"db": "unknown", "sick": "silent"}, S.P_FAILED, ("fence",)),
    (406, S.FENCED, {"order": "failed", "order_op": "activate"}, S.P_FAILED, ("fence",)),
    (407, S.FENCED, GONE | {"distrust": "x"}, S.FENCED, ()),
    (408, S.FENCED, GONE, S.FENCED, ("activate",)),
    (409, S.FENCED, GONE | {"leads": "me", "recovered": False, "eligible_why": "2 more"}, S.FENCED, ()),
    (410, S.FENCED, {"db": "standby"}, S.P_FAILED, ("fence",)),
    (490, S.YIELDING, NAMED | {"order": "running", "order_op": "fence"}, S.YIELDING, ()),
    (492, S.YIELDING, GONE | NAMED, S.YIELDING, ("vacate",)),
    (494, S.YIELDING, GONE | NAMED | {"writing": True}, S.YIELDING, ()),
    (496, S.YIELDING, GONE | {"leads": "unread"}, S.P_INITIALIZING, ()),
    (500, S.YIELDING, GONE, S.FENCED, ()),
    (502, S.YIELDING, {}, S.P_FAILED, ("fence",)),
    (503, S.YIELDING, ASTRAY, S.YIELDING, ("follow",)),
    (504, S.YIELDING, STANDBY | {"leads": "other", "latched": True}, S.YIELDING, ()),
    (505, S.YIELDING, STRAY | UNABLE | {"rejoin_due": True}, S.YIELDING, ("rejoin",)),
    (506, S.YIELDING, STANDBY | {"leads": "other"}, S.WATCHING, ()),
    (507, S.YIELDING, STRAY | UNABLE, S.YIELDING, ()),
    (508, S.YIELDING, STRAY | {"leads": "other"}, S.YIELDING, ("follow",)),
    (509, S.YIELDING, STRAY | IN_VAIN, S.YIELDING, ()),
    (510, S.YIELDING, STRAY | {"leads": "other", "order": "done", "order_op": "follow"}, S.YIELDING, ("follow",)),
    (600, S.R_INITIALIZING, {"foreign": "another system id"}, S.R_INITIALIZING, ("fatal",)),
    (602, S.R_INITIALIZING, {"fencer_known": False}, S.R_INITIALIZING, ()),
    (603, S.R_INITIALIZING, EMPTY | {"distrust": "x", "may_found": True}, S.R_INITIALIZING, ()),
    (604, S.R_INITIALIZING, {"leads": "me"}, S.LEADER, ()),
    (605, S.R_INITIALIZING, ADOPT | {"leads": "me"}, S.ADOPTING, ()),
    (606, S.R_INITIALIZING, {"leads": "me", "granted": False}, S.DEMOTING, ("fence",)),
    (607, S.R_INITIALIZING, ADOPT | {"leads": "nobody_yet"}, S.R_INITIALIZING, ("create",)),
    (608, S.R_INITIALIZING, {"leads": "me", "db": "unknown"}, S.R_INITIALIZING, ()),
    (609, S.R_INITIALIZING, EMPTY | {"may_found": True}, S.R_INITIALIZING, ("create",)),
    (610, S.R_INITIALIZING, EMPTY, S.R_INITIALIZING, ()),
    (612, S.R_INITIALIZING, STANDBY, S.WATCHING, ()),
    (700, S.WATCHING, {"foreign": "another system id"}, S.WATCHING, ("fatal",)),
    (701, S.WATCHING, STANDBY | {"leads": "unread"}, S.R_INITIALIZING, ()),
    (702, S.WATCHING, STANDBY | {"failing": True}, S.R_FAILED, ()),
    (704, S.WATCHING, STANDBY | {"latched": True, "stale": True, "eligible": True}, S.WATCHING, ()),
    (705, S.WATCHING, ASTRAY, S.WATCHING, ("follow",)),
    (706, S.WATCHING, {"leads": "me", "granted": False}, S.DEMOTING, ("fence",)),
    (707, S.WATCHING, STANDBY | {"distrust": "x", "stale": True, "eligible": True}, S.WATCHING, ()),
    (708, S.WATCHING, STANDBY | {"leads": "me"}, S.PROMOTING, ("claim",)),
    (710, S.WATCHING, STANDBY | {"leads": "vacant", "eligible": True}, S.PROMOTING, ("claim",)),
    (711, S.WATCHING, STANDBY | UNABLE | {"rejoin_due": True}, S.WATCHING, ("rejoin",)),
    (712, S.WATCHING, STANDBY | {"stale": True, "eligible": True}, S.PROMOTING, ("claim",)),
    (713, S.WATCHING, STANDBY | UNABLE, S.WATCHING, ()),
    (714, S.WATCHING, STRAY, S.WATCHING, ("follow",)),
    (715, S.WATCHING, STRAY | IN_VAIN, S.WATCHING, ()),
    (716, S.WATCHING, STRAY | {"order": "done", "order_op": "follow"}, S.WATCHING, ("follow",)),
    (717, S.WATCHING, STANDBY | {"other_slot": True}, S.WATCHING, ("follow",)),
    (718, S.WATCHING, STANDBY | {"stale": True, "eligible_why": "behind"}, S.WATCHING, ()),
    (719, S.WATCHING, STANDBY | {"rejoin_why": "wrong password"}, S.WATCHING, ()),
    (720, S.WATCHING, STANDBY | {"distrust": "x"}, S.WATCHING, ()),
    (798, S.PROMOTING, ACTIVATED | {"leads": "other"}, S.DEMOTING, ("fence",)),
    (800, S.PROMOTING, STANDBY | {"leads": "other"}, S.WATCHING, ()),
    (802, S.PROMOTING, {"latched": True}, S.DEMOTING, ("fence",)),
    (804, S.PROMOTING, {"lease_left": False}, S.DEMOTING, ("fence",)),
    (806, S.PROMOTING, ACTIVATED, S.LEADER, ()),
    (807, S.PROMOTING, ACTIVATED | {"db": "unknown", "sick": "silent"}, S.DEMOTING, ("fence",)),
    (808, S.PROMOTING, {"order": "failed", "order_op": "activate"}, S.DEMOTING, ("fence",)),
    (809, S.PROMOTING, STANDBY | {"distrust": "x"}, S.PROMOTING, ()),
    (810, S.PROMOTING, STANDBY, S.PROMOTING, ("activate",)),
    *leader(900, S.LEADER, S.DEMOTING, S.DEMOTING),
    (996, S.DEMOTING, GONE | NAMED | {"leads": "me"}, S.DEMOTING, ("vacate",)),
    (1000, S.DEMOTING, GONE | {"failing": True}, S.R_FAILED, ()),
    (1002, S.DEMOTING, GONE | {"leads": "me", "postgres_failed": True}, S.DEMOTING, ("vacate",)),
    (1003, S.DEMOTING, {"leads": "me", "spent": True, "postgres_failed": True}, S.DEMOTING, ("vacate",)),
    (1004, S.DEMOTING, GONE, S.WATCHING, ()),
    (1006, S.DEMOTING, {"order": "failed", "order_op": "fence"}, S.DEMOTING, ("fence",)),
    (1008, S.DEMOTING, {}, S.DEMOTING, ("fence",)),
    (1100, S.R_FAILED, STANDBY, S.WATCHING, ()),
]  # fmt: skip


def test_each_row_has_its_example() -> None:
    assert [e[0] for e in EXAMPLES] == [row.id for row in TABLE]


@pytest.mark.parametrize("example", EXAMPLES, ids=[str(e[0]) for e in EXAMPLES])
def test_row(example: Example) -> None:
    """W1 to W10: which row decides, where it leads, and what is done."""
    row, state, seen, next_, do = example
    d = decide(observation(state, **seen))
    assert (d.row, d.next, d.do) == (row, next_, do), d.why
