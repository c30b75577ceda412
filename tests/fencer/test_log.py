"""The fencer's log: bounded in every direction, and nobody's text ends a line or a terminal."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import pytest

from harmony_fencer import log as logs
from harmony_fencer.log import Log, wants_console


class Read:
    def __init__(self) -> None:
        self.fd, self.end = os.pipe()
        self.log = Log(self.end)

    def lines(self) -> list[str]:
        self.log.flush(30)
        os.close(self.end)
        with os.fdopen(self.fd, "rb", closefd=False) as f:
            return f.read().decode().splitlines()


@pytest.fixture
def read() -> Iterator[Read]:
    made = Read()
    yield made
    os.close(made.fd)


def test_one_json_line_each_with_what_is_bound(read: Read) -> None:
    read.log.info("before")
    read.log.configure(console=False, process="fencer", node="n1")
    read.log.critical("what", why="two\nlines", n=3)
    (line,) = read.lines()
    said = json.loads(line)
    assert said.pop("timestamp").endswith("+00:00")
    assert said == {
        "process": "fencer", "node": "n1", "level": "critical", "event": "what", "why": "two\nlines", "n": 3,
    }  # fmt: skip


def test_a_clients_text_is_no_terminals_command(read: Read) -> None:
    read.log.configure(console=True)
    read.log.warning("bad", detail="\x1b[2J\nfalse line")
    (line,) = read.lines()
    assert line.endswith("warning  bad detail=?[2J?false line")


def test_a_line_is_bounded(read: Read) -> None:
    read.log.configure(console=False)
    read.log.info("long", detail="x" * 3 * logs.MAX_LINE)
    (line,) = read.lines()
    assert len(line) == logs.MAX_LINE


def test_what_clients_provoke_is_one_line_a_second(read: Read) -> None:
    read.log.configure(console=False)
    for _ in range(50):
        read.log.seldom("refused", who="x")
    read.log.seldom("another", who="x")
    last, more = read.log._seldom["refused"]
    read.log._seldom["refused"] = (last - 2, more)  # two seconds later
    read.log.seldom("refused", who="x")
    said = [json.loads(line) for line in read.lines()]
    assert [s["event"] for s in said] == ["refused", "another", "refused"]
    assert said[2]["alike_before"] == 49
    assert "alike_before" not in said[0]


def test_a_full_stderr_costs_lines_and_nobody_waits(read: Read) -> None:
    """What was lost is counted, and said when there is room again."""
    read.log.configure(console=False)

    def fill() -> None:
        for n in range(3 * logs.MAX_QUEUED):
            read.log.info("line", n=n, padding="x" * 500)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert 0 < read.log._dropped <= 3 * logs.MAX_QUEUED
    assert read.log._queue.qsize() <= logs.MAX_QUEUED
    lost = read.log._dropped
    while read.log._queue.full():
        os.read(read.fd, 65536)
    read.log.info("last")
    os.set_blocking(read.fd, False)
    text = b""
    while b'"last"' not in text:
        try:
            text += os.read(read.fd, 65536)
        except BlockingIOError:
            continue
    assert b'"lines_lost_before_this":%d' % lost in text
    read.lines()


@pytest.mark.parametrize(("form", "expected"), [("console", True), ("json", False)])
def test_for_whom(form: str, expected: bool) -> None:
    assert wants_console(form) is expected  # type: ignore[arg-type]
