"""Runs every case with every client against the same gateways, and compares what callers saw.

Usage: python -m conformance.driver [--language NAME]... [--client FOLDER] [--case NAME]... [--show]
[--write FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from conformance import gateways
from conformance.expect import differences

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("cases.yaml")
_ANSWER_SECONDS = 60.0  # a program that says nothing for so long, past what a case lasts, hangs

Case = dict[str, Any]
Line = dict[str, Any]


@dataclass(frozen=True)
class Language:
    """One client's program: its command, or the folder whose Makefile makes it."""

    name: str
    command: tuple[str, ...] = ()
    folder: Path | None = None

    def built(self) -> Language:
        """The same with its command. Raises MissingError without its toolchain."""
        if self.folder is None:
            return self
        if _make(self.folder, "available").returncode:
            raise MissingError(f"{self.name}: its toolchain is not installed")
        made = _make(self.folder, "conformance")
        if made.returncode:
            raise RuntimeError(f"{self.name}: its program cannot be built:\n{made.stdout}")
        command = _make(self.folder, "conformance-command").stdout.split()
        return Language(self.name, tuple(command), self.folder)


class MissingError(Exception):
    """A toolchain is not there."""


def _make(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--silent", "--no-print-directory", "-C", str(folder), target]
    return subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def languages() -> Iterator[Language]:
    """Python's two clients, and each client with a Makefile of its own: its target `conformance`
    builds the program, and `conformance-command` prints how to start it."""
    program = "clients/python/conformance.py"
    yield Language("python", (sys.executable, program))
    yield Language("python-asyncio", (sys.executable, program, "--asyncio"))
    for makefile in sorted(ROOT.glob("clients/*/Makefile")):
        yield Language(makefile.parent.name, folder=makefile.parent)


@dataclass
class Outcome:
    """What became of one case in one language."""

    case: str
    language: str
    line: Line
    problems: list[str] = field(default_factory=list)


class Program:
    """A client's program: a case goes in as a line, what the caller saw comes out as one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, case: Case, connect: dict[str, str]) -> Line:
        """The line. Raises TimeoutError, or ValueError for what is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        sent = {k: v for k, v in case.items() if k not in _DRIVERS_OWN}
        self._process.stdin.write(json.dumps({"case": sent, "connect": connect}).encode() + b"\n")
        await self._process.stdin.drain()
        async with asyncio.timeout(_ANSWER_SECONDS + case.get("lasts", 0)):
            line = await self._process.stdout.readline()
        if not line:
            raise ValueError("the program ended")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError(f"no JSON object: {line[:200]!r}")
        return answer


_DRIVERS_OWN = frozenset(
    {"about", "gateway", "driver", "upstream", "gateway_saw", "expect", "connect", "lasts"}
)


@asynccontextmanager
async def program(language: Language) -> AsyncIterator[Program]:
    """A language's program, until left."""
    process = await asyncio.create_subprocess_exec(
        *language.command,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"GRPC_VERBOSITY": "NONE", **os.environ},
        limit=64 * 1024 * 1024,
    )
    try:
        yield Program(process)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


def cases() -> list[Case]:
    """Every case, with what it leaves out."""
    loaded: list[Case] = yaml.safe_load(CASES.read_text())
    for case in loaded:
        case.setdefault("gateway", "plain")
    return loaded


async def run_case(case: Case, language: Language, runner: Program) -> Outcome:
    """One case in one language, on a gateway and an upstream of its own."""
    case = json.loads(json.dumps(case).replace("{language}", language.name))
    outcome = Outcome(case["name"], language.name, {})
    async with gateways.serving(case) as scene:
        connect = scene.connect(case.get("connect", {}))
        during = asyncio.ensure_future(scene.meanwhile(case.get("driver", "")))
        try:
            outcome.line = await runner.run(case, connect)
            if outcome.line.get("case") != case["name"]:
                outcome.problems.append(f"case: {outcome.line.get('case')!r}")
            if "defect" in outcome.line:
                outcome.problems.append(f"defect: {outcome.line['defect']}")
            outcome.problems += differences(outcome.line, case["expect"])
            outcome.problems += await scene.differences(case)
        except (TimeoutError, ValueError) as error:
            outcome.problems.append(str(error) or "no line in time")
        finally:
            during.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await during
    return outcome


async def run(
    languages: Sequence[Language], chosen: Sequence[Case], say: Callable[[str], None]
) -> list[Outcome]:
    """Every case in every language, one at a time: the machine is shared, and so is blame. Cases
    that last minutes only wait; they do so beside the others, each in a program of its own."""
    outcomes: list[Outcome] = []
    async with asyncio.TaskGroup() as group:
        beside = [
            group.create_task(_alone(case, language))
            for language in languages
            for case in chosen
            if "lasts" in case
        ]
        outcomes += await _in_turn(languages, [c for c in chosen if "lasts" not in c], say)
    for task in beside:
        outcomes.append(task.result())
        for problem in task.result().problems:
            say(f"{task.result().language}: {task.result().case}: {problem}")
    for outcome in _compared(outcomes):
        say(f"{outcome.language}: {outcome.case}: {outcome.problems[0]}")
        outcomes.append(outcome)
    return outcomes


async def _alone(case: Case, language: Language) -> Outcome:
    async with program(language) as runner:
        return await run_case(case, language, runner)


async def _in_turn(
    languages: Sequence[Language], chosen: Sequence[Case], say: Callable[[str], None]
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for language in languages:
        async with AsyncExitStack() as stack:
            runner = await stack.enter_async_context(program(language))
            for case in chosen:
                outcome = await run_case(case, language, runner)
                outcomes.append(outcome)
                for problem in outcome.problems:
                    say(f"{language.name}: {case['name']}: {problem}")
                if any("in time" in p or "program ended" in p for p in outcome.problems):
                    await stack.aclose()  # it hangs, or is gone: the next case gets a new one
                    runner = await stack.enter_async_context(program(language))
    return outcomes


def _compared(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Where languages that met what was expected still say different things."""
    by_case: dict[str, dict[str, Line]] = {}
    found: list[Outcome] = []
    for outcome in outcomes:
        by_case.setdefault(outcome.case, {})[outcome.language] = _steady(outcome.line)
    for name, lines in by_case.items():
        first, *others = lines.items()
        for language, line in others:
            if line != first[1]:
                what = f"differs from {first[0]}: {_difference(first[1], line)}"
                found.append(Outcome(name, language, line, [what]))
    return found


_VOLATILE = frozenset({"retry_after_ms", "id", "usage", "partial_text", "message"})


def _steady(value: Any) -> Any:
    """A line without what chance decides."""
    if isinstance(value, dict):
        if value.get("code") == "DEADLINE_EXCEEDED":  # whose clock was first: the client's or ours
            value = {k: v for k, v in value.items() if k not in ("reason", "attempts")}
        return {k: _steady(v) for k, v in value.items() if k not in _VOLATILE}
    if isinstance(value, list):
        return [_steady(each) for each in value]
    return value


def _difference(a: Line, b: Line) -> str:
    names = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
    return "; ".join(
        f"{k}: {json.dumps(a.get(k))[:200]} / {json.dumps(b.get(k))[:200]}" for k in names
    )


def table(outcomes: Sequence[Outcome], languages: Sequence[str], skipped: dict[str, str]) -> str:
    """docs/conformance.md: cases x languages."""
    problems = {(o.case, o.language): o.problems for o in reversed(outcomes)}
    for outcome in outcomes:
        if outcome.problems:
            problems[outcome.case, outcome.language] = outcome.problems
    columns = [*languages, *skipped]
    lines = [
        "# Conformance",
        "",
        "Every client runs every case against the same gateway and simulator; written by",
        "`make conformance`. [The cases](../tests/conformance/cases.yaml), and",
        "[what a client's program prints](../tests/conformance/README.md).",
        "",
        "| case | " + " | ".join(columns) + " | what it shows |",
        "|---|" + "---|" * len(columns) + "---|",
    ]
    for case in cases():
        cells = []
        for language in columns:
            if language in skipped:
                cells.append("SKIPPED")
            elif (case["name"], language) in problems:
                cells.append("**FAILED**" if problems[case["name"], language] else "ok")
            else:
                cells.append("")
        lines.append(f"| `{case['name']}` | " + " | ".join(cells) + f" | {case['about']} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for; 0 when every case passed."""
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument("--language", action="append", metavar="NAME")
    parser.add_argument(
        "--client", type=Path, metavar="FOLDER", help="only this client, which may lie anywhere"
    )
    parser.add_argument("--case", action="append", metavar="NAME")
    parser.add_argument("--show", action="store_true", help="print every line")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args(argv)
    logging.getLogger("tokenwire").addHandler(logging.NullHandler())
    chosen = [c for c in cases() if not arguments.case or c["name"] in arguments.case]
    wanted = [x for x in languages() if not arguments.language or x.name in arguments.language]
    if arguments.client:
        wanted = [Language(arguments.client.name, folder=ROOT / arguments.client)]
    if not chosen or not wanted:
        parser.error("no such case, or no such language")
    present: list[Language] = []
    skipped: dict[str, str] = {}
    for language in wanted:
        try:
            present.append(language.built())
        except MissingError as error:
            skipped[language.name] = str(error)
            print(f"SKIPPED {error}", file=sys.stderr)
    outcomes = asyncio.run(run(present, chosen, lambda text: print(text, file=sys.stderr)))
    if arguments.show:
        for outcome in outcomes:
            print(json.dumps({"language": outcome.language, **outcome.line}, ensure_ascii=False))
    if arguments.write:
        text = table(outcomes, [x.name for x in present], skipped)
        print(text[text.index("| case") :])
        arguments.write.write_text(text)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    passed = len(chosen) * len(present) - failed
    print(f"{len(chosen)} cases in {len(present)} languages: {passed} passed, {failed} failed")
    return 1 if failed or (skipped and os.environ.get("CI")) else 0


if __name__ == "__main__":
    sys.exit(main())
