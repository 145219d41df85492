"""The answers of OpenAI chat completions, whole and streamed, as everything compatible sends them.

Streams that real providers sent decide what is tolerated here: no index on tool deltas
(Mistral), ids and names repeated in every part, null or object arguments, content as a list of
parts, usage in every chunk, two finish reasons, none at all, no [DONE], lone surrogates split
over chunks, errors inside a 200. What is never tolerated is an end without proof.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.classify import classify_payload
from tokenwire_service.upstream.dialect import StreamDecoder
from tokenwire_service.upstream.json_text import (
    INT32_MAX,
    Halves,
    clean,
    count,
    dumps,
    first_count,
    load,
    nested,
    protocol,
    real,
    rest,
    set_extra,
    string,
)
from tokenwire_service.upstream.openai_plain import Whole, piece, whole

StreamChatResponse = chat_service_pb2.StreamChatResponse

_FINISH_REASONS = {
    "stop": chat_pb2.FINISH_REASON_STOP,
    "end_turn": chat_pb2.FINISH_REASON_STOP,
    "eos": chat_pb2.FINISH_REASON_STOP,
    "length": chat_pb2.FINISH_REASON_LENGTH,
    "max_tokens": chat_pb2.FINISH_REASON_LENGTH,
    "model_length": chat_pb2.FINISH_REASON_LENGTH,  # Mistral: the context window is full
    "tool_calls": chat_pb2.FINISH_REASON_TOOL_CALLS,
    "function_call": chat_pb2.FINISH_REASON_TOOL_CALLS,
    "content_filter": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "sensitive": chat_pb2.FINISH_REASON_CONTENT_FILTER,  # Zhipu
}
# Ends by which an upstream says that it broke off: what it sent is only a part.
_FAILED = {
    "error": Fault.SERVER_ERROR,  # OpenRouter, Mistral, vLLM
    "network_error": Fault.SERVER_ERROR,  # Zhipu: inference failed
    "abort": Fault.SERVER_ERROR,  # vLLM, SGLang: the server gave the request up
    "insufficient_system_resource": Fault.OVERLOADED,  # DeepSeek
}
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


def decode(body: bytes, *, flat_errors: bool = False) -> chat_service_pb2.ChatResponse:
    """A whole answer, tolerant in form and strict in substance. `flat_errors`: whether an object
    with a `code` in place of choices is an error."""
    plain = whole(body)
    return _decode(body, flat_errors) if plain is None else _of_plain(plain)


def _of_plain(plain: Whole) -> chat_service_pb2.ChatResponse:
    response = chat_service_pb2.ChatResponse()
    header = response.header
    if plain.id is not None:
        header.id = plain.id
    if plain.model is not None:
        header.model = plain.model
    if plain.system_fingerprint is not None:
        header.system_fingerprint = plain.system_fingerprint
    if plain.service_tier is not None:
        header.service_tier = plain.service_tier
    if plain.created is not None:
        header.create_time.seconds = plain.created
    [found] = plain.choices
    choice = response.choices.add(index=found.index)
    choice.message.role, choice.message.content = "assistant", found.message.content
    choice.finish_reason_raw = found.finish_reason
    choice.finish_reason = finish_reason(found.finish_reason)
    if (usage := _usage(plain.usage)) is not None:
        response.usage.CopyFrom(usage)
    return response


def _decode(body: bytes, flat_errors: bool) -> chat_service_pb2.ChatResponse:
    answer, _ = load(body)
    if not isinstance(answer, dict):
        raise protocol("the answer is not a JSON object")
    _raise_error(answer, flat=flat_errors)
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        raise protocol("the answer has no choices")
    response = chat_service_pb2.ChatResponse()
    _fill_header(response.header, answer)
    set_extra(response.header, rest(answer, _HEADER_FIELDS))
    for position, raw in enumerate(choices):
        if not isinstance(raw, dict):
            raise protocol("a choice is not an object")
        if not raw.keys() & {"message", "delta", "text", "finish_reason"}:
            raise protocol("a choice holds no message")
        choice = response.choices.add(index=_index(raw, position))
        _fill_choice(choice, raw)
    if (usage := _usage(answer.get("usage"))) is not None:
        response.usage.CopyFrom(usage)
    return response


def decode_models(body: bytes) -> list[model_service_pb2.Model]:
    """GET /models."""
    answer, _ = load(body)
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise protocol("the model list has no `data`")
    return [
        model_service_pb2.Model(
            name=clean(entry["id"]),
            upstream_model=clean(entry["id"]),
            extra_json=dumps(entry),
        )
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]


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


_RUN_CHARACTERS = 8192  # after so many, what is joined is enough: 32 KiB, if each takes four bytes


def _text(index: int, run: list[str]) -> StreamChatResponse:
    event = StreamChatResponse()
    delta = event.delta
    delta.choice_index, delta.content = index, "".join(run)
    return event


class OpenAIStream(StreamDecoder):
    """Decodes one stream of chunks. See StreamDecoder for the contract."""

    def __init__(self, choices: int = 1, *, flat_errors: bool = False) -> None:
        self.done = False
        self._flat_errors = flat_errors
        self._asked = choices
        self.usage: chat_pb2.Usage | None = None
        self._header = chat_service_pb2.ResponseHeader()
        self._header_sent = False
        self._header_extra: dict[str, Any] = {}
        self._trailer_extra: dict[str, Any] = {}
        self._choices: dict[int, _ChoiceState] = {}
        self._chunks = 0
        self._lossy = False  # a lone surrogate was seen: texts need the slow path from now on
        self._halves = Halves()

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
        chunk, lossy = load(data)
        self._lossy = self._lossy or lossy
        if isinstance(chunk, list) and len(chunk) == 1:
            chunk = chunk[0]  # Google wraps errors in an array
        if not isinstance(chunk, dict):
            raise protocol("a stream event is not a JSON object")
        if event.type == "error" or chunk.get("type") == "error":
            raise classify_payload(chunk, 0, {})
        _raise_error(chunk, flat=self._flat_errors)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            chunk_type = string(chunk.get("object"))
            if choices is not None or not (
                isinstance(chunk.get("usage"), dict) or chunk_type.startswith("chat.completion")
            ):
                raise protocol("a stream event is no chat.completion.chunk")
            choices = []
        self._chunks += 1
        self._note(chunk)
        out: list[StreamChatResponse] = []
        met: set[int] = set()
        for position, raw in enumerate(choices):
            if not isinstance(raw, dict):
                raise protocol("a choice is not an object")
            index = _index(raw, position)
            if index in met and self._asked > 1:
                raise protocol("two choices have the same index")
            met.add(index)
            self._choice(raw, index, out)
        return out

    def feed_all(self, events: Iterable[sse.Event], out: list[StreamChatResponse]) -> int:
        """As `feed` of each, joining pieces of plain text that follow each other."""
        pieces = joined = at = 0
        run: list[str] = []  # of the choice `at`
        for event in events:
            plain = None
            if self._header_sent and not self._lossy and not self.done and event.type != "error":
                plain = piece(event.data)
            if plain is None:
                if run:
                    out.append(_text(at, run))
                    run = []
                said = self.feed(event)
                pieces += sum(each.HasField("delta") for each in said)
                out += said
                continue
            index, text = plain
            if run and (index != at or joined >= _RUN_CHARACTERS):
                out.append(_text(at, run))
                run = []
            if not run:
                joined, at = 0, index
                if index not in self._choices:
                    self._choices[index] = _ChoiceState()
            run.append(text)
            joined += len(text)
            pieces += 1
            self._chunks += 1
        if run:
            out.append(_text(at, run))
        return pieces

    def finish(self, error_field: bytes | None) -> list[StreamChatResponse]:
        """One finish per choice and the trailer, if the stream proved that it is complete."""
        if error_field is not None:
            payload, _ = load(error_field)
            raise classify_payload(payload, 0, {})
        if not self._chunks or not self._choices:
            raise protocol("the stream ended without any chat.completion.chunk that holds a choice")
        ended = all(c.finish_reason or _details_reason(c.extra) for c in self._choices.values())
        # One that never began has not ended either; whoever serves fewer says so with [DONE].
        ended = ended and len(self._choices) >= self._asked
        if not ended and not self.done:
            raise UpstreamFault(
                Fault.TRUNCATED, "the stream ended with neither a finish_reason nor [DONE]"
            )
        out: list[StreamChatResponse] = []
        for index, name, call in self._halves.left():
            self._emit(out, _replacement(index, name, call))
        if not self._header_sent:
            out.append(self._take_header())
        for index, choice in sorted(self._choices.items()):
            event = StreamChatResponse()
            event.finish.choice_index = index
            event.finish.finish_reason = finish_reason(
                choice.finish_reason or _details_reason(choice.extra)
            )
            event.finish.finish_reason_raw = choice.finish_reason
            set_extra(event.finish, choice.extra)
            out.append(event)
        trailer = StreamChatResponse(trailer=chat_service_pb2.StreamTrailer(usage=self.usage))
        set_extra(trailer.trailer, self._trailer_extra)
        out.append(trailer)
        return out

    def _note(self, chunk: dict[str, Any]) -> None:
        """Facts of the whole response: the first id and model win, the last usage."""
        if not self._header_sent:
            _fill_header(self._header, chunk)
        if extra := rest(chunk, _HEADER_FIELDS):
            (self._trailer_extra if self._header_sent else self._header_extra).update(extra)
        if (usage := _usage(chunk.get("usage"))) is not None:
            self.usage = usage

    def _choice(self, raw: dict[str, Any], index: int, out: list[StreamChatResponse]) -> None:
        _raise_choice_error(raw)
        delta = raw.get("delta")
        if delta is None and "delta" not in raw:
            delta = raw.get("message")
            if delta is None and "text" in raw:
                raise protocol("the stream is of legacy text completions")
        if delta is not None and not isinstance(delta, dict):
            raise protocol("a delta is not an object")
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = _ChoiceState()
        message = chat_service_pb2.Delta()
        if delta:
            self._delta(delta, index, state, message)
        logprobs = raw.get("logprobs")
        if logprobs:
            message.logprobs.extend(token_logprobs(logprobs))
        if message.ByteSize():
            message.choice_index = index
            self._emit(out, message)
        reason = raw.get("finish_reason")
        if isinstance(reason, str) and reason:
            state.finish_reason = clean(reason)
        extra = rest(raw, _CHOICE_FIELDS)
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
                raise protocol("content is neither text nor a list of parts")
            if content:
                message.content = self._text((index, "content", 0), content)
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or thinking
        if reasoning:
            message.reasoning = self._text((index, "reasoning", 0), string(reasoning))
        if refusal := delta.get("refusal"):
            message.refusal = self._text((index, "refusal", 0), string(refusal))
        if calls := delta.get("tool_calls"):
            self._tool_calls(calls, index, state, message)
        if annotations := delta.get("annotations"):
            message.annotations.extend(_annotations(annotations))
        if not delta.keys() <= _MESSAGE_FIELDS and (extra := rest(delta, _MESSAGE_FIELDS)):
            message.extra_json = dumps(extra)

    def _tool_calls(
        self, calls: Any, index: int, state: _ChoiceState, message: chat_service_pb2.Delta
    ) -> None:
        """Parts of calls, keyed by index, else by id, else belonging to the last one."""
        if not isinstance(calls, list):
            raise protocol("tool_calls is not a list")
        for place, raw in enumerate(calls):
            if not isinstance(raw, dict):
                raise protocol("a tool call is not an object")
            custom = raw.get("type") == "custom" or isinstance(raw.get("custom"), dict)
            body = raw.get("custom" if custom else "function")
            body = body if isinstance(body, dict) else {}
            name = clean(string(body.get("name")))
            call_id = clean(string(raw.get("id")))
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
                arguments = dumps(arguments)
            if arguments:
                part.arguments = self._text((index, "arguments", position), string(arguments))
            if part.id or part.name or part.arguments:
                part.custom, call.begun = custom and not call.begun, True
                message.tool_calls.append(part)

    def _text(self, slot: tuple[int, str, int], text: str) -> str:
        return self._halves.join(slot, text) if self._lossy else text

    def _emit(self, out: list[StreamChatResponse], delta: chat_service_pb2.Delta) -> None:
        if not self._header_sent:
            out.append(self._take_header())
        out.append(StreamChatResponse(delta=delta))

    def _take_header(self) -> StreamChatResponse:
        self._header_sent = True
        set_extra(self._header, self._header_extra)
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
        raise protocol("a message is not an object")
    out = choice.message
    out.role = clean(string(message.get("role"))) or "assistant"
    content = message.get("content", raw.get("text"))
    thinking = ""
    if isinstance(content, list):
        content, thinking = _list_content(content)
    if isinstance(content, str):
        out.content = clean(content)
    elif content is not None:
        raise protocol("content is neither text nor a list of parts")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or thinking
    if reasoning:
        out.reasoning = clean(string(reasoning))
    if refusal := message.get("refusal"):
        out.refusal = clean(string(refusal))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise protocol("tool_calls is not a list")
    for raw_call in calls:
        if not isinstance(raw_call, dict):
            raise protocol("a tool call is not an object")
        _fill_call(out.tool_calls.add(id=clean(string(raw_call.get("id")))), raw_call)
    out.annotations.extend(_annotations(message.get("annotations") or []))
    set_extra(out, rest(message, _MESSAGE_FIELDS))
    reason = clean(string(raw.get("finish_reason")))
    choice.finish_reason_raw = reason
    choice.finish_reason = finish_reason(reason or _details_reason(raw))
    extra = rest(raw, _CHOICE_FIELDS)
    logprobs = raw.get("logprobs")
    if isinstance(logprobs, dict) and "content" in logprobs:
        choice.logprobs.extend(token_logprobs(logprobs))
    elif logprobs:
        extra["logprobs"] = logprobs
    set_extra(choice, extra)


def _fill_call(call: chat_pb2.ToolCall, raw: dict[str, Any]) -> None:
    if raw.get("type") == "custom" and isinstance(custom := raw.get("custom"), dict):
        call.custom.name = clean(string(custom.get("name")))
        call.custom.input = clean(string(custom.get("input")))
        return
    function = raw.get("function")
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, dict | list):
        arguments = dumps(arguments)
    call.function.name = clean(string(function.get("name")))
    call.function.arguments_json = clean(string(arguments))


def _fill_header(header: chat_service_pb2.ResponseHeader, answer: dict[str, Any]) -> None:
    if not header.id and isinstance(value := answer.get("id"), str):
        header.id = clean(value)
    if not header.model and isinstance(value := answer.get("model"), str):
        header.model = clean(value)
    if not header.system_fingerprint and isinstance(value := answer.get("system_fingerprint"), str):
        header.system_fingerprint = clean(value)
    if not header.service_tier and isinstance(value := answer.get("service_tier"), str):
        header.service_tier = clean(value)
    if not header.HasField("create_time"):
        created = answer.get("created")
        if isinstance(created, int | float) and 0 < created < 253_402_300_800:  # year 10000
            header.create_time.FromSeconds(int(created))


def finish_reason(raw: str) -> chat_pb2.FinishReason.ValueType:
    """The contract's word for the upstream's; OTHER for unknown ones and for none."""
    return _FINISH_REASONS.get(raw, chat_pb2.FINISH_REASON_OTHER)


def _details_reason(choice: dict[str, Any]) -> str:
    """What `finish_details`, which OpenAI's vision preview sent instead, says of the end."""
    return string(nested(choice, "finish_details").get("type"))


def _usage(raw: object) -> chat_pb2.Usage | None:
    if not isinstance(raw, dict) or not raw:
        return None
    prompt = nested(raw, "prompt_tokens_details")
    completion = nested(raw, "completion_tokens_details")
    usage = chat_pb2.Usage(
        prompt_tokens=count(raw.get("prompt_tokens")) or 0,
        completion_tokens=count(raw.get("completion_tokens")) or 0,
        total_tokens=count(raw.get("total_tokens")) or 0,
        cached_prompt_tokens=first_count(
            prompt.get("cached_tokens"),
            raw.get("prompt_cache_hit_tokens"),
            raw.get("cached_tokens"),
        ),
        cache_write_tokens=first_count(
            prompt.get("cache_write_tokens"), raw.get("cache_write_tokens")
        ),
        reasoning_tokens=first_count(
            completion.get("reasoning_tokens"), raw.get("reasoning_tokens")
        ),
    )
    set_extra(usage, rest(raw, _USAGE_FIELDS))
    return usage


def _index(raw: dict[str, Any], position: int) -> int:
    index = raw.get("index")
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index <= INT32_MAX:
        return index
    if isinstance(index, str | float):
        raise protocol("the index of a choice is no integer")  # a guess would mix two answers
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
                    _list_content(inner)[0] if isinstance(inner, list) else string(inner)
                )
            elif part.get("type") in ("text", "output_text"):
                text.append(string(part.get("text")))
    return "".join(text), "".join(thinking)


def _annotations(raw: Any) -> Iterable[chat_pb2.Annotation]:
    for item in raw if isinstance(raw, list) else ():
        citation = item.get("url_citation") if isinstance(item, dict) else None
        if isinstance(citation, dict):
            yield chat_pb2.Annotation(
                start_offset=count(citation.get("start_index")) or 0,
                end_offset=count(citation.get("end_index")) or 0,
                url=clean(string(citation.get("url"))),
                title=clean(string(citation.get("title"))),
            )


def token_logprobs(raw: Any) -> Iterable[chat_pb2.TokenLogprob]:
    """OpenAI's {"content": [...]}, as others send it, too."""
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
        token=clean(string(raw.get("token"))),
        logprob=real(value),
        raw_bytes=bytes(octets) if valid and octets else b"",
    )


def _raise_error(answer: dict[str, Any], *, flat: bool) -> None:
    """Raises if a 200 carries an error instead of an answer. `flat`: also one that is not wrapped
    in `error`."""
    error = answer.get("error")
    bare = flat and not answer.get("choices") and answer.get("code") not in (None, 0, "", "0")
    if error or bare or answer.get("object") == "error":
        raise classify_payload(answer, 0, {})


def _raise_choice_error(raw: dict[str, Any]) -> None:
    """Raises if a choice says that its model failed: its text is a part only."""
    if raw.get("error"):
        raise classify_payload({"error": raw["error"]}, 0, {})
    reason = string(raw.get("finish_reason"))
    if reason in _FAILED:
        raise UpstreamFault(_FAILED[reason], f"the answer ended with finish_reason {reason}")
