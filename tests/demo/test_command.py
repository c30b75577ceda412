"""The demo leaves nothing behind, also when its terminal is closed under it (B14): first it stops, then it speaks."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import cast

import psutil
import pytest
from rich.console import Console

from harmony.demo import procs
from harmony.demo.cluster import Cluster
from harmony.demo.command import _interruptible as interruptible
from harmony.demo.command import _remove as remove
from harmony.demo.view import View


class Closed(io.StringIO):
    """A terminal that was closed."""

    def write(self, _text: str, /) -> int:
        raise OSError(5, "EIO")


@pytest.mark.parametrize("plain", [True, False])
def test_a_view_that_nobody_sees_interrupts_once_and_never_the_end(plain: bool) -> None:
    view = View(Console(file=Closed(), force_terminal=True), plain=plain)
    with pytest.raises(KeyboardInterrupt):
        with view:
            view.say("hello")
    view.say("nor again")
    view.close()
    ending = View(Console(file=Closed()), plain=True)
    ending.end()
    ending.say("stopping")


def test_everything_is_stopped_before_anything_is_said(tmp_path: Path) -> None:
    """B14: the write failed (EIO), and nothing was stopped."""
    done: list[str] = []

    class Kept:
        def stop(self) -> list[psutil.Process]:
            done.append("stopped")
            return []

    class Told:
        def say(self, sentence: str) -> None:
            done.append("said")
            raise OSError(5, "EIO")

    with pytest.raises(OSError, match="EIO"):
        remove(cast(Cluster, Kept()), tmp_path, True, cast(View, Told()))
    assert done == ["stopped", "said"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_interrupts_and_more_do_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        for again in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), again)
    assert signal.getsignal(number) == before


def _until_it_runs(demo: subprocess.Popen[bytes], terminal: int) -> list[psutil.Process]:
    """All processes of the demo, once a node's three have been started; its output is read meanwhile."""
    deadline = time.monotonic() + 120
    os.set_blocking(terminal, False)
    said = b""
    while time.monotonic() < deadline and demo.poll() is None:
        try:
            said += os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.05)
        children = procs.tree(demo.pid)
        if sum("harmony_fencer" in " ".join(p.cmdline()) for p in children if procs.alive(p)) >= 3:
            return children
    raise AssertionError(said.decode(errors="replace")[-3000:])


@pytest.mark.real
def test_a_closed_terminal_stops_everything() -> None:
    """B14: nats-server, supervisors, fencers and PostgreSQL stayed for ever."""
    terminal, other = pty.openpty()

    def own() -> None:
        os.setsid()
        fcntl.ioctl(other, termios.TIOCSCTTY, 0)

    argv = [sys.executable, "-m", "harmony", "demo", "--keep"]
    demo = subprocess.Popen(argv, stdin=other, stdout=other, stderr=other, preexec_fn=own)  # noqa: PLW1509
    os.close(other)
    try:
        everything = _until_it_runs(demo, terminal)
        bases = {a for p in everything for a in p.cmdline() if "harmony-demo-" in a}
        os.close(terminal)
        demo.wait(120)
        assert bases
        assert [p.cmdline() for p in everything if procs.alive(p)] == []
        base = next(part for part in Path(min(bases)).parents if part.name.startswith("harmony-demo-"))
        assert not base.exists()
    finally:
        demo.kill()
        demo.wait()
