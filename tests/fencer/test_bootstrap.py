"""From nothing: the operator's command and its contract, an interrupted start, and what is never touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harmony_fencer import protocol
from tests.fencer.node import Node
from tests.fencer.pair import Pair

pytestmark = [pytest.mark.real, pytest.mark.sampled(0.5)]
ROLES = "CREATE ROLE one LOGIN;\n-- a comment\n\nCREATE ROLE two LOGIN REPLICATION;\n"


def empty(node: Node, method: str, **more: object) -> None:
    """No data directory, and its parent's owner may make one."""
    shutil.rmtree(node.data)
    node.configure(bootstrap={"method": method, **more})


def command(node: Node, text: str) -> str:
    """A shell script of that text in PATH's place; PostgreSQL's user may run it."""
    path = node.top / "make"
    bin_dir, library = node.template.postgres.bin_dir, node.template.postgres.library_dir
    path.write_text(f"#!/bin/sh -e\nPATH={bin_dir}:$PATH\nexport LD_LIBRARY_PATH={library or ''}\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def source(pair: Pair) -> Pair:
    """n2 leads, and n1 has nothing yet."""
    pair.primary.copy(pair.node.template.data)
    pair.primary.start()
    pair.primary.run("CREATE TABLE rows (x text)")
    pair.primary.run("INSERT INTO rows VALUES ('common'), ('new primary')")
    return pair


WHERE = "-h $HARMONY_PRIMARY_HOST -p $HARMONY_PRIMARY_PORT -U $HARMONY_REPLICATION_USER"
COPY = f"pg_basebackup -D $HARMONY_DATA_DIR {WHERE} -c fast"


WRONG = [
    ("echo no such backup; exit 3", "exited 3: no such backup"),
    ("true", "is no data directory"),
    ("initdb -D $HARMONY_DATA_DIR -N > /dev/null", "thrown away"),
    ("sleep 60", "did not end within 6 s"),
]


def test_a_standby_by_the_operators_command(source: Pair) -> None:
    """What it is told, what is checked afterwards, what makes no such standby; then it is one as any other."""
    node = source.node
    empty(node, "command", command=command(node, ""), timeout_s=6.0)
    node.start()
    assert node.status().empty == "command"
    for text, said in WRONG:
        command(node, text)
        record = source.rejoin()
        assert (record.state, said in record.detail) == ("failed", True), record
        assert not node.data.exists(), "nothing of it is put in place"
    told = "env | grep ^HARMONY_ | sort > $HARMONY_DATA_DIR/told"
    command(node, f"{COPY}\n{told}\ntouch $HARMONY_DATA_DIR/recovery.signal")
    record = source.rejoin()
    assert record.state == "done", (record, node.log())
    source.healthy()
    lines = dict(line.split("=", 1) for line in (node.data / "told").read_text().splitlines())
    assert lines == {
        "HARMONY_ROLE": "standby",
        "HARMONY_NODE": "n1",
        "HARMONY_DATA_DIR": f"{node.data}.harmony-new",
        "HARMONY_SYSTEM_IDENTIFIER": source.system(),
        "HARMONY_PRIMARY": "n2",
        "HARMONY_PRIMARY_HOST": "127.0.0.1",
        "HARMONY_PRIMARY_PORT": str(source.primary.port),
        "HARMONY_REPLICATION_USER": "postgres",
    }
    assert (node.status().system_identifier, node.status().was_standby) == (source.system(), True)
    assert source.beside == {}


def test_what_is_no_data_directory_is_never_touched(source: Pair) -> None:
    """Neither copied over nor founded in."""
    node = source.node
    for method in ("copy", "initdb"):
        shutil.rmtree(node.data)
        node.data.mkdir(mode=0o700)
        if node.template.user is not None:
            shutil.chown(node.data, node.template.user)
        (node.data / "precious").write_text("mine")
        node.configure(bootstrap={"method": method})
        node.start()
        assert node.status().empty == ""
        record = source.rejoin(clone=True)
        assert (record.state, "is not empty, and no data directory" in record.detail) == ("failed", True), (
            record
        )
        source.order += 1
        assert isinstance(node.activate(2, source.order), protocol.Accepted)
        assert node.outcome(renewing=True).state == "failed"
        assert source.beside == {}
        assert (node.data / "precious").read_text() == "mine"
        node.kill_fencer()


@pytest.mark.parametrize("method", ["initdb", "command"])
def test_founded_by_the_first_activation(node: Node, method: str) -> None:
    """Also over what an interrupted initdb left; with its roles and its own pg_hba.conf."""
    made = command(
        node,
        'initdb -D "$HARMONY_DATA_DIR" -U postgres -A trust -N > /dev/null; test $HARMONY_ROLE = founder',
    )
    options = ["--username=postgres", "--auth=reject", "--encoding=UTF8", "--no-sync"]
    hba = ["local all all trust", "host all all 127.0.0.1/32 trust"]
    empty(node, method, initdb_options=options, hba=hba, sql=ROLES, command=made, timeout_s=60.0)
    left = Path(f"{node.data}.harmony-new")
    left.mkdir()
    (left / "PG_VERSION").write_text("15\n")
    if node.template.user is not None:
        for path in (left, left / "PG_VERSION"):
            shutil.chown(path, node.template.user)
    node.start()
    assert (node.status().empty, node.status().system_identifier) == (method, None)
    node.activate(1, 1, timeline=2)
    record = node.outcome(renewing=True)
    assert (record.state, record.timeline) == ("done", 2), (record, node.log())
    assert node.writable()
    if method == "initdb":
        with node.connect() as c:
            rows = c.execute(
                "SELECT rolname, rolreplication FROM pg_roles WHERE rolname IN ('one', 'two')"
            ).fetchall()
        assert sorted(rows) == [("one", False), ("two", True)]
    node.wait(lambda: node.status().system_identifier is not None, "it knows what it is")
    assert not left.exists()
    node.fence(1, 2)
    assert not node.status().was_standby, "started as one, and promoted"
    node.make_writable(1, 3)


def test_a_wrong_statement_is_named(node: Node) -> None:
    """And nothing stands there afterwards that could be taken for a cluster."""
    empty(
        node,
        "initdb",
        initdb_options=["--username=postgres", "--no-sync"],
        sql="CREATE ROLE x; GRANT nobody TO x;",
    )
    node.start()
    node.activate(1, 1)
    record = node.outcome(renewing=True)
    assert (record.state, "bootstrap.sql_file" in record.detail, "nobody" in record.detail) == (
        "failed",
        True,
        True,
    )
    assert not node.data.exists()
