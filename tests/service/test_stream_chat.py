"""StreamChat as its callers see it: the order of events, and what each of them holds."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from harness import (
    Received,
    Start,
    chunk,
    event_stream,
    provider,
    receive,
    request,
    simulate,
    stream_request,
    upstream,
)
from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.config import Model
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
CUMULATIVE = chat_service_pb2.STREAM_MODE_CUMULATIVE


def weather_request(**fields: object) -> chat_service_pb2.ChatRequest:
    """One that the simulator answers with a tool call."""
    chat = request("What is the weather in Paris and in Rome?", **fields)
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
    chat.tools.add().function.MergeFrom(
        chat_pb2.FunctionTool(name="get_weather", parameters_schema_json=schema)
    )
    return chat


async def test_events_come_in_the_order_of_the_contract(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    received = await receive(gateway.chat.StreamChat(stream_request(request("Count to five"))))
    assert received.failure is None
    assert received.kinds[0] == "header"
    assert received.kinds[-2:] == ["finish", "trailer"]
    assert set(received.kinds[1:-2]) == {"delta"}


async def test_a_stream_says_the_same_as_a_plain_answer(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request("Count to five", extra_body_json=simulate(reasoning="Let me count them."))
    whole = await gateway.chat.Chat(chat)
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.text == whole.choices[0].message.content != ""
    reasoning = "".join(delta.reasoning for delta in received.deltas)
    assert reasoning == whole.choices[0].message.reasoning == "Let me count them."
    assert received.finishes[0].finish_reason == whole.choices[0].finish_reason
    assert received.trailer.usage == whole.usage


async def test_several_choices_have_a_text_and_a_finish_each(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request("Tell me a story")
    chat.params.choice_count = 3
    whole = await gateway.chat.Chat(chat)
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert received.texts == {c.index: c.message.content for c in whole.choices}
    assert len(set(received.texts.values())) > 1
    assert received.kinds[-4:] == ["finish", "finish", "finish", "trailer"]
    assert set(received.finishes) == {0, 1, 2}


async def test_tool_calls_grow_from_parts_that_name_them_once(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    whole = await gateway.chat.Chat(weather_request())
    received = await receive(gateway.chat.StreamChat(stream_request(weather_request())))
    calls = whole.choices[0].message.tool_calls
    assert len(calls) >= 1
    parts = [part for delta in received.deltas for part in delta.tool_calls]
    assert {part.index for part in parts} == set(range(len(calls)))
    for index, call in enumerate(calls):
        mine = [part for part in parts if part.index == index]
        assert mine[0].name == call.function.name == "get_weather"
        assert mine[0].id != ""
        assert all(not part.name and not part.id for part in mine[1:])
        arguments = "".join(part.arguments for part in mine)
        assert arguments == call.function.arguments_json
        assert set(json.loads(arguments)) == {"city"}
    assert received.finishes[0].finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert received.finishes[0].finish_reason_raw == "tool_calls"


async def test_each_token_brings_its_log_probability(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request("Count to five")
    chat.params.logprobs = True
    chat.params.top_logprobs = 2
    whole = await gateway.chat.Chat(chat)
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    tokens = [token for delta in received.deltas for token in delta.logprobs]
    assert b"".join(token.raw_bytes for token in tokens).decode() == received.text
    assert tokens == list(whole.choices[0].logprobs)
    assert all(token.logprob <= 0 and len(token.top) == 2 for token in tokens)


@pytest.mark.parametrize("kind", ["text", "choices", "tools", "reasoning"])
async def test_the_last_snapshot_is_the_sum_of_the_deltas(
    start: Start, simulator: Simulated, kind: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = weather_request() if kind == "tools" else request("Tell me a story")
    if kind == "choices":
        chat.params.choice_count = 3
    if kind == "reasoning":
        chat.extra_body_json = simulate(reasoning="One has to think first.")
    whole = await gateway.chat.Chat(chat)
    grown = await receive(gateway.chat.StreamChat(stream_request(chat, mode=CUMULATIVE)))
    assert grown.failure is None
    assert grown.deltas == []
    assert grown.kinds[0] == "header"
    assert grown.kinds[-1] == "trailer"
    for choice in whole.choices:
        mine = [s for s in grown.snapshots if s.choice_index == choice.index]
        # Ids of calls are made up anew for each answer.
        for call in (*mine[-1].message.tool_calls, *choice.message.tool_calls):
            call.id = ""
        assert mine[-1].message == choice.message
        assert mine[0].state == chat_service_pb2.Snapshot.STATE_READY
        assert mine[0].message == chat_pb2.ChatMessage(role="assistant", content="")
        assert {s.state for s in mine[1:-1]} == {chat_service_pb2.Snapshot.STATE_STREAMING}
        assert mine[-1].state == chat_service_pb2.Snapshot.STATE_ENDED
        assert choice.index in grown.finishes


async def test_every_snapshot_begins_with_the_one_before(start: Start) -> None:
    gate = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for word in ("one ", "two ", "three"):
            await response.write(chunk(word))
            await gate.wait()
            gate.clear()
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        texts = []
        async for event in gateway.chat.StreamChat(stream_request(request(), mode=CUMULATIVE)):
            if event.WhichOneof("event") == "snapshot":
                texts.append(event.snapshot.message.content)
                if texts[-1]:  # else it is only ready
                    gate.set()
    assert texts == ["", "one ", "one two ", "one two three", "one two three"]


async def test_max_delay_joins_what_follows_the_first_text(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for number in range(20):
            await response.write(chunk(f"{number} "))
            await asyncio.sleep(0.01)
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        prompt = await receive(gateway.chat.StreamChat(stream_request(request())))
        held_request = stream_request(request())
        held_request.max_delay.FromSeconds(5)
        held = await receive(gateway.chat.StreamChat(held_request))
    assert held.text == prompt.text == "".join(f"{number} " for number in range(20))
    assert len(prompt.deltas) > 2
    assert [delta.content for delta in held.deltas][:1] == ["0 "]
    assert len(held.deltas) == 2
    assert held.kinds == ["header", "delta", "delta", "finish", "trailer"]


async def test_max_delay_lets_text_go_when_it_is_over(start: Start) -> None:
    gate = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("first "))
        await asyncio.sleep(0.02)
        await response.write(chunk("second "))
        await gate.wait()  # opened by the caller, who has to get the second text first
        await response.write(chunk("third", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        wanted = stream_request(request())
        wanted.max_delay.FromMilliseconds(100)
        texts = []
        async for event in gateway.chat.StreamChat(wanted):
            if event.WhichOneof("event") == "delta":
                texts.append(event.delta.content)
                if "second" in event.delta.content:
                    gate.set()
    assert "".join(texts) == "first second third"


async def test_what_arrives_together_leaves_together(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(b"".join(chunk(f"{number} ") for number in range(200)))
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.text == "".join(f"{number} " for number in range(200))
    assert len(received.deltas) < 20


async def test_silence_after_the_first_text_is_filled_with_empty_messages(start: Start) -> None:
    gate = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await asyncio.sleep(0.1)  # silence before the first text: nothing may be sent yet
        await response.write(chunk("first "))
        await gate.wait()
        await response.write(chunk("second", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), heartbeat=0.02)
        received = Received()
        async for event in gateway.chat.StreamChat(stream_request(request())):
            received.events.append(event)
            if received.kinds.count("none") == 3:
                gate.set()
    assert received.kinds[:2] == ["header", "delta"]
    assert received.kinds[2:5] == ["none", "none", "none"]
    assert received.kinds[-3:] == ["delta", "finish", "trailer"]
    assert received.text == "first second"


async def test_the_header_tells_every_attempt_and_its_key(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=simulate(fault="rate_limited", keys=["t-k1"]))
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    first, second = received.header.attempts
    assert (first.upstream, first.key_id, first.http_status) == ("test", "k1", 429)
    assert first.error_reason == error_reason_pb2.ERROR_REASON_RATE_LIMITED
    assert (second.upstream, second.key_id, second.http_status) == ("test", "k2", 200)
    assert second.error_reason == error_reason_pb2.ERROR_REASON_UNSPECIFIED
    assert first.duration.ToNanoseconds() > 0
    assert second.duration.ToNanoseconds() > 0
    # Served by k2 from now on: there is one attempt again.
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert [attempt.key_id for attempt in received.header.attempts] == ["k2"]


async def test_the_header_holds_what_upstream_and_gateway_know(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(
        upstream(simulator[1], unsupported_parameters=frozenset({"top_k"})),
        models=(
            Model(
                name="fast",
                upstream="test",
                upstream_model="simulated-small",
                max_completion_tokens=64,
            ),
        ),
    )
    chat = request(
        model="fast",
        unsupported_parameter_policy=chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP,
    )
    chat.params.max_completion_tokens = 1000
    chat.params.top_k = 5
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    header = received.header
    assert header.id.startswith("chatcmpl-")
    assert header.model == "simulated-small"
    assert header.upstream == "test"
    assert header.create_time.seconds > 1_700_000_000
    assert header.max_completion_tokens == 64
    assert list(header.dropped_parameters) == ["params.top_k"]


async def test_the_trailer_tells_tokens_and_the_time_to_the_first_of_them(start: Start) -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 5},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "queue_time": 0.5,
    }

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await asyncio.sleep(0.05)
        await response.write(chunk("hello", finish_reason="stop"))
        last = {"object": "chat.completion.chunk", "choices": [], "usage": usage, "x_time": 2}
        await response.write(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        began = asyncio.get_running_loop().time()
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        took = asyncio.get_running_loop().time() - began
        assert served.asked[0].body["stream_options"]["include_usage"] is True
    trailer = received.trailer
    counted = (trailer.usage.prompt_tokens, trailer.usage.completion_tokens)
    assert (*counted, trailer.usage.total_tokens) == (9, 4, 13)
    assert trailer.usage.cached_prompt_tokens == 5
    assert trailer.usage.HasField("reasoning_tokens")
    assert not trailer.usage.HasField("cache_write_tokens")
    assert json.loads(trailer.usage.extra_json)["queue_time"] == 0.5
    assert json.loads(trailer.extra_json) == {"x_time": 2}
    first_token = trailer.time_to_first_token.ToNanoseconds() / 1e9
    assert 0.04 < first_token <= took + 0.01


async def test_an_answer_without_any_text_is_complete_too(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        grown = await receive(gateway.chat.StreamChat(stream_request(request(), mode=CUMULATIVE)))
    assert received.kinds == ["header", "finish", "trailer"]
    assert not received.trailer.HasField("time_to_first_token")
    assert grown.kinds == ["header", "snapshot", "snapshot", "finish", "trailer"]


@pytest.mark.parametrize(
    "proof",
    [b"data: [DONE]\n\n", chunk("", finish_reason="stop")],
    ids=["a [DONE] alone", "a finish reason alone"],
)
async def test_either_proof_of_completion_is_enough(start: Start, proof: bytes) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("hello") + proof)
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is None
    assert received.text == "hello"
    assert received.kinds[-2:] == ["finish", "trailer"]


async def test_a_stop_string_that_the_upstream_sends_is_never_seen(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for piece in ("seen <e", "nd", "> not seen"):
            await response.write(chunk(piece))
            await asyncio.sleep(0.01)
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        chat = request()
        chat.params.stop.append("<end>")
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.text == "seen "
    assert received.failure is None


async def test_many_streams_at_once_keep_their_texts_apart(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))

    async def one(number: int) -> str:
        chat = request(extra_body_json=simulate(text=f"{number} " * 50, tokens_per_second=2000))
        return (await receive(gateway.chat.StreamChat(stream_request(chat)))).text

    texts = await asyncio.gather(*map(one, range(50)))
    assert texts == [f"{number} " * 50 for number in range(50)]
    assert simulator[0].stats.requests == 50
