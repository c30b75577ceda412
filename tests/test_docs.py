"""Documents that are rendered from the code stay equal to it (`make rewrite` renders them)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bench.ha import report
from bench.ha.scenarios import SCENARIOS
from bench.mutants import RULES
from harmony.config import SECTIONS
from harmony.config_text import parameters
from harmony.core.render import markdown
from harmony.core.table import TABLE
from tests.fencer import render_protocol

DOCS = Path(__file__).parents[1] / "docs"
TEXTS = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]
FILES = {"json", "py", "sock", "md", "txt", "toml", "state", "conf", "service", "lock"}
KEYS = {f"{p.section}.{p.key}" for p in parameters()}


def test_states_are_documented(rewrite: bool) -> None:
    """STYLE 5: the diagram and the rows are the table's."""
    path = DOCS / "states.md"
    if rewrite:
        path.write_text(markdown())
    assert path.read_text() == markdown()


def test_the_protocol_is_documented(rewrite: bool) -> None:
    """Its limits, peers, fields, refusals, admission and example are the code's."""
    path = DOCS / "protocol.md"
    if rewrite:
        path.write_text(render_protocol.rendered(path.read_text()))
    assert path.read_text() == render_protocol.rendered(path.read_text())


def test_the_protocols_texts_are_of_what_there_is() -> None:
    """No field, refusal or peer without a meaning, and no meaning left over from what is gone."""
    assert set(render_protocol.MEANING) == render_protocol.fields_documented()
    assert set(render_protocol.REFUSALS) == render_protocol.refusals_in_code()
    assert set(render_protocol.PEERS) == render_protocol.peers_in_code()


def test_the_protocols_links_lead_somewhere() -> None:
    text = (DOCS / "protocol.md").read_text()
    headings = {h.lower().replace(" ", "-").replace(",", "") for h in re.findall(r"(?m)^#+ (.+)$", text)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


@pytest.mark.parametrize("name", ["failover", "failover-once", "failover-more"])
def test_the_failover_benchs_results_are_documented(name: str, rewrite: bool) -> None:
    """docs/failover.md shows what is in these files, as it was measured."""
    path = DOCS / "failover.md"
    results = report.load(DOCS / f"{name}.json")
    if rewrite:
        path.write_text(report.rendered(path.read_text(), name, results))
    assert path.read_text() == report.rendered(path.read_text(), name, results)


def test_the_failover_table_is_of_one_run() -> None:
    """Both peers beside each other in each scenario, five times and more, by one version of each.

    But for a scenario that is newer than that run: measured in one of its own, without the other peer.
    """
    later = report.grouped(report.load(DOCS / "failover-once.json"))
    assert {len(repeats) >= 5 for repeats in later.values()} == {True}
    results = report.load(DOCS / "failover.json")
    rows = report.grouped(results)
    assert set(rows) == {
        (name, peer, "fast", "on")
        for name in SCENARIOS
        for peer in ("harmony", "patroni")
        if (name, "harmony", "fast", "on") not in later
    }
    assert min(len(repeats) for repeats in rows.values()) >= 5
    for program in ("harmony", "patroni", "postgresql"):
        assert len({r.versions[program] for r in results.repeats if program in r.versions}) == 1, program


def test_each_broken_rule_has_its_line() -> None:
    """docs/mutation.md is written by hand from what bench/mutate.py printed: nothing new or changed is missing."""
    noticed = dict(re.findall(r"(?m)^\| (.+?) \| `(.+)` \|$", (DOCS / "mutation.md").read_text()))
    rows = {f"{row.id} {row.state}: {row.condition}" for row in TABLE}
    assert set(noticed) == rows | {rule[0] for rule in RULES}
    for test in noticed.values():
        path, name, *_ = test.split("::")
        text = (DOCS.parent / path).read_text()
        assert name.partition("[")[0] in text, test


def test_each_broken_rule_is_where_it_was() -> None:
    """bench/mutants breaks what stands there: each text once."""
    for rule, file, was, _, _ in RULES:
        assert (DOCS.parent / file).read_text().count(was) == 1, rule


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_each_parameter_that_is_named_is_there(path: Path) -> None:
    """B19: who followed docs/rejoin.md was told by config check that there is no such key."""
    text = path.read_text()
    named = {
        f"{section}.{key}"
        for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)\b(?![(/])", text)
        if section in SECTIONS and key not in FILES
    }
    for block in re.findall(r"(?ms)^```toml\n(.*?)^```", text):
        tables = tomllib.loads(block.replace("…", ""))
        named |= {f"{s}.{key}" for s, table in tables.items() if s != "members" for key in table}
    assert named <= KEYS, sorted(named - KEYS)


def test_the_text_of_this_program_names_no_other_parameters() -> None:
    """The same of what it says: messages are followed, too."""
    for path in sorted((DOCS.parent / "harmony").rglob("*.py")):
        said = re.findall(r"\b(?:set|correct|clear|see|or) ([a-z]+)\.([a-z_]+)\b(?![(/])", path.read_text())
        named = {f"{s}.{k}" for s, k in said if s in SECTIONS and k not in FILES}
        assert named <= KEYS, (path, sorted(named - KEYS))
