"""What tests of shared state run on: the event loop of production, and a Redis of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from redis_server import RedisServer, redis_server


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def redis(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RedisServer]:
    """One that forgets everything when it is killed: a Redis, or what a test asks for."""
    async with redis_server(tmp_path, engine=getattr(request, "param", "redis")) as started:
        yield started
