"""What JetStream answers, read with suspicion: an answer is never taken for another one."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime

from nats.aio.client import Client

from harmony.errors import StoreUnavailable
from harmony.store.bucket import type_json
from harmony.store.interface import Entry

MISMATCH = {10071, 10164}
STREAM_MISSING = 10059
MESSAGE_MISSING = 10037
NOT_HERE = {10008, 10009, 10039, 10076, 10118}  # JetStream, or its leader, is out of this server's reach
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z\Z")


class NoRespondersError(StoreUnavailable):
    """JetStream is not there, as far as this server knows."""


class ApiError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"JetStream error {code}: {text}")
        self.code = code


def time_ns(text: str) -> int:
    """RFC 3339 in UTC, as the store writes it, to ns since the epoch. Raises ValueError."""
    found = _TIME.match(text)
    if found is None:
        raise ValueError(f"not a store's time: {text!r}")
    seconds = datetime.fromisoformat(found.group(1)).replace(tzinfo=UTC).timestamp()
    return int(seconds) * 1_000_000_000 + int((found.group(2) or "").ljust(9, "0"))


def version(client: Client) -> tuple[int, int] | None:
    """Of the server at the other end."""
    told = client.connected_server_version
    try:
        return int(told.major), int(told.minor)
    except ValueError:
        return None


def checked(raw: bytes) -> type_json:
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise StoreUnavailable(f"not an answer of JetStream: {raw[:100]!r}") from e
    if not isinstance(answer, dict):
        raise StoreUnavailable(f"not an answer of JetStream: {raw[:100]!r}")
    error = answer.get("error")
    if isinstance(error, dict):
        code = error.get("err_code", error.get("code"))
        raise ApiError(code if isinstance(code, int) else 0, str(error.get("description", "")))
    return answer


def entry_of(key: str, message: object) -> Entry | None:
    if not isinstance(message, dict):
        raise StoreUnavailable("JetStream answered without a message")
    try:
        headers = base64.b64decode(str(message.get("hdrs", "")))
        if b"KV-Operation:" in headers:
            return None
        value = base64.b64decode(str(message.get("data", "")))
        return Entry(key, value, int(str(message["seq"])), time_ns(str(message["time"])))
    except (KeyError, ValueError, OverflowError) as e:
        raise StoreUnavailable(
            f"JetStream answered with no message of a bucket: {str(message)[:200]!r}"
        ) from e
