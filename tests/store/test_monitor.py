"""The monitoring port over real sockets: what it answers is judged, and whoever does not answer costs a deadline."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from harmony.store import monitor

GOOD = {"config": {"store_dir": "/x", "sync_always": True}}
LAX = {"config": {"store_dir": "/x", "sync_interval": 120_000_000_000}}


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """No line."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


def test_what_it_says() -> None:
    with answering(200, json.dumps(GOOD).encode()) as (url, asked):
        assert monitor.ask(url) == ""
    assert asked == ["/jsz?config=1"]
    with answering(200, json.dumps(LAX).encode()) as (url, _):
        assert "sync_interval 120 s" in monitor.ask(url)


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, json.dumps(GOOD).encode()), (200, b"nonsense"), (200, b"[]"), (200, b'{"config":{}}')],
)
def test_what_is_no_answer_of_a_server_with_jetstream(status: int, body: bytes) -> None:
    with answering(status, body) as (url, _), pytest.raises(ValueError):  # noqa: PT011
        monitor.ask(url)


def test_only_so_much_is_read() -> None:
    """A port of somebody else's must not fill the agent's memory."""
    large = b'{"padding":"' + b"x" * monitor.MOST_BYTES + b'",' + json.dumps(GOOD).encode()[1:]
    with answering(200, large) as (url, _), pytest.raises(ValueError, match="Unterminated"):
        monitor.ask(url)


def test_https_is_spoken_where_it_is_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        said: list[bytes] = []

        def take() -> None:
            client, _ = server.accept()
            with client:
                said.append(client.recv(3))

        thread = threading.Thread(target=take)
        thread.start()
        with pytest.raises(OSError):  # noqa: PT011
            monitor.ask(f"https://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert said[0][:1] == b"\x16", "a TLS handshake"


def test_silence_costs_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        raised: list[BaseException] = []

        def ask() -> None:
            try:
                monitor.ask(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.05)
            except TimeoutError as e:
                raised.append(e)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(30)
        assert raised


async def test_each_is_asked_and_what_it_said_last_counts() -> None:
    with answering(200, json.dumps(LAX).encode()) as (lax, _), answering(200, b"x") as (broken, asked):
        ports = monitor.Monitors([lax, broken], 0.01)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ports.run)
            with trio.fail_after(30):
                while not ports.problems or len(asked) < 2:  # and again
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert len(ports.problems) == 1
    ports._urls = (lax,)  # the server is down now: what it said last still counts
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ports.run)
        with trio.fail_after(30):
            while not ports._silent.get(lax):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert len(ports.problems) == 1
