"""Answers: whole, or growing event by event into the same shape."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenwire.typed import parsed
from tokenwire.v1.chat_pb2 import (
    FINISH_REASON_UNSPECIFIED,
    Annotation,
    ChatMessage,
    FinishReason,
    TokenLogprob,
    Usage,
)
from tokenwire.v1.chat_pb2 import ToolCall as ToolCallProto
from tokenwire.v1.chat_service_pb2 import (
    ChatResponse,
    Delta,
    ResponseHeader,
    StreamChatResponse,
    StreamTrailer,
)
from tokenwire.v1.chat_service_pb2 import Choice as ChoiceProto

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model wants made."""

    proto: ToolCallProto

    @property
    def id(self) -> str:
        """What the answering message repeats; `answer` does that."""
        return self.proto.id

    @property
    def name(self) -> str:
        """Name of the tool."""
        return self.proto.custom.name if self.is_custom else self.proto.function.name

    @property
    def is_custom(self) -> bool:
        """Whether this calls a free-form tool, whose input is text rather than JSON."""
        return self.proto.WhichOneof("call") == "custom"

    @property
    def raw_arguments(self) -> str:
        """Exactly what the model wrote: usually JSON text; the input of a custom tool."""
        return self.proto.custom.input if self.is_custom else self.proto.function.arguments_json

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, parsed; no text counts as no arguments.

        Raises ValueError when the model wrote something other than a JSON object.
        """
        text = self.raw_arguments
        if not text.strip() and not self.is_custom:
            return {}
        return _object(text, self._what())

    def parse(self, into: type[T]) -> T:
        """The arguments as an `into` of yours, see `Choice.parse`."""
        text = self.raw_arguments
        return parsed(text if text.strip() or self.is_custom else "{}", into, self._what())

    def answer(self, result: Any) -> ChatMessage:
        """The message that gives the model `result`: text as is, anything else as JSON."""
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        return ChatMessage(role="tool", tool_call_id=self.id, content=text)

    def _what(self) -> str:
        return f"arguments of the call of {self.name!r} ({self.id})"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to one request."""

    proto: ChoiceProto

    @property
    def index(self) -> int:
        """Position, from 0."""
        return self.proto.index

    @property
    def message(self) -> ChatMessage:
        """The whole message; append it to the conversation to go on."""
        return self.proto.message

    @property
    def text(self) -> str:
        """The answer; "" when there is none, as when the model only calls tools."""
        return self.proto.message.content

    @property
    def reasoning(self) -> str:
        """What the model showed of its reasoning; usually ""."""
        return self.proto.message.reasoning

    @property
    def refusal(self) -> str:
        """Why the model declined; usually ""."""
        return self.proto.message.refusal

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Calls the model wants made."""
        return tuple(ToolCall(call) for call in self.proto.message.tool_calls)

    @property
    def finish_reason(self) -> str:
        """ "stop", "length", "tool_calls", "content_filter" or "other"; "" while it grows.

        The upstream's own word is `proto.finish_reason_raw`.
        """
        if self.proto.finish_reason == FINISH_REASON_UNSPECIFIED:
            return ""
        if self.proto.finish_reason not in FinishReason.values():
            return "other"  # a value newer than this package
        return FinishReason.Name(self.proto.finish_reason).removeprefix("FINISH_REASON_").lower()

    def json(self) -> Any:
        """The text, parsed as JSON: for `json_schema=` and `response_format="json_object"`.

        Raises ValueError when the text is not JSON, as after `finish_reason` "length".
        """
        return _parsed(self.text, self._what())

    def parse(self, into: type[T]) -> T:
        """The text, JSON, as an `into` of yours: a dataclass, a TypedDict, a pydantic model or
        `list[...]` of one; for `json_schema=` the same type.

        Needs pydantic: `pip install 'tokenwire[pydantic]'`. Raises ValueError when the text does
        not fit, as after `finish_reason` "length".
        """
        return parsed(self.text, into, self._what())

    def _what(self) -> str:
        return f"answer (finish_reason {self.finish_reason!r})"


class Answer(ABC):
    """Shortcuts to the first choice, for whatever has choices."""

    __slots__ = ()

    @property
    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """Answers, by index: one unless `choice_count` asked for more."""

    @property
    def first(self) -> Choice:
        """The first choice; an empty one when there is none."""
        return self.choices[0] if self.choices else Choice(ChoiceProto())

    @property
    def message(self) -> ChatMessage:
        """The first choice's message; append it to the conversation to go on."""
        return self.first.message

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.first.text

    @property
    def reasoning(self) -> str:
        """The first choice's reasoning."""
        return self.first.reasoning

    @property
    def refusal(self) -> str:
        """The first choice's refusal."""
        return self.first.refusal

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's tool calls."""
        return self.first.tool_calls

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended, see `Choice.finish_reason`."""
        return self.first.finish_reason

    def json(self) -> Any:
        """The first choice's text, parsed as JSON, see `Choice.json`."""
        return self.first.json()

    def parse(self, into: type[T]) -> T:
        """The first choice's text as an `into` of yours, see `Choice.parse`."""
        return self.first.parse(into)


class Reply(Answer):
    """A whole answer, or within an error what had arrived of one."""

    __slots__ = ("proto", "request_id")

    def __init__(self, proto: ChatResponse, request_id: str = "") -> None:
        self.proto = proto
        self.request_id = request_id

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Answers, by index."""
        return tuple(Choice(choice) for choice in self.proto.choices)

    @property
    def header(self) -> ResponseHeader:
        """Model, upstream, attempts, dropped parameters."""
        return self.proto.header

    @property
    def usage(self) -> Usage:
        """Tokens used."""
        return self.proto.usage

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:60] + "…"
        return (
            f"Reply({text!r}, finish_reason={self.finish_reason!r}, "
            f"model={self.header.model!r}, request_id={self.request_id!r})"
        )


class StreamEvent:
    """One event of a stream."""

    __slots__ = ("proto", "text")

    def __init__(self, proto: StreamChatResponse, text: str) -> None:
        self.proto = proto
        self.text = text
        """New answer text, in either mode; "" for an event without any."""

    @property
    def kind(self) -> str:
        """ "header", "delta", "snapshot", "finish" or "trailer"."""
        return self.proto.WhichOneof("event") or ""

    @property
    def choice_index(self) -> int:
        """Choice this belongs to; 0 for header and trailer."""
        event = getattr(self.proto, self.kind)
        return int(getattr(event, "choice_index", 0))

    @property
    def reasoning(self) -> str:
        """New reasoning text; empty with mode="cumulative", where the stream has it."""
        return self.proto.delta.reasoning

    def __repr__(self) -> str:
        return f"StreamEvent({self.kind!r}, text={self.text!r})"


class Accumulator(Answer):
    """Folds the events of one stream into the answer so far. No I/O.

    A client's stream holds one; use it by itself to fold events that came another way.
    """

    __slots__ = ("_cached", "_growing", "header", "trailer")

    def __init__(self) -> None:
        self.header: ResponseHeader | None = None
        """Model, upstream, attempts; None before the first event."""
        self.trailer: StreamTrailer | None = None
        """Usage and the gateway's time to first token; None unless the stream is complete."""
        self._growing: dict[int, _Growing] = {}
        self._cached: tuple[Choice, ...] | None = None

    def add(self, event: StreamChatResponse) -> StreamEvent | None:
        """Fold one event in; None for one to ignore (a heartbeat, or newer than this package)."""
        kind = event.WhichOneof("event")
        text = ""
        if kind == "delta":
            text = event.delta.content
            self._choice(event.delta.choice_index).append(event.delta)
        elif kind == "snapshot":
            text = self._choice(event.snapshot.choice_index).replace(event.snapshot.message)
        elif kind == "finish":
            choice = self._choice(event.finish.choice_index)
            choice.finish_reason = event.finish.finish_reason
            choice.finish_reason_raw = event.finish.finish_reason_raw
            choice.extra_json = event.finish.extra_json
        elif kind == "header":
            self.header = event.header
        elif kind == "trailer":
            self.trailer = event.trailer
        else:
            return None
        return StreamEvent(event, text)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Answers so far, by index."""
        if self._cached is None:
            self._cached = tuple(
                Choice(growing.proto(index)) for index, growing in sorted(self._growing.items())
            )
        return self._cached

    @property
    def is_complete(self) -> bool:
        """Whether the trailer has arrived: without it the answer is only a part."""
        return self.trailer is not None

    @property
    def usage(self) -> Usage | None:
        """Tokens used; None before the trailer."""
        return self.trailer.usage if self.trailer is not None else None

    def so_far(self, request_id: str = "") -> Reply:
        """What has arrived; see `is_complete`."""
        response = ChatResponse(choices=[choice.proto for choice in self.choices])
        if self.header is not None:
            response.header.CopyFrom(self.header)
        if self.trailer is not None and self.trailer.extra_json:
            # What a whole answer has in its header, a stream learns when that has gone.
            response.header.extra_json = _merged(
                response.header.extra_json, self.trailer.extra_json
            )
        if self.trailer is not None and self.trailer.HasField("usage"):  # else nobody reported it
            response.usage.CopyFrom(self.trailer.usage)
        return Reply(response, request_id)

    def _choice(self, index: int) -> _Growing:
        self._cached = None
        return self._growing.setdefault(index, _Growing())


class _Growing:
    """One choice while it grows. Lists of pieces, so that n deltas cost n and not n squared."""

    __slots__ = (
        "annotations",
        "calls",
        "content",
        "extra",
        "extra_json",
        "finish_reason",
        "finish_reason_raw",
        "logprobs",
        "reasoning",
        "refusal",
        "whole",
    )

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.calls: dict[int, _GrowingCall] = {}
        self.logprobs: list[TokenLogprob] = []
        self.annotations: list[Annotation] = []
        self.extra: dict[str, Any] = {}
        self.whole: ChatMessage | None = None
        self.finish_reason: FinishReason.ValueType = FINISH_REASON_UNSPECIFIED
        self.finish_reason_raw = ""
        self.extra_json = ""

    def append(self, delta: Delta) -> None:
        if delta.content:
            self.content.append(delta.content)
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
        if delta.refusal:
            self.refusal.append(delta.refusal)
        for part in delta.tool_calls:
            call = self.calls.setdefault(part.index, _GrowingCall())
            call.id = call.id or part.id
            call.name = call.name or part.name
            call.custom = call.custom or part.custom
            call.arguments.append(part.arguments)
        self.logprobs.extend(delta.logprobs)
        self.annotations.extend(delta.annotations)
        if delta.extra_json:
            self.extra = _appended(self.extra, _extra(delta.extra_json))

    def replace(self, message: ChatMessage) -> str:
        """Take a snapshot; returns the text that is new in it."""
        before = self.whole.content if self.whole is not None else ""
        self.whole = message
        return message.content.removeprefix(before)

    def proto(self, index: int) -> ChoiceProto:
        return ChoiceProto(
            index=index,
            message=self.whole if self.whole is not None else self._message(),
            finish_reason=self.finish_reason,
            finish_reason_raw=self.finish_reason_raw,
            logprobs=self.logprobs,
            extra_json=self.extra_json,
        )

    def _message(self) -> ChatMessage:
        message = ChatMessage(role="assistant", annotations=self.annotations)
        message.tool_calls.extend(call.proto() for _, call in sorted(self.calls.items()))
        if self.refusal:
            message.refusal = "".join(self.refusal)
        if self.reasoning:
            message.reasoning = "".join(self.reasoning)
        if self.content or not (self.calls or self.refusal):
            # A turn that only calls tools has null content, not an empty one.
            message.content = "".join(self.content)
        if self.extra:
            message.extra_json = json.dumps(self.extra)
        return message


class _GrowingCall:
    __slots__ = ("arguments", "custom", "id", "name")

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.custom = False
        self.arguments: list[str] = []

    def proto(self) -> ToolCallProto:
        call = ToolCallProto(id=self.id)
        if self.custom:
            call.custom.name, call.custom.input = self.name, "".join(self.arguments)
        else:
            call.function.name = self.name
            call.function.arguments_json = "".join(self.arguments)
        return call


def _appended(before: Any, new: Any) -> Any:
    """Delta semantics for JSON nobody has modelled: text and lists grow, objects merge."""
    if isinstance(before, dict) and isinstance(new, dict):
        merged = dict(before)
        for key, value in new.items():
            merged[key] = _appended(before[key], value) if key in before else value
        return merged
    if isinstance(before, str) and isinstance(new, str):
        return before + new
    if isinstance(before, list) and isinstance(new, list):
        return before + new
    return new


def _extra(text: str) -> dict[str, Any]:
    """Unmodelled fields; they are a courtesy, and must not cost the answer."""
    try:
        return _object(text, "extra_json") if text else {}
    except ValueError:
        return {}


def _merged(before: str, after: str) -> str:
    return json.dumps({**_extra(before), **_extra(after)})


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"the {what} is not JSON: {error}: {_start(text)}") from None
    except RecursionError:
        raise ValueError(f"the {what} is nested too deeply: {_start(text)}") from None


def _object(text: str, what: str) -> dict[str, Any]:
    value = _parsed(text, what)
    if not isinstance(value, dict):
        raise ValueError(f"the {what} is not a JSON object: {_start(text)}")
    return value


def _start(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")
