"""What of the store speaks against an adoption. Pure; all the rest is in tests/demo/test_adoption.py."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harmony.adoption import Findings, look_at_store
from harmony.config import Config, load
from harmony.config_text import example
from harmony.core.states import State
from harmony.records import encode
from harmony.store.interface import Entry
from tests.core.helpers import cluster, member


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "harmony.toml"
    file.write_text(example())
    return load(file, {})


def _entry(record: msgspec.Struct) -> Entry:
    return Entry("k", encode(record), 1, 0)  # type: ignore[arg-type]


def problems(config: Config, state: Entry | None, **members: Entry | None) -> list[str]:
    found = Findings(system_identifier="sys")
    look_at_store(config, state, dict(members), found)
    return found.problems


def test_an_empty_store_or_an_adoption_begun_before(config: Config) -> None:
    begun = cluster(primary="n1", term=1, adopting=True, status=State.ADOPTING)
    assert problems(config, None, n1=None, n2=_entry(member("n2"))) == []
    assert problems(config, _entry(begun), n1=_entry(member("n1")), n2=_entry(member("n2"))) == []


def test_what_speaks_against_it(config: Config) -> None:
    assert "n1 leads it in term 3" in problems(config, _entry(cluster()))[0]
    vacant = cluster(primary=None, primary_fencer_id=None)
    assert "its place is vacant" in problems(config, _entry(vacant))[0]
    other = cluster(primary="n2", term=1, adopting=True)
    assert "an adoption begun there" in problems(config, _entry(other))[0]
    assert "use another cluster.id" in problems(config, _entry(cluster(system_identifier="x")))[0]
    assert "another cluster's" in problems(config, None, n2=_entry(member("n2", system_identifier="x")))[0]
    assert "not of this version" in problems(config, Entry("k", b"{}", 1, 0))[0]


def test_who_has_not_started_harmony_yet_is_remarked(config: Config) -> None:
    found = Findings(system_identifier="sys")
    look_at_store(config, None, {"n1": None, "n2": None}, found)
    assert found.problems == []
    assert len(found.remarks) == 1
    assert "n2" in found.remarks[0]
