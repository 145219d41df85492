"""Prometheus is told whether the Redis that replicas share is there."""

from __future__ import annotations

import asyncio
import re

import aiohttp

from harness import Start, upstream
from redis_server import RedisServer
from tokenwire_service.settings import Metrics, Redis


async def test_a_redis_that_is_away_is_told_until_it_returns(
    start: Start, redis: RedisServer
) -> None:
    gateway = await start(
        upstream("http://127.0.0.1:1/v1"),
        metrics=Metrics(listen="127.0.0.1:0"),
        redis=Redis(url=redis.url, on_failure="open"),
    )

    async def away() -> str:
        url = f"http://{gateway.running.metrics}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            [told] = re.findall(r"^tokenwire_redis_away (\S+)$", await answer.text(), re.MULTILINE)
        return str(told)

    async def told(value: str) -> None:
        async with asyncio.timeout(10):
            while await away() != value:
                await asyncio.sleep(0.05)

    assert await away() == "0.0"
    await redis.kill()
    await told("1.0")
    await redis.start()
    await told("0.0")
