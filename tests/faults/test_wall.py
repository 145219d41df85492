"""docs/faults.md lists every fault with its tests: all of them exist, and none is left out."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/faults.md"
FAULTS = [f"F{number}" for number in range(1, 27)]
OPEN: set[str] = set()  # of those that nothing proves yet


def rows() -> dict[str, list[str]]:
    """Fault -> its tests, as `path::name`."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text().splitlines():
        if match := re.fullmatch(r"\| (F\d+) \|.*\|([^|]*)\|", line):
            assert match[1] not in found, line
            found[match[1]] = [test for test in match[2].strip().split("<br>") if test]
    return found


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """The names of a module's test functions."""
    nodes = ast.parse(path.read_text()).body
    functions = (n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(each.name for each in functions if each.name.startswith("test_"))


def test_every_fault_has_its_row_and_its_tests() -> None:
    assert list(rows()) == FAULTS
    assert {fault for fault, tests in rows().items() if not tests} == OPEN


def test_every_test_of_the_table_exists() -> None:
    for tests in rows().values():
        for test in tests:
            path, _, name = test.partition("::")
            assert name in names_in(ROOT / path), test


def test_every_test_of_the_wall_stands_in_the_row_of_its_name() -> None:
    here = Path(__file__)
    for path in sorted(here.parent.glob("test_*.py")):
        if path == here:
            continue
        for name in names_in(path):
            number = re.match(r"test_f(\d\d)_", name)
            assert number is not None, f"{path.name}::{name} tells no fault"
            row = rows()[f"F{int(number[1])}"]
            assert f"{path.relative_to(ROOT)}::{name}" in row, name
