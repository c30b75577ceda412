"""A node with its fencer, and another's PostgreSQL to follow: for tests of how one comes back to the other."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psycopg

from harmony.demo.parts import run_as
from harmony_fencer import processes, protocol
from tests.fencer.node import Node, Template, free_port


class Primary:
    """Another node's PostgreSQL, without a fencer: the one to follow."""

    def __init__(self, top: Path, template: Template) -> None:
        self.top, self._template = top, template
        self.data, self.port = top / "data", free_port()
        (top / "s").mkdir()
        if template.user is not None:
            shutil.chown(top / "s", template.user)

    def copy(self, source: Path) -> None:
        """A cold copy of what does not run (or of an empty initdb)."""
        subprocess.run(["cp", "-a", str(source), str(self.data)], check=True)
        for name in ("standby.signal", "postmaster.pid"):
            (self.data / name).unlink(missing_ok=True)
        with (self.data / "postgresql.conf").open("a") as f:
            f.write("wal_keep_size = 256MB\nwal_log_hints = on\n")

    def _pg_ctl(self, *arguments: str) -> None:
        pg = self._template.postgres
        done = run_as(
            self._template.user,
            [f"{pg.bin_dir}/pg_ctl", *arguments, "-D", str(self.data)],
            pg.library_dir,
            30,
        )
        assert done.returncode == 0, done

    def start(self, *options: str) -> None:
        more = f"-p {self.port} -c unix_socket_directories={self.top}/s -c listen_addresses=127.0.0.1 "
        self._pg_ctl("start", "-w", "-l", str(self.data / "log"), "-o", more + " ".join(options))

    def stop(self) -> None:
        if processes.of_data_dir(str(self.data)):
            self._pg_ctl("stop", "-w", "-m", "immediate")

    def checkpointer(self, number: signal.Signals) -> None:
        """Stopped, it keeps nobody from promoting or writing."""
        ((pid,),) = self.run("SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'")
        os.kill(int(str(pid)), number)

    def run(self, sql: str) -> list[tuple[object, ...]]:
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True
        ) as c:
            done = c.execute(sql.encode())
            return done.fetchall() if done.description else []


class Pair:
    """n1, whose fencer is tested, and n2, which was promoted while n1 still wrote."""

    def __init__(self, node: Node, primary: Primary) -> None:
        self.node, self.primary, self.order = node, primary, 10
        node.configure(
            members={
                "n1": {"host": "127.0.0.1", "port": node.port},
                "n2": {"host": "127.0.0.1", "port": primary.port},
            },
            start_timeout_s=20,
        )
        node.set_postgres(wal_keep_size="64MB", wal_log_hints="on")

    @property
    def beside(self) -> dict[str, Path]:
        """What stands beside the data directory, by the end of its name."""
        top = self.node.data.parent
        return {re.sub(r"\d{8}T.*", "", p.name[5:]): p for p in top.glob("data.*")}

    def diverge(self, *, crash: bool = False, promote: bool = False, checkpoint: bool = True) -> None:
        """n2 is a copy of n1 that leads on a new timeline; n1 then writes what nobody else has.

        `promote`: on a new timeline of the same number. `checkpoint`: n2 has one on its timeline.
        """
        node = self.node
        node.start()
        node.make_writable()
        with node.connect() as c:
            c.execute("CREATE TABLE rows (x text)")
            c.execute("INSERT INTO rows VALUES ('common')")
        node.fence(1, 2, clean=True)
        self.primary.copy(node.data)
        (self.primary.data / "standby.signal").touch()
        if self.node.template.user is not None:
            shutil.chown(self.primary.data / "standby.signal", self.node.template.user)
        self.primary.start()
        if not checkpoint:
            self.primary.checkpointer(signal.SIGSTOP)
        self.primary._pg_ctl("promote", "-w")
        self.primary.run("INSERT INTO rows SELECT 'new primary' FROM generate_series(1, 1000)")
        if checkpoint:
            self.primary.run("CHECKPOINT")
        if promote:
            node.make_writable(2, 1)
        else:  # as one that was cut off and never stopped
            node.kill_fencer()
            (node.data / "standby.signal").unlink()
            node.start_by_hand()
        with node.connect() as c:
            c.execute("INSERT INTO rows SELECT 'lost' FROM generate_series(1, 1000)")
        if crash:
            node.kill_postgres()
        elif not promote:
            argv = [f"{node.template.postgres.bin_dir}/pg_ctl", "stop", "-w", "-D", str(node.data)]
            run_as(node.template.user, argv, node.template.postgres.library_dir, 30)
        if not promote:
            node.start()
        node.fence(2, 2, clean=not crash)

    def logs(self) -> str:
        """PostgreSQL's own, of n1; and the fencer's."""
        return (self.node.data / "harmony-postgres.log").read_text()[-2500:] + self.node.log()

    def system(self) -> str:
        return str(self.primary.run("SELECT system_identifier FROM pg_control_system()")[0][0])

    def send(self, *, clone: bool = False, system: str | None = None) -> protocol.Reply:
        self.order += 1
        return self.node.ask(
            protocol.Rejoin(
                generation=protocol.Generation(2, self.order),
                primary="n2",
                system_identifier=system or self.system(),
                clone=clone,
            )
        )

    def rejoin(self, *, clone: bool = False, system: str | None = None) -> protocol.OrderRecord:
        reply = self.send(clone=clone, system=system)
        assert isinstance(reply, protocol.Accepted), reply
        return self.node.outcome()

    def follow(self) -> None:
        """As the agent orders it, after a rejoin that came to nothing."""
        self.order += 1
        self.node.ask(protocol.Follow(generation=protocol.Generation(2, self.order), primary="n2"))
        record = self.node.outcome()
        assert record.state == "done", (record, self.logs())

    def rows(self) -> set[str]:
        with self.node.connect() as c:
            return {str(r[0]) for r in c.execute("SELECT DISTINCT x FROM rows").fetchall()}

    def healthy(self) -> None:
        """A standby of n2 that has what n2 has, and nothing else; and what n2 writes now arrives."""
        self.primary.run("INSERT INTO rows VALUES ('after')")
        node = self.node
        node.wait(lambda: node.in_recovery() and "after" in self.rows(), "what the primary writes arrives")
        assert self.rows() == {"common", "new primary", "after"}
        status = node.status()
        assert (status.is_standby, status.unfinished, status.progress) == (True, False, "")
        assert status.following == "n2"
        assert not node.writable()
        assert f"port = '{node.port}'" in (node.data / "harmony.postgresql.conf").read_text()
