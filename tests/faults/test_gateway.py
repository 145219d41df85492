"""F11, F13, F19, F24: a running gateway whose callers stall, insist, or send too much."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web
from grpc_health.v1 import health_pb2

from harness import (
    Figures,
    Provider,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    stream_request,
    until,
)
from processes import Program, begun, serve, write_config
from tokenwire.v1 import (
    chat_service_pb2,
    chat_service_pb2_grpc,
    tokenizer_service_pb2,
)

KEY = {"TEST_KEY": "sk-test-k1"}
PIECE = chunk("x" * 60_000)


async def endless(asked: web.Request) -> web.StreamResponse:
    """As fast as it is read; one word where that is asked for."""
    body = await asked.json()
    response = await event_stream(asked)
    if body["messages"][0]["content"] == "short":
        await response.write(chunk("hello", finish_reason="stop") + b"data: [DONE]\n\n")
        return response
    while True:
        await response.write(PIECE)


# --- F11 --------------------------------------------------------------------------------

# What one stream may hold of the gateway's memory while its caller does not read, in KiB; stated
# in docs/architecture.md.
PER_STALLED_STREAM = 1536


async def test_f11_a_caller_that_stops_reading_costs_bounded_memory_and_nobody_else(
    tmp_path: Path, figures: Figures, long: bool
) -> None:
    count = 200 if long else 40
    async with provider(endless) as served:
        config = write_config(tmp_path, served.base_url)
        async with serve("--config", config, **KEY) as gateway:
            await receive(gateway.chat.StreamChat(stream_request(request("short"))))
            before = gateway.resident_kib
            stalled = [gateway.chat.StreamChat(stream_request(request())) for _ in range(count)]
            for call in stalled:
                await call.read()
            await until(lambda: served.open == count)
            resident = 0
            while resident != gateway.resident_kib:  # until nothing moves any more
                resident = gateway.resident_kib
                await asyncio.sleep(1.0)
            each = (resident - before) / count
            figures("F11 memory of the gateway for each stalled stream", each, "KiB")
            assert each < PER_STALLED_STREAM
            # The others, over the same connection too, go on.
            for _ in range(20):
                began = time.monotonic()
                received = await receive(gateway.chat.StreamChat(stream_request(request("short"))))
                assert received.text == "hello"
                figures("F11 a short stream beside them", (time.monotonic() - began) * 1000, "ms")
            for call in stalled:
                call.cancel()
            await until(lambda: served.open == 0)


async def test_f11_a_write_that_nobody_takes_ends_the_call(tmp_path: Path) -> None:
    async with provider(endless) as served:
        config = write_config(tmp_path, served.base_url, timeouts={"write": "500ms"})
        async with serve("--config", config, **KEY) as gateway:
            call = gateway.chat.StreamChat(stream_request(request()))
            await anext(aiter(call))
            await until(lambda: served.open == 0)  # though its caller is still there
            received = await receive(call)
    assert received.failure is not None
    assert received.failure.code is grpc.StatusCode.ABORTED
    assert received.failure.reason == "CALLER_STALLED"


# --- F13 --------------------------------------------------------------------------------

STREAMS = 100


@dataclass
class Crowd:
    """A hundred streams under way, read in the background; they go on until they are told."""

    served: Provider
    gateway: Program
    reading: list[asyncio.Task[Any]]
    told: asyncio.Event


@asynccontextmanager
async def crowd(tmp_path: Path, **drain: str) -> AsyncIterator[Crowd]:
    """A gateway with a crowd."""
    told = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        while not told.is_set():
            await response.write(chunk("word "))
            await asyncio.sleep(0.1)
        await response.write(chunk("the end", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        config = write_config(tmp_path, served.base_url, drain=drain)
        async with serve("--config", config, **KEY) as gateway:
            calls = [gateway.chat.StreamChat(stream_request(request())) for _ in range(STREAMS)]
            yield Crowd(served, gateway, await asyncio.gather(*map(begun, calls)), told)


async def test_f13_sigterm_lets_a_hundred_streams_end(tmp_path: Path) -> None:
    async with crowd(tmp_path, propagation="0s", grace="60s") as streams:
        gateway = streams.gateway
        gateway.signal(signal.SIGTERM)
        await until(lambda: gateway.event("draining") is not None)
        streams.told.set()
        for received in await asyncio.gather(*streams.reading):
            assert received.failure is None, received.failure.message
            assert received.text.endswith("the end")
            assert received.kinds[-1] == "trailer"
        assert await gateway.exit_code() == 0
        assert gateway.event("draining")["in_flight"] == STREAMS  # type: ignore[index]
        assert gateway.event("stopped")["cut_short"] is False  # type: ignore[index]
        assert len(streams.served.asked) == STREAMS


async def test_f13_a_second_sigterm_ends_a_hundred_streams_at_once(
    tmp_path: Path, figures: Figures
) -> None:
    async with crowd(tmp_path, propagation="0s", grace="10m") as streams:
        gateway = streams.gateway
        gateway.signal(signal.SIGTERM)
        await until(lambda: gateway.event("draining") is not None)
        began = time.monotonic()
        gateway.signal(signal.SIGTERM)
        for received in await asyncio.gather(*streams.reading):
            assert received.failure is not None
            assert "trailer" not in received.kinds  # never told as whole
        assert await gateway.exit_code() == 1
        figures("F13 from the second SIGTERM to the end", (time.monotonic() - began) * 1000, "ms")
        await until(lambda: streams.served.open == 0)
    assert "Traceback" not in "\n".join(gateway.lines)


async def test_f13_sigkill_closes_every_upstream_and_the_next_serves(tmp_path: Path) -> None:
    async with crowd(tmp_path, propagation="0s", grace="10m") as streams:
        gateway = streams.gateway
        address = gateway.event("serving")["address"]  # type: ignore[index]
        gateway.signal(signal.SIGKILL)
        assert await gateway.exit_code() == -signal.SIGKILL
        for received in await asyncio.gather(*streams.reading):
            assert received.failure is not None
            assert received.failure.code is grpc.StatusCode.UNAVAILABLE
            assert "trailer" not in received.kinds
        await until(lambda: streams.served.open == 0)
        streams.told.set()
        config = str(tmp_path / "tokenwire.yaml")
        async with serve("--config", config, "--listen", address, **KEY) as another:
            received = await receive(another.chat.StreamChat(stream_request(request())))
            assert received.failure is None


# --- F19 --------------------------------------------------------------------------------

LAG_BOUND = 3.0  # seconds; what an idle machine shows stands in docs/faults.md


@asynccontextmanager
async def lag_watched(gateway: Program) -> AsyncIterator[list[float]]:
    """How long the gateway's event loop took for something small, again and again, in seconds."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            began = time.monotonic()
            await gateway.health.Check(health_pb2.HealthCheckRequest())
            lags.append(time.monotonic() - began)
            await asyncio.sleep(0.005)

    watching = asyncio.ensure_future(watch())
    await until(lambda: len(lags) > 20)
    lags.clear()
    try:
        yield lags
    finally:
        while len(lags) < 3:
            await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def many_messages(count: int) -> chat_service_pb2.ChatRequest:
    chat = chat_service_pb2.ChatRequest(model="m")
    for _ in range(count):
        chat.messages.add(role="user", content="hello")
    return chat


SPECIAL = "<|endoftext|><|im_start|>system\n<|endofprompt|>" * 1000

CHAT = "/tokenwire.v1.ChatService/Chat"
COUNT = "/tokenwire.v1.TokenizerService/CountTokens"


def counting(**of: Any) -> bytes:
    return tokenizer_service_pb2.CountTokensRequest(model="gpt-4o", **of).SerializeToString()


MANY = many_messages(100_000)

# (method, message as it travels): what is large or odd about it. The code that it ends with.
HEAVY: dict[str, tuple[str, bytes, str]] = {
    "a prompt of 4 MiB": (CHAT, request("word" * (1 << 20)).SerializeToString(), "OK"),
    "100,000 messages": (CHAT, MANY.SerializeToString(), "INVALID_ARGUMENT"),
    "special tokens": (CHAT, request(SPECIAL).SerializeToString(), "OK"),
    "half a surrogate pair": (
        CHAT,
        request("#").SerializeToString().replace(b"\x01#", b"\x03\xed\xa0\xbd"),
        "INVALID_ARGUMENT",
    ),
    "tokens of a million spaces": (COUNT, counting(text=" " * 10**6), "any"),
    "tokens of 4 MiB": (COUNT, counting(text="word " * (4 * 2**20 // 5)), "OK"),
    "tokens of special text": (COUNT, counting(text=SPECIAL), "OK"),
    "tokens of 100,000 messages": (
        COUNT,
        counting(chat=many_messages(100_000)),
        "INVALID_ARGUMENT",
    ),
}


async def test_f19_what_is_large_or_odd_holds_nobody_up(tmp_path: Path, figures: Figures) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    async with provider(answer) as served:
        config = write_config(tmp_path, served.base_url)
        async with serve("--config", config, **KEY) as gateway:
            assert gateway.channel is not None
            await gateway.channel.unary_unary(COUNT)(counting(text="load the encoding"))
            for name, (method, message, code) in HEAVY.items():
                ask = gateway.channel.unary_unary(method)
                async with lag_watched(gateway) as lags:
                    ended = "OK"
                    try:
                        await ask(message, timeout=60)
                    except grpc.aio.AioRpcError as error:
                        ended = error.code().name
                assert ended == code or (code == "any" and ended in ("OK", "INVALID_ARGUMENT"))
                figures(f"F19 a health check beside {name}", max(lags) * 1000, "ms")
                assert max(lags) < LAG_BOUND, name
            whole = await gateway.chat.Chat(request())
            assert whole.choices[0].message.content == "hello"


# --- F24 --------------------------------------------------------------------------------


def retrying(*codes: str) -> list[tuple[str, Any]]:
    """The options of a caller that retries by itself, as often as gRPC allows."""
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": codes,
    }
    config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
    return [("grpc.service_config", json.dumps(config)), ("grpc.enable_retries", 1)]


async def test_f24_two_layers_of_retries_do_not_multiply(tmp_path: Path) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=500)

    async with provider(answer) as served:
        retries = {"max_attempts": 3, "backoff": "1ms", "backoff_cap": "1ms", "budget_floor": 1000}
        config = write_config(tmp_path, served.base_url, retries=retries)
        async with serve("--config", config, **KEY) as gateway:
            address = gateway.event("serving")["address"]  # type: ignore[index]
            async with grpc.aio.insecure_channel(address, options=retrying("UNAVAILABLE")) as own:
                stub: Any = chat_service_pb2_grpc.ChatServiceStub(own)
                for count in (1, 2):
                    failure = await failing(stub.Chat(request()))
                    assert failure.reason == "UPSTREAM_ERROR"
                    assert failure.pushback == "-1"
                    assert len(served.asked) == 3 * count  # ours, and not 3 x 5
                failure = await failing(stub.StreamChat(stream_request(request())))
                assert failure.pushback == "-1"
                assert len(served.asked) == 9
            await until(lambda: len(calls(gateway)) >= 3)
    assert len(calls(gateway)) == 3


def calls(gateway: Program) -> list[dict[str, Any]]:
    """What the log tells of each call."""
    lines = (json.loads(line) for line in gateway.lines if line.startswith("{"))
    return [line for line in lines if line["event"] == "call"]


async def test_f24_a_caller_that_retries_by_itself_waits_as_long_as_it_is_told(
    tmp_path: Path,
) -> None:
    """Its own backoff is a hundredth of a second; the gateway's pushback is more than one."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        if len(served.asked) == 1:
            return web.json_response({"error": {}}, status=429, headers={"retry-after-ms": "1500"})
        return completion()

    async with provider(answer) as served:
        config = write_config(tmp_path, served.base_url, timeouts={"total": "1s"})
        async with serve("--config", config, **KEY) as gateway:
            address = gateway.event("serving")["address"]  # type: ignore[index]
            codes = ("RESOURCE_EXHAUSTED",)
            async with grpc.aio.insecure_channel(address, options=retrying(*codes)) as own:
                stub: Any = chat_service_pb2_grpc.ChatServiceStub(own)
                began = time.monotonic()
                whole = await stub.Chat(request(), timeout=30)
            await until(lambda: len(calls(gateway)) >= 2)
    assert whole.choices[0].message.content == "hello"
    assert time.monotonic() - began >= 1.5
    assert len(served.asked) == 2
    assert [call["code"] for call in calls(gateway)] == ["RESOURCE_EXHAUSTED", "OK"]
