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

from harmony.adoption import Findings, against_member, judge, look_at_members, look_at_store, look_here
from harmony.cli.adopt import _adopt, _progress, permit
from harmony.cli.control import Impossible
from harmony.cli.main import cli
from harmony.config import Config, MemberAddress, load
from harmony.config_text import example
from harmony.core.states import State
from harmony.records import CLUSTER_STATE, MEMBER_PREFIX, ClusterState, encode
from harmony.store.interface import Entry
from harmony.store.memory import MemoryServer, MemoryStore
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
        left = os.geteuid()
        os.seteuid(os.getuid())
    changes = user is not None and os.geteuid() == 0
    assert server.uids == [pwd.getpwnam("nobody").pw_uid if changes else os.geteuid()]
    assert left == os.getuid(), "and is who it was again"
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
    importlib.import_module("harmony.cli.adopt")
    load(str(file))  # whatever that imports, too: another user may not read where it lies
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


@pytest.fixture
def here(config: Config, tmp_path: Path) -> Config:
    """What the configuration names is on this host; PostgreSQL does not answer."""
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
    return msgspec.structs.replace(config, postgresql=p, store=store)


@pytest.mark.parametrize("against", ['"it is a standby"', ""])
async def test_nothing_is_permitted_against_a_finding(
    here: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    against: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    looked = Looked(tmp_path, against)
    monkeypatch.setattr(sys, "executable", str(looked.python))
    assert await _adopt(here, (), dry_run=False, yes=True, wait=False) == 1, "PostgreSQL cannot be asked"
    told = capsys.readouterr().err
    assert "AGAINST IT: PostgreSQL here cannot be asked" in told
    assert ("AGAINST IT: it is a standby" in told) == bool(against)
    assert "--permit" not in looked.asked.read_text()


@pytest.mark.parametrize(
    ("dry_run", "yes", "code", "permitted"),
    [(True, True, 0, False), (False, False, 2, False), (False, True, None, True)],
    ids=["dry run", "not confirmed", "confirmed"],
)
def test_it_is_permitted_by_an_answer_only(
    here: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dry_run: bool,
    yes: bool,
    code: int | None,
    permitted: bool,
) -> None:
    """I1: the permit lets a primary run that holds no lease: nobody gives it by looking."""
    looked = Looked(tmp_path, "")
    monkeypatch.setattr(sys, "executable", str(looked.python))
    assert permit(here, Findings(), dry_run=dry_run, yes=yes) == code
    assert looked.asked.exists() == permitted
    if permitted:
        assert "--permit-adoption" in looked.asked.read_text()


def test_a_permit_that_the_fencer_refuses_is_none(
    here: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(Looked(tmp_path, '"it is a standby"').python))
    with pytest.raises(Impossible, match="it is a standby"):
        permit(here, Findings(), dry_run=False, yes=True)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (cluster(primary="n1", status=State.ADOPTING, adopting=True), "adopting"),
        (cluster(primary="n1", status=State.HEALTHY, adopting=True), "healthy"),
        (cluster(primary="n1", status=State.HEALTHY), None),
    ],
    ids=["begun", "not taken over yet", "led"],
)
async def test_its_progress_ends_when_it_is_led(
    config: Config, state: ClusterState, said: str | None
) -> None:
    store = MemoryStore(MemoryServer(), "c1")
    assert "now start Harmony" in str(await _progress(config, store))
    await store.create(MEMBER_PREFIX + "n1", encode(member("n1", status=state.status)), timeout_s=1)
    await store.create(CLUSTER_STATE, encode(state), timeout_s=1)
    told = await _progress(config, store)
    assert told is None if said is None else str(told).startswith(f"n1: {state.status}, ")


@pytest.mark.parametrize("primary", ["n2", None])
async def test_its_progress_ends_where_somebody_else_leads(config: Config, primary: str | None) -> None:
    store = MemoryStore(MemoryServer(), "c1")
    await store.create(MEMBER_PREFIX + "n1", encode(member("n1")), timeout_s=1)
    await store.create(CLUSTER_STATE, encode(cluster(primary=primary)), timeout_s=1)
    with pytest.raises(Impossible, match=f"{primary or 'nobody'} as the primary"):
        await _progress(config, store)


def row(changes: dict[str, object]) -> tuple[object, ...]:
    """What a primary tells that may be adopted; the columns by name, in the question's order."""
    told: dict[str, object] = {"recovering": False, "version": 15, "data": "/d", "system": 7}
    told |= {"level": "replica", "senders": 10, "hot": "on", "rewindable": True, "listens": "*", "names": ""}
    told |= {"role": True, "monitor": True, "streams": []}
    return tuple((told | changes).values())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"recovering": True}, "is a standby"),
        ({"version": 12}, "PostgreSQL 12 is none of"),
        ({"data": "/elsewhere"}, "it runs from /elsewhere"),
        ({"monitor": False}, "no member of pg_monitor"),
        ({"role": None}, "with LOGIN and REPLICATION"),
        ({"role": False}, "with LOGIN and REPLICATION"),
        ({"level": "minimal"}, "wal_level is minimal"),
        ({"senders": 2}, "max_wal_senders is 2, 3 are needed"),
    ],
    ids=["fit", "standby", "version", "data", "blind", "no role", "no right", "minimal", "senders"],
)
def test_what_the_primary_itself_tells(config: Config, changes: dict[str, object], word: str) -> None:
    """I1, W2: each of these would stop it later, when it is under a lease already."""
    found = Findings()
    p = msgspec.structs.replace(config.postgresql, data_dir="/d")
    judge(msgspec.structs.replace(config, postgresql=p), row(changes), found)
    assert found.system_identifier == "7"
    if word:
        (problem,) = found.problems
        assert word in problem
    else:
        assert found.problems == []
