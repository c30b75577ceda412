"""What all tests share: `--rewrite` renders documents and expected texts anew."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write rendered documents and expected texts anew"
    )


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    """Whether to write what is seen instead of comparing with it."""
    return bool(request.config.getoption("--rewrite"))
