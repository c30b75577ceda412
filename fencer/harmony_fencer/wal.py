"""Whether PostgreSQL can become a standby in a rewound data directory. A look at names; it reads no WAL.

pg_rewind succeeds where its source has recycled WAL since the fork. PostgreSQL then asks the primary for it for ever,
and never becomes a standby that answers. It succeeds, too (before PostgreSQL 16), where its source has no checkpoint on
its timeline yet, and takes it for one of the timeline that it left. PostgreSQL then refuses to start.
"""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

from harmony_fencer import timelines
from harmony_fencer.durable import read_small

REACHED = "Min recovery ending loc's timeline"  # in what pg_controldata says
_BEGIN = re.compile(r"START WAL LOCATION: \S+ \(file [0-9A-F]{8}([0-9A-F]{8})([0-9A-F]{8})\)")
_NAME = re.compile(r"[0-9A-F]{8}([0-9A-F]{8})([0-9A-F]{8})\Z")


def broken(data: Path) -> bool:
    """Whether a segment is missing between backup_label's first and the newest; no label: none. Raises OSError."""
    label = data / "backup_label"
    if not label.exists():  # no rewind was required
        return False
    begin = _BEGIN.search(read_small(label, 4096).decode("utf-8", "replace"))
    if begin is None:
        return False
    first = (int(begin.group(1), 16), int(begin.group(2), 16))
    names = (_NAME.match(name) for name in os.listdir(data / "pg_wal"))
    found = {(int(n.group(1), 16), int(n.group(2), 16)) for n in names if n is not None}
    after = sorted(n for n in found if n >= first)
    # How many segments make up the higher number depends on their size: any carry counts as the next one.
    follows = ((a, b + 1) == after_it or after_it == (a + 1, 0) for (a, b), after_it in pairwise(after))
    return first not in found or not all(follows)


def mistaken(data: Path, reached: str) -> str:
    """Which timeline the source was taken for, where that is not its own; "": it was not. Raises OSError.

    `reached`: the timeline up to whose WAL the rewound one must recover, by its control file.
    """
    if not (data / "backup_label").exists():  # no rewind was required
        return ""
    newest = timelines.newest(data / "pg_wal")
    if not reached.isdigit() or int(reached) >= newest:
        return ""
    return f"has no checkpoint on its timeline {newest} yet, and was taken for one of timeline {reached}"
