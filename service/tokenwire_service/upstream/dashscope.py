"""The dialect of DashScope's own API, beside its OpenAI-compatible mode: Qwen and what else Alibaba
Cloud's Model Studio serves.

API version v1 as documented in November 2026: text-generation, and multimodal-generation for
models or requests with more than text; the golden file in tests/unit shows one request that uses
everything. docs/dialects.md says what becomes of each field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import UpstreamFault, Violation, invalid
from tokenwire_service.upstream import dashscope_answers, json_text, native
from tokenwire_service.upstream.classify import classify
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route
from tokenwire_service.upstream.json_text import json_object, patched, raw_object
from tokenwire_service.upstream.media import has_unread_type, inline
from tokenwire_service.upstream.request import (
    Turn,
    Unsupported,
    extended,
    openai_format,
    parameters,
    turns,
)

ToolChoice = chat_pb2.ToolChoice

_NEVER = frozenset({"min_p", "frequency_penalty", "logit_bias", "verbosity"})
_TYPED_ONLY = ("model", "messages", "input", "stream")  # of the upstream body
_PLAIN_PARAMS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "choice_count": "n",
    "logprobs": "logprobs",
    "top_logprobs": "top_logprobs",
    "parallel_tool_calls": "parallel_tool_calls",
}
# Tokens of thinking by reasoning_effort; None: as many as the model allows.
_BUDGETS: Mapping[str, int | None] = {
    "minimal": 1024,
    "low": 4096,
    "medium": 16_384,
    "high": None,
    "xhigh": None,
    "max": None,
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SERVICES = "/services/aigc"
_TEXT = f"{_SERVICES}/text-generation/generation"
_MULTIMODAL = f"{_SERVICES}/multimodal-generation/generation"
_MULTIMODAL_MODELS = re.compile(r"-vl|-audio|-omni|-ocr|-asr|^qvq|^qwen3\.[5-9]|^qwen[4-9]")
# The only models of this family that can send what is new alone, whatever they are asked for.
_CUMULATIVE_MODELS = re.compile(r"^qwen-mt-(?!flash|lite)")


class DashScope(Dialect):
    """The dialect."""

    # --- request ------------------------------------------------------------------------

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The body of POST .../generation."""
        unsupported = Unsupported(chat, route)
        effective = parameters(chat, route, unsupported, never=_NEVER)
        params, limit = effective.params, effective.max_completion_tokens
        said = turns(chat, route)
        multimodal = bool(_MULTIMODAL_MODELS.search(route.model_name)) or any(
            part.WhichOneof("part") in ("image", "audio", "video")
            for t in said
            for part, _ in t.parts
        )
        messages = [_message(turn, multimodal, unsupported) for turn in said]
        theirs: dict[str, Any] = {"result_format": "message"}
        if stream:
            theirs["incremental_output"] = not _CUMULATIVE_MODELS.search(route.model_name)
        for name, their_name in _PLAIN_PARAMS.items():
            if params.HasField(name):  # type: ignore[arg-type]  # a name of the table above
                theirs[their_name] = getattr(params, name)
        if limit:
            theirs["max_tokens"] = limit
        if params.stop:
            theirs["stop"] = list(params.stop)
        theirs |= _thinking(chat, params, unsupported)
        tools, choice = _tools(chat, unsupported)
        if tools:
            theirs["tools"] = tools
        if choice is not None:
            theirs["tool_choice"] = choice
        if chat.HasField("response_format"):
            theirs["response_format"] = openai_format(chat.response_format)
        for name in ("end_user_id", "prompt_cache_key", "service_tier"):
            if getattr(chat, name):
                unsupported.leave_out(name)
        body: dict[str, Any] = {
            "model": route.model_name,
            "input": {"messages": messages},
            "parameters": theirs,
        }
        body = extended(body, chat, route, _TYPED_ONLY)
        sent = body.get("parameters")
        incremental = isinstance(sent, dict) and sent.get("incremental_output") is True
        path = _MULTIMODAL if multimodal else _TEXT
        return Encoded(
            self,
            "" if _is_whole(route.upstream) else path,
            json_text.encode(body),
            limit,
            unsupported.settle(),
            tuple(params.stop),
            params.choice_count or 1,
            headers={"X-DashScope-SSE": "enable", "Accept": "text/event-stream"} if stream else {},
            notes=frozenset() if incremental else frozenset({dashscope_answers.CUMULATIVE}),
        )

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """Bearer authentication; keys belong to one workspace."""
        return {"Authorization": f"Bearer {key.secret.reveal()}"}

    # --- answer -------------------------------------------------------------------------

    def decode(self, encoded: Encoded, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole answer."""
        return dashscope_answers.decode(body)

    def stream_decoder(self, encoded: Encoded) -> dashscope_answers.DashScopeStream:
        """A decoder for one stream of answers, each with what is new or with everything so far."""
        cumulative = dashscope_answers.CUMULATIVE in encoded.notes
        return dashscope_answers.DashScopeStream(encoded.choices, cumulative=cumulative)

    def classify(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFault:
        """What a non-200 answer means. To a request for a stream the answer may come as one."""
        return classify(status, headers, dashscope_answers.error_of_stream(body))

    def list_models(self, upstream: Upstream) -> Encoded | None:
        """GET /models, the first page."""
        if _is_whole(upstream):
            return None
        return Encoded(self, "/models?page_no=1&page_size=100", b"")

    def decode_models(self, body: bytes) -> list[model_service_pb2.Model]:
        """The answer to it."""
        return dashscope_answers.decode_models(body)


def _is_whole(upstream: Upstream) -> bool:
    """Whether the base URL names the service itself, for models that are guessed wrong here."""
    return upstream.base_url.endswith("/generation")


def _thinking(
    chat: chat_service_pb2.ChatRequest, params: chat_pb2.GenerationParams, unsupported: Unsupported
) -> dict[str, Any]:
    """Either of reasoning_effort `none` and enable_thinking false turns thinking off."""
    effort = params.reasoning_effort
    off = effort == "none" or (params.HasField("enable_thinking") and not params.enable_thinking)
    if (
        effort not in ("", "none")
        and (off or effort not in _BUDGETS)
        and chat.params.reasoning_effort
    ):
        unsupported.leave_out("params.reasoning_effort")
    if off:
        return {"enable_thinking": False}
    if not effort and not params.enable_thinking:
        return {}
    budget = _BUDGETS.get(effort)
    return {"enable_thinking": True, **({"thinking_budget": budget} if budget else {})}


# --- the conversation --------------------------------------------------------------------


def _message(turn: Turn, multimodal: bool, unsupported: Unsupported) -> dict[str, Any]:
    message = turn.message
    role = _ROLES.get(turn.role)
    if role is None:
        expected = f"expected one of {', '.join(_ROLES)}"
        raise invalid(Violation(f"{turn.path}.role", f"is {turn.role!r} upstream, {expected}"))
    out: dict[str, Any] = {"role": role, "content": _content(turn, multimodal, unsupported)}
    if message.name and role == "tool":
        out["name"] = message.name
    elif message.name:
        unsupported.leave_out(f"{turn.path}.name")
    if message.annotations:
        unsupported.note(f"{turn.path}.annotations")
    if message.refusal:  # the words in which the model declined
        out["content"] = _with(out["content"], message.refusal, multimodal)
    if message.HasField("reasoning"):
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = []
    for i, call in enumerate(message.tool_calls):
        if call.WhichOneof("call") == "custom":
            unsupported.refuse(f"{turn.path}.tool_calls[{i}].custom", "a function call")
            continue
        function = {"name": call.function.name, "arguments": call.function.arguments_json}
        out["tool_calls"].append({"id": call.id, "type": "function", "function": function})
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    _, rest = native.split(message.extra_json, f"{turn.path}.extra_json")
    return patched(out, rest, f"{turn.path}.extra_json") if rest else out


def _content(turn: Turn, multimodal: bool, unsupported: Unsupported) -> Any:
    """A text, or a list of parts; the multimodal service takes lists alone."""
    if not turn.parts:
        text = turn.content or ""
        return [{"text": text}] if multimodal else text
    return [_part(part, path, multimodal, unsupported) for part, path in turn.parts]


def _with(content: Any, text: str, multimodal: bool) -> Any:
    if isinstance(content, str):
        return content + text
    said = [part for part in content if part != {"text": ""}]
    return [*said, {"text": text} if multimodal else {"type": "text", "text": text}]


def _part(part: chat_pb2.ContentPart, path: str, multimodal: bool, unsupported: Unsupported) -> Any:
    kind = part.WhichOneof("part") or ""
    out: Any
    if kind == "raw_json":
        out = raw_object(part.raw_json, f"{path}.raw_json")
    elif kind == "text":
        out = {"text": part.text} if multimodal else {"type": "text", "text": part.text}
    elif kind == "file":
        unsupported.refuse(f"{path}.file", "text, an image, audio or a video")
        out = {}
    else:
        out = _media(getattr(part, kind), kind, f"{path}.{kind}", unsupported)
    if part.extra_json:
        out = patched(out, part.extra_json, f"{path}.extra_json")
    return out


def _media(media: chat_pb2.Media, kind: str, path: str, unsupported: Unsupported) -> dict[str, Any]:
    if media.file_id:
        unsupported.refuse(f"{path}.file_id", "data or a URL")
    if media.filename:
        unsupported.leave_out(f"{path}.filename")
    if media.detail not in ("", "auto"):
        unsupported.leave_out(f"{path}.detail")
    if has_unread_type(media):
        unsupported.note(f"{path}.media_type")
    found = inline(media, path)
    return {kind: found.url if found is not None else media.url}


# --- tools, format -----------------------------------------------------------------------


def _tools(chat: chat_service_pb2.ChatRequest, unsupported: Unsupported) -> tuple[list[Any], Any]:
    """(`tools`, `tool_choice`). The API has no list of allowed tools: others are not sent. Nor can
    it demand a call, but of one tool."""
    choice = chat.tool_choice
    none = choice.mode == ToolChoice.MODE_NONE
    allowed = set() if none else set(choice.tool_names)
    tools: list[Any] = []
    names: list[str] = []
    for i, tool in enumerate(chat.tools):
        kind = tool.WhichOneof("tool")
        if kind == "raw_json":
            path = f"tools[{i}].raw_json"
            function = json_object(tool.raw_json, path).get("function")
            name = function.get("name", "") if isinstance(function, dict) else ""
        else:
            name = tool.function.name
        if kind == "custom":
            unsupported.refuse(f"tools[{i}].custom", "a function")
        elif not allowed or name in allowed:
            names.append(name)
            tools.append(
                raw_object(tool.raw_json, path)
                if kind == "raw_json"
                else _function(tool.function, f"tools[{i}].function", unsupported)
            )
    if none:
        return tools, "none"
    if choice.mode == ToolChoice.MODE_REQUIRED:
        if len(names) == 1:
            return tools, {"type": "function", "function": {"name": names[0]}}
        unsupported.leave_out("tool_choice.mode")
    if choice.mode == ToolChoice.MODE_AUTO or allowed:
        return tools, "auto"
    return tools, None


def _function(
    function: chat_pb2.FunctionTool, path: str, unsupported: Unsupported
) -> dict[str, Any]:
    out: dict[str, Any] = {"name": function.name}
    if function.description:
        out["description"] = function.description
    schema = function.parameters_schema_json
    out["parameters"] = raw_object(schema, f"{path}.parameters_schema_json") if schema else {}
    if function.strict:
        unsupported.leave_out(f"{path}.strict")
    return {"type": "function", "function": out}
