"""The agent's process: it retires when asked to, within a bound, and at once when asked twice (O1)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from harmony.agent.main import RETIRING_S, on_signals
from harmony.config import load
from harmony.core.messages import Event, Retiring
from tests import pace

CONFIG = """
[cluster]
id = "c1"
preferred_primary = "n1"
[node]
name = "n2"
run_dir = "{folder}"
state_dir = "{folder}"
[members]
n1.host = "10.0.0.1"
n2.host = "10.0.0.2"
[store]
type = "memory"
[timing]
preset = "fast"
[postgresql]
data_dir = "/nowhere"
"""


async def test_the_first_signal_retires_and_the_second_ends() -> None:
    posted: list[Event] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(on_signals, posted.append, nursery.cancel_scope, hand_over=True, bound_s=60)
        )
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGTERM)
        with trio.fail_after(2):
            while not posted:
                await trio.sleep(0.005)
        assert posted == [Retiring(hand_over=True)]
        assert not nursery.cancel_scope.cancel_called
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep(2)
        raise AssertionError("it goes on")
    assert posted, "the first one ended it"


async def test_it_never_waits_longer_than_its_bound(autojump_clock: trio.testing.MockClock) -> None:
    """Below what the supervisor waits before it kills: fence_timeout_s + 3 s."""
    assert RETIRING_S < 3
    posted: list[Event] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(on_signals, posted.append, nursery.cancel_scope, hand_over=False, bound_s=4)
        )
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(100)
        raise AssertionError("it goes on")
    assert posted == [Retiring(hand_over=False)]


@pytest.mark.real
def test_a_process_with_nothing_to_hand_over_ends_at_once() -> None:
    """The whole agent, with no fencer and no database; its memory stays on disk."""
    with tempfile.TemporaryDirectory(prefix="hagent") as name:
        folder = Path(name)
        (folder / "agent").mkdir()
        (folder / "harmony.toml").write_text(CONFIG.format(folder=folder))
        resolved = folder / "agent.json"
        resolved.write_bytes(msgspec.json.encode(load(folder / "harmony.toml", {})))
        argv = [sys.executable, "-I", "-m", "harmony.agent", "--resolved", str(resolved)]
        with (folder / "log").open("wb") as log, subprocess.Popen(argv, stderr=log, stdout=log) as process:
            until = time.monotonic() + pace.wait_s(10)
            while not (folder / "agent" / "agent.sock").exists() and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert process.wait(pace.wait_s(10)) == 0, (folder / "log").read_text()
            assert time.monotonic() - began < 2.5 + pace.SLACK_S
        text = (folder / "log").read_text()
        assert "retired" in text, text


def test_it_starts_without_what_only_terminals_need() -> None:
    """A node waits for its agent: structlog would load rich, where it is installed, for nothing."""
    argv = [sys.executable, "-I", "-X", "importtime", "-m", "harmony.agent", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "structlog.dev" in done.stderr
    assert "rich.console" not in done.stderr
