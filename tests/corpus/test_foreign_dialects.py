"""Recorded streams of other languages, read by the dialects that speak them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pytest

from corpus import runner
from corpus.runner import Item
from harness import Received, Start, receive, request, stream_request, upstream
from tokenwire.v1 import chat_pb2
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.dialect import Encoded
from tokenwire_service.upstream.dialects import loaded
from tokenwire_service.upstream.openai import OpenAI

DIALECTS = loaded()


class Told(NamedTuple):
    """What a recording says, read by eye."""

    dialect: str
    text: str
    calls: list[tuple[str, str]]
    reason: str
    prompt: int
    completion: int
    kept: list[str]  # kinds of what goes along as it is


STREAMS: Mapping[str, Told] = {
    "anthropic-messages-02": Told(
        "anthropic",
        "I'll look up the book information for ISBN 0-7653-1178-X.",
        [("get_book_info", '{"isbn": "0-7653-1178-X"}')],
        "tool_use",
        594,
        84,
        [],
    ),
    "anthropic-messages-03": Told(
        "anthropic", "Hello! 👋", [], "end_turn", 181, 8, ["compaction", "text"]
    ),
    "google-01": Told(
        "gemini",
        '{"integer_a":2,"integer_b":2,"answer":4}',
        [],
        "STOP",
        13,
        17 + 327,
        ["text", "thoughtSignature"],
    ),
}


def read(dialect: str, pieces: Iterable[bytes]) -> Received:
    """What a dialect makes of a stream. Raises UpstreamFault."""
    speaker = DIALECTS[dialect]
    events, decoder = sse.Decoder(1 << 23), speaker.stream_decoder(Encoded(speaker, "", b"x"))
    received = Received()
    for piece in pieces:
        for event in events.feed(piece):
            received.events += decoder.feed(event)
    received.events += decoder.finish(events.error_field)
    return received


def kinds(extra_json: str) -> list[str]:
    """What kinds of blocks, or members of parts, an answer was kept with."""
    (kept,) = json.loads(extra_json).values()
    blocks: list[dict[str, Any]] = kept.get("content") or kept.get("parts")
    return sorted({block["type"] for block in blocks if "type" in block}) or sorted(
        {name for block in blocks for name in block}
    )


def assert_told(received: Received, told: Told) -> None:
    assert received.failure is None
    assert received.text == told.text
    names: dict[int, list[str]] = {}
    for delta in received.deltas:
        for part in delta.tool_calls:
            call = names.setdefault(part.index, ["", ""])
            call[0] += part.name
            call[1] += part.arguments
    assert [tuple(call) for call in names.values()] == told.calls
    assert received.finishes[0].finish_reason_raw == told.reason
    assert received.finishes[0].finish_reason != chat_pb2.FINISH_REASON_OTHER
    usage = received.trailer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (told.prompt, told.completion)
    extras = [delta.extra_json for delta in received.deltas if delta.extra_json]
    assert [kinds(extra) for extra in extras] == ([told.kept] if told.kept else [])


def body_of(name: str) -> bytes:
    body: str = Item("streams_foreign", name).data["body"]
    return body.encode()


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_says_the_same_however_it_comes(name: str) -> None:
    body, told = body_of(name), STREAMS[name]
    for pieces in (
        [body],
        [body[i : i + 1] for i in range(len(body))],
        [body[i : i + 7] for i in range(0, len(body), 7)],
        [body.replace(b"\r\n", b"\n").replace(b"\n", b"\r")],
    ):
        assert_told(read(told.dialect, pieces), told)


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_that_was_cut_is_never_ok(name: str) -> None:
    body, told = body_of(name).replace(b"\r\n", b"\n"), STREAMS[name]
    ends = [i + 2 for i in range(len(body)) if body[i : i + 2] == b"\n\n"]
    assert len(ends) > 1
    for end in [0, *ends[:-1], *(end - 1 for end in ends)]:
        with pytest.raises(UpstreamFault) as caught:
            read(told.dialect, [body[:end]])
        assert caught.value.fault in (Fault.TRUNCATED, Fault.PROTOCOL)


OF_OPENAIS_SHAPE = sorted(name for name, each in DIALECTS.items() if isinstance(each, OpenAI))


@pytest.mark.parametrize("dialect", OF_OPENAIS_SHAPE)
def test_a_recording_of_another_shape_is_a_protocol_fault(dialect: str) -> None:
    for item in runner.items("streams_foreign"):
        with pytest.raises(UpstreamFault) as caught:
            read(dialect, [item.data["body"].encode()])
        assert caught.value.fault is Fault.PROTOCOL, item


@pytest.mark.parametrize("dialect", sorted(set(DIALECTS) - set(OF_OPENAIS_SHAPE)))
def test_every_other_recording_is_a_protocol_fault(dialect: str) -> None:
    wrong = 0
    for kind in ("streams_foreign", "streams"):
        for item in runner.items(kind):
            if item.id in STREAMS and STREAMS[item.id].dialect == dialect:
                continue
            with pytest.raises(UpstreamFault) as caught:
                read(dialect, [item.data["body"].encode()])
            if kind == "streams_foreign":
                assert caught.value.fault is Fault.PROTOCOL, item
            wrong += 1
    assert wrong > 70


@pytest.mark.parametrize("mode", ["whole", "event1", "byte", "gzip"])
@pytest.mark.parametrize("name", STREAMS)
async def test_a_recorded_stream_reaches_the_caller(
    start: Start, replay: str, name: str, mode: str
) -> None:
    told = STREAMS[name]
    there = upstream(f"{replay}/streams_foreign/{name}/{mode}", dialect=told.dialect)
    gateway = await start(there)
    assert_told(await receive(gateway.chat.StreamChat(stream_request(request()))), told)


@pytest.mark.parametrize("mode", ["cut10", "cut50", "cut90", "rst50"])
@pytest.mark.parametrize("name", STREAMS)
async def test_a_recorded_stream_that_breaks_off_is_an_error(
    start: Start, replay: str, name: str, mode: str
) -> None:
    there = upstream(f"{replay}/streams_foreign/{name}/{mode}", dialect=STREAMS[name].dialect)
    gateway = await start(there)
    received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is not None
    assert STREAMS[name].text.startswith(received.text)
