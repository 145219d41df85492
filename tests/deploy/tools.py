"""The programs that render, validate, build and run what is deployed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/chart/tokenwire"
_ENVIRONMENT = ROOT / "build/deploy/venv/bin"
_RUN_SECONDS = 300.0  # for one program; a machine may be busy


def missing(what: str, target: str) -> NoReturn:
    """Fails in CI, skips elsewhere."""
    text = f"{what} is not installed: make {target}"
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


def tool(name: str) -> Path:
    """A program of the environment of `make setup-deploy`."""
    found = _ENVIRONMENT / name
    if not found.exists() or not (ROOT / "build/deploy/.complete").exists():
        missing(name, "setup-deploy")
    return found


def built(name: str) -> Path:
    """A program of deploy/tools, which `make setup-deploy` builds."""
    found = ROOT / "build/deploy/bin" / name
    if not found.exists():
        missing(name, "setup-deploy")
    return found


def run(*command: str | Path, stdin: str = "", check: bool = True, **variables: str) -> str:
    """What a program writes to standard output. With `check` another exit code than 0 fails."""
    ran = subprocess.run(
        command,
        input=stdin,
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=_RUN_SECONDS,
        check=False,
    )
    if check and ran.returncode != 0:
        pytest.fail(f"{command[0]} ended with {ran.returncode}: {ran.stdout}{ran.stderr}")
    return ran.stdout


def rendered(*values: dict[str, Any]) -> list[dict[str, str]]:
    """What the chart renders with each values: text by template. An error fails the test."""
    answers = answered(*values)
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return [answer["manifests"] for answer in answers]


def answered(*values: dict[str, Any]) -> list[dict[str, Any]]:
    """The same with errors: {"manifests": ...} or {"error": ...} for each."""
    answers: list[dict[str, Any]] = json.loads(
        run(tool("python"), ROOT / "deploy/render.py", stdin=json.dumps(values))
    )
    return answers
