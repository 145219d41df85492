"""One attempt at one upstream with one key, over aiohttp: the only module that opens a socket.

Timers: connect, first byte (until the first text of a stream, or until the whole plain answer
begins), idle (between events; comments and blank lines are no progress). Each raises an
UpstreamFault and is this module's own; the call's deadline is the gateway's, around the whole
attempt. What has arrived when a timer is due was in time: see timer.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError
from yarl import URL

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Limits, Upstream
from tokenwire_service.errors import TIMER, Fault, UpstreamFault, bare
from tokenwire_service.keyring import Lease
from tokenwire_service.timer import TURN, Alarm, Within
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route, StreamDecoder

_ERROR_BODY_BYTES = 64 * 1024  # what is read of an error answer; those recorded take a few kB
_READ_BYTES = 64 * 1024  # decoded at once; a caller who does not read holds up no more than this
_KEEPALIVE_SECONDS = (
    30.0  # below the idle timers of load balancers, so no dead connection is reused
)
_NEWEST = 0.2  # share of the newest gap between pieces in their average
_DRAIN_SECONDS = 0.05  # to read the last chunk's end after [DONE], so that the connection is kept


@dataclass
class Progress:
    """What an attempt has seen so far; filled while it runs, read when it failed. `fresh` is asked
    for: a connection that never served before, after one that had died in the pool."""

    fresh: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)  # sent beside the request's own
    http_status: int = 0
    first_byte_at: float = 0.0
    reused_connection: bool = False
    remaining_requests: int | None = None  # in the provider's window, if it says
    remaining_tokens: int | None = None
    usage: chat_pb2.Usage | None = None


# Whose connection is being looked for in this task.
_ATTEMPT: ContextVar[Progress] = ContextVar("attempt")


class _Connector(aiohttp.TCPConnector):
    """Notes of each attempt whether its connection has served before.

    A TraceConfig would tell as much, for a fifth of what a request costs: 101 against 79 us of CPU
    (aiohttp alone, POST of 600 bytes to a local server, 4,000 requests, in turns).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._served: weakref.WeakSet[Any] = weakref.WeakSet()

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: Any,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  # the base's
    ) -> Any:
        """As the base's."""
        connection = await super().connect(req, traces, timeout)
        protocol = connection.protocol
        _ATTEMPT.get().reused_connection = protocol in self._served
        self._served.add(protocol)
        return connection


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
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # True: each with a new connection
        self.open_answers = 0  # responses not yet closed

    async def close(self) -> None:
        """Closes every connection."""
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    async def fetch(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> chat_service_pb2.ChatResponse:
        """The whole plain answer."""
        alarm = Alarm(self._now)
        async with self._request(encoded, lease, progress, alarm) as response:
            body = await self._body(response, self._limits.upstream_answer_bytes, alarm)
        return encoded.dialect.decode(encoded, body)

    async def models(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> list[model_service_pb2.Model]:
        """The upstream's own model list."""
        alarm = Alarm(self._now)
        async with self._request(encoded, lease, progress, alarm) as response:
            body = await self._body(response, self._limits.upstream_answer_bytes, alarm)
        return encoded.dialect.decode_models(body)

    @asynccontextmanager
    async def open(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[Answer]:
        """A stream, closed on leaving: an unfinished one closes its connection, so the upstream
        stops generating."""
        text_until = self._now() + self.upstream.timeouts.first_byte
        alarm = Alarm(self._now)
        async with self._request(encoded, lease, progress, alarm) as response:
            early = b""
            if response.content_type == "application/json":
                try:  # blanks keep the connection alive, but are no text
                    async with Within(max(0.0, text_until - self._now())):
                        early = await self._no_plain_answer(encoded, response, alarm)
                except TimeoutError:
                    raise UpstreamFault(
                        Fault.TIMEOUT, "no text in time", facts={TIMER: "first_byte"}
                    ) from None
            answer = Answer(
                response,
                encoded.dialect.stream_decoder(encoded),
                self._limits,
                text_until,
                self.upstream.timeouts.idle,
                self._now,
                alarm,
                early,
            )
            yield answer
            await answer.drain()

    @asynccontextmanager
    async def _request(
        self, encoded: Encoded, lease: Lease, progress: Progress, alarm: Alarm
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer's head. `alarm`: for all waits of this request, disarmed at its end."""
        headers = {
            **self.upstream.headers,
            **encoded.headers,
            **progress.headers,
            **encoded.dialect.headers(lease.key, lease.organization),
            "Accept-Encoding": "identity",
        }
        if encoded.body:
            headers["Content-Type"] = "application/json"
        # A proxy reads its login in the request for a tunnel, else in the request itself.
        login, tunnelled = self._proxy_login(), self._base.startswith("https:")
        if not tunnelled:
            headers.update(login)
        response: aiohttp.ClientResponse | None = None
        timeouts = self.upstream.timeouts
        _ATTEMPT.set(progress)
        try:
            try:
                with alarm.until(self._now() + timeouts.first_byte):
                    response = await self._connected(progress.fresh).request(
                        "POST" if encoded.body else "GET",
                        URL(self._base + encoded.path, encoded=True),
                        data=encoded.body or None,
                        headers=headers,
                        allow_redirects=False,
                        proxy=self.upstream.proxy,
                        proxy_headers=login if tunnelled else None,
                    )
                    self.open_answers += 1
                    progress.http_status = response.status
                    progress.first_byte_at = self._now()
                    progress.remaining_requests = _remaining(response, "requests")
                    progress.remaining_tokens = _remaining(response, "tokens")
                    if response.status == 407 and self.upstream.proxy:
                        raise _refused_by_proxy(407)
                    if response.status != 200:
                        raise await self._refusal(encoded.dialect, response)
                    kind = response.content_type
                    if kind in ("text/html", "application/xhtml+xml"):
                        raise UpstreamFault(
                            Fault.PROTOCOL, f"the answer is {kind}, not JSON", http_status=200
                        )
            except aiohttp.ConnectionTimeoutError:
                self._forget_addresses()
                raise UpstreamFault(
                    Fault.UNREACHABLE,
                    f"no connection within {timeouts.connect:g} s",
                    facts={TIMER: "connect"},
                ) from None
            except TimeoutError:
                raise UpstreamFault(
                    Fault.TIMEOUT,
                    f"no answer within {timeouts.first_byte:g} s",
                    facts={TIMER: "first_byte"},
                ) from None
            except (aiohttp.ClientError, ssl.SSLError) as error:
                raise self._no_answer(error, progress) from None
            try:
                yield response
            except aiohttp.ClientError as error:
                badly_encoded = isinstance(error.__cause__, ContentEncodingError)
                bare(error)  # its response keeps it
                if badly_encoded:
                    raise UpstreamFault(
                        Fault.PROTOCOL, "the answer's compression is broken"
                    ) from None
                raise UpstreamFault(
                    Fault.TRUNCATED, f"the connection broke within the answer ({_kind(error)})"
                ) from None
        finally:
            alarm.close()
            if response is not None:
                # Only a response read to its end has given its connection back already; any
                # other is closed with it, which is what tells the upstream to stop.
                response.close()
                self.open_answers -= 1

    def _no_answer(
        self, error: aiohttp.ClientError | ssl.SSLError, progress: Progress
    ) -> UpstreamFault:
        """Which fault it is that no connection came about, or that one broke before its answer was
        here."""
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return UpstreamFault(Fault.UNREACHABLE, "the certificate is not trusted")
        if isinstance(
            error,
            aiohttp.ClientConnectorError | aiohttp.ClientProxyConnectionError | ssl.SSLError,
        ):
            self._forget_addresses()
            return UpstreamFault(Fault.UNREACHABLE, f"no connection ({_kind(error)})")
        if isinstance(error, aiohttp.ClientHttpProxyError):  # its text quotes the proxy's words
            return _refused_by_proxy(error.status)
        if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
            fault = Fault.STALE_CONNECTION if progress.reused_connection else Fault.SERVER_ERROR
            return UpstreamFault(
                fault, f"the connection was closed without an answer ({_kind(error)})"
            )
        # bad status line, header, length, ...
        return UpstreamFault(Fault.PROTOCOL, f"the answer is not HTTP ({_kind(error)})")

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

    async def _no_plain_answer(
        self, encoded: Encoded, response: aiohttp.ClientResponse, alarm: Alarm
    ) -> bytes:
        """The first bytes of a stream that calls itself JSON, which some servers send. Raises what
        an error in a whole JSON answer means: InternLM and others refuse a stream by one."""
        limit = self._limits.upstream_answer_bytes
        begun = await self._body(response, limit, alarm, pieces=1)
        if begun.lstrip()[:1] not in (b"{", b"["):
            return begun
        rest = await self._body(response, limit - len(begun), alarm)
        encoded.dialect.decode(encoded, begun + rest)
        raise UpstreamFault(Fault.PROTOCOL, "a whole answer, where a stream was asked for")

    async def _body(
        self,
        response: aiohttp.ClientResponse,
        limit: int,
        alarm: Alarm,
        *,
        pieces: int | None = None,
    ) -> bytes:
        """The whole body, or what comes of it in so many `pieces` that are not blank. Whitespace
        keeps some upstreams' connections alive: it is progress."""
        body = bytearray()
        idle = self.upstream.timeouts.idle
        while pieces is None or pieces > 0:
            try:
                with alarm.until(self._now() + idle):
                    piece = await response.content.readany()
            except TimeoutError:
                raise UpstreamFault(
                    Fault.TIMEOUT,
                    f"silent for {idle:g} s within the answer",
                    facts={TIMER: "idle"},
                ) from None
            if not piece:
                break
            if len(body) + len(piece) > limit:
                raise UpstreamFault(Fault.PROTOCOL, f"the answer exceeds {limit} bytes")
            body += piece
            if pieces is not None and piece.strip():
                pieces -= 1
            if response.content.at_eof():  # it came with its end, as short answers do
                break
        return bytes(body)

    def _proxy_login(self) -> dict[str, str]:
        if self.upstream.proxy_login is None:
            return {}
        user, _, password = self.upstream.proxy_login.reveal().partition(":")
        return {"Proxy-Authorization": aiohttp.encode_basic_auth(user, password, "utf-8")}

    def _forget_addresses(self) -> None:
        """The upstream may have moved: the next attempt asks the DNS, not what it said before."""
        for session in self._sessions.values():
            if isinstance(session.connector, aiohttp.TCPConnector):
                session.connector.clear_dns_cache()

    def _connected(self, fresh: bool) -> aiohttp.ClientSession:
        """The session, made on first use because it belongs to the running event loop. Those that
        died in the pool may be many: with `fresh` none of it is used."""
        session = self._sessions.get(fresh)
        if session is None:
            keeping: dict[str, Any] = {"keepalive_timeout": _KEEPALIVE_SECONDS}
            session = self._new_session(**({"force_close": True} if fresh else keeping))
            self._sessions[fresh] = session
        return session

    def _new_session(self, **connections: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # limit 0 is none: the upstream's slots bound the connections.
            connector=_Connector(limit=0, **connections),
            cookie_jar=aiohttp.DummyCookieJar(),  # one tenant's cookies never reach another
            timeout=aiohttp.ClientTimeout(total=None, connect=self.upstream.timeouts.connect),
            trust_env=False,
            headers={"User-Agent": "tokenwire"},
            max_field_size=64 * 1024,
        )


class Answer:
    """One upstream stream being read."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        decoder: StreamDecoder,
        limits: Limits,
        text_until: float,
        idle: float,
        now: Callable[[], float],
        alarm: Alarm,
        early: bytes = b"",
    ) -> None:
        self._response = response
        self._early = early  # read already
        self._events = sse.Decoder(limits.upstream_event_bytes)
        self._decoder = decoder
        self._limit = limits.upstream_answer_bytes
        self._size = 0  # of what came since the last delta: a stream as such has no bound
        self._now = now
        self._idle = idle
        self._silent_at = text_until  # when silence becomes a fault
        self._begun = False  # a first piece of text has come: a role alone may come for ever
        self._alarm = alarm
        self.pieces = 0  # of text and calls in what was read last, as the upstream sent them
        self._fault: UpstreamFault | None = None  # met behind events that were still good
        self._gap = 0.0  # seconds from one piece to the next, lately; 0 while nobody knows
        self._piece_at: float | None = None  # when the last one came
        self._rests = 0.0  # seconds that the next rest takes
        self._paused: asyncio.Transport | None = None  # until it is over

    @property
    def usage(self) -> chat_pb2.Usage | None:
        """The last usage the upstream sent."""
        return self._decoder.usage

    async def read(self, wake_at: float) -> list[chat_service_pb2.StreamChatResponse] | None:
        """What arrives next: None at the end, an empty list at `wake_at` if nothing did."""
        if self._fault is not None:
            raise self._fault
        self.pieces = 0
        while not self._decoder.done:
            silent_at = self._silent_at
            until, patience = (wake_at, 0.0) if wake_at < silent_at else (silent_at, TURN)
            try:
                chunk, self._early = self._early, b""
                if not chunk:
                    with self._alarm.until(until, patience):
                        chunk = await self._response.content.read(_READ_BYTES)
            except TimeoutError:
                if patience:
                    what = f"silent for {self._idle:g} s" if self._begun else "no text in time"
                    timer = "idle" if self._begun else "first_byte"
                    raise UpstreamFault(Fault.TIMEOUT, what, facts={TIMER: timer}) from None
                return []
            if not chunk:
                break
            try:
                events = self._events.feed(chunk)
            except sse.EventTooLarge as error:
                events = error.events
                self._fault = UpstreamFault(Fault.PROTOCOL, str(error))
            decoded: list[chat_service_pb2.StreamChatResponse] = []
            try:
                self.pieces += self._decoder.feed_all(events, decoded)
            except UpstreamFault as fault:
                self._fault = fault
            self._begun = self._begun or any(each.HasField("delta") for each in decoded)
            # Events without data, and Anthropic's pings, only keep the connection alive.
            if self._begun and (
                self.pieces or any(e.data.strip() and e.type != "ping" for e in events)
            ):
                self._silent_at = self._now() + self._idle
            if decoded:
                self._size = 0
                if self.pieces:
                    self._note_pace()
                return decoded
            if self._fault is not None:
                raise self._fault
            self._size += len(chunk)
            if self._size > self._limit:
                raise UpstreamFault(
                    Fault.PROTOCOL, f"more than {self._limit} bytes without any text"
                )
        return None

    def _note_pace(self) -> None:
        now = self._now()
        if self._piece_at is not None:
            gap = (now - self._piece_at) / self.pieces
            self._gap += (gap - self._gap) * (_NEWEST if self._gap else 1.0)
        self._piece_at = now

    def pause(self, seconds: float) -> None:
        """Reads nothing from here on until `rest` is over: what arrives stays in the kernel, and
        wakes nobody. Called before what was read is written: else the next read would bring what
        came meanwhile, alone and stale. A stream so slow that not every other rest would gather a
        second piece goes on at once: it would only be later, and the loop have one timer more."""
        if self._gap >= 2 * seconds:
            return
        connection = self._response.connection
        protocol = None if connection is None else connection.protocol
        if protocol is None:
            return  # all of it is here
        self._rests = seconds
        # Not protocol.pause_reading: its parser would stop within what arrives next, and take a
        # whole answer for one cut off if the connection closes behind it.
        transport = protocol.transport
        # Where it does not read, more has arrived already than is read at once.
        if transport is not None and transport.is_reading():
            transport.pause_reading()
            self._paused = transport

    async def rest(self) -> None:
        """For as long as `pause` said, if it did."""
        try:
            if self._rests:
                await asyncio.sleep(self._rests)
        finally:
            if self._paused is not None and not self._paused.is_closing():
                self._paused.resume_reading()
                if self._begun:  # nobody has listened, for as long as the write took
                    self._silent_at = max(self._silent_at, self._now() + self._idle)
            self._rests, self._paused = 0.0, None

    def finish(self) -> list[chat_service_pb2.StreamChatResponse]:
        """The finishes and the trailer. Raises UpstreamFault without proof of completion."""
        return self._decoder.finish(self._events.error_field)

    async def drain(self) -> None:
        """Reads what little follows [DONE], so that the connection can serve again."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while await self._response.content.readany():
                    pass


def _remaining(response: aiohttp.ClientResponse, dimension: str) -> int | None:
    """What the provider says is left of its window; None if it does not."""
    text = response.headers.get(f"x-ratelimit-remaining-{dimension}", "")
    return int(text[:12]) if text.isascii() and text.isdigit() else None


def _refused_by_proxy(status: int) -> UpstreamFault:
    """No fault of the upstream or a key, neither of which was reached."""
    return UpstreamFault(Fault.UNREACHABLE, f"the proxy answered {status}")


def _kind(error: BaseException) -> str:
    """The error's class and number: its text may quote addresses and header bytes."""
    number = getattr(error, "errno", None)
    return f"{type(error).__name__}, errno {number}" if number else type(error).__name__
