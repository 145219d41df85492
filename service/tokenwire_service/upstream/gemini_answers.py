"""The answers of Gemini's generateContent and streamGenerateContent.

A candidate is a list of parts. Texts, thoughts and function calls become the contract's own
fields; where there is more than that (signatures of thoughts, images, code that was run), all
parts go along in `extra_json`, so that they can be given back unchanged: see `native`.

There is no word for the end of a stream: it has ended well when every candidate that was asked
for has named its finishReason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    real,
    rest,
    set_extra,
    string,
)

StreamChatResponse = chat_service_pb2.StreamChatResponse

_FINISH_REASONS = {
    "STOP": chat_pb2.FINISH_REASON_STOP,
    "MAX_TOKENS": chat_pb2.FINISH_REASON_LENGTH,
    "SAFETY": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "RECITATION": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "BLOCKLIST": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "PROHIBITED_CONTENT": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "SPII": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "IMAGE_SAFETY": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "IMAGE_PROHIBITED_CONTENT": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "IMAGE_RECITATION": chat_pb2.FINISH_REASON_CONTENT_FILTER,
    "FUNCTION_CALL": chat_pb2.FINISH_REASON_TOOL_CALLS,  # not Google's, but of some who copy it
}
_NOT_ENDED = ("", "FINISH_REASON_UNSPECIFIED")
# The model broke its own format: nothing that it wrote before is an answer.
_BROKEN = frozenset({"MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE"})
_HEADER_FIELDS = frozenset(
    {"candidates", "usageMetadata", "modelVersion", "responseId", "createTime", "error"}
)
_CHUNK_FIELDS = _HEADER_FIELDS | {"promptFeedback"}
_CANDIDATE_FIELDS = frozenset({"content", "finishReason", "index", "logprobsResult"})
_CALL_FIELDS = frozenset({"id", "name", "args"})
_USAGE_FIELDS = frozenset({"promptTokenCount", "candidatesTokenCount", "totalTokenCount"})
_MADE_UP = "tokenwire-call-"
_NATIVE_CHARACTERS = 8 * 2**20  # of an answer that goes along as it is; no request takes more


def is_made_up(call_id: str) -> bool:
    """Whether an id was given here, to a call that came without: Google never saw it."""
    return call_id.startswith(_MADE_UP)


def decode(body: bytes) -> chat_service_pb2.ChatResponse:
    """A whole answer, tolerant in form and strict in substance."""
    payload, lossy = load(body)
    answer = _checked(payload)
    response = chat_service_pb2.ChatResponse()
    _fill_header(response.header, answer)
    set_extra(response.header, rest(answer, _HEADER_FIELDS))
    candidates = [
        _Candidate(_index(raw, position)).take(raw, response.header.id, _whole)
        for position, raw in enumerate(_candidates(answer))
    ]
    if not candidates:
        raise protocol("the answer has no candidates")
    if not all(candidate.reason for candidate, _ in candidates):
        raise protocol("a candidate has no finishReason: it is not complete")
    _raise_broken([candidate for candidate, _ in candidates])
    for candidate, delta in candidates:
        choice = response.choices.add(index=candidate.index)
        message = choice.message
        message.role = "assistant"
        if delta.content or not delta.tool_calls:
            message.content = delta.content
        if delta.reasoning:
            message.reasoning = delta.reasoning
        for part in delta.tool_calls:
            call = message.tool_calls.add(id=part.id)
            call.function.name = part.name
            call.function.arguments_json = part.arguments
        message.extra_json = candidate.native(lossy)
        choice.logprobs.extend(delta.logprobs)
        choice.finish_reason = candidate.finish_reason
        choice.finish_reason_raw = candidate.reason
        set_extra(choice, candidate.extra)
    if (usage := _usage(answer)) is not None:
        response.usage.CopyFrom(usage)
    return response


def decode_models(body: bytes) -> list[model_service_pb2.Model]:
    """GET /models: those that generateContent takes."""
    answer, _ = load(body)
    entries = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise protocol("the model list has no `models`")
    models = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            continue
        methods = entry.get("supportedGenerationMethods")
        if isinstance(methods, list) and "generateContent" not in methods:
            continue
        name = clean(entry["name"]).removeprefix("models/")
        models.append(
            model_service_pb2.Model(
                name=name,
                upstream_model=name,
                context_window_tokens=count(entry.get("inputTokenLimit")) or 0,
                max_completion_tokens=count(entry.get("outputTokenLimit")) or 0,
                extra_json=dumps(entry),
            )
        )
    return models


_Join = Callable[[tuple[int, str, int], str], str]


def _whole(_slot: tuple[int, str, int], text: str) -> str:
    """A text that is whole."""
    return clean(text)


def _as_it_is(_slot: tuple[int, str, int], text: str) -> str:
    return text


class GeminiStream(StreamDecoder):
    """Decodes one stream of GenerateContentResponses. See StreamDecoder for the contract."""

    def __init__(self, choices: int = 1) -> None:
        self.done = False  # only the end of the connection says so
        self.usage: chat_pb2.Usage | None = None
        self._asked = choices
        self._header = chat_service_pb2.ResponseHeader()
        self._header_sent = False
        self._header_extra: dict[str, Any] = {}
        self._trailer_extra: dict[str, Any] = {}
        self._candidates: dict[int, _Candidate] = {}
        self._lossy = False  # a lone surrogate was seen: texts need the slow path from now on
        self._halves = Halves()

    def feed(self, event: sse.Event) -> list[StreamChatResponse]:
        """The header and deltas of one event."""
        data = event.data.strip()
        if not data:
            return []
        payload, lossy = load(data)
        self._lossy = self._lossy or lossy
        chunk = _checked(payload, is_error=event.type == "error")
        if not self._header_sent:
            _fill_header(self._header, chunk)
        if extra := rest(chunk, _HEADER_FIELDS):
            (self._trailer_extra if self._header_sent else self._header_extra).update(extra)
        if (usage := _usage(chunk)) is not None:
            self.usage = usage
        out: list[StreamChatResponse] = []
        for position, raw in enumerate(_candidates(chunk)):
            index = _index(raw, position)
            candidate = self._candidates.setdefault(index, _Candidate(index))
            join = self._halves.join if self._lossy else _as_it_is
            _, delta = candidate.take(raw, self._header.id, join)
            if delta.ByteSize():
                delta.choice_index = index
                self._emit(out, delta)
        return out

    def finish(self, error_field: bytes | None) -> list[StreamChatResponse]:
        """One finish per candidate and the trailer, if the stream proved that it is complete."""
        if error_field is not None:
            raise classify_payload(load(error_field)[0], 0, {})
        if not self._candidates:
            raise protocol("the stream ended without any candidate")
        ended = sum(bool(candidate.reason) for candidate in self._candidates.values())
        if ended < max(self._asked, len(self._candidates)):
            raise UpstreamFault(Fault.TRUNCATED, "the stream ended without a finishReason")
        candidates = [candidate for _, candidate in sorted(self._candidates.items())]
        _raise_broken(candidates)
        out: list[StreamChatResponse] = []
        for index, name, _ in self._halves.left():
            delta = chat_service_pb2.Delta(choice_index=index)
            setattr(delta, name, "\ufffd")
            self._emit(out, delta)
        for candidate in candidates:
            if extra := candidate.native(self._lossy):
                delta = chat_service_pb2.Delta(choice_index=candidate.index, extra_json=extra)
                self._emit(out, delta)
        if not self._header_sent:
            out.append(self._take_header())
        for candidate in candidates:
            event = StreamChatResponse()
            event.finish.choice_index = candidate.index
            event.finish.finish_reason = candidate.finish_reason
            event.finish.finish_reason_raw = candidate.reason
            set_extra(event.finish, candidate.extra)
            out.append(event)
        trailer = StreamChatResponse(trailer=chat_service_pb2.StreamTrailer(usage=self.usage))
        set_extra(trailer.trailer, self._trailer_extra)
        out.append(trailer)
        return out

    def _emit(self, out: list[StreamChatResponse], delta: chat_service_pb2.Delta) -> None:
        if not self._header_sent:
            out.append(self._take_header())
        out.append(StreamChatResponse(delta=delta))

    def _take_header(self) -> StreamChatResponse:
        self._header_sent = True
        set_extra(self._header, self._header_extra)
        return StreamChatResponse(header=self._header)


@dataclass
class _Candidate:
    """What an answer has said of one candidate so far."""

    index: int
    reason: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    _spoke: bool = False
    _parts: list[dict[str, Any]] = field(default_factory=list)  # as they came; texts not joined yet
    _keeps_native: bool = False  # there was a part that the contract's fields do not hold
    _size: int = 0  # characters of texts kept for it

    @property
    def finish_reason(self) -> chat_pb2.FinishReason.ValueType:
        """The contract's word. Google says STOP of a model that calls functions, too."""
        found = _FINISH_REASONS.get(self.reason, chat_pb2.FINISH_REASON_OTHER)
        if found == chat_pb2.FINISH_REASON_STOP and self.calls:
            return chat_pb2.FINISH_REASON_TOOL_CALLS
        return found

    @property
    def is_broken(self) -> bool:
        """Whether the model broke its own format before it said anything."""
        return self.reason in _BROKEN and not self._spoke

    def take(
        self, raw: dict[str, Any], response_id: str, join: _Join
    ) -> tuple[_Candidate, chat_service_pb2.Delta]:
        """(itself, what is new). `join` makes of a piece of text what protobuf can hold."""
        content = raw.get("content")
        parts = content.get("parts") if isinstance(content, dict) else None
        if content is not None and not isinstance(content, dict):
            raise protocol("the content of a candidate is not an object")
        if parts is not None and not isinstance(parts, list):
            raise protocol("the parts of a candidate are not a list")
        texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        delta = chat_service_pb2.Delta()
        for part in parts or ():
            if not isinstance(part, dict):
                raise protocol("a part is not an object")
            self._keep(part)
            if text := string(part.get("text")):
                texts["reasoning" if part.get("thought") else "content"].append(text)
            call = part.get("functionCall")
            if isinstance(call, dict):
                self._call(call, response_id, delta)
        for name, pieces in texts.items():
            if text := join((self.index, name, 0), "".join(pieces)):
                setattr(delta, name, text)
        delta.logprobs.extend(_logprobs(nested(raw, "logprobsResult")))
        self._spoke = self._spoke or delta.ByteSize() > 0
        reason = clean(string(raw.get("finishReason")))
        if reason not in _NOT_ENDED:
            self.reason = reason
        self.extra |= rest(raw, _CANDIDATE_FIELDS)
        return self, delta

    def _call(self, call: dict[str, Any], response_id: str, delta: chat_service_pb2.Delta) -> None:
        name = clean(string(call.get("name")))
        if not name or call.get("willContinue") or call.get("partialArgs"):
            raise protocol("a function call has no name, or came in pieces")
        given = call.get("args")
        made_up = f"{_MADE_UP}{response_id or 'x'}-{self.index}-{self.calls}"
        delta.tool_calls.add(
            index=self.calls,
            id=clean(string(call.get("id"))) or made_up,
            name=name,
            arguments=clean(dumps(given if given is not None else {})),
        )
        self.calls += 1

    def _keep(self, part: dict[str, Any]) -> None:
        self._size += len(string(part.get("text")))
        if self._size > _NATIVE_CHARACTERS:
            self._parts = []
            return
        self._keeps_native = self._keeps_native or not _is_held(part)
        self._parts.append(part)

    def native(self, lossy: bool) -> str:
        """All parts as JSON text, texts joined that came in pieces; empty where the contract's
        fields hold everything."""
        if not self._keeps_native or not self._parts:
            return ""
        joined: list[dict[str, Any]] = []
        texts: list[str] = []
        for part in self._parts:
            kind = _text_kind(part)
            if kind is not None and joined and _text_kind(joined[-1]) == kind:
                texts.append(part["text"])
                continue
            if texts:
                joined[-1] = {**joined[-1], "text": joined[-1]["text"] + "".join(texts)}
                texts = []
            joined.append(part)
        if texts:
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + "".join(texts)}
        return dumps({"gemini": {"parts": native.sendable(joined) if lossy else joined}})


def _is_held(part: dict[str, Any]) -> bool:
    """Whether the contract's fields hold all of a part."""
    if part.keys() == {"text"}:
        return True
    call = part.get("functionCall")
    return (
        part.keys() == {"functionCall"} and isinstance(call, dict) and call.keys() <= _CALL_FIELDS
    )


def _text_kind(part: dict[str, Any]) -> bool | None:
    """Whether a part that is only text is a thought; None for any other part."""
    if not isinstance(part.get("text"), str) or not part.keys() <= {"text", "thought"}:
        return None
    return bool(part.get("thought"))


# --- parts of both -----------------------------------------------------------------------


def _checked(payload: Any, *, is_error: bool = False) -> dict[str, Any]:
    """A GenerateContentResponse. Raises for an error, a prompt that was blocked, anything else."""
    if isinstance(payload, list) and len(payload) == 1:
        payload = payload[0]  # Google wraps errors in an array
    if not isinstance(payload, dict):
        raise protocol("the answer is not a JSON object")
    if is_error or payload.get("error"):
        raise classify_payload(payload, 0, {})
    if not payload.keys() & _CHUNK_FIELDS:
        raise protocol("the answer is no GenerateContentResponse")
    feedback = nested(payload, "promptFeedback")
    blocked = clean(string(feedback.get("blockReason")))
    if blocked and not payload.get("candidates"):
        message = clean(string(feedback.get("blockReasonMessage")))
        raise UpstreamFault(
            Fault.CONTENT_FILTERED, message or f"the prompt was blocked: {blocked}", code=blocked
        )
    return payload


def _candidates(answer: dict[str, Any]) -> list[dict[str, Any]]:
    candidates = answer.get("candidates")
    if candidates is None:
        return []
    if not isinstance(candidates, list) or not all(isinstance(c, dict) for c in candidates):
        raise protocol("the candidates are not a list of objects")
    return candidates


def _index(raw: dict[str, Any], position: int) -> int:
    index = raw.get("index", position)  # left out where it is 0, as protobuf does
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index <= INT32_MAX:
        return index
    raise protocol("the index of a candidate is no integer")


def _raise_broken(candidates: list[_Candidate]) -> None:
    if all(candidate.is_broken for candidate in candidates):
        first = candidates[0]
        message = clean(string(first.extra.get("finishMessage")))
        raise UpstreamFault(Fault.OUTPUT_INVALID, message or first.reason, code=first.reason)


def _fill_header(header: chat_service_pb2.ResponseHeader, answer: dict[str, Any]) -> None:
    header.id = header.id or clean(string(answer.get("responseId")))
    header.model = header.model or clean(string(answer.get("modelVersion")))
    if not header.HasField("create_time") and (created := string(answer.get("createTime"))):
        try:
            header.create_time.FromJsonString(created)
        except ValueError:
            header.ClearField("create_time")


def _logprobs(raw: dict[str, Any]) -> Iterable[chat_pb2.TokenLogprob]:
    chosen, top = raw.get("chosenCandidates"), raw.get("topCandidates")
    tops = top if isinstance(top, list) else []
    for place, token in enumerate(chosen if isinstance(chosen, list) else ()):
        if not isinstance(token, dict):
            continue
        out = _logprob(token)
        beside = tops[place] if place < len(tops) else None
        alternatives = beside.get("candidates") if isinstance(beside, dict) else None
        for alternative in alternatives if isinstance(alternatives, list) else ():
            if isinstance(alternative, dict):
                out.top.append(_logprob(alternative))
        yield out


def _logprob(raw: dict[str, Any]) -> chat_pb2.TokenLogprob:
    return chat_pb2.TokenLogprob(
        token=clean(string(raw.get("token"))), logprob=real(raw.get("logProbability"))
    )


def _usage(answer: dict[str, Any]) -> chat_pb2.Usage | None:
    """Google counts thoughts apart from the answer, and what its own tools gave from the prompt."""
    raw = answer.get("usageMetadata")
    if not isinstance(raw, dict) or not raw:
        return None
    thoughts = count(raw.get("thoughtsTokenCount"))
    tools = count(raw.get("toolUsePromptTokenCount")) or 0
    usage = chat_pb2.Usage(
        prompt_tokens=min((count(raw.get("promptTokenCount")) or 0) + tools, INT32_MAX),
        completion_tokens=min(
            (count(raw.get("candidatesTokenCount")) or 0) + (thoughts or 0), INT32_MAX
        ),
        total_tokens=count(raw.get("totalTokenCount")) or 0,
        cached_prompt_tokens=count(raw.get("cachedContentTokenCount")),
        reasoning_tokens=thoughts,
    )
    set_extra(usage, rest(raw, _USAGE_FIELDS))
    return usage
