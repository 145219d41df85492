"""Whether a request is within the contract: every wrong field, with what was expected there.

Ranges are written once, here, beside the field's full name; a test proves that they are exactly
those that the comments of the contract state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from google.protobuf.message import Message

from tokenwire.v1 import (
    chat_pb2,
    chat_service_pb2,
    model_service_pb2,
    tokenizer_service_pb2,
)
from tokenwire_service.errors import Violation, invalid

# Roles that need no template. `environment` is sent as `system`.
KNOWN_ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "environment"}
)
MAX_MESSAGES = 10_000
MAX_STOP_CHARACTERS = 1024  # looked for at the end of every delta
MAX_ITEMS = 256
MAX_TEXTS = 256
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_PAGE_TOKEN = re.compile(r"[0-9]{0,9}")  # a position; more digits than int() takes are no number


class Range(NamedTuple):
    """An interval; infinite ends are written empty, as in the contract."""

    low: float
    high: float
    low_open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (value > self.low if self.low_open else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        left = "(" if self.low_open else "["
        return (
            f"{left}{self.low:g}, {self.high:g}]"
            if self.high < math.inf
            else (f"{left}{self.low:g}, )")
        )


# Full names without the package. A map's range is that of its values.
RANGES: dict[str, Range] = {
    "GenerationParams.temperature": Range(0, 2),
    "GenerationParams.top_p": Range(0, 1, low_open=True),
    "GenerationParams.top_k": Range(1, math.inf),
    "GenerationParams.min_p": Range(0, 1),
    "GenerationParams.max_completion_tokens": Range(1, math.inf),
    "GenerationParams.frequency_penalty": Range(-2, 2),
    "GenerationParams.presence_penalty": Range(-2, 2),
    "GenerationParams.repetition_penalty": Range(0, math.inf, low_open=True),
    "GenerationParams.choice_count": Range(1, 128),
    "GenerationParams.top_logprobs": Range(0, 20),
    "GenerationParams.logit_bias": Range(-100, 100),
    "Annotation.start_offset": Range(0, math.inf),
    "Annotation.end_offset": Range(0, math.inf),
    "StreamChatRequest.max_delay": Range(0, 5),
    "BatchChatRequest.max_concurrency": Range(0, MAX_ITEMS),
    "ListModelsRequest.page_size": Range(0, 1000),
}


def check(request: Message) -> None:
    """Raises INVALID_REQUEST naming every field that is wrong, if any is."""
    problems = list(_CHECKS[type(request)](request))
    if problems:
        raise invalid(*problems)


def _ranges(message: Message, path: str) -> Iterator[Violation]:
    """The fields of one message, not of those inside, that are outside their range."""
    name = message.DESCRIPTOR.name
    for descriptor, value in message.ListFields():
        wanted = RANGES.get(f"{name}.{descriptor.name}")
        if wanted is None:
            continue
        where = f"{path}{descriptor.name}"
        if hasattr(value, "ToNanoseconds"):
            seconds = value.ToNanoseconds() / 1e9
            if seconds not in wanted:
                yield Violation(where, f"got {seconds:g} s, expected {wanted} s")
        elif hasattr(value, "items"):
            for key, one in value.items():
                if one not in wanted:
                    yield Violation(f"{where}[{key}]", f"got {one:g}, expected {wanted}")
        elif value not in wanted:
            yield Violation(where, f"got {value:g}, expected a number in {wanted}")


def _model(name: str, path: str) -> Iterator[Violation]:
    if not name:
        yield Violation(path, "missing, expected a model's name")
    elif len(name) > 200 or not name.isprintable():
        yield Violation(path, "expected 1 to 200 printable characters")


def _chat(chat: chat_service_pb2.ChatRequest, path: str = "") -> Iterator[Violation]:
    yield from _model(chat.model, f"{path}model")
    yield from _conversation(chat, path)


def _conversation(chat: chat_service_pb2.ChatRequest, path: str) -> Iterator[Violation]:
    if not chat.messages:
        yield Violation(f"{path}messages", "empty, expected at least one message")
    if len(chat.messages) > MAX_MESSAGES:
        yield Violation(
            f"{path}messages", f"got {len(chat.messages)}, expected at most {MAX_MESSAGES}"
        )
        return
    for i, message in enumerate(chat.messages):
        yield from _message(message, f"{path}messages[{i}].")
    if chat.HasField("params"):
        yield from _params(chat.params, f"{path}params.")
    if chat.tools or chat.HasField("tool_choice"):
        yield from _tools(chat, path)
    for i, template in enumerate(chat.role_templates):
        if not template.role:
            yield Violation(f"{path}role_templates[{i}].role", "missing, expected a role")
    if chat.HasField("response_format"):
        yield from _format(chat.response_format, f"{path}response_format.")
    if chat.labels:
        yield from _labels(chat, path)


def _params(params: chat_pb2.GenerationParams, path: str) -> Iterator[Violation]:
    yield from _ranges(params, path)
    if len(params.stop) > 16:
        yield Violation(f"{path}stop", f"got {len(params.stop)} strings, expected at most 16")
    for i, stop in enumerate(params.stop):
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            expected = f"expected 1 to {MAX_STOP_CHARACTERS} characters"
            yield Violation(f"{path}stop[{i}]", f"got {len(stop)}, {expected}")
    if params.HasField("top_logprobs") and not params.logprobs:
        yield Violation(f"{path}top_logprobs", "needs params.logprobs")


def _format(wanted: chat_pb2.ResponseFormat, path: str) -> Iterator[Violation]:
    if wanted.WhichOneof("format") == "json_schema":
        schema = wanted.json_schema
        if not schema.name:
            yield Violation(f"{path}json_schema.name", "missing, expected a name")
        if not schema.schema_json:
            yield Violation(f"{path}json_schema.schema_json", "missing, expected a JSON Schema")


def _message(message: chat_pb2.ChatMessage, path: str) -> Iterator[Violation]:
    if not message.role:
        yield Violation(f"{path}role", "missing, expected a role such as user")
    if message.HasField("content") and message.parts:
        yield Violation(f"{path}parts", "set beside content, expected at most one of them")
    for i, part in enumerate(message.parts):
        kind = part.WhichOneof("part")
        if kind in ("image", "audio", "video", "file"):
            yield from _media(getattr(part, kind), f"{path}parts[{i}].{kind}")
        elif kind is None:
            expected = "one of text, image, audio, video, file, raw_json"
            yield Violation(f"{path}parts[{i}]", f"empty, expected {expected}")
    for i, call in enumerate(message.tool_calls):
        if call.WhichOneof("call") is None:
            yield Violation(f"{path}tool_calls[{i}]", "empty, expected one of function, custom")
    for i, annotation in enumerate(message.annotations):
        yield from _ranges(annotation, f"{path}annotations[{i}].")


def _media(media: chat_pb2.Media, path: str) -> Iterator[Violation]:
    source = media.WhichOneof("source")
    if source is None:
        yield Violation(path, "no source, expected one of data, url, file_id")
    elif source == "data" and not media.media_type:
        yield Violation(f"{path}.media_type", "missing, expected a media type with data")
    elif source == "url" and not media.url.startswith(("https:", "data:")):
        yield Violation(f"{path}.url", "expected an absolute https: or data: URL")


def _tools(chat: chat_service_pb2.ChatRequest, path: str) -> Iterator[Violation]:
    names: set[str] = set()
    raw = False
    for i, tool in enumerate(chat.tools):
        kind = tool.WhichOneof("tool")
        where = f"{path}tools[{i}]"
        if kind is None:
            yield Violation(where, "empty, expected one of function, custom, raw_json")
        elif kind == "raw_json":
            raw = True
        else:
            name = getattr(tool, kind).name
            names.add(name)
            if kind == "function" and not _TOOL_NAME.fullmatch(name):
                yield Violation(f"{where}.function.name", f"expected ^{_TOOL_NAME.pattern}$")
            elif not name:
                yield Violation(f"{where}.custom.name", "missing, expected a name")
    for i, name in enumerate(chat.tool_choice.tool_names):
        if name not in names and not raw:
            yield Violation(
                f"{path}tool_choice.tool_names[{i}]", "expected the name of a tool above"
            )


def _labels(chat: chat_service_pb2.ChatRequest, path: str) -> Iterator[Violation]:
    if len(chat.labels) > 16:
        yield Violation(f"{path}labels", f"got {len(chat.labels)}, expected at most 16")
    for key, value in chat.labels.items():
        if not 0 < len(key.encode()) <= 64 or len(value.encode()) > 512:
            expected = "expected a key of 1 to 64 and a value of up to 512 bytes"
            yield Violation(f"{path}labels[{key[:64]}]", expected)


def _stream(request: chat_service_pb2.StreamChatRequest) -> Iterator[Violation]:
    yield from _chat(request.chat, "chat.")
    yield from _ranges(request, "")


def _batch(request: chat_service_pb2.BatchChatRequest) -> Iterator[Violation]:
    """Only the batch itself: a wrong item fails alone."""
    if not 0 < len(request.items) <= MAX_ITEMS:
        yield Violation("items", f"got {len(request.items)}, expected 1 to {MAX_ITEMS}")
    yield from _ranges(request, "")
    seen: dict[str, int] = {}
    for i, item in enumerate(request.items):
        if item.custom_id and seen.setdefault(item.custom_id, i) != i:
            first = seen[item.custom_id]
            yield Violation(
                f"items[{i}].custom_id", f"the same as items[{first}], expected a unique one"
            )


def _count(request: tokenizer_service_pb2.CountTokensRequest) -> Iterator[Violation]:
    yield from _model(request.model, "model")
    if request.WhichOneof("input") == "chat":
        yield from _conversation(request.chat, "chat.")
    elif request.WhichOneof("input") is None:
        yield Violation("input", "missing, expected one of text, chat")


def _tokenize(request: tokenizer_service_pb2.TokenizeRequest) -> Iterator[Violation]:
    yield from _model(request.model, "model")
    if len(request.texts) > MAX_TEXTS:
        yield Violation("texts", f"got {len(request.texts)}, expected at most {MAX_TEXTS}")


def _list_models(request: model_service_pb2.ListModelsRequest) -> Iterator[Violation]:
    yield from _ranges(request, "")
    if not _PAGE_TOKEN.fullmatch(request.page_token):
        yield Violation("page_token", "expected a next_page_token of an earlier answer")


def _get_model(request: model_service_pb2.GetModelRequest) -> Iterator[Violation]:
    yield from _model(request.name, "name")


_CHECKS: dict[type, Any] = {
    chat_service_pb2.ChatRequest: _chat,
    chat_service_pb2.StreamChatRequest: _stream,
    chat_service_pb2.BatchChatRequest: _batch,
    tokenizer_service_pb2.CountTokensRequest: _count,
    tokenizer_service_pb2.TokenizeRequest: _tokenize,
    model_service_pb2.ListModelsRequest: _list_models,
    model_service_pb2.GetModelRequest: _get_model,
}
