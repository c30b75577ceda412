"""A cluster from nothing: claimed before it is made, by one, and never beside data that is there already."""

from __future__ import annotations

from dataclasses import replace

from harmony.core.messages import Accepted, FencerSeen, MemberSeen, Order
from harmony.core.states import State
from harmony.records import ClusterState
from tests.core.helpers import EPOCH, cluster, member, seen
from tests.core.test_adoption import Node

NOTHING: dict[str, object] = {
    "adopting": False,
    "is_standby": True,
    "postgres_up": False,
    "system_identifier": None,
}


class Empty(Node):
    """The preferred primary, with a fencer that may make something where nothing is; PostgreSQL does not answer."""

    def __init__(self, name: str = "n1", method: str = "initdb") -> None:
        super().__init__(name, **NOTHING, empty=method)
        self.silent = True

    def answers(self, **changes: object) -> Order:
        """The fencer's status after the newest order, with what has changed since."""
        order = self.orders[-1]
        done = {
            "order": order.generation,
            "order_op": order.op,
            "order_state": "done",
            "highest": order.generation,
        }
        self.fencer = FencerSeen(replace(self.fencer.view, **done | changes))  # type: ignore[arg-type]
        return order


def test_it_is_claimed_first_and_made_by_the_first_activation() -> None:
    """The record has no system identifier until there is one; the timeline that initdb begins with is not reserved."""
    for method in ("initdb", "command"):
        node = Empty(method=method)
        node.run(5)
        assert [(r.primary, r.term, r.system_identifier, r.adopting) for r in node.records[:1]] == [
            ("n1", 1, "", False)
        ]
        assert node.answers(fence_proven=True).op == "fence"
        while node.orders[-1].op == "fence" and len(node.records) < 50:
            node.run(1)
        order = node.orders[-1]
        assert (order.op, order.timeline) == ("activate", 2)
        lease = {"active": order.generation, "lease_deadline_ns": node.now + 10**10}
        node.answers(
            **lease, system_identifier="sys", empty="", postgres_up=True, is_standby=False, fence_proven=False
        )
        node.silent, node.db = False, replace(node.db, timeline=2)
        node.streaming("n2", synchronous=True)
        node.run(10)
        assert node.view.state is State.HEALTHY
        assert node.records[-1].system_identifier == "sys"


def test_nothing_is_founded_beside_data_that_is_there() -> None:
    """Its owner would be another cluster's from then on."""
    for text, method, others in (
        ("n2 (77)", "initdb", "77"),
        ("makes no new cluster", "copy", None),
    ):
        node = Empty(method=method)
        node.pending += [MemberSeen("n2", member("n2", system_identifier=others), 60, EPOCH)]
        node.run(20)
        assert (node.records, node.orders) == ([], [])
        assert text in node.view.why


def test_a_standbys_data_founds_nothing_by_itself() -> None:
    """Its primary may still run somewhere, unknown to the store: two would write. An operator may say so."""
    for word in (False, True):
        node = Node(
            "n1", adopting=False, is_standby=True, postgres_up=False, was_standby=True, fence_proven=True
        )
        node.silent = True
        node.run(3)
        if word:
            node.pending.append(Accepted(create=True))
            node.pending.append(seen(None, 0))
        node.run(10)
        assert bool(node.records) is word
        assert word or "the standby of some primary" in node.view.why


def test_nobody_else_founds() -> None:
    node = Empty("n2")
    node.run(20)
    assert (node.view.state, node.records, node.orders) == (State.R_INITIALIZING, [], [])


def _follower(record: ClusterState) -> Empty:
    node = Empty("n2", "copy")
    node.pending = [seen(record, 50)]
    node.pending += [MemberSeen("n1", member("n1", db="primary", status=State.HEALTHY), 60, EPOCH)]
    node.run(5)
    return node


def test_an_empty_standby_is_copied_when_the_primary_is_seen_writing() -> None:
    """Not from one that is still being made."""
    node = _follower(cluster())
    assert [(o.op, o.primary, o.system_identifier) for o in node.orders] == [("rejoin", "n1", "sys")]
    node = _follower(cluster(system_identifier="", status=State.FENCED))
    assert (node.orders, "no data directory here yet" in node.view.why) == ([], True)
