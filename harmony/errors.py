"""Errors of the world outside, as a tree; it imports nothing. Our own bugs crash instead.

HarmonyError
├── ConfigError            the configuration is wrong: every problem with its place      (exit 78)
├── FatalError             this node must not go on as configured: says what to do        (exit 78)
├── StoreError
│   ├── StoreUnavailable   not connected, or the answer did not come in time: outcome unknown
│   ├── SequenceMismatch   the store refused a compare-and-set: lost or unknown, read again
│   └── StoreMisconfigured the bucket exists but is not as Harmony needs it              (exit 78)
└── FencerUnavailable      the fencer's socket cannot be reached or does not answer
"""

from __future__ import annotations

EXIT_CONFIG = 78  # sysexits' EX_CONFIG: restarting will not help


def in_a_line(e: Exception, most: int = 300) -> str:
    """What a library's error says, for a log or a status: one line, `most` characters."""
    return " ".join(str(e).split())[:most]


class HarmonyError(Exception):
    """Base of all that can go wrong outside this program."""


class ConfigError(HarmonyError):
    """The configuration is wrong. `problems` are lines 'place: what is wrong, what to do'."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class FatalError(HarmonyError):
    """Going on would be wrong and a restart will not help; the message says what to do."""


class StoreError(HarmonyError):
    """Base of the store's errors."""


class StoreUnavailable(StoreError):
    """Not connected, or no answer in time. A write may or may not have been stored."""


class SequenceMismatch(StoreError):
    """The store refused a compare-and-set because the key's revision is another."""


class StoreMisconfigured(StoreError):
    """The bucket is not as Harmony needs it; the message names every difference."""


class FencerUnavailable(HarmonyError):
    """The fencer does not answer on its socket."""
