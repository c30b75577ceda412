"""harmonyctl switchover: what is checked before anything is asked, and how the outcome is read from the record."""

from __future__ import annotations

import msgspec
import pytest

from harmony.cli.control import Impossible
from harmony.cli.switchover import Picture, bound_s, follow, look, outcome, wished
from harmony.config import Config, load
from harmony.core.timing import PRESETS
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, ClusterState, Control, Switchover, encode
from harmony.store.memory import MemoryServer, MemoryStore
from tests.cli.test_control import CONFIG
from tests.core.helpers import cluster, member

NAMES = ("n1", "n2", "n3")


def picture(record: ClusterState | None = None, **changes: dict[str, object]) -> Picture:
    """n1 leads in term 3, n2 and n3 stream; `changes` by node, None: it is not alive."""
    members = {n: member(n, **(changes.get(n) or {})) for n in NAMES if changes.get(n, {}) is not None}
    return Picture(record or cluster(), members, 1024)


def test_who_goes_first() -> None:
    """W1: the most WAL, then priority, then the name; or who was asked for."""
    assert picture().plan(NAMES, None) == "n2"
    assert picture(n3={"received_lsn": 1001}).plan(NAMES, None) == "n3"
    assert picture(n3={"priority": 200}).plan(NAMES, None) == "n3"
    assert picture().plan(NAMES, "n3") == "n3"
    assert picture(n2={"latched": True}).plan(NAMES, None) == "n3"


@pytest.mark.parametrize(
    ("found", "to", "word"),
    [
        (picture(cluster(primary=None, primary_fencer_id=None)), None, "vacant"),
        (picture(n1=None), None, "n1 is recorded as the primary and its agent is not alive"),  # type: ignore[arg-type]
        (picture(), "n1", "the primary already"),
        (picture(), "n9", "not a member; members are n1, n2, n3"),
        (picture(n2={"latched": True}), "n2", "latched"),
        (picture(n2={"retiring": True}), "n2", "being stopped"),
        (picture(n2={"received_lsn": 0}, n3=None), "n2", "behind"),  # type: ignore[arg-type]
        (picture(n2={"db": "down"}, n3={"streaming": False}), None, "n3 does not stream"),
    ],
    ids=["vacant", "primary lost", "itself", "a stranger", "latched", "stopping", "lag", "nobody"],
)
def test_what_cannot_be_is_said_before_it_is_asked(found: Picture, to: str | None, word: str) -> None:
    """W1: with the reason, and nothing is written."""
    if "behind" in word:
        found = Picture(msgspec.structs.replace(found.cluster, lsn=5000), found.members, 1024)
    with pytest.raises(Impossible, match=word):
        found.plan(NAMES, to)


def test_the_outcome_is_read_from_the_record() -> None:
    """W1: done, refused with the leader's reason, or somebody else was faster."""
    named = cluster(successor="n2", request="r")
    assert outcome(named, 3, "n2", "r") is None
    assert (
        outcome(cluster(primary=None, primary_fencer_id=None, successor="n2", clean=True), 3, "n2", "r")
        is None
    )
    assert outcome(cluster(term=4, primary="n2"), 3, "n2", "r") == (True, "n2 leads in term 4")
    ended = outcome(cluster(term=4, primary="n3"), 3, "n2", "r")
    assert ended is not None
    assert not ended[0]
    assert "faster than n2" in ended[1]
    assert outcome(cluster(refused=("r", "n2 is not alive")), 3, "n2", "r") == (
        False,
        "refused: n2 is not alive",
    )
    assert outcome(cluster(refused=("older", "x")), 3, "n2", "r") is None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_it_waits_longer_than_the_leader_gives_a_successor(name: str) -> None:
    t = PRESETS[name]
    assert bound_s(t) > t.failover_timeout_s + t.lease_s + t.fence_timeout_s


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    file = tmp_path_factory.mktemp("c") / "harmony.toml"
    file.write_text(CONFIG.format(cluster="c1", url="nats://127.0.0.1:1"))
    return load(str(file))


async def test_who_is_alive_is_told_by_the_stores_own_time(config: Config) -> None:
    """D2: a member whose record is older than failover_timeout, by the store's stamps, is not alive."""
    now = [10**18]
    store = MemoryStore(MemoryServer(clock_ns=lambda: now[0]), "c1")
    with pytest.raises(Impossible, match="no record yet"):
        await look(store, config)
    await store.create(MEMBER_PREFIX + "n3", encode(member("n3")), timeout_s=1)
    now[0] += config.timing.failover_ns + 1
    await store.create(CLUSTER_STATE, encode(cluster()), timeout_s=1)
    await store.create(MEMBER_PREFIX + "n2", encode(member("n2")), timeout_s=1)
    found = await look(store, config)
    assert set(found.members) == {"n2"}
    assert "n3 is not alive" in found.obstacle("n3")


async def test_a_record_that_becomes_unreadable_while_it_follows_is_named(config: Config) -> None:
    """W1: with where to look, and no traceback on the worst day."""
    store = MemoryStore(MemoryServer(), "c1")
    await store.create(CLUSTER_STATE, b"{", timeout_s=1)
    with pytest.raises(Impossible, match="cluster_state cannot be read"):
        await follow(store, config.timing, 3, "n2", "r")


@pytest.mark.parametrize("now", [cluster(term=4), cluster(primary="n2"), cluster(primary=None)])
def test_what_was_asked_for_is_over_once_leadership_has_changed(now: ClusterState) -> None:
    wish = Switchover("r", "n2", 3, "somebody")
    control = Control(attempt="a", acknowledged=2)
    assert wished(control, cluster(), cluster(), wish) == Control("a", acknowledged=2, switchover=wish)
    with pytest.raises(Impossible, match="leadership has changed meanwhile"):
        wished(control, now, cluster(), wish)
