"""Whether a directory is a mount point: its name can be neither changed nor exchanged. Only looks."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ESCAPED = re.compile(rb"\\([0-7]{3})")


def is_mount(path: Path, table: Path = Path("/proc/self/mountinfo")) -> bool:
    """Also one of the same file system (a bind mount), which os.path.ismount does not see. Never raises."""
    try:
        lines = table.read_bytes().splitlines()
    except OSError:
        return path.is_mount()
    wanted = os.path.realpath(os.fsencode(path))
    places = (line.split(b" ")[4] for line in lines if line.count(b" ") > 4)
    return any(_ESCAPED.sub(lambda m: bytes([int(m.group(1), 8)]), place) == wanted for place in places)
