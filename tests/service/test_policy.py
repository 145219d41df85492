"""Policy as callers meet it, over real sockets: queues, fallbacks, timers, back-pressure, costs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from harness import (
    Failure,
    Provider,
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    simulate,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import error_reason_pb2
from tokenwire_service.config import Config, Limits, Model, Retries, Timeouts, UpstreamTimeouts
from tokenwire_service.keyring import KeyRing, Lease
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
METHODS = ["Chat", "StreamChat"]
LONG = 30.0  # seconds: nothing here lasts so long
SHORT = 0.3


def call_of(gateway: Stubs, method: str, model: str = "m", **wanted: Any) -> Any:
    """A call, begun."""
    timeout = wanted.pop("timeout", LONG)
    chat = request("Tell me a story", model, **wanted)
    if method == "Chat":
        return gateway.chat.Chat(chat, timeout=timeout)
    return gateway.chat.StreamChat(stream_request(chat), timeout=timeout)


async def header_of(call: Any) -> Any:
    """What an answer says of itself."""
    if isinstance(call, grpc.aio.UnaryUnaryCall):
        return (await call).header
    received = await receive(call)
    assert received.failure is None, received.failure
    return received.header


@dataclass
class Gate:
    """An upstream that answers nobody until it is opened."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, asked: web.Request) -> web.StreamResponse:
        await self.opened.wait()
        return await answered(asked)


async def answered(asked: web.Request) -> web.StreamResponse:
    """`hello`, plain or as a stream."""
    if not (await asked.json()).get("stream"):
        return completion()
    response = await event_stream(asked)
    await response.write(chunk("hello", finish_reason="stop") + b"data: [DONE]\n\n")
    return response


def refused(status: int, code: str, **headers: str) -> Handler:
    """An upstream that refuses everyone."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        error = {"message": "no", "type": code, "code": code}
        return web.json_response({"error": error}, status=status, headers=headers)

    return answer


@asynccontextmanager
async def providers(**answers: Handler) -> AsyncIterator[dict[str, Provider]]:
    """Several upstreams by name."""
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(provider(a)) for name, a in answers.items()}


def config(served: dict[str, Provider], *, fallbacks: bool = True, **settings: Any) -> Config:
    """Each upstream serves a model of its name; the first one's falls back to the others."""
    names = tuple(served)
    others = {names[0]: names[1:]} if fallbacks else {}
    return Config(
        listen="127.0.0.1:0",
        upstreams=tuple(
            upstream(each.base_url, name=name, passthrough=False) for name, each in served.items()
        ),
        models=tuple(
            Model(name=name, upstream=name, fallbacks=others.get(name, ())) for name in names
        ),
        **settings,
    )


# --- queues -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_a_stalled_upstream_with_all_its_slots_taken_leaves_the_others_alone(
    start: Start, method: str
) -> None:
    gate = Gate()
    async with providers(slow=gate, fast=answered) as served:
        limits = Limits(in_flight=4, queue=10)
        gateway = await start(config=config(served, fallbacks=False, limits=limits))
        stuck = [call_of(gateway, method, "slow") for _ in range(8)]
        pool = gateway.running.pools["slow"]
        await until(lambda: pool.bulkhead.waiting == 5)
        await until(lambda: served["slow"].open == 3)  # three quarters of all slots
        headers = await asyncio.gather(
            *(header_of(call_of(gateway, method, "fast")) for _ in range(10))
        )
        assert {header.upstream for header in headers} == {"fast"}
        gate.opened.set()
        assert len(await asyncio.gather(*map(header_of, stuck))) == 8


@pytest.mark.parametrize("method", METHODS)
async def test_a_full_queue_is_told_at_once_with_a_time_to_come_back(
    start: Start, method: str
) -> None:
    gate = Gate()
    async with provider(gate) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(in_flight=1, queue=2))
        waiting = [call_of(gateway, method) for _ in range(3)]
        bulkhead = gateway.running.pools["test"].bulkhead
        await until(lambda: bulkhead.waiting == 2)
        failure = await failing(call_of(gateway, method))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == "GATEWAY_OVERLOADED"
        assert failure.retry_seconds > 0
        assert int(failure.pushback) > 0
        assert failure.metadata["attempts"] == "0"
        gate.opened.set()
        await asyncio.gather(*map(header_of, waiting))
    assert len(served.asked) == 3


@pytest.mark.parametrize("method", METHODS)
async def test_a_deadline_in_the_queue_ends_a_call_that_no_upstream_has_seen(
    start: Start, method: str
) -> None:
    gate = Gate()
    async with provider(gate) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(in_flight=1, queue=2))
        first = call_of(gateway, method)
        await until(lambda: served.open == 1)
        failure = await failing(call_of(gateway, method, timeout=SHORT))
        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: len(gateway.events.calls) == 1)
        assert gateway.events.calls[0].code == "DEADLINE_EXCEEDED"
        assert gateway.events.calls[0].attempts == 0
        assert gateway.running.pools["test"].bulkhead.waiting == 0
        gate.opened.set()
        await header_of(first)
    assert len(served.asked) == 1


async def test_cancels_in_the_queue_and_of_who_holds_the_slot_lose_none(start: Start) -> None:
    gate = Gate()
    async with provider(gate) as served:
        gateway = await start(upstream(served.base_url), limits=Limits(in_flight=1, queue=2))
        calls = [call_of(gateway, "Chat") for _ in range(3)]
        bulkhead = gateway.running.pools["test"].bulkhead
        await until(lambda: (bulkhead.waiting, served.open) == (2, 1))
        for call in calls:
            call.cancel()
        await until(lambda: gateway.running.gateway.in_flight == bulkhead.waiting == 0)
        gate.opened.set()
        assert (await call_of(gateway, "Chat")).header.upstream == "test"


async def test_callers_see_nothing_of_an_account_that_bears_three_at_once(start: Start) -> None:
    at_once = most = refusals = 0

    async def answer(asked: web.Request) -> web.StreamResponse:
        nonlocal at_once, most, refusals
        if at_once == 3:
            refusals += 1
            return await refused(429, "rate_limit_exceeded", **{"retry-after-ms": "50"})(asked)
        at_once += 1
        most = max(most, at_once)
        try:
            await asyncio.sleep(0.02)
            return await answered(asked)
        finally:
            at_once -= 1

    async with provider(answer) as served:
        retries = Retries(max_attempts=20, budget_floor=1000)
        gateway = await start(upstream(served.base_url, keys=1), retries=retries)
        headers = await asyncio.gather(*(header_of(call_of(gateway, "Chat")) for _ in range(40)))
    assert len(headers) == 40
    assert most == 3
    assert 1 <= refusals < 60, "without a limit: 37 at first, and nearly as many after each rest"


# --- fallbacks --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_the_answer_of_a_fallback_tells_who_gave_it_and_why(
    start: Start, method: str
) -> None:
    first = refused(429, "rate_limit_exceeded", **{"retry-after": "20"})
    second = refused(401, "invalid_api_key")
    async with providers(first=first, second=second, third=answered) as served:
        gateway = await start(config=config(served))
        header = await header_of(call_of(gateway, method, "first"))
    assert header.upstream == "third"
    limited = error_reason_pb2.ERROR_REASON_RATE_LIMITED
    rejected = error_reason_pb2.ERROR_REASON_UPSTREAM_CREDENTIALS_REJECTED
    assert [(a.upstream, a.key_id, a.http_status, a.error_reason) for a in header.attempts] == [
        ("first", "k1", 429, limited),
        ("first", "k2", 429, limited),
        ("second", "k1", 401, rejected),
        ("second", "k2", 401, rejected),
        ("third", "k1", 200, 0),
    ]
    assert [asked.body["model"] for asked in served["third"].asked] == ["third"]


@pytest.mark.parametrize("method", METHODS)
async def test_when_all_fail_the_trail_tells_what_was_tried(start: Start, method: str) -> None:
    first = refused(429, "rate_limit_exceeded", **{"retry-after": "60"})
    async with providers(first=first, second=refused(500, "server_error")) as served:
        quick = Retries(max_attempts=2, backoff=0.001, backoff_cap=0.001)
        gateway = await start(config=config(served, retries=quick))
        failure = await failing(call_of(gateway, method, "first"))
    assert failure.reason == "RATE_LIMITED"
    assert failure.metadata["upstream"] == "first"
    assert failure.metadata["attempts"] == "4"
    assert failure.metadata["trail"] == (
        "first/k1 429 RATE_LIMITED, first/k2 429 RATE_LIMITED, "
        "second/k1 500 UPSTREAM_ERROR, second/k2 500 UPSTREAM_ERROR"
    )


async def test_after_the_first_text_no_other_model_is_asked(start: Start) -> None:
    async def cut(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("a beginning"))
        return response

    async with providers(first=cut, second=answered) as served:
        gateway = await start(config=config(served))
        received = await receive(call_of(gateway, "StreamChat", "first"))
    assert received.text == "a beginning"
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    assert received.failure.metadata["trail"] == "first/k1 200 UPSTREAM_ERROR"
    assert served["second"].asked == []


# --- timers -----------------------------------------------------------------------------


async def silent(asked: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def silent_after_text(asked: web.Request) -> web.StreamResponse:
    response = await event_stream(asked)
    await response.write(chunk("a beginning"))
    return await silent(asked)


async def endless(asked: web.Request) -> web.StreamResponse:
    response = await event_stream(asked)
    while True:
        await response.write(chunk("x" * 60_000))


@asynccontextmanager
async def nobody_accepts() -> AsyncIterator[Provider]:
    """An address where a connection is never made."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):  # beyond the backlog the kernel lets a connect wait
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        yield Provider(base_url=f"http://127.0.0.1:{address[1]}/v1")


# Each timer: where a call is that it ends, and the reason that it alone gives.
TIMERS: dict[str, tuple[Callable[[], Any], str]] = {
    "connect": (nobody_accepts, "UPSTREAM_UNREACHABLE"),
    "first_byte": (lambda: provider(silent), "UPSTREAM_TIMEOUT"),
    "idle": (lambda: provider(silent_after_text), "UPSTREAM_STREAM_INTERRUPTED"),
    "total": (lambda: provider(silent), "UPSTREAM_TIMEOUT"),
    "write": (lambda: provider(endless), "CALLER_STALLED"),
}


def timers_of(settings: type[Timeouts] | type[UpstreamTimeouts], short: str) -> Any:
    """All of them long, but for one."""
    names = settings.__struct_fields__
    return settings(**{name: SHORT if name == short else LONG for name in names})


async def ended_by(gateway: Stubs, timer: str, timeout: float) -> Failure:
    """How a call ends whose caller, where writing is timed, reads nothing until then."""
    call = call_of(gateway, "StreamChat", timeout=timeout)
    if timer == "write":
        await anext(aiter(call))
        await until(lambda: len(gateway.events.calls) == 1)
    failure = (await receive(call)).failure
    assert failure is not None
    return failure


def test_every_timer_has_its_row() -> None:
    assert set(TIMERS) == {*Timeouts.__struct_fields__, *UpstreamTimeouts.__struct_fields__}


@pytest.mark.parametrize("timer", TIMERS)
async def test_each_timer_has_its_own_reason(start: Start, timer: str) -> None:
    place, reason = TIMERS[timer]
    async with place() as served:
        gateway = await start(
            upstream(served.base_url, timeouts=timers_of(UpstreamTimeouts, timer)),
            timeouts=timers_of(Timeouts, timer),
            retries=Retries(max_attempts=1),
        )
        failure = await ended_by(gateway, timer, LONG)
        await until(lambda: served.open == 0)
    assert failure.reason == reason
    assert failure.metadata["timer"] == timer
    assert failure.code is not grpc.StatusCode.DEADLINE_EXCEEDED
    assert failure.pushback == "-1"
    assert failure.metadata["attempts"] == "1"


@pytest.mark.parametrize("timer", TIMERS)
async def test_each_timer_ends_with_the_callers_deadline(start: Start, timer: str) -> None:
    place, _ = TIMERS[timer]
    async with place() as served:
        gateway = await start(
            upstream(served.base_url, timeouts=timers_of(UpstreamTimeouts, "none")),
            timeouts=timers_of(Timeouts, "none"),
        )
        failure = await ended_by(gateway, timer, SHORT)
        await until(lambda: served.open == 0)
        await until(lambda: len(gateway.events.calls) == 1)
    assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert gateway.events.calls[0].code == "DEADLINE_EXCEEDED"


FILLERS = {
    "comments": b": keep-alive\n\n",
    "blank lines": b"\n\n",
    "blank lines of another kind": b"\r\n\r\n",
    "an event without data": b"event: ping\n\n",
    "empty data": b"data:\n\n",
    "an id": b"id: 7\n\n",
    "a delay": b"retry: 1000\n\n",
}


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("text", [b"", chunk("a beginning")], ids=["before text", "after text"])
async def test_what_only_keeps_a_stream_alive_is_no_progress(
    start: Start, filler: str, text: bytes
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(text)
        while True:
            await response.write(FILLERS[filler])
            await asyncio.sleep(0.02)

    async with provider(answer) as served:
        timeouts = UpstreamTimeouts(first_byte=SHORT, idle=SHORT)
        gateway = await start(
            upstream(served.base_url, timeouts=timeouts), retries=Retries(max_attempts=1)
        )
        failure = await failing(call_of(gateway, "StreamChat"))
        await until(lambda: served.open == 0)
    assert failure.reason == ("UPSTREAM_STREAM_INTERRUPTED" if text else "UPSTREAM_TIMEOUT")


NO_TEXT = {
    "a role": b'{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}',
    "no choice": b'{"object": "chat.completion.chunk", "choices": []}',
    "usage": b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}',
}


@pytest.mark.parametrize("what", NO_TEXT)
async def test_events_without_text_are_no_beginning(start: Start, what: str) -> None:
    """An upstream that sends them for ever would else be waited for as long."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        while True:
            await response.write(b"data: " + NO_TEXT[what] + b"\n\n")
            await asyncio.sleep(0.02)

    async with provider(answer) as served:
        timeouts = UpstreamTimeouts(first_byte=SHORT, idle=LONG)
        gateway = await start(
            upstream(served.base_url, timeouts=timeouts), retries=Retries(max_attempts=1)
        )
        failure = await failing(call_of(gateway, "StreamChat"))
        await until(lambda: served.open == 0)
    assert failure.reason == "UPSTREAM_TIMEOUT"
    assert failure.metadata["timer"] == "first_byte"


async def test_a_model_may_think_longer_than_it_may_pause(start: Start) -> None:
    """Some send the role at once, and then nothing while they think."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(b"data: " + NO_TEXT["a role"] + b"\n\n")
        await asyncio.sleep(4 * SHORT)
        await response.write(chunk("42", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        timeouts = UpstreamTimeouts(first_byte=LONG, idle=SHORT)
        gateway = await start(upstream(served.base_url, timeouts=timeouts))
        received = await receive(call_of(gateway, "StreamChat"))
    assert received.failure is None
    assert received.text == "42"
    assert len(served.asked) == 1


async def test_initial_metadata_come_with_the_first_message_and_not_before(start: Start) -> None:
    """Sent earlier they would switch off the caller's own retries, though nothing was delivered."""
    proceed = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(b"data: " + NO_TEXT["a role"] + b"\n\n")
        await proceed.wait()
        await response.write(chunk("hello", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        call = call_of(gateway, "StreamChat")
        metadata = asyncio.ensure_future(call.initial_metadata())
        await until(lambda: served.open == 1)
        await asyncio.sleep(SHORT)
        assert not metadata.done()
        proceed.set()
        received = await receive(call)
        await metadata
    assert received.text == "hello"


# --- back-pressure ----------------------------------------------------------------------


def peak_mebibytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def standstill(count: Callable[[], int]) -> None:
    """Waits until nothing more is counted."""
    before = -1
    while before != count():
        before = count()
        await asyncio.sleep(0.15)


async def test_a_caller_that_pauses_stops_the_upstream_and_still_gets_everything(
    start: Start,
) -> None:
    pieces, size = 3400, 60_000  # 200 MB
    written = 0
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def answer(asked: web.Request) -> web.StreamResponse:
        nonlocal written
        response = await event_stream(asked)
        for number in range(pieces):
            piece = f"{number:06d}".ljust(size, "x")
            sent.update(piece.encode())
            await response.write(chunk(piece))
            written += 1
        await response.write(b"data: [DONE]\n\n")
        return response

    reset = Path("/proc/self/clear_refs")
    if os.access(reset, os.W_OK):
        reset.write_text("5")  # forgets the peak
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        before = peak_mebibytes()
        call = gateway.chat.StreamChat(stream_request(request()), timeout=2 * LONG)
        kinds = [(await anext(aiter(call))).WhichOneof("event")]
        await standstill(lambda: written)
        assert written * size < 32 << 20
        assert peak_mebibytes() - before < 64
        async for event in call:
            kinds.append(event.WhichOneof("event"))
            received.update(event.delta.content.encode())
        assert peak_mebibytes() - before < 64
    assert (kinds[0], kinds[-2:]) == ("header", ["finish", "trailer"])
    assert written == pieces
    assert received.hexdigest() == sent.hexdigest()


async def test_a_caller_that_never_reads_on_is_given_up_and_the_upstream_stops(
    start: Start,
) -> None:
    async with provider(endless) as served:
        gateway = await start(upstream(served.base_url), timeouts=Timeouts(write=SHORT))
        call = gateway.chat.StreamChat(stream_request(request()), timeout=LONG)
        await anext(aiter(call))
        await until(lambda: len(gateway.events.calls) == 1)
        await until(lambda: served.open == 0)
        assert gateway.running.leases == gateway.running.gateway.in_flight == 0
        received = await receive(call)
    assert received.failure is not None
    assert received.failure.code is grpc.StatusCode.ABORTED
    assert received.failure.reason == "CALLER_STALLED"
    (ended,) = gateway.events.calls
    assert (ended.code, ended.usage_estimated) == ("ABORTED", True)
    assert ended.completion_tokens >= len(received.text) // 4
    assert received.failure.metadata["completionTokens"] == str(ended.completion_tokens)


# --- what is left -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_what_a_provider_says_is_left_is_told_to_the_keys(
    start: Start, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    told: list[tuple[int | None, int | None]] = []
    real = KeyRing.remaining

    def remaining(
        ring: KeyRing, lease: Lease, requests: int | None, tokens: int | None, now: float
    ) -> None:
        told.append((requests, tokens))
        real(ring, lease, requests, tokens, now)

    monkeypatch.setattr(KeyRing, "remaining", remaining)
    headers = [
        {"x-ratelimit-remaining-requests": "7", "x-ratelimit-remaining-tokens": "900"},
        {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-remaining-tokens": "some"},
        {},
    ]

    async def answer(asked: web.Request) -> web.StreamResponse:
        fields = headers[len(served.asked) - 1]
        if method == "Chat":
            whole = completion()
            whole.headers.update(fields)
            return whole
        body = chunk("hello", finish_reason="stop") + b"data: [DONE]\n\n"
        return web.Response(body=body, content_type="text/event-stream", headers=fields)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        for _ in headers:
            await header_of(call_of(gateway, method))
    assert told == [(7, 900), (None, None), (None, None)]


# --- costs ------------------------------------------------------------------------------


async def test_a_cancelled_stream_cost_what_was_delivered(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for _ in range(10):
            await response.write(chunk("x" * 40))
        return await silent(asked)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        call = gateway.chat.StreamChat(stream_request(request("y" * 400)))
        text = ""
        while len(text) < 400:
            text += (await call.read()).delta.content
        call.cancel()
        await until(lambda: len(gateway.events.calls) == 1)
    (ended,) = gateway.events.calls
    assert ended.code == "CANCELLED"
    assert (ended.completion_tokens, ended.usage_estimated) == (100, True)
    assert 100 <= ended.prompt_tokens <= 110
    assert [each.fault for each in gateway.events.attempts] == ["abandoned"]


async def test_an_interrupted_stream_tells_what_it_cost(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    wanted = simulate(fault="cut", text="several words of an answer " * 10)
    received = await receive(call_of(gateway, "StreamChat", extra_body_json=wanted))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    facts = received.failure.metadata
    (ended,) = gateway.events.calls
    assert facts["usageEstimated"] == "true"
    assert int(facts["completionTokens"]) == -(-len(received.text) // 4) == ended.completion_tokens
    assert int(facts["promptTokens"]) == ended.prompt_tokens > 0
    assert ended.usage_estimated
