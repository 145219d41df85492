"""Keeps stop strings out of the text, also where a provider sends them, whole or in pieces.

Some providers return the stop string they stopped at, and some go on after it. The contract says
that it is never part of the text, so what comes from it on is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenwire.v1 import chat_pb2, chat_service_pb2

StreamChatResponse = chat_service_pb2.StreamChatResponse


class StopFilter:
    """Cuts the content of each choice of one stream at its first stop string.

    The end of the text that may be the beginning of a stop string is held back until more is
    known, so a stop string that is split over deltas never shows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held: dict[int, str] = {}
        self._stopped: set[int] = set()

    def apply(self, events: Sequence[StreamChatResponse]) -> list[StreamChatResponse]:
        """The events, without what must not be seen; deltas that become empty are left out."""
        if not self._stops:
            return list(events)
        out: list[StreamChatResponse] = []
        for event in events:
            kind = event.WhichOneof("event")
            if kind == "delta" and event.delta.content:
                delta = event.delta
                delta.content = self._pass(delta.choice_index, delta.content)
                if not delta.content and _is_empty(delta):
                    continue
            elif kind == "finish":
                index = event.finish.choice_index
                if index in self._stopped:
                    event.finish.finish_reason = _why_cut(event.finish.finish_reason)
                elif rest := self._held.pop(index, ""):
                    last = chat_service_pb2.Delta(content=rest, choice_index=index)
                    out.append(StreamChatResponse(delta=last))
            out.append(event)
        return out

    def _pass(self, index: int, text: str) -> str:
        if index in self._stopped:
            return ""
        text = self._held.pop(index, "") + text
        at = cut_at(text, self._stops)
        if at is not None:
            self._stopped.add(index)
            return text[:at]
        keep = _overlap(text, self._stops)
        if keep:
            self._held[index] = text[-keep:]
            text = text[:-keep]
        return text


def cut(response: chat_service_pb2.ChatResponse, stops: Sequence[str]) -> None:
    """The same for a whole answer."""
    for choice in response.choices:
        at = cut_at(choice.message.content, stops)
        if at is not None:
            choice.message.content = choice.message.content[:at]
            choice.finish_reason = _why_cut(choice.finish_reason)


def cut_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins, None if there is none. Generation
    would have stopped at its end, whatever another one might still have become."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _why_cut(reason: chat_pb2.FinishReason.ValueType) -> chat_pb2.FinishReason.ValueType:
    """Why a text that was cut ended. A provider that went on until its limit says LENGTH, which
    would tell the caller that the answer is incomplete. Calls and filters are still true."""
    return chat_pb2.FINISH_REASON_STOP if reason == chat_pb2.FINISH_REASON_LENGTH else reason


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def _is_empty(delta: chat_service_pb2.Delta) -> bool:
    named = {descriptor.name for descriptor, _ in delta.ListFields()}
    return named <= {"choice_index"}
