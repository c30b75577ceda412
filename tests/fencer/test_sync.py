"""Whom commits wait for: the fencer's rules of waiting on a real PostgreSQL, and what PostgreSQL makes of them (I2)."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from harmony.core.ruling import names
from harmony.core.sync import HOLD, Rule
from harmony_fencer import protocol, settings
from harmony_fencer.config import load
from harmony_fencer.protocol import Generation, SyncRule, SyncTold
from tests import pace
from tests.fencer.node import Node

pytestmark = pytest.mark.real
G = Generation(1, 1)
NOBODY = SyncRule(0, ())
N2 = SyncRule(1, ("n2",))


@pytest.fixture
def node(node: Node) -> Node:
    node.configure(synchronous=True, lease_s=60)
    return node


def tell(node: Node, number: int, rule: SyncRule | None, generation: Generation = G) -> protocol.Reply:
    return node.ask(protocol.Sync(generation=generation, number=number, rule=rule))


def told(node: Node, number: int, rule: SyncRule | None) -> None:
    """And PostgreSQL's new sessions have it."""
    reply = tell(node, number, rule)
    assert isinstance(reply, protocol.Done), reply
    node.wait(lambda: node.status().sync == SyncTold(number, rule, done=True), "told")
    node.wait(lambda: loaded(node) == settings.names(load(str(node.config)), rule), "loaded")


def loaded(node: Node) -> str:
    with node.connect() as c:
        row = c.execute("SHOW synchronous_standby_names").fetchone()
    assert row is not None
    return str(row[0])


def waits(node: Node) -> bool:
    """Whether a commit waits for a standby (there is none); one that does is cancelled, and stands all the same."""
    with node.connect() as client, node.connect() as beside:
        pid = client.info.backend_pid
        commit = threading.Thread(
            target=client.execute, args=("SELECT pg_logical_emit_message(true, 'test', '')",)
        )
        commit.start()
        until = time.monotonic() + pace.wait_s(5)
        waiting = False
        while commit.is_alive() and time.monotonic() < until:
            row = beside.execute("SELECT wait_event FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone()
            waiting = row == ("SyncRep",)
            if waiting:
                beside.execute("SELECT pg_cancel_backend(%s)", (pid,))
            time.sleep(0.05)
        commit.join(5)
        assert not commit.is_alive()
    return waiting


def refusal(reply: protocol.Reply) -> str:
    assert isinstance(reply, protocol.Refusal), reply
    return reply.error


def test_the_agent_expects_what_the_fencer_writes(node: Node) -> None:
    """The two have no code in common."""
    c = load(str(node.config))
    for rule in (Rule(0, ()), Rule(1, ("n2",)), Rule(2, ("n2", "n-3"))):
        assert names(rule) == settings.names(c, SyncRule(rule.count, rule.voters))
    assert names(HOLD) == settings.names(c, None)


def test_a_rule_is_told_under_the_lease_and_lasts_over_a_new_fencer(node: Node) -> None:
    """And nothing is restarted by it; a number that was used is refused; with the lease it is gone."""
    node.start()
    node.make_writable()
    master = node.postmaster()
    assert node.status().sync == SyncTold(0, NOBODY, done=True)
    assert not waits(node)
    told(node, 1, N2)
    assert waits(node)
    assert refusal(tell(node, 1, NOBODY)) == "conflicting_order"
    node.kill_fencer()
    node.start()
    assert node.status().sync == SyncTold(1, N2, done=True)
    told(node, 3, NOBODY)
    assert not waits(node)
    assert refusal(tell(node, 2, N2)) == "stale_rule"
    assert node.postmaster() == master
    node.fence(1, 2)
    assert node.status().sync is None
    assert refusal(tell(node, 4, N2)) == "not_active"


def test_a_standby_acknowledges_nothing_whoever_promotes_it(node: Node) -> None:
    """Its rule is there from its start on; the order to become the primary brings another one."""
    node.start()
    node.follow(1, 1)
    node.kill_fencer()  # who would fence it
    node.promote_by_hand()
    node.wait(lambda: node.in_recovery() is False, "promoted")
    assert waits(node)


def test_a_rule_after_none_is_not_in_force_before_the_checkpointer_has_it(node: Node) -> None:
    """The trap in PostgreSQL that HOLD is for: each session shows the rule, and commits wait for nobody."""
    node.start()
    node.make_writable()
    with node.connect() as c:
        row = c.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'").fetchone()
    assert row is not None
    checkpointer = int(str(row[0]))
    node.send(checkpointer, signal.SIGSTOP)  # as in an fsync that takes its time
    try:
        told(node, 1, None)
        assert not waits(node)
    finally:
        node.send(checkpointer, signal.SIGCONT)
    node.wait(lambda: waits(node), "in force")
