"""Bytes from outside that are nothing of ours: every reader of them raises its one error, with every msgspec allowed.

`make test-lowest` and `make test-newest` run this where msgspec raises other errors than the locked one.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from harmony import records
from harmony.admin import ErrorReply
from harmony.agent import memory
from harmony.agent.serve import answer
from harmony.cli.fence import _wait_s
from harmony.core.messages import Marks
from harmony.decoding import Unreadable
from harmony.errors import StoreUnavailable
from harmony.store import answers
from harmony_fencer import adopt, config, protocol, state
from harmony_fencer import lease as leases
from harmony_fencer.durable import seal
from harmony_fencer.processes import Place
from harmony_fencer.protocol import Generation
from tests.agent.test_serve import Agent
from tests.core.helpers import cluster, member
from tests.test_house import MODULES, TOP

CONTROL = records.Control(attempt="x", switchover=records.Switchover("id", "n2", 3, "someone"))
GOOD = {
    "cluster": records.encode(cluster()),
    "member": records.encode(member("n1")),
    "control": records.encode(CONTROL),
    "request": protocol.frame(protocol.Hello(client="x"))[4:],
    "reply": protocol.frame(protocol.Done("x"))[4:],
}


def bad(good: bytes, every: int = 1) -> list[bytes]:
    """What a bit, a disk, a person or another program can make of a record."""
    text = good.index(b":") + 2
    return [
        b"", b"\0", b" ", b"null", b"[]", b"{}", b"7", b'"x"', b"not json", b"\xff", b"\xff\xfe", b'"\xff"',
        good[:-1], good[: len(good) // 2], good + b"x", b"\xef\xbb\xbf" + good, good.decode().encode("utf-16"),
        good[:text] + b"\xff" + good[text:],  # within the first text
        good.replace(b'":', b'\xff":', 1), good.replace(b'":"', b'":"\xed\xa0\x80', 1),
        good[:-1] + b',"\xff":1}', good[:-1] + b',"more":"\xff"}', good[:-1] + b',"more":' + b"[" * 100_000,
        b"[" * 100_000, b'{"a":' * 100_000, good.replace(b'":"', b'":"\\ud800', 1), b"\x81\xa1a\x01", b"\xc1" * 40,
        *(good.replace(b'":"', b'":' + other + b',"zz":"', 1) for other in (b"1", b"null", b"{}", b"1e400", b"-0")),
        *(good[:i] + byte + good[i + 1 :] for i in range(0, len(good), every) for byte in (b"\0", b"\x80", b"\xff")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "decode"),
    [
        ("cluster", records.decode_cluster),
        ("member", records.decode_member),
        ("control", records.decode_control),
    ],
)
def test_a_record_is_whole_or_unreadable(name: str, decode: Callable[[bytes], object]) -> None:
    """Any other error would end every agent that watches the store, and end it again after each restart."""
    decode(GOOD[name])
    for raw in bad(GOOD[name]):
        with pytest.raises(Unreadable):
            decode(raw)


@pytest.mark.parametrize(
    ("name", "decode"), [("request", protocol.decode_request), ("reply", protocol.decode_reply)]
)
def test_a_message_is_whole_or_refused(name: str, decode: Callable[[bytes], object]) -> None:
    decode(GOOD[name])
    for raw in bad(GOOD[name]):
        with pytest.raises(protocol.ProtocolError):
            decode(raw)


def test_the_admin_socket_answers_what_it_cannot_read() -> None:
    for raw in bad(b'{"op":"status"}'):
        assert isinstance(answer(raw, 0, Agent()), ErrorReply), raw[:60]


def test_a_file_is_whole_or_not_believed(tmp_path: Path) -> None:
    """Sealed with a right checksum, as a version with a fault of its own would leave them."""
    for body in bad(GOOD["cluster"], 50):
        raw = seal(body)
        for decode in (memory.decode, state.decode):
            with pytest.raises(ValueError):  # noqa: PT011 (any text: it is shown, and nothing hangs on it)
                decode(raw)
        path = tmp_path / "file"
        path.write_bytes(raw)
        assert state.witness(path, "n1") is None
        assert leases.load(path, boot_id="b", now_ns=1, lease_ns=10) is None
        assert Place(str(tmp_path / "none"), notes=path).identity() is None
        for name in (state.LATCH, adopt.NAME, memory.NAME, state.NAME):
            (tmp_path / name).write_bytes(raw)
        assert "cannot be read" in (state.latch(tmp_path) or protocol.Latch("", "", "")).reason
        assert adopt.load(tmp_path) is None
        assert memory.load(tmp_path, "c").damage
        assert state.load(tmp_path)[1]
    assert memory.decode(memory.encode(memory.Stored("c", Marks()))).cluster_id == "c"
    assert state.decode(state.encode(state.fresh(Generation(3, 1)))).highest == Generation(3, 1)


def test_a_resolved_configuration_is_whole_or_named(tmp_path: Path) -> None:
    file = tmp_path / "fencer.json"
    for raw in bad(b'{"node":"n1"}', 3):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match="fencer"):
            config.load(str(file))


def test_a_fence_does_not_ask_for_a_readable_file(tmp_path: Path) -> None:
    """`fence --force` works when all else is broken."""
    for raw in (b"\xff", b'"\xff"', b'{"lease_s":"\xff"}', b"[" * 100_000, b""):
        (tmp_path / "fencer.json").write_bytes(raw)
        assert _wait_s(tmp_path) > 0


def test_an_answer_of_the_store_is_whole_or_it_is_unavailable() -> None:
    entry = b'{"data":"e30=","seq":7,"time":"2026-01-02T03:04:05.6Z","subject":"x"}'
    assert answers.entry_of("k", answers.checked(entry)) is not None
    for raw in [*bad(entry), b'{"error":{"err_code":"x"}}', b'{"error":{"code":null}}']:
        with contextlib.suppress(StoreUnavailable, answers.ApiError):
            answers.entry_of("k", answers.checked(raw))
    for without in (
        b'{"seq":7}',
        entry.replace(b":7", b':"x"'),
        entry.replace(b"e30=", b"e"),
        entry.replace(b"T0", b""),
    ):
        with pytest.raises(StoreUnavailable):
            answers.entry_of("k", answers.checked(without))


def test_bytes_are_decoded_in_one_place() -> None:
    """Who calls msgspec's decoder elsewhere has to know every error of every version."""
    for path in MODULES:
        if path.name == "decoding.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                assert name not in {"msgspec.json.decode", "msgspec.msgpack.decode", "msgspec.DecodeError"}, (
                    f"{path.relative_to(TOP)}:{node.lineno}"
                )
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                raw_decoder = node.func.attr == "decode" and ast.unparse(node.func.value).startswith("_")
                assert not raw_decoder, f"{path.relative_to(TOP)}:{node.lineno}"
