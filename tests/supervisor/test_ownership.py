"""What lies in the agent's folders follows agent.user (B3), and root is led nowhere else by it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harmony.agent import memory
from harmony.agent.memory import Stored
from harmony.core.messages import Marks
from harmony_supervisor.main import _folders as folders
from harmony_supervisor.main import _owner as owner
from harmony_supervisor.ownership import give

AGENT, BEFORE, STRANGER = 54321, 54320, 54319
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def owners(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.lstat().st_uid, p.lstat().st_gid) for p in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("before", [0, BEFORE])
def test_a_corrected_agent_user_can_read_what_was_remembered(tmp_path: Path, before: int) -> None:
    """B3: the folder was given to it, and not the file in it: each node distrusted the store for good."""
    run, state = tmp_path / "run", tmp_path / "state"
    folders(run, state, (before, before))
    memory.save(state / "agent", Stored("c", Marks(3, 7)))
    (state / "agent" / "deeper").mkdir(mode=0o700)
    (state / "agent" / "deeper" / "file").touch()
    (state / "fencer.state").touch()  # the fencer's: not below the agent's folder
    for name in ("store.json", "deeper", "deeper/file"):
        os.chown(state / "agent" / name, before, before)
    folders(run, state, (AGENT, AGENT + 1))
    assert owners(state) == {
        "agent": (AGENT, AGENT + 1),
        "agent/deeper": (AGENT, AGENT + 1),
        "agent/deeper/file": (AGENT, AGENT + 1),
        "agent/store.json": (AGENT, AGENT + 1),
        "fencer.state": (0, 0),
    }
    assert owners(run) == {"agent": (AGENT, AGENT + 1)}


def test_an_agent_that_is_root_again_gets_its_folders_back(tmp_path: Path) -> None:
    run, state = tmp_path / "run", tmp_path / "state"
    folders(run, state, (AGENT, AGENT))
    folders(run, state, owner(None))
    assert {*owners(state).values(), *owners(run).values()} == {(0, 0)}


@pytest.mark.parametrize("kind", ["symlink", "folder symlink", "hard link", "stranger", "socket", "fifo"])
def test_root_gives_away_nothing_that_the_agents_user_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A link in a folder that the agent can write to must not make it the owner of another file."""
    mine, victim = tmp_path / "agent", tmp_path / "elsewhere" / "victim"
    mine.mkdir()
    os.chown(mine, AGENT, AGENT)
    victim.parent.mkdir()
    victim.write_text("root's")
    entry, own = mine / "entry", (0, 0)
    match kind:
        case "symlink":
            entry.symlink_to(victim)
        case "folder symlink":
            entry.symlink_to(victim.parent)
        case "hard link":
            entry.hardlink_to(victim)
        case "stranger":
            entry.touch()
            own = (STRANGER, STRANGER)
            os.chown(entry, *own)
        case "socket":
            with socket.socket(socket.AF_UNIX) as sock:
                monkeypatch.chdir(mine)  # pytest's folders are too deep for a socket's path
                sock.bind("entry")
        case _:
            os.mkfifo(entry)
    (mine / "zz").touch()
    give(mine, AGENT, AGENT)
    assert (victim.stat().st_uid, victim.parent.stat().st_uid) == (0, 0)
    assert (entry.lstat().st_uid, entry.lstat().st_gid) == own
    assert (mine / "zz").stat().st_uid == AGENT, "and the rest is given all the same"


def test_the_folder_itself_must_be_no_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "agent").symlink_to(elsewhere)
    with pytest.raises(OSError, match="agent"):
        give(tmp_path / "agent", AGENT, AGENT)
    assert elsewhere.stat().st_uid == 0
