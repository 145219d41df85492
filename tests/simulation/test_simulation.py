"""The invariants hold in worlds made by chance, and a seed tells the same story twice."""

import dataclasses

import pytest
from simulation.vtime import run
from simulation.world import History, World, judge

SEEDS = 40
CALLS = 1000  # in each world


def history_of(seed: int, calls: int) -> History:
    world = World(seed, calls)
    history = run(world.run())
    judge(world)
    return history


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_invariant_is_broken(seed: int) -> None:
    history = history_of(seed, CALLS)
    assert not history.broken, f"seed {seed}: {history.broken}"
    assert len(history.ended) == CALLS


def test_a_seed_runs_the_same_twice() -> None:
    first, second = history_of(7, 300), history_of(7, 300)
    assert [dataclasses.astuple(e) for e in first.ended] == [
        dataclasses.astuple(e) for e in second.ended
    ]
    assert first.sent == second.sent


def test_most_outcomes_are_met() -> None:
    """Worlds in which nothing goes wrong, or everything, would prove little."""
    seen = {e.outcome for seed in range(8) for e in history_of(seed, 300).ended}
    assert {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RATE_LIMITED", "GATEWAY_OVERLOADED"} <= seen
