"""The mock upstream and the load generator, as processes on a core of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.scenarios import Scenario

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build/bench"
SYSTEM_CORE = 0
_CORES = sorted(os.sched_getaffinity(0))
LOAD_CORE = _CORES[-1]

# Ten, so that 30 % of them are three: the mock looks at the last digit.
# As long as real ones are: short texts are searched for in logs in another way.
KEYS = tuple(f"sk-bench-{'0123456789abcdef' * 2}-{digit}" for digit in range(10))


def pinned(core: int) -> Any:
    """What pins a child to a core before it begins: for Popen's preexec_fn."""
    return lambda: os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def program(
    command: Sequence[str | Path], core: int, *, log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until left. What it writes goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **(environ or {})},
            preexec_fn=pinned(core),
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Mock:
    """The mock upstream, which serves."""

    address: str

    @property
    def base_url(self) -> str:
        """As an OpenAI client is given it."""
        return f"http://{self.address}/v1"

    def counters(self) -> dict[str, Any]:
        """What it was asked, and its CPU."""
        with urllib.request.urlopen(f"http://{self.address}/", timeout=30) as reply:
            counted: dict[str, Any] = json.load(reply)
        return counted


@dataclass(frozen=True)
class Target:
    """Where calls go: a server of the contract, or the URL of OpenAI-compatible chat."""

    grpc: str = ""
    http: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def command(scenario: Scenario, to: Target, seconds: float) -> list[str]:
    """The load generator's, for a run of so many seconds."""
    streams = scenario.streams if to.grpc else 1
    connections = scenario.connections if to.grpc else scenario.at_once
    arguments = ["-grpc", to.grpc] if to.grpc else ["-http", to.http]
    arguments += ["-model", scenario.model(seconds), f"-prompt-bytes={scenario.prompt_bytes}"]
    arguments += [f"-connections={connections}", f"-streams={streams}", f"-seconds={seconds}s"]
    if scenario.stream:
        arguments.append("-stream")
    if scenario.rate:
        arguments.append(f"-rate={scenario.rate}")
    if scenario.pace:  # each stream once: it lasts as long as the run
        arguments.append(f"-requests={scenario.at_once}")
    if scenario.ramp:
        arguments += [f"-ramp={scenario.ramp}s", f"-seconds={seconds + scenario.ramp}s"]
    if scenario.slow and to.grpc:
        arguments.append(f"-slow={scenario.slow}")
    # An overloaded system takes longer than its stream's pace; one that hangs must not hang us.
    arguments.append(f"-limit={4 * seconds + scenario.ramp + 20:g}s")
    for name, value in to.headers.items():
        arguments += ["-header", f"{name}={value}"]
    return [str(BUILT / "load"), *arguments]


async def load(scenario: Scenario, to: Target, seconds: float) -> dict[str, Any]:
    """Runs the generator to its end; its report."""
    process = await asyncio.create_subprocess_exec(
        *command(scenario, to, seconds),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=pinned(LOAD_CORE),
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the load generator failed: {err.decode()}")
    report: dict[str, Any] = json.loads(out)
    return report
