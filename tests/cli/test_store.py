"""harmonyctl store: what is known beside what is shown, the risks before the question, and only then the request."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from harmony.admin import StatusReply
from harmony.cli.store import lines
from harmony.core.messages import Marks
from tests.cli.test_commands import Fakes, R, Served, replace, with_node

LOST = "the store has lost history: it went back from revision 99 (term 5) to 9 (term 3)"
DISTRUSTS = with_node(
    replace(
        R,
        myself=replace(
            R.myself, distrust=LOST, store=replace(R.myself.store, marks=Marks(5, 99, "b", "KV_x of t0"))
        ),
    ),
    "n3",
    distrust="the bucket is gone",
)


class Asked:
    """An agent that answers status and acceptances, and notes the latter."""

    def __init__(self, folder: Path, status: StatusReply, reply: object) -> None:
        self.requests: list[dict[str, object]] = []

        def answer(c: socket.socket) -> None:
            request = json.loads(c.recv(4096))
            if request["op"] == "status":
                c.sendall(msgspec.json.encode(status) + b"\n")
            else:
                self.requests.append(request)
                c.sendall(json.dumps(reply).encode() + b"\n")

        self.served = Served(folder / "agent" / "agent.sock", answer)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hctl") as name:
        (Path(name) / "agent").mkdir()
        yield Path(name)


def run(
    folder: Path, *args: str, status: StatusReply = DISTRUSTS, reply: object = None
) -> tuple[int, str, Asked]:
    asked = Asked(folder, status, reply if reply is not None else {"accepted": "all of it"})
    try:
        code, text = Fakes(folder).run(*args)
    finally:
        asked.served.close()
    return code, text, asked


def test_what_is_known_beside_what_is_shown() -> None:
    text = "\n".join(lines(DISTRUSTS))
    for part in (
        "it shows   revision 9, term 3, primary n1 (read 0.2 s ago)",
        "seen here  revision 99, term 5, of lineage KV_x of t0",
        f"n1: DISTRUSTS the store: {LOST}",
        "n2: trusts the store",
        "n3: DISTRUSTS the store: the bucket is gone",
    ):
        assert part in text
    none = replace(R.myself.store, lineage="", shown=None, marks=Marks(), memory="store.json: torn")
    text = "\n".join(lines(replace(R, myself=replace(R.myself, store=none, store_connected=False))))
    for part in ("NOT CONNECTED", "no bucket", "nothing was read yet", "nothing yet", "store.json: torn"):
        assert part in text


def test_show_says_by_its_exit_code(folder: Path) -> None:
    """For scripts: 0 trusted, 1 distrusted, 3 no agent."""
    assert run(folder, "store", "show", status=R)[0] == 0
    (folder / "agent" / "agent.sock").unlink()
    code, text, _ = run(folder, "store", "show", "--json")
    told = json.loads(text)
    assert (code, told["distrust"], told["marks"]["revision"]) == (1, LOST, 99)
    assert told["others"] == {"n1": "", "n2": "", "n3": "the bucket is gone"}
    (folder / "agent" / "agent.sock").unlink()
    code, text = Fakes(folder).run("store", "show")
    assert code == 3
    assert "the agent does not answer" in text


def test_the_risks_come_before_the_question_and_nothing_without_an_answer(folder: Path) -> None:
    """I1, I2: nobody accepts by accident: no terminal, no yes, no acceptance."""
    code, text, asked = run(folder, "store", "accept", "--found")
    assert code == 2
    assert asked.requests == []
    for part in (
        "seen here  revision 99",
        "may then be two primaries",
        "BECOMES THE CLUSTER'S",
        "not accepted",
    ):
        assert part in text


@pytest.mark.parametrize("found", [False, True])
def test_accepted(folder: Path, found: bool) -> None:
    code, text, asked = run(folder, "store", "accept", "--yes", *(["--found"] if found else []))
    assert code == 0, text
    assert "accepted: all of it" in text
    assert ("BECOMES THE CLUSTER'S" in text) is found
    (request,) = asked.requests
    assert (request["op"], request["create"]) == ("accept", found)
    assert "pid" in str(request["who"])


def test_refused(folder: Path) -> None:
    code, text, _ = run(folder, "store", "accept", "--yes", reply={"error": "not permitted for uid 7"})
    assert code == 1
    assert "the agent refused: not permitted for uid 7" in text


MOVED = replace(
    R, myself=replace(R.myself, distrust="is cluster.id right?", store=replace(R.myself.store, was_in="main"))
)


@pytest.mark.parametrize(
    ("leave", "code"), [((), 2), (("--leave", "mian"), 2), (("--leave", "c1"), 2), (("--leave", "main"), 0)]
)
def test_data_of_another_cluster_moves_only_by_its_name(
    folder: Path, leave: tuple[str, ...], code: int
) -> None:
    """I1: the hint that is printed never makes a second primary of a typo."""
    found, text, asked = run(folder, "store", "accept", "--found", "--yes", *leave, status=MOVED)
    assert found == code, text
    assert "BELONGED TO CLUSTER main, and c1 is configured" in text
    assert [r["leave"] for r in asked.requests] == ([] if code else ["main"])


def test_what_was_in_no_other_cluster_leaves_none(folder: Path) -> None:
    code, text, asked = run(folder, "store", "accept", "--yes", "--leave", "main")
    assert code == 2
    assert "is cluster.id right?" in text
    assert asked.requests == []
