"""One attempt at one upstream with one key, over aiohttp: the only module that opens a socket.

Timers: connect, first byte (until the first event or the whole plain answer begins), idle
(between events; comments and blank lines are no progress). Each raises UpstreamFault(TIMEOUT)
and is this module's own; the call's deadline is the gateway's, around the whole attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError
from yarl import URL

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Limits, Upstream
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import Lease
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route, StreamDecoder

_ERROR_BODY_BYTES = 64 * 1024  # what is read of an error answer; those recorded take a few kB
_KEEPALIVE_SECONDS = (
    30.0  # below the idle timers of load balancers, so no dead connection is reused
)
_DRAIN_SECONDS = 0.05  # to read the last chunk's end after [DONE], so that the connection is kept


@dataclass
class Progress:
    """What an attempt has seen so far; filled while it runs, read when it failed."""

    http_status: int = 0
    first_byte_at: float = 0.0
    reused_connection: bool = False
    remaining_requests: int | None = None  # in the provider's window, if it says
    usage: chat_pb2.Usage | None = None


class UpstreamClient:
    """Sends requests to one upstream."""

    def __init__(
        self,
        upstream: Upstream,
        dialect: Callable[[Route], Dialect],
        limits: Limits,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.upstream = upstream
        self.dialect = dialect  # of a route that leads here
        self._limits = limits
        self._now = now
        self._base = upstream.base_url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self.open_answers = 0  # responses not yet closed

    async def close(self) -> None:
        """Closes every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def fetch(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> chat_service_pb2.ChatResponse:
        """The whole plain answer."""
        async with self._request(encoded, lease, progress) as response:
            body = await self._body(response, self._limits.upstream_answer_bytes)
        return encoded.dialect.decode(encoded, body)

    async def models(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> list[model_service_pb2.Model]:
        """The upstream's own model list."""
        async with self._request(encoded, lease, progress) as response:
            body = await self._body(response, self._limits.upstream_answer_bytes)
        return encoded.dialect.decode_models(body)

    @asynccontextmanager
    async def open(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[Answer]:
        """A stream, closed on leaving: an unfinished one closes its connection, so the upstream
        stops generating."""
        async with self._request(encoded, lease, progress) as response:
            answer = Answer(
                response,
                encoded.dialect.stream_decoder(encoded),
                self._limits,
                self.upstream.timeouts.first_byte,
                self.upstream.timeouts.idle,
                self._now,
            )
            yield answer
            await answer.drain()

    @asynccontextmanager
    async def _request(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {
            **self.upstream.headers,
            **encoded.headers,
            **encoded.dialect.headers(lease.key, lease.organization),
            "Accept-Encoding": "identity",
        }
        if encoded.body:
            headers["Content-Type"] = "application/json"
        response: aiohttp.ClientResponse | None = None
        timeouts = self.upstream.timeouts
        try:
            try:
                async with asyncio.timeout(timeouts.first_byte):
                    response = await self._connected().request(
                        "POST" if encoded.body else "GET",
                        URL(self._base + encoded.path, encoded=True),
                        data=encoded.body or None,
                        headers=headers,
                        allow_redirects=False,
                        proxy=self.upstream.proxy,
                        trace_request_ctx=progress,
                    )
                    self.open_answers += 1
                    progress.http_status = response.status
                    progress.first_byte_at = self._now()
                    remaining = response.headers.get("x-ratelimit-remaining-requests", "")
                    if remaining.isascii() and remaining.isdigit():
                        progress.remaining_requests = int(remaining[:12])
                    if response.status != 200:
                        raise await self._refusal(encoded.dialect, response)
                    kind = response.content_type
                    if kind in ("text/html", "application/xhtml+xml"):
                        raise UpstreamFault(
                            Fault.PROTOCOL, f"the answer is {kind}, not JSON", http_status=200
                        )
            except aiohttp.ConnectionTimeoutError:
                raise UpstreamFault(
                    Fault.UNREACHABLE, f"no connection within {timeouts.connect:g} s"
                ) from None
            except TimeoutError:
                raise UpstreamFault(
                    Fault.TIMEOUT, f"no answer within {timeouts.first_byte:g} s"
                ) from None
            try:
                yield response
            except aiohttp.ClientError as error:
                if isinstance(error.__cause__, ContentEncodingError):
                    raise UpstreamFault(
                        Fault.PROTOCOL, "the answer's compression is broken"
                    ) from None
                raise UpstreamFault(
                    Fault.TRUNCATED, f"the connection broke within the answer ({_kind(error)})"
                ) from None
        except aiohttp.ClientConnectorCertificateError:
            raise UpstreamFault(Fault.UNREACHABLE, "the certificate is not trusted") from None
        except (
            aiohttp.ClientConnectorError,
            aiohttp.ClientProxyConnectionError,
            ssl.SSLError,
        ) as error:
            raise UpstreamFault(Fault.UNREACHABLE, f"no connection ({_kind(error)})") from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            fault = Fault.STALE_CONNECTION if progress.reused_connection else Fault.SERVER_ERROR
            raise UpstreamFault(
                fault, f"the connection was closed without an answer ({_kind(error)})"
            ) from None
        except aiohttp.ClientError as error:  # bad status line, header, length, ...
            raise UpstreamFault(
                Fault.PROTOCOL, f"the answer is not HTTP ({_kind(error)})"
            ) from None
        finally:
            if response is not None:
                # Only a response read to its end has given its connection back already; any
                # other is closed with it, which is what tells the upstream to stop.
                response.close()
                self.open_answers -= 1

    async def _refusal(self, dialect: Dialect, response: aiohttp.ClientResponse) -> UpstreamFault:
        headers = {name.lower(): value for name, value in response.headers.items()}
        if 300 <= response.status < 400:
            return UpstreamFault(
                Fault.PROTOCOL,
                "the upstream answered with a redirect, which is never followed",
                http_status=response.status,
            )
        try:
            body = await response.content.read(_ERROR_BODY_BYTES)
            while len(body) < _ERROR_BODY_BYTES and (more := await response.content.read(4096)):
                body += more
        except aiohttp.ClientError:
            body = b""
        fault = dialect.classify(response.status, headers, body)
        fault.http_status = response.status
        return fault

    async def _body(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """The whole body. Whitespace keeps some upstreams' connections alive: it is progress."""
        pieces: list[bytes] = []
        size = 0
        idle = self.upstream.timeouts.idle
        while True:
            try:
                async with asyncio.timeout(idle):
                    piece = await response.content.readany()
            except TimeoutError:
                raise UpstreamFault(
                    Fault.TIMEOUT, f"silent for {idle:g} s within the answer"
                ) from None
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            if size > limit:
                raise UpstreamFault(Fault.PROTOCOL, f"the answer exceeds {limit} bytes")
            pieces.append(piece)

    def _connected(self) -> aiohttp.ClientSession:
        """The session, made on first use because it belongs to the running event loop."""
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_reuseconn.append(_note_reuse)
            self._session = aiohttp.ClientSession(
                # limit 0 is none: the upstream's slots bound the connections.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),  # one tenant's cookies never reach another
                timeout=aiohttp.ClientTimeout(total=None, connect=self.upstream.timeouts.connect),
                trust_env=False,
                trace_configs=[trace],
                headers={"User-Agent": "tokenwire"},
                max_field_size=64 * 1024,
            )
        return self._session


class Answer:
    """One upstream stream being read."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        decoder: StreamDecoder,
        limits: Limits,
        first_byte: float,
        idle: float,
        now: Callable[[], float],
    ) -> None:
        self._response = response
        self._events = sse.Decoder(limits.upstream_event_bytes)
        self._decoder = decoder
        self._limit = limits.upstream_answer_bytes
        self._size = 0  # of what came since the last delta: a stream as such has no bound
        self._now = now
        self._idle = idle
        self._silent_at = now() + first_byte  # when silence becomes a fault
        self._heard = False
        self._fault: UpstreamFault | None = None  # met behind events that were still good

    @property
    def usage(self) -> chat_pb2.Usage | None:
        """The last usage the upstream sent."""
        return self._decoder.usage

    async def read(self, wake_at: float) -> list[chat_service_pb2.StreamChatResponse] | None:
        """What arrives next: None at the end, an empty list at `wake_at` if nothing did."""
        if self._fault is not None:
            raise self._fault
        while not self._decoder.done:
            now = self._now()
            until = min(self._silent_at, wake_at)
            try:
                async with asyncio.timeout(max(0.0, until - now)):
                    chunk = await self._response.content.readany()
            except TimeoutError:
                # Not by the clock: a loop's timers may run a moment early.
                if until == self._silent_at:
                    what = f"silent for {self._idle:g} s" if self._heard else "no event in time"
                    raise UpstreamFault(Fault.TIMEOUT, what) from None
                return []
            if not chunk:
                break
            try:
                events = self._events.feed(chunk)
            except sse.EventTooLarge as error:
                events = error.events
                self._fault = UpstreamFault(Fault.PROTOCOL, str(error))
            # Events without data, and Anthropic's pings, only keep the connection alive.
            if any(event.data.strip() and event.type != "ping" for event in events):
                self._heard = True
                self._silent_at = self._now() + self._idle
            decoded: list[chat_service_pb2.StreamChatResponse] = []
            try:
                for event in events:
                    decoded += self._decoder.feed(event)
            except UpstreamFault as fault:
                self._fault = fault
            if decoded:
                self._size = 0
                return decoded
            if self._fault is not None:
                raise self._fault
            self._size += len(chunk)
            if self._size > self._limit:
                raise UpstreamFault(
                    Fault.PROTOCOL, f"more than {self._limit} bytes without any text"
                )
        return None

    def finish(self) -> list[chat_service_pb2.StreamChatResponse]:
        """The finishes and the trailer. Raises UpstreamFault without proof of completion."""
        return self._decoder.finish(self._events.error_field)

    async def drain(self) -> None:
        """Reads what little follows [DONE], so that the connection can serve again."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while await self._response.content.readany():
                    pass


async def _note_reuse(
    _session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any
) -> None:
    context.trace_request_ctx.reused_connection = True


def _kind(error: BaseException) -> str:
    """The error's class and number: its text may quote addresses and header bytes."""
    number = getattr(error, "errno", None)
    return f"{type(error).__name__}, errno {number}" if number else type(error).__name__
