"""harmony-fencer: the privileged process. Started by the supervisor; the other modes are for emergencies.

--once REASON: fence now, beside whatever fencer there is. --if-unguarded REASON: fence what could write when
no fencer guards it (after all of Harmony has died, and at boot). --check-adoption, --permit-adoption WHO,
--withdraw-adoption: for harmonyctl adopt. Exit codes: 0 asked to stop, or proven;
1 not proven; 75 another fencer holds the lock; 78 configuration; else restart.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec
import trio

from harmony_fencer import adopt, guard
from harmony_fencer import lease as leases
from harmony_fencer import state as states
from harmony_fencer.clock import BootClock, boot_id, boot_ns
from harmony_fencer.config import EXIT_CONFIG, FencerConfig, load
from harmony_fencer.engine import Outcome, Parts
from harmony_fencer.fencer import Fencer
from harmony_fencer.ledger import Ledger, load_state
from harmony_fencer.log import log, wants_console
from harmony_fencer.postgres import Postgres
from harmony_fencer.protocol import Generation, Latch
from harmony_fencer.realtime import on_a_disk, steady
from harmony_fencer.server import bind, serve
from harmony_fencer.watchdog import Device

EXIT_LOCKED = 75
PETS = 4  # in one watchdog timeout
LOCK_POLL_S = 0.01
PATIENCE_SHARE = 0.3  # of fence_timeout: an orphan that has not begun to fence by then hangs


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------- one fencer per node


def _flock(config: FencerConfig, name: str) -> int | None:
    fd = os.open(Path(config.run_dir) / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def lock(config: FencerConfig, patience_s: float) -> int | None:
    """Hold run_dir/fencer.lock: at most one fencer per node. None when another keeps it.

    Waits until the lease in force, as its holder renews it, is over, and `patience_s` more. While waiting
    fencer.next is held: an orphaned fencer sees by it that a successor is there, and goes at once.
    """
    successor: int | None = None
    until: float | None = None
    while True:
        fd = _flock(config, "fencer.lock")
        over = until is not None and time.monotonic() >= until
        if fd is not None or patience_s <= 0 or over:
            if successor is not None:
                os.close(successor)
            if fd is not None:
                os.pwrite(fd, b"%-10d\n" % os.getpid(), 0)
            return fd
        if successor is None:
            successor = _flock(config, "fencer.next")
            log.warning("another fencer holds the lock; waiting for it to end")
        if _lease_left(config):
            until = None
        elif until is None:
            until = time.monotonic() + patience_s
        time.sleep(LOCK_POLL_S)


def _lease_left(config: FencerConfig) -> bool:
    path = Path(config.run_dir) / leases.NAME
    return leases.load(path, boot_id=boot_id(), now_ns=boot_ns(), lease_ns=config.lease_ns) is not None


def end_hung_orphan(config: FencerConfig) -> None:
    """SIGKILL the fencer that kept the lock past its lease, if it is an orphan: it hangs, or it would have gone."""
    try:
        pid = int((Path(config.run_dir) / "fencer.lock").read_bytes().split()[0])
        fd = os.pidfd_open(pid)
    except (OSError, ValueError, IndexError):
        return
    try:
        if _is_ours(pid, b"harmony_fencer") and not _is_ours(_parent(pid), b"harmony_supervisor"):
            log.error("killing an orphaned fencer that hangs", pid=pid)
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except OSError:
        return
    finally:
        os.close(fd)


def _is_ours(pid: int, module: bytes) -> bool:
    """Started as `-m module`, or by its script harmony-fencer, harmony-supervisor."""
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return any(os.path.basename(a).replace(b"-", b"_") == module for a in argv)  # noqa: PTH119 (bytes)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _successor_waits(config: FencerConfig) -> bool:
    try:
        fd = _flock(config, "fencer.next")
    except OSError:  # no descriptor or no room is left: the lease is guarded all the same
        return False
    if fd is not None:
        os.close(fd)
    return fd is None


async def _as_orphan(config: FencerConfig, fencer: Fencer) -> None:
    """Returns when nothing here can write any more, or a new supervisor's fencer waits to carry on."""
    log.error("the supervisor is gone: guarding the lease to its end, taking no more orders")
    fencer.orphaned()
    while not fencer.idle:
        if not fencer.engaged and _successor_waits(config):
            log.warning("a new fencer is here: it carries on under the lease; ending")
            return
        await trio.sleep(LOCK_POLL_S)
    log.warning("nothing here can write any more: ending")


# ---------------------------------------------------------------- the process


async def _supervision(fd: int, config: FencerConfig, fencer: Fencer, done: trio.Event) -> None:
    """Ready, pong and status to the supervisor; its death makes us an orphan."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    try:
        await stream.send_all(b"ready fencer\n")
        buffer, told = b"", ""
        async for chunk in stream:
            *lines, buffer = (buffer + chunk)[-4096:].split(b"\n")
            out = b"".join(b"pong " + line[5:40] + b"\n" for line in lines if line.startswith(b"ping "))
            text = fencer.brief()
            if text != told:
                told = text
                out += b"status " + text.encode("ascii", "replace")[:240] + b"\n"
            await stream.send_all(out)
    except trio.BrokenResourceError:
        pass
    await _as_orphan(config, fencer)
    done.set()


async def run(config: FencerConfig, sock: socket.socket, supervisor_fd: int | None) -> None:
    """Serve until SIGTERM or SIGINT, or, as an orphan, until nothing here can write."""
    clock, postgres = BootClock(), Postgres(config)
    watchdog = Device(config.watchdog_device) if config.watchdog_mode != "off" else None
    fencer = Fencer(config, Parts(postgres, clock, boot_id(), _utc_now, watchdog))
    done = trio.Event()
    async with trio.open_nursery() as nursery:
        # The guard before anything that may wait for a disk.
        nursery.start_soon(guard.guard, fencer, clock)
        nursery.start_soon(guard.pet, fencer, clock, config.watchdog_timeout_s / PETS)
        await fencer.start(nursery)
        nursery.start_soon(guard.watch, fencer)
        nursery.start_soon(serve, config, fencer, sock)
        log.info("serving", held_by=postgres.where)
        if supervisor_fd is not None:
            nursery.start_soon(_supervision, supervisor_fd, config, fencer, done)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

            async def stop() -> None:
                async for number in signals:
                    log.info("asked to stop", signal=signal.Signals(number).name)
                    await fencer.shut_down()
                    done.set()

            nursery.start_soon(stop)
            await done.wait()
        nursery.cancel_scope.cancel()
    postgres.tree.remove()


def _to_be_adopted(config: FencerConfig, postgres: Postgres) -> Outcome | None:
    """Said in place of a fence, where an operator's permit covers what runs."""
    if adopt.load(Path(config.run_dir)) is None:
        return None  # nearly always: and no disk was waited for
    if not Ledger(config, boot_id()).permits(postgres):
        return None
    return Outcome(True, "PostgreSQL is to be adopted: it runs on, unguarded, as before", (), 0.0)


def adoption(config: FencerConfig, who: str | None) -> int:
    """What speaks against adopting what runs here, as JSON; where nothing does, and with `who`, permit it."""
    postgres, folder = Postgres(config, lasting=False), Path(config.run_dir)
    found = {"problems": (problems := list[str]()), "system_identifier": "", "held_by": ""}
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        Path(config.state_dir).mkdir(mode=0o711, parents=True, exist_ok=True)
        if (fd := lock(config, 0)) is None:
            problems.append("Harmony runs here already: stop it first (it would have fenced this PostgreSQL)")
        ledger = Ledger(config, boot_id())
        if ledger.untrusted or ledger.state.highest != Generation(0, 0):
            highest = f"this node's fencer has accepted generation {ledger.state.highest}: it is no new node"
            problems.append(
                ledger.untrusted or f"{highest}; {config.state_dir} of another cluster? Move it away"
            )
        if ledger.latched:
            problems.append("an operator's fence latches this node: harmonyctl unfence")
        if why := postgres.not_adoptable():
            problems.append(why)
        else:
            found["system_identifier"] = adopt.system_identifier(postgres.data)
            found["held_by"] = adopt.unit_of(pid := postgres.postmaster() or 0)
            if who is not None and not problems:
                adopt.grant(folder, adopt.Permit(boot_ns(), pid, adopt.started(pid), who[:500], _utc_now()))
        if fd is not None:
            os.close(fd)
    except OSError as e:
        problems.append(str(e))
    sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    return 1 if problems else 0


def _report(reason: str, outcome: Outcome) -> int:
    report = {"reason": reason, "proven": outcome.proven, "detail": outcome.detail, "rungs": outcome.rungs}
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    return 0 if outcome.proven else 1


def emergency(config: FencerConfig, reason: str, who: str | None) -> int:
    """Fence now, beside whatever fencer there is; with `who`, latched. Exit code 0 when proven, else 1."""
    postgres = Postgres(config, lasting=False)
    if who is None and (spared := _to_be_adopted(config, postgres)) is not None:
        return _report(reason, spared)
    postgres.halt()
    reason = reason.encode("utf-8", "replace").decode()
    if who is not None:
        try:
            who = who.encode("utf-8", "replace").decode()
            states.set_latch(Path(config.state_dir), Latch(reason[:500], who[:500], _utc_now()))
        except Exception as e:  # noqa: BLE001 (no latch must not mean no fence)
            sys.stderr.write(f"harmony-fencer: the latch could not be set: {e}\n")

    async def stop() -> Outcome:
        with contextlib.suppress(OSError):  # it ends by itself
            leases.clear(Path(config.run_dir) / leases.NAME)
        return await postgres.stop()

    return _report(reason, trio.run(stop))


def fence_what_could_write(config: FencerConfig, reason: str) -> int:
    """Beside nobody who guards: fence what could write, and mark what is down. A standby is left running."""
    postgres = Postgres(config, lasting=False)
    if (spared := _to_be_adopted(config, postgres)) is not None:
        return _report(reason, spared)
    state, untrusted = load_state(config)
    activated = state.order is not None and (state.order.op == "activate" or state.order.state != "done")
    could_write = bool(untrusted) or activated or postgres.could_write()
    if could_write:
        postgres.halt()

    async def look() -> Outcome:
        if not postgres.pids():
            await postgres.mark_standby()
            return Outcome(True, "PostgreSQL is down; whoever starts it gets a standby", (), 0.0)
        if could_write or postgres.postmaster() is None or await postgres.in_production():
            return await postgres.stop()
        return Outcome(True, "a standby runs: it is left running", (), 0.0)

    return _report(reason, trio.run(look))


def if_unguarded(config: FencerConfig, reason: str) -> int:
    """fence_what_could_write(), unless a fencer lives."""
    if lock(config, 0) is None:
        sys.stdout.write("a fencer is there: it guards the lease\n")
        return 0
    return fence_what_could_write(config, reason)


def _reset(config: FencerConfig, term: int | None) -> int:
    if term is None or term < 0:
        return _fail("--reset-state needs --term N, the cluster's current term", EXIT_CONFIG)
    places = (Path(config.run_dir) / states.WITNESS, Path(config.data_dir) / states.WITNESS)
    begin = Generation(term, 0)
    for place in places:
        seen = states.witness(place, config.node)
        if seen is not None and seen.highest.term > term:
            text = f"--term {term} is below the term {seen.highest.term} that {place} shows"
            return _fail(f"{text}: give the cluster's, or move that file away", EXIT_CONFIG)
        if seen is not None:
            begin = max(begin, seen.highest)  # else orders of this term could be accepted a second time
    kept = states.reset(Path(config.state_dir), begin)
    sys.stdout.write(f"state begun anew at generation {begin}; the old file: {kept}\n")
    return 0


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="harmony-fencer", description=__doc__)
    parser.add_argument("--config", required=True, help="run_dir/fencer.json, as the supervisor wrote it")
    parser.add_argument("--supervisor-fd", type=int, help="the supervisor's socketpair")
    parser.add_argument("--once", metavar="REASON", help="fence now, print the outcome, exit 0 iff proven")
    parser.add_argument("--latch", metavar="WHO", help="with --once: and latch the node, as an operator")
    parser.add_argument("--if-unguarded", metavar="REASON", help="fence what could write and nobody guards")
    parser.add_argument("--reset-state", action="store_true", help="begin the state file anew at --term")
    parser.add_argument("--term", type=int, help="the cluster's current term, for --reset-state")
    parser.add_argument("--check-adoption", action="store_true", help="what speaks against it, as JSON")
    parser.add_argument("--permit-adoption", metavar="WHO", help="and where nothing does, permit it")
    parser.add_argument("--withdraw-adoption", action="store_true", help="take the permit back")
    options = parser.parse_args()
    try:
        config = load(options.config)
    except ValueError as e:
        sys.exit(_fail(str(e), EXIT_CONFIG))
    except OSError as e:
        sys.exit(_fail(str(e), 1))
    log.configure(console=wants_console(config.log_format), process="fencer", node=config.node)
    missing = steady()
    _all_descriptors()
    try:
        if options.once is not None:
            code = emergency(config, options.once, options.latch)
        elif options.if_unguarded is not None:
            code = if_unguarded(config, options.if_unguarded)
        elif options.check_adoption or options.permit_adoption is not None:
            code = adoption(config, options.permit_adoption)
        elif options.withdraw_adoption:
            adopt.withdraw(Path(config.run_dir))
            code = 0
        else:
            code = _serve(config, options, missing + on_a_disk(Path(config.run_dir)))
    except BaseException as e:
        log.critical("ended by an error", error=repr(e))
        raise
    finally:
        log.flush()
    sys.exit(code)


def _all_descriptors() -> None:
    """As many as we may: a root shell has 1,024, a big host's PostgreSQL more processes than that."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(config: FencerConfig, options: argparse.Namespace, missing: list[str]) -> int:
    if missing:
        log.warning("not granted; a busy host may delay a fence", missing=missing)
    held = lock(config, 0 if options.reset_state else config.fence_timeout_s * PATIENCE_SHARE)
    if held is None and not options.reset_state:
        fence_what_could_write(config, "another fencer holds the lock, and its lease is over")
        end_hung_orphan(config)
    if held is None:
        return _fail("another fencer holds the lock; stop Harmony on this node first", EXIT_LOCKED)
    if options.reset_state:
        return _reset(config, options.term)
    try:
        sock = bind(config)
    except ValueError as e:
        return _fail(str(e), EXIT_CONFIG)
    except OSError as e:  # no descriptor, memory or room is left: a restart may help, and it fences first
        return _fail(f"the socket cannot be made: {e}", 1)
    trio.run(run, config, sock, options.supervisor_fd, strict_exception_groups=True)
    return 0


def _fail(text: str, code: int) -> int:
    sys.stderr.write(f"harmony-fencer: {text}\n")
    return code
