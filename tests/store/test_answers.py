"""What NATS may answer and a real server cannot be made to: by a stand-in that speaks its protocol (fakenats.py)."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from harmony.errors import SequenceMismatch, StoreUnavailable
from harmony.store import open_store
from harmony.store.interface import Store
from harmony.store.nats import open_nats
from tests.store.fakenats import NONCE, STREAM, FakeNats

# A user's credentials as `nsc` writes them; the seed is of no server's.
CREDENTIALS = """-----BEGIN NATS USER JWT-----
a-jwt-of-the-test
------END NATS USER JWT------
-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""


@contextlib.asynccontextmanager
async def opened(
    server: FakeNats, *, replicas: int = 1, credentials: str | None = None, may_create: bool = True
) -> AsyncIterator[Store]:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        async with open_store(
            "nats",
            urls=[server.url],
            cluster_id="c",
            replicas=replicas,
            credentials_file=credentials,
            may_create=may_create,
        ) as store:
            yield store
        nursery.cancel_scope.cancel()


async def until(condition: object) -> None:
    with trio.fail_after(30):
        while not condition():  # type: ignore[operator]
            await trio.sleep(0.01)


def seed() -> str:
    """A user's, of the key 0…0: prefixes S and U, CRC-16, base 32 (nkeys)."""
    raw = bytes([18 << 3 | 20 << 3 >> 5, (20 << 3 & 31) << 3]) + bytes(32)
    crc = 0
    for byte in raw:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return base64.b32encode(raw + crc.to_bytes(2, "little")).decode().rstrip("=")


async def test_the_credentials_are_shown_and_the_servers_nonce_is_signed(tmp_path: Path) -> None:
    """store.credentials_file: what a server demands. It needs nkeys, which is a dependency for it."""
    import nkeys

    file = tmp_path / "user.creds"
    file.write_text(CREDENTIALS.format(seed=seed()))
    server = FakeNats(nonce=NONCE)
    async with opened(server, credentials=str(file)) as store:
        await until(lambda: store.connected)
    said = server.connects[0]
    assert said["jwt"] == "a-jwt-of-the-test"
    signature = str(said["sig"])
    key = nkeys.from_seed(seed().encode())
    raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    assert key.verify(NONCE.encode(), raw)


async def test_without_credentials_none_are_shown() -> None:
    server = FakeNats()
    async with opened(server) as store:
        await until(lambda: store.connected)
    assert "jwt" not in server.connects[0]


@pytest.mark.parametrize(("version", "problem"), [("2.11.0", ""), ("2.10.29", "2.10"), ("x", "does not say")])
async def test_a_server_that_is_too_old_is_named(version: str, problem: str) -> None:
    """Writes go on; nobody promotes by it (harmony/store/bucket.py says why)."""
    async with opened(FakeNats(version=version)) as store:
        await until(lambda: store.connected and store.facts)
        assert store.facts is not None
        assert bool(store.facts.problem) == bool(problem)
        assert problem in store.facts.problem


async def test_what_is_made_has_the_configured_copies() -> None:
    """The bucket is made with `replicas`; what is there with fewer is a problem of its own."""
    server = FakeNats()
    found = [{"error": {"code": 404, "err_code": 10059, "description": "stream not found"}}, STREAM]
    server.answers["$JS.API.STREAM.INFO."] = lambda: found.pop(0) if len(found) > 1 else found[0]
    server.answers["$JS.API.STREAM.CREATE."] = lambda: STREAM
    async with opened(server, replicas=3) as store:
        await until(lambda: store.facts)
        assert store.facts is not None
        assert "num_replicas is 1, must be 3" in store.facts.problem
    made = [json.loads(body) for subject, body in server.asked if ".STREAM.CREATE." in subject]
    assert [m["num_replicas"] for m in made] == [3]


@pytest.mark.parametrize(
    ("answer", "raised", "text"),
    [
        (
            {"error": {"code": 400, "err_code": 10071, "description": "wrong last sequence"}},
            SequenceMismatch,
            "",
        ),
        (
            {"error": {"code": 400, "err_code": 10164, "description": "wrong last sequence"}},
            SequenceMismatch,
            "",
        ),
        (
            {"error": {"code": 503, "err_code": 10008, "description": "no leader"}},
            StoreUnavailable,
            "no leader",
        ),
        ({"error": {"code": 404, "err_code": 10059, "description": "gone"}}, StoreUnavailable, "no stream"),
        ({"stream": "KV_harmony_c"}, StoreUnavailable, "without a sequence"),
        ({"seq": "7"}, StoreUnavailable, "without a sequence"),
        ([7], StoreUnavailable, "not an answer"),
    ],
)
async def test_a_write_that_is_not_acknowledged(answer: object, raised: type[Exception], text: str) -> None:
    """D1: refused is told from unknown. Only the refusal of the expected sequence is a refusal."""
    server = FakeNats()
    server.answers["$KV."] = lambda: answer
    async with opened(server) as store:
        await until(lambda: store.connected)
        with pytest.raises(raised, match=text or None) as caught:
            await store.update("k", b"v", 5, timeout_s=20)
    assert type(caught.value) is raised
    headers = next(body for subject, body in server.asked if subject == "$KV.harmony_c.k")
    assert b"Nats-Expected-Last-Subject-Sequence: 5" in headers


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ({"seq": 4, "data": "dg==", "time": "2026-01-01T00:00:00.5Z"}, b"v"),
        (
            {
                "seq": 4,
                "hdrs": "TkFUUy8xLjANCktWLU9wZXJhdGlvbjogREVMDQoNCg==",
                "time": "2026-01-01T00:00:00Z",
            },
            None,
        ),
    ],
)
async def test_a_deleted_key_is_none(answer: dict[str, object], value: bytes | None) -> None:
    server = FakeNats()
    server.answers["$JS.API.STREAM.MSG.GET."] = lambda: {"message": answer}
    async with opened(server) as store:
        await until(lambda: store.connected)
        found = await store.get("k", timeout_s=20)
    assert (found.value if found is not None else None) == value
    if found is not None:
        assert (found.revision, found.created_ns) == (4, 1767225600_500_000_000)


async def test_an_error_at_a_read_is_no_missing_key() -> None:
    """I4: less than was asked for is never taken for nothing there."""
    server = FakeNats()
    server.answers["$JS.API.STREAM.MSG.GET."] = lambda: {"error": {"err_code": 10008, "description": "busy"}}
    async with opened(server) as store:
        await until(lambda: store.connected)
        with pytest.raises(StoreUnavailable, match="busy"):
            await store.get("k", timeout_s=20)
        server.answers["$JS.API.STREAM.MSG.GET."] = lambda: {"error": {"err_code": 10037}}
        assert await store.get("k", timeout_s=20) is None


async def test_a_call_that_finds_no_stream_has_it_looked_at_at_once() -> None:
    """I2: what is lost is told then, and not at the next look."""
    fake = FakeNats()
    fake.answers["$JS.API.STREAM.MSG.GET."] = lambda: {
        "error": {"err_code": 10059, "description": "stream not found"}
    }

    def looked() -> int:
        return sum("STREAM.INFO" in subject for subject, _ in fake.asked)

    async with trio.open_nursery() as nursery:
        await nursery.start(fake.serve)
        async with open_nats([fake.url], "c", 1, None) as store:
            store.look_every_s = 3600.0
            with trio.fail_after(60):
                while not store.connected:
                    await trio.sleep(0.01)
                before = looked()
                with pytest.raises(StoreUnavailable, match="no stream"):
                    await store.get("k", timeout_s=30)
                while looked() == before:
                    await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
