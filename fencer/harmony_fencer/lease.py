"""The lease: until when this node may write. Kept in run_dir with the boot id, so that a restarted
fencer goes on with it; it means nothing in another boot. It decides nothing and fences nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harmony_fencer.decoding import decoded
from harmony_fencer.durable import read_small, seal, unseal
from harmony_fencer.protocol import Generation, SyncTold

NAME = "lease.json"


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PostgreSQL may write under `generation` until `deadline_boottime_ns` of boot `boot_id`."""

    generation: Generation
    deadline_boottime_ns: int
    boot_id: str
    sync: SyncTold | None = None  # the rule that its commits wait by


_leases: msgspec.json.Decoder[Lease] = msgspec.json.Decoder(Lease)


def clamp(deadline_ns: int, now_ns: int, lease_ns: int) -> int:
    """No deadline is further away than one lease."""
    return min(deadline_ns, now_ns + lease_ns)


def save(path: Path, lease: Lease) -> None:
    """Atomic, not fsync'd: it is worthless after a reboot anyway. Raises OSError."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(seal(msgspec.json.encode(lease)))
    temporary.rename(path)


def clear(path: Path) -> None:
    """Raises OSError; a missing one is clear already."""
    path.unlink(missing_ok=True)


def load(path: Path, *, boot_id: str, now_ns: int, lease_ns: int) -> Lease | None:
    """The lease in force, or None: none, unreadable, of another boot, over, or too far in the future."""
    try:
        lease = decoded(_leases, unseal(read_small(path)))
    except (OSError, ValueError):
        return None
    if lease.boot_id != boot_id or not now_ns < lease.deadline_boottime_ns <= now_ns + lease_ns:
        return None
    return lease
