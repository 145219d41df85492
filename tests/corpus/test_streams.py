"""Streams that providers really sent reach the caller as they were, however they are cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from corpus import runner, verdicts
from corpus.runner import Answer
from harness import Start, Stubs
from tokenwire_service.errors import UpstreamFault
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.openai_answers import OpenAIStream


def assert_every_key_serves(gateway: Stubs) -> None:
    """No key is retired or cooling for the model it served."""
    standings = {verdicts.standing(p.ring, name) for name, p in gateway.running.pools.items()}
    assert standings == {"serves"}


@pytest.mark.parametrize("mode", runner.MODES)
async def test_every_recorded_stream_reaches_the_caller(
    start: Start, replay: str, mode: str
) -> None:
    runs = runner.runs("streams", mode)
    gateway = await start(config=runner.config(replay, runs))
    answers = await runner.call_all(gateway.chat, runs)
    wrong = [line for run in runs for line in runner.differences(run, answers[run])]
    assert not wrong, "\n".join(wrong)
    assert_every_key_serves(gateway)


def decoded(pieces: Iterable[bytes]) -> tuple[Answer, str]:
    """(what the decoders make of a stream that comes in these pieces, how it fails if it does)."""
    events, decoder, answer = sse.Decoder(1 << 23), OpenAIStream(), Answer()
    try:
        for piece in pieces:
            for event in events.feed(piece):
                for told in decoder.feed(event):
                    answer.add(told)
        for told in decoder.finish(events.error_field):
            answer.add(told)
    except UpstreamFault as fault:
        return answer, str(fault)
    return answer, ""


# Ways of sending the same stream, on sockets or not.
VARIANTS: Mapping[str, Callable[[bytes], Iterable[bytes]]] = {
    # Between sockets bytes are joined again now and then; here each comes alone.
    "byte by byte": lambda body: (body[i : i + 1] for i in range(len(body))),
    "with CR": lambda body: [body.replace(b"\r\n", b"\n").replace(b"\n", b"\r")],
    "with CRLF": lambda body: [body.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")],
    "with a byte order mark": lambda body: [b"\xef\xbb\xbf" + body],
    "with comments": lambda body: [body.replace(b"\ndata:", b"\n: still here\ndata:")],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_recorded_stream_decodes_to_the_same(variant: str) -> None:
    for item in runner.items("streams"):
        body = item.data["body"].encode()
        assert decoded(VARIANTS[variant](body)) == decoded([body]), item


def events_of(body: bytes) -> list[Any]:
    """The events of a stream: JSON decoded, all others as their bytes."""
    return [
        json.loads(event.data) if event.data.startswith(b"{") else event.data
        for event in sse.Decoder(1 << 23).feed(body)
    ]


def body_of(events: Iterable[Any]) -> bytes:
    """The stream of these events."""
    texts = (json.dumps(event).encode() if isinstance(event, dict) else event for event in events)
    return b"".join(b"data: " + text + b"\n\n" for text in texts)


def repeat_ids_and_names(events: list[Any]) -> None:
    """As some providers do, in every part of a tool call."""
    first: dict[tuple[int, int], Any] = {}
    for event in events:
        for choice in event.get("choices") or () if isinstance(event, dict) else ():
            for call in (choice.get("delta") or {}).get("tool_calls") or ():
                if isinstance(index := call.get("index"), int):
                    known = first.setdefault((choice["index"], index), call)
                    call["id"] = known.get("id")
                    call.setdefault("function", {})["name"] = known["function"]["name"]


def give_each_chunk_an_id(events: list[Any]) -> None:
    """As some providers do, instead of one id for all."""
    chunks = [event for event in events if isinstance(event, dict)]
    for number, chunk in enumerate(chunks[1:]):
        if chunks[0].get("id"):
            chunk["id"] = f"another-{number}"


def go_on_after_done(events: list[Any]) -> None:
    """What follows [DONE] is no part of the answer."""
    if b"[DONE]" in events:
        events += [event for event in events if isinstance(event, dict)]


def repeat_the_end(events: list[Any]) -> None:
    """A second chunk with the same finish_reason, as OpenRouter sends."""
    ends = [e for e in events if isinstance(e, dict) and finishing(e)]
    for end in ends[-1:]:
        empty = [{**choice, "delta": {}, "message": None} for choice in end["choices"]]
        events.insert(events.index(end) + 1, {**end, "choices": empty})


def finishing(event: dict[str, Any]) -> bool:
    """Whether a choice ends in this event."""
    return any(choice.get("finish_reason") for choice in event.get("choices") or ())


@pytest.mark.parametrize(
    "change", [repeat_ids_and_names, give_each_chunk_an_id, go_on_after_done, repeat_the_end]
)
def test_what_other_providers_do_changes_nothing(change: Callable[[list[Any]], None]) -> None:
    changed = 0
    for item in runner.items("streams"):
        body = item.data["body"].encode()
        plain, other = events_of(body), events_of(body)
        change(other)
        assert decoded([body_of(other)]) == decoded([body_of(plain)]), item
        changed += other != plain
    assert changed > 3


@pytest.mark.parametrize("mode", [*runner.CUTS, *runner.RESETS])
async def test_a_stream_that_was_cut_is_never_told_as_whole(
    start: Start, replay: str, mode: str
) -> None:
    runs = runner.runs("streams", mode)
    gateway = await start(config=runner.config(replay, runs))
    answers = await runner.call_all(gateway.chat, runs)
    wrong = [line for run in runs for line in runner.differences(run, answers[run])]
    assert not wrong, "\n".join(wrong)
    assert_every_key_serves(gateway)


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
@pytest.mark.parametrize("mode", runner.MODES_OF["streams_foreign"])
async def test_another_dialect_is_a_protocol_error_and_no_fault_of_the_key(
    start: Start, replay: str, mode: str, unary: bool
) -> None:
    runs = runner.runs("streams_foreign", mode)
    gateway = await start(config=runner.config(replay, runs))
    answers = await runner.call_all(gateway.chat, runs, unary=unary)
    wrong = [line for run in runs for line in runner.differences(run, answers[run])]
    assert not wrong, "\n".join(wrong)
    assert_every_key_serves(gateway)
