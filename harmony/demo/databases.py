"""Makes the demo nodes' databases: one initdb, roles and tables, and cold copies as standbys; and what is to be done
before they are removed.

It leaves nothing running: from here on only the fencers start PostgreSQL.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psycopg

from harmony.demo.parts import Parts, Postgres, SetupError, run_as

HOST = "127.0.0.1"
PROGRAM_TIMEOUT_S = 60.0
SETTINGS = """
# --- Harmony demo ---
wal_level = replica
wal_log_hints = on
max_wal_senders = 10
max_replication_slots = 10
wal_keep_size = '256MB'
hot_standby = on
fsync = on
max_connections = 50
shared_buffers = '32MB'
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{socket_dir}'
"""
CONTENT = """
CREATE ROLE harmony LOGIN REPLICATION;
GRANT pg_monitor TO harmony;
DO $$BEGIN
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'pg_checkpoint') THEN GRANT pg_checkpoint TO harmony; END IF;
END$$;
CREATE ROLE replicator LOGIN REPLICATION;
GRANT EXECUTE ON FUNCTION pg_ls_dir(text, boolean, boolean) TO replicator;
GRANT EXECUTE ON FUNCTION pg_stat_file(text, boolean) TO replicator;
GRANT EXECUTE ON FUNCTION pg_read_binary_file(text) TO replicator;
GRANT EXECUTE ON FUNCTION pg_read_binary_file(text, bigint, bigint, boolean) TO replicator;
CREATE ROLE app LOGIN;
CREATE TABLE harmony_demo (id bigint PRIMARY KEY, port int DEFAULT inet_server_port(),
                           written timestamptz DEFAULT clock_timestamp());
CREATE TABLE harmony_demo_probe (id bigint, port int DEFAULT inet_server_port());
GRANT SELECT, INSERT ON harmony_demo, harmony_demo_probe TO app;
"""


@dataclass(frozen=True)
class Node:
    """A node's name, its folder under the demo's directory and its PostgreSQL's port."""

    name: str
    folder: Path
    port: int

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def socket_dir(self) -> Path:
        return self.folder / "sock"

    @property
    def config(self) -> Path:
        return self.folder / "harmony.toml"

    @property
    def admin_socket(self) -> Path:
        return self.folder / "run" / "agent" / "agent.sock"


def _program(parts: Parts, name: str, *arguments: str) -> None:
    pg = parts.postgres
    argv = [str(pg.bin_dir / name), *arguments]
    try:
        done = run_as(parts.users.postgres, argv, pg.library_dir, timeout_s=PROGRAM_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"{name} did not run: {error}") from error
    if done.returncode != 0:
        raise SetupError(f"{name} failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-1000:]}")


def make_databases(parts: Parts, nodes: list[Node], template: Path | None = None) -> None:
    """n1's database with roles and tables, and a cold copy of it as a standby for each other node.

    `template`: where a copy of n1's is kept, and taken from the next time. Raises SetupError with what the failing
    program said.
    """
    user = parts.users.postgres
    for node in nodes:
        node.data_dir.mkdir(mode=0o700)
        if user is not None:
            shutil.chown(node.data_dir, user, pwd.getpwnam(user).pw_gid)
    if template is not None and template.exists():
        plain = (template / "postgresql.conf").read_text()
        _copy(parts, template, nodes[0], plain, standby=False)
    else:
        plain = _make(parts, nodes[0])
        if template is not None:
            shutil.copytree(nodes[0].data_dir, template, symlinks=True)
            (template / "postgresql.conf").write_text(plain)
    for node in nodes[1:]:
        _copy(parts, nodes[0].data_dir, node, plain, standby=True)


def give_back_memory(postgres: Postgres, user: str | None, data: Path) -> None:
    """Before a data directory is removed: have PostgreSQL remove the shared memory that it left when it was killed.

    A start in the same directory does so (System V's segment, of which Linux has 4,096 in all, and what is in
    /dev/shm); nothing else ever would. Only where no PostgreSQL runs in it. Never raises.
    """
    if not (data / "PG_VERSION").exists():
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        (data / "postmaster.pid").unlink(missing_ok=True)  # its pid may be another program's by now
        # No server without a postmaster is a standby: it ends before it recovers or writes anything.
        (data / "standby.signal").touch()
        argv = [f"{postgres.bin_dir}/postgres", "--single", "-D", str(data), "postgres"]
        run_as(user, argv, postgres.library_dir, PROGRAM_TIMEOUT_S)


def _make(parts: Parts, first: Node) -> str:
    """By initdb; the postgresql.conf that it has written."""
    user, data = parts.users.postgres, str(first.data_dir)
    _program(
        parts, "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-k", "-N"
    )
    plain = (first.data_dir / "postgresql.conf").read_text()
    _configure(first, plain)
    log = str(first.data_dir / "first-start.log")
    _program(parts, "pg_ctl", "-D", data, "-w", "-l", log, "-o", "-c listen_addresses=''", "start")
    try:
        with psycopg.connect(
            f"host={first.socket_dir} port={first.port} user=postgres dbname=postgres connect_timeout=10",
            autocommit=True,
        ) as connection:
            connection.execute(CONTENT)
            me = user or pwd.getpwuid(os.geteuid()).pw_name
            if me not in {"postgres", "harmony", "replicator", "app"}:
                quoted = '"' + me.replace('"', '""') + '"'
                connection.execute(f"CREATE ROLE {quoted} LOGIN SUPERUSER".encode())
    except psycopg.Error as error:
        raise SetupError(f"n1 could not be given its roles and tables: {error}") from error
    finally:
        _program(parts, "pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
    return plain


def _copy(parts: Parts, source: Path, node: Node, plain: str, *, standby: bool) -> None:
    shutil.copytree(source, node.data_dir, symlinks=True, dirs_exist_ok=True)
    if standby:
        (node.data_dir / "standby.signal").touch(mode=0o600)
    _configure(node, plain)
    _give(parts, node.data_dir)


def _configure(node: Node, plain: str) -> None:
    # Written in place: the file keeps PostgreSQL's owner and mode.
    (node.data_dir / "postgresql.conf").write_text(
        plain + SETTINGS.format(port=node.port, socket_dir=node.socket_dir)
    )


def _give(parts: Parts, folder: Path) -> None:
    user = parts.users.postgres
    if user is None:
        return
    entry = pwd.getpwnam(user)
    for at, _folders, files in os.walk(folder):
        os.chown(at, entry.pw_uid, entry.pw_gid)
        for name in files:
            os.chown(Path(at) / name, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
