"""The agent's shell, each broken on purpose (bench/mutate.py)."""

from __future__ import annotations

from bench.mutants.rule import Rule

RULES: list[Rule] = [
    ("rejoin: the probe tells the checkpoint", "harmony/agent/probe.py", "early=bool(early),", "",
     "tests/demo/test_comeback.py -k once_the_new_primary"),
    ("sickness: an error is an answer", "harmony/agent/health.py", ' or (s.greeting == "answered" and s.refused)', "",
     "tests/agent/test_health.py -k symptoms"),
    ("sickness: nobody waits, nothing stalls", "harmony/agent/health.py", "if same and vitals.wal_waiters else 0",
     "if same else 0", "tests/agent/test_health.py -k stall"),
    ("sickness: a wait that ends is none", "harmony/agent/health.py", "since_ns if then == now else now_ns", "since_ns",
     "tests/agent/test_health.py -k slept_in_between"),
]  # fmt: skip
