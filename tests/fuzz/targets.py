"""What must hold for any bytes an upstream may send.

Each target takes bytes and raises AssertionError where a promise is broken; any other exception
that leaves it is a defect as well. They are run on seeds, on what hypothesis invents, and by
atheris, which is guided by coverage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

from sse_reference import reference
from tokenwire.v1.chat_service_pb2 import ChatResponse, StreamChatResponse
from tokenwire_service.errors import UpstreamFault
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.dialect import Encoded
from tokenwire_service.upstream.openai import OpenAI

_NO_LIMIT = 1 << 30


def _cut(data: bytes, seed: int) -> Iterable[bytes]:
    """Pieces of 0 to 12 bytes, of sizes that follow from the seed."""
    start = 0
    while start < len(data):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        size = (seed >> 16) % 13
        yield data[start : start + size]
        start += size


def _events(pieces: Iterable[bytes], limit: int) -> tuple[list[sse.Event], bool, sse.Decoder]:
    """(the events before a bound was met, whether it was, the decoder)."""
    decoder = sse.Decoder(limit)
    events: list[sse.Event] = []
    for piece in pieces:
        try:
            events += decoder.feed(piece)
        except sse.EventTooLarge as error:
            return events + error.events, True, decoder
    return events, False, decoder


def event_stream(data: bytes) -> None:
    """The decoder agrees with the standard, however it is cut, and bounded is a prefix of that."""
    seed, data = (data[0], data[1:]) if data else (0, data)
    wanted, retry = reference(data)
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))], _cut(data, seed)):
        events, over, decoder = _events(pieces, _NO_LIMIT)
        assert not over
        assert events == wanted
        assert decoder.retry_ms == retry
    limit = seed % 64 + 1
    outcomes = [
        _events(pieces, limit)[:2]
        for pieces in ([data], [data[i : i + 1] for i in range(len(data))], _cut(data, seed))
    ]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    events, over = outcomes[0]
    assert events == wanted[: len(events)]
    assert over or events == wanted
    assert all(len(event.data) <= limit for event in events)


Decoded = tuple[list[StreamChatResponse], str]


def _decoded(events: Iterable[sse.Event], error_field: bytes | None, choices: int) -> Decoded:
    """(what the caller would get, the fault it ended with)."""
    decoder = OpenAI().stream_decoder(Encoded(OpenAI(), "", b"", choices=choices))
    out: list[StreamChatResponse] = []
    try:
        for event in events:
            out += decoder.feed(event)
        out += decoder.finish(error_field)
    except UpstreamFault as fault:
        return out, fault.fault.value
    return out, ""


def _proven(events: Iterable[sse.Event], choices: int) -> bool:
    """Whether a stream says that it is complete, by the crudest reading there is."""
    ended: dict[object, bool] = {}
    for event in events:
        if event.data.strip() == b"[DONE]":
            return True
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            # The gateway reads some more than Python does; then any mention will do.
            ended[event.data] = b"finish" in event.data
            continue
        chunk = chunk[0] if isinstance(chunk, list) and len(chunk) == 1 else chunk
        found = chunk.get("choices") if isinstance(chunk, dict) else None
        for choice in found if isinstance(found, list) else ():
            if isinstance(choice, dict):
                reason = choice.get("finish_reason") or choice.get("finish_details")
                index = str(choice.get("index"))
                ended[index] = ended.get(index, False) or bool(reason)
    return sum(ended.values()) >= min(choices, 1)


def openai_stream(data: bytes) -> None:
    """Any bytes become events or an UpstreamFault, the same however they are cut; and what ends
    well has proved that it is complete, in the order that the contract promises."""
    seed, data = (data[0], data[1:]) if data else (0, data)
    choices = seed % 3 + 1
    events, over, decoder = _events([data], _NO_LIMIT)
    assert not over
    out, fault = _decoded(events, decoder.error_field, choices)
    cut, _, again = _events(_cut(data, seed), _NO_LIMIT)
    assert _decoded(cut, again.error_field, choices) == (out, fault)
    kinds = [message.WhichOneof("event") for message in out]
    assert kinds.count("header") <= 1
    assert "header" not in kinds[1:]
    assert None not in kinds
    for message in out:
        assert StreamChatResponse.FromString(message.SerializeToString()) == message
    if fault:
        assert "trailer" not in kinds
        assert "finish" not in kinds or fault
        return
    assert _proven(events, choices), "OK without proof"
    assert kinds[0] == "header"
    assert kinds[-1] == "trailer"
    assert kinds.count("trailer") == 1
    first = kinds.index("finish")
    assert set(kinds[first:-1]) == {"finish"}
    indices = [m.finish.choice_index for m in out if m.WhichOneof("event") == "finish"]
    assert len(set(indices)) == len(indices)
    said = {m.delta.choice_index for m in out if m.WhichOneof("event") == "delta"}
    assert said <= set(indices)


def openai_answer(data: bytes) -> None:
    """Any body becomes an answer with a choice, or an UpstreamFault."""
    try:
        answer = OpenAI().decode(Encoded(OpenAI(), "", b""), data)
    except UpstreamFault:
        return
    assert answer.choices
    assert ChatResponse.FromString(answer.SerializeToString()) == answer


def openai_error(data: bytes) -> None:
    """Any error answer is told apart, whatever its status, headers and body say."""
    head, _, body = data.partition(b"\n")
    status = 400 + (head[0] if head else 0) % 200
    headers = {"retry-after": head[1:].decode("latin-1")} if len(head) > 1 else {}
    fault = OpenAI().classify(status, headers, body)
    assert isinstance(fault, UpstreamFault)
    assert fault.retry_after is None or fault.retry_after >= 0


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (event_stream, openai_stream, openai_answer, openai_error)
}
