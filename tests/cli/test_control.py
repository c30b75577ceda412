"""What operators ask of the cluster: by compare-and-set, straight in the store (D1)."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from click.testing import CliRunner, Result

from harmony.cli.acknowledge import edit
from harmony.cli.control import Impossible, change, connected
from harmony.cli.main import cli
from harmony.config import load
from harmony.errors import StoreUnavailable
from harmony.records import (
    CLUSTER_STATE,
    CONTROL,
    MEMBER_PREFIX,
    ClusterState,
    Control,
    Switchover,
    decode_control,
    encode,
)
from harmony.store.memory import MemoryServer, MemoryStore
from tests.cli.test_commands import CLUSTER
from tests.core import helpers
from tests.store.conftest import Server, opener, server
from tests.store.fakenats import NONCE, FakeNats
from tests.store.test_answers import CREDENTIALS, seed

__all__ = ["server"]  # a fixture
WISH = Switchover("id", "n2", 3, "somebody")


def acknowledged(control: Control, cluster: ClusterState) -> Control:
    return msgspec.structs.replace(control, acknowledged=cluster.term)


async def stored(server: MemoryServer) -> MemoryStore:
    store = MemoryStore(server, "c1")
    await store.create(CLUSTER_STATE, encode(CLUSTER), timeout_s=10)
    return store


async def test_made_where_it_is_missing_and_the_rest_is_kept() -> None:
    store = await stored(MemoryServer())
    made = await change(store, acknowledged)
    assert (made.acknowledged, made.switchover) == (3, None)
    entry = await store.get(CONTROL, timeout_s=10)
    assert entry is not None
    wished = msgspec.structs.replace(made, switchover=WISH, acknowledged=1)
    await store.update(CONTROL, encode(wished), entry.revision, timeout_s=10)
    again = await change(store, acknowledged)
    assert (again.acknowledged, again.switchover) == (3, WISH)
    assert again.attempt not in {made.attempt, ""}


async def test_without_a_cluster_there_is_nothing_to_ask() -> None:
    with pytest.raises(Impossible, match="no record yet"):
        await change(MemoryStore(MemoryServer(), "c1"), acknowledged)


async def test_somebody_else_is_never_overwritten() -> None:
    """D1: who was faster stays; we read again, and give up with the reason where that never ends."""
    server = MemoryServer()
    store, other = await stored(server), MemoryStore(server, "c1")
    rounds = 0

    async def interfere() -> None:
        entry = await other.get(CONTROL, timeout_s=10)
        seen = decode_control(entry.value) if entry is not None else Control(attempt="")
        changed = msgspec.structs.replace(seen, attempt=f"other-{rounds}", switchover=WISH)
        await other.update(CONTROL, encode(changed), entry.revision if entry is not None else 0, timeout_s=10)

    class Slow(MemoryStore):
        limit = 2

        async def update(self, key: str, value: bytes, revision: int, *, timeout_s: float) -> int:
            nonlocal rounds
            rounds += 1
            if rounds <= self.limit:
                await interfere()
            return await super().update(key, value, revision, timeout_s=timeout_s)

    slow = Slow(server, "c1")
    found = await change(slow, acknowledged)
    assert (found.acknowledged, found.switchover, rounds) == (3, WISH, 3)
    slow.limit = 1000
    with pytest.raises(Impossible, match="not written after 5 tries"):
        await change(slow, acknowledged)
    assert await store.get(CONTROL, timeout_s=10) is not None


async def test_a_lost_answer_is_looked_up() -> None:
    """Written and not acknowledged: found by its attempt id, and not written twice. Lost: written again."""
    server = MemoryServer()
    store = await stored(server)
    store.faults.lost_ack = 1
    assert (await change(store, acknowledged)).acknowledged == 3
    assert server.revision == 2
    store.faults.lost = 1
    assert (await change(store, acknowledged)).acknowledged == 3
    assert server.revision == 3
    store.faults.disconnected = True
    with pytest.raises(StoreUnavailable):
        await change(store, acknowledged)


async def test_a_record_of_another_version_is_left_alone() -> None:
    store = await stored(MemoryServer())
    await store.create(CONTROL, b'{"of":"tomorrow"}', timeout_s=10)
    with pytest.raises(Impossible, match="not a record of this version"):
        await change(store, acknowledged)


# ---------------------------------------------------------------- the command

CONFIG = """
[cluster]
id = "{cluster}"
preferred_primary = "n1"
[node]
name = "n1"
[members]
n1.host = "10.0.0.1"
n2.host = "10.0.0.2"
n3.host = "10.0.0.3"
[store]
urls = ["{url}"]
[timing]
preset = "fast"
[postgresql]
data_dir = "/nowhere"
"""


def acknowledge(tmp_path: Path, cluster: str, url: str, *options: str) -> tuple[int, str]:
    result = command(tmp_path, cluster, url, "acknowledge", *(options or ("--yes",)))
    return result.exit_code, result.output


def command(tmp_path: Path, cluster: str, url: str, *arguments: str) -> Result:
    file = tmp_path / "harmony.toml"
    file.write_text(CONFIG.format(cluster=cluster, url=url))
    result = CliRunner().invoke(cli, [*arguments, "--config", str(file)], env={"HARMONY_CONFIG": None})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.real
def test_a_switchover_asks_first_and_only_its_results_are_on_standard_output(
    server: Server, tmp_path: Path
) -> None:
    """B13: a question before what cuts clients off; no log between the results; a closed pipe ends it quietly."""

    async def found(*, look: bool) -> bool:
        async with opener(server.url)("c1") as store:
            with trio.fail_after(30):
                while not store.connected:
                    await trio.sleep(0.01)
            if look:
                return await store.get(CONTROL, timeout_s=5) is not None
            await store.create(CLUSTER_STATE, encode(helpers.cluster(cluster_id="c1")), timeout_s=5)
            for name in ("n1", "n2", "n3"):
                await store.create(MEMBER_PREFIX + name, encode(helpers.member(name)), timeout_s=5)
        return False

    trio.run(partial(found, look=False))
    dry = command(tmp_path, "c1", server.url, "switchover", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert [line for line in dry.stdout.splitlines() if "store connected" in line or "[" in line] == []
    assert dry.stdout.startswith("cluster c1, term 3: n1 leads\n")
    assert dry.stderr == ""
    told = command(tmp_path, "c1", server.url, "switchover", "--dry-run", "--verbose")
    assert told.stdout == dry.stdout
    asked = command(tmp_path, "c1", server.url, "switchover", "--to", "n2")
    assert asked.exit_code == 2
    assert "not handed over (answer yes, or give --yes)" in asked.stderr
    assert not trio.run(partial(found, look=True)), "nothing was asked of the leader"
    read, write = os.pipe()
    os.close(read)
    argv = [
        sys.executable,
        "-m",
        "harmony",
        "switchover",
        "--dry-run",
        "--config",
        str(tmp_path / "harmony.toml"),
    ]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [("acknowledge",), ("switchover",), ("adopt",)])
def test_a_store_that_is_down_is_one_line_and_no_log(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """B13: it was some 20 lines of debugging on standard output."""
    yes = () if arguments == ("adopt",) else ("--yes",)
    result = command(tmp_path, "c1", "nats://127.0.0.1:1", *arguments, *yes)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("not done: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_an_acknowledgement_asks_first(tmp_path: Path) -> None:
    """B13: without a terminal and without --yes nothing is even connected."""
    code, text = acknowledge(tmp_path, "c1", "nats://127.0.0.1:1", "--verbose")
    assert code == 2
    assert text == "not acknowledged (answer yes, or give --yes)\n"


@pytest.mark.real
def test_acknowledge_in_a_real_store(server: Server, tmp_path: Path) -> None:
    """From any node, whatever the agents do; no bucket is made by it."""
    code, text = acknowledge(tmp_path, "nowhere", server.url)
    assert code == 1
    assert "is gone" in text or "cannot be reached" in text

    async def found() -> None:
        async with opener(server.url)("c1") as store:
            with trio.fail_after(10):
                while not store.connected:
                    await trio.sleep(0.01)
            await store.create(CLUSTER_STATE, encode(CLUSTER), timeout_s=2)

    trio.run(found)
    for _ in range(2):
        code, text = acknowledge(tmp_path, "c1", server.url)
        assert code == 0, text
        assert "up to term 3" in text


def test_a_wrong_configuration_is_named(tmp_path: Path) -> None:
    code, text = acknowledge(tmp_path, "NOT AN ID", "nats://127.0.0.1:1")
    assert code == 78
    assert "cluster.id" in text


def test_what_was_acknowledged_stays_so() -> None:
    """A store that was rolled back shows an older term: the later acknowledgement is kept."""
    assert edit(Control(attempt="", acknowledged=9), CLUSTER).acknowledged == 9
    assert edit(Control(attempt="", acknowledged=1), CLUSTER).acknowledged == 3


async def test_the_credentials_reach_the_server(tmp_path: Path) -> None:
    """store.credentials_file: a server that demands them would let no operator ask for anything."""
    secret = tmp_path / "user.creds"
    secret.write_text(CREDENTIALS.format(seed=seed()))
    fake = FakeNats(nonce=NONCE)
    async with trio.open_nursery() as nursery:
        await nursery.start(fake.serve)
        file = tmp_path / "harmony.toml"
        text = CONFIG.format(cluster="c1", url=fake.url)
        file.write_text(text.replace("[timing]", f'credentials_file = "{secret}"\n[timing]'))
        config = load(str(file), {})

        async def ask() -> None:
            async with connected(config):
                pass

        nursery.start_soon(ask)
        with trio.fail_after(30):
            while not fake.connects:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert fake.connects[0].get("jwt") == "a-jwt-of-the-test"
