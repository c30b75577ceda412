"""The store on NATS JetStream KV: one bucket per cluster, raw JetStream requests, our own connection.

nats-py's own reconnection is off: it would send after a reconnect what was given up before. Here a lost
connection is thrown away with all its buffers, and a new one is made, for ever (nothing that was given up
can win later). Every call is one request with one deadline; nothing is cached, nothing is retried.

A server may be up and cut off from the others: then JetStream does not answer through it. Whenever a call waits
for longer than an answer takes, the other servers are asked beside it, and the first through which the same stream
answers is gone over to. Calls under way keep their connection until they end.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence

import nats.errors
import structlog
import trio
import trio_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from harmony.errors import SequenceMismatch, StoreMisconfigured, StoreUnavailable
from harmony.store import bucket as buckets
from harmony.store.answers import (
    MESSAGE_MISSING,
    MISMATCH,
    NOT_HERE,
    STREAM_MISSING,
    ApiError,
    NoRespondersError,
    checked,
    entry_of,
    version,
)
from harmony.store.bucket import type_json
from harmony.store.interface import Entry, StoreFacts, WatchCallback
from harmony.store.link import CONNECT_TIMEOUT_S, FAILURES, Link, open_link
from harmony.store.monitor import Monitors

SETUP_TIMEOUT_S = 5.0
CHECK_CONSUMER_S = 1.0
CHECK_FACTS_S = 10.0
MAX_REASON = 300
PATIENCE = 0.5  # the part of a call's time after which the other servers are asked
ELSEWHERE_S = 1.0  # the longest that each of them may take
REST_S, MOST_REST_S = 1.0, 30.0  # between two rounds of asking them
log = structlog.get_logger("store")


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
        self._urls = list(dict.fromkeys(urls))
        self._bucket = f"harmony_{cluster_id}"
        self._stream = f"KV_{self._bucket}"
        self._replicas = replicas
        self._credentials = credentials_file
        self._link: Link | None = None
        self._epoch = 0
        self._misconfigured: str | None = None
        self._may_create = may_create
        self._looked: StoreFacts | None = None
        self._look_again = trio.Event()
        self.monitors = Monitors(monitor_urls, CHECK_FACTS_S)
        self._why = "not connected yet"
        self.patience, self.look_every_s = PATIENCE, CHECK_FACTS_S
        self._rest_s = 0.0  # before the servers are asked again
        self._told: dict[str, str] = {}  # by URL, since the last connection: each cause is logged once
        self._watchers: dict[int, tuple[WatchCallback, dict[str, int]]] = {}
        self._serial = 0
        self._rewatch = trio.Event()

    @property
    def connection_epoch(self) -> int:
        """Counts connections; 0 before the first."""
        return self._epoch

    @property
    def connected(self) -> bool:
        """Whether a connection is up and its bucket was found right."""
        return self._link is not None

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
        pause, turn, link = 0.05, 0, None
        async with trio.open_nursery() as closing:
            while True:
                found, link = link, None
                if found is None:
                    url = self._urls[turn % len(self._urls)]
                    turn += 1
                    try:
                        found = await open_link(url, self._credentials, CONNECT_TIMEOUT_S + 1)
                    except FAILURES as e:
                        self._tell(f"{type(e).__name__} {e}".strip(), url)
                        await trio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 (jitter)
                        pause = min(1.0, pause * 2)
                        continue
                turn = self._urls.index(found.url) + 1
                try:
                    if self._link is found or await self._setup(found):
                        pause = 0.05
                        link = await self._use(found)
                    elif turn % len(self._urls) == 0:  # none of them is of use
                        await trio.sleep(1.0)
                finally:
                    self._link = link
                    closing.start_soon(found.close)

    async def _use(self, link: Link) -> Link | None:
        """Until it is lost, or until another server is gone over to: the connection to that one."""
        self._link = link
        self._epoch += 1
        self._why = ""
        self._told.clear()
        log.info("store connected", url=link.url, bucket=self._bucket)
        better: Link | None = None

        async def move() -> None:
            nonlocal better
            better = await self._elsewhere(link)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watching, link.client)
            nursery.start_soon(self._looking, link)
            if len(self._urls) > 1:
                nursery.start_soon(move)
            await link.closed.wait()
            nursery.cancel_scope.cancel()
        if better is None:
            self._rest_s = 0.0
            self._tell("connection lost", link.url)
        else:
            log.warning("JetStream does not answer through this server", url=link.url, going_to=better.url)
        return better

    async def _elsewhere(self, link: Link) -> Link:
        """Whenever a call waits for too long here: a server through which the same stream answers meanwhile.

        Who went over a moment ago rests first, and longer each time: a slow store is slow through all of its servers.
        """
        began = trio.current_time()
        await trio.sleep(self._rest_s)
        others = [url for url in self._urls if url != link.url]
        while True:
            await link.until_impatient()
            better = await self._first_to_answer(others)
            if better is not None:
                lasted = trio.current_time() - began
                self._rest_s = (
                    REST_S if lasted > MOST_REST_S else min(MOST_REST_S, max(REST_S, 2 * self._rest_s))
                )
                return better
            await trio.sleep(REST_S)
            link.forget_refusal()

    async def _first_to_answer(self, urls: Sequence[str]) -> Link | None:
        """All at once: one that is down must not be waited for."""
        first: Link | None = None

        async def ask(url: str) -> None:
            nonlocal first
            found = await self._answering(url)
            if found is not None and first is None:
                first = found
                nursery.cancel_scope.cancel()
            elif found is not None:
                await found.close()

        async with trio.open_nursery() as nursery:
            for url in urls:
                nursery.start_soon(ask, url)
        return first

    async def _answering(self, url: str) -> Link | None:
        """A connection to this server, where the stream that we know answers through it."""
        found: Link | None = None
        right = False
        try:
            found = await open_link(url, self._credentials, ELSEWHERE_S)
            with trio.fail_after(ELSEWHERE_S):
                info = await self._api(found.client, f"STREAM.INFO.{self._stream}", {})
            right = self._looked is not None and self._lineage(info) == self._looked.lineage
        except (*FAILURES, ApiError, StoreUnavailable) as e:
            log.debug("no answer from JetStream there either", url=url, why=str(e))
        finally:
            if found is not None and not right:
                await found.close()
        return found if right else None

    def _tell(self, why: str, url: str = "") -> None:
        self._why = (f"{url}: {why}" if url else why)[:MAX_REASON]
        if self._told.get(url) != self._why:
            self._told[url] = self._why
            log.warning("store not connected", why=self._why)

    async def _setup(self, link: Link) -> bool:
        """Look at the bucket for the first time on this connection. False: try again later."""
        try:
            return await self._look(link)
        except (ApiError, StoreUnavailable, trio.TooSlowError) as e:
            self._tell(f"{e or 'no answer from JetStream'}", link.url)
            return False

    def _lineage(self, info: type_json) -> str:
        return f"{self._stream} of {info.get('created')}"

    async def _look(self, link: Link) -> bool:
        """Hold the stream against what it must be; make it where that is allowed (once). False: of no use.

        Raises ApiError, StoreUnavailable, TooSlowError: nothing is known that was not known before.
        """
        client = link.client
        with trio.fail_after(SETUP_TIMEOUT_S):
            try:
                with trio.fail_after(ELSEWHERE_S if len(self._urls) > 1 else SETUP_TIMEOUT_S):
                    info = await self._api(client, f"STREAM.INFO.{self._stream}", {})
            except ApiError as e:
                if e.code != STREAM_MISSING:
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
        weak += buckets.too_old(version(client))
        self._looked = StoreFacts(self._lineage(info), "; ".join(weak))
        return True

    async def _looking(self, link: Link) -> None:
        """Again and again on this connection, and at once where a call found no stream."""
        while True:
            with trio.move_on_after(self.look_every_s):
                await self._look_again.wait()
            self._look_again = trio.Event()
            try:
                if not await self._look(link):
                    link.closed.set()
                    return
            except (ApiError, StoreUnavailable, trio.TooSlowError) as e:
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
                raise NoRespondersError(f"{type(e).__name__} {e}".strip()) from e
            raise StoreUnavailable(f"{type(e).__name__} {e}".strip()) from e
        return bytes(answer.data)

    async def _api(self, client: Client, what: str, body: type_json) -> type_json:
        raw = await self._request(client, f"$JS.API.{what}", json.dumps(body).encode() if body else b"")
        return checked(raw)

    @contextlib.asynccontextmanager
    async def _call(self, timeout_s: float) -> AsyncIterator[Client]:
        """A connected client, within a deadline; every failure of the world as a StoreError."""
        if self._misconfigured is not None:
            raise StoreMisconfigured(self._misconfigured)
        if self._link is None:
            raise StoreUnavailable(self._why or "not connected")
        link = self._link
        call = link.begin(timeout_s * self.patience)
        with trio.move_on_after(timeout_s) as scope:
            try:
                yield link.client
            except ApiError as e:
                if e.code in MISMATCH:
                    raise SequenceMismatch(str(e)) from e
                if e.code in NOT_HERE:
                    link.refused()
                if e.code != STREAM_MISSING:
                    raise StoreUnavailable(str(e)) from e
                self._look_again.set()
                raise StoreUnavailable(f"no stream: {e}") from e
            except NoRespondersError:
                link.refused()
                raise
            finally:
                link.end(call)
        if scope.cancelled_caught:
            raise StoreUnavailable(f"no answer within {timeout_s:g} s")

    async def get(self, key: str, *, timeout_s: float) -> Entry | None:
        """The key's newest entry, from the stream's leader; None where there is none."""
        async with self._call(timeout_s) as client:
            try:
                subject = f"$KV.{self._bucket}.{key}"
                found = await self._api(client, f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": subject})
            except ApiError as e:
                if e.code == MESSAGE_MISSING:
                    return None
                raise
            return entry_of(key, found.get("message"))
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
            sequence = checked(raw).get("seq")
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
            except (StoreUnavailable, ApiError, trio.TooSlowError, OSError, nats.errors.Error) as e:
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
        except* (ApiError, StoreUnavailable, trio.TooSlowError) as group:
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
