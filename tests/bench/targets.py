"""What the gateway is held to, as data, and whether a run's results keep it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.results import Results, number
from bench.scenarios import DIRECT, FLOOR, LITELLM, OURS, PORTKEY, RELAY

Measure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Goal:
    """One figure. `at_most` tells which side of `must` and `reach` is good."""

    title: str
    measure: Measure
    must: float
    reach: float
    at_most: bool = True
    unit: str = ""

    def bound(self, value: float) -> str:
        """As the table writes it."""
        return f"{'<=' if self.at_most else '>='} {value:g}{self.unit}"

    def verdict(self, measured: float | None) -> str:
        """In words: reached, met, or missed by how much."""
        if measured is None:
            return "not measured"
        for bound, word in ((self.reach, "reached"), (self.must, "met")):
            if measured <= bound if self.at_most else measured >= bound:
                return word
        if self.must == 0:
            return f"missed: {number(measured)}{self.unit}"
        return f"missed by {abs(measured / self.must - 1):.0%}"


def _ratio(over: str, under: str, metric: str, *scenarios: str) -> Measure:
    """One system's median over another's; with two scenarios, each in its own."""

    def measure(results: Results) -> float | None:
        above = results.median(scenarios[0], over, metric)
        below = results.median(scenarios[-1], under, metric)
        return above / below if above is not None and below else None

    return measure


def _added(metric: str, scenario: str) -> Measure:
    """Ours less the direct way's in the same run, milliseconds."""

    def measure(results: Results) -> float | None:
        ours = results.median(scenario, OURS, metric)
        direct = results.median(scenario, DIRECT, metric)
        return ours - direct if ours is not None and direct is not None else None

    return measure


def _ours(metric: str, scenario: str) -> Measure:
    return lambda results: results.median(scenario, OURS, metric)


def _failed(scenario: str) -> Measure:
    return lambda results: results.failed(scenario, OURS)


def _idle(results: Results) -> float | None:
    """Alone: an instance beside another shares the pages of its code with it."""
    found: float | None = results.data["systems"].get(OURS, {}).get("idle_mib")
    return found


def _episode(path: str) -> Measure:
    def measure(results: Results) -> float | None:
        found = results.episode(path)
        if found is None:
            return None
        return float(statistics.median(found if isinstance(found, list) else [found]))

    return measure


REQUEST, TOKEN = "us_per_request", "us_per_token"
_LAG, _TTFT = "load.lag_ms.p99", "load.ttft_ms.p99"

GOALS = (
    Goal("unary CPU: ours / grpc.aio floor", _ratio(OURS, FLOOR, REQUEST, "unary"), 2.0, 1.6),
    Goal("unary CPU: LiteLLM / ours", _ratio(LITELLM, OURS, REQUEST, "unary"), 18, 25, False),
    Goal("unary CPU: Portkey / ours", _ratio(PORTKEY, OURS, REQUEST, "unary"), 4.5, 6, False),
    Goal(
        "full-speed token CPU: LiteLLM / ours",
        _ratio(LITELLM, OURS, TOKEN, "stream-256"),
        90,
        120,
        False,
    ),
    Goal(
        "full-speed token CPU: Portkey / ours",
        _ratio(PORTKEY, OURS, TOKEN, "stream-256"),
        5,
        6,
        False,
    ),
    Goal(
        "full-speed token CPU: ours / Go relay",
        _ratio(OURS, RELAY, TOKEN, "stream-256"),
        1.3,
        1.0,
    ),
    Goal(
        "paced token CPU, 200 x 50 tokens/s: ours / paced grpc.aio floor",
        _ratio(OURS, FLOOR, TOKEN, "paced-200x50"),
        1.9,
        1.6,
    ),
    Goal(
        "paced token CPU, 20 x 50 tokens/s: LiteLLM / ours",
        _ratio(LITELLM, OURS, TOKEN, "paced-20x50"),
        4,
        6,
        False,
    ),
    Goal(
        "paced token CPU, each at saturation (20 x 50; 1000 x 20): LiteLLM / ours",
        _ratio(LITELLM, OURS, TOKEN, "paced-20x50", "paced-1000x20"),
        9,
        12,
        False,
    ),
    Goal(
        "paced token CPU, 100 x 50 tokens/s: Portkey / ours",
        _ratio(PORTKEY, OURS, TOKEN, "paced-100x50"),
        1.3,
        1.8,
        False,
    ),
    Goal("1000 x 10 tokens/s: failures", _failed("paced-1000x10"), 0, 0),
    Goal("1000 x 10 tokens/s: added lag p99", _added(_LAG, "paced-1000x10"), 10, 5, unit=" ms"),
    Goal("1000 x 20 tokens/s: failures", _failed("paced-1000x20"), 0, 0),
    Goal("1000 x 20 tokens/s: added lag p99", _added(_LAG, "paced-1000x20"), 150, 100, unit=" ms"),
    Goal("1000 x 20 tokens/s: TTFT p99", _ours(_TTFT, "paced-1000x20"), 1000, 1000, unit=" ms"),
    Goal("5000 x 2 tokens/s: failures", _failed("paced-5000x2"), 0, 0),
    Goal("5000 x 2 tokens/s: added lag p99", _added(_LAG, "paced-5000x2"), 500, 100, unit=" ms"),
    Goal(
        "added unary p50 at 20 a second",
        _added("load.latency_ms.p50", "unary-calm"),
        2,
        1,
        unit=" ms",
    ),
    Goal(
        "added TTFT p50 at 20 a second", _added("load.ttft_ms.p50", "stream-calm"), 2, 1, unit=" ms"
    ),
    Goal("memory idle, PSS", _idle, 75, 55, unit=" MiB"),
    Goal("memory per open stream", _episode("memory.kib_per_stream"), 50, 36, unit=" KiB"),
    Goal("start to serving", _episode("start.seconds"), 0.8, 0.4, unit=" s"),
)
