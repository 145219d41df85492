"""The contract's ranges are exactly those enforced; every mistake is named by its exact path."""

import math
import re

import pytest
from google.protobuf.message import Message

from harness import request
from ranges import CASES, MODULES, PLACES, PROTOS, batch, documented_ranges, edges
from tokenwire.v1 import (
    chat_pb2,
    chat_service_pb2,
    error_reason_pb2,
    model_service_pb2,
    tokenizer_service_pb2,
)
from tokenwire_service.errors import GatewayError, Violation
from tokenwire_service.validation import MAX_MESSAGES, RANGES, Range, check


def violations(message: Message) -> tuple[Violation, ...]:
    try:
        check(message)
    except GatewayError as error:
        raised = error
    else:
        return ()
    assert raised.reason == error_reason_pb2.ERROR_REASON_INVALID_REQUEST
    assert raised.violations
    return raised.violations


def paths(message: Message) -> list[str]:
    return [violation.field for violation in violations(message)]


def stream(chat: chat_service_pb2.ChatRequest, **fields: object) -> Message:
    return chat_service_pb2.StreamChatRequest(chat=chat, **fields)


def count(chat: chat_service_pb2.ChatRequest) -> Message:
    return tokenizer_service_pb2.CountTokensRequest(model="m", chat=chat)


# --- ranges -----------------------------------------------------------------------------


def test_the_ranges_are_exactly_those_of_the_contract() -> None:
    assert documented_ranges() == RANGES


def test_every_range_is_tried() -> None:
    assert set(PLACES) == set(RANGES)


def test_every_file_of_the_contract_is_looked_at() -> None:
    services = {
        path.relative_to(PROTOS).as_posix()
        for path in PROTOS.glob("tokenwire/v1/*.proto")  # the admin port takes no values
        if re.search(r"^service ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert services == {module.DESCRIPTOR.name for module in MODULES}


@pytest.mark.parametrize(("name", "value", "fine"), CASES)
def test_a_value_is_refused_just_outside_its_range(name: str, value: float, fine: bool) -> None:
    build, path = PLACES[name]
    found = violations(build(value))
    assert [violation.field for violation in found] == ([] if fine else [path])
    for violation in found:
        assert str(RANGES[name]) in violation.description, "what was expected is said"


@pytest.mark.parametrize(
    "name", [name for name in RANGES if name.startswith(("GenerationParams", "Annotation"))]
)
def test_a_range_holds_wherever_a_chat_stands(name: str) -> None:
    build, path = PLACES[name]
    wrong = build(edges(name)[1][0])
    assert isinstance(wrong, chat_service_pb2.ChatRequest)
    assert paths(stream(wrong)) == [f"chat.{path}"]
    assert paths(count(wrong)) == [f"chat.{path}"]


def test_every_bad_entry_of_a_map_is_named() -> None:
    chat = request()
    for token, bias in ((1, 100.0), (2, 101.0), (3, -101.0), (4, math.nan)):
        chat.params.logit_bias[token] = bias
    assert sorted(paths(chat)) == [f"params.logit_bias[{token}]" for token in (2, 3, 4)]


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        (Range(0, 2), "[0, 2]"),
        (Range(0, 1, low_open=True), "(0, 1]"),
        (Range(1, math.inf), "[1, )"),
    ],
)
def test_a_range_is_written_as_in_the_contract(interval: Range, shown: str) -> None:
    assert str(interval) == shown


@pytest.mark.parametrize("value", ["1", None, b"1", [1], math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_in_no_range(value: object) -> None:
    assert value not in Range(-math.inf, math.inf)


# --- every request ----------------------------------------------------------------------

REQUESTS = {
    method.input_type.name: module
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
EMPTY = {
    "ChatRequest": ["model", "messages"],
    "StreamChatRequest": ["chat.model", "chat.messages"],
    "BatchChatRequest": ["items"],
    "CountTokensRequest": ["model", "input"],
    "TokenizeRequest": ["model"],
    "ListModelsRequest": [],
    "GetModelRequest": ["name"],
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_request_is_checked_and_an_empty_one_lacks_what_is_required(name: str) -> None:
    assert paths(getattr(REQUESTS[name], name)()) == EMPTY[name]


def test_a_good_request_of_every_kind_passes() -> None:
    good = [
        request(),
        stream(request()),
        batch(0),
        count(request()),
        tokenizer_service_pb2.CountTokensRequest(model="m", text=""),
        tokenizer_service_pb2.TokenizeRequest(model="m", texts=["a"] * 256),
        model_service_pb2.ListModelsRequest(page_token="100"),
        model_service_pb2.GetModelRequest(name="m"),
    ]
    assert {type(message).__name__ for message in good} == set(REQUESTS)
    assert [paths(message) for message in good] == [[]] * len(good)


# --- every mistake ----------------------------------------------------------------------


def chat(**fields: object) -> chat_service_pb2.ChatRequest:
    return request(**fields)


def said(**fields: object) -> chat_service_pb2.ChatRequest:
    """A chat whose second message has these fields."""
    made = request()
    made.messages.add(**{"role": "user", **fields})
    return made


def tool(kind: str, **fields: object) -> chat_pb2.Tool:
    types = {"function": chat_pb2.FunctionTool, "custom": chat_pb2.CustomTool}
    return chat_pb2.Tool(**{kind: types[kind](**fields)})


def with_tools(*tools: chat_pb2.Tool, names: tuple[str, ...] = ()) -> chat_service_pb2.ChatRequest:
    made = request(tools=tools)
    made.tool_choice.tool_names.extend(names)
    return made


def with_part(**fields: object) -> chat_service_pb2.ChatRequest:
    return said(parts=[chat_pb2.ContentPart(text="t"), chat_pb2.ContentPart(**fields)])


def items(*ids: str) -> chat_service_pb2.BatchChatRequest:
    made = chat_service_pb2.BatchChatRequest()
    for custom_id in ids:
        made.items.add(custom_id=custom_id, chat=request())
    return made


F = tool("function", name="f")
SCHEMA = chat_pb2.JsonSchemaFormat

# What is wrong -> (request, exactly the paths that are named).
MISTAKES: dict[str, tuple[Message, list[str]]] = {
    "model too long": (chat(model="m" * 201), ["model"]),
    "model of 200": (chat(model="m" * 200), []),
    "model with a line break": (chat(model="a\nb"), ["model"]),
    "no messages": (chat_service_pb2.ChatRequest(model="m"), ["messages"]),
    "message without role": (said(role=""), ["messages[1].role"]),
    "content and parts": (
        said(content="", parts=[chat_pb2.ContentPart(text="t")]),
        ["messages[1].parts"],
    ),
    "neither content nor parts": (said(), []),
    "part without element": (with_part(extra_json="{}"), ["messages[1].parts[1]"]),
    "media without source": (with_part(image=chat_pb2.Media()), ["messages[1].parts[1].image"]),
    "data without media type": (
        with_part(audio=chat_pb2.Media(data=b"x")),
        ["messages[1].parts[1].audio.media_type"],
    ),
    "data with media type": (
        with_part(audio=chat_pb2.Media(data=b"x", media_type="audio/wav")),
        [],
    ),
    "url of another scheme": (
        with_part(video=chat_pb2.Media(url="http://h/v.mp4")),
        ["messages[1].parts[1].video.url"],
    ),
    "relative url": (
        with_part(file=chat_pb2.Media(url="/etc/passwd")),
        ["messages[1].parts[1].file.url"],
    ),
    "https url": (with_part(image=chat_pb2.Media(url="https://h/i.png")), []),
    "data url": (with_part(image=chat_pb2.Media(url="data:image/png;base64,AA==")), []),
    "file id": (with_part(file=chat_pb2.Media(file_id="file-1")), []),
    "empty tool call": (
        said(tool_calls=[chat_pb2.ToolCall(id="i")]),
        ["messages[1].tool_calls[0]"],
    ),
    "17 stop strings": (
        chat(params=chat_pb2.GenerationParams(stop=["s"] * 17)),
        ["params.stop"],
    ),
    "16 stop strings": (chat(params=chat_pb2.GenerationParams(stop=["s"] * 16)), []),
    "empty stop string": (
        chat(params=chat_pb2.GenerationParams(stop=["s", ""])),
        ["params.stop[1]"],
    ),
    "stop string of 1025": (
        chat(params=chat_pb2.GenerationParams(stop=["s" * 1024, "é" * 1025])),
        ["params.stop[1]"],
    ),
    "stop strings of 1 and 1024": (
        chat(params=chat_pb2.GenerationParams(stop=["s", "é" * 1024])),
        [],
    ),
    "alternatives without logprobs": (
        chat(params=chat_pb2.GenerationParams(top_logprobs=0)),
        ["params.top_logprobs"],
    ),
    "alternatives with logprobs off": (
        chat(params=chat_pb2.GenerationParams(top_logprobs=2, logprobs=False)),
        ["params.top_logprobs"],
    ),
    "empty tool": (with_tools(F, chat_pb2.Tool()), ["tools[1]"]),
    "function without name": (with_tools(tool("function")), ["tools[0].function.name"]),
    "function name with a space": (
        with_tools(tool("function", name="a b")),
        ["tools[0].function.name"],
    ),
    "function name of 65": (
        with_tools(tool("function", name="f" * 65)),
        ["tools[0].function.name"],
    ),
    "function name of 64": (with_tools(tool("function", name="F_-9" * 16)), []),
    "function name with a line break": (
        with_tools(tool("function", name="f\n")),
        ["tools[0].function.name"],
    ),
    "custom tool without name": (with_tools(F, tool("custom")), ["tools[1].custom.name"]),
    "custom tool of any name": (with_tools(tool("custom", name="a b")), []),
    "choice of an unknown tool": (
        with_tools(F, names=("f", "g")),
        ["tool_choice.tool_names[1]"],
    ),
    "choice of a tool nobody can read": (
        with_tools(chat_pb2.Tool(raw_json="{}"), names=("g",)),
        [],
    ),
    "choice without tools": (with_tools(names=("f",)), ["tool_choice.tool_names[0]"]),
    "template without role": (
        chat(role_templates=[chat_pb2.RoleTemplate(role="a"), chat_pb2.RoleTemplate()]),
        ["role_templates[1].role"],
    ),
    "schema format without anything": (
        chat(response_format=chat_pb2.ResponseFormat(json_schema=SCHEMA())),
        ["response_format.json_schema.name", "response_format.json_schema.schema_json"],
    ),
    "17 labels": (chat(labels={f"k{i}": "v" for i in range(17)}), ["labels"]),
    "16 labels": (chat(labels={f"k{i}": "v" for i in range(16)}), []),
    "label without key": (chat(labels={"": "v"}), ["labels[]"]),
    "label key of 65 bytes": (chat(labels={"k" * 65: "v"}), [f"labels[{'k' * 64}]"]),
    "label key of 66 bytes in 22 characters": (
        chat(labels={"键" * 22: "v"}),
        [f"labels[{'键' * 22}]"],
    ),
    "label key of 64 bytes": (chat(labels={"k" * 64: "v"}), []),
    "label value of 513 bytes": (chat(labels={"k": "é" * 256 + "v"}), ["labels[k]"]),
    "label value of 512 bytes": (chat(labels={"k": "é" * 256}), []),
    "no items": (items(), ["items"]),
    "257 items": (items(*[""] * 257), ["items"]),
    "256 items": (items(*[""] * 256), []),
    "the same custom id": (items("a", "b", "a", "a"), ["items[2].custom_id", "items[3].custom_id"]),
    "no custom ids": (items("", "", ""), []),
    "257 texts": (
        tokenizer_service_pb2.TokenizeRequest(model="m", texts=["t"] * 257),
        ["texts"],
    ),
    "page token of letters": (
        model_service_pb2.ListModelsRequest(page_token="next"),
        ["page_token"],
    ),
    "page token of other digits": (
        model_service_pb2.ListModelsRequest(page_token="١٢"),
        ["page_token"],
    ),
    "page token of 5000 digits": (
        model_service_pb2.ListModelsRequest(page_token="9" * 5000),
        ["page_token"],
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_named_by_its_path(what: str) -> None:
    message, expected = MISTAKES[what]
    assert paths(message) == expected


@pytest.mark.parametrize(
    "what", [w for w in MISTAKES if isinstance(MISTAKES[w][0], chat_service_pb2.ChatRequest)]
)
def test_a_mistake_in_a_stream_is_named_below_chat(what: str) -> None:
    message, expected = MISTAKES[what]
    assert isinstance(message, chat_service_pb2.ChatRequest)
    assert paths(stream(message)) == [f"chat.{path}" for path in expected]


def test_all_mistakes_are_told_at_once() -> None:
    wrong = chat_service_pb2.StreamChatRequest()
    wrong.chat.messages.add()
    wrong.chat.params.temperature = 3
    wrong.chat.params.top_p = 0
    wrong.max_delay.seconds = 6
    assert paths(wrong) == [
        "chat.model",
        "chat.messages[0].role",
        "chat.params.temperature",
        "chat.params.top_p",
        "max_delay",
    ]


def test_too_many_messages_are_one_violation_and_not_looked_at() -> None:
    wrong = request()
    wrong.messages.extend([chat_pb2.ChatMessage()] * MAX_MESSAGES)
    assert paths(wrong) == ["messages"]
    del wrong.messages[-1]
    assert len(paths(wrong)) == MAX_MESSAGES - 1


def test_a_batch_leaves_its_items_to_fail_alone() -> None:
    made = items("a")
    made.items[0].chat.Clear()
    assert paths(made) == []


def test_the_model_inside_a_count_is_not_needed() -> None:
    inner = request()
    inner.model = ""
    assert paths(count(inner)) == []
