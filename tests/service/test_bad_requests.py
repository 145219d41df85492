"""What is wrong with a request is told in full, field by field, and costs no upstream request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from harness import (
    Failure,
    Start,
    Stubs,
    failing,
    item_failure,
    request,
    simulate,
    stream_request,
    upstream,
)
from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Limits
from tokenwire_service.simulator import Simulator
from tokenwire_service.validation import RANGES

Simulated = tuple[Simulator, str]
Chat = chat_service_pb2.ChatRequest
TRAILERS_MAX = 8192  # bytes; beyond that gRPC replaces the status by another


async def heard_everywhere(gateway: Stubs, chat: Chat) -> tuple[Failure, Failure, Failure]:
    """The failures of Chat, of StreamChat, and of the second item of a BatchChat."""
    items = chat_service_pb2.BatchChatRequest()
    items.items.add(chat=request(extra_body_json=simulate(text="good")))
    items.items.add(chat=chat)
    answers = {answer.index: answer async for answer in gateway.chat.BatchChat(items)}
    assert answers[0].WhichOneof("result") == "response"
    return (
        await failing(gateway.chat.Chat(chat)),
        await failing(gateway.chat.StreamChat(stream_request(chat))),
        item_failure(answers[1]),
    )


async def heard(gateway: Stubs, chat: Chat) -> Failure:
    """The failure of Chat, after a look whether StreamChat and BatchChat tell the same."""
    failure, streamed, batched = await heard_everywhere(gateway, chat)
    for prefix, other in (("chat.", streamed), ("items[1].chat.", batched)):
        assert (other.code, other.reason) == (failure.code, failure.reason)
        assert other.fields == {prefix + name: text for name, text in failure.fields.items()}
        assert other.message == prefix + failure.message
    assert failure.pushback == streamed.pushback == "-1"
    return failure


def with_params(**params: Any) -> Chat:
    return request(params=chat_pb2.GenerationParams(**params))


def with_annotation(**offsets: int) -> Chat:
    chat = request()
    chat.messages[0].annotations.add(**offsets)
    return chat


# One value below and one above each range, where there is such a value.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "GenerationParams.temperature": [-0.001, 2.001, math.nan, math.inf],
    "GenerationParams.top_p": [0.0, 1.001, math.nan],
    "GenerationParams.top_k": [0, -1],
    "GenerationParams.min_p": [-0.001, 1.001],
    "GenerationParams.max_completion_tokens": [0, -1],
    "GenerationParams.frequency_penalty": [-2.001, 2.001],
    "GenerationParams.presence_penalty": [-2.001, 2.001],
    "GenerationParams.repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "GenerationParams.choice_count": [0, 129],
    "GenerationParams.top_logprobs": [-1, 21],
    "GenerationParams.logit_bias": [-100.001, 100.001, math.nan],
    "Annotation.start_offset": [-1],
    "Annotation.end_offset": [-1],
    "StreamChatRequest.max_delay": [-0.001, 5.001],
    "BatchChatRequest.max_concurrency": [-1, 257],
    "ListModelsRequest.page_size": [-1, 1001],
}
VALUES = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]


def test_every_range_of_the_contract_has_values_outside_it() -> None:
    assert set(OUT_OF_RANGE) == set(RANGES)


@pytest.mark.parametrize(("name", "value"), VALUES)
async def test_a_value_out_of_range_is_refused_with_the_range(
    start: Start, simulator: Simulated, name: str, value: Any
) -> None:
    gateway = await start(upstream(simulator[1]))
    message, _, field = name.partition(".")
    if message == "GenerationParams":
        if field == "logit_bias":
            chat, where = with_params(logit_bias={7: value}), "params.logit_bias[7]"
        elif field == "top_logprobs":
            chat, where = with_params(logprobs=True, top_logprobs=value), "params.top_logprobs"
        else:
            chat, where = with_params(**{field: value}), f"params.{field}"
        failure = await heard(gateway, chat)
    elif message == "Annotation":
        where = f"messages[0].annotations[0].{field}"
        failure = await heard(gateway, with_annotation(**{field: value}))
    else:
        where = field
        call: Any
        if message == "StreamChatRequest":
            wanted = stream_request(request())
            wanted.max_delay.FromNanoseconds(int(value * 1e9))
            call = gateway.chat.StreamChat(wanted)
        elif message == "BatchChatRequest":
            items = chat_service_pb2.BatchChatRequest(max_concurrency=value)
            items.items.add(chat=request())
            call = gateway.chat.BatchChat(items)
        else:
            call = gateway.models.ListModels(model_service_pb2.ListModelsRequest(page_size=value))
        failure = await failing(call)
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason == "INVALID_REQUEST"
    assert set(failure.fields) == {where}
    assert str(RANGES[name]) in failure.fields[where]


def no_messages() -> Chat:
    return Chat(model="m")


def both_contents() -> Chat:
    chat = request("text")
    chat.messages[0].parts.add(text="and parts")
    return chat


def unknown_role() -> Chat:
    chat = request()
    chat.messages.add(role="wizard", content="x")
    return chat


def no_role() -> Chat:
    chat = request()
    chat.messages[0].role = ""
    return chat


def too_many_messages() -> Chat:
    chat = Chat(model="m")
    chat.messages.extend([chat_pb2.ChatMessage(role="user", content="x")] * 10_001)
    return chat


def plain_http_image() -> Chat:
    chat = request()
    chat.messages[0].ClearField("content")
    chat.messages[0].parts.add().image.url = "http://169.254.169.254/latest/meta-data"
    return chat


def bad_tool_name() -> Chat:
    chat = request()
    chat.tools.add().function.name = "no spaces"
    return chat


def unknown_tool() -> Chat:
    chat = request()
    chat.tool_choice.tool_names.append("nobody")
    return chat


MISTAKES: dict[str, tuple[Callable[[], Chat], str, str]] = {
    "no model": (lambda: request(model=""), "INVALID_REQUEST", "model"),
    "an unprintable model": (lambda: request(model="a\nb"), "INVALID_REQUEST", "model"),
    "a model's name of 201 characters": (
        lambda: request(model="m" * 201),
        "INVALID_REQUEST",
        "model",
    ),
    "no messages": (no_messages, "INVALID_REQUEST", "messages"),
    "too many messages": (too_many_messages, "INVALID_REQUEST", "messages"),
    "an unknown role": (unknown_role, "UNKNOWN_ROLE", "messages[1].role"),
    "no role": (no_role, "INVALID_REQUEST", "messages[0].role"),
    "content and parts": (both_contents, "INVALID_REQUEST", "messages[0].parts"),
    "an image by plain HTTP": (
        plain_http_image,
        "INVALID_REQUEST",
        "messages[0].parts[0].image.url",
    ),
    "17 stop strings": (lambda: with_params(stop=["x"] * 17), "INVALID_REQUEST", "params.stop"),
    "an empty stop string": (lambda: with_params(stop=[""]), "INVALID_REQUEST", "params.stop[0]"),
    "top_logprobs alone": (
        lambda: with_params(top_logprobs=1),
        "INVALID_REQUEST",
        "params.top_logprobs",
    ),
    "a tool's name": (bad_tool_name, "INVALID_REQUEST", "tools[0].function.name"),
    "a choice of no tool": (unknown_tool, "INVALID_REQUEST", "tool_choice.tool_names[0]"),
    "a label": (
        lambda: request(labels={"k": "v" * 513}),
        "INVALID_REQUEST",
        "labels[k]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
async def test_a_mistake_is_named_by_its_field(
    start: Start, simulator: Simulated, name: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    mistake, reason, field = MISTAKES[name]
    failure = await heard(gateway, mistake())
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason == reason
    assert set(failure.fields) == {field}
    assert failure.fields[field] != ""
    assert failure.message.startswith(f"{field}: ")
    assert simulator[0].stats.requests == 1  # the good item of the batch


async def test_all_mistakes_are_told_at_once(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = with_params(temperature=3, top_p=2, choice_count=0)
    chat.model = ""
    chat.messages.add(content="no role")
    failure = await heard(gateway, chat)
    assert set(failure.fields) == {
        "model",
        "messages[1].role",
        "params.temperature",
        "params.top_p",
        "params.choice_count",
    }
    assert "and 4 more" in failure.message


# --- JSON inside the request ------------------------------------------------------------


def set_extra_body(chat: Chat, text: str) -> str:
    chat.extra_body_json = text
    return "extra_body_json"


def set_message_extra(chat: Chat, text: str) -> str:
    chat.messages[0].extra_json = text
    return "messages[0].extra_json"


def set_part_raw(chat: Chat, text: str) -> str:
    chat.messages[0].ClearField("content")
    chat.messages[0].parts.add(raw_json=text)
    return "messages[0].parts[0].raw_json"


def set_part_extra(chat: Chat, text: str) -> str:
    chat.messages[0].ClearField("content")
    chat.messages[0].parts.add(text="x", extra_json=text)
    return "messages[0].parts[0].extra_json"


def set_tool_raw(chat: Chat, text: str) -> str:
    chat.tools.add(raw_json=text)
    return "tools[0].raw_json"


def set_parameters(chat: Chat, text: str) -> str:
    chat.tools.add(function=chat_pb2.FunctionTool(name="f", parameters_schema_json=text))
    return "tools[0].function.parameters_schema_json"


def set_tool_format(chat: Chat, text: str) -> str:
    chat.tools.add(custom=chat_pb2.CustomTool(name="f", format_json=text))
    return "tools[0].custom.format_json"


def set_schema(chat: Chat, text: str) -> str:
    chat.response_format.json_schema.name = "s"
    chat.response_format.json_schema.schema_json = text
    return "response_format.json_schema.schema_json"


def set_format_raw(chat: Chat, text: str) -> str:
    chat.response_format.raw_json = text
    return "response_format.raw_json"


# Full names without the package -> what sets the field, and says its path.
JSON_FIELDS: dict[str, Callable[[Chat, str], str]] = {
    "ChatRequest.extra_body_json": set_extra_body,
    "ChatMessage.extra_json": set_message_extra,
    "ContentPart.raw_json": set_part_raw,
    "ContentPart.extra_json": set_part_extra,
    "Tool.raw_json": set_tool_raw,
    "FunctionTool.parameters_schema_json": set_parameters,
    "CustomTool.format_json": set_tool_format,
    "JsonSchemaFormat.schema_json": set_schema,
    "ResponseFormat.raw_json": set_format_raw,
}
ANY_TEXT = {"FunctionCall.arguments_json"}  # what a model wrote, valid or not


def json_fields(message: Descriptor, seen: set[str]) -> Iterator[str]:
    if message.name in seen:
        return
    seen.add(message.name)
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            yield from json_fields(field.message_type, seen)
        elif field.name.endswith("_json"):
            yield f"{message.name}.{field.name}"


def test_every_field_of_json_in_a_request_is_known_here() -> None:
    assert set(json_fields(Chat.DESCRIPTOR, set())) == set(JSON_FIELDS) | ANY_TEXT


NO_JSON_OBJECT = {
    "cut": '{"a": ',
    "a list": "[1]",
    "a number": "1",
    "null": "null",
    "NaN": '{"a": NaN}',
    "a comment": '{"a": 1} // no',
    "half a surrogate pair": '{"\\ud83d": 1}',
    "half a pair as a value": '{"a": "\\ud83d"}',
    "nesting": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("text", NO_JSON_OBJECT.values(), ids=NO_JSON_OBJECT)
@pytest.mark.parametrize("field", JSON_FIELDS)
async def test_text_that_is_no_json_object_is_refused(
    start: Start, simulator: Simulated, field: str, text: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request()
    where = JSON_FIELDS[field](chat, text)
    failure = await failing(gateway.chat.Chat(chat))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason == "INVALID_REQUEST"
    assert set(failure.fields) == {where}
    assert "expected a JSON object" in failure.fields[where]
    assert simulator[0].stats.requests == 0


# --- messages as such -------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"\xff\xff\xff", b"\x0a\x01\xff"], ids=["no protobuf", "invalid UTF-8"]
)
@pytest.mark.parametrize("method", ["Chat", "StreamChat", "BatchChat"])
async def test_bytes_that_are_no_message_are_a_bad_request(
    start: Start, simulator: Simulated, method: str, sent: bytes
) -> None:
    gateway = await start(upstream(simulator[1]))
    path = f"/tokenwire.v1.ChatService/{method}"
    if method == "Chat":
        call = gateway.channel.unary_unary(path)(sent)
    else:
        call = gateway.channel.unary_stream(path)(sent)
    failure = await failing(call)
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason == "INVALID_REQUEST"
    assert "Error" not in failure.everything.replace("ErrorInfo", "")
    assert [c.code for c in gateway.events.calls] == ["INVALID_ARGUMENT"]


async def test_a_message_too_large_is_refused_and_the_server_goes_on(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]), limits=Limits(message_bytes=65536))
    for call in (
        gateway.chat.Chat(request("x" * 70_000)),
        gateway.chat.StreamChat(stream_request(request("x" * 70_000))),
    ):
        failure = await failing(call)  # by gRPC itself, before there is a message to look at
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await gateway.chat.Chat(request("x" * 60_000))).choices[0].message.content != ""
    assert simulator[0].stats.requests == 1


async def test_metadata_without_end_are_refused_and_the_server_goes_on(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    for metadata in ((("x-request-id", "x" * 100_000),), [("x-more", "x" * 100)] * 1000):
        failure = await failing(gateway.chat.Chat(request(), metadata=metadata))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert simulator[0].stats.requests == 0
    assert (await gateway.chat.Chat(request())).choices[0].message.content != ""


async def test_an_answer_too_large_to_send_has_a_status_with_details(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]), limits=Limits(message_bytes=65536))
    chat = request(extra_body_json=simulate(tokens=20_000))
    failure = await failing(gateway.chat.Chat(chat))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.reason == "REQUEST_TOO_LARGE"
    assert [c.code for c in gateway.events.calls] == ["RESOURCE_EXHAUSTED"]


def many_templates(name: str) -> Chat:
    chat = unknown_role()
    for number in range(2000):
        chat.role_templates.add(role=f"{name}{number}")
    return chat


LARGE_MISTAKES: dict[str, Chat] = {
    "two thousand roles to choose from": many_templates("some-role-"),
    "two thousand roles in four bytes each": many_templates("\U0001f600" * 20),
    "a role as long as a book": request(
        messages=[chat_pb2.ChatMessage(role="\u4f60" * 100_000, content="x")]
    ),
    "a thousand mistakes": Chat(
        model="m", messages=[chat_pb2.ChatMessage(content="no role")] * 1000
    ),
    "labels of four bytes a character": request(
        labels={"\U0001f600" * n: "v" * 600 for n in range(1, 30)}
    ),
}


@pytest.mark.parametrize("name", LARGE_MISTAKES)
async def test_however_much_is_wrong_the_status_fits_into_its_trailers(
    start: Start, simulator: Simulated, name: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    for failure in await heard_everywhere(gateway, LARGE_MISTAKES[name]):
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.reason in ("INVALID_REQUEST", "UNKNOWN_ROLE")
        assert len(failure.message) <= 300
        assert len(failure.fields) >= 1
        # In base64 and in percent signs, as they travel.
        size = sum(len(name) + len(value) * 4 / 3 for name, value in failure.trailers.items())
        assert size + 3 * len(failure.message.encode()) < TRAILERS_MAX


async def test_a_method_that_does_not_exist_is_unimplemented(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    failure = await failing(gateway.channel.unary_unary("/tokenwire.v1.ChatService/Nope")(b""))
    assert failure.code is grpc.StatusCode.UNIMPLEMENTED
