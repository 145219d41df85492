"""Servers by others as processes, each in an environment of its own: `make test-servers`.

CI tests against LiteLLM. The others are heavy (gigabytes of torch, a quarter of an hour of C++):
their tests run where `make setup-servers` was.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_STARTS_WITHIN = 900.0  # seconds: the first start compiles thousands of modules


def programs(name: str) -> Path:
    """Where an environment has its programs; skips where it is not installed, but in CI only the
    heavy ones."""
    folder = ROOT / "build/servers" / name
    if not (folder / ".complete").exists():
        assert name != "litellm" or not os.environ.get("CI"), "`make test` installs LiteLLM in CI"
        pytest.skip(f"{name} is not installed: make setup-servers")
    return folder / "venv/bin"


@contextmanager
def listening(
    command: list[str | Path], health: str, folder: Path, environ: Mapping[str, str]
) -> Iterator[str]:
    """Runs a server until left; `{port}` in its command is a free one. Its root URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part).replace("{port}", str(port)) for part in command],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environ},
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + _STARTS_WITHIN
        while not _healthy(url + health):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
