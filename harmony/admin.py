"""The agent's admin socket: what is asked and answered there. One JSON line each way, then it closes.

Read-only: nothing on this socket changes anything.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from harmony.records import ClusterState, Member

MAX_LINE_BYTES = 1024 * 1024


class StatusQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`{"op": "status"}`."""

    op: Literal["status"]


class NodeView(msgspec.Struct, frozen=True):
    """A configured member as this agent sees it. `age_s` is since its record last changed (local clock)."""

    name: str
    host: str
    port: int
    member: Member | None
    age_s: float | None
    alive: bool  # its record changed within failover_timeout


class SelfView(msgspec.Struct, frozen=True):
    """The answering agent."""

    node: str
    state: str
    row: str
    why: str
    store_connected: bool
    failures: int
    lease_left_ms: int | None
    fencer_ok: bool
    fencer_detail: str
    latched: str | None


class StatusReply(msgspec.Struct, frozen=True):
    """The whole cluster as one agent sees it. `cluster_age_s`: since cluster_state last changed."""

    cluster_id: str
    cluster: ClusterState | None
    cluster_revision: int | None
    cluster_age_s: float | None
    cluster_stale: bool
    nodes: tuple[NodeView, ...]
    myself: SelfView
