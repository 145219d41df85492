"""What a review under faults found: waiters nobody woke, parts taken for the whole."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import grpc
import pytest
from aiohttp import web

from harness import (
    Start,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    raw_provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2, chat_service_pb2_grpc
from tokenwire_service.admission import Admission
from tokenwire_service.config import Config, Key, Limits, Timeouts, Upstream
from tokenwire_service.secret import Secret
from tokenwire_service.server import ListenError


def one_at_a_time(base_url: str) -> Upstream:
    key = Key(id="k1", secret=Secret("sk-test-k1"), quota_group="g1", in_flight=1)
    return Upstream(name="test", base_url=base_url, keys=(key,), passthrough=True)


def refusal(status: int, code: str, **headers: str) -> web.Response:
    body = {"error": {"message": "no", "type": code, "code": code}}
    return web.json_response(body, status=status, headers=headers)


async def test_a_retired_key_is_told_to_everyone_who_waits_for_it(start: Start) -> None:
    release = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        await release.wait()
        return refusal(401, "invalid_api_key")

    async with provider(answer) as served:
        gateway = await start(one_at_a_time(served.base_url))
        calls = [gateway.chat.Chat(request(), timeout=20) for _ in range(5)]
        ends = asyncio.gather(*(failing(call) for call in calls))
        await until(lambda: gateway.running.pools["test"].waiting == 4)
        release.set()
        failures = await ends
    reasons = {failure.reason for failure in failures}
    assert reasons == {"UPSTREAM_CREDENTIALS_REJECTED"}
    assert len(served.asked) == 1


async def test_one_who_gives_up_leaves_the_others_their_turn(start: Start) -> None:
    """The first in the line cannot wait as long as the key cools; the second can."""
    release = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        if len(served.asked) > 1:
            return completion()
        await release.wait()
        return refusal(429, "rate_limit_exceeded", **{"retry-after": "3"})

    async with provider(answer) as served:
        gateway = await start(one_at_a_time(served.base_url))
        pool = gateway.running.pools["test"]
        first = asyncio.ensure_future(failing(gateway.chat.Chat(request(), timeout=2.5)))
        await until(lambda: served.open == 1)
        hurried = asyncio.ensure_future(failing(gateway.chat.Chat(request(), timeout=2.5)))
        await until(lambda: pool.waiting == 1)
        patient = gateway.chat.Chat(request(), timeout=20)
        await until(lambda: pool.waiting == 2)
        release.set()
        assert (await first).reason == "RATE_LIMITED"
        assert (await hurried).reason == "RATE_LIMITED"
        assert (await patient).choices[0].message.content == "hello"


async def test_after_an_outage_those_who_waited_are_not_served_one_by_one(start: Start) -> None:
    """One of them probes; once that has succeeded nothing keeps the others apart."""
    together = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        if len(served.asked) == 1:
            return refusal(503, "server_error", **{"retry-after": "1"})
        if len(served.asked) > 2:
            if served.open == 5:
                together.set()
            await together.wait()
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=1))
        first = gateway.chat.Chat(request(), timeout=20)
        await until(lambda: served.ended == 1)
        calls = [gateway.chat.Chat(request(), timeout=20) for _ in range(5)]
        for call in (first, *calls):
            assert (await call).choices[0].message.content == "hello"


async def test_a_place_in_the_queue_is_left_though_a_slot_comes_back_at_that_moment() -> None:
    admission = Admission(1, 10, lambda: 0.0)

    async def wait() -> None:
        async with admission.slot(1.0):
            pass

    async with admission.slot(1.0):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert admission.waiting == 1
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (admission.in_flight, admission.waiting) == (0, 0)


@pytest.mark.parametrize("max_delay", [0, 2])
async def test_joined_text_stays_within_what_one_message_may_hold(
    start: Start, max_delay: int
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for _ in range(40):
            await response.write(chunk("x" * 20_000))
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(message_bytes=64 << 10))
        asked = stream_request(request())
        asked.max_delay.seconds = max_delay
        received = await receive(gateway.chat.StreamChat(asked, timeout=20))
    assert received.failure is None
    assert received.text == "x" * 800_000


async def test_a_batch_whose_caller_stopped_reading_ends(start: Start) -> None:
    async def answer(_: web.Request) -> web.Response:
        return completion("x" * 4_000_000)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), timeouts=Timeouts(write=0.3))
        batch = chat_service_pb2.BatchChatRequest()
        for _ in range(20):
            batch.items.add(chat=request())
        call = gateway.chat.BatchChat(batch)
        await until(lambda: bool(gateway.events.calls))
        assert gateway.events.calls[0].reason == "CALLER_STALLED"
        call.cancel()


async def test_a_choice_that_never_began_is_missed(start: Start) -> None:
    """The first choice has ended and so has the stream: half of the answer."""

    async def answer(
        _: asyncio.StreamReader, writer: asyncio.StreamWriter, end: bytes = b""
    ) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        writer.write(head + chunk("one", finish_reason="stop") + end)
        await writer.drain()

    asked = stream_request(request())
    asked.chat.params.choice_count = 2
    async with raw_provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        cut = await receive(gateway.chat.StreamChat(asked, timeout=20))
    assert cut.failure is not None
    assert cut.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"

    async with raw_provider(partial(answer, end=b"data: [DONE]\n\n")) as served:
        gateway = await start(upstream(served.base_url))
        fewer = await receive(gateway.chat.StreamChat(asked, timeout=20))
    assert fewer.failure is None
    assert fewer.texts == {0: "one"}


FAILED_CHOICE: dict[str, object] = {
    "finish_reason": "error",
    "error": {"code": 502, "message": "the provider died"},
}


async def test_a_choice_that_says_it_failed_is_no_answer(start: Start) -> None:
    """OpenRouter reports within the choice that its provider broke off."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        if not (await asked.json()).get("stream"):
            message = {"role": "assistant", "content": "half of"}
            return completion(choices=[{"index": 0, "message": message, **FAILED_CHOICE}])
        response = await event_stream(asked)
        await response.write(chunk("half of"))
        await response.write(chunk("", **FAILED_CHOICE) + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        whole = await failing(gateway.chat.Chat(request(), timeout=20))
        streamed = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=20))
    assert whole.reason == "UPSTREAM_ERROR"
    assert streamed.text == "half of"
    assert streamed.failure is not None
    assert streamed.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"


CALLS: dict[str, list[list[dict[str, object]]]] = {
    "neither index nor id, in one event": [[{}, {}]],
    "neither index nor id, in two": [[{}], [{}]],
    "one index for both": [[{"index": 0, "id": "x"}], [{"index": 0, "id": "y"}]],
}


@pytest.mark.parametrize("events", CALLS.values(), ids=list(CALLS))
async def test_two_tool_calls_are_never_made_one(
    start: Start, events: list[list[dict[str, object]]]
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        names = iter("ab")
        for parts in events:
            calls = [
                {**part, "function": {"name": next(names), "arguments": "{}"}} for part in parts
            ]
            await response.write(chunk("", delta={"tool_calls": calls}))
        await response.write(chunk("", finish_reason="tool_calls") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=20))
    assert received.failure is None
    parts = [part for delta in received.deltas for part in delta.tool_calls]
    assert [(p.index, p.name, p.arguments) for p in parts] == [(0, "a", "{}"), (1, "b", "{}")]


async def test_a_choice_index_that_is_no_number_is_not_guessed(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(
            chunk("one", index="0") + chunk("two", index="1") + b"data: [DONE]\n\n"
        )
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=20))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_PROTOCOL_ERROR"


async def test_a_second_gateway_does_not_take_the_firsts_unix_socket(
    start: Start, tmp_path: Path
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return completion()

    async with provider(answer) as served:
        config = Config(listen=f"unix:{tmp_path}/s", upstreams=(upstream(served.base_url),))
        first = await start(config=config)
        with pytest.raises(ListenError):
            await start(config=config)
        async with grpc.aio.insecure_channel(first.running.address) as channel:
            stub = chat_service_pb2_grpc.ChatServiceStub(channel)
            await stub.Chat(request(), timeout=20)
