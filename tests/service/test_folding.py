"""Callers get the form they ask for, whatever form their model's upstream gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from aiohttp import web

from harness import (
    Provider,
    Start,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.config import Limits, Model, Retries

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
DONE = b"data: [DONE]\n\n"


def event(**payload: Any) -> bytes:
    body = {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [], **payload}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def piece(delta: Mapping[str, Any], index: int = 0, **choice: Any) -> bytes:
    return event(choices=[{"index": index, "delta": delta, **choice}])


def streaming(*pieces: bytes) -> Answer:
    """An upstream that streams only, as some Qwen models: it refuses what asks for no stream."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        if not (await asked.json()).get("stream"):
            return web.json_response(
                {"error": {"message": "This model only support stream mode."}}, status=400
            )
        response = await event_stream(asked)
        for each in pieces:
            await response.write(each)
        return response

    return answer


def plain(**fields: Any) -> Answer:
    """An upstream that cannot stream: it answers every request with one JSON object."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        if (await asked.json()).get("stream"):
            return web.json_response({"error": {"message": "no streaming here"}}, status=400)
        return web.json_response(
            {"id": "c1", "object": "chat.completion", "model": "m", "usage": USAGE, **fields}
        )

    return answer


# One answer that has everything, in both forms.
LOGPROB = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
CALLS = [
    {"id": "x1", "type": "function", "function": {"name": "f", "arguments": '{"q": "###"}'}},
    {"id": "x2", "type": "custom", "custom": {"name": "g", "input": "ls ###"}},
]
CITED = {
    "type": "url_citation",
    "url_citation": {"start_index": 0, "end_index": 1, "url": "https://e.example", "title": "t"},
}
WHOLE: Mapping[str, Any] = {
    "vendor": {"region": "north"},
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "a\U0001f600b",
                "reasoning_content": "why ### not",
                "annotations": [CITED],
                "audio": {"id": "au"},
                "tool_calls": CALLS,
            },
            "logprobs": {"content": [LOGPROB]},
            "finish_reason": "tool_calls",
            "matched": 7,
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": None, "refusal": "I will not."},
            "finish_reason": "content_filter",
        },
    ],
}
STREAM = (
    event(vendor={"region": "north"}),
    piece({"role": "assistant", "content": "", "reasoning_content": "why "}),
    piece({"refusal": "I will"}, 1),
    piece({"reasoning_content": "### not"}),
    # Both halves of one character, and a stop string, fall into two pieces each.
    b'data: {"choices": [{"index": 0, "delta": {"content": "a\\ud83d"}}]}\n\n',
    b'data: {"choices": [{"index": 0, "delta": {"content": "\\ude00b#"}, "logprobs": '
    + json.dumps({"content": [LOGPROB]}).encode()
    + b"}]}\n\n",
    piece({"content": "## and what follows it", "annotations": [CITED], "audio": {"id": "au"}}),
    piece({"tool_calls": [{"index": 0, **CALLS[0], "function": {"name": "f", "arguments": ""}}]}),
    piece({"tool_calls": [{"index": 0, "function": {"arguments": '{"q": "#'}}]}),
    piece({"tool_calls": [{"index": 0, "function": {"arguments": '##"}'}}]}),
    piece({"tool_calls": [{"index": 1, **CALLS[1]}]}),
    piece({"refusal": " not."}, 1, finish_reason="content_filter"),
    piece({}, finish_reason="tool_calls", matched=7),
    event(usage={"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}),
    event(usage=USAGE),
    DONE,
)


def everything() -> chat_service_pb2.ChatRequest:
    chat = request("hello")
    chat.params.choice_count = 2
    chat.params.stop.append("###")
    return chat


def as_events(response: chat_service_pb2.ChatResponse) -> list[str]:
    kinds = ["header"]
    kinds += ["delta"] * len(response.choices) + ["finish"] * len(response.choices)
    return [*kinds, "trailer"]


def without_times(response: chat_service_pb2.ChatResponse) -> chat_service_pb2.ChatResponse:
    for attempt in response.header.attempts:
        attempt.ClearField("duration")
    return response


async def test_a_chat_over_a_stream_is_the_answer_the_upstream_would_have_given_whole(
    start: Start,
) -> None:
    async with provider(streaming(*STREAM)) as streams, provider(plain(**WHOLE)) as wholes:
        folds = await start(upstream(streams.base_url, streaming="always"))
        asks = await start(upstream(wholes.base_url))
        folded = without_times(await folds.chat.Chat(everything()))
        whole = without_times(await asks.chat.Chat(everything()))
    assert folded == whole
    assert folded.choices[0].message.content == "a\U0001f600b"
    assert folded.choices[0].message.tool_calls[0].function.arguments_json == '{"q": "###"}'
    assert json.loads(folded.header.extra_json) == {"vendor": {"region": "north"}}
    assert folded.usage.total_tokens == 7
    assert streams.asked[0].body["stream_options"] == {"include_usage": True}
    assert "stream" not in wholes.asked[0].body


async def test_a_stream_over_a_whole_answer_is_one_delta_for_each_choice(start: Start) -> None:
    async with provider(plain(**WHOLE)) as served:
        gateway = await start(upstream(served.base_url, streaming="never"))
        received = await receive(gateway.chat.StreamChat(stream_request(everything())))
        whole = await gateway.chat.Chat(everything())
    assert received.failure is None
    assert received.kinds == as_events(whole)
    first, second = received.deltas
    assert (first.content, first.reasoning) == ("a\U0001f600b", "why ### not")
    assert [(p.index, p.id, p.name, p.arguments, p.custom) for p in first.tool_calls] == [
        (0, "x1", "f", '{"q": "###"}', False),
        (1, "x2", "g", "ls ###", True),
    ]
    assert [p.token for p in first.logprobs] == ["a"]
    assert [note.url for note in first.annotations] == ["https://e.example"]
    assert json.loads(first.extra_json) == {"audio": {"id": "au"}}
    assert (second.choice_index, second.content, second.refusal) == (1, "", "I will not.")
    assert [f.finish_reason_raw for f in received.finishes.values()] == [
        "tool_calls",
        "content_filter",
    ]
    assert json.loads(received.finishes[0].extra_json) == {"matched": 7}
    assert received.trailer.usage == whole.usage
    assert received.trailer.HasField("time_to_first_token")
    assert received.header.attempts[0].http_status == 200
    assert all("stream" not in asked.body for asked in served.asked)


async def test_a_cumulative_stream_over_a_whole_answer_has_its_snapshots(start: Start) -> None:
    async with provider(plain(**WHOLE)) as served:
        gateway = await start(upstream(served.base_url, streaming="never"))
        received = await receive(gateway.chat.StreamChat(stream_request(everything(), mode=2)))
    states = [s.State.Name(s.state) for s in received.snapshots if s.choice_index == 0]
    assert states == ["STATE_READY", "STATE_STREAMING", "STATE_ENDED"]
    assert received.snapshots[-1].message.refusal == "I will not."


async def test_two_choices_of_one_index_are_never_told_as_one_text(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        choices = [
            {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
            for text in ("one", "two")
        ]
        return web.json_response({"id": "c1", "model": "m", "choices": choices})

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, streaming="never"), retries=QUICK)
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_PROTOCOL_ERROR"
    assert received.events == []


async def test_the_models_setting_wins_over_the_upstreams(start: Start) -> None:
    async with provider(streaming(chunk("hi"), piece({}, finish_reason="stop"), DONE)) as served:
        gateway = await start(
            upstream(served.base_url, streaming="never"),
            models=(
                Model(name="only-streams", upstream="test", streaming="always"),
                Model(name="as-asked", upstream="test", streaming="as_asked"),
            ),
        )
        answer = await gateway.chat.Chat(request(model="only-streams"))
        assert answer.choices[0].message.content == "hi"
        refused = await failing(gateway.chat.Chat(request(model="as-asked")))
        assert "only support stream mode" in refused.message
        received = await receive(gateway.chat.StreamChat(stream_request(request(model="as-asked"))))
        assert received.text == "hi"


async def test_an_answer_without_any_text_folds_both_ways(start: Start) -> None:
    nothing = {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
    async with (
        provider(streaming(piece({"content": ""}, finish_reason="stop"), DONE)) as streams,
        provider(plain(choices=[nothing])) as wholes,
    ):
        gateway = await start(upstream(streams.base_url, streaming="always"))
        answer = await gateway.chat.Chat(request())
        assert answer.choices[0].message == chat_pb2.ChatMessage(role="assistant", content="")
        gateway = await start(upstream(wholes.base_url, streaming="never"))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        assert received.kinds == ["header", "finish", "trailer"]


# --- the same policy ---------------------------------------------------------------------


def first_then(first: Answer, then: Answer) -> tuple[Provider, Answer]:
    seen = Provider()

    async def answer(asked: web.Request) -> web.StreamResponse:
        seen.ended += 1
        return await (first if seen.ended == 1 else then)(asked)

    return seen, answer


GOOD = (chunk("hello"), piece({}, finish_reason="stop"), DONE)


async def test_a_folded_chat_may_try_again_after_a_stream_that_broke(start: Start) -> None:
    """Nothing of it was delivered: what commits a stream commits no whole answer."""
    _, answer = first_then(streaming(chunk("wrong ")), streaming(*GOOD))
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, streaming="always"), retries=QUICK)
        whole = await gateway.chat.Chat(request())
    assert whole.choices[0].message.content == "hello"
    assert [a.http_status for a in whole.header.attempts] == [200, 200]


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ((chunk("part of it"),), "UPSTREAM_ERROR"),
        ((), "UPSTREAM_PROTOCOL_ERROR"),
        ((chunk("a"), event(error={"message": "boom", "code": 500})), "UPSTREAM_ERROR"),
    ],
    ids=["no proof", "nothing", "an error within"],
)
async def test_a_folded_chat_is_never_ok_without_proof(
    start: Start, pieces: tuple[bytes, ...], reason: str
) -> None:
    async with provider(streaming(*pieces)) as served:
        gateway = await start(upstream(served.base_url, streaming="always"), retries=QUICK)
        failure = await failing(gateway.chat.Chat(request()))
    assert (failure.code.name, failure.reason) == ("UNAVAILABLE", reason)
    assert len(served.asked) > 1


async def test_a_stream_over_a_whole_answer_that_broke_off_tries_again(start: Start) -> None:
    async def broken(asked: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "1000"})
        await response.prepare(asked)
        await response.write(b'{"choices": [{"message": {"content": "wrong"}')
        assert asked.transport is not None
        asked.transport.abort()
        return response

    async def good(asked: web.Request) -> web.StreamResponse:
        return completion("hello")

    _, answer = first_then(broken, good)
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, streaming="never"), retries=QUICK)
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is None
    assert received.text == "hello"
    assert len(received.header.attempts) == 2


@pytest.mark.parametrize("way", ["folded", "unfolded"])
async def test_a_limited_key_is_followed_by_another(start: Start, way: str) -> None:
    async def limited(asked: web.Request) -> web.StreamResponse:
        body = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
        return web.json_response(body, status=429, headers={"retry-after": "30"})

    async def whole(asked: web.Request) -> web.StreamResponse:
        return completion("hello")

    _, answer = first_then(limited, streaming(*GOOD) if way == "folded" else whole)
    async with provider(answer) as served:
        mode = "always" if way == "folded" else "never"
        gateway = await start(upstream(served.base_url, streaming=mode))
        if way == "folded":
            response = await gateway.chat.Chat(request(), timeout=10)
            text, header = response.choices[0].message.content, response.header
        else:
            received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=10))
            text, header = received.text, received.header
    assert text == "hello"
    assert [a.http_status for a in header.attempts] == [429, 200]
    assert len({a.key_id for a in header.attempts}) == 2


async def test_a_caller_who_leaves_a_folded_chat_ends_the_stream(start: Start) -> None:
    async def endless(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        while True:
            await response.write(chunk("more "))
            await asyncio.sleep(0.01)

    async with provider(endless) as served:
        gateway = await start(upstream(served.base_url, streaming="always"))
        call = gateway.chat.Chat(request())
        await until(lambda: served.open == 1)
        call.cancel()
        await until(lambda: served.open == 0)


async def test_a_folded_stream_is_bounded_as_a_whole_answer_is(start: Start) -> None:
    limits = Limits(upstream_answer_bytes=64 * 1024)
    async with provider(streaming(*[chunk("x" * 10_000)] * 8, *GOOD)) as served:
        gateway = await start(
            upstream(served.base_url, streaming="always"), limits=limits, retries=QUICK
        )
        failure = await failing(gateway.chat.Chat(request()))
        assert failure.reason == "UPSTREAM_PROTOCOL_ERROR"
        assert "exceeds 65536 bytes" in failure.message
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        assert received.failure is None, "a stream as such has no bound"


async def test_a_fallback_is_asked_in_its_own_form(start: Start) -> None:
    async def down(asked: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "down"}}, status=500)

    async with provider(down) as broken, provider(streaming(*GOOD)) as served:
        gateway = await start(
            upstream(broken.base_url, passthrough=False),
            upstream(served.base_url, name="other", passthrough=False, streaming="always"),
            models=(
                Model(name="m", upstream="test", fallbacks=("n",)),
                Model(name="n", upstream="other"),
            ),
            retries=QUICK,
        )
        answer = await gateway.chat.Chat(request())
    assert answer.choices[0].message.content == "hello"
    assert answer.header.upstream == "other"
    assert "stream" not in broken.asked[0].body
    assert served.asked[0].body["stream"] is True


# --- what stops, and why -----------------------------------------------------------------


@pytest.mark.parametrize("streaming_setting", ["as_asked", "always", "never"])
@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
async def test_a_text_cut_at_its_stop_string_ended_there(
    start: Start, streaming_setting: str, unary: bool
) -> None:
    """Though its provider, which does not stop there, went on until its limit."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        if (await asked.json()).get("stream"):
            pieces = (chunk("one #"), chunk("## two"), piece({}, finish_reason="length"), DONE)
            return await streaming(*pieces)(asked)
        body = {"message": {"content": "one ### two"}, "finish_reason": "length"}
        return web.json_response({"choices": [body]})

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, streaming=streaming_setting))
        chat = request()
        chat.params.stop.append("###")
        if unary:
            (choice,) = (await gateway.chat.Chat(chat)).choices
            text, reason, raw = (
                choice.message.content,
                choice.finish_reason,
                choice.finish_reason_raw,
            )
        else:
            received = await receive(gateway.chat.StreamChat(stream_request(chat)))
            finish = received.finishes[0]
            text, reason, raw = received.text, finish.finish_reason, finish.finish_reason_raw
    assert (text, reason, raw) == ("one ", chat_pb2.FINISH_REASON_STOP, "length")
