"""What is counted of the events, and that every observer is told of each."""

from __future__ import annotations

from msgspec.structs import replace

from harness import Recorder
from tokenwire_service.counters import Counters, KeyCount
from tokenwire_service.telemetry import ABANDONED, AttemptEvent, CallEvent, Observers

ANSWERED = AttemptEvent("r", "u", "m", "k", 200, "", "", 0.1, 7, 5)
REFUSED = AttemptEvent("r", "u", "m", "k", 429, "rate_limited", "slow_down", 0.1)
CALL = CallEvent("r", "tokenwire.v1.ChatService/Chat", "OK", "", "", "m", 1, 7, 5, False, 0.1)


def test_attempts_are_counted_by_key_and_outcome() -> None:
    at = 100.0
    counters = Counters(now=lambda: at)
    counters.keep("u", ["k", "other", "never"])
    counters.keep("v", ["k"])
    for event in (
        ANSWERED,
        REFUSED,
        replace(REFUSED, fault=ABANDONED, prompt_tokens=7, completion_tokens=1),
        replace(ANSWERED, key_id="other"),
        replace(ANSWERED, upstream="v"),
    ):
        at += 1.0
        counters.attempt(event)
    assert counters.key("u", "k") == KeyCount(
        attempts=3,
        successes=1,
        abandoned=1,
        faults={"rate_limited": 1},  # type: ignore[arg-type]
        prompt_tokens=14,
        completion_tokens=6,
        at=103.0,
        error="rate_limited",
        error_status=429,
        error_code="slow_down",
        error_at=102.0,
    )
    assert counters.key("u", "other").attempts == counters.key("v", "k").attempts == 1
    assert counters.key("u", "never") == KeyCount()


def test_calls_are_counted_by_method_and_code() -> None:
    counters = Counters()
    for event in (CALL, CALL, replace(CALL, code="UNAVAILABLE")):
        counters.call(event)
    assert counters.calls == {(CALL.method, "OK"): 2, (CALL.method, "UNAVAILABLE"): 1}


def test_keys_that_are_gone_are_forgotten() -> None:
    counters = Counters()
    for upstream in "uv":
        counters.keep(upstream, (f"k{number}" for number in range(100)))
    for number in range(100):
        counters.attempt(replace(ANSWERED, key_id=f"k{number}"))
        counters.attempt(replace(ANSWERED, upstream="v", key_id=f"k{number}"))
    counters.keep("u", ["k7"])
    assert [counters.key("u", f"k{n}").attempts for n in (6, 7)] == [0, 1]
    assert counters.key("v", "k6").attempts == 1


def test_what_ends_after_its_key_or_upstream_has_left_leaves_no_trace() -> None:
    counters = Counters()
    for upstream in "uv":
        counters.keep(upstream, ["k", "other"])
        counters.attempt(replace(ANSWERED, upstream=upstream))
    counters.keep("u", ["other"])
    counters.leave("v")
    for upstream in "uv":
        counters.attempt(replace(ANSWERED, upstream=upstream))
        counters.keep(upstream, ["k", "other"])  # another one of that name
        assert counters.key(upstream, "k") == KeyCount()


def test_several_observers_are_told_alike() -> None:
    first, second = Recorder(), Recorder()
    both = Observers(first, second)
    both.attempt(ANSWERED)
    both.call(CALL)
    assert first.attempts == second.attempts == [ANSWERED]
    assert first.calls == second.calls == [CALL]
