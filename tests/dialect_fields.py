"""Every field of a ChatRequest, set alone: what the other dialects' tests prove nothing lost by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor

from tokenwire.v1 import chat_service_pb2

Chat = chat_service_pb2.ChatRequest

_USER = 'messages { role: "user" content: "hi" }'
_ANSWERED = """
messages { role: "user" content: "hi" }
messages { role: "assistant" content: "so" %s }
messages { role: "user" content: "go on" }
"""
_CALLED = """
messages { role: "user" content: "hi" }
messages { role: "assistant" tool_calls { %s } }
messages { role: "tool" content: "r" tool_call_id: "%s" name: "f" }
"""
_PART = 'messages { role: "user" parts { text: "see" } parts { %s } }'
_TOOL = _USER + " tools { %s }"
_FUNCTION = _TOOL % 'function { name: "f" %s }'
_CUSTOM = _TOOL % 'custom { name: "f" %s }'
_SCHEMA = _USER + (
    ' response_format { json_schema { name: "%s" schema_json: "{\\"type\\": \\"%s\\"}" %s } }'
)


class Pair(NamedTuple):
    """Two requests, which differ by one field."""

    without: str
    having: str


def _params(text: str) -> Pair:
    return Pair(_USER, f"{_USER} params {{ {text} }}")


def _answered(text: str) -> Pair:
    return Pair(_ANSWERED % "", _ANSWERED % text)


def _part(without: str, having: str) -> Pair:
    return Pair(_PART % without, _PART % having)


_IMAGE = 'image { data: "\\211PNG" media_type: "image/png" %s }'
_URL = 'image { url: "https://example.com/%s" }'
_TOOLS = (
    f'{_USER} tools {{ function {{ name: "f" }} }} tools {{ function {{ name: "g" }} }} '
    "tool_choice { %s }"
)
_CITED = 'annotations { start_offset: 0 end_offset: 2 url: "https://example.com/" title: "t" }'

# Names without the package. Where a field cannot be sent alone, it is changed.
FIELDS: dict[str, Pair] = {
    "ChatRequest.messages": Pair(_USER, _ANSWERED % ""),
    "ChatRequest.params": _params("top_p: 0.5"),
    "ChatRequest.tools": Pair(_USER, _FUNCTION % ""),
    "ChatRequest.tool_choice": Pair(_FUNCTION % "", _FUNCTION % "" + " tool_choice { mode: 2 }"),
    "ChatRequest.response_format": Pair(_USER, _SCHEMA % ("n", "object", "")),
    "ChatRequest.role_templates": Pair(
        _USER, _USER + ' role_templates { role: "user" begin: "<" }'
    ),
    "ChatRequest.end_user_id": Pair(_USER, _USER + ' end_user_id: "e"'),
    "ChatRequest.prompt_cache_key": Pair(_USER, _USER + ' prompt_cache_key: "k"'),
    "ChatRequest.service_tier": Pair(_USER, _USER + ' service_tier: "flex"'),
    "ChatRequest.extra_body_json": Pair(_USER, _USER + ' extra_body_json: "{\\"x\\": 1}"'),
    "ChatMessage.role": Pair(_USER, 'messages { role: "assistant" content: "hi" }'),
    "ChatMessage.content": Pair(_USER, 'messages { role: "user" content: "ho" }'),
    "ChatMessage.parts": Pair(_USER, _PART % 'text: "x"'),
    "ChatMessage.name": Pair(_USER, 'messages { role: "user" content: "hi" name: "n" }'),
    "ChatMessage.tool_calls": _answered('tool_calls { id: "i" function { name: "f" } }'),
    "ChatMessage.tool_call_id": Pair(
        _CALLED % ('id: "i" function { name: "f" }', "i"),
        _CALLED % ('id: "i" function { name: "f" }', "j"),
    ),
    "ChatMessage.reasoning": _answered('reasoning: "hm"'),
    "ChatMessage.refusal": _answered('refusal: "no"'),
    "ChatMessage.annotations": _answered(_CITED),
    "ChatMessage.extra_json": _answered('extra_json: "{\\"x\\": 1}"'),
    "ContentPart.text": _part('text: "a"', 'text: "b"'),
    "ContentPart.image": _part('text: "a"', _IMAGE % ""),
    "ContentPart.audio": _part('text: "a"', 'audio { data: "R" media_type: "audio/wav" }'),
    "ContentPart.video": _part('text: "a"', 'video { url: "https://example.com/v.mp4" }'),
    "ContentPart.file": _part('text: "a"', 'file { data: "%%PDF" media_type: "application/pdf" }'),
    "ContentPart.raw_json": _part('text: "a"', 'raw_json: "{\\"x\\": 1}"'),
    "ContentPart.extra_json": _part('text: "a"', 'text: "a" extra_json: "{\\"x\\": 1}"'),
    "Media.data": _part(_IMAGE % "", 'image { data: "other" media_type: "image/png" }'),
    "Media.url": _part(_URL % "a", _URL % "b"),
    "Media.file_id": _part(_URL % "a", 'image { file_id: "f" }'),
    "Media.media_type": _part(_IMAGE % "", 'image { data: "\\211PNG" media_type: "image/webp" }'),
    "Media.filename": _part(_IMAGE % "", _IMAGE % 'filename: "f.png"'),
    "Media.detail": _part(_IMAGE % "", _IMAGE % 'detail: "high"'),
    "Annotation.start_offset": _answered(_CITED),
    "Annotation.end_offset": _answered(_CITED),
    "Annotation.url": _answered(_CITED),
    "Annotation.title": _answered(_CITED),
    "ToolCall.id": Pair(
        _CALLED % ('id: "i" function { name: "f" }', "i"),
        _CALLED % ('id: "j" function { name: "f" }', "j"),
    ),
    "ToolCall.function": _answered('tool_calls { id: "i" function { name: "f" } }'),
    "ToolCall.custom": _answered('tool_calls { id: "i" custom { name: "f" } }'),
    "FunctionCall.name": Pair(
        _ANSWERED % 'tool_calls { id: "i" function { name: "f" } }',
        _ANSWERED % 'tool_calls { id: "i" function { name: "g" } }',
    ),
    "FunctionCall.arguments_json": Pair(
        _ANSWERED % 'tool_calls { id: "i" function { name: "f" } }',
        _ANSWERED % 'tool_calls { id: "i" function { name: "f" arguments_json: "{\\"a\\":1}" } }',
    ),
    "CustomCall.name": _answered('tool_calls { id: "i" custom { name: "f" } }'),
    "CustomCall.input": _answered('tool_calls { id: "i" custom { name: "f" input: "x" } }'),
    "Tool.function": Pair(_USER, _FUNCTION % ""),
    "Tool.custom": Pair(_USER, _CUSTOM % ""),
    "Tool.raw_json": Pair(_USER, _TOOL % 'raw_json: "{\\"x\\": 1}"'),
    "FunctionTool.name": Pair(_FUNCTION % "", _TOOL % 'function { name: "g" }'),
    "FunctionTool.description": Pair(_FUNCTION % "", _FUNCTION % 'description: "d"'),
    "FunctionTool.parameters_schema_json": Pair(
        _FUNCTION % "",
        _FUNCTION % 'parameters_schema_json: "{\\"type\\": \\"object\\", \\"x\\": 1}"',
    ),
    "FunctionTool.strict": Pair(_FUNCTION % "", _FUNCTION % "strict: true"),
    "CustomTool.name": Pair(_USER, _CUSTOM % ""),
    "CustomTool.description": Pair(_USER, _CUSTOM % 'description: "d"'),
    "CustomTool.format_json": Pair(_USER, _CUSTOM % 'format_json: "{}"'),
    "ToolChoice.mode": Pair(_TOOLS % "mode: 1", _TOOLS % "mode: 3"),
    "ToolChoice.tool_names": Pair(_TOOLS % "mode: 1", _TOOLS % 'mode: 1 tool_names: "g"'),
    "ResponseFormat.text": Pair(_USER, _USER + " response_format { text {} }"),
    "ResponseFormat.json_object": Pair(_USER, _USER + " response_format { json_object {} }"),
    "ResponseFormat.json_schema": Pair(_USER, _SCHEMA % ("n", "object", "")),
    "ResponseFormat.raw_json": Pair(_USER, _USER + ' response_format { raw_json: "{\\"x\\":1}" }'),
    "JsonSchemaFormat.name": Pair(_USER, _SCHEMA % ("n", "object", "")),
    "JsonSchemaFormat.strict": Pair(
        _SCHEMA % ("n", "object", ""), _SCHEMA % ("n", "object", "strict: true")
    ),
    "JsonSchemaFormat.schema_json": Pair(
        _SCHEMA % ("n", "object", ""), _SCHEMA % ("n", "array", "")
    ),
    "JsonSchemaFormat.description": Pair(
        _SCHEMA % ("n", "object", ""), _SCHEMA % ("n", "object", 'description: "d"')
    ),
    "GenerationParams.temperature": _params("temperature: 0"),
    "GenerationParams.top_p": _params("top_p: 0.5"),
    "GenerationParams.top_k": _params("top_k: 4"),
    "GenerationParams.min_p": _params("min_p: 0"),
    "GenerationParams.max_completion_tokens": _params("max_completion_tokens: 7"),
    "GenerationParams.stop": _params('stop: "x"'),
    "GenerationParams.frequency_penalty": _params("frequency_penalty: 0"),
    "GenerationParams.presence_penalty": _params("presence_penalty: 0"),
    "GenerationParams.repetition_penalty": _params("repetition_penalty: 1"),
    "GenerationParams.seed": _params("seed: 0"),
    "GenerationParams.choice_count": _params("choice_count: 2"),
    "GenerationParams.logprobs": _params("logprobs: true"),
    "GenerationParams.top_logprobs": Pair(
        f"{_USER} params {{ logprobs: true }}",
        f"{_USER} params {{ logprobs: true top_logprobs: 3 }}",
    ),
    "GenerationParams.logit_bias": _params("logit_bias { key: 1 value: 2 }"),
    "GenerationParams.reasoning_effort": _params('reasoning_effort: "low"'),
    "GenerationParams.enable_thinking": _params("enable_thinking: false"),
    "GenerationParams.verbosity": _params('verbosity: "low"'),
    "GenerationParams.parallel_tool_calls": Pair(
        _FUNCTION % "", f"{_FUNCTION % ''} params {{ parallel_tool_calls: false }}"
    ),
    "RoleTemplate.role": Pair(_USER, _USER + ' role_templates { role: "user" begin: "<" }'),
    "RoleTemplate.api_role": Pair(
        _USER, _USER + ' role_templates { role: "user" api_role: "assistant" }'
    ),
    "RoleTemplate.begin": Pair(_USER, _USER + ' role_templates { role: "user" begin: "<" }'),
    "RoleTemplate.end": Pair(_USER, _USER + ' role_templates { role: "user" end: ">" }'),
    "RoleTemplate.fallback_role": Pair(
        _USER, _USER + ' role_templates { role: "user" fallback_role: "assistant" }'
    ),
}

# What no upstream is to see, and what changes nothing by itself.
UNSEEN = {
    "ChatRequest.model": "the route says it",
    "ChatRequest.unsupported_parameter_policy": "for the gateway",
    "ChatRequest.labels": "for accounting",
}


def chat(text: str, *, drop: bool = False) -> Chat:
    """The request that a text describes."""
    request = text_format.Parse(text, Chat(model="m"))
    if drop:
        request.unsupported_parameter_policy = chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP
    return request


def all_fields(descriptor: Descriptor = Chat.DESCRIPTOR) -> Iterator[str]:
    """The names of all fields within a message."""
    for field in descriptor.fields:
        yield field.full_name.removeprefix("tokenwire.v1.")
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from all_fields(field.message_type)
