"""The invariants hold in worlds made by chance, a million requests of them, and a seed tells the
same story twice. How it is done: world.py makes the worlds, history.py is what they write down,
judge.py has one function for each invariant, run.py starts them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from simulation import judge as judges
from simulation import sharing_judge as sharing_judges
from simulation.judge import judge
from simulation.run import (
    LEAST,
    SEEDS,
    SHARED_SEEDS,
    SHARED_SIZE,
    SHARED_TO_MEET,
    SIZE,
    TO_MEET,
    Summary,
    digest,
    on_all_cores,
    report,
    story,
    summarize_shared,
    tell,
)

INVARIANTS = Path(__file__).parents[2] / "docs" / "invariants.md"
REQUESTS = 1_000_000
SHARED_LEAST = 20
PATIENCE = 3600  # seconds, for machines that have other things to do; two idle cores take minutes

many = pytest.mark.timeout(PATIENCE)


@pytest.fixture(scope="module")
def everything() -> Summary:
    """All worlds of a CI run, on all cores."""
    return on_all_cores(SEEDS)


@many
def test_no_invariant_is_broken_in_a_million_requests(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """The report goes into the output: see conftest.py."""
    began = time.monotonic()
    everything = request.getfixturevalue("everything")
    record_property("simulated", report(everything, time.monotonic() - began))
    assert everything.broken == []
    assert everything.worlds == len(SEEDS)
    assert everything.calls >= REQUESTS


@many
@pytest.mark.parametrize("kind", TO_MEET)
def test_all_of_it_was_met_often(everything: Summary, kind: str) -> None:
    """Worlds in which nothing goes wrong, or everything, would prove little."""
    seldom = {name: everything.met[kind, name] for name in TO_MEET[kind]}
    assert {name: n for name, n in seldom.items() if n < LEAST} == {}
    unknown = {name for k, name in everything.met if k == kind} - set(TO_MEET[kind])
    assert unknown <= {"", "entering"}, "a table of what must be met lacks these"


@many
def test_a_seed_runs_the_same_in_another_process_and_by_other_clocks(everything: Summary) -> None:
    """I15, too: the clocks on the wall stand still here, and jump about there."""
    for seed in (0, 3):
        assert digest(tell(seed, SIZE, clock_jumps=False)) == everything.digests[seed]


@many
def test_no_invariant_of_replicas_is_broken_whatever_becomes_of_their_redis(
    record_property: Callable[[str, object], None],
) -> None:
    began = time.monotonic()
    found = on_all_cores(SHARED_SEEDS, SHARED_SIZE, summarize_shared)
    record_property("simulated", report(found, time.monotonic() - began, SHARED_TO_MEET))
    assert found.broken == []
    assert found.calls == len(SHARED_SEEDS) * SHARED_SIZE
    met = {
        (kind, name): found.met[kind, name]
        for kind in SHARED_TO_MEET
        for name in SHARED_TO_MEET[kind]
    }
    assert {name: n for name, n in met.items() if n < SHARED_LEAST} == {}
    assert summarize_shared(3).digests[3] == found.digests[3]


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_no_invariant_is_broken_in_a_small_world(seed: int) -> None:
    assert judge(tell(seed, 1200)) == []


def test_each_invariant_is_judged_where_the_document_says() -> None:
    judged = set()
    for name in (*vars(judges), *vars(sharing_judges)):
        judged |= {int(n) for n in re.findall(r"(?<![a-z0-9])i(\d+)_", name)}
    document = INVARIANTS.read_text()
    for name in set(re.findall(r"\btest_\w+", document.partition("| | |")[2])):
        assert list(INVARIANTS.parents[1].glob(f"tests/*/{name}.py")), f"no tests/*/{name}.py"
    rows = re.findall(r"^\| I(\d+) \|.*\| (.+) \|$", document, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 28))
    told = {int(number) for number, where in rows if "simulation" in where}
    # I15 is judged by the same worlds with and without clocks that jump.
    assert judged | {15} == told


def test_one_world_can_be_told_again() -> None:
    """What `make simulate SEED=1000 CALL=c5` prints: the call, its requests, its outcome."""
    told = story(1000, 300, "c5")
    (call,) = [each for each in tell(1000, 300).calls if each.name == "c5"]
    assert told.startswith("seed 1000: ")
    assert str(call) in told
    assert f"{call.outcome} at {call.ended:.3f}" in told
