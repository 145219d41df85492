"""Both ends of every range of the contract hold at the port, in each RPC that takes the field."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from aiohttp import web
from google.protobuf.message import Message

from harness import (
    Failure,
    Stubs,
    completion,
    event_stream,
    failure_of,
    item_failure,
    provider,
    stream_request,
    upstream,
)
from ranges import CASES, PLACES
from tokenwire.v1.chat_service_pb2 import BatchChatRequest, ChatRequest, StreamChatRequest
from tokenwire.v1.model_service_pb2 import ListModelsRequest
from tokenwire.v1.tokenizer_service_pb2 import CountTokensRequest
from tokenwire_service.config import Retries
from tokenwire_service.validation import RANGES


async def answer(asked: web.Request) -> web.StreamResponse:
    """One choice, whatever was asked for."""
    if asked.path.endswith("/models"):
        return web.json_response({"data": []})
    if (await asked.json()).get("stream"):
        response = await event_stream(asked)
        await response.write(
            b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n'
            b"data: [DONE]\n\n"
        )
        return response
    return completion("x")


def _batch(chat: ChatRequest) -> BatchChatRequest:
    made = BatchChatRequest()
    made.items.add(chat=chat)
    return made


Send = Callable[[Stubs], Any]


def calls(message: Message) -> list[tuple[str, Send]]:
    """Every RPC that takes this request: (what stands in front of the field's path, the call)."""
    match message:
        case ChatRequest():
            count = CountTokensRequest(model="m", chat=message)
            return [
                ("", lambda g: g.chat.Chat(message)),
                ("chat.", lambda g: g.chat.StreamChat(stream_request(message))),
                ("items[0].chat.", lambda g: g.chat.BatchChat(_batch(message))),
                ("chat.", lambda g: g.tokens.CountTokens(count)),
            ]
        case StreamChatRequest():
            return [("", lambda g: g.chat.StreamChat(message))]
        case BatchChatRequest():
            return [("", lambda g: g.chat.BatchChat(message))]
        case ListModelsRequest():
            return [("", lambda g: g.models.ListModels(message))]
    raise AssertionError(f"no RPC for {type(message).__name__}")


async def heard(call: Any) -> Failure | None:
    """How a call failed, an item's failure in a batch included; None if it did not."""
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
            return None
        messages = [message async for message in call]
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    for message in messages:
        if "error" in message.DESCRIPTOR.fields_by_name and message.HasField("error"):
            return item_failure(message)
    return None


@pytest.fixture
async def gateway(start: Any) -> AsyncIterator[Stubs]:
    """One in front of an upstream that takes anything."""
    async with provider(answer) as served:
        yield await start(upstream(served.base_url), retries=Retries(max_attempts=1))


@pytest.mark.parametrize("name", RANGES)
async def test_a_value_is_refused_at_the_port_just_outside_its_range(
    gateway: Stubs, name: str
) -> None:
    build, path = PLACES[name]
    tried: Counter[bool] = Counter()
    for _, value, fine in (case for case in CASES if case[0] == name):
        for prefix, send in calls(build(value)):
            failure = await heard(send(gateway))
            if fine:  # an upstream may still give fewer choices than it was asked for
                assert failure is None or failure.reason != "INVALID_REQUEST", (value, failure)
                continue
            assert failure is not None, f"{value} passed"
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
            assert failure.reason == "INVALID_REQUEST"
            assert list(failure.fields) == [prefix + path]
            assert str(RANGES[name]) in failure.fields[prefix + path]
        tried[fine] += 1
    assert tried[True] >= 2
    assert tried[False] >= 2
