"""The synchronous rule follows who is there, on real parts: three nodes, a client that writes all the time (I2)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from harmony.core.ruling import recorded
from harmony.core.sync import Rule
from harmony.core.timing import PRESETS
from harmony.demo.client import boottime_ns
from harmony.demo.cluster import Cluster, ask_status
from harmony.demo.scenarios import Fault, Scenario
from tests import pace
from tests.demo.running import Running, under_load

pytestmark = pytest.mark.real
LEASE_S = PRESETS["fast"].lease_s


@pytest.fixture
def running() -> Iterator[Running]:
    with under_load(Cluster) as found:
        found.until("both standbys confirm", lambda: rule(found, "n1") == Rule(1, ("n2", "n3")))
        yield found


def rule(running: Running, name: str) -> Rule:
    return recorded(running.record(name))


def lose(running: Running, name: str) -> int:
    """The whole node, at once. When (boot clock, ns)."""
    at_ns = boottime_ns()
    Fault(Scenario.NODE_KILLED, running.cluster, name).apply()
    return at_ns


def stall_s(running: Running, since_ns: int) -> float:
    """The longest that the client waited for an acknowledgement since then."""
    times = [since_ns, *(a.acked_ns for a in running.recorders.writer.acks if a.acked_ns > since_ns)]
    return max(b - a for a, b in itertools.pairwise(times)) / 1e9


def why(running: Running, name: str) -> str:
    reply = ask_status(running.cluster.nodes[name].admin_socket, 1.0)
    return reply.myself.why if reply is not None else ""


def test_one_after_the_other(running: Running) -> None:
    """A standby is lost, then the primary: the other standby alone has everything, and takes over."""
    since_ns = lose(running, "n3")
    running.until("it is waited for no more", lambda: rule(running, "n1") == Rule(1, ("n2",)))
    lose(running, "n1")
    running.until("the other one leads", lambda: running.acks_by("n2", boottime_ns() - 10**9) > 0)
    assert rule(running, "n2").count == 0, "nobody is left to confirm"
    for name in ("n1", "n3"):
        running.cluster.start_supervisor(name)
    running.until("both confirm again", lambda: rule(running, "n2") == Rule(1, ("n1", "n3")), 60)
    running.check(since_ns, "n2")


def test_the_last_standby_is_lost_and_then_the_primary(running: Running) -> None:
    """Writes go on after about a lease; the standby that comes back lacks some of them, and must not lead."""
    since_ns = lose(running, "n2")
    lose(running, "n3")
    running.until("nobody is waited for", lambda: rule(running, "n1") == Rule(0, ("n2", "n3")))
    alone_ns = boottime_ns()
    running.until("writes go on", lambda: running.acks_by("n1", alone_ns) > 50)
    assert stall_s(running, since_ns) < 3 * LEASE_S + pace.SLACK_S
    lose(running, "n1")
    for name in ("n2", "n3"):
        running.cluster.start_supervisor(name)
    running.until("they may not lead", lambda: "waited for nobody" in why(running, "n2"), 30)
    time.sleep(2)
    assert not running.acks_by("n2", alone_ns)
    assert not running.acks_by("n3", alone_ns)
    running.cluster.start_supervisor("n1")
    back_ns = boottime_ns()
    running.until("the last primary leads again", lambda: running.acks_by("n1", back_ns) > 20, 40)
    running.until("they confirm again", lambda: rule(running, "n1") == Rule(1, ("n2", "n3")), 60)
    running.check(since_ns, "n1")
