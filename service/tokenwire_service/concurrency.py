"""How many requests a provider bears at once, found by trying: additive increase, multiplicative
decrease, as TCP finds a path's capacity (Chiu and Jain, 1989), with a memory of where it ended.

A provider's limit belongs to an account and is rarely known. There is none here until the first
429, so that nothing is held back without cause. Each 429 tells that what ran beside the request
was borne and one more was not: the limit falls to a share of that, grows back to it by one a
second, and stays. Then one more is tried, and as long as that is borne, the next. A 429 at the
same place doubles the time until the next try, so that a limit once found costs few of them.
"""

from __future__ import annotations

import math

FLOOR = 1.0  # requests
DECREASE = 0.7  # share that is left after a 429
GROWTH = 1.0  # requests per second, back to what was borne
STEP = 0.1  # share beyond what was borne that is tried at once, and one at least
FIRST_HOLD = 1.0  # seconds from a 429 until more is tried than was borne; doubles
HOLD_CAP = 30.0
FORGOTTEN = 3600.0  # seconds: what was learnt so long ago says nothing any more


class AdaptiveLimit:
    """The limit of one quota group with one model. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._borne = math.inf  # requests at once, as far as is known
        self._base = math.inf  # the limit at `_since`
        self._since = -math.inf  # when it was lowered
        self._hold = FIRST_HOLD

    def at(self, now: float) -> float:
        """Requests that may be in flight now: 1 or more, inf while nothing is known."""
        elapsed = max(0.0, now - self._since)
        if elapsed > FORGOTTEN:
            return math.inf
        more = max(1.0, self._borne * STEP) if elapsed >= self._hold else 0.0
        return min(self._base + elapsed * GROWTH, self._borne + more)

    def borne(self, together: int) -> None:
        """A request was answered; from its beginning on at least so many were under way `together`,
        itself included."""
        if together > self._borne:
            self._borne = self._base = float(together)

    def limited(self, together: int, started: float, now: float) -> None:
        """A request that began at `started` met a 429 while up to so many were under way
        `together`, itself included. Requests that were under way together with one that has
        lowered the limit already do not lower it again."""
        if started < self._since:
            return
        borne = max(FLOOR, together - 1.0)
        again = abs(borne - self._borne) <= max(1.0, borne * STEP)
        self._hold = min(2 * self._hold, HOLD_CAP) if again else FIRST_HOLD
        self._lower(borne, max(FLOOR, borne * DECREASE), now)

    def remaining(self, requests: int, in_flight: int, now: float) -> None:
        """The provider said that so many `requests` are left in its window: the limit falls to
        them and what is under way, before there is a 429."""
        limit = max(FLOOR, float(in_flight + requests))
        if limit < self.at(now):
            self._hold = FIRST_HOLD
            self._lower(limit, limit, now)

    def _lower(self, borne: float, base: float, now: float) -> None:
        self._borne, self._base, self._since = borne, base, now
