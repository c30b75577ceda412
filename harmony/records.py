"""What Harmony keeps in the store: strict records, encoded as JSON, each with its attempt id.

It reads and writes no store; unknown fields are errors, so that two versions never misread each other.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from harmony.core.states import State
from harmony.decoding import decoded

CLUSTER_STATE = "cluster_state"
CONTROL = "control"
MEMBER_PREFIX = "member."

SLOT_PREFIX = "harmony_member_"  # of the names of the members' own replication slots: nobody else's

Count = Annotated[int, msgspec.Meta(ge=0)]


class ClusterState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one key that decides. `primary` None is a vacancy, left by `last_primary` after a proven fence.

    LSNs are byte positions (int), timelines PostgreSQL's. Every acknowledged commit is on any `sync_count` of
    `sync_voters` (core/sync.py). 0 of none: asynchronous. 0 of some: commits wait for nobody now, as there is no
    synchronous standby, and whoever does not hold all must not lead.
    """

    cluster_id: str
    system_identifier: str
    term: Annotated[int, msgspec.Meta(ge=1)]
    primary: str | None
    primary_fencer_id: str | None
    last_primary: str
    beat: Count
    attempt: str
    boot_id: str
    status: State  # of the writer's workflow, at the time of writing
    timeline: Count
    lsn: Count
    sync_count: Count
    sync_voters: tuple[str, ...]
    # the hand-over under way: whom the leader has named, on whose request; in a vacancy: who goes first
    successor: str | None = None
    request: str = ""  # id of the switchover request that it answers; empty: the leader's own doing
    clean: bool = False  # of a vacancy: PostgreSQL was shut down cleanly, and `lsn` is all there will ever be
    refused: tuple[str, str] | None = None  # (id, why) of a switchover request that came to nothing
    begins: Count = 0  # where `timeline` left the one before; 0: not known
    reserved: Count = 0  # the newest timeline that was given away for a promotion
    # leadership that was taken without a hand-over: (term, the store's time of what was replaced), newest last
    changes: tuple[tuple[int, int], ...] = ()
    # founded for a primary that runs already, whose fencer holds no lease yet: nobody else may ever lead by this
    adopting: bool = False


class Switchover(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wish of an operator: that `to` (None: the best) leads. It is about one `term`, and dies with it."""

    id: str
    to: str | None
    term: Count
    who: str


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What operators ask of the cluster. `acknowledged`: the term up to which changes have been looked into."""

    attempt: str
    acknowledged: Count = 0
    switchover: Switchover | None = None


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node's own record. `seen_revision` and `silent_ns` say how long, at the moment the LSN was read,
    the node had seen no newer cluster_state than that revision (its own CLOCK_BOOTTIME)."""

    node: str
    attempt: str
    boot_id: str
    status: State
    row: str  # id of the table row that holds it there
    why: str
    db: Literal["down", "standby", "primary", "unknown"]
    timeline: Count
    received_lsn: Count
    replayed_lsn: Count
    streaming: bool
    seen_revision: Count
    silent_ns: Count
    latched: bool
    nofailover: bool
    priority: int
    generation: str
    lease_left_ms: int | None
    fencer_id: str
    fencer_ok: bool
    system_identifier: str | None
    version: str
    confirms: Count = 0  # the term in which this node, named as the successor, has said: ready
    distrust: str = ""  # why this node does not trust the store
    retiring: bool = False  # its agent was asked to stop
    progress: str = ""  # of a rejoin
    cannot_rewind: str = ""  # why a rejoin would have to copy, and what to do
    unable: bool = False  # its PostgreSQL cannot follow as its data directory is: a rejoin is wanted
    early: bool = False  # a primary, and too early for a rewind to it: no checkpoint on its timeline yet
    barred: bool = False  # it will not promote now, whatever its WAL: nobody need wait for it to go first
    sick: str = ""  # why its PostgreSQL should not lead, though it lives
    note: str = ""  # what people should know of its PostgreSQL's health, and nothing is done about
    # the replication slots here that Harmony keeps, with the byte position from which each holds WAL; null: not known
    slots: dict[str, int] | None = None
    limits: dict[str, int] = {}  # settings of which a standby must not have less than its primary
    notes: tuple[str, ...] = ()  # what is wrong with settings and slots here, with what to do


ALARM = "ALARM: "


class Note(msgspec.Struct, frozen=True):
    """What is wrong with settings or slots, with what to do. `alarm`: it endangers data.

    `Member.notes` holds it as text, and here alone is it known how: records of two versions must be read by both.
    """

    text: str
    alarm: bool = False

    def written(self) -> str:
        """As `Member.notes` holds it."""
        return f"{ALARM}{self.text}" if self.alarm else self.text

    @staticmethod
    def read(written: str) -> Note:
        """Of one of `Member.notes`."""
        return Note(written.removeprefix(ALARM), written.startswith(ALARM))


def lsn(position: int) -> str:
    """A WAL position (bytes) as PostgreSQL prints it: `0/4137E40`."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def slot_name(node: str) -> str:
    """The replication slot of a member, on every other member. The fencer has the same rule."""
    return SLOT_PREFIX + node.replace("-", "_")


_cluster: msgspec.json.Decoder[ClusterState] = msgspec.json.Decoder(ClusterState)
_member: msgspec.json.Decoder[Member] = msgspec.json.Decoder(Member)
_control: msgspec.json.Decoder[Control] = msgspec.json.Decoder(Control)


def encode(record: ClusterState | Member | Control) -> bytes:
    """JSON bytes of a record."""
    return msgspec.json.encode(record)


def decode_cluster(value: bytes) -> ClusterState:
    """Raises Unreadable on anything else than a whole ClusterState."""
    return decoded(_cluster, value)


def decode_member(value: bytes) -> Member:
    """Raises Unreadable on anything else than a whole Member."""
    return decoded(_member, value)


def decode_control(value: bytes) -> Control:
    """Raises Unreadable on anything else than a whole Control."""
    return decoded(_control, value)
