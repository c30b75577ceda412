"""That a promotion begins the timeline which was reserved for it, and no other. A few small files, no process.

PostgreSQL numbers a new timeline by what it finds in pg_wal: the newest history file and one more. A node that has
not heard of another's promotion would begin a second timeline of the same number, and from then on nothing
tells the two apart: not an LSN, not pg_rewind, not the walreceiver, which streams the one onto the other.
So the numbers between are taken by history files of ours. They name a fork in the distant past, which PostgreSQL
reads as "not mine" while it runs; it must not find one that is the newest when it starts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from harmony_fencer.durable import read_small
from harmony_fencer.files import Change
from harmony_fencer.programs import PostgresError

MOST = 1000  # numbers that a promotion may leave out: more is no crash or two, but a mistake
MARK = "taken by Harmony: no WAL of this timeline is or will be here"
_WAL = re.compile(r"[0-9A-F]{24}\Z")
_HISTORY = re.compile(r"[0-9A-F]{8}\.history\Z")
_FORK = re.compile(rb"^\s*\d+\s+([0-9A-F]{1,8})/([0-9A-F]{1,8})\b", re.MULTILINE)
_HISTORY_BYTES = 1 << 20


class Newest(NamedTuple):
    """The newest timeline with WAL here. `begins`: the byte position at which it left the one before; 0: not known."""

    number: int
    begins: int = 0


class TimelineTakenError(PostgresError):
    """The reserved number is not newer than `timeline`, the newest that has WAL here."""

    def __init__(self, reserved: int, timeline: int) -> None:
        super().__init__(
            f"timeline {reserved} was reserved for this promotion, and the data directory has WAL of timeline "
            f"{timeline} already (promoted by hand?): a newer one will be reserved"
        )
        self.timeline = timeline


def newest(pg_wal: Path) -> int:
    """The newest timeline that has WAL in `pg_wal`; 0: none. Raises OSError."""
    return max((int(n[:8], 16) for n in os.listdir(pg_wal) if _WAL.match(n)), default=0)


def begins(pg_wal: Path, timeline: int) -> int:
    """Where `timeline` left the one before, in bytes, as the last line of its history file says; 0: not known."""
    try:
        forks = _FORK.findall(read_small(pg_wal / f"{timeline:08X}.history", _HISTORY_BYTES))
    except OSError:
        return 0
    return int(forks[-1][0], 16) << 32 | int(forks[-1][1], 16) if forks else 0


def take_up_to(change: Change, pg_wal: Path, reserved: int) -> None:
    """Leave `reserved` as the next number. Raises TimelineTakenError, PostgresError, OSError."""
    own = newest(pg_wal)
    if own >= reserved:
        raise TimelineTakenError(reserved, own)
    if reserved - own > MOST:
        raise PostgresError(
            f"timeline {reserved} is reserved and the newest here is {own}: no such gap can be"
        )
    for number in range(own + 1, reserved):
        path = pg_wal / f"{number:08X}.history"
        if not path.exists():
            change.write(path, f"{own}\t0/1\t{MARK}\n".encode())


def give_back(pg_wal: Path) -> list[str]:
    """Remove what a promotion that never came has left as the newest. The names. Raises OSError."""
    gone: list[str] = []
    own = newest(pg_wal)
    for name in sorted((n for n in os.listdir(pg_wal) if _HISTORY.match(n)), reverse=True):
        path = pg_wal / name
        if int(name[:8], 16) <= own or MARK not in path.read_text(errors="replace"):
            break
        path.unlink()
        gone.append(name)
    return gone
