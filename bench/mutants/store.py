"""The store's clients, each broken on purpose (bench/mutate.py)."""

from __future__ import annotations

from bench.mutants.rule import Rule

RULES: list[Rule] = [
    ("compare-and-set: nats", "harmony/store/nats.py",
     'headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}', "headers = None",
     "tests/store/test_contract.py"),
]  # fmt: skip
