"""What a bucket, a server's version and its monitoring port must be, without any of them (I2)."""

from __future__ import annotations

import pytest

from harmony.store import bucket
from harmony.store.monitor import judge

MADE = bucket.wanted("harmony_c", 3)


def test_what_is_made_is_what_is_wanted() -> None:
    assert bucket.impossible(MADE, "harmony_c") == []
    assert bucket.problems(MADE, 3) == []
    assert (
        bucket.problems({"storage": "file", "retention": "limits"}, 1) == []
    )  # the server leaves defaults out
    # What the check forgives in a bucket that is there is not what is made: nobody deletes or purges by mistake.
    assert (MADE["deny_delete"], MADE["deny_purge"], MADE["allow_rollup_hdrs"]) == (True, True, False)
    assert MADE["discard"] == "new"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"storage": "memory"}, "storage is memory, must be file"),
        ({"retention": "interest"}, "retention is interest, must be limits"),
        ({"max_age": 5}, "max_age is 5, must be 0"),
        ({"max_bytes": 5}, "max_bytes is 5, must be -1"),
        ({"max_msgs": 5}, "max_msgs is 5, must be -1"),
        ({"max_msgs_per_subject": 63}, "max_msgs_per_subject is 63, must be at least 64"),
        ({"num_replicas": 1}, "num_replicas is 1, must be 3 (store.replicas) or more"),
        ({"persist_mode": "async"}, "persist_mode is async"),
    ],
)
def test_every_weakness_by_name(change: dict[str, object], named: str) -> None:
    (found,) = bucket.problems(MADE | change, 3)
    assert found.startswith(named)


def test_more_than_is_wanted_is_fine() -> None:
    assert bucket.problems(MADE | {"num_replicas": 5, "max_msgs_per_subject": -1}, 3) == []


@pytest.mark.parametrize(
    "change", [{"subjects": ["x.>"]}, {"sealed": True}, {"no_ack": True}, {"mirror": {"name": "x"}}]
)
def test_what_cannot_be_written(change: dict[str, object]) -> None:
    assert len(bucket.impossible(MADE | change, "harmony_c")) == 1


def test_the_servers_version() -> None:
    assert bucket.too_old((2, 11)) == bucket.too_old((3, 0)) == []
    assert bucket.too_old((2, 10)) == ["the server is of version 2.10, 2.11 or newer is needed"]
    assert "does not say" in bucket.too_old(None)[0]


def test_sync_settings() -> None:
    assert judge("u", {"config": {"store_dir": "/x", "sync_interval": 120, "sync_always": True}}) == ""
    lax = judge("http://h:1", {"config": {"store_dir": "/x", "sync_interval": 120_000_000_000}})
    assert lax.startswith("the server at http://h:1 has sync_interval 120 s, must be always")
    for other in ({}, [], {"config": {}}, {"config": None}):
        with pytest.raises(ValueError, match="no configuration of JetStream"):
            judge("u", other)
