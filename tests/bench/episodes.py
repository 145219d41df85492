"""What needs a gateway of its own: its start, its memory, overload, a soak."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from bench import machine
from bench.scenarios import BY_NAME, Scenario
from bench.systems import DEFAULT, PENDING, tokenwire
from bench.traffic import Mock, load


class Lengths(Protocol):
    """What of run.Parameters matters here."""

    @property
    def seconds(self) -> float: ...
    @property
    def starts(self) -> int: ...
    @property
    def cool(self) -> float: ...
    @property
    def soak_minutes(self) -> float: ...
    @property
    def miniature(self) -> bool: ...


# Streams that run while more calls come than the gateway can serve, and these calls: as many as it
# has the time to refuse, and far more.
RUNNING = Scenario("running", "200 streams x 10 tokens/s", stream=True, pace=10.0, streams=50)
TOO_MANY = tuple(
    Scenario("too-many", "unary calls", connections=8, streams=400, rate=rate)
    for rate in (1200.0, 6000.0)
)
# What a soak consists of, both at once.
SOAK = (
    Scenario("soak-unary", "100 unary calls a second", rate=100.0),
    Scenario("soak-stream", "20 streams of 64 chunks a second", stream=True, rate=20.0, chunks=64),
)


async def all_of_them(
    mock: Mock, folder: Path, lengths: Lengths, say: Callable[[str], None]
) -> dict[str, Any]:
    """Each, one after the other."""
    found: dict[str, Any] = {}
    for name, episode in (
        ("start", start),
        ("memory", memory),
        ("overload", overload),
        ("soak", soak),
    ):
        found[name] = await episode(mock, folder, lengths)
        say(f"{name:>14} {found[name]}")
    return found


def _shape(scenario: Scenario, lengths: Lengths) -> Scenario:
    return scenario.miniature() if lengths.miniature else scenario


async def start(mock: Mock, folder: Path, lengths: Lengths) -> dict[str, Any]:
    """Seconds from the spawn of the process to the first answer of its health service."""
    took = []
    for _ in range(lengths.starts):
        with tokenwire(mock, folder) as system:
            took.append(system.start_seconds)
    return {"seconds": took}


async def memory(mock: Mock, folder: Path, lengths: Lengths) -> dict[str, Any]:
    """Idle; after some calls; with a thousand streams open; some time after them."""
    scenario = _shape(BY_NAME["paced-1000x10"], lengths)
    with tokenwire(mock, folder) as system:
        await asyncio.sleep(min(2.0, lengths.seconds))
        found: dict[str, Any] = {"idle_mib": machine.pss_mib(system.pid)}
        await load(_shape(BY_NAME["unary"], lengths), system.target, min(1.0, lengths.seconds))
        found["warm_mib"] = machine.pss_mib(system.pid)
        seconds = scenario.lasting(lengths.seconds)
        running = asyncio.ensure_future(load(scenario, system.target, seconds))
        peak = 0.0
        while not running.done():
            peak = max(peak, machine.pss_mib(system.pid))
            await asyncio.wait({running}, timeout=0.5)
        opened = (await running)["peak"]
        await asyncio.sleep(lengths.cool)
        found |= {
            "loaded_mib": peak,
            "streams": opened,
            "kib_per_stream": (peak - found["warm_mib"]) * 1024 / opened,
            "after_mib": machine.pss_mib(system.pid),
            "after_seconds": lengths.cool,
        }
    return found


async def overload(mock: Mock, folder: Path, lengths: Lengths) -> list[dict[str, Any]]:
    """Streams that run, alone and while calls come that are more than can be served, on a gateway
    whose limits are the default. A report for each of TOO_MANY."""
    running = _shape(RUNNING, lengths)
    reports = []
    for shape in TOO_MANY:
        flood = replace(_shape(shape, lengths), ramp=0.0)
        with tokenwire(mock, folder, in_flight=DEFAULT) as system:
            alone = await load(running, system.target, lengths.seconds)
            # Longer than a run, so that what comes while it begins is not the most of it.
            beside = asyncio.ensure_future(load(running, system.target, 3 * lengths.seconds))
            await asyncio.sleep(lengths.seconds / 4)
            flooded = await load(flood, system.target, 2 * lengths.seconds)
            pressed = await beside
        reports.append(
            {
                "in_flight": DEFAULT,
                "pending": PENDING,
                "calls_a_second": flood.rate,
                "status": flooded["status"],
                "errors": flooded["errors"],
                "missed": flooded["missed"],
                "refused_ms": flooded["refused_ms"],
                "served_ms": flooded["latency_ms"],
                "served_a_second": flooded["status"].get("OK", 0) / flooded["wall_seconds"],
                "running_alone": {k: alone[k] for k in ("status", "lag_ms")},
                "running_pressed": {k: pressed[k] for k in ("status", "lag_ms")},
            }
        )
    return reports


async def soak(mock: Mock, folder: Path, lengths: Lengths) -> dict[str, Any]:
    """Unary calls and streams for minutes: memory after each part of the time, and failures."""
    shapes = [_shape(scenario, lengths) for scenario in SOAK]
    ends = time.monotonic() + 60 * lengths.soak_minutes
    part = max(0.2, 60 * lengths.soak_minutes / 12)
    sizes: list[float] = []
    calls = failed = 0
    with tokenwire(mock, folder, in_flight=DEFAULT) as system:
        while not sizes or time.monotonic() < ends:
            reports = await asyncio.gather(*(load(s, system.target, part) for s in shapes))
            for report in reports:
                calls += sum(report["status"].values())
                failed += sum(n for status, n in report["status"].items() if status != "OK")
            sizes.append(machine.pss_mib(system.pid))
    third = max(1, len(sizes) // 3)
    return {
        "minutes": lengths.soak_minutes,
        "calls": calls,
        "failed": failed,
        "mib": sizes,
        # The limits' windows of a minute fill first; what counts is whether it goes on growing.
        "growth_mib": statistics.median(sizes[-third:])
        - statistics.median(sizes[third : 2 * third] or sizes[:third]),
    }
