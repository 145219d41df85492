"""The answers of Anthropic's Messages API, whole and streamed.

A message is a list of blocks. Texts, thoughts and calls of tools become the contract's own
fields; where there is more than that (signatures of thoughts, the provider's own searches), the
whole list goes along in `extra_json`, so that it can be given back unchanged: see `native`.

A stream has ended well with `message_stop` behind a `message_delta` that names a stop_reason.
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

StreamChatResponse = chat_service_pb2.StreamChatResponse

_FINISH_REASONS = {
    "end_turn": chat_pb2.FINISH_REASON_STOP,
    "stop_sequence": chat_pb2.FINISH_REASON_STOP,
    "max_tokens": chat_pb2.FINISH_REASON_LENGTH,
    "model_context_window_exceeded": chat_pb2.FINISH_REASON_LENGTH,
    "tool_use": chat_pb2.FINISH_REASON_TOOL_CALLS,
    "refusal": chat_pb2.FINISH_REASON_CONTENT_FILTER,
}
_ENDING = ("stop_sequence", "stop_details", "container")  # what is said of the end
_MESSAGE_FIELDS = frozenset(
    {"id", "type", "role", "content", "model", "usage", "error", "stop_reason", *_ENDING}
)
_USAGE_FIELDS = frozenset(
    {"input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"}
)
# What the contract's fields hold of a block; a block with more than that is kept as it is.
_HELD = {
    "text": frozenset({"type", "text"}),
    "tool_use": frozenset({"type", "id", "name", "input"}),
}
_NATIVE_CHARACTERS = 8 * 2**20  # of an answer that goes along as it is; no request takes more
_DIRECT = {"type": "direct"}  # the `caller` of a tool that the model itself calls


def decode(body: bytes) -> chat_service_pb2.ChatResponse:
    """A whole message, tolerant in form and strict in substance."""
    answer, lossy = load(body)
    if not isinstance(answer, dict):
        raise protocol("the answer is not a JSON object")
    if answer.get("type") == "error" or answer.get("error"):
        raise classify_payload(answer, 0, {})
    blocks = answer.get("content")
    if not isinstance(blocks, list):
        raise protocol("the answer is no message: it has no content")
    reason = clean(string(answer.get("stop_reason")))
    if not reason:
        raise protocol("the message has no stop_reason: it is not complete")
    response = chat_service_pb2.ChatResponse()
    _fill_header(response.header, answer)
    set_extra(response.header, rest(answer, _MESSAGE_FIELDS))
    choice = response.choices.add()
    choice.finish_reason = finish_reason(reason)
    choice.finish_reason_raw = reason
    choice.message.role = clean(string(answer.get("role"))) or "assistant"
    _fill_message(choice.message, blocks, lossy)
    set_extra(choice, {name: answer[name] for name in _ENDING if answer.get(name) is not None})
    if (usage := _usage(nested(answer, "usage"))) is not None:
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
            context_window_tokens=count(entry.get("max_input_tokens")) or 0,
            max_completion_tokens=count(entry.get("max_tokens")) or 0,
            extra_json=dumps(entry),
        )
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]


@dataclass
class _Block:
    """One block of a stream, as far as it has come."""

    raw: dict[str, Any]
    call: int = -1  # index of the tool call that it is
    began_at: int = 0  # characters of content before it
    has_arguments: bool = False
    arguments: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)  # members that grew, in pieces

    @property
    def kind(self) -> str:
        return string(self.raw.get("type"))

    def grow(self, delta: dict[str, Any]) -> None:
        """Takes a delta in: texts grow, anything else is added."""
        for name, value in delta.items():
            if name in ("type", "citation"):
                continue
            if name == "partial_json":
                self.arguments.append(string(value))
            elif isinstance(value, str):
                self.texts.setdefault(name, []).append(value)
            else:
                self.raw[name] = value
        if isinstance(citation := delta.get("citation"), dict):
            cited = self.raw.get("citations")
            self.raw["citations"] = [*(cited if isinstance(cited, list) else ()), citation]

    def whole(self) -> dict[str, Any]:
        """The block at its end, as an answer that is not streamed would hold it."""
        for name, pieces in self.texts.items():
            self.raw[name] = string(self.raw.get(name)) + "".join(pieces)
        if text := "".join(self.arguments):
            try:
                self.raw["input"] = load(clean(text).encode())[0]
            except UpstreamFault:
                self.raw["input"] = text  # cut by max_tokens: no JSON yet
        self.texts, self.arguments = {}, []
        return self.raw


class AnthropicStream(StreamDecoder):
    """Decodes one stream of message events. See StreamDecoder for the contract."""

    def __init__(self) -> None:
        self.done = False
        self.usage: chat_pb2.Usage | None = None
        self._begun = False
        self._header = chat_service_pb2.ResponseHeader()
        self._header_sent = False
        self._usage: dict[str, Any] = {}
        self._open: dict[int, _Block] = {}
        self._closed: list[dict[str, Any]] = []
        self._last_index = -1
        self._keeps_native = False  # there was a block that the contract's fields do not hold
        self._size = 0  # characters kept for it
        self._calls = 0
        self._characters = 0  # of content, so far
        self._ending: dict[str, Any] = {}
        self._trailer_extra: dict[str, Any] = {}
        self._lossy = False  # a lone surrogate was seen: texts need the slow path from now on
        self._halves = Halves()

    def feed(self, event: sse.Event) -> list[StreamChatResponse]:
        """The header and deltas of one event."""
        data = event.data.strip()
        if self.done or not data:
            return []
        payload, lossy = load(data)
        self._lossy = self._lossy or lossy
        if not isinstance(payload, dict):
            raise protocol("a stream event is not a JSON object")
        kind = string(payload.get("type"))
        if event.type == "error" or kind == "error" or (not kind and payload.get("error")):
            raise classify_payload(payload, 0, {})
        if kind == "ping":
            return []
        if not self._begun and kind != "message_start":
            raise protocol("the stream does not begin with message_start")
        out: list[StreamChatResponse] = []
        if kind == "message_start":
            self._start(payload)
        elif kind == "content_block_start":
            self._block_start(payload, out)
        elif kind == "content_block_delta":
            self._block_delta(payload, out)
        elif kind == "content_block_stop":
            index = _index(payload)
            if (block := self._open.pop(index, None)) is None:
                raise protocol("a block ends that has not begun")
            self._close(block, out)
        elif kind == "message_delta":
            self._ending |= {k: v for k, v in nested(payload, "delta").items() if v is not None}
            self._note_usage(payload)
            self._trailer_extra |= rest(payload, frozenset({"type", "delta", "usage"}))
        elif kind == "message_stop":
            self.done = True
        elif not kind:
            raise protocol("a stream event has no type")
        else:  # the API announces that there will be more of them
            self._trailer_extra[kind] = payload
        return out

    def finish(self, error_field: bytes | None) -> list[StreamChatResponse]:
        """The finish and the trailer, if the stream proved that it is complete."""
        if error_field is not None:
            raise classify_payload(load(error_field)[0], 0, {})
        if not self._begun:
            raise protocol("the stream ended without message_start")
        reason = clean(string(self._ending.get("stop_reason")))
        if not self.done:
            raise UpstreamFault(Fault.TRUNCATED, "the stream ended without message_stop")
        if not reason:
            raise protocol("the message stopped without a stop_reason")
        out: list[StreamChatResponse] = []
        for _, block in sorted(self._open.items()):
            self._close(block, out)
        for _, name, call in self._halves.left():
            delta = chat_service_pb2.Delta()
            if name == "arguments":
                delta.tool_calls.add(index=call, arguments="\ufffd")
            else:
                setattr(delta, name, "\ufffd")
            self._emit(out, delta)
        if self._keeps_native and self._size <= _NATIVE_CHARACTERS:
            extra = _native(self._closed, self._lossy)
            self._emit(out, chat_service_pb2.Delta(extra_json=extra))
        if not self._header_sent:
            out.append(self._take_header())
        event = StreamChatResponse()
        event.finish.finish_reason = finish_reason(reason)
        event.finish.finish_reason_raw = reason
        set_extra(event.finish, rest(self._ending, frozenset({"stop_reason"})))
        out.append(event)
        trailer = StreamChatResponse(trailer=chat_service_pb2.StreamTrailer(usage=self.usage))
        set_extra(trailer.trailer, self._trailer_extra)
        out.append(trailer)
        return out

    # --- events -------------------------------------------------------------------------

    def _start(self, payload: dict[str, Any]) -> None:
        message = payload.get("message")
        if not isinstance(message, dict) or self._begun:
            raise protocol("message_start without a message, or for the second time")
        self._begun = True
        _fill_header(self._header, message)
        set_extra(self._header, rest(message, _MESSAGE_FIELDS))
        self._ending = {name: message[name] for name in _ENDING if message.get(name) is not None}
        self._note_usage(message)

    def _note_usage(self, payload: dict[str, Any]) -> None:
        """Counts are of the whole message so far: the last of each is right."""
        self._usage |= {k: v for k, v in nested(payload, "usage").items() if v is not None}
        self.usage = _usage(self._usage)

    def _block_start(self, payload: dict[str, Any], out: list[StreamChatResponse]) -> None:
        index = _index(payload)
        raw = payload.get("content_block")
        if not isinstance(raw, dict) or index <= self._last_index:
            raise protocol("a block begins without content, or out of its order")
        self._last_index = index
        block = self._open[index] = _Block(dict(raw), began_at=self._characters)
        delta = chat_service_pb2.Delta()
        if block.kind == "text":
            self._say(delta, "content", string(raw.get("text")))
        elif block.kind == "thinking":
            self._say(delta, "reasoning", string(raw.get("thinking")))
        elif block.kind == "tool_use":
            block.call = self._calls
            self._calls += 1
            delta.tool_calls.add(
                index=block.call,
                id=clean(string(raw.get("id"))),
                name=clean(string(raw.get("name"))),
            )
        if delta.ByteSize():
            self._emit(out, delta)

    def _block_delta(self, payload: dict[str, Any], out: list[StreamChatResponse]) -> None:
        block = self._open.get(_index(payload))
        grown = payload.get("delta")
        if block is None or not isinstance(grown, dict):
            raise protocol("a delta of a block that is not open")
        self._size += sum(len(value) for value in grown.values() if isinstance(value, str))
        if self._size <= _NATIVE_CHARACTERS:
            block.grow(grown)
        delta = chat_service_pb2.Delta()
        kind = string(grown.get("type"))
        if kind == "text_delta" and block.kind == "text":
            self._say(delta, "content", string(grown.get("text")))
        elif kind == "thinking_delta" and block.kind == "thinking":
            self._say(delta, "reasoning", string(grown.get("thinking")))
        elif kind == "input_json_delta":
            text = string(grown.get("partial_json"))
            block.has_arguments = block.has_arguments or bool(text)
            if block.call >= 0 and (text := self._text("arguments", block.call, text)):
                delta.tool_calls.add(index=block.call, arguments=text)
        elif kind in ("text_delta", "thinking_delta"):
            raise protocol(f"a {kind} in a block that is {block.kind or 'nothing'}")
        if delta.ByteSize():
            self._emit(out, delta)

    def _close(self, block: _Block, out: list[StreamChatResponse]) -> None:
        """Tells what is known only when a block is whole."""
        delta = chat_service_pb2.Delta()
        if block.call >= 0 and not block.has_arguments:
            given = block.raw.get("input")  # whole at once, or there are no arguments
            text = clean(dumps(given if given is not None else {}))
            delta.tool_calls.add(index=block.call, arguments=text)
        raw = block.whole()
        delta.annotations.extend(_annotations(raw, block.began_at, self._characters))
        self._closed.append(raw)
        self._keeps_native = self._keeps_native or not _is_held(raw)
        if delta.ByteSize():
            self._emit(out, delta)

    def _say(self, delta: chat_service_pb2.Delta, name: str, text: str) -> None:
        text = self._text(name, 0, text)
        if text:
            setattr(delta, name, text)
            if name == "content":
                self._characters += len(text)

    def _text(self, name: str, call: int, text: str) -> str:
        return self._halves.join((0, name, call), text) if self._lossy else text

    def _emit(self, out: list[StreamChatResponse], delta: chat_service_pb2.Delta) -> None:
        if not self._header_sent:
            out.append(self._take_header())
        out.append(StreamChatResponse(delta=delta))

    def _take_header(self) -> StreamChatResponse:
        self._header_sent = True
        return StreamChatResponse(header=self._header)


# --- parts of both -----------------------------------------------------------------------


def finish_reason(raw: str) -> chat_pb2.FinishReason.ValueType:
    """The contract's word for the upstream's."""
    return _FINISH_REASONS.get(raw, chat_pb2.FINISH_REASON_OTHER)


def _index(payload: dict[str, Any]) -> int:
    index = payload.get("index")
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index <= INT32_MAX:
        return index
    raise protocol("a block has no index")


def _fill_header(header: chat_service_pb2.ResponseHeader, message: dict[str, Any]) -> None:
    header.id = clean(string(message.get("id")))
    header.model = clean(string(message.get("model")))
    header.service_tier = clean(string(nested(message, "usage").get("service_tier")))


def _fill_message(message: chat_pb2.ChatMessage, blocks: list[Any], lossy: bool) -> None:
    content: list[str] = []
    thoughts: list[str] = []
    characters = 0
    for block in blocks:
        if not isinstance(block, dict):
            raise protocol("a block is not an object")
        kind = block.get("type")
        if kind == "text":
            text = clean(string(block.get("text")))
            message.annotations.extend(_annotations(block, characters, characters + len(text)))
            characters += len(text)
            content.append(text)
        elif kind == "thinking":
            thoughts.append(clean(string(block.get("thinking"))))
        elif kind == "tool_use":
            call = message.tool_calls.add(id=clean(string(block.get("id"))))
            call.function.name = clean(string(block.get("name")))
            given = block.get("input")
            call.function.arguments_json = clean(dumps(given if given is not None else {}))
    if content:
        message.content = "".join(content)
    if any(thoughts):
        message.reasoning = "".join(thoughts)
    if not all(map(_is_held, blocks)):
        message.extra_json = _native(blocks, lossy)


def _is_held(block: dict[str, Any]) -> bool:
    """Whether the contract's fields hold all of a block."""
    kind = string(block.get("type"))
    known = _HELD.get(kind)
    if known is None:
        return False
    more = rest(block, known)
    return not more or (kind == "tool_use" and more == {"caller": _DIRECT})


def _native(blocks: list[dict[str, Any]], lossy: bool) -> str:
    return dumps({"anthropic": {"content": native.sendable(blocks) if lossy else blocks}})


def _annotations(block: dict[str, Any], start: int, end: int) -> Iterable[chat_pb2.Annotation]:
    """Sources with an address; they stand for all of their block."""
    cited = block.get("citations")
    for citation in cited if isinstance(cited, list) else ():
        if isinstance(citation, dict) and (url := clean(string(citation.get("url")))):
            title = clean(string(citation.get("title")))
            yield chat_pb2.Annotation(start_offset=start, end_offset=end, url=url, title=title)


def _usage(raw: dict[str, Any]) -> chat_pb2.Usage | None:
    """Anthropic counts what it reads from a cache, or writes to one, apart from the rest."""
    if not raw:
        return None
    read = count(raw.get("cache_read_input_tokens"))
    written = count(raw.get("cache_creation_input_tokens"))
    prompt = min((count(raw.get("input_tokens")) or 0) + (read or 0) + (written or 0), INT32_MAX)
    completion = count(raw.get("output_tokens")) or 0
    usage = chat_pb2.Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=min(prompt + completion, INT32_MAX),
        cached_prompt_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=count(nested(raw, "output_tokens_details").get("thinking_tokens")),
    )
    set_extra(usage, rest(raw, _USAGE_FIELDS))
    return usage
