"""The two forms of one answer, events of a stream and a whole, each made from the other.

For callers who want the form that their model's upstream does not give. What a caller gets is
what the upstream's own answer in that form would say, and what the clients make of a stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.upstream.json_text import dumps, protocol

StreamChatResponse = chat_service_pb2.StreamChatResponse


class Growing:
    """The message of one choice while its deltas come. Lists of pieces, so that n deltas cost n."""

    def __init__(self) -> None:
        self.logprobs: list[chat_pb2.TokenLogprob] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._annotations: list[chat_pb2.Annotation] = []
        self._calls: dict[int, _GrowingCall] = {}
        self._extra: dict[str, Any] = {}

    def add(self, delta: chat_service_pb2.Delta) -> None:
        """Appends every field to what came before."""
        if delta.content:
            self._content.append(delta.content)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        if delta.refusal:
            self._refusal.append(delta.refusal)
        for part in delta.tool_calls:
            self._calls.setdefault(part.index, _GrowingCall()).add(part)
        self.logprobs.extend(delta.logprobs)
        self._annotations.extend(delta.annotations)
        if delta.extra_json:
            self._extra = _added(self._extra, _object(delta.extra_json))

    def message(self) -> chat_pb2.ChatMessage:
        """All so far. Content is null in a turn that only calls tools, or refuses."""
        message = chat_pb2.ChatMessage(role="assistant", annotations=self._annotations)
        message.tool_calls.extend(call.call() for _, call in sorted(self._calls.items()))
        if self._refusal:
            message.refusal = _joined(self._refusal)
        if self._reasoning:
            message.reasoning = _joined(self._reasoning)
        if self._content or not (self._calls or self._refusal):
            message.content = _joined(self._content)
        if self._extra:
            message.extra_json = dumps(self._extra)
        return message


class _GrowingCall:
    def __init__(self) -> None:
        self._id = ""
        self._name = ""
        self._custom = False
        self._arguments: list[str] = []

    def add(self, part: chat_service_pb2.ToolCallDelta) -> None:
        self._id = self._id or part.id
        self._name = self._name or part.name
        self._custom = self._custom or part.custom
        self._arguments.append(part.arguments)

    def call(self) -> chat_pb2.ToolCall:
        call = chat_pb2.ToolCall(id=self._id)
        if self._custom:
            call.custom.name, call.custom.input = self._name, _joined(self._arguments)
        else:
            call.function.name = self._name
            call.function.arguments_json = _joined(self._arguments)
        return call


class Fold:
    """The whole answer that the events of one stream make."""

    def __init__(self) -> None:
        self._response = chat_service_pb2.ChatResponse()
        self._growing: dict[int, Growing] = {}
        self._finishes: dict[int, chat_service_pb2.Finish] = {}
        self.size = 0  # of the events taken, in bytes

    def add(self, events: Iterable[StreamChatResponse]) -> None:
        """Takes events in the contract's order."""
        for event in events:
            self.size += event.ByteSize()
            kind = event.WhichOneof("event")
            if kind == "header":
                self._response.header.CopyFrom(event.header)
            elif kind == "delta":
                self._growing.setdefault(event.delta.choice_index, Growing()).add(event.delta)
            elif kind == "finish":
                self._growing.setdefault(event.finish.choice_index, Growing())
                self._finishes[event.finish.choice_index] = event.finish
            elif kind == "trailer":
                self._end(event.trailer)

    def response(self) -> chat_service_pb2.ChatResponse:
        """The answer, once the trailer was taken: before that it is only a part."""
        return self._response

    def _end(self, trailer: chat_service_pb2.StreamTrailer) -> None:
        response = self._response
        for index, growing in sorted(self._growing.items()):
            finish = self._finishes.get(index, chat_service_pb2.Finish())
            response.choices.add(
                index=index,
                message=growing.message(),
                finish_reason=finish.finish_reason,
                finish_reason_raw=finish.finish_reason_raw,
                logprobs=growing.logprobs,
                extra_json=finish.extra_json,
            )
        if trailer.HasField("usage"):
            response.usage.CopyFrom(trailer.usage)
        if trailer.extra_json:  # what a whole answer has in its header
            extra = {**_object(response.header.extra_json), **_object(trailer.extra_json)}
            response.header.extra_json = dumps(extra)


def unfolded(response: chat_service_pb2.ChatResponse) -> list[StreamChatResponse]:
    """The events of a whole answer: its header, one delta for each choice that says anything, then
    finishes and trailer. Raises a PROTOCOL fault where two choices would read as one text."""
    if len({choice.index for choice in response.choices}) < len(response.choices):
        raise protocol("two choices have the same index")
    choices = sorted(response.choices, key=lambda choice: choice.index)
    events = [StreamChatResponse(header=response.header)]
    deltas = map(_delta, choices)
    events += [StreamChatResponse(delta=delta) for delta in deltas if _says_anything(delta)]
    events += [
        StreamChatResponse(
            finish=chat_service_pb2.Finish(
                choice_index=choice.index,
                finish_reason=choice.finish_reason,
                finish_reason_raw=choice.finish_reason_raw,
                extra_json=choice.extra_json,
            )
        )
        for choice in choices
    ]
    trailer = chat_service_pb2.StreamTrailer()
    if response.HasField("usage"):
        trailer.usage.CopyFrom(response.usage)
    events.append(StreamChatResponse(trailer=trailer))
    return events


def _delta(choice: chat_service_pb2.Choice) -> chat_service_pb2.Delta:
    message = choice.message
    delta = chat_service_pb2.Delta(
        choice_index=choice.index,
        content=message.content,
        reasoning=message.reasoning,
        refusal=message.refusal,
        logprobs=choice.logprobs,
        annotations=message.annotations,
        extra_json=message.extra_json,
    )
    for index, call in enumerate(message.tool_calls):
        custom = call.WhichOneof("call") == "custom"
        delta.tool_calls.add(
            index=index,
            id=call.id,
            name=call.custom.name if custom else call.function.name,
            arguments=call.custom.input if custom else call.function.arguments_json,
            custom=custom,
        )
    return delta


def _says_anything(delta: chat_service_pb2.Delta) -> bool:
    return any(descriptor.name != "choice_index" for descriptor, _ in delta.ListFields())


def _joined(pieces: list[str]) -> str:
    """The text of all pieces, which from now on are one."""
    if len(pieces) > 1:
        pieces[:] = ["".join(pieces)]
    return pieces[0] if pieces else ""


def _object(text: str) -> dict[str, Any]:
    """Unmodelled fields. They are a courtesy: what cannot be read must not cost the answer."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _added(before: Any, new: Any) -> Any:
    """As deltas mean it: texts and lists grow, objects merge, anything else is replaced."""
    if isinstance(before, dict) and isinstance(new, dict):
        shared = {name: _added(before[name], new[name]) for name in before.keys() & new.keys()}
        return {**before, **new, **shared}
    if isinstance(before, str) and isinstance(new, str):
        return before + new
    if isinstance(before, list) and isinstance(new, list):
        return before + new
    return new
