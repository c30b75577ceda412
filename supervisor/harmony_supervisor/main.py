"""harmony-supervisor: what systemd starts. Resolves the configuration once and starts the two children.

--boot-fence: only make sure that PostgreSQL here cannot start writable (before its own unit, at boot).
Exit codes: 0 asked to stop, 75 another supervisor runs here, 78 configuration, 1 fenced in an emergency.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import pwd
import subprocess
import sys
from pathlib import Path

import structlog
import trio

from harmony_supervisor.child import EXIT_CONFIG, Spec
from harmony_supervisor.notify import Notifier
from harmony_supervisor.supervisor import Settings, Supervisor

EXIT_LOCKED = 75
FENCER_PING_SHARE = 0.1  # of fence_timeout
FENCER_HUNG_SHARE = 0.35
PYTHON = (sys.executable, "-I", "-m")


def _resolve(path: str) -> dict[str, dict[str, object]]:
    """Ask harmony for the resolved configuration. Ends the process with its message when it is wrong."""
    argv = [*PYTHON, "harmony", "config", "resolve", "--config", path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        sys.exit(EXIT_CONFIG if done.returncode == EXIT_CONFIG else 1)
    resolved: dict[str, dict[str, object]] = json.loads(done.stdout)
    return resolved


def _write(path: Path, value: object, mode: int) -> None:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "w") as file:
        json.dump(value, file)
    temporary.chmod(mode)
    temporary.rename(path)


def _configure_logging(form: str, node: str) -> None:
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
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
    structlog.contextvars.bind_contextvars(process="supervisor", node=node)


def _folders(run_dir: Path, state_dir: Path, owner: tuple[int, int] | None) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    run_dir.chmod(0o755)
    state_dir.mkdir(parents=True, exist_ok=True)
    state_dir.chmod(0o700)
    (run_dir / "agent").mkdir(exist_ok=True)
    if owner is not None:
        os.chown(run_dir / "agent", *owner)


def _steady() -> None:
    """Real-time scheduling, for us and (inherited) the fencer, where it is granted; the fencer says where not.

    Whoever must kill a hung fencer in time has to get to run. Priority 5 is below all that the kernel needs.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) not in {os.SCHED_RR, os.SCHED_FIFO}:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(5))


def _lock(run_dir: Path) -> int | None:
    fd = os.open(run_dir / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return fd


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="harmony-supervisor", description=__doc__)
    parser.add_argument("--config", default="/etc/harmony/harmony.toml", help="the TOML file")
    parser.add_argument("--boot-fence", action="store_true", help="fence what could write here, and end")
    options = parser.parse_args()
    notifier = Notifier()
    resolved = _resolve(options.config)
    s = resolved["supervisor"]
    run_dir, state_dir = Path(str(s["run_dir"])), Path(str(s["state_dir"]))
    _configure_logging(str(s["log_format"]), str(s["node"]))
    user = pwd.getpwnam(str(s["agent_user"])) if s["agent_user"] is not None and os.geteuid() == 0 else None
    try:
        _folders(run_dir, state_dir, (user.pw_uid, user.pw_gid) if user is not None else None)
        held = _lock(run_dir) if not options.boot_fence else -1
        if held is None:
            sys.stderr.write(
                f"harmony-supervisor: another one runs here (it holds {run_dir}/supervisor.lock)\n"
            )
            sys.exit(EXIT_LOCKED)
        _write(run_dir / "fencer.json", resolved["fencer"], 0o600)
        _write(run_dir / "agent.json", resolved["agent"], 0o644)
    except OSError as e:
        sys.stderr.write(f"harmony-supervisor: {e}: run_dir and state_dir must be writable for this user\n")
        sys.exit(EXIT_CONFIG)
    fencer_argv = [*PYTHON, "harmony_fencer", "--config", str(run_dir / "fencer.json")]
    if options.boot_fence:
        os.execv(fencer_argv[0], [*fencer_argv, "--if-unguarded", "boot"])  # noqa: S606
    _steady()
    fence_timeout_s = float(str(s["fence_timeout_s"]))
    lease_s = float(str(resolved["fencer"]["lease_s"]))
    fencer = Spec(
        "fencer",
        fencer_argv,
        # A fencer that hangs at its lease's end is replaced, and the new one has fenced, within fence_timeout.
        ping_interval_s=fence_timeout_s * FENCER_PING_SHARE,
        ping_timeout_s=fence_timeout_s * FENCER_HUNG_SHARE,
        steady=True,
        ready_timeout_s=30.0 + lease_s + fence_timeout_s,
    )
    agent = Spec(
        "agent",
        [*PYTHON, "harmony.agent", "--resolved", str(run_dir / "agent.json")],
        ping_interval_s=float(str(s["ping_interval_s"])),
        ping_timeout_s=float(str(s["ping_timeout_s"])),
        uid=user.pw_uid if user is not None else None,
        gid=user.pw_gid if user is not None else None,
        groups=tuple(os.getgrouplist(user.pw_name, user.pw_gid)) if user is not None else (),
        die_with_us=True,
    )
    settings = Settings(node=str(s["node"]), fence_timeout_s=fence_timeout_s, lease_s=lease_s)

    async def run() -> int:
        return await Supervisor(settings, fencer, agent, [*fencer_argv, "--once"], notifier).run()

    sys.exit(trio.run(run, strict_exception_groups=True))
