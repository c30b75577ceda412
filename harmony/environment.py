"""HARMONY_<SECTION>_<KEY> and HARMONY_MEMBERS, laid over the file's values.

What begins with a section's name must be one of its keys. Other HARMONY_* variables may be anybody's: they are ignored,
with a warning where they are nearly one of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from harmony.config_words import value_of

NEAR = 0.85  # of difflib: one letter too few or too many
MEMBERS = "HARMONY_MEMBERS"
ELSEWHERE = ("HARMONY_DEMO_", "HARMONY_CONFIG")  # read by others of our programs
Kinds = Mapping[str, Mapping[str, object]]


def lay_over(
    env: Mapping[str, str], raw: dict[str, object], kinds: Kinds, problems: list[str], warnings: list[str]
) -> None:
    """Change `raw` to what the variables say; `kinds` has the type of each key of each section."""
    ours = {f"HARMONY_{s}_{key}".upper(): (s, key) for s, keys in kinds.items() for key in keys}
    for variable, text in sorted(env.items()):
        if not variable.startswith("HARMONY_") or variable.startswith(ELSEWHERE):
            continue
        if variable == MEMBERS:
            raw["members"] = _members(text, problems)
        elif variable not in ours:
            _unknown(variable, [*ours, MEMBERS], kinds, problems, warnings)
        else:
            section, key = ours[variable]
            wrong = _lay(raw, section, key, kinds[section][key], text)
            if wrong:
                problems.append(f"environment: {variable}: {wrong}")


def _unknown(variable: str, known: list[str], kinds: Kinds, problems: list[str], warnings: list[str]) -> None:
    near = difflib.get_close_matches(variable, known, 1)
    if variable.startswith(tuple(f"HARMONY_{s}_".upper() for s in kinds)):
        problems.append(
            f"environment: {variable}: unknown" + (f"; did you mean {near[0]}?" if near else "; unset it")
        )
    elif difflib.get_close_matches(variable, known, 1, NEAR):
        warnings.append(f"environment: {variable}: unknown, and ignored; did you mean {near[0]}?")


def _lay(raw: dict[str, object], section: str, key: str, kind: object, text: str) -> str:
    """What is wrong; empty: it was laid over."""
    if key == "permanent_slots":
        return "tables are for the file: [replication.permanent_slots.NAME]"
    given: object = [part.strip() for part in text.split(",")] if key.endswith("urls") else text
    value, wrong = value_of(kind, key, given, strict=False)
    table = raw.setdefault(section, {})
    if isinstance(table, dict) and wrong is None:
        table[key] = value
    return wrong or ""


def _members(text: str, problems: list[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for item in text.split(","):
        name, equals, address = item.strip().partition("=")
        host, colon, port = address.rpartition(":")
        if not (equals and colon and host and port.isascii() and port.isdecimal()) or name in found:
            problems.append(
                f"environment: HARMONY_MEMBERS: {item.strip()!r} is not allowed; must be NAME=HOST:PORT "
                "separated by commas, each name once"
            )
            continue
        found[name] = {"host": host.removeprefix("[").removesuffix("]"), "port": int(port)}
    return found
