"""harmonyctl against small sockets that speak the real protocols: status, fence, unfence, health (W5, O5)."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from click.testing import CliRunner

from harmony.admin import NodeView, SelfView, Shown, StatusReply, StoreView
from harmony.agent.fencer import FencerClient
from harmony.cli import where
from harmony.cli.fence import _wait_s
from harmony.cli.main import COMMANDS, cli
from harmony.cli.outlook import able, outlook
from harmony.cli.where import who
from harmony.config import load
from harmony.core.messages import Marks
from harmony.core.states import State
from harmony.errors import FencerUnavailable
from harmony.fencer_client import call, protocol
from harmony.records import ClusterState, Member
from harmony.verdict import judge

replace = msgspec.structs.replace
CLUSTER = ClusterState(
    "c1", "7", 3, "n1", "f1", "n1", 9, "a", "b", State.HEALTHY, 1, (1 << 32) + 256, 1, ("n2", "n3")
)
GENERATION = protocol.Generation(3, 5)


def member(node: str, *, db: str = "standby", streaming: bool = True) -> Member:
    primary = db == "primary"
    raw = {"node": node, "attempt": "a", "boot_id": "b", "row": "1", "why": "w", "db": db, "timeline": 1}
    raw |= {
        "status": State.HEALTHY if primary else State.WATCHING,
        "received_lsn": 1 << 32,
        "replayed_lsn": 0,
    }
    raw |= {"streaming": streaming and not primary, "seen_revision": 1, "silent_ns": 0, "latched": False}
    raw |= {"nofailover": False, "priority": 1, "generation": "3.5", "lease_left_ms": None}
    raw |= {"fencer_id": "f", "fencer_ok": True, "system_identifier": "7", "version": "0"}
    return msgspec.convert(raw, Member)


def reply(me: str = "n1") -> StatusReply:
    nodes = tuple(
        NodeView(n, "127.0.0.1", 5432, member(n, db="primary" if n == "n1" else "standby"), 0.1, alive=True)
        for n in ("n1", "n2", "n3")
    )
    state = State.HEALTHY if me == "n1" else State.WATCHING
    store = StoreView("KV_x of t1", "", Marks(3, 9, "a", "KV_x of t1"), Shown(9, 3, "n1", 0.2), "")
    myself = SelfView(
        me,
        state,
        "204",
        "why",
        True,
        0,
        900,
        True,
        "",
        None,
        "",
        "",
        0,
        retiring=False,
        successor=None,
        store=store,
    )
    return StatusReply("c1", CLUSTER, 9, 0.1, False, nodes, myself)


def with_node(s: StatusReply, name: str, **changes: object) -> StatusReply:
    """Changes of the node's view, or of its member record."""
    nodes = []
    for n in s.nodes:
        if n.name == name:
            own = {k: v for k, v in changes.items() if k in {"alive", "age_s", "member"}}
            rest = {k: v for k, v in changes.items() if k not in own}
            n = replace(n, **own)  # noqa: PLW2901
            if rest and n.member is not None:
                n = replace(n, member=replace(n.member, **rest))  # noqa: PLW2901
        nodes.append(n)
    return replace(s, nodes=tuple(nodes))


R = reply()
STALE = replace(R, cluster_stale=True)


@pytest.mark.parametrize(
    ("s", "code", "word"),
    [
        (R, 0, None),
        (replace(R, myself=replace(R.myself, store_connected=False)), 3, "not connected"),
        (with_node(STALE, "n1", alive=False), 3, "view is stale"),
        (STALE, 2, "stale"),
        (replace(R, cluster=None), 2, "no record"),
        (replace(R, cluster=replace(CLUSTER, primary=None)), 2, "vacant"),
        (replace(R, cluster=replace(CLUSTER, status=State.P_FAILED)), 2, "says"),
        (replace(R, cluster=replace(CLUSTER, primary="n9")), 1, "not among"),
        (with_node(R, "n2", alive=False), 1, "n2 is not heard of"),
        (with_node(R, "n2", member=None), 1, "n2 is not heard of"),
        (with_node(R, "n3", streaming=False), 1, "n3 does not stream"),
        (with_node(R, "n3", db="primary"), 1, "says it is one"),
        (with_node(R, "n1", db="down"), 1, "database of n1"),
        (with_node(R, "n2", fencer_ok=False), 1, "fencer of n2"),
        (with_node(R, "n2", latched=True), 1, "latched"),
        (with_node(R, "n1", sick="silent for longer"), 1, "PostgreSQL of n1 is SICK: silent for longer"),
        (with_node(R, "n2", note="the disk is full"), 1, "PostgreSQL of n2: the disk is full"),
        (replace(R, myself=replace(R.myself, distrust="lost history")), 1, "n1 DISTRUSTS the store: lost"),
        (with_node(R, "n2", distrust="lost history"), 1, "n2 DISTRUSTS the store: lost history"),
        (replace(R, myself=replace(R.myself, stopped="5 changes: stopped")), 1, "5 changes: stopped"),
        (
            replace(R, cluster=None, myself=replace(R.myself, distrust="its stream is gone")),
            2,
            "its stream is gone",
        ),
        (with_node(R, "n2", notes=("ALARM: fsync is off",)), 1, "n2: fsync is off"),
        (with_node(R, "n2", notes=("max_wal_senders is 3",)), 0, None),
    ],
)
def test_health(s: StatusReply, code: int, word: str | None) -> None:
    """D5: never healthy unless everything says so."""
    verdict = judge(s)
    reasons = verdict.reasons
    assert verdict.code == code, reasons
    assert (word is None and not reasons) or (word is not None and word in " ".join(reasons))


@pytest.mark.parametrize(
    "change",
    [
        {"alive": False},
        {"member": None},
        {"db": "down"},
        {"latched": True},
        {"nofailover": True},
        {"fencer_ok": False},
        {"retiring": True},
        {"distrust": "rolled back"},
        {"timeline": 0},
    ],
)
def test_who_is_able(change: dict[str, object]) -> None:
    s = with_node(with_node(R, "n2", **change), "n3", alive=False)
    assert not any(able(s, n) for n in s.nodes)
    assert outlook(s)[0] is False
    assert "NO OTHER NODE" in outlook(s)[1]
    assert outlook(R) == (True, outlook(R)[1])
    assert "n2 or n3 takes over" in outlook(R)[1]


def test_outlook_elsewhere() -> None:
    assert outlook(reply("n2"))[0] is True
    assert outlook(replace(reply("n2"), cluster=None))[0] is False
    blind = replace(reply("n2"), myself=replace(reply("n2").myself, store_connected=False))
    assert outlook(blind)[0] is False
    assert "does not see the cluster" in outlook(blind)[1]
    assert outlook(replace(R, cluster=replace(CLUSTER, sync_voters=("n3",))))[1].endswith("n3 takes over")


# ---------------------------------------------------------------- sockets


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: pytest's own can be too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="hctl") as name:
        (Path(name) / "agent").mkdir()
        yield Path(name)


class Served:
    """A Unix socket served by one thread, one connection after the other."""

    def __init__(self, path: Path, answer: Callable[[socket.socket], None]) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        self._sock.listen(8)
        self._answer = answer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self._answer(connection)
                except OSError:
                    continue

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._sock.close()


class Fakes:
    """Started as the test needs them, all ended with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Served] = []
        self.requests: list[protocol.Request] = []

    def agent(self, data: bytes) -> None:
        def answer(c: socket.socket) -> None:
            assert c.recv(1024) == b'{"op":"status"}\n'
            c.sendall(data + b"\n")

        self.started.append(Served(self.folder / "agent" / "agent.sock", answer))

    def fencer(self, *replies: protocol.Reply) -> None:
        """One reply after the other; the last again and again."""
        left = list(replies)

        def answer(c: socket.socket) -> None:
            with c.makefile("rb") as f:
                self.requests.append(protocol.decode_request(f.read(protocol.frame_length(f.read(4)))))
            c.sendall(protocol.frame(left.pop(0) if len(left) > 1 else left[0]))

        self.started.append(Served(self.folder / "fencer.sock", answer))

    def run(self, *args: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, [*args, "--run-dir", str(self.folder)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output


@pytest.fixture
def fakes(folder: Path) -> Iterator[Fakes]:
    made = Fakes(folder)
    yield made
    for one in made.started:
        one.close()


RUNGS = (protocol.Rung("fast", 12.0, False, "SIGINT"), protocol.Rung("kill", 3.0, True))


def record(state: str = "done", op: str = "operator_fence", order: int = 5) -> protocol.OrderRecord:
    raw = {"generation": {"term": 3, "order": order}, "op": op, "primary": None, "state": state}
    return replace(msgspec.convert(raw, protocol.OrderRecord), rungs=RUNGS, took_ms=15.0)


def fencer_status(
    order: protocol.OrderRecord | None, *, proven: bool = False, latched: bool = True
) -> protocol.Status:
    raw = {"v": 1, "node": "n1", "fencer_id": "f", "boot_id": "b", "now_boottime_ns": 10**9, "trusted": True}
    raw |= {"trust_detail": "", "highest": {"term": 3, "order": 5}, "active": None, "self_fence": None}
    raw |= {"lease_deadline_boottime_ns": None, "order": None, "fence_proven": proven, "following": None}
    raw |= {"postgres": "down" if proven else "running", "postgres_starts": 1, "is_standby": True}
    raw |= {
        "held_by": "cgroup /c",
        "watchdog": "off",
        "cannot_lead": "",
        "progress": "",
        "unfinished": False,
        "cannot_rewind": "",
        "timeline": 4,
        "change": 1,
        "shutdown_lsn": None,
        "adopting": False,
        "empty": "",
        "was_standby": False,
    }
    raw |= {
        "system_identifier": "7",
        "timeline": 4,
        "latch": {"reason": "r", "who": "w", "at_utc": "t"} if latched else None,
    }
    return replace(msgspec.convert(raw, protocol.Status), order=order)


def test_status_table_and_json(fakes: Fakes) -> None:
    fakes.agent(msgspec.json.encode(with_node(R, "n3", streaming=False)))
    code, text = fakes.run("status")
    assert code == 1
    for part in ("degraded, term 3, primary n1", "any 1 of n2, n3", "state [row]", "1/0", "256"):
        assert part in text, text
    code, text = fakes.run("status", "--json")
    told = json.loads(text)
    assert (code, told["exit_code"], told["cluster_id"]) == (1, 1, "c1")
    assert [f["text"] for f in told["findings"]] == told["reasons"]
    assert (told["findings"][0]["severity"], told["findings"][0]["node"]) == ("degraded", "n3")


def test_an_agent_that_was_not_restarted_since_an_upgrade_is_understood(fakes: Fakes) -> None:
    told = msgspec.to_builtins(R)
    for newer in (
        *("distrust", "stopped", "changes", "retiring", "successor", "store"),
        *("store_failure", "failure_threshold", "beat_s", "lease_s"),
    ):
        del told["myself"][newer]
    fakes.agent(msgspec.json.encode(told))
    assert fakes.run("status")[0] == 0


def test_status_tells_of_distrust_and_hand_over(fakes: Fakes) -> None:
    """The alarm and the way out, in words."""
    myself = replace(R.myself, distrust="lost history", changes=2, retiring=True)
    said = replace(with_node(R, "n1", retiring=True), myself=myself, cluster=replace(CLUSTER, successor="n2"))
    fakes.agent(msgspec.json.encode(said))
    code, text = fakes.run("status")
    assert code == 1
    for part in (
        "n1 DISTRUSTS the store: lost history",
        "harmonyctl store accept",
        "2 failovers since",
        "n2 is to take over from n1",
        "n1 was asked to stop",
    ):
        assert part in text, text
    code, text = fakes.run("status", "--json")
    assert json.loads(text)["myself"]["distrust"] == "lost history"


@pytest.mark.parametrize("data", [b'{"error":"bad request"}', b"nonsense", b'"\xff"', b""])
def test_status_with_a_wrong_agent_falls_back(fakes: Fakes, data: bytes) -> None:
    fakes.agent(data)
    fakes.fencer(fencer_status(record(), proven=True))
    code, text = fakes.run("status")
    assert code == 3
    assert "the agent does not answer" in text
    assert "PostgreSQL is down" in text
    assert "latched by w" in text


def test_status_of_a_dead_node(fakes: Fakes) -> None:
    code, text = fakes.run("status", "--json")
    answer = json.loads(text)
    assert (code, answer["exit_code"], answer["fencer"], len(answer["reasons"])) == (3, 3, None, 2)
    assert [f["text"] for f in answer["findings"]] == answer["reasons"]


def test_force_needs_nothing_but_the_fencer(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """W5: no agent, no configuration; exit 0 only with the proof."""
    monkeypatch.setenv("HARMONY_NONSENSE", "1")
    running = fencer_status(record("running"))
    fakes.fencer(protocol.Accepted(record("running")), running, fencer_status(record(), proven=True))
    code, text = fakes.run("fence", "--force", "--reason", "because")
    assert code == 0, text
    assert "kill" in text
    assert "latched until `harmonyctl unfence`" in text
    first = fakes.requests[0]
    assert isinstance(first, protocol.OperatorFence)
    assert first.reason == "because"
    assert not first.clean


@pytest.mark.parametrize("state", ["failed", "preempted"])
def test_a_fence_without_proof_is_not_a_fence(fakes: Fakes, state: str) -> None:
    """W5: never 0 without proof."""
    fakes.fencer(protocol.Accepted(record("running")), fencer_status(record(state)))
    code, text = fakes.run("fence", "--force")
    assert code == 1
    assert "NOT proven" in text


def test_a_newer_fence_of_the_agent_proves_as_well(fakes: Fakes) -> None:
    newer = record("running", "fence", order=6)
    done = fencer_status(replace(newer, state="done"), proven=True)
    fakes.fencer(protocol.Accepted(record("running")), fencer_status(newer), done)
    assert fakes.run("fence", "--force")[0] == 0


def test_a_newer_fence_that_latches_nothing_is_not_the_operators(fakes: Fakes) -> None:
    """W5: PostgreSQL is gone, and the agent may start it again."""
    newer = record("done", "fence", order=6)
    fakes.fencer(protocol.Accepted(record("running")), fencer_status(newer, proven=True, latched=False))
    code, text = fakes.run("fence", "--force")
    assert code == 1
    assert "NOT proven" in text


def test_a_newer_fence_without_its_proof_proves_nothing(fakes: Fakes) -> None:
    """W5: nothing runs at this moment, and nobody has seen that nothing can start again."""
    found = fencer_status(record("done", "fence", order=6))
    fakes.fencer(protocol.Accepted(record("running")), replace(found, postgres="down"))
    code, text = fakes.run("fence", "--force")
    assert (code, "NOT proven" in text) == (1, True)


def test_an_order_of_before_is_not_its_outcome(fakes: Fakes) -> None:
    """W5: what is told may be the last order still."""
    before = fencer_status(record("failed", "follow", order=4))
    fakes.fencer(protocol.Accepted(record("running")), before, fencer_status(record(), proven=True))
    code, text = fakes.run("fence", "--force")
    assert (code, "fenced, proven" in text) == (0, True)


@pytest.mark.parametrize("code", [0, 1])
def test_the_one_shot_latches(fakes: Fakes, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """W5: what is fenced without a fencer stays so, too; and its exit code is the command's."""
    (fakes.folder / "fencer.json").write_text("{}")
    python = fakes.folder / "python"
    python.write_text(f'#!/bin/sh\nfor a in "$@"; do echo "$a" >> {fakes.folder}/argv; done\nexit {code}\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert fakes.run("fence", "--force", "--reason", "because")[0] == code
    argv = (fakes.folder / "argv").read_text().splitlines()
    assert argv[argv.index("--once") + 1] == "because"
    assert "pid" in argv[argv.index("--latch") + 1]


def test_not_permitted_says_sudo(fakes: Fakes) -> None:
    fakes.fencer(protocol.Refusal("not_permitted", "no"))
    code, text = fakes.run("fence", "--force")
    assert code == 1
    assert "sudo" in text


@pytest.mark.parametrize("error", ["retiring", "storage_failed"])
def test_a_fencer_that_cannot_is_bypassed(fakes: Fakes, error: str) -> None:
    """W5: without a usable fencer and without fencer.json the operator is told to do it by hand."""
    fakes.fencer(msgspec.convert({"kind": "refusal", "error": error, "detail": "x"}, protocol.Refusal))
    code, text = fakes.run("fence", "--force")
    assert code == 1
    assert error in text
    assert "by hand" in text


def test_one_shot_when_the_fencer_is_dead(fakes: Fakes) -> None:
    """O8 on a plain host: the emergency fence is run; what it cannot prove is no success."""
    (fakes.folder / "fencer.json").write_text("{}")
    code, text = fakes.run("fence", "--force")
    assert code == 1
    assert "one-shot fence NOT proven (exit code 78)" in text


def test_one_shot_that_cannot_be_started(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even then a sentence and exit code 1, no traceback."""
    (fakes.folder / "fencer.json").write_text("{}")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    code, text = fakes.run("fence", "--force")
    assert code == 1
    assert "NOT fenced" in text


def test_asks_before_it_fences(fakes: Fakes) -> None:
    fakes.agent(msgspec.json.encode(R))
    fakes.fencer(protocol.Accepted(record("running")), fencer_status(record(), proven=True))
    code, text = fakes.run("fence")  # no terminal, no --yes
    assert (code, fakes.requests) == (2, [])
    assert "n2 or n3 takes over" in text
    assert fakes.run("fence", "--yes")[0] == 0
    first = fakes.requests[0]
    assert isinstance(first, protocol.OperatorFence)
    assert first.clean


def test_refuses_when_nobody_can_take_over(fakes: Fakes) -> None:
    alone = with_node(with_node(R, "n2", alive=False), "n3", latched=True)
    fakes.agent(msgspec.json.encode(alone))
    fakes.fencer(protocol.Accepted(record()))
    code, text = fakes.run("fence", "--yes")
    assert (code, fakes.requests) == (2, [])
    assert "--force" in text


def test_unfence(fakes: Fakes) -> None:
    fakes.fencer(protocol.Done("the latch is gone"), protocol.Refusal("not_latched", "no fence"))
    code, text = fakes.run("unfence")
    assert code == 0
    assert "Next" in text
    code, text = fakes.run("unfence")
    assert code == 1
    assert "not_latched" in text


def test_a_host_without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uid that passwd does not know must not keep anyone from fencing."""
    for name in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert who().startswith("uid 4000000")


def test_who_used_sudo_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latch's record names the person, not root."""
    monkeypatch.setenv("SUDO_USER", "anna")
    assert who() == f"anna (pid {os.getpid()})"


def test_a_clean_fence_is_waited_for(folder: Path) -> None:
    """A clean shutdown may take the whole lease: before that nothing is called unproven."""
    (folder / "fencer.json").write_text('{"lease_s": 11.0, "fence_timeout_s": 2.0, "node": "n1"}')
    assert _wait_s(folder) > 13
    (folder / "fencer.json").unlink()
    assert _wait_s(folder) > 60, "where nothing tells, no less than the longest"


BROKEN = 'x = 1\n[node]\nrun_dir = "{folder}"\n'


def test_a_broken_default_file_still_says_where(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W5: this host's own file never keeps anyone from fencing this host."""
    file = tmp_path / "harmony.toml"
    file.write_text(BROKEN.format(folder=fakes.folder))
    monkeypatch.delenv("HARMONY_CONFIG", raising=False)
    monkeypatch.setattr(where, "DEFAULT_CONFIG", str(file))
    fakes.fencer(protocol.Accepted(record("running")), fencer_status(record(), proven=True))
    result = CliRunner().invoke(cli, ["fence", "--force"])
    assert result.exit_code == 0, result.output
    assert "is not valid; looking in" in result.output


@pytest.mark.parametrize("named", ["option", "variable"])
@pytest.mark.parametrize("text", [None, BROKEN, "not TOML", "fifo"])
@pytest.mark.parametrize(
    "command",
    [("fence", "--force"), ("fence", "--yes"), ("unfence",), ("store", "show"), ("store", "accept")],
)
def test_a_file_that_was_named_and_cannot_be_used_fences_nobody(
    fakes: Fakes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    text: str | None,
    named: str,
) -> None:
    """B11: a typo in --config fenced the default node, and said that it was proven."""
    file = tmp_path / "othercluster.toml"
    if text == "fifo":
        os.mkfifo(file)
    elif text is not None:
        file.write_text(text.format(folder=fakes.folder))
    monkeypatch.setattr(where, "DEFAULT_RUN_DIR", str(fakes.folder))
    fakes.fencer(protocol.Accepted(record("running")), fencer_status(record(), proven=True))
    fakes.agent(msgspec.json.encode(R))
    options, env = (["--config", str(file)], {}) if named == "option" else ([], {"HARMONY_CONFIG": str(file)})
    result = CliRunner().invoke(cli, [*command, *options], env=env)
    assert result.exit_code == 78, result.output
    assert "nothing was done" in result.output
    assert fakes.requests == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize(
    ("command", "said"),
    [("fence --force", "fence"), ("fence", "fence"), ("unfence", "unfence"), ("store show", "store show")],
)
def test_an_ordinary_user_is_told_of_sudo_first(folder: Path, command: str, said: str) -> None:
    """B21: not that PostgreSQL must be stopped by hand."""
    (folder / "fencer.json").touch(0o600)
    for name in ("fencer.sock", "agent/agent.sock"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(folder / name))
        (folder / name).chmod(0o600)
    folder.chmod(0o711)
    for lazy in COMMANDS.values():
        importlib.import_module(lazy.module)  # nobody may not read our installation
    importlib.import_module("harmony.cli.outlook")
    os.seteuid(65534)
    try:
        done = CliRunner().invoke(cli, [*command.split(), "--run-dir", str(folder)])
    finally:
        os.seteuid(0)
    assert done.exit_code in {1, 2, 3}, done
    assert f"run it as root: sudo harmonyctl {said}" in done.output.splitlines()[0]
    assert "by hand" not in done.output


@pytest.mark.parametrize("command", ["fence --force", "fence --yes"])
def test_a_fence_needs_nobody_who_reads(fakes: Fakes, command: str) -> None:
    """B14's kind: once it is decided, a closed terminal or pipe keeps nobody from fencing."""
    fakes.agent(msgspec.json.encode(reply("n2")))
    fakes.fencer(
        protocol.Accepted(record("running")),
        fencer_status(record("running")),
        fencer_status(record(), proven=True),
    )
    argv = [sys.executable, "-m", "harmony", *command.split(), "--run-dir", str(fakes.folder)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=full, check=False, timeout=60)
    forced = command == "fence --force"
    assert (done.returncode == 0) is forced, done
    assert bool(fakes.requests) is forced, "what could not be asked is not done"
    (fakes.folder / "fencer.sock").unlink()
    (fakes.folder / "fencer.json").write_text("{}")
    if forced:
        with Path("/dev/full").open("w") as full:
            assert subprocess.run(argv, stdout=full, stderr=full, check=False, timeout=60).returncode == 1


# ---------------------------------------------------------------- client


async def test_client(fakes: Fakes) -> None:
    fakes.fencer(fencer_status(None))
    client = FencerClient(str(fakes.folder / "fencer.sock"))
    await client.connect()
    assert isinstance(await client.request(protocol.StatusRequest(), timeout_s=2), protocol.Status)
    await client.close()


async def test_client_closes_after_a_timeout_and_after_a_cancel(folder: Path) -> None:
    """D7: a late reply must never be taken for the next request's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(folder / "s"))
        silent.listen(4)
        client = FencerClient(str(folder / "s"))
        await client.connect()
        with pytest.raises(FencerUnavailable, match=r"no answer in 0\.05 s"):
            await client.request(protocol.StatusRequest(), timeout_s=0.05)
        with pytest.raises(FencerUnavailable, match="not connected"):
            await client.request(protocol.StatusRequest(), timeout_s=0.05)
        await client.connect()
        with trio.move_on_after(0.05):
            await client.request(protocol.StatusRequest(), timeout_s=5)
        with pytest.raises(FencerUnavailable, match="not connected"):
            await client.request(protocol.StatusRequest(), timeout_s=0.05)
        with pytest.raises(FencerUnavailable, match=r"no answer in 0\.1 s"):
            call(str(folder / "s"), protocol.StatusRequest(), timeout_s=0.1)


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02{}", b"\x00\x00"])
def test_wrong_frames(folder: Path, data: bytes) -> None:
    """Frames are bounded and decoded strictly on this side too."""
    served = Served(folder / "s", lambda c: c.sendall(data))
    try:
        with pytest.raises(FencerUnavailable):
            call(str(folder / "s"), protocol.StatusRequest(), timeout_s=2)
    finally:
        served.close()


# ---------------------------------------------------------------- configuration commands


def test_config_commands(tmp_path: Path) -> None:
    """C2."""
    run = CliRunner().invoke
    file = tmp_path / "harmony.toml"
    file.write_text(run(cli, ["config", "example"]).output)
    assert load(file, {}).node.name == "n1"
    assert "> lease 11 + fence_timeout_s 2 + safety_margin_s 1.5 = 14.5 s" in run(
        cli, ["config", "check", str(file)]
    ).output.replace("\n", " ")
    file.write_text(file.read_text().replace("/var/lib/postgresql/15/main", str(tmp_path / "none")))
    here = run(cli, ["config", "check", "--host", str(file)])
    assert here.exit_code == 78
    assert f"{file}: postgresql.data_dir:" in here.output
    assert run(cli, ["config", "resolve", "--config", str(file)]).exit_code == 78
    assert run(cli, ["--version"]).exit_code == 0
