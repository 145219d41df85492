"""What replicas share, from the start of one of them until its last call has been told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tokenwire_service import quotas, sharedkeys
from tokenwire_service.config import Redis
from tokenwire_service.quotas import Quotas
from tokenwire_service.sharedkeys import SharedKeys
from tokenwire_service.store import Store


@dataclass(frozen=True)
class Shared:
    """What replicas have in common: limits, and what they know of keys."""

    quotas: Quotas
    keys: SharedKeys
    store: Store


@asynccontextmanager
async def started(redis: Redis | None, logger: logging.Logger) -> AsyncIterator[Shared | None]:
    """What is shared, once Redis has been tried for the first time; None where none is
    configured. Whether it is there does not matter for the start."""
    if redis is None:
        yield None
        return
    store = Store(redis, (*quotas.SCRIPTS, *sharedkeys.SCRIPTS), logger)
    shared = Shared(Quotas(store), SharedKeys(store), store)
    running = (store.run, shared.quotas.run, shared.keys.run)
    tasks = [asyncio.ensure_future(_lasting(each, logger)) for each in running]
    try:
        await store.tried()
        yield shared
    finally:
        await store.drain()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _lasting(run: Callable[[], Awaitable[None]], logger: logging.Logger) -> None:
    """A defect must not end it in silence."""
    while True:
        try:
            await run()
        except Exception:
            logger.exception("defect", extra={"fields": {"where": "shared state"}})
            await asyncio.sleep(1)
