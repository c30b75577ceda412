"""Leadership handed over between real nodes: on an operator's wish, when a node is stopped, and back again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony.demo import procs
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster
from harmony.demo.databases import Node
from tests.demo.running import Running, under_load

pytestmark = pytest.mark.real


class Polite(Cluster):
    """As nodes are installed: the one that is stopped hands over, and the preferred primary is given its place back."""

    def settings(self, node: Node) -> dict[str, object]:
        more = {"on_stop": "handover", "failback": "automatic", "failback_after_s": 3.0}
        return super().settings(node) | {"failover": {"maximum_changes": 0} | more}


@pytest.fixture
def running() -> Iterator[Running]:
    with under_load(Polite) as found:
        found.until("n1 accepts writes", lambda: found.acks_by("n1", 0) > 20)
        yield found


def test_a_switchover_and_the_way_back(running: Running) -> None:
    """W1, W3, W7: named, confirmed, demoted cleanly, and back to the preferred primary when it has caught up."""
    code, text = running.harmonyctl("n3", "switchover", "--dry-run")
    assert (code, "n2: could take over" in text, "n3: could take over" in text) == (0, True, True), text
    for to, why in (("n1", "the primary already"), ("n9", "not a member")):
        code, text = running.harmonyctl("n3", "switchover", "--to", to)
        assert code == 1, text
        assert why in text
    assert running.record("n3").term == 1, "nothing of that has done anything"
    began = boottime_ns()
    code, text = running.harmonyctl("n3", "switchover", "--to", "n2")
    assert (code, "n2 leads in term 2" in text) == (0, True), text
    running.until("n2 accepts writes", lambda: running.acks_by("n2", began) > 20)
    log = (running.cluster.nodes["n1"].folder / "node.log").read_text()
    assert log.index("checkpoint ahead of the hand-over") < log.index("demoting for n2")
    assert running.record("n3").primary == "n2"
    assert running.record("n3").changes == (), "a hand-over is no failover"
    back = boottime_ns()
    running.until("the preferred primary leads again", lambda: running.acks_by("n1", back) > 20, 60)
    # Both pauses together are far below what a failover would take: nobody waited for staleness.
    assert running.check(began, "n1") < 4.0


def test_a_node_that_is_stopped_hands_over_first(running: Running) -> None:
    """O1, W7: `systemctl stop harmony` on the primary: no staleness is waited for, nothing is lost."""
    began = boottime_ns()
    supervisor = running.cluster.supervisors["n1"]
    procs.send(supervisor, signal.SIGTERM)
    others = ("n2", "n3")
    running.until("another accepts writes", lambda: any(running.acks_by(n, began) > 20 for n in others))
    assert supervisor.wait(timeout=15) == 0
    assert procs.postgres_of(running.cluster.nodes["n1"].data_dir) == []
    record = running.record("n2")
    assert record.primary in others
    assert record.changes == (), "a hand-over is no failover"
    running.cluster.start_supervisor("n1")
    back = boottime_ns()
    running.until("it comes back and is given its place", lambda: running.acks_by("n1", back) > 20, 90)
    assert running.check(began, "n1") < 4.0
    assert Path(running.cluster.nodes["n1"].data_dir, "postmaster.pid").exists()
