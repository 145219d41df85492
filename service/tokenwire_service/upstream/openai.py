"""The dialect of OpenAI chat completions, as OpenAI and everything compatible with it speaks it.

Streams that real providers sent decide what is tolerated here: no index on tool deltas
(Mistral), ids and names repeated in every part, null or object arguments, content as a list of
parts, usage in every chunk, two finish reasons, none at all, no [DONE], lone surrogates split
over chunks, errors inside a 200. What is never tolerated is an end without proof.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2, model_service_pb2
from tokenwire_service.config import Key
from tokenwire_service.errors import Fault, UpstreamFault, Violation, invalid
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.classify import classify, classify_payload
from tokenwire_service.upstream.dialect import Encoded, Route
from tokenwire_service.validation import KNOWN_ROLES

StreamChatResponse = chat_service_pb2.StreamChatResponse

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
_FINISH_REASONS = {
    "stop": chat_pb2.FINISH_REASON_STOP,
    "end_turn": chat_pb2.FINISH_REASON_STOP,
    "eos": chat_pb2.FINISH_REASON_STOP,
    "length": chat_pb2.FINISH_REASON_LENGTH,
    "max_tokens": chat_pb2.FINISH_REASON_LENGTH,
    "tool_calls": chat_pb2.FINISH_REASON_TOOL_CALLS,
    "function_call": chat_pb2.FINISH_REASON_TOOL_CALLS,
    "content_filter": chat_pb2.FINISH_REASON_CONTENT_FILTER,
}
_TYPED_ONLY = ("model", "messages", "stream")  # of the upstream body
_INT32_MAX = 2**31 - 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_encoder = msgspec.json.Encoder(decimal_format="number")


class OpenAI:
    """The dialect. Stateless; one instance serves every call."""

    # --- request ------------------------------------------------------------------------

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The body of POST /chat/completions."""
        official = _is_openai(route.upstream.base_url)
        body: dict[str, Any] = {
            "model": route.model_name,
            "messages": encode_messages(chat, route),
        }
        params = chat_pb2.GenerationParams()
        if route.model is not None:
            params.CopyFrom(route.model.defaults)
        if chat.params.stop:
            del params.stop[:]
        if chat.params.logit_bias:
            params.logit_bias.clear()
        params.MergeFrom(chat.params)
        dropped = _drop_unsupported(params, chat, route)
        cap = (route.model.max_completion_tokens or 0) if route.model is not None else 0
        limit = 0
        if params.HasField("max_completion_tokens"):
            limit = min(params.max_completion_tokens, cap or _INT32_MAX)
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
            body = _patched(body, chat.extra_body_json, "extra_body_json", _TYPED_ONLY)
        return Encoded(
            "/chat/completions",
            _encoder.encode(body),
            limit,
            dropped,
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

    def decode(self, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole answer, tolerant in form and strict in substance."""
        answer, _ = _load(body)
        if not isinstance(answer, dict):
            raise _protocol("the answer is not a JSON object")
        _raise_error(answer)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise _protocol("the answer has no choices")
        response = chat_service_pb2.ChatResponse()
        _fill_header(response.header, answer)
        _set_extra(response.header, _rest(answer, _HEADER_FIELDS))
        for position, raw in enumerate(choices):
            if not isinstance(raw, dict):
                raise _protocol("a choice is not an object")
            if not raw.keys() & {"message", "delta", "text", "finish_reason"}:
                raise _protocol("a choice holds no message")
            choice = response.choices.add(index=_index(raw, position))
            _fill_choice(choice, raw)
        if (usage := _usage(answer)) is not None:
            response.usage.CopyFrom(usage)
        return response

    def stream_decoder(self, choices: int = 1) -> OpenAIStream:
        """A decoder for one stream of chat.completion.chunk objects."""
        return OpenAIStream(choices)

    def classify(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFault:
        """What a non-200 answer means."""
        return classify(status, headers, body)

    def decode_models(self, body: bytes) -> list[model_service_pb2.Model]:
        """GET /models."""
        answer, _ = _load(body)
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list):
            raise _protocol("the model list has no `data`")
        return [
            model_service_pb2.Model(
                name=_clean(entry["id"]),
                upstream_model=_clean(entry["id"]),
                extra_json=_dumps(entry),
            )
            for entry in entries
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        ]


# --- encoding ---------------------------------------------------------------------------


def encode_messages(chat: chat_service_pb2.ChatRequest, route: Route) -> list[dict[str, Any]]:
    """The messages in the upstream's roles: wrapped by their templates, then joined.

    The rule is the contract's, at ChatRequest.role_templates.
    """
    configured = route.model.role_templates if route.model is not None else ()
    templates = {t.role: t for t in (chat.role_templates or configured)}
    problems: list[Violation] = []
    encoded: list[dict[str, Any]] = []
    texts: list[list[str]] = []  # of each: what is to be joined, empty if nothing may be
    for i, message in enumerate(chat.messages):
        role, template = _role(templates, message.role)
        if not role:
            known = ", ".join(sorted(KNOWN_ROLES | set(templates)))
            problems.append(
                Violation(
                    f"messages[{i}].role", f"got {message.role[:40]!r}, expected one of {known}"
                )
            )
            continue
        out = _encode_message(message, role, template, f"messages[{i}]")
        plain = set(out) == {"role", "content"} and isinstance(out["content"], str)
        if templates and plain and encoded and texts[-1] and encoded[-1]["role"] == out["role"]:
            texts[-1].append(out["content"])
            continue
        encoded.append(out)
        texts.append([out["content"]] if plain else [])
    if problems:
        raise invalid(*problems, reason=error_reason_pb2.ERROR_REASON_UNKNOWN_ROLE)
    for joined, parts in zip(encoded, texts, strict=True):
        if len(parts) > 1:
            joined["content"] = "\n".join(parts)
    return encoded


def _role(
    templates: Mapping[str, chat_pb2.RoleTemplate], role: str
) -> tuple[str, chat_pb2.RoleTemplate | None]:
    """(role upstream, template to wrap with) of a caller's role; no role when it is unknown, or
    its fallbacks go round in a circle."""
    template = templates.get(role)
    for _ in templates:
        if template is None or not template.fallback_role:
            break
        role = template.fallback_role
        template = templates.get(role)
    if template is not None:
        return ("", None) if template.fallback_role else (template.api_role or role, template)
    if role not in KNOWN_ROLES:
        return "", None
    return ("system" if role == "environment" else role), None


def _encode_message(
    message: chat_pb2.ChatMessage, role: str, template: chat_pb2.RoleTemplate | None, path: str
) -> dict[str, Any]:
    begin, end = (template.begin, template.end) if template is not None else ("", "")
    out: dict[str, Any] = {"role": role, "content": None}
    if message.parts:
        parts = [_encode_part(p, f"{path}.parts[{i}]") for i, p in enumerate(message.parts)]
        if begin:
            parts.insert(0, {"type": "text", "text": begin})
        if end:
            parts.append({"type": "text", "text": end})
        out["content"] = parts
    elif message.HasField("content"):
        out["content"] = begin + message.content + end
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
        out = _patched(out, message.extra_json, f"{path}.extra_json")
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
        out = _raw_object(part.raw_json, f"{path}.raw_json")
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
        out = _patched(out, part.extra_json, f"{path}.extra_json")
    return out


def _media_url(media: chat_pb2.Media) -> str:
    if media.WhichOneof("source") == "data":
        encoded = base64.b64encode(media.data).decode("ascii")
        return f"data:{media.media_type};base64,{encoded}"
    return media.url


def _encode_tool(tool: chat_pb2.Tool, path: str) -> Any:
    kind = tool.WhichOneof("tool")
    if kind == "raw_json":
        return _raw_object(tool.raw_json, f"{path}.raw_json")
    if kind == "custom":
        custom: dict[str, Any] = {"name": tool.custom.name}
        if tool.custom.description:
            custom["description"] = tool.custom.description
        if tool.custom.format_json:
            custom["format"] = _raw_object(tool.custom.format_json, f"{path}.custom.format_json")
        return {"type": "custom", "custom": custom}
    if kind != "function":
        raise invalid(Violation(path, "got no tool, expected one of function, custom, raw_json"))
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description:
        function["description"] = tool.function.description
    if tool.function.parameters_schema_json:
        function["parameters"] = _raw_object(
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
        return _raw_object(wanted.raw_json, "response_format.raw_json")
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        return {"type": "text"}
    schema: dict[str, Any] = {
        "name": wanted.json_schema.name,
        "schema": _raw_object(
            wanted.json_schema.schema_json, "response_format.json_schema.schema_json"
        ),
    }
    if wanted.json_schema.description:
        schema["description"] = wanted.json_schema.description
    if wanted.json_schema.HasField("strict"):
        schema["strict"] = wanted.json_schema.strict
    return {"type": "json_schema", "json_schema": schema}


def _drop_unsupported(
    params: chat_pb2.GenerationParams, chat: chat_service_pb2.ChatRequest, route: Route
) -> tuple[str, ...]:
    """Clears what the upstream does not take; refuses instead unless the caller allows it.

    A default of the configuration is dropped without asking: the caller never named it.
    """
    unsupported = route.upstream.unsupported_parameters
    if route.model is not None:
        unsupported = unsupported | route.model.unsupported_parameters
    named = sorted(
        descriptor.name for descriptor, _ in params.ListFields() if descriptor.name in unsupported
    )
    asked = {descriptor.name for descriptor, _ in chat.params.ListFields()}
    refused = [name for name in named if name in asked]
    if (
        refused
        and chat.unsupported_parameter_policy != chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP
    ):
        raise invalid(
            *(
                Violation(
                    f"params.{name}",
                    f"upstream {route.upstream.name} does not take it; "
                    "set unsupported_parameter_policy to DROP to leave it out",
                )
                for name in refused
            ),
            reason=error_reason_pb2.ERROR_REASON_UNSUPPORTED_PARAMETER,
        )
    for name in named:
        params.ClearField(name)  # type: ignore[arg-type]  # names come from the descriptor
    return tuple(f"params.{name}" for name in refused)


def _is_openai(base_url: str) -> bool:
    return urlsplit(base_url).hostname == "api.openai.com"


def _json_object(text: str, path: str) -> dict[str, Any]:
    """A JSON object with its numbers as they are written, so that none is rounded."""
    try:
        value = _parsed(text)
        if _SURROGATE.search(text):
            _encoder.encode(value)  # refuses half a pair, which could not be sent
    except UnicodeEncodeError:
        reason = "half a surrogate pair"
    except ValueError as error:
        reason = f"not valid JSON: {str(error)[:120]}"
    except RecursionError:
        reason = "nested too deeply"
    else:
        if isinstance(value, dict):
            return value
        reason = "got another JSON value"
    raise invalid(Violation(path, f"{reason}, expected a JSON object"))


def _raw_object(text: str, path: str) -> msgspec.Raw:
    """The caller's own text, checked: it reaches the upstream unchanged."""
    _json_object(text, path)
    return msgspec.Raw(text.encode())


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_no_constant)


def _number(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _patched(target: Any, text: str, path: str, typed_only: tuple[str, ...] = ()) -> dict[str, Any]:
    """`target` merged with the patch in `text`, as RFC 7396 says."""
    patch = _json_object(text, path)
    for name in typed_only:
        if name in patch:
            raise invalid(Violation(path, f"may not set {name}: use the typed field"))
    try:
        return _merge_patch(target, patch)
    except RecursionError:
        raise invalid(Violation(path, "nested too deeply, expected a JSON object")) from None


def _merge_patch(target: Any, patch: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(target, msgspec.Raw):
        target = _parsed(bytes(target).decode())
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = _merge_patch(merged.get(name), value)
        else:
            merged[name] = value
    return merged


# --- decoding ---------------------------------------------------------------------------

_HEADER_FIELDS = frozenset(
    {
        "id",
        "object",
        "created",
        "model",
        "system_fingerprint",
        "service_tier",
        "choices",
        "usage",
        "obfuscation",
        "error",
    }
)
_CHOICE_FIELDS = frozenset({"index", "delta", "message", "finish_reason", "logprobs", "text"})
_MESSAGE_FIELDS = frozenset(
    {"role", "content", "reasoning", "reasoning_content", "refusal", "tool_calls", "annotations"}
)
_USAGE_FIELDS = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
_EXCERPT_BYTES = 80
_WORD_BYTES = bytes(set(range(0x21, 0x7F)) - set(b"\"',<>()[]{}"))


@dataclass
class _ChoiceState:
    """What a stream has said about one choice."""

    finish_reason: str = ""
    slots: dict[object, int] = field(default_factory=dict)  # upstream's own name -> our index
    calls: list[_CallState] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class _CallState:
    begun: bool = False
    name: str = ""
    id: str = ""


class OpenAIStream:
    """Decodes one stream of chunks. See StreamDecoder for the contract."""

    def __init__(self, choices: int = 1) -> None:
        self.done = False
        self._asked = choices
        self.usage: chat_pb2.Usage | None = None
        self._header = chat_service_pb2.ResponseHeader()
        self._header_sent = False
        self._header_extra: dict[str, Any] = {}
        self._trailer_extra: dict[str, Any] = {}
        self._choices: dict[int, _ChoiceState] = {}
        self._chunks = 0
        self._lossy = False  # a lone surrogate was seen: strings need the slow path from now on
        self._held: dict[
            tuple[int, str, int], str
        ] = {}  # high surrogates waiting for their low half

    def feed(self, event: sse.Event) -> list[StreamChatResponse]:
        """The header and deltas of one event."""
        if self.done:
            return []
        data = event.data.strip()
        if data == b"[DONE]":
            self.done = True
            return []
        if not data:
            return []  # a keep-alive with empty data
        chunk, lossy = _load(data)
        self._lossy = self._lossy or lossy
        if isinstance(chunk, list) and len(chunk) == 1:
            chunk = chunk[0]  # Google wraps errors in an array
        if not isinstance(chunk, dict):
            raise _protocol("a stream event is not a JSON object")
        if event.type == "error" or chunk.get("type") == "error":
            raise classify_payload(chunk, 0, {})
        _raise_error(chunk)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            chunk_type = _string(chunk.get("object"))
            if choices is not None or not (
                isinstance(chunk.get("usage"), dict) or chunk_type.startswith("chat.completion")
            ):
                raise _protocol("a stream event is no chat.completion.chunk")
            choices = []
        self._chunks += 1
        self._note(chunk)
        out: list[StreamChatResponse] = []
        for position, raw in enumerate(choices):
            if not isinstance(raw, dict):
                raise _protocol("a choice is not an object")
            self._choice(raw, _index(raw, position), out)
        return out

    def finish(self, error_field: bytes | None) -> list[StreamChatResponse]:
        """One finish per choice and the trailer, if the stream proved that it is complete."""
        if error_field is not None:
            payload, _ = _load(error_field)
            raise classify_payload(payload, 0, {})
        if not self._chunks or not self._choices:
            raise _protocol(
                "the stream ended without any chat.completion.chunk that holds a choice"
            )
        ended = all(c.finish_reason or _details_reason(c.extra) for c in self._choices.values())
        # One that never began has not ended either; whoever serves fewer says so with [DONE].
        ended = ended and len(self._choices) >= self._asked
        if not ended and not self.done:
            raise UpstreamFault(
                Fault.TRUNCATED, "the stream ended with neither a finish_reason nor [DONE]"
            )
        out: list[StreamChatResponse] = []
        for index, name, call in sorted(self._held):
            self._emit(out, _replacement(index, name, call))
        self._held.clear()
        if not self._header_sent:
            out.append(self._take_header())
        for index, choice in sorted(self._choices.items()):
            event = StreamChatResponse()
            event.finish.choice_index = index
            event.finish.finish_reason = finish_reason(
                choice.finish_reason or _details_reason(choice.extra)
            )
            event.finish.finish_reason_raw = choice.finish_reason
            _set_extra(event.finish, choice.extra)
            out.append(event)
        trailer = StreamChatResponse(trailer=chat_service_pb2.StreamTrailer(usage=self.usage))
        _set_extra(trailer.trailer, self._trailer_extra)
        out.append(trailer)
        return out

    def _note(self, chunk: dict[str, Any]) -> None:
        """Facts of the whole response: the first id and model win, the last usage."""
        if not self._header_sent:
            _fill_header(self._header, chunk)
        if extra := _rest(chunk, _HEADER_FIELDS):
            (self._trailer_extra if self._header_sent else self._header_extra).update(extra)
        if (usage := _usage(chunk)) is not None:
            self.usage = usage

    def _choice(self, raw: dict[str, Any], index: int, out: list[StreamChatResponse]) -> None:
        _raise_choice_error(raw)
        delta = raw.get("delta")
        if delta is None and "delta" not in raw:
            delta = raw.get("message")
            if delta is None and "text" in raw:
                raise _protocol("the stream is of legacy text completions")
        if delta is not None and not isinstance(delta, dict):
            raise _protocol("a delta is not an object")
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = _ChoiceState()
        message = chat_service_pb2.Delta()
        if delta:
            self._delta(delta, index, state, message)
        logprobs = raw.get("logprobs")
        if logprobs:
            message.logprobs.extend(_logprobs(logprobs))
        if message.ByteSize():
            message.choice_index = index
            self._emit(out, message)
        reason = raw.get("finish_reason")
        if isinstance(reason, str) and reason:
            state.finish_reason = _clean(reason)
        extra = _rest(raw, _CHOICE_FIELDS)
        if logprobs and not (isinstance(logprobs, dict) and "content" in logprobs):
            extra["logprobs"] = logprobs  # another shape than OpenAI's
        if extra:
            state.extra.update(extra)

    def _delta(
        self,
        delta: dict[str, Any],
        index: int,
        state: _ChoiceState,
        message: chat_service_pb2.Delta,
    ) -> None:
        content = delta.get("content")
        thinking = ""
        if content:
            if isinstance(content, list):
                content, thinking = _list_content(content)
            elif not isinstance(content, str):
                raise _protocol("content is neither text nor a list of parts")
            if content:
                message.content = self._text((index, "content", 0), content)
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or thinking
        if reasoning:
            message.reasoning = self._text((index, "reasoning", 0), _string(reasoning))
        if refusal := delta.get("refusal"):
            message.refusal = self._text((index, "refusal", 0), _string(refusal))
        if calls := delta.get("tool_calls"):
            self._tool_calls(calls, index, state, message)
        if annotations := delta.get("annotations"):
            message.annotations.extend(_annotations(annotations))
        if not delta.keys() <= _MESSAGE_FIELDS and (extra := _rest(delta, _MESSAGE_FIELDS)):
            message.extra_json = _dumps(extra)

    def _tool_calls(
        self, calls: Any, index: int, state: _ChoiceState, message: chat_service_pb2.Delta
    ) -> None:
        """Parts of calls, keyed by index, else by id, else belonging to the last one."""
        if not isinstance(calls, list):
            raise _protocol("tool_calls is not a list")
        for place, raw in enumerate(calls):
            if not isinstance(raw, dict):
                raise _protocol("a tool call is not an object")
            custom = raw.get("type") == "custom" or isinstance(raw.get("custom"), dict)
            body = raw.get("custom" if custom else "function")
            body = body if isinstance(body, dict) else {}
            name = _clean(_string(body.get("name")))
            call_id = _clean(_string(raw.get("id")))
            key: object = raw.get("index")
            if not isinstance(key, int):
                key = call_id or None
            if key is None:
                position = max(len(state.calls) - 1, 0)
            else:
                position = state.slots.get(key, len(state.calls))
            if position < len(state.calls) and _is_another(
                state.calls[position], name, call_id, key is None and place > 0
            ):
                position = len(state.calls)
            if position == len(state.calls):
                state.calls.append(_CallState())
            if key is not None:
                state.slots[key] = position
            if call_id:
                state.slots.setdefault(call_id, position)
            call = state.calls[position]
            part = chat_service_pb2.ToolCallDelta(index=position)
            if call_id and not call.id:
                part.id = call.id = call_id
            if name and not call.name:
                part.name = call.name = name
            arguments = body.get("input" if custom else "arguments")
            if isinstance(arguments, dict | list):
                arguments = _dumps(arguments)
            if arguments:
                part.arguments = self._text((index, "arguments", position), _string(arguments))
            if part.id or part.name or part.arguments:
                part.custom, call.begun = custom and not call.begun, True
                message.tool_calls.append(part)

    def _text(self, slot: tuple[int, str, int], text: str) -> str:
        """`text` as a protobuf string can hold it: pairs of surrogates joined over chunks."""
        if not self._lossy or not text:
            return text
        text = self._held.pop(slot, "") + text
        if "\ud800" <= text[-1] <= "\udbff":
            self._held[slot] = text[-1]
            text = text[:-1]
        return _clean(text)

    def _emit(self, out: list[StreamChatResponse], delta: chat_service_pb2.Delta) -> None:
        if not self._header_sent:
            out.append(self._take_header())
        out.append(StreamChatResponse(delta=delta))

    def _take_header(self) -> StreamChatResponse:
        self._header_sent = True
        _set_extra(self._header, self._header_extra)
        return StreamChatResponse(header=self._header)


def _is_another(call: _CallState, name: str, call_id: str, beside: bool) -> bool:
    """Whether a part begins another call than the one its index, or the lack of one, points to:
    some servers give all calls one index, or none. Parts that repeat a name go on with its call,
    and so do parts without one, whose id may be made up anew each time (old vLLM)."""
    if not name or not call.name:
        return False
    if call_id and call.id:
        return call_id != call.id
    return beside or name != call.name


def _replacement(index: int, name: str, call: int) -> chat_service_pb2.Delta:
    """A delta that ends a text whose last surrogate never found its other half."""
    delta = chat_service_pb2.Delta(choice_index=index)
    if name == "arguments":
        delta.tool_calls.add(index=call, arguments="\ufffd")
    else:
        setattr(delta, name, "\ufffd")
    return delta


def _fill_choice(choice: chat_service_pb2.Choice, raw: dict[str, Any]) -> None:
    _raise_choice_error(raw)
    message = raw.get("message")
    if message is None:
        message = raw.get("delta") or {}
    if not isinstance(message, dict):
        raise _protocol("a message is not an object")
    out = choice.message
    out.role = _clean(_string(message.get("role"))) or "assistant"
    content = message.get("content", raw.get("text"))
    thinking = ""
    if isinstance(content, list):
        content, thinking = _list_content(content)
    if isinstance(content, str):
        out.content = _clean(content)
    elif content is not None:
        raise _protocol("content is neither text nor a list of parts")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or thinking
    if reasoning:
        out.reasoning = _clean(_string(reasoning))
    if refusal := message.get("refusal"):
        out.refusal = _clean(_string(refusal))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise _protocol("tool_calls is not a list")
    for raw_call in calls:
        if not isinstance(raw_call, dict):
            raise _protocol("a tool call is not an object")
        _fill_call(out.tool_calls.add(id=_clean(_string(raw_call.get("id")))), raw_call)
    out.annotations.extend(_annotations(message.get("annotations") or []))
    _set_extra(out, _rest(message, _MESSAGE_FIELDS))
    reason = _clean(_string(raw.get("finish_reason")))
    choice.finish_reason_raw = reason
    choice.finish_reason = finish_reason(reason or _details_reason(raw))
    extra = _rest(raw, _CHOICE_FIELDS)
    logprobs = raw.get("logprobs")
    if isinstance(logprobs, dict) and "content" in logprobs:
        choice.logprobs.extend(_logprobs(logprobs))
    elif logprobs:
        extra["logprobs"] = logprobs
    _set_extra(choice, extra)


def _fill_call(call: chat_pb2.ToolCall, raw: dict[str, Any]) -> None:
    if raw.get("type") == "custom" and isinstance(custom := raw.get("custom"), dict):
        call.custom.name = _clean(_string(custom.get("name")))
        call.custom.input = _clean(_string(custom.get("input")))
        return
    function = raw.get("function")
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, dict | list):
        arguments = _dumps(arguments)
    call.function.name = _clean(_string(function.get("name")))
    call.function.arguments_json = _clean(_string(arguments))


def _fill_header(header: chat_service_pb2.ResponseHeader, answer: dict[str, Any]) -> None:
    if not header.id and isinstance(value := answer.get("id"), str):
        header.id = _clean(value)
    if not header.model and isinstance(value := answer.get("model"), str):
        header.model = _clean(value)
    if not header.system_fingerprint and isinstance(value := answer.get("system_fingerprint"), str):
        header.system_fingerprint = _clean(value)
    if not header.service_tier and isinstance(value := answer.get("service_tier"), str):
        header.service_tier = _clean(value)
    if not header.HasField("create_time"):
        created = answer.get("created")
        if isinstance(created, int | float) and 0 < created < 253_402_300_800:  # year 10000
            header.create_time.FromSeconds(int(created))


def finish_reason(raw: str) -> chat_pb2.FinishReason.ValueType:
    """The contract's word for the upstream's; OTHER for unknown ones and for none."""
    return _FINISH_REASONS.get(raw, chat_pb2.FINISH_REASON_OTHER)


def _details_reason(choice: dict[str, Any]) -> str:
    """What `finish_details`, which OpenAI's vision preview sent instead, says of the end."""
    return _string(_details(choice, "finish_details").get("type"))


def _usage(answer: dict[str, Any]) -> chat_pb2.Usage | None:
    raw = answer.get("usage")
    if not isinstance(raw, dict) or not raw:
        return None
    prompt = _details(raw, "prompt_tokens_details")
    completion = _details(raw, "completion_tokens_details")
    usage = chat_pb2.Usage(
        prompt_tokens=_count(raw.get("prompt_tokens")) or 0,
        completion_tokens=_count(raw.get("completion_tokens")) or 0,
        total_tokens=_count(raw.get("total_tokens")) or 0,
        cached_prompt_tokens=_first_count(
            prompt.get("cached_tokens"),
            raw.get("prompt_cache_hit_tokens"),
            raw.get("cached_tokens"),
        ),
        cache_write_tokens=_first_count(
            prompt.get("cache_write_tokens"), raw.get("cache_write_tokens")
        ),
        reasoning_tokens=_first_count(
            completion.get("reasoning_tokens"), raw.get("reasoning_tokens")
        ),
    )
    _set_extra(usage, _rest(raw, _USAGE_FIELDS))
    return usage


def _details(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _INT32_MAX:
        return int(value)
    return None


def _real(value: Any) -> float:
    """0 for what is no number, or has more digits than a float takes."""
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= _INT32_MAX):
        return float(value)
    return 0.0


def _first_count(*values: Any) -> int | None:
    return next((n for n in map(_count, values) if n is not None), None)


def _index(raw: dict[str, Any], position: int) -> int:
    index = raw.get("index")
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index <= _INT32_MAX:
        return index
    if isinstance(index, str | float):
        raise _protocol("the index of a choice is no integer")  # a guess would mix two answers
    return position


def _list_content(parts: list[Any]) -> tuple[str, str]:
    """(text, thinking) of content that came as a list of parts (Mistral)."""
    text: list[str] = []
    thinking: list[str] = []
    for part in parts:
        if isinstance(part, str):
            text.append(part)
        elif isinstance(part, dict):
            if part.get("type") == "thinking":
                inner = part.get("thinking")
                thinking.append(
                    _list_content(inner)[0] if isinstance(inner, list) else _string(inner)
                )
            elif part.get("type") in ("text", "output_text"):
                text.append(_string(part.get("text")))
    return "".join(text), "".join(thinking)


def _annotations(raw: Any) -> Iterable[chat_pb2.Annotation]:
    for item in raw if isinstance(raw, list) else ():
        citation = item.get("url_citation") if isinstance(item, dict) else None
        if isinstance(citation, dict):
            yield chat_pb2.Annotation(
                start_offset=_count(citation.get("start_index")) or 0,
                end_offset=_count(citation.get("end_index")) or 0,
                url=_clean(_string(citation.get("url"))),
                title=_clean(_string(citation.get("title"))),
            )


def _logprobs(raw: Any) -> Iterable[chat_pb2.TokenLogprob]:
    tokens = raw.get("content") if isinstance(raw, dict) else None
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict):
            out = _logprob(token)
            alternatives = token.get("top_logprobs")
            for alternative in alternatives if isinstance(alternatives, list) else ():
                if isinstance(alternative, dict):
                    out.top.append(_logprob(alternative))
            yield out


def _logprob(raw: dict[str, Any]) -> chat_pb2.TokenLogprob:
    value = raw.get("logprob")
    octets = raw.get("bytes")
    valid = isinstance(octets, list) and all(isinstance(b, int) and 0 <= b < 256 for b in octets)
    return chat_pb2.TokenLogprob(
        token=_clean(_string(raw.get("token"))),
        logprob=_real(value),
        token_bytes=bytes(octets) if valid and octets else b"",
    )


def _rest(raw: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """What the schema does not know and the upstream did not leave empty."""
    return {
        k: v for k, v in raw.items() if k not in known and v is not None and v != [] and v != {}
    }


def _set_extra(message: Any, extra: dict[str, Any]) -> None:
    if extra:
        message.extra_json = _dumps(extra)


def _dumps(value: Any) -> str:
    try:
        try:
            return _encoder.encode(value).decode()
        except UnicodeEncodeError:
            return json.dumps(value)  # keeps a lone surrogate as its escape, which is valid UTF-8
    except RecursionError:
        raise _protocol("the answer is nested too deeply") from None


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _clean(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _load(data: bytes) -> tuple[Any, bool]:
    """(value, lossy): lossy when strings may hold lone surrogates. Raises PROTOCOL faults.

    msgspec refuses lone surrogates and malformed UTF-8, which real streams contain; the
    standard library reads them.
    """
    try:
        return msgspec.json.decode(data), False
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8", "replace"), parse_constant=_no_constant), True
    except (ValueError, RecursionError) as error:
        kind = "is nested too deeply" if isinstance(error, RecursionError) else "is not JSON"
        raise _protocol(f"the answer {kind}: {excerpt(data)}") from None


def excerpt(data: bytes) -> str:
    """The start of an answer that could not be read, fit for a message. It never ends within a
    word: half a key would not be recognised as one, and pass."""
    text, rest = data[:_EXCERPT_BYTES], data[_EXCERPT_BYTES : _EXCERPT_BYTES + 1]
    if rest and rest[0] in _WORD_BYTES:
        text = text.rstrip(_WORD_BYTES)
    return repr(" ".join(text.decode("utf-8", "replace").split()))


def _raise_error(answer: dict[str, Any]) -> None:
    """Raises if a 200 carries an error instead of an answer."""
    error = answer.get("error")
    if error or answer.get("object") == "error":
        raise classify_payload(answer, 0, {})


def _raise_choice_error(raw: dict[str, Any]) -> None:
    """Raises if a choice says that its model failed (OpenRouter): its text is a part only."""
    if raw.get("error"):
        raise classify_payload({"error": raw["error"]}, 0, {})
    if raw.get("finish_reason") == "error":
        raise UpstreamFault(Fault.SERVER_ERROR, "the answer ended with finish_reason error")


def _protocol(message: str) -> UpstreamFault:
    return UpstreamFault(Fault.PROTOCOL, message)
