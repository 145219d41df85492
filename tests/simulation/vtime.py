"""An asyncio event loop in virtual time: sleeping costs nothing, and the same seed runs the same.

Time moves only when nothing is ready to run, straight to the next timer. If nothing is scheduled
either, the program is stuck; if time does not move though the loop goes round and round, it is
busy for nothing. Both are errors, and a check of liveness for free.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

START = 1000.0  # seconds; 0 would hide a time that is taken for a delay
MOST_ROUNDS = 5_000  # of the loop at one moment
_EARLY = 1e-9  # seconds: what is due within them is due, as for any loop


class StuckError(RuntimeError):
    """Nothing is ready and nothing is scheduled, or time does not move."""


class _Task(asyncio.Task[Any]):
    """A task that hashes by its number. asyncio keeps tasks in sets, and cancels those of a group
    in the set's order: by address, no seed would run the same twice."""

    _numbers = itertools.count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._number = next(self._numbers)
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop: no selector, for there is nothing to wait for. It replaces what BaseEventLoop
    leaves to others, and for speed its own turn, with timers at the same time in the order in
    which they were set."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.rounds = 0  # how often the loop went round
        self._rounds_at_now = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        _Task._numbers = itertools.count()
        self.set_task_factory(lambda loop, coro, **given: _Task(coro, loop=loop, **given))

    def time(self) -> float:
        """Seconds."""
        return self.now

    def stall(self, seconds: float) -> None:
        """As if the process had stood still for so long: time passes, and nothing runs."""
        self.now += seconds
        self._rounds_at_now = 0

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """As any loop."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        self.rounds += 1
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise StuckError("stuck: nothing is ready and nothing is scheduled")
            if timers[0][0] > self.now:
                self.now = timers[0][0]
                self._rounds_at_now = 0
        self._rounds_at_now += 1
        if self._rounds_at_now > MOST_ROUNDS:
            self._rounds_at_now = 0
            raise StuckError(f"busy: {MOST_ROUNDS} rounds of the loop, and no time passes")
        until = self.now + _EARLY
        while timers and timers[0][0] <= until:
            timer = heapq.heappop(timers)[2]
            if not timer.cancelled():
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """They go when their time comes."""

    def _write_to_self(self) -> None:
        """Nobody waits who must be woken."""

    def _asyncgen_firstiter_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        """Everyone closes their own."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs to the end, in no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
