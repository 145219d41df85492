"""HTTP/2 that no gRPC client speaks: whoever sends it, the others are served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import h2.config
import h2.connection
import h2.exceptions
import pytest

from harness import request, until
from processes import Program, serve

PATH = b"/tokenwire.v1.ChatService/Chat"
_SECONDS = 20.0  # for what a busy machine needs


@dataclass
class Peer:
    """One raw connection to the gateway."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h2.connection.H2Connection

    async def flush(self) -> None:
        """Sends what is due. A gateway that has closed the connection is one of the outcomes."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(self.http.data_to_send())
            await self.writer.drain()

    def open(self, *more: tuple[bytes, bytes], end: bool = False, **pseudo: bytes) -> int:
        """The head of a request on a new stream."""
        head = {b":method": b"POST", b":scheme": b"http", b":path": PATH, b":authority": b"x"}
        head |= {b":" + name.encode(): value for name, value in pseudo.items()}
        headers = [*head.items(), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
        replaced = {name for name, _ in more}
        headers = [each for each in headers if each[0] not in replaced]
        stream: int = self.http.get_next_available_stream_id()
        self.http.send_headers(stream, [*headers, *more], end_stream=end)
        return stream

    async def answered(self) -> bytes:
        """What the gateway sends within a moment."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.3):
                return await self.reader.read(65536)
        return b""


@asynccontextmanager
async def peer(gateway: Program) -> AsyncIterator[Peer]:
    """A connection whose preface and settings are sent. It checks nothing of what it is told to
    send."""
    serving = gateway.event("serving")
    assert serving is not None
    host, _, port = serving["address"].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    config = h2.config.H2Configuration(
        validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
    )
    connection = Peer(reader, writer, h2.connection.H2Connection(config))
    connection.http.initiate_connection()
    await connection.flush()
    try:
        yield connection
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
async def gateway() -> AsyncIterator[Program]:
    """A process of its own: what ends it must not end the tests."""
    async with serve() as started:
        yield started
        assert started.process.returncode is None, started.lines[-5:]


async def assert_serves(gateway: Program) -> None:
    async with asyncio.timeout(_SECONDS):
        answer = await gateway.chat.Chat(request(), timeout=_SECONDS)
    assert answer.choices


def a_get(raw: Peer) -> None:
    raw.open(method=b"GET", end=True)


def another_content_type(raw: Peer) -> None:
    raw.open((b"content-type", b"text/html"), end=True)


def no_content_type(raw: Peer) -> None:
    raw.open((b"content-type", b""), end=True)


def an_unknown_method(raw: Peer) -> None:
    raw.open(path=b"/tokenwire.v1.ChatService/Guess", end=True)


def no_path(raw: Peer) -> None:
    raw.open(path=b"", end=True)


def a_message_cut_short(raw: Peer) -> None:
    raw.http.send_data(raw.open(), b"\x00\x00\x00\x10\x00short", end_stream=True)


def a_length_beyond_all_limits(raw: Peer) -> None:
    raw.http.send_data(raw.open(), b"\x00\xff\xff\xff\xff", end_stream=True)


def a_compressed_message_that_is_none(raw: Peer) -> None:
    stream = raw.open((b"grpc-encoding", b"gzip"))
    raw.http.send_data(stream, b"\x01\x00\x00\x00\x04oops", end_stream=True)


def a_timeout_that_is_none(raw: Peer) -> None:
    raw.open((b"grpc-timeout", b"soon"), end=True)


def ten_thousand_headers(raw: Peer) -> None:
    raw.open(*((f"x-{i}".encode(), b"v") for i in range(10_000)), end=True)


def a_header_with_control_characters(raw: Peer) -> None:
    raw.open((b"x-odd", b"a\x00b\r\nc"), end=True)


def a_thousand_streams_opened_and_reset(raw: Peer) -> None:
    for _ in range(1000):
        with contextlib.suppress(h2.exceptions.TooManyStreamsError):
            raw.http.reset_stream(raw.open())


def a_thousand_pings(raw: Peer) -> None:
    for i in range(1000):
        raw.http.ping(i.to_bytes(8, "big"))


def frames_of_no_kind(raw: Peer) -> None:
    raw.writer.write(b"\x00\x00\x04\xfe\x00\x00\x00\x00\x00huh?" * 100)


def noise(raw: Peer) -> None:
    raw.writer.write(bytes(range(256)) * 64)


SENT: tuple[Callable[[Peer], None], ...] = (
    a_get,
    another_content_type,
    no_content_type,
    an_unknown_method,
    no_path,
    a_message_cut_short,
    a_length_beyond_all_limits,
    a_compressed_message_that_is_none,
    a_timeout_that_is_none,
    ten_thousand_headers,
    a_header_with_control_characters,
    a_thousand_streams_opened_and_reset,
    a_thousand_pings,
    frames_of_no_kind,
    noise,
)


async def test_f18_what_no_grpc_client_sends_costs_others_nothing(gateway: Program) -> None:
    for send in SENT:
        async with peer(gateway) as raw:
            send(raw)
            await raw.flush()
            await raw.answered()
            await assert_serves(gateway)
        await assert_serves(gateway)
    assert not [line for line in gateway.lines if "Traceback" in line]


async def test_f18_connections_that_say_nothing_cost_others_nothing(
    gateway: Program, request: pytest.FixtureRequest
) -> None:
    """Half-open requests: a head and no message, held while others call."""
    streams = 100
    connections = 100 if request.config.getoption("--long") else 10
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(connections):
            raw = await stack.enter_async_context(peer(gateway))
            for _ in range(streams):
                raw.open()
            await raw.flush()
        await assert_serves(gateway)
    await assert_serves(gateway)


async def test_f18_a_byte_that_ends_the_server_ends_the_process_too() -> None:
    """A path that is not UTF-8 stops gRPC's accept loop (seen with grpcio 1.85): a gateway that
    hears nobody any more must not look alive, or no supervisor restarts it."""
    async with serve() as gateway:
        async with peer(gateway) as raw:
            raw.open(path=PATH + b"\xff", end=True)
            await raw.flush()
            await raw.answered()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                await gateway.process.wait()
        if gateway.process.returncode is None:
            await assert_serves(gateway)
        else:
            assert gateway.process.returncode == 1
            await until(lambda: any("ended by itself" in line for line in gateway.lines))
