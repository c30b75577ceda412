"""harmony-fencer: the privileged process. Started by the supervisor; `--once` is the emergency fence.

Exit codes: 0 asked to stop, 75 another fencer holds the lock, 78 configuration; else restart.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import structlog
import trio

from harmony_fencer import state as states
from harmony_fencer.config import EXIT_CONFIG, FencerConfig, load
from harmony_fencer.fencer import Fencer, emergency
from harmony_fencer.server import bind, serve

EXIT_LOCKED = 75
log = structlog.get_logger("fencer")


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _configure_logging(config: FencerConfig) -> None:
    console = config.log_format == "console" or (config.log_format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    structlog.contextvars.bind_contextvars(process="fencer", node=config.node)


def lock(config: FencerConfig, wait_s: float) -> int | None:
    """Hold run_dir/fencer.lock: at most one fencer per node. None when another kept it for `wait_s`."""
    fd = os.open(Path(config.run_dir) / "fencer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until, told = time.monotonic() + wait_s, False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(fd)
                return None
            if not told:
                told = True
                log.warning("another fencer holds the lock; waiting for its lease to end", at_most_s=wait_s)
            time.sleep(0.05)
        else:
            return fd


async def _supervision(fd: int, fencer: Fencer, done: trio.Event) -> None:
    """Ready, pong and status to the supervisor; its death makes us an orphan guard."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    try:
        await stream.send_all(b"ready fencer\n")
        buffer, told = b"", ""
        async for chunk in stream:
            *lines, buffer = (buffer + chunk)[-4096:].split(b"\n")
            out = b"".join(b"pong " + line[5:40] + b"\n" for line in lines if line.startswith(b"ping "))
            s = fencer.status()
            text = f"postgres {s.postgres}, generation {s.highest}, {'leased' if s.active else 'no lease'}"
            if text != told:
                told = text
                out += b"status " + text.encode("ascii", "replace")[:240] + b"\n"
            await stream.send_all(out)
    except trio.BrokenResourceError:
        pass
    log.error("the supervisor is gone: guarding the lease to its end, taking no more orders")
    fencer.orphaned()
    await fencer.guard_until_over()
    log.warning("nothing here can write any more: ending")
    done.set()


async def run(config: FencerConfig, sock: socket.socket, supervisor_fd: int | None) -> None:
    """Serve until SIGTERM or SIGINT, or, as an orphan, until nothing here can write."""
    fencer = Fencer(config, _utc_now)
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        await fencer.start(nursery)
        nursery.start_soon(serve, config, fencer, sock)
        if supervisor_fd is not None:
            nursery.start_soon(_supervision, supervisor_fd, fencer, done)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

            async def stop() -> None:
                async for number in signals:
                    log.info("asked to stop", signal=signal.Signals(number).name)
                    await fencer.shut_down()
                    done.set()

            nursery.start_soon(stop)
            await done.wait()
        nursery.cancel_scope.cancel()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="harmony-fencer", description=__doc__)
    parser.add_argument("--config", required=True, help="run_dir/fencer.json, as the supervisor wrote it")
    parser.add_argument("--supervisor-fd", type=int, help="the supervisor's socketpair")
    parser.add_argument("--once", metavar="REASON", help="fence now, print the outcome, exit 0 iff proven")
    parser.add_argument("--reset-state", action="store_true", help="begin the state file anew at --term")
    parser.add_argument("--term", type=int, help="the cluster's current term, for --reset-state")
    options = parser.parse_args()
    try:
        config = load(options.config)
    except ValueError as e:
        sys.exit(_fail(str(e), EXIT_CONFIG))
    _configure_logging(config)
    if options.once is not None:
        sys.exit(emergency(config, options.once))
    held = lock(config, 0 if options.reset_state else config.lease_s + config.fence_timeout_s + 2)
    if held is None:
        sys.exit(_fail("another fencer holds the lock; stop Harmony on this node first", EXIT_LOCKED))
    if options.reset_state:
        if options.term is None or options.term < 0:
            sys.exit(_fail("--reset-state needs --term N, the cluster's current term", EXIT_CONFIG))
        kept = states.reset(Path(config.state_dir), options.term)
        sys.stdout.write(f"state begun anew at generation {options.term}.0; the old file: {kept}\n")
        sys.exit(0)
    try:
        sock = bind(config)
    except (ValueError, OSError) as e:
        sys.exit(_fail(str(e), EXIT_CONFIG))
    trio.run(run, config, sock, options.supervisor_fd, strict_exception_groups=True)


def _fail(text: str, code: int) -> int:
    sys.stderr.write(f"harmony-fencer: {text}\n")
    return code
