"""The two children's specifications, the log, and the supervisor's run. Reads no file and decides nothing."""

from __future__ import annotations

import logging
import os
import pwd
import sys
from collections.abc import Sequence

import structlog
import trio

from harmony_supervisor.child import Spec
from harmony_supervisor.notify import Notifier
from harmony_supervisor.supervisor import Settings, Supervisor

FENCER_HUNG_SHARE = 0.35  # of fence_timeout; in the rest the next fencer starts, and fences
FENCER_HUNG_LEAST_S = 0.25  # a healthy fencer may not get to run for so long: no shorter one is a hang
FENCER_PING_SHARE = 0.515  # of that: the second look after a hang comes just past it
log = structlog.get_logger("supervisor")


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


def fencer_pings(fence_timeout_s: float) -> tuple[float, float]:
    """Seconds (between pings of the fencer, without an answer until it is replaced)."""
    hung_s = max(FENCER_HUNG_LEAST_S, FENCER_HUNG_SHARE * fence_timeout_s)
    return FENCER_PING_SHARE * hung_s, hung_s


def run(
    resolved: dict[str, dict[str, object]],
    fencer_argv: Sequence[str],
    agent_argv: Sequence[str],
    user: pwd.struct_passwd | None,
    notifier: Notifier,
) -> int:
    """Until asked to stop, or until going on would be wrong; the exit code. `user`: the agent's, if not ours."""
    s = resolved["supervisor"]
    _configure_logging(str(s["log_format"]), str(s["node"]))
    if user is None and os.geteuid() == 0:
        log.warning(
            "the agent runs as root", what_to_do="name an unprivileged user in agent.user; it needs no more"
        )
    fence_timeout_s = float(str(s["fence_timeout_s"]))
    lease_s = float(str(resolved["fencer"]["lease_s"]))
    fencer_ping_s, fencer_hung_s = fencer_pings(fence_timeout_s)
    fencer = Spec(
        "fencer",
        fencer_argv,
        # A fencer that hangs at its lease's end is replaced, and the new one has fenced, within fence_timeout.
        ping_interval_s=fencer_ping_s,
        ping_timeout_s=fencer_hung_s,
        steady=True,
        ready_timeout_s=30.0 + lease_s + fence_timeout_s,  # an orphan may guard its lease to the end first
        again_timeout_s=fence_timeout_s + 2.0,
    )
    agent = Spec(
        "agent",
        agent_argv,
        ping_interval_s=float(str(s["ping_interval_s"])),
        ping_timeout_s=float(str(s["ping_timeout_s"])),
        uid=user.pw_uid if user is not None else None,
        gid=user.pw_gid if user is not None else None,
        groups=tuple(os.getgrouplist(user.pw_name, user.pw_gid)) if user is not None else (),
        die_with_us=True,
    )
    settings = Settings(node=str(s["node"]), fence_timeout_s=fence_timeout_s, lease_s=lease_s)
    supervisor = Supervisor(settings, fencer, agent, [*fencer_argv, "--once"], notifier)
    return trio.run(supervisor.run, strict_exception_groups=True)
