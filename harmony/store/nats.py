"""The store on NATS JetStream KV: one bucket per cluster, raw JetStream requests, our own connection.

nats-py's own reconnection is off: it would send after a reconnect what was given up before. Here a lost
connection is thrown away with all its buffers, and a new one is made, for ever (nothing that was given up
can win later). Every call is one request with one deadline; nothing is cached, nothing is retried.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime

import nats
import nats.errors
import structlog
import trio
import trio_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from harmony.errors import SequenceMismatch, StoreMisconfigured, StoreUnavailable
from harmony.store import bucket as buckets
from harmony.store.bucket import type_json
from harmony.store.interface import Entry, StoreFacts, WatchCallback
from harmony.store.monitor import Monitors

CONNECT_TIMEOUT_S = 2.0
SETUP_TIMEOUT_S = 5.0
CHECK_CONSUMER_S = 1.0
CHECK_FACTS_S = 10.0
MAX_REASON = 300
_MISMATCH = {10071, 10164}
_STREAM_MISSING = 10059
_MESSAGE_MISSING = 10037
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z\Z")
log = structlog.get_logger("store")


class _ApiError(Exception):
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


class NatsStore:
    """See harmony.store.interface.Store. Made by `open_nats`."""

    def __init__(
        self,
        urls: list[str],
        cluster_id: str,
        replicas: int,
        credentials_file: str | None,
        monitor_urls: Sequence[str] = (),
        *,
        may_create: bool = True,
    ) -> None:
        self._urls = urls
        self._bucket = f"harmony_{cluster_id}"
        self._stream = f"KV_{self._bucket}"
        self._replicas = replicas
        self._credentials = credentials_file
        self._client: Client | None = None
        self._epoch = 0
        self._misconfigured: str | None = None
        self._may_create = may_create
        self._looked: StoreFacts | None = None
        self._look_again = trio.Event()
        self.monitors = Monitors(monitor_urls, CHECK_FACTS_S)
        self._why = "not connected yet"
        self._watchers: dict[int, tuple[WatchCallback, dict[str, int]]] = {}
        self._serial = 0
        self._closed = trio.Event()
        self._rewatch = trio.Event()

    @property
    def connection_epoch(self) -> int:
        """Counts connections; 0 before the first."""
        return self._epoch

    @property
    def connected(self) -> bool:
        """Whether a connection is up and its bucket was found right."""
        return self._client is not None

    @property
    def facts(self) -> StoreFacts | None:
        """See the interface; with what the monitoring ports say."""
        if self._looked is None:
            return None
        found = [p for p in (self._looked.problem, *self.monitors.problems) if p]
        return StoreFacts(self._looked.lineage, "; ".join(found))

    def allow_creation(self) -> None:
        """See the interface."""
        self._may_create = True
        self._look_again.set()

    # ------------------------------------------------------------ the connection

    async def run(self) -> None:
        """Connect, and connect again, for ever."""
        pause, turn = 0.05, 0
        while True:
            url = self._urls[turn % len(self._urls)]
            turn += 1
            self._closed = trio.Event()
            try:
                with trio.fail_after(CONNECT_TIMEOUT_S + 1):
                    client = await trio_asyncio.aio_as_trio(self._connect)(url)
            except (OSError, nats.errors.Error, trio.TooSlowError, TimeoutError) as e:
                self._tell(f"{url}: {type(e).__name__} {e}".strip())
                await trio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
                pause = min(1.0, pause * 2)
                continue
            try:
                if await self._setup(client, url):
                    pause = 0.05
                    self._client = client
                    self._epoch += 1
                    self._why = ""
                    log.info("store connected", url=url, bucket=self._bucket)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._watching, client)
                        nursery.start_soon(self._looking, client)
                        await self._closed.wait()
                        nursery.cancel_scope.cancel()
                    self._tell(f"{url}: connection lost")
                else:
                    await trio.sleep(1.0)
            finally:
                self._client = None
                with trio.CancelScope(shield=True), trio.move_on_after(0.5):
                    with contextlib.suppress(OSError, nats.errors.Error, TimeoutError):
                        await trio_asyncio.aio_as_trio(client.close)()

    def _tell(self, why: str) -> None:
        if why != self._why:
            self._why = why[:MAX_REASON]
            log.warning("store not connected", why=self._why)

    async def _connect(self, url: str) -> Client:
        """One server, now or not. Left to itself nats-py asks a server that refuses for two minutes, and on Python 3.11
        (bpo-37658) a cancellation may be lost on it: then nobody would look for the other servers meanwhile."""
        newest: Exception | None = None

        async def closed() -> None:
            self._closed.set()

        async def error(e: Exception) -> None:
            nonlocal newest
            newest = e
            log.debug("nats", error=str(e))

        try:
            return await nats.connect(
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
                user_credentials=self._credentials,
            )
        except nats.errors.NoServersError as e:
            raise newest or e from None

    async def _setup(self, client: Client, url: str) -> bool:
        """Look at the bucket for the first time on this connection. False: try again later."""
        try:
            return await self._look(client)
        except (_ApiError, StoreUnavailable, trio.TooSlowError) as e:
            self._tell(f"{url}: {e or 'no answer from JetStream'}")
            return False

    async def _look(self, client: Client) -> bool:
        """Hold the stream against what it must be; make it where that is allowed (once). False: of no use.

        Raises _ApiError, StoreUnavailable, TooSlowError: nothing is known that was not known before.
        """
        with trio.fail_after(SETUP_TIMEOUT_S):
            try:
                info = await self._api(client, f"STREAM.INFO.{self._stream}", {})
            except _ApiError as e:
                if e.code != _STREAM_MISSING:
                    raise
                if not self._may_create:
                    self._looked = StoreFacts("", buckets.gone(self._bucket))
                    self._tell(self._looked.problem)
                    return False
                made = buckets.wanted(self._bucket, self._replicas)
                info = await self._api(client, f"STREAM.CREATE.{self._stream}", made)
        self._may_create = False
        found = info.get("config")
        config = found if isinstance(found, dict) else {}
        wrong = buckets.impossible(config, self._bucket)
        self._misconfigured = None
        if wrong:
            self._misconfigured = (
                f"nothing can be written to the bucket {self._bucket}: {'; '.join(wrong)}. "
                f"Correct the stream {self._stream} (nats stream edit), or use another cluster.id"
            )
            self._tell(self._misconfigured)
            return False
        weak = buckets.problems(config, self._replicas)
        weak = [f"the stream {self._stream} is weaker than it must be: {'; '.join(weak)}"] if weak else []
        weak += buckets.too_old(_version(client))
        self._looked = StoreFacts(f"{self._stream} of {info.get('created')}", "; ".join(weak))
        return True

    async def _looking(self, client: Client) -> None:
        """Again and again on this connection, and at once where a call found no stream."""
        while True:
            with trio.move_on_after(CHECK_FACTS_S):
                await self._look_again.wait()
            self._look_again = trio.Event()
            try:
                if not await self._look(client):
                    self._closed.set()
                    return
            except (_ApiError, StoreUnavailable, trio.TooSlowError) as e:
                log.debug("the stream's state is not known", why=str(e))
            await trio.sleep(0.2)

    # ------------------------------------------------------------ requests

    async def _request(
        self, client: Client, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> bytes:
        try:
            answer = await trio_asyncio.aio_as_trio(client.request)(
                subject, payload, timeout=60, headers=headers
            )
        except (OSError, nats.errors.Error, TimeoutError) as e:
            if isinstance(e, nats.errors.NoRespondersError):
                self._look_again.set()
            raise StoreUnavailable(f"{type(e).__name__} {e}".strip()) from e
        return bytes(answer.data)

    async def _api(self, client: Client, what: str, body: type_json) -> type_json:
        raw = await self._request(client, f"$JS.API.{what}", json.dumps(body).encode() if body else b"")
        return _checked(raw)

    @contextlib.asynccontextmanager
    async def _call(self, timeout_s: float) -> AsyncIterator[Client]:
        """A connected client, within a deadline; every failure of the world as a StoreError."""
        if self._misconfigured is not None:
            raise StoreMisconfigured(self._misconfigured)
        if self._client is None:
            raise StoreUnavailable(self._why or "not connected")
        client = self._client
        with trio.move_on_after(timeout_s) as scope:
            try:
                yield client
            except _ApiError as e:
                if e.code in _MISMATCH:
                    raise SequenceMismatch(str(e)) from e
                if e.code != _STREAM_MISSING:
                    raise StoreUnavailable(str(e)) from e
                self._look_again.set()
                raise StoreUnavailable(f"no stream: {e}") from e
        if scope.cancelled_caught:
            raise StoreUnavailable(f"no answer within {timeout_s:g} s")

    async def get(self, key: str, *, timeout_s: float) -> Entry | None:
        """The key's newest entry, from the stream's leader; None where there is none."""
        async with self._call(timeout_s) as client:
            try:
                subject = f"$KV.{self._bucket}.{key}"
                found = await self._api(client, f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": subject})
            except _ApiError as e:
                if e.code == _MESSAGE_MISSING:
                    return None
                raise
            return _entry(key, found.get("message"))
        raise AssertionError("unreachable")

    async def keys(self, prefix: str, *, timeout_s: float) -> list[str]:
        """Keys that begin with `prefix`, sorted."""
        async with self._call(timeout_s) as client:
            body: type_json = {"subjects_filter": f"$KV.{self._bucket}.>"}
            info = await self._api(client, f"STREAM.INFO.{self._stream}", body)
            state = info.get("state")
            subjects = state.get("subjects") if isinstance(state, dict) else None
            cut = len(f"$KV.{self._bucket}.")
            names = [str(s)[cut:] for s in subjects] if isinstance(subjects, dict) else []
            return sorted(n for n in names if n.startswith(prefix))
        raise AssertionError("unreachable")

    async def create(self, key: str, value: bytes, *, timeout_s: float) -> int:
        """Write where nothing has ever been written."""
        return await self.update(key, value, 0, timeout_s=timeout_s)

    async def update(self, key: str, value: bytes, revision: int, *, timeout_s: float) -> int:
        """Write where the revision is `revision`: JetStream's expected last sequence of the subject."""
        async with self._call(timeout_s) as client:
            headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
            raw = await self._request(client, f"$KV.{self._bucket}.{key}", value, headers)
            sequence = _checked(raw).get("seq")
            if not isinstance(sequence, int):
                raise StoreUnavailable(f"an acknowledgement without a sequence: {raw[:200]!r}")
            return sequence
        raise AssertionError("unreachable")

    # ------------------------------------------------------------ the watch

    def watch(self, callback: WatchCallback) -> Callable[[], None]:
        """See the interface. Each (re)subscription begins with every key's newest entry."""
        self._serial += 1
        number = self._serial
        self._watchers[number] = (callback, {})
        self._rewatch.set()

        def unsubscribe() -> None:
            self._watchers.pop(number, None)

        return unsubscribe

    async def _watching(self, client: Client) -> None:
        """Keep one consumer alive on this connection; notice within about a second when it is gone."""
        while True:
            self._rewatch = trio.Event()
            if not self._watchers:
                await self._rewatch.wait()
                continue
            try:
                await self._one_consumer(client)
            except (StoreUnavailable, _ApiError, trio.TooSlowError, OSError, nats.errors.Error) as e:
                log.debug("watch ended; subscribing again", why=str(e))
                await trio.sleep(0.2)

    async def _one_consumer(self, client: Client) -> None:
        inbox = client.new_inbox()
        send, receive = trio.open_memory_channel[Msg](1024)

        async def delivered(message: Msg) -> None:
            with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                send.send_nowait(message)  # a full queue drops: the watch only wakes

        with trio.fail_after(SETUP_TIMEOUT_S):
            subscription = await trio_asyncio.aio_as_trio(client.subscribe)(inbox, cb=delivered)
            info = await self._api(
                client,
                f"CONSUMER.CREATE.{self._stream}",
                {
                    "stream_name": self._stream,
                    "config": {
                        "deliver_subject": inbox,
                        "deliver_policy": "last_per_subject",
                        "ack_policy": "none",
                        "replay_policy": "instant",
                        "filter_subject": f"$KV.{self._bucket}.>",
                        "inactive_threshold": 30_000_000_000,
                        "mem_storage": True,
                        "num_replicas": 1,
                    },
                },
            )
        gone: str | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deliver, receive)
                while not self._rewatch.is_set():
                    with trio.move_on_after(CHECK_CONSUMER_S):
                        await self._rewatch.wait()
                    with trio.fail_after(SETUP_TIMEOUT_S):
                        await self._api(client, f"CONSUMER.INFO.{self._stream}.{info['name']}", {})
                nursery.cancel_scope.cancel()
        except* (_ApiError, StoreUnavailable, trio.TooSlowError) as group:
            gone = str(group.exceptions[0])  # raising in here would make a group of it
        finally:
            send.close()
            with trio.CancelScope(shield=True), trio.move_on_after(0.3):
                with contextlib.suppress(OSError, nats.errors.Error):
                    await trio_asyncio.aio_as_trio(subscription.unsubscribe)()
        if gone is not None:
            raise StoreUnavailable(f"the watch's consumer is gone: {gone}")

    async def _deliver(self, receive: trio.MemoryReceiveChannel[Msg]) -> None:
        cut = len(f"$KV.{self._bucket}.")
        async for message in receive:
            tokens = message.reply.split(".")
            if len(tokens) < 9 or (message.headers or {}).get("KV-Operation"):
                continue
            # $JS.ACK.[domain.account.]stream.consumer.delivered.STREAM_SEQ.consumer_seq.TIME.pending[.random]
            at = 5 if len(tokens) == 9 else 7
            revision, created = int(tokens[at]), int(tokens[at + 2])
            entry = Entry(message.subject[cut:], bytes(message.data), revision, created)
            for callback, seen in list(self._watchers.values()):
                if revision > seen.get(entry.key, 0):
                    seen[entry.key] = revision
                    callback(entry)


def _version(client: Client) -> tuple[int, int] | None:
    """Of the server at the other end."""
    told = client.connected_server_version
    try:
        return int(told.major), int(told.minor)
    except ValueError:
        return None


def _checked(raw: bytes) -> type_json:
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise StoreUnavailable(f"not an answer of JetStream: {raw[:100]!r}") from e
    if not isinstance(answer, dict):
        raise StoreUnavailable(f"not an answer of JetStream: {raw[:100]!r}")
    error = answer.get("error")
    if isinstance(error, dict):
        code = error.get("err_code", error.get("code"))
        raise _ApiError(code if isinstance(code, int) else 0, str(error.get("description", "")))
    return answer


def _entry(key: str, message: object) -> Entry | None:
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


@contextlib.asynccontextmanager
async def open_nats(
    urls: list[str],
    cluster_id: str,
    replicas: int,
    credentials_file: str | None,
    monitor_urls: Sequence[str] = (),
    *,
    may_create: bool = True,
) -> AsyncIterator[NatsStore]:
    """A NatsStore that connects in the background; it opens also while the server is down."""
    async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
        store = NatsStore(urls, cluster_id, replicas, credentials_file, monitor_urls, may_create=may_create)
        nursery.start_soon(store.run)
        nursery.start_soon(store.monitors.run)
        try:
            yield store
        finally:
            nursery.cancel_scope.cancel()
