"""The fencer's log: one JSON line an event on stderr, or `key=value` on a terminal. Never blocks its caller.

A full pipe to a journald that hangs must not stop the dead-man's switch: lines go to a bounded queue, a
thread of its own writes them, and what does not fit is counted and said later. structlog would cost this
process half of its start-up time and a third of its memory (docs/adr/005): it is not imported here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import queue
import sys
import threading
import time
from typing import Literal

import msgspec

MAX_QUEUED = 512
MAX_LINE = 8192
Level = Literal["info", "warning", "error", "critical"]


class Log:
    """`configure()` once; until then nothing is written. Values must be what msgspec can encode."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._queue: queue.Queue[bytes] = queue.Queue(MAX_QUEUED)
        self._bound: dict[str, object] = {}
        self._console = False
        self._configured = False
        self._dropped = 0
        self._seldom: dict[str, tuple[float, int]] = {}
        self._writing = threading.Event()
        self._thread: threading.Thread | None = None

    def configure(self, *, console: bool, **bound: object) -> None:
        """Begin to write; `bound` stands in every line."""
        self._console, self._bound, self._configured = console, bound, True
        self._start()

    def _start(self) -> None:
        """Its thread; where none can be started (the unit's or the host's limit of tasks) lines wait for it, and
        it is tried again with the next: a fence must not fail for want of a log."""
        if self._thread is None:
            thread = threading.Thread(target=self._write, name="log", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def info(self, event: str, **fields: object) -> None:
        self._say("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._say("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._say("error", event, fields)

    def critical(self, event: str, **fields: object) -> None:
        self._say("critical", event, fields)

    def seldom(self, event: str, **fields: object) -> None:
        """A warning that a client can provoke at will: one line a second for each event, the others counted."""
        now = time.monotonic()
        last, more = self._seldom.get(event, (-1.0, 0))
        if now - last < 1.0:
            self._seldom[event] = (last, more + 1)
            return
        self._seldom[event] = (now, 0)
        self.warning(event, **fields, **({"alike_before": more} if more else {}))

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until everything is written, `seconds` at most."""
        until = time.monotonic() + seconds
        while (
            self._thread is not None
            and (not self._queue.empty() or self._writing.is_set())
            and time.monotonic() < until
        ):
            time.sleep(0.002)

    def _say(self, level: Level, event: str, fields: dict[str, object]) -> None:
        if not self._configured:
            return
        self._start()
        if self._dropped:
            fields = {**fields, "lines_lost_before_this": self._dropped}
        try:
            self._queue.put_nowait(self._line(level, event, fields))
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def _line(self, level: Level, event: str, fields: dict[str, object]) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        if self._console:
            shown = " ".join(f"{k}={v}" for k, v in fields.items())
            shown = "".join(c if c.isprintable() else "?" for c in shown)  # a client's texts are in it
            line = f"{now:%H:%M:%S.%f} {level:8} {event} {shown}".encode("utf-8", "replace")
        else:
            said = {**self._bound, "level": level, "event": event, **fields}
            line = msgspec.json.encode(said | {"timestamp": now.isoformat()})
        return line[:MAX_LINE].replace(b"\n", b" ") + b"\n"

    def _write(self) -> None:
        while True:
            line = self._queue.get()
            self._writing.set()
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
            except BlockingIOError:
                time.sleep(0.05)  # somebody made our stderr non-blocking; this line is lost
            except OSError:
                time.sleep(0.05)  # nobody reads any more
            finally:
                if self._queue.empty():
                    self._writing.clear()


log = Log()


def wants_console(form: Literal["auto", "json", "console"]) -> bool:
    """Whether lines are for a person."""
    return form == "console" or (form == "auto" and sys.stderr.isatty())
