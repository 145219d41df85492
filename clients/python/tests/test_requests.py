"""What Python developers write, and the request that comes of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest

from tokenwire.requests import (
    CALL_OPTIONS,
    ChatOptions,
    batch_request,
    chat_request,
    stream_request,
)
from tokenwire.v1.chat_pb2 import (
    ChatMessage,
    ContentPart,
    FunctionTool,
    GenerationParams,
    ResponseFormat,
    RoleTemplate,
    Tool,
    ToolChoice,
)
from tokenwire.v1.chat_service_pb2 import BatchChatItem, ChatRequest, UnsupportedParameterPolicy


def sent(prompt: Any = "Hi", **options: Any) -> ChatRequest:
    return chat_request(prompt, "m", **options)


def message(value: Any) -> ChatMessage:
    return sent([value]).messages[0]


def part(value: Any) -> ContentPart:
    return message({"role": "user", "content": [value]}).parts[0]


# --- options ------------------------------------------------------------------------


def test_every_option_reaches_its_field() -> None:
    request = sent(
        temperature=0,
        top_p=0.7,
        top_k=5,
        min_p=0.1,
        max_completion_tokens=100,
        stop=["a", "b"],
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.1,
        seed=2**40,
        choice_count=2,
        logprobs=True,
        top_logprobs=3,
        logit_bias={50256: -100, "7": 1.5},
        reasoning_effort="low",
        enable_thinking=False,
        verbosity="high",
        parallel_tool_calls=False,
        tools=[{"name": "f"}],
        tool_choice="required",
        response_format="json_object",
        role_templates=[{"role": "environment", "api_role": "system"}],
        end_user_id="u",
        prompt_cache_key="k",
        service_tier="flex",
        unsupported_parameters="drop",
        labels={"team": "a"},
        extra_body={"x": [1, None]},
        timeout=3,
        request_id="r",
        metadata={},
    )
    params = GenerationParams(
        temperature=0,
        top_p=0.7,
        top_k=5,
        min_p=0.1,
        max_completion_tokens=100,
        stop=["a", "b"],
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.1,
        seed=2**40,
        choice_count=2,
        logprobs=True,
        top_logprobs=3,
        logit_bias={50256: -100, 7: 1.5},
        reasoning_effort="low",
        enable_thinking=False,
        verbosity="high",
        parallel_tool_calls=False,
    )
    assert request == ChatRequest(
        model="m",
        messages=[ChatMessage(role="user", content="Hi")],
        params=params,
        tools=[Tool(function=FunctionTool(name="f"))],
        tool_choice=ToolChoice(mode=ToolChoice.MODE_REQUIRED),
        response_format=ResponseFormat(json_object={}),
        role_templates=[RoleTemplate(role="environment", api_role="system")],
        end_user_id="u",
        prompt_cache_key="k",
        service_tier="flex",
        unsupported_parameter_policy=(UnsupportedParameterPolicy.UNSUPPORTED_PARAMETER_POLICY_DROP),
        labels={"team": "a"},
        extra_body_json='{"x": [1, null]}',
    )


def test_every_field_of_the_contract_has_an_option() -> None:
    fields = {*ChatRequest.DESCRIPTOR.fields_by_name, *GenerationParams.DESCRIPTOR.fields_by_name}
    fields -= {"messages", "model", "params"}
    renamed = {
        "extra_body_json": "extra_body",
        "unsupported_parameter_policy": "unsupported_parameters",
    }
    options = set(ChatOptions.__annotations__) - CALL_OPTIONS - {"json_schema"}
    assert {renamed.get(name, name) for name in fields} == options


def test_none_is_no_value() -> None:
    options: Any = dict.fromkeys(set(ChatOptions.__annotations__) - CALL_OPTIONS)
    assert chat_request("Hi", "m", **options) == sent()


def test_options_replace_the_fields_of_a_ready_request() -> None:
    ready = ChatRequest(
        model="m",
        messages=[ChatMessage(role="user", content="Hi")],
        params=GenerationParams(stop=["a"], logit_bias={1: 1}, seed=1),
        tools=[Tool(function=FunctionTool(name="old"))],
        role_templates=[RoleTemplate(role="x")],
        response_format=ResponseFormat(json_object={}),
        labels={"old": "1"},
    )
    request = chat_request(
        ready,
        stop="b",
        logit_bias={2: 2},
        tools=[{"name": "new"}],
        role_templates=[],
        response_format="text",
        labels={"new": "2"},
    )
    assert list(request.params.stop) == ["b"]
    assert dict(request.params.logit_bias) == {2: 2}
    assert [tool.function.name for tool in request.tools] == ["new"]
    assert list(request.role_templates) == []
    assert request.response_format == ResponseFormat(text={})
    assert dict(request.labels) == {"new": "2"}
    assert request.params.seed == 1
    assert ready.params.stop == ["a"]


# --- tools and formats --------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
        {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
        },
    ],
)
def test_a_function_tool(tool: Mapping[str, Any]) -> None:
    assert sent(tools=[tool]).tools[0].function == FunctionTool(
        name="f", description="d", parameters_schema_json=json.dumps(SCHEMA), strict=True
    )


def test_the_order_of_a_schema_is_kept_and_text_is_untouched() -> None:
    text = '{ "type":"object",  "n":9007199254740993 }'
    first, second = sent(
        tools=[{"name": "f", "parameters": SCHEMA}, {"name": "g", "parameters": text}]
    ).tools
    assert list(json.loads(first.function.parameters_schema_json)["properties"]) == ["z", "a"]
    assert second.function.parameters_schema_json == text


def test_other_tools() -> None:
    custom = {"type": "custom", "custom": {"name": "c", "format": {"type": "text"}}}
    search = {"type": "web_search", "max_uses": 3}
    ready = Tool(function=FunctionTool(name="r"))
    tools = sent(tools=[custom, search, ready, FunctionTool(name="s")]).tools
    assert (tools[0].custom.name, tools[0].custom.format_json) == ("c", '{"type": "text"}')
    assert json.loads(tools[1].raw_json) == search
    assert [tool.function.name for tool in tools[2:]] == ["r", "s"]


@pytest.mark.parametrize(
    ("given", "mode", "names"),
    [
        ("auto", ToolChoice.MODE_AUTO, []),
        ("none", ToolChoice.MODE_NONE, []),
        ("required", ToolChoice.MODE_REQUIRED, []),
        ({"name": "f"}, ToolChoice.MODE_REQUIRED, ["f"]),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice.MODE_REQUIRED, ["f"]),
        ({"type": "custom", "custom": {"name": "c"}}, ToolChoice.MODE_REQUIRED, ["c"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "f"}}, {"name": "g"}],
                },
            },
            ToolChoice.MODE_REQUIRED,
            ["f", "g"],
        ),
        (ToolChoice(mode=ToolChoice.MODE_AUTO, tool_names=["x"]), ToolChoice.MODE_AUTO, ["x"]),
    ],
)
def test_tool_choice(given: Any, mode: Any, names: list[str]) -> None:
    assert sent(tool_choice=given).tool_choice == ToolChoice(mode=mode, tool_names=names)


def test_response_formats() -> None:
    assert sent(response_format="text").response_format.WhichOneof("format") == "text"
    openai = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"},
    }
    typed = sent(response_format=openai).response_format.json_schema
    assert (typed.name, typed.schema_json, typed.strict, typed.description) == (
        "n",
        json.dumps(SCHEMA),
        True,
        "d",
    )
    grammar = {"type": "grammar", "grammar": "root ::= x"}
    assert json.loads(sent(response_format=grammar).response_format.raw_json) == grammar
    ready = ResponseFormat(raw_json="{}")
    assert sent(response_format=ready).response_format == ready


def test_json_schema() -> None:
    plain = sent(json_schema=SCHEMA).response_format.json_schema
    assert (plain.name, plain.HasField("strict")) == ("answer", False)
    titled = sent(json_schema={"title": "Ünit price", **SCHEMA}).response_format.json_schema
    assert titled.name == "_nit_price"
    wrapped = {"name": "n", "schema": '{"type":"object"}', "strict": True}
    named = sent(json_schema=wrapped).response_format.json_schema
    assert (named.name, named.schema_json, named.strict) == ("n", '{"type":"object"}', True)
    text = sent(json_schema='{"type":"object"}').response_format.json_schema
    assert (text.name, text.schema_json) == ("answer", '{"type":"object"}')


# --- messages -----------------------------------------------------------------------


def test_an_assistant_turn_in_the_openai_layout() -> None:
    turn = message(
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "reasoning_content": "Hmm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "2", "type": "custom", "custom": {"name": "c", "input": "text"}},
            ],
            "annotations": [
                {
                    "type": "url_citation",
                    "url_citation": {"start_index": 1, "end_index": 2, "url": "u", "title": "t"},
                }
            ],
            "audio": {"id": "a1"},
        }
    )
    assert not turn.HasField("content")
    assert not turn.HasField("refusal")
    assert turn.reasoning == "Hmm"
    assert (turn.tool_calls[0].id, turn.tool_calls[0].function.arguments_json) == ("1", "{}")
    assert (turn.tool_calls[1].custom.name, turn.tool_calls[1].custom.input) == ("c", "text")
    [note] = turn.annotations
    assert (note.start_offset, note.end_offset, note.url, note.title) == (1, 2, "u", "t")
    assert json.loads(turn.extra_json) == {"audio": {"id": "a1"}}


def test_a_tool_turn() -> None:
    turn = message({"role": "tool", "tool_call_id": "1", "name": "f", "content": ""})
    assert turn == ChatMessage(role="tool", tool_call_id="1", name="f", content="")


PIXEL = b"\x89PNG"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("text", ContentPart(text="text")),
        ({"type": "text", "text": "a"}, ContentPart(text="a")),
        (
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
            ContentPart(text="a", extra_json='{"cache_control": {"type": "ephemeral"}}'),
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
            ContentPart(image={"url": "https://x/y.png", "detail": "low"}),
        ),
        ({"type": "image_url", "image_url": "data:,"}, ContentPart(image={"url": "data:,"})),
        ({"type": "video_url", "video_url": {"url": "u"}}, ContentPart(video={"url": "u"})),
        (
            {
                "type": "input_audio",
                "input_audio": {"data": base64.b64encode(PIXEL).decode(), "format": "wav"},
            },
            ContentPart(audio={"data": PIXEL, "media_type": "audio/wav"}),
        ),
        (
            {"type": "file", "file": {"file_data": "data:,x", "filename": "a.pdf"}},
            ContentPart(file={"url": "data:,x", "filename": "a.pdf"}),
        ),
        ({"type": "file", "file": {"file_id": "f1"}}, ContentPart(file={"file_id": "f1"})),
        (
            {"type": "image", "data": PIXEL, "media_type": "image/png"},
            ContentPart(image={"data": PIXEL, "media_type": "image/png"}),
        ),
        ({"type": "file", "file_id": "f2"}, ContentPart(file={"file_id": "f2"})),
        ({"type": "new", "new": 1}, ContentPart(raw_json='{"type": "new", "new": 1}')),
        (ContentPart(text="ready"), ContentPart(text="ready")),
    ],
)
def test_parts(given: Any, expected: ContentPart) -> None:
    assert part(given) == expected


# --- mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        (7, TypeError, "messages: expected a str, a list of messages or a ChatRequest, got int"),
        (b"x", TypeError, "messages: expected a str"),
        ({"role": "user", "content": "x"}, TypeError, "messages: expected a str, a list"),
        ([], ValueError, "messages: expected at least one message"),
        (["x"], TypeError, r"messages\[0\]: expected a dict such as .*, got 'x'"),
        ([{"content": "x"}], ValueError, r"messages\[0\].role: expected a role"),
        ([{"role": "user"}], ValueError, r"messages\[0\].content: missing"),
        ([{"role": "assistant"}], ValueError, r"messages\[0\].content: missing"),
        ([{"role": "user", "contents": "x"}], ValueError, r"messages\[0\].content: missing"),
        ([{"role": 1, "content": "x"}], TypeError, r"messages\[0\].role: expected a str, got int"),
        (
            [{"role": "user", "content": 5}],
            TypeError,
            r"content: expected a list of parts, got int",
        ),
        ("\ud83d", ValueError, "messages: the character at 0 is half of a surrogate pair"),
        (
            [{"role": "user", "content": "ok"}, {"role": "user", "content": "a\udc00"}],
            ValueError,
            r"messages\[1\].content: the character at 1 is half",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
            TypeError,
            r"messages\[0\].tool_calls\[0\].function: expected a dict, got None",
        ),
        (
            [{"role": "user", "content": [{"image_url": "x"}]}],
            ValueError,
            r"messages\[0\].content\[0\].type: missing",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "data": PIXEL}]}],
            ValueError,
            r"content\[0\].media_type: missing",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "data": "x", "media_type": "i"}]}],
            TypeError,
            r"content\[0\].data: expected bytes, got 'x'",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}],
            ValueError,
            r"content\[0\].image_url: unknown key 'uri', expected data, url,",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "detail": "low"}]}],
            ValueError,
            r'expected one of "data", "url" and "file_id"',
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}}
                    ],
                }
            ],
            ValueError,
            r"input_audio.data: expected base64",
        ),
    ],
)
def test_wrong_messages(prompt: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        sent(prompt)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"temperature": "hot"}, TypeError, "temperature: expected a number, got 'hot'"),
        ({"temperature": True}, TypeError, "temperature: expected a number, got bool"),
        ({"top_k": 1.5}, TypeError, "top_k: expected an int, got float"),
        ({"top_k": True}, TypeError, "top_k: expected an int, got bool"),
        ({"top_k": 2**40}, ValueError, "top_k: 1099511627776 does not fit"),
        ({"logprobs": 1}, TypeError, "logprobs: expected True or False, got int"),
        ({"stop": [1]}, TypeError, r"stop\[0\]: expected a str, got int"),
        ({"stop": {"a"}}, TypeError, "stop: expected a list of strings, got set"),
        ({"logit_bias": {"x": 1}}, TypeError, "logit_bias key: expected an int, got 'x'"),
        ({"logit_bias": {2**40: 1}}, ValueError, "logit_bias: 1099511627776 is no token id"),
        ({"tools": {"name": "f"}}, TypeError, "tools: expected a list of tools, got dict"),
        ({"tools": [{"nam": "f"}]}, ValueError, r"tools\[0\]: unknown key 'nam'"),
        ({"tools": [{}]}, TypeError, r"tools\[0\].name: expected a str, got None"),
        ({"tools": [len]}, TypeError, r"tools\[0\]: expected a dict, got builtin"),
        (
            {"tools": [{"name": "f", "parameters": {"x": {1}}}]},
            TypeError,
            r"tools\[0\].parameters: Object of type set is not JSON serializable",
        ),
        ({"tool_choice": "any"}, ValueError, "'auto' or 'none' or 'required', got 'any'"),
        ({"response_format": "json"}, ValueError, "\"json_object\" or a dict, got 'json'"),
        ({"json_schema": 1}, TypeError, "json_schema.schema: expected a dict or JSON text, got"),
        (
            {"json_schema": {}, "response_format": "text"},
            ValueError,
            "json_schema, response_format: expected only one",
        ),
        ({"role_templates": [{"rol": "x"}]}, ValueError, r"role_templates\[0\]: unknown key 'rol'"),
        ({"labels": {"a": 1}}, TypeError, r"labels\['a'\]: expected a str, got int"),
        ({"extra_body": {"x": float("nan")}}, ValueError, "extra_body: Out of range float"),
        ({"extra_body": [1]}, TypeError, "extra_body: expected a dict or JSON text, got list"),
        ({"unsupported_parameters": "ignore"}, ValueError, "expected 'reject' or 'drop'"),
        ({"n": 2}, TypeError, "unknown option 'n'; did you mean 'choice_count'?"),
        ({"temprature": 2}, TypeError, "unknown option 'temprature'; did you mean 'temperature'?"),
        ({"qqqq": 2}, TypeError, "unknown option 'qqqq'$"),
    ],
)
def test_wrong_options(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        sent(**options)


# --- streams and batches ------------------------------------------------------------


def test_a_delay_that_is_not_set_is_not_sent() -> None:
    assert not stream_request("Hi", "m", "delta", 0).HasField("max_delay")
    assert stream_request("Hi", "m", "delta", 0.0015).max_delay.nanos == 1_500_000


def test_items_of_a_batch() -> None:
    ready = BatchChatItem(custom_id="r", chat=sent("ready"))
    request = batch_request(
        ["a", [{"role": "user", "content": "b"}], {"messages": "c", "model": "own"}, ready],
        "m",
        0,
        seed=1,
    )
    assert [item.chat.messages[0].content for item in request.items] == ["a", "b", "c", "ready"]
    assert [item.chat.model for item in request.items] == ["m", "m", "own", "m"]
    assert [item.chat.params.seed for item in request.items] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("items", "error", "text"),
    [
        ("abc", TypeError, "items: expected a list of prompts, got 'abc'"),
        (5, TypeError, "items: expected a list of prompts, got int"),
        ([], ValueError, "items: expected at least one"),
        (["a", 5], TypeError, r"items\[1\]: messages: expected a str"),
        ([{"prompt": "a"}], ValueError, r"items\[0\]: expected \"messages\", got the keys"),
        ([{"messages": "a", "timeout": 3}], TypeError, r"items\[0\]: timeout: one call carries"),
        ([{"messages": "a", "sed": 3}], TypeError, r"items\[0\]: unknown option 'sed'"),
    ],
)
def test_wrong_batches(items: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        batch_request(items, "m", 0)
