"""The permit to leave a running primary alone until it is led: whom it covers, what ends it, and a lease over it."""

from __future__ import annotations

import json
import signal
import subprocess

import msgspec
import pytest
import trio

from harmony_fencer import protocol
from harmony_fencer.config import load
from harmony_fencer.postgres import Postgres
from tests.fencer.node import Node

pytestmark = pytest.mark.real


@pytest.fixture
def running(node: Node) -> Node:
    """A primary that was started by hand and reads Harmony's settings."""
    with (node.data / "postgresql.conf").open("a") as file:
        file.write(f"include_if_exists '{node.data}/harmony.included.conf'\n")
    node.start_by_hand()
    assert node.writable()
    return node


def _adoption(node: Node, *arguments: str) -> list[str]:
    done = subprocess.run(node.argv(*arguments), capture_output=True, timeout=60, check=False)
    problems: list[str] = json.loads(done.stdout)["problems"]
    assert done.returncode == (1 if problems else 0), done
    return problems


def test_led_without_a_restart(running: Node) -> None:
    """The settings come in by a reload, the fencer holds the lease, and fences at its end as ever."""
    assert _adoption(running, "--check-adoption") == []
    assert _adoption(running, "--permit-adoption", "test") == []
    pid = running.postmaster()
    running.start()
    assert running.status().adopting
    assert _adoption(running, "--permit-adoption", "again") != [], "a fencer runs"
    running.make_writable()
    assert (running.postmaster(), running.status().adopting) == (pid, False)
    with running.connect() as c:
        row = c.execute(
            "SELECT sourcefile FROM pg_settings WHERE name = 'synchronous_standby_names'"
        ).fetchone()
    assert row == (str(running.data / "harmony.included.conf"),)
    running.wait(lambda: running.pids() == [], "the end of the lease stops it", 10)
    running.make_writable(1, 2)
    assert running.writable(), (
        "started by Harmony, with its own file, which the user's must not include in turn"
    )


def test_settings_come_in_without_a_program_of_postgresql(running: Node) -> None:
    """Starting one costs a promotion, and a standby that has a new primary, as much as all the rest."""
    engine = Postgres(msgspec.structs.replace(load(str(running.config)), bin_dir="/nowhere"), lasting=False)
    with running.connect() as c:
        before = c.execute("SELECT pg_conf_load_time()").fetchone()
        trio.run(engine.reload)
        running.wait(lambda: c.execute("SELECT pg_conf_load_time()").fetchone() != before, "loaded anew", 30)


def test_what_else_ends_the_permit(running: Node) -> None:
    """It is spared beside nobody and by a fencer that is stopped or killed; not after its postmaster's end."""
    assert _adoption(running, "--permit-adoption", "test") == []
    for mode in ("--if-unguarded", "--once"):
        subprocess.run(running.argv(mode, "test"), capture_output=True, timeout=60, check=True)
        assert running.writable(), mode
    running.start()
    running.kill_fencer()
    running.start()
    assert running.kill_fencer(signal.SIGTERM) == 0
    assert running.writable()
    running.kill_postgres()
    running.start_by_hand()
    assert running.writable()
    running.start()
    running.wait(lambda: running.status().self_fence is not None, "another postmaster was not permitted")
    running.wait(lambda: running.pids() == [], "it is stopped")
    assert not running.status().adopting


def test_an_operators_fence_and_any_order_end_it(running: Node) -> None:
    assert _adoption(running, "--permit-adoption", "test") == []
    running.start()
    reply = running.ask(protocol.OperatorFence(reason="test", who="test"))
    assert isinstance(reply, protocol.Accepted)
    assert running.outcome().state == "done"
    running.kill_fencer()
    assert any("no new node" in p for p in _adoption(running, "--check-adoption"))


def test_withdrawn(running: Node) -> None:
    assert _adoption(running, "--permit-adoption", "test") == []
    subprocess.run(running.argv("--withdraw-adoption"), timeout=60, check=True)
    running.start()
    running.wait(lambda: running.pids() == [], "a primary without a lease is stopped")


def test_what_a_reload_cannot_bring_in_is_named(node: Node) -> None:
    """Each with what to do, and nothing is written."""
    node.start_by_hand()
    assert any("add as its last line" in p for p in _adoption(node, "--permit-adoption", "test"))
    with (node.data / "postgresql.conf").open("a") as file:
        file.write(f"include_if_exists '{node.data}/harmony.included.conf'\n")
    with node.connect() as c:
        c.execute("ALTER SYSTEM SET synchronous_standby_names = 'x'")
    assert any("ALTER SYSTEM RESET" in p for p in _adoption(node, "--permit-adoption", "test"))
    with node.connect() as c:
        c.execute("ALTER SYSTEM RESET synchronous_standby_names")
    assert _adoption(node, "--check-adoption") == []
    assert not (node.run / "fencer.adopt").exists()
    assert not (node.data / "harmony.included.conf").exists()
