"""Blocking work beside the event loop, in a thread that nobody waits for in the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[], T], name: str) -> T:
    """What `work` returns or raises. A network's file system may take its time, or never answer; so
    it is a daemon, for which the end does not wait as it would for a thread of an executor."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def succeed(result: T) -> None:
        if not found.done():  # else nobody waits any more
            found.set_result(result)

    def fail(error: BaseException) -> None:
        if not found.done():
            found.set_exception(error)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001  # it is told to whoever waits
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(succeed, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await found
