"""What matters most runs on a second major version of PostgreSQL, too: the wheel's, newer than Debian's."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harmony.demo.parts import FORCE_POSTGRES, FORCE_VERSION, SetupError, find_parts
from tests.fencer.conftest import make_template, node, pair
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
    top = Path(tempfile.mkdtemp(prefix="hf-"))
    top.chmod(0o755)
    scratch = top / "scratch"
    scratch.mkdir(mode=0o755)
    try:
        yield make_template(top, find_parts(scratch))
    except SetupError as e:
        pytest.skip(str(e))
    finally:
        shutil.rmtree(top)
