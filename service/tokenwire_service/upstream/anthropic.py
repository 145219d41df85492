"""The dialect of Anthropic's Messages API: what Claude, and everything compatible, is sent.

API version 2023-06-01 with the fields documented in November 2026 (`output_config`, adaptive
thinking, `strict` tools); the golden file in tests/unit shows one request that uses everything.
docs/dialects.md says what becomes of each field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import UpstreamFault, Violation, invalid
from tokenwire_service.upstream import anthropic_answers, json_text, native
from tokenwire_service.upstream.classify import classify
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route
from tokenwire_service.upstream.json_text import INT32_MAX, json_object, patched, raw_object
from tokenwire_service.upstream.media import has_unread_type, inline
from tokenwire_service.upstream.request import Turn, Unsupported, extended, parameters, turns

ToolChoice = chat_pb2.ToolChoice

_VERSION = {"anthropic-version": "2023-06-01"}
_NEVER = frozenset(
    {
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "verbosity",
    }
)
_TYPED_ONLY = ("model", "messages", "stream")  # of the upstream body
_MAX_TOKENS = 4096  # which the API insists on, where neither the caller nor the model names any
_MAX_TOKENS_THINKING = 16_384  # the same, for thoughts and answer together
_LEAST_BUDGET = 1024  # tokens of thinking, says the API

# How much of max_tokens may go into thoughts, for models that take a budget.
_BUDGET_SHARES = {
    "minimal": 0.1,
    "low": 0.2,
    "": 0.5,
    "medium": 0.5,
    "high": 0.8,
    "xhigh": 0.95,
    "max": 0.95,
}
_CLAUDE = re.compile(r"claude\D*?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")
_FIRST_ADAPTIVE = (4, 6)


class Anthropic(Dialect):
    """The dialect."""

    # --- request ------------------------------------------------------------------------

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The body of POST /messages."""
        unsupported = Unsupported(chat, route)
        effective = parameters(chat, route, unsupported, never=_NEVER)
        params = effective.params
        asked = {descriptor.name for descriptor, _ in chat.params.ListFields()}
        if params.choice_count > 1 and "choice_count" in asked:
            unsupported.leave_out("params.choice_count")
        thinking, effort, limit = _thinking(
            params, effective.max_completion_tokens, route, asked, unsupported
        )
        system, messages = _conversation(turns(chat, route), unsupported)
        body: dict[str, Any] = {"model": route.model_name, "max_tokens": limit}
        if system:
            body["system"] = system
        body["messages"] = messages
        for name in ("temperature", "top_p", "top_k"):
            if params.HasField(name):
                body[name] = getattr(params, name)
        if params.stop:
            body["stop_sequences"] = list(params.stop)
        if thinking:
            body["thinking"] = thinking
        tools, choice = _tools(chat, params, unsupported)
        if tools:
            body["tools"] = tools
        if choice:
            body["tool_choice"] = choice
        output: dict[str, Any] = {"effort": effort} if effort else {}
        if chat.HasField("response_format"):
            output |= _format(chat.response_format, unsupported)
        if output:
            body["output_config"] = output
        if chat.end_user_id:
            body["metadata"] = {"user_id": chat.end_user_id}
        if chat.service_tier:
            tier = "standard_only" if chat.service_tier == "default" else chat.service_tier
            body["service_tier"] = tier
        if chat.prompt_cache_key:
            unsupported.leave_out("prompt_cache_key")
        if stream:
            body["stream"] = True
        body = extended(body, chat, route, _TYPED_ONLY)
        return Encoded(
            self,
            "/messages",
            json_text.encode(body),
            limit,
            unsupported.settle(),
            tuple(params.stop),
            headers=_VERSION,
        )

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """Anthropic's own header; keys belong to one organization and name none."""
        return {"x-api-key": key.secret.reveal()}

    # --- answer -------------------------------------------------------------------------

    def decode(self, encoded: Encoded, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole message."""
        return anthropic_answers.decode(body)

    def stream_decoder(self, encoded: Encoded) -> anthropic_answers.AnthropicStream:
        """A decoder for one stream of message events."""
        return anthropic_answers.AnthropicStream()

    def classify(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFault:
        """What a non-200 answer means."""
        return classify(status, headers, body)

    def list_models(self, upstream: Upstream) -> Encoded | None:
        """GET /models, all on one page."""
        return Encoded(self, "/models?limit=1000", b"", headers=_VERSION)

    def decode_models(self, body: bytes) -> list[model_service_pb2.Model]:
        """The answer to it."""
        return anthropic_answers.decode_models(body)


# --- how much, and how much thought ------------------------------------------------------


def _thinking(
    params: chat_pb2.GenerationParams,
    asked_limit: int,
    route: Route,
    asked: set[str],
    unsupported: Unsupported,
) -> tuple[dict[str, Any] | None, str, int]:
    """(`thinking`, `effort`, `max_tokens`). Either of reasoning_effort `none` and enable_thinking
    false turns thinking off."""
    cap = (route.model.max_completion_tokens if route.model is not None else None) or INT32_MAX
    effort = params.reasoning_effort
    off = effort == "none" or (params.HasField("enable_thinking") and not params.enable_thinking)
    on = bool(effort or params.enable_thinking) and not off
    limit = asked_limit or min(cap, _MAX_TOKENS_THINKING if on else _MAX_TOKENS)
    if _is_adaptive(route.model_name):
        level = {"none": "", "minimal": "low"}.get(effort, effort)
        if off:
            return {"type": "disabled"}, level, limit
        # Models since 4.7 leave the thoughts out unless asked.
        return ({"type": "adaptive", "display": "summarized"} if on else None), level, limit
    if off:
        if effort not in ("", "none") and "reasoning_effort" in asked:
            unsupported.leave_out("params.reasoning_effort")
        return {"type": "disabled"}, "", limit
    if not on:
        return None, "", limit
    if limit <= _LEAST_BUDGET:
        expected = f"thinking needs more than {_LEAST_BUDGET}"
        raise invalid(Violation("params.max_completion_tokens", f"got {limit}, {expected}"))
    if effort not in _BUDGET_SHARES and "reasoning_effort" in asked:
        unsupported.leave_out("params.reasoning_effort")
    share = _BUDGET_SHARES.get(effort, _BUDGET_SHARES[""])
    budget = max(int(limit * share), _LEAST_BUDGET)  # below the limit, as it must be
    return {"type": "enabled", "budget_tokens": budget}, "", limit


def _is_adaptive(model_name: str) -> bool:
    """Whether a model thinks as much as it sees fit: Claude since 4.6, which refuses budgets since
    4.7. Older ones, and other makers' models behind this API, take a budget alone."""
    if "claude" not in model_name:
        return False
    version = _CLAUDE.search(model_name)
    return version is None or (int(version[1]), int(version[2] or 0)) >= _FIRST_ADAPTIVE


# --- the conversation --------------------------------------------------------------------


def _conversation(
    said: list[Turn], unsupported: Unsupported
) -> tuple[str | list[Any], list[dict[str, Any]]]:
    """(`system`, `messages`). System messages at the beginning are the system prompt; later ones
    keep their place, as the user's, for few models take them there. Neighbours are joined."""
    system: list[Any] = []
    messages: list[dict[str, Any]] = []
    for turn in said:
        if turn.role in ("system", "developer") and not messages:
            out = _plain_turn(turn, "system", unsupported)
            system += _as_blocks(out["content"])
            continue
        if turn.role in ("tool", "function"):
            out = _tool_result(turn, unsupported)
        elif turn.role == "assistant":
            out = _assistant(turn, unsupported)
        elif turn.role in ("user", "system", "developer"):
            out = _plain_turn(turn, "user", unsupported)
        else:
            expected = "expected one of system, developer, user, assistant, tool"
            raise invalid(Violation(f"{turn.path}.role", f"is {turn.role!r} upstream, {expected}"))
        last = messages[-1] if messages else None
        if last and last["role"] == out["role"] and {*last, *out} == {"role", "content"}:
            last["content"] = _as_blocks(last["content"]) + _as_blocks(out["content"])
        else:
            messages.append(out)
    if len(system) == 1 and system[0].keys() == {"type", "text"}:
        text: str = system[0]["text"]
        return text, messages
    return system, messages


def _as_blocks(content: Any) -> list[Any]:
    """The API refuses empty texts among others."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content)


def _plain_turn(turn: Turn, role: str, unsupported: Unsupported) -> dict[str, Any]:
    """What a user, or the system, said."""
    message = turn.message
    for name in ("name", "reasoning", "refusal", "annotations", "tool_call_id"):
        if _has(message, name):
            unsupported.leave_out(f"{turn.path}.{name}")
    if message.tool_calls:
        unsupported.refuse(f"{turn.path}.tool_calls", "calls by the assistant alone")
    out = {"role": role, "content": _content(turn, unsupported, only_text=role == "system")}
    _, rest = native.split(message.extra_json, f"{turn.path}.extra_json")
    return patched(out, rest, f"{turn.path}.extra_json") if rest else out


def _tool_result(turn: Turn, unsupported: Unsupported) -> dict[str, Any]:
    """What a tool gave back: the user's, for this API."""
    message = turn.message
    if not message.tool_call_id:
        expected = "missing, expected the id of the call that this answers"
        raise invalid(Violation(f"{turn.path}.tool_call_id", expected))
    for name in ("reasoning", "refusal", "annotations"):  # the tool's name goes by the id
        if _has(message, name):
            unsupported.leave_out(f"{turn.path}.{name}")
    if message.tool_calls:
        unsupported.refuse(f"{turn.path}.tool_calls", "calls by the assistant alone")
    block: dict[str, Any] = {
        "type": "tool_result",
        "tool_use_id": message.tool_call_id,
        "content": _content(turn, unsupported),
    }
    _, rest = native.split(message.extra_json, f"{turn.path}.extra_json")
    if rest:
        block = patched(block, rest, f"{turn.path}.extra_json")
    return {"role": "user", "content": [block]}


def _assistant(turn: Turn, unsupported: Unsupported) -> dict[str, Any]:
    """What the model said: as it was, if the message is still the one that it sent."""
    message = turn.message
    path = f"{turn.path}.extra_json"
    kept, rest = native.split(message.extra_json, path, "anthropic")
    for name in ("name", "tool_call_id"):
        if _has(message, name):
            unsupported.leave_out(f"{turn.path}.{name}")
    blocks = kept.get("content") if kept is not None else None
    if isinstance(blocks, list) and _is_unchanged(turn, blocks):
        out: dict[str, Any] = {"role": "assistant", "content": blocks}
    else:
        # The API refuses thoughts without their signature, and sources have no place.
        for name in ("reasoning", "annotations"):
            if _has(message, name):
                unsupported.note(f"{turn.path}.{name}")
        content = _content(turn, unsupported)
        if message.refusal:  # the words in which the model declined
            content = [*_as_blocks(content), {"type": "text", "text": message.refusal}]
        if message.tool_calls:
            content = _as_blocks(content)
            for i, call in enumerate(message.tool_calls):
                where = f"{turn.path}.tool_calls[{i}]"
                if call.WhichOneof("call") == "custom":
                    unsupported.refuse(f"{where}.custom", "a function call")
                    continue
                content.append(_tool_use(call, f"{where}.function.arguments_json"))
        out = {"role": "assistant", "content": content}
    return patched(out, rest, path) if rest else out


def _tool_use(call: chat_pb2.ToolCall, path: str) -> dict[str, Any]:
    arguments = call.function.arguments_json
    return {
        "type": "tool_use",
        "id": call.id,
        "name": call.function.name,
        "input": raw_object(arguments, path) if arguments.strip() else {},
    }


def _is_unchanged(turn: Turn, blocks: list[Any]) -> bool:
    """Whether a message still says what its blocks say: callers may have edited it."""
    if not all(isinstance(block, dict) for block in blocks) or turn.parts:
        return False
    text = "".join(str(b.get("text", "")) for b in blocks if b.get("type") == "text")
    calls = [block for block in blocks if block.get("type") == "tool_use"]
    ours = turn.message.tool_calls
    return (
        text == (turn.content or "")
        and len(calls) == len(ours)
        and all(
            (theirs.get("id"), theirs.get("name")) == (call.id, call.function.name)
            and native.says(theirs.get("input"), call.function.arguments_json)
            for theirs, call in zip(calls, ours, strict=True)
        )
    )


def _content(turn: Turn, unsupported: Unsupported, *, only_text: bool = False) -> Any:
    """A text, or a list of blocks."""
    if not turn.parts:
        return turn.content or ""
    blocks = []
    for part, path in turn.parts:
        kind = part.WhichOneof("part") or ""
        if only_text and kind not in ("text", "raw_json"):
            unsupported.refuse(f"{path}.{kind}", "text in a system prompt")
        elif kind != "text" or part.text:
            blocks.append(_block(part, kind, path, unsupported))
    return blocks


def _block(part: chat_pb2.ContentPart, kind: str, path: str, unsupported: Unsupported) -> Any:
    out: Any
    if kind == "raw_json":
        out = raw_object(part.raw_json, f"{path}.raw_json")
    elif kind == "text":
        out = {"type": "text", "text": part.text}
    elif kind in ("image", "file"):
        out = _media(getattr(part, kind), kind, f"{path}.{kind}", unsupported)
    else:
        unsupported.refuse(f"{path}.{kind}", "text, an image or a document")
        out = {}
    if part.extra_json:
        out = patched(out, part.extra_json, f"{path}.extra_json")
    return out


def _media(media: chat_pb2.Media, kind: str, path: str, unsupported: Unsupported) -> dict[str, Any]:
    if media.detail not in ("", "auto"):
        unsupported.leave_out(f"{path}.detail")
    source: dict[str, Any]
    block = "image" if kind == "image" or media.media_type.startswith("image/") else "document"
    if media.file_id:
        source = {"type": "file", "file_id": media.file_id}
    elif (found := inline(media, path)) is None:
        source = {"type": "url", "url": media.url}
    else:
        if kind != "image":
            block = "image" if found.media_type.startswith("image/") else "document"
        source = {"type": "base64", "media_type": found.media_type, "data": found.data}
        if block == "document" and found.media_type == "text/plain":
            try:
                text = found.octets.decode()
            except UnicodeDecodeError:
                raise invalid(Violation(path, "expected a text in UTF-8")) from None
            source = {"type": "text", "media_type": "text/plain", "data": text}
        elif block == "document" and found.media_type != "application/pdf":
            expected = "an image, application/pdf or text/plain"
            unsupported.refuse(path, expected)
    if has_unread_type(media):
        unsupported.note(f"{path}.media_type")
    out: dict[str, Any] = {"type": block, "source": source}
    if media.filename and block == "document":
        out["title"] = media.filename
    elif media.filename:
        unsupported.leave_out(f"{path}.filename")
    return out


def _has(message: chat_pb2.ChatMessage, name: str) -> bool:
    return bool(getattr(message, name))


# --- tools, format -----------------------------------------------------------------------


def _tools(
    chat: chat_service_pb2.ChatRequest,
    params: chat_pb2.GenerationParams,
    unsupported: Unsupported,
) -> tuple[list[Any], dict[str, Any] | None]:
    """(`tools`, `tool_choice`). The API has no list of allowed tools: others are not sent."""
    choice = chat.tool_choice
    allowed = set(choice.tool_names) if choice.mode != ToolChoice.MODE_NONE else set()
    tools: list[Any] = []
    for i, tool in enumerate(chat.tools):
        kind = tool.WhichOneof("tool")
        if kind == "raw_json":
            path = f"tools[{i}].raw_json"
            if not allowed or json_object(tool.raw_json, path).get("name") in allowed:
                tools.append(raw_object(tool.raw_json, path))
        elif kind == "custom":
            unsupported.refuse(f"tools[{i}].custom", "a function")
        elif not allowed or tool.function.name in allowed:
            tools.append(_function(tool.function, f"tools[{i}].function"))
    wanted: dict[str, Any] | None = None
    if choice.mode == ToolChoice.MODE_NONE:
        if chat.params.HasField("parallel_tool_calls"):
            unsupported.note("params.parallel_tool_calls")
        return tools, {"type": "none"}
    if choice.mode == ToolChoice.MODE_AUTO or allowed:
        wanted = {"type": "auto"}
    if choice.mode == ToolChoice.MODE_REQUIRED:
        wanted = {"type": "any"}
        if len(choice.tool_names) == 1:
            wanted = {"type": "tool", "name": choice.tool_names[0]}
    if chat.params.HasField("parallel_tool_calls") and not tools:
        unsupported.note("params.parallel_tool_calls")
    elif params.HasField("parallel_tool_calls") and tools:
        wanted = wanted or {"type": "auto"}
        wanted["disable_parallel_tool_use"] = not params.parallel_tool_calls
    return tools, wanted


def _function(function: chat_pb2.FunctionTool, path: str) -> dict[str, Any]:
    out: dict[str, Any] = {"name": function.name}
    if function.description:
        out["description"] = function.description
    schema = function.parameters_schema_json
    out["input_schema"] = (
        raw_object(schema, f"{path}.parameters_schema_json")
        if schema
        else {"type": "object", "properties": {}}
    )
    if function.HasField("strict"):
        out["strict"] = function.strict
    return out


def _format(wanted: chat_pb2.ResponseFormat, unsupported: Unsupported) -> dict[str, Any]:
    """The part of `output_config`. A schema is always enforced, and has no name."""
    kind = wanted.WhichOneof("format")
    if kind == "raw_json":
        return {"format": raw_object(wanted.raw_json, "response_format.raw_json")}
    if kind == "json_object":
        unsupported.leave_out("response_format.json_object")
    if kind == "text":  # which is what there is without any
        unsupported.note("response_format.text")
    if kind != "json_schema":
        return {}
    unsupported.note("response_format.json_schema.name")
    if wanted.json_schema.HasField("strict"):
        unsupported.note("response_format.json_schema.strict")
    if wanted.json_schema.description:
        unsupported.leave_out("response_format.json_schema.description")
    path = "response_format.json_schema.schema_json"
    return {
        "format": {
            "type": "json_schema",
            "schema": raw_object(wanted.json_schema.schema_json, path),
        }
    }
