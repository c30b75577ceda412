"""The agent's connection to its fencer: one request, one reply, in turn. It repeats nothing."""

from __future__ import annotations

import trio

from harmony.errors import FencerUnavailable
from harmony.fencer_client import protocol


class FencerClient:
    """One connection. After any failure it is closed and of no more use."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stream: trio.SocketStream | None = None

    async def connect(self) -> None:
        """Raises FencerUnavailable."""
        try:
            with trio.fail_after(2.0):
                while self._stream is None:
                    try:
                        self._stream = await trio.open_unix_socket(self._path)
                    except BlockingIOError:  # so many wait to be accepted that none more may
                        await trio.sleep(0.01)
        except (OSError, trio.TooSlowError) as e:
            raise FencerUnavailable(f"{self._path}: {str(e) or 'no answer in 2 s'}") from e

    async def close(self) -> None:
        """Close; never raises."""
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)
            self._stream = None

    async def request(self, request: protocol.Request, *, timeout_s: float) -> protocol.Reply:
        """Send one request and wait for its reply. Raises FencerUnavailable.

        Also when cancelled from outside it closes: a reply that comes late must never answer the next
        request.
        """
        stream = self._stream
        if stream is None:
            raise FencerUnavailable("not connected")
        answered = False
        try:
            with trio.fail_after(timeout_s):
                await stream.send_all(protocol.frame(request))
                header = await self._exactly(stream, protocol.HEADER.size)
                reply = protocol.decode_reply(await self._exactly(stream, protocol.frame_length(header)))
            answered = True
        except (OSError, trio.BrokenResourceError, trio.TooSlowError, protocol.ProtocolError) as e:
            raise FencerUnavailable(
                f"{type(request).__name__}: {str(e) or f'no answer in {timeout_s:g} s'}"
            ) from e
        finally:
            if not answered:
                self._stream = None
                stream.socket.close()
        return reply

    @staticmethod
    async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = await stream.receive_some(count - len(data))
            if not chunk:
                raise trio.BrokenResourceError("the fencer closed the connection")
            data += chunk
        return data
