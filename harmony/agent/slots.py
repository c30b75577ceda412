"""Which replication slots there should be here, and what is to be done for it: a pure plan, nothing that acts.

Harmony's are the physical slots `harmony_member_<node>`, one of each other member, and those that the configuration
names. No other slot is ever made, moved or dropped; of one that holds much WAL back and is not used, a note tells.

On the primary a member's slot is moved by the member. On a standby it follows the primary's slot of the same name,
and so holds what that member may still ask for when this node leads. The primary's own slot holds what a rewind of it
would need: all since the newest restartpoint, which is at a checkpoint that the primary has, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from harmony.config import PermanentSlot
from harmony.core.slots import Duty
from harmony.records import SLOT_PREFIX, slot_name

LOGICAL_FROM = 170000  # server_version_num: failover slots
WAITING = {"extended", "unreserved"}  # wal_status: holds more than max_wal_size
KEEP = "max_slot_wal_keep_size"


@dataclass(frozen=True, slots=True)
class Slot:
    """A row of pg_replication_slots. `lsn`: from where it holds WAL, in bytes; `behind`: how much that is."""

    name: str
    physical: bool = True
    active: bool = False
    lsn: int | None = None
    status: str = "reserved"
    behind: int = 0
    pinned: bool = False  # it holds a transaction id, too: the horizon of VACUUM
    temporary: bool = False
    database: str = ""
    plugin: str = ""
    failover: bool = False
    synced: bool = False

    @property
    def lost(self) -> bool:
        return self.status == "lost"


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of pg_settings; `value` in the setting's own unit."""

    value: str
    source: str = "configuration file"
    pending: bool = False  # changed in the file, and waits for a restart


@dataclass(frozen=True, slots=True)
class Found:
    """What a database has. `redo`: where its newest checkpoint or restartpoint begins."""

    recovering: bool
    version: int
    user: str
    may: bool  # our role may make slots
    replayed: int
    redo: int
    slots: tuple[Slot, ...]
    settings: Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of the configuration."""

    node: str
    members: tuple[str, ...]
    slots: bool = True
    permanent: Mapping[str, PermanentSlot] = field(default_factory=dict)
    synchronous: bool = True

    @property
    def slot(self) -> str:
        """The name of this node's own slot, on the others."""
        return slot_name(self.node)

    @property
    def logical(self) -> bool:
        return any(p.type == "logical" for p in self.permanent.values())


@dataclass(frozen=True, slots=True)
class Create:
    """With `logical`: on its database, by its plugin, as a failover slot."""

    name: str
    logical: PermanentSlot | None = None


@dataclass(frozen=True, slots=True)
class Advance:
    name: str
    to: int


@dataclass(frozen=True, slots=True)
class Drop:
    name: str
    why: str


Action = Create | Advance | Drop


def kept(found: Found, wanted: Wanted) -> dict[str, int]:
    """The slots of Harmony's that are here and hold WAL, each with the position from which it does."""
    names = {slot_name(n) for n in wanted.members} | wanted.permanent.keys()
    return {
        s.name: s.lsn
        for s in found.slots
        if wanted.slots and s.name in names and s.lsn is not None and not s.lost and not s.temporary
    }


def plan(found: Found, wanted: Wanted, duty: Duty | None) -> tuple[list[Action], list[str]]:
    """What is to be done, in order, and what is wrong. Without a duty, or in another role than it says: nothing."""
    notes = list(_idle(found, wanted))
    if not wanted.slots or duty is None or found.recovering != (duty.role == "standby"):
        return [], notes
    unable = _unable(found)
    if unable:
        return [], [*notes, f"no replication slots are made here: {unable}"]
    actions: list[Action] = []
    have = {s.name: s for s in found.slots}
    for node in wanted.members:
        if node != wanted.node:
            name = slot_name(node)
            to = found.redo if node == duty.primary else duty.theirs.get(name)
            actions += _physical(name, have.get(name), found, duty, to, wanted_here=node in duty.heard)
    mine = {slot_name(n) for n in wanted.members if n != wanted.node}
    for s in found.slots:
        if s.name.startswith(SLOT_PREFIX) and s.physical and s.name not in mine and not s.active:
            actions.append(Drop(s.name, "it is of no other member"))
    for name, p in wanted.permanent.items():
        slot = have.get(name)
        if slot is not None and slot.physical != (p.type == "physical"):
            notes.append(
                f"slot {name} is not {p.type}, as replication.permanent_slots says: drop it, or rename one"
            )
        elif p.type == "physical":
            if duty.role == "primary" and slot is not None and slot.lost:
                notes.append(_lost(name))
            else:
                there = duty.role == "primary" or name in duty.theirs
                to = duty.theirs.get(name)
                actions += _physical(name, slot, found, duty, to, wanted_here=there)
        else:
            more, said = _logical(name, slot, p, found, duty)
            actions += more
            notes += said
    return actions, notes


def _unable(found: Found) -> str:
    """Why no slots may or can be made; "": they can."""
    if not found.may:
        return (
            f'the role {found.user} lacks the right. ALTER ROLE "{found.user}" REPLICATION. Until then, who was away '
            "for long must be copied anew"
        )
    keep = found.settings.get(KEEP)
    if keep is not None and keep.value == "-1" and keep.source == "default":
        return (
            f"{KEEP} is not set, and they could fill the disk. Harmony sets it at its next order to PostgreSQL; or "
            "set it in postgresql.conf and reload"
        )
    return ""


def _physical(
    name: str, slot: Slot | None, found: Found, duty: Duty, to: int | None, *, wanted_here: bool
) -> Iterator[Action]:
    """`to`: on a standby, how far it may be moved; None: not known."""
    standby = duty.role == "standby"
    if slot is not None and not slot.physical:
        return  # somebody's, under a name of ours: making ours fails, which is told
    useless = _useless(slot, standby=standby) if slot is not None and not slot.active else ""
    if useless:
        yield Drop(name, useless)
        slot = None
    if slot is None:
        if wanted_here:
            yield Create(name)
        return
    to = min(to, found.replayed) if to is not None else None
    if standby and not slot.active and to is not None and slot.lsn is not None and to > slot.lsn:
        yield Advance(name, to)


def _useless(slot: Slot, *, standby: bool) -> str:
    """Why a slot that nobody uses is to be made anew; "": it is not. On a standby nobody but us moves it."""
    if slot.lost:
        return "its WAL is gone"
    if standby and slot.pinned:  # it would hold VACUUM back for ever, and advancing leaves the pin
        return "it holds transactions back"
    if standby and slot.lsn is None:
        return "it holds no WAL, and could not be moved"
    return ""


def _logical(
    name: str, slot: Slot | None, p: PermanentSlot, found: Found, duty: Duty
) -> tuple[list[Action], list[str]]:
    if found.version < LOGICAL_FROM:
        return [], [f"slot {name}: logical slots survive a failover from PostgreSQL 17 on; it is not made"]
    if slot is not None and (slot.database, slot.plugin) != (p.database, p.plugin):
        return [], [
            f"slot {name} is of database {slot.database}, plugin {slot.plugin}, not as replication.permanent_slots says"
        ]
    if duty.role == "primary":
        if slot is None:
            return [Create(name, p)], []
        if slot.lost:
            return [], [_lost(name)]
        if not slot.failover:
            return [], [f"slot {name} was not made as a failover slot, and a failover loses it: drop it once"]
        return [], []
    if slot is None or slot.temporary:
        return [], [f"slot {name} is not copied to this standby yet: a failover to it would lose the slot"]
    if slot.synced:
        return [], []
    if slot.failover and not slot.active:
        return [
            Drop(name, "it is from when this node led, and keeps PostgreSQL from copying the primary's")
        ], []
    return [], [
        f"slot {name} here is not the primary's, and keeps that from being copied: drop it on this node"
    ]


def _lost(name: str) -> str:
    return f"slot {name} is lost: its owner was away for more WAL than {KEEP}. Drop it, and its owner begins anew"


def _idle(found: Found, wanted: Wanted) -> Iterator[str]:
    """Slots that nobody uses and that hold more WAL than PostgreSQL keeps by itself."""
    ours = {slot_name(n) for n in wanted.members} | wanted.permanent.keys()
    for s in found.slots:
        if s.active or s.status not in WAITING or (found.recovering and s.name in ours):
            continue
        whose = "" if s.name in ours else " It is not Harmony's: drop it where nobody needs it"
        yield f"slot {s.name} is not used and holds {s.behind // 2**20} MB of WAL back.{whose}"
