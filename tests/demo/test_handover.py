"""Leadership handed over between real nodes: on an operator's wish, when a node is stopped, and back again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony.demo import procs
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster
from harmony.demo.databases import Node
from tests import sampling
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
    # Refused for a moment: a standby whose read crossed a newer heartbeat, or that is told of its slot.
    both = ("n2: could take over", "n3: could take over")
    running.until(
        "both could take over",
        lambda: all(w in running.harmonyctl("n3", "switchover", "--dry-run")[1] for w in both),
    )
    for to, why in (("n1", "the primary already"), ("n9", "not a member")):
        code, text = running.harmonyctl("n3", "switchover", "--yes", "--to", to)
        assert code == 1, text
        assert why in text
    assert running.record("n3").term == 1, "nothing of that has done anything"
    began = boottime_ns()
    said: list[str] = []

    def moved() -> bool:
        code, text = running.harmonyctl("n3", "switchover", "--yes", "--to", "n2")
        said.append(text)
        return code == 0

    running.until("it is not refused", moved)
    assert "n2 leads in term 2" in said[-1], said
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


# What is killed when its node's log says that: of who hands over (old), and of who takes over (new).
STEPS = [
    ("old", "harmony.agent", "naming the successor"),
    ("old", "harmony_fencer", "checkpoint ahead of the hand-over"),
    ("old", "harmony.agent", "demoting for"),
    ("old", "harmony_fencer", "demoting for"),
    ("old", "harmony.agent", "writing the vacancy for the successor"),
    ("new", "harmony.agent", "we are eligible: claiming"),
    ("new", "harmony_fencer", "claim won: activating"),
    ("new", "harmony.agent", "claim won: activating"),
]


class Killer(threading.Thread):
    """Kills one process as soon as a log says that word anew."""

    def __init__(self, log: Path, word: str, folder: Path, module: str) -> None:
        super().__init__(daemon=True)
        (self._victim,) = procs.with_argument(folder, (module,))
        self._log, self._word, self._begin = log, word.encode(), log.stat().st_size
        self.struck = False

    def run(self) -> None:
        until = time.monotonic() + 20
        with self._log.open("rb") as f:
            while time.monotonic() < until:
                f.seek(self._begin)
                if self._word in f.read():
                    self.struck = procs.send(self._victim, signal.SIGKILL)
                    return
                time.sleep(0.002)


@pytest.fixture
def steady() -> Iterator[Running]:
    """Leadership stays where it was put."""
    with under_load(Cluster) as found:
        yield found


def test_killed_at_each_step(steady: Running) -> None:
    """O1, I1, I2: whatever dies in a switchover, one leads soon, all come back, and nothing is lost."""
    running, cluster, began = steady, steady.cluster, boottime_ns()

    def whole() -> str:
        """Who leads, when all are well."""
        found = cluster.streaming()
        well = found is not None and found[1:] == (2, True) and len(running.record(found[0]).sync_voters) == 2
        return found[0] if found is not None and well else ""

    def settled() -> str:
        """And still so a second later: a request that was made twice may be carried out twice."""
        before = whole()
        time.sleep(1.0)
        return before if whole() == before else ""

    for role, module, word in sampling.chosen(STEPS, 2):
        old = running.until("all are well", whole, 60)
        new = next(n for n in ("n2", "n3") if n != old)
        node = cluster.nodes[old if role == "old" else new]
        said: tuple[int, str] = (0, "")
        killer = Killer(node.folder / "node.log", word, node.folder, module)
        killer.start()
        while killer.is_alive():  # it may be refused for a moment
            said = running.harmonyctl("n1", "switchover", "--yes", "--to", new)
            killer.join(0.2)
        assert killer.struck, (role, module, word, said, running.logs())
        struck = boottime_ns()
        running.until(
            f"somebody leads after {module} of the {role} one was killed at: {word}",
            lambda since=struck: any(running.acks_by(n, since) > 20 for n in cluster.nodes),  # type: ignore[misc]
        )
    running.check(began, running.until("all are well, and stay so", settled, 60))
