"""Breaks a copy of the source, row by row of mutants.py, and runs the tests that must notice.

    make mutants                all rows, on all cores; writes docs/mutants.md
    make mutants ARGS=budget    only the rows whose promise holds this word; writes nothing

A mutant that survives, and a row whose text stands nowhere or twice, is a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from mutation.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PACKAGE = Path("service/tokenwire_service")
COPIED = ("service/tokenwire_service", "clients/python/src", "tests", "docs", "pyproject.toml")
PATIENCE = 600  # seconds for the tests of one row; a mutant that hangs has been noticed, too
TABLE = ROOT / "docs" / "mutants.md"


class RowError(Exception):
    """A row does not fit the source."""


@dataclass(frozen=True)
class Result:
    """What became of one mutant."""

    mutant: Mutant
    where: str
    noticed_by: str  # empty: it survived


def place(mutant: Mutant) -> Path:
    """The one module that holds the row's text, relative to the tree. Raises RowError."""
    found = [
        path.relative_to(ROOT)
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        for _ in range(path.read_text().count(mutant.old))
    ]
    if len(found) != 1:
        stands = "in " + ", ".join(map(str, found)) if found else "nowhere"
        raise RowError(f"{mutant.keeps}: its text stands {stands}; mend the row in mutants.py")
    return found[0]


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """A tree to break."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        for part in COPIED:
            source, target = ROOT / part, Path(name) / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield Path(name)


def tried(mutant: Mutant, tree: Path) -> Result:
    """Runs the row's tests on the broken tree, and mends it again."""
    where = place(mutant)
    broken = tree / where
    whole = broken.read_text()
    broken.write_text(whole.replace(mutant.old, mutant.new))
    try:
        return Result(mutant, str(where), _first_failure(mutant.tests, tree))
    finally:
        broken.write_text(whole)


def _first_failure(tests: tuple[str, ...], tree: Path) -> str:
    """The first of the tests that fails."""
    paths = [str(tree / "service"), str(tree / "clients/python/src"), str(tree / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-rfE"]
    command += ["-p", "mutation.unshrunk", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return "(it hangs)"
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if failed is None and "Timeout" in done.stdout + done.stderr:
        return "(it hangs)"
    if failed is None and done.returncode != 0:  # not that it was noticed: the row is wrong
        error = re.search(r"^ERROR (\S+)", done.stdout, re.MULTILINE)
        if error is None or "::" not in error[1]:
            raise RowError(f"the tests do not run: {done.stdout[-600:]}{done.stderr[-600:]}")
        return error[1].removeprefix("tests/")
    return failed[1].removeprefix("tests/") if failed else ""


def all_tried(mutants: tuple[Mutant, ...], workers: int) -> list[Result]:
    """Each mutant, several at once, each on a tree of its own."""
    for mutant in mutants:
        place(mutant)  # all rows first: that costs nothing
    trees: Queue[Path] = Queue()

    def one(mutant: Mutant) -> Result:
        tree = trees.get()
        try:
            result = tried(mutant, tree)
        finally:
            trees.put(tree)
        print(f"{'noticed ' if result.noticed_by else 'SURVIVED'} {mutant.keeps}", flush=True)
        return result

    def with_trees(left: int) -> list[Result]:
        if left == 0:
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(one, mutants))
        with copy_of_the_tree() as tree:
            trees.put(tree)
            return with_trees(left - 1)

    return with_trees(workers)


def table(results: list[Result]) -> str:
    """docs/mutants.md."""
    lines = [
        "# Mutants",
        "",
        "Each row is a deliberate breakage of the source (`tests/mutation/mutants.py`): what the",
        "code promises there, and the first test that turned red when it was broken. Written by",
        "`make mutants`; a mutant that no test notices fails it.",
        "",
        "| what is broken | in | noticed by |",
        "|---|---|---|",
    ]
    for result in results:
        where = result.where.removeprefix("service/tokenwire_service/")
        by = result.noticed_by and f"`{result.noticed_by}`"
        lines.append(f"| {result.mutant.keeps} | {where} | {by or '**nobody**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only rows whose promise holds all of these")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    chosen = tuple(m for m in MUTANTS if all(word in m.keeps for word in given.words))
    results = all_tried(chosen, given.workers)
    survived = [result for result in results if not result.noticed_by]
    if not given.words:
        TABLE.write_text(table(results))
    print(f"{len(results)} mutants, {len(survived)} survived")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
