"""A request becomes exactly the body that each foreign language asks for."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness import request
from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.config import Key, Model, Upstream
from tokenwire_service.errors import GatewayError
from tokenwire_service.secret import Secret
from tokenwire_service.upstream.anthropic import Anthropic
from tokenwire_service.upstream.dashscope import DashScope
from tokenwire_service.upstream.dialect import Dialect, Route
from tokenwire_service.upstream.gemini import Gemini

GOLDEN = Path(__file__).with_name("golden")

Chat = chat_service_pb2.ChatRequest
Media = chat_pb2.Media
Params = chat_pb2.GenerationParams
Template = chat_pb2.RoleTemplate
ToolChoice = chat_pb2.ToolChoice
DROP = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP

ANTHROPIC, GEMINI, DASHSCOPE = Anthropic(), Gemini(), DashScope()
ALL = pytest.mark.parametrize(
    "dialect", [ANTHROPIC, GEMINI, DASHSCOPE], ids=lambda d: type(d).__name__
)


def route(name: str, base_url: str = "http://upstream.example/v1", **model: Any) -> Route:
    upstream = Upstream(name="u", base_url=base_url, keys=())
    return Route(upstream, Model(name="m", upstream="u", **model) if model else None, name)


def body(dialect: Dialect, chat: Chat, name: str = "m", **to: Any) -> Any:
    stream = to.pop("stream", False)
    return json.loads(dialect.encode(chat, route(name, **to), stream=stream).body)


def refused(dialect: Dialect, chat: Chat, name: str = "m") -> list[str]:
    with pytest.raises(GatewayError) as caught:
        dialect.encode(chat, route(name), stream=False)
    return [violation.field for violation in caught.value.violations]


def exact(text: str | bytes) -> Any:
    """JSON with the order of its keys and its numbers as they are written."""
    return json.loads(
        text,
        object_pairs_hook=tuple,
        parse_int=lambda digits: ("number", digits),
        parse_float=lambda digits: ("number", digits),
    )


# --- everything at once -----------------------------------------------------------------


def everything(media: str) -> Chat:
    """A request that uses all that the languages can say, and DROP for the rest. `media`: kinds
    of media it holds."""
    chat = Chat(
        model="alias",
        params=Params(
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            max_completion_tokens=9000,  # above the cap
            stop=["###", "</s>"],
            frequency_penalty=-0.5,
            presence_penalty=0.0,
            repetition_penalty=1.1,
            seed=-(2**63),
            choice_count=2,
            logprobs=True,
            top_logprobs=5,
            logit_bias={50256: 1.5},
            reasoning_effort="high",
            enable_thinking=True,
            verbosity="low",
            parallel_tool_calls=False,
        ),
        tool_choice=ToolChoice(mode=ToolChoice.MODE_REQUIRED, tool_names=["lookup", "store"]),
        response_format=chat_pb2.ResponseFormat(
            json_schema=chat_pb2.JsonSchemaFormat(
                name="answer",
                schema_json='{"type": "object", "required": ["z", "a"], "x": 1.10}',
                description="The answer.",
                strict=True,
            )
        ),
        role_templates=[
            Template(role="system", begin="<sys>", end="</sys>"),
            Template(role="environment", api_role="system", begin="<env>", end="</env>"),
            Template(role="user", begin="[user] ", end="."),
        ],
        end_user_id="end-user-1",
        prompt_cache_key="bucket",
        service_tier="default",
        unsupported_parameter_policy=DROP,
        labels={"team": "a"},  # for accounting here: not for the upstream
        extra_body_json='{"vendor": {"big": 9007199254740993, "half": 0.10}}',
    )
    say = chat.messages.add
    system = say(role="system").parts
    system.add(text="Be terse.", extra_json='{"cache_control": {"type": "ephemeral"}}')
    say(role="developer", content="No jokes.", name="ops")
    seen = say(role="user").parts
    seen.add(text="What is this?", extra_json='{"cache_control": {"type": "ephemeral"}}')
    if "image" in media:
        seen.add(image=Media(data=b"\x89PNG", media_type="image/png", detail="high"))
        seen.add(image=Media(url="https://example.com/i.png"))
        seen.add(image=Media(url="data:image/gif;base64,R0lG"))
    if "audio" in media:
        seen.add(audio=Media(data=b"RIFF", media_type="audio/wav"))
        seen.add(video=Media(url="https://example.com/v.mp4", media_type="video/mp4"))
    if "file" in media:
        seen.add(file=Media(data=b"%PDF", media_type="application/pdf", filename="d.pdf"))
        seen.add(file=Media(data=b"caf\xc3\xa9", media_type="text/plain; charset=utf-8"))
        seen.add(file=Media(file_id="file-7"))
    seen.add(raw_json='{"z": 9007199254740993, "type": "vendor", "a": 1.10}')
    asked = say(role="assistant", content="", reasoning="I should look.", refusal="Not that one.")
    asked.annotations.add(start_offset=0, end_offset=1, url="https://example.com", title="t")
    for i, arguments in enumerate(('{"q": "x", "n": 1.0, "big": 18446744073709551616}', "")):
        function = chat_pb2.FunctionCall(name="lookup", arguments_json=arguments)
        asked.tool_calls.add(id=f"call-{i}", function=function)
    say(role="tool", content='{"found": 1.50}', tool_call_id="call-0", name="lookup")
    say(role="tool", content="nothing", tool_call_id="call-1", extra_json='{"is_error": true}')
    say(role="user", content="Go on")
    say(role="user", content="please")
    say(role="environment", content="It rains")
    say(role="assistant", content="Then")
    for name, strict in (("lookup", True), ("store", None), ("unwanted", None)):
        chat.tools.add().function.CopyFrom(
            chat_pb2.FunctionTool(
                name=name,
                description="Looks up." if strict else "",
                parameters_schema_json=(
                    '{"type": "object", "properties": {"z": {"maximum": 18446744073709551616}}}'
                    if strict
                    else ""
                ),
                strict=strict,
            )
        )
    chat.tools.add(raw_json='{"type": "search", "name": "lookup", "b": 1, "a": 1e400}')
    return chat


class Case(NamedTuple):
    """One dialect, and what of the request is not in its body."""

    dialect: Dialect
    model: str
    media: str
    path: str
    headers: dict[str, str]
    dropped: list[str]


CASES = {
    "anthropic": Case(
        ANTHROPIC,
        "claude-opus-5",
        "image file",
        "/messages",
        {"anthropic-version": "2023-06-01"},
        [
            "params.frequency_penalty",
            "params.logit_bias",
            "params.logprobs",
            "params.min_p",
            "params.presence_penalty",
            "params.repetition_penalty",
            "params.seed",
            "params.top_logprobs",
            "params.verbosity",
            "params.choice_count",
            "messages[1].name",
            "messages[2].parts[1].image.detail",
            "messages[3].reasoning",
            "messages[3].annotations",
            "response_format.json_schema.name",
            "response_format.json_schema.strict",
            "response_format.json_schema.description",
            "prompt_cache_key",
        ],
    ),
    "gemini": Case(
        GEMINI,
        "gemini-3-pro",
        "image audio file",
        "/models/gemini-3-pro:streamGenerateContent?alt=sse",
        {},
        [
            "params.logit_bias",
            "params.min_p",
            "params.repetition_penalty",
            "params.verbosity",
            "messages[1].name",
            "messages[2].parts[6].file.filename",
            "messages[3].reasoning",
            "messages[3].annotations",
            "response_format.json_schema.name",
            "response_format.json_schema.strict",
            "response_format.json_schema.description",
            "params.parallel_tool_calls",
            "end_user_id",
            "prompt_cache_key",
        ],
    ),
    "dashscope": Case(
        DASHSCOPE,
        "qwen3-vl-plus",
        "image audio",
        "/services/aigc/multimodal-generation/generation",
        {"X-DashScope-SSE": "enable", "Accept": "text/event-stream"},
        [
            "params.frequency_penalty",
            "params.logit_bias",
            "params.min_p",
            "params.verbosity",
            "messages[1].name",
            "messages[2].parts[1].image.detail",
            "messages[2].parts[5].video.media_type",
            "messages[3].annotations",
            "tools[0].function.strict",
            "tool_choice.mode",
            "end_user_id",
            "prompt_cache_key",
            "service_tier",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_request_that_uses_everything_is_the_golden_body(name: str) -> None:
    case = CASES[name]
    to = route(case.model, max_completion_tokens=8192)
    encoded = case.dialect.encode(everything(case.media), to, stream=True)
    golden = (GOLDEN / f"{name}_everything.json").read_text(encoding="utf-8")
    assert exact(encoded.body) == exact(golden)
    assert encoded.path == case.path
    assert dict(encoded.headers) == case.headers
    assert list(encoded.dropped) == case.dropped
    assert encoded.max_completion_tokens == 8192
    assert encoded.stop == ("###", "</s>")


@ALL
def test_the_key_stands_in_one_header(dialect: Dialect) -> None:
    key = Key(id="k", secret=Secret("sk-1"))
    names = {
        "Anthropic": {"x-api-key": "sk-1"},
        "Gemini": {"x-goog-api-key": "sk-1"},
        "DashScope": {"Authorization": "Bearer sk-1"},
    }
    assert dialect.headers(key, "org") == names[type(dialect).__name__]


def test_what_is_not_set_is_not_sent() -> None:
    said = [{"role": "user", "content": "hi"}]
    assert body(ANTHROPIC, request("hi"), "claude-opus-5") == {
        "model": "claude-opus-5",
        "max_tokens": 4096,
        "messages": said,
    }
    assert body(GEMINI, request("hi")) == {
        "contents": [{"role": "user", "parts": [{"text": "hi"}]}]
    }
    assert body(DASHSCOPE, request("hi")) == {
        "model": "m",
        "input": {"messages": said},
        "parameters": {"result_format": "message"},
    }


@ALL
@pytest.mark.parametrize("member", ["model", "stream", "messages"])
def test_what_is_typed_is_not_patched(dialect: Dialect, member: str) -> None:
    chat = request(extra_body_json=json.dumps({member: 1}))
    assert refused(dialect, chat) == ["extra_body_json"]


@ALL
def test_a_role_that_the_language_has_no_word_for_is_refused_where_it_stands(
    dialect: Dialect,
) -> None:
    chat = request(role_templates=[Template(role="user", api_role="narrator")])
    assert refused(dialect, chat) == ["messages[0].role"]


@ALL
def test_everything_that_is_refused_is_named_at_once(dialect: Dialect) -> None:
    chat = request(params=Params(min_p=0.1, verbosity="low"), prompt_cache_key="k")
    chat.tools.add().custom.name = "shell"
    named = {"params.min_p", "params.verbosity", "prompt_cache_key", "tools[0].custom"}
    assert set(refused(dialect, chat)) == named


@ALL
def test_what_is_said_is_refused_even_where_parameters_may_be_dropped(dialect: Dialect) -> None:
    chat = Chat(model="m", unsupported_parameter_policy=DROP)
    call = chat.messages.add(role="assistant").tool_calls.add(id="i")
    call.custom.name = "shell"
    assert refused(dialect, chat) == ["messages[0].tool_calls[0].custom"]


@ALL
def test_an_answer_of_another_provider_is_taken_back(dialect: Dialect) -> None:
    """Its thoughts and sources are named, where there is no place for them."""
    chat = request()
    answer = chat.messages.add(role="assistant", content="so", reasoning="hm")
    answer.annotations.add(url="https://example.com")
    encoded = dialect.encode(chat, route("m"), stream=False)
    assert "messages[1].annotations" in encoded.dropped
    assert ("messages[1].reasoning" in encoded.dropped) != (b"hm" in encoded.body)


@ALL
def test_defaults_of_the_model_are_dropped_without_a_word(dialect: Dialect) -> None:
    to = route("m", defaults=Params(min_p=0.1, choice_count=2, parallel_tool_calls=False))
    encoded = dialect.encode(request(), to, stream=False)
    assert encoded.dropped == ()
    assert b"min_p" not in encoded.body


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}', "[" * 100_000, '{"a": "\\ud800"}'])
@ALL
def test_arguments_that_are_no_object_are_refused_where_they_stand(
    dialect: Dialect, text: str
) -> None:
    chat = request()
    call = chat.messages.add(role="assistant").tool_calls.add(id="i")
    call.function.name, call.function.arguments_json = "f", text
    if dialect is DASHSCOPE:  # sends the text as it is
        sent = body(dialect, chat)["input"]["messages"][1]["tool_calls"][0]
        assert sent["function"]["arguments"] == text
    else:
        assert refused(dialect, chat) == ["messages[1].tool_calls[0].function.arguments_json"]


# --- media ------------------------------------------------------------------------------


def seen(**media: Media) -> Chat:
    chat = Chat(model="m")
    chat.messages.add(role="user").parts.add(**media)
    return chat


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,iVBORw==",
        "data:IMAGE/PNG;x=y;base64,iVBORw%3D%3D",
        "data:image/png,%89PNG",
    ],
)
def test_a_data_url_is_sent_as_bytes(url: str) -> None:
    chat = seen(image=Media(url=url))
    data = base64.b64encode(b"\x89PNG").decode()
    (block,) = body(ANTHROPIC, chat)["messages"][0]["content"]
    assert block["source"] == {"type": "base64", "media_type": "image/png", "data": data}
    (part,) = body(GEMINI, chat)["contents"][0]["parts"]
    assert part == {"inlineData": {"mimeType": "image/png", "data": data}}
    (part,) = body(DASHSCOPE, chat)["input"]["messages"][0]["content"]
    assert part == {"image": f"data:image/png;base64,{data}"}


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:image/png;base64,???"])
@ALL
def test_a_broken_data_url_is_refused_where_it_stands(dialect: Dialect, url: str) -> None:
    assert refused(dialect, seen(image=Media(url=url))) == ["messages[0].parts[0].image.url"]


def test_files_go_where_their_kind_belongs() -> None:
    def block(file: Media) -> Any:
        return body(ANTHROPIC, seen(file=file))["messages"][0]["content"][0]

    assert block(Media(data=b"x", media_type="image/png"))["type"] == "image"
    assert block(Media(url="https://example.com/d.pdf"))["source"]["type"] == "url"
    text = block(Media(data="é".encode(), media_type="text/plain", filename="t"))
    assert text["source"] == {"type": "text", "media_type": "text/plain", "data": "é"}
    assert text["title"] == "t"
    word = Media(data=b"x", media_type="application/msword")
    assert refused(ANTHROPIC, seen(file=word)) == ["messages[0].parts[0].file"]
    latin = Media(data=b"\xe9", media_type="text/plain")
    assert refused(ANTHROPIC, seen(file=latin)) == ["messages[0].parts[0].file"]


def test_what_a_language_has_no_part_for_is_refused() -> None:
    clip = Media(data=b"x", media_type="audio/wav")
    assert refused(ANTHROPIC, seen(audio=clip)) == ["messages[0].parts[0].audio"]
    assert refused(ANTHROPIC, seen(video=clip)) == ["messages[0].parts[0].video"]
    assert refused(DASHSCOPE, seen(file=clip)) == ["messages[0].parts[0].file"]


# --- how much, and how much thought ------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "model", "expected"),
    [
        (Params(), {}, 4096),
        (Params(), {"max_completion_tokens": 1000}, 1000),
        (Params(max_completion_tokens=9000), {}, 9000),
        (Params(max_completion_tokens=9000), {"max_completion_tokens": 8192}, 8192),
        (Params(), {"defaults": Params(max_completion_tokens=77)}, 77),
        (Params(enable_thinking=True), {}, 16_384),
        (Params(enable_thinking=False), {}, 4096),
    ],
)
def test_anthropic_is_always_told_how_much(
    params: Params, model: dict[str, Any], expected: int
) -> None:
    to = route("claude-opus-5", **model)
    encoded = ANTHROPIC.encode(request(params=params), to, stream=False)
    assert json.loads(encoded.body)["max_tokens"] == expected
    assert encoded.max_completion_tokens == expected


ADAPTIVE = {"type": "adaptive", "display": "summarized"}


@pytest.mark.parametrize(
    ("model", "params", "thinking", "effort"),
    [
        ("claude-opus-5", Params(reasoning_effort="high"), ADAPTIVE, "high"),
        ("claude-opus-5", Params(reasoning_effort="minimal"), ADAPTIVE, "low"),
        ("claude-opus-4-6", Params(reasoning_effort="max"), ADAPTIVE, "max"),
        ("claude-mythos-preview", Params(enable_thinking=True), ADAPTIVE, None),
        ("claude-sonnet-5", Params(reasoning_effort="none"), {"type": "disabled"}, None),
        ("claude-sonnet-5", Params(enable_thinking=False), {"type": "disabled"}, None),
        ("claude-sonnet-5", Params(), None, None),
        ("claude-sonnet-4-5", Params(), None, None),
        ("claude-sonnet-4-5", Params(enable_thinking=False), {"type": "disabled"}, None),
        ("claude-sonnet-4-20250514", Params(enable_thinking=True), 8192, None),
        ("claude-haiku-4-5-20251001", Params(reasoning_effort="high"), 13_107, None),
        ("claude-3-7-sonnet-latest", Params(reasoning_effort="minimal"), 1638, None),
        ("kimi-k2", Params(reasoning_effort="low", max_completion_tokens=2000), 1024, None),
        ("kimi-k2", Params(reasoning_effort="max", max_completion_tokens=1025), 1024, None),
    ],
)
def test_anthropic_thinks_as_the_model_can(
    model: str, params: Params, thinking: Any, effort: str | None
) -> None:
    sent = body(ANTHROPIC, request(params=params), model)
    if isinstance(thinking, int):
        thinking = {"type": "enabled", "budget_tokens": thinking}
    assert sent.get("thinking") == thinking
    assert sent.get("output_config", {}).get("effort") == effort


def test_a_budget_needs_room() -> None:
    chat = request(params=Params(enable_thinking=True, max_completion_tokens=1024))
    assert refused(ANTHROPIC, chat, "claude-sonnet-4-5") == ["params.max_completion_tokens"]


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("gemini-3-pro", Params(), None),
        ("gemini-3-pro", Params(reasoning_effort="low"), {"thinkingLevel": "LOW"}),
        ("gemini-3-pro", Params(reasoning_effort="max"), {"thinkingLevel": "HIGH"}),
        ("gemini-3-pro", Params(enable_thinking=True), {}),
        ("gemini-3-pro", Params(enable_thinking=False), {"thinkingBudget": 0}),
        ("gemini-2.5-flash", Params(reasoning_effort="none"), {"thinkingBudget": 0}),
        ("gemini-2.5-flash", Params(reasoning_effort="medium"), {"thinkingBudget": 8192}),
        ("models/gemini-2.5-pro", Params(enable_thinking=True), {"thinkingBudget": -1}),
    ],
)
def test_gemini_thinks_as_the_model_can(model: str, params: Params, expected: Any) -> None:
    sent = body(GEMINI, request(params=params), model).get("generationConfig", {})
    if expected is not None and expected.get("thinkingBudget") != 0:
        expected = {"includeThoughts": True, **expected}
    assert sent.get("thinkingConfig") == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (Params(), {}),
        (Params(enable_thinking=False), {"enable_thinking": False}),
        (Params(reasoning_effort="none"), {"enable_thinking": False}),
        (Params(enable_thinking=True), {"enable_thinking": True}),
        (Params(reasoning_effort="low"), {"enable_thinking": True, "thinking_budget": 4096}),
        (Params(reasoning_effort="high"), {"enable_thinking": True}),
    ],
)
def test_dashscope_thinks_as_it_is_told(params: Params, expected: Any) -> None:
    sent = body(DASHSCOPE, request(params=params), "qwen-plus")["parameters"]
    assert sent == {"result_format": "message", **expected}


@pytest.mark.parametrize(
    ("dialect", "model", "params"),
    [
        (ANTHROPIC, "claude-sonnet-4-5", Params(reasoning_effort="odd")),
        (ANTHROPIC, "claude-sonnet-4-5", Params(reasoning_effort="low", enable_thinking=False)),
        (GEMINI, "gemini-2.5-pro", Params(reasoning_effort="odd")),
        (GEMINI, "gemini-3-pro", Params(reasoning_effort="low", enable_thinking=False)),
        (DASHSCOPE, "qwen-plus", Params(reasoning_effort="odd")),
        (DASHSCOPE, "qwen-plus", Params(reasoning_effort="low", enable_thinking=False)),
    ],
)
def test_an_effort_that_cannot_be_said_is_refused(
    dialect: Dialect, model: str, params: Params
) -> None:
    assert refused(dialect, request(params=params), model) == ["params.reasoning_effort"]


# --- tools ------------------------------------------------------------------------------


def armed(mode: ToolChoice.Mode.ValueType, *names: str, parallel: bool | None = None) -> Chat:
    chat = request(tool_choice=ToolChoice(mode=mode, tool_names=names))
    for name in ("a", "b"):
        chat.tools.add().function.name = name
    chat.tools.add(raw_json='{"name": "c", "function": {"name": "c"}}')
    if parallel is not None:
        chat.params.parallel_tool_calls = parallel
    return chat


AUTO, NONE, REQUIRED = ToolChoice.MODE_AUTO, ToolChoice.MODE_NONE, ToolChoice.MODE_REQUIRED
UNSPECIFIED = ToolChoice.MODE_UNSPECIFIED


@pytest.mark.parametrize(
    ("chat", "tools", "choice"),
    [
        (armed(UNSPECIFIED), "abc", None),
        (armed(AUTO), "abc", {"type": "auto"}),
        (armed(NONE, "a"), "abc", {"type": "none"}),
        (armed(REQUIRED), "abc", {"type": "any"}),
        (armed(REQUIRED, "b"), "b", {"type": "tool", "name": "b"}),
        (armed(REQUIRED, "b", "c"), "bc", {"type": "any"}),
        (armed(UNSPECIFIED, "c"), "c", {"type": "auto"}),
        (
            armed(UNSPECIFIED, parallel=False),
            "abc",
            {"type": "auto", "disable_parallel_tool_use": True},
        ),
        (
            armed(REQUIRED, parallel=True),
            "abc",
            {"type": "any", "disable_parallel_tool_use": False},
        ),
        (armed(NONE, parallel=False), "abc", {"type": "none"}),
    ],
)
def test_anthropic_calls_tools_as_it_may(chat: Chat, tools: str, choice: Any) -> None:
    sent = body(ANTHROPIC, chat)
    assert "".join(tool["name"] for tool in sent["tools"]) == tools
    assert sent.get("tool_choice") == choice


@pytest.mark.parametrize(
    ("chat", "calling"),
    [
        (armed(UNSPECIFIED), None),
        (armed(AUTO), {"mode": "AUTO"}),
        (armed(NONE, "a"), {"mode": "NONE"}),
        (armed(REQUIRED), {"mode": "ANY"}),
        (armed(REQUIRED, "a"), {"mode": "ANY", "allowedFunctionNames": ["a"]}),
        (armed(AUTO, "a", "b"), {"mode": "VALIDATED", "allowedFunctionNames": ["a", "b"]}),
    ],
)
def test_gemini_calls_functions_as_it_may(chat: Chat, calling: Any) -> None:
    sent = body(GEMINI, chat)
    assert [len(tool.get("functionDeclarations", ())) for tool in sent["tools"]] == [2, 0]
    assert sent.get("toolConfig", {}).get("functionCallingConfig") == calling


@pytest.mark.parametrize(
    ("chat", "tools", "choice"),
    [
        (armed(UNSPECIFIED), "abc", None),
        (armed(AUTO), "abc", "auto"),
        (armed(NONE, "a"), "abc", "none"),
        (armed(REQUIRED, "b"), "b", {"type": "function", "function": {"name": "b"}}),
        (armed(AUTO, "a", "c"), "ac", "auto"),
    ],
)
def test_dashscope_calls_functions_as_it_may(chat: Chat, tools: str, choice: Any) -> None:
    sent = body(DASHSCOPE, chat)["parameters"]
    assert "".join(tool["function"]["name"] for tool in sent["tools"]) == tools
    assert sent.get("tool_choice") == choice


def test_dashscope_cannot_demand_any_call() -> None:
    assert refused(DASHSCOPE, armed(REQUIRED)) == ["tool_choice.mode"]


def test_the_result_of_a_call_goes_back_to_it() -> None:
    chat = request()
    asked = chat.messages.add(role="assistant").tool_calls
    for call_id, name in (("i", "f"), ("tokenwire-call-r-0-1", "g")):
        asked.add(id=call_id, function=chat_pb2.FunctionCall(name=name))
        chat.messages.add(role="tool", tool_call_id=call_id, content="x")
    said = body(GEMINI, chat)["contents"]
    assert said[1]["parts"] == [
        {"functionCall": {"id": "i", "name": "f", "args": {}}},
        {"functionCall": {"name": "g", "args": {}}},  # Google gave it no id
    ]
    assert [part["functionResponse"] for part in said[2]["parts"]] == [
        {"id": "i", "name": "f", "response": {"output": "x"}},
        {"name": "g", "response": {"output": "x"}},
    ]
    chat.messages[-1].tool_call_id = "unknown"
    assert refused(GEMINI, chat) == ["messages[3].tool_call_id"]
    chat.messages[-1].tool_call_id = ""
    assert refused(ANTHROPIC, chat) == ["messages[3].tool_call_id"]


# --- an answer goes back as it was -------------------------------------------------------


def continued(extra: Any, content: str = "Yes.", arguments: str = '{"a": 1}', **more: Any) -> Chat:
    chat = request("hi")
    answer = chat.messages.add(role="assistant", content=content, extra_json=json.dumps(extra))
    answer.MergeFrom(chat_pb2.ChatMessage(**more))
    function = chat_pb2.FunctionCall(name="f", arguments_json=arguments)
    answer.tool_calls.add(id="i", function=function)
    return chat


BLOCKS = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "text", "text": "Yes."},
    {"type": "tool_use", "id": "i", "name": "f", "input": {"a": 1}},
]
PARTS = [
    {"text": "hm", "thought": True},
    {"text": "Yes."},
    {"functionCall": {"name": "f", "args": {"a": 1}}, "thoughtSignature": "s"},
]
KEPT = {"anthropic": {"content": BLOCKS}, "gemini": {"parts": PARTS}}


def test_an_answer_goes_back_as_it_was() -> None:
    chat = continued(KEPT, reasoning="hm")
    assert body(ANTHROPIC, chat)["messages"][1] == {"role": "assistant", "content": BLOCKS}
    assert body(GEMINI, chat)["contents"][1] == {"role": "model", "parts": PARTS}


@pytest.mark.parametrize(
    "change", [{"content": "No."}, {"arguments": '{"a": 2}'}], ids=["text", "arguments"]
)
def test_an_answer_that_was_edited_does_not(change: dict[str, Any]) -> None:
    chat = continued(KEPT, **change)
    block = body(ANTHROPIC, chat)["messages"][1]
    part = body(GEMINI, chat)["contents"][1]
    assert "signature" not in json.dumps(block)
    assert "thoughtSignature" not in json.dumps(part)


def test_an_answer_that_got_parts_does_not() -> None:
    kept = {"anthropic": {"content": BLOCKS[::2]}, "gemini": {"parts": PARTS[::2]}}
    chat = continued(kept)
    chat.messages[1].ClearField("content")
    assert body(ANTHROPIC, chat)["messages"][1]["content"] == BLOCKS[::2]
    assert body(GEMINI, chat)["contents"][1]["parts"] == PARTS[::2]
    chat.messages[1].parts.add(text="more")
    assert body(ANTHROPIC, chat)["messages"][1]["content"][0] == {"type": "text", "text": "more"}
    assert body(GEMINI, chat)["contents"][1]["parts"][0] == {"text": "more"}


def test_a_message_with_fields_of_its_own_is_not_joined() -> None:
    chat = request("a")
    chat.messages.add(role="user", content="b", extra_json='{"own": 1}')
    chat.messages.add(role="user", content="c")
    assert [said.get("own") for said in body(ANTHROPIC, chat)["messages"]] == [None, 1, None]
    assert [said.get("own") for said in body(GEMINI, chat)["contents"]] == [None, 1, None]


def test_what_one_dialect_kept_is_not_sent_by_another() -> None:
    for dialect in (ANTHROPIC, GEMINI, DASHSCOPE):
        sent = json.dumps(body(dialect, continued({**KEPT, "own": 1.0})))
        assert '"own": 1.0' in sent
        assert '"anthropic"' not in sent
        assert '"gemini"' not in sent
