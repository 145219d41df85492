"""How late the event loop runs, which tells how long streams rest between two reads.

A loop that has more to do than there is time runs everything late. Most of what it does for streams
is per message, not per token: who reads half as often writes half as many messages, each twice as
full. So streams rest while the loop is late, longer and longer until it keeps up, and never longer
than HOLD_CAP. What arrives meanwhile waits in the kernel's buffers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL = 0.05  # seconds between two looks
LATE = 0.010  # seconds: from here on streams rest
IN_TIME = 0.003  # below, they rest less again
FIRST_HOLD = 0.02
HOLD_CAP = 0.1
GROWTH, DECAY = 1.5, 0.95  # of the hold, at each look
_NEWEST = 0.2  # share of the newest look in the average: one long turn is no overload


class LoopLag:
    """`seconds`: how late the loop is, on average over the last looks. `hold`: seconds that streams
    rest after a message, 0 while the loop keeps up. `now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.seconds = 0.0
        self.hold = 0.0
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Looks from now on, until `close`."""
        self._due = self._now() + INTERVAL
        self._handle = asyncio.get_running_loop().call_later(INTERVAL, self._look)

    def close(self) -> None:
        """Looks no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self) -> None:
        self.measured(max(0.0, self._now() - self._due))
        self.start()

    def measured(self, late: float) -> None:
        """The loop ran something so many seconds after its time."""
        self.seconds += (late - self.seconds) * _NEWEST
        if late > LATE:
            self.hold = min(HOLD_CAP, max(FIRST_HOLD, self.hold * GROWTH))
        elif late < IN_TIME:
            self.hold = self.hold * DECAY if self.hold > FIRST_HOLD / 2 else 0.0
