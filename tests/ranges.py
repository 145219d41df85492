"""The ranges of the contract: what its comments say, and requests on both sides of each end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from harness import request
from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2, tokenizer_service_pb2
from tokenwire_service.validation import RANGES, Range

PROTOS = Path(__file__).parents[1] / "protos"
MODULES = (chat_service_pb2, model_service_pb2, tokenizer_service_pb2)

Build = Callable[[float], Message]


def documented_ranges() -> dict[str, Range]:
    """Message.field -> the interval in the comment above it."""
    found: dict[str, Range] = {}
    for path in PROTOS.rglob("*.proto"):
        messages: list[str] = []
        comment = ""
        before = len(found)
        written = path.read_text(encoding="utf-8")
        for line in written.splitlines():
            text = line.strip()
            if text.startswith("//"):
                comment += text[2:]
                continue
            if match := re.match(r"(?:message|enum|oneof|service|rpc) (\w+).*\{$", text):
                messages.append(match[1] if text.startswith("message") else "")
            elif text == "}":
                messages.pop()
            elif match := re.match(r"(?:optional |repeated )?[\w.<>, ]+ (\w+) = \d+", text):
                message = next(name for name in reversed(messages) if name)
                ranges = re.findall(
                    r"Range(?: of the \w+)?: ([\[(])(-?[\d.]+)s?, (?:(-?[\d.]+)s?\]|\))", comment
                )
                assert len(ranges) == comment.count("Range"), f"{match[1]}: {comment}"
                for left, low, high in ranges:
                    found[f"{message}.{match[1]}"] = Range(
                        float(low), float(high) if high else math.inf, left == "("
                    )
            comment = ""
        # Also one that stands over no field, or twice over one.
        assert len(found) - before == written.count("Range"), path
    return found


def parameter(name: str) -> Build:
    def build(value: float) -> Message:
        chat = request()
        if name == "top_logprobs":
            chat.params.logprobs = True
        if name == "logit_bias":
            chat.params.logit_bias[7] = value
        else:
            setattr(chat.params, name, value)
        return chat

    return build


def annotation(name: str) -> Build:
    def build(value: float) -> Message:
        chat = request()
        chat.messages[0].annotations.add(**{name: value})
        return chat

    return build


def delayed(value: float) -> Message:
    made = chat_service_pb2.StreamChatRequest(chat=request())
    made.max_delay.FromNanoseconds(round(value * 1e9))
    return made


def batch(value: float) -> Message:
    made = chat_service_pb2.BatchChatRequest(max_concurrency=int(value))
    made.items.add(chat=request())
    return made


def listing(value: float) -> Message:
    return model_service_pb2.ListModelsRequest(page_size=int(value))


# Field -> (request with that value, path in it).
PLACES: dict[str, tuple[Build, str]] = {
    **{
        f"GenerationParams.{field.name}": (parameter(field.name), f"params.{field.name}")
        for field in chat_pb2.GenerationParams.DESCRIPTOR.fields
        if f"GenerationParams.{field.name}" in RANGES
    },
    "GenerationParams.logit_bias": (parameter("logit_bias"), "params.logit_bias[7]"),
    "Annotation.start_offset": (
        annotation("start_offset"),
        "messages[0].annotations[0].start_offset",
    ),
    "Annotation.end_offset": (annotation("end_offset"), "messages[0].annotations[0].end_offset"),
    "StreamChatRequest.max_delay": (delayed, "max_delay"),
    "BatchChatRequest.max_concurrency": (batch, "max_concurrency"),
    "ListModelsRequest.page_size": (listing, "page_size"),
}


def descriptor(name: str) -> FieldDescriptor:
    message, _, field = name.partition(".")
    found = [m for module in (chat_pb2, *MODULES) if (m := getattr(module, message, None))]
    described: FieldDescriptor = found[0].DESCRIPTOR.fields_by_name[field]
    return described


def kind_of(name: str) -> str:
    field = descriptor(name)
    if field.message_type is not None and field.message_type.name == "Duration":
        return "duration"
    if field.message_type is not None:
        field = field.message_type.fields_by_name["value"]
    return "float" if field.type == FieldDescriptor.TYPE_DOUBLE else "int"


def edges(name: str) -> tuple[list[float], list[float]]:
    """(just within, just outside)."""
    low, high, low_open = RANGES[name]
    kind = kind_of(name)
    if kind == "float":
        most = high if high < math.inf else 1.7976931348623157e308
        within = [math.nextafter(low, math.inf) if low_open else low, most]
        outside = [low if low_open else math.nextafter(low, -math.inf), -1e300]
        outside += [math.nan, math.inf, -math.inf]
        if high < math.inf:
            outside += [math.nextafter(high, math.inf), 1e300]
    elif kind == "duration":
        within = [low, high]
        outside = [low - 1e-9, high + 1e-9, -3600.0, 3600.0]
    else:
        most = high if high < math.inf else 2**31 - 1
        within = [low, most]
        outside = [low - 1, -(2**31)]
        if high < math.inf:
            outside += [high + 1, 2**31 - 1]
    if kind == "int":
        return [int(v) for v in within], [int(v) for v in outside]
    return within, outside


CASES = [(name, value, True) for name in RANGES for value in edges(name)[0]]
CASES += [(name, value, False) for name in RANGES for value in edges(name)[1]]
