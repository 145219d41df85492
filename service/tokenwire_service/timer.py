"""A timeout that a busy event loop does not let fire falsely."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType

TURN = 0.001  # seconds after which a loop has looked at its sockets once more


class Within:
    """`async with Within(seconds)`: as asyncio.timeout, but what has arrived wins over the timer.

    A loop that was held up runs its timers before it looks at its sockets: what came in time would
    be late, for every call at once. So a timer that is due gives the loop one more turn.
    """

    __slots__ = ("_handle", "_seconds", "_timeout")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)
        self._handle: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Within:
        await self._timeout.__aenter__()
        if self._seconds < math.inf:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._due)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    def expired(self) -> bool:
        """Whether this timer ended what it stands around."""
        return self._timeout.expired()

    def _due(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(TURN, self._over)

    def _over(self) -> None:
        # Behind those whom this turn has woken already.
        self._timeout.reschedule(asyncio.get_running_loop().time())
