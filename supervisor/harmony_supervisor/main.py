"""harmony-supervisor: what systemd starts. Resolves the configuration once and starts the two children.

--boot-fence: only make sure that PostgreSQL here cannot start writable (before its own unit, at boot).
Exit codes: 0 asked to stop, 75 another supervisor runs here, 78 configuration, 1 fenced in an emergency.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

from harmony_supervisor.notify import Notifier
from harmony_supervisor.ownership import give

EXIT_CONFIG = 78
EXIT_LOCKED = 75
RESOLVE_S = 60.0
PYTHON = (sys.executable, "-I", "-m")


def _resolving(path: str) -> subprocess.Popen[str]:
    """Ask harmony for the resolved configuration; the answer is for _resolved()."""
    argv = [*PYTHON, "harmony", "config", "resolve", "--config", path]
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _resolved(process: subprocess.Popen[str]) -> dict[str, dict[str, object]]:
    """The answer. Ends the process with harmony's message when the configuration is wrong."""
    try:
        out, err = process.communicate(timeout=RESOLVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        sys.stderr.write(f"harmony-supervisor: the configuration was not resolved within {RESOLVE_S:g} s\n")
        sys.exit(1)
    sys.stderr.write(err)  # warnings, too
    if process.returncode != 0:
        sys.exit(EXIT_CONFIG if process.returncode == EXIT_CONFIG else 1)
    resolved: dict[str, dict[str, object]] = json.loads(out)
    return resolved


def _write(path: Path, value: object, mode: int) -> None:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "w") as file:
        json.dump(value, file)
    temporary.chmod(mode)
    temporary.rename(path)


def _owner(user: pwd.struct_passwd | None) -> tuple[int, int] | None:
    """Whose the agent's folders are. None: ours, as only root can give them away."""
    if os.geteuid() != 0:
        return None
    return (user.pw_uid, user.pw_gid) if user is not None else (0, 0)


def _folders(run_dir: Path, state_dir: Path, owner: tuple[int, int] | None) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    run_dir.chmod(0o755)
    state_dir.mkdir(parents=True, exist_ok=True)
    state_dir.chmod(0o711)  # the agent's folder is in it; what else is there is its owner's alone
    (run_dir / "agent").mkdir(exist_ok=True)
    (state_dir / "agent").mkdir(mode=0o700, exist_ok=True)
    if owner is not None:
        give(run_dir / "agent", *owner)
        give(state_dir / "agent", *owner)


def _steady() -> None:
    """Real-time scheduling, for us and (inherited) the fencer, where it is granted; the fencer says where not.

    Whoever must kill a hung fencer in time has to get to run, and from the first line on: a supervisor that
    replaces a dead one has only what is left of the lease. Priority 5 is below all that the kernel needs.
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
    if not options.boot_fence:
        _steady()
    resolving = _resolving(options.config)
    if not options.boot_fence:
        # Takes as long as resolving does: both at once. After a restart the lease is running out.
        import harmony_supervisor.running  # noqa: PLC0415
    resolved = _resolved(resolving)
    s = resolved["supervisor"]
    run_dir, state_dir = Path(str(s["run_dir"])), Path(str(s["state_dir"]))
    user = pwd.getpwnam(str(s["agent_user"])) if s["agent_user"] is not None and os.geteuid() == 0 else None
    try:
        _folders(run_dir, state_dir, _owner(user))
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
    agent_argv = [*PYTHON, "harmony.agent", "--resolved", str(run_dir / "agent.json")]
    if options.boot_fence:
        os.execv(fencer_argv[0], [*fencer_argv, "--if-unguarded", "boot"])  # noqa: S606
    sys.exit(harmony_supervisor.running.run(resolved, fencer_argv, agent_argv, user, notifier))
