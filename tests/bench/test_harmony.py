"""How the benches ask Harmony: a cluster that is degraded is told of, and is no failure of the bench."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.ha.harmony import Harmony
from tests.hosts.host import HostError


@dataclass
class Local:
    """A host whose programs run here."""

    folder: Path

    def run(self, argv: list[str], *, timeout: float, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout)
        if check and done.returncode:
            raise HostError(f"exited {done.returncode}")
        return done


def peer(folder: Path, script: str) -> Harmony:
    """Whose harmonyctl is this script."""
    program = folder / "harmonyctl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    made = object.__new__(Harmony)
    made._bin = folder
    made._lab = SimpleNamespace(hosts={"n1": Local(folder)})  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_status_is_read_whatever_it_judges(tmp_path: Path, code: int) -> None:
    said = peer(tmp_path, f'echo \'{{"myself": {{"changes": 2}}}}\'; exit {code}').status("n1")
    assert said == {"myself": {"changes": 2}}


def test_no_answer_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="exited 3: nobody answers"):
        peer(tmp_path, "echo nobody answers >&2; exit 3").status("n1")
