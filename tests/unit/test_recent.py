"""Five minutes, second by second, and no more than that."""

from __future__ import annotations

import msgspec
import pytest

from tokenwire_service.recent import KEPT, Recent
from tokenwire_service.telemetry import AttemptEvent, CallEvent

CALL = CallEvent(
    request_id="r",
    method="tokenwire.v1.ChatService/StreamChat",
    code="OK",
    reason="",
    message="",
    model="m",
    attempts=1,
    prompt_tokens=0,
    completion_tokens=0,
    usage_estimated=False,
    seconds=1.0,
)
ATTEMPT = AttemptEvent(
    request_id="r",
    upstream="u",
    model="m",
    key_id="k",
    http_status=200,
    fault="",
    upstream_code="",
    seconds=1.0,
    prompt_tokens=3,
    completion_tokens=5,
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.time = 1000.5

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> Recent:
    return Recent(lambda: 7, now=clock)


def test_a_second_is_told_when_it_is_over(recent: Recent, clock: Clock) -> None:
    recent.call(CALL)
    assert recent.since(0) == []
    clock.time += 1
    (second,) = recent.since(0)
    assert (second.number, second.succeeded, second.in_flight) == (0, 1, 7)
    assert recent.since(1) == []


def test_what_counts_as_what(recent: Recent, clock: Clock) -> None:
    recent.call(msgspec.structs.replace(CALL, code="CANCELLED", reason="CANCELLED"))
    recent.call(msgspec.structs.replace(CALL, code="UNAVAILABLE", reason="RATE_LIMITED"))
    recent.call(msgspec.structs.replace(CALL, code="UNIMPLEMENTED"))
    recent.attempt(ATTEMPT)
    recent.attempt(msgspec.structs.replace(ATTEMPT, fault="rate_limited", number=2))
    recent.attempt(msgspec.structs.replace(ATTEMPT, fault="abandoned", number=3))
    recent.relayed(2, 0.25)
    recent.relayed(3, None)
    clock.time += 1
    (second,) = recent.since(0)
    assert (second.succeeded, second.left) == (0, 1)
    assert second.failed == {"RATE_LIMITED": 1, "UNIMPLEMENTED": 1}
    assert (second.attempts, second.retries, second.faults) == (3, 2, {"rate_limited": 1})
    assert (second.prompt_tokens, second.completion_tokens) == (9, 15)
    assert (second.deltas, list(second.first_texts)) == (5, [0.25])


def test_seconds_without_an_event_are_there_too(recent: Recent, clock: Clock) -> None:
    recent.call(CALL)
    clock.time += 5
    recent.call(CALL)
    clock.time += 1
    assert [each.number for each in recent.since(0)] == [0, 1, 2, 3, 4, 5]
    assert [each.succeeded for each in recent.since(0)] == [1, 0, 0, 0, 0, 1]
    assert [each.number for each in recent.since(4)] == [4, 5]


@pytest.mark.parametrize("pause", [1, 37, KEPT - 1, KEPT, KEPT + 1, 86_400])
def test_it_never_holds_more_than_it_says(recent: Recent, clock: Clock, pause: int) -> None:
    for _ in range(3 * KEPT // pause + 2):
        recent.call(CALL)
        clock.time += pause
        numbers = [each.number for each in recent.since(0)]
        assert len(numbers) <= KEPT
        assert numbers == list(range(numbers[0], int(clock.time - 1000.5)))
    assert len(recent.since(0)) == min(KEPT, int(clock.time - 1000.5))


def test_a_flood_of_first_texts_is_bounded(recent: Recent, clock: Clock) -> None:
    for _ in range(10_000):
        recent.relayed(1, 0.1)
    clock.time += 1
    (second,) = recent.since(0)
    assert second.deltas == 10_000
    assert len(second.first_texts) == 256
