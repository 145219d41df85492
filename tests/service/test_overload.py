"""An event loop that is late: streams rest and send fuller messages, new calls are refused."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

from harness import (
    Failure,
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    failure_of,
    provider,
    raw_provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.backlog import CALM
from tokenwire_service.config import Limits, UpstreamTimeouts
from tokenwire_service.keyring import KeyRing, Lease
from tokenwire_service.looplag import LoopLag
from tokenwire_service.upstream.client import Answer, Progress, UpstreamClient
from tokenwire_service.upstream.dialect import Route
from tokenwire_service.upstream.dialects import chooser

TEXTS = [f"{number} " for number in range(200)]


def held(gateway: Stubs, *, hold: float = 0.0, seconds: float = 0.0) -> LoopLag:
    """As if the loop of this gateway were so late, from now on."""
    lag = gateway.running.gateway.lag
    lag.close()
    lag.hold, lag.seconds = hold, seconds
    return lag


async def paced(asked: web.Request) -> web.StreamResponse:
    """A piece in each millisecond or two."""
    response = await event_stream(asked)
    for text in TEXTS:
        await response.write(chunk(text))
        await asyncio.sleep(0.001)
    await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
    return response


async def test_streams_that_rest_say_the_same_in_fewer_messages(start: Start) -> None:
    async with provider(paced) as served:
        gateway = await start(upstream(served.base_url))
        held(gateway)
        brisk = await receive(gateway.chat.StreamChat(stream_request(request())))
        held(gateway, hold=0.1)
        rested = await receive(gateway.chat.StreamChat(stream_request(request())))
    for received in (brisk, rested):
        assert received.failure is None
        assert received.text == "".join(TEXTS)
        assert received.kinds[0] == "header"
        assert received.kinds[-2:] == ["finish", "trailer"]
    assert len(rested.deltas) < len(brisk.deltas) / 2


async def test_a_stream_that_rests_can_be_left(start: Start) -> None:
    async with provider(paced) as served:
        gateway = await start(upstream(served.base_url))
        held(gateway, hold=30.0)
        call = gateway.chat.StreamChat(stream_request(request()))
        await call.read()
        assert served.open == 1
        call.cancel()
        await until(lambda: served.open == 0)
        await until(lambda: gateway.running.leases == 0)


async def test_a_deadline_ends_a_stream_that_rests(start: Start) -> None:
    async with provider(paced) as served:
        gateway = await start(upstream(served.base_url))
        held(gateway, hold=30.0)
        received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=0.5))
        assert received.failure is not None
        assert received.failure.code.name == "DEADLINE_EXCEEDED"
        await until(lambda: served.open == 0)


@asynccontextmanager
async def reading(
    base_url: str, now: Callable[[], float] = time.monotonic, **settings: Any
) -> AsyncIterator[Answer]:
    """One stream of an upstream, as the gateway reads it."""
    wanted = upstream(base_url, **settings)
    client = UpstreamClient(wanted, chooser(), Limits(), now=now)
    lease = KeyRing(wanted).lease("m", 0.0)
    assert isinstance(lease, Lease)
    route = Route(wanted, None, "m")
    encoded = client.dialect(route).encode(request(), route, stream=True)
    try:
        async with client.open(encoded, lease, Progress()) as answer:
            yield answer
    finally:
        await client.close()


async def test_a_whole_answer_is_not_cut_off_by_its_connections_end_after_a_rest() -> None:
    """It comes with its end while its reader, which rested and found nothing yet, is busy."""
    rested = asyncio.Event()

    def piece(data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data)

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
        writer.write(b"Transfer-Encoding: chunked\r\n\r\n" + piece(chunk("one ")))
        await rested.wait()
        end = piece(chunk("", finish_reason="stop") + b"data: [DONE]\n\n") + piece(b"")
        writer.write(piece(chunk("two ")) + piece(chunk("three")) + end)

    async with raw_provider(answers) as served, reading(served.base_url) as answer:
        events = await answer.read(math.inf) or []
        answer.pause(0.01)
        await answer.rest()
        assert await answer.read(asyncio.get_running_loop().time()) == []
        rested.set()
        await until(lambda: served.ended == 1)
        await asyncio.sleep(0.1)
        while (more := await answer.read(math.inf)) is not None:
            events += more
        assert "".join(each.delta.content for each in events) == "one two three"
        assert answer.finish()


async def test_a_rest_gathers_what_comes_while_the_last_piece_is_written() -> None:
    """Else that would be read first, alone, and wait for the next rest to be followed."""
    asked_for: asyncio.Queue[str] = asyncio.Queue()
    written: list[str] = []

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        while text := await asked_for.get():
            await response.write(chunk(text))
            written.append(text)
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served, reading(served.base_url) as stream:
        for text in ("one ", "two "):
            asked_for.put_nowait(text)
            assert await stream.read(math.inf)
        stream.pause(0.05)
        for text in ("three ", "four"):
            asked_for.put_nowait(text)
            await until(lambda text=text: text in written)  # type: ignore[misc]
            await asyncio.sleep(0.02)  # time to be read, if anything read
        await stream.rest()
        events = await stream.read(math.inf) or []
        assert [each.delta.content for each in events] == ["three four"]
        asked_for.put_nowait("")
        assert await stream.read(math.inf) is None


async def test_a_caller_that_reads_slowly_does_not_make_its_upstream_look_silent() -> None:
    """While the loop is late nothing is read until the message is written."""
    asked_for: asyncio.Queue[str] = asyncio.Queue()
    timeouts = UpstreamTimeouts(idle=1.0)

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        while text := await asked_for.get():
            await response.write(chunk(text))
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with (
        provider(answer) as served,
        reading(served.base_url, timeouts=timeouts) as stream,
    ):
        for text in ("one ", "two "):
            asked_for.put_nowait(text)
            assert await stream.read(math.inf)
        stream.pause(0.01)
        await asyncio.sleep(1.2)  # until the message is written
        await stream.rest()
        asyncio.get_running_loop().call_later(0.2, asked_for.put_nowait, "three")
        events = await stream.read(math.inf) or []
        assert [each.delta.content for each in events] == ["three"]
        asked_for.put_nowait("")
        assert await stream.read(math.inf) is None


@pytest.mark.parametrize(("gap", "rests"), [(0.01, True), (0.3, False)])
async def test_a_stream_rests_only_where_a_rest_gathers_pieces(gap: float, rests: bool) -> None:
    """It would be later without being cheaper."""
    clock = [0.0]

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for text in TEXTS[:20]:
            await asked_for.get()
            await response.write(chunk(text))
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    asked_for: asyncio.Queue[None] = asyncio.Queue()
    async with provider(answer) as served, reading(served.base_url, lambda: clock[0]) as stream:
        for _ in range(10):
            asked_for.put_nowait(None)
            assert await stream.read(math.inf)
            clock[0] += gap
        stream.pause(0.1)
        rest = stream.rest()
        try:
            rest.send(None)
            rested = True  # it waits for something
        except StopIteration:
            rested = False
        rest.close()
        assert rested is rests


async def test_a_loop_that_is_very_late_takes_no_new_batch_and_goes_on_with_those_that_run(
    start: Start,
) -> None:
    go_on = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        await go_on.wait()
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(loop_lag=0.2))
        wanted = chat_service_pb2.BatchChatRequest(max_concurrency=1)
        for _ in range(3):
            wanted.items.add(chat=request())
        running = gateway.chat.BatchChat(wanted)
        await until(lambda: served.open == 1)
        held(gateway, seconds=0.3)
        failure = await failing(gateway.chat.BatchChat(wanted))
        assert failure.reason == "GATEWAY_OVERLOADED"
        go_on.set()
        assert [each.WhichOneof("result") async for each in running] == ["response"] * 3
        assert len(served.asked) == 3


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_a_loop_that_is_very_late_takes_no_new_calls_and_asks_no_upstream(
    start: Start, method: str
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return await paced(asked) if (await asked.json()).get("stream") else completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(loop_lag=0.2))
        running = asyncio.ensure_future(receive(gateway.chat.StreamChat(stream_request(request()))))
        await until(lambda: served.open == 1)
        lag = held(gateway, seconds=0.3)
        call = (
            gateway.chat.Chat(request())
            if method == "Chat"
            else gateway.chat.StreamChat(stream_request(request()))
        )
        failure = await failing(call)
        assert failure.code.name == "UNAVAILABLE"
        assert failure.reason == "GATEWAY_OVERLOADED"
        assert "300 ms late" in failure.message
        assert failure.retry_seconds > 0
        assert int(failure.pushback) > 0
        assert len(served.asked) == 1
        assert gateway.running.gateway.refused_late == 1
        goes_on = await running
        assert goes_on.failure is None
        assert goes_on.text == "".join(TEXTS)
        lag.seconds = 0.1
        assert (await gateway.chat.Chat(request())).choices


# --- more calls than can begin -----------------------------------------------------------


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_calls_that_come_faster_than_they_begin_are_refused_before_any_upstream_is_asked(
    start: Start, method: str
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return await paced(asked) if (await asked.json()).get("stream") else completion()

    async with provider(answer) as served:
        gateway = await start(
            upstream(served.base_url), limits=Limits(pending=1000, in_flight=10_000, loop_lag=60.0)
        )
        backlog = gateway.running.boundary.backlog
        assert backlog is not None
        backlog.ran = time.monotonic  # whoever else uses this processor
        calls: list[Any] = [
            gateway.chat.Chat(request())
            if method == "Chat"
            else gateway.chat.StreamChat(stream_request(request()))
            for _ in range(900)
        ]
        asked = health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest())
        outcomes = await asyncio.gather(*map(outcome, calls))
        assert (await asked).status == health_pb2.HealthCheckResponse.SERVING
        refused = [each for each in outcomes if each is not None]
        assert 0 < len(refused) < len(calls)
        for failure in refused:
            assert failure.code.name == "UNAVAILABLE"
            assert failure.reason == "GATEWAY_OVERLOADED"
            assert failure.retry_seconds > 0
            assert int(failure.pushback) > 0
            assert failure.trailers["x-request-id"] == failure.metadata["requestId"]
        assert backlog.refused == len(refused)
        assert len(served.asked) == len(calls) - len(refused)
        ended = [call for call in gateway.events.calls if call.method.endswith(method)]
        assert len(ended) == len(calls)
        assert sum(call.reason == "GATEWAY_OVERLOADED" for call in ended) == len(refused)
        assert (await gateway.chat.Chat(request())).choices
        await until(lambda: backlog.waiting == 0)


async def outcome(call: Any) -> Failure | None:
    """Why it failed; None where it did not."""
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            assert (await call).choices
        else:
            assert [event async for event in call][-1].HasField("trailer")
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    return None


# Calls that give up before they begin, then more than may wait; says what became of each, and ends
# when the others have ended, too.
_CALLERS = """
import sys, time
import grpc
channel = grpc.insecure_channel(sys.argv[1])
grpc.channel_ready_future(channel).result()
chat = channel.unary_unary("/tokenwire.v1.ChatService/Chat")
print("ready", flush=True)
packed = bytes.fromhex(sys.stdin.readline())
given_up = [chat.future(packed, timeout=0.05) for _ in range(50)]
more = [chat.future(packed) for _ in range(600)]
print(*{call.code().name for call in given_up}, flush=True)
time.sleep(0.3)
print(*[call.code().name for call in more if call.done()], flush=True)
for call in more:
    call.code()
"""


async def test_calls_that_end_before_they_begin_get_nobody_refused(start: Start) -> None:
    """Callers that give up, calls that gRPC cuts off, and those whose message never comes: gRPC
    goes on counting some of them."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(pending=200))
        backlog = gateway.running.boundary.backlog
        assert backlog is not None
        callers = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CALLERS, gateway.running.address),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert callers.stdin is not None
        assert callers.stdout is not None
        try:
            assert await callers.stdout.readline() == b"ready\n"
            callers.stdin.write(request().SerializeToString().hex().encode() + b"\n")
            time.sleep(1)  # the loop, and with it the gateway, does not run
            assert await callers.stdout.readline() == b"DEADLINE_EXCEEDED\n"
            cut_off = (await callers.stdout.readline()).split()
            assert len(cut_off) > 300
            assert set(cut_off) == {b"CANCELLED"}
            open_ended: Any = gateway.channel.stream_unary("/tokenwire.v1.ChatService/Chat")()
            await callers.wait()
            before = backlog.refused
            held(gateway)  # in time, and at leisure, whoever else uses this processor
            backlog.ran = backlog.wanted = float
            await asyncio.sleep(CALM + 0.2)  # until the overload is over
            for _ in range(10):
                await asyncio.sleep(0.05)
                assert (await gateway.chat.Chat(request())).choices
            burst = await asyncio.gather(*(gateway.chat.Chat(request()) for _ in range(50)))
            assert all(each.choices for each in burst)
            assert backlog.refused == before
            assert backlog.waiting == 0
            open_ended.cancel()
            await until(lambda: backlog.running == 0)
        finally:
            if callers.returncode is None:
                callers.kill()
                await callers.wait()
