"""BatchChat as its callers see it: how many run at once, in which order they come, who fails."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from aiohttp import web

from harness import (
    Start,
    completion,
    failing,
    item_failure,
    provider,
    request,
    simulate,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.config import Limits
from tokenwire_service.gateway import Gateway
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]


def batch(
    *chats: chat_service_pb2.ChatRequest, concurrency: int = 0
) -> chat_service_pb2.BatchChatRequest:
    """Items named i0, i1, ..."""
    wanted = chat_service_pb2.BatchChatRequest(max_concurrency=concurrency)
    for index, chat in enumerate(chats):
        wanted.items.add(custom_id=f"i{index}", chat=chat)
    return wanted


async def test_each_item_is_answered_once_under_its_own_name(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chats = [request(extra_body_json=simulate(text=f"text {n}")) for n in range(50)]
    answers = [answer async for answer in gateway.chat.BatchChat(batch(*chats))]
    assert sorted(answer.index for answer in answers) == list(range(50))
    for answer in answers:
        assert answer.custom_id == f"i{answer.index}"
        assert answer.response.choices[0].message.content == f"text {answer.index}"
        assert answer.response.usage.total_tokens > 0
        assert len(answer.response.header.attempts) == 1


@pytest.mark.parametrize(
    ("asked_for", "limit", "expected"),
    [(0, 20, 20), (3, 20, 3), (1, 20, 1), (256, 20, 20), (0, 5, 5), (40, 30, 30)],
)
async def test_so_many_items_run_at_once_as_caller_and_server_allow(
    start: Start, asked_for: int, limit: int, expected: int
) -> None:
    waiting = 0
    most = 0
    gate = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await gate.wait()
        waiting -= 1
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(batch_items_at_once=limit))
        call = gateway.chat.BatchChat(batch(*[request()] * 60, concurrency=asked_for))
        await until(lambda: waiting == expected)
        gate.set()
        answers = [answer async for answer in call]
    assert len(answers) == 60
    assert most == expected


async def test_answers_come_in_the_order_of_completion(start: Start) -> None:
    gates = {name: asyncio.Event() for name in ("a", "b", "c")}

    async def answer(asked: web.Request) -> web.StreamResponse:
        name = (await asked.json())["messages"][0]["content"]
        await gates[name].wait()
        return completion(name)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        call = gateway.chat.BatchChat(batch(*map(request, "abc")))
        order = []
        for name in ("c", "a", "b"):
            gates[name].set()
            got = await call.read()
            order.append((got.index, got.response.choices[0].message.content))
        assert await call.read() == grpc.aio.EOF
    assert order == [(2, "c"), (0, "a"), (1, "b")]


async def test_a_failed_item_carries_its_status_and_leaves_the_others_alone(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    out_of_range = request()
    out_of_range.params.temperature = 3
    no_messages = chat_service_pb2.ChatRequest(model="m")
    unknown_role = request()
    unknown_role.messages.add(role="wizard", content="x")
    refused = request(extra_body_json=simulate(fault="bad_request"))
    quota = request(model="poor", extra_body_json=simulate(fault="context_length_exceeded"))
    calls = batch(request(), out_of_range, no_messages, unknown_role, refused, quota, request())
    answers = {answer.index: answer async for answer in gateway.chat.BatchChat(calls)}
    assert len(answers) == 7
    assert {i for i, a in answers.items() if a.WhichOneof("result") == "response"} == {0, 6}
    failures = {i: item_failure(answers[i]) for i in range(1, 6)}
    assert {i: f.reason for i, f in failures.items()} == {
        1: "INVALID_REQUEST",
        2: "INVALID_REQUEST",
        3: "UNKNOWN_ROLE",
        4: "INVALID_REQUEST",
        5: "CONTEXT_LENGTH_EXCEEDED",
    }
    assert {f.code for f in failures.values()} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert set(failures[1].fields) == {"items[1].chat.params.temperature"}
    assert set(failures[2].fields) == {"items[2].chat.messages"}
    assert set(failures[3].fields) == {"items[3].chat.messages[1].role"}
    assert set(failures[4].fields) == {"items[4].chat.params.temperature"}
    assert failures[1].message.startswith("items[1].chat.params.temperature: ")
    assert failures[5].metadata["maxContextTokens"] == "8192"
    assert failures[5].metadata["upstreamStatus"] == "400"
    assert failures[5].metadata["attempts"] == "1"
    # The batch as a whole went well.
    assert [call.code for call in gateway.events.calls] == ["OK"]


async def test_every_item_may_fail_and_the_batch_is_still_complete(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chats = [request(extra_body_json=simulate(fault="model_not_found"))] * 5
    answers = [answer async for answer in gateway.chat.BatchChat(batch(*chats))]
    assert [item_failure(answer).reason for answer in answers] == ["MODEL_NOT_FOUND"] * 5


async def test_cancel_of_the_batch_cancels_every_upstream_request(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    stats = simulator[0].stats
    chats = [request(extra_body_json=simulate(fault="stall_before_headers"))] * 40
    call = gateway.chat.BatchChat(batch(*chats, concurrency=7))
    reading = asyncio.ensure_future(call.read())
    await until(lambda: stats.open_requests == 7)
    call.cancel()
    await until(lambda: stats.open_requests == 0)
    assert stats.aborted_requests == 7
    assert stats.requests == 7  # those that waited were never sent
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: [c.code for c in gateway.events.calls] == ["CANCELLED"])


async def test_a_caller_that_leaves_between_answers_stops_the_rest(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    stats = simulator[0].stats
    stalled = [request(extra_body_json=simulate(fault="stall_midway"))] * 30
    call = gateway.chat.BatchChat(batch(request(), *stalled))
    assert (await call.read()).index == 0
    await until(lambda: stats.open_requests == 20)
    call.cancel()
    await until(lambda: stats.open_requests == 0)
    assert stats.aborted_requests == 20


async def test_an_answer_too_large_to_send_fails_its_item_alone(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]), limits=Limits(message_bytes=65536))
    large = request(extra_body_json=simulate(tokens=20_000))
    answers = {a.index: a async for a in gateway.chat.BatchChat(batch(large, request()))}
    failure = item_failure(answers[0])
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.reason == "REQUEST_TOO_LARGE"
    assert answers[1].response.choices[0].message.content != ""


async def test_items_of_a_running_batch_are_served_while_the_gateway_drains(
    start: Start,
) -> None:
    gate = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        await gate.wait()
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        call = gateway.chat.BatchChat(batch(*[request()] * 10, concurrency=2))
        await until(lambda: served.open == 2)
        gateway.running.gateway.draining = True
        late = await failing(gateway.chat.BatchChat(batch(request())))
        gate.set()
        answers = [answer async for answer in call]
    assert late.reason == "GATEWAY_DRAINING"
    assert [a.WhichOneof("result") for a in answers] == ["response"] * 10


@pytest.mark.parametrize(
    "defect",
    [RuntimeError("sk-secret"), asyncio.CancelledError("sk-secret"), BaseException("sk-secret")],
    ids=lambda error: type(error).__name__,
)
async def test_a_defect_in_one_item_is_its_own(
    start: Start,
    simulator: Simulated,
    monkeypatch: pytest.MonkeyPatch,
    defect: BaseException,
) -> None:
    real = Gateway.chat

    async def sometimes(self: Gateway, call: object) -> chat_service_pb2.ChatResponse:
        if call.chat.model == "bad":  # type: ignore[attr-defined]
            raise defect
        return await real(self, call)  # type: ignore[arg-type]

    monkeypatch.setattr(Gateway, "chat", sometimes)
    gateway = await start(upstream(simulator[1]))
    calls = batch(request(), request(model="bad"), *[request()] * 5, concurrency=1)
    answers = {answer.index: answer async for answer in gateway.chat.BatchChat(calls)}
    assert len(answers) == 7
    failure = item_failure(answers[1])
    assert failure.code is grpc.StatusCode.INTERNAL
    assert failure.reason == "INTERNAL"
    assert "sk-secret" not in failure.everything
    assert [a.WhichOneof("result") for i, a in sorted(answers.items()) if i != 1] == (
        ["response"] * 6
    )


@pytest.mark.parametrize("count", [0, 257])
async def test_a_batch_has_one_to_256_items(start: Start, simulator: Simulated, count: int) -> None:
    gateway = await start(upstream(simulator[1]))
    failure = await failing(gateway.chat.BatchChat(batch(*[request()] * count)))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(failure.fields) == {"items"}
    assert simulator[0].stats.requests == 0


async def test_names_of_items_are_unique_unless_empty(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    calls = batch(request(), request(), request())
    calls.items[2].custom_id = "i0"
    failure = await failing(gateway.chat.BatchChat(calls))
    assert set(failure.fields) == {"items[2].custom_id"}
    for item in calls.items:
        item.custom_id = ""
    assert len([answer async for answer in gateway.chat.BatchChat(calls)]) == 3
