"""The dialect of OpenAI chat completions: what OpenAI and everything compatible with it is sent."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import UpstreamFault, Violation, invalid
from tokenwire_service.settings import OPENAI_UNSUPPORTED
from tokenwire_service.upstream import json_text, native, openai_answers
from tokenwire_service.upstream.classify import classify
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route
from tokenwire_service.upstream.json_text import patched, raw_object
from tokenwire_service.upstream.request import Turn, Unsupported, parameters, turns

# GenerationParams fields whose name upstream is another one, or that need their own encoding.
_PLAIN_PARAMS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "logprobs",
    "top_logprobs",
    "enable_thinking",
    "parallel_tool_calls",
)
_TYPED_ONLY = ("model", "messages", "stream")  # of the upstream body


class OpenAI(Dialect):
    """The dialect."""

    # --- request ------------------------------------------------------------------------

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The body of POST /chat/completions."""
        official = _is_openai(route.upstream.base_url)
        body: dict[str, Any] = {
            "model": route.model_name,
            "messages": [_encode_turn(turn) for turn in turns(chat, route)],
        }
        unsupported = Unsupported(chat, route)
        usual = OPENAI_UNSUPPORTED if official else frozenset()
        effective = parameters(chat, route, unsupported, usual=usual)
        params, limit = effective.params, effective.max_completion_tokens
        for name in _PLAIN_PARAMS:
            if params.HasField(name):  # type: ignore[arg-type]  # a name of the table above
                body[name] = getattr(params, name)
        if limit:
            body["max_completion_tokens" if official else "max_tokens"] = limit
        if params.HasField("choice_count"):
            body["n"] = params.choice_count
        if params.stop:
            body["stop"] = list(params.stop)
        if params.logit_bias:
            body["logit_bias"] = {str(k): v for k, v in sorted(params.logit_bias.items())}
        for name in ("reasoning_effort", "verbosity"):
            if value := getattr(params, name):
                body[name] = value
        if chat.tools:
            body["tools"] = [_encode_tool(t, f"tools[{i}]") for i, t in enumerate(chat.tools)]
        if chat.HasField("tool_choice") and (choice := _encode_tool_choice(chat)) is not None:
            body["tool_choice"] = choice
        if chat.HasField("response_format"):
            body["response_format"] = _encode_format(chat.response_format)
        if chat.end_user_id:
            body["safety_identifier" if official else "user"] = chat.end_user_id
        if chat.prompt_cache_key:
            body["prompt_cache_key"] = chat.prompt_cache_key
        if chat.service_tier:
            body["service_tier"] = chat.service_tier
        if stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
            if official:  # random padding against length analysis; the link is TLS to one peer
                body["stream_options"]["include_obfuscation"] = False
        if chat.extra_body_json:
            body = patched(body, chat.extra_body_json, "extra_body_json", _TYPED_ONLY)
        return Encoded(
            self,
            "/chat/completions",
            json_text.encode(body),
            limit,
            unsupported.settle(),
            tuple(params.stop),
            params.choice_count or 1,
        )

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """Bearer authentication, with the organization OpenAI should bill."""
        headers = {"Authorization": f"Bearer {key.secret.reveal()}"}
        if organization:
            headers["OpenAI-Organization"] = organization
        return headers

    # --- answer -------------------------------------------------------------------------

    def decode(self, encoded: Encoded, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole answer, tolerant in form and strict in substance."""
        return openai_answers.decode(body)

    def stream_decoder(self, encoded: Encoded) -> openai_answers.OpenAIStream:
        """A decoder for one stream of chat.completion.chunk objects."""
        return openai_answers.OpenAIStream(encoded.choices)

    def classify(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFault:
        """What a non-200 answer means."""
        return classify(status, headers, body)

    def list_models(self, upstream: Upstream) -> Encoded | None:
        """GET /models."""
        return Encoded(self, "/models", b"")

    def decode_models(self, body: bytes) -> list[model_service_pb2.Model]:
        """GET /models."""
        return openai_answers.decode_models(body)


# --- encoding ---------------------------------------------------------------------------


def _encode_turn(turn: Turn) -> dict[str, Any]:
    message = turn.message
    out: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.parts:
        out["content"] = [_encode_part(part, path) for part, path in turn.parts]
    if message.name:
        out["name"] = message.name
    if message.tool_calls:
        out["tool_calls"] = [_encode_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    if message.HasField("reasoning"):
        out["reasoning_content"] = message.reasoning
    if message.HasField("refusal"):
        out["refusal"] = message.refusal
    if message.extra_json:
        path = f"{turn.path}.extra_json"
        _, rest = native.split(message.extra_json, path)
        out = patched(out, rest, path) if rest else out
    return out


def _encode_call(call: chat_pb2.ToolCall) -> dict[str, Any]:
    if call.WhichOneof("call") == "custom":
        custom = {"name": call.custom.name, "input": call.custom.input}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.function.name, "arguments": call.function.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def _encode_part(part: chat_pb2.ContentPart, path: str) -> Any:
    kind = part.WhichOneof("part")
    out: Any
    if kind == "raw_json":
        out = raw_object(part.raw_json, f"{path}.raw_json")
    elif kind == "text":
        out = {"type": "text", "text": part.text}
    elif kind is not None and (media := getattr(part, kind)).file_id:
        document: dict[str, Any] = {"file_id": media.file_id}
        if media.filename:
            document["filename"] = media.filename
        out = {"type": "file", "file": document}
    elif kind == "image":
        image: dict[str, Any] = {"url": _media_url(part.image)}
        if part.image.detail:
            image["detail"] = part.image.detail
        out = {"type": "image_url", "image_url": image}
    elif kind == "audio":
        audio_format = part.audio.media_type.partition(";")[0].strip().rpartition("/")[2]
        audio_format = audio_format.removeprefix("x-")
        if part.audio.WhichOneof("source") == "data":
            clip = {
                "data": base64.b64encode(part.audio.data).decode("ascii"),
                "format": {"mpeg": "mp3", "wave": "wav"}.get(audio_format, audio_format),
            }
            out = {"type": "input_audio", "input_audio": clip}
        else:
            out = {"type": "audio_url", "audio_url": {"url": part.audio.url}}
    elif kind == "video":
        out = {"type": "video_url", "video_url": {"url": _media_url(part.video)}}
    elif kind == "file":
        document = {"file_data": _media_url(part.file)}
        if part.file.filename:
            document["filename"] = part.file.filename
        out = {"type": "file", "file": document}
    else:
        raise invalid(
            Violation(
                path, "got no element, expected one of text, image, audio, video, file, raw_json"
            )
        )
    if part.extra_json:
        out = patched(out, part.extra_json, f"{path}.extra_json")
    return out


def _media_url(media: chat_pb2.Media) -> str:
    if media.WhichOneof("source") == "data":
        encoded = base64.b64encode(media.data).decode("ascii")
        return f"data:{media.media_type};base64,{encoded}"
    return media.url


def _encode_tool(tool: chat_pb2.Tool, path: str) -> Any:
    kind = tool.WhichOneof("tool")
    if kind == "raw_json":
        return raw_object(tool.raw_json, f"{path}.raw_json")
    if kind == "custom":
        custom: dict[str, Any] = {"name": tool.custom.name}
        if tool.custom.description:
            custom["description"] = tool.custom.description
        if tool.custom.format_json:
            custom["format"] = raw_object(tool.custom.format_json, f"{path}.custom.format_json")
        return {"type": "custom", "custom": custom}
    if kind != "function":
        raise invalid(Violation(path, "got no tool, expected one of function, custom, raw_json"))
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description:
        function["description"] = tool.function.description
    if tool.function.parameters_schema_json:
        function["parameters"] = raw_object(
            tool.function.parameters_schema_json, f"{path}.function.parameters_schema_json"
        )
    if tool.function.HasField("strict"):
        function["strict"] = tool.function.strict
    return {"type": "function", "function": function}


def _encode_tool_choice(chat: chat_service_pb2.ChatRequest) -> Any:
    choice = chat.tool_choice
    required = choice.mode == chat_pb2.ToolChoice.MODE_REQUIRED
    if not choice.tool_names or choice.mode == chat_pb2.ToolChoice.MODE_NONE:
        return {
            chat_pb2.ToolChoice.MODE_AUTO: "auto",
            chat_pb2.ToolChoice.MODE_NONE: "none",
            chat_pb2.ToolChoice.MODE_REQUIRED: "required",
        }.get(choice.mode)
    custom = {tool.custom.name for tool in chat.tools if tool.WhichOneof("tool") == "custom"}
    named = []
    for name in choice.tool_names:
        kind = "custom" if name in custom else "function"
        named.append({"type": kind, kind: {"name": name}})
    if required and len(named) == 1:
        return named[0]
    allowed = {"mode": "required" if required else "auto", "tools": named}
    return {"type": "allowed_tools", "allowed_tools": allowed}


def _encode_format(wanted: chat_pb2.ResponseFormat) -> Any:
    kind = wanted.WhichOneof("format")
    if kind == "raw_json":
        return raw_object(wanted.raw_json, "response_format.raw_json")
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        return {"type": "text"}
    schema: dict[str, Any] = {
        "name": wanted.json_schema.name,
        "schema": raw_object(
            wanted.json_schema.schema_json, "response_format.json_schema.schema_json"
        ),
    }
    if wanted.json_schema.description:
        schema["description"] = wanted.json_schema.description
    if wanted.json_schema.HasField("strict"):
        schema["strict"] = wanted.json_schema.strict
    return {"type": "json_schema", "json_schema": schema}


def _is_openai(base_url: str) -> bool:
    return urlsplit(base_url).hostname == "api.openai.com"
