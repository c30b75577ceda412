"""The settings as text: what is set, and where the user's own value goes first."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest

from harmony_fencer import settings
from harmony_fencer.config import Address, FencerConfig, SlotsConfig
from harmony_fencer.protocol import SyncRule
from harmony_fencer.settings import Source

KEEP = "max_slot_wal_keep_size"
RETRY = "wal_retrieve_retry_interval"


def config(top: Path, run: Literal["pg_ctl", "systemd"] = "pg_ctl", **slots: object) -> FencerConfig:
    return FencerConfig(
        node="n-1",
        agent_uid=0,
        agent_gid=0,
        postgres_ids=None,
        data_dir=str(top),
        config_file=str(top / "postgresql.conf"),
        run=run,
        unit="",
        cgroup=False,
        bin_dir="/",
        library_dir=None,
        port=5432,
        listen_addresses="*",
        socket_dir="/",
        members={"n2": Address("10.0.0.2", 5432)},
        replication_user="r",
        replication_passfile=None,
        lease_s=1,
        fence_timeout_s=1,
        start_timeout_s=1,
        watchdog_mode="off",
        watchdog_device="",
        watchdog_timeout_s=1,
        state_dir="/",
        run_dir="/",
        log_format="json",
        slots=SlotsConfig(**slots),  # type: ignore[arg-type]
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "pg_wal").mkdir()
    (tmp_path / "PG_VERSION").write_text("15\n")
    (tmp_path / "postgresql.conf").write_text("# a comment: max_slot_wal_keep_size = 1\n")
    return tmp_path


def rendered(c: FencerConfig, source: Source, data: Path) -> dict[str, str]:
    """Each setting with the value that counts: the last one."""
    lines = settings.render(c, source, SyncRule(0, ()), data).splitlines()
    return dict(line.split(" = ", 1) for line in lines if " = " in line)


def test_through_its_slot_only_where_it_is_there(data: Path) -> None:
    c = config(data, own=True, keep_mb=7)
    assert rendered(c, Source("n2", slot=True), data)["primary_slot_name"] == "'harmony_member_n_1'"
    assert rendered(c, Source("n2"), data)["primary_slot_name"] == "''"
    assert rendered(c, Source(None, slot=True), data)["primary_slot_name"] == "''"
    off = rendered(config(data), Source("n2", slot=True), data)
    assert not {"primary_slot_name", KEEP} & off.keys(), "the user's own are left alone"


@pytest.mark.parametrize(("lease_s", "wait_s"), [(2, 10), (11.5, 12), (300, 60)])
def test_how_long_a_primary_waits_for_a_dead_standby(data: Path, lease_s: float, wait_s: int) -> None:
    """Of this connection alone, whatever the primary's own wal_sender_timeout is for consumers of its own."""
    c = msgspec.structs.replace(config(data), lease_s=lease_s)
    found = rendered(c, Source("n2"), data)["primary_conninfo"]
    assert f"options=''-c wal_sender_timeout={wait_s}s''" in found
    assert rendered(c, Source(None), data)["primary_conninfo"] == "''"


def test_the_bound(data: Path) -> None:
    """Before the user's file, which may say otherwise; without a number a tenth of the disk."""
    text = settings.render(config(data, own=True, keep_mb=7), Source(None), SyncRule(0, ()), data)
    assert text.index(f"{KEEP} = '7MB'") < text.index("include ")
    automatic = rendered(config(data, own=True), Source(None), data)[KEEP]
    assert int(automatic.strip("'").removesuffix("MB")) >= 64
    (data / "pg_wal").rmdir()
    assert rendered(config(data, own=True), Source(None), data)[KEEP] == "'1024MB'"


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("primary", ["n2", None])
def test_a_standby_asks_again_soon(data: Path, own: bool, primary: str | None) -> None:
    """Whoever leads again in place waited up to 5 s for its standbys. Before the user's file, whatever the slots."""
    text = settings.render(config(data, own=own), Source(primary), SyncRule(0, ()), data)
    assert text.index(f"{RETRY} = '500ms'") < text.index("include ")


@pytest.mark.parametrize("key", [KEEP, RETRY])
@pytest.mark.parametrize("run", ["pg_ctl", "systemd"])
@pytest.mark.parametrize("place", ["postgresql.conf", "conf.d/a.conf", "deep.conf"])
def test_the_users_own_goes_first(
    data: Path, run: Literal["pg_ctl", "systemd"], place: str, key: str
) -> None:
    """Run by systemd ours is read after it, and would win."""
    (data / "conf.d").mkdir()
    lines = [
        "include_dir 'conf.d'",
        "include_if_exists = 'missing.conf'",
        "include 'deep.conf'",
        "include 'loop.conf'",
    ]
    (data / "postgresql.conf").write_text("\n".join(lines))
    (data / "loop.conf").write_text("include 'loop.conf'\n")
    (data / "deep.conf").write_text("")
    (data / "conf.d" / settings.DROP_IN).write_text(f"{key} = 1\n")
    assert key in rendered(config(data, run, own=True), Source(None), data)
    with (data / place).open("a") as f:
        f.write(f"\n{key.upper()} '5'\n")
    found = rendered(config(data, run, own=True), Source(None), data)
    assert {KEEP, RETRY} & found.keys() == {KEEP, RETRY} - {key}


@pytest.mark.parametrize(("version", "synced"), [("16", False), ("17", True), ("18", True)])
def test_logical_slots_are_synchronised_where_postgresql_can(data: Path, version: str, synced: bool) -> None:
    """An older one would not start with a setting that it does not know."""
    (data / "PG_VERSION").write_text(version + "\n")
    found = rendered(config(data, own=True, synced=True), Source("n2", slot=True), data)
    assert ("sync_replication_slots" in found) is synced
    assert ("hot_standby_feedback" in found) is synced
    assert ("dbname='postgres'" in found["primary_conninfo"].replace("''", "'")) is synced
    without = rendered(config(data, own=True), Source("n2", slot=True), data)
    assert "sync_replication_slots" not in without


@pytest.mark.parametrize("listens", [None, "", "10.0.0.1"])
def test_where_postgresql_listens_is_the_users_matter(data: Path, listens: str | None) -> None:
    """F13: a database that listened on 127.0.0.1 was opened to everybody, silently."""
    c = msgspec.structs.replace(config(data), listen_addresses=listens)
    found = rendered(c, Source(None), data)
    assert found.get("listen_addresses") == (f"'{listens}'" if listens is not None else None)
