"""Sends one answer over its connection: at its pace, or broken the way a fault wants it."""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web

from tokenwire_service.simulator.answer import Answer
from tokenwire_service.simulator.faults import Directives, Slow, Strike, Then, Where

Sleep = Callable[[float], Awaitable[object]]

_FIRST_TOKEN_S: Final = 0.2
# Long enough for a reader on the same host to take what was sent: a reset discards the rest.
_BEFORE_RESET_S: Final = 0.02


class Delivery:
    """One answer on its way. `tokens_per_second` is the pace where the directives ask for none."""

    def __init__(
        self,
        request: web.Request,
        headers: Mapping[str, str],
        directives: Directives,
        *,
        tokens_per_second: float,
        sleep: Sleep,
    ) -> None:
        rate = directives.tokens_per_second
        if rate is None:
            rate = tokens_per_second
        self._request = request
        self._response = web.StreamResponse(headers=headers)
        self._at = directives.at
        self._sleep = sleep
        self._token_s = 1 / rate if rate else 0.0
        self._first_token_s = _FIRST_TOKEN_S if rate else 0.0
        if directives.first_token_ms is not None:
            self._first_token_s = directives.first_token_ms / 1000
        self._bytewise = False

    async def send(
        self, answer: Answer, *, stream: bool, fault: Strike | Slow | None
    ) -> web.StreamResponse:
        """Sends the answer, and returns when it is complete or broken.

        A stall lasts until this task is cancelled. Raises ConnectionError when the client left.
        """
        strike = fault if isinstance(fault, Strike) else None
        if isinstance(fault, Slow):
            self._bytewise = True
            self._token_s *= fault.factor
        if strike is not None and strike.where is Where.BEFORE_HEADERS:
            await self._finish(strike.then)
        elif stream:
            await self._stream(answer, strike)
        else:
            await self._plain(answer, strike)
        return self._response

    async def _stream(self, answer: Answer, strike: Strike | None) -> None:
        self._response.headers["cache-control"] = "no-cache"
        await self._response.prepare(self._request)
        if strike is not None and strike.where is Where.AFTER_HEADERS:
            return await self._finish(strike.then)
        await self._sleep(self._first_token_s)
        await self._write(answer.head(), 0)
        point = int(self._at * answer.ticks)
        for tick, events in enumerate(answer.body()):
            if tick == point and strike is not None and await self._strike(strike):
                return None
            await self._write(events, 1)
        if answer.ticks <= point and strike is not None and await self._strike(strike):
            return None
        return await self._write(answer.tail(), 0)

    async def _strike(self, strike: Strike) -> bool:
        """Whether that was the end of the stream."""
        await self._write(strike.event, 0)
        if strike.then is not Then.CONTINUE:
            await self._finish(strike.then)
        return strike.then is not Then.CONTINUE

    async def _plain(self, answer: Answer, strike: Strike | None) -> None:
        body = answer.plain()
        sent = len(body)
        if strike is not None:
            point = max(0, min(int(self._at * len(body)), len(body) - 1))
            body = strike.plain(body, point)
            # With an event, the damage is in the body itself, which is sent as a whole.
            sent = len(body) if strike.event else point
        self._response.content_length = len(body)
        if strike is not None and strike.where is Where.AFTER_HEADERS:
            await self._response.prepare(self._request)
            return await self._finish(strike.then)
        await self._sleep(self._first_token_s)
        if not self._bytewise:
            await self._sleep(self._token_s * answer.ticks)
        await self._response.prepare(self._request)
        await self._write(body[:sent], answer.ticks if self._bytewise else 0)
        if sent < len(body) and strike is not None:
            if strike.then is Then.END and self._request.transport is not None:
                self._request.transport.close()
            await self._finish(strike.then)
        return None

    async def _write(self, data: bytes, tokens: int) -> None:
        """Writes the bytes, in as much time as these tokens take.

        Waits first: after its last byte a client may leave, and has not aborted anything. It waits
        at full speed too, since sleep(0) lets the other tasks of this loop run.
        """
        if self._bytewise:
            for index in range(len(data)):
                await self._sleep(self._token_s * tokens / len(data))
                await self._response.write(data[index : index + 1])
        elif data:
            await self._sleep(self._token_s * tokens)
            await self._response.write(data)

    async def _finish(self, then: Then) -> None:
        if then is Then.STALL:
            # Until the client leaves or the simulator stops: both cancel this task.
            await asyncio.get_running_loop().create_future()
        if then is Then.RESET:
            await self._sleep(_BEFORE_RESET_S)
            self._reset()

    def _reset(self) -> None:
        transport = self._request.transport
        if transport is None:
            return
        # Through a copy of the descriptor it works in every event loop: uvloop hides its socket.
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as copy:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
