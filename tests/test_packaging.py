"""What users install: a wheel that holds all it promises, and a lock that is whole and names no machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from tests.test_house import TOP

PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
LOCK = (TOP / "requirements.lock").read_text()


def locked() -> dict[str, str]:
    """Name to version."""
    return dict(re.findall(r"(?m)^([a-z0-9-]+)==(\S+)", LOCK))


def test_the_wheel_holds_every_module_and_every_unit(tmp_path: Path) -> None:
    """harmony-boot-fence.service and PostgreSQL's drop-in are what makes a boot safe."""
    argv = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(argv, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        units = {n.removeprefix("harmony/share/"): wheel.read(n) for n in wheel.namelist() if "/share/" in n}
        names = set(wheel.namelist())
    assert units == {p.name: p.read_bytes() for p in (TOP / "systemd").iterdir()}
    assert {"harmony.service", "harmony-boot-fence.service", "postgresql-harmony.conf"} <= set(units)
    for package in ("harmony", "fencer/harmony_fencer", "supervisor/harmony_supervisor"):
        top = (TOP / package).parent
        assert {str(p.relative_to(top)) for p in (TOP / package).rglob("*.py")} <= names


def test_everything_is_locked_by_hash() -> None:
    """pip refuses a lock of which one package has none; it does not refuse another index, or a file of one machine."""
    for block in re.split(r"(?m)^(?=[a-z])", LOCK)[1:]:
        assert re.match(r"[a-z0-9-]+==[\w.]+( ; .*)? \\\n    --hash=sha256:[0-9a-f]{64}", block), block[:80]
    assert not re.search(r"://|(?m:^-)|@ |\.\./", LOCK)


def test_the_lock_is_of_this_project() -> None:
    """Each declared requirement is in it, in an allowed version, below a bound; `make lock` writes it anew."""
    versions = locked()
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["embedded"], *extras["dev"]]:
        wanted = Requirement(text)
        assert versions[wanted.name] in wanted.specifier, f"{text}: {versions[wanted.name]} is locked"
    for text in PROJECT["dependencies"]:
        assert {s.operator for s in Requirement(text).specifier} == {">=", "<"}, text
    assert "editables" in versions, "else an editable install would fetch it"
    assert "hatchling" in versions
