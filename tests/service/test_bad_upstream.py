"""Upstreams that break the protocol, by accident or to do harm: a clear status, bounded memory,
nothing followed, and never OK for what is not whole."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from harness import (
    Received,
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    raw_provider,
    receive,
    request,
    simulate,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import model_service_pb2
from tokenwire_service.config import Limits, Retries, UpstreamTimeouts
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)
METHODS = ["Chat", "StreamChat"]


def call_of(gateway: Stubs, method: str, **fields: Any) -> Any:
    if method == "Chat":
        return gateway.chat.Chat(request(**fields), timeout=20)
    return gateway.chat.StreamChat(stream_request(request(**fields)), timeout=20)


# --- characters -------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["invalid_utf8", "lone_surrogate"])
async def test_what_is_no_character_becomes_the_replacement_character(
    start: Start, simulator: Simulated, fault: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=simulate(fault=fault, text="one two three four"))
    whole = await gateway.chat.Chat(chat)
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    text = whole.choices[0].message.content
    assert text.count("\ufffd") == 1
    assert text.replace("\ufffd", "") == "one two three four"
    assert received.failure is None
    assert received.text == text


@pytest.mark.parametrize("where", ["content", "reasoning_content", "refusal"])
async def test_a_pair_of_surrogates_split_over_two_events_is_one_character(
    start: Start, where: str
) -> None:
    halves = ["a\\ud83d", "\\ude00b"]

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for half in halves:
            event = f'{{"choices": [{{"index": 0, "delta": {{"{where}": "{half}"}}}}]}}'
            await response.write(b"data: " + event.encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    field = where.removesuffix("_content")
    assert "".join(getattr(delta, field) for delta in received.deltas) == "a\U0001f600b"


async def test_a_character_cut_by_the_network_is_whole_again(start: Start) -> None:
    event = chunk("").replace(b'""', '"你好 \U0001f600"'.encode()) + b"data: [DONE]\n\n"

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for at in range(len(event)):
            await response.write(event[at : at + 1])
            await asyncio.sleep(0)
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.text == "你好 \U0001f600"


async def test_half_a_character_in_a_model_list_is_no_defect(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.Response(body=b'{"data": [{"id": "a\\ud83d"}]}', content_type="application/json")

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
    assert [model.name for model in listed.models] == ["a\ufffd"]


# --- bodies -----------------------------------------------------------------------------

BODIES: dict[str, bytes] = {
    "HTML": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "NaN": b'{"choices": [{"message": {"content": NaN}, "delta": {}}]}',
    "a number of 5,000 digits": b'{"choices": [], "usage": ' + b"9" * 5000 + b"}",
    "nesting of 100,000": b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a NUL": b"\0",
    "a byte order mark alone": b"\xef\xbb\xbf",
    "two documents": b'{"choices": []} {"choices": []}',
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BODIES)
async def test_what_is_no_completion_is_a_protocol_error(
    start: Start, name: str, method: str
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if method == "Chat":
            return web.Response(body=BODIES[name], content_type="application/json")
        return web.Response(
            body=b"data: " + BODIES[name] + b"\n\n", content_type="text/event-stream"
        )

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), retries=QUICK)
        failure = await failing(call_of(gateway, method))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.reason == "UPSTREAM_PROTOCOL_ERROR"
    assert len(served.asked) == 2


ODD: list[Any] = [None, True, -1, 1e308, 10**30, "", "\ud83d", [], [[]], {}, {"a": 1}, [None]]
FULL = {
    "id": "c",
    "created": 1,
    "model": "m",
    "system_fingerprint": "f",
    "service_tier": "t",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "hi",
                "reasoning": "r",
                "refusal": "no",
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "i",
                        "type": "function",
                        "function": {"name": "n", "arguments": "{}"},
                    },
                    {"id": "i", "type": "custom", "custom": {"name": "n", "input": "x"}},
                ],
                "annotations": [
                    {"url_citation": {"start_index": 1, "end_index": 2, "url": "u", "title": "t"}}
                ],
            },
            "finish_reason": "stop",
            "finish_details": {"type": "stop"},
            "logprobs": {
                "content": [{"token": "t", "logprob": -1, "bytes": [1], "top_logprobs": [{}]}]
            },
        }
    ],
    "usage": {
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "total_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 1},
    },
    "error": None,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    inside: dict[Any, Any] = value if isinstance(value, dict) else {}
    if isinstance(value, list):
        inside = dict(enumerate(value))
    for key, inner in inside.items():
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


@pytest.mark.parametrize("method", METHODS)
async def test_no_odd_value_anywhere_in_an_answer_is_a_defect_here(
    start: Start, method: str
) -> None:
    full = json.loads(json.dumps(FULL).replace("message", "delta")) if method != "Chat" else FULL
    bodies = [json.dumps(replaced(full, path, odd)) for path in places(full) for odd in ODD]
    waiting = iter(bodies)

    async def answer(asked: web.Request) -> web.StreamResponse:
        body = next(waiting).encode()
        if method == "Chat":
            return web.Response(body=body, content_type="application/json")
        return web.Response(
            body=b"data: " + body + b"\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        )

    once = Retries(max_attempts=1)
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=1), retries=once)
        for _ in bodies:
            if method == "Chat":
                await asyncio.gather(gateway.chat.Chat(request()), return_exceptions=True)
            else:
                await receive(gateway.chat.StreamChat(stream_request(request())))
        ends = [(call.code, body) for call, body in zip(gateway.events.calls, bodies, strict=True)]
    assert len(served.asked) == len(bodies) > 500
    assert [end for end in ends if end[0] not in ("OK", "UNAVAILABLE")] == []
    assert {code for code, _ in ends} == {"OK", "UNAVAILABLE"}


# --- sizes ------------------------------------------------------------------------------


@contextmanager
def memory_bounded(mebibytes: int) -> Iterator[None]:
    """Insists that this process does not grow beyond so much more than it holds now."""
    reset = Path("/proc/self/clear_refs")
    if os.access(reset, os.W_OK):
        reset.write_text("5")  # forgets the peak
    before = _peak_kib()
    yield
    assert (_peak_kib() - before) / 1024 < mebibytes


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def bomb(byte: bytes) -> bytes:
    """About a megabyte of gzip that unpacks to a gibibyte of one byte."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = byte * 2**20
    first = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush a block does not depend on what came before: it may be repeated.
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + again * 1023


@pytest.mark.parametrize(
    ("method", "status", "byte", "reason"),
    [
        ("Chat", 200, b" ", "UPSTREAM_PROTOCOL_ERROR"),
        ("StreamChat", 200, b"x", "UPSTREAM_PROTOCOL_ERROR"),  # one line without an end
        ("StreamChat", 200, b"\n", "UPSTREAM_PROTOCOL_ERROR"),  # lines without an event
        ("Chat", 400, b"x", "INVALID_REQUEST"),
        ("Chat", 500, b"x", "UPSTREAM_ERROR"),
    ],
)
async def test_a_megabyte_that_unpacks_to_a_gibibyte_is_not_unpacked(
    start: Start, method: str, status: int, byte: bytes, reason: str
) -> None:
    packed = bomb(byte)
    assert len(packed) < 2 << 20

    async def answer(asked: web.Request) -> web.StreamResponse:
        kind = "application/json" if method == "Chat" else "text/event-stream"
        headers = {"content-type": kind, "content-encoding": "gzip"}
        return web.Response(status=status, body=packed, headers=headers)

    once = Retries(max_attempts=1)
    limits = Limits(upstream_answer_bytes=8 << 20)
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=1), retries=once, limits=limits)
        with memory_bounded(128):
            failure = await failing(call_of(gateway, method))
    assert failure.reason == reason


@pytest.mark.parametrize("method", METHODS)
async def test_broken_compression_is_a_protocol_error(start: Start, method: str) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.Response(body=b"not gzip at all", headers={"content-encoding": "gzip"})

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), retries=QUICK)
        failure = await failing(call_of(gateway, method))
    assert failure.reason == "UPSTREAM_PROTOCOL_ERROR"


async def forever(asked: web.Request, piece: bytes, kind: str) -> web.StreamResponse:
    """Writes pieces until the other side has enough."""
    response = web.StreamResponse(headers={"content-type": kind})
    await response.prepare(asked)
    while True:
        await response.write(piece)


SMALL = Limits(upstream_answer_bytes=2**18, upstream_event_bytes=2**16)


@pytest.mark.parametrize(
    ("method", "piece"),
    [
        ("Chat", b" " * 4096),
        ("Chat", b'{"choices": [' + b"1," * 2000),
        ("StreamChat", b"data: " + b"x" * 4096),  # a line without an end
        ("StreamChat", b"data: x\n" * 500),  # an event without an end
        ("StreamChat", b": comment\n\n" * 400),
        ("StreamChat", b'data: {"choices": []}\n\n' * 200),  # events without text
    ],
)
async def test_an_answer_without_an_end_is_given_up(
    start: Start, method: str, piece: bytes
) -> None:
    kind = "application/json" if method == "Chat" else "text/event-stream"

    async def answer(asked: web.Request) -> web.StreamResponse:
        return await forever(asked, piece, kind)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), retries=QUICK, limits=SMALL)
        with memory_bounded(64):
            failure = await failing(call_of(gateway, method))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == "UPSTREAM_PROTOCOL_ERROR"
        assert len(served.asked) == 2
        await until(lambda: served.open == 0)


async def test_a_long_stream_is_not_a_large_one(start: Start) -> None:
    piece = "x" * 4096

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        for _ in range(200):  # 800 KiB of text and as much of comments, above every limit below
            for event in (b":" + piece.encode() + b"\n", chunk(piece)):
                await response.write(event)
                await asyncio.sleep(0.001)  # so that they come apart
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), limits=SMALL)
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is None, received.failure.message
    assert received.text == piece * 200


# --- HTTP -------------------------------------------------------------------------------


def repeated(head: bytes, piece: bytes, pause: float = 0.0) -> Callable[..., Any]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


def once(data: bytes) -> Callable[..., Any]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return answer


OK = b"HTTP/1.1 200 OK\r\n"
WIRE: dict[str, tuple[Callable[..., Any], str]] = {
    "a header without an end": (repeated(OK + b"x-long: ", b"x" * 4096), "UPSTREAM_PROTOCOL_ERROR"),
    "headers without an end": (repeated(OK, b"x-header: 1\r\n" * 100), "UPSTREAM_PROTOCOL_ERROR"),
    "a status line without an end": (
        repeated(b"HTTP/1.1 200 ", b"x" * 4096),
        "UPSTREAM_PROTOCOL_ERROR",
    ),
    "no HTTP": (once(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "UPSTREAM_PROTOCOL_ERROR"),
    "TLS": (once(b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n"), "UPSTREAM_PROTOCOL_ERROR"),
    "a negative length": (
        once(OK + b"content-length: -5\r\n\r\nhello"),
        "UPSTREAM_PROTOCOL_ERROR",
    ),
    "two lengths": (
        once(OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!"),
        "UPSTREAM_PROTOCOL_ERROR",
    ),
    "a line break in a header": (
        once(OK + b"x-a: 1\n\n2\r\ncontent-length: 0\r\n\r\n"),
        "UPSTREAM_PROTOCOL_ERROR",
    ),
    "a broken chunk": (
        once(OK + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n"),
        "UPSTREAM_PROTOCOL_ERROR",
    ),
    "a chunk without an end": (
        once(OK + b"transfer-encoding: chunked\r\n\r\nff\r\nhello"),
        "UPSTREAM_ERROR",
    ),
    "nothing": (once(b""), "UPSTREAM_ERROR"),
    "half a status line": (once(b"HTTP/1.1 20"), "UPSTREAM_ERROR"),
    "interim answers without an end": (
        repeated(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.005),
        "UPSTREAM_TIMEOUT",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WIRE)
async def test_what_is_no_http_is_told_as_what_it_is(start: Start, name: str, method: str) -> None:
    answer, reason = WIRE[name]
    async with raw_provider(answer) as served:
        wanted = upstream(served.base_url, timeouts=UpstreamTimeouts(first_byte=0.3))
        gateway = await start(wanted, retries=QUICK)
        with memory_bounded(64):
            failure = await failing(call_of(gateway, method))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == reason, failure.message
        assert 2 <= len(served.asked) <= 3
        await until(lambda: served.open == 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", METHODS)
async def test_a_redirect_is_refused_and_neither_key_nor_prompt_sent_on(
    start: Start, status: int, method: str
) -> None:
    async def thief(asked: web.Request) -> web.StreamResponse:
        return completion("mine")

    async with provider(thief) as elsewhere:

        async def answer(asked: web.Request) -> web.StreamResponse:
            return web.Response(status=status, headers={"location": elsewhere.base_url})

        async with provider(answer) as served:
            gateway = await start(upstream(served.base_url), retries=QUICK)
            failure = await failing(call_of(gateway, method))
            assert failure.reason == "UPSTREAM_PROTOCOL_ERROR"
            assert failure.metadata["upstreamStatus"] == str(status)
            assert elsewhere.base_url not in failure.everything
            listed = await failing(gateway.models.ListModels(model_service_pb2.ListModelsRequest()))
            assert listed.reason == "UPSTREAM_PROTOCOL_ERROR"
            assert elsewhere.asked == []


async def test_an_error_page_is_quoted_in_one_short_line(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        message = "line one\r\nline two\x1b[31m\x00 " + "\u4f60" * 5000
        return web.json_response({"error": {"message": message, "code": "x" * 500}}, status=400)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        failure = await failing(gateway.chat.Chat(request()))
    assert failure.reason == "INVALID_REQUEST"
    assert "line one line two" in failure.message
    assert failure.message.isprintable()
    assert len(failure.message) <= 300
    assert len(failure.metadata["upstreamCode"]) <= 64


async def test_after_every_kind_of_harm_the_gateway_serves(
    start: Start, simulator: Simulated
) -> None:
    """One gateway, one upstream, all faults at once, and good calls in between."""
    timeouts = UpstreamTimeouts(first_byte=0.2, idle=0.2)
    gateway = await start(upstream(simulator[1], timeouts=timeouts), retries=QUICK)
    faults = ["html", "cut", "reset_midway", "truncated_json", "invalid_utf8", "bad_gateway"]
    faults += ["stall_midway", "garbage_midway", "reset_before_headers", "error_event"]

    async def good(number: int) -> str:
        chat = request(extra_body_json=simulate(text=f"good {number}"))
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
        assert received.failure is None
        return received.text

    async def bad(fault: str) -> Received:
        chat = request("Tell me a story", extra_body_json=simulate(fault=fault))
        return await receive(gateway.chat.StreamChat(stream_request(chat)))

    harm = asyncio.gather(*(bad(fault) for fault in faults * 3))
    texts = await asyncio.gather(*map(good, range(30)))
    assert texts == [f"good {number}" for number in range(30)]
    assert all(r.failure is not None or "\ufffd" in r.text for r in await harm)


@pytest.mark.parametrize(
    ("dialect", "said", "reason"),
    [
        ("internlm", {"code": -20003, "msg": "too long"}, "CONTEXT_LENGTH_EXCEEDED"),
        ("openai", {"error": {"code": "insufficient_quota"}}, "UPSTREAM_QUOTA_EXHAUSTED"),
    ],
)
async def test_a_stream_is_refused_by_a_whole_json_answer(
    start: Start, dialect: str, said: dict[str, Any], reason: str
) -> None:
    """InternLM answers so: what it says is not lost for being no event stream."""

    async def answer(_asked: web.Request) -> web.StreamResponse:
        return web.json_response(said)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=1, dialect=dialect))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        assert received.failure is not None
        assert received.failure.reason == reason
        assert len(served.asked) == 1


async def test_a_whole_answer_to_a_stream_is_no_answer(start: Start) -> None:
    async with provider(lambda _asked: _completed()) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        assert received.failure is not None
        assert received.failure.reason == "UPSTREAM_PROTOCOL_ERROR"
        assert "a whole answer, where a stream was asked for" in received.failure.message


async def _completed() -> web.Response:
    return completion("hello")


async def test_events_that_call_themselves_json_are_events(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(asked)
        await response.write(b"\n\n")
        await asyncio.sleep(0.05)
        await response.write(chunk("hel"))
        await asyncio.sleep(0.05)
        await response.write(chunk("lo", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        assert received.failure is None
        assert received.text == "hello"


async def test_blanks_that_call_themselves_json_are_no_text(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(asked)
        while True:
            await response.write(b"\n")
            await asyncio.sleep(0.02)

    async with provider(answer) as served:
        timeouts = UpstreamTimeouts(first_byte=0.3, idle=10.0)
        there = upstream(served.base_url, timeouts=timeouts)
        gateway = await start(there, retries=Retries(max_attempts=1))
        received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=30))
        assert received.failure is not None
        assert received.failure.reason == "UPSTREAM_TIMEOUT"
        assert received.failure.metadata["timer"] == "first_byte"
