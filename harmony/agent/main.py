"""harmony-agent: the unprivileged heartbeat and decision process. Started by the supervisor.

It holds no privilege, touches no PostgreSQL process, and may die at any moment: the fencer keeps the lease.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import stat
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

import msgspec
import structlog
import trio

from harmony.admin import MAX_LINE_BYTES, StatusQuery
from harmony.agent.probe import Probe, Target
from harmony.agent.shell import Shell
from harmony.config import Config
from harmony.core.view import Identity
from harmony.errors import EXIT_CONFIG, FatalError
from harmony.logs import configure_logging
from harmony.store import open_store

ADMIN_TIMEOUT_S = 2.0
ADMIN_CONNECTIONS = 16
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


async def _admin(listener: trio.SocketListener, shell: Shell) -> None:
    """Answer one status question per connection; slow or wrong clients cost nothing but a slot."""
    limit = trio.CapacityLimiter(ADMIN_CONNECTIONS)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream, limit:
            with trio.move_on_after(ADMIN_TIMEOUT_S):
                line = b""
                while b"\n" not in line and len(line) < 1024:
                    chunk = await stream.receive_some(1024)
                    if not chunk:
                        return
                    line += chunk
                try:
                    msgspec.json.decode(line, type=StatusQuery)
                    reply = msgspec.json.encode(shell.status())
                except msgspec.DecodeError as e:
                    reply = msgspec.json.encode({"error": f"bad request: {e}"})
                await stream.send_all(reply[:MAX_LINE_BYTES] + b"\n")

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a status client went away")

    await trio.serve_listeners(guarded, [listener])


def _bind(path: Path) -> socket.socket:
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise FatalError(f"{path} exists and is not a socket: move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    path.chmod(0o666)  # status is for everybody; the socket answers nothing else
    sock.listen(ADMIN_CONNECTIONS)
    return sock


async def _signals(cancel: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("asked to stop; the fencer ends what we lead", signal=signal.Signals(number).name)
            cancel.cancel()
            return


def identity(config: Config) -> Identity:
    """What the core must know of this node and does not change."""
    count = config.replication.synchronous_count if config.replication.mode == "quorum" else 0
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
    )


async def run(config: Config, supervisor_fd: int | None) -> None:
    """Run the agent until SIGTERM, the supervisor's death, or an error."""
    run_dir = Path(config.node.run_dir)
    p = config.postgresql
    port = config.members[config.node.name].port
    probe = Probe(Target(p.socket_dir, port, p.db_user, p.db_name))
    supervision = Supervision(supervisor_fd)
    s = config.store
    async with (
        open_store(
            s.type,
            urls=s.urls,
            cluster_id=config.cluster.id,
            replicas=s.replicas,
            credentials_file=s.credentials_file,
        ) as store,
        trio.open_nursery() as nursery,
    ):
        shell = Shell(config, identity(config), store, probe, str(run_dir / "fencer.sock"), supervision.say)
        listener = trio.SocketListener(
            trio.socket.from_stdlib_socket(_bind(run_dir / "agent" / "agent.sock"))
        )
        nursery.start_soon(_signals, nursery.cancel_scope)
        nursery.start_soon(supervision.run, nursery.cancel_scope)
        nursery.start_soon(_admin, listener, shell)
        nursery.start_soon(shell.run)


def main() -> None:
    """Entry point. Exit codes: 0 asked to stop, 78 do not restart as configured, else restart."""
    parser = argparse.ArgumentParser(prog="harmony-agent", description=__doc__)
    parser.add_argument("--resolved", required=True, help="agent.json, as the supervisor wrote it")
    parser.add_argument("--supervisor-fd", type=int, help="the supervisor's socketpair")
    options = parser.parse_args()
    try:
        config = msgspec.json.decode(Path(options.resolved).read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as e:
        sys.stderr.write(f"harmony-agent: {options.resolved}: {e}\n")
        sys.exit(EXIT_CONFIG)
    configure_logging(config.log.format, config.log.level, node=config.node.name)
    try:
        trio.run(run, config, options.supervisor_fd, strict_exception_groups=True)
    except* FatalError as group:
        for fatal in group.exceptions:
            log.critical("cannot go on; a restart will not help", why=str(fatal))
        os._exit(EXIT_CONFIG)
    os._exit(0)  # a probe's thread may hang in a frozen PostgreSQL: do not wait for it
