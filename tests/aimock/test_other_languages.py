"""The gateway in front of aimock's endpoints of Anthropic's and Gemini's own APIs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from harness import Received, Start, failing, receive, request, stream_request, upstream
from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.config import Retries, Upstream
from tokenwire_service.folding import Growing

HAIKU = "An old silent pond / a frog jumps into the pond / splash! Silence again."
QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)


class Language(NamedTuple):
    """One API of aimock's."""

    base: str  # below aimock's root
    model: str
    limited: str  # its own fixture of a key that is limited once


LANGUAGES = {
    "anthropic": Language("/v1", "claude-sonnet-4-5", "anthropic"),
    "gemini": Language("/v1beta", "gemini-2.5-flash", "gemini"),
}
ALL = pytest.mark.parametrize("name", LANGUAGES)


def there(aimock: str, name: str) -> Upstream:
    root = aimock.removesuffix("/v1")
    return upstream(root + LANGUAGES[name].base, dialect=name)


def asking(name: str, text: str) -> chat_service_pb2.ChatRequest:
    return request(text, model=LANGUAGES[name].model)


def with_tools(chat: chat_service_pb2.ChatRequest) -> chat_service_pb2.ChatRequest:
    """The same with two tools."""
    schema = '{"type":"object","properties":{"city":{"type":"string"}}}'
    for name in ("get_weather", "get_time"):
        chat.tools.add().function.CopyFrom(
            chat_pb2.FunctionTool(name=name, parameters_schema_json=schema)
        )
    return chat


def calls_of(received: Received) -> list[tuple[str, Any]]:
    """(name, arguments) of the calls in a stream. Each has an id of its own."""
    calls: dict[int, list[str]] = {}
    for delta in received.deltas:
        for part in delta.tool_calls:
            call = calls.setdefault(part.index, ["", "", ""])
            for i, text in enumerate((part.id, part.name, part.arguments)):
                call[i] += text
    assert len({call[0] for call in calls.values()} - {""}) == len(calls)
    return [(call[1], json.loads(call[2])) for call in calls.values()]


CALLS = [("get_weather", {"city": "Paris"}), ("get_time", {"zone": "CET"})]


@ALL
async def test_a_plain_answer_comes_through(start: Start, aimock: str, name: str) -> None:
    gateway = await start(there(aimock, name))
    answer = await gateway.chat.Chat(asking(name, "a haiku please"))
    (choice,) = answer.choices
    assert choice.message.content == HAIKU
    assert choice.message.reasoning == "Bashō, of course."
    assert choice.finish_reason == chat_pb2.FINISH_REASON_STOP
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 21, 28)


@ALL
async def test_a_stream_comes_through(start: Start, aimock: str, name: str) -> None:
    gateway = await start(there(aimock, name))
    received = await receive(
        gateway.chat.StreamChat(stream_request(asking(name, "a haiku please")))
    )
    assert received.failure is None
    assert received.text == HAIKU
    assert "".join(delta.reasoning for delta in received.deltas) == "Bashō, of course."
    assert received.finishes[0].finish_reason == chat_pb2.FINISH_REASON_STOP
    assert received.trailer.usage.completion_tokens == 21


@ALL
async def test_tools_are_called_and_their_results_go_back(
    start: Start, aimock: str, name: str
) -> None:
    gateway = await start(there(aimock, name))
    chat = with_tools(asking(name, "the weather in Paris"))
    answer = await gateway.chat.Chat(chat)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert message.content == "Let me look."
    calls = [(c.function.name, json.loads(c.function.arguments_json)) for c in message.tool_calls]
    assert calls == CALLS
    chat.messages.append(message)
    for call, result in zip(message.tool_calls, ("12:00", "18 °C"), strict=True):
        chat.messages.add(role="tool", tool_call_id=call.id, content=result)
    answer = await gateway.chat.Chat(chat)
    assert answer.choices[0].message.content == "It is 18 °C in Paris."


@ALL
async def test_streamed_tool_calls_are_put_together(start: Start, aimock: str, name: str) -> None:
    gateway = await start(there(aimock, name))
    chat = with_tools(asking(name, "the weather in Paris"))
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.failure is None
    assert calls_of(received) == CALLS
    assert received.text == "Let me look."
    assert received.finishes[0].finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS


@ALL
@pytest.mark.parametrize("way", ["stream", "unary"])
async def test_another_key_serves_while_one_is_limited(
    start: Start, aimock: str, name: str, way: str
) -> None:
    gateway = await start(there(aimock, name))
    chat = asking(name, f"limited once ({LANGUAGES[name].limited} {way})")
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


@ALL
@pytest.mark.parametrize("way", ["stream", "unary"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("refused", "INVALID_REQUEST"),
        ("broken", "UPSTREAM_ERROR"),
        ("overloaded", "UPSTREAM_OVERLOADED"),
        ("malformed", "UPSTREAM_PROTOCOL_ERROR"),
        ("disconnected", "UPSTREAM_ERROR"),
    ],
)
async def test_a_fault_is_told(
    start: Start, aimock: str, name: str, way: str, text: str, reason: str
) -> None:
    gateway = await start(there(aimock, name), retries=QUICK)
    chat = asking(name, text)
    if way == "unary":
        failure = await failing(gateway.chat.Chat(chat, timeout=10))
    else:
        failure = await failing(gateway.chat.StreamChat(stream_request(chat), timeout=10))
    assert failure.reason == reason


@ALL
async def test_a_stream_that_was_cut_is_interrupted(start: Start, aimock: str, name: str) -> None:
    gateway = await start(there(aimock, name), retries=QUICK)
    received = await receive(gateway.chat.StreamChat(stream_request(asking(name, "cut"))))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    assert "One two three four five six seven eight nine ten".startswith(received.text)


@pytest.mark.parametrize("way", ["stream", "unary"])
async def test_thoughts_go_back_signed(start: Start, aimock: str, way: str) -> None:
    """aimock refuses, as Anthropic does, calls that come back without the thoughts before them."""
    strict = {"X-AIMock-Strict": "true"}
    gateway = await start(upstream(aimock, dialect="anthropic", headers=strict))
    chat = with_tools(asking("anthropic", "the tide in Brest"))
    chat.params.enable_thinking = True
    if way == "unary":
        message = (await gateway.chat.Chat(chat)).choices[0].message
    else:
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
        growing = Growing()
        for delta in received.deltas:
            growing.add(delta)
        message = growing.message()
    assert message.reasoning == "The moon matters."
    chat.messages.append(message)
    chat.messages.add(role="tool", tool_call_id=message.tool_calls[0].id, content="high")
    answer = await gateway.chat.Chat(chat)
    assert answer.choices[0].message.content == "It is high tide."
    chat.messages[1].ClearField("extra_json")
    chat.messages[1].ClearField("reasoning")
    failure = await failing(gateway.chat.Chat(chat))
    assert failure.reason == "INVALID_REQUEST"
    assert "thinking" in failure.message
