"""What happened in each of the last seconds, for whoever watches a gateway live.

Bounded: five minutes, and for each second at most 256 times of first texts.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenwire_service.telemetry import ABANDONED, AttemptEvent, CallEvent

KEPT = 300  # seconds
_SAMPLES = 256  # first texts of one second whose times are kept


@dataclass
class Second:
    """One second. `number` counts from the start of the gateway; calls, attempts and tokens are
    those that ended in it, `deltas` and `first_texts` those that were sent to callers in it."""

    number: int
    succeeded: int = 0  # calls with OK
    left: int = 0  # calls whose caller cancelled them
    failed: Counter[str] = field(default_factory=Counter)  # calls, by reason, or code without one
    attempts: int = 0
    retries: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # of attempts, by Fault.value
    prompt_tokens: int = 0
    completion_tokens: int = 0
    deltas: int = 0  # pieces of answers; of most providers a token each
    first_texts: array[float] = field(default_factory=lambda: array("f"))  # seconds, see _SAMPLES
    in_flight: int = 0  # calls, as its end found them


class Recent:
    """An observer. `in_flight`: how many calls run now. `now`: monotonic seconds."""

    def __init__(
        self, in_flight: Callable[[], int], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._in_flight = in_flight
        self._now = now
        self._began = now()
        self._seconds: deque[Second] = deque([Second(0)], maxlen=KEPT + 1)

    def since(self, number: int) -> list[Second]:
        """The seconds that are over, from `number` on: at most KEPT, oldest first."""
        self._current()
        return [each for each in self._seconds if each.number >= number][:-1]

    def attempt(self, event: AttemptEvent) -> None:
        """Counts it."""
        second = self._current()
        second.attempts += 1
        second.retries += event.number > 1
        second.prompt_tokens += event.prompt_tokens
        second.completion_tokens += event.completion_tokens
        if event.fault and event.fault != ABANDONED:
            second.faults[event.fault] += 1

    def call(self, event: CallEvent) -> None:
        """Counts it."""
        second = self._current()
        if event.code == "OK":
            second.succeeded += 1
        elif event.code == "CANCELLED":
            second.left += 1
        else:
            second.failed[event.reason or event.code] += 1

    def relayed(self, deltas: int, first_after: float | None, _gap: float | None = None) -> None:
        """A stream has sent so many deltas; `first_after`: seconds since its call began, where
        they are its first."""
        second = self._current()
        second.deltas += deltas
        if first_after is not None and len(second.first_texts) < _SAMPLES:
            second.first_texts.append(first_after)

    def _current(self) -> Second:
        """This second; those that have passed since the last look are closed."""
        number = int(self._now() - self._began)
        last = self._seconds[-1]
        if number == last.number:
            return last
        in_flight = self._in_flight()
        last.in_flight = in_flight
        for missed in range(max(last.number + 1, number - KEPT), number):
            self._seconds.append(Second(missed, in_flight=in_flight))
        self._seconds.append(Second(number))
        return self._seconds[-1]
