"""Backoff within its bounds; retries never more than the budget, whatever the clock does."""

import ast
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenwire_service
from tokenwire_service.retry import Backoff, RetryBudget

SOURCES = Path(tokenwire_service.__file__).parent


class Clock:
    """Virtual monotonic seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- backoff ----------------------------------------------------------------------------


@given(
    first=st.floats(0.001, 60),
    cap=st.floats(0.001, 600),
    failures=st.integers(1, 10_000),
    share=st.floats(0, 1, exclude_max=True),
)
def test_a_delay_is_between_nothing_and_the_doubled_first_or_the_cap(
    first: float, cap: float, failures: int, share: float
) -> None:
    delay = Backoff(first, cap, random=lambda: share).delay(failures)
    ceiling = min(cap, first * 2 ** min(failures - 1, 30))
    assert delay == pytest.approx(share * ceiling)
    assert 0 <= delay <= cap


def test_the_ceiling_doubles_until_the_cap() -> None:
    backoff = Backoff(0.25, 3.0, random=lambda: 1.0)
    assert [backoff.delay(n) for n in range(1, 7)] == [0.25, 0.5, 1.0, 2.0, 3.0, 3.0]


def test_jitter_is_full_and_the_same_seed_gives_the_same_schedule() -> None:
    def schedule(seed: int) -> list[float]:
        backoff = Backoff(1.0, 8.0, random=random.Random(seed).random)
        return [backoff.delay(1 + n % 5) for n in range(500)]

    assert schedule(7) == schedule(7) != schedule(8)
    shares = [delay / min(8.0, 2.0 ** (n % 5)) for n, delay in enumerate(schedule(7))]
    assert min(shares) < 0.05
    assert max(shares) > 0.95


# --- budget -----------------------------------------------------------------------------


@given(
    ratio=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
    floor=st.integers(0, 5),
    events=st.lists(
        st.one_of(st.sampled_from(["call", "retry", "retry"]), st.floats(0, 30)), max_size=150
    ),
)
def test_retries_never_exceed_the_share_and_the_floor_over_any_window(
    ratio: float, floor: int, events: list[str | float]
) -> None:
    clock = Clock()
    budget = RetryBudget(ratio, floor, clock)
    history: list[tuple[float, int, int]] = [(clock.now, 0, 0)]  # (time, calls, retries) so far
    for event in events:
        _, calls, retries = history[-1]
        if event == "call":
            budget.deposit()
            calls += 1
        elif event == "retry":
            retries += budget.withdraw()
        else:
            clock.now += float(event)
        history.append((clock.now, calls, retries))
        assert 0 <= budget.balance <= floor + 100 * ratio
    for i, (began, calls_before, retries_before) in enumerate(history):
        for ended, calls, retries in history[i:]:
            share = ratio * (calls - calls_before)
            saved = min(100, calls_before) * ratio  # unused ones of earlier calls
            ground = floor * (1 + (ended - began) / 10)
            assert retries - retries_before <= share + saved + ground + 1e-6


@given(st.integers(0, 300))
def test_at_full_failure_the_load_is_one_plus_the_share(calls: int) -> None:
    budget = RetryBudget(0.25, 0, Clock())
    retries = 0
    for _ in range(calls):
        budget.deposit()
        while budget.withdraw():
            retries += 1
    assert retries == calls // 4


def test_the_floor_lets_a_quiet_gateway_retry_and_refills_in_ten_seconds() -> None:
    clock = Clock()
    budget = RetryBudget(0.2, 3, clock)
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]
    clock.now += 3.4
    assert [budget.withdraw() for _ in range(2)] == [True, False]
    clock.now += 1e6
    assert [budget.withdraw() for _ in range(4)] == [True, True, True, False]


def test_unused_retries_pile_up_to_a_bound() -> None:
    budget = RetryBudget(1.0, 0, Clock())
    for _ in range(100_000):
        budget.deposit()
    assert sum(budget.withdraw() for _ in range(1000)) == 100


def test_what_calls_have_earned_is_spent_before_the_floor() -> None:
    budget = RetryBudget(1.0, 3, Clock())
    budget.deposit()
    assert budget.balance == 4.0
    assert [(budget.withdraw(), budget.balance) for _ in range(2)] == [(True, 3.0), (True, 2.0)]


def test_whatever_the_balance_shows_can_be_withdrawn() -> None:
    clock = Clock()
    budget = RetryBudget(0.5, 1, clock)
    budget.withdraw()
    budget.deposit()
    clock.now += 5.0  # half a retry earned, half a retry granted
    assert budget.balance == 1.0
    assert budget.withdraw()
    assert budget.balance == 0.0
    assert not budget.withdraw()


def test_without_share_and_floor_nothing_is_retried() -> None:
    clock = Clock()
    budget = RetryBudget(0.0, 0, clock)
    for _ in range(50):
        budget.deposit()
        clock.now += 10
        assert not budget.withdraw()


# --- clocks -----------------------------------------------------------------------------

# Where the date on the wall is what is meant: dates in headers, stamps of log lines, people.
WALL_CLOCK = {
    "upstream/classify.py",
    "telemetry.py",
    "callers.py",  # whose budget is one of a calendar day
    "quotas.py",  # the same, over all replicas
    "cli.py",
    "demo.py",
    "simulated.py",
    "terminal.py",
}
POLICY = [
    path
    for path in [*SOURCES.glob("*.py"), *SOURCES.glob("upstream/*.py")]
    if str(path.relative_to(SOURCES)) not in WALL_CLOCK
]


@pytest.mark.parametrize("path", POLICY, ids=lambda path: path.stem)
def test_a_jump_of_the_wall_clock_changes_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("time", "time"), ("time", "time_ns")}
        if isinstance(node, ast.ImportFrom):
            assert not (
                node.module == "time" and {"time", "time_ns"} & {n.name for n in node.names}
            )
            assert node.module != "datetime"
        if isinstance(node, ast.Import):
            assert "datetime" not in {name.name for name in node.names}
