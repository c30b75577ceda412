"""What of the store speaks against an adoption. Pure; all the rest is in tests/demo/test_adoption.py."""

from __future__ import annotations

import importlib
import os
import pwd
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from harmony.adoption import Findings, against_member, look_at_members, look_at_store, look_here
from harmony.cli.adopt import _adopt
from harmony.cli.main import cli
from harmony.config import Config, MemberAddress, load
from harmony.config_text import example
from harmony.core.states import State
from harmony.records import encode
from harmony.store.interface import Entry
from tests.core.helpers import cluster, member


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "harmony.toml"
    file.write_text(example())
    return load(file, {})


def _entry(record: msgspec.Struct) -> Entry:
    return Entry("k", encode(record), 1, 0)  # type: ignore[arg-type]


def problems(config: Config, state: Entry | None, **members: Entry | None) -> list[str]:
    found = Findings(system_identifier="sys")
    look_at_store(config, state, dict(members), found)
    return found.problems


def test_an_empty_store_or_an_adoption_begun_before(config: Config) -> None:
    begun = cluster(primary="n1", term=1, adopting=True, status=State.ADOPTING)
    assert problems(config, None, n1=None, n2=_entry(member("n2"))) == []
    assert problems(config, _entry(begun), n1=_entry(member("n1")), n2=_entry(member("n2"))) == []


def test_what_speaks_against_it(config: Config) -> None:
    assert "n1 leads it in term 3" in problems(config, _entry(cluster()))[0]
    vacant = cluster(primary=None, primary_fencer_id=None)
    assert "its place is vacant" in problems(config, _entry(vacant))[0]
    other = cluster(primary="n2", term=1, adopting=True)
    assert "an adoption begun there" in problems(config, _entry(other))[0]
    assert "use another cluster.id" in problems(config, _entry(cluster(system_identifier="x")))[0]
    assert "another cluster's" in problems(config, None, n2=_entry(member("n2", system_identifier="x")))[0]
    assert "not of this version" in problems(config, Entry("k", b"{}", 1, 0))[0]


def test_who_has_not_started_harmony_yet_is_remarked(config: Config) -> None:
    found = Findings(system_identifier="sys")
    look_at_store(config, None, {"n1": None, "n2": None}, found)
    assert found.problems == []
    assert len(found.remarks) == 1
    assert "n2" in found.remarks[0]


def test_what_is_not_known_here_is_nobody_elses_fault(config: Config) -> None:
    """B16: PostgreSQL here could not be asked, and each member was called another cluster's."""
    found = Findings()
    look_at_store(config, _entry(cluster()), {"n2": _entry(member("n2"))}, found)
    assert len(found.problems) == 1
    assert "there is nothing to adopt" in found.problems[0]


def test_another_member_that_answers() -> None:
    """I1: two primaries of one cluster are never adopted."""
    assert against_member("n2", "7", "7", read_only=True) == ""
    assert "TWO PRIMARIES" in against_member("n2", "7", "7", read_only=False)
    assert "another cluster's" in against_member("n2", "8", "7", read_only=True)


class Refusing:
    """PostgreSQL's socket: notes who connects, and refuses with this text."""

    def __init__(self, folder: Path, port: int, text: str) -> None:
        self.uids: list[int] = []
        self._text = text
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(folder / f".s.PGSQL.{port}"))
        (folder / f".s.PGSQL.{port}").chmod(0o777)
        self._sock.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._sock.accept()
            except OSError:
                return
            with link:
                raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                self.uids.append(struct.unpack("3i", raw)[1])
                link.recv(4096)
                body = b"SFATAL\0VFATAL\0C28000\0M" + self._text.encode() + b"\0\0"
                link.sendall(b"E" + struct.pack(">i", len(body) + 4) + body)

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._sock.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hctl") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("user", ["nobody", None])
def test_postgresql_is_asked_as_the_agent_asks_it(config: Config, folder: Path, user: str | None) -> None:
    """B16: root, which adopt must be, is nobody to a peer rule; and the advice was wrong."""
    refused = 'Peer authentication failed for user "harmony"'
    server = Refusing(folder, config.members["n1"].port, refused)
    found = Findings()
    agent = msgspec.structs.replace(config.agent, user=user)
    postgresql = msgspec.structs.replace(config.postgresql, socket_dir=str(folder))
    try:
        look_here(msgspec.structs.replace(config, agent=agent, postgresql=postgresql), found)
    finally:
        server.close()
    changes = user is not None and os.geteuid() == 0
    assert server.uids == [pwd.getpwnam("nobody").pw_uid if changes else os.geteuid()]
    assert os.geteuid() == os.getuid(), "and is who it was again"
    (problem,) = found.problems
    assert f"the agent runs as {user or 'root'}" in problem
    assert "agent.user" in problem
    assert "CREATE ROLE" not in problem


def test_a_role_that_is_not_there(config: Config, folder: Path) -> None:
    server = Refusing(folder, config.members["n1"].port, 'role "harmony" does not exist')
    found = Findings()
    postgresql = msgspec.structs.replace(config.postgresql, socket_dir=str(folder))
    try:
        look_here(msgspec.structs.replace(config, postgresql=postgresql), found)
    finally:
        server.close()
    assert "CREATE ROLE harmony LOGIN" in found.problems[0]
    assert found.system_identifier == ""


def test_who_is_away_must_be_named(config: Config) -> None:
    """I1: an unreachable member may be another primary."""
    gone = {n: MemberAddress(host="127.0.0.1", port=1) for n in config.members}
    away = msgspec.structs.replace(config, members=gone)
    found = Findings(system_identifier="7")
    look_at_members(away, ("n2", "n9"), found)
    assert [remark.split(":")[0] for remark in found.remarks] == ["without n2"]
    assert "go on with --without n3" in found.problems[0]
    assert found.problems[1:] == ["--without n9: not another configured member"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_only_root_may_permit_it(tmp_path: Path) -> None:
    text = example()
    folder = Path(tempfile.mkdtemp(prefix="hctl"))
    folder.chmod(0o755)
    file = folder / "harmony.toml"
    file.write_text(text)
    for module in ("harmony.cli.adopt", "harmony.config"):
        importlib.import_module(module)
    os.seteuid(65534)
    try:
        result = CliRunner().invoke(cli, ["adopt", "--withdraw", "--config", str(file)])
    finally:
        os.seteuid(0)
        file.unlink()
        folder.rmdir()
    assert (result.exit_code, result.stderr) == (1, "not done: only root may permit it here: use sudo\n")


class Looked:
    """A fencer's program that judges; what it was asked for is noted."""

    def __init__(self, folder: Path, problems: str) -> None:
        self.asked = folder / "asked"
        self.python = folder / "python"
        judged = f'{{"problems":[{problems}],"system_identifier":"7","held_by":""}}'
        self.python.write_text(f"#!/bin/sh\necho \"$@\" >> {self.asked}\necho '{judged}'\n")
        self.python.chmod(0o755)


@pytest.mark.parametrize("against", ['"it is a standby"', ""])
async def test_nothing_is_permitted_against_a_finding(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    against: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    looked = Looked(tmp_path, against)
    monkeypatch.setattr(sys, "executable", str(looked.python))
    (tmp_path / "bin").mkdir()
    for name in ("postgres", "pg_ctl", "pg_controldata"):
        (tmp_path / "bin" / name).touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "postgresql.conf").touch()
    p = msgspec.structs.replace(
        config.postgresql,
        data_dir=str(tmp_path / "data"),
        bin_dir=str(tmp_path / "bin"),
        user=None,
        socket_dir=str(tmp_path),
    )
    if os.geteuid() == 0:
        os.chown(tmp_path / "data", 65534, 65534)
        p = msgspec.structs.replace(p, user="nobody")
    store = msgspec.structs.replace(config.store, type="memory")
    changed = msgspec.structs.replace(config, postgresql=p, store=store)
    assert await _adopt(changed, (), dry_run=False, yes=True, wait=False) == 1, "PostgreSQL cannot be asked"
    assert "AGAINST IT: " in capsys.readouterr().err
    assert "--permit" not in looked.asked.read_text()
