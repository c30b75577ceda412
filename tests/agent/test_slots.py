"""The plan for the slots and the words about settings: plain data in, plain data out."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from harmony.agent.keeper import Keeper
from harmony.agent.probe import Target
from harmony.agent.settings import LIMITS, check, limits
from harmony.agent.slots import Action, Advance, Create, Drop, Found, Setting, Slot, Wanted, kept, plan
from harmony.config import PermanentSlot
from harmony.core.slots import Duty

N1, N2, N3 = (f"harmony_member_{n}" for n in ("n1", "n2", "n3"))
BOUND = {"max_slot_wal_keep_size": Setting("1024")}
PHYSICAL, LOGICAL = PermanentSlot(type="physical"), PermanentSlot(type="logical", database="app", plugin="x")
WANTED = Wanted("n1", ("n1", "n2", "n3"))
PRIMARY = Duty("primary", "n1", frozenset({"n2", "n3"}), {}, {}, 10**18)
STANDBY = Duty("standby", "n2", frozenset({"n2", "n3"}), {N1: 900, N3: 500}, {}, 0)


def found(*slots: Slot, standby: bool = False, **changes: object) -> Found:
    base = Found(standby, 150000, "harmony", True, 1000, 300, slots, BOUND)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_a_primary_makes_the_slots_of_the_members_it_hears() -> None:
    """One that was never heard of, or is gone, gets none that nobody would ever move."""
    assert plan(found(), WANTED, PRIMARY) == ([Create(N2), Create(N3)], [])
    assert plan(found(), WANTED, replace(PRIMARY, heard=frozenset({"n3"})))[0] == [Create(N3)]
    there = found(Slot(N2, active=True, lsn=1), Slot(N3, lsn=1))
    assert plan(there, WANTED, PRIMARY) == ([], []), "a member moves its slot itself"


def test_a_standby_follows_the_primarys_slots() -> None:
    """Never beyond what it has itself replayed, never back; of the primary's own, all that a rewind would need."""
    here = found(Slot(N2, lsn=100), Slot(N3, lsn=100), standby=True)
    assert plan(here, WANTED, STANDBY)[0] == [Advance(N2, 300), Advance(N3, 500)]
    assert plan(replace(here, replayed=400), WANTED, STANDBY)[0] == [Advance(N2, 300), Advance(N3, 400)]
    assert plan(found(Slot(N2, lsn=300), Slot(N3, lsn=700), standby=True), WANTED, STANDBY)[0] == []
    assert (
        plan(found(Slot(N2, lsn=100, active=True), Slot(N3, lsn=500), standby=True), WANTED, STANDBY)[0] == []
    )
    assert plan(here, WANTED, replace(STANDBY, theirs={}))[0] == [Advance(N2, 300)], "not known: not moved"


@pytest.mark.parametrize(
    ("here", "duty"),
    [
        (found(), None),
        (found(standby=True), PRIMARY),
        (found(), STANDBY),
    ],
    ids=["no duty", "a standby under a primary's duty", "a primary under a standby's"],
)
def test_nothing_is_done_where_it_is_not_certain_what_this_node_is(here: Found, duty: Duty | None) -> None:
    stale = replace(here, slots=(Slot(N1, lsn=1), Slot(N2, lsn=1, status="lost")))
    assert plan(stale, WANTED, duty)[0] == []


def test_what_is_lost_is_dropped_and_made_anew() -> None:
    """Bounded: the slot of who is gone is dropped, and made again once that is heard of."""
    here = found(Slot(N2, lsn=None, status="lost"), Slot(N3, lsn=1, status="lost", active=True))
    gone = "its WAL is gone"
    assert plan(here, WANTED, PRIMARY)[0] == [Drop(N2, gone), Create(N2)]
    assert plan(here, WANTED, replace(PRIMARY, heard=frozenset()))[0] == [Drop(N2, gone)]
    assert kept(here, WANTED) == {}


def test_what_an_old_primary_brings_back_holds_nothing_back() -> None:
    """Its own slot, those of who is no member any more, and the horizon of VACUUM that a standby once had."""
    here = found(
        Slot(N1, lsn=1),
        Slot("harmony_member_n9", lsn=1),
        Slot(N2, lsn=300, pinned=True),
        Slot(N3, lsn=500),
        standby=True,
    )
    actions = plan(here, WANTED, STANDBY)[0]
    assert [(type(a), a.name) for a in actions] == [
        (Drop, N2),
        (Create, N2),
        (Drop, N1),
        (Drop, "harmony_member_n9"),
    ]
    unreserved = found(Slot(N2, lsn=None), Slot(N3, lsn=500), standby=True)
    assert plan(unreserved, WANTED, STANDBY)[0] == [
        Drop(N2, "it holds no WAL, and could not be moved"),
        Create(N2),
    ]
    at_home = found(Slot(N2, lsn=1, pinned=True), Slot(N3, lsn=1))
    assert plan(at_home, WANTED, PRIMARY)[0] == [], "there it is its owner's (hot_standby_feedback)"


@pytest.mark.parametrize("duty", [PRIMARY, STANDBY], ids=["primary", "standby"])
def test_the_slots_of_others_are_left_alone(duty: Duty) -> None:
    """Whatever their state: only said, where they hold much back."""
    others = (
        Slot("mine", lsn=1, status="lost"),
        Slot("cdc", physical=False, lsn=1, status="extended", behind=2**30),
        Slot("harmony_member_n9", physical=False, lsn=1),
    )
    here = found(*others, Slot(N2, lsn=300), Slot(N3, lsn=500), standby=duty is STANDBY)
    actions, notes = plan(here, WANTED, duty)
    assert actions == []
    assert notes == [
        "slot cdc is not used and holds 1024 MB of WAL back. It is not Harmony's: drop it where nobody needs it"
    ]


def test_permanent_physical_slots() -> None:
    wanted = replace(WANTED, members=("n1",), permanent={"backup": PHYSICAL})
    assert plan(found(), wanted, PRIMARY)[0] == [Create("backup")]
    theirs = replace(STANDBY, theirs={"backup": 500})
    assert plan(found(standby=True), wanted, theirs)[0] == [Create("backup")]
    assert plan(found(standby=True), wanted, STANDBY)[0] == [], "not before the primary has it"
    assert plan(found(Slot("backup", lsn=100), standby=True), wanted, theirs)[0] == [Advance("backup", 500)]
    actions, notes = plan(found(Slot("backup", lsn=1, status="lost")), wanted, PRIMARY)
    assert actions == []
    assert "slot backup is lost" in notes[0]
    assert "not physical" in plan(found(Slot("backup", physical=False)), wanted, PRIMARY)[1][0]
    assert kept(found(Slot("backup", lsn=7), Slot("mine", lsn=7)), wanted) == {"backup": 7}


def logical(**changes: object) -> Slot:
    base = Slot("cdc", physical=False, lsn=1, database="app", plugin="x", failover=True, synced=True)
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("duty", "slot", "actions", "note"),
    [
        (PRIMARY, None, [Create("cdc", LOGICAL)], ""),
        (PRIMARY, logical(), [], ""),
        (PRIMARY, logical(status="lost"), [], "is lost"),
        (PRIMARY, logical(failover=False), [], "a failover loses it"),
        (PRIMARY, logical(plugin="y"), [], "plugin y"),
        (STANDBY, None, [], "not copied to this standby yet"),
        (STANDBY, logical(temporary=True), [], "not copied to this standby yet"),
        (STANDBY, logical(), [], ""),
        (STANDBY, logical(synced=False), [Drop("cdc", "")], ""),
        (STANDBY, logical(synced=False, active=True), [], "drop it on this node"),
        (STANDBY, logical(synced=False, failover=False), [], "drop it on this node"),
    ],
)
def test_permanent_logical_slots(duty: Duty, slot: Slot | None, actions: list[Action], note: str) -> None:
    """PostgreSQL 17 copies them; what an old primary brings back under the name would keep it from that."""
    wanted = replace(WANTED, members=("n1",), permanent={"cdc": LOGICAL})
    slots = (slot,) if slot is not None else ()
    here = found(*slots, standby=duty is STANDBY, version=170000)
    did, notes = plan(here, wanted, duty)
    assert [replace(a, why="") if isinstance(a, Drop) else a for a in did] == actions
    assert (note in notes[0]) if note else notes == []
    older = plan(replace(here, version=160000), wanted, duty)
    assert older[0] == []
    assert "from PostgreSQL 17 on" in older[1][0]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"may": False}, 'ALTER ROLE "harmony" REPLICATION'),
        ({"settings": {"max_slot_wal_keep_size": Setting("-1", "default")}}, "could fill the disk"),
    ],
)
def test_without_the_right_or_a_bound_none_is_made(changes: dict[str, object], note: str) -> None:
    actions, notes = plan(found(Slot(N1, lsn=1), **changes), WANTED, PRIMARY)
    assert actions == []
    assert note in notes[0]


def test_switched_off_nothing_is_done() -> None:
    off = replace(WANTED, slots=False)
    assert plan(found(Slot(N1, lsn=1), Slot(N2, status="lost")), off, PRIMARY) == ([], [])
    assert kept(found(Slot(N2, lsn=1)), off) == {}


GOOD = {
    "max_slot_wal_keep_size": "1024",
    "max_replication_slots": "10",
    "wal_level": "replica",
    "hot_standby": "on",
    "wal_log_hints": "on",
    "data_checksums": "off",
    "full_page_writes": "on",
    "fsync": "on",
    "synchronous_commit": "on",
    "primary_slot_name": "",
} | dict.fromkeys(LIMITS, "100")


def said(changes: dict[str, str], wanted: Wanted = WANTED, duty: Duty | None = PRIMARY) -> list[str]:
    settings = {name: Setting(value) for name, value in (GOOD | changes).items()}
    return [note.written() for note in check(found(settings=settings), wanted, duty)]


def test_good_settings_are_not_talked_about() -> None:
    assert said({}) == []
    assert said({}, duty=replace(STANDBY, limits=dict.fromkeys(LIMITS, 100))) == []


@pytest.mark.parametrize(
    ("changes", "meaning", "todo", "alarm"),
    [
        ({"fsync": "off"}, "may lose acknowledged commits", "Set fsync = on", True),
        ({"full_page_writes": "off"}, "torn pages", "Set full_page_writes = on", True),
        ({"synchronous_commit": "off"}, "do not wait for a standby", "Set it to on", True),
        ({"synchronous_commit": "local"}, "do not wait for a standby", "Set it to on", True),
        ({"synchronous_commit": "remote_write"}, "crash with it", "Set it to on", False),
        ({"wal_log_hints": "off"}, "copied anew instead of rewound", "next restart", False),
        ({"wal_level": "minimal"}, "no standby", "Set wal_level = replica", False),
        ({"hot_standby": "off"}, "could not be watched", "RESET hot_standby", False),
        ({"max_wal_senders": "3"}, "2 standbys and a copy need 4", "Raise it", False),
        ({"max_replication_slots": "1"}, "2 are needed", "raise it", False),
        ({"max_slot_wal_keep_size": "-1"}, "may fill the disk", "Give it a bound", False),
    ],
)
def test_each_wrong_setting_says_what_it_means_and_what_to_do(
    changes: dict[str, str], meaning: str, todo: str, alarm: bool
) -> None:
    (note,) = said(changes)
    assert meaning in note
    assert todo in note
    assert note.startswith("ALARM: ") is alarm
    assert len(note) <= 400


def test_settings_that_only_matter_in_a_mode() -> None:
    assert said({"synchronous_commit": "off"}, replace(WANTED, synchronous=False)) == []
    assert said({"wal_log_hints": "off", "data_checksums": "on"}) == []
    (note,) = said({}, replace(WANTED, permanent={"cdc": LOGICAL}))
    assert "Set wal_level = logical on every member" in note


def test_a_standby_with_less_than_its_primary() -> None:
    """PostgreSQL would not start it, or stop its replay."""
    duty = replace(STANDBY, limits={"max_connections": 200, "max_wal_senders": 100})
    (note,) = said({}, duty=duty)
    assert note.startswith("max_connections is 100 here and 200 on n2: at the next start")
    assert note.endswith("Set it to 200 or more here and restart")
    settings = {name: Setting(value) for name, value in GOOD.items()}
    assert limits(found(settings=settings)) == dict.fromkeys(LIMITS, 100)


def test_a_setting_that_waits_for_a_restart() -> None:
    settings = {name: Setting(value) for name, value in GOOD.items()} | {
        "wal_level": Setting("replica", pending=True)
    }
    (note,) = check(found(settings=settings), WANTED, PRIMARY)
    assert note.text.startswith("wal_level was changed and waits for a restart")


class Noted:
    """A connection to nothing: notes what is executed."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def execute(self, query: str, _parameters: object = None) -> None:
        self.asked.append(query)


@pytest.mark.parametrize(
    "action", [Create(N2), Advance(N2, 1), Drop(N2, "")], ids=["create", "advance", "drop"]
)
def test_after_the_lease_nothing_is_even_asked(action: Action) -> None:
    """Between the look and the statement it may have ended; a standby has none, and needs none."""
    keeper, now = Keeper(Target("/nowhere", 1, "u", "d"), WANTED), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    for duty, asked in (
        (None, 0),
        (replace(PRIMARY, until_ns=now - 1), 0),
        (replace(PRIMARY, until_ns=now + 10**13), 1),
        (STANDBY, 1),
    ):
        link = Noted()
        why = keeper._carry_out(link, action, duty)  # type: ignore[arg-type]
        assert (len(link.asked), why) == (asked, "" if asked else "the lease is over")
