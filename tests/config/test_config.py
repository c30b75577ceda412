"""The configuration: strict, everything at once, with its place (C1, C2, C3, C4)."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.cli.main import cli
from harmony.config import Config, load
from harmony.config_text import example, markdown
from harmony.core.timing import Timing
from harmony.errors import ConfigError
from harmony.mounts import is_mount
from harmony.resolve import find_config_file, remarks, resolve, warnings
from harmony_fencer import mounts
from harmony_fencer.config import FencerConfig

GOOD = """
[cluster]
id = "main"
preferred_primary = "n1"
[node]
name = "n2"
run_dir = "/tmp/r"
[members.n1]
host = "10.0.0.1"
[members.n2]
host = "10.0.0.2"
[members.n3]
host = "10.0.0.3"
port = 5433
[postgresql]
data_dir = "/tmp/nowhere"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "harmony.toml"
    path.write_text(text)
    return path


def problems(path: Path, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, env or {})
    return caught.value.problems


def test_defaults(tmp_path: Path) -> None:
    c = load(write(tmp_path, GOOD), {})
    assert c.timing.lease_s == 11
    assert (c.members["n1"].port, c.members["n3"].port) == (5432, 5433)
    assert msgspec.json.decode(msgspec.json.encode(c), type=Config) == c


def test_every_problem_at_once_with_its_place(tmp_path: Path) -> None:
    """C2: unknown keys and sections, wrong types and ranges, missing keys: all in one answer."""
    text = GOOD.replace('id = "main"', 'id = "Bad Id"\ncolour = 1').replace("port = 5433", 'port = "x"')
    text += '\n[timming]\nx = 1\n[timing]\npreset = "slow"\nfence_timout_s = 1\nheartbeat_interval_s = -1\n'
    found = "\n".join(problems(write(tmp_path, text)))
    for place in (
        "cluster.id:",
        "cluster.colour: unknown key",
        "members.n3.port:",
        "timming: unknown section; did you mean timing?",
        "timing.preset:",
        "timing.fence_timout_s: unknown key; did you mean fence_timeout_s?",
        "timing.heartbeat_interval_s:",
    ):
        assert place in found, found


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (('name = "n2"', 'name = "n9"'), "node.name: n9 is not in [members]"),
        (('preferred_primary = "n1"', 'preferred_primary = "x"'), "cluster.preferred_primary: x"),
        (('preferred_primary = "n1"', ""), "cluster.preferred_primary: missing"),
        (('"/tmp/r"', '"relative"'), "node.run_dir:"),
        (('"/tmp/r"', '"/' + "r" * 120 + '"'), "node.run_dir: /rrr"),
        (("port = 5433", "port = 0"), "members.n3.port"),
        (
            ("[postgresql]", "[replication]\nsynchronous_count = 3\n[postgresql]"),
            "replication.synchronous_count",
        ),
        (("[cluster]", "[cluster"), "not TOML"),
    ],
)
def test_bad_values(tmp_path: Path, change: tuple[str, str], place: str) -> None:
    assert place in "\n".join(problems(write(tmp_path, GOOD.replace(*change))))


SLOT = "[replication.permanent_slots."


@pytest.mark.parametrize(
    ("slots", "place"),
    [
        (
            f'{SLOT}a]\ntype = "physical"\nplugin = "x"\n',
            "permanent_slots.a.plugin: a physical slot has none",
        ),
        (f'{SLOT}a]\ntype = "logical"\nplugin = "x"\n', "permanent_slots.a.database: missing"),
        (f'{SLOT}a]\ntype = "logical"\ndatabase = "x"\n', "permanent_slots.a.plugin: missing"),
        (
            f'{SLOT}a]\ntype = "logical"\nplugin = "x"\ndatabase = 1\n',
            "permanent_slots.a.database: 1 is not allowed",
        ),
        (f"{SLOT}a]\n", "permanent_slots.a.type: missing"),
        (f'{SLOT}a]\ntype = "round"\n', "permanent_slots.a.type: 'round' is not allowed"),
        (f'{SLOT}a]\ntype = "physical"\ncolour = 1\n', "permanent_slots.a.colour: unknown key"),
        (f'{SLOT}A-b]\ntype = "physical"\n', "must be 1 to 63 of a-z 0-9 _"),
        (f'{SLOT}harmony_member_x]\ntype = "physical"\n', "are the members' own slots"),
        ("[replication]\npermanent_slots = 1\n", "permanent_slots: must be a table"),
        (f'[replication]\nslots = false\n{SLOT}a]\ntype = "physical"\n', "needs replication.slots = true"),
        (
            "[members.n-1]\nhost = '10.0.0.4'\n[members.n_1]\nhost = '10.0.0.5'\n",
            "members.n_1: its replication slot",
        ),
    ],
)
def test_slots_in_the_configuration(tmp_path: Path, slots: str, place: str) -> None:
    (found,) = problems(write(tmp_path, GOOD + slots))
    assert place in found


def test_good_slots_in_the_configuration(tmp_path: Path) -> None:
    text = f'{SLOT}a]\ntype = "physical"\n{SLOT}b]\ntype = "logical"\ndatabase = "d"\nplugin = "p"\n'
    c = load(write(tmp_path, GOOD + text), {})
    assert c.replication.permanent_slots["b"].plugin == "p"
    assert c.replication.logical_slots
    assert msgspec.json.decode(msgspec.json.encode(c), type=Config) == c
    found = problems(write(tmp_path, GOOD), {"HARMONY_REPLICATION_PERMANENT_SLOTS": "a"})
    assert "tables are for the file" in found[0]


def test_the_inequality(tmp_path: Path) -> None:
    """C1: refused, naming every number."""
    text = GOOD + "[timing]\npreset = 'fast'\nfailover_timeout_s = 3.5\n"
    (found,) = problems(write(tmp_path, text))
    for number in (
        "3.5",
        "lease 2",
        "0.5",
        "× failure_threshold 3",
        "fence_timeout_s 1",
        "safety_margin_s 0.5",
    ):
        assert number in found


@settings(max_examples=50)
@given(
    st.floats(0.1, 5),
    st.floats(0.1, 5),
    st.integers(1, 9),
    st.floats(0.1, 5),
    st.floats(0.1, 5),
    st.floats(1, 60),
)
def test_no_accepted_timing_violates_it(a: float, b: float, n: int, f: float, m: float, over: float) -> None:
    """C1: whatever is accepted leaves room for lease, fence and margin."""
    t = Timing(
        heartbeat_interval_s=a,
        heartbeat_timeout_s=b,
        failure_threshold=n,
        success_threshold=1,
        fence_timeout_s=f,
        safety_margin_s=m,
        failover_timeout_s=over,
    )
    assert (t.violation() is None) == (t.failover_ns > t.lease_ns + t.stop_ns + t.margin_ns)


def test_environment(tmp_path: Path) -> None:
    """C2: variables lie over the file; unknown ones are errors."""
    path = write(tmp_path, GOOD)
    env = {
        "HARMONY_TIMING_PRESET": "fast",
        "HARMONY_NODE_PRIORITY": "7",
        "HARMONY_NODE_NOFAILOVER": "true",
        "HARMONY_STORE_URLS": "nats://a:1,nats://b:2",
    }
    c = load(path, env)
    assert (c.timing.lease_s, c.node.priority, c.node.nofailover) == (2.0, 7, True)
    assert c.store.urls == ["nats://a:1", "nats://b:2"]
    found = "\n".join(problems(path, {"HARMONY_TIMING_PRESETT": "x", "HARMONY_NODE_PRIORITY": "x"}))
    assert "did you mean HARMONY_TIMING_PRESET?" in found
    assert "HARMONY_NODE_PRIORITY" in found


def test_the_example_is_valid(tmp_path: Path) -> None:
    text = example()
    assert load(write(tmp_path, text), {}).cluster.id == "main"
    everything = re.sub(r"(?m)^# ([a-z_]+ = (?!\.\.\.))", r"\1", text)
    assert "heartbeat_interval_s" in everything
    tomllib.loads(everything)


def test_resolve(tmp_path: Path) -> None:
    """What the fencer is started with is what it accepts; what does not fit the machine is named."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "postgresql.conf").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("postgres", "pg_ctl", "pg_controldata"):
        (programs / name).touch()
    text = GOOD.replace("/tmp/nowhere", str(data))  # noqa: S108
    text += f'bin_dir = "{programs}"\nuser = "{data.owner()}"\n'
    resolved = resolve(load(write(tmp_path, text), {}))
    fencer = msgspec.json.decode(msgspec.json.encode(resolved["fencer"]), type=FencerConfig)
    assert (fencer.lease_s, fencer.port) == (11.0, 5432)
    supervisor = resolved["supervisor"]
    assert (supervisor["ping_interval_s"], supervisor["ping_timeout_s"]) == (0.5, 3.0)
    assert (fencer.slots.own, fencer.slots.keep_mb, fencer.slots.synced) == (True, 0, False)
    logical = f'{text}{SLOT}b]\ntype = "logical"\ndatabase = "d"\nplugin = "p"\n'
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(ConfigError, match=r"from PostgreSQL 17 on, this is 16"):
        resolve(load(write(tmp_path, logical), {}))
    (data / "PG_VERSION").write_text("17\n")
    wanted = resolve(load(write(tmp_path, logical), {}))["fencer"]["slots"]
    assert wanted == {"own": True, "keep_mb": 0, "synced": True}
    missing = GOOD + 'user = "no-such-user"\nbin_dir = "/nowhere"\n'
    with pytest.raises(ConfigError) as caught:
        resolve(load(write(tmp_path, missing), {}))
    found = "\n".join(caught.value.problems)
    for place in ("postgresql.user", "postgresql.data_dir", "postgresql.config_file", "postgresql.bin_dir"):
        assert place in found


def test_what_does_not_fit_the_host_is_named(tmp_path: Path) -> None:
    """C3: before anything is started; PostgreSQL would say it later, or not at all."""
    data, programs = tmp_path / "data", tmp_path / "bin"
    data.mkdir()
    (data / "postgresql.conf").touch()
    programs.mkdir()
    (programs / "postgres").touch()
    text = GOOD.replace("/tmp/nowhere", str(data)) + f'bin_dir = "{programs}"\n'  # noqa: S108

    def said(more: str = "") -> str:
        with pytest.raises(ConfigError) as caught:
            resolve(load(write(tmp_path, text + more), {}))
        return "\n".join(caught.value.problems)

    assert f"{programs} has no pg_ctl" in said()
    assert f"{programs} has no pg_controldata" in said()
    gone = text.replace(f'data_dir = "{data}"', f'data_dir = "{tmp_path}/none"')
    with pytest.raises(ConfigError, match=r"postgresql\.data_dir: .*/none: .*; initdb or restore it first"):
        resolve(load(write(tmp_path, gone), {}))
    if os.geteuid() == 0:
        assert "PostgreSQL refuses to run as root" in said()
        assert "belongs to uid 0, PostgreSQL runs as uid" in said('user = "nobody"\n')
        (told,) = [one for one in warnings(load(write(tmp_path, text), {})) if "agent.user" in one]
        assert "the agent runs as root" in told


def test_another_datas_file_is_not_taken_for_it(tmp_path: Path) -> None:
    """Debian has one for each cluster: the wrong one would start the wrong data."""
    main = tmp_path / "etc" / "15" / "other"
    main.mkdir(parents=True)
    (main / "postgresql.conf").write_text(f"data_directory = '{tmp_path}/other'\n")
    assert find_config_file(str(tmp_path / "mine"), str(tmp_path / "etc")) is None


def test_debians_layout_is_found(tmp_path: Path) -> None:
    """Its postgresql.conf lies in /etc/postgresql/15/main and names the data directory, also by a symlink."""
    data, main = tmp_path / "lib" / "15" / "main", tmp_path / "etc" / "15" / "main"
    data.mkdir(parents=True)
    main.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(data)
    assert find_config_file(str(data), str(tmp_path / "etc")) is None
    (main / "postgresql.conf").write_text(f"#data_directory = 'ConfigDir'\ndata_directory = '{link}'\n")
    assert find_config_file(str(data), str(tmp_path / "etc")) == str(main / "postgresql.conf")
    (data / "postgresql.conf").touch()
    assert find_config_file(str(data), str(tmp_path / "etc")) == str(data / "postgresql.conf")


def test_systemd_needs_a_unit_and_the_watchdog_counts(tmp_path: Path) -> None:
    """C1: the watchdog's timeout stands in the inequality, with its name."""
    with pytest.raises(ConfigError, match=r"postgresql\.unit: missing"):
        load(write(tmp_path, GOOD + 'run = "systemd"\n'), {})
    text = GOOD + '[watchdog]\nmode = "required"\ntimeout_s = 3\n'
    with pytest.raises(ConfigError, match=r"watchdog\.timeout_s 3 \(longer than fence_timeout_s 2\)"):
        load(write(tmp_path, text), {})
    assert load(write(tmp_path, text.replace("= 3", "= 2")), {}).timing.stop_s == 2.0


def test_config_check_command(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    good = CliRunner().invoke(cli, ["config", "check", str(path)])
    assert good.exit_code == 0
    assert "lease 11 s" in good.output
    bad = CliRunner().invoke(cli, ["config", "check", str(write(tmp_path, GOOD + "x = 1\n"))])
    assert bad.exit_code == 78
    assert "postgresql.x: unknown key" in bad.output


def test_documented(rewrite: bool) -> None:
    """C4: docs/configuration.md is rendered from the code."""
    path = Path(__file__).parents[2] / "docs" / "configuration.md"
    if rewrite:
        path.write_text(markdown())
    assert path.read_text() == markdown()


@pytest.mark.parametrize(
    ("section", "line", "place"),
    [
        ("node", 'state_dir = "/tmp/nowhere/state"', "node.state_dir"),
        ("node", 'state_dir = "/tmp/nowhere"', "node.state_dir"),
        ("postgresql", 'socket_dir = "/tmp/../tmp/nowhere/s"', "postgresql.socket_dir"),
        ("postgresql", 'replication_passfile = "/tmp/nowhere/.pgpass"', "postgresql.replication_passfile"),
        ("postgresql", 'config_file = "/tmp/nowhere/conf/postgresql.conf"', "postgresql.config_file"),
        ("bootstrap", 'sql_file = "/tmp/nowhere/roles.sql"', "bootstrap.sql_file"),
        ("store", 'credentials_file = "/tmp/nowhere/creds"', "store.credentials_file"),
    ],
)
def test_nothing_of_harmonys_own_is_inside_the_data_directory(
    tmp_path: Path, section: str, line: str, place: str
) -> None:
    """F8: a rewind exchanges it for a stub, and the password file was gone."""
    text = GOOD if f"[{section}]" in GOOD else GOOD + f"[{section}]\n"
    (found,) = problems(write(tmp_path, text.replace(f"[{section}]", f"[{section}]\n{line}")))
    assert found.partition(": ")[2].startswith(f"{place}: ")
    assert "inside postgresql.data_dir" in found


def test_what_a_link_leads_inside_the_data_directory_is_refused_on_the_host(tmp_path: Path) -> None:
    """F8: by another name it is as gone."""
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    text = GOOD.replace(
        '"/tmp/nowhere"', f'"{tmp_path}/data"\nreplication_passfile = "{tmp_path}/link/.pgpass"'
    )
    with pytest.raises(ConfigError) as caught:
        resolve(load(write(tmp_path, text), {}))
    assert any(p.startswith("postgresql.replication_passfile: ") for p in caught.value.problems)
    whole = problems(write(tmp_path, GOOD.replace('"/tmp/nowhere"', f'"{tmp_path}"')))
    assert "harmony.toml is inside postgresql.data_dir" in "".join(whole)
    kept = GOOD.replace('"/tmp/nowhere"', '"/tmp/nowhere"\nconfig_file = "/tmp/nowhere/postgresql.conf"')
    load(write(tmp_path, kept), {})  # at its top it is kept


def test_a_mount_point_is_told_on_the_first_day(tmp_path: Path) -> None:
    """F12: also a bind mount, of the same file system; it keeps nobody from starting."""
    (table := tmp_path / "mountinfo").write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 8:1 /a /srv/my\\040data rw - ext4 /dev/sda1 rw\n"
    )
    for looks in (is_mount, mounts.is_mount):
        assert looks(Path("/srv/my data"), table)
        assert not looks(Path("/srv"), table)
    c = load(write(tmp_path, GOOD.replace('"/tmp/nowhere"', '"/proc"')), {})
    (said,) = remarks(c)
    assert "postgresql.data_dir: /proc is a mount point" in said
    assert remarks(load(write(tmp_path, GOOD), {})) == []
