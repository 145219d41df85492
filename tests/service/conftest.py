"""What all service tests run on: the event loop of production, and encodings loaded once."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from tokenwire_service import encodings

_HANGS_AFTER = 60.0  # seconds
_load_once = functools.cache(encodings.load)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop's timers, transports and errors differ from asyncio's own in details."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def encodings_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes half a second, and never changes."""
    monkeypatch.setattr(encodings, "load", _load_once)


@pytest.fixture(autouse=True)
async def watchdog() -> AsyncIterator[None]:
    """Ends a case that hangs: on uvloop the signal of pytest-timeout interrupts nothing."""

    def bite() -> None:
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "").startswith("test_"):  # not those of gRPC
                task.cancel("the case hangs")

    timer = asyncio.get_running_loop().call_later(_HANGS_AFTER, bite)
    yield
    timer.cancel()
