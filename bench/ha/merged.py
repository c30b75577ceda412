"""One timeline of a campaign: what was done to it, and every line that any host logged, in the order of time.

It reads logs of any kind that begin with a time or carry one, JSON with `timestamp` above all, and understands none of
them; a line without a time stays behind the one before it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

NS = 1_000_000_000
TIME = re.compile(r"(\d{4})[-/](\d\d)[-/](\d\d)[T ](\d\d:\d\d:\d\d)[.,]?(\d*)")
SHOWN_FIRST = ("process", "row", "before", "after", "event", "why")
HIDDEN = {"timestamp", "node", "level", *SHOWN_FIRST}


def when_ns(line: str) -> int | None:
    """Wall-clock nanoseconds (UTC) of the first time in a line."""
    found = TIME.search(line[:4096])
    if found is None:
        return None
    year, month, day, clock, fraction = found.groups()
    with contextlib.suppress(ValueError):
        whole = datetime.datetime.fromisoformat(f"{year}-{month}-{day}T{clock}+00:00")
        return int(whole.timestamp()) * NS + int(f"{fraction:0<9}"[:9])
    return None


def shown(line: str) -> str:
    """For people: of JSON the row and the reason first, then the rest."""
    try:
        said = json.loads(line)
    except ValueError:
        return line
    if not isinstance(said, dict):
        return line
    first = [
        f"row {said['row']}" if key == "row" else str(said[key])
        for key in SHOWN_FIRST
        if said.get(key) not in {None, ""}
    ]
    rest = [f"{key}={value}" for key, value in said.items() if key not in HIDDEN]
    return "  ".join([*first, *rest])


def of_log(name: str, text: str) -> list[tuple[int, str, str]]:
    """(nanoseconds, host, line) of a log; what comes before its first time counts as the beginning of time."""
    found: list[tuple[int, str, str]] = []
    at_ns = 0
    for line in text.splitlines():
        timestamp = re.search(r'"timestamp":\s*"([^"]+)"', line)
        at_ns = when_ns(timestamp[1] if timestamp else line) or at_ns
        found.append((at_ns, name, shown(line)))
    return found


def merged(logs: Mapping[str, str], done: Iterable[tuple[int, str]]) -> str:
    """All logs by host (or host/what), and what was `done` (wall-clock nanoseconds, words), as lines of text."""
    lines: list[tuple[int, str, str]] = [(at_ns, "*****", words) for at_ns, words in done]
    for name, text in logs.items():
        lines += of_log(name, text)
    return "".join(_line(*line) for line in sorted(lines, key=lambda line: line[0]))


def _line(at_ns: int, name: str, words: str) -> str:
    clock = datetime.datetime.fromtimestamp(at_ns // NS, datetime.UTC).strftime("%H:%M:%S")
    return f"{clock}.{at_ns % NS // 1000:06d} {name:<11} {words}\n"


def read(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The logs that a stage kept, by host and file."""
    found: dict[str, str] = {}
    for name in names:
        for file in sorted((folder / name).glob("*.log")):
            found[f"{name}/{file.stem}"] = file.read_text(errors="replace")
    return found
