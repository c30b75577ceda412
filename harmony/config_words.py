"""What is allowed in words, for the checks, the example and the documents; no library words them. Pure."""

from __future__ import annotations

import difflib
import math

import msgspec

NAME = r"^[a-z0-9]([a-z0-9_-]{0,38}[a-z0-9])?\Z"
HOST = r"^[A-Za-z0-9_.:-]{1,253}\Z"
ABSOLUTE = r"^/[^\x00-\x1f']*\Z"
ROLE = r"^[^\s:/'-][^\s:/']{0,62}\Z"
URL = r"^(nats|tls|ws|wss)://[^\s,/]+/?\Z"
MONITOR = r"^https?://[^\s,/@]+/?\Z"
ID = r"^[a-z0-9][a-z0-9_-]{0,31}\Z"
LISTEN = r"^[A-Za-z0-9_.:, *-]*\Z"
TEXT_LINE = r"^[^\x00-\x1f]{1,500}\Z"
SLOT = r"^[a-z0-9_]{1,63}\Z"
UNIT = r"^[A-Za-z0-9:_.@\\-]{1,200}\.service\Z"
WORDS = {
    NAME: "1 to 40 of a-z 0-9 _ -, beginning and ending in a-z 0-9",
    HOST: "a host name or an IP address, without port",
    ABSOLUTE: "an absolute path, without quotes",
    ROLE: "a user, role or database name without spaces, quotes, : and /",
    URL: "nats://HOST:PORT (or tls, ws, wss)",
    MONITOR: "http://HOST:PORT (or https), the server's monitoring port, without user and password",
    ID: "1 to 32 of a-z 0-9 _ -, beginning in a-z 0-9",
    UNIT: "a service's name with .service at its end",
    TEXT_LINE: "one line of text, 1 to 500 characters",
    SLOT: "1 to 63 of a-z 0-9 _",
    LISTEN: "addresses separated by commas, or *",
}


def hint(word: str, known: list[str]) -> str:
    """What was probably meant, or all that could be."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"


def value_of(kind: object, key: str, value: object, *, strict: bool = True) -> tuple[object, str | None]:
    """(converted, None) or (None, what is wrong). URLs are not repeated: they may hold a password."""
    shown = "the value" if key.endswith("urls") else repr(value)[:80]
    try:
        converted: object = msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError:
        return None, f"{shown} is not allowed; must be {_must_be(msgspec.inspect.type_info(kind), key)}"
    if isinstance(converted, float) and not math.isfinite(converted):
        return None, f"{shown} is not allowed; must be a finite number"
    return converted, None


def _must_be(t: msgspec.inspect.Type, key: str) -> str:
    """The type and its range, for who wrote something else."""
    match t:
        case msgspec.inspect.UnionType(types=types):
            (one,) = (one for one in types if not isinstance(one, msgspec.inspect.NoneType))
            return _must_be(one, key)
        case msgspec.inspect.LiteralType():
            return f"one of {allowed(t)}"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType():
            return f"a whole number{_unit(key)}, {allowed(t)}"
        case msgspec.inspect.FloatType():
            return f"a number{_unit(key)}, {allowed(t)}"
        case msgspec.inspect.ListType():
            return f"a list of {allowed(t)}"
        case _:
            return allowed(t)


def _unit(key: str) -> str:
    units = {"_s": " of seconds", "_bytes": " of bytes", "_mb": " of megabytes"}
    return next((unit for end, unit in units.items() if key.endswith(end)), "")


def allowed(t: msgspec.inspect.Type) -> str:
    """The range, from the type itself."""
    match t:
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(allowed(one) for one in types if not isinstance(one, msgspec.inspect.NoneType))
        case msgspec.inspect.LiteralType(values=values):
            return ", ".join(str(v) for v in values)
        case msgspec.inspect.BoolType():
            return "true, false"
        case msgspec.inspect.IntType(ge=ge, le=le):
            return f"{ge} to {le}" if le is not None else f"at least {ge}"
        case msgspec.inspect.FloatType(gt=gt, le=le):
            return f"above {gt:g}, to {le:g}"
        case msgspec.inspect.ListType(item_type=item, min_length=low, max_length=high):
            return f"{low or 0} to {high} of: {allowed(item)}"
        case msgspec.inspect.DictType():
            return "0 to 32 tables"
        case msgspec.inspect.StrType(pattern=str(pattern)):
            return WORDS[pattern]
        case _:
            raise TypeError(f"no words for the range of {t}")
