"""Programs by others: where they are, and how one is run."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_SECONDS = 60.0  # for one program; a machine may be busy


def missing(what: str) -> NoReturn:
    """Fails in CI, skips elsewhere."""
    text = f"{what} is not installed: make setup-wire"
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


def program(path: str) -> Path:
    """A program below build/, where it is."""
    found = ROOT / "build" / path
    if not found.exists():
        missing(found.name)
    return found


@dataclass(frozen=True)
class Ran:
    """What a program said, and how it ended."""

    code: int
    out: str
    err: str


async def run(*command: str | Path, **variables: str) -> Ran:
    """Runs a program to its end, from the repository's root. `variables` join the environment."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(RUN_SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


def messages(text: str) -> list[Any]:
    """The JSON values that stand in a row in `text`."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = text.strip()
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        found.append(value)
        at = end + len(text[end:]) - len(text[end:].lstrip())
    return found
