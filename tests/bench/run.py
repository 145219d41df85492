"""Runs the scenarios against the systems in turns, and the episodes; writes results, prints ratios.

`PYTHONPATH=tests python -m bench.run`: `make bench`, `make bench-smoke`, `make bench-peers`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import episodes, machine, page
from bench.results import Results
from bench.scenarios import BY_NAME, OURS, SCENARIOS, Scenario
from bench.systems import (
    PEERS,
    STARTERS,
    UNOBTAINABLE,
    System,
    mock_upstream,
    unavailable,
    versions,
)
from bench.traffic import BUILT, SYSTEM_CORE, Mock, load

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "results.json"


@dataclass(frozen=True)
class Parameters:
    """How long and how often. Seconds, but for `soak_minutes`."""

    seconds: float = 5.0
    repeats: int = 3
    starts: int = 5
    cool: float = 60.0  # after load, until memory is read once more
    soak_minutes: float = 1.0
    miniature: bool = False  # everything once, and small: its figures mean nothing

    @staticmethod
    def smoke() -> Parameters:
        """All shapes in the time of a test."""
        return Parameters(0.1, 1, 1, 0.1, 0.001, miniature=True)


async def measure(scenario: Scenario, system: System, mock: Mock, seconds: float) -> dict[str, Any]:
    """One run: what the load generator saw, and what the system used for it."""
    counted = mock.counters()
    meter = machine.Meter(system.pid, SYSTEM_CORE, time.monotonic()) if system.pid else None
    sampling = asyncio.ensure_future(_peak_mib(system.pid))
    began = time.monotonic()
    try:
        report = await load(scenario, system.target, seconds)
    finally:
        sampling.cancel()
    wall = time.monotonic() - began
    run: dict[str, Any] = {
        "scenario": scenario.name,
        "system": system.name,
        "load": report,
        "generator_share": (
            (mock.counters()["cpu_seconds"] - counted["cpu_seconds"] + report["cpu_seconds"]) / wall
        ),
        "failed": sum(n for status, n in report["status"].items() if status != "OK"),
    }
    if meter is not None:
        used = meter.read(time.monotonic())
        done = report["status"].get("OK", 0)
        run |= {
            "cpu_seconds": used.cpu,
            "core_share": used.cpu / used.wall,
            "foreign_share": used.foreign_share,
            "us_per_request": used.cpu / done * 1e6 if done else None,
            "us_per_token": used.cpu / report["tokens"] * 1e6 if report["tokens"] else None,
        }
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        run["peak_mib"] = sampling.result() if not sampling.cancelled() else None
    return run


async def _peak_mib(pid: int) -> float:
    """The most memory that was seen until it was cancelled."""
    peak = 0.0
    with contextlib.suppress(asyncio.CancelledError):
        while pid:
            peak = max(peak, machine.pss_mib(pid))
            await asyncio.sleep(1.0)
    return peak


async def bench(
    parameters: Parameters,
    names: Sequence[str],
    scenarios: Sequence[Scenario],
    folder: Path,
    *,
    with_episodes: bool = True,
) -> dict[str, Any]:
    """Everything: every scenario on every system it has something to say about, in turns."""
    missing = {name: why for name in names if (why := unavailable(name))}
    results: dict[str, Any] = {
        "taken": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.description(),
        "versions": versions(),
        "parameters": {f: getattr(parameters, f) for f in Parameters.__dataclass_fields__},
        "missing": missing | (UNOBTAINABLE if set(names) & set(PEERS) else {}),
        "systems": {},
        "runs": [],
        "episodes": {},
    }
    with contextlib.ExitStack() as stack:
        mock = stack.enter_context(mock_upstream(folder))
        systems: dict[str, System] = {}
        for name in names:
            if name in missing:
                _say(f"{name}: {missing[name]}")
                continue
            system = stack.enter_context(STARTERS[name](mock, folder))
            systems[name] = system
            await asyncio.sleep(0.0 if parameters.miniature else 2.0)
            results["systems"][name] = {
                "settings": system.settings,
                "start_seconds": system.start_seconds,
                "idle_mib": machine.pss_mib(system.pid) if system.pid else None,
            }
        for system in systems.values():
            for warm in (BY_NAME["unary"], BY_NAME["stream-256"]):
                await load(warm.miniature(), system.target, min(1.0, parameters.seconds))
        for repeat in range(parameters.repeats):
            for scenario in scenarios:
                turn = [systems[n] for n in scenario.systems if n in systems]
                if repeat % 2:
                    turn.reverse()  # so that none always follows the same one
                for system in turn:
                    shape = scenario.miniature() if parameters.miniature else scenario
                    run = await measure(shape, system, mock, shape.lasting(parameters.seconds))
                    results["runs"].append(run | {"repeat": repeat})
                    _say(_line(run))
        if with_episodes and OURS in systems:
            results["episodes"] = await episodes.all_of_them(mock, folder, parameters, _say)
    return results


def _line(run: dict[str, Any]) -> str:
    parts = [f"{run['scenario']:>14} {run['system']:<15}"]
    for key, unit in (("us_per_request", "us/request"), ("us_per_token", "us/token")):
        if run.get(key) is not None:
            parts.append(f"{run[key]:9.1f} {unit}")
    if "foreign_share" in run:
        parts.append(f"core {run['core_share']:.0%} foreign {run['foreign_share']:.0%}")
    parts.append(f"generator {run['generator_share']:.0%}")
    if run["failed"]:
        parts.append(f"{run['failed']} FAILED {run['load']['status']} {run['load']['errors']}")
    return "  ".join(parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="of each scenario on each system")
    parser.add_argument("--cool", type=float, default=60.0, help="seconds of rest after load")
    parser.add_argument("--soak-minutes", type=float, default=1.0)
    parser.add_argument("--smoke", action="store_true", help="all of it in miniature")
    parser.add_argument("--peers", action="store_true", help="also LiteLLM and Portkey")
    parser.add_argument("--publish", action="store_true", help="write docs/performance.md")
    parser.add_argument("--only", default="", help="scenarios, separated by commas; no episodes")
    parser.add_argument("--systems", default="", help="systems, separated by commas")
    asked = parser.parse_args(argv)
    parameters = Parameters(
        asked.seconds, asked.repeats, cool=asked.cool, soak_minutes=asked.soak_minutes
    )
    names = [name for name in STARTERS if asked.peers or name not in PEERS]
    if asked.systems:
        names = asked.systems.split(",")
    scenarios = [BY_NAME[n] for n in asked.only.split(",")] if asked.only else SCENARIOS
    folder = BUILT / "run"
    folder.mkdir(parents=True, exist_ok=True)
    results = asyncio.run(
        bench(
            Parameters.smoke() if asked.smoke else parameters,
            names,
            scenarios,
            folder,
            with_episodes=not asked.only,
        )
    )
    written = PUBLISHED if asked.publish else BUILT / "results.json"
    written.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(page.ratios(Results(results)))
    print(page.targets(Results(results)))
    if asked.publish:
        page.write(PUBLISHED)
    wrong = [r for r in results["runs"] if "WRONG" in r["load"]["status"]]
    for run in wrong:
        _say(f"A WRONG ANSWER: {run['system']} in {run['scenario']}: {run['load']['errors']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
