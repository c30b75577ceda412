"""Running PostgreSQL's own programs as PostgreSQL's user, and starting it: by pg_ctl or by systemd.

PostgreSQL enters its own cgroup before it is executed, so that no process of it was ever outside. It
inherits neither our scheduling nor our protection from the OOM killer.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import trio

from harmony_fencer import processes
from harmony_fencer.cgroup import Cgroup
from harmony_fencer.config import FencerConfig
from harmony_fencer.durable import read_small
from harmony_fencer.log import log
from harmony_fencer.realtime import ordinary
from harmony_fencer.watchdog import WatchdogError

LOG = "harmony-postgres.log"
SYSTEMCTL_S = 5.0
KILLED_S = 0.2
WATCH_S = 0.5
SAID = 4000
_TELLING = (
    "logging_collector=off",
    "log_destination=stderr",
    "lc_messages=C",
    "log_min_messages=warning",
    "log_error_verbosity=default",
)
_REASON = re.compile(r"(FATAL|PANIC): .*")


class PostgresError(Exception):
    """PostgreSQL did not do what it was told; the text is for the operator, `said` the program's own."""

    said = ""
    text = ""  # the end of its output, as it is
    reason = (
        ""  # why PostgreSQL does not start, where it said so in English: FATAL or PANIC and what is behind it
    )


def explain(e: Exception) -> str:
    """For the operator; what nobody expected says what it is."""
    expected = isinstance(e, PostgresError | WatchdogError | OSError)
    return (str(e) if expected else f"unexpected: {e!r}")[:500]


def log_size(data: Path) -> int:
    """How long PostgreSQL's own log is; 0: there is none."""
    try:
        return (data / LOG).lstat().st_size
    except OSError:
        return 0


def log_tail(data: Path, since: int = 0) -> str:
    """What PostgreSQL's own log says of its newest start, one line, 300 characters: its last reason, else its end.

    `since`: where what counts begins, in bytes.
    """
    try:
        raw = read_small(data / LOG, 16_000, tail=True)
    except OSError:
        return ""
    if since:
        raw = raw[max(0, len(raw) - max(0, log_size(data) - since)) :]
    lines = raw.decode("utf-8", "replace").rpartition("LOG:  starting PostgreSQL")[2].split("\n")
    for number, line in reversed(list(enumerate(lines))):
        found = _REASON.search(line)
        if found and "the database system is" not in line:
            return " | ".join([found.group(), *lines[number + 1 : number + 3]])[:300].strip(" |")
    return " | ".join(lines)[-300:].strip(" |")


def _tail(fd: int) -> str:
    """The end of what a program has said; its own position in the file is left alone."""
    size = os.fstat(fd).st_size
    return os.pread(fd, SAID, max(0, size - SAID)).decode("utf-8", "replace")


class Programs:
    """Of one data directory."""

    def __init__(self, config: FencerConfig) -> None:
        self._c = config

    def _environment(self) -> dict[str, str]:
        environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LC_ALL": "C",
            # PostgreSQL's documentation, "Linux Memory Overcommit": the postmaster may be protected,
            # its children put themselves back.
            "PG_OOM_ADJUST_FILE": "/proc/self/oom_score_adj",
            "PG_OOM_ADJUST_VALUE": "0",
        }
        if self._c.library_dir:
            environment["LD_LIBRARY_PATH"] = self._c.library_dir
        return environment

    def _as_postgres(self) -> list[str]:
        """A prefix of argv that becomes PostgreSQL's user."""
        ids = self._c.postgres_ids
        if ids is None:
            return []
        groups = ",".join(str(g) for g in ids.groups)
        return ["setpriv", f"--reuid={ids.uid}", f"--regid={ids.gid}", f"--groups={groups}", "--"]

    async def _run(
        self,
        argv: list[str],
        *,
        shown: str,
        timeout_s: float,
        watch: Callable[[str], None] | None = None,
        fds: tuple[int, ...] = (),
        feed: bytes = b"",
        since: int = 0,
    ) -> str:
        """`watch` is given the end of the output now and then, and may raise; `fds` are inherited; `feed` is stdin;
        `since`: where in PostgreSQL's log its reason for a failure begins."""
        # PostgreSQL must not inherit a pipe of ours: pg_ctl's child would keep it open for ever.
        try:
            # In memory: no folder for temporary files must be there, or have room.
            sink = os.fdopen(os.memfd_create("output", os.MFD_CLOEXEC), "w+b")
        except OSError as e:
            raise PostgresError(f"{shown} could not be run: {e}") from e
        with sink, os.fdopen(os.memfd_create("input", os.MFD_CLOEXEC), "w+b") as source:
            source.write(feed)
            source.seek(0)
            try:
                process = await trio.lowlevel.open_process(
                    [*ordinary(), *argv],
                    stdin=source if feed else subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env=self._environment(),
                    cwd="/",
                    start_new_session=True,
                    pass_fds=fds,
                )
            except (OSError, RuntimeError) as e:  # RuntimeError: no thread can be started
                raise PostgresError(f"{shown} could not be run: {e}") from e
            try:
                with trio.fail_after(timeout_s):
                    while process.returncode is None:
                        with trio.move_on_after(WATCH_S if watch is not None else math.inf):
                            await process.wait()
                        if watch is not None:
                            watch(_tail(sink.fileno()))
            except trio.TooSlowError as e:
                raise PostgresError(f"{shown} did not end within {timeout_s:g} s") from e
            finally:
                await self._end(process, shown)
            text = _tail(sink.fileno())
        if process.returncode != 0:
            said, tail = " ".join(text.split())[-400:], log_tail(Path(self._c.data_dir), since)
            error = PostgresError(
                f"{shown} exited {process.returncode}: {said}"
                + (f"; log: {tail}" if tail and not fds else "")
            )
            error.said, error.text = said, text
            error.reason = tail if _REASON.match(tail) else ""
            raise error
        return text

    async def _end(self, process: trio.Process, shown: str) -> None:
        """Cancelled or too slow: killed (that harms nothing; it may be frozen, and SIGTERM wait for ever).

        One that waits for a hung disk cannot be killed now and is not waited for: no fence hangs with it. It
        does nothing more when the disk comes back.
        """
        if process.returncode is not None:
            return
        processes.end_starter(process.pid, self._c.data_dir)
        with trio.CancelScope(shield=True), trio.move_on_after(KILLED_S):
            await process.wait()
            return
        log.error("cannot be killed, is the disk hung? Going on without it", program=shown, pid=process.pid)

    async def run(
        self,
        program: str,
        *arguments: str,
        timeout_s: float,
        watch: Callable[[str], None] | None = None,
        fds: tuple[int, ...] = (),
        feed: bytes = b"",
    ) -> str:
        """The end of stdout and stderr of one of PostgreSQL's programs. Raises PostgresError."""
        argv = [*self._as_postgres(), str(Path(self._c.bin_dir) / program), *arguments]
        shown = f"{program} {' '.join(arguments[:1])}".strip()
        return await self._run(argv, shown=shown, timeout_s=timeout_s, watch=watch, fds=fds, feed=feed)

    async def tool(
        self,
        program: str,
        *arguments: str,
        timeout_s: float,
        watch: Callable[[str], None] | None = None,
        fds: tuple[int, ...] = (),
    ) -> None:
        """One of the host's programs, as PostgreSQL's user. Raises PostgresError."""
        argv, shown = (
            [*self._as_postgres(), program, *arguments],
            arguments[-1] if program == "env" else program,
        )
        await self._run(argv, shown=shown, timeout_s=timeout_s, watch=watch, fds=fds)

    async def start(self, config_file: Path, cgroup: Cgroup | None) -> None:
        """Start and wait until it answers. Raises PostgresError."""
        seconds = max(1, round(self._c.start_timeout_s))
        if self._c.run == "systemd":
            await self.systemctl("reset-failed", check=False)
            await self.systemctl("start", timeout_s=seconds + 5)
            return
        await self._pg_ctl_start(f"-c config_file={_shell(str(config_file))}", cgroup)

    async def ask_why(self, config_file: Path, cgroup: Cgroup | None) -> None:
        """Start what did not start and did not say why: into our log, whatever its settings say, and in English.

        Raises PostgresError with its `reason`. Where it does start, it runs.
        """
        told = " ".join(f"-c {setting}" for setting in _TELLING)
        await self._pg_ctl_start(f"-c config_file={_shell(str(config_file))} {told}", cgroup)

    async def _pg_ctl_start(self, options: str, cgroup: Cgroup | None) -> None:
        seconds = max(1, round(self._c.start_timeout_s))
        data = Path(self._c.data_dir)
        log, since = str(data / LOG), log_size(data)
        argv = [*self._as_postgres(), str(Path(self._c.bin_dir) / "pg_ctl"), "start", "-D", self._c.data_dir]
        argv += ["-w", "-t", str(seconds), "-l", log, "-o", options]
        if cgroup is not None:
            enter = 'echo 0 > "$0" && exec "$@"'
            argv = ["/bin/sh", "-c", enter, str(cgroup.path / "cgroup.procs"), *argv]
        await self._run(argv, shown="pg_ctl start", timeout_s=seconds + 5, since=since)

    async def systemctl(self, verb: str, *, timeout_s: float = SYSTEMCTL_S, check: bool = True) -> None:
        """Ask systemd about PostgreSQL's unit. Raises PostgresError when `check`."""
        argv = ["systemctl", "--no-ask-password", *verb.split(), self._c.unit]
        try:
            await self._run(argv, shown=f"systemctl {verb} {self._c.unit}", timeout_s=timeout_s)
        except PostgresError:
            if check:
                raise


def _shell(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
