"""The table of mutants fits the source, docs/mutants.md tells of all of them, and the quick ones
are tried each time. `make mutants` tries all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mutation.mutants import MUTANTS, Mutant
from mutation.run import ROOT, TABLE, copy_of_the_tree, place, tried


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.keeps)
def test_each_row_fits_the_source(mutant: Mutant) -> None:
    place(mutant)
    assert mutant.old != mutant.new
    for test in mutant.tests:
        assert (ROOT / test.partition("::")[0]).is_file()


def test_the_document_tells_of_every_mutant_and_that_none_survived() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [m.keeps for m in MUTANTS]
    assert not [row for row in rows if "**nobody**" in row.split(" | ")[-1]]


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with copy_of_the_tree() as copied:
        yield copied


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.quick], ids=lambda mutant: mutant.keeps)
@pytest.mark.timeout(900)
def test_a_quick_mutant_is_noticed(mutant: Mutant, tree: Path) -> None:
    assert tried(mutant, tree).noticed_by
