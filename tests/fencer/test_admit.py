"""Admission: each row of the order table, pure (DESIGN section 5)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony_fencer.admit import Extend, Facts, KnownRule, NewOrder, NewRule, Peer, Permit, Repeat, admit
from harmony_fencer.protocol import (
    Activate,
    Fence,
    Follow,
    Generation,
    Hello,
    OperatorFence,
    OrderRecord,
    OrderState,
    Refusal,
    Rejoin,
    Renew,
    Request,
    StatusRequest,
    Sync,
    SyncRule,
    SyncTold,
    Unfence,
)

NOW = 1_000
FACTS = Facts("n1", frozenset({"n1", "n2"}), True, False, False, Generation(3, 4), None, None, 0)
ACTIVE = replace(FACTS, active=Generation(3, 4), lease_deadline_ns=NOW + 50)
RULE = SyncRule(0, ())


def activate(term: int, order: int, deadline: int = NOW + 10) -> Activate:
    return Activate(generation=Generation(term, order), deadline_boottime_ns=deadline, sync=RULE)


def error(facts: Facts, request: Request, peer: Peer = "agent") -> str:
    verdict = admit(facts, request, peer, NOW)
    assert isinstance(verdict, Refusal), verdict
    return verdict.error


@pytest.mark.parametrize("generation", [(3, 4), (3, 3), (2, 99), (0, 0)])
def test_lower_or_equal_generations_are_stale(generation: tuple[int, int]) -> None:
    """I3, D7: every order needs a generation greater than the highest accepted."""
    g = Generation(*generation)
    for request in (
        activate(*generation),
        Fence(generation=g, reason=""),
        Follow(generation=g, primary="n2"),
    ):
        assert error(FACTS, request) == "stale_generation"


@pytest.mark.parametrize("generation", [(3, 5), (4, 0)])
def test_greater_generations_are_accepted(generation: tuple[int, int]) -> None:
    g = Generation(*generation)
    assert admit(FACTS, activate(*generation), "agent", NOW) == NewOrder("activate", g)
    assert admit(FACTS, Follow(generation=g, primary="n2"), "agent", NOW) == NewOrder("follow", g, "n2")
    assert admit(FACTS, Follow(generation=g, primary=None), "agent", NOW) == NewOrder("follow", g)


def test_the_same_order_again_gets_its_outcome_another_is_refused() -> None:
    record = OrderRecord(Generation(3, 4), "fence", None, "done")
    facts = replace(FACTS, newest=record)
    assert admit(facts, Fence(generation=Generation(3, 4), reason=""), "agent", NOW) == Repeat(record)
    assert error(facts, activate(3, 4)) == "conflicting_order"


def test_activate_needs_a_deadline_in_the_future() -> None:
    """I1, W9."""
    assert error(FACTS, activate(3, 5, NOW)) == "lease_expired"
    assert error(FACTS, activate(3, 5, NOW - 1)) == "lease_expired"


def test_a_latched_or_untrusted_node_is_neither_activated_nor_follows_but_is_fenced() -> None:
    for facts, name in (
        (replace(FACTS, latched=True), "latched"),
        (replace(FACTS, trusted=False), "untrusted_state"),
    ):
        g = Generation(3, 5)
        assert error(facts, activate(3, 5)) == name
        assert error(facts, Follow(generation=g, primary="n2")) == name
        assert isinstance(admit(facts, Fence(generation=g, reason=""), "agent", NOW), NewOrder)


def test_follow_names_another_member() -> None:
    for primary in ("n1", "n9"):
        assert error(FACTS, Follow(generation=Generation(3, 5), primary=primary)) == "bad_message"


@pytest.mark.parametrize("voters", [("n1",), ("n9",), ("n1", "n2")], ids=["itself", "a stranger", "both"])
def test_commits_wait_for_other_members_only(voters: tuple[str, ...]) -> None:
    """I2: a commit that itself or nobody confirms is on no other host."""
    asked = Activate(
        generation=Generation(3, 5), deadline_boottime_ns=NOW + 10, sync=SyncRule(len(voters), voters)
    )
    assert error(FACTS, asked) == "bad_message"
    good = Activate(generation=Generation(3, 5), deadline_boottime_ns=NOW + 10, sync=SyncRule(1, ("n2",)))
    assert isinstance(admit(FACTS, good, "agent", NOW), NewOrder)


def test_renew() -> None:
    """W9: of the active generation only, never after the deadline, never shorter."""
    g = Generation(3, 4)
    assert admit(ACTIVE, Renew(generation=g, deadline_boottime_ns=NOW + 90), "agent", NOW) == Extend(NOW + 90)
    assert admit(ACTIVE, Renew(generation=g, deadline_boottime_ns=NOW + 9), "agent", NOW) == Extend(NOW + 50)
    assert error(ACTIVE, Renew(generation=Generation(3, 5), deadline_boottime_ns=NOW + 90)) == "not_active"
    assert error(ACTIVE, Renew(generation=Generation(3, 3), deadline_boottime_ns=NOW + 90)) == "not_active"
    assert error(ACTIVE, Renew(generation=g, deadline_boottime_ns=NOW - 1)) == "lease_expired"
    expired = replace(ACTIVE, lease_deadline_ns=NOW)
    assert error(expired, Renew(generation=g, deadline_boottime_ns=NOW + 90)) == "not_active"
    assert error(FACTS, Renew(generation=g, deadline_boottime_ns=NOW + 90)) == "not_active"


LED = OrderRecord(Generation(3, 4), "activate", None, "done")
COMMITTING = replace(ACTIVE, newest=LED, sync=SyncTold(2, RULE, done=True))


def rule(number: int, *voters: str, generation: tuple[int, int] = (3, 4)) -> Sync:
    return Sync(generation=Generation(*generation), number=number, rule=SyncRule(len(voters), voters))


def test_a_rule_is_told_under_the_lease_and_in_the_order_of_its_number() -> None:
    """I2: one that was held up, of a dead agent for example, never undoes a newer one."""
    told = SyncTold(3, SyncRule(1, ("n2",)), done=False)
    assert admit(COMMITTING, rule(3, "n2"), "agent", NOW) == NewRule(told)
    assert admit(COMMITTING, rule(2), "agent", NOW) == KnownRule()
    assert isinstance(admit(replace(COMMITTING, sync=told), rule(3, "n2"), "agent", NOW), NewRule), (
        "not yet told"
    )
    assert error(COMMITTING, rule(1, "n2")) == "stale_rule"
    assert error(COMMITTING, rule(2, "n2")) == "conflicting_order"
    assert error(COMMITTING, rule(3, "n9")) == error(COMMITTING, rule(3, "n1")) == "bad_message"
    assert error(COMMITTING, rule(3, "n2", generation=(3, 3))) == "not_active"
    assert error(replace(COMMITTING, lease_deadline_ns=NOW), rule(3, "n2")) == "not_active"
    assert error(replace(COMMITTING, highest=Generation(3, 5)), rule(3, "n2")) == "not_active", (
        "a fence is on its way"
    )
    for newest in (replace_state("running"), replace_state("failed"), None):
        assert error(replace(COMMITTING, newest=newest), rule(3, "n2")) == "not_active"


def replace_state(state: OrderState) -> OrderRecord:
    return OrderRecord(LED.generation, "activate", None, state)


EVERY: list[Request] = [
    Hello(client="x"),
    StatusRequest(),
    activate(9, 9),
    Fence(generation=Generation(9, 9), reason=""),
    Follow(generation=Generation(9, 9), primary="n2"),
    Renew(generation=Generation(3, 4), deadline_boottime_ns=NOW + 60),
    rule(3, "n2"),
    OperatorFence(reason="", who=""),
    Unfence(who=""),
]


@pytest.mark.parametrize("request_", EVERY, ids=lambda r: type(r).__name__)
def test_who_may(request_: Request) -> None:
    """Strangers nothing, the agent no operator's orders, root everything."""
    facts = replace(COMMITTING, latched=isinstance(request_, Unfence))
    assert error(facts, request_, "other") == "not_permitted"
    operators = isinstance(request_, (OperatorFence, Unfence))
    verdict = admit(facts, request_, "agent", NOW)
    assert isinstance(verdict, Refusal) == operators
    assert not isinstance(admit(facts, request_, "root", NOW), Refusal)


def test_the_operators_fence_is_numbered_above_all() -> None:
    verdict = admit(replace(FACTS, latched=True), OperatorFence(reason="", who=""), "root", NOW)
    assert verdict == NewOrder("operator_fence", Generation(3, 5))


def test_an_orphan_takes_no_orders() -> None:
    facts = replace(ACTIVE, retiring=True)
    for request in (activate(9, 9), Renew(generation=Generation(3, 4), deadline_boottime_ns=NOW + 60)):
        assert error(facts, request) == "retiring"
    assert isinstance(admit(facts, StatusRequest(), "agent", NOW), Permit)
    assert error(FACTS, Unfence(who=""), "root") == "not_latched"


def rejoin(term: int, order: int, primary: str = "n2") -> Rejoin:
    return Rejoin(generation=Generation(term, order), primary=primary, system_identifier="1")


def test_a_rejoin_is_an_order_like_a_follow_and_never_of_a_leader() -> None:
    """I2: it destroys what only this node has."""
    assert admit(FACTS, rejoin(3, 5), "agent", NOW) == NewOrder("rejoin", Generation(3, 5), "n2")
    assert error(FACTS, rejoin(3, 4)) == "stale_generation"
    assert error(ACTIVE, rejoin(3, 5)) == "active"
    assert error(replace(FACTS, latched=True), rejoin(3, 5)) == "latched"
    assert error(replace(FACTS, trusted=False), rejoin(3, 5)) == "untrusted_state"
    for primary in ("n1", "n9"):
        assert error(FACTS, rejoin(3, 5, primary)) == "bad_message"


def test_what_a_rejoin_has_left_unfinished_is_not_activated() -> None:
    """I2: it holds half of one history and half of another. It may be fenced, follow (in vain), and be rejoined."""
    facts = replace(FACTS, unfinished=True)
    assert error(facts, activate(3, 5)) == "unfinished"
    g = Generation(3, 5)
    for request in (rejoin(3, 5), Follow(generation=g, primary="n2"), Fence(generation=g, reason="")):
        assert isinstance(admit(facts, request, "agent", NOW), NewOrder)
