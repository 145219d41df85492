"""Upstreams that speak other languages than OpenAI's, over real sockets, as callers see them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import grpc
import pytest
from aiohttp import web

from harness import (
    Failure,
    Provider,
    Start,
    Stubs,
    event_stream,
    failing,
    provider,
    receive,
    request,
    stream_request,
    upstream,
)
from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2, model_service_pb2
from tokenwire_service.config import Retries, UpstreamTimeouts

QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)


class Language(NamedTuple):
    """One dialect: its whole answer "Hello", the same as events, and where its parts stand."""

    answer: Any
    events: list[Any]
    path: str
    stream_path: str
    key: tuple[str, str]  # header, and what stands before the key there
    models_path: str
    models: Any
    error: Any  # a rate limit
    overloaded: Any  # within a stream


def _claude(*blocks: Any, reason: str | None = "end_turn") -> Any:
    return {
        "id": "id-1",
        "type": "message",
        "role": "assistant",
        "model": "answering",
        "content": list(blocks),
        "stop_reason": reason,
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }


def _claude_text(index: int, text: str) -> Any:
    delta = {"type": "text_delta", "text": text}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _gemini(text: str, reason: str | None = None) -> Any:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": [{"text": text}]}}
    if reason:
        candidate["finishReason"] = reason
    usage = {"promptTokenCount": 3, "candidatesTokenCount": 2, "totalTokenCount": 5}
    return {
        "candidates": [candidate],
        "responseId": "id-1",
        "modelVersion": "answering",
        "usageMetadata": usage,
    }


def _dash(text: str, reason: str = "null") -> Any:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    return {"output": {"choices": [choice]}, "usage": usage, "request_id": "id-1"}


LANGUAGES: Mapping[str, Language] = {
    "anthropic": Language(
        _claude({"type": "text", "text": "Hello"}),
        [
            {"type": "message_start", "message": _claude(reason=None)},
            {"type": "ping"},
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "text", "text": ""},
            },
            _claude_text(0, "Hel"),
            _claude_text(0, "lo"),
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn"},
                "usage": {"output_tokens": 2},
            },
            {"type": "message_stop"},
        ],
        "/v1/messages",
        "/v1/messages",
        ("x-api-key", ""),
        "/v1/models?limit=1000",
        {"data": [{"id": "listed"}]},
        {"type": "error", "error": {"type": "rate_limit_error", "message": "Slow"}},
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    ),
    "gemini": Language(
        _gemini("Hello", "STOP"),
        [_gemini("Hel"), _gemini("lo"), _gemini("", "STOP")],
        "/v1/models/m%2Fx:generateContent",
        "/v1/models/m%2Fx:streamGenerateContent?alt=sse",
        ("x-goog-api-key", ""),
        "/v1/models?pageSize=1000",
        {"models": [{"name": "models/listed"}]},
        {"error": {"code": 429, "message": "Slow", "status": "RESOURCE_EXHAUSTED"}},
        {"error": {"code": 503, "message": "Overloaded", "status": "UNAVAILABLE"}},
    ),
    "dashscope": Language(
        _dash("Hello", "stop"),
        [_dash("Hel"), _dash("lo"), _dash("", "stop")],
        "/v1/services/aigc/text-generation/generation",
        "/v1/services/aigc/text-generation/generation",
        ("authorization", "Bearer "),
        "/v1/models?page_no=1&page_size=100",
        {"output": {"models": [{"model": "listed"}]}},
        {"code": "Throttling.RateQuota", "message": "Slow", "request_id": "r"},
        {"code": "ServiceUnavailable", "message": "Overloaded", "request_id": "r"},
    ),
}
ALL = pytest.mark.parametrize("name", LANGUAGES)
KEY_HEADERS = {"authorization", "x-api-key", "x-goog-api-key", "api-key"}


def data(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def answering(language: Language, *events: Any) -> Callable[[web.Request], Any]:
    """Answers as the language does, or a stream with these events."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        if asked.method == "GET":
            return web.json_response(language.models)
        body = await asked.json()
        streams = body.get("stream") or "alt=sse" in asked.path_qs
        if streams or asked.headers.get("X-DashScope-SSE") == "enable":
            response = await event_stream(asked)
            await response.write(data(*(events or language.events)))
            return response
        return web.json_response(events[0] if events else language.answer)

    return answer


@asynccontextmanager
async def speaking(
    start: Start, name: str, answer: Callable[[web.Request], Any], **settings: Any
) -> AsyncIterator[tuple[Provider, Stubs]]:
    async with provider(answer) as served:
        there = upstream(served.base_url, dialect=name, **settings)
        yield served, await start(there, retries=QUICK)


@ALL
async def test_an_answer_comes_through(start: Start, name: str) -> None:
    language = LANGUAGES[name]
    async with speaking(start, name, answering(language)) as (served, gateway):
        answer = await gateway.chat.Chat(request("hi", model="m/x"))
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == chat_pb2.FINISH_REASON_STOP
        assert answer.header.id == "id-1"
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 5)
        assert [asked.path for asked in served.asked] == [language.path]


@ALL
async def test_a_stream_comes_through(start: Start, name: str) -> None:
    language = LANGUAGES[name]
    async with speaking(start, name, answering(language)) as (served, gateway):
        received = await receive(
            gateway.chat.StreamChat(stream_request(request("hi", model="m/x")))
        )
        assert received.failure is None
        assert received.text == "Hello"
        assert received.finishes[0].finish_reason == chat_pb2.FINISH_REASON_STOP
        assert (received.header.id, received.header.upstream) == ("id-1", "test")
        assert received.trailer.usage.total_tokens == 5
        assert [asked.path for asked in served.asked] == [language.stream_path]


@ALL
async def test_the_key_stands_in_its_header_alone(start: Start, name: str) -> None:
    language = LANGUAGES[name]
    header, before = language.key
    async with speaking(start, name, answering(language), keys=1) as (served, gateway):
        await gateway.chat.Chat(request())
        await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
        for asked in served.asked:
            assert asked.headers[header] == f"{before}sk-test-k1"
            assert asked.headers.keys() & KEY_HEADERS == {header}
            rest = {name: value for name, value in asked.headers.items() if name != header}
            assert "sk-test" not in str((asked.path, asked.body, rest))
            assert ("anthropic-version" in asked.headers) == (name == "anthropic")


@ALL
async def test_the_models_are_the_upstreams(start: Start, name: str) -> None:
    language = LANGUAGES[name]
    async with speaking(start, name, answering(language)) as (served, gateway):
        listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
        assert [model.name for model in listed.models] == ["listed"]
        assert [asked.path for asked in served.asked] == [language.models_path]


@ALL
async def test_what_is_dropped_is_named_in_the_header(start: Start, name: str) -> None:
    async with speaking(start, name, answering(LANGUAGES[name])) as (served, gateway):
        chat = request(params=chat_pb2.GenerationParams(verbosity="low"))
        failure = await failing(gateway.chat.Chat(chat))
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.reason == "UNSUPPORTED_PARAMETER"
        assert set(failure.fields) == {"params.verbosity"}
        assert served.asked == []
        chat.unsupported_parameter_policy = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
        assert list(received.header.dropped_parameters) == ["params.verbosity"]


@ALL
@pytest.mark.parametrize("way", ["stream", "unary"])
async def test_another_key_serves_while_one_is_limited(start: Start, name: str, way: str) -> None:
    language = LANGUAGES[name]
    asked_before: list[str] = []

    async def limited(asked: web.Request) -> web.StreamResponse:
        asked_before.append(asked.path)
        if len(asked_before) == 1:
            return web.json_response(language.error, status=429)
        return await answering(language)(asked)

    async with speaking(start, name, limited) as (_, gateway):
        if way == "unary":
            answer = await gateway.chat.Chat(request())
            text, header = answer.choices[0].message.content, answer.header
        else:
            received = await receive(gateway.chat.StreamChat(stream_request(request())))
            text, header = received.text, received.header
        assert text == "Hello"
        reasons = [attempt.error_reason for attempt in header.attempts]
        assert reasons == [error_reason_pb2.ERROR_REASON_RATE_LIMITED, 0]


async def end_of(gateway: Stubs, way: str, chat: chat_service_pb2.ChatRequest) -> Failure:
    if way == "unary":
        return await failing(gateway.chat.Chat(chat))
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.failure is not None
    return received.failure


@ALL
@pytest.mark.parametrize("way", ["stream", "unary"])
async def test_an_error_inside_a_200_is_an_error(start: Start, name: str, way: str) -> None:
    language = LANGUAGES[name]
    answer = answering(language, language.overloaded)
    async with speaking(start, name, answer) as (served, gateway):
        failure = await end_of(gateway, way, request())
        assert failure.reason == "UPSTREAM_OVERLOADED"
        assert len(served.asked) == QUICK.max_attempts


@ALL
async def test_an_error_within_a_stream_interrupts_it(start: Start, name: str) -> None:
    language = LANGUAGES[name]
    events = [*language.events[:-2], language.overloaded]
    async with speaking(start, name, answering(language, *events)) as (served, gateway):
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        assert received.text.startswith("Hel")
        assert received.failure is not None
        assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
        assert len(served.asked) == 1


@ALL
async def test_a_stream_that_was_cut_anywhere_is_never_ok(start: Start, name: str) -> None:
    language = LANGUAGES[name]
    for end in range(1, len(language.events)):
        answer = answering(language, *language.events[:end])
        async with speaking(start, name, answer) as (_, gateway):
            received = await receive(gateway.chat.StreamChat(stream_request(request())))
            assert received.failure is not None
            assert received.failure.code is grpc.StatusCode.UNAVAILABLE
            assert set(received.kinds) <= {"header", "delta"}


@ALL
@pytest.mark.parametrize("other", [*LANGUAGES, "openai"])
@pytest.mark.parametrize("way", ["stream", "unary"])
async def test_another_language_is_a_protocol_error(
    start: Start, name: str, other: str, way: str
) -> None:
    if other == name:
        return
    chunk = {"object": "chat.completion.chunk", "choices": [{"delta": {"content": "x"}}]}
    if other == "openai":
        wrong = Language(chunk, [chunk], "", "", ("", ""), "", {}, {}, {})
    else:
        wrong = LANGUAGES[other]
    async with speaking(start, name, answering(wrong)) as (_, gateway):
        failure = await end_of(gateway, way, request())
        assert failure.reason == "UPSTREAM_PROTOCOL_ERROR"


@ALL
async def test_pings_and_comments_are_no_progress(start: Start, name: str) -> None:
    """An upstream that only says that it is alive is silent."""

    async def alive(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        while True:
            await response.write(b": alive\n\nevent: ping\ndata: \n\n")
            await asyncio.sleep(0.02)

    timeouts = UpstreamTimeouts(first_byte=0.3, idle=0.3)
    async with speaking(start, name, alive, timeouts=timeouts) as (_, gateway):
        failure = await end_of(gateway, "stream", request())
        assert failure.reason == "UPSTREAM_TIMEOUT"


async def test_pings_of_anthropic_are_no_progress_either(start: Start) -> None:
    async def pinging(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(data(LANGUAGES["anthropic"].events[0]))
        while True:
            await response.write(b"event: ping\n" + data({"type": "ping"}))
            await asyncio.sleep(0.02)

    timeouts = UpstreamTimeouts(first_byte=0.3, idle=0.3)
    async with speaking(start, "anthropic", pinging, timeouts=timeouts) as (_, gateway):
        failure = await end_of(gateway, "stream", request())
        assert failure.reason == "UPSTREAM_TIMEOUT"


async def test_thoughts_go_back_signed_as_they_came(start: Start) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    answer = answering(LANGUAGES["anthropic"], _claude(thought, call, reason="tool_use"))
    async with speaking(start, "anthropic", answer) as (served, gateway):
        chat = request()
        chat.tools.add().function.name = "f"
        chat.messages.append((await gateway.chat.Chat(chat)).choices[0].message)
        chat.messages.add(role="tool", tool_call_id="t1", content="done")
        await gateway.chat.Chat(chat)
        said = served.asked[1].body["messages"]
        assert said[1] == {"role": "assistant", "content": [thought, call]}
        assert said[2]["content"][0]["tool_use_id"] == "t1"


async def test_a_cumulative_stream_becomes_deltas(start: Start) -> None:
    language = LANGUAGES["dashscope"]
    events = [_dash("Hel"), _dash("Hello"), _dash("Hello!", "stop")]
    async with speaking(start, "dashscope", answering(language, *events)) as (served, gateway):
        patch = '{"parameters": {"incremental_output": false}}'
        for chat in (request(extra_body_json=patch), request(model="qwen-mt-plus")):
            received = await receive(gateway.chat.StreamChat(stream_request(chat)))
            assert received.failure is None
            assert received.text == "Hello!"
            assert served.asked[-1].body["parameters"]["incremental_output"] is False
            assert served.asked[-1].headers["x-dashscope-sse"] == "enable"


async def test_a_service_may_be_named_whole(start: Start) -> None:
    async with provider(answering(LANGUAGES["dashscope"])) as served:
        there = upstream(f"{served.base_url}/other/generation", dialect="dashscope")
        gateway = await start(there)
        await gateway.chat.Chat(request())
        listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
        assert [asked.path for asked in served.asked] == ["/v1/other/generation"]
        assert not listed.models
