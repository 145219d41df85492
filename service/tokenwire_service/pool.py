"""One upstream as the gateway uses it: its client, its keys, its slots, and who waits for a key."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from tokenwire_service.admission import Admission
from tokenwire_service.config import Key, Upstream
from tokenwire_service.keyring import KeyRing, Lease, Unavailable
from tokenwire_service.upstream.client import UpstreamClient

_MOMENT = 0.001  # seconds: a loop's timers may be early by as much


_Line: TypeAlias = tuple[str, frozenset[str]]


@dataclass(eq=False)
class _Waiter:
    """One who waits for a key. `turn` brings it, or why there will be none."""

    model: str
    deadline: float
    sticky: str
    tokens: int
    avoid: frozenset[str]
    turn: asyncio.Future[Lease | Unavailable]

    @property
    def line(self) -> _Line:
        """Those who can have the same keys stand in one line."""
        return self.model, self.avoid


@dataclass
class _Closed:
    """Why a line gets no key. It holds for all who need `least` tokens or more: for those behind
    one who leaves if they need as much as that one did; behind one who stays for everyone."""

    found: Unavailable
    least: int


class Pool:
    """One upstream. Keys are handed out here: to those who wait for one model in the order in
    which they came, also before those who come later. Whatever changes is looked at once, for all
    of them: nobody is woken to find nothing. `now`: monotonic seconds, as the keys' own times.
    """

    def __init__(
        self,
        client: UpstreamClient,
        ring: KeyRing,
        bulkhead: Admission,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self.ring = ring
        self.bulkhead = bulkhead
        self._now = now
        self._waiting: list[_Waiter] = []  # by arrival
        self._closed: dict[_Line, Unavailable] = {}  # of each line that somebody stands in
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf

    @property
    def upstream(self) -> Upstream:
        """Its configuration. The ring has the keys of now, not this."""
        return self.client.upstream

    @property
    def waiting(self) -> int:
        """Calls that wait for a key."""
        return len(self._waiting)

    async def lease(
        self,
        model: str,
        deadline: float,
        *,
        sticky: str = "",
        tokens: int = 0,
        avoid: frozenset[str] = frozenset(),
        wait: bool = True,
    ) -> Lease | Unavailable:
        """A key, to be given back to `release`; or why none can serve before `deadline`. Waits for
        as long as that may change; unless not to `wait`, also for one that is only busy. `sticky`,
        `tokens` and `avoid`: as KeyRing.lease."""
        found = self._closed.get((model, avoid)) or self.ring.lease(
            model, self._now(), sticky=sticky, tokens=tokens, avoid=avoid
        )
        if isinstance(found, Lease) or not wait or not found.worth_waiting(deadline):
            return found
        turn: asyncio.Future[Lease | Unavailable] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiter(model, deadline, sticky, tokens, avoid, turn))
        self._closed[model, avoid] = found
        self._look_at(min(found.look_at, self._alarm_at))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self.look()
            elif isinstance(found := turn.result(), Lease):
                self.release(found)  # it came at the same moment
            raise

    def release(self, lease: Lease) -> None:
        """Ends a lease; the next may have its key."""
        self.ring.release(lease)
        self.look()

    def replace(self, keys: Iterable[Key]) -> None:
        """Other keys, while calls run: as KeyRing.replace. Who waits may have one of the new; who
        waits for one that has left is told, if there is no other."""
        self.ring.replace(keys)
        self.look()

    def look(self) -> None:
        """Something has changed: hands out what can be had now, and tells those for whom waiting
        has become of no use."""
        if not self._waiting:
            return
        closed: dict[_Line, _Closed] = {}
        waiting: list[_Waiter] = []
        for waiter in self._waiting:
            if waiter.turn.done():
                continue  # it left
            known = closed.get(waiter.line)
            if known is None or waiter.tokens < known.least:
                found = self.ring.lease(
                    waiter.model,
                    self._now(),
                    sticky=waiter.sticky,
                    tokens=waiter.tokens,
                    avoid=waiter.avoid,
                )
                if isinstance(found, Lease):
                    waiter.turn.set_result(found)
                    continue
                known = closed[waiter.line] = _Closed(found, waiter.tokens)
            if known.found.worth_waiting(waiter.deadline):
                known.least = 0
                waiting.append(waiter)
            else:
                waiter.turn.set_result(known.found)
        self._waiting = waiting
        self._closed = {waiter.line: closed[waiter.line].found for waiter in waiting}
        self._look_at(min((each.look_at for each in self._closed.values()), default=math.inf))

    def _look_at(self, at: float) -> None:
        """Looks again when the soonest key opens by itself."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_at = at
        if at < math.inf:
            delay = max(_MOMENT, at - self._now())
            self._alarm = asyncio.get_running_loop().call_later(delay, self.look)
