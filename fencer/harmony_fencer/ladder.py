"""The fence: PostgreSQL stopped and proven gone, rung by rung, within its budget.

Cutting off writes and tearing down are two things. Under deadline the first rung is `freeze`: every process
stops where it is, in about a millisecond, and never runs again; then standby.signal is written, so that the
fence lasts even if this host dies halfway; then `kill`. A planned demotion begins with `fast`, PostgreSQL's
own clean shutdown, while time allows. (`immediate`, SIGQUIT, is no rung: a frozen process cannot answer it,
and for the data it is what a kill is: crash recovery at the next start. docs/adr/006.)

A fence counts only when no process of the data directory lives, nothing is left in its cgroup, and nothing
listens on its port (I6). What could not be killed stays frozen. Where all of that is killed and waits in the kernel for
a disk, it never runs again: the outcome says `spent` (docs/adr/015).
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

from harmony_fencer import processes
from harmony_fencer.clock import NS, boot_ns
from harmony_fencer.engine import Outcome
from harmony_fencer.protocol import Rung
from harmony_fencer.tree import Tree

POLL_S = 0.002
PORT_POLL_S = 0.02
AGAIN_S = 0.1
WATCH_AGAIN_S = 0.05
MARK_SHARE = 0.15


class Ladder:
    """One fence of one data directory; `run()` may be cancelled between any two polls."""

    def __init__(
        self,
        tree: Tree,
        mark_standby: Callable[[], Awaitable[None]],
        *,
        port: int,
        fence_timeout_s: float,
        clean_until_ns: int = 0,
    ) -> None:
        self._tree = tree
        self._mark_standby = mark_standby
        self._port = port
        self._fence_timeout_s = fence_timeout_s
        self._clean_until = clean_until_ns
        self._started = boot_ns()
        self._end = max(self._started, clean_until_ns) + round(fence_timeout_s * NS)
        self._rungs: list[Rung] = []

    async def run(self) -> Outcome:
        """Climb until proven gone or the budget is spent."""
        notes = ""
        if not self._tree.gone():
            if self._clean_until > self._started and not self._tree.halted:
                notes = await self._mark()
                await self._fast()
            if not self._tree.gone():
                self._freeze()
                notes = await self._mark()
                await self._kill()
        if not notes:
            notes = await self._mark()
        return self._outcome(notes, proven=await self._proof())

    async def _proof(self) -> bool:
        """Until one look finds nobody and nobody listens, or the budget is spent.

        Somebody may start PostgreSQL at any moment. What was begun before standby.signal was there is killed;
        what begins after the proof is a read-only standby.
        """
        gone = self._tree.gone()
        while True:
            if gone and not self._listening():
                return True
            if boot_ns() >= self._end:
                return False
            if gone:
                await trio.sleep(PORT_POLL_S)
                gone = self._tree.gone()
            else:
                gone = await self._kill()

    def _listening(self) -> bool:
        try:
            return processes.listening(self._port)
        except OSError:
            return True  # cannot tell

    def _outcome(self, notes: str, *, proven: bool) -> Outcome:
        took_ms = (boot_ns() - self._started) / 1e6
        if proven:
            self._tree.released()
            return Outcome(True, notes.strip("; "), tuple(self._rungs), took_ms)
        left = self._tree.everybody()
        rung = self._rungs[-1].name if self._rungs else "proof"
        if left:
            who = ", ".join(processes.describe(p) for p in left[:8]) + (" …" if len(left) > 8 else "")
            what = (
                f"after rung {rung} {len(left)} processes live on: {who}. They are frozen and write nothing "
                "more of their own, but it is tried again until they are gone; one in state D waits for its "
                "disk: repair that, or power this host off before anybody forces a promotion elsewhere"
            )
        else:
            what = (
                f"after rung {rung} no process of the data directory is left, but something listens on port "
                f"{self._port}: {processes.listeners(self._port)}. Stop it, or correct the port in [members]"
            )
        spent = bool(left) and self._tree.spent()
        return Outcome(False, f"{notes}{what}"[:900], tuple(self._rungs), took_ms, spent=spent)

    def _rung(self, name: str, begun_ns: int, detail: str, *, gone: bool) -> None:
        self._rungs.append(Rung(name, (boot_ns() - begun_ns) / 1e6, gone, detail))

    async def _mark(self) -> str:
        """A full, broken or hung disk must not keep us from stopping PostgreSQL: what went wrong, or ""."""
        try:
            with trio.move_on_after(self._fence_timeout_s * MARK_SHARE):
                await self._mark_standby()
                return ""
        except OSError as e:
            return f"standby.signal could not be written: {e}; "
        return "standby.signal could not be written in time (is the disk hung?); "

    async def _fast(self) -> None:
        begun = boot_ns()
        self._tree.watch()
        sent = self._tree.signal_postmaster(signal.SIGINT)
        watched_ns = begun
        while sent and not self._tree.gone() and boot_ns() < self._clean_until:
            await trio.sleep(POLL_S * 2)
            if boot_ns() - watched_ns > WATCH_AGAIN_S * NS:
                self._tree.watch()
                watched_ns = boot_ns()
        self._tree.watched()
        said = "SIGINT to the postmaster" if sent else "no postmaster to tell"
        self._rung("fast", begun, said, gone=self._tree.gone())

    def _freeze(self) -> None:
        begun = boot_ns()
        self._tree.halt()
        self._rung("freeze", begun, self._tree.halted_how, gone=self._tree.gone())

    async def _kill(self) -> bool:
        """Everything, again and again: until a look at the whole machine finds nobody (True), or the end."""
        begun, seen = boot_ns(), len(self._tree.everybody())
        while True:
            self._tree.kill()
            again = min(self._end, boot_ns() + round(AGAIN_S * NS))
            while boot_ns() < again and not self._tree.quiet():
                await trio.sleep(POLL_S)
            gone = self._tree.gone()
            if gone or boot_ns() >= self._end:
                break
        self._rung("kill", begun, f"{seen} processes", gone=gone)
        return gone
