"""Reads results: which runs count, and their medians with ranges."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Above these a run says more about something else. Shares of one core.
FOREIGN = 0.10
GENERATOR = 0.90


@dataclass(frozen=True)
class Spread:
    """A median with its range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.median)} [{number(self.low)}-{number(self.high)}]"


def number(value: float) -> str:
    """Three digits, which is more than any of these figures is worth."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class Kept:
    """The runs of one system in one scenario that count."""

    runs: tuple[Mapping[str, Any], ...]
    dropped: int  # for foreign load
    unclean: bool  # fewer than two clean ones there were, so the others count, too
    generator_bound: int  # runs in which the generator had hardly room


class Results:
    """What one `bench.run` wrote."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def kept(self, scenario: str, system: str) -> Kept:
        """Runs with little foreign load, if there are two or all."""
        runs = [r for r in self.data["runs"] if r["scenario"] == scenario and r["system"] == system]
        clean = [r for r in runs if r.get("foreign_share", 0.0) <= FOREIGN]
        unclean = len(clean) < min(2, len(runs))
        counted = runs if unclean else clean
        bound = sum(r["generator_share"] > GENERATOR for r in counted)
        return Kept(tuple(counted), len(runs) - len(counted), unclean, bound)

    def spread(self, scenario: str, system: str, metric: str) -> Spread | None:
        """Of a metric such as "us_per_token" or "load.lag_ms.p99"; None where it was not taken."""
        values = [
            value
            for run in self.kept(scenario, system).runs
            if (value := _at(run, metric)) is not None
        ]
        if not values:
            return None
        return Spread(statistics.median(values), min(values), max(values))

    def median(self, scenario: str, system: str, metric: str) -> float | None:
        """The median alone."""
        found = self.spread(scenario, system, metric)
        return None if found is None else found.median

    def failed(self, scenario: str, system: str) -> int | None:
        """Calls that failed, in all runs, also those dropped; None if there was no run."""
        runs = [r for r in self.data["runs"] if r["scenario"] == scenario and r["system"] == system]
        return sum(r["failed"] for r in runs) if runs else None

    def rate(self, scenario: str, system: str, metric: str) -> float | None:
        """Of "messages", "tokens" or "OK", a second."""
        values = []
        for run in self.kept(scenario, system).runs:
            report = run["load"]
            count = report["status"].get("OK", 0) if metric == "OK" else report[metric]
            values.append(count / report["wall_seconds"])
        return statistics.median(values) if values else None

    def episode(self, path: str) -> Any:
        """Something of an episode, such as "memory.idle_mib"; None where it was not taken."""
        return _at(self.data["episodes"], path)


def _at(found: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found
