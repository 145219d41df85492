"""docs/security.md tells of every threat how it is met, and names tests that exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THREATS = [f"T{number}" for number in range(1, 13)]


def rows() -> dict[str, tuple[str, str, list[str]]]:
    """Threat -> what could happen, what stands against it, its tests as `path::name`."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    for line in (ROOT / "docs/security.md").read_text().splitlines():
        if match := re.fullmatch(r"\| (T\d+) \|([^|]+)\|([^|]+)\|([^|]*)\|", line):
            threat, could, against, tests = (cell.strip() for cell in match.groups())
            assert threat not in found, line
            found[threat] = could, against, [test for test in tests.split("<br>") if test]
    return found


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """The names of a module's test functions."""
    nodes = ast.parse(path.read_text()).body
    functions = (n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(each.name for each in functions if each.name.startswith("test_"))


def test_every_threat_has_its_row_its_defence_and_its_tests() -> None:
    assert list(rows()) == THREATS
    for threat, (could, against, tests) in rows().items():
        assert could, threat
        assert against, threat
        assert tests, threat


def test_every_test_of_the_table_exists() -> None:
    for _, _, tests in rows().values():
        for test in tests:
            path, _, name = test.partition("::")
            assert name in names_in(ROOT / path), test


def test_what_the_gateway_runs_on_is_pinned_with_hashes() -> None:
    # As pip reads it: a line that ends with a backslash goes on.
    text = (ROOT / "service/requirements.txt").read_text().replace("\\\n", " ")
    packages = [
        line for line in text.splitlines() if line.strip() and not line.startswith((" ", "#"))
    ]
    assert len(packages) > 20
    for package in packages:
        assert re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", package), package
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert dockerfile.count("pip install") == 1
    assert "--require-hashes --no-deps" in dockerfile
