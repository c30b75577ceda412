"""Starting, promoting and configuring PostgreSQL as its own user; never as root, never by SQL.

It is configured through data_dir/harmony.postgresql.conf, which includes the user's postgresql.conf and
then sets what Harmony must own. The user's files are not touched. It decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import trio

from harmony_fencer import processes
from harmony_fencer.config import FencerConfig
from harmony_fencer.protocol import SyncRule
from harmony_fencer.state import sync_folder

CONF = "harmony.postgresql.conf"
LOG = "harmony-postgres.log"
_OURS = re.compile(r"^\s*(primary_conninfo|synchronous_standby_names)\s*=", re.MULTILINE)
_WAL = re.compile(r"[0-9A-F]{24}\Z")


class PostgresError(Exception):
    """PostgreSQL did not do what it was told; the text is for the operator."""


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _conninfo(fields: dict[str, str]) -> str:
    return " ".join(
        f"{key}='{value.replace(chr(92), chr(92) * 2).replace(chr(39), chr(92) + chr(39))}'"
        for key, value in fields.items()
    )


class Postgres:
    """The PostgreSQL of one data directory."""

    def __init__(self, config: FencerConfig) -> None:
        self._c = config
        self.data = Path(config.data_dir)
        self._system_identifier: str | None = None

    # ------------------------------------------------------------ looking

    def pids(self) -> list[int]:
        """Live processes of the data directory."""
        return processes.of_data_dir(self._c.data_dir)

    def postmaster(self) -> int | None:
        """The live postmaster."""
        return processes.postmaster(self._c.data_dir)

    def initialised(self) -> bool:
        return (self.data / "PG_VERSION").exists()

    def is_standby(self) -> bool:
        """Marked so that whoever starts it gets a read-only standby."""
        return (self.data / "standby.signal").exists()

    async def system_identifier(self) -> str | None:
        """From pg_controldata, once read for good."""
        if self._system_identifier is None and self.initialised():
            with contextlib.suppress(PostgresError):
                out = await self._run("pg_controldata", "-D", self._c.data_dir, timeout_s=5)
                found = re.search(r"system identifier:\s*(\d+)", out)
                self._system_identifier = found.group(1) if found else None
        return self._system_identifier

    async def control_state(self) -> str:
        """pg_controldata's cluster state, such as 'in production'."""
        out = await self._run("pg_controldata", "-D", self._c.data_dir, timeout_s=5)
        found = re.search(r"cluster state:\s*(.+)", out)
        return found.group(1).strip() if found else ""

    def timeline(self) -> int:
        """The newest timeline that has WAL here."""
        names = [n for n in os.listdir(self.data / "pg_wal") if _WAL.match(n)]
        return max((int(n[:8], 16) for n in names), default=0)

    def log_tail(self) -> str:
        """The end of PostgreSQL's own log, one line, 300 characters."""
        try:
            raw = (self.data / LOG).read_bytes()[-2000:]
        except OSError:
            return ""
        return " | ".join(raw.decode("utf-8", "replace").split("\n"))[-300:].strip(" |")

    # ------------------------------------------------------------ files

    def _write(self, name: str, text: str) -> None:
        temporary = self.data / (name + ".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, text.encode())
            if os.geteuid() == 0:
                os.fchown(fd, *self._c.postgres_ids)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(self.data / name)
        sync_folder(self.data)

    def mark_standby(self) -> None:
        """Create standby.signal, durable: the next start, whoever starts it, gives a standby."""
        if self.initialised() and not self.is_standby():
            self._write("standby.signal", "")

    def configure(self, primary: str | None, sync: SyncRule) -> None:
        """Write what Harmony owns. Raises PostgresError where the user's files would override it."""
        if not (self.data / "postgresql.conf").exists():
            raise PostgresError(
                f"{self.data}/postgresql.conf is missing (a separate config folder is not supported yet)"
            )
        auto = self.data / "postgresql.auto.conf"
        clash = _OURS.search(auto.read_text()) if auto.exists() else None
        if clash is not None:
            raise PostgresError(
                f"{auto} sets {clash.group(1)}, which would override Harmony: "
                f"ALTER SYSTEM RESET {clash.group(1)}, or delete that line while PostgreSQL is down"
            )
        conninfo = ""
        if primary is not None:
            address = self._c.members[primary]
            fields = {
                "host": address.host,
                "port": str(address.port),
                "user": self._c.replication_user,
                "application_name": self._c.node,
                "connect_timeout": "2",
                "keepalives_idle": "2",
                "keepalives_interval": "1",
                "keepalives_count": "3",
            }
            if self._c.replication_passfile:
                fields["passfile"] = self._c.replication_passfile
            conninfo = _conninfo(fields)
        names = ""
        if sync.count > 0 and sync.voters:
            names = f"ANY {sync.count} ({', '.join(chr(34) + v + chr(34) for v in sync.voters)})"
        settings = {
            "port": str(self._c.port),
            "listen_addresses": self._c.listen_addresses,
            "unix_socket_directories": self._c.socket_dir,
            "hot_standby": "on",
            "wal_log_hints": "on",
            "recovery_target_timeline": "latest",
            "primary_conninfo": conninfo,
            "synchronous_standby_names": names,
        }
        lines = [
            "# Written by Harmony's fencer at every order; changes here are lost. Yours go into postgresql.conf."
        ]
        lines.append("include 'postgresql.conf'")
        lines += [f"{key} = {_quote(value)}" for key, value in settings.items()]
        self._write(CONF, "\n".join(lines) + "\n")

    # ------------------------------------------------------------ acting

    async def _run(self, program: str, *arguments: str, timeout_s: float) -> str:
        """Run one of PostgreSQL's programs as PostgreSQL's user; stdout+stderr, or PostgresError."""
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}
        if self._c.library_dir:
            environment["LD_LIBRARY_PATH"] = self._c.library_dir
        uid, gid = self._c.postgres_ids
        root = os.geteuid() == 0
        name = self._c.postgres_user
        extra = os.getgrouplist(name, gid) if root and name is not None else ([] if root else None)
        # PostgreSQL must not inherit a pipe of ours: pg_ctl's child would keep it open for ever.
        with tempfile.TemporaryFile() as sink:
            try:
                with trio.fail_after(timeout_s):
                    done = await trio.run_process(
                        [str(Path(self._c.bin_dir) / program), *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=sink,
                        stderr=sink,
                        env=environment,
                        cwd="/",
                        check=False,
                        start_new_session=True,
                        user=uid if root else None,
                        group=gid if root else None,
                        extra_groups=extra,
                    )
            except trio.TooSlowError as e:
                raise PostgresError(f"{program} did not end within {timeout_s:g} s") from e
            except OSError as e:
                raise PostgresError(f"{program} could not be run: {e}") from e
            sink.seek(0)
            text = sink.read()[-4000:].decode("utf-8", "replace")
        if done.returncode != 0:
            raise PostgresError(
                f"{program} {' '.join(arguments[:1])} exited {done.returncode}: "
                f"{' '.join(text.split())[-200:]}; log: {self.log_tail()}"
            )
        return text

    async def start(self) -> None:
        """Start as a standby and wait until it answers. Raises PostgresError."""
        await trio.to_thread.run_sync(self.mark_standby, abandon_on_cancel=True)
        log = self.data / LOG
        seconds = max(1, round(self._c.start_timeout_s))
        await self._run(
            "pg_ctl",
            "start",
            "-D",
            self._c.data_dir,
            "-w",
            "-t",
            str(seconds),
            "-l",
            str(log),
            "-o",
            f"-c config_file={_shell(str(self.data / CONF))}",
            timeout_s=seconds + 5,
        )

    async def reload(self) -> None:
        """Make it read its configuration again."""
        await self._run("pg_ctl", "reload", "-D", self._c.data_dir, timeout_s=5)

    async def promote(self) -> None:
        """Promote and wait until the control file says 'in production'. Raises PostgresError."""
        seconds = max(1, round(self._c.start_timeout_s))
        await self._run(
            "pg_ctl", "promote", "-D", self._c.data_dir, "-w", "-t", str(seconds), timeout_s=seconds + 5
        )
        state = await self.control_state()
        if state != "in production" or self.is_standby():
            raise PostgresError(f"after promotion the control file says {state!r}")


def _shell(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
