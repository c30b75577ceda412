"""What the user's own postgresql.conf listens on, held against what the other members need. Reads files, no server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from harmony.config import Config

DEFAULT = "localhost"  # PostgreSQL's, where nothing is set
OURS = (
    "harmony.postgresql.conf",
    "harmony.included.conf",
)  # and the drop-in that includes them leads to these
DEEPEST = 10
_INCLUDE = re.compile(r"^\s*(include|include_if_exists|include_dir)\s*=?\s*'([^']+)'", re.IGNORECASE)
_LISTEN = re.compile(r"^\s*listen_addresses\s*=?\s*('[^']*'|[^\s#]*)", re.IGNORECASE)
_ONLY_HERE = {"localhost", "127.0.0.1", "::1", ""}


def _lines(file: Path, depth: int = 0) -> Iterator[str]:
    """A configuration file's and, in their places, those of what it includes; what cannot be read is left out."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        yield line
        found = _INCLUDE.match(line)
        if found is None or depth >= DEEPEST:
            continue
        place = file.parent / found.group(2)
        inner = sorted(place.glob("*.conf")) if found.group(1).lower() == "include_dir" else [place]
        for one in inner:
            if one.name not in OURS:
                yield from _lines(one, depth + 1)


def users_own(config_file: str, data_dir: str) -> str:
    """listen_addresses as the user has set it: the last one counts, and ALTER SYSTEM's comes last."""
    value = DEFAULT
    for file in (Path(config_file), Path(data_dir) / "postgresql.auto.conf"):
        for line in _lines(file):
            found = _LISTEN.match(line)
            if found is not None:
                value = found.group(1).strip("'")
    return value


def warnings(c: Config, config_file: str) -> list[str]:
    """What is overridden, and where the other members cannot reach this one."""
    p = c.postgresql
    own = users_own(config_file, p.data_dir)
    found = []
    if p.listen_addresses is not None and p.listen_addresses != own:
        found.append(
            f"postgresql.listen_addresses: '{p.listen_addresses}' overrides '{own}' of {config_file}: PostgreSQL "
            "listens there from its next start"
        )
    listens = p.listen_addresses if p.listen_addresses is not None else own
    host = c.members[c.node.name].host
    alone = {one.strip() for one in listens.split(",")} <= _ONLY_HERE
    if len(c.members) > 1 and alone and host not in _ONLY_HERE:
        found.append(
            f"postgresql.listen_addresses: PostgreSQL listens on '{listens}' only, and the other members reach it as "
            f"{host}: set it in {config_file}, or in harmony.toml"
        )
    return found
