"""The dialect of Google's Gemini API: generateContent and streamGenerateContent.

API version v1beta with the fields documented in November 2026 (JSON Schema in declarations and
answers, thinking levels, service tiers); the golden file in tests/unit shows one request that
uses everything. docs/dialects.md says what becomes of each field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import GatewayError, UpstreamFault, Violation, invalid
from tokenwire_service.upstream import gemini_answers, json_text, native
from tokenwire_service.upstream.classify import classify
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route, path_segment
from tokenwire_service.upstream.json_text import patched, raw_object
from tokenwire_service.upstream.media import has_unread_type, inline
from tokenwire_service.upstream.request import Turn, Unsupported, extended, parameters, turns

ToolChoice = chat_pb2.ToolChoice

_NEVER = frozenset({"min_p", "repetition_penalty", "logit_bias", "verbosity"})
_TYPED_ONLY = ("model", "messages", "contents", "stream")  # of the upstream body
_PLAIN_PARAMS = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "choice_count": "candidateCount",
    "frequency_penalty": "frequencyPenalty",
    "presence_penalty": "presencePenalty",
    "seed": "seed",
    "logprobs": "responseLogprobs",
    "top_logprobs": "logprobs",
}
# Google's own table for OpenAI's words: models before Gemini 3 take a budget in tokens.
_AS_IT_SEES_FIT = -1
_BUDGETS = {
    "": _AS_IT_SEES_FIT,
    "minimal": 1024,
    "low": 1024,
    "medium": 8192,
    "high": 24_576,
    "xhigh": 24_576,
    "max": 24_576,
}
_LEVELS = {"xhigh": "HIGH", "max": "HIGH"}  # where another word means the same or the closest
_TAKES_BUDGET = re.compile(r"(?:^|/)gemini-[12](?:\.|-|$)")
_RESOLUTIONS = ("low", "medium", "high", "ultra_high")


class Gemini(Dialect):
    """The dialect."""

    # --- request ------------------------------------------------------------------------

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The body of POST /models/{model}:generateContent."""
        unsupported = Unsupported(chat, route)
        effective = parameters(chat, route, unsupported, never=_NEVER)
        params, limit = effective.params, effective.max_completion_tokens
        system, contents = _Conversation(unsupported).encode(turns(chat, route))
        body: dict[str, Any] = {}
        if system:
            body["systemInstruction"] = {"parts": system}
        body["contents"] = contents
        tools, strict = _tools(chat, unsupported)
        if tools:
            body["tools"] = tools
        if calling := _calling(chat.tool_choice, strict):
            body["toolConfig"] = {"functionCallingConfig": calling}
        config: dict[str, Any] = {}
        for name, theirs in _PLAIN_PARAMS.items():
            if params.HasField(name):  # type: ignore[arg-type]  # a name of the table above
                config[theirs] = getattr(params, name)
        if limit:
            config["maxOutputTokens"] = limit
        if params.stop:
            config["stopSequences"] = list(params.stop)
        asked = {descriptor.name for descriptor, _ in chat.params.ListFields()}
        if thinking := _thinking(params, route.model_name, asked, unsupported):
            config["thinkingConfig"] = thinking
        if chat.HasField("response_format"):
            config |= _format(chat.response_format, unsupported)
        if config:
            body["generationConfig"] = config
        if "parallel_tool_calls" in asked and params.parallel_tool_calls:
            unsupported.note("params.parallel_tool_calls")  # it always may
        elif "parallel_tool_calls" in asked:
            unsupported.leave_out("params.parallel_tool_calls")
        if chat.service_tier and chat.service_tier != "auto":  # which is what not saying it means
            tier = "standard" if chat.service_tier == "default" else chat.service_tier
            body["serviceTier"] = tier
        for name in ("end_user_id", "prompt_cache_key"):
            if getattr(chat, name):
                unsupported.leave_out(name)
        body = extended(body, chat, route, _TYPED_ONLY)
        method = "streamGenerateContent?alt=sse" if stream else "generateContent"
        return Encoded(
            self,
            f"/{_model_path(route.model_name)}:{method}",
            json_text.encode(body),
            limit,
            unsupported.settle(),
            tuple(params.stop),
            params.choice_count or 1,
        )

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """Google's own header: a key in the URL would end up in logs."""
        return {"x-goog-api-key": key.secret.reveal()}

    # --- answer -------------------------------------------------------------------------

    def decode(self, encoded: Encoded, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole GenerateContentResponse."""
        return gemini_answers.decode(body)

    def stream_decoder(self, encoded: Encoded) -> gemini_answers.GeminiStream:
        """A decoder for one stream of them."""
        return gemini_answers.GeminiStream(encoded.choices)

    def classify(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFault:
        """What a non-200 answer means."""
        return classify(status, headers, body)

    def list_models(self, upstream: Upstream) -> Encoded | None:
        """GET /models, all on one page."""
        return Encoded(self, "/models?pageSize=1000", b"")

    def decode_models(self, body: bytes) -> list[model_service_pb2.Model]:
        """The answer to it."""
        return gemini_answers.decode_models(body)


def _model_path(name: str) -> str:
    """`models/x`; names may say their own collection, as tunedModels/x does."""
    collection, slash, model = name.partition("/")
    if slash and collection in ("models", "tunedModels"):
        return f"{collection}/{path_segment(model)}"
    return f"models/{path_segment(name)}"


def _thinking(
    params: chat_pb2.GenerationParams, model_name: str, asked: set[str], unsupported: Unsupported
) -> dict[str, Any]:
    """`thinkingConfig`. Either of reasoning_effort `none` and enable_thinking false turns thinking
    off; models that cannot stop thinking refuse that themselves."""
    effort = params.reasoning_effort
    if effort == "none" or (params.HasField("enable_thinking") and not params.enable_thinking):
        if effort not in ("", "none") and "reasoning_effort" in asked:
            unsupported.leave_out("params.reasoning_effort")
        return {"thinkingBudget": 0}
    if not effort and not params.enable_thinking:
        return {}
    config: dict[str, Any] = {"includeThoughts": True}
    if _TAKES_BUDGET.search(model_name):
        if effort not in _BUDGETS and "reasoning_effort" in asked:
            unsupported.leave_out("params.reasoning_effort")
        config["thinkingBudget"] = _BUDGETS.get(effort, _AS_IT_SEES_FIT)
    elif effort:
        config["thinkingLevel"] = _LEVELS.get(effort, effort.upper())
    return config


# --- the conversation --------------------------------------------------------------------


class _Conversation:
    """The turns of one request, which alternate between user and model."""

    def __init__(self, unsupported: Unsupported) -> None:
        self._unsupported = unsupported
        self._functions: dict[str, str] = {}  # id of a call so far -> name of its function

    def encode(self, said: list[Turn]) -> tuple[list[Any], list[dict[str, Any]]]:
        """(parts of the system instruction, contents). System messages at the beginning are the
        instruction; later ones keep their place, as the user's. Neighbours are joined."""
        system: list[Any] = []
        contents: list[dict[str, Any]] = []
        for turn in said:
            if turn.role in ("system", "developer") and not contents:
                system += self._plain(turn, only_text=True)["parts"]
                continue
            if turn.role in ("tool", "function"):
                out = self._result(turn)
            elif turn.role == "assistant":
                out = self._assistant(turn)
            elif turn.role in ("user", "system", "developer"):
                out = self._plain(turn)
            else:
                expected = "expected one of system, developer, user, assistant, tool"
                problem = f"is {turn.role!r} upstream, {expected}"
                raise invalid(Violation(f"{turn.path}.role", problem))
            last = contents[-1] if contents else None
            if last and last["role"] == out["role"] and {*last, *out} == {"role", "parts"}:
                last["parts"] = [*last["parts"], *out["parts"]]
            else:
                contents.append(out)
        return system, contents

    def _leave_out(self, turn: Turn, *names: str) -> None:
        for name in names:
            if getattr(turn.message, name):
                self._unsupported.leave_out(f"{turn.path}.{name}")

    def _patched(self, out: dict[str, Any], rest: str, turn: Turn) -> dict[str, Any]:
        return patched(out, rest, f"{turn.path}.extra_json") if rest else out

    def _plain(self, turn: Turn, *, only_text: bool = False) -> dict[str, Any]:
        """What a user, or the system, said."""
        self._leave_out(turn, "name", "reasoning", "refusal", "annotations", "tool_call_id")
        if turn.message.tool_calls:
            self._unsupported.refuse(f"{turn.path}.tool_calls", "calls by the assistant alone")
        parts = []
        for part, path, kind in _kinds(turn):
            if only_text and kind not in ("text", "raw_json"):
                self._unsupported.refuse(f"{path}.{kind}", "text in a system instruction")
            else:
                parts.append(self._part(part, kind, path))
        _, rest = native.split(turn.message.extra_json, f"{turn.path}.extra_json")
        return self._patched({"role": "user", "parts": parts}, rest, turn)

    def _result(self, turn: Turn) -> dict[str, Any]:
        """What a function gave back: the user's, for this API. It goes by the function's name,
        and by an id if the call had one of Google's."""
        message = turn.message
        self._leave_out(turn, "reasoning", "refusal", "annotations")
        if message.tool_calls:
            self._unsupported.refuse(f"{turn.path}.tool_calls", "calls by the assistant alone")
        name = self._functions.get(message.tool_call_id) or message.name
        if not name:
            expected = "expected the id of a call above, or a name beside it"
            problem = f"got {message.tool_call_id[:80]!r}, {expected}"
            raise invalid(Violation(f"{turn.path}.tool_call_id", problem))
        answer: dict[str, Any] = {}
        if message.tool_call_id and not gemini_answers.is_made_up(message.tool_call_id):
            answer["id"] = message.tool_call_id
        answer["name"] = name
        texts: list[str] = []
        parts: list[Any] = []
        for part, path, kind in _kinds(turn):
            if kind == "text":
                texts.append(part.text)
            else:
                parts.append(self._part(part, kind, path))
        answer["response"] = _object("".join(texts))
        if parts:
            answer["parts"] = parts
        _, rest = native.split(message.extra_json, f"{turn.path}.extra_json")
        return {
            "role": "user",
            "parts": [{"functionResponse": self._patched(answer, rest, turn)}],
        }

    def _assistant(self, turn: Turn) -> dict[str, Any]:
        """What the model said: as it was, if the message is still the one that it sent."""
        message = turn.message
        kept, rest = native.split(message.extra_json, f"{turn.path}.extra_json", "gemini")
        self._leave_out(turn, "name", "tool_call_id")
        for call in message.tool_calls:
            self._functions[call.id] = call.function.name
        parts = kept.get("parts") if kept is not None else None
        if isinstance(parts, list) and _is_unchanged(turn, parts):
            return self._patched({"role": "model", "parts": parts}, rest, turn)
        for name in ("reasoning", "annotations"):  # it takes no thoughts of others, nor sources
            if getattr(message, name):
                self._unsupported.note(f"{turn.path}.{name}")
        parts = [self._part(part, kind, path) for part, path, kind in _kinds(turn)]
        if message.refusal:  # the words in which the model declined
            parts.append({"text": message.refusal})
        for i, call in enumerate(message.tool_calls):
            where = f"{turn.path}.tool_calls[{i}]"
            if call.WhichOneof("call") == "custom":
                self._unsupported.refuse(f"{where}.custom", "a function call")
                continue
            out: dict[str, Any] = {}
            if call.id and not gemini_answers.is_made_up(call.id):
                out["id"] = call.id
            out["name"] = call.function.name
            arguments = call.function.arguments_json
            path = f"{where}.function.arguments_json"
            out["args"] = raw_object(arguments, path) if arguments.strip() else {}
            parts.append({"functionCall": out})
        return self._patched({"role": "model", "parts": parts}, rest, turn)

    def _part(self, part: chat_pb2.ContentPart, kind: str, path: str) -> Any:
        out: Any
        if kind == "raw_json":
            out = raw_object(part.raw_json, f"{path}.raw_json")
        elif kind == "text":
            out = {"text": part.text}
        else:
            out = self._media(getattr(part, kind), f"{path}.{kind}")
        if part.extra_json:
            out = patched(out, part.extra_json, f"{path}.extra_json")
        return out

    def _media(self, media: chat_pb2.Media, path: str) -> dict[str, Any]:
        """Of any kind: the media type says which."""
        if media.filename:
            self._unsupported.leave_out(f"{path}.filename")
        out: dict[str, Any]
        if not media.file_id and (found := inline(media, path)) is not None:
            out = {"inlineData": {"mimeType": found.media_type, "data": found.data}}
            if has_unread_type(media):
                self._unsupported.note(f"{path}.media_type")
        else:
            file = {"mimeType": media.media_type} if media.media_type else {}
            out = {"fileData": {**file, "fileUri": media.file_id or media.url}}
        if media.detail in _RESOLUTIONS:
            out["mediaResolution"] = {"level": f"MEDIA_RESOLUTION_{media.detail.upper()}"}
        elif media.detail not in ("", "auto"):
            self._unsupported.leave_out(f"{path}.detail")
        return out


def _kinds(turn: Turn) -> list[tuple[chat_pb2.ContentPart, str, str]]:
    """(part, path, kind) of what a turn says, empty texts aside."""
    parts = turn.parts
    if turn.content:
        parts = [(chat_pb2.ContentPart(text=turn.content), turn.path)]
    found = [(part, path, part.WhichOneof("part") or "") for part, path in parts]
    return [one for one in found if one[2] != "text" or one[0].text]


def _object(text: str) -> Any:
    """The answer of a function, which must be an object: as it is, or under `output`."""
    try:
        return raw_object(text, "content")
    except GatewayError:
        return {"output": text}


def _is_unchanged(turn: Turn, parts: list[Any]) -> bool:
    """Whether a message still says what its parts say: callers may have edited it."""
    if not all(isinstance(part, dict) for part in parts) or turn.parts:
        return False
    text = "".join(str(p.get("text", "")) for p in parts if not p.get("thought"))
    calls = [call for part in parts if isinstance(call := part.get("functionCall"), dict)]
    ours = turn.message.tool_calls
    return (
        text == (turn.content or "")
        and len(calls) == len(ours)
        and all(
            theirs.get("name") == call.function.name
            and native.says(theirs.get("args") or {}, call.function.arguments_json)
            for theirs, call in zip(calls, ours, strict=True)
        )
    )


# --- tools, format -----------------------------------------------------------------------


def _tools(chat: chat_service_pb2.ChatRequest, unsupported: Unsupported) -> tuple[list[Any], bool]:
    """(`tools`, whether a function wants its schema kept to)."""
    declared: list[Any] = []
    tools: list[Any] = []
    strict = False
    for i, tool in enumerate(chat.tools):
        kind = tool.WhichOneof("tool")
        if kind == "raw_json":
            tools.append(raw_object(tool.raw_json, f"tools[{i}].raw_json"))
        elif kind == "custom":
            unsupported.refuse(f"tools[{i}].custom", "a function")
        else:
            function = tool.function
            out: dict[str, Any] = {"name": function.name}
            if function.description:
                out["description"] = function.description
            if schema := function.parameters_schema_json:
                path = f"tools[{i}].function.parameters_schema_json"
                out["parametersJsonSchema"] = raw_object(schema, path)
            strict = strict or function.strict
            declared.append(out)
    return ([{"functionDeclarations": declared}] if declared else []) + tools, strict


def _calling(choice: chat_pb2.ToolChoice, strict: bool) -> dict[str, Any]:
    """`functionCallingConfig`. VALIDATED is AUTO that keeps to the schemas, or to some names."""
    if choice.mode == ToolChoice.MODE_NONE:
        return {"mode": "NONE"}
    if choice.mode == ToolChoice.MODE_REQUIRED:
        mode = "ANY"  # which keeps to the schemas
    elif strict or choice.tool_names:
        mode = "VALIDATED"
    elif choice.mode == ToolChoice.MODE_AUTO:
        mode = "AUTO"
    else:
        return {}
    if choice.tool_names:
        return {"mode": mode, "allowedFunctionNames": list(choice.tool_names)}
    return {"mode": mode}


def _format(wanted: chat_pb2.ResponseFormat, unsupported: Unsupported) -> dict[str, Any]:
    """The part of `generationConfig`. A schema is always enforced, and has no name."""
    kind = wanted.WhichOneof("format")
    if kind == "raw_json":
        return json_text.json_object(wanted.raw_json, "response_format.raw_json")
    if kind == "json_object":
        return {"responseMimeType": "application/json"}
    if kind != "json_schema":
        return {"responseMimeType": "text/plain"}
    unsupported.note("response_format.json_schema.name")
    if wanted.json_schema.HasField("strict"):
        unsupported.note("response_format.json_schema.strict")
    if wanted.json_schema.description:
        unsupported.leave_out("response_format.json_schema.description")
    path = "response_format.json_schema.schema_json"
    return {
        "responseMimeType": "application/json",
        "responseJsonSchema": raw_object(wanted.json_schema.schema_json, path),
    }
