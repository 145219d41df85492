"""Chat as its callers see it: what reaches the upstream, and what comes back."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from harness import (
    Start,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    simulate,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.config import Model
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]


def full_request() -> chat_service_pb2.ChatRequest:
    """One that uses most of the contract."""
    chat = chat_service_pb2.ChatRequest(
        model="some/model:v1",
        end_user_id="user-1",
        prompt_cache_key="bucket",
        service_tier="flex",
        extra_body_json='{"seed": 12345678901234567890, "user": null, "nested": {"z": 1, "a": 2}}',
    )
    chat.messages.add(role="system", content="Be brief.")
    chat.messages.add(role="environment", content="It is raining.")
    user = chat.messages.add(role="user", name="ann")
    user.parts.add(text="What is this?")
    user.parts.add().image.MergeFrom(chat_pb2.Media(data=b"\x89PNG", media_type="image/png"))
    called = chat.messages.add(role="assistant")
    called.tool_calls.add(id="call_1").function.MergeFrom(
        chat_pb2.FunctionCall(name="get_weather", arguments_json='{"city": "Paris"}')
    )
    chat.messages.add(role="tool", content="12 degrees", tool_call_id="call_1")
    chat.params.temperature = 0.7
    chat.params.top_p = 1
    chat.params.max_completion_tokens = 100
    chat.params.stop.extend(["END", "\n\n"])
    chat.params.choice_count = 2
    chat.params.seed = 7
    chat.params.logit_bias[50256] = -100
    chat.params.reasoning_effort = "low"
    chat.params.parallel_tool_calls = False
    tool = chat.tools.add().function
    tool.name = "get_weather"
    tool.description = "The weather"
    tool.parameters_schema_json = '{"type": "object", "properties": {"z": {}, "a": {}}}'
    tool.strict = True
    chat.tool_choice.mode = chat_pb2.ToolChoice.MODE_REQUIRED
    chat.tool_choice.tool_names.append("get_weather")
    chat.response_format.json_schema.name = "weather"
    chat.response_format.json_schema.schema_json = '{"type": "object"}'
    chat.response_format.json_schema.strict = True
    return chat


async def test_the_upstream_gets_the_whole_request_in_its_own_words(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=1))
        await gateway.chat.Chat(full_request())
    (asked,) = served.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["authorization"] == "Bearer sk-test-k1"
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["accept-encoding"] == "identity"
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    assert asked.body == {
        "model": "some/model:v1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "It is raining."},
            {
                "role": "user",
                "name": "ann",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                    }
                ],
            },
            {"role": "tool", "content": "12 degrees", "tool_call_id": "call_1"},
        ],
        "temperature": 0.7,
        "top_p": 1.0,
        "max_tokens": 100,
        "stop": ["END", "\n\n"],
        "n": 2,
        "seed": 12345678901234567890,  # from extra_body_json, which is merged last
        "logit_bias": {"50256": -100.0},
        "reasoning_effort": "low",
        "parallel_tool_calls": False,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "The weather",
                    "parameters": schema,
                    "strict": True,
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": {"type": "object"}, "strict": True},
        },
        "prompt_cache_key": "bucket",
        "service_tier": "flex",
        "nested": {"z": 1, "a": 2},
    }
    properties = asked.body["tools"][0]["function"]["parameters"]["properties"]
    assert list(properties) == ["z", "a"]  # key order matters to models


async def test_everything_the_upstream_answers_reaches_the_caller(start: Start) -> None:
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "some-model-2024",
        "system_fingerprint": "fp_1",
        "service_tier": "flex",
        "x_region": "eu",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "Hm.",
                    "refusal": None,
                    "x_note": {"deep": [1, 2]},
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"a": 1'},
                        }
                    ],
                    "annotations": [
                        {
                            "type": "url_citation",
                            "url_citation": {
                                "start_index": 1,
                                "end_index": 3,
                                "url": "https://example.org",
                                "title": "T",
                            },
                        }
                    ],
                },
                "finish_reason": "tool_calls",
                "content_filter_results": {"hate": {"filtered": False}},
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "Hi"},
                "finish_reason": "weird",
            },
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12, "x_cost": 0.25},
    }

    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.json_response(body)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        whole = await gateway.chat.Chat(request())
    header = whole.header
    assert (header.id, header.model, header.upstream) == ("chatcmpl-1", "some-model-2024", "test")
    assert header.create_time.seconds == 1_700_000_000
    assert (header.system_fingerprint, header.service_tier) == ("fp_1", "flex")
    assert json.loads(header.extra_json) == {"x_region": "eu"}
    first, second = whole.choices
    assert not first.message.HasField("content")
    assert first.message.reasoning == "Hm."
    assert json.loads(first.message.extra_json) == {"x_note": {"deep": [1, 2]}}
    assert first.message.tool_calls[0].id == "call_1"
    assert first.message.tool_calls[0].function.arguments_json == '{"a": 1'
    annotation = first.message.annotations[0]
    assert (annotation.start_offset, annotation.end_offset) == (1, 3)
    assert (annotation.url, annotation.title) == ("https://example.org", "T")
    assert first.finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert json.loads(first.extra_json) == {"content_filter_results": {"hate": {"filtered": False}}}
    assert second.message.content == "Hi"
    assert second.finish_reason == chat_pb2.FINISH_REASON_OTHER
    assert second.finish_reason_raw == "weird"
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 7, 12)
    assert json.loads(usage.extra_json) == {"x_cost": 0.25}


async def test_a_schema_gives_json_that_fits_it(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request("Describe the weather")
    chat.response_format.json_schema.name = "weather"
    chat.response_format.json_schema.schema_json = (
        '{"type": "object", "properties": {"sky": {"type": "string"}, "degrees": '
        '{"type": "integer"}}, "required": ["sky", "degrees"], "additionalProperties": false}'
    )
    whole = await gateway.chat.Chat(chat)
    found = json.loads(whole.choices[0].message.content)
    assert {name: type(value) for name, value in found.items()} == {"sky": str, "degrees": int}


async def test_an_answer_cut_by_its_length_says_so(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request("Tell me a story")
    chat.params.max_completion_tokens = 3
    whole = await gateway.chat.Chat(chat)
    assert whole.choices[0].finish_reason == chat_pb2.FINISH_REASON_LENGTH
    assert whole.usage.completion_tokens == 3
    assert whole.header.max_completion_tokens == 3


async def test_an_answer_names_the_attempts_before_it(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=simulate(fault="server_error", id="once", times=1))
    whole = await gateway.chat.Chat(chat)
    first, second = whole.header.attempts
    assert (first.http_status, second.http_status) == (500, 200)
    assert first.error_reason == error_reason_pb2.ERROR_REASON_UPSTREAM_ERROR
    assert second.error_reason == error_reason_pb2.ERROR_REASON_UNSPECIFIED
    assert simulator[0].stats.by_id["once"] == {"requests": 2, "faults": 1}
    assert [call.attempts for call in gateway.events.calls] == [2]
    assert [(a.fault, a.http_status) for a in gateway.events.attempts] == [
        ("server_error", 500),
        ("", 200),
    ]


async def test_defaults_caps_and_templates_of_a_model_apply_to_its_alias(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    defaults = chat_pb2.GenerationParams(temperature=0.2, top_p=0.5)
    model = Model(
        name="house",
        aliases=("old-house",),
        upstream="test",
        upstream_model="vendor/model",
        max_completion_tokens=50,
        defaults=defaults,
        role_templates=(
            chat_pb2.RoleTemplate(role="user", api_role="user", begin="<u>", end="</u>"),
            chat_pb2.RoleTemplate(role="narrator", api_role="user"),
        ),
    )
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, passthrough=False), models=(model,))
        chat = request("hello", model="old-house")
        chat.messages.add(role="narrator", content="It rains.")
        chat.params.temperature = 1.5
        chat.params.max_completion_tokens = 1000
        await gateway.chat.Chat(chat)
        failure = await failing(gateway.chat.Chat(request(model="vendor/model")))
    (asked,) = served.asked
    assert asked.body == {
        "model": "vendor/model",
        "messages": [{"role": "user", "content": "<u>hello</u>\nIt rains."}],
        "temperature": 1.5,
        "top_p": 0.5,
        "max_tokens": 50,
    }
    assert failure.reason == "MODEL_NOT_FOUND"
    assert failure.details["ResourceInfo"].resource_name == "vendor/model"


async def test_a_parameter_the_upstream_does_not_take_is_refused_unless_dropped(
    start: Start,
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    async with provider(answer) as served:
        unsupported = frozenset({"top_k", "min_p"})
        gateway = await start(upstream(served.base_url, unsupported_parameters=unsupported))
        chat = request()
        chat.params.top_k = 3
        chat.params.min_p = 0.5
        failure = await failing(gateway.chat.Chat(chat))
        streamed = await failing(gateway.chat.StreamChat(stream_request(chat)))
        assert served.asked == []
        chat.unsupported_parameter_policy = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP
        whole = await gateway.chat.Chat(chat)
    assert failure.reason == streamed.reason == "UNSUPPORTED_PARAMETER"
    assert set(failure.fields) == {"params.min_p", "params.top_k"}
    assert set(streamed.fields) == {"chat.params.min_p", "chat.params.top_k"}
    assert list(whole.header.dropped_parameters) == ["params.min_p", "params.top_k"]
    assert set(served.asked[0].body) == {"model", "messages"}


@pytest.mark.parametrize("name", ["model", "messages", "stream"])
async def test_extra_body_may_not_set_what_the_gateway_decides(
    start: Start, simulator: Simulated, name: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=json.dumps({name: None}))
    failure = await failing(gateway.chat.Chat(chat))
    assert failure.reason == "INVALID_REQUEST"
    assert set(failure.fields) == {"extra_body_json"}
    assert simulator[0].stats.requests == 0


async def test_configured_headers_are_sent_and_nothing_of_the_callers(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, headers={"x-team": "search"}))
        metadata = (
            ("authorization", "Bearer the-callers-own"),
            ("cookie", "session=1"),
            ("x-evil", "1"),
            ("openai-organization", "org-evil"),
        )
        await gateway.chat.Chat(request(), metadata=metadata)
    headers = served.asked[0].headers
    assert headers["x-team"] == "search"
    assert headers["authorization"].startswith("Bearer sk-test-")
    assert not {"cookie", "x-evil", "openai-organization"} & set(headers)


async def test_a_cookie_of_the_upstream_is_never_sent_back(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = completion()
        response.set_cookie("tenant", "one")
        return response

    async with provider(answer) as served:
        # By name: cookie jars take none from a bare address in any case.
        base_url = served.base_url.replace("127.0.0.1", "localhost")
        gateway = await start(upstream(base_url, keys=1))
        await gateway.chat.Chat(request())
        await gateway.chat.Chat(request())
    assert ["cookie" in asked.headers for asked in served.asked] == [False, False]


async def test_one_upstream_answer_serves_one_caller(start: Start) -> None:
    """Connections are kept and used again; answers never cross over."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        body = await asked.json()
        return completion(body["messages"][0]["content"])

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        answers = await asyncio.gather(
            *(gateway.chat.Chat(request(f"text {number}")) for number in range(100))
        )
    assert [a.choices[0].message.content for a in answers] == [f"text {n}" for n in range(100)]
    assert len(served.asked) == 100


async def test_a_kept_connection_serves_the_next_stream(start: Start) -> None:
    """Read to its end, a stream gives its connection back: no new one for each call."""
    peers = set()

    async def answer(asked: web.Request) -> web.StreamResponse:
        peers.add(asked.transport.get_extra_info("peername"))  # type: ignore[union-attr]
        response = await event_stream(asked)
        await response.write(chunk("x") + b"data: [DONE]\n\n")
        await asyncio.sleep(0.005)  # the end of the body comes after the end of the stream
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        for _ in range(5):
            received = await receive(gateway.chat.StreamChat(stream_request(request())))
            assert received.failure is None
        await until(lambda: served.open == 0)
    assert len(peers) == 1
