"""F12, F21, F22, F23: deadlines, wall clocks, a blocked event loop, silence that clients ping."""

from __future__ import annotations

import asyncio
import email.utils
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from harness import (
    Start,
    Stubs,
    chunk,
    event_stream,
    provider,
    receive,
    request,
    simulate,
    stream_request,
    until,
    upstream,
)
from processes import begun, run, serve, write_config
from tokenwire.v1 import chat_service_pb2_grpc
from tokenwire_service.config import Retries, Timeouts, UpstreamTimeouts

ONCE = Retries(max_attempts=1)


@asynccontextmanager
async def simulator_apart() -> AsyncIterator[str]:
    """The base URL of a simulator that goes on while this process is held up."""
    async with run("simulate", "--listen", "127.0.0.1:0", "--tokens-per-second", "0") as program:
        await until(lambda: program.out != "")
        yield program.out.split()[3]


# --- F22 --------------------------------------------------------------------------------

BLOCK = 2.0  # seconds


async def blocked_while(gateway: Stubs, method: str, count: int, tokens: int = 40) -> list[str]:
    """Holds the loop up in the middle of `count` calls; how they ended."""
    # 40 words take two seconds: the last of them comes while nobody looks.
    pace = simulate(tokens=tokens, tokens_per_second=20, first_token_ms=0)
    chat = request("Tell me a story", extra_body_json=pace)

    async def one() -> None:
        if method == "Chat":
            await gateway.chat.Chat(chat)
        else:
            received = await receive(gateway.chat.StreamChat(stream_request(chat)))
            assert received.failure is None, received.failure.message

    calls = [asyncio.ensure_future(one()) for _ in range(count)]
    await until(lambda: gateway.running.leases == count)
    await asyncio.sleep(0.3)
    time.sleep(BLOCK)
    await asyncio.gather(*calls)
    return [attempt.fault for attempt in gateway.events.attempts]


async def test_f22_what_came_while_the_loop_was_blocked_is_no_silence(start: Start) -> None:
    async with simulator_apart() as base_url:
        timeouts = UpstreamTimeouts(first_byte=1.0, idle=1.0)
        gateway = await start(
            upstream(base_url, timeouts=timeouts), retries=ONCE, timeouts=Timeouts(write=1.0)
        )
        faults = await blocked_while(gateway, "StreamChat", 20)
    assert faults == [""] * 20


async def test_f22_nor_is_a_plain_answer_that_came_meanwhile_late(start: Start) -> None:
    async with simulator_apart() as base_url:
        timeouts = UpstreamTimeouts(first_byte=1.0, idle=1.0)
        gateway = await start(upstream(base_url, timeouts=timeouts), retries=ONCE)
        faults = await blocked_while(gateway, "Chat", 20, tokens=16)
    assert faults == [""] * 20


async def test_f22_a_loop_that_is_never_blocked_still_ends_silence(start: Start) -> None:
    async with simulator_apart() as base_url:
        timeouts = UpstreamTimeouts(first_byte=5.0, idle=0.3)
        gateway = await start(upstream(base_url, timeouts=timeouts), retries=ONCE)
        chat = request(extra_body_json=simulate(fault="stall_midway", first_token_ms=0))
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.failure is not None
    assert "silent for 0.3 s" in received.failure.message


# --- F21 --------------------------------------------------------------------------------

# A gateway whose every reading of the wall clock, in Python, is off by what a file says.
_JUMPING = """
import sys, time
from pathlib import Path
offset, real = Path(sys.argv.pop(1)), time.time
def jumping():
    return real() + float(offset.read_text())
time.time, time.time_ns = jumping, lambda: int(jumping() * 1e9)
from tokenwire_service.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("jump", [3600, -3600], ids=["forward", "back"])
async def test_f21_a_jump_of_the_wall_clock_changes_nothing(tmp_path: Path, jump: int) -> None:
    offset = tmp_path / "offset"
    offset.write_text("0")
    limited = False

    async def answer(asked: web.Request) -> web.StreamResponse:
        nonlocal limited
        if limited:
            limited = False
            there = time.time() + jump  # the provider's own time
            dates = {
                "retry-after": email.utils.formatdate(there + 2, usegmt=True),
                "date": email.utils.formatdate(there, usegmt=True),
            }
            return web.json_response({"error": {}}, status=429, headers=dates)
        response = await event_stream(asked)
        for _ in range(10):
            await response.write(chunk("x"))
            await asyncio.sleep(0.1)
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        config = write_config(
            tmp_path, served.base_url, timeouts={"total": "20s"}, log={"format": "json"}
        )
        program = (sys.executable, "-c", _JUMPING, str(offset))
        async with serve("--config", config, program=program, TEST_KEY="sk-test-k1") as gateway:
            # In the middle of a stream.
            stream = await begun(gateway.chat.StreamChat(stream_request(request()), timeout=15))
            offset.write_text(str(jump))
            received = await stream
            assert received.failure is None
            # While the one key cools, as long as a date says: by the provider's own clock.
            offset.write_text("0")
            limited = True
            began = time.monotonic()
            waiting = asyncio.ensure_future(
                receive(gateway.chat.StreamChat(stream_request(request()), timeout=15))
            )
            await until(lambda: gateway.event("attempt") is not None)
            offset.write_text(str(jump))
            received = await waiting
            assert received.failure is None, received.failure.message
            assert [attempt.http_status for attempt in received.header.attempts] == [429, 200]
            assert time.monotonic() - began > 2.9  # the delay, and a second of stream
    logged = [json.loads(line)["time"] for line in gateway.lines if line.startswith("{")]
    assert len({moment[:13] for moment in logged}) > 1  # the clock did jump


# --- F23 --------------------------------------------------------------------------------

# The options of xai-sdk's channels (1.x, client.py), which it sets unless told otherwise.
XAI_SDK: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", 20 << 20),
    ("grpc.max_receive_message_length", 20 << 20),
    ("grpc.enable_retries", 1),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{}],
                        "retryPolicy": {
                            "maxAttempts": 5,
                            "initialBackoff": "0.1s",
                            "maxBackoff": "1s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
XAI_SDK_TIMEOUT = 27 * 60.0  # seconds


async def test_f23_the_options_of_xai_sdk_outlast_a_silent_stream(
    tmp_path: Path, long: bool
) -> None:
    """A server that minds pings sends GOAWAY too_many_pings after the third of them. In CI they
    come every second, which is as often as gRPC sends any, and six of them."""
    silence = 120.0 if long else 6.0  # seconds
    options = [
        (name, value if long or name != "grpc.keepalive_time_ms" else 1000)
        for name, value in XAI_SDK
    ]

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        beginning = (await asked.json())["messages"][0]["content"]
        if beginning != "nothing":
            await response.write(chunk(beginning))
        await asyncio.sleep(silence if len(served.asked) <= 2 else 0)
        await response.write(chunk("the end", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        config = write_config(tmp_path, served.base_url)
        patient = json.loads(Path(config).read_text())
        patient["upstreams"]["test"]["timeouts"] = {"first_byte": "10m", "idle": "10m"}
        Path(config).write_text(json.dumps(patient))
        async with serve("--config", config, TEST_KEY="sk-test-k1") as gateway:
            address = gateway.event("serving")["address"]  # type: ignore[index]
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                stub = chat_service_pb2_grpc.ChatServiceStub(channel)
                wanted = [stream_request(request(text)) for text in ("nothing", "a beginning, ")]
                calls = [stub.StreamChat(each, timeout=XAI_SDK_TIMEOUT) for each in wanted]
                before, after = await asyncio.gather(*map(receive, calls))
                assert before.failure is None, before.failure.message
                assert after.failure is None, after.failure.message
                assert (before.text, after.text) == ("the end", "a beginning, the end")
                # The connection that was silent serves on.
                assert (await receive(stub.StreamChat(wanted[0]))).failure is None
    assert len(served.asked) == 3  # no retry hid a connection that was cut
