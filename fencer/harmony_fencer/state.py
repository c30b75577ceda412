"""What the fencer must never forget: the highest generation accepted, the newest order, the latch.

Invariant (I3): a write is durable before anything it permits is begun, and what is in memory never runs
ahead of the disk. A file that cannot be believed makes the fencer *untrusted*: it fences and refuses to
activate. An older copy put back (a restored backup, a snapshot, a write that the disk lost) is valid in
itself; the *witnesses* give it away: small copies of the generation in run_dir (this boot) and in the data
directory (over boots, on another disk). Nothing here touches PostgreSQL.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import msgspec

from harmony_fencer.decoding import Unreadable, decoded
from harmony_fencer.durable import REAL, Disk, read_small, remove, replace, seal, unseal
from harmony_fencer.protocol import Generation, Latch, OrderRecord

NAME = "fencer.state"
LATCH = "fencer.latch"
WITNESS = "harmony.witness"


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The durable part. `order` is the newest accepted order with its outcome, as far as it was recorded."""

    fencer_id: str
    highest: Generation
    order: OrderRecord | None
    following: str | None


class Witness(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """That the fencer of `node` had accepted `highest`. Another node's (in a cloned directory) means nothing."""

    node: str
    fencer_id: str
    highest: Generation


_states: msgspec.json.Decoder[State] = msgspec.json.Decoder(State)
_witnesses: msgspec.json.Decoder[Witness] = msgspec.json.Decoder(Witness)
_latches: msgspec.json.Decoder[Latch] = msgspec.json.Decoder(Latch)


def fresh(highest: Generation = Generation(0, 0)) -> State:  # noqa: B008 (frozen)
    """The state of a node without a past."""
    return State(uuid.uuid4().hex, highest, None, None)


def encode(state: State) -> bytes:
    return seal(msgspec.json.encode(state))


def decode(raw: bytes) -> State:
    """Raises ValueError when a single byte is missing or another."""
    try:
        return decoded(_states, unseal(raw))
    except Unreadable as e:
        raise ValueError(f"it is not of this version: {e}") from e


def write(folder: Path, state: State, *, disk: Disk = REAL) -> None:
    """Durable when it returns. Raises OSError."""
    replace(folder / NAME, encode(state), disk=disk)


def sealed_witness(w: Witness) -> bytes:
    """The content of a witness file."""
    return seal(msgspec.json.encode(w))


def testify(path: Path, w: Witness) -> None:
    """Write a witness. Raises OSError."""
    replace(path, sealed_witness(w))


def witness(path: Path, node: str) -> Witness | None:
    """The witness at `path`, when it is whole and of this node."""
    try:
        found = decoded(_witnesses, unseal(read_small(path)))
    except (OSError, ValueError):
        return None
    return found if found.node == node else None


def load(folder: Path, *, node: str = "", witnesses: tuple[Path, ...] = ()) -> tuple[State, str]:
    """The state, and why it cannot be trusted ("" where it can). A missing file is a new node's.

    What a witness shows counts as accepted even then: fences are numbered on above it.
    """
    path = folder / NAME
    seen = [(p, w) for p in witnesses if (w := witness(p, node)) is not None]
    place, newest = max(seen, key=lambda s: s[1].highest, default=(path, None))
    instead = fresh() if newest is None else State(newest.fencer_id, newest.highest, None, None)
    try:
        state = decode(read_small(path))
    except FileNotFoundError:
        if newest is None:
            return _begin(folder)
        return instead, _repair(f"{path} is gone, but {place} shows {newest.highest} accepted here")
    except (ValueError, OSError) as e:
        return instead, _repair(f"{path}: {e}")
    ours = [(p, w) for p, w in seen if w.fencer_id == state.fencer_id and w.highest > state.highest]
    if ours:
        place, w = max(ours, key=lambda s: s[1].highest)
        why = f"{path} has generation {state.highest}, but {place} shows {w.highest}: an older copy"
        return msgspec.structs.replace(state, highest=w.highest), _repair(why)
    return state, ""


def _begin(folder: Path) -> tuple[State, str]:
    state = fresh()
    try:
        write(folder, state)
    except OSError as e:  # full, read-only, not there: whoever only wants to fence must be able to go on
        return state, f"{folder / NAME} cannot be written ({e}): repair that disk and restart Harmony"
    return state, ""


def _repair(why: str) -> str:
    return (
        f"{why}. PostgreSQL stays fenced here and nothing is activated. To repair: read the cluster's term N "
        "from `harmonyctl status` on another node, stop Harmony on this one, run "
        "`harmony-fencer --config RUN_DIR/fencer.json --reset-state --term N`, and start it again"
    )


def reset(folder: Path, begin: Generation) -> Path | None:
    """Begin anew at this generation. The old file is kept: its new path, or None where there was none."""
    path, kept = folder / NAME, None
    if path.exists():
        number = 1
        while (folder / f"{NAME}.bad-{number}").exists():
            number += 1
        kept = path.rename(folder / f"{NAME}.bad-{number}")
    write(folder, fresh(begin))
    return kept


# ---------------------------------------------------------------- the operator's latch


def set_latch(folder: Path, latch: Latch, *, disk: Disk = REAL) -> None:
    """A file of its own, so that the one-shot fence can set it beside a hung fencer. Raises OSError."""
    replace(folder / LATCH, seal(msgspec.json.encode(latch)), disk=disk)


def lift_latch(folder: Path, *, disk: Disk = REAL) -> None:
    """Raises OSError."""
    remove(folder / LATCH, disk=disk)


def latch(folder: Path) -> Latch | None:
    """The latch in force. One that cannot be read is in force all the same."""
    path = folder / LATCH
    try:
        return decoded(_latches, unseal(read_small(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        return Latch(f"{path} cannot be read ({e}); it is taken for a latch", "unknown", "unknown")
