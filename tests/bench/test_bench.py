"""The benchmark measures what it says: each scenario in miniature; how figures are made of runs."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import floor, interpreter, machine, page, reuseport
from bench.results import Results
from bench.run import PUBLISHED, Parameters, bench
from bench.scenarios import DIRECT, FLOOR, OURS, RELAY, SCENARIOS
from bench.systems import STARTERS, mock_upstream
from bench.targets import GOALS, Goal
from bench.traffic import BUILT, ROOT, SYSTEM_CORE, Target, command, load

GO = Path(__file__).parent / "go"


@pytest.fixture(scope="module")
def built() -> None:
    """The programs in Go: `make setup-bench` has built them, or this does."""
    if shutil.which("go") is None:
        missing = "the benchmark's mock, load generator and relay need Go"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    BUILT.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["go", "build", "-o", BUILT, "./mock", "./load", "./relay"],
        cwd=GO,
        env={**os.environ, "GOFLAGS": "-mod=readonly -buildvcs=false"},
        check=True,
    )


@pytest.mark.timeout(300)
def test_the_programs_in_go(built: None) -> None:
    """Their own tests, and what `make check` asks of the Go client."""
    environ = {**os.environ, "GOFLAGS": "-mod=readonly -buildvcs=false"}
    for asked in (["go", "vet", "./..."], ["go", "test", "./..."]):
        done = subprocess.run(
            asked, cwd=GO, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    unformatted = subprocess.run(
        ["gofmt", "-l", "-s", "."], cwd=GO, capture_output=True, text=True, check=True
    )
    assert unformatted.stdout == ""


@pytest.mark.timeout(300)
async def test_every_scenario_in_miniature(built: None, tmp_path: Path) -> None:
    """Shape only: every system answers every scenario, to the byte, and every figure is there."""
    names = (OURS, FLOOR, RELAY, DIRECT)
    found = await bench(Parameters.smoke(), names, SCENARIOS, tmp_path)
    taken = {(run["scenario"], run["system"]) for run in found["runs"]}
    assert taken == {(s.name, name) for s in SCENARIOS for name in s.systems if name in names}
    for run in found["runs"]:
        report, what = run["load"], (run["scenario"], run["system"])
        assert report["status"].keys() == {"OK"}, (what, report)
        assert report["latency_ms"]["count"] == report["status"]["OK"] > 0, what
        assert report["bytes"] > 0, what
        if run["system"] != DIRECT:
            assert run["peak_mib"] > 1, what
    by_key = {(run["scenario"], run["system"]): run for run in found["runs"]}
    paced = by_key["paced-100x50", OURS]["load"]
    assert paced["lag_ms"]["count"] == paced["tokens"] > 0
    burst = by_key["stream-256", OURS]["load"]
    assert burst["messages"] < burst["tokens"], "what comes in one read leaves as one message"
    plain = by_key["stream-256", RELAY]["load"]
    assert plain["messages"] > plain["tokens"], "the relay sends a message for each chunk"

    episodes = found["episodes"]
    assert episodes["start"]["seconds"][0] > 0
    assert episodes["memory"]["idle_mib"] > 10
    assert all(flood["status"]["OK"] > 0 for flood in episodes["overload"])
    assert episodes["soak"]["calls"] > 0
    assert episodes["soak"]["failed"] == 0

    results = Results(json.loads(json.dumps(found)))
    for goal in GOALS:
        if "LiteLLM" not in goal.title and "Portkey" not in goal.title:
            assert goal.verdict(goal.measure(results)) != "not measured", goal.title
    assert "no findings" in page.render(results)


@pytest.mark.timeout(60)
async def test_systems_in_python_run_in_the_python_that_is_named(
    built: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was built with profile-guided optimisation: in an environment made for it."""
    named = Path(sys.base_prefix) / "bin/python3"
    monkeypatch.setenv("BENCH_PYTHON", str(named))
    monkeypatch.setattr(interpreter, "BUILT", tmp_path)
    with mock_upstream(tmp_path) as mock:
        with (
            pytest.raises(SystemExit, match="make setup-bench-python"),
            STARTERS[OURS](mock, tmp_path),
        ):
            pass
        made = tmp_path / "python/gateway"
        (made / "bin").mkdir(parents=True)
        (made / "bin/python").symlink_to(Path(sys.prefix) / "bin/python")
        (made / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
        (made / "lib").symlink_to(Path(sys.prefix) / "lib")
        (made / ".complete").touch()
        for starter in (STARTERS[OURS], STARTERS[FLOOR]):
            with starter(mock, tmp_path) as system:
                called = Path(f"/proc/{system.pid}/cmdline").read_bytes().split(b"\0")[0]
                assert called.decode() == str(made / "bin/python")
                report = await load(SCENARIOS[0].miniature(), system.target, 0.1)
                assert report["status"].keys() == {"OK"}
    assert machine.description()["python"].startswith(platform.python_version())


def test_the_page_is_what_its_results_say() -> None:
    results = Results(json.loads(PUBLISHED.read_text(encoding="utf-8")))
    assert page.PAGE.read_text(encoding="utf-8") == page.render(results), "python -m bench.page"


def run(system: str, us: float, foreign: float = 0.0, **more: Any) -> dict[str, Any]:
    load = {"status": {"OK": 10}, "wall_seconds": 2.0, "tokens": 100, "messages": 50}
    return {
        "scenario": "unary",
        "system": system,
        "us_per_request": us,
        "foreign_share": foreign,
        "generator_share": 0.5,
        "failed": 0,
        "load": load,
        **more,
    }


def test_runs_with_foreign_load_are_dropped_while_two_clean_ones_remain() -> None:
    runs = [run(OURS, 1.0), run(OURS, 3.0), run(OURS, 99.0, foreign=0.2)]
    results = Results({"runs": runs, "episodes": {}})
    kept = results.kept("unary", OURS)
    assert (kept.dropped, kept.unclean) == (1, False)
    spread = results.spread("unary", OURS, "us_per_request")
    assert spread is not None
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)

    results = Results({"runs": runs[1:], "episodes": {}})
    kept = results.kept("unary", OURS)
    assert (kept.dropped, kept.unclean) == (0, True)
    assert results.median("unary", OURS, "us_per_request") == 51.0


def test_a_ratio_is_of_medians_of_one_session() -> None:
    runs = [run(OURS, 300.0), run(OURS, 500.0), run(FLOOR, 200.0)]
    results = Results({"runs": runs, "episodes": {}})
    goal = next(g for g in GOALS if g.title == "unary CPU: ours / grpc.aio floor")
    measured = goal.measure(results)
    assert measured == 2.0
    assert goal.verdict(measured) == "met"


@pytest.mark.parametrize(
    ("measured", "at_most", "verdict"),
    [
        (1.0, True, "reached"),
        (1.9, True, "met"),
        (3.0, True, "missed by 50%"),
        (1.5, False, "missed by 25%"),
        (2.0, False, "met"),
        (None, True, "not measured"),
    ],
)
def test_verdicts(measured: float | None, at_most: bool, verdict: str) -> None:
    goal = Goal("", lambda _: None, 2.0, 1.0 if at_most else 3.0, at_most)
    assert goal.verdict(measured) == verdict


def test_a_failure_misses_a_goal_of_none() -> None:
    assert Goal("", lambda _: None, 0, 0).verdict(3) == "missed: 3.00"


async def test_cpu_is_counted_with_children_that_ended() -> None:
    """Of a shell whose child burnt CPU and is gone."""
    burn = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.3: pass'; sleep 60"
    process = await asyncio.create_subprocess_exec("sh", "-c", burn)
    try:
        meter = machine.Meter(process.pid, SYSTEM_CORE, time.monotonic())
        for _ in range(500):
            if meter.read(time.monotonic()).cpu >= 0.29:
                break
            await asyncio.sleep(0.02)
        assert meter.read(time.monotonic()).cpu >= 0.29
        assert len(machine.tree(process.pid)) == 2
        assert machine.pss_mib(process.pid) > 0
    finally:
        for pid in machine.tree(process.pid)[1:]:
            os.kill(pid, 9)
        process.kill()
        await process.wait()


def test_load_of_others_is_foreign() -> None:
    assert machine.Usage(wall=2.0, cpu=1.0, core_busy=1.5).foreign_share == 0.25
    assert machine.Usage(wall=2.0, cpu=1.0, core_busy=0.9).foreign_share == 0.0


def test_the_floor_answers_by_the_same_plans_as_the_mock() -> None:
    assert floor.plan(b"\n\x0ebench-n256-r50\x12 prompt of bench") == (256, 50.0)
    assert floor.plan(b"no model") == (16, 0.0)
    source = (GO / "answer/answer.go").read_text(encoding="utf-8")
    for token in floor.TOKENS:
        assert json.dumps(token, ensure_ascii=False) in source


def test_over_http_there_are_as_many_calls_at_once() -> None:
    scenario = SCENARIOS[0]
    over_grpc = command(scenario, Target(grpc="h:1"), 1.0)
    over_http = command(scenario, Target(http="http://h:1/"), 1.0)
    assert {"-connections=4", "-streams=8"} <= set(over_grpc)
    assert {"-connections=32", "-streams=1"} <= set(over_http)


def test_the_patch_of_portkey_refuses_another_version(tmp_path: Path) -> None:
    server = tmp_path / "node_modules/@portkey-ai/gateway/build/start-server.js"
    server.parent.mkdir(parents=True)
    patch = Path(__file__).parent / "portkey/patch.py"

    def patched() -> int:
        done = subprocess.run([sys.executable, patch, tmp_path], capture_output=True, check=False)
        return done.returncode

    server.write_text("x(this.updateHeaders(i,n.cacheStatus,o),y)")
    assert patched() == 0
    once = server.read_text()
    assert once.count("new Response") == 1
    assert patched() == 0
    assert server.read_text() == once
    server.write_text("another version")
    assert patched() != 0


def test_no_lock_names_a_registry() -> None:
    lock = json.loads((ROOT / "tests/bench/portkey/package-lock.json").read_text())
    assert all("resolved" not in package for package in lock["packages"].values())
    assert all("integrity" in package for name, package in lock["packages"].items() if name)


def test_the_busiest_of_several_listeners_has_at_least_its_part() -> None:
    for processes, connections in ((1, 3), (2, 4), (4, 16)):
        assert 1 / processes <= reuseport.busiest(processes, connections) <= 1
