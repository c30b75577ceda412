"""A million frames against a real fencer: no crash, no growth, nothing accepted that should not be, nor refused.

    python bench/fuzz.py [--frames 1000000] [--seed N]

Random bytes, token soup, valid requests of every kind (stale, repeated, conflicting, latched, expired), the
same with a field removed, added, doubled, renamed or retyped, and with bytes changed; over connections of
root's and, where this runs as root, of the agent's uid. Between them orders that must be accepted: they alone
may move the highest generation. Each reply is held against an oracle that is written from docs/protocol.md and
shares no code with the fencer. Exit code 1: a violation; the seed and the command that replays it are printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from harmony.demo.parts import find_parts
from tests.fencer.conftest import make_template
from tests.fencer.node import LEASE_S, Node, boot_ns

NS = 10**9
LEASE_NS = round(LEASE_S * NS)
MAX_BODY = 16384
CONNECTIONS = {"root": 8, "agent": 2}  # below the limits
BATCH = {"root": 40, "agent": 4}  # frames sent to one before its replies are read; the agent's are paced
ORDER_EVERY = 4_000
WARM_UP = 0.05  # of all frames, before memory is looked at
GROWTH_KB = 4_096
AGENT_UID = 65534
FENCE_TIMEOUT_S = 10.0  # a quarter of it is the disk's: a slow one here would make the state untrusted
NODE, MEMBERS = "n1", {"n1", "n2"}
UNSURE_NS = 5 * NS  # a deadline this close to now is not sent: nobody could say which answer is right
Json = object
Generation = tuple[int, int]

# ---------------------------------------------------------------- the oracle: what a body is


class Bad(Exception):
    """`names`: what it may be refused as."""

    def __init__(self, *names: str) -> None:
        super().__init__(names)
        self.names = names


def check(ok: bool) -> None:
    if not ok:
        raise Bad("bad_message")


def integer(low: int, high: int) -> Callable[[Json], None]:
    return lambda v: check(isinstance(v, int) and not isinstance(v, bool) and low <= v <= high)


def text(v: Json) -> None:
    check(isinstance(v, str) and len(v) <= 512)


def boolean(v: Json) -> None:
    check(isinstance(v, bool))


def name(v: Json) -> None:
    check(isinstance(v, str) and re.fullmatch(r"[a-z0-9]|[a-z0-9][a-z0-9_-]{0,38}[a-z0-9]", v) is not None)


def nobody_or_name(v: Json) -> None:
    if v is not None:
        name(v)


def fields(
    v: Json, required: dict[str, Callable[[Json], None]], optional: frozenset[str] = frozenset()
) -> None:
    if not isinstance(v, dict):
        raise Bad("bad_message")
    check(set(v) <= set(required) and set(required) - optional <= set(v))
    for key, value in v.items():
        required[key](value)


def generation(v: Json) -> None:
    fields(v, {"term": integer(0, 2**52), "order": integer(0, 2**52)})


def names(v: Json) -> None:
    check(isinstance(v, list) and len(v) <= 32)
    assert isinstance(v, list)
    for one in v:
        name(one)
    check(len(set(v)) == len(v))


def rule(v: Json) -> None:
    fields(v, {"count": integer(0, 32), "voters": names})
    assert isinstance(v, dict)
    check(v["count"] <= len(v["voters"]))


def nobody_or_counter(v: Json) -> None:
    if v is not None:
        integer(0, 2**53 - 1)(v)


BOOT_NS = integer(0, 2**62)
MAY_BE_LEFT_OUT = frozenset({"clean", "unless", "wait_ms"})
REQUESTS: dict[str, dict[str, Callable[[Json], None]]] = {
    "hello": {"client": text},
    "status": {"unless": nobody_or_counter, "wait_ms": integer(0, 1000)},
    "activate": {"generation": generation, "deadline_boottime_ns": BOOT_NS, "sync": rule},
    "fence": {"generation": generation, "reason": text, "clean": boolean},
    "follow": {"generation": generation, "primary": nobody_or_name},
    "renew": {"generation": generation, "deadline_boottime_ns": BOOT_NS},
    "operator_fence": {"reason": text, "who": text, "clean": boolean},
    "unfence": {"who": text},
}


def _constant(_: str) -> Json:
    raise ValueError


def _names_are_plain(raw: str) -> bool:
    """Every name as it is, and once."""
    at, seen = 0, set()
    while (at := raw.find('"', at)) >= 0:
        value, end = scanstring(raw, at + 1, True)
        if re.match(r"[ \t\r\n]*:", raw[end : end + 40]):
            if "\\" in raw[at + 1 : end - 1] or value in seen:
                return False
            seen.add(value)
        at = end
    return True


def _depth(v: Json) -> int:
    depth, level = 0, [v]
    while level:
        depth += 1
        level = [
            x
            for y in level
            for x in (y.values() if isinstance(y, dict) else y if isinstance(y, list) else ())
        ]
    return depth


def request(body: bytes) -> dict[str, Json]:
    """The one valid request that the body is. Raises Bad."""
    either = ("bad_message", "bad_version") if b"v" in body or b"\\" in body else ("bad_message",)
    try:
        raw = body.decode()
        found: Json = json.loads(raw, parse_constant=_constant)
        json.dumps(found, ensure_ascii=False).encode()  # no lone surrogates
    except (ValueError, RecursionError):
        raise Bad(*either) from None
    if not isinstance(found, dict):
        raise Bad("bad_message")
    version = found.get("v")
    plain = _names_are_plain(raw)
    if isinstance(version, int) and not isinstance(version, bool) and version != 1:
        # Of more than 64 bits, twice there, or very deep: refused one way or the other.
        raise Bad(*either) if abs(version) >= 2**63 or not plain or _depth(found) > 50 else Bad("bad_version")
    if not plain:
        raise Bad(*either)
    op = found.get("op")
    if not isinstance(op, str) or op not in REQUESTS:
        raise Bad("bad_message")
    said = {k: v for k, v in found.items() if k != "op"}
    fields(said, REQUESTS[op] | {"v": integer(1, 1)}, MAY_BE_LEFT_OUT)
    return found


# ---------------------------------------------------------------- the oracle: what is answered


@dataclass
class Model:
    """What the fencer has been told so far."""

    highest: Generation = (0, 0)
    newest: tuple[str, Json] = ("", None)
    active: Generation | None = None
    until_ns: int = 0  # of the lease: surely in force before, surely over a second after
    latched: bool = False


def _number(said: dict[str, Json]) -> Generation:
    g = said["generation"]
    assert isinstance(g, dict)
    return g["term"], g["order"]


def expect(m: Model, said: dict[str, Json], peer: str) -> tuple[set[str], bool]:
    """(the answers that are right, whether it would change what the others may expect)."""
    op, now = said["op"], boot_ns()
    if op in {"hello", "status"}:
        return {"status"}, False
    if op in {"operator_fence", "unfence"}:
        if peer != "root":
            return {"not_permitted"}, False
        if op == "unfence":
            return ({"done"}, True) if m.latched else ({"not_latched"}, False)
        return {"accepted"}, True
    deadline = said.get("deadline_boottime_ns")
    late = isinstance(deadline, int) and deadline <= now
    unsure = isinstance(deadline, int) and abs(deadline - now) < UNSURE_NS
    g = _number(said)
    if op == "renew":
        if m.active != g or now > m.until_ns + NS:
            return {"not_active"}, False
        if unsure or now > m.until_ns - NS // 2:
            return {"not_active", "lease_expired", "renewed"}, False
        return ({"lease_expired"} if late else {"renewed"}), False
    if g == m.highest and m.newest[0]:
        return ({"accepted"} if m.newest == (op, said.get("primary")) else {"conflicting_order"}), False
    if g <= m.highest:
        return {"stale_generation"}, False
    if op != "fence" and m.latched:
        return {"latched"}, False
    if op == "activate":
        return ({"accepted"}, True) if unsure or not late else ({"lease_expired"}, False)
    primary = said.get("primary")
    if op == "follow" and primary is not None and (primary == NODE or primary not in MEMBERS):
        return {"bad_message"}, False
    return {"accepted"}, True


# ---------------------------------------------------------------- frames


# fmt: off
SOUP = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true", b"1", b"-1", b"1e9",
    b"1.5", b"NaN", b"Infinity", b'"v":1', b'"op":"status"', b'"op":"fence"', b'"generation"', b'"term":1', b" ",
    b'"order":2', b'"reason":""', b'"v":2', b"\xff", b"\xef\xbb\xbf", b"\x00", b"\n", "é".encode(), b'"clean":true',
]
STRANGE: list[Json] = [
    None, True, False, 0, -1, 1.0, 1.5, 2**31, 2**52, 2**52 + 1, 2**53, 2**62, 2**62 + 1, 2**63, 2**64, 10**30,
    -(2**63), "", "1", "n1", "n2", "N2", "x" * 512, "x" * 513, "\x00\x1b[31m", "\ud800", "é", [], {}, [[]],
    ["n2", "n2"], {"term": 1, "order": 1}, {"count": 1, "voters": []}, float("nan"), 1e308, "a" * 41,
]
WORDS = ["v", "op", "generation", "term", "order", "reason", "clean", "who", "client", "sync", "primary", "x", "V", ""]
# fmt: on


class Maker:
    """Frames from one random stream."""

    def __init__(self, seed: int, model: Model) -> None:
        self.r = random.Random(seed)
        self._m = model

    def _generation(self) -> Json:
        (term, order), r = self._m.highest, self.r
        kind = r.randrange(8)
        if kind < 3:  # stale
            term, order = r.randint(0, term), r.randint(0, max(0, order - 1))
        elif kind == 4:  # greater: refused for another reason, or withheld
            term += r.randint(0, 2)
            order += r.randint(1, 3)
        elif kind == 5 and self._m.active is not None:
            term, order = self._m.active
        return {"term": term, "order": order}  # else: the very same

    def _deadline(self) -> int:
        return self.r.choice(
            (0, 1, boot_ns() - 3600 * NS, boot_ns() + 3600 * NS, 2**62, max(0, boot_ns() - 60 * NS))
        )

    def valid(self) -> dict[str, Json]:
        r = self.r
        op = r.choice(list(REQUESTS))
        said: dict[str, Json] = {"op": op, "v": 1}
        for key in REQUESTS[op]:
            if key == "generation":
                said[key] = self._generation()
            elif key == "deadline_boottime_ns":
                said[key] = self._deadline()
            elif key == "sync":
                voters = r.sample(["n2", "n3", "a-b_c"], r.randint(0, 3))
                said[key] = {"count": r.randint(0, len(voters)), "voters": voters}
            elif key == "unless":
                said[key] = r.choice([None, 0, 2**53 - 1])
            elif key == "wait_ms":
                said[key] = r.choice([0, 1, 1000])
            elif key == "primary":
                said[key] = r.choice([None, "n2", "n1", "n3"])
            elif key == "clean":
                said[key] = r.random() < 0.5
            else:
                said[key] = r.choice(["", "fuzz", "x" * 512, "é\u2028\x00", '"v":2', "\\"])
        for key in MAY_BE_LEFT_OUT & set(said):
            if r.random() < 0.5:
                del said[key]
        if r.random() < 0.3:
            said = dict(r.sample(list(said.items()), len(said)))
        return said

    def _strange(self) -> Json:
        return copy.deepcopy(self.r.choice(STRANGE))

    def _objects(self, said: dict[str, Json]) -> dict[str, Json]:
        inner = [v for v in said.values() if isinstance(v, dict)]
        return self.r.choice([said, *inner]) if inner else said

    def mutated(self) -> bytes:
        """One to three changes to the tree; a doubled name to its text."""
        r, said = self.r, self.valid()
        doubled = ""
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            where = self._objects(said)
            key = r.choice(list(where)) if where else ""
            kind = r.randrange(7)
            if kind == 0:
                where.pop(key, None)
            elif kind == 1:
                where[r.choice(WORDS)] = self._strange()
            elif kind in {2, 3}:
                where[key] = self._strange()
            elif kind == 4 and key in where:
                where[r.choice([key.upper(), key + " ", key[:-1], "\ufeff" + key, key + "\x00"])] = where.pop(
                    key
                )
            elif kind == 5:
                where[key] = self._deep(r.choice((2, 10, 60, 3000)), where.get(key))
            else:
                doubled = key
        try:
            body = json.dumps(said, separators=r.choice([(",", ":"), (", ", ": ")]))
        except RecursionError:
            body = "[" * 8000
        if doubled and f'"{doubled}":' in body:
            other = json.dumps(self._strange())
            again = r.choice([doubled, f"\\u{ord(doubled[0]):04x}{doubled[1:]}"])
            at = body.index(f'"{doubled}":')
            body = f'{body[:at]}"{again}":{other},{body[at:]}'
        if r.random() < 0.02:
            body = body.replace("1", "9" * r.choice((30, 4000, 5000)), 1)
        return body.encode("utf-8", "surrogatepass")

    def _deep(self, depth: int, value: Json) -> Json:
        for _ in range(min(depth, 400)):
            value = [value] if self.r.random() < 0.5 else {"x": value}
        return value

    def body(self) -> bytes:
        r = self.r
        kind = r.randrange(20)
        if kind < 3:
            body = r.randbytes(r.randint(1, 60))
        elif kind == 3:
            body = (
                r.randbytes(r.choice((500, 4000, MAX_BODY)))
                if r.random() < 0.1
                else b"[" * r.randint(1, 3000)
            )
        elif kind < 6:
            body = b"".join(r.choices(SOUP, k=r.randint(1, 25)))
            if r.random() < 0.5:
                body = b"{" + body + b"}"
        elif kind < 11:
            body = json.dumps(self.valid()).encode()
        elif kind < 16:
            body = self.mutated()
        else:
            damaged = bytearray(json.dumps(self.valid(), ensure_ascii=r.random() < 0.5).encode())
            for _ in range(r.randint(1, 3)):
                at = r.randint(0, len(damaged))
                damaged[at : at + r.randint(0, 3)] = r.choice(SOUP) if r.random() < 0.5 else r.randbytes(1)
            body = bytes(damaged)
        return body[:MAX_BODY] or b" "


# ---------------------------------------------------------------- connections


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    before = os.geteuid()
    if uid != before:
        os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


class Connection:
    """One client of `peer`; its replies come in the order of its frames."""

    def __init__(self, path: str, peer: str) -> None:
        self._path, self.peer = path, peer
        self.pending: deque[tuple[bytes, set[str], Generation | None]] = deque()
        self._buffer = b""
        self.connect()

    def connect(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        with as_user(AGENT_UID if self.peer == "agent" else os.geteuid()):
            self._sock.connect(self._path)
        self._sock.settimeout(20)
        self._buffer = b""

    def send(self, raw: bytes) -> None:
        self._sock.sendall(raw)

    def close(self) -> None:
        self._sock.close()

    def reply(self) -> dict[str, Json]:
        while True:
            if len(self._buffer) >= 4:
                (length,) = struct.unpack_from(">I", self._buffer)
                if not 1 <= length <= MAX_BODY:
                    raise ValueError(f"a reply of {length} bytes")
                if len(self._buffer) >= 4 + length:
                    body, self._buffer = self._buffer[4 : 4 + length], self._buffer[4 + length :]
                    found = json.loads(body.decode())
                    assert isinstance(found, dict)
                    return found
            chunk = self._sock.recv(262144)
            if not chunk:
                raise EOFError
            self._buffer += chunk

    def ended(self) -> bool:
        try:
            return not self._buffer and self._sock.recv(1) == b""
        except ConnectionResetError:
            return True


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def named(reply: dict[str, Json]) -> str:
    return str(reply["error"] if reply["kind"] == "refusal" else reply["kind"])


@dataclass
class Health:
    """Of the fencer's process."""

    started: str
    descriptors: int
    resident_kb: int


def health(pid: int) -> Health:
    proc = Path(f"/proc/{pid}")
    started = (proc / "stat").read_text().rpartition(")")[2].split()[19]
    found = re.search(r"VmRSS:\s+(\d+)", (proc / "status").read_text())
    assert found is not None
    return Health(started, len(list((proc / "fd").iterdir())), int(found.group(1)))


# ---------------------------------------------------------------- the run


@dataclass
class Fuzz:
    """One run against one node."""

    node: Node
    seed: int
    model: Model = field(default_factory=Model)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    sent: int = 0
    withheld: int = 0
    orders: int = 0

    def __post_init__(self) -> None:
        path = str(self.node.run / "fencer.sock")
        self.connections = [
            Connection(path, peer)
            for peer, count in CONNECTIONS.items()
            for _ in range(count)
            if peer == "root" or os.geteuid() == 0
        ]
        self.maker = Maker(self.seed, self.model)

    def violation(self, what: str, body: bytes) -> None:
        if len(self.wrong) < 20:
            self.wrong.append(f"frame {self.sent}: {what}\n    {body[:400]!r}")

    # -------------------------------------------------- frames that change nothing

    def round(self) -> None:
        """A batch to every connection, then all the replies."""
        for c in self.connections:
            out = []
            for _ in range(BATCH[c.peer]):
                body = self.maker.body()
                shown: Generation | None = None
                try:
                    said = request(body)
                    right, changes = expect(self.model, said, c.peer)
                    if changes:
                        self.withheld += 1
                        continue
                    shown = self.model.highest
                except Bad as e:
                    right = set(e.names)
                out.append(framed(body))
                c.pending.append((body, right, shown))
            c.send(b"".join(out))
        for c in self.connections:
            self._read(c)
            if self.maker.r.random() < 0.05:
                self._spoil(c)

    def _read(self, c: Connection) -> None:
        while c.pending:
            body, right, shown = c.pending.popleft()
            reply = c.reply()
            got = named(reply)
            self.sent += 1
            self.counts[got] += 1
            if got not in right:
                self.violation(f"{c.peer}: answered {got}, right were {sorted(right)}: {reply}", body)
            elif reply["kind"] == "refusal":
                highest = reply["highest"]
                told = (highest["term"], highest["order"]) if isinstance(highest, dict) else None
                if told != shown:
                    self.violation(f"{got} shows highest {told}, not {shown}", body)
            elif got == "status" and self._seen(reply) != self.model.highest:
                self.violation(f"status shows {self._seen(reply)}, not {self.model.highest}", body)
            elif got == "renewed":
                deadline = reply["deadline_boottime_ns"]
                assert isinstance(deadline, int)
                self.model.until_ns = deadline
                if deadline > boot_ns() + LEASE_NS:
                    self.violation("a lease longer than lease_s", body)

    @staticmethod
    def _seen(status: dict[str, Json]) -> Generation:
        highest = status["highest"]
        assert isinstance(highest, dict)
        return highest["term"], highest["order"]

    def _spoil(self, c: Connection) -> None:
        """End this connection: by a frame of no length, or by leaving in the middle of one."""
        r = self.maker.r
        self.sent += 1
        if r.random() < 0.5:
            length = r.choice((0, MAX_BODY + 1, 2**31, 2**32 - 1, r.randint(MAX_BODY + 1, 2**32 - 1)))
            c.send(struct.pack(">I", length) + r.randbytes(r.randint(0, 50)))
            reply = c.reply()
            self.counts[named(reply)] += 1
            if named(reply) != "bad_frame" or not c.ended():
                self.violation(f"a length of {length} was answered {reply}", b"")
        else:
            whole = framed(self.maker.body())
            c.send(whole[: r.randint(0, len(whole) - 1)])
            self.counts["(cut short)"] += 1
        c.close()
        c.connect()

    # -------------------------------------------------- orders that must be accepted

    def order(self) -> None:
        """One valid order of root or the agent; the model moves with it."""
        m, r = self.model, self.maker.r
        c = r.choice(self.connections)
        term, order = m.highest
        g = (term, order + r.randint(1, 3)) if r.random() < 0.7 else (term + r.randint(1, 3), r.randint(0, 2))
        kind = r.choice(["fence"] * 4 + ["follow"] * 3 + ["activate"] * 2 + ["operator_fence"])
        if m.latched:
            self._ask(self.connections[0], {"op": "unfence", "who": "fuzz"}, "done")
            m.latched = False
        said: dict[str, Json] = {"op": kind, "generation": {"term": g[0], "order": g[1]}}
        if kind == "fence":
            said |= {"reason": "fuzz", "clean": r.random() < 0.3}
        elif kind == "follow":
            said |= {"primary": r.choice([None, "n2"])}
        elif kind == "activate":
            said |= {"deadline_boottime_ns": 2**62, "sync": {"count": 0, "voters": []}}
        else:
            c, said, g = self.connections[0], {"op": kind, "reason": "fuzz", "who": "fuzz"}, (term, order + 1)
        m.active = None
        self._ask(c, said, "accepted")
        m.highest, m.newest, m.latched = g, (kind, said.get("primary")), kind == "operator_fence"
        if kind == "activate":
            self._leads(c, g)
        status = self._ask(c, {"op": "status"}, "status")
        if self._seen(status) != g or (status["latch"] is not None) != m.latched:
            self.violation(f"after {kind} {g}: {status}", b"")
        self.orders += 1

    def _leads(self, c: Connection, g: Generation) -> None:
        """Renewed until it writes; then there is a lease for the frames to come."""
        renew: dict[str, Json] = {"op": "renew", "generation": {"term": g[0], "order": g[1]}}
        record: Json = None
        while not self.wrong:
            renewed = self._ask(c, renew | {"deadline_boottime_ns": 2**62}, "renewed")
            deadline = renewed.get("deadline_boottime_ns")
            record = self._ask(c, {"op": "status"}, "status")["order"]
            assert isinstance(record, dict)
            if record["state"] != "running" and isinstance(deadline, int):
                self.model.active, self.model.until_ns = g, deadline
                if record["state"] != "done":
                    self.violation(f"activate {g} ended as {record}", b"")
                return
            time.sleep(0.02)
        self.wrong.append(f"  after which the order was {record}")

    def _ask(self, c: Connection, said: dict[str, Json], right: str) -> dict[str, Json]:
        body = json.dumps({"v": 1, **said}).encode()
        c.send(framed(body))
        reply = c.reply()
        self.sent += 1
        self.counts[named(reply)] += 1
        if named(reply) != right:
            self.violation(f"{c.peer}: answered {reply}, right was {right}", body)
        return reply

    def quiet(self) -> Health:
        """Fenced and proven, all connections open: what the process holds then."""
        while self.model.latched or self.model.newest[0] != "fence":
            self.order()
        until = time.monotonic() + 20
        while time.monotonic() < until and not self.node.status().fence_proven:
            time.sleep(0.05)
        assert self.node.process is not None
        looks = []
        for _ in range(10):  # a descriptor may be open for a moment
            time.sleep(0.05)
            looks.append(health(self.node.process.pid))
        return min(looks, key=lambda h: h.descriptors)

    def run(self, frames: int) -> tuple[Health, Health]:
        before: Health | None = None
        due, told = ORDER_EVERY, time.monotonic()
        while self.sent < frames and not self.wrong:
            self.round()
            if self.sent >= due:
                due += ORDER_EVERY
                self.order()
            if before is None and self.sent >= frames * WARM_UP:
                before = self.quiet()
            if time.monotonic() - told > 10:
                told = time.monotonic()
                assert self.node.process is not None
                sys.stderr.write(f"{self.sent} frames, {health(self.node.process.pid).resident_kb} kB\n")
        after = self.quiet()
        return before or after, after


def judge(fuzz: Fuzz, before: Health, after: Health, seconds: float) -> None:
    """What the process must not have done."""
    if before.started != after.started:
        fuzz.wrong.append("the fencer was restarted")
    if after.descriptors > before.descriptors + 4:  # a watch's own come and go
        fuzz.wrong.append(f"descriptors: {before.descriptors} before, {after.descriptors} after")
    if after.resident_kb - before.resident_kb > GROWTH_KB:
        fuzz.wrong.append(f"memory: {before.resident_kb} kB before, {after.resident_kb} kB after")
    lines = (fuzz.node.top / "fencer.log").read_text().count("\n")
    print(f"log: {lines} lines for {fuzz.orders} orders in {seconds:.0f} s")
    if lines > 8 * fuzz.orders + 5 * seconds + 50:
        fuzz.wrong.append("the log was flooded")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    replay = f"python bench/fuzz.py --frames {options.frames} --seed {options.seed}"
    print(f"seed {options.seed}: {replay}", flush=True)
    with tempfile.TemporaryDirectory(prefix="hz-") as scratch:
        top = Path(scratch)
        top.chmod(0o755)
        (top / "parts").mkdir(mode=0o755)
        (top / "node").mkdir(mode=0o755)
        node = Node(top / "node", make_template(top, find_parts(top / "parts")))
        told = json.loads(node.config.read_text()) | {"fence_timeout_s": FENCE_TIMEOUT_S}
        if os.geteuid() == 0:
            told |= {"agent_uid": AGENT_UID, "agent_gid": AGENT_UID}
        node.config.write_text(json.dumps(told))
        try:
            node.start()
            fuzz = Fuzz(node, options.seed)
            begun = time.monotonic()
            try:
                before, after = fuzz.run(options.frames)
            except (OSError, EOFError) as e:
                raise SystemExit(f"VIOLATION ({replay}): the fencer ended: {e!r}\n{node.log()}") from e
            seconds = time.monotonic() - begun
            print(f"{fuzz.sent} frames in {seconds:.0f} s: {fuzz.sent / seconds:.0f} a second, on ", end="")
            print(
                f"{len(fuzz.connections)} connections; {fuzz.withheld} more would have been orders: not sent"
            )
            print(", ".join(f"{name} {count}" for name, count in fuzz.counts.most_common()))
            print(
                f"memory: {before.resident_kb} kB after the warm-up, {after.resident_kb} kB at the end; ",
                end="",
            )
            print(f"descriptors: {before.descriptors}, {after.descriptors}")
            judge(fuzz, before, after, seconds)
        finally:
            node.destroy()
            shutil.rmtree(node.data, ignore_errors=True)
    if fuzz.wrong:
        sys.exit(f"VIOLATION ({replay}):\n" + "\n".join(fuzz.wrong))
    print("nothing wrong")


if __name__ == "__main__":
    main()
