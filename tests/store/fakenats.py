"""A stand-in for a NATS server, where a real one cannot be made to answer so: it speaks the protocol's core, notes
what clients say, and answers JetStream's requests with what the test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

NONCE = "a-nonce-to-be-signed"
STREAM = {
    "config": {
        "subjects": ["$KV.harmony_c.>"],
        "storage": "file",
        "retention": "limits",
        "max_msgs_per_subject": 64,
        "num_replicas": 1,
    },
    "created": "2026-01-01T00:00:00Z",
}


@dataclass
class FakeNats:
    """`answers`: by the beginning of a subject, the newest of these first; else an empty object."""

    version: str = "2.11.1"
    nonce: str = ""
    connects: list[dict[str, object]] = field(default_factory=list)
    asked: list[tuple[str, bytes]] = field(default_factory=list)  # subject; headers and payload
    answers: dict[str, Callable[[], object]] = field(
        default_factory=lambda: {"$JS.API.STREAM.INFO.": lambda: STREAM}
    )
    silent: tuple[str, ...] = ()  # subjects that begin so are not answered
    # Subjects that begin so, and whatever comes after them, are answered when that is set.
    held: dict[str, trio.Event] = field(default_factory=dict)
    life: trio.CancelScope = field(default_factory=trio.CancelScope)  # cancelled, it is down
    url: str = ""

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever; `url` is set when it has started."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"nats://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        task_status.started()
        with self.life:
            await trio.serve_listeners(self._client, listeners)

    async def _client(self, stream: trio.SocketStream) -> None:
        info = {"server_id": "X", "version": self.version, "headers": True, "max_payload": 1048576}
        if self.nonce:
            info |= {"nonce": self.nonce, "auth_required": True}
        await stream.send_all(b"INFO " + json.dumps(info).encode() + b"\r\n")
        buffer, sid = b"", b"1"

        async def more() -> bytes:
            chunk = await stream.receive_some(65536)
            if not chunk:
                raise trio.EndOfChannel
            return buffer + chunk

        try:
            while True:
                while b"\r\n" not in buffer:
                    buffer = await more()
                line, _, buffer = buffer.partition(b"\r\n")
                word, *rest = line.split(b" ")
                if word == b"CONNECT":
                    self.connects.append(json.loads(line[8:]))
                elif word == b"PING":
                    await stream.send_all(b"PONG\r\n")
                elif word == b"SUB":
                    sid = rest[-1]
                elif word in {b"PUB", b"HPUB"}:
                    size = int(rest[-1])
                    while len(buffer) < size + 2:
                        buffer = await more()
                    body, buffer = buffer[:size], buffer[size + 2 :]
                    subject = rest[0].decode()
                    self.asked.append((subject, body))
                    for begin, event in self.held.items():
                        if subject.startswith(begin):
                            await event.wait()
                    if subject.startswith(self.silent):
                        continue
                    answer = json.dumps(self._answer(subject)).encode()
                    said = b"MSG %s %s %d\r\n%s\r\n" % (rest[1], sid, len(answer), answer)
                    await stream.send_all(said)
        except (trio.EndOfChannel, trio.BrokenResourceError):
            return

    def _answer(self, subject: str) -> object:
        for begin, answer in reversed(self.answers.items()):
            if subject.startswith(begin):
                return answer()
        return {}
