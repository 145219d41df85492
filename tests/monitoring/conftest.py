"""Prometheus and promtool from Debian's packages; missing, they fail CI."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str) -> str:
    """Its path."""
    found = shutil.which(name)
    if found is None:
        missing = f"{name} is needed: `make setup-monitoring` installs it, as root"
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
