"""What docs/protocol.md says and the code knows: limits, peers, fields, refusals, admission, an example.

Rendered into the places that the document marks; tests/test_docs.py holds the two equal, and every row of
the admission tables is executable (tests/fencer/test_protocol.py). It lives here so that the fencer carries
no texts that only readers of the document need.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import cleandoc
from typing import get_args

import msgspec
from msgspec import inspect

from harmony_fencer import protocol, server
from harmony_fencer.admit import PERMITTED, Facts, KnownRule, NewOrder, NewRule, Peer, Permit, Repeat, Verdict
from harmony_fencer.admit import Extend as Extended
from harmony_fencer.ledger import PATIENCE_SHARE, UNHURRIED_S
from harmony_fencer.protocol import (
    Activate,
    Fence,
    Follow,
    Generation,
    Hello,
    OperatorFence,
    OrderOp,
    OrderRecord,
    Refusal,
    Rejoin,
    Renew,
    Reply,
    Request,
    StatusRequest,
    Sync,
    SyncRule,
    SyncTold,
    Unfence,
)

REQUESTS = get_args(protocol.Request)
REPLIES = get_args(protocol.Reply)
SHARED = (protocol.Generation, protocol.SyncRule)
RECORDS = (protocol.OrderRecord, protocol.SelfFence, protocol.Rung, protocol.Latch, protocol.SyncTold)

# ---------------------------------------------------------------- fields

_GENERATION = f"the order's number; in a request both counters are at most {protocol.MAX_ASKED}"
_DEADLINE = "until when PostgreSQL may write; clamped to now + `lease_s`"
_REASON = "for people"
_WHO = "who asks, for people"
MEANING = {
    "Generation.term": "from the cluster's state, +1 at every claim of leadership",
    "Generation.order": "counted by the sender within the term",
    "SyncRule.count": "commits wait for so many of `voters`, at most their number; 0: asynchronous",
    "SyncRule.voters": "the members that count, each once (PostgreSQL: `ANY count (voters)`)",
    "Hello.client": "the caller's name, for people",
    "Activate.generation": _GENERATION,
    "Activate.deadline_boottime_ns": _DEADLINE,
    "Activate.timeline": "what the promotion must begin, reserved in the store "
    "([ADR 011](adr/011-timelines-are-reserved.md)); 0: whatever PostgreSQL takes",
    "Activate.sync": "the synchronous replication to be configured before it may write",
    "Fence.generation": _GENERATION,
    "Fence.reason": _REASON,
    "Fence.clean": "true: a planned demotion, a clean shutdown is tried first; false: writes end at once",
    "Follow.generation": _GENERATION,
    "Follow.primary": "the member to stream from, another than this node; null: nobody",
    "Follow.slot": "true: through this node's replication slot there, which is there by the primary's own word",
    "Rejoin.generation": _GENERATION,
    "Rejoin.primary": "the member to stream from and to be made equal to, another than this node",
    "Rejoin.system_identifier": "the cluster's, in decimal: no other one's data is touched or taken",
    "Rejoin.clone": "true: copied anew at once, as a rewind before this did not help",
    "Rejoin.slot": "as in `follow`; a copy uses it, too",
    "Renew.generation": "of the `activate` whose lease is in force",
    "Renew.deadline_boottime_ns": _DEADLINE + "; an earlier one than that in force changes nothing",
    "Sync.generation": "of the `activate` that is done and whose lease is in force",
    "Sync.number": "counted by the sender within the generation; the rule of the `activate` itself is 0",
    "Sync.rule": "whom commits wait for from now on; null: every commit waits, until the next rule",
    "SyncTold.number": "as it was asked for; 0: the rule of the `activate`",
    "SyncTold.rule": "null: every commit waits",
    "SyncTold.done": "it is in PostgreSQL's configuration, and PostgreSQL was told to read it",
    "OperatorFence.reason": "kept with the latch",
    "OperatorFence.who": "kept with the latch",
    "OperatorFence.clean": "as for `fence`",
    "Unfence.who": _WHO,
    "Rung.name": "`fast` (clean shutdown), `freeze`, `kill`",
    "Rung.took_ms": "how long it took",
    "Rung.gone": "whether PostgreSQL was gone after it",
    "Rung.detail": "what was done, for people",
    "OrderRecord.generation": "under which it was accepted",
    "OrderRecord.op": "which order",
    "OrderRecord.primary": "of a `follow` or `rejoin`: as it was asked for",
    "OrderRecord.state": "what became of it: see [outcomes](#outcomes)",
    "OrderRecord.detail": "why it failed, or what was not as it should be, for people",
    "OrderRecord.timeline": "of an `activate` that is done: PostgreSQL's timeline",
    "OrderRecord.took_ms": "from its beginning to its end; 0 while it runs",
    "OrderRecord.rungs": "of a fence: the steps that were taken, in order",
    "SelfFence.reason": "why, for people",
    "SelfFence.at_boottime_ns": "when it began",
    "SelfFence.state": "as for an order; a fence of its own that failed is tried again until it is done",
    "SelfFence.detail": "what was not as it should be, for people",
    "SelfFence.took_ms": "of its newest attempt",
    "SelfFence.rungs": "of its newest attempt",
    "Latch.reason": "as the operator gave it",
    "Latch.who": "as the operator gave it",
    "Latch.at_utc": "when, ISO 8601",
    "Status.node": "this node's name",
    "Status.fencer_id": "random, made with the state file: tells two hosts with one name apart",
    "Status.boot_id": "of this boot: the times below mean nothing in another",
    "Status.now_boottime_ns": "when this was written",
    "Status.trusted": "false: the state on disk cannot be believed; fences only, until it is repaired",
    "Status.trust_detail": "why, and how to repair it, for people",
    "Status.highest": "the highest generation accepted: only a greater one is a new order",
    "Status.active": "of the `activate` whose lease is in force, also while it is being carried out",
    "Status.lease_deadline_boottime_ns": "when that lease ends; null: PostgreSQL may not write",
    "Status.order": "the newest accepted order",
    "Status.self_fence": "the newest fence that the fencer began by itself since it was started",
    "Status.fence_proven": "a fence was the last thing done since the start, and it ended with proof",
    "Status.shutdown_lsn": "byte position where the shutdown checkpoint record of the newest clean fence of a "
    "primary begins; null: not cleanly shut down, or PostgreSQL has been started since",
    "Status.postgres": "whether a postmaster of this data directory lives, as last seen",
    "Status.postgres_starts": "starts seen by this fencer process: betrays a crash and restart between two looks",
    "Status.following": "the primary of the last `follow` done, while PostgreSQL runs as a standby",
    "Status.is_standby": "`standby.signal` is there: whoever starts PostgreSQL gets a read-only standby",
    "Status.timeline": "the newest with WAL here, as seen at the start or by an activate; 0: not known yet",
    "Status.begins": "byte position at which `timeline` left the one before, by its history file; 0: not known",
    "Status.system_identifier": "PostgreSQL's, once it has been read",
    "Status.sync": "the rule of the generation whose lease is in force; null: none is",
    "Status.latch": "the operator's fence in force",
    "Status.empty": "`bootstrap.method`, where nothing stands at `data_dir` and something may be made there",
    "Status.was_standby": "what ran here last was a standby, as the control file has it",
    "Status.adopting": "PostgreSQL runs as a primary without a lease, by an operator's permit (`harmonyctl adopt`); "
    "the first accepted order ends that",
    "Status.held_by": "how PostgreSQL's processes are held: a cgroup, or the process tree and why, for people",
    "Status.watchdog": "the watchdog device and its state, for people",
    "StatusRequest.unless": "the `change` of the last `status` seen",
    "StatusRequest.wait_ms": "while nothing has changed since `unless`, answer after so many milliseconds",
    "Status.cannot_rewind": "why `pg_rewind` could not help here and what to do; empty: nothing is known against it",
    "Status.progress": "what a `rejoin` is doing, or that one was interrupted, for people; empty: neither",
    "Status.unfinished": "a `rejoin` was interrupted: until another is done, PostgreSQL cannot be started here",
    "Status.spent": "no proof, yet all that is left is killed and waits in the kernel for a disk: it never runs again",
    "Status.change": "another number when anything but times has changed; begins anew with the fencer",
    "Status.cannot_lead": "why an `activate` would fail here, for people; empty: nothing is known against it",
    "Refusal.error": "see [refusals](#refusals)",
    "Refusal.detail": "for people; printable",
    "Refusal.highest": "the highest generation accepted; null where the message was not understood",
    "Accepted.record": "of this order, running; of a repeat, its outcome as far as it is known",
    "Renewed.deadline_boottime_ns": "the deadline now in force",
    "Done.detail": "for people",
}  # fmt: skip


def _type(t: inspect.Type) -> str:
    match t:
        case inspect.BoolType():
            return "true, false"
        case inspect.IntType(ge=low, le=high):
            return "integer" if high is None else f"integer, {low} to {high}"
        case inspect.FloatType():
            return "number"
        case inspect.StrType(pattern=None, max_length=None):
            return "string"
        case inspect.StrType(pattern=None, max_length=high):
            return f"string, at most {high} characters"
        case inspect.StrType():
            return "a [member's name](#types)"
        case inspect.LiteralType(values=values):
            return ", ".join(f"`{v}`" for v in values)
        case inspect.StructType(cls=cls):
            return f"a [{cls.__name__}](#{cls.__name__.lower()})"
        case inspect.VarTupleType(item_type=item, max_length=high):
            return f"array{f' of at most {high}' if high is not None else ''}: each {_type(item)}"
        case inspect.UnionType(types=types):
            return ", or ".join("null" if isinstance(x, inspect.NoneType) else _type(x) for x in types)
        case _:
            raise AssertionError(t)


def _unit(name: str) -> str:
    if name.endswith("_boottime_ns"):
        return "ns of CLOCK_BOOTTIME"
    return "ms" if name.endswith("_ms") else ""


def _default(f: inspect.Field) -> str:
    if f.required:
        return "always"
    shown = msgspec.json.encode(f.default).decode()
    return f"may be left out: `{shown}`"


def _struct(cls: type, *, reply: bool = False) -> list[str]:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    lines = [f"### {cls.__name__}", "", cleandoc(cls.__doc__ or ""), ""]  # Python 3.13 has done it already
    lines += ["| field | | type and range | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    if info.tag_field is not None:
        lines.append(
            f"| `{info.tag_field}` | always | `{info.tag}` |  | which {'reply' if reply else 'request'} |"
        )
    for f in info.fields:
        if f.name == "v":
            lines.append(f"| `v` | always | integer | | the protocol's version: {protocol.VERSION} |")
            continue
        there = "always" if reply else _default(f)
        lines.append(
            f"| `{f.name}` | {there} | {_type(f.type)} | {_unit(f.name)} | {MEANING[f'{cls.__name__}.{f.name}']} |"
        )
    return [*lines, ""]


def peers_in_code() -> set[Peer]:
    return set(server.CONNECTIONS)


def fields_documented() -> set[str]:
    """Every Struct.field that the document has a row for."""
    return {
        f"{cls.__name__}.{name}"
        for cls in (*REQUESTS, *REPLIES, *SHARED, *RECORDS)
        for name in cls.__struct_fields__
        if name != "v"
    }


# ---------------------------------------------------------------- refusals

REFUSALS = {
    "bad_frame": (
        "the length before the body is 0 or over the limit",
        "your bug; the connection is closed, as where the next frame begins is not known",
    ),
    "bad_message": (
        "the body is not one valid request ([strictly](#json-strictly)); or `follow` names no other member",
        "your bug, or (`follow`) members configured differently here; the connection goes on",
    ),
    "bad_version": (
        "`v` is another version",
        "stop: fencer and client are of different releases; restart the older one",
    ),
    "not_permitted": (
        "this user may not send this request; or may not connect at all (then: closed)",
        "do not repeat; `operator_fence` and `unfence` are for root",
    ),
    "too_many_connections": (
        "this peer has all of its connections open; this one is closed, nothing was read from it",
        "close what you do not need, and try again",
    ),
    "stale_generation": (
        "the generation is not greater than the highest accepted",
        "somebody ordered since: read `status`, decide anew, count on from `highest`; never just raise the number",
    ),
    "conflicting_order": (
        "the generation was used for another order",
        "two senders share a number, or you lost count: read `status`, decide anew, take a greater one",
    ),
    "stale_rule": (
        "a `sync` with a greater number was accepted",
        "somebody else told PostgreSQL since: read `status`, decide anew, take a greater number",
    ),
    "not_active": (
        "the generation is not the one whose lease is in force, or that lease is over; `sync`: or not activated yet",
        "you do not lead (any more): stop renewing; PostgreSQL is being fenced or was",
    ),
    "active": (
        "the node leads under a lease, and a `rejoin` would destroy what only it has",
        "`fence` first, and only where another leads",
    ),
    "unfinished": (
        "a `rejoin` was interrupted while the data directory was being rewound",
        "send another `rejoin`: nothing else can start PostgreSQL there",
    ),
    "lease_expired": (
        "the deadline asked for is not in the future of the fencer's clock",
        "your heartbeat is too old, or you slept: send nothing older; look at the cluster first",
    ),
    "latched": (
        "an operator's fence is in force",
        "wait for `unfence`; a `fence` is accepted all the same",
    ),
    "not_latched": ("there is no operator's fence to lift", "nothing to do"),
    "untrusted_state": (
        "the fencer cannot believe its own memory of the highest generation, or its disk fails",
        "have it repaired as `trust_detail` says; a `fence` is accepted all the same",
    ),
    "storage_failed": (
        "the order could not be made durable, so it was not begun",
        "repair the disk, and ask again",
    ),
    "retiring": (
        "the fencer is ending (asked to, or its supervisor died): it only keeps the lease it has",
        "connect again: a new fencer comes",
    ),
}


def _refusals() -> list[str]:
    lines = ["| error | cause | what the client should do |", "| --- | --- | --- |"]
    return lines + [f"| `{name}` | {cause} | {do} |" for name, (cause, do) in REFUSALS.items()]


def refusals_in_code() -> set[str]:
    info = inspect.type_info(Refusal)
    assert isinstance(info, inspect.StructType)
    (error,) = (f.type for f in info.fields if f.name == "error")
    assert isinstance(error, inspect.LiteralType)
    return {str(v) for v in error.values}


# ---------------------------------------------------------------- limits and peers


def _limits() -> list[str]:
    rows = [
        ("version", f"{protocol.VERSION}", "any other: `bad_version`"),
        ("body of a frame", f"1 to {protocol.MAX_FRAME_BYTES} bytes", "else `bad_frame`, and closed"),
        (
            "text in a request",
            f"{protocol.MAX_TEXT} characters",
            "Unicode code points; longer: `bad_message`",
        ),
        ("counters in a request", f"{protocol.MAX_ASKED}", "larger: `bad_message`"),
        (
            "a frame once begun",
            f"{server.FRAME_TIMEOUT_S:g} s",
            "from its first byte to its last; slower: closed",
        ),
        ("a reply", f"{server.FRAME_TIMEOUT_S:g} s", "to be taken by the client; slower: closed"),
        ("an idle connection", "no limit", "it costs its own place only"),
        ("a refused connection", f"{server.REFUSAL_TIMEOUT_S:g} s", "to read why; then closed"),
        (
            "connections not yet accepted",
            f"{server.BACKLOG}",
            "more wait their turn in connect()",
        ),
        (
            "requests of the agent's user",
            f"{server.AGENT_PER_S:g} a second, {server.AGENT_BURST} at once",
            "over all its connections; faster: answered later",
        ),
        ("`wait_ms` of a `status`", f"{protocol.MAX_WAIT_MS} ms", "longer: `bad_message`"),
        (
            "the disk of an `activate` or `follow`",
            f"{UNHURRIED_S:g} s",
            "slower: `storage_failed`",
        ),
        (
            "the disk of a fence",
            f"`fence_timeout_s` × {PATIENCE_SHARE:g}",
            "slower: fenced all the same, and untrusted until the disk has kept it",
        ),
    ]
    lines = ["| what | limit | beyond it |", "| --- | --- | --- |"]
    return lines + [f"| {what} | {limit} | {beyond} |" for what, limit, beyond in rows]


PEERS: dict[Peer, str] = {
    "root": "uid 0, or the user that the fencer itself runs as",
    "agent": "`agent_uid` of the configuration",
    "other": "everybody else",
}


def _op(cls: type) -> str:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return str(info.tag)


def _peers() -> list[str]:
    lines = ["| peer | " + " | ".join(f"`{_op(c)}`" for c in REQUESTS) + " | connections |"]
    lines += ["| --- |" + " --- |" * (len(REQUESTS) + 1)]
    for peer, who in PEERS.items():
        may = ["yes" if peer in PERMITTED[c] else "no" for c in REQUESTS]
        lines.append(f"| **{peer}**: {who} | " + " | ".join(may) + f" | {server.CONNECTIONS[peer]} |")
    told = server.REFUSED_AT_ONCE
    return [
        *lines,
        "",
        f"Beyond its connections, {told} more of each peer are told why; the others are just closed.",
    ]


# ---------------------------------------------------------------- admission


@dataclass(frozen=True)
class Case:
    """One request as admit() sees it, at NOW."""

    facts: Facts
    request: Request
    peer: Peer


NOW = 1_000
G = Generation(7, 3)


@dataclass(frozen=True)
class Step:
    """A condition, what is answered where it holds, and how a case is brought into it (None: not by admit())."""

    when: str
    answer: str  # a refusal's name, or what else
    bring: Callable[[Case], Case] | None


def _facts(case: Case, **changed: object) -> Case:
    return replace(case, facts=replace(case.facts, **changed))  # type: ignore[arg-type]


def _newest(op: OrderOp, primary: str | None = None) -> Callable[[Case], Case]:
    return lambda c: _facts(c, highest=G, newest=OrderRecord(G, op, primary, "done"))


OPS: dict[type, OrderOp] = {Activate: "activate", Fence: "fence", Follow: "follow", Rejoin: "rejoin"}


def _same(case: Case) -> Case:
    op: OrderOp = OPS[type(case.request)]
    return _newest(op, getattr(case.request, "primary", None))(case)


def _late(case: Case) -> Case:
    return replace(case, request=msgspec.structs.replace(case.request, deadline_boottime_ns=NOW))


def _permitted(who: str, peer: Peer) -> Step:
    return Step(f"the peer is not {who}", "not_permitted", lambda c: replace(c, peer=peer))


EITHER = _permitted("root or the agent", "other")
ROOT = _permitted("root", "agent")
RETIRING = Step("the fencer is ending, or orphaned", "retiring", lambda c: _facts(c, retiring=True))
STALE = Step(
    "the generation is not greater than the highest",
    "stale_generation",
    lambda c: _facts(c, highest=Generation(7, 4), newest=None),
)
UNTRUSTED = Step("the state is not trusted", "untrusted_state", lambda c: _facts(c, trusted=False))
LATCHED = Step("an operator's fence is in force", "latched", lambda c: _facts(c, latched=True))
NOT_DURABLE = Step("it cannot be made durable", "storage_failed", None)
LATE = Step("the deadline is not in the future", "lease_expired", _late)


REPEATED = "accepted, with its outcome so far: nothing is done again"


def _repeats(other: OrderOp, *, primary: bool = False) -> list[Step]:
    same = "the newest order has this very generation, and is the same order"
    return [
        Step(f"{same} with the same primary" if primary else same, REPEATED, _same),
        Step("the newest order has this very generation", "conflicting_order", _newest(other)),
        STALE,
    ]


NO_MEMBER = Step(
    "`primary` is this node, or no configured member",
    "bad_message",
    lambda c: replace(c, request=msgspec.structs.replace(c.request, primary="n9")),
)
LEADS = Step("the node leads under a lease", "active", lambda c: _facts(c, active=Generation(7, 2)))
UNFINISHED = Step(
    "a rejoin was interrupted in the data directory", "unfinished", lambda c: _facts(c, unfinished=True)
)
NO_VOTERS = Step(
    "`sync.voters` names this node, or no configured member",
    "bad_message",
    lambda c: replace(c, request=msgspec.structs.replace(c.request, sync=SyncRule(1, ("n9",)))),
)
NEWER = Step(
    "a newer order has been accepted and is about to begin",
    "not_active",
    lambda c: _facts(c, highest=Generation(7, 9)),
)
NOT_ACTIVE = Step(
    "the generation is not the one whose lease is in force",
    "not_active",
    lambda c: _facts(c, active=Generation(7, 2)),
)
OVER = Step(
    "that lease is over (it is never revived)",
    "not_active",
    lambda c: _facts(c, active=G, lease_deadline_ns=NOW),
)
UNDER_WAY = Step(
    "the `activate` of that generation is not done",
    "not_active",
    lambda c: _facts(c, newest=OrderRecord(G, "activate", None, "running")),
)
STALE_RULE = Step(
    "a greater number was accepted", "stale_rule", lambda c: _facts(c, sync=SyncTold(3, RULE, done=True))
)
OTHER_RULE = Step(
    "this number was accepted with another rule",
    "conflicting_order",
    lambda c: _facts(c, sync=SyncTold(2, None, done=True)),
)
NO_CONFIRMERS = Step(
    "`rule.voters` names this node, or no configured member",
    "bad_message",
    lambda c: replace(c, request=msgspec.structs.replace(c.request, rule=SyncRule(1, ("n9",)))),
)
TOLD = "done: nothing is done again"
SAME_RULE = Step(
    "this number was accepted with this rule, and PostgreSQL was told",
    TOLD,
    lambda c: _facts(c, sync=SyncTold(2, RULE, done=True)),
)
NOT_LATCHED = Step("no operator's fence is in force", "not_latched", lambda c: _facts(c, latched=False))
BEGUN = "accepted: durable, whatever runs is cancelled and awaited, and it begins"
FRESH = Facts("n1", frozenset({"n1", "n2"}), True, False, False, Generation(7, 2), None, None, 0)
LEADING = replace(FRESH, highest=G, active=G, lease_deadline_ns=NOW + 50)
RULE = SyncRule(0, ())
COMMITTING = replace(
    LEADING, newest=OrderRecord(G, "activate", None, "done"), sync=SyncTold(0, RULE, done=True)
)

# Per request: a case that is admitted, the conditions in the order in which they are checked, what is done else.
ADMISSION: list[tuple[Case, list[Step], str]] = [
    (Case(FRESH, Hello(client=""), "agent"), [EITHER], "status"),
    (Case(FRESH, StatusRequest(), "agent"), [EITHER], "status"),
    (
        Case(FRESH, Activate(generation=G, deadline_boottime_ns=NOW + 9, sync=RULE), "agent"),
        [
            EITHER,
            RETIRING,
            *_repeats("fence"),
            UNTRUSTED,
            LATCHED,
            LATE,
            NO_VOTERS,
            UNFINISHED,
            NOT_DURABLE,
        ],
        BEGUN,
    ),
    (
        Case(FRESH, Fence(generation=G, reason=""), "agent"),
        [EITHER, RETIRING, *_repeats("operator_fence")],
        f"{BEGUN}; where it cannot be made durable, it begins all the same",
    ),
    (
        Case(FRESH, Follow(generation=G, primary="n2"), "agent"),
        [EITHER, RETIRING, *_repeats("follow", primary=True), UNTRUSTED, LATCHED, NO_MEMBER, NOT_DURABLE],
        BEGUN,
    ),
    (
        Case(FRESH, Rejoin(generation=G, primary="n2", system_identifier="1"), "agent"),
        [
            EITHER,
            RETIRING,
            *_repeats("follow", primary=True),
            UNTRUSTED,
            LATCHED,
            LEADS,
            NO_MEMBER,
            NOT_DURABLE,
        ],
        BEGUN,
    ),
    (
        Case(LEADING, Renew(generation=G, deadline_boottime_ns=NOW + 90), "agent"),
        [EITHER, RETIRING, NOT_ACTIVE, NEWER, OVER, LATE],
        "renewed: the later of the two deadlines, at most now + `lease_s`",
    ),
    (
        Case(COMMITTING, Sync(generation=G, number=2, rule=RULE), "agent"),
        [
            EITHER,
            RETIRING,
            NOT_ACTIVE,
            NEWER,
            OVER,
            UNDER_WAY,
            NO_CONFIRMERS,
            STALE_RULE,
            OTHER_RULE,
            SAME_RULE,
        ],
        "done: it is in the lease file, and PostgreSQL is being told",
    ),
    (
        Case(FRESH, OperatorFence(reason="", who=""), "root"),
        [ROOT, RETIRING],
        f"{BEGUN}, under `highest` with `order` + 1; the node is latched first; never refused for a disk",
    ),
    (
        Case(replace(FRESH, latched=True), Unfence(who=""), "root"),
        [ROOT, NOT_LATCHED, Step("the latch cannot be removed from disk", "storage_failed", None)],
        "done: PostgreSQL stays as it is until the next order",
    ),
]


def answer(verdict: Verdict) -> str:
    """How a row of this verdict begins."""
    match verdict:
        case Refusal(error=error):
            return error
        case Repeat():
            return REPEATED
        case NewOrder():
            return BEGUN
        case Extended():
            return "renewed"
        case NewRule():
            return "done"
        case KnownRule():
            return TOLD
        case Permit():
            return ""


def _admission() -> list[str]:
    lines: list[str] = []
    for case, steps, otherwise in ADMISSION:
        lines += [f"**`{_op(type(case.request))}`**", "", "| | when | answer |", "| --- | --- | --- |"]
        for number, step in enumerate(steps, 1):
            named = f"`{step.answer}`" if step.answer in REFUSALS else step.answer
            lines.append(f"| {number} | {step.when} | {named} |")
        lines += [f"| {len(steps) + 1} | else | {otherwise} |", ""]
    return lines[:-1]


# ---------------------------------------------------------------- an example, byte for byte


def _dump(raw: bytes) -> list[str]:
    lines = []
    for at in range(0, len(raw), 16):
        piece = raw[at : at + 16]
        shown = "".join(chr(b) if 32 <= b < 127 else "." for b in piece)
        lines.append(f"{at:04x}  {piece.hex(' '):<47}  {shown}")
    return lines


def _example() -> list[str]:
    record = OrderRecord(Generation(4, 2), "fence", None, "running")
    said: list[tuple[str, Request | Reply]] = [
        ("The client sends", Fence(generation=Generation(4, 2), reason="rejoin")),
        ("The fencer, whose highest was 4.1, answers", protocol.Accepted(record)),
        ("The client sends an older order", Fence(generation=Generation(4, 1), reason="")),
        (
            "The fencer answers",
            Refusal("stale_generation", "generation 4.1, highest accepted 4.2", Generation(4, 2)),
        ),
    ]
    lines: list[str] = []
    for who, message in said:
        raw = protocol.frame(message)
        lines += [f"{who} {len(raw)} bytes, of which the first four say {len(raw) - 4}:", "", "```"]
        lines += [*_dump(raw), "```", ""]
    return lines[:-1]


# ---------------------------------------------------------------- into the document


def _all(classes: tuple[type, ...], *, reply: bool = False) -> list[str]:
    return [line for cls in classes for line in _struct(cls, reply=reply)][:-1]


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "limits": _limits,
    "peers": _peers,
    "requests": lambda: _all(REQUESTS),
    "types": lambda: _all(SHARED),
    "replies": lambda: _all(REPLIES, reply=True),
    "records": lambda: _all(RECORDS, reply=True),
    "refusals": _refusals,
    "admission": _admission,
    "example": _example,
}
_PLACE = re.compile(r"(<!-- rendered: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str) -> str:
    """The document with what stands in its marked places rendered anew. Raises KeyError, ValueError."""
    places = [name for _, name, _ in _PLACE.findall(text)]
    if sorted(places) != sorted(SECTIONS):
        raise ValueError(f"docs/protocol.md has the places {places}, not each of {list(SECTIONS)} once")
    return _PLACE.sub(
        lambda m: m.group(1) + "\n" + "\n".join(SECTIONS[m.group(2)]()) + "\n\n" + m.group(3), text
    )
