"""The fencer's wire protocol: frames and messages, and nothing that acts.

A frame is a 4-byte big-endian length (1 to MAX_FRAME_BYTES) and that many bytes of UTF-8 JSON.
One request, one reply, in order, on a Unix stream socket. Every request carries `v` (protocol
version) and `op`; unknown, missing and repeated fields, wrong types, other versions and oversized
frames are answered with a named Refusal and never acted on. What a frame means to one JSON reader it
means to all: a name that stands twice, or is spelled with escapes, is refused. docs/protocol.md is the
specification. This module knows no clock, no file and no PostgreSQL.
"""

from __future__ import annotations

import re
import struct
from typing import Annotated, Literal, TypeVar

import msgspec

from harmony_fencer.decoding import Unreadable, decoded

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024
HEADER = struct.Struct(">I")
MAX_TEXT = 512  # characters of a request's text for people
MAX_ASKED = 2**52  # a request's counters; the room above is for the fences that the fencer numbers itself
MAX_WAIT_MS = 1000
_MAX_COUNTER = 2**53 - 1  # what JSON readers of other languages keep exactly
_NAME = r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?\Z"

NodeName = Annotated[str, msgspec.Meta(pattern=_NAME)]
Counter = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNTER)]
BootNs = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Timeline = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


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
    """Who calls, and in which version. Answered with a Status."""

    client: Text


class StatusRequest(_Request, frozen=True, tag="status", kw_only=True):
    """Answered with a Status; changes nothing. With `wait_ms`, and while `unless` is the Status's `change`, the
    answer comes when something has changed, at the latest after `wait_ms` milliseconds."""

    unless: Counter | None = None
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=MAX_WAIT_MS)] = 0


class Activate(_Request, frozen=True, tag="activate", kw_only=True):
    """Make PostgreSQL the writable primary, until `deadline_boottime_ns` (absolute CLOCK_BOOTTIME).

    `timeline`: what the promotion must begin, reserved for it in the store; 0: whatever PostgreSQL takes.
    """

    generation: Generation
    deadline_boottime_ns: BootNs
    sync: SyncRule
    timeline: Timeline = 0


class Fence(_Request, frozen=True, tag="fence", kw_only=True):
    """Stop PostgreSQL and prove it gone: at once, or `clean` (a planned demotion: a clean shutdown first)."""

    generation: Generation
    reason: Text
    clean: bool = False


class Follow(_Request, frozen=True, tag="follow", kw_only=True):
    """Run PostgreSQL as a standby of `primary` (a configured member), or of nobody (null)."""

    generation: Generation
    primary: NodeName | None
    slot: bool = False


class Rejoin(_Request, frozen=True, tag="rejoin", kw_only=True):
    """Make PostgreSQL a standby of `primary` that its data directory cannot follow as it is: rewind it, else (or,
    with `clone`, at once) copy it anew, the old directory kept. It destroys what only this node has."""

    generation: Generation
    primary: NodeName
    system_identifier: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,20}\Z")]
    clone: bool = False
    slot: bool = False


class Renew(_Request, frozen=True, tag="renew", kw_only=True):
    """Move the deadline of the active generation; never acts on PostgreSQL."""

    generation: Generation
    deadline_boottime_ns: BootNs


class Sync(_Request, frozen=True, tag="sync", kw_only=True):
    """Have the writable PostgreSQL of the active generation wait by another rule; null: every commit waits.

    `number` counts the rules of one generation; the activate's own is 0.
    """

    generation: Generation
    number: Counter
    rule: SyncRule | None


class OperatorFence(_Request, frozen=True, tag="operator_fence", kw_only=True):
    """An operator's fence: the fencer numbers it itself, above all others, and latches the node."""

    reason: Text
    who: Text
    clean: bool = False


class Unfence(_Request, frozen=True, tag="unfence", kw_only=True):
    """Take the operator's latch away. PostgreSQL stays as it is until the next order."""

    who: Text


Request = Hello | StatusRequest | Activate | Fence | Follow | Rejoin | Renew | Sync | OperatorFence | Unfence
OrderOp = Literal["activate", "fence", "follow", "rejoin", "operator_fence"]
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
    primary: str | None  # of a follow or rejoin
    state: OrderState
    detail: str = ""
    timeline: int | None = None  # of a done activate
    took_ms: float = 0.0
    rungs: tuple[Rung, ...] = ()


class SyncTold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The newest rule that PostgreSQL has to wait by; `done`: it was told (what its processes have loaded is
    for them to say)."""

    number: int
    rule: SyncRule | None  # null: every commit waits
    done: bool


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
    # Byte position of the shutdown checkpoint record of the newest clean fence of a primary: its WAL ends with
    # it. None: not cleanly shut down, or PostgreSQL has been started since
    shutdown_lsn: int | None
    postgres: PostgresState
    postgres_starts: int  # counts starts seen; a crash and restart between two looks is noticed by it
    following: str | None  # primary of the last done follow, while PostgreSQL runs as its standby
    is_standby: bool  # the data directory is marked as a standby (standby.signal)
    was_standby: bool  # the control file says so of what ran here last
    system_identifier: str | None
    timeline: int  # the newest that had WAL here at the start or after an activate; 0: not known
    latch: Latch | None
    adopting: (
        bool  # it runs as a primary with an operator's permit and without a lease, until the first order
    )
    held_by: str  # how PostgreSQL's processes are held: their cgroup, or the process tree and why
    watchdog: str  # "off", or the device and what became of it
    cannot_lead: str  # why an activate would fail here ("" where nothing is known against it)
    progress: str  # of a rejoin, under way or interrupted
    empty: str  # how a data directory may be made where nothing is (bootstrap.method); "": something is there
    unfinished: bool  # a rejoin was interrupted: only another one can start PostgreSQL here
    cannot_rewind: (
        str  # why pg_rewind could not help here, and what to do; "" where nothing is known against it
    )
    change: int  # another number when anything here but the times has changed; begins anew with the fencer
    sync: SyncTold | None = None  # of the active generation
    begins: int = 0  # the byte position at which `timeline` left the one before; 0: not known
    # No proof, yet what the newest fence has left is killed and waits in the kernel for a disk: none of it ever runs
    # again. The place may be given up; nothing may be started here
    spent: bool = False


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="refusal"):
    """A request that was not admitted, by name; nothing has changed."""

    error: Literal[
        "bad_frame",
        "bad_message",
        "bad_version",
        "not_permitted",
        "too_many_connections",
        "stale_generation",
        "conflicting_order",
        "stale_rule",
        "not_active",
        "active",
        "unfinished",
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
    """unfence was carried out, or a sync is being (its end is in the status)."""

    detail: str


Reply = Status | Refusal | Accepted | Renewed | Done

S = TypeVar("S", bound=msgspec.Struct)
# Texts for people: what is too long for a frame is cut in these, and only in these.
PROSE = {
    "client",
    "reason",
    "who",
    "detail",
    "trust_detail",
    "held_by",
    "watchdog",
    "cannot_lead",
    "cannot_rewind",
    "progress",
}
KEPT_RUNGS = 4  # the first and the last so many, where not all fit


class _Versioned(msgspec.Struct):
    """Any version's request: each has `v`."""

    v: int


_encoder = msgspec.json.Encoder()
_versions: msgspec.json.Decoder[_Versioned] = msgspec.json.Decoder(_Versioned)
_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_STRING = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"(\s*:)?', re.DOTALL)  # group 2: it is a name


class ProtocolError(Exception):
    """Bytes that are no valid message; `error` is the Refusal's name for it."""

    def __init__(self, error: Literal["bad_frame", "bad_message", "bad_version"], detail: str) -> None:
        super().__init__(f"{error}: {detail}")
        self.error: Literal["bad_frame", "bad_message", "bad_version"] = error
        self.detail = detail


def _cut(message: S, limit: int) -> S:
    """No text for people over `limit` characters or with what UTF-8 cannot say, and not too many rungs."""
    changed: dict[str, object] = {}
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if name in PROSE and isinstance(value, str):
            text = value if len(value) <= limit else value[: limit - 1] + "…"
            changed[name] = text.encode("utf-8", "replace").decode()
        elif name == "rungs" and isinstance(value, tuple):
            kept = value if len(value) <= 2 * KEPT_RUNGS else value[:KEPT_RUNGS] + value[-KEPT_RUNGS:]
            changed[name] = tuple(_cut(rung, limit) for rung in kept)
        elif isinstance(value, msgspec.Struct):
            changed[name] = _cut(value, limit)
    return msgspec.structs.replace(message, **changed)


def _encode(message: Request | Reply) -> bytes:
    if isinstance(message, _Request):
        return _encoder.encode(_cut(message, MAX_TEXT))  # a fence is not refused for its reason's length
    try:
        body = _encoder.encode(message)
    except UnicodeEncodeError:
        body = _encoder.encode(_cut(message, MAX_FRAME_BYTES))
    for limit in (MAX_TEXT, MAX_TEXT // 16):
        if len(body) > MAX_FRAME_BYTES:
            body = _encoder.encode(_cut(message, limit))
    return body


def frame(message: Request | Reply) -> bytes:
    """Encode one message as a frame. Texts for people are cut ("…" at their end) where it would be too long.

    Raises ValueError when even so it would exceed MAX_FRAME_BYTES (our bug: no reply can).
    """
    body = _encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The body's length from a 4-byte header. Raises ProtocolError("bad_frame") outside 1..MAX."""
    (length,) = HEADER.unpack(header)
    if not 1 <= length <= MAX_FRAME_BYTES:
        raise ProtocolError("bad_frame", f"frame length {length} is not within 1..{MAX_FRAME_BYTES}")
    return int(length)


def _bad(why: Exception | str) -> ProtocolError:
    """The detail holds what the peer sent: printable, so that it can be shown on a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in str(why)[:300])
    return ProtocolError("bad_message", text)


def decode_request(body: bytes) -> Request:
    """Strictly decode a request's body. Raises ProtocolError, naming the place, and nothing else."""
    try:
        version = decoded(_versions, body).v
        if version != VERSION:
            raise ProtocolError("bad_version", f"version {version}"[:40] + f"; this fencer speaks {VERSION}")
        request = decoded(_requests, body)
    except Unreadable as e:
        raise _bad(e) from e
    _refuse_ambiguity(body)
    _refuse_nonsense(request)
    return request


def _refuse_nonsense(request: Request) -> None:
    """What no single field shows. A rule that cannot be met would silently become another one."""
    if isinstance(request, Activate | Fence | Follow | Rejoin | Renew | Sync):
        g = request.generation
        if max(g.term, g.order) > MAX_ASKED:
            raise _bad(f"Expected `int` <= {MAX_ASKED} - at `$.generation`")
    rule = (
        request.sync if isinstance(request, Activate) else request.rule if isinstance(request, Sync) else None
    )
    if rule is not None and (len(set(rule.voters)) < len(rule.voters) or rule.count > len(rule.voters)):
        place = "sync" if isinstance(request, Activate) else "rule"
        raise _bad(f"Expected distinct voters, and `count` of them at most - at `$.{place}`")


def _refuse_ambiguity(body: bytes) -> None:
    """Of a valid request: every name once, as it is (no two of a request's objects share a name)."""
    seen: set[bytes] = set()
    for found in _STRING.finditer(body):
        if found.group(2) is not None:
            name = found.group(1)
            if b"\\" in name or name in seen:
                why = "is spelled with escapes" if b"\\" in name else "stands twice"
                raise _bad(f"the name `{name.decode()[:40]}` {why}")
            seen.add(name)


def decode_reply(body: bytes) -> Reply:
    """Decode a reply's body. Raises ProtocolError, naming the place."""
    try:
        return decoded(_replies, body)
    except Unreadable as e:
        raise _bad(e) from e
