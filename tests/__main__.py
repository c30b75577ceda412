"""`python -m tests [--all] [pytest's arguments]`: the tests, in as little time as two cores need (`make test`).

Tests of real servers mostly wait. They run in lanes side by side, each lane a process with memory and a network of its
own (conftest.py), a file never in two lanes. What only computes (marked `computes`: simulation, searches) runs beside
them in the kernel's idle class: it has what is left, and nothing else.

Without --all, what repeats itself is sampled (sampling.py): another sample at each run, named by its turn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from tests import sampling

LANES = 3  # more of them wait for the two cores and no longer for servers
IDLE = ["setpriv", "--pdeathsig", "TERM", "--", "chrt", "--idle", "0"]  # and they do not outlive this
NONE_SELECTED = 5  # pytest's exit code


def main() -> int:
    """The exit code: not 0 when either part has failed."""
    asked = sys.argv[1:]
    if "--all" in asked:
        asked.remove("--all")
        os.environ.pop(sampling.TURN, None)
    else:
        os.environ.setdefault(sampling.TURN, str(int(time.time()) // 60))
        print(
            f"A sample of what repeats itself; the same again: {sampling.TURN}={sampling.turn()}", flush=True
        )
    pytest = [sys.executable, "-m", "pytest", *asked]
    lanes = ["-n", str(LANES), "--dist", "loadscope", "--no-loadscope-reorder", "--maxschedchunk", "1"]
    with tempfile.TemporaryFile() as said:
        searches = subprocess.Popen(
            [*IDLE, *pytest, "-m", "computes"], stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            rest = subprocess.run([*pytest, *lanes, "-m", "not computes"], check=False).returncode
            print("Ran beside them:", flush=True)
            computed = searches.wait()
        finally:
            searches.terminate()
            said.seek(0)
            sys.stdout.buffer.write(said.read())
            sys.stdout.flush()
    if rest == computed == NONE_SELECTED:
        return NONE_SELECTED
    return max({rest, computed} - {0, NONE_SELECTED}, default=0)


if __name__ == "__main__":
    sys.exit(main())
