"""harmonyctl where nobody answers; all the rest of it is in tests/cli."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from harmony.cli.main import cli


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
