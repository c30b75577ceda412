"""A real PostgreSQL data directory, initialised once and copied for each test."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmony.demo.cluster import memory_folder
from harmony.demo.parts import Parts, find_parts, run_as
from tests.fencer.node import Node, Template
from tests.fencer.pair import Pair, Primary

# For `postgres --single`, which takes a statement a line.
NO_TEMPLATE0 = """UPDATE pg_database SET datistemplate = false WHERE datname = 'template0'
DROP DATABASE template0"""


def make_template(top: Path, parts: Parts, *, whole: bool = False) -> Template:
    """One initdb under `top`, for many copies: without template0 unless it is to be `whole`, and with holes where its
    WAL is zeros. Copying it was an eighth of all that these tests need of a core."""
    postgres, user = parts.postgres, parts.users.postgres
    data, small = top / "made", top / "template"
    data.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(data, user)
    argv = [f"{postgres.bin_dir}/initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
    run_as(user, argv, postgres.library_dir, 60)
    if not whole:
        alone = [f"{postgres.bin_dir}/postgres", "--single", "-D", str(data), "-c", "fsync=off", "postgres"]
        done = run_as(
            user,
            ["sh", "-c", f"echo {shlex.quote(NO_TEMPLATE0)} | {shlex.join(alone)}"],
            postgres.library_dir,
            60,
        )
        assert done.returncode == 0, done
    subprocess.run(["cp", "-a", "--sparse=always", str(data), str(small)], check=True)
    shutil.rmtree(data)
    with (small / "postgresql.conf").open("a") as f:
        f.write("fsync = off\nshared_buffers = 16MB\n")
    return Template(small, postgres, user)


@contextmanager
def made_template(*, whole: bool = False) -> Iterator[Template]:
    """Of the PostgreSQL that is found here; gone afterwards. Raises SetupError."""
    top = Path(tempfile.mkdtemp(prefix="hf-"))
    top.chmod(0o755)
    scratch = top / "scratch"
    scratch.mkdir(mode=0o755)
    try:
        yield make_template(top, find_parts(scratch), whole=whole)
    finally:
        shutil.rmtree(top)


@pytest.fixture(scope="session")
def template() -> Iterator[Template]:
    with made_template() as made:
        yield made


@pytest.fixture
def node(template: Template) -> Iterator[Node]:
    top = Path(tempfile.mkdtemp(prefix="hf-"))
    top.chmod(0o755)
    made = Node(top, template)
    yield made
    made.destroy()
    shutil.rmtree(top)


@contextmanager
def pair_of(template: Template) -> Iterator[Pair]:
    """Gone afterwards, with all that they run."""
    tops = [Path(tempfile.mkdtemp(prefix="hf-", dir=memory_folder())) for _ in range(2)]
    for top in tops:
        top.chmod(0o755)
    node, primary = Node(tops[0], template), Primary(tops[1], template)
    yield Pair(node, primary)
    primary.stop()
    node.destroy()
    for top in tops:
        shutil.rmtree(top)


@pytest.fixture
def pair(template: Template) -> Iterator[Pair]:
    with pair_of(template) as made:
        yield made
