"""harmony-agent: the unprivileged heartbeat and decision process. Started by the supervisor.

It holds no privilege, touches no PostgreSQL process, and may die at any moment: the fencer keeps the lease.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec
import structlog
import trio

from harmony.agent.health import Health
from harmony.agent.keeper import Keeper
from harmony.agent.memory import Memory, load
from harmony.agent.probe import Probe, Target
from harmony.agent.serve import bind, serve
from harmony.agent.shell import Shell, World
from harmony.agent.slots import Wanted
from harmony.config import Config
from harmony.core.messages import Event, Retiring
from harmony.core.view import Identity, Policy
from harmony.decoding import Unreadable, decoded
from harmony.errors import EXIT_CONFIG, FatalError
from harmony.logs import configure_logging
from harmony.store import open_store

MEMORY_S = 10.0  # longest wait for the agent's own disk at start; then the supervisor starts another one
LEAST_PATIENCE_S = 10.0
RETIRING_S = 2.0  # over fence_timeout: below what the supervisor waits for an agent that it has asked to stop
log = structlog.get_logger("agent")


class Supervision:
    """The child's end of the supervisor's socketpair: ready, pong, status; EOF means it is dead."""

    def __init__(self, fd: int | None) -> None:
        self._stream = None
        if fd is not None:
            sock = socket.socket(fileno=fd)
            self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._wanted = trio.Event()
        self._status = ""
        self._told = ""
        self._lines: list[str] = []

    def say(self, status: str) -> None:
        """Tell the supervisor (and through it systemd) what we are doing; only changes are sent."""
        if self._stream is not None and status != self._status:
            self._status = status
            self._wanted.set()

    async def run(self, cancel: trio.CancelScope) -> None:
        """Answer pings; cancel everything when the supervisor is gone."""
        if self._stream is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._talk, self._stream)
            buffer = b""
            try:
                async for chunk in self._stream:
                    *lines, buffer = (buffer + chunk[:4096])[-4096:].split(b"\n")
                    for line in lines:
                        if line.startswith(b"ping "):
                            self._lines.append("pong " + line[5:40].decode("ascii", "replace"))
                            self._wanted.set()
            except trio.BrokenResourceError:
                pass
            log.error("the supervisor is gone: ending")
            cancel.cancel()
            nursery.cancel_scope.cancel()

    async def _talk(self, stream: trio.SocketStream) -> None:
        await stream.send_all(b"ready agent\n")
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            lines, self._lines = self._lines, []
            if self._status != self._told:
                self._told = self._status
                text = self._status.encode("ascii", "replace")[:240].replace(b"\n", b" ")
                lines.append("status " + text.decode("ascii"))
            try:
                await stream.send_all("".join(line + "\n" for line in lines).encode("ascii"))
            except trio.BrokenResourceError:
                return


async def on_signals(
    post: Callable[[Event], None], cancel: trio.CancelScope, *, hand_over: bool, bound_s: float
) -> None:
    """The first one retires the agent, which ends by itself when nothing holds it; a second one ends it at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        name = signal.Signals(await anext(signals)).name
        log.info("asked to stop; what we lead is handed over, or ended by the fencer", signal=name)
        post(Retiring(hand_over))
        why = f"it has taken {bound_s:g} s"
        with trio.move_on_after(bound_s):
            why = f"asked again ({signal.Signals(await anext(signals)).name})"
        log.warning("ending now", why=why)
        cancel.cancel()


def patience_s(config: Config) -> float:
    """How long a symptom has to last: generous, as a needless failover is worse than a late one."""
    return config.sickness.patience_s or max(LEAST_PATIENCE_S, 2 * config.timing.failover_timeout_s)


def identity(config: Config) -> Identity:
    """What the core must know of this node and does not change."""
    f = config.failover
    count = config.replication.synchronous_count if config.replication.mode != "off" else 0
    return Identity(
        node=config.node.name,
        cluster_id=config.cluster.id,
        preferred=config.cluster.preferred_primary == config.node.name,
        members=tuple(sorted(config.members)),
        sync_count=count,
        maximum_lag_bytes=config.replication.maximum_lag_bytes,
        nofailover=config.node.nofailover,
        priority=config.node.priority,
        instance=uuid.uuid4().hex[:12],
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        version=version("harmony-ha"),
        policy=Policy(
            preferred_primary=config.cluster.preferred_primary,
            failback=f.failback,
            failback_after_s=f.failback_after_s,
            maximum_changes=f.maximum_changes,
            changes_window_s=f.changes_window_s,
            flap_window_s=f.flap_window_s,
            rejoin=config.rejoin.mode,
            rejoin_after_s=config.rejoin.after_s,
            sick_after_s=patience_s(config),
            sick_handover=config.sickness.action == "handover",
            restart_budget=f.restart_budget,
            restart_window_s=f.restart_window_s,
        ),
        sync_mode=config.replication.mode,
    )


def wanted(config: Config) -> Wanted:
    """The slots and settings that the configuration asks for."""
    r = config.replication
    return Wanted(
        node=config.node.name,
        members=tuple(sorted(config.members)),
        slots=r.slots,
        permanent=r.permanent_slots,
        synchronous=r.mode != "off",
    )


async def run(config: Config, supervisor_fd: int | None) -> None:
    """Run the agent until it has retired, the supervisor's death, or an error."""
    run_dir, folder = Path(config.node.run_dir), Path(config.node.state_dir) / "agent"
    p = config.postgresql
    port = config.members[config.node.name].port
    target = Target(p.socket_dir, port, p.db_user, p.db_name)
    probe = Probe(target)
    sickness = config.sickness
    health = Health(
        probe,
        target,
        p.data_dir,
        write_probe=sickness.write_probe,
        disk_free_mb=sickness.disk_free_mb,
    )
    keeper = Keeper(target, wanted(config))
    supervision = Supervision(supervisor_fd)
    s = config.store
    with trio.fail_after(MEMORY_S):  # before the store is touched: whether it lost anything is judged by this
        remembered = await trio.to_thread.run_sync(load, folder, config.cluster.id, abandon_on_cancel=True)
    async with (
        open_store(
            s.type,
            urls=s.urls,
            cluster_id=config.cluster.id,
            replicas=s.replicas,
            credentials_file=s.credentials_file,
            monitor_urls=s.monitor_urls,
            may_create=remembered.of_nothing,
        ) as store,
        trio.open_nursery() as nursery,
    ):
        memory = Memory(folder, config.cluster.id)
        fencer = str(run_dir / "fencer.sock")
        world = World(store, probe, health, keeper.survey, memory, remembered, fencer, supervision.say)
        shell = Shell(config, identity(config), world)
        listener = bind(run_dir / "agent" / "agent.sock")

        async def decide() -> None:
            await shell.run()
            nursery.cancel_scope.cancel()

        nursery.start_soon(
            partial(
                on_signals,
                shell.post,
                nursery.cancel_scope,
                hand_over=config.failover.on_stop == "handover",
                bound_s=config.timing.fence_timeout_s + RETIRING_S,
            )
        )
        nursery.start_soon(supervision.run, nursery.cancel_scope)
        nursery.start_soon(memory.run)
        nursery.start_soon(serve, listener, shell)
        nursery.start_soon(decide)


def _each(e: BaseException) -> Iterator[BaseException]:
    """The errors themselves: nurseries nest their groups."""
    if isinstance(e, BaseExceptionGroup):
        for inner in e.exceptions:
            yield from _each(inner)
    else:
        yield e


def main() -> None:
    """Entry point. Exit codes: 0 asked to stop, 78 do not restart as configured, else restart."""
    parser = argparse.ArgumentParser(prog="harmony-agent", description=__doc__)
    parser.add_argument("--resolved", required=True, help="agent.json, as the supervisor wrote it")
    parser.add_argument("--supervisor-fd", type=int, help="the supervisor's socketpair")
    options = parser.parse_args()
    try:
        config = decoded(msgspec.json.Decoder(Config), Path(options.resolved).read_bytes())
    except (OSError, Unreadable) as e:
        sys.stderr.write(f"harmony-agent: {options.resolved}: {e}\n")
        sys.exit(EXIT_CONFIG)
    configure_logging(config.log.format, config.log.level, node=config.node.name)
    try:
        trio.run(run, config, options.supervisor_fd, strict_exception_groups=True)
    except* FatalError as group:
        for fatal in _each(group):
            log.critical("cannot go on; a restart will not help", why=str(fatal))
        os._exit(EXIT_CONFIG)
    os._exit(0)  # a probe's thread may hang in a frozen PostgreSQL: do not wait for it
