"""The dialect of OpenAI chat completions: what OpenAI and everything compatible with it is sent."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import UpstreamFault, Violation, invalid
from tokenwire_service.providers import NAMES, PROFILES, Profile
from tokenwire_service.upstream import json_text, native, openai_answers
from tokenwire_service.upstream.classify import classify
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route
from tokenwire_service.upstream.json_text import patched, raw_object
from tokenwire_service.upstream.request import (
    Turn,
    Unsupported,
    extended,
    openai_format,
    parameters,
    turns,
)

_TYPED_ONLY = ("model", "messages", "stream")  # of the upstream body
_REQUEST_FIELDS = ("end_user_id", "prompt_cache_key", "service_tier")  # texts with a name in NAMES


class OpenAI(Dialect):
    """The dialect. Those who speak it with other paths, headers or errors are its subclasses;
    those who only take or call something else are profiles."""

    # Whether an object with a `code` and nothing else is an error, also inside a 200.
    flat_errors = False

    # --- request ------------------------------------------------------------------------

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The body of POST /chat/completions."""
        profile = PROFILES[route.profile_name]
        unsupported = Unsupported(chat, route)
        effective = parameters(
            chat,
            route,
            unsupported,
            usual=profile.unsupported,
            reasoned=profile.reasoned,
        )
        params, limit = effective.params, effective.max_completion_tokens
        body: dict[str, Any] = {
            "model": route.model_name,
            "messages": [_encode_turn(t, profile, unsupported) for t in turns(chat, route)],
        }
        values = _values(params, limit)
        if profile.stops_here:
            values.pop("stop", None)
        for name, value in values.items():
            _put(body, name, value, profile)
        if chat.tools:
            body["tools"] = [_encode_tool(t, f"tools[{i}]") for i, t in enumerate(chat.tools)]
        choice = _encode_tool_choice(chat, unsupported) if chat.HasField("tool_choice") else None
        if choice is not None and "tool_choice" not in profile.unsupported:
            body["tool_choice"] = choice
        elif choice == "auto":
            unsupported.note("tool_choice")  # it is what happens anyway
        elif choice is not None:
            unsupported.leave_out("tool_choice")
        if chat.HasField("response_format"):
            shape = openai_format(chat.response_format)
            if "response_format" not in profile.unsupported:
                body["response_format"] = shape
            elif shape == {"type": "text"}:
                unsupported.note("response_format")  # it is what comes anyway
            else:
                unsupported.leave_out("response_format")
        for name in _REQUEST_FIELDS:
            if text := getattr(chat, name):
                if name in profile.unsupported:
                    unsupported.leave_out(name)
                else:
                    _put(body, name, text, profile)
        if stream:
            body["stream"] = True
            if profile.stream_options:
                body["stream_options"] = dict(profile.stream_options)
        body = extended(body, chat, route, _TYPED_ONLY)
        return Encoded(
            self,
            self.path(route),
            json_text.encode(body),
            limit,
            unsupported.settle(),
            tuple(params.stop),
            params.choice_count or 1,
        )

    def path(self, route: Route) -> str:
        """Where requests go, below the base URL."""
        return "/chat/completions"

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """Bearer authentication, with the organization OpenAI should bill."""
        headers = {"Authorization": f"Bearer {key.secret.reveal()}"}
        if organization:
            headers["OpenAI-Organization"] = organization
        return headers

    # --- answer -------------------------------------------------------------------------

    def decode(self, encoded: Encoded, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole answer, tolerant in form and strict in substance."""
        return openai_answers.decode(body, flat_errors=self.flat_errors)

    def stream_decoder(self, encoded: Encoded) -> openai_answers.OpenAIStream:
        """A decoder for one stream of chat.completion.chunk objects."""
        return openai_answers.OpenAIStream(encoded.choices, flat_errors=self.flat_errors)

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


def _values(params: chat_pb2.GenerationParams, limit: int) -> dict[str, Any]:
    """What the parameters say, by their proto names, in the order of NAMES."""
    said = {descriptor.name for descriptor, _ in params.ListFields()}
    if limit:  # the model's cap is sent though nobody asked
        said.add("max_completion_tokens")
    values: dict[str, Any] = {}
    for name in NAMES:
        if name in said:
            values[name] = getattr(params, name)
    if limit:
        values["max_completion_tokens"] = limit
    if "stop" in values:
        values["stop"] = list(params.stop)
    if "logit_bias" in values:
        values["logit_bias"] = {str(k): v for k, v in sorted(params.logit_bias.items())}
    return values


def _put(body: dict[str, Any], name: str, value: Any, profile: Profile) -> None:
    """Writes a field where the profile has its place."""
    value = profile.values[name][value] if name in profile.values else value
    *levels, last = profile.names.get(name, NAMES[name]).split(".")
    for level in levels:
        body = body.setdefault(level, {})
    body[last] = value


def _encode_turn(turn: Turn, profile: Profile, unsupported: Unsupported) -> dict[str, Any]:
    message = turn.message
    out: dict[str, Any] = {
        "role": profile.roles.get(turn.role, turn.role),
        "content": turn.content,
    }
    if turn.parts:
        out["content"] = [_encode_part(part, path, unsupported) for part, path in turn.parts]
    if message.name:
        _put_of_turn(out, "name", message.name, turn, profile, unsupported)
    if message.tool_calls:
        out["tool_calls"] = [_encode_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    if message.HasField("reasoning"):
        _put_of_turn(out, "reasoning", message.reasoning, turn, profile, unsupported)
    if message.HasField("refusal"):
        _put_of_turn(out, "refusal", message.refusal, turn, profile, unsupported)
    if message.annotations:
        unsupported.note(f"{turn.path}.annotations")  # of an earlier answer: nobody takes them back
    if message.extra_json:
        path = f"{turn.path}.extra_json"
        _, rest = native.split(message.extra_json, path)
        out = patched(out, rest, path) if rest else out
    return out


def _put_of_turn(
    out: dict[str, Any],
    name: str,
    text: str,
    turn: Turn,
    profile: Profile,
    unsupported: Unsupported,
) -> None:
    if f"messages.{name}" not in profile.unsupported:
        _put(out, f"messages.{name}", text, profile)
    elif name == "name":  # who said it: without it, something else was said
        unsupported.leave_out(f"{turn.path}.{name}")
    else:  # part of an earlier answer, which callers hand back whole
        unsupported.note(f"{turn.path}.{name}")


def _encode_call(call: chat_pb2.ToolCall) -> dict[str, Any]:
    if call.WhichOneof("call") == "custom":
        custom = {"name": call.custom.name, "input": call.custom.input}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.function.name, "arguments": call.function.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def _encode_part(part: chat_pb2.ContentPart, path: str, unsupported: Unsupported) -> Any:
    kind = part.WhichOneof("part")
    out: Any
    if kind == "raw_json":
        out = raw_object(part.raw_json, f"{path}.raw_json")
    elif kind == "text":
        out = {"type": "text", "text": part.text}
    elif kind is not None:
        media = getattr(part, kind)
        out, told = _encode_media(kind, media)
        for descriptor, _ in media.ListFields():
            if descriptor.name not in told:
                unsupported.note(f"{path}.{kind}.{descriptor.name}")
    else:
        raise invalid(
            Violation(
                path, "got no element, expected one of text, image, audio, video, file, raw_json"
            )
        )
    if part.extra_json:
        out = patched(out, part.extra_json, f"{path}.extra_json")
    return out


def _encode_media(kind: str, media: chat_pb2.Media) -> tuple[dict[str, Any], frozenset[str]]:
    """(the part, which of the fields it holds)."""
    source = media.WhichOneof("source") or ""
    told: set[str] = {source, "media_type"} if source == "data" else {source}
    out: dict[str, Any]
    if source == "file_id" or kind == "file":
        document = {"file_id": media.file_id} if source == "file_id" else {}
        if not document:
            document["file_data"] = _media_url(media)
        if media.filename:
            document["filename"] = media.filename
        out = {"type": "file", "file": document}
        told.add("filename")
    elif kind == "image":
        image: dict[str, Any] = {"url": _media_url(media)}
        if media.detail:
            image["detail"] = media.detail
        out = {"type": "image_url", "image_url": image}
        told.add("detail")
    elif kind == "audio" and source == "data":
        audio_format = media.media_type.partition(";")[0].strip().rpartition("/")[2]
        audio_format = audio_format.removeprefix("x-")
        clip = {
            "data": base64.b64encode(media.data).decode("ascii"),
            "format": {"mpeg": "mp3", "wave": "wav"}.get(audio_format, audio_format),
        }
        out = {"type": "input_audio", "input_audio": clip}
    elif kind == "audio":
        out = {"type": "audio_url", "audio_url": {"url": media.url}}
    else:
        out = {"type": "video_url", "video_url": {"url": _media_url(media)}}
    return out, frozenset(told)


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


def _encode_tool_choice(chat: chat_service_pb2.ChatRequest, unsupported: Unsupported) -> Any:
    choice = chat.tool_choice
    if choice.tool_names and choice.mode == chat_pb2.ToolChoice.MODE_NONE:
        unsupported.note("tool_choice.tool_names")  # without calls, which ones does not matter
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
