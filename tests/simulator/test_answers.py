"""The shape of an answer, and that a stream and a plain answer say the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tokenwire_service.simulator import Simulator

if TYPE_CHECKING:
    from tests.simulator.conftest import Client

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1},
            },
            "required": ["location", "days"],
        },
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "addNumbers",
        "parameters": {
            "type": "object",
            "properties": {"terms": {"type": "array", "items": {"type": "number"}}},
            "required": ["terms"],
        },
    },
}
NOTE = {"type": "custom", "custom": {"name": "write_note", "description": "Writes a note"}}
IN_PARIS = "What is the weather in Paris, in celsius?"
ASKS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"seed": 7, "logprobs": True, "top_logprobs": 3},
    {"max_tokens": 5},
    {"max_completion_tokens": 30, "reasoning_effort": "high"},
    {"stop": ["the", "。"]},
    {"enable_thinking": True},
    {"tools": [WEATHER, ADD], "tool_choice": "required", "n": 2},
    {"tools": [NOTE], "tool_choice": "required", "reasoning_effort": "low"},
    {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 4},
    {"response_format": {"type": "json_object"}},
    {"simulate": {"tokens": 300}},
    {"simulate": {"text": "a b c", "reasoning": "why not"}},
    {"simulate": {"chunks": ["a", "", "\ud83d", "\ude00", "ü", "\u0000"]}},
    {"simulate": {"chunks": []}},
    {"simulate": {"text": ""}},
]


def whole(text: str) -> str:
    """The text with halves of surrogate pairs joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def fold(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of these deltas."""
    content = [delta["content"] for delta in deltas if delta.get("content") is not None]
    calls: list[dict[str, Any]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if "id" in part:
            assert part["index"] == len(calls)
            calls.append({key: value for key, value in part.items() if key != "index"})
        else:
            for kind in ("function", "custom"):
                for field, piece in part.get(kind, {}).items():
                    calls[part["index"]][kind][field] += piece
    reasoning = [d["reasoning_content"] for d in deltas if "reasoning_content" in d]
    return {
        "role": deltas[0]["role"],
        "content": whole("".join(content)) if content else None,
        "tool_calls": [{**call, "id": "call"} for call in calls],
        "reasoning_content": "".join(reasoning),
    }


@pytest.mark.parametrize("fields", ASKS)
@pytest.mark.parametrize("prompt", [IN_PARIS, "巴黎的天气怎么样？", "Add 2 and 3.5", "", "hi"])
async def test_a_stream_says_what_the_plain_answer_says(
    client: Client, prompt: str, fields: dict[str, Any]
) -> None:
    plain = (await client.ask(prompt, **fields)).json
    options = {"include_usage": True}
    stream = await client.ask(prompt, stream=True, stream_options=options, **fields)
    assert stream.payloads[-1] == "[DONE]"
    for index, choice in enumerate(plain["choices"]):
        told = choice["message"]
        assert fold(stream.deltas(index)) == {
            "role": "assistant",
            "content": told["content"],
            "tool_calls": [{**call, "id": "call"} for call in told.get("tool_calls", [])],
            "reasoning_content": told.get("reasoning_content", ""),
        }
        parts = [c for chunk in stream.chunks for c in chunk["choices"] if c["index"] == index]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(reasons) - 1) + [choice["finish_reason"]]
        logged = [token for c in parts if c["logprobs"] for token in c["logprobs"]["content"]]
        assert logged == (choice["logprobs"] or {"content": []})["content"]
    assert stream.chunks[-1]["choices"] == []
    assert stream.chunks[-1]["usage"] == plain["usage"]
    assert all(chunk["usage"] is None for chunk in stream.chunks[:-1])
    usage = plain["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    spoken = [d for i in range(len(plain["choices"])) for d in stream.deltas(i)[1:-1]]
    assert usage["completion_tokens"] == len(spoken)
    details = usage["completion_tokens_details"]
    assert details["reasoning_tokens"] == sum("reasoning_content" in delta for delta in spoken)


async def test_the_shape_of_a_stream(client: Client) -> None:
    reply = await client.ask(stream=True, n=2, simulate={"chunks": ["a", "b"]})
    ident, created = reply.chunks[0]["id"], reply.chunks[0]["created"]
    assert ident.startswith("chatcmpl-")

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {
            "id": ident,
            "object": "chat.completion.chunk",
            "created": created,
            "model": "simulated-small",
            "service_tier": "default",
            "system_fingerprint": "fp_simulated",
            "choices": [choice],
        }

    role = {"role": "assistant", "content": "", "refusal": None}
    assert reply.chunks == [
        *(chunk(index, role) for index in (0, 1)),
        *(chunk(index, {"content": "a"}) for index in (0, 1)),
        *(chunk(index, {"content": "b"}) for index in (0, 1)),
        *(chunk(index, {}, "stop") for index in (0, 1)),
    ]
    assert reply.payloads[-1] == "[DONE]"


async def test_the_shape_of_a_plain_answer(client: Client) -> None:
    answer = (await client.ask(simulate={"text": "One two."})).json
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "simulated-small",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "One two.",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 13,
            "completion_tokens": 3,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "service_tier": "default",
        "system_fingerprint": "fp_simulated",
    }


async def test_the_same_request_gets_the_same_words(client: Client) -> None:
    async def said(**fields: Any) -> str:
        return (await client.ask(**fields)).json["choices"][0]["message"]["content"]

    assert await said() == await said()
    assert await said() == await said(simulate={"id": "elsewhere"}, temperature=0.2)
    assert len({await said(seed=seed) for seed in range(8)}) > 4
    choices = (await client.ask(n=6)).json["choices"]
    assert len({choice["message"]["content"] for choice in choices}) > 3


async def test_limits_and_stops(client: Client) -> None:
    text = {"text": "one two three four"}
    cut = (await client.ask(max_tokens=2, simulate=text)).json
    assert cut["choices"][0]["message"]["content"] == "one two"
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 2
    whole = (await client.ask(max_tokens=4, simulate=text)).json
    assert whole["choices"][0]["finish_reason"] == "stop"
    stopped = (await client.ask(stop=["four", " three"], simulate=text)).json
    assert stopped["choices"][0]["message"]["content"] == "one two"
    assert stopped["choices"][0]["finish_reason"] == "stop"
    long = (await client.ask(simulate={"tokens": 777})).json
    assert long["usage"]["completion_tokens"] == 777
    assert long["choices"][0]["finish_reason"] == "stop"


async def test_thinking_takes_tokens_first(client: Client) -> None:
    answer = (await client.ask(reasoning_effort="high", max_completion_tokens=10)).json
    message = answer["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"].startswith("They wrote: “Why is the sky")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 10
    thinker = (await client.send(client.body(model="simulated-thinker"))).json
    assert thinker["choices"][0]["message"]["reasoning_content"]
    for fields in ({"reasoning_effort": "none"}, {"enable_thinking": False}):
        silent = (await client.send(client.body(model="simulated-thinker", **fields))).json
        assert "reasoning_content" not in silent["choices"][0]["message"]
    asked = (await client.ask(chat_template_kwargs={"enable_thinking": True})).json
    assert asked["choices"][0]["message"]["reasoning_content"]


def calls_of(answer: Any) -> list[tuple[str, Any]]:
    calls = answer["choices"][0]["message"].get("tool_calls", [])
    if calls:
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert answer["choices"][0]["message"]["content"] is None
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


@pytest.mark.parametrize(
    ("prompt", "fields", "expected"),
    [
        (
            IN_PARIS,
            {},
            [("get_weather", {"location": "Paris", "unit": "celsius", "days": 1})],
        ),
        ("Add 2 and 3.5 please", {}, [("addNumbers", {"terms": [2, 3.5]})]),
        ("Tell me a story", {}, []),
        (IN_PARIS, {"tool_choice": "none"}, []),
        ("Hello", {"tool_choice": "required"}, [("get_weather", {"location": "get_weather"})]),
        (
            IN_PARIS,
            {"tool_choice": {"type": "function", "function": {"name": "addNumbers"}}},
            [("addNumbers", {"terms": [1]})],
        ),
        (
            IN_PARIS,
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "addNumbers"}}],
                    },
                }
            },
            [],
        ),
    ],
)
async def test_tool_calls(client: Client, prompt: str, fields: Any, expected: Any) -> None:
    answer = (await client.ask(prompt, tools=[WEATHER, ADD], **fields)).json
    if prompt == "Hello":
        assert [name for name, _ in calls_of(answer)] == ["get_weather"]
    else:
        assert calls_of(answer) == expected


async def test_several_tool_calls_unless_told_otherwise(client: Client) -> None:
    prompt = "Add 1 and 2, and tell the weather in Oslo"
    both = (await client.ask(prompt, tools=[WEATHER, ADD])).json
    assert {name for name, _ in calls_of(both)} == {"get_weather", "addNumbers"}
    ids = [call["id"] for call in both["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 2
    one = (await client.ask(prompt, tools=[WEATHER, ADD], parallel_tool_calls=False)).json
    assert len(calls_of(one)) == 1


async def test_a_custom_tool_gets_text(client: Client) -> None:
    answer = (await client.ask("Please write a note about otters", tools=[NOTE])).json
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "custom"
    assert call["custom"] == {"name": "write_note", "input": "Please write a note about otters"}


async def test_tool_arguments_come_in_pieces(client: Client) -> None:
    reply = await client.ask(IN_PARIS, tools=[WEATHER], stream=True)
    deltas = reply.deltas()
    assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
    (start,) = deltas[1]["tool_calls"]
    assert start["function"] == {"name": "get_weather", "arguments": ""}
    rest = [part for delta in deltas[2:-1] for part in delta["tool_calls"]]
    assert len(rest) > 3
    assert all(set(part) == {"index", "function"} for part in rest)


async def test_a_tool_result_is_used(client: Client) -> None:
    asked = {"role": "user", "content": IN_PARIS}
    calling = (await client.ask(IN_PARIS, tools=[WEATHER])).json["choices"][0]["message"]
    result = {
        "role": "tool",
        "tool_call_id": calling["tool_calls"][0]["id"],
        "content": '{"sky": "clear", "temp_c": 21}',
    }
    messages = [asked, calling, result]
    answer = (await client.ask(messages=messages, tools=[WEATHER])).json["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert "get_weather" in answer["message"]["content"]
    assert "sky is clear, temp c is 21" in answer["message"]["content"]


async def test_json_that_fits_a_schema(client: Client) -> None:
    free = (await client.ask(response_format={"type": "json_object"})).json
    value = json.loads(free["choices"][0]["message"]["content"])
    assert value["words"] == ["sky", "blue"]
    assert value["answer"]
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "mood": {"enum": ["grim", "sunny"]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 2},
            "age": {"type": ["integer", "null"], "minimum": 18},
            "open": {"type": "boolean"},
        },
        "required": ["city", "mood", "tags", "age", "open"],
        "additionalProperties": False,
        "$defs": {"tag": {"type": "string", "maxLength": 3}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = await client.ask("Is it sunny in Lisbon?", response_format=wanted)
    value = json.loads(reply.json["choices"][0]["message"]["content"])
    assert list(value) == ["city", "mood", "tags", "age", "open"]
    assert (value["city"], value["mood"], value["age"], value["open"]) == (
        "Lisbon",
        "sunny",
        18,
        True,
    )
    assert len(value["tags"]) == 2
    assert all(0 < len(tag) <= 3 for tag in value["tags"])


async def test_logprobs(client: Client) -> None:
    ask = {"logprobs": True, "top_logprobs": 2, "simulate": {"text": "héllo there"}}
    logprobs = (await client.ask(**ask)).json["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [token["token"] for token in logprobs["content"]] == ["héllo", " there"]
    for token in logprobs["content"]:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert -1 < token["logprob"] <= 0
        first, second = token["top_logprobs"]
        assert (first["token"], first["logprob"]) == (token["token"], token["logprob"])
        assert second["logprob"] < first["logprob"]


async def test_obfuscation_on_request(client: Client) -> None:
    reply = await client.ask(stream=True, stream_options={"include_obfuscation": True})
    assert all(isinstance(chunk["obfuscation"], str) for chunk in reply.chunks)


async def test_conversation_and_attachments_are_heard(client: Client) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I live on a boat"},
        {"role": "assistant", "content": "How nice."},
        {"role": "user", "content": [{"type": "text", "text": "Is that wise?"}, image]},
    ]
    text = (await client.ask(messages=messages)).json["choices"][0]["message"]["content"]
    assert "Is that wise?" in text
    assert "1 attachment" in text
    assert "I live on a boat" in text


async def test_scripted_deltas_arrive_exactly(client: Client) -> None:
    chunks = ["", "a\nb", "\ud83d", "\ude00", "\uffff", "中", "", '"' * 3]
    reply = await client.ask(stream=True, max_tokens=1, stop="a", simulate={"chunks": chunks})
    assert [delta["content"] for delta in reply.deltas()[1:-1]] == chunks
    assert b"\\ud83d" in reply.raw
    plain = await client.ask(simulate={"chunks": ["\ud83d", "x"]})
    assert b'"content":"\\ud83dx"' in plain.raw


async def test_raw_events_arrive_as_they_are(client: Client) -> None:
    events = ['{"a":1}', "not json", "", "\ud83d"]
    reply = await client.ask(stream=True, simulate={"raw_events": events})
    head = b'data: {"a":1}\n\ndata: not json\n\ndata: \n\ndata: \xed\xa0\xbd\n\n'
    assert reply.raw == head + b"data: [DONE]\n\n"
    script = {"raw_events": events, "done": False}
    assert (await client.ask(stream=True, simulate=script)).raw == head
    assert (await client.ask(simulate={"raw_events": ["{", "}"]})).raw == b"{}"


async def test_done_can_be_left_out(client: Client) -> None:
    reply = await client.ask(stream=True, simulate={"text": "hi", "done": False})
    assert reply.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "[DONE]" not in reply.payloads


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("pace", "directives", "seconds"),
    [
        (60, {}, 0.2 + 10 / 60),
        (60, {"first_token_ms": 1000}, 1 + 10 / 60),
        (60, {"tokens_per_second": 5}, 0.2 + 2),
        (60, {"tokens_per_second": 0}, 0),
        (0, {}, 0),
        (0, {"first_token_ms": 50}, 0.05),
        (0, {"tokens_per_second": 10}, 0.2 + 1),
        (60, {"tokens_per_second": 20, "fault": "slow"}, 0.2 + 5),
    ],
)
async def test_pace(pace: float, directives: Any, seconds: float, stream: bool) -> None:
    slept: list[float] = []

    async def sleep(delay: float) -> None:
        slept.append(delay)

    simulator = Simulator(tokens_per_second=pace, sleep=sleep, now=lambda: 1_000_000.5)
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": stream,
        "simulate": {"chunks": ["x"] * 10} | directives,
    }
    headers = {"authorization": "Bearer key"}
    async with (
        simulator.serving() as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/chat/completions", json=body, headers=headers) as response,
    ):
        text = await response.text()
    assert '"created":1000000,' in text
    assert sum(slept) == pytest.approx(seconds)
