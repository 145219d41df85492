"""The corpus as an upstream, on the event loop that the gateway runs on in production."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from corpus import runner


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, as `tokenwire serve`."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session", autouse=True)
def corpus() -> None:
    """Skips where there is no corpus; CI has it."""
    if not runner.CORPUS.is_dir():
        missing = "no corpus of real traffic beside the repository, in ../shared/corpus"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.fixture(scope="session")
def replay(corpus: None) -> Iterator[str]:
    """The base URL of an upstream that serves the corpus."""
    with runner.replaying() as base_url:
        yield base_url
