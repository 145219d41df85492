"""Cancel: whenever a caller leaves, the upstream request ends and the key's lease comes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from aiohttp import web

from harness import (
    Provider,
    Start,
    Stubs,
    chunk,
    event_stream,
    provider,
    receive,
    request,
    simulate,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.config import Retries, Timeouts
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
PIECE = "x" * 60_000


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> object:
    """A caller that leaves is no defect: nothing is logged as an error, by nobody."""
    yield
    loud = [r for when in ("call", "teardown") for r in caplog.get_records(when)]
    assert [r.getMessage() for r in loud if r.levelno >= logging.ERROR] == []


@asynccontextmanager
async def endless() -> AsyncIterator[Provider]:
    """An upstream whose stream never ends, as fast as it is read."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        while True:
            await response.write(chunk(PIECE))

    async with provider(answer) as served:
        yield served


async def cancelled(gateway: Stubs) -> None:
    """Waits until the gateway has noticed, and says so."""
    await until(lambda: len(gateway.events.calls) == 1)
    assert gateway.events.calls[0].code == "CANCELLED"
    await until(lambda: gateway.running.leases == 0)
    assert gateway.running.connections_busy == 0


@pytest.mark.parametrize("fault", ["stall_before_headers", "stall_after_headers", "stall_midway"])
@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_a_cancel_closes_the_upstream_request(
    start: Start, simulator: Simulated, method: str, fault: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    stats = simulator[0].stats
    chat = request("Tell me a story", extra_body_json=simulate(fault=fault))
    if method == "Chat":
        call = gateway.chat.Chat(chat)
    else:
        call = gateway.chat.StreamChat(stream_request(chat))
        if fault == "stall_midway":
            await call.read()  # the header, which comes with the first text
            assert (await call.read()).delta.content != ""
    await until(lambda: stats.open_requests == 1)
    assert gateway.running.leases == 1
    call.cancel()
    await until(lambda: stats.open_requests == 0)
    assert (stats.requests, stats.aborted_requests) == (1, 1)
    await cancelled(gateway)


async def test_a_caller_whose_connection_breaks_has_cancelled(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    stats = simulator[0].stats
    chat = request("Tell me a story", extra_body_json=simulate(fault="stall_midway"))
    reading = asyncio.ensure_future(receive(gateway.chat.StreamChat(stream_request(chat))))
    await until(lambda: stats.open_streams == 1)
    await gateway.channel.close()
    await until(lambda: stats.aborted_streams == 1)
    await asyncio.gather(reading, return_exceptions=True)
    await cancelled(gateway)


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_a_cancel_ends_the_wait_for_a_cooling_key(
    start: Start, simulator: Simulated, method: str
) -> None:
    gateway = await start(upstream(simulator[1], keys=1))
    stats = simulator[0].stats
    chat = request(extra_body_json=simulate(fault="rate_limited", retry_after_s=60))
    call = (
        gateway.chat.Chat(chat)
        if method == "Chat"
        else gateway.chat.StreamChat(stream_request(chat))
    )
    await until(lambda: len(gateway.events.attempts) == 1)
    call.cancel()
    await cancelled(gateway)
    assert stats.requests == 1
    assert gateway.running.gateway.in_flight == 0


async def test_a_cancel_ends_the_wait_between_two_attempts(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1], keys=1), retries=Retries())
    chat = request(extra_body_json=simulate(fault="overloaded", retry_after_s=60))
    call = gateway.chat.Chat(chat)
    await until(lambda: len(gateway.events.attempts) == 1)
    call.cancel()
    await cancelled(gateway)
    assert simulator[0].stats.requests == 1


@pytest.mark.parametrize(
    "mode", [chat_service_pb2.STREAM_MODE_DELTA, chat_service_pb2.STREAM_MODE_CUMULATIVE]
)
async def test_a_caller_that_does_not_read_stops_the_upstream_and_may_cancel(
    start: Start, mode: chat_service_pb2.StreamMode.ValueType
) -> None:
    async with endless() as served:
        gateway = await start(upstream(served.base_url))
        call = gateway.chat.StreamChat(stream_request(request(), mode=mode))
        await call.read()
        # What comes from the upstream in between is in the windows of two connections; the
        # gateway itself holds one read and one message.
        await asyncio.sleep(0.3)
        assert served.open == 1
        call.cancel()
        await until(lambda: served.open == 0)
        await cancelled(gateway)


async def test_what_a_caller_does_not_read_is_not_fetched(start: Start) -> None:
    written = 0

    async def answer(asked: web.Request) -> web.StreamResponse:
        nonlocal written
        response = await event_stream(asked)
        while True:
            await response.write(chunk(PIECE))
            written += len(PIECE)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        call = gateway.chat.StreamChat(stream_request(request()))
        await call.read()
        before = -1
        while before != written:  # until the upstream is blocked
            before = written
            await asyncio.sleep(0.15)
        assert written < 64 << 20
        call.cancel()
        await until(lambda: served.open == 0)


@pytest.mark.parametrize(
    "mode", [chat_service_pb2.STREAM_MODE_DELTA, chat_service_pb2.STREAM_MODE_CUMULATIVE]
)
async def test_a_caller_that_does_not_read_hears_of_the_servers_maximum_when_it_does(
    start: Start, mode: chat_service_pb2.StreamMode.ValueType
) -> None:
    async with endless() as served:
        gateway = await start(upstream(served.base_url), timeouts=Timeouts(total=1.5))
        call = gateway.chat.StreamChat(stream_request(request(), mode=mode))
        events = aiter(call)
        await anext(events)
        await until(lambda: served.ended == 1)  # though nobody reads
        assert gateway.running.leases == 0
        assert gateway.running.gateway.in_flight == 0
        received = await receive(call)
    assert received.failure is not None
    assert received.failure.code is grpc.StatusCode.UNAVAILABLE
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    assert [call.code for call in gateway.events.calls] == ["UNAVAILABLE"]


async def test_one_caller_that_does_not_read_holds_nobody_else_up(
    start: Start, simulator: Simulated
) -> None:
    async with endless() as served:
        gateway = await start(upstream(served.base_url))
        stuck = gateway.chat.StreamChat(stream_request(request()))
        await stuck.read()
        await asyncio.sleep(0.1)
        other = gateway.chat.StreamChat(stream_request(request()))
        for _ in range(20):
            assert (await other.read()).WhichOneof("event") in ("header", "delta")
        other.cancel()
        stuck.cancel()
        await until(lambda: served.open == 0)


async def test_a_cancel_at_any_moment_leaves_nothing_behind(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    stats = simulator[0].stats
    pace = simulate(tokens=200, tokens_per_second=2000)

    async def one(number: int) -> None:
        chat = request("Tell me a story", extra_body_json=pace)
        if number % 2:
            call = gateway.chat.Chat(chat)
            task = asyncio.ensure_future(asyncio.wait_for(call, 10))
        else:
            call = gateway.chat.StreamChat(stream_request(chat))
            task = asyncio.ensure_future(receive(call))
        await asyncio.sleep(number * 0.002)
        call.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*map(one, range(100)))
    await until(lambda: stats.open_requests == 0)
    await until(lambda: gateway.running.gateway.in_flight == 0)
    assert gateway.running.leases == 0
    assert gateway.running.connections_busy == 0
    assert {call.code for call in gateway.events.calls} <= {"OK", "CANCELLED"}
    whole = await gateway.chat.Chat(request())
    assert whole.choices[0].message.content != ""
