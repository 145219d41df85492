"""aimock, an OpenAI-compatible upstream written by others, as a process."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

_HERE = Path(__file__).resolve().parent
_CLI = _HERE.parents[1] / "build/npm/node_modules/@copilotkit/aimock/dist/cli.js"


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, as `tokenwire serve`."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of an aimock that takes the keys sk-test-k1 and sk-test-k2."""
    node = shutil.which("node")
    if node is None or not _CLI.exists():
        missing = "aimock needs Node 20 and npm: `make test` installs it where they are"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    log = tmp_path_factory.mktemp("aimock") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [node, _CLI, "--port", "0", "--fixtures", _HERE / "fixtures.json"],
            env={**os.environ, "AIMOCK_API_KEYS": "sk-test-k1,sk-test-k2"},
            stdout=output,
            stderr=output,
        )
    try:
        yield _listening(process, log) + "/v1"
    finally:
        process.terminate()
        process.wait()


def _listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """Waits until it serves; its address."""
    for _ in range(600):
        if found := re.search(r"listening on (http://\S+)", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())
