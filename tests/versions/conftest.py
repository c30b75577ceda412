"""What matters most runs on a second major version of PostgreSQL, too: the wheel's, newer than Debian's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harmony.demo.parts import FORCE_POSTGRES, FORCE_VERSION, SetupError
from tests.fencer.conftest import made_template, node, pair
from tests.fencer.node import Template

__all__ = ["node", "pair"]
SECOND = "18"


@pytest.fixture(scope="package")
def second() -> Iterator[pytest.MonkeyPatch]:
    """From here on PostgreSQL is of that version; where tests are asked to run on another, there is no second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(FORCE_POSTGRES, raising=False)
        patch.setenv(FORCE_VERSION, SECOND)
        yield patch


@pytest.fixture(scope="package")
def template(second: pytest.MonkeyPatch) -> Iterator[Template]:
    try:
        with made_template() as made:
            yield made
    except SetupError as e:
        pytest.skip(str(e))
