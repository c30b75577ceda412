"""Documents that are rendered from the code stay equal to it (`make rewrite` renders them)."""

from __future__ import annotations

from pathlib import Path

from harmony.core.render import markdown


def test_states_are_documented(rewrite: bool) -> None:
    """STYLE 5: the diagram and the rows are the table's."""
    path = Path(__file__).parents[1] / "docs" / "states.md"
    if rewrite:
        path.write_text(markdown())
    assert path.read_text() == markdown()
