"""A request becomes exactly the body that OpenAI's language asks for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from everything import everything
from harness import request
from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.config import Key, Model, Upstream
from tokenwire_service.errors import GatewayError
from tokenwire_service.secret import Secret
from tokenwire_service.upstream.dialect import Encoded, Route
from tokenwire_service.upstream.openai import OpenAI
from tokenwire_service.validation import KNOWN_ROLES

GOLDEN = Path(__file__).with_name("golden") / "openai_everything.json"

Chat = chat_service_pb2.ChatRequest
Params = chat_pb2.GenerationParams
Template = chat_pb2.RoleTemplate
ToolChoice = chat_pb2.ToolChoice


def route(
    base_url: str = "http://upstream.example/v1",
    unsupported: frozenset[str] | None = None,
    **model: Any,
) -> Route:
    upstream = Upstream(name="u", base_url=base_url, keys=(), unsupported_parameters=unsupported)
    return Route(upstream, Model(name="m", upstream="u", **model) if model else None, "m")


def encode(chat: Chat, to: Route | None = None, *, stream: bool = False) -> Encoded:
    return OpenAI().encode(chat, to or route(), stream=stream)


def body(chat: Chat, to: Route | None = None, *, stream: bool = False) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(encode(chat, to, stream=stream).body)
    return decoded


def refused(chat: Chat, to: Route | None = None) -> tuple[str, list[str], list[str]]:
    """(reason, paths, descriptions)."""
    with pytest.raises(GatewayError) as caught:
        encode(chat, to)
    found = caught.value.violations
    return caught.value.reason_name, [v.field for v in found], [v.description for v in found]


def exact(text: str | bytes) -> Any:
    """JSON with the order of its keys and its numbers as they are written."""
    return json.loads(
        text,
        object_pairs_hook=tuple,
        parse_int=lambda digits: ("number", digits),
        parse_float=lambda digits: ("number", digits),
    )


# --- everything at once -----------------------------------------------------------------


def everywhere() -> Route:
    upstream = Upstream(name="u", base_url="http://upstream.example/v1", keys=())
    model = Model(name="m", aliases=("alias",), upstream="u", max_completion_tokens=4096)
    return Route(upstream, model, "upstream-model")


def set_fields(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        yield field.full_name
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else [value]:
                yield from set_fields(one)


def all_fields(descriptor: Descriptor) -> Iterator[str]:
    for field in descriptor.fields:
        yield field.full_name
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from all_fields(field.message_type)


def test_one_request_that_uses_every_field_is_the_golden_body() -> None:
    encoded = encode(everything(), everywhere(), stream=True)
    assert exact(encoded.body) == exact(GOLDEN.read_text(encoding="utf-8"))
    assert encoded.path == "/chat/completions"
    assert encoded.max_completion_tokens == 4096
    assert encoded.dropped == ("messages[4].annotations",)
    assert encoded.stop == ("###", "</s>")


def test_that_request_uses_every_field_there_is() -> None:
    """But for the other members of a oneof that can be set once; they have tests below."""
    alone = {"text", "json_object", "raw_json"}
    elsewhere = {f"tokenwire.v1.ResponseFormat.{name}" for name in alone}
    assert set(all_fields(Chat.DESCRIPTOR)) - set(set_fields(everything())) == elsewhere


def test_api_openai_com_gets_other_names() -> None:
    other = everywhere()
    official = Route(
        Upstream(
            name="u",
            base_url="https://api.openai.com/v1",
            keys=(),
            unsupported_parameters=frozenset(),
        ),
        other.model,
        other.model_name,
    )
    theirs = json.loads(encode(everything(), official, stream=True).body)
    ours = json.loads(encode(everything(), other, stream=True).body)
    assert theirs.pop("max_completion_tokens") == ours.pop("max_tokens")
    assert theirs.pop("safety_identifier") == ours.pop("user")
    assert theirs["stream_options"].pop("include_obfuscation") is False
    assert theirs == ours


@pytest.mark.parametrize(
    ("base_url", "official"),
    [
        ("https://api.openai.com/v1", True),
        ("https://api.openai.com", True),
        ("https://api.openai.com:443/v1", True),
        ("https://API.OpenAI.com/v1", True),
        ("http://api.openai.com.example/v1", False),
        ("http://example.com/api.openai.com", False),
        ("http://[::1]:8080/v1", False),
    ],
)
def test_openai_is_known_by_its_host(base_url: str, official: bool) -> None:
    sent = body(request(end_user_id="e"), route(base_url))
    assert ("safety_identifier" in sent, "user" in sent) == (official, not official)


def test_what_is_not_set_is_not_sent() -> None:
    assert body(request("hi")) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert body(request("hi", params=Params(), tool_choice=ToolChoice())) == body(request("hi"))


def test_a_stream_asks_for_usage() -> None:
    sent = body(request(), stream=True)
    assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})


def test_the_key_and_its_organization_are_headers() -> None:
    key = Key(id="k", secret=Secret("sk-1"))
    assert OpenAI().headers(key, None) == {"Authorization": "Bearer sk-1"}
    assert OpenAI().headers(key, "org") == {
        "Authorization": "Bearer sk-1",
        "OpenAI-Organization": "org",
    }


# --- roles ------------------------------------------------------------------------------


def talk(*turns: tuple[str, str], templates: tuple[Template, ...] = ()) -> Chat:
    chat = Chat(model="m", role_templates=templates)
    for role, content in turns:
        chat.messages.add(role=role, content=content)
    return chat


def sent(chat: Chat, to: Route | None = None) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in body(chat, to)["messages"]]


@pytest.mark.parametrize("role", sorted(KNOWN_ROLES - {"environment"}))
def test_a_known_role_is_sent_as_it_is(role: str) -> None:
    assert sent(talk((role, "x"))) == [(role, "x")]


def test_environment_is_sent_as_system() -> None:
    assert sent(talk(("environment", "x"), ("user", "y"))) == [("system", "x"), ("user", "y")]


def test_without_templates_nothing_is_joined() -> None:
    turns = (("user", "a"), ("user", "b"), ("environment", "c"), ("system", "d"))
    assert sent(talk(*turns)) == [("user", "a"), ("user", "b"), ("system", "c"), ("system", "d")]


WRAP = Template(role="user", begin="<", end=">")


def test_a_template_wraps_and_neighbours_of_one_role_are_joined() -> None:
    chat = talk(("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"), templates=(WRAP,))
    assert sent(chat) == [("user", "<a>\n<b>"), ("assistant", "c"), ("user", "<d>")]


def test_joining_goes_by_the_role_upstream() -> None:
    observer = Template(role="observer", api_role="user", begin="saw: ")
    chat = talk(("user", "a"), ("observer", "b"), ("user", "c"), templates=(observer,))
    assert sent(chat) == [("user", "a\nsaw: b\nc")]


def test_a_fallback_uses_the_template_of_the_other_role() -> None:
    chain = (
        Template(role="a", fallback_role="b", begin="never"),
        Template(role="b", fallback_role="user", begin="never"),
        WRAP,
    )
    assert sent(talk(("a", "x"), templates=chain)) == [("user", "<x>")]


@pytest.mark.parametrize(("fallback", "role"), [("tool", "tool"), ("environment", "system")])
def test_a_fallback_to_a_known_role_needs_no_template(fallback: str, role: str) -> None:
    assert sent(talk(("a", "x"), templates=(Template(role="a", fallback_role=fallback),))) == [
        (role, "x")
    ]


@pytest.mark.parametrize(
    "templates",
    [
        (Template(role="a", fallback_role="nobody"),),
        (Template(role="a", fallback_role="a"),),
        (Template(role="a", fallback_role="b"), Template(role="b", fallback_role="a")),
        (Template(role="other", begin="<"),),
        (),
    ],
    ids=["fallback to nobody", "to itself", "in a circle", "other template", "none"],
)
def test_an_unknown_role_is_refused_where_it_stands(templates: tuple[Template, ...]) -> None:
    chat = talk(("user", "x"), ("a", "y"), ("a", "z"), templates=templates)
    reason, paths, descriptions = refused(chat)
    assert reason == "UNKNOWN_ROLE"
    assert paths == ["messages[1].role", "messages[2].role"]
    assert "got 'a'" in descriptions[0]
    assert "environment" in descriptions[0]


def test_the_templates_of_a_request_replace_those_of_the_model() -> None:
    configured = route(role_templates=(Template(role="user", begin="M:"),))
    assert sent(talk(("user", "a"), ("user", "b")), configured) == [("user", "M:a\nM:b")]
    assert sent(talk(("user", "a"), templates=(WRAP,)), configured) == [("user", "<a>")]
    own = talk(("user", "a"), templates=(Template(role="x"),))
    assert sent(own, configured) == [("user", "a")]


@pytest.mark.parametrize(
    "special",
    [
        {"name": "n"},
        {"tool_call_id": "i"},
        {"tool_calls": [chat_pb2.ToolCall(id="i", function=chat_pb2.FunctionCall(name="f"))]},
        {"reasoning": "r"},
        {"refusal": "r"},
        {"extra_json": '{"x":1}'},
    ],
    ids=lambda special: next(iter(special)),
)
def test_a_message_that_is_more_than_text_is_never_joined(special: dict[str, Any]) -> None:
    chat = talk(("user", "a"), templates=(WRAP,))
    chat.messages.add(role="user", content="b", **special)
    chat.messages.add(role="user", content="c")
    assert sent(chat) == [("user", "<a>"), ("user", "<b>"), ("user", "<c>")]


def test_parts_are_wrapped_by_parts_and_never_joined() -> None:
    chat = talk(("user", "a"), templates=(WRAP,))
    chat.messages.add(role="user").parts.add(text="b")
    chat.messages.add(role="user", content="c")
    text = [{"type": "text", "text": t} for t in "<b>"]
    assert sent(chat) == [("user", "<a>"), ("user", text), ("user", "<c>")]


def test_no_content_stays_none_and_is_never_joined() -> None:
    chat = talk(("user", "a"), templates=(WRAP,))
    chat.messages.add(role="user")
    assert sent(chat) == [("user", "<a>"), ("user", None)]


def test_joining_very_many_messages_is_linear() -> None:
    """10,000 messages of 3 kB: copying all that went before each would take minutes."""
    chat = talk(*[("user", "x" * 3000)] * 10_000, templates=(WRAP,))
    [(_, content)] = sent(chat)
    assert len(content) == 10_000 * 3003 - 1


# --- media ------------------------------------------------------------------------------


def part_of(**fields: Any) -> Any:
    chat = Chat(model="m")
    chat.messages.add(role="user").parts.add(**fields)
    return body(chat)["messages"][0]["content"][0]


@pytest.mark.parametrize(
    ("media_type", "word"),
    [
        *(("audio/wav", "wav"), ("audio/x-wav", "wav"), ("audio/wave", "wav")),
        *(("audio/mpeg", "mp3"), ("audio/mp3", "mp3"), ("audio/flac", "flac")),
        ("audio/wav; codecs=1", "wav"),
    ],
)
def test_inline_audio_is_named_by_its_format(media_type: str, word: str) -> None:
    got = part_of(audio=chat_pb2.Media(data=b"\0\1", media_type=media_type))
    assert got == {"type": "input_audio", "input_audio": {"data": "AAE=", "format": word}}


@pytest.mark.parametrize("kind", ["image", "audio", "video", "file"])
def test_a_file_the_upstream_knows_is_named_by_its_id(kind: str) -> None:
    got = part_of(**{kind: chat_pb2.Media(file_id="f-1")})
    assert got == {"type": "file", "file": {"file_id": "f-1"}}


def test_a_document_without_a_name_has_none() -> None:
    got = part_of(file=chat_pb2.Media(data=b"%PDF", media_type="application/pdf"))
    assert got == {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERg=="}}


def test_inline_video_is_a_data_url() -> None:
    got = part_of(video=chat_pb2.Media(data=b"v", media_type="video/mp4"))
    assert got == {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,dg=="}}


# --- parameters -------------------------------------------------------------------------


def test_defaults_of_the_model_apply_where_the_request_says_nothing() -> None:
    defaults = Params(
        temperature=0.3,
        top_p=0.5,
        stop=["a", "b"],
        logit_bias={1: 1.0, 2: 2.0},
        max_completion_tokens=100,
        reasoning_effort="low",
    )
    to = route(defaults=defaults)
    plain = body(request(), to)
    assert (plain["temperature"], plain["top_p"], plain["max_tokens"]) == (0.3, 0.5, 100)
    assert plain["stop"] == ["a", "b"]
    assert plain["logit_bias"] == {"1": 1.0, "2": 2.0}
    asked = Params(temperature=0.0, stop=["c"], logit_bias={2: -1.0}, reasoning_effort="high")
    own = body(request(params=asked), to)
    assert (own["temperature"], own["top_p"], own["reasoning_effort"]) == (0.0, 0.5, "high")
    assert own["stop"] == ["c"], "lists are replaced, not joined"
    assert own["logit_bias"] == {"2": -1.0}
    assert defaults.stop == ["a", "b"], "the configuration stays as it is"


@pytest.mark.parametrize(
    ("asked", "default", "cap", "used"),
    [
        (None, None, None, 0),
        (None, None, 50, 0),
        (10, None, None, 10),
        (10, None, 50, 10),
        (100, None, 50, 50),
        (None, 100, 50, 50),
        (20, 100, 50, 20),
        (2**31 - 1, None, None, 2**31 - 1),
    ],
)
def test_the_cap_lowers_what_is_asked_and_the_header_hears_of_it(
    asked: int | None, default: int | None, cap: int | None, used: int
) -> None:
    to = route(defaults=Params(max_completion_tokens=default), max_completion_tokens=cap)
    encoded = encode(request(params=Params(max_completion_tokens=asked)), to)
    assert encoded.max_completion_tokens == used
    assert json.loads(encoded.body).get("max_tokens", 0) == used


DROP = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP
REJECT = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_REJECT
UNSET = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_UNSPECIFIED


@pytest.mark.parametrize("policy", [UNSET, REJECT])
def test_a_parameter_the_upstream_does_not_take_is_refused(policy: int) -> None:
    chat = request(
        params=Params(top_k=1, min_p=0, temperature=1), unsupported_parameter_policy=policy
    )
    reason, paths, descriptions = refused(chat, route(unsupported=frozenset({"top_k", "min_p"})))
    assert reason == "UNSUPPORTED_PARAMETER"
    assert paths == ["params.min_p", "params.top_k"]
    assert "upstream u does not take it" in descriptions[0]


def test_or_dropped_and_named_where_the_caller_allows_it() -> None:
    chat = request(
        params=Params(top_k=1, stop=["s"], temperature=1), unsupported_parameter_policy=DROP
    )
    encoded = encode(chat, route(unsupported=frozenset({"top_k", "stop"})))
    assert encoded.dropped == ("params.stop", "params.top_k")
    assert json.loads(encoded.body)["temperature"] == 1
    assert not {"top_k", "stop"} & json.loads(encoded.body).keys()


def test_a_default_the_upstream_does_not_take_is_dropped_without_a_word() -> None:
    to = route(
        unsupported=frozenset({"top_k"}),
        defaults=Params(top_k=1),
        unsupported_parameters=frozenset({"min_p"}),
    )
    encoded = encode(request(), to)
    assert encoded.dropped == ()
    assert "top_k" not in json.loads(encoded.body)
    assert refused(request(params=Params(min_p=0)), to)[1] == ["params.min_p"]


@pytest.mark.parametrize("name", [field.name for field in Params.DESCRIPTOR.fields])
def test_every_parameter_can_be_unsupported(name: str) -> None:
    chat = Chat()
    chat.CopyFrom(everything())
    to = route(unsupported=frozenset({name}))
    whole = json.loads(encode(chat, route()).body)
    encoded = encode(chat, to)
    assert encoded.dropped == (f"params.{name}", "messages[4].annotations")
    left_out = whole.keys() - json.loads(encoded.body).keys()
    assert len(left_out) == 1


# --- tools and formats ------------------------------------------------------------------

AUTO, NONE, REQUIRED = ToolChoice.MODE_AUTO, ToolChoice.MODE_NONE, ToolChoice.MODE_REQUIRED
NAMED_F = {"type": "function", "function": {"name": "f"}}
NAMED_C = {"type": "custom", "custom": {"name": "c"}}


@pytest.mark.parametrize(
    ("mode", "names", "expected"),
    [
        (ToolChoice.MODE_UNSPECIFIED, [], None),
        (AUTO, [], "auto"),
        (NONE, [], "none"),
        (REQUIRED, [], "required"),
        (NONE, ["f"], "none"),
        (REQUIRED, ["f"], NAMED_F),
        (REQUIRED, ["c"], NAMED_C),
        (AUTO, ["f"], {"mode": "auto", "tools": [NAMED_F]}),
        (ToolChoice.MODE_UNSPECIFIED, ["f"], {"mode": "auto", "tools": [NAMED_F]}),
        (REQUIRED, ["f", "c"], {"mode": "required", "tools": [NAMED_F, NAMED_C]}),
    ],
)
def test_which_tools_may_be_called(mode: int, names: list[str], expected: Any) -> None:
    chat = request(tool_choice=ToolChoice(mode=mode, tool_names=names))
    chat.tools.add().function.name = "f"
    chat.tools.add().custom.name = "c"
    if isinstance(expected, dict) and "mode" in expected:
        expected = {"type": "allowed_tools", "allowed_tools": expected}
    assert body(chat).get("tool_choice") == expected


def test_a_tool_of_nothing_but_a_name_is_sent_so() -> None:
    chat = request()
    chat.tools.add().function.name = "f"
    chat.tools.add().custom.name = "c"
    assert body(chat)["tools"] == [NAMED_F, NAMED_C]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (chat_pb2.ResponseFormat(text=chat_pb2.TextFormat()), {"type": "text"}),
        (
            chat_pb2.ResponseFormat(json_object=chat_pb2.JsonObjectFormat()),
            {"type": "json_object"},
        ),
        (chat_pb2.ResponseFormat(raw_json='{"type":"regex"}'), {"type": "regex"}),
    ],
)
def test_the_shape_of_the_answer(wanted: chat_pb2.ResponseFormat, expected: Any) -> None:
    assert body(request(response_format=wanted))["response_format"] == expected


# --- the caller's own JSON --------------------------------------------------------------

# Key order, doubled keys, spaces, big and exact numbers, escapes: none of it is ours to change.
VERBATIM = (
    '{ "z" : 9007199254740993,\t"a":1.10, "e": 1E400, "z":[ ],"u":"\\u00e9\\/é","d":'
    + "9" * 5000
    + ',\n"n":{"y":null,"x":{}} }'
)


def with_json(place: str, text: str) -> Chat:
    chat = request()
    match place:
        case "tools[0].raw_json":
            chat.tools.add(raw_json=text)
        case "tools[0].function.parameters_schema_json":
            chat.tools.add().function.name = "f"
            chat.tools[0].function.parameters_schema_json = text
        case "tools[0].custom.format_json":
            chat.tools.add().custom.name = "c"
            chat.tools[0].custom.format_json = text
        case "response_format.raw_json":
            chat.response_format.raw_json = text
        case "response_format.json_schema.schema_json":
            chat.response_format.json_schema.schema_json = text
        case "messages[0].parts[0].raw_json":
            chat.messages[0].ClearField("content")
            chat.messages[0].parts.add(raw_json=text)
        case "messages[0].parts[0].extra_json":
            chat.messages[0].ClearField("content")
            chat.messages[0].parts.add(text="t", extra_json=text)
        case "messages[0].extra_json":
            chat.messages[0].extra_json = text
        case "extra_body_json":
            chat.extra_body_json = text
        case _:
            raise AssertionError(place)
    return chat


MERGED = ["messages[0].parts[0].extra_json", "messages[0].extra_json", "extra_body_json"]
AS_IS = [
    "tools[0].raw_json",
    "tools[0].function.parameters_schema_json",
    "tools[0].custom.format_json",
    "response_format.raw_json",
    "response_format.json_schema.schema_json",
    "messages[0].parts[0].raw_json",
]


def test_every_field_of_json_is_tried() -> None:
    received = {"ToolCall", "FunctionCall", "CustomCall"}  # text of the model, not checked
    named = {
        name.rpartition(".")[2]
        for name in all_fields(Chat.DESCRIPTOR)
        if name.endswith("_json") and name.split(".")[2] not in received
    }
    assert {place.rpartition(".")[2] for place in AS_IS + MERGED} == named


@pytest.mark.parametrize("place", AS_IS)
def test_json_reaches_the_upstream_byte_for_byte(place: str) -> None:
    assert VERBATIM.encode() in encode(with_json(place, VERBATIM)).body


@pytest.mark.parametrize("place", MERGED)
def test_merged_json_keeps_its_order_and_its_numbers(place: str) -> None:
    text = '{"zz":9007199254740993,"e":1E400,"aa":{"y":1.10,"x":12345678901234567890},"l":[null]}'
    assert text[1:-1].encode() in encode(with_json(place, text)).body


@pytest.mark.parametrize("place", AS_IS + MERGED)
@pytest.mark.parametrize(
    "text",
    [
        *("{", "not json", " ", "[]", "null", "1", '"{}"', "{} {}", "{'a':1}", '{"a":}'),
        *('{"a":NaN}', '{"a":-Infinity}', '{"a":01}', '{"a":"\n"}', "\ufeff{}", '{"\\ud83d":1}'),
        *('{"a":"\\ud83d"}', '{"a":' * 100_000, '{"a":' + "[" * 990 + "]" * 990 + "}"),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_json_object_is_refused_where_it_stands(place: str, text: str) -> None:
    reason, paths, descriptions = refused(with_json(place, text))
    assert (reason, paths) == ("INVALID_REQUEST", [place])
    assert "expected a JSON object" in descriptions[0]


@pytest.mark.parametrize("place", AS_IS + MERGED)
def test_however_deep_it_is_it_is_sent_or_refused(place: str) -> None:
    """Close to where Python's recursion ends, one step may pass and the next not."""
    outcomes = set()
    for depth in range(880, 1000):
        chat = with_json(place, '{"a":' * depth + "1" + "}" * depth)
        try:
            encode(chat)
            outcomes.add("sent")
        except GatewayError as error:
            outcomes.add(error.violations[0].field)
    assert outcomes == {"sent", place}


@pytest.mark.parametrize("name", ["model", "messages", "stream"])
@pytest.mark.parametrize("value", ["null", '"x"', "true", "{}"])
def test_the_patch_may_not_set_what_has_a_field_of_its_own(name: str, value: str) -> None:
    reason, paths, descriptions = refused(with_json("extra_body_json", f'{{"{name}":{value}}}'))
    assert (reason, paths) == ("INVALID_REQUEST", ["extra_body_json"])
    assert descriptions == [f"may not set {name}: use the typed field"]


def test_the_patch_goes_last_and_into_what_the_fields_made() -> None:
    chat = request(params=Params(temperature=1, top_p=0.5), service_tier="flex")
    chat.response_format.json_schema.CopyFrom(
        chat_pb2.JsonSchemaFormat(name="n", schema_json='{"type":"object","a":9007199254740993}')
    )
    chat.extra_body_json = (
        '{"temperature":0.5,"top_p":null,"service_tier":{"x":1},'
        '"response_format":{"json_schema":{"schema":{"type":null,"b":1}}}}'
    )
    encoded = encode(chat)
    assert json.loads(encoded.body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "service_tier": {"x": 1},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"a": 9007199254740993, "b": 1}},
        },
    }


# Appendix A of RFC 7396: original, patch, result.
APPENDIX = [
    ('{"a":"b"}', '{"a":"c"}', '{"a":"c"}'),
    ('{"a":"b"}', '{"b":"c"}', '{"a":"b","b":"c"}'),
    ('{"a":"b"}', '{"a":null}', "{}"),
    ('{"a":"b","b":"c"}', '{"a":null}', '{"b":"c"}'),
    ('{"a":["b"]}', '{"a":"c"}', '{"a":"c"}'),
    ('{"a":"c"}', '{"a":["b"]}', '{"a":["b"]}'),
    ('{"a":{"b":"c"}}', '{"a":{"b":"d","c":null}}', '{"a":{"b":"d"}}'),
    ('{"a":[{"b":"c"}]}', '{"a":[1]}', '{"a":[1]}'),
    ('["a","b"]', '["c","d"]', '["c","d"]'),
    ('{"a":"b"}', '["c"]', '["c"]'),
    ('{"a":"foo"}', '"bar"', '"bar"'),
    ('{"e":null}', '{"a":1}', '{"e":null,"a":1}'),
    ("[1,2]", '{"a":"b","c":null}', '{"a":"b"}'),
    ("{}", '{"a":{"bb":{"ccc":null}}}', '{"a":{"bb":{}}}'),
]


@pytest.mark.parametrize(("original", "patch", "result"), APPENDIX)
def test_merging_is_that_of_rfc_7396(original: str, patch: str, result: str) -> None:
    """Below a member, since what is merged here is always an object."""
    chat = Chat(model="m")
    chat.messages.add(role="user").parts.add(
        raw_json=f'{{"k":{original}}}', extra_json=f'{{"k":{patch}}}'
    )
    assert body(chat)["messages"][0]["content"] == [{"k": json.loads(result)}]


def test_deep_patches_are_merged_in_linear_time() -> None:
    """900 levels around 8 MB: reading the rest again at each level would take minutes."""
    patch = '{"a":' * 900 + '"' + "x" * 8_000_000 + '"' + "}" * 900
    for place in MERGED:
        assert len(encode(with_json(place, patch)).body) > 8_000_000
