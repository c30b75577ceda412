"""The configuration where problems meet: everything still in one answer, and nothing crashes (C1, C2)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.config import SECTIONS, load
from harmony.config_file import MAX_FILE_BYTES
from harmony.config_text import parameters
from harmony.errors import ConfigError
from harmony.resolve import find_bin_dir
from tests.config.test_config import GOOD, problems, write


def test_relations_are_judged_beside_other_problems(tmp_path: Path) -> None:
    """C2: an unknown key hides neither the inequality nor a wrong name."""
    text = GOOD.replace('name = "n2"', 'name = "n9"\ncolour = 1')
    text += "[timing]\nfailover_timeout_s = 3\nx = 1\n[replication]\nsynchronous_count = 3\n"
    found = "\n".join(problems(write(tmp_path, text), {"HARMONY_NODE_X": "1"}))
    for place in (
        "node.colour: unknown key",
        "node.name: n9 is not in [members]",
        "timing.x: unknown key",
        "timing.failover_timeout_s (preset standard): failover_timeout_s 3",
        "replication.synchronous_count: 3 must be below",
        "environment: HARMONY_NODE_X: unknown",
    ):
        assert place in found, found


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (("[postgresql]", "[timing]\nfailover_timeout_s = nan\n[postgresql]"), "timing.failover_timeout_s:"),
        (("[postgresql]", "[timing]\nfence_timeout_s = inf\n[postgresql]"), "timing.fence_timeout_s:"),
        (("[postgresql]", "[timing]\nfailure_threshold = 0\n[postgresql]"), "timing.failure_threshold:"),
        (("[postgresql]", "[timing]\nfailure_threshold = true\n[postgresql]"), "timing.failure_threshold:"),
        (("[postgresql]", "[timing]\nheartbeat_interval_s = 0\n[postgresql]"), "timing.heartbeat_interval_s"),
        (("[postgresql]", "[store]\nurls = []\n[postgresql]"), "store.urls"),
        (("[postgresql]", "[store]\nurls = ['localhost:1']\n[postgresql]"), "nats://HOST:PORT"),
        (("[postgresql]", "[store]\nreplicas = 2\n[postgresql]"), "store.replicas"),
        (("10.0.0.1", "10.0.0.1 "), "members.n1.host: '10.0.0.1 ' is not allowed; must be a host name"),
        (("10.0.0.1", "10.0.0.2"), "members.n2: same host and port as n1"),
        (("[members.n1]", "[members.N1]"), "members.N1: the name is not allowed"),
        (("[postgresql]", "[postgresql]\nuser = 'a b'"), "postgresql.user"),
        (("[postgresql]", "[postgresql]\nsocket_dir = '/" + "s" * 100 + "'"), "postgresql.socket_dir:"),
        (("[cluster]", "store = 1\n[cluster]"), "store: must be a table"),
        (("[cluster]", "timing = 1\n[cluster]"), "timing: must be a table"),
        (("[cluster]", "[cluster\n"), "line 2, column"),
    ],
)
def test_bad(tmp_path: Path, change: tuple[str, str], place: str) -> None:
    assert place in "\n".join(problems(write(tmp_path, GOOD.replace(*change))))


def test_one_member_needs_mode_off(tmp_path: Path) -> None:
    text = GOOD.split("[members.n1]")[0] + '[members.n2]\nhost = "h"\n[postgresql]\ndata_dir = "/d"\n'
    path = write(tmp_path, text.replace('"n1"', '"n2"'))
    (found,) = problems(path)
    assert 'set mode = "off"' in found
    assert load(path, {"HARMONY_REPLICATION_MODE": "off"}).replication.mode == "off"


def test_members_from_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    c = load(path, {"HARMONY_MEMBERS": "n1=a:1, n2=[::1]:2"})
    assert {n: (m.host, m.port) for n, m in c.members.items()} == {"n1": ("a", 1), "n2": ("::1", 2)}
    found = "\n".join(problems(path, {"HARMONY_MEMBERS": "n1=a:1,n2,n3=b:x,n1=a:2"}))
    assert found.count("must be NAME=HOST:PORT") == 3


def test_environment_problems(tmp_path: Path) -> None:
    """Each names its variable; also beside a file that cannot be read; no password is repeated."""
    env = {"HARMONY_TIMING_FENCE_TIMEOUT_S": "nan", "HARMONY_STORE_URLS": "nats://u:secret@h/ /", "HOME": "/"}
    found = problems(write(tmp_path, GOOD), env)
    assert [p.split(":")[:2] for p in found] == [
        ["environment", " HARMONY_STORE_URLS"],
        ["environment", " HARMONY_TIMING_FENCE_TIMEOUT_S"],
    ]
    assert "secret" not in "".join(found)
    assert len(problems(tmp_path / "none.toml", env)) == 3


@pytest.mark.parametrize("data", [b"\xff\xfe", b"x = " + b"[" * 5000, b"#" * (MAX_FILE_BYTES + 1), b"\x00"])
def test_no_toml(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "harmony.toml"
    path.write_bytes(data)
    assert len(problems(path)) == 1


def test_bin_dir_of_the_right_major_version(tmp_path: Path) -> None:
    for name in ("9.6", "15", "17", "rubbish"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "postgres").touch()
    data = tmp_path / "data"
    assert find_bin_dir(str(data), str(tmp_path)) == str(tmp_path / "17" / "bin")
    data.mkdir()
    for version, found in (("15", str(tmp_path / "15" / "bin")), ("16", None)):
        (data / "PG_VERSION").write_text(version + "\n")
        assert find_bin_dir(str(data), str(tmp_path)) == found


SECONDS = st.floats(0.1, 30)


@settings(max_examples=60)
@given(st.sampled_from(["fast", "standard", "wan"]), SECONDS, SECONDS, st.integers(1, 9), SECONDS)
def test_whatever_is_loaded_keeps_the_inequality(
    tmp_path_factory: pytest.TempPathFactory, preset: str, timeout: float, fence: float, n: int, over: float
) -> None:
    """C1: through load(), presets with single values over them."""
    path = tmp_path_factory.getbasetemp() / "property.toml"
    values = f"heartbeat_timeout_s = {timeout}\nfence_timeout_s = {fence}\nfailure_threshold = {n}\n"
    path.write_text(GOOD + f'[timing]\npreset = "{preset}"\nfailover_timeout_s = {over}\n{values}')
    try:
        t = load(path, {}).timing
    except ConfigError as e:
        places = {p.removeprefix(f"{path}: ").partition(":")[0].partition(" ")[0] for p in e.problems}
        fitting = {"timing.fence_timeout_s", "timing.heartbeat_timeout_s"}  # test_times.py
        assert places <= {"timing.failover_timeout_s"} | fitting
    else:
        assert t.failover_timeout_s > t.lease_s + t.fence_timeout_s + t.safety_margin_s - 1e-6


def test_every_parameter_has_a_variable(tmp_path: Path) -> None:
    """C2: no key of any section is unknown as HARMONY_<SECTION>_<KEY>."""
    for section, kind in SECTIONS.items():
        for f in msgspec.structs.fields(kind):
            try:
                load(write(tmp_path, GOOD), {f"HARMONY_{section}_{f.name}".upper(): "1"})
            except ConfigError as e:
                assert "unknown" not in str(e)  # noqa: PT017


def test_every_parameter_is_explained() -> None:
    """C4: meaning, range, and what changing it costs; seconds and bytes have their unit."""
    for p in parameters():
        assert all(len(text) > 2 for text in (p.meaning, p.cost, p.range)), p
        assert bool(p.unit) == p.key.endswith(("_s", "_bytes")), p
