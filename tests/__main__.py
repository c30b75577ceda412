"""`python -m tests [pytest's arguments]`: all tests, in less time on two cores (`make test`).

Tests of real servers mostly wait, and are sensitive to what else runs; the simulation and the searches only compute. So
these (marked `computes`) run beside those in the kernel's idle class: they have what is left, and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

IDLE = ["setpriv", "--pdeathsig", "TERM", "--", "chrt", "--idle", "0"]  # and they do not outlive this
NONE_SELECTED = 5  # pytest's exit code


def main() -> int:
    """The exit code: not 0 when either part has failed."""
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile() as said:
        searches = subprocess.Popen(
            [*IDLE, *pytest, "-m", "computes"], stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            rest = subprocess.run([*pytest, "-m", "not computes"], check=False).returncode
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
