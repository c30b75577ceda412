"""What Harmony keeps in the store: strict records, encoded as JSON, each with its attempt id.

It reads and writes no store; unknown fields are errors, so that two versions never misread each other.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from harmony.core.states import State

CLUSTER_STATE = "cluster_state"
MEMBER_PREFIX = "member."

Count = Annotated[int, msgspec.Meta(ge=0)]


class ClusterState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one key that decides. `primary` None is a vacancy, left by `last_primary` after a proven fence.

    LSNs are byte positions (int), timelines PostgreSQL's; sync_count/sync_voters is the rule that the
    primary of this term commits under: any `sync_count` of `sync_voters` (0: asynchronous).
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


_cluster: msgspec.json.Decoder[ClusterState] = msgspec.json.Decoder(ClusterState)
_member: msgspec.json.Decoder[Member] = msgspec.json.Decoder(Member)


def encode(record: ClusterState | Member) -> bytes:
    """JSON bytes of a record."""
    return msgspec.json.encode(record)


def decode_cluster(value: bytes) -> ClusterState:
    """Raises msgspec.DecodeError on anything else than a whole ClusterState."""
    return _cluster.decode(value)


def decode_member(value: bytes) -> Member:
    """Raises msgspec.DecodeError on anything else than a whole Member."""
    return _member.decode(value)
