"""What a call made goes with its end: nothing of ours waits for the collector."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from harness import (
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.config import Config, Limits, Model, Retries

CALLS = 20


async def _chat(gateway: Stubs) -> None:
    await gateway.chat.Chat(request())


async def _stream(gateway: Stubs) -> None:
    received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is None


async def _cumulative(gateway: Stubs) -> None:
    wanted = stream_request(request(), mode=chat_service_pb2.STREAM_MODE_CUMULATIVE)
    assert [each async for each in gateway.chat.StreamChat(wanted)]


async def _batch(gateway: Stubs) -> None:
    wanted = chat_service_pb2.BatchChatRequest(max_concurrency=2)
    for _ in range(3):
        wanted.items.add(chat=request())
    assert len([each async for each in gateway.chat.BatchChat(wanted)]) == 3


async def _invalid(gateway: Stubs) -> None:
    await failing(gateway.chat.Chat(chat_service_pb2.ChatRequest()))


async def _failed(gateway: Stubs) -> None:
    await failing(gateway.chat.Chat(request("fail")))


async def _failed_items(gateway: Stubs) -> None:
    wanted = chat_service_pb2.BatchChatRequest()
    wanted.items.add(chat=request("fail"))
    wanted.items.add(chat=chat_service_pb2.ChatRequest())
    answers = [each async for each in gateway.chat.BatchChat(wanted)]
    assert [each.WhichOneof("result") for each in answers] == ["error"] * 2


async def _cut(gateway: Stubs) -> None:
    received = await receive(gateway.chat.StreamChat(stream_request(request("cut"))))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"


async def _reset(gateway: Stubs) -> None:
    received = await receive(gateway.chat.StreamChat(stream_request(request("reset"))))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"


async def _reset_at_once(gateway: Stubs) -> None:
    await failing(gateway.chat.StreamChat(stream_request(request("reset at once"))))


async def _unanswered(gateway: Stubs) -> None:
    await failing(gateway.chat.Chat(request("hang"), timeout=0.05))


async def _unanswered_stream(gateway: Stubs) -> None:
    await failing(gateway.chat.StreamChat(stream_request(request("hang")), timeout=0.05))


async def _crowded(gateway: Stubs) -> None:
    calls = [gateway.chat.StreamChat(stream_request(request(model="crowded"))) for _ in range(3)]
    failures = [(await receive(each)).failure for each in calls]
    assert {None, "GATEWAY_OVERLOADED"} == {each and each.reason for each in failures}


async def _fallen_back(gateway: Stubs) -> None:
    answer = await gateway.chat.Chat(request("fall back", model="with fallbacks"))
    assert answer.header.upstream == "good"
    wanted = stream_request(request("fall back", model="with fallbacks"))
    received = await receive(gateway.chat.StreamChat(wanted))
    assert received.header.upstream == "good"


async def _left(gateway: Stubs) -> None:
    call = gateway.chat.StreamChat(stream_request(request()))
    await call.read()
    call.cancel()


async def _left_batch(gateway: Stubs) -> None:
    wanted = chat_service_pb2.BatchChatRequest(max_concurrency=2)
    for text in ("hello", "hang", "hang"):
        wanted.items.add(chat=request(text))
    call = gateway.chat.BatchChat(wanted)
    await call.read()
    call.cancel()


def config(base_url: str) -> Config:
    """One upstream for any model, one that fails, one to fall back to, one with one slot."""
    of_models = {
        "bad": upstream(base_url.replace("/v1", "/bad/v1"), name="bad", passthrough=False),
        "good": upstream(base_url, name="good", passthrough=False),
        "narrow": upstream(base_url, name="narrow", passthrough=False, in_flight=1),
    }
    return Config(
        listen="127.0.0.1:0",
        upstreams=(upstream(base_url), *of_models.values()),
        models=(
            Model(name="with fallbacks", upstream="bad", fallbacks=("fallback",)),
            Model(name="fallback", upstream="good"),
            Model(name="crowded", upstream="narrow"),
        ),
        limits=Limits(queue=0),
        retries=Retries(max_attempts=1),
    )


@pytest.mark.parametrize(
    "call",
    [
        _chat,
        _stream,
        _cumulative,
        _batch,
        _invalid,
        _failed,
        _failed_items,
        _cut,
        _reset,
        _reset_at_once,
        _unanswered,
        _unanswered_stream,
        _crowded,
        _fallen_back,
        _left,
        _left_batch,
    ],
    ids=lambda call: call.__name__.strip("_"),
)
async def test_a_call_leaves_nothing_of_ours_to_the_collector(
    start: Start, call: Callable[[Stubs], Awaitable[None]]
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        wanted = await asked.json()
        text = wanted["messages"][-1]["content"]
        assert asked.transport is not None
        if text == "hang":
            await asyncio.sleep(60)
        if text == "fall back" and asked.path.startswith("/bad"):
            return web.json_response({"error": {"message": "down"}}, status=503)
        if text == "fail":
            return web.json_response({"error": {"message": "no"}}, status=400)
        if not wanted.get("stream"):
            return completion()
        response = await event_stream(asked)
        if text == "reset at once":
            asked.transport.abort()
            return response
        for piece in "several", " pieces", " of", " text":
            await response.write(chunk(piece))
            await asyncio.sleep(0.002)
        if text == "reset":
            asked.transport.abort()
        if text in ("cut", "reset"):
            return response
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(config=config(served.base_url))
        await call(gateway)  # what is made once
        gc.collect()
        gc.disable()
        try:
            for _ in range(CALLS):
                await call(gateway)
            await until(lambda: served.open == 0)
            await asyncio.sleep(0.05)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [each for each in gc.garbage if _is_ours(each)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert left == []


def _is_ours(found: object) -> bool:
    module = getattr(found, "__module__", None) or type(found).__module__
    code = getattr(found, "cr_code", None) or getattr(found, "gi_code", None)
    return str(module).startswith("tokenwire_service") or (
        code is not None and "tokenwire_service" in code.co_filename
    )
