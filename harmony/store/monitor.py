"""Whether the NATS servers sync each write before they acknowledge it: only their monitoring port tells.

It is asked in a thread, each server with a deadline. A server that does not answer is no problem in itself: one
that is down acknowledges nothing; what it said last counts until it says otherwise.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from urllib.parse import urlsplit

import structlog
import trio

ASK_S = 2.0
MOST_BYTES = 1024 * 1024
log = structlog.get_logger("store")


def ask(url: str, timeout_s: float = ASK_S) -> str:
    """What is wrong with this server's sync settings ("" where nothing is). Blocking. Raises OSError, ValueError."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", "/jsz?config=1")
        with connection.getresponse() as answer:  # it holds the socket where not all of it is read
            text = answer.read(MOST_BYTES)
    except http.client.HTTPException as e:
        raise ValueError(f"no HTTP of a monitoring port: {type(e).__name__} {e}") from e
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(f"/jsz answers with {answer.status}")
    try:
        return judge(url, json.loads(text))
    except RecursionError as e:
        raise ValueError("/jsz answers with JSON nested too deeply") from e


def judge(url: str, jsz: object) -> str:
    """Pure: of a decoded answer. Raises ValueError where it is none of a server with JetStream."""
    config = jsz.get("config") if isinstance(jsz, dict) else None
    if not isinstance(config, dict) or "store_dir" not in config:
        raise ValueError("/jsz?config=1 shows no configuration of JetStream")
    if config.get("sync_always") is True:
        return ""
    interval = config.get("sync_interval")
    seconds = f"{interval / 1e9:g} s" if isinstance(interval, int) else str(interval)
    return f"the server at {url} has sync_interval {seconds}, must be always: a power cut loses acknowledged writes"


class Monitors:
    """The configured monitoring ports. `run()` asks each about every `every_s`, for ever."""

    def __init__(self, urls: Sequence[str], every_s: float) -> None:
        self._urls, self._every_s = tuple(urls), every_s
        self._found: dict[str, str] = {}
        self._silent: dict[str, str] = {}

    @property
    def problems(self) -> list[str]:
        """What the servers said last, where it is not as it must be."""
        return [text for text in self._found.values() if text]

    async def run(self) -> None:
        while self._urls:
            async with trio.open_nursery() as nursery:
                for url in self._urls:
                    nursery.start_soon(self._ask, url)
            await trio.sleep(self._every_s)

    async def _ask(self, url: str) -> None:
        why = f"no answer within {2 * ASK_S:g} s"
        try:
            with trio.move_on_after(2 * ASK_S):
                self._found[url] = await trio.to_thread.run_sync(ask, url, abandon_on_cancel=True)
                why = ""
        except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: no thread can be started
            why = f"{type(e).__name__} {e}"[:300]
        if why != self._silent.get(url, ""):
            self._silent[url] = why
            log.warning("monitoring port", url=url, why=why or "answers again")
