"""How soon and how often to try again: full-jitter backoff, and a budget shared by all calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with full jitter: uniform in [0, min(cap, first * 2^n)] seconds.

    Full jitter spreads a herd best: https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/
    """

    first: float
    cap: float
    random: Callable[[], float] = random.random

    def delay(self, failures: int) -> float:
        """Seconds to wait after `failures` failures in a row, 1 or more."""
        ceiling: float = min(self.cap, self.first * 2.0 ** min(failures - 1, 30))
        return ceiling * self.random()


class RetryBudget:
    """Retries as a share of calls, so that an outage is not answered with a storm.

    Each call deposits `ratio`, each retry withdraws 1; `floor` retries per 10 seconds are
    always allowed, so that a quiet gateway can retry at all. As in Finagle's RetryBudget.
    """

    _WINDOW = 10.0  # seconds
    _CAP = 100.0  # calls' worth of unused retries that may pile up, over the floor

    def __init__(self, ratio: float, floor: int, now: Callable[[], float]) -> None:
        self._ratio = ratio
        self._floor = float(floor)
        self._now = now
        self._earned = 0.0  # by calls; spent first
        self._granted = self._floor  # by time
        self._refilled = now()

    def change(self, ratio: float, floor: int) -> None:
        """From now on; what is saved stays, up to what may pile up."""
        self._refill()
        self._ratio, self._floor = ratio, float(floor)
        self._earned = min(self._CAP * ratio, self._earned)
        self._granted = min(self._floor, self._granted)

    @property
    def balance(self) -> float:
        """Retries that may be made now."""
        self._refill()
        return self._earned + self._granted

    def deposit(self) -> None:
        """A call arrived."""
        self._earned = min(self._CAP * self._ratio, self._earned + self._ratio)

    def withdraw(self) -> bool:
        """Takes one retry; False when there is none."""
        if self.balance < 1:
            return False
        rest = 1 - min(1.0, self._earned)
        self._earned = max(0.0, self._earned - 1)
        self._granted = max(0.0, self._granted - rest)
        return True

    def _refill(self) -> None:
        now = self._now()
        grown = (now - self._refilled) * self._floor / self._WINDOW
        self._granted = min(self._floor, self._granted + grown)
        self._refilled = now
