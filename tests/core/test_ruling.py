"""I2: a primary's synchronous rule, step by step, as the core drives it: what is told, recorded, and waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec.structs import replace as with_

from harmony.core import candidate, ruling
from harmony.core.messages import (
    Command,
    DbSeen,
    Event,
    MemberSeen,
    Nudge,
    RuleRefused,
    TellRule,
    Walsender,
    Write,
    WriteDone,
)
from harmony.core.node import initial, step
from harmony.core.observe import unfit_by
from harmony.core.ruling import activated, claimed, names
from harmony.core.states import State
from harmony.core.sync import HOLD, NOBODY, Mode, Rule
from harmony.core.timing import NS
from harmony.core.view import Identity, SentOrder, View
from harmony.records import CLUSTER_STATE, ClusterState, Member
from tests.core.helpers import EPOCH, FAST, T0, cluster, fencer, identity, member, seen

TICK = NS // 20
BOTH = Rule(1, ("n2", "n3"))
ONLY2 = Rule(1, ("n2",))
ALONE = Rule(0, ("n2", "n3"))


class Leader:
    """n1 leads; its fencer and its PostgreSQL do at once what they are told, unless a test holds them up."""

    def __init__(
        self, recorded: Rule = BOTH, *, mode: Mode = "quorum", restarted: bool = False, **changes: object
    ) -> None:
        self.me: Identity = replace(identity("n1"), sync_mode=mode)
        self.now, self.revision = T0, 50
        self.record = cluster(term=3, sync_count=recorded.count, sync_voters=recorded.voters, **changes)
        told = recorded if recorded.count else NOBODY
        self.rule, self.number, self.done = told, 0 if not restarted else 4, True
        self.loaded = told  # by PostgreSQL's session
        self.waiting = False
        self.lsn = 1000
        self.dead: set[str] = set()  # standbys
        self.voters: set[str] = set(told.voters)
        self.more: tuple[Walsender, ...] = ()
        self.deaf = False  # the store, to a record with another rule
        self.unfit = ""  # a standby, and why
        self.unfit_by: dict[str, object] = {}
        self.refuses = False  # the fencer
        self.silent = False  # the database
        self.told: list[Rule] = []
        self.recorded: list[Rule] = []
        self.commands: list[Command] = []
        self.view: View = initial(self.me)
        self.events: list[Event] = [seen(self.record, 50), MemberSeen("n1", None, 0, 0)]
        if not restarted:  # as if we had promoted it
            self.view = with_(self.view, order=SentOrder((3, 1), "activate", T0))

    def seen(self) -> list[Event]:
        events: list[Event] = [
            fencer(
                "n1", active=(3, 1), lease_deadline_ns=self.now + 60 * NS, following=None, is_standby=False,
                order=(3, 1), order_op="activate", order_state="done",
                rule=self.rule, rule_number=self.number, rule_done=self.done,
            )
        ]  # fmt: skip
        for n in ("n2", "n3"):
            if n not in self.dead:
                record = member(n, **(self.unfit_by if n == self.unfit else {}))
                events.append(MemberSeen(n, record, self.now, EPOCH + self.now))
        if not self.silent:
            self.lsn += 10
            senders = tuple(
                Walsender(n, n in self.voters, self.lsn) for n in ("n2", "n3") if n not in self.dead
            )
            senders += self.more
            names_ = names(self.loaded)
            events.append(
                DbSeen("primary", 4, self.lsn, 0, False, "sys", self.now, names_, senders, self.waiting)
            )
        return events

    def tick(self) -> None:
        self.now += TICK
        events, self.events = [*self.events, *self.seen()], []
        self.view, self.commands = step(self.view, events, self.me, FAST, self.now)
        for c in self.commands:
            match c:
                case TellRule(number=number, rule=rule):
                    self.told.append(rule)
                    if self.refuses:
                        self.events.append(RuleRefused(number))
                    elif number >= self.number:
                        self.rule, self.number, self.done = rule, number, True
                        self.loaded, self.voters = rule, set(rule.voters)
                        self.waiting = rule == HOLD
                case Write(key=key, record=record, revision=revision, attempt=attempt):
                    self.write(key, record, revision, attempt)
                case _:
                    pass

    def write(self, key: str, record: object, revision: int, attempt: str) -> None:
        if key != CLUSTER_STATE:
            self.events.append(WriteDone(key, attempt, "acked", self.now))
            return
        assert isinstance(record, ClusterState)
        rule = ruling.recorded(record)
        if rule != ruling.recorded(self.record):
            self.recorded.append(rule)
            if self.deaf:
                self.events.append(WriteDone(key, attempt, "unknown"))
                return
        self.revision += 1
        self.record = record
        self.events.append(WriteDone(key, attempt, "acked", self.revision))

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * NS / TICK)):
            self.tick()
        assert self.view.state in {State.HEALTHY, State.LEADER}, (self.view.state, self.view.why)


def test_nothing_is_changed_while_everybody_is_there() -> None:
    leader = Leader()
    leader.run(20)
    assert (leader.told, leader.recorded) == ([], [])


def test_a_lost_standby_is_dropped_and_taken_in_again() -> None:
    """After about a lease, and when it has kept up for one; the recorded rule never says more than is in force."""
    leader = Leader()
    leader.run(6)
    leader.dead = {"n3"}
    leader.run(1.5 * FAST.lease_s)
    assert (leader.told, leader.recorded) == ([ONLY2], [ONLY2])
    leader.run(10)
    leader.dead = set()
    leader.run(2 * FAST.lease_s)
    assert leader.told == [ONLY2, BOTH]
    assert leader.recorded == [ONLY2, BOTH]


def test_the_last_one_is_lost_and_back() -> None:
    """Recorded before it is told, and back by way of a rule under which every commit waits."""
    leader = Leader(ONLY2)
    leader.dead = {"n2", "n3"}
    leader.run(3 * FAST.failover_timeout_s)
    assert (leader.recorded, leader.told) == ([ALONE], [NOBODY])
    leader.dead = {"n3"}
    leader.run(3 * FAST.failover_timeout_s)
    assert leader.told == [NOBODY, HOLD, ONLY2]
    assert leader.recorded == [ALONE, ONLY2]


def test_strict_blocks() -> None:
    leader = Leader(ONLY2, mode="strict")
    leader.dead = {"n2", "n3"}
    leader.run(3 * FAST.failover_timeout_s)
    assert leader.told == leader.recorded == [BOTH], "whoever comes back first; and no commit without one"


def test_off_by_configuration() -> None:
    leader = Leader(mode="off")
    leader.run(5)
    assert leader.told == [NOBODY]
    assert leader.recorded == [Rule(0, BOTH.voters), NOBODY]


def test_commits_that_are_not_seen_to_wait_do_not_count() -> None:
    """One of our own is begun; when even that is not seen, the attempt is given up, and not tried at once again."""
    leader = Leader(ALONE)
    leader.dead = {"n3"}
    for _ in range(200):
        leader.tick()
        leader.waiting = False
        if Nudge() in leader.commands:
            break
    else:
        raise AssertionError("nothing was begun")
    for _ in range(round(1.5 * FAST.lease_s * NS / TICK)):
        leader.tick()
        leader.waiting = False
    assert leader.told == [HOLD, NOBODY]
    assert leader.recorded == []
    leader.run(FAST.failover_timeout_s)
    assert leader.told == [HOLD, NOBODY]
    leader.run(20 * FAST.failover_timeout_s)
    assert leader.told[2:4] == [HOLD, ONLY2]


@pytest.mark.parametrize("late", ["session", "voter", "fencer"])
def test_what_is_not_seen_in_force_is_not_recorded(late: str) -> None:
    """A session that has not loaded the names, a voter that is none any more, a fencer that has not told it yet."""
    leader = Leader()
    leader.run(6)
    leader.dead = {"n3"}
    for _ in range(round(10 * NS / TICK)):
        leader.tick()
        if leader.told:
            match late:
                case "session":
                    leader.loaded = BOTH
                case "voter":
                    leader.dead, leader.voters = set(), {"n2", "n3"}
                case _:
                    leader.done = False
    assert set(leader.told) == {ONLY2} if late != "voter" else leader.told[0] == ONLY2
    assert leader.recorded == []
    leader.loaded, leader.voters, leader.done, leader.dead = ONLY2, {"n2"}, True, {"n3"}
    leader.run(5)
    assert leader.recorded[:1] == [ONLY2]


def test_while_the_fate_of_a_record_is_open_nothing_is_told() -> None:
    """What the store holds may be the stronger one, which allows less."""
    leader = Leader(ONLY2)
    leader.dead = {"n3"}
    leader.run(6)
    leader.dead, leader.deaf = {"n2", "n3"}, True
    while not leader.recorded:
        leader.tick()
    weaker = with_(leader.record, sync_count=ALONE.count, sync_voters=ALONE.voters)
    v = with_(leader.view, cluster=weaker, recording=None)
    for unsettled in (True, False):
        commands: list[Command] = []
        ruling.drive(with_(v, unsettled=unsettled), leader.me, FAST, leader.now, commands)
        assert [c.rule for c in commands if isinstance(c, TellRule)] == [NOBODY] * (not unsettled)


def test_an_agent_that_begins_waits_until_what_it_found_is_in_force() -> None:
    """Somebody may still be a voter by the rule of before; with a lower count of the next he would be enough."""
    leader = Leader(BOTH, restarted=True)
    two = Rule(2, ("n2", "n3"))
    leader.rule = leader.loaded = two
    stranger = Walsender("n9", voter=True, flushed_lsn=0)
    leader.more = (stranger,)
    leader.run(8)
    assert leader.told == [two], "once more, with a number of its own"
    leader.more = ()
    leader.run(3)
    assert leader.told == [two, BOTH]


def test_an_agent_that_finds_a_rule_in_force_tells_it_again_before_it_changes_it() -> None:
    """What the one before it has sent may still be on its way; and what it told may not be loaded."""
    leader = Leader(restarted=True)
    leader.run(6)
    assert leader.told == []
    leader.dead = {"n3"}
    leader.voters = {"n2", "n3"}
    for _ in range(200):
        leader.tick()
        leader.loaded = BOTH if len(leader.told) < 2 else leader.loaded
        if leader.told:
            break
    assert leader.told == [BOTH]
    assert leader.number == 5
    leader.run(3)
    assert leader.told == [BOTH, ONLY2]


def test_a_rule_that_was_told_where_there_was_none_is_not_believed() -> None:
    """Of a standby it is: that never ran without. What is adopted did, and of what one finds it is not known."""

    def leads(*, restarted: bool = False, **changes: object) -> Leader:
        leader = Leader(ALONE, restarted=restarted, **changes)
        leader.rule, leader.loaded, leader.voters = BOTH, BOTH, set(BOTH.voters)
        leader.run(8)
        assert leader.recorded == [BOTH]
        return leader

    assert leads().told == []
    assert leads(adopting=True).told == [HOLD, BOTH]
    assert leads(restarted=True).told == [BOTH, HOLD, BOTH]


def test_a_refused_rule_is_looked_at_anew() -> None:
    leader = Leader()
    leader.run(6)
    leader.dead, leader.refuses = {"n3"}, True
    leader.run(3)
    assert leader.told
    assert leader.recorded == []
    leader.refuses = False
    leader.run(5)
    assert leader.recorded == [ONLY2]


def test_without_answers_of_the_database_nothing_changes() -> None:
    leader = Leader()
    leader.run(6)
    leader.dead, leader.silent = {"n3"}, True
    for _ in range(60):
        leader.tick()
    assert (leader.told, leader.recorded) == ([], [])


@pytest.mark.parametrize(
    "why", [{"latched": True}, {"nofailover": True}, {"sick": "its postmaster is stopped"}]
)
def test_who_may_not_lead_confirms_only_where_nobody_else_does(why: dict[str, object]) -> None:
    leader = Leader()
    leader.run(6)
    leader.unfit, leader.unfit_by = "n3", why
    leader.run(3)
    assert leader.told == [ONLY2]
    leader.dead = {"n2"}
    leader.run(8)
    assert leader.told[-1] == Rule(1, ("n3",))


# ---------------------------------------------------------------- claims


def test_a_claim_records_what_is_certain() -> None:
    """Of the commits of before, each is on so many of all but the claimant; the last primary has every one."""
    n2 = identity("n2")
    assert claimed(cluster(), n2) == Rule(1, ("n1", "n3"))
    assert claimed(cluster(sync_count=1, sync_voters=("n2",)), n2) == Rule(1, ("n1", "n3"))
    gone = cluster(sync_count=2, sync_voters=("n2", "n9"), last_primary="n8")
    assert claimed(gone, n2) == Rule(1, ("n1", "n3", "n8", "n9"))
    assert claimed(cluster(sync_count=0), identity("n1")) == Rule(0, ("n2", "n3"))
    assert claimed(None, identity("n1")) == Rule(0, ("n2", "n3")), "what a founder has may be nowhere else"
    assert claimed(cluster(), identity("n2", sync=0)) == NOBODY


def test_an_activation_waits_from_the_first_commit_on() -> None:
    me = identity("n1")
    assert activated(cluster(), me) == BOTH
    assert activated(cluster(sync_count=0), me) == BOTH, "and goes on without, if nobody comes"
    assert activated(cluster(sync_count=0, sync_voters=()), me) == NOBODY
    assert activated(cluster(sync_voters=("n2", "n9")), me) == ONLY2, "n9 is no member any more"


def test_when_commits_waited_for_nobody_only_the_last_primary_may_lead() -> None:
    c = cluster(sync_count=0, lsn=1000)

    def judge(node: str, **changes: object) -> candidate.Verdict:
        me = candidate.Standing(node, True, 4, 5000, FAST.settle_ns, False, False, 100, True)
        others: dict[str, Member] = {n: member(n) for n in ("n1", "n2", "n3") if n != node}
        record = cluster(sync_count=0, lsn=1000, primary=None, **changes)
        return candidate.judge(
            me, record, 50, others, settle_ns=0, maximum_lag_bytes=0, barred="", patient=False
        )

    assert "only n1 certainly has all of them" in judge("n2").why
    assert judge("n1").ok
    assert judge("n2", clean=True).ok, "it has the shutdown checkpoint: that is all there is"
    assert "wait for nobody" in unfit_by(c, member("n2"), "n2")


def test_the_record_is_that_of_the_attempt_that_landed() -> None:
    """Two attempts of one exchange may record different rules; the store has the first, whatever the second said."""
    leader = Leader()
    leader.run(6)
    first: list[ClusterState] = []
    for _ in range(200):
        leader.tick()
        writes = [c for c in leader.commands if isinstance(c, Write) and c.key == CLUSTER_STATE]
        if writes:
            assert isinstance(writes[0].record, ClusterState)
            first = [writes[0].record]
            break
    v = leader.view
    other = with_(first[0], attempt="another", sync_count=0)
    v = with_(v, lead_records=(other, first[0]))
    leader.view = v
    leader.tick()
    assert leader.view.cluster == first[0]
