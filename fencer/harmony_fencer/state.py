"""What the fencer must never forget: the highest generation accepted, the newest order, the latch.

Invariant (I3): a write is finished (fsync of file and folder) before anything it permits is begun, and
what is in memory never runs ahead of the disk. A file that cannot be believed is kept aside and makes
the fencer *untrusted*: it fences and refuses to activate. Nothing here touches PostgreSQL.
"""

from __future__ import annotations

import os
import uuid
import zlib
from pathlib import Path

import msgspec

from harmony_fencer.protocol import Generation, Latch, OrderRecord

NAME = "fencer.state"


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The durable part. `order` is the newest accepted order with its outcome, as far as it was recorded."""

    fencer_id: str
    highest: Generation
    order: OrderRecord | None
    latch: Latch | None
    following: str | None


def fresh(highest: Generation = Generation(0, 0)) -> State:  # noqa: B008 (frozen)
    """The state of a node without a past."""
    return State(uuid.uuid4().hex, highest, None, None, None)


def encode(state: State) -> bytes:
    """One line of CRC-32, one of JSON."""
    body = msgspec.json.encode(state)
    return b"%08x\n%s\n" % (zlib.crc32(body), body)


def decode(raw: bytes) -> State:
    """Raises ValueError when a single byte is missing or another."""
    head, separator, body = raw.partition(b"\n")
    if not separator or not body.endswith(b"\n") or len(head) != 8:
        raise ValueError("it is cut short or empty")
    try:
        right = int(head, 16) == zlib.crc32(body[:-1])
    except ValueError:
        right = False
    if not right:
        raise ValueError("its checksum is wrong")
    try:
        return msgspec.json.decode(body, type=State)
    except msgspec.DecodeError as e:
        raise ValueError(f"it is not of this version: {e}") from e


def write(folder: Path, state: State) -> None:
    """Durable when it returns: temporary file, fsync, rename, fsync of the folder. Raises OSError."""
    temporary = folder / (NAME + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        data = memoryview(encode(state))
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(folder / NAME)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load(folder: Path) -> tuple[State, str]:
    """The state, and why it cannot be trusted ("" where it can). A missing file is a new node's."""
    path = folder / NAME
    try:
        return decode(path.read_bytes()), ""
    except FileNotFoundError:
        state = fresh()
        write(folder, state)
        return state, ""
    except (ValueError, OSError) as e:
        return fresh(), (
            f"{path}: {e}. PostgreSQL stays fenced here and nothing is activated. To repair: read the "
            "cluster's term N from `harmonyctl status` on another node, stop Harmony on this one, run "
            "`harmony-fencer --config RUN_DIR/fencer.json --reset-state --term N`, and start it again"
        )


def reset(folder: Path, term: int) -> Path | None:
    """Begin anew at generation (term, 0). The old file is kept: its new path, or None where there was none."""
    path, kept = folder / NAME, None
    if path.exists():
        number = 1
        while (folder / f"{NAME}.bad-{number}").exists():
            number += 1
        kept = path.rename(folder / f"{NAME}.bad-{number}")
    write(folder, fresh(Generation(term, 0)))
    return kept
