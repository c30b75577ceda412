"""A real PostgreSQL data directory, initialised once and copied for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmony.demo.cluster import memory_folder
from harmony.demo.parts import Parts, find_parts, run_as
from tests.fencer.node import Node, Template
from tests.fencer.pair import Pair, Primary


def make_template(top: Path, parts: Parts) -> Template:
    """One initdb under `top`, for many copies."""
    postgres, user = parts.postgres, parts.users.postgres
    data = top / "template"
    data.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(data, user)
    argv = [f"{postgres.bin_dir}/initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
    run_as(user, argv, postgres.library_dir, 60)
    with (data / "postgresql.conf").open("a") as f:
        f.write("fsync = off\nshared_buffers = 16MB\n")
    return Template(data, postgres, user)


@pytest.fixture(scope="session")
def template() -> Iterator[Template]:
    top = Path(tempfile.mkdtemp(prefix="hf-"))
    top.chmod(0o755)
    scratch = top / "scratch"
    scratch.mkdir(mode=0o755)
    yield make_template(top, find_parts(scratch))
    shutil.rmtree(top)


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
