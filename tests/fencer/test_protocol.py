"""The wire: whatever the bytes, a valid request or a named refusal, and one meaning for every reader."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony_fencer import protocol
from harmony_fencer.admit import Facts, NewOrder, admit
from harmony_fencer.protocol import (
    MAX_ASKED,
    MAX_FRAME_BYTES,
    MAX_TEXT,
    Accepted,
    Activate,
    Done,
    Fence,
    Follow,
    Generation,
    Hello,
    Latch,
    OperatorFence,
    OrderRecord,
    ProtocolError,
    Refusal,
    Renew,
    Renewed,
    Reply,
    Request,
    Rung,
    SelfFence,
    Status,
    StatusRequest,
    Sync,
    SyncRule,
    SyncTold,
    Unfence,
    decode_reply,
    decode_request,
    frame,
    frame_length,
)
from tests.fencer.render_protocol import ADMISSION, NOW, REQUESTS, Case, Step, answer

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_TEXT)
ASKED = st.integers(0, MAX_ASKED)
COUNTER = st.integers(0, 2**53 - 1)
BOOT_NS = st.integers(0, 2**62)
GENERATIONS = st.builds(Generation, ASKED, ASKED)
RULES = st.lists(NAMES, unique=True, max_size=32).flatmap(
    lambda voters: st.builds(SyncRule, st.integers(0, len(voters)), st.just(tuple(voters)))
)
REQUEST: st.SearchStrategy[Request] = st.one_of(
    st.builds(Hello, client=TEXT),
    st.just(StatusRequest()),
    st.builds(Activate, generation=GENERATIONS, deadline_boottime_ns=BOOT_NS, sync=RULES),
    st.builds(Fence, generation=GENERATIONS, reason=TEXT, clean=st.booleans()),
    st.builds(Follow, generation=GENERATIONS, primary=st.none() | NAMES),
    st.builds(Renew, generation=GENERATIONS, deadline_boottime_ns=BOOT_NS),
    st.builds(Sync, generation=GENERATIONS, number=COUNTER, rule=st.none() | RULES),
    st.builds(OperatorFence, reason=TEXT, who=TEXT, clean=st.booleans()),
    st.builds(Unfence, who=TEXT),
)
STATES = st.sampled_from(get_args(protocol.OrderState))
MS = st.floats(0, 1e9)
SEEN = st.builds(Generation, COUNTER, COUNTER)
RUNGS = st.lists(st.builds(Rung, TEXT, MS, st.booleans(), TEXT), max_size=3).map(tuple)
OPS = st.sampled_from(get_args(protocol.OrderOp))
RECORDS = st.builds(OrderRecord, SEEN, OPS, st.none() | NAMES, STATES, TEXT, st.none() | COUNTER, MS, RUNGS)
ERRORS = st.sampled_from(
    sorted(msgspec.json.schema(Refusal)["$defs"]["Refusal"]["properties"]["error"]["enum"])
)
SMALL_REPLY: st.SearchStrategy[Reply] = st.one_of(
    st.builds(Refusal, ERRORS, TEXT, st.none() | SEEN),
    st.builds(Accepted, RECORDS),
    st.builds(Renewed, BOOT_NS),
    st.builds(Done, TEXT),
)


def body(message: Request | Reply) -> bytes:
    return frame(message)[4:]


def refused(raw: bytes) -> str:
    """The name and the place."""
    with pytest.raises(ProtocolError) as e:
        decode_request(raw)
    return str(e.value)


# ---------------------------------------------------------------- what is sent arrives


@given(REQUEST)
def test_every_request_arrives_as_it_was_sent(request_: Request) -> None:
    raw = frame(request_)
    assert frame_length(raw[:4]) == len(raw) - 4
    assert decode_request(raw[4:]) == request_


@given(SMALL_REPLY)
def test_every_reply_arrives_as_it_was_sent(reply: Reply) -> None:
    raw = frame(reply)
    assert len(raw) <= 4 + MAX_FRAME_BYTES
    assert decode_reply(raw[4:]) == reply


@given(REQUEST)
def test_another_json_writer_is_understood(request_: Request) -> None:
    """Escapes in texts, white space and the order of the fields are the client's choice."""
    fields = json.loads(body(request_))
    other = dict(reversed(fields.items()))
    assert decode_request(json.dumps(other, indent=1).encode() + b"\r\n") == request_


# ---------------------------------------------------------------- what is not a request is refused


@settings(max_examples=1000)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_named_refusal(raw: bytes) -> None:
    try:
        decoded = decode_request(raw)
    except ProtocolError as e:
        refusal = Refusal(e.error, e.detail)
    else:
        assert isinstance(decoded, REQUESTS)
        return
    assert refusal.error in {"bad_message", "bad_version"}
    assert refusal.detail.isprintable()
    assert 0 < len(refusal.detail) <= 300
    assert decode_reply(body(refusal)) == refusal


@settings(max_examples=500)
@given(REQUEST, st.data())
def test_a_damaged_request_is_another_valid_one_or_refused(request_: Request, data: st.DataObject) -> None:
    """Bytes removed, replaced or put in: never another exception, and never what a strict reader rejects."""
    raw = bytearray(body(request_))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        decoded = decode_request(bytes(raw))
    except ProtocolError:
        return
    assert decode_request(body(decoded)) == decoded
    pairs = json.loads(raw.decode(), object_pairs_hook=lambda p: p)
    assert len({k for k, _ in pairs}) == len(pairs)


REQUEST_OF_EACH: list[Request] = [
    Hello(client="x"),
    StatusRequest(unless=3, wait_ms=5),
    Activate(generation=Generation(1, 2), deadline_boottime_ns=3, sync=SyncRule(1, ("n2",))),
    Fence(generation=Generation(1, 2), reason="r", clean=True),
    Follow(generation=Generation(1, 2), primary="n2"),
    Renew(generation=Generation(1, 2), deadline_boottime_ns=3),
    Sync(generation=Generation(1, 2), number=3, rule=SyncRule(1, ("n2",))),
    OperatorFence(reason="r", who="w", clean=True),
    Unfence(who="w"),
]
IDS = [type(r).__name__ for r in REQUEST_OF_EACH]
LEFT_OUT = {"clean", "slot", "timeline", "unless", "wait_ms"}  # may be
Tree = dict[str, object]


def nodes(tree: Tree) -> list[tuple[Tree, str]]:
    """Every (object, name) of a request, the nested ones too."""
    found = []
    for name, value in tree.items():
        found.append((tree, name))
        if isinstance(value, dict):
            found += nodes(value)
    return found


@pytest.mark.parametrize("number", range(len(REQUEST_OF_EACH)), ids=IDS)
def test_every_field_is_needed_once_known_and_of_its_type(number: int) -> None:
    """Each field of each request: left out, twice, misspelt, escaped, of another type, out of range."""
    request_ = REQUEST_OF_EACH[number]
    raw = body(request_)
    assert set(type(request_).__struct_fields__) | {"op"} == set(json.loads(raw))
    for at in range(len(nodes(json.loads(raw)))):

        def changed(value: object, *, name: str = "", at: int = at) -> bytes:
            tree = json.loads(raw)
            parent, old = nodes(tree)[at]
            kept = {(name or old) if k == old else k: value if k == old else v for k, v in parent.items()}
            parent.clear()
            parent.update(kept)
            return json.dumps(tree).encode()

        tree = json.loads(raw)
        parent, name = nodes(tree)[at]
        value = parent[name]
        assert decode_request(changed(value)) == request_
        del parent[name]
        if name not in LEFT_OUT:
            assert refused(json.dumps(tree).encode()).startswith("bad_message: ")
        refused(changed(value, name=name + "x"))
        refused(changed(value, name=name.upper()))
        twice = changed(value).replace(f'"{name}":'.encode(), f'"{name}":null,"{name}":'.encode())
        refused(twice)
        same = json.dumps({name: value}).encode()[1:-1]
        assert f"`{name}` stands twice" in refused(changed(value).replace(same, same + b", " + same))
        escaped = f'"\\u{ord(name[0]):04x}{name[1:]}":'.encode()
        assert "escapes" in refused(changed(value).replace(f'"{name}":'.encode(), escaped))
        strange: list[object] = [[], {}, [value], {"x": value}, 1.5, -1, 2**63, -(2**63), 10**400]
        strange += [2**64, float("nan"), float("inf"), "é" * 513, "\ud800", "a\x00b\u2028" * 200, "N1", ""]
        strange += [not value] if not isinstance(value, bool) else [int(value)]
        strange += [None] if name not in {"primary", "unless", "rule"} else []
        strange += [str(value)] if not isinstance(value, str) else []
        strange += [float(value), f"{value}", bool(value)] if type(value) is int else []
        for other in strange:
            if name in {"client", "reason", "who"} and other in ("N1", ""):
                continue  # texts like any other
            name_of_it = refused(changed(other)).partition(":")[0]
            assert name_of_it == ("bad_version" if name == "v" and type(other) is int else "bad_message") or (
                name == "v" and other == 10**400
            )


@pytest.mark.parametrize("request_", REQUEST_OF_EACH, ids=IDS)
def test_an_unknown_field_is_refused_wherever_it_stands(request_: Request) -> None:
    raw = body(request_)
    for at in [i for i, c in enumerate(raw) if c == ord("{")]:
        rest = b"" if raw[at + 1 : at + 2] == b"}" else b","
        assert "zz" in refused(raw[: at + 1] + b'"zz":1' + rest + raw[at + 1 :])


STATUS = b'{"op":"status","v":1}'


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"", ""),
        (b" ", ""),
        (b"null", ""),
        (b"[]", ""),
        (b'"status"', ""),
        (b"\xef\xbb\xbf" + STATUS, ""),  # a byte order mark
        (STATUS.decode().encode("utf-16"), ""),
        (STATUS + STATUS, ""),
        (STATUS + b"\x00", ""),
        (STATUS[:-1] + b",}", ""),
        (STATUS[:-1] + b"/**/}", ""),
        (b"{'op':'status','v':1}", ""),
        (b'{"op":"status","v":01}', ""),
        (b'{"op":"status","v":+1}', ""),
        (b'{"op":"status","v":1.0}', ""),
        (b'{"op":"status","v":1e0}', ""),
        (b'{"op":"status","v":NaN}', ""),
        (b'{"op":"status","v":' + b"9" * 5000 + b"}", ""),
        (b'{"op":"status","v":1,"v":1}', "stands twice"),
        (b'{"op":"status","v":2,"v":1}', "stands twice"),
        (b'{"op":"status","op":"status","v":1}', ""),
        (
            b'{"op":"fence","v":1,"reason":"","generation":{"term":9,"order":1,"term":1}}',
            "`term` stands twice",
        ),
        (b'{"op":"hello","v":1,"client":"\xff"}', ""),
        (b'{"op":"hello","v":1,"client":"\xed\xa0\x80"}', ""),  # a surrogate in UTF-8
        (b'{"op":"hello","v":1,"client":"\xc0\x80"}', ""),  # an overlong NUL
        (b'{"op":"hello","v":1,"client":"\\ud800"}', ""),
        (b'{"op":"hello","v":1,"client":"\\udc00\\ud800"}', ""),
        (b'{"op":"hello","v":1,"client":"a\x00b"}', ""),
        (b'{"op":"hello","v":1,"client":"a\nb"}', ""),
        (b'{"op":"hello","v":1,"client":' + b"[" * 8000 + b"]" * 8000 + b"}", ""),
        (b'{"v":1,"a":' * 1400 + b"1" + b"}" * 1400, ""),
        (b"[" * MAX_FRAME_BYTES, ""),
        (b'{"op":"follow","v":1,"generation":{"term":1,"order":1},"primary":"n2\\n"}', "primary"),
        (b'{"op":"follow","v":1,"generation":{"term":1,"order":1},"primary":"n2\\u0000"}', "primary"),
        (b'{"op":"follow","v":1,"generation":[1,1],"primary":"n2"}', ""),
    ],
)
def test_what_readers_of_json_disagree_about_is_refused(raw: bytes, name: str) -> None:
    text = refused(raw)
    assert text.startswith("bad_message: ")
    assert name in text


def test_another_version_is_told_so_whatever_else_it_says() -> None:
    for raw in (
        b'{"v":2}',
        b'{"op":"vote","v":2,"x":[{}]}',
        b'{"v":0,"op":7}',
        b'{"v":-1}',
        b'{"v":4294967297}',
    ):
        assert refused(raw).startswith("bad_version: version ")
    for raw in (b'{"op":"status"}', b'{"x":{"v":2},"op":"status","v":1}', b'{"v":2'):
        assert refused(raw).startswith("bad_message: ")
    assert decode_request(b'{"op":"hello","v":1,"client":"\\"v\\":2"}') == Hello(client='"v":2')


def test_a_rule_that_cannot_be_met_is_refused() -> None:
    """I2: it would be configured as none (no voters) or as one that nobody can satisfy."""
    for count, voters in ((1, ()), (2, ("n2",)), (1, ("n2", "n2"))):
        raw = body(
            Activate(generation=Generation(1, 1), deadline_boottime_ns=1, sync=SyncRule(count, voters))
        )
        assert "$.sync" in refused(raw)
        raw = body(Sync(generation=Generation(1, 1), number=1, rule=SyncRule(count, voters)))
        assert "$.rule" in refused(raw)


def test_no_two_objects_of_a_request_share_a_name() -> None:
    """What lets a repeated name be found without a second parse."""
    for request_ in REQUEST_OF_EACH:
        names = [name for _, name in nodes(json.loads(body(request_)))]
        assert len(names) == len(set(names))


def test_the_fencer_always_has_a_number_left_for_its_own_fence() -> None:
    """A sender that uses up the counters must not make the operator's fence unrecordable (I3)."""
    for most in (Generation(MAX_ASKED, MAX_ASKED), Generation(0, MAX_ASKED)):
        assert decode_request(body(Fence(generation=most, reason=""))) == Fence(generation=most, reason="")
        facts = Facts("n1", frozenset(), True, False, True, most, None, None, 0)
        for _ in range(3):
            verdict = admit(facts, OperatorFence(reason="", who=""), "root", 0)
            assert isinstance(verdict, NewOrder)
            assert verdict.generation > facts.highest
            record = OrderRecord(verdict.generation, verdict.op, None, "running")
            assert decode_reply(body(Accepted(record))) == Accepted(record)
            facts = replace(facts, highest=verdict.generation, newest=record)
    for over in (Generation(MAX_ASKED + 1, 0), Generation(0, MAX_ASKED + 1)):
        assert "$.generation" in refused(body(Fence(generation=over, reason="")))


# ---------------------------------------------------------------- frames


@given(st.integers(0, 2**32 - 1))
def test_frame_lengths(length: int) -> None:
    header = struct.pack(">I", length)
    if 1 <= length <= MAX_FRAME_BYTES:
        assert frame_length(header) == length
    else:
        with pytest.raises(ProtocolError, match="bad_frame"):
            frame_length(header)


def test_the_bounds_of_a_frame() -> None:
    for length, fits in ((0, False), (1, True), (MAX_FRAME_BYTES, True), (MAX_FRAME_BYTES + 1, False)):
        try:
            assert frame_length(struct.pack(">I", length)) == length
            assert fits
        except ProtocolError:
            assert not fits


WORST = "\x01"  # six bytes of JSON for one character


def full(text: str, rungs: int) -> Status:
    """Every text that the fencer fills in from elsewhere, at a length beyond all that it cuts to."""
    ladder = tuple(Rung("kill", 1234567.125, False, text) for _ in range(rungs))
    most = Generation(2**53 - 1, 2**53 - 1)
    return Status(
        v=1, node="n" * 40, fencer_id="f" * 32, boot_id="b" * 36, now_boottime_ns=2**62, trusted=False,
        trust_detail=text, highest=most, active=most, lease_deadline_boottime_ns=2**62,
        order=OrderRecord(most, "operator_fence", "n" * 40, "preempted", text, 2**53 - 1, 1234567.125, ladder),
        self_fence=SelfFence(text, 2**62, "preempted", text, 1234567.125, ladder), fence_proven=False,
        postgres="running", postgres_starts=2**31, following="n" * 40, is_standby=False,
        system_identifier="9" * 20, latch=Latch(text, text, "2026-01-01T00:00:00+00:00"), held_by=text,
        watchdog=text, cannot_lead=text, progress=text, unfinished=True, adopting=True, cannot_rewind=text,
        empty="initdb", was_standby=True, change=2**53 - 1, timeline=2**32 - 1, shutdown_lsn=2**63,
        sync=SyncTold(2**53 - 1, SyncRule(32, ("n" * 40,) * 32), done=False),
    )  # fmt: skip


@pytest.mark.parametrize("length", [0, 512, 900, 1000, 10_000])
@pytest.mark.parametrize("rungs", [0, 8, 200])
@pytest.mark.parametrize("character", [WORST, "€", "\U0001f600", "\udcff", '"'])
def test_a_status_always_fits(length: int, rungs: int, character: str) -> None:
    """One that did not would end the fencer. Texts for people are cut; what is decided upon never."""
    status = full(character * length, rungs)
    raw = frame(status)
    assert len(raw) <= 4 + MAX_FRAME_BYTES
    told = decode_reply(raw[4:])
    assert isinstance(told, Status)
    for name in ("node", "fencer_id", "boot_id", "now_boottime_ns", "highest", "active", "trusted"):
        assert getattr(told, name) == getattr(status, name)
    assert told.order is not None
    assert status.order is not None
    assert (told.order.generation, told.order.op, told.order.state) == (
        status.order.generation,
        status.order.op,
        status.order.state,
    )
    assert len(told.order.rungs) >= min(rungs, 8)
    assert told.latch is not None
    assert len(told.latch.reason) >= min(length, 32)


@pytest.mark.parametrize("character", [WORST, "\udcff"])
def test_every_other_reply_always_fits(character: str) -> None:
    text = character * 10_000
    record = full(text, 200).order
    assert record is not None
    replies: list[Reply] = [Accepted(record), Refusal("latched", text, Generation(1, 1)), Done(text)]
    for reply in replies:
        assert type(decode_reply(frame(reply)[4:])) is type(reply)


def test_what_fits_is_not_cut() -> None:
    status = full("x" * 650, 3)
    assert decode_reply(body(status)) == status


def test_a_fence_is_not_refused_for_its_reason() -> None:
    """However long it is, and whatever a terminal made of it."""
    for reason in ("x" * 5000, "f\udcfcr immer", WORST * 5000):
        for request_ in (
            Fence(generation=Generation(1, 1), reason=reason),
            OperatorFence(reason=reason, who=reason),
        ):
            told = decode_request(body(request_))
            assert isinstance(told, Fence | OperatorFence)
            assert len(told.reason) == min(len(reason), MAX_TEXT)


# ---------------------------------------------------------------- admission, as it is documented


def rows() -> list[tuple[str, Case, list[Step], int]]:
    return [
        (f"{type(case.request).__name__}-{i + 1}", case, steps, i)
        for case, steps, _ in ADMISSION
        for i, step in enumerate(steps)
        if step.bring is not None
    ]


@pytest.mark.parametrize(("case", "steps", "at"), [r[1:] for r in rows()], ids=[r[0] for r in rows()])
def test_the_first_condition_that_holds_decides(case: Case, steps: list[Step], at: int) -> None:
    """docs/protocol.md: with this condition and all the later ones holding, this one's answer is given."""
    for step in reversed(steps[at:]):
        if step.bring is not None:
            case = step.bring(case)
    verdict = admit(case.facts, case.request, case.peer, NOW)
    assert answer(verdict) == steps[at].answer


@pytest.mark.parametrize(
    ("case", "otherwise"),
    [(c, o) for c, _, o in ADMISSION],
    ids=[type(c.request).__name__ for c, _, _ in ADMISSION],
)
def test_else_it_is_admitted(case: Case, otherwise: str) -> None:
    assert otherwise.startswith(answer(admit(case.facts, case.request, case.peer, NOW)))


def test_every_request_has_its_admission_documented() -> None:
    assert [type(case.request) for case, _, _ in ADMISSION] == list(REQUESTS)
