"""harmonyctl's judgement of the cluster, and its way to the fencer when all else is dead."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from harmony.admin import NodeView, SelfView, StatusReply
from harmony.cli.main import cli
from harmony.core.states import State
from harmony.verdict import judge
from tests.core.helpers import cluster, member


def reply(**changes: object) -> StatusReply:
    def view(name: str, **more: object) -> NodeView:
        return NodeView(name, "h", 1, member(name, **more), 0.1, alive=True)

    fields: dict[str, object] = {
        "cluster_id": "c",
        "cluster": cluster(),
        "cluster_revision": 5,
        "cluster_age_s": 0.2,
        "cluster_stale": False,
        "nodes": (view("n1", db="primary", streaming=False), view("n2"), view("n3")),
        "myself": SelfView("n2", "replica/watching", "0", "", True, 0, None, True, "", None),
    }
    return StatusReply(**(fields | changes))  # type: ignore[arg-type]


def test_healthy() -> None:
    assert (judge(reply()).code, judge(reply()).findings) == (0, ())


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"cluster": None}, 2, "no record"),
        ({"cluster": cluster(primary=None)}, 2, "vacant"),
        ({"cluster_stale": True}, 2, "stale"),
        ({"cluster": cluster(status=State.FENCED)}, 2, "primary/fenced"),
        ({"myself": SelfView("n2", "x", "0", "", False, 0, None, True, "", None)}, 3, "not connected"),
        ({"nodes": (NodeView("n1", "h", 1, None, None, alive=False),)}, 1, "n1 is not heard of"),
        (
            {"nodes": (NodeView("n2", "h", 1, member("n2", streaming=False), 0.1, alive=True),)},
            1,
            "not stream",
        ),
        ({"nodes": (NodeView("n2", "h", 1, member("n2", latched=True), 0.1, alive=True),)}, 1, "latched"),
        ({"nodes": (NodeView("n2", "h", 1, member("n2", fencer_ok=False), 0.1, alive=True),)}, 1, "fencer"),
    ],
)
def test_exit_codes(changes: dict[str, object], code: int, reason: str) -> None:
    """0 healthy, 1 degraded, 2 no primary, 3 cannot tell; always with the reason."""
    verdict = judge(reply(**changes))
    assert verdict.code == code
    assert reason in " ".join(verdict.reasons)


def test_nobody_there(tmp_path: Path) -> None:
    """3 when neither agent nor fencer answers; a fence that cannot be made is never said to be made."""
    status = CliRunner().invoke(cli, ["status", "--run-dir", str(tmp_path)])
    assert status.exit_code == 3
    assert "nor does the fencer" in status.output
    fence = CliRunner().invoke(cli, ["fence", "--force", "--run-dir", str(tmp_path)])
    assert fence.exit_code == 1
    assert "stop PostgreSQL by hand" in fence.output
    asked = CliRunner().invoke(cli, ["fence", "--run-dir", str(tmp_path)])
    assert asked.exit_code == 2
    assert "--force" in asked.output
