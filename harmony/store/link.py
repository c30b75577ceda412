"""One connection to one NATS server: made in time or not, never again by itself, closed when its calls have ended."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass, field

import nats.errors
import structlog
import trio
import trio_asyncio
from nats.aio.client import Client

CONNECT_TIMEOUT_S = 2
CLOSE_S = 0.5
DRAIN_S = 5.0  # the longest that a connection is kept for its last calls
FAILURES = (OSError, nats.errors.Error, trio.TooSlowError, TimeoutError)  # of opening one
log = structlog.get_logger("store")


@dataclass(eq=False)
class Link:
    """A connection, and how long its calls have waited."""

    url: str
    client: Client
    closed: trio.Event
    patience: dict[object, float] = field(
        default_factory=dict
    )  # of each call under way: until when (trio's clock)
    news: trio.Event = field(default_factory=trio.Event)  # something changed in it

    def begin(self, patience_s: float) -> object:
        """A call is under way from now on; what `end` takes."""
        call = object()
        self.patience[call] = trio.current_time() + patience_s
        self.news.set()
        return call

    def end(self, call: object) -> None:
        """It was answered, or given up."""
        del self.patience[call]

    def refused(self) -> None:
        """JetStream is not there, as the server itself says: there is nothing to wait for."""
        self.patience[None] = -math.inf
        self.news.set()

    async def until_impatient(self) -> None:
        """Until a call has waited for longer than its patience, or was refused."""
        while trio.current_time() < (at := min(self.patience.values(), default=math.inf)):
            self.news = trio.Event()
            with trio.move_on_at(at):
                await self.news.wait()

    def forget_refusal(self) -> None:
        """The next one counts anew."""
        self.patience.pop(None, None)

    async def close(self) -> None:
        """When its calls have ended: one that waits for a slow answer may still get it."""
        try:
            with trio.move_on_after(DRAIN_S):
                while set(self.patience) - {None} and not self.closed.is_set():
                    await trio.sleep(0.05)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_S):
                with contextlib.suppress(OSError, nats.errors.Error, TimeoutError):
                    await trio_asyncio.aio_as_trio(self.client.close)()


async def open_link(url: str, credentials_file: str | None, timeout_s: float) -> Link:
    """A connection to this server, made within `timeout_s`. Raises one of FAILURES."""
    closed = trio.Event()
    with trio.fail_after(timeout_s):
        client = await trio_asyncio.aio_as_trio(_connect)(url, credentials_file, closed)
    return Link(url, client, closed)


async def _connect(url: str, credentials_file: str | None, lost: trio.Event) -> Client:
    """One server, now or not. Left to itself nats-py asks a server that refuses for two minutes, and on Python 3.11
    (bpo-37658) a cancellation may be lost on it: then nobody would look for the other servers meanwhile."""
    newest: Exception | None = None

    async def closed() -> None:
        lost.set()

    async def error(e: Exception) -> None:
        nonlocal newest
        newest = e
        log.debug("nats", error=str(e))

    client = Client()
    try:
        await client.connect(
            url,
            allow_reconnect=False,
            max_reconnect_attempts=1,  # of the first connection, too; 0 would be for ever
            reconnect_time_wait=0,
            connect_timeout=CONNECT_TIMEOUT_S,
            ping_interval=1,
            max_outstanding_pings=2,
            pending_size=0,
            closed_cb=closed,
            disconnected_cb=closed,
            error_cb=error,
            user_credentials=credentials_file,
        )
    except BaseException as e:  # a cancellation, too: half a connection is nobody's to close otherwise
        with contextlib.suppress(OSError, nats.errors.Error, TimeoutError):
            await asyncio.wait_for(client.close(), CLOSE_S)
        if isinstance(e, nats.errors.NoServersError):
            raise newest or e from None
        raise
    return client
