"""Requests of the contract, built from what Python developers have at hand.

Ranges are the server's to judge: it names the field and knows the model. Here only
types are checked, so that a mistake is told before anything is sent, with its place.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_origin

from tokenwire.replies import Answer, Choice, ToolCall
from tokenwire.typed import schema_of
from tokenwire.v1.chat_pb2 import (
    Annotation,
    ChatMessage,
    ContentPart,
    FunctionTool,
    JsonSchemaFormat,
    Media,
    ResponseFormat,
    RoleTemplate,
    Tool,
    ToolChoice,
)
from tokenwire.v1.chat_pb2 import ToolCall as ToolCallProto
from tokenwire.v1.chat_service_pb2 import (
    STREAM_MODE_CUMULATIVE,
    STREAM_MODE_DELTA,
    UNSUPPORTED_PARAMETER_POLICY_DROP,
    UNSUPPORTED_PARAMETER_POLICY_REJECT,
    BatchChatItem,
    BatchChatRequest,
    ChatRequest,
    StreamChatRequest,
)
from tokenwire.v1.tokenizer_service_pb2 import CountTokensRequest, TokenizeRequest

Json: TypeAlias = Mapping[str, Any] | str
"""A JSON object: as Python values, or as text that is sent unchanged."""

Message: TypeAlias = ChatMessage | Answer | Choice | Mapping[str, Any]
"""One turn: a dict in the OpenAI layout, a ChatMessage, or an earlier answer."""

Prompt: TypeAlias = str | Sequence[Message] | ChatRequest
"""One user message, a conversation (oldest first), or a ready request."""

BatchItem: TypeAlias = Prompt | Mapping[str, Any] | BatchChatItem
"""A prompt, or a dict with "messages" and, as wanted, "custom_id", "model" and options."""


class CallOptions(TypedDict, total=False):
    """What every call takes."""

    timeout: float | None
    """Seconds until the call fails with DEADLINE_EXCEEDED; None for no limit."""
    request_id: str
    """`x-request-id`, to find the call in the gateway's log; made up when not given."""
    metadata: Mapping[str, str | bytes]
    """More gRPC metadata, such as `traceparent`."""


class ChatOptions(CallOptions, total=False):
    """What every chat takes. None, like absence, means the model's default."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    max_completion_tokens: int | None
    stop: str | Sequence[str] | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    choice_count: int | None
    """Answers to generate (`n` elsewhere)."""
    logprobs: bool | None
    top_logprobs: int | None
    logit_bias: Mapping[int, float] | None
    """Token id to bias."""
    reasoning_effort: str | None
    enable_thinking: bool | None
    verbosity: str | None
    parallel_tool_calls: bool | None
    tools: Sequence[Tool | FunctionTool | Mapping[str, Any]] | None
    """{"name", "description", "parameters"}, or the OpenAI layout around it. "parameters" is a JSON
    Schema, or a type that has one; `call.parse(type)` then has the arguments."""
    tool_choice: str | Mapping[str, Any] | ToolChoice | None
    """ "auto", "none", "required", {"name": ...} to force one, or the OpenAI layout."""
    response_format: str | Mapping[str, Any] | ResponseFormat | None
    """ "text", "json_object", or the OpenAI layout."""
    json_schema: Json | type[Any] | None
    """JSON Schema the answer must match; `reply.json()` parses it. Or a type that has one, which
    needs pydantic; `reply.parse(type)` makes one of the answer."""
    role_templates: Sequence[RoleTemplate | Mapping[str, str]] | None
    end_user_id: str | None
    prompt_cache_key: str | None
    service_tier: str | None
    unsupported_parameters: Literal["reject", "drop"] | None
    """Whether a parameter the upstream does not take fails the call (the default)."""
    labels: Mapping[str, str] | None
    """For accounting."""
    extra_body: Json | None
    """Merged into the upstream's body last, for what is not modelled here."""


CALL_OPTIONS = frozenset(CallOptions.__annotations__)

# Names other libraries use, for the hint in the error.
_ELSEWHERE = {
    "max_tokens": "max_completion_tokens",
    "max_new_tokens": "max_completion_tokens",
    "n": "choice_count",
    "user": "end_user_id",
    "safety_identifier": "end_user_id",
    "stop_words": "stop",
    "functions": "tools",
    "function_call": "tool_choice",
    "headers": "metadata",
    "extra_headers": "metadata",
}


# --- requests -----------------------------------------------------------------------


def chat_request(
    prompt: Prompt, model: str | None = None, **options: Unpack[ChatOptions]
) -> ChatRequest:
    """A ChatRequest. Options of the call itself, such as `timeout`, are left out.

    A ready request is copied, and what else is given replaces its fields.
    Raises TypeError and ValueError that say where and what was expected.
    """
    request = ChatRequest()
    if isinstance(prompt, ChatRequest):
        request.CopyFrom(prompt)
    else:
        request.messages.extend(_messages(prompt, "messages"))
    if model is not None:
        request.model = _text(model, "model")
    if not request.model:
        raise ValueError('model: expected the name of a model, for example "gpt-4o-mini"')
    if options.get("json_schema") is not None and options.get("response_format") is not None:
        raise ValueError("json_schema, response_format: expected only one of them")
    for name, value in options.items():
        if name in CALL_OPTIONS:
            continue
        if name not in _SETTERS:
            raise TypeError(_unknown(name))
        if value is not None:
            _SETTERS[name](request, name, value)
    return request


def stream_request(
    prompt: Prompt,
    model: str | None,
    mode: str,
    max_delay: float,
    **options: Unpack[ChatOptions],
) -> StreamChatRequest:
    """A StreamChatRequest; `max_delay` in seconds."""
    modes = {"delta": STREAM_MODE_DELTA, "cumulative": STREAM_MODE_CUMULATIVE}
    request = StreamChatRequest(
        chat=chat_request(prompt, model, **options), mode=_one_of(modes, mode, "mode")
    )
    if delay := _number(max_delay, "max_delay"):
        request.max_delay.FromNanoseconds(round(delay * 1e9))
    return request


def batch_request(
    items: Iterable[BatchItem],
    model: str | None,
    max_concurrency: int,
    **options: Unpack[ChatOptions],
) -> BatchChatRequest:
    """A BatchChatRequest.

    `model` and the options hold for items without their own; a ready ChatRequest or
    BatchChatItem takes only the model, and that only if it has none.
    """
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise TypeError(f"items: expected a list of prompts, got {_kind(items)}")
    request = BatchChatRequest(max_concurrency=_integer(max_concurrency, "max_concurrency"))
    for index, item in enumerate(items):
        try:
            request.items.append(_batch_item(item, model, options))
        except TypeError as error:
            raise TypeError(f"items[{index}]: {error}") from None
        except ValueError as error:
            raise ValueError(f"items[{index}]: {error}") from None
    if not request.items:
        raise ValueError("items: expected at least one")
    return request


def _batch_item(item: BatchItem, model: str | None, shared: ChatOptions) -> BatchChatItem:
    if isinstance(item, ChatRequest):
        item = BatchChatItem(chat=item)
    if isinstance(item, BatchChatItem):  # ready: it lacks at most the model
        chat = chat_request(item.chat, None if item.chat.model else model)
        return BatchChatItem(custom_id=item.custom_id, chat=chat)
    if not isinstance(item, Mapping):
        return BatchChatItem(chat=chat_request(item, model, **shared))
    own = dict(item)
    if "messages" not in own:
        raise ValueError(f'expected "messages", got the keys {sorted(map(str, own))}')
    prompt = own.pop("messages")
    custom_id = _text(own.pop("custom_id", ""), "custom_id")
    model = own.pop("model", None) or model
    for name in CALL_OPTIONS & own.keys():
        raise TypeError(f"{name}: one call carries the whole batch: give it to batch() itself")
    merged: Any = {**shared, **own}
    return BatchChatItem(custom_id=custom_id, chat=chat_request(prompt, model, **merged))


def count_request(
    prompt: Prompt, model: str | None, **options: Unpack[ChatOptions]
) -> CountTokensRequest:
    """A CountTokensRequest: of one text as it is, or of a conversation with its layout."""
    chat = chat_request(prompt, model, **options)
    if isinstance(prompt, str) and not options.keys() - CALL_OPTIONS:
        return CountTokensRequest(model=chat.model, text=prompt)
    return CountTokensRequest(model=chat.model, chat=chat)


def tokenize_request(texts: str | Sequence[str], model: str) -> TokenizeRequest:
    """A TokenizeRequest."""
    each = [texts] if isinstance(texts, str) else _sequence(texts, "texts", "strings")
    return TokenizeRequest(
        model=_text(model, "model"),
        texts=[_text(text, f"texts[{i}]") for i, text in enumerate(each)],
    )


def only_call_options(options: CallOptions) -> None:
    """Raises TypeError for an option that is not of every call."""
    for name in options:
        if name not in CALL_OPTIONS:
            raise TypeError(f"unknown option {name!r}, expected {', '.join(sorted(CALL_OPTIONS))}")


# --- options ------------------------------------------------------------------------


def _set_float(request: ChatRequest, name: str, value: Any) -> None:
    setattr(request.params, name, _number(value, name))


def _set_int(request: ChatRequest, name: str, value: Any) -> None:
    _assign(request.params, name, _integer(value, name), name)


def _set_flag(request: ChatRequest, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_kind(value)}")
    setattr(request.params, name, value)


def _set_word(request: ChatRequest, name: str, value: Any) -> None:
    setattr(request.params, name, _text(value, name))


def _set_text(request: ChatRequest, name: str, value: Any) -> None:
    setattr(request, name, _text(value, name))


def _set_stop(request: ChatRequest, name: str, value: Any) -> None:
    strings = [value] if isinstance(value, str) else _sequence(value, name, "strings")
    request.params.stop[:] = [_text(each, f"{name}[{i}]") for i, each in enumerate(strings)]


def _set_logit_bias(request: ChatRequest, name: str, value: Any) -> None:
    request.params.logit_bias.clear()
    for token, bias in _mapping(value, name).items():
        # JSON keys are strings, so biases copied from elsewhere often have "50256".
        number = int(token) if isinstance(token, str) and token.isdecimal() else token
        key = _integer(number, f"{name} key")
        try:
            request.params.logit_bias[key] = _number(bias, f"{name}[{token}]")
        except ValueError:
            raise ValueError(f"{name}: {token} is no token id") from None


def _set_tools(request: ChatRequest, name: str, value: Any) -> None:
    tools = [_tool(each, f"{name}[{i}]") for i, each in enumerate(_sequence(value, name, "tools"))]
    del request.tools[:]
    request.tools.extend(tools)


def _set_tool_choice(request: ChatRequest, name: str, value: Any) -> None:
    request.tool_choice.CopyFrom(_tool_choice(value, name))


def _set_response_format(request: ChatRequest, name: str, value: Any) -> None:
    request.response_format.CopyFrom(_response_format(value, name))


def _set_json_schema(request: ChatRequest, name: str, value: Any) -> None:
    if _is_type(value):
        value = {"title": getattr(value, "__name__", ""), **schema_of(value)}
    wrapped = isinstance(value, Mapping) and "schema" in value
    title = value.get("title", "") if isinstance(value, Mapping) else ""
    # Upstreams want a name of this alphabet, and few people have one at hand.
    label = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in str(title))
    given = value if wrapped else {"name": label[:64] or "answer", "schema": value}
    request.response_format.CopyFrom(ResponseFormat(json_schema=_schema(given, name)))


def _set_role_templates(request: ChatRequest, name: str, value: Any) -> None:
    templates = []
    for i, each in enumerate(_sequence(value, name, "role templates")):
        where = f"{name}[{i}]"
        if isinstance(each, RoleTemplate):
            templates.append(each)
            continue
        fields = _mapping(each, where)
        _only(fields, RoleTemplate.DESCRIPTOR.fields_by_name, where)
        templates.append(
            RoleTemplate(**{key: _text(text, f"{where}.{key}") for key, text in fields.items()})
        )
    del request.role_templates[:]
    request.role_templates.extend(templates)


def _set_policy(request: ChatRequest, name: str, value: Any) -> None:
    policies = {
        "reject": UNSUPPORTED_PARAMETER_POLICY_REJECT,
        "drop": UNSUPPORTED_PARAMETER_POLICY_DROP,
    }
    request.unsupported_parameter_policy = _one_of(policies, value, name)


def _set_labels(request: ChatRequest, name: str, value: Any) -> None:
    request.labels.clear()
    for key, text in _mapping(value, name).items():
        request.labels[_text(key, f"{name} key")] = _text(text, f"{name}[{key!r}]")


def _set_extra_body(request: ChatRequest, name: str, value: Any) -> None:
    request.extra_body_json = _json(value, name)


_SETTERS: Mapping[str, Callable[[ChatRequest, str, Any], None]] = {
    "temperature": _set_float,
    "top_p": _set_float,
    "top_k": _set_int,
    "min_p": _set_float,
    "max_completion_tokens": _set_int,
    "stop": _set_stop,
    "frequency_penalty": _set_float,
    "presence_penalty": _set_float,
    "repetition_penalty": _set_float,
    "seed": _set_int,
    "choice_count": _set_int,
    "logprobs": _set_flag,
    "top_logprobs": _set_int,
    "logit_bias": _set_logit_bias,
    "reasoning_effort": _set_word,
    "enable_thinking": _set_flag,
    "verbosity": _set_word,
    "parallel_tool_calls": _set_flag,
    "tools": _set_tools,
    "tool_choice": _set_tool_choice,
    "response_format": _set_response_format,
    "json_schema": _set_json_schema,
    "role_templates": _set_role_templates,
    "end_user_id": _set_text,
    "prompt_cache_key": _set_text,
    "service_tier": _set_text,
    "unsupported_parameters": _set_policy,
    "labels": _set_labels,
    "extra_body": _set_extra_body,
}


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _SETTERS, n=1)
    hint = _ELSEWHERE.get(name) or (near[0] if near else "")
    return f"unknown option {name!r}" + (f"; did you mean {hint!r}?" if hint else "")


# --- messages -----------------------------------------------------------------------


def _messages(prompt: Any, where: str) -> list[ChatMessage]:
    if isinstance(prompt, str):
        return [ChatMessage(role="user", content=_text(prompt, where))]
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if not prompt:
            raise ValueError(f"{where}: expected at least one message")
        return [_message(each, f"{where}[{i}]") for i, each in enumerate(prompt)]
    raise TypeError(f"{where}: expected a str, a list of messages or a ChatRequest, {_got(prompt)}")


def _message(value: Any, where: str) -> ChatMessage:
    if isinstance(value, ChatMessage):
        return value
    if isinstance(value, (Answer, Choice)):
        return value.message
    if not isinstance(value, Mapping):
        raise TypeError(
            f'{where}: expected a dict such as {{"role": "user", "content": "..."}}, '
            f"a ChatMessage or an earlier answer, {_got(value)}"
        )
    fields = {key: each for key, each in value.items() if each is not None}
    message = ChatMessage(role=_text(fields.pop("role", ""), f"{where}.role"))
    if not message.role:
        raise ValueError(f'{where}.role: expected a role such as "user"')
    content = fields.pop("content", None)
    if isinstance(content, str):
        message.content = _text(content, f"{where}.content")
    elif content is not None:
        parts = _sequence(content, f"{where}.content", "parts")
        message.parts.extend(_part(part, f"{where}.content[{i}]") for i, part in enumerate(parts))
    elif message.role != "assistant" or not fields:
        raise ValueError(f"{where}.content: missing")
    for i, call in enumerate(_sequence(fields.pop("tool_calls", ()), f"{where}.tool_calls", "")):
        message.tool_calls.append(_tool_call(call, f"{where}.tool_calls[{i}]"))
    for i, note in enumerate(_sequence(fields.pop("annotations", ()), f"{where}.annotations", "")):
        message.annotations.append(_annotation(note, f"{where}.annotations[{i}]"))
    for name in ("name", "tool_call_id", "reasoning", "refusal"):
        if name in fields:
            setattr(message, name, _text(fields.pop(name), f"{where}.{name}"))
    if "reasoning_content" in fields:  # the older name
        text = _text(fields.pop("reasoning_content"), f"{where}.reasoning_content")
        message.reasoning = message.reasoning or text
    if fields:
        message.extra_json = _json(fields, where)
    return message


def _part(value: Any, where: str) -> ContentPart:
    if isinstance(value, ContentPart):
        return value
    if isinstance(value, str):
        return ContentPart(text=_text(value, where))
    fields = dict(_mapping(value, where))
    kind = fields.pop("type", "text" if "text" in fields else None)
    if kind is None:
        raise ValueError(f'{where}.type: missing, expected for example "text" or "image_url"')
    part = ContentPart()
    body = fields.pop(kind, None) if kind != "file" or "file" in fields else None
    if kind == "text":
        part.text = _text(body, f"{where}.text")
    elif kind in _MEDIA and body is None:
        getattr(part, kind).CopyFrom(_media(fields, where))
        fields = {}
    elif kind in ("image_url", "video_url"):
        source = {"url": body} if isinstance(body, str) else dict(_mapping(body, f"{where}.{kind}"))
        getattr(part, kind.removesuffix("_url")).CopyFrom(_media(source, f"{where}.{kind}"))
    elif kind == "input_audio":
        audio = _mapping(body, f"{where}.{kind}")
        _only(audio, ("data", "format"), f"{where}.{kind}")
        part.audio.data = _base64(audio.get("data"), f"{where}.{kind}.data")
        part.audio.media_type = "audio/" + _text(audio.get("format"), f"{where}.{kind}.format")
    elif kind == "file" and isinstance(body, Mapping):
        source = dict(body)
        if "file_data" in source:
            source["url"] = source.pop("file_data")  # a data: URL
        part.file.CopyFrom(_media(source, f"{where}.file"))
    else:
        return ContentPart(raw_json=_json(value, where))
    if fields:
        part.extra_json = _json(fields, where)
    return part


_MEDIA = ("image", "audio", "video", "file")


def _media(fields: Mapping[str, Any], where: str) -> Media:
    _only(fields, Media.DESCRIPTOR.fields_by_name, where)
    if sum(source in fields for source in ("data", "url", "file_id")) != 1:
        raise ValueError(f'{where}: expected one of "data", "url" and "file_id"')
    media = Media()
    for name, value in fields.items():
        if name != "data":
            setattr(media, name, _text(value, f"{where}.{name}"))
        elif isinstance(value, (bytes, bytearray, memoryview)):
            media.data = bytes(value)
        else:
            raise TypeError(f"{where}.data: expected bytes, {_got(value)}")
    if media.WhichOneof("source") == "data" and not media.media_type:
        raise ValueError(f'{where}.media_type: missing, expected for example "image/png"')
    return media


def _tool_call(value: Any, where: str) -> ToolCallProto:
    if isinstance(value, ToolCallProto):
        return value
    if isinstance(value, ToolCall):
        return value.proto
    fields = _mapping(value, where)
    call = ToolCallProto(id=_text(fields.get("id", ""), f"{where}.id"))
    if isinstance(custom := fields.get("custom"), Mapping):
        call.custom.name = _text(custom.get("name"), f"{where}.custom.name")
        call.custom.input = _text(custom.get("input"), f"{where}.custom.input")
        return call
    function = _mapping(fields.get("function"), f"{where}.function")
    call.function.name = _text(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments", "")
    call.function.arguments_json = (
        _json(arguments, f"{where}.function.arguments")
        if isinstance(arguments, Mapping)
        else _text(arguments, f"{where}.function.arguments")
    )
    return call


def _annotation(value: Any, where: str) -> Annotation:
    if isinstance(value, Annotation):
        return value
    fields = _mapping(value, where)
    cited = _mapping(fields.get("url_citation", fields), where)
    note = Annotation(
        url=_text(cited.get("url", ""), f"{where}.url"),
        title=_text(cited.get("title", ""), f"{where}.title"),
    )
    for name, other in (("start_offset", "start_index"), ("end_offset", "end_index")):
        number = _integer(cited.get(name, cited.get(other, 0)), f"{where}.{name}")
        _assign(note, name, number, f"{where}.{name}")
    return note


# --- tools and formats --------------------------------------------------------------


def _tool(value: Any, where: str) -> Tool:
    if isinstance(value, Tool):
        return value
    if isinstance(value, FunctionTool):
        return Tool(function=value)
    fields = _mapping(value, where)
    kind = fields.get("type", "function")
    if kind == "custom":
        custom = _mapping(fields.get("custom"), f"{where}.custom")
        _only(custom, ("name", "description", "format"), f"{where}.custom")
        tool = Tool()
        tool.custom.name = _text(custom.get("name"), f"{where}.custom.name")
        tool.custom.description = _text(custom.get("description", ""), f"{where}.description")
        if custom.get("format") is not None:
            tool.custom.format_json = _json(custom["format"], f"{where}.custom.format")
        return tool
    if kind != "function":
        return Tool(raw_json=_json(fields, where))
    function = fields
    if "function" in fields:
        function = _mapping(fields["function"], f"{where}.function")
        where = f"{where}.function"
    _only(function, ("type", "name", "description", "parameters", "strict"), where)
    declared = FunctionTool(
        name=_text(function.get("name"), f"{where}.name"),
        description=_text(function.get("description") or "", f"{where}.description"),
    )
    if function.get("parameters") is not None:
        schema = function["parameters"]
        if _is_type(schema):
            schema = schema_of(schema)
        declared.parameters_schema_json = _json(schema, f"{where}.parameters")
    if function.get("strict") is not None:
        declared.strict = bool(function["strict"])
    return Tool(function=declared)


def _tool_choice(value: Any, where: str) -> ToolChoice:
    modes = {
        "auto": ToolChoice.MODE_AUTO,
        "none": ToolChoice.MODE_NONE,
        "required": ToolChoice.MODE_REQUIRED,
    }
    if isinstance(value, ToolChoice):
        return value
    if isinstance(value, str):
        return ToolChoice(mode=_one_of(modes, value, where))
    fields = _mapping(value, where)
    if isinstance(allowed := fields.get("allowed_tools"), Mapping):
        tools = _sequence(allowed.get("tools"), f"{where}.allowed_tools.tools", "tools")
        return ToolChoice(
            mode=_one_of(modes, allowed.get("mode", "auto"), f"{where}.allowed_tools.mode"),
            tool_names=[_named(tool, f"{where}.allowed_tools.tools") for tool in tools],
        )
    return ToolChoice(mode=ToolChoice.MODE_REQUIRED, tool_names=[_named(fields, where)])


def _named(value: Any, where: str) -> str:
    fields = _mapping(value, where)
    for kind in ("function", "custom"):
        if isinstance(fields.get(kind), Mapping):
            fields = fields[kind]
    return _text(fields.get("name"), f"{where}.name")


def _response_format(value: Any, where: str) -> ResponseFormat:
    if isinstance(value, ResponseFormat):
        return value
    fields = {"type": value} if isinstance(value, str) else _mapping(value, where)
    kind = fields.get("type")
    wanted = ResponseFormat()
    if kind == "text":
        wanted.text.SetInParent()
    elif kind == "json_object":
        wanted.json_object.SetInParent()
    elif kind == "json_schema":
        wanted.json_schema.CopyFrom(_schema(fields.get("json_schema"), f"{where}.json_schema"))
    elif isinstance(value, str):
        raise ValueError(f'{where}: expected "text", "json_object" or a dict, got {value!r}')
    else:
        wanted.raw_json = _json(fields, where)
    return wanted


def _schema(value: Any, where: str) -> JsonSchemaFormat:
    fields = _mapping(value, where)
    _only(fields, ("name", "schema", "description", "strict"), where)
    schema = JsonSchemaFormat(
        name=_text(fields.get("name"), f"{where}.name"),
        schema_json=_json(fields.get("schema"), f"{where}.schema"),
        description=_text(fields.get("description") or "", f"{where}.description"),
    )
    if fields.get("strict") is not None:
        schema.strict = bool(fields["strict"])
    return schema


# --- values -------------------------------------------------------------------------


def _is_type(value: Any) -> bool:
    return isinstance(value, type) or get_origin(value) is not None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where}: expected a str, {_got(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the character at {error.start} is half of a surrogate pair, "
            "which is no Unicode text"
        ) from None
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: expected a number, {_got(value)}")
    return float(value)


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{where}: expected an int, {_got(value)}")


def _assign(message: Any, name: str, value: int, where: str) -> None:
    try:
        setattr(message, name, value)
    except ValueError:
        raise ValueError(f"{where}: {value} does not fit") from None


def _json(value: Any, where: str) -> str:
    if isinstance(value, str):
        return _text(value, where)
    fields = dict(_mapping(value, where, "a dict or JSON text"))
    try:
        return _text(json.dumps(fields, ensure_ascii=False, allow_nan=False), where)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _base64(value: Any, where: str) -> bytes:
    try:
        return base64.b64decode(_text(value, where), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: expected base64, {error}") from None


def _sequence(value: Any, where: str, of: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{where}: expected a list{of and f' of {of}'}, {_got(value)}")
    return value


def _mapping(value: Any, where: str, expected: str = "a dict") -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: expected {expected}, {_got(value)}")
    return value


def _only(fields: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    if unknown := [key for key in fields if key not in set(known)]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}, expected {', '.join(known)}")


def _one_of(choices: Mapping[str, Any], value: Any, where: str) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where}: expected {' or '.join(map(repr, choices))}, {_got(value)}")
    return choices[value]


def _got(value: Any) -> str:
    return f"got {_kind(value)}"


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, str) and len(value) <= 40:
        return repr(value)
    return type(value).__name__
