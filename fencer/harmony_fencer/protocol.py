"""The fencer's wire protocol: frames and messages, and nothing that acts.

A frame is a 4-byte big-endian length (1 to MAX_FRAME_BYTES) and that many bytes of UTF-8 JSON.
One request, one reply, in order, on a Unix stream socket. Every request carries `v` (protocol
version) and `op`; unknown fields, wrong types, other versions and oversized frames are answered
with a named Refusal and never acted on. This module knows no clock, no file and no PostgreSQL.
"""

from __future__ import annotations

import re
import struct
from typing import Annotated, Literal

import msgspec

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024
HEADER = struct.Struct(">I")
_MAX_COUNTER = 2**53 - 1  # what JSON readers of other languages keep exactly
_NAME = r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?\Z"

NodeName = Annotated[str, msgspec.Meta(pattern=_NAME)]
Counter = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNTER)]
BootNs = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Text = Annotated[str, msgspec.Meta(max_length=512)]


class Generation(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """(term, order): compared lexicographically. The term comes from the store, the order counts in it."""

    term: Counter
    order: Counter

    def __str__(self) -> str:
        return f"{self.term}.{self.order}"


class SyncRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Commits wait for `count` of `voters` (PostgreSQL: ANY count (voters)); count 0 means asynchronous."""

    count: Annotated[int, msgspec.Meta(ge=0, le=32)]
    voters: Annotated[tuple[NodeName, ...], msgspec.Meta(max_length=32)]


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", kw_only=True):
    v: int = VERSION


class Hello(_Request, frozen=True, tag="hello", kw_only=True):
    """Who calls (for the log) and in which version. Answered with a Status."""

    client: Text


class StatusRequest(_Request, frozen=True, tag="status", kw_only=True):
    """Answered with a Status; changes nothing."""


class Activate(_Request, frozen=True, tag="activate", kw_only=True):
    """Make PostgreSQL the writable primary, until `deadline_boottime_ns` (absolute CLOCK_BOOTTIME)."""

    generation: Generation
    deadline_boottime_ns: BootNs
    sync: SyncRule


class Fence(_Request, frozen=True, tag="fence", kw_only=True):
    """Stop PostgreSQL and prove it gone: at once, or `clean` (a planned demotion: a clean shutdown first)."""

    generation: Generation
    reason: Text
    clean: bool = False


class Follow(_Request, frozen=True, tag="follow", kw_only=True):
    """Run PostgreSQL as a standby of `primary` (a configured member), or of nobody (None)."""

    generation: Generation
    primary: NodeName | None


class Renew(_Request, frozen=True, tag="renew", kw_only=True):
    """Move the deadline of the active generation; never acts on PostgreSQL."""

    generation: Generation
    deadline_boottime_ns: BootNs


class OperatorFence(_Request, frozen=True, tag="operator_fence", kw_only=True):
    """An operator's fence: the fencer numbers it itself, above all others, and latches the node."""

    reason: Text
    who: Text
    clean: bool = False


class Unfence(_Request, frozen=True, tag="unfence", kw_only=True):
    """Take the operator's latch away. PostgreSQL stays as it is until the next order."""

    who: Text


Request = Hello | StatusRequest | Activate | Fence | Follow | Renew | OperatorFence | Unfence
OrderOp = Literal["activate", "fence", "follow", "operator_fence"]
OrderState = Literal["running", "done", "failed", "preempted"]
PostgresState = Literal["down", "running"]


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step of the ladder: what was tried, how long it took, whether PostgreSQL was gone after it."""

    name: str
    took_ms: float
    gone: bool
    detail: str = ""


class OrderRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An accepted order and what became of it. `detail` says why it failed."""

    generation: Generation
    op: OrderOp
    primary: str | None  # of a follow
    state: OrderState
    detail: str = ""
    timeline: int | None = None  # of a done activate
    took_ms: float = 0.0
    rungs: tuple[Rung, ...] = ()


class SelfFence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last fence that the fencer began by itself (lease over, start-up, untrusted state, shutdown)."""

    reason: str
    at_boottime_ns: int
    state: OrderState
    detail: str = ""
    took_ms: float = 0.0
    rungs: tuple[Rung, ...] = ()


class Latch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's fence in force."""

    reason: str
    who: str
    at_utc: str


class Status(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="status"):
    """All that the fencer says about itself. Times are CLOCK_BOOTTIME nanoseconds of `boot_id`."""

    v: int
    node: str
    fencer_id: str  # random, made with the state file: two hosts with one name are told apart by it
    boot_id: str
    now_boottime_ns: int
    trusted: bool  # False: the state file could not be believed; fenced, activate refused
    trust_detail: str
    highest: Generation
    active: Generation | None  # the activate whose lease is in force (also while it is being carried out)
    lease_deadline_boottime_ns: int | None
    order: OrderRecord | None  # the newest accepted order
    self_fence: SelfFence | None
    fence_proven: bool  # a fence was the last thing done and it ended with proof
    postgres: PostgresState
    postgres_starts: int  # counts starts seen; a crash and restart between two looks is noticed by it
    following: str | None  # primary of the last done follow, while PostgreSQL runs as its standby
    is_standby: bool  # the data directory is marked as a standby (standby.signal)
    system_identifier: str | None
    latch: Latch | None
    held_by: str  # how PostgreSQL's processes are held: their cgroup, or the process tree and why
    watchdog: str  # "off", or the device and what became of it
    cannot_lead: str  # why an activate would fail here ("" where nothing is known against it)


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="refusal"):
    """A request that was not admitted, by name; nothing has changed."""

    error: Literal[
        "bad_frame",
        "bad_message",
        "bad_version",
        "not_permitted",
        "stale_generation",
        "conflicting_order",
        "not_active",
        "lease_expired",
        "latched",
        "not_latched",
        "untrusted_state",
        "storage_failed",
        "retiring",
    ]
    detail: str
    highest: Generation | None = None


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="accepted"):
    """The order is on disk and has begun, or (a repeat) its recorded outcome as far as it is known."""

    record: OrderRecord


class Renewed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="renewed"):
    """The deadline now in force (the asked-for one, clamped)."""

    deadline_boottime_ns: int


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="done"):
    """unfence was carried out."""

    detail: str


Reply = Status | Refusal | Accepted | Renewed | Done

_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_VERSION_ONLY = re.compile(rb'"v"\s*:\s*(-?\d{1,9})')


class ProtocolError(Exception):
    """Bytes that are no valid message; `error` is the Refusal's name for it."""

    def __init__(self, error: Literal["bad_frame", "bad_message", "bad_version"], detail: str) -> None:
        super().__init__(f"{error}: {detail}")
        self.error: Literal["bad_frame", "bad_message", "bad_version"] = error
        self.detail = detail


def frame(message: Request | Reply) -> bytes:
    """Encode one message as a frame. Raises ValueError when it would exceed MAX_FRAME_BYTES (our bug)."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The body's length from a 4-byte header. Raises ProtocolError("bad_frame") outside 1..MAX."""
    (length,) = HEADER.unpack(header)
    if not 1 <= length <= MAX_FRAME_BYTES:
        raise ProtocolError("bad_frame", f"frame length {length} is not within 1..{MAX_FRAME_BYTES}")
    return int(length)


def decode_request(body: bytes) -> Request:
    """Strictly decode a request's body. Raises ProtocolError, naming the place."""
    found = _VERSION_ONLY.search(body)
    if found is not None and int(found.group(1)) != VERSION:
        raise ProtocolError("bad_version", f"version {int(found.group(1))}; this fencer speaks {VERSION}")
    try:
        request = _requests.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProtocolError("bad_message", str(e)[:300]) from e
    if request.v != VERSION:
        raise ProtocolError("bad_version", f"version {request.v}; this fencer speaks {VERSION}")
    return request


def decode_reply(body: bytes) -> Reply:
    """Decode a reply's body. Raises ProtocolError, naming the place."""
    try:
        return _replies.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProtocolError("bad_message", str(e)[:300]) from e
