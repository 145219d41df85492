"""A recorded stream, folded, is what its recording says and what a client makes of the stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from corpus import runner
from harness import Start
from tokenwire.replies import Accumulator
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.errors import UpstreamFault
from tokenwire_service.folding import Fold, unfolded
from tokenwire_service.stops import StopFilter, cut
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.openai_answers import OpenAIStream


def events_of(item: runner.Item) -> list[chat_service_pb2.StreamChatResponse]:
    """What the decoder makes of a recording; raises its fault."""
    events, decoder = sse.Decoder(1 << 23), OpenAIStream()
    out = []
    for event in events.feed(item.data["body"].encode()):
        out += decoder.feed(event)
    return out + decoder.finish(events.error_field)


def copied(events: list[chat_service_pb2.StreamChatResponse]) -> list[Any]:
    return [type(event).FromString(event.SerializeToString()) for event in events]


def plain(message: Message) -> Any:
    """A message as plain values, the JSON texts in it parsed: their spaces say nothing."""

    def parsed(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: json.loads(each) if name == "extraJson" else parsed(each)
                for name, each in value.items()
            }
        return [parsed(each) for each in value] if isinstance(value, list) else value

    return parsed(MessageToDict(message))


def folded(events: list[chat_service_pb2.StreamChatResponse]) -> chat_service_pb2.ChatResponse:
    fold = Fold()
    for event in copied(events):
        fold.add([event])
    return fold.response()


def accumulated(events: list[chat_service_pb2.StreamChatResponse]) -> chat_service_pb2.ChatResponse:
    accumulator = Accumulator()
    for event in copied(events):
        accumulator.add(event)
    return accumulator.so_far().proto


COMPLETE = [
    item
    for item in runner.items("streams")
    if item.data["expected"]["outcome"] != "upstream_error_mid_stream"
]


def test_most_recordings_are_complete() -> None:
    assert len(COMPLETE) > 60


@pytest.mark.parametrize("item", COMPLETE, ids=lambda item: item.id)
def test_a_folded_recording_is_what_a_client_makes_of_the_stream(item: runner.Item) -> None:
    events = events_of(item)
    assert plain(folded(events)) == plain(accumulated(events))


@pytest.mark.parametrize("item", COMPLETE, ids=lambda item: item.id)
def test_unfolding_and_folding_again_gives_the_same(item: runner.Item) -> None:
    whole = folded(events_of(item))
    assert plain(folded(unfolded(whole))) == plain(whole)
    assert plain(accumulated(unfolded(whole))) == plain(whole)


@pytest.mark.parametrize("item", COMPLETE, ids=lambda item: item.id)
def test_stop_strings_cut_the_same_before_and_after_folding(item: runner.Item) -> None:
    events = events_of(item)
    text = folded(events).choices[0].message.content
    stops = [text[len(text) // 3 :][:4] or "###", text[len(text) // 2 :][:9] or "<|im_end|>"]
    filtered = StopFilter(stops)
    before = folded([kept for event in copied(events) for kept in filtered.apply([event])])
    after = folded(events)
    cut(after, stops)
    if not text:
        assert before.choices[0].message.content == ""
    assert not any(stop in choice.message.content for choice in before.choices for stop in stops)
    for response in (before, after):  # null and empty are the same once nothing is left of a text
        for choice in response.choices:
            if not choice.message.content:
                choice.message.ClearField("content")
    assert plain(before) == plain(after)


async def test_chat_over_every_recorded_stream(start: Start, replay: str) -> None:
    """Through the gateway and over sockets: what Chat says is what the recording says, and an
    error in its midst is never a part of an answer told as the whole."""
    runs = runner.runs("streams", "whole")
    gateway = await start(config=runner.config(replay, runs, streaming="always"))
    answers = await runner.call_all(gateway.chat, runs, unary=True)
    wrong: list[str] = []
    for run in runs:
        got = answers[run]
        expected = run.item.data["expected"]
        if expected["outcome"] == "upstream_error_mid_stream":
            if got.failure is None or got.choices:
                wrong.append(f"{run.name}: an answer in spite of the error")
            continue
        wrong += [f"{run.name}: {what}" for what in runner.whole_of_stream(run, expected, got)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("mode", ["cut30", "cut70", "rst50"])
async def test_chat_over_a_stream_that_was_cut_is_never_told_as_whole(
    start: Start, replay: str, mode: str
) -> None:
    runs = runner.runs("streams", mode)
    gateway = await start(config=runner.config(replay, runs, streaming="always"))
    answers = await runner.call_all(gateway.chat, runs, unary=True)
    for run in runs:
        body = run.item.data["body"].encode()
        arrived = body[: len(body) * int(mode[-2:]) // 100]
        proven = runner.proven(arrived)
        if answers[run].failure is None:
            assert proven, run.name
        elif mode.startswith("cut"):
            assert not proven, run.name


async def test_stream_chat_over_every_recorded_answer(start: Start, replay: str) -> None:
    runs = runner.runs("responses", "whole")
    gateway = await start(config=runner.config(replay, runs, streaming="never"))
    whole = await runner.call_all(gateway.chat, runs, unary=True)
    streamed = await runner.call_all(gateway.chat, runs)
    for run in runs:
        here, there = streamed[run], whole[run]
        assert here.failure is None, run.name
        assert here.usage == there.usage, run.name
        assert sorted(here.choices) == sorted(there.choices), run.name
        for index, choice in here.choices.items():
            wanted = there.choices[index]
            for name in ("content", "reasoning", "refusal", "finish_reason", "finish_reason_raw"):
                assert getattr(choice, name) == getattr(wanted, name), (run.name, name)
            assert choice.tool_calls == wanted.tool_calls, run.name
            assert choice.finishes == 1, run.name


def test_a_recording_that_fails_has_no_fold() -> None:
    failing = [item for item in runner.items("streams") if item not in COMPLETE]
    assert failing
    for item in failing:
        with pytest.raises(UpstreamFault):
            events_of(item)
