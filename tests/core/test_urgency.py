"""What is told at once: one question of the database and one record at each occasion, and no answer of before it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.core import candidate, urgency
from harmony.core.messages import (
    Ask,
    Command,
    Connected,
    DbSeen,
    DbSilent,
    Event,
    MemberSeen,
    Order,
    RefreshDone,
    Write,
    WriteDone,
)
from harmony.core.node import initial, step
from harmony.core.timing import NS
from harmony.core.view import View
from harmony.records import ClusterState, Member
from tests.core.helpers import EPOCH, FAST, T0, cluster, fencer, identity, member, seen, standby

ME = identity("n2")
MS = NS // 1000
VACANT = cluster(primary=None, primary_fencer_id=None)
NAMED = cluster(successor="n2")


class Node:
    """n2, a standby of n1 that has just told of itself; its records are acknowledged at once, if `acks`."""

    def __init__(self, db_asked_ns: int = T0 - 10 * MS) -> None:
        self.now, self.revision, self.acks = T0, 60, True
        self.open: list[Write] = []
        self.view: View = initial(ME)
        self.told: list[Member] = []
        own = MemberSeen("n2", member("n2", seen_revision=0), 60, EPOCH)
        self.do(fencer(), seen(cluster(), 50), own, standby(db_asked_ns), after_ms=0)
        self.do()
        self.told.clear()

    def do(self, *events: Event, after_ms: int = 1) -> list[Command]:
        """One step; the commands of it."""
        self.now += after_ms * MS
        answers = [self.acknowledged(w) for w in self.open] if self.acks else []
        self.open = [] if self.acks else self.open
        self.view, commands = step(self.view, [*answers, *events, RefreshDone(ok=True)], ME, FAST, self.now)
        for c in commands:
            if isinstance(c, Write) and isinstance(c.record, Member):
                self.told.append(c.record)
                self.open.append(c)
        return commands

    def acknowledged(self, write: Write) -> WriteDone:
        self.revision += 1
        return WriteDone(write.key, write.attempt, "acked", self.revision)

    def asks(self, *events: Event, after_ms: int = 1) -> int:
        """How often the database is asked now."""
        return self.do(*events, after_ms=after_ms).count(Ask())


def cut_off(asked_ns: int, lsn: int = 1000) -> DbSeen:
    """The answer of a standby whose primary's connections have ended."""
    return replace(standby(asked_ns, lsn), streaming=False)


def final(record: Member, revision: int) -> bool:
    """Whether others take this position for the final one of a vacancy."""
    me = candidate.Standing("n3", True, 4, 1000, 0, False, False, 100, True)
    vacancy = cluster(primary=None, sync_count=1, sync_voters=("n2", "n3"))
    verdict = candidate.judge(
        me, vacancy, revision, {"n2": record}, settle_ns=0, maximum_lag_bytes=64, barred="", patient=False
    )
    return "not heard: n2" not in verdict.why


def test_a_vacancy_is_answered_at_once() -> None:
    """The final position is known after one question and one write, not at the next beat."""
    n = Node()
    assert n.asks(seen(VACANT, 51, by_read=False)) == 1
    assert not n.told, "before the database has answered there is nothing to tell"
    n.do(cut_off(n.now, lsn=2000))
    (record,) = n.told
    assert (record.seen_revision, record.received_lsn) == (51, 2000)
    assert final(record, 51)


def test_an_answer_of_before_the_vacancy_is_none() -> None:
    """I2: the question was under way when the place became vacant; what came between is not in its answer."""
    n = Node()
    asked = n.now
    n.do(seen(VACANT, 51, by_read=False))
    n.do(cut_off(asked, lsn=900))
    assert not n.told
    n.do(cut_off(n.now, lsn=2000))
    assert [r.received_lsn for r in n.told] == [2000]


def test_a_beat_right_after_a_vacancy_tells_no_final_position() -> None:
    """I2: the record is new, the position in it is of before the last commits: nobody may count on it."""
    n = Node()
    n.do(after_ms=495)
    n.told.clear()
    n.do(seen(VACANT, 51, by_read=False), after_ms=501)
    (record,) = n.told
    assert record.seen_revision == 0
    assert not final(record, 51)


def test_each_occasion_is_acted_upon_once() -> None:
    """No storm: steps, answers, reads and repeated sights of the same vacancy ask nothing and write nothing more."""
    n = Node()
    asks = n.asks(seen(VACANT, 51, by_read=False))
    for i in range(40):
        again = [seen(VACANT, 51, by_read=i % 2 == 0), cut_off(n.now), DbSilent("busy")]
        asks += n.asks(*again, after_ms=10)
    assert asks == 1
    assert len(n.told) == 1


def test_a_write_under_way_is_not_the_record_that_is_owed() -> None:
    """It was composed before the answer: the next begins when it has ended, one after the other."""
    n = Node()
    n.acks = False
    n.do(after_ms=501)
    assert len(n.told) == 1
    n.do(seen(VACANT, 51, by_read=False))
    n.do(cut_off(n.now, lsn=2000))
    assert len(n.told) == 1
    n.acks = True
    n.do()
    assert [r.received_lsn for r in n.told] == [1000, 2000]


def test_a_database_that_does_not_answer_is_told_of_when_it_does() -> None:
    n = Node()
    n.do(seen(VACANT, 51, by_read=False))
    n.do(DbSilent("busy"), after_ms=100)
    assert not n.told
    n.do(cut_off(n.now), after_ms=100)
    assert len(n.told) == 1


def test_what_is_still_on_its_way_is_waited_for() -> None:
    """Else the other would begin a timeline before what this one has in the end, and this one had to be rewound."""
    n = Node()
    n.do(seen(VACANT, 51, by_read=False))
    assert [n.asks(standby(n.now, lsn=1000 + i)) for i in range(3)] == [1, 1, 1]
    assert not n.asks(), "one question at a time"
    assert not n.told
    assert not n.asks(cut_off(n.now, lsn=1500))
    assert [r.received_lsn for r in n.told] == [1500]
    assert not n.asks(standby(n.now, lsn=1500)), "told is told"


def test_a_connection_that_does_not_end_is_not_waited_for() -> None:
    """A primary that is gone can leave it half open; its acknowledged commits are here all the same."""
    n = Node()
    asks = n.asks(seen(VACANT, 51, by_read=False))
    for _ in range(40):
        asks += n.asks(standby(n.now), after_ms=5)
    assert len(n.told) == 1
    assert asks <= 2 + urgency.DRAIN_NS // (5 * MS)


def test_who_is_named_says_at_once_that_it_is_ready() -> None:
    n = Node()
    assert n.asks(seen(NAMED, 51, by_read=False)) == 1
    n.do(standby(n.now))
    assert [r.confirms for r in n.told] == [3]
    assert not n.asks(seen(cluster(successor="n2", beat=8), 52, by_read=False), standby(n.now))
    assert len(n.told) == 1, "each heartbeat names it again"


def test_who_is_named_a_second_time_says_so_again() -> None:
    n = Node()
    n.do(seen(NAMED, 51, by_read=False))
    n.do(standby(n.now))
    n.do(seen(cluster(), 52, by_read=False))
    assert n.asks(seen(NAMED, 53, by_read=False)) == 1


@pytest.mark.parametrize(
    "record", [cluster(successor="n3"), cluster(beat=8)], ids=["another is named", "a beat"]
)
def test_what_is_no_occasion(record: ClusterState) -> None:
    n = Node()
    assert not n.asks(seen(record, 51, by_read=False))
    n.do(standby(n.now))
    assert not n.told


def test_when_the_primary_is_stale_by_the_own_clock() -> None:
    """The own record is at once as new as staleness needs it; the database is asked after `settle`, so it is final."""
    n = Node()
    n.acks = True
    asks = 0
    while n.now - n.view.silent_from_ns <= FAST.failover_ns:
        assert not asks
        asks += n.asks(standby(n.now), after_ms=50)
    assert asks == 1
    n.told.clear()
    n.do(standby(n.now))
    (record,) = n.told
    assert record.seen_revision == 50
    assert record.silent_ns > FAST.settle_ns


def test_silence_that_begins_anew_owes_nothing() -> None:
    """Stale no more: the answer that comes late is told at the beat, as ever."""
    n = Node()
    while n.now - n.view.silent_from_ns <= FAST.failover_ns:
        n.do(standby(n.now), after_ms=50)
    n.do(Connected())
    n.told.clear()
    n.do(standby(n.now))
    assert not n.told


def follows(n: Node, revision: int, term: int, primary: str) -> list[Order]:
    """What is ordered when that node leads."""
    record = cluster(term=term, primary=primary, primary_fencer_id=f"id-{primary}", last_primary=primary)
    return [c for c in n.do(seen(record, revision, by_read=False)) if isinstance(c, Order)]


def followed(n: Node, order: Order, following: str | None) -> list[Order]:
    """The fencer has carried it out, and PostgreSQL then follows that node; what is ordered now."""
    commands = n.do(
        fencer(
            following=following,
            highest=order.generation,
            order=order.generation,
            order_op=order.op,
            order_state="done",
        )
    )
    return [c for c in commands if isinstance(c, Order)]


def test_who_leads_newly_is_followed_at_once() -> None:
    """The pause between two orders is for one that is sent anew, not for the next leader, whose commits wait for us."""
    n = Node()
    (first,) = follows(n, 51, 4, "n3")
    assert not followed(n, first, "n3")
    (second,) = follows(n, 52, 5, "n1")
    assert (first.primary, second.primary) == ("n3", "n1")


def test_the_same_leader_is_not_followed_again_at_once() -> None:
    """Its order was done, and does not hold: not in a storm."""
    n = Node()
    (first,) = follows(n, 51, 4, "n3")
    assert not followed(n, first, None)
    assert not follows(n, 52, 4, "n3")
