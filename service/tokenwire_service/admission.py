"""Who may start: bounded calls in flight, and a bounded queue in front that knows deadlines.

A slot is held until the call, streams included, has ended. First come, first served. Nobody
queues who cannot be served: a full queue, or a deadline sooner than the wait to be expected,
is refused at once, so that another instance can be asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

_SMOOTHING = 0.1  # share of the newest call in the average duration


class FullError(Exception):
    """No slot, and no place in the queue. `retry_after`: seconds until one may be free."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("full")
        self.retry_after = retry_after


class Admission:
    """`slots` calls at once, and up to `queue` waiting. `now`: monotonic seconds."""

    def __init__(self, slots: int, queue: int, now: Callable[[], float]) -> None:
        self.slots = slots
        self._queue = queue
        self._now = now
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._average = 0.0  # seconds a call holds its slot
        self.dropped = 0  # calls refused since the start

    @property
    def in_flight(self) -> int:
        """Slots in use."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Calls in the queue."""
        return len(self._waiting)

    def slot(self, deadline: float) -> Slot:
        """Holds a slot while it is entered; waits for one first. Raises FullError at once if that
        is hopeless."""
        return Slot(self, deadline)

    async def enter(self, deadline: float) -> float:
        """Waits for a slot; when it came."""
        await self._enter(deadline)
        return self._now()

    def leave(self, began: float) -> None:
        """Gives back a slot that was had since `began`."""
        took = self._now() - began
        self._average += (took - self._average) * (_SMOOTHING if self._average else 1.0)
        self._leave()

    async def _enter(self, deadline: float) -> None:
        if self._in_flight < self.slots and not self._waiting:
            self._in_flight += 1
            return
        expected = self._average * (len(self._waiting) + 1) / self.slots
        if len(self._waiting) >= self._queue or self._now() + expected > deadline:
            self.dropped += 1
            raise FullError(max(expected, 0.1))  # seconds: a slot is hardly free sooner
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # the slot came at the same moment: hand it on
            elif turn in self._waiting:  # else a slot that came back has passed over it already
                self._waiting.remove(turn)
            raise

    def resize(self, slots: int, queue: int) -> None:
        """Other bounds from now on. Nobody loses a slot or a place in the queue: where there are
        fewer, those that end free none until the rest fits."""
        self.slots, self._queue = slots, queue
        self._hand_out()

    def _leave(self) -> None:
        """Frees a slot, which the next in the queue may have."""
        self._in_flight -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._in_flight < self.slots:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)


class Slot:
    """The context of Admission.slot. Not a generator: every call enters two of them."""

    __slots__ = ("_admission", "_began", "_deadline")

    def __init__(self, admission: Admission, deadline: float) -> None:
        self._admission = admission
        self._deadline = deadline

    async def __aenter__(self) -> None:
        self._began = await self._admission.enter(self._deadline)

    async def __aexit__(self, *_error: object) -> None:
        self._admission.leave(self._began)
