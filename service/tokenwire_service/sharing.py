"""What replicas share, from the start of one of them until its last call has been told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tokenwire_service import quotas
from tokenwire_service.config import Redis
from tokenwire_service.quotas import Quotas
from tokenwire_service.store import Store


@asynccontextmanager
async def started(redis: Redis | None, logger: logging.Logger) -> AsyncIterator[Quotas | None]:
    """The shared limits, once Redis has been tried for the first time; None where none is
    configured. Whether it is there does not matter for the start."""
    if redis is None:
        yield None
        return
    store = Store(redis, quotas.SCRIPTS, logger)
    limits = Quotas(store)
    tasks = [asyncio.ensure_future(each) for each in (store.run(), limits.run())]
    try:
        await store.tried()
        yield limits
    finally:
        await store.drain()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
