"""Start, fence, a reserved timeline, rejoin by rewind and by copy, a cluster from nothing that fails over.

The tests themselves are elsewhere; here they run with another `template` (conftest.py). `make test-versions` runs all
of them on every version that can be had.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.demo.running import Running, under_load
from tests.demo.test_bootstrap import FromNothing, test_a_cluster_from_nothing
from tests.fencer.node import Node, Template
from tests.fencer.test_process import test_activate_renew_and_the_end_of_the_lease
from tests.fencer.test_rejoin import (
    test_a_diverged_standby_is_rewound,
    test_a_source_without_a_checkpoint_on_its_timeline,
    test_without_the_wal_it_is_copied_and_the_old_one_kept,
)
from tests.fencer.test_timelines import (
    test_a_standby_streams_across_the_numbers_that_were_left_out,
    test_the_timeline_is_the_reserved_one,
)

pytestmark = [pytest.mark.real, pytest.mark.sampled(3, group="a second version of PostgreSQL")]
__all__ = [
    "test_a_cluster_from_nothing",
    "test_a_diverged_standby_is_rewound",
    "test_a_source_without_a_checkpoint_on_its_timeline",
    "test_a_standby_streams_across_the_numbers_that_were_left_out",
    "test_activate_renew_and_the_end_of_the_lease",
    "test_the_timeline_is_the_reserved_one",
    "test_without_the_wal_it_is_copied_and_the_old_one_kept",
]


@pytest.fixture
def running(template: Template) -> Iterator[Running]:
    """A cluster of the version of `template`."""
    with under_load(FromNothing) as found:
        assert found.cluster.parts.postgres.version == template.postgres.version
        yield found


def test_it_is_another_version(node: Node) -> None:
    assert (node.data / "PG_VERSION").read_text().strip() == "18"
