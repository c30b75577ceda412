"""JSON from outside (the store, sockets, files) as our structs: one place, one error.

Which errors msgspec raises on bad input differs between its versions: UnicodeDecodeError escapes from some, and before
0.21 its own were no ValueErrors. One that nobody expects would end the agent, and all agents read the same record.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


class Unreadable(ValueError):
    """These bytes are not a whole message or record of this version of Harmony; the text says where."""


def decoded(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """What `raw` says. Raises Unreadable, and nothing else."""
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        raise Unreadable(str(e)) from e
