"""The supervisor: fencer first, agent second, both kept alive; systemd told; the emergency fence last.

It decides nothing about the database. When the fencer cannot be kept up it runs the fencer's one-shot.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import trio

from harmony_supervisor.child import EXIT_CONFIG, Child, Spec
from harmony_supervisor.notify import Notifier

FENCER_DEATHS = 3
DEATHS_WITHIN_S = 10.0
log = structlog.get_logger("supervisor")


@dataclass(frozen=True)
class Settings:
    """Times in seconds."""

    node: str
    fence_timeout_s: float
    lease_s: float


class Supervisor:
    """`run()` returns the exit code."""

    def __init__(
        self, settings: Settings, fencer: Spec, agent: Spec, emergency: Sequence[str], notifier: Notifier
    ) -> None:
        self._s = settings
        self._emergency = emergency
        self._notifier = notifier
        self._told = ""
        self._was_ready = False
        self.fencer = self._child(fencer)
        self.agent = self._child(agent)
        self._code = 0
        self._over = trio.Event()
        self._stopping = False

    def _child(self, spec: Spec) -> Child:
        return Child(spec, self._changed)

    def _changed(self) -> None:
        if not self._was_ready and self.fencer.ready and self.agent.ready:
            self._was_ready = True
            self._notifier.send("READY=1")
            log.info("both children are ready", node=self._s.node)
        text = f"{self._s.node}: agent {self.agent.status}; fencer {self.fencer.status}"
        if text != self._told:
            self._told = text
            self._notifier.send("STATUS=" + text)

    async def run(self) -> int:
        """Until a signal, or until going on would be wrong."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._signals)
            nursery.start_soon(self._watchdog)
            nursery.start_soon(self._keep, self.fencer)
            nursery.start_soon(self._emergencies)
            nursery.start_soon(self._agent_after_fencer)
            try:
                await self._over.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await self._stop()
            nursery.cancel_scope.cancel()
        return self._code

    async def _agent_after_fencer(self) -> None:
        """Second, but without waiting for the fencer's readiness: after a restart the lease is running out."""
        await self.fencer.wait_started()
        await self._keep(self.agent)

    async def _keep(self, child: Child) -> None:
        if await child.run() == EXIT_CONFIG:
            while child is self.fencer and not self._stopping and not await self._fence_once():
                await trio.sleep(1.0)  # nobody guards PostgreSQL any more: not before it is fenced
            log.critical("a restart will not help; stopping everything", child=child.spec.name)
            self._end(EXIT_CONFIG)

    def _end(self, code: int) -> None:
        if not self._over.is_set():
            self._code = code
            self._over.set()

    async def _stop(self) -> None:
        self._stopping = True
        log.info("stopping: the agent, then the fencer")
        self._notifier.send("STOPPING=1")
        await self.agent.stop(self._s.fence_timeout_s + 3)
        # Its clean shutdown may take until the lease ends, and the fence after it its whole budget.
        await self.fencer.stop(self._s.lease_s + self._s.fence_timeout_s + 3)

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP:
                    log.warning("the configuration is read at start only: restart to change it")
                    continue
                log.info("asked to stop", signal=signal.Signals(number).name)
                self._end(0)

    async def _watchdog(self) -> None:
        """Pet systemd's watchdog only while both children answer (or are not both up yet)."""
        if self._notifier.watchdog_s is None:
            return
        while True:
            if not self._was_ready or (self.fencer.answering and self.agent.answering):
                self._notifier.send("WATCHDOG=1")
            await trio.sleep(self._notifier.watchdog_s / 3)

    async def _emergencies(self) -> None:
        """A fencer that cannot be kept up: fence by the one-shot; only when proven, give up (systemd restarts)."""
        while True:
            await trio.sleep(0.1)
            recent = [t for t in self.fencer.deaths if t > time.monotonic() - DEATHS_WITHIN_S]
            if self._stopping or not (self.fencer.stuck or len(recent) >= FENCER_DEATHS):
                continue
            stuck = self.fencer.stuck  # it dies in the end, and is replaced
            log.critical("the fencer cannot be kept up: emergency fence", stuck=stuck)
            proven = await self._fence_once()
            if proven and not (stuck or self.fencer.stuck):
                self._end(1)
                return
            if not proven:
                log.critical("the emergency fence is NOT proven; trying again, the agent holds others off")
            await trio.sleep(1.0)

    async def _fence_once(self) -> bool:
        """The one-shot, beside whatever fencer there is: whether it has proven its fence."""

        async def kill(process: trio.Process) -> None:
            process.kill()

        try:
            with trio.move_on_after(self._s.fence_timeout_s + 5):
                done = await trio.run_process(
                    [*self._emergency, "the fencer cannot be kept up"],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    capture_stdout=True,
                    deliver_cancel=kill,
                )
                outcome = done.stdout.decode("utf-8", "replace")[-500:]
                log.warning("emergency fence", exit_code=done.returncode, outcome=outcome)
                return done.returncode == 0
        except (OSError, RuntimeError) as e:
            log.critical("the emergency fence could not be started", why=str(e))
        return False
