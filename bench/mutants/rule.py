"""What a broken rule is, and the names that many of them share."""

from __future__ import annotations

# rule, file, what stands there, what is put there instead, the tests that should notice
Rule = tuple[str, str, str, str, str]

FENCER, CORE = "fencer/harmony_fencer", "harmony/core"
MODEL, STORIES = "tests/fencer/test_model.py", "tests/fencer/test_model.py -k 'not Interleaving'"
CRASH = "tests/fencer/test_crash.py"
