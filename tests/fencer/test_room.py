"""What the fencer sees of its host: room for a copy, a run_dir in memory; and what its children inherit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harmony_fencer.places import must_fit, there
from harmony_fencer.programs import PostgresError
from harmony_fencer.realtime import on_a_disk, ordinary


def test_a_copy_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    """What is copied already counts, and what is to be kept free, too."""
    found = os.statvfs(tmp_path)
    free_kb = found.f_bavail * found.f_frsize // 1024
    must_fit(tmp_path, 0, free_kb // 2, 0)
    must_fit(tmp_path, 0, 2 * free_kb, 2 * free_kb)
    for keep_free_mb, total_kb in ((0, 2 * free_kb), (2 * free_kb // 1024, free_kb // 2)):
        with pytest.raises(PostgresError, match="the disk is too small for a copy"):
            must_fit(tmp_path, keep_free_mb, total_kb, 0)


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    """Whoever took it for nothing would rename onto it."""
    assert not there(tmp_path / "link")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert there(tmp_path / "link")


@pytest.mark.parametrize(("kind", "said"), [("ext4", True), ("tmpfs", False), ("ramfs", False)])
def test_a_run_dir_on_a_disk_is_told(tmp_path: Path, kind: str, said: bool) -> None:
    device = tmp_path.stat().st_dev
    table = tmp_path / "mountinfo"
    table.write_text(f"22 1 {os.major(device)}:{os.minor(device)} / / rw - {kind} /dev/x rw\n")
    told = on_a_disk(tmp_path, table)
    assert bool(told) is said
    assert not told or kind in told[0]


SCHEDULED = """
import json, os, sys
os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
from harmony_fencer.realtime import ordinary
print(json.dumps(ordinary()))
"""


def test_a_childs_scheduling_is_ordinary() -> None:
    """PostgreSQL at the fencer's priority would keep the fencer from its turn."""
    done = subprocess.run(
        [sys.executable, "-c", SCHEDULED], capture_output=True, text=True, check=False, timeout=60
    )
    if "PermissionError" in done.stderr:
        pytest.skip("no real-time scheduling here")
    assert json.loads(done.stdout)[:3] == ["chrt", "--other", "0"]
    assert "chrt" not in ordinary()
