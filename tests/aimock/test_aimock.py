"""The gateway in front of an upstream whose authors have never seen it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from harness import (
    Failure,
    Start,
    failing,
    receive,
    request,
    stream_request,
    upstream,
)
from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2, model_service_pb2
from tokenwire_service.config import Key, Retries, Upstream
from tokenwire_service.secret import Secret

HAIKU = "An old silent pond / a frog jumps into the pond / splash! Silence again."
QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)


def with_tools(chat: chat_service_pb2.ChatRequest) -> chat_service_pb2.ChatRequest:
    """The same with two tools."""
    schema = '{"type":"object","properties":{"city":{"type":"string"}}}'
    for name in ("get_weather", "get_time"):
        chat.tools.add().function.CopyFrom(
            chat_pb2.FunctionTool(name=name, parameters_schema_json=schema)
        )
    return chat


async def asked(aimock: str) -> Any:
    """The body of the last request, as aimock understood it."""
    root = aimock.removesuffix("/v1")
    headers = {"Authorization": "Bearer sk-test-k1"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{root}/__aimock/journal") as answer,
    ):
        return (await answer.json())[-1]["body"]


def test_the_lock_file_names_no_host() -> None:
    lock = Path(__file__).with_name("package-lock.json").read_text()
    assert "sha512-" in lock
    assert "://" not in lock


async def test_a_plain_answer_comes_through(start: Start, aimock: str) -> None:
    gateway = await start(upstream(aimock))
    answer = await gateway.chat.Chat(request("a haiku please", model="gpt-4o"))
    assert (answer.header.id, answer.header.model) == ("chatcmpl-haiku", "gpt-4o-2024-08-06")
    assert answer.header.system_fingerprint == "fp_aimock"
    (choice,) = answer.choices
    assert choice.message.content == HAIKU
    assert choice.message.reasoning == "Bashō, of course."
    assert choice.finish_reason == chat_pb2.FINISH_REASON_STOP
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 21, 28)
    body = await asked(aimock)
    assert (body["model"], body["messages"]) == (
        "gpt-4o",
        [{"role": "user", "content": "a haiku please"}],
    )


async def test_a_stream_comes_through(start: Start, aimock: str) -> None:
    gateway = await start(upstream(aimock))
    received = await receive(
        gateway.chat.StreamChat(stream_request(request("a haiku please", model="gpt-4o")))
    )
    assert received.failure is None
    assert received.text == HAIKU
    assert "".join(delta.reasoning for delta in received.deltas) == "Bashō, of course."
    assert received.header.id == "chatcmpl-haiku"
    assert received.finishes[0].finish_reason == chat_pb2.FINISH_REASON_STOP
    assert received.trailer.usage.total_tokens == 28
    assert (await asked(aimock))["stream_options"] == {"include_usage": True}


async def test_tools_are_called_and_their_results_go_back(start: Start, aimock: str) -> None:
    gateway = await start(upstream(aimock))
    chat = with_tools(request("the weather in Paris"))
    answer = await gateway.chat.Chat(chat)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert message.content == "Let me look."
    calls = [(c.function.name, json.loads(c.function.arguments_json)) for c in message.tool_calls]
    assert calls == [("get_weather", {"city": "Paris"}), ("get_time", {"zone": "CET"})]
    chat.messages.append(message)
    for call, result in zip(message.tool_calls, ("12:00", "18 °C"), strict=True):
        chat.messages.add(role="tool", tool_call_id=call.id, content=result)
    answer = await gateway.chat.Chat(chat)
    assert answer.choices[0].message.content == "It is 18 °C in Paris."


async def test_streamed_tool_calls_are_put_together(start: Start, aimock: str) -> None:
    gateway = await start(upstream(aimock))
    received = await receive(
        gateway.chat.StreamChat(stream_request(with_tools(request("the weather in Paris"))))
    )
    assert received.failure is None
    calls: dict[int, list[str]] = {}
    for delta in received.deltas:
        for part in delta.tool_calls:
            call = calls.setdefault(part.index, ["", "", ""])
            for i, text in enumerate((part.id, part.name, part.arguments)):
                call[i] += text
    assert [call[0].startswith("call_") for call in calls.values()] == [True, True]
    assert [call[1] for call in calls.values()] == ["get_weather", "get_time"]
    assert [json.loads(call[2]) for call in calls.values()] == [{"city": "Paris"}, {"zone": "CET"}]
    assert received.finishes[0].finish_reason_raw == "tool_calls"


async def test_a_response_format_is_understood(start: Start, aimock: str) -> None:
    gateway = await start(upstream(aimock))
    chat = request("fill the form")
    chat.response_format.json_schema.name = "city"
    chat.response_format.json_schema.schema_json = '{"type":"object"}'
    answer = await gateway.chat.Chat(chat)
    assert json.loads(answer.choices[0].message.content) == {"city": "Paris"}


async def test_the_models_are_the_upstreams(start: Start, aimock: str) -> None:
    gateway = await start(upstream(aimock))
    listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
    models = {model.name: model for model in listed.models}
    assert models["gpt-4o"].upstream == "test"
    assert json.loads(models["gpt-4o"].extra_json)["owned_by"] == "aimock"


async def test_a_batch_comes_through(start: Start, aimock: str) -> None:
    gateway = await start(upstream(aimock), retries=QUICK)
    batch = chat_service_pb2.BatchChatRequest()
    for text in ("haiku 1", "refused", "haiku 2"):
        batch.items.add(custom_id=text, chat=request(text))
    answers = {answer.custom_id: answer async for answer in gateway.chat.BatchChat(batch)}
    assert answers["refused"].WhichOneof("result") == "error"
    for text in ("haiku 1", "haiku 2"):
        assert answers[text].response.choices[0].message.content == HAIKU


@pytest.mark.parametrize("way", ["stream", "unary"])
async def test_another_key_serves_while_one_is_limited(start: Start, aimock: str, way: str) -> None:
    gateway = await start(upstream(aimock))
    chat = request(f"limited once ({way})")
    if way == "unary":
        answer = await gateway.chat.Chat(chat)
        text, header = answer.choices[0].message.content, answer.header
    else:
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
        text, header = received.text, received.header
    assert text == "The other key answers."
    assert [(a.key_id, a.http_status, a.error_reason) for a in header.attempts] == [
        ("k1", 429, error_reason_pb2.ERROR_REASON_RATE_LIMITED),
        ("k2", 200, error_reason_pb2.ERROR_REASON_UNSPECIFIED),
    ]


async def test_another_key_serves_for_good_when_one_is_rejected(start: Start, aimock: str) -> None:
    keys = (
        Key(id="unknown", secret=Secret("sk-test-unknown")),
        Key(id="known", secret=Secret("sk-test-k2")),
    )
    gateway = await start(Upstream(name="test", base_url=aimock, keys=keys, passthrough=True))
    first = await gateway.chat.Chat(request("haiku"))
    assert [a.key_id for a in first.header.attempts] == ["unknown", "known"]
    rejected = error_reason_pb2.ERROR_REASON_UPSTREAM_CREDENTIALS_REJECTED
    assert first.header.attempts[0].error_reason == rejected
    second = await gateway.chat.Chat(request("haiku"))
    assert [a.key_id for a in second.header.attempts] == ["known"]


class Told(NamedTuple):
    """What the caller hears, and after how many requests."""

    code: str
    reason: str
    attempts: int


UNMATCHED = "what no fixture matches"
# By the fixture that aimock answers with.
FAULTS: Mapping[str, Told] = {
    "limited for long": Told("RESOURCE_EXHAUSTED", "RATE_LIMITED", 2),
    "no credit": Told("RESOURCE_EXHAUSTED", "UPSTREAM_QUOTA_EXHAUSTED", 2),
    "refused": Told("INVALID_ARGUMENT", "INVALID_REQUEST", 1),
    "broken": Told("UNAVAILABLE", "UPSTREAM_ERROR", 3),
    "overloaded": Told("UNAVAILABLE", "UPSTREAM_OVERLOADED", 3),
    "dropped": Told("UNAVAILABLE", "UPSTREAM_ERROR", 3),
    "malformed": Told("UNAVAILABLE", "UPSTREAM_PROTOCOL_ERROR", 2),
    "disconnected": Told("UNAVAILABLE", "UPSTREAM_ERROR", 3),
    UNMATCHED: Told("INVALID_ARGUMENT", "INVALID_REQUEST", 1),
}


def test_every_fault_of_the_fixtures_has_its_row() -> None:
    fixtures = json.loads(Path(__file__).with_name("fixtures.json").read_bytes())["fixtures"]
    faults = {
        fixture["match"]["userMessage"]
        for fixture in fixtures
        if ("chaos" in fixture or "error" in fixture["response"])
        and "sequenceIndex" not in fixture["match"]
    }
    assert set(FAULTS) == {*faults, UNMATCHED}


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_told_by_its_row(
    start: Start, aimock: str, fault: str, unary: bool
) -> None:
    gateway = await start(upstream(aimock), retries=QUICK)
    chat = request(fault)
    if unary:
        failure = await failing(gateway.chat.Chat(chat, timeout=10))
    else:
        failure = await failing(gateway.chat.StreamChat(stream_request(chat), timeout=10))
    told = Told(failure.code.name, failure.reason, int(failure.metadata["attempts"]))
    assert told == FAULTS[fault]


async def test_a_key_that_is_limited_for_long_is_told_when_to_return(
    start: Start, aimock: str
) -> None:
    gateway = await start(upstream(aimock))
    failure: Failure = await failing(gateway.chat.Chat(request("limited for long"), timeout=10))
    assert 60 < failure.retry_seconds < 80
    assert int(failure.pushback) > 60_000


async def test_a_stream_that_is_cut_is_a_true_prefix_and_never_whole(
    start: Start, aimock: str
) -> None:
    gateway = await start(upstream(aimock))
    received = await receive(gateway.chat.StreamChat(stream_request(request("cut"))))
    assert received.failure is not None
    assert received.failure.code.name == "UNAVAILABLE"
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    assert received.failure.pushback == "-1"
    assert set(received.kinds) == {"header", "delta"}
    assert received.text
    assert "One two three four five six seven eight nine ten".startswith(received.text)
    assert len(received.text) < 40
