"""Each dialect and profile says what its servers understand, and loses nothing in silence."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from everything import everything
from harness import request
from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.config import Key, Model, Upstream
from tokenwire_service.errors import Fault, GatewayError, UpstreamFault
from tokenwire_service.providers import AUTO, DIALECTS, NAMES, PROFILES
from tokenwire_service.secret import Secret
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.dialect import Encoded, Route, path_segment
from tokenwire_service.upstream.dialects import loaded

GOLDEN = Path(__file__).with_name("golden")
Chat = chat_service_pb2.ChatRequest
DROP = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP
REJECT = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_REJECT
LOADED = loaded()


class Case(NamedTuple):
    """One way to be spoken to. A dialect of its own joins every test below by a row."""

    dialect: str
    profile: str = AUTO

    @property
    def route(self) -> Route:
        return Route(
            Upstream(
                name="u",
                base_url="http://upstream.example",
                keys=(),
                dialect=self.dialect,
                profile=self.profile,
                api_version="2024-10-21" if self.dialect == "azure" else None,
            ),
            Model(name="m", upstream="u", max_completion_tokens=4096),
            "upstream-model",
        )

    def encode(self, chat: Chat, *, stream: bool = False) -> Encoded:
        return LOADED[self.dialect].encode(chat, self.route, stream=stream)


CASES = {
    **{name: Case(name) for name in DIALECTS},
    **{
        f"openai_{name}": Case("openai", name)
        for name in PROFILES
        if name not in ("azure", "azure-reasoning", "azure-hybrid", "qwen", "internlm")
    },
    "azure_reasoning": Case("azure", "azure-reasoning"),
    "azure_hybrid": Case("azure", "azure-hybrid"),
}


def exact(text: str | bytes) -> Any:
    """JSON with the order of its keys and its numbers as they are written."""
    return json.loads(
        text,
        object_pairs_hook=tuple,
        parse_int=lambda digits: ("number", digits),
        parse_float=lambda digits: ("number", digits),
    )


# --- everything at once -----------------------------------------------------------------


def test_every_dialect_and_profile_is_a_case() -> None:
    assert {case.dialect for case in CASES.values()} == set(DIALECTS)
    spoken = {case.route.profile_name for case in CASES.values()} - {""}
    assert spoken == set(PROFILES)


PROFILED = [name for name, case in CASES.items() if case.route.profile_name]


@pytest.mark.parametrize("name", PROFILED)
def test_one_request_that_uses_every_field_is_the_golden_body(name: str) -> None:
    golden = (GOLDEN / f"{name}_everything.json").read_text(encoding="utf-8")
    assert exact(CASES[name].encode(everything(), stream=True).body) == exact(golden)


@pytest.mark.parametrize("name", PROFILED)
def test_that_request_names_all_that_is_left_out_of_it(name: str) -> None:
    """Exactly what the profile does not take: nothing more, and nothing in silence."""
    case = CASES[name]
    profile = PROFILES[case.route.profile_name]
    without = profile.unsupported | profile.reasoned
    paths = {
        "messages.name": {"messages[1].name"},
        "messages.reasoning": {"messages[3].reasoning"},
        "messages.refusal": {"messages[3].refusal"},
    }
    expected = {"messages[3].annotations"}
    for field in without:
        top = field in Chat.DESCRIPTOR.fields_by_name
        expected |= paths.get(field, {field if top else f"params.{field}"})
    # The template joins two messages: those behind them are found where the caller put them.
    shifted = {path.replace("messages[1]", "messages[2]") for path in expected}
    shifted = {path.replace("messages[3]", "messages[4]") for path in shifted}
    assert set(case.encode(everything(), stream=True).dropped) == shifted


def test_every_parameter_has_a_name() -> None:
    assert set(chat_pb2.GenerationParams.DESCRIPTOR.fields_by_name) <= set(NAMES)


def test_profiles_speak_of_fields_that_there_are() -> None:
    message = {f"messages.{f}" for f in chat_pb2.ChatMessage.DESCRIPTOR.fields_by_name}
    fields = set(chat_pb2.GenerationParams.DESCRIPTOR.fields_by_name) | message
    fields |= set(Chat.DESCRIPTOR.fields_by_name)
    for name, profile in PROFILES.items():
        spoken = {*profile.names, *profile.values, *profile.unsupported, *profile.reasoned}
        assert spoken <= fields, name
        assert {variant for _, variant in profile.variants} <= set(PROFILES), name


# --- nothing is lost in silence ---------------------------------------------------------

# What is the gateway's own and no upstream's.
OURS = {"model", "labels", "unsupported_parameter_policy", "role_templates[0].role"}

# The least that a message needs around a field of it.
LEAST: Mapping[str, Callable[[Any], None]] = {
    "ChatMessage": lambda m: m.MergeFrom(chat_pb2.ChatMessage(role="assistant", content="c")),
    "Media": lambda m: m.MergeFrom(chat_pb2.Media(url="https://e.example/a.png")),
    "ContentPart": lambda m: m.MergeFrom(chat_pb2.ContentPart(text="t")),
    "Tool": lambda m: m.function.MergeFrom(chat_pb2.FunctionTool(name="f")),
    "FunctionTool": lambda m: m.MergeFrom(chat_pb2.FunctionTool(name="f")),
    "CustomTool": lambda m: m.MergeFrom(chat_pb2.CustomTool(name="c")),
    "ToolCall": lambda m: m.function.MergeFrom(
        chat_pb2.FunctionCall(name="f", arguments_json="{}")
    ),
    "JsonSchemaFormat": lambda m: m.MergeFrom(
        chat_pb2.JsonSchemaFormat(name="n", schema_json="{}")
    ),
    "FunctionCall": lambda m: m.MergeFrom(chat_pb2.FunctionCall(name="f", arguments_json="{}")),
    "CustomCall": lambda m: m.MergeFrom(chat_pb2.CustomCall(name="c")),
    "RoleTemplate": lambda m: m.MergeFrom(chat_pb2.RoleTemplate(role="user")),
}


def leaves(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    """The path of every field there is, messages without fields included."""
    for field in descriptor.fields:
        path = prefix + field.name
        inner = field.message_type
        if inner is None or inner.GetOptions().map_entry or not inner.fields:
            yield path
        else:
            yield from leaves(
                field.message_type, f"{path}[0]." if field.is_repeated else f"{path}."
            )


def sample(field: FieldDescriptor) -> Any:
    """A value that differs from the least."""
    match field.type:
        case FieldDescriptor.TYPE_STRING if field.name.endswith("_json"):
            return '{"marker": 1}'
        case FieldDescriptor.TYPE_STRING if field.name == "url":
            return "data:image/png;base64,iVBORw=="
        case FieldDescriptor.TYPE_STRING if field.name in ("media_type", "detail"):
            return {"media_type": "image/png", "detail": "high"}[field.name]
        case FieldDescriptor.TYPE_STRING if field.name in ("api_role", "fallback_role", "role"):
            return "system"
        case FieldDescriptor.TYPE_STRING if field.name == "reasoning_effort":
            return "low"
        case FieldDescriptor.TYPE_STRING:
            return "marker"
        case FieldDescriptor.TYPE_BYTES:
            return b"%PDF-1.7"
        case FieldDescriptor.TYPE_ENUM:
            return chat_pb2.ToolChoice.MODE_REQUIRED
        case FieldDescriptor.TYPE_DOUBLE:
            return 0.5
        case FieldDescriptor.TYPE_BOOL:
            return True
        case _:
            return 2


def with_field(path: str) -> tuple[Chat, Chat]:
    """(a request without that field, the same with it)."""
    chat = request(model="m")
    if path.startswith(("tool_choice", "messages[0].tool_calls")):
        chat.tools.add().function.name = "f"
    if path.startswith("messages[0].parts"):
        chat.messages[0].ClearField("content")
    elif path.startswith("messages[0]") and not path.endswith((".role", ".content")):
        chat.messages[0].role = "assistant"
    message: Message = chat
    *parents, last = path.split(".")
    for step in parents:
        name, _, index = step.partition("[")
        inner = getattr(message, name)
        if index:
            message = inner[0] if len(inner) else inner.add()
        else:
            inner.SetInParent()
            message = inner
        if message.ByteSize() == 0 and (least := LEAST.get(message.DESCRIPTOR.name)):
            least(message)
    field = message.DESCRIPTOR.fields_by_name[last]
    before = Chat()
    before.CopyFrom(chat)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, last)[5] = 1.0
    elif field.message_type is not None:
        getattr(message, last).SetInParent()
        before.ClearField(parents[0])  # type: ignore[arg-type]
    elif field.is_repeated:
        getattr(message, last).append("f" if last == "tool_names" else "marker")
    else:
        setattr(message, last, sample(field))
    return before, chat


LEAVES = [path for path in leaves(Chat.DESCRIPTOR) if path not in OURS | {"labels"}]


def test_the_walk_reaches_every_field() -> None:
    assert len(LEAVES) > 80
    assert {"params.top_k", "messages[0].parts[0].image.detail", "tools[0].custom.format_json"} <= {
        *LEAVES
    }


@pytest.mark.parametrize("policy", [REJECT, DROP], ids=["reject", "drop"])
@pytest.mark.parametrize("name", CASES)
def test_no_field_is_lost_in_silence(name: str, policy: Any) -> None:
    """Each field alone: it changes what is sent, or what the gateway does with the answer; or it
    is refused where it stands; or the header names it."""
    case, lost = CASES[name], []
    for path in LEAVES:
        before, after = with_field(path)
        before.unsupported_parameter_policy = after.unsupported_parameter_policy = policy
        try:
            one, other = said(case, before), said(case, after)
        except GatewayError as error:
            named = {violation.field for violation in error.violations}
            if not any(touches(path, field) for field in named):
                lost.append(f"{path}: refused at {named}")
            continue
        if one[:-1] == other[:-1] and not any(touches(path, field) for field in other[-1]):
            lost.append(path)
    assert not lost


def said(case: Case, chat: Chat) -> tuple[Any, ...]:
    encoded = case.encode(chat)
    return (
        encoded.path,
        encoded.body,
        encoded.headers,
        encoded.notes,
        encoded.stop,  # the gateway cuts the answer there
        encoded.dropped,
    )


def touches(path: str, named: str) -> bool:
    """Whether an error at `named` is about `path`: that field, or what it stands in."""
    return path == named or path.startswith((f"{named}.", f"{named}["))


# --- all that OpenAI takes --------------------------------------------------------------

# The parameters of POST /chat/completions: CompletionCreateParams of openai-python 3.57.0, as
# published on 2026-11-25.
PUBLISHED = {
    "messages",
    "model",
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "moderation",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
}
P = chat_pb2.GenerationParams
FUNCTION = chat_pb2.Tool(function=chat_pb2.FunctionTool(name="f"))
# Parameter -> (how a caller says it, what is sent for it).
TYPED: Mapping[str, tuple[dict[str, Any], Any]] = {
    "messages": ({}, [{"role": "user", "content": "hello"}]),
    "model": ({"model": "m"}, "gpt-4o"),
    "frequency_penalty": ({"params": P(frequency_penalty=1)}, 1.0),
    "presence_penalty": ({"params": P(presence_penalty=-1)}, -1.0),
    "logit_bias": ({"params": P(logit_bias={7: -100})}, {"7": -100.0}),
    "logprobs": ({"params": P(logprobs=True)}, True),
    "top_logprobs": ({"params": P(logprobs=True, top_logprobs=3)}, 3),
    "max_completion_tokens": ({"params": P(max_completion_tokens=9)}, 9),
    "n": ({"params": P(choice_count=2)}, 2),
    "parallel_tool_calls": ({"params": P(parallel_tool_calls=False)}, False),
    "prompt_cache_key": ({"prompt_cache_key": "k"}, "k"),
    "reasoning_effort": ({"params": P(reasoning_effort="xhigh")}, "xhigh"),
    "response_format": (
        {"response_format": chat_pb2.ResponseFormat(json_object=chat_pb2.JsonObjectFormat())},
        {"type": "json_object"},
    ),
    "safety_identifier": ({"end_user_id": "e"}, "e"),
    "seed": ({"params": P(seed=2**63 - 1)}, 2**63 - 1),
    "service_tier": ({"service_tier": "flex"}, "flex"),
    "stop": ({"params": P(stop=["a"])}, ["a"]),
    "stream": ({}, True),
    "stream_options": ({}, {"include_usage": True, "include_obfuscation": False}),
    "temperature": ({"params": P(temperature=0)}, 0.0),
    "top_p": ({"params": P(top_p=0.1)}, 0.1),
    "tools": ({"tools": [FUNCTION]}, [{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": (
        {"tools": [FUNCTION], "tool_choice": chat_pb2.ToolChoice(mode=2)},
        "none",
    ),
    "verbosity": ({"params": P(verbosity="low")}, "low"),
}
# The rest is one provider's, or two providers': it rides extra_body_json, unread.
EXTRA: Mapping[str, Any] = {
    "audio": {"voice": "alloy", "format": "mp3"},
    "function_call": "auto",  # replaced by tool_choice
    "functions": [{"name": "f"}],  # replaced by tools
    "max_tokens": 9,  # replaced by max_completion_tokens
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "explicit", "ttl": "24h"},
    "prompt_cache_retention": "24h",
    "store": True,
    "user": "u",  # replaced by safety_identifier
    "web_search_options": {"search_context_size": "low"},
}
OFFICIAL = Upstream(name="u", base_url="https://api.openai.com/v1", keys=())


def sent(chat: Chat, model: str = "gpt-4o", *, stream: bool = True) -> dict[str, Any]:
    route = Route(OFFICIAL, None, model)
    body: dict[str, Any] = json.loads(LOADED["openai"].encode(chat, route, stream=stream).body)
    return body


def test_every_parameter_of_openai_has_its_way() -> None:
    assert TYPED.keys() | EXTRA.keys() == PUBLISHED
    assert not TYPED.keys() & EXTRA.keys()


@pytest.mark.parametrize("name", TYPED)
def test_a_typed_parameter_is_sent_under_openais_name(name: str) -> None:
    fields, expected = TYPED[name]
    got = sent(request(**{"model": "m", **fields}))[name]
    assert (got, type(got)) == (expected, type(expected))


@pytest.mark.parametrize("name", EXTRA)
def test_any_other_is_sent_as_the_caller_wrote_it(name: str) -> None:
    chat = request(extra_body_json=json.dumps({name: EXTRA[name]}))
    assert sent(chat)[name] == EXTRA[name]


# --- reasoning models -------------------------------------------------------------------

SAMPLING = P(temperature=1, top_p=1, frequency_penalty=0, presence_penalty=0, logprobs=True)
ALWAYS = ["o1", "o3-mini", "o4-mini-2025-04-16", "ft:o4-mini:acme", "gpt-5", "gpt-5-nano"]
ON_DEMAND = ["gpt-5.1", "gpt-5.2-mini", "gpt-6"]
NEVER = ["gpt-4o", "gpt-4.1-mini", "gpt-5-chat-latest", "gpt-5.1-chat-latest", "gpt-3.5-turbo"]


@pytest.mark.parametrize("model", ALWAYS + ON_DEMAND)
def test_a_reasoning_model_has_words_of_its_own(model: str) -> None:
    chat = request(params=P(max_completion_tokens=5, reasoning_effort="low", stop=["x"]))
    chat.messages.insert(0, chat_pb2.ChatMessage(role="system", content="s"))
    body = sent(chat, model, stream=False)
    assert body == {
        "model": model,
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": "hello"},
        ],
        "max_completion_tokens": 5,
        "reasoning_effort": "low",
    }, "stop strings are found by the gateway"


@pytest.mark.parametrize("model", ALWAYS)
def test_a_model_that_always_reasons_takes_no_sampling(model: str) -> None:
    with pytest.raises(GatewayError) as caught:
        sent(request(params=SAMPLING), model)
    assert caught.value.reason_name == "UNSUPPORTED_PARAMETER"
    assert [v.field for v in caught.value.violations] == sorted(
        f"params.{field.name}" for field, _ in SAMPLING.ListFields()
    )


@pytest.mark.parametrize("model", ON_DEMAND)
def test_one_that_reasons_if_asked_takes_it_unless_asked(model: str) -> None:
    names = [field.name for field, _ in SAMPLING.ListFields()]
    assert sent(request(params=SAMPLING), model).keys() >= set(names)
    with_none = P(reasoning_effort="none")
    with_none.MergeFrom(SAMPLING)
    assert sent(request(params=with_none), model).keys() >= set(names)
    with_some = P(reasoning_effort="low")
    with_some.MergeFrom(SAMPLING)
    with pytest.raises(GatewayError):
        sent(request(params=with_some), model)


@pytest.mark.parametrize("model", NEVER)
def test_other_models_of_openai_are_no_reasoning_models(model: str) -> None:
    chat = request(params=SAMPLING)
    chat.messages.insert(0, chat_pb2.ChatMessage(role="system", content="s"))
    body = sent(chat, model)
    assert body["messages"][0]["role"] == "system"
    assert body["temperature"] == 1


# --- the choice -------------------------------------------------------------------------

CHOICES = [
    # base URL, dialect as configured, model -> dialect, profile
    ("https://api.openai.com/v1", "openai", "gpt-4o", "openai", "openai"),
    ("https://API.openai.com/v1", "openai", "o3", "openai", "openai-reasoning"),
    ("https://api.openai.com/v1", AUTO, "gpt-5.1", "openai", "openai-hybrid"),
    ("https://api.openai.com.evil.example/v1", "openai", "o3", "openai", "compatible"),
    ("http://10.0.0.1:8000/v1", "openai", "o3", "openai", "compatible"),
    ("http://10.0.0.1:8000/v1", "openai", "qwen3-8b", "openai", "compatible"),
    ("http://10.0.0.1:8000/v1", "openai", "internlm3", "openai", "compatible"),
    ("http://10.0.0.1:8000/v1", AUTO, "llama-3", "openai", "compatible"),
    ("http://10.0.0.1:8000/v1", AUTO, "gpt-4o", "openai", "openai"),
    ("http://10.0.0.1:8000/v1", AUTO, "o1-mini", "openai", "openai-reasoning"),
    ("http://10.0.0.1:8000/v1", AUTO, "openai/gpt-oss-20b", "openai", "compatible"),
    ("http://10.0.0.1:8000/v1", AUTO, "Qwen/Qwen3-8B", "qwen", "qwen"),
    ("http://10.0.0.1:8000/v1", AUTO, "internlm/internlm3-8b", "internlm", "internlm"),
    ("http://10.0.0.1:8000/v1", "qwen", "o1", "qwen", "qwen"),
    ("https://a.openai.azure.com", AUTO, "d", "azure", "azure"),
    ("https://a.openai.azure.com", AUTO, "o3-mini", "azure", "azure-reasoning"),
    ("https://a.openai.azure.com/openai/v1", "openai", "o3", "openai", "compatible"),
    ("https://dashscope.aliyuncs.com/compatible-mode/v1", AUTO, "x", "qwen", "qwen"),
    ("https://dashscope.aliyuncs.com/compatible-mode/v1", "openai", "x", "openai", "compatible"),
    ("https://chat.intern-ai.org.cn/api/v1", AUTO, "x", "internlm", "internlm"),
    ("https://api.deepseek.com", "openai", "deepseek-chat", "openai", "deepseek"),
    ("https://api.deepseek.com", AUTO, "qwen-distill", "openai", "deepseek"),
    ("https://api.groq.com/openai/v1", "openai", "qwen/qwen3-32b", "openai", "groq"),
    ("https://api.mistral.ai/v1", AUTO, "mistral-small", "openai", "mistral"),
    ("https://api.x.ai/v1", "openai", "grok-4", "openai", "xai"),
    ("https://us-east-1.api.x.ai/v1", "openai", "grok-4", "openai", "xai"),
    ("https://openrouter.ai/api/v1", AUTO, "openai/o3", "openai", "openrouter"),
    ("https://api.together.xyz/v1", "openai", "x", "openai", "together"),
]


@pytest.mark.parametrize(("base_url", "dialect", "model", "spoken", "profile"), CHOICES)
def test_the_address_decides_and_the_name_only_where_it_is_let(
    base_url: str, dialect: str, model: str, spoken: str, profile: str
) -> None:
    upstream = Upstream(name="u", base_url=base_url, keys=(), dialect=dialect)
    for route in (
        Route(upstream, None, model),
        Route(upstream, Model(name="mine", upstream="u"), model),
        Route(upstream, Model(name=model, upstream="u"), "deployment-7"),
    ):
        assert (route.dialect_name, route.profile_name) == (spoken, profile)


def test_what_is_configured_is_not_guessed() -> None:
    upstream = Upstream(
        name="u", base_url="https://api.openai.com/v1", keys=(), dialect="openai", profile="vllm"
    )
    assert Route(upstream, None, "o3").profile_name == "vllm"
    model = Model(name="o3", upstream="u", dialect="internlm", profile="ollama")
    route = Route(upstream, model, "o3")
    assert (route.dialect_name, route.profile_name) == ("internlm", "ollama")
    guessed = Model(name="o3", upstream="u", profile=AUTO)
    assert Route(upstream, guessed, "o3").profile_name == "openai-reasoning"


def test_what_configuration_lists_as_unsupported_replaces_the_profile() -> None:
    upstream = Upstream(
        name="u",
        base_url="https://api.openai.com/v1",
        keys=(),
        unsupported_parameters=frozenset({"seed"}),
    )
    route = Route(upstream, None, "gpt-4o")
    chat = request(params=P(top_k=1))
    assert json.loads(LOADED["openai"].encode(chat, route, stream=False).body)["top_k"] == 1
    with pytest.raises(GatewayError):
        LOADED["openai"].encode(request(params=P(seed=1)), route, stream=False)


# --- azure ------------------------------------------------------------------------------


def azure(base_url: str, model: str = "prod gpt/4?", version: str | None = "2024-10-21") -> str:
    upstream = Upstream(name="u", base_url=base_url, keys=(), dialect="azure", api_version=version)
    chat = request()
    return LOADED["azure"].encode(chat, Route(upstream, None, model), stream=False).path


def test_azure_has_the_deployment_and_the_version_in_its_path() -> None:
    path = "/deployments/prod%20gpt%2F4%3F/chat/completions?api-version=2024-10-21"
    assert azure("https://a.openai.azure.com") == f"/openai{path}"
    assert azure("https://a.openai.azure.com/openai") == path
    v1 = "https://a.openai.azure.com/openai/v1"
    assert azure(v1, version=None) == "/chat/completions"
    assert azure(v1, version="preview") == "/chat/completions?api-version=preview"


@pytest.mark.parametrize("name", [".", ".."])
def test_no_callers_name_can_leave_its_segment(name: str) -> None:
    with pytest.raises(GatewayError) as caught:
        path_segment(name)
    assert caught.value.violations[0].field == "model"
    assert path_segment("../a") == "..%2Fa"


@pytest.mark.parametrize("name", DIALECTS)
def test_a_key_is_in_one_header_and_nowhere_else(name: str) -> None:
    key = Key(id="k", secret=Secret("sk-very-secret"))
    headers = LOADED[name].headers(key, "org")
    assert sum("sk-very-secret" in value for value in headers.values()) == 1
    encoded = CASES[name].encode(request(), stream=True)
    assert "sk-very-secret" not in repr(encoded)
    assert set(encoded.headers) & set(headers) == set()


def test_azures_key_has_a_header_of_its_own() -> None:
    key = Key(id="k", secret=Secret("s"))
    assert LOADED["azure"].headers(key, "org") == {"api-key": "s"}


# --- errors inside a 200 ----------------------------------------------------------------

CODE = b'{"code": -20003, "msg": "exceeds the maximum length", "requestId": "r"}'


def fault_of(call: Callable[[], Any]) -> UpstreamFault:
    with pytest.raises(UpstreamFault) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("name", ["internlm", "qwen"])
def test_a_bare_code_inside_a_200_is_an_error(name: str) -> None:
    dialect, encoded = LOADED[name], CASES[name].encode(request(), stream=True)
    whole = fault_of(lambda: dialect.decode(encoded, CODE))
    streamed = fault_of(lambda: dialect.stream_decoder(encoded).feed(sse.Event("", CODE, "")))
    for fault in (whole, streamed):
        assert fault.fault is Fault.CONTEXT_TOO_LONG
        assert fault.message == "exceeds the maximum length"
    other = b'{"code": "Throttling.RateQuota", "message": "m", "request_id": "r"}'
    assert fault_of(lambda: dialect.decode(encoded, other)).fault is Fault.RATE_LIMITED


@pytest.mark.parametrize("name", ["internlm", "qwen"])
@pytest.mark.parametrize("code", ["0", '"0"', "null", '""', "200"])
def test_a_code_that_says_nothing_is_none(name: str, code: str) -> None:
    dialect, encoded = LOADED[name], CASES[name].encode(request(), stream=True)
    body = f'{{"code": {code}, "choices": [{{"message": {{"content": "a"}}}}]}}'.encode()
    assert dialect.decode(encoded, body).choices[0].message.content == "a"


def test_elsewhere_a_bare_code_is_no_answer_either() -> None:
    dialect, encoded = LOADED["openai"], CASES["openai"].encode(request())
    assert fault_of(lambda: dialect.decode(encoded, CODE)).fault is Fault.PROTOCOL


# --- documents --------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[2] / "docs" / "dialects.md"


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def documented_dialects() -> Iterator[str]:
    """The rows that docs/dialects.md must have for the dialects."""
    for name, row in DIALECTS.items():
        module = row.implementation.partition(":")[0]
        yield f"| `{name}` | `upstream/{module}.py` | {quoted(row.addresses)} |"


def documented_profiles() -> Iterator[str]:
    """The rows that docs/dialects.md must have for the profiles."""
    for name, profile in PROFILES.items():
        places = [f"`{field}` as `{place}`" for field, place in profile.names.items()]
        places += [f"role `{role}` as `{other}`" for role, other in profile.roles.items()]
        if not profile.stream_options:
            places.append("no `stream_options`")
        elif len(profile.stream_options) > 1:
            places.append("`stream_options.include_obfuscation` false")
        if profile.stops_here:
            places.append("`stop` kept by the gateway")
        without = [f"`{field}`" for field in sorted(profile.unsupported)]
        if profile.reasoned:
            fields = quoted(sorted(profile.reasoned))
            without.append(f"with a `reasoning_effort` other than `none` also {fields}")
        yield (
            f"| `{name}` | {quoted(profile.addresses)} | {', '.join(places) or '-'} "
            f"| {', '.join(without) or '-'} |"
        )


@pytest.mark.parametrize("rows", [documented_dialects, documented_profiles])
def test_the_document_lists_every_dialect_and_profile(rows: Callable[[], Iterator[str]]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    missing = [row for row in rows() if f"\n{row}" not in text]
    assert not missing, "\n".join(missing)
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(listed) == {*DIALECTS, *PROFILES}
