"""JSON from sockets and files as our structs: one place, one error (harmony/decoding.py is its twin).

Which errors msgspec raises on bad input differs between its versions (UnicodeDecodeError escaped until 0.21, and its
own were no ValueErrors before 0.21). One that is not expected would end a fencer.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


class Unreadable(ValueError):
    """These bytes are not a whole message or record of this version; the text says where."""


def decoded(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """What `raw` says. Raises Unreadable, and nothing else."""
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        raise Unreadable(str(e)) from e
