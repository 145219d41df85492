"""Time: the caller's deadline, the server's maximum, and the timers of one request upstream."""

from __future__ import annotations

import asyncio
import math
import socket

import grpc
import pytest
from aiohttp import web

from harness import (
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    item_failure,
    provider,
    receive,
    request,
    simulate,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.config import Limits, Retries, Timeouts, UpstreamTimeouts
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.interceptors import CallContext
from tokenwire_service.keyring import KeyRing, Lease
from tokenwire_service.simulator import Simulator
from tokenwire_service.upstream.client import Progress, UpstreamClient
from tokenwire_service.upstream.dialect import Route
from tokenwire_service.upstream.dialects import chooser

Simulated = tuple[Simulator, str]
QUICK = Retries(backoff=0.001, backoff_cap=0.001)

# (method, fault, whether text has been delivered when the time is over)
MOMENTS = [
    ("Chat", "stall_before_headers", False),
    ("Chat", "stall_after_headers", False),
    ("Chat", "stall_midway", False),
    ("StreamChat", "stall_before_headers", False),
    ("StreamChat", "stall_after_headers", False),
    ("StreamChat", "stall_midway", True),
]


def begin(gateway: Stubs, method: str, fault: str, timeout: float | None = None) -> object:
    """A call that meets the fault."""
    chat = request("Tell me a story", extra_body_json=simulate(fault=fault))
    if method == "Chat":
        return gateway.chat.Chat(chat, timeout=timeout)
    return gateway.chat.StreamChat(stream_request(chat), timeout=timeout)


async def nothing_open(simulator: Simulator) -> None:
    """Every request that reached the upstream (on a busy machine it may be too late for that)
    was given up."""
    await until(lambda: simulator.stats.open_requests == 0)
    assert simulator.stats.aborted_requests == simulator.stats.requests


@pytest.mark.parametrize(("method", "fault", "delivered"), MOMENTS)
async def test_the_callers_deadline_ends_the_upstream_request(
    start: Start, simulator: Simulated, method: str, fault: str, delivered: bool
) -> None:
    gateway = await start(upstream(simulator[1]))
    stats = simulator[0].stats
    call = begin(gateway, method, fault, timeout=1.0)
    ending = asyncio.ensure_future(failing(call))
    await until(lambda: stats.open_requests == 1)
    failure = await ending
    assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: stats.open_requests == 0)
    assert (stats.requests, stats.aborted_requests) == (1, 1)
    await until(lambda: len(gateway.events.calls) == 1)
    # The caller resets the stream at its deadline, which may come before the gateway's own timer.
    assert gateway.events.calls[0].code in ("DEADLINE_EXCEEDED", "CANCELLED")


async def test_a_caller_that_leaves_at_its_deadline_is_logged_as_such(
    start: Start, simulator: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter([20.0])  # when the call begins; hardly anything when it ends
    monkeypatch.setattr(CallContext, "time_remaining", lambda self: next(remaining, 0.01))
    gateway = await start(upstream(simulator[1]))
    call = gateway.chat.Chat(request(extra_body_json=simulate(fault="stall_before_headers")))
    await until(lambda: simulator[0].stats.open_requests == 1)
    call.cancel()
    await until(lambda: len(gateway.events.calls) == 1)
    assert gateway.events.calls[0].code == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(("method", "fault", "delivered"), MOMENTS)
async def test_a_deadline_that_the_gateway_notices_first_has_details(
    start: Start,
    simulator: Simulated,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    fault: str,
    delivered: bool,
) -> None:
    monkeypatch.setattr(CallContext, "time_remaining", lambda self: 0.8)
    gateway = await start(upstream(simulator[1]))
    failure = await failing(begin(gateway, method, fault, timeout=20))
    assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert failure.reason == "DEADLINE_EXCEEDED"
    assert failure.metadata["attempts"] == "1"
    assert failure.pushback == "-1"
    await nothing_open(simulator[0])


@pytest.mark.parametrize(("method", "fault", "delivered"), MOMENTS)
@pytest.mark.parametrize("callers", [None, 20.0], ids=["no deadline", "a later deadline"])
async def test_without_a_sooner_deadline_the_servers_maximum_ends_a_call(
    start: Start,
    simulator: Simulated,
    method: str,
    fault: str,
    delivered: bool,
    callers: float | None,
) -> None:
    gateway = await start(upstream(simulator[1]), timeouts=Timeouts(total=0.8))
    failure = await failing(begin(gateway, method, fault, timeout=callers))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.reason == ("UPSTREAM_STREAM_INTERRUPTED" if delivered else "UPSTREAM_TIMEOUT")
    assert "0.8 s" in failure.message
    assert failure.pushback == "-1"
    await nothing_open(simulator[0])
    assert simulator[0].stats.requests <= 1


async def test_what_was_delivered_before_the_maximum_is_kept(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("a beginning"))
        await asyncio.Event().wait()
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), timeouts=Timeouts(total=1.5))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.text == "a beginning"
    assert received.kinds == ["header", "delta"]
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"


async def test_each_item_of_a_batch_has_the_servers_maximum_for_itself(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]), timeouts=Timeouts(total=1.0))
    wanted = chat_service_pb2.BatchChatRequest(max_concurrency=1)
    for fault in ("stall_before_headers", "stall_midway", "slow"):
        wanted.items.add(chat=request(extra_body_json=simulate(fault=fault, tokens=1)))
    answers = {answer.index: answer async for answer in gateway.chat.BatchChat(wanted)}
    assert item_failure(answers[0]).reason == "UPSTREAM_TIMEOUT"
    assert item_failure(answers[1]).reason == "UPSTREAM_TIMEOUT"
    assert answers[2].WhichOneof("result") == "response"


@pytest.mark.parametrize(
    ("method", "fault"), [(method, fault) for method, fault, delivered in MOMENTS if not delivered]
)
async def test_an_upstream_silent_before_any_text_is_asked_once_more(
    start: Start, simulator: Simulated, method: str, fault: str
) -> None:
    timeouts = UpstreamTimeouts(first_byte=0.3, idle=0.3)
    gateway = await start(upstream(simulator[1], timeouts=timeouts), retries=QUICK)
    failure = await failing(begin(gateway, method, fault, timeout=20))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.reason == "UPSTREAM_TIMEOUT"
    assert failure.metadata["attempts"] == "2"
    assert failure.pushback == "-1"
    await nothing_open(simulator[0])
    assert simulator[0].stats.requests <= 2
    assert {a.fault for a in gateway.events.attempts} == {"timeout"}


async def test_the_first_text_has_its_time_from_the_request_on(start: Start) -> None:
    """Not once more from the head of the answer, however late that came."""

    async def late(asked: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1.2)
        response = await event_stream(asked)
        await asyncio.sleep(1.2)
        await response.write(chunk("late", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(late) as served:
        there = upstream(served.base_url, timeouts=UpstreamTimeouts(first_byte=2.0))
        gateway = await start(there, retries=Retries(max_attempts=1))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_TIMEOUT"
    assert received.failure.metadata["timer"] == "first_byte"
    assert received.events == []


async def test_an_upstream_silent_within_its_text_is_never_asked_again(
    start: Start, simulator: Simulated
) -> None:
    timeouts = UpstreamTimeouts(first_byte=5, idle=0.3)
    gateway = await start(upstream(simulator[1], timeouts=timeouts), retries=QUICK)
    received = await receive(begin(gateway, "StreamChat", "stall_midway", timeout=20))
    assert received.text != ""
    assert received.failure is not None
    assert received.failure.code is grpc.StatusCode.UNAVAILABLE
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    assert received.failure.metadata["attempts"] == "1"
    assert received.failure.pushback == "-1"
    await until(lambda: simulator[0].stats.aborted_streams == 1)
    assert simulator[0].stats.requests == 1


@pytest.mark.parametrize("filler", [b": keep-alive\n\n", b"\n\n", b"data:\n\n"])
async def test_comments_and_blank_lines_are_no_progress(start: Start, filler: bytes) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("a beginning"))
        while True:
            await response.write(filler)
            await asyncio.sleep(0.02)

    async with provider(answer) as served:
        timeouts = UpstreamTimeouts(first_byte=5, idle=0.2)
        gateway = await start(upstream(served.base_url, timeouts=timeouts))
        received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=5))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"


async def test_events_keep_a_slow_stream_alive(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for _ in range(8):
            await response.write(chunk("x"))
            await asyncio.sleep(0.05)
        await response.write(b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        timeouts = UpstreamTimeouts(first_byte=0.3, idle=0.3)
        gateway = await start(upstream(served.base_url, timeouts=timeouts))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is None
    assert received.text == "x" * 8


async def test_white_space_keeps_a_plain_answer_alive(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(asked)
        for _ in range(8):
            await response.write(b"  \n")
            await asyncio.sleep(0.05)
        await response.write(completion("at last").body)  # type: ignore[arg-type]
        return response

    async with provider(answer) as served:
        timeouts = UpstreamTimeouts(first_byte=0.3, idle=0.3)
        gateway = await start(upstream(served.base_url, timeouts=timeouts))
        whole = await gateway.chat.Chat(request())
    assert whole.choices[0].message.content == "at last"


async def test_a_connection_that_nobody_accepts_is_unreachable(start: Start) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:  # beyond the backlog the kernel lets a connect wait
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            timeouts = UpstreamTimeouts(connect=0.1)
            gateway = await start(
                upstream(f"http://127.0.0.1:{port}/v1", timeouts=timeouts),
                retries=Retries(max_attempts=2, backoff=0.001, backoff_cap=0.001),
            )
            failure = await failing(gateway.chat.Chat(request()))
        finally:
            for filler in fillers:
                filler.close()
    assert failure.reason == "UPSTREAM_UNREACHABLE"
    assert failure.metadata["attempts"] == "2"


async def test_a_wait_beyond_the_deadline_is_not_begun(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=simulate(fault="overloaded", retry_after_s=30))
    failure = await failing(gateway.chat.Chat(chat, timeout=20))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.reason == "UPSTREAM_OVERLOADED"
    assert failure.retry_seconds == 30
    assert failure.pushback == "30000"
    assert simulator[0].stats.requests == 1


async def test_a_deadline_of_a_millisecond_leaves_nothing_behind(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    calls = [gateway.chat.Chat(request(), timeout=0.001 * (n % 5)) for n in range(30)]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, grpc.aio.AioRpcError):
            assert outcome.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            assert isinstance(outcome, chat_service_pb2.ChatResponse)
    assert (await gateway.chat.Chat(request())).choices[0].message.content != ""


async def test_the_silence_timer_does_not_depend_on_the_clock_having_moved(
    simulator: Simulated,
) -> None:
    """A loop's timers may run a moment before the clock says so; that is no beat of the heart."""
    wanted = upstream(simulator[1], timeouts=UpstreamTimeouts(first_byte=0.05))
    client = UpstreamClient(wanted, chooser(), Limits(), now=lambda: 0.0)
    ring = KeyRing(wanted)
    lease = ring.lease("m", 0.0)
    assert isinstance(lease, Lease)
    chat = request(extra_body_json=simulate(fault="stall_after_headers"))
    try:
        route = Route(wanted, None, "m")
        encoded = client.dialect(route).encode(chat, route, stream=True)
        with pytest.raises(UpstreamFault) as caught:
            async with client.open(encoded, lease, Progress()) as opened:
                await opened.read(math.inf)
        assert caught.value.fault is Fault.TIMEOUT
    finally:
        await client.close()
