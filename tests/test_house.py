"""The house's own rules: who may import whom, no unconditional writes, fields that are read, the unit."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
PACKAGES = {
    "harmony": TOP / "harmony",
    "harmony_fencer": TOP / "fencer" / "harmony_fencer",
    "harmony_supervisor": TOP / "supervisor" / "harmony_supervisor",
}
MODULES = {path: name for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_import_directions() -> None:
    """DESIGN section 1: fencer and supervisor import nothing of ours; harmony only the protocol, once."""
    crossing = set()
    for path, package in MODULES.items():
        for name in imports(path):
            top = name.partition(".")[0]
            if top in PACKAGES and top != package:
                crossing.add((str(path.relative_to(TOP)), top))
    assert crossing == {("harmony/fencer_client.py", "harmony_fencer")}
    wanted = {n for n in imports(TOP / "harmony/fencer_client.py") if n.startswith("harmony_fencer")}
    assert wanted == {"harmony_fencer", "harmony_fencer.protocol"}


def test_the_fencer_stays_small() -> None:
    """It loads neither NATS nor psycopg nor the agent's code."""
    allowed = {"harmony_fencer", "msgspec", "structlog", "trio"}
    for path, package in MODULES.items():
        if package == "harmony_fencer":
            third = {n.partition(".")[0] for n in imports(path)} - allowed
            assert not third & {"nats", "psycopg", "psutil", "click", "rich", "harmony"}, path


def test_the_core_is_pure() -> None:
    """STYLE 7: no clock, no I/O, no randomness in the decision core."""
    forbidden = {"trio", "nats", "psycopg", "time", "random", "os", "socket", "pathlib", "subprocess", "uuid"}
    for path in (TOP / "harmony" / "core").glob("*.py"):
        assert not {n.partition(".")[0] for n in imports(path)} & forbidden, path


def test_no_unconditional_write() -> None:
    """D1: the only write to the store carries the expected revision."""
    text = (TOP / "harmony/store/nats.py").read_text()
    assert "Nats-Expected-Last-Subject-Sequence" in text
    for path in (TOP / "harmony").rglob("*.py"):
        assert not re.search(r"\bkv\.|key_value\(|\.purge\(|\.put\(|js\.publish", path.read_text()), path


def test_no_field_is_written_and_never_read() -> None:
    """O6: every field of our structs is read somewhere (people read the JSON of the ones allowed here)."""
    shown = {
        # in status --json and harmony's own log for people: what was, beside what is decided on
        "seq", "boot_id", "beat", "now_boottime_ns", "postgres_starts", "at_boottime_ns", "row", "version",
        "cluster_revision", "cluster_age_s", "generation", "client", "took_ms", "gone", "self_fence",
        "store_failing_s",  # why nobody leads, and since when
        "before", "after",  # the last two by pattern matching
    }  # fmt: skip
    everything = "\n".join(path.read_text() for path in MODULES)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        name = item.target.id
                        read = re.search(rf"\.{name}\b(?!\s*=[^=])|\b{name}=\w+\)", everything)
                        assert read or name in shown, f"{path.name}: {node.name}.{name}"


def test_modules_fit_in_the_head() -> None:
    for path in MODULES:
        lines = len(path.read_text().splitlines())
        assert lines <= 500, f"{path}: {lines} lines"


def test_nothing_is_patched() -> None:
    for path in (TOP / "tests").rglob("*.py"):
        if path != Path(__file__):
            assert "mock.patch" not in path.read_text(), path
    assert not list((TOP / "systemd").rglob("__init__.py"))
    scripts = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"harmonyctl", "harmony-supervisor", "harmony-agent", "harmony-fencer"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
@pytest.mark.parametrize(("name", "exposure"), [("harmony.service", 50), ("harmony-boot-fence.service", 35)])
def test_the_units(tmp_path: Path, name: str, exposure: int) -> None:
    """`verify` exits 0 on unknown keys: its stderr must be empty; the exposure (tenths) stays low."""
    text = (TOP / "systemd" / name).read_text()
    unit = tmp_path / name
    unit.write_text(re.sub(r"(?m)^(Exec\w+=-?)\S+", r"\1/bin/true", text))
    verify = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (verify.returncode, verify.stderr) == (0, "")
    argv = ["systemd-analyze", "security", "--offline=yes", f"--threshold={exposure}", str(unit)]
    security = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert security.returncode == 0, security.stdout[-300:]


def test_the_unit_keeps_its_promises() -> None:
    """What the argument for safety rests on: a hung supervisor is killed, PostgreSQL is not, someone fences."""
    text = (TOP / "systemd/harmony.service").read_text()
    for line in ("Type=notify", "WatchdogSec=", "WatchdogSignal=SIGKILL", "KillMode=process", "Delegate=yes"):
        assert line in text
    for line in ("ExecStopPost=-", "--if-unguarded", "RestartPreventExitStatus=78"):
        assert line in text


def test_killed_databases_leave_nothing_on_the_machine() -> None:
    """tests/conftest.py: their shared memory goes with the tests' own namespaces."""
    if subprocess.run(["unshare", "--mount", "--ipc", "true"], capture_output=True, check=False).returncode:
        pytest.skip(
            "not allowed to make namespaces: what a killed PostgreSQL left is taken back node by node"
        )
    parent = Path(f"/proc/{os.getppid()}/ns/ipc")
    assert Path("/proc/self/ns/ipc").readlink() != parent.readlink()
    assert "harmony-tests" in Path("/proc/self/mounts").read_text()
