"""Programs by others: Prometheus, promtool, the OpenTelemetry Collector. Missing, they fail CI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

BUILT = Path(__file__).parents[2] / "build" / "monitoring"


def program(name: str) -> str:
    """Its path."""
    found = shutil.which(name, path=f"{BUILT}:{os.environ['PATH']}")
    if found is None:
        missing = f"{name} is needed: `make setup-monitoring` installs it (Prometheus as root)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="session")
def prometheus() -> str:
    return program("prometheus")


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("promtool")


@pytest.fixture(scope="session")
def otelcol() -> str:
    return program("otelcol")
