"""The store's clients, each broken on purpose (bench/mutate.py)."""

from __future__ import annotations

from bench.mutants.rule import Rule

NATS, LINK, READ = (f"harmony/store/{name}.py" for name in ("nats", "link", "answers"))
CONTRACT, ANSWERS, ELSEWHERE, MONITOR = (
    f"tests/store/test_{name}.py" for name in ("contract", "answers", "elsewhere", "monitor")
)

RULES: list[Rule] = [
    ("compare-and-set: nats", "harmony/store/nats.py",
     'headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}', "headers = None",
     "tests/store/test_contract.py"),
    ("store: refused is told from unknown", READ, "MISMATCH = {10071, 10164}", "MISMATCH = {10071}", ANSWERS),
    ("store: only a sequence's mismatch is a refusal", NATS, "                if e.code in MISMATCH:\n", "                if True:\n", ANSWERS),
    ("store: an acknowledgement has a sequence", NATS, "            if not isinstance(sequence, int):\n", "            if False:\n", ANSWERS),
    ("store: an error is no missing key", NATS, "if e.code == MESSAGE_MISSING:", "if True:", ANSWERS),
    ("store: a deleted key is none", READ, 'if b"KV-Operation:" in headers:', "if False:", ANSWERS),
    ("store: the credentials", LINK, "user_credentials=credentials_file,", "", ANSWERS),
    ("store: the credentials reach the client", "harmony/store/__init__.py", "urls, cluster_id, replicas, credentials_file, monitor_urls,", "urls, cluster_id, replicas, None, monitor_urls,", ANSWERS),
    ("store: an old server", NATS, "        weak += buckets.too_old(version(client))\n", "", ANSWERS),
    ("store: made with the configured copies", NATS, "buckets.wanted(self._bucket, self._replicas)", "buckets.wanted(self._bucket, 1)", ANSWERS),
    ("store: fewer copies than configured", NATS, "buckets.problems(config, self._replicas)", "buckets.problems(config, 1)", ANSWERS),
    ("store: who has seen a bucket does not make it", NATS, "                if not self._may_create:\n", "                if False:\n", CONTRACT),
    ("store: made once", NATS, "        self._may_create = False\n", "", CONTRACT),
    ("store: may_create reaches the client", "harmony/store/__init__.py", "may_create=may_create\n", "may_create=True\n", CONTRACT),
    ("store: the monitoring ports reach it", NATS, "Monitors(monitor_urls, CHECK_FACTS_S)", "Monitors((), CHECK_FACTS_S)", CONTRACT),
    ("store: a call's deadline", NATS, "        with trio.move_on_after(timeout_s) as scope:\n", "        with trio.move_on_after(60) as scope:\n", f"{CONTRACT} -k frozen"),
    ("store: each key of its own cluster", NATS, 'self._bucket = f"harmony_{cluster_id}"', 'self._bucket = "harmony_all"', CONTRACT),
    ("store: the store's own time", READ, 'return int(seconds) * 1_000_000_000 + int((found.group(2) or "").ljust(9, "0"))', "return int(seconds) * 1_000_000_000", f"{CONTRACT} {ANSWERS}"),
    ("store: the watch goes on after a consumer is lost", NATS, "f\"CONSUMER.INFO.{self._stream}.{info['name']}\"", 'f"STREAM.INFO.{self._stream}"', f"{CONTRACT} -k watch"),
    ("store: newer revisions only", NATS, "if revision > seen.get(entry.key, 0):", "if False:", CONTRACT),
    ("store: what cannot be written is fatal", NATS, "        if wrong:\n", "        if False:\n", CONTRACT),
    ("store: the lineage is of the stream's birth", NATS, 'f"{self._stream} of {info.get(\'created\')}"', "self._stream", CONTRACT),
    ("store: a server without JetStream is left", NATS, "            if len(self._urls) > 1:\n", "            if False:\n", ELSEWHERE),
    ("store: for the same history only", NATS, "right = self._looked is not None and self._lineage(info) == self._looked.lineage", "right = True", ELSEWHERE),
    ("store: who says so is not waited for", NATS, "                if e.code in NOT_HERE:\n", "                if False:\n", ELSEWHERE),
    ("store: not at every slow answer", NATS, "        await trio.sleep(self._rest_s)\n        others", "        others", ELSEWHERE),
    ("store: who lost a connection does not rest", NATS, "            self._rest_s = 0.0\n            self._tell", "            self._tell", ELSEWHERE),
    ("store: a server named twice hides no other", NATS, "list(dict.fromkeys(urls))", "urls", ELSEWHERE),
    ("store: calls under way keep their connection", LINK, "while set(self.patience) - {None} and not self.closed.is_set():", "while False:", ELSEWHERE),
    ("store: each server's cause is logged once", NATS, "if self._told.get(url) != self._why:", "if True:", ELSEWHERE),
    ("store: looked at again where a call found none", NATS, "                self._look_again.set()\n                raise StoreUnavailable(f\"no stream", "                raise StoreUnavailable(f\"no stream", ANSWERS),
    ("bucket: on disk", "harmony/store/bucket.py", '        "storage": "file",\n        "retention": "limits",\n        "discard"', '        "storage": "memory",\n        "retention": "limits",\n        "discard"', "tests/store/test_bucket.py"),
    ("bucket: nothing is deleted", "harmony/store/bucket.py", '"deny_delete": True', '"deny_delete": False', "tests/store/test_bucket.py"),
    ("bucket: nothing is purged", "harmony/store/bucket.py", '"deny_purge": True', '"deny_purge": False', "tests/store/test_bucket.py"),
    ("bucket: acknowledged when stored", "harmony/store/bucket.py", 'if config.get("persist_mode", "default") != "default":', "if False:", "tests/store/test_bucket.py"),
    ("bucket: the oldest version", "harmony/store/bucket.py", "MINIMUM_VERSION = (2, 11)", "MINIMUM_VERSION = (2, 10)", "tests/store/test_bucket.py"),
    ("monitor: always", "harmony/store/monitor.py", 'if config.get("sync_always") is True:', "if True:", MONITOR),
    ("monitor: an error is no answer", "harmony/store/monitor.py", "    if answer.status != 200:\n", "    if False:\n", MONITOR),
    ("monitor: a deadline", "harmony/store/monitor.py", "timeout=timeout_s)", "timeout=3600)", MONITOR),
    ("monitor: a bound", "harmony/store/monitor.py", "answer.read(MOST_BYTES)", "answer.read()", MONITOR),
    ("monitor: TLS where it is asked for", "harmony/store/monitor.py", 'if parts.scheme == "https" else', "if False else", MONITOR),
    ("monitor: asked again", "harmony/store/monitor.py", "            await trio.sleep(self._every_s)\n", "            await trio.sleep_forever()\n", MONITOR),
    ("monitor: one that fails ends nothing", "harmony/store/monitor.py", "except (OSError, ValueError, RuntimeError) as e:", "except OSError as e:", MONITOR),
]  # fmt: skip
