"""The answers of DashScope's own API, whole and streamed.

A stream is a row of answers. Each holds what is new (`incremental_output`), or everything so far:
then what is new is the rest behind what came before, and an answer that does not begin with that
breaks the protocol. There is no word for the end: a stream has ended well when every choice that
was asked for has named a finish_reason, which is the string "null" until then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.upstream import native, sse
from tokenwire_service.upstream.classify import classify_payload
from tokenwire_service.upstream.dialect import StreamDecoder
from tokenwire_service.upstream.json_text import (
    INT32_MAX,
    Halves,
    clean,
    count,
    dumps,
    load,
    nested,
    protocol,
    rest,
    set_extra,
    string,
)
from tokenwire_service.upstream.openai_answers import token_logprobs

StreamChatResponse = chat_service_pb2.StreamChatResponse

CUMULATIVE = "cumulative"  # the note on a request whose stream repeats everything each time

_FINISH_REASONS = {
    "stop": chat_pb2.FINISH_REASON_STOP,
    "length": chat_pb2.FINISH_REASON_LENGTH,
    "tool_calls": chat_pb2.FINISH_REASON_TOOL_CALLS,
    "content_filter": chat_pb2.FINISH_REASON_CONTENT_FILTER,
}
_ANSWER_FIELDS = frozenset(
    {"output", "usage", "request_id", "code", "message", "status_code", "headers"}
)
_OUTPUT_FIELDS = frozenset({"choices", "text", "finish_reason"})
_CHOICE_FIELDS = frozenset({"index", "message", "finish_reason", "logprobs"})
_MESSAGE_FIELDS = frozenset({"role", "content", "reasoning_content", "tool_calls"})
_USAGE_FIELDS = frozenset({"input_tokens", "output_tokens", "total_tokens"})
_NAMES = ("model", "model_id", "name", "id")  # where an entry of the model list says its name
# A piece that begins with so many characters, being all before it, is no piece: the upstream
# sends everything each time, and what it was asked for went unheard.
_SUSPICIOUS, _REMEMBERED = 32, 256
_MAX_CALLS = 1024  # of one choice; places are the upstream's to name


def decode(body: bytes) -> chat_service_pb2.ChatResponse:
    """A whole answer, tolerant in form and strict in substance."""
    payload, _ = load(body)
    answer = _checked(payload)
    response = chat_service_pb2.ChatResponse()
    response.header.id = clean(string(answer.get("request_id")))
    set_extra(response.header, _header_extra(answer))
    choices = _choices(answer)
    if not choices:
        raise protocol("the answer has no choices")
    for position, raw in enumerate(choices):
        state = _Choice(_index(raw, position))
        delta = state.take(raw, cumulative=False)
        if not state.reason:
            raise protocol("a choice has no finish_reason: it is not complete")
        choice = response.choices.add(index=state.index)
        message = choice.message
        message.role = "assistant"
        message.content = clean(delta.content)
        if delta.reasoning:
            message.reasoning = clean(delta.reasoning)
        for part in delta.calls:
            call = message.tool_calls.add(id=part.id)
            call.function.name = part.name
            call.function.arguments_json = clean(part.arguments)
        set_extra(message, state.message_extra)
        choice.finish_reason = finish_reason(state.reason)
        choice.finish_reason_raw = state.reason
        choice.logprobs.extend(delta.logprobs)
        set_extra(choice, state.extra)
    if (usage := _usage(nested(answer, "usage"))) is not None:
        response.usage.CopyFrom(usage)
    return response


def decode_models(body: bytes) -> list[model_service_pb2.Model]:
    """GET /models."""
    answer, _ = load(body)
    output = nested(answer, "output") if isinstance(answer, dict) else {}
    entries = output.get("models")
    if not isinstance(entries, list):
        raise protocol("the model list has no `output.models`")
    models = []
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        if name := next((clean(string(entry[n])) for n in _NAMES if string(entry.get(n))), ""):
            models.append(
                model_service_pb2.Model(name=name, upstream_model=name, extra_json=dumps(entry))
            )
    return models


def error_of_stream(body: bytes) -> bytes:
    """The JSON of an error answer, which may come as one event of a stream."""
    if body.lstrip().startswith((b"{", b"[")):
        return body
    lines = (line.strip() for line in body.splitlines())
    return next((line[5:].strip() for line in lines if line.startswith(b"data:")), body)


@dataclass
class _Call:
    """One tool call of a choice, or what is new of it."""

    index: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class _New:
    """What one answer says of a choice that was not said before; texts may hold lone surrogates."""

    content: str = ""
    reasoning: str = ""
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[chat_pb2.TokenLogprob] = field(default_factory=list)


@dataclass
class _Choice:
    """What was said of one choice so far: of its texts all for a cumulative stream, else the
    beginning."""

    index: int
    reason: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    message_extra: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    _calls: dict[int, _Call] = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict)
    _logprobs: int = 0

    def take(self, raw: dict[str, Any], *, cumulative: bool) -> _New:
        """What is new in one answer."""
        message = raw.get("message")
        if message is None:
            message = {}
        if not isinstance(message, dict):
            raise protocol("a message is not an object")
        new = _New()
        content, other_parts = _text_of(message.get("content"))
        new.content = self._new("content", content, cumulative)
        reasoning = message.get("reasoning_content")
        new.reasoning = self._new("reasoning", string(reasoning), cumulative)
        self._take_calls(message.get("tool_calls"), cumulative, new)
        tokens = list(token_logprobs(raw.get("logprobs")))
        new.logprobs = tokens[self._logprobs :] if cumulative else tokens
        self._logprobs = max(self._logprobs, len(tokens))
        reason = clean(string(raw.get("finish_reason")))
        if reason not in ("", "null"):
            self.reason = reason
        self.message_extra |= native.sendable(rest(message, _MESSAGE_FIELDS))
        if other_parts:
            self.extra["content_parts"] = other_parts
        self.extra |= rest(raw, _CHOICE_FIELDS)
        return new

    def _take_calls(self, calls: Any, cumulative: bool, new: _New) -> None:
        if calls is None:
            return
        if not isinstance(calls, list):
            raise protocol("tool_calls is not a list")
        for position, raw in enumerate(calls):
            if not isinstance(raw, dict):
                raise protocol("a tool call is not an object")
            index = raw.get("index", position)
            if not isinstance(index, int) or not 0 <= index < _MAX_CALLS:
                raise protocol("the index of a tool call is no small integer")
            if index not in self._calls and index != len(self._calls):
                raise protocol("a tool call is left out")
            call = self._calls.setdefault(index, _Call(index))
            function = nested(raw, "function")
            name = clean(string(function.get("name")))
            if call.name and name not in ("", call.name):
                raise protocol("a tool call changes its name")
            part = _Call(index)
            if not call.id:
                part.id = call.id = clean(string(raw.get("id")))
            if not call.name:
                part.name = call.name = name
            arguments = function.get("arguments")
            if isinstance(arguments, dict | list):
                arguments = dumps(arguments)
            part.arguments = self._new(f"arguments {index}", string(arguments), cumulative)
            if part.id or part.name or part.arguments:
                new.calls.append(part)

    def _new(self, name: str, text: str, cumulative: bool) -> str:
        """The end of `text` that was not there before. No text says nothing."""
        if not text:
            return ""
        before = self._texts.get(name, "")
        if not cumulative:
            if len(before) >= _SUSPICIOUS and text.startswith(before):
                raise protocol("an answer repeats all before it, though only news were asked for")
            if len(before) < _REMEMBERED:
                self._texts[name] = (before + text)[:_REMEMBERED]
            return text
        self._texts[name] = text
        if text.startswith(before):
            return text[len(before) :]
        # Half a surrogate pair at the end before is no character of its own any more.
        units, units_before = (t.encode("utf-16-le", "surrogatepass") for t in (text, before))
        if not units.startswith(units_before):
            raise protocol("an answer does not begin with what came before it")
        return units[len(units_before) :].decode("utf-16-le", "surrogatepass")


class DashScopeStream(StreamDecoder):
    """Decodes one stream of answers. See StreamDecoder for the contract."""

    def __init__(self, choices: int = 1, *, cumulative: bool = False) -> None:
        self.done = False  # only the end of the connection says so
        self.usage: chat_pb2.Usage | None = None
        self._asked = choices
        self._cumulative = cumulative
        self._header = chat_service_pb2.ResponseHeader()
        self._header_sent = False
        self._header_extra: dict[str, Any] = {}
        self._trailer_extra: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}
        self._lossy = False  # a lone surrogate was seen: texts need the slow path from now on
        self._halves = Halves()

    def feed(self, event: sse.Event) -> list[StreamChatResponse]:
        """The header and deltas of one event."""
        data = event.data.strip()
        if not data or data == b"[DONE]":
            return []
        payload, lossy = load(data)
        self._lossy = self._lossy or lossy
        answer = _checked(payload, is_error=event.type == "error")
        if not self._header.id:
            self._header.id = clean(string(answer.get("request_id")))
        extra = self._trailer_extra if self._header_sent else self._header_extra
        extra.update(_header_extra(answer))
        out: list[StreamChatResponse] = []
        raws = _choices(answer)
        for position, raw in enumerate(raws):
            index = _index(raw, position)
            choice = self._choices.setdefault(index, _Choice(index))
            delta = self._delta(choice.take(raw, cumulative=self._cumulative), index)
            if delta.ByteSize():
                delta.choice_index = index
                self._emit(out, delta)
        self._note_usage(answer, [_index(raw, i) for i, raw in enumerate(raws)])
        return out

    def finish(self, error_field: bytes | None) -> list[StreamChatResponse]:
        """One finish per choice and the trailer, if the stream proved that it is complete."""
        if error_field is not None:
            raise classify_payload(load(error_field)[0], 0, {})
        if not self._choices:
            raise protocol("the stream ended without any choice")
        ended = sum(bool(choice.reason) for choice in self._choices.values())
        if ended < max(self._asked, len(self._choices)):
            raise UpstreamFault(Fault.TRUNCATED, "the stream ended without a finish_reason")
        out: list[StreamChatResponse] = []
        for index, name, call in self._halves.left():
            delta = chat_service_pb2.Delta(choice_index=index)
            if name == "arguments":
                delta.tool_calls.add(index=call, arguments="\ufffd")
            else:
                setattr(delta, name, "\ufffd")
            self._emit(out, delta)
        for index, choice in sorted(self._choices.items()):
            if choice.message_extra:  # the last value of each, however often they came
                extra = dumps(choice.message_extra)
                self._emit(out, chat_service_pb2.Delta(choice_index=index, extra_json=extra))
        if not self._header_sent:
            out.append(self._take_header())
        for index, choice in sorted(self._choices.items()):
            event = StreamChatResponse()
            event.finish.choice_index = index
            event.finish.finish_reason = finish_reason(choice.reason)
            event.finish.finish_reason_raw = choice.reason
            set_extra(event.finish, choice.extra)
            out.append(event)
        trailer = StreamChatResponse(trailer=chat_service_pb2.StreamTrailer(usage=self.usage))
        set_extra(trailer.trailer, self._trailer_extra)
        out.append(trailer)
        return out

    def _delta(self, new: _New, index: int) -> chat_service_pb2.Delta:
        delta = chat_service_pb2.Delta(logprobs=new.logprobs)
        delta.content = self._text((index, "content", 0), new.content)
        delta.reasoning = self._text((index, "reasoning", 0), new.reasoning)
        for call in new.calls:
            text = self._text((index, "arguments", call.index), call.arguments)
            if call.id or call.name or text:
                delta.tool_calls.add(index=call.index, id=call.id, name=call.name, arguments=text)
        return delta

    def _note_usage(self, answer: dict[str, Any], indices: Iterable[int]) -> None:
        """The last counts are right. Of several choices each answer counts its own tokens."""
        raw = nested(answer, "usage")
        if not raw:
            return
        alone = list(indices)
        if self._asked > 1 and len(alone) == 1:
            self._choices[alone[0]].usage = raw
            said = [choice.usage for choice in self._choices.values() if choice.usage]
            written = sum(count(usage.get("output_tokens")) or 0 for usage in said)
            read = count(raw.get("input_tokens")) or 0
            raw = {**raw, "output_tokens": written, "total_tokens": read + written}
        self.usage = _usage(raw)

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


# --- parts of both -----------------------------------------------------------------------


def finish_reason(raw: str) -> chat_pb2.FinishReason.ValueType:
    """The contract's word for the upstream's."""
    return _FINISH_REASONS.get(raw, chat_pb2.FINISH_REASON_OTHER)


def _checked(payload: Any, *, is_error: bool = False) -> dict[str, Any]:
    """An answer with output. Raises for an error, whatever its status was, and anything else."""
    if not isinstance(payload, dict):
        raise protocol("the answer is not a JSON object")
    if is_error or payload.get("code") or payload.get("error"):
        raise classify_payload(payload, 0, {})
    if not isinstance(payload.get("output"), dict):
        raise protocol("the answer has no output")
    return payload


def _choices(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices; a model that knows only texts (result_format `text`) has one."""
    output = answer["output"]
    choices = output.get("choices")
    if choices is None and isinstance(output.get("text"), str):
        message = {"content": output["text"]}
        return [{"message": message, "finish_reason": output.get("finish_reason")}]
    if choices is None:
        return []
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise protocol("the choices are not a list of objects")
    return choices


def _index(raw: dict[str, Any], position: int) -> int:
    index = raw.get("index", position)
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index <= INT32_MAX:
        return index
    raise protocol("the index of a choice is no integer")


def _text_of(content: Any) -> tuple[str, list[Any]]:
    """(text, other parts) of content, which is a list where there may be more than text."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise protocol("content is neither text nor a list of parts")
    texts = [string(part.get("text")) for part in content if isinstance(part, dict)]
    return "".join(texts), [p for p in content if not isinstance(p, dict) or "text" not in p]


def _header_extra(answer: dict[str, Any]) -> dict[str, Any]:
    return {**rest(answer["output"], _OUTPUT_FIELDS), **rest(answer, _ANSWER_FIELDS)}


def _usage(raw: dict[str, Any]) -> chat_pb2.Usage | None:
    if not raw:
        return None
    read = count(raw.get("input_tokens")) or 0
    written = count(raw.get("output_tokens")) or 0
    total = count(raw.get("total_tokens"))
    usage = chat_pb2.Usage(
        prompt_tokens=read,
        completion_tokens=written,
        total_tokens=min(read + written, INT32_MAX) if total is None else total,
        cached_prompt_tokens=count(nested(raw, "prompt_tokens_details").get("cached_tokens")),
        cache_write_tokens=count(
            nested(raw, "prompt_tokens_details").get("cache_creation_input_tokens")
        ),
        reasoning_tokens=count(nested(raw, "output_tokens_details").get("reasoning_tokens")),
    )
    set_extra(usage, rest(raw, _USAGE_FIELDS))
    return usage
