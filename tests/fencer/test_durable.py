"""What must survive: state file, lease, frames. A byte missing anywhere is never an older generation."""

from __future__ import annotations

from pathlib import Path

import pytest

from harmony_fencer import lease as leases
from harmony_fencer import state as states
from harmony_fencer.protocol import (
    HEADER,
    MAX_FRAME_BYTES,
    Generation,
    Hello,
    OrderRecord,
    ProtocolError,
    decode_request,
    frame,
    frame_length,
)

STATE = states.State(
    "id",
    Generation(7, 3),
    OrderRecord(Generation(7, 3), "activate", None, "done", timeline=4),
    None,
)


def test_round_trip(tmp_path: Path) -> None:
    states.write(tmp_path, STATE)
    assert states.load(tmp_path) == (STATE, "")


def test_cut_short_at_every_length_is_untrusted(tmp_path: Path) -> None:
    """I3: what cannot be believed is never taken for a lower generation; the file is left as evidence."""
    whole = states.encode(STATE)
    for length in range(len(whole)):
        (tmp_path / states.NAME).write_bytes(whole[:length])
        _, why = states.load(tmp_path)
        assert why, length
        assert "--reset-state --term" in why
        assert (tmp_path / states.NAME).read_bytes() == whole[:length]


@pytest.mark.parametrize("position", range(0, 200, 7))
def test_any_other_byte_is_untrusted(tmp_path: Path, position: int) -> None:
    raw = bytearray(states.encode(STATE))
    raw[position % len(raw)] ^= 0x01
    (tmp_path / states.NAME).write_bytes(raw)
    assert states.load(tmp_path)[1]


def test_a_write_that_ends_early_leaves_the_old_state(tmp_path: Path) -> None:
    """A crash before the rename: the half-written file beside it means nothing."""
    states.write(tmp_path, STATE)
    (tmp_path / (states.NAME + ".new")).write_bytes(states.encode(STATE)[:10])
    assert states.load(tmp_path) == (STATE, "")


def test_reset_keeps_the_bad_file(tmp_path: Path) -> None:
    (tmp_path / states.NAME).write_bytes(b"junk")
    kept = states.reset(tmp_path, Generation(9, 0))
    assert kept is not None
    assert kept.read_bytes() == b"junk"
    state, why = states.load(tmp_path)
    assert (state.highest, why) == (Generation(9, 0), "")


def test_lease(tmp_path: Path) -> None:
    """W9: another boot, a past deadline and one too far ahead are no lease."""
    path = tmp_path / "lease.json"
    lease = leases.Lease(Generation(1, 1), 1_500, "boot")
    leases.save(path, lease)
    assert leases.load(path, boot_id="boot", now_ns=1_000, lease_ns=1_000) == lease
    assert leases.load(path, boot_id="other", now_ns=1_000, lease_ns=1_000) is None
    assert leases.load(path, boot_id="boot", now_ns=1_500, lease_ns=1_000) is None
    assert leases.load(path, boot_id="boot", now_ns=1_000, lease_ns=499) is None
    path.write_bytes(path.read_bytes()[:-2])
    assert leases.load(path, boot_id="boot", now_ns=1_000, lease_ns=1_000) is None
    assert leases.clamp(10_000, 1_000, 500) == 1_500


def test_frames() -> None:
    raw = frame(Hello(client="x"))
    assert frame_length(raw[:4]) == len(raw) - 4
    assert decode_request(raw[4:]) == Hello(client="x")
    for length in (0, MAX_FRAME_BYTES + 1, 2**32 - 1):
        with pytest.raises(ProtocolError, match="bad_frame"):
            frame_length(HEADER.pack(length))


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"not json", "bad_message"),
        (b"[1]", "bad_message"),
        (b'{"op":"nuke","v":1}', "bad_message"),
        (b'{"op":"status","v":1,"extra":1}', "bad_message"),
        (b'{"op":"status","v":2}', "bad_version"),
        (b'{"op":"status","v":"1"}', "bad_message"),
        (b'{"op":"fence","v":1,"generation":{"term":-1,"order":0},"reason":""}', "bad_message"),
        (b'{"op":"fence","v":1,"generation":{"term":1.5,"order":0},"reason":""}', "bad_message"),
        (b'{"op":"follow","v":1,"generation":{"term":1,"order":0},"primary":"x\'; drop"}', "bad_message"),
        (b"[" * 5000, "bad_message"),
        (b"\xff\xfe", "bad_message"),
    ],
)
def test_bad_messages_are_named(body: bytes, name: str) -> None:
    with pytest.raises(ProtocolError, match=name):
        decode_request(body)
