"""Breaks one safety rule at a time in a copy of the tree and shows which tests notice.

    python bench/mutate.py                 each rule of bench/mutants/
    python bench/mutate.py WORD            those whose name has the word in it
    python bench/mutate.py rows            each row of the table taken away
    python bench/mutate.py --area agent    those of one area
    ... --jobs 4                           so many at once, each in a network of its own (root)
    ... --confirm                          what noticed passes where nothing is broken, or it counts for nothing

Exit code 1: a broken rule that no test noticed. docs/mutation.md holds what it printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.mutants import AREAS, RULES
from bench.mutants.rule import Rule
from harmony.core.table import TABLE

TOP = Path(__file__).parents[1]
NOBODY = "NOBODY"
ALONE = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up; exec "$@"', "alone")
NOT_COPIED = (".git", ".venv", "build", "__pycache__", ".*_cache", ".hypothesis")


def broken(folder: Path, file: str, was: str, now: str) -> None:
    path = folder / file
    text = path.read_text()
    if was not in text:
        raise SystemExit(f"{file}: {was!r} is not there any more: correct bench/mutants")
    path.write_text(text.replace(was, now))


def environment(folder: Path, tree: Path) -> Path:
    """A virtual environment that imports the broken copy, also in processes started with `python -I`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    paths = [str(tree / p) for p in ("", "fencer", "supervisor")] + [sysconfig.get_path("purelib")]
    (site / "tree.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin" / "python"


def noticed_by(
    python: Path, tree: Path, arguments: Sequence[str], prefix: Sequence[str] = (), **variables: str
) -> str:
    """The first test that fails; NOBODY."""
    binaries = Path(sys.executable).parent
    env = os.environ | {"SEEDS": "160", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"} | variables
    argv = [*prefix, str(python), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(argv, cwd=tree, env=env, capture_output=True, text=True, check=False)
    lines = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR "))]
    if done.returncode == 1 and lines:
        return lines[0]
    if done.returncode:
        raise SystemExit(f"pytest {' '.join(arguments)} did not run:\n{done.stdout}{done.stderr}")
    return NOBODY


def without_each_row() -> Iterator[tuple[str, str]]:
    """Rows of the table, and who notices that it is missing: their examples, which are left out, aside."""
    python = Path(sys.executable)
    for row in TABLE:
        tests = shlex.split("-p bench.broken_row tests/core --ignore tests/core/test_rows.py")
        name = f"{row.id} {row.state}: {row.condition}"
        noticed = noticed_by(python, TOP, tests, BROKEN_ROW=str(row.id))
        if noticed == NOBODY:
            tests = shlex.split(f"-p bench.broken_row tests/core/test_rows.py -k test_row[{row.id}]")
            noticed = noticed_by(python, TOP, tests, BROKEN_ROW=str(row.id))
        yield name, noticed


def without(rule: Rule, prefix: Sequence[str], *, confirm: bool) -> tuple[str, str]:
    """The rule's name, and who notices that it is broken."""
    what, file, was, now, tests = rule
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        tree = Path(name) / "tree"
        shutil.copytree(TOP, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        Path(name).chmod(0o755)
        python = environment(Path(name) / "venv", tree)
        broken(tree, file, was, now)
        noticed = noticed_by(python, tree, shlex.split(tests), prefix)
        if confirm and noticed != NOBODY:
            shutil.copy(TOP / file, tree / file)
            # A parameter with a space in it is cut off in pytest's line: then all of them.
            test = noticed if noticed.endswith("]") or "[" not in noticed else noticed.partition("[")[0]
            if noticed_by(python, tree, [test], prefix) != NOBODY:
                return what, NOBODY
    return what, noticed


def without_each_rule(rules: Sequence[Rule], jobs: int, *, confirm: bool) -> Iterator[tuple[str, str]]:
    """In their order. More than one at a time: in networks of their own, as tests share ports."""
    prefix = ALONE if jobs > 1 else ()
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda rule: without(rule, prefix, confirm=confirm), rules)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="", help="of the rule's name; or: rows")
    parser.add_argument("--area", choices=sorted(AREAS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--confirm", action="store_true")
    o = parser.parse_args()
    rules = [rule for rule in (AREAS[o.area] if o.area else RULES) if o.word in rule[0]]
    found = without_each_row() if o.word == "rows" else without_each_rule(rules, o.jobs, confirm=o.confirm)
    survivors = []
    for rule, noticed in found:
        if noticed == NOBODY:
            survivors.append(rule)
        print(f"| {rule} | `{noticed}` |", flush=True)
    if survivors:
        raise SystemExit(f"not noticed: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
