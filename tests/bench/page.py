"""docs/performance.md, written from results.

`PYTHONPATH=tests python -m bench.page` writes it again without a run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.results import FOREIGN, GENERATOR, Results, number
from bench.scenarios import DIRECT, FLOOR, OURS, SCENARIOS, Scenario
from bench.systems import PEERS, STARTERS
from bench.targets import GOALS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/performance.md"

Row = Sequence[str]


def table(head: Row, rows: Iterable[Row]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _metric(scenario: Scenario) -> tuple[str, str]:
    if scenario.per == "request":
        return "us_per_request", "us/request"
    return "us_per_token", "us/token"


def _columns(results: Results) -> list[str]:
    """The systems that use CPU and were there, ours first."""
    return [name for name in STARTERS if name in results.data["systems"] and name != DIRECT]


def cpu(results: Results) -> str:
    """CPU of each system in each scenario, median [range]."""
    columns = _columns(results)
    rows = []
    for scenario in SCENARIOS:
        metric, unit = _metric(scenario)
        cells = [results.spread(scenario.name, name, metric) for name in columns]
        if any(cells):
            marked = [
                "" if spread is None else f"{spread}{_marks(results, scenario.name, name)}"
                for spread, name in zip(cells, columns, strict=True)
            ]
            rows.append([scenario.title, unit, *marked])
    return table(["scenario", "CPU", *columns], rows)


def _marks(results: Results, scenario: str, system: str) -> str:
    kept = results.kept(scenario, system)
    marks = " (f)" if kept.unclean else ""
    if kept.generator_bound:
        marks += " (g)"
    if failed := results.failed(scenario, system):
        marks += f" ({failed} failed)"
    return marks


def ratios(results: Results) -> str:
    """CPU of each other system over ours: above 1, it is dearer."""
    others = [name for name in _columns(results) if name != OURS]
    rows = []
    for scenario in SCENARIOS:
        metric, _ = _metric(scenario)
        ours = results.median(scenario.name, OURS, metric)
        cells = [results.median(scenario.name, name, metric) for name in others]
        if ours and any(cells):
            rows.append([scenario.title, *("" if c is None else number(c / ours) for c in cells)])
    return table(["CPU, ours = 1", *others], rows)


def targets(results: Results) -> str:
    """Each goal, what was measured, and the verdict."""
    rows = []
    for goal in GOALS:
        measured = goal.measure(results)
        said = "" if measured is None else number(measured) + goal.unit
        rows.append(
            [
                goal.title,
                goal.bound(goal.must),
                goal.bound(goal.reach),
                said,
                goal.verdict(measured),
            ]
        )
    return table(["goal", "must", "reach", "measured", "verdict"], rows)


def times(results: Results) -> str:
    """What a caller waits, milliseconds: medians over the runs."""
    names = [name for name in STARTERS if name in results.data["systems"]]
    rows = []
    for scenario in SCENARIOS:
        for name in names:
            if name not in scenario.systems or not results.kept(scenario.name, name).runs:
                continue

            def cell(metric: str, of: str = scenario.name, system: str = name) -> str:
                pair = [results.median(of, system, f"load.{metric}.{q}") for q in ("p50", "p99")]
                if results.median(of, system, f"load.{metric}.count"):
                    return " / ".join(number(value or 0.0) for value in pair)
                return ""

            rate = results.rate(
                scenario.name, name, "OK" if scenario.per == "request" else "tokens"
            )
            rows.append(
                [
                    scenario.title,
                    name,
                    number(rate or 0.0) + ("/s" if scenario.per == "request" else " tokens/s"),
                    cell("latency_ms") if not scenario.pace else "",
                    cell("ttft_ms") if scenario.stream else "",
                    cell("lag_ms"),
                    cell("gap_ms") if scenario.pace else "",
                ]
            )
    head = ["scenario", "system", "rate", "whole call", "TTFT", "lag of a token", "gap of tokens"]
    return table(head, rows)


def coalescing(results: Results) -> str:
    """Tokens in a message."""
    rows = []
    for scenario in SCENARIOS:
        if not scenario.stream or not results.kept(scenario.name, OURS).runs:
            continue
        tokens = results.rate(scenario.name, OURS, "tokens")
        messages = results.rate(scenario.name, OURS, "messages")
        if tokens and messages:
            rows.append([scenario.title, number(tokens / messages)])
    return table(["scenario", "tokens a message"], rows)


def resources(results: Results) -> str:
    """Start and memory of each system."""
    rows = []
    for name, system in results.data["systems"].items():
        if system["idle_mib"] is not None:
            many = results.spread("paced-1000x10", name, "peak_mib")
            rows.append([name, number(system["idle_mib"]), "" if many is None else str(many)])
    return table(["system", "idle, PSS MiB", "most with 1000 streams, PSS MiB"], rows)


def better(results: Results) -> list[str]:
    """Where another system, which does what ours does or less, is better than ours."""
    found = []
    for scenario in SCENARIOS:
        metric, unit = _metric(scenario)
        for name in _columns(results):
            if name in (OURS, FLOOR):
                continue
            for what, key in (
                (f"CPU, {unit}", metric),
                ("TTFT p50, ms", "load.ttft_ms.p50"),
                ("lag p99, ms", "load.lag_ms.p99"),
                ("whole call p50, ms", "load.latency_ms.p50"),
            ):
                if key == "load.latency_ms.p50" and scenario.pace:
                    continue
                theirs = results.median(scenario.name, name, key)
                ours = results.median(scenario.name, OURS, key)
                if theirs and ours and theirs < ours:
                    found.append(
                        f"{scenario.title}: {name}, {what} {number(theirs)}, ours {number(ours)}"
                    )
    for name, system in results.data["systems"].items():
        ours = results.data["systems"][OURS]["idle_mib"]
        if name not in (OURS, FLOOR) and system["idle_mib"] and system["idle_mib"] < ours:
            found.append(
                f"Memory idle: {name}, {number(system['idle_mib'])} MiB, ours {number(ours)}"
            )
    return found


def exclusions(results: Results) -> str:
    """Runs that were dropped, or counted though they were not clean."""
    rows = []
    for scenario in SCENARIOS:
        for name in _columns(results):
            kept = results.kept(scenario.name, name)
            if kept.dropped or kept.unclean or kept.generator_bound:
                said = [f"{kept.dropped} dropped"] if kept.dropped else []
                said += ["(f) counted with foreign load"] if kept.unclean else []
                said += [f"(g) generator busy in {kept.generator_bound}"] * bool(
                    kept.generator_bound
                )
                rows.append([scenario.title, name, "; ".join(said)])
    return table(["scenario", "system", "runs"], rows) if rows else "None."


def capacity(results: Results) -> str:
    """What the mock and the generator do on their core with no system between: they, not the
    system, must have room."""
    unary = results.rate("unary", DIRECT, "OK")
    tokens = results.rate("stream-256", DIRECT, "tokens")
    if unary is None or tokens is None:
        return "The generator was not measured alone."
    return (
        f"Alone, over HTTP/1.1, mock and generator together do {number(unary)} unary calls or "
        f"{number(tokens)} tokens of full-speed streams a second on their one core."
    )


def episodes(results: Results) -> str:
    """Start, memory, overload and soak of the gateway, in sentences."""
    found = results.data["episodes"]
    if not found:
        return "Not run."
    start, memory = found["start"]["seconds"], found["memory"]
    soak = found["soak"]
    lines = [
        f"- **Start**: {number(statistics.median(start))} s [{number(min(start))}-"
        f"{number(max(start))}] from the spawn to the first answer of its health service, "
        f"{len(start)} starts.",
        f"- **Memory** (PSS, of an instance beside another one, with which it shares the pages of "
        f"its code): {number(memory['idle_mib'])} MiB idle, {number(memory['warm_mib'])} "
        f"after some calls, {number(memory['loaded_mib'])} with {memory['streams']} streams open "
        f"({number(memory['kib_per_stream'])} KiB each), {number(memory['after_mib'])} "
        f"{number(memory['after_seconds'])} s after.",
        *map(_flood, found["overload"]),
        f"- **Soak**: {number(soak['minutes'])} minutes, {soak['calls']:,} calls, {soak['failed']} "
        f"failed. Memory grew by {number(soak['growth_mib'])} MiB from the second third of the "
        f"time to the last.",
    ]
    return "\n".join(lines)


def _flood(over: dict[str, Any]) -> str:
    refused = {status: n for status, n in over["status"].items() if status != "OK"}
    return (
        f"- **Overload**: {number(over['calls_a_second'])} unary calls a second on a gateway with "
        f"limits.in_flight {over['in_flight']} and limits.pending {over['pending']}, for twice as "
        f"long as a run, while 200 streams run. {number(over['served_a_second'])} calls a second "
        f"were served, p50 {number(over['served_ms']['p50'])} ms after they were due; "
        f"{_statuses(refused) or 'none'} were refused (UNAVAILABLE by the gateway, CANCELLED by "
        f"gRPC), p50 {number(over['refused_ms']['p50'])} ms, p99 "
        f"{number(over['refused_ms']['p99'])} ms after they were due; {over['missed']:,} more "
        f"found every slot of the generator taken. The streams' tokens lagged p50/p99 "
        f"{_pair(over['running_alone'])} ms alone and {_pair(over['running_pressed'])} ms then; "
        f"{_statuses(over['running_pressed']['status'])}."
    )


def _pair(running: dict[str, Any]) -> str:
    return f"{number(running['lag_ms']['p50'])}/{number(running['lag_ms']['p99'])}"


def _statuses(status: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(status.items()))


METHOD = """\
The gateway's limits.in_flight and limits.pending are 10,000, but in overload and in the soak,
where they are the default.
The system under test has core 0 alone; the mock upstream and the load generator, both in Go
(tests/bench/go), have the last core. CPU is user and system time of the system's whole process
tree, read from /proc before and after each run, set-up and end of its calls included, per
completed request or per upstream content token that arrived. The generator checks every byte of
every answer. Runs go in turns over the systems, forwards and backwards. A figure is the median
of its runs [lowest-highest].

Paced streams begin over half a second, a thousand of them over 3 s and 5,000 over 12 s, and last
as long as a run: a thousand at least 10 s, 5,000 at least 40 s.

Every scenario of a line ran in one session, so compare within a line. A stamp in each paced token
tells its **lag**, from the mock's write to the generator's read. The **gap** is the time between
two tokens of one stream. *Added* figures are ours less those of the generator on the mock itself
("direct"). Calls at a steady rate begin at their times whatever becomes of earlier ones, and
their times count from there.

The gateway, the floor and LiteLLM run in the same Python (`BENCH_PYTHON`), named below: a
distribution's is built with profile-guided optimisation, as that of the image.

The **grpc.aio floor** (tests/bench/floor.py) answers prepared bytes in the gateway's own
interpreter: no upstream, no parsing. The **Go relay** (tests/bench/go/relay) relays the same
contract in the plain way, one message a chunk, without callers, keys, limits, retries or log.
Peers are HTTP servers and are called over HTTP/1.1; what a gRPC call costs them nobody can say."""


def render(results: Results) -> str:
    """The whole page."""
    data = results.data
    parameters, foreign = data["parameters"], f"{FOREIGN:.0%}"
    without_peers = not any(name in data["systems"] for name in PEERS)
    lines = [
        "# Performance",
        "",
        "Written by `make bench-peers` from tests/bench/results.json; not edited by hand. "
        "`make bench` measures without peers, into build/bench.",
        "",
        f"**This run**: {data['taken']}, {number(parameters['seconds'])} s a run, "
        f"{parameters['repeats']} repeats, soak of {number(parameters['soak_minutes'])} minutes, "
        f"memory read again {number(parameters['cool'])} s after load.",
    ]
    if parameters["miniature"] or parameters["seconds"] < 5 or parameters["repeats"] < 3:
        lines += ["", "> **A short run, for the shape of the page: its figures are no findings.**"]
    if without_peers:
        lines += ["", "> No peer was measured in this run."]
    lines += [
        *("", "## Goals", ""),
        targets(results),
        "",
        "Why some are missed: [ADR 17](adr/0017-fewer-fuller-messages.md#why-goals-are-missed).",
        *("", "## CPU", "", "Microseconds, median [range]. (f): with foreign load."),
        "(n failed): of all runs together.",
        f"(g): the generator used more than {GENERATOR:.0%} of its core, so the system could have "
        "done more; its CPU per unit stands.",
        "",
        cpu(results),
        "",
        ratios(results),
        *("", "## Where others are better", ""),
        *([f"- {line}." for line in better(results)] or ["Nowhere in this run."]),
        *("", "## Times", "", "Milliseconds, p50 / p99.", ""),
        times(results),
        *("", "## Coalescing", ""),
        "What came in one read of the upstream leaves as one message.",
        "",
        coalescing(results),
        *("", "## Start, memory, overload, soak", ""),
        episodes(results),
        "",
        "Alone, at first; and the most in the runs with a thousand streams, after what it served "
        "in rounds before (prompts of 4 MB, 5,000 streams), of which an allocator keeps much:",
        "",
        resources(results),
        *("", "## Method", "", METHOD, "", capacity(results)),
        *("", "## What is left out", ""),
        f"Runs in which more than {foreign} of core 0 went to others are dropped where two clean "
        "ones remain, and counted here.",
        "",
        exclusions(results),
        "",
        *(f"- **{name}** is not measured: {why}." for name, why in data["missing"].items()),
        "- TLS, several processes, several hosts, and networks with latency are not measured.",
        "- Peers carry features that ours has not, and ours some that they have not.",
        *("", "## Settings, versions, machine", ""),
        *(f"- **{name}**: {system['settings']}." for name, system in data["systems"].items()),
        "",
        table(["", ""], [[k, v] for k, v in (data["machine"] | data["versions"]).items()]),
    ]
    return "\n".join(lines) + "\n"


def write(results: Path) -> None:
    """Writes the page from a file of results."""
    PAGE.write_text(render(Results(json.loads(results.read_text()))), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).with_name("results.json"))
