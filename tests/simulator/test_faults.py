"""Every fault of the closed list, on the wire."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import uvloop

from tokenwire_service.simulator import Fault, Simulator
from tokenwire_service.simulator.faults import FAULTS, Canned, Directives, Slip, Slow, Strike

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulator.conftest import Client

PAGE = Path(__file__).parents[2] / "docs" / "simulator.md"
TEXT = "one two three four"
CANNED = {
    Fault.INVALID_API_KEY: (401, "invalid_request_error", None, "invalid_api_key"),
    Fault.ACCOUNT_DEACTIVATED: (401, "invalid_request_error", None, "account_deactivated"),
    Fault.ACCESS_DENIED: (403, "request_forbidden", None, "unsupported_country_region_territory"),
    Fault.RATE_LIMITED: (429, "requests", None, "rate_limit_exceeded"),
    Fault.QUOTA_EXHAUSTED: (429, "insufficient_quota", None, "insufficient_quota"),
    Fault.PAYMENT_REQUIRED: (402, "unknown_error", None, "invalid_request_error"),
    Fault.OVERLOADED: (503, "server_error", None, "engine_overloaded"),
    Fault.SERVER_ERROR: (500, "server_error", None, None),
    Fault.CONTEXT_LENGTH_EXCEEDED: (
        400,
        "invalid_request_error",
        "messages",
        "context_length_exceeded",
    ),
    Fault.CONTENT_FILTER: (400, None, "prompt", "content_filter"),
    Fault.MODEL_NOT_FOUND: (404, "invalid_request_error", None, "model_not_found"),
    Fault.BAD_REQUEST: (400, "invalid_request_error", "temperature", "unsupported_value"),
    Fault.REQUEST_TOO_LARGE: (413, "invalid_request_error", None, "request_too_large"),
}


def faulty(fault: Fault, **more: Any) -> dict[str, Any]:
    return {"simulate": {"fault": fault, "text": TEXT} | more}


def test_every_fault_has_its_row() -> None:
    assert set(FAULTS) == set(Fault)
    json_errors = {f for f, row in FAULTS.items() if isinstance(row, Canned) and row.error}
    assert json_errors == set(CANNED)


def test_every_fault_has_its_case_below() -> None:
    text = Path(__file__).read_text()
    for fault, row in FAULTS.items():
        assert isinstance(row, Canned | Strike | Slip | Slow)
        assert text.count(f"Fault.{fault.name}") > 0, fault


def test_the_page_tells_every_fault_and_field() -> None:
    page = PAGE.read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page.split("## Faults")[1], re.MULTILINE)
    assert rows == [(fault.value, row.about) for fault, row in FAULTS.items()]
    fields = re.findall(r"^\| `(\w+)` \| ", page.split("## Faults")[0], re.MULTILINE)
    assert set(fields) == set(Directives.__struct_fields__)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", CANNED)
async def test_error_answers(client: Client, fault: Fault, stream: bool) -> None:
    reply = await client.ask(stream=stream, **faulty(fault))
    assert reply.headers["content-type"] == "application/json"
    error = reply.error
    told = (reply.status, error["type"], error["param"], error["code"])
    assert told == CANNED[fault]
    assert error["message"]
    assert "{" not in error["message"]
    assert "key-aaaa" not in reply.raw.decode()
    assert client.simulator.stats.by_fault == {fault.value: 1}
    if fault is Fault.CONTENT_FILTER:
        assert error["innererror"]["content_filter_result"]["violence"]["filtered"] is True


async def test_delays_that_errors_tell(client: Client) -> None:
    limited = await client.ask(**faulty(Fault.RATE_LIMITED))
    assert limited.headers["retry-after"] == "1"
    assert limited.headers["retry-after-ms"] == "1000"
    assert limited.headers["x-ratelimit-remaining-requests"] == "0"
    limited = await client.ask(**faulty(Fault.RATE_LIMITED, retry_after_s=0.25))
    assert limited.headers["retry-after"] == "1"
    assert limited.headers["retry-after-ms"] == "250"
    assert limited.headers["x-ratelimit-reset-requests"] == "250ms"
    assert "try again in 250ms" in limited.error["message"]
    limited = await client.ask(**faulty(Fault.RATE_LIMITED, retry_after_s=90))
    assert limited.headers["x-ratelimit-reset-requests"] == "90s"
    assert "retry-after" not in (await client.ask(**faulty(Fault.OVERLOADED))).headers
    full = await client.ask(**faulty(Fault.OVERLOADED, retry_after_s=3))
    assert full.headers["retry-after"] == "3"


async def test_keys_in_errors_are_masked(client: Client) -> None:
    body = client.body(**faulty(Fault.INVALID_API_KEY))
    reply = await client.send(body, key="sk-something-secret-wxyz")
    assert "********wxyz" in reply.error["message"]
    assert "secret" not in reply.raw.decode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "status"), [(Fault.BAD_GATEWAY, 502), (Fault.HTML, 200)])
async def test_html(client: Client, fault: Fault, status: int, stream: bool) -> None:
    reply = await client.ask(stream=stream, **faulty(fault))
    assert (reply.status, reply.headers["content-type"]) == (status, "text/html")
    assert reply.raw.startswith(b"<!DOCTYPE html>")


async def test_empty_body(client: Client) -> None:
    for stream, kind in ((False, "application/json"), (True, "text/event-stream; charset=utf-8")):
        reply = await client.ask(stream=stream, **faulty(Fault.EMPTY_BODY))
        assert (reply.status, reply.headers["content-type"], reply.raw) == (200, kind, b"")


async def test_redirect(client: Client) -> None:
    body = client.body(**faulty(Fault.REDIRECT))
    async with client.post(body) as response:
        assert response.status == 307
        target = response.headers["location"]
    assert client.simulator.stats.redirects_followed == 0
    client.base_url = client.base_url.removesuffix("/v1")
    assert (await client.send(body, path=target)).status == 404
    assert client.simulator.stats.redirects_followed == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_stalls(client: Client, stream: bool) -> None:
    stats = client.simulator.stats

    async def stalled(fault: Fault) -> bytes | None:
        """What came before the silence; None when not even headers did."""
        got = bytearray()

        async def read() -> None:
            async with client.post(client.body(stream=stream, **faulty(fault))) as response:
                headers.set()
                async for data in response.content.iter_any():
                    got.extend(data)

        headers = asyncio.Event()
        aborted = stats.aborted_requests
        reading = asyncio.create_task(read())
        await client.until(lambda: stats.open_requests == 1)
        if fault is not Fault.STALL_BEFORE_HEADERS:
            await headers.wait()
        if fault is Fault.STALL_MIDWAY:
            await client.until(lambda: (b" two" if stream else b"chat.completion") in got)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not reading.done()
        reading.cancel()
        await client.until(lambda: stats.open_requests == 0)
        assert stats.aborted_requests == aborted + 1
        return bytes(got) if headers.is_set() else None

    assert await stalled(Fault.STALL_BEFORE_HEADERS) is None
    assert await stalled(Fault.STALL_AFTER_HEADERS) == b""
    part = await stalled(Fault.STALL_MIDWAY)
    assert part is not None
    if stream:
        assert b"three" not in part
        assert b'finish_reason":"' not in part
    else:
        assert b'fp_simulated"}' not in part


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [Fault.RESET_BEFORE_HEADERS, Fault.RESET_MIDWAY])
def test_resets(fault: Fault, stream: bool, loop_factory: Callable[[], Any]) -> None:
    got = bytearray()

    async def drain(reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            got.extend(data)

    async def read() -> None:
        simulator = Simulator(tokens_per_second=0)
        async with simulator.serving() as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
            message = {"role": "user", "content": "hi"}
            body = {"model": "m", "messages": [message], "stream": stream} | faulty(fault)
            raw = json.dumps(body).encode()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
            )
            with pytest.raises(ConnectionResetError):
                await drain(reader)
            writer.close()
        assert simulator.stats.aborted_requests == 0, "the client had not left"

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(read())
    if fault is Fault.RESET_BEFORE_HEADERS:
        assert got == b""
    else:
        assert got.startswith(b"HTTP/1.1 200 OK\r\n")
        assert (b" two" if stream else b"chat.completion") in got
        assert b'fp_simulated"}' not in got


async def test_cut(client: Client) -> None:
    reply = await client.ask(stream=True, **faulty(Fault.CUT))
    assert reply.text() == "one two"
    assert all(c["choices"][0]["finish_reason"] is None for c in reply.chunks)
    assert "[DONE]" not in reply.payloads
    for at, text in ((0, ""), (0.25, "one"), (1, TEXT)):
        reply = await client.ask(stream=True, **faulty(Fault.CUT, at=at))
        assert reply.text() == text
        assert all(c["choices"][0]["finish_reason"] is None for c in reply.chunks)
    for at in (0, 0.5, 1):
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.ask(**faulty(Fault.CUT, at=at))
    raw = {"fault": Fault.CUT, "raw_events": ["a", "b"]}
    assert (await client.ask(stream=True, simulate=raw)).raw == b"data: a\n\n"


async def test_error_event(client: Client) -> None:
    reply = await client.ask(stream=True, **faulty(Fault.ERROR_EVENT))
    assert reply.status == 200
    *chunks, error = reply.chunks
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "one two"
    assert error["error"]["type"] == "server_error"
    plain = await client.ask(**faulty(Fault.ERROR_EVENT))
    assert (plain.status, plain.error["type"]) == (200, "server_error")


async def test_garbage_midway(client: Client) -> None:
    reply = await client.ask(stream=True, **faulty(Fault.GARBAGE_MIDWAY))
    garbage = [payload for payload in reply.payloads if payload.startswith("<html>")]
    assert len(garbage) == 1
    assert reply.payloads[3] == garbage[0]
    assert reply.payloads[-1] == "[DONE]"
    plain = await client.ask(**faulty(Fault.GARBAGE_MIDWAY))
    assert b"<html>" in plain.raw
    assert json.loads(plain.raw.replace(garbage[0].encode(), b""))["choices"]


async def test_truncated_json(client: Client) -> None:
    reply = await client.ask(stream=True, **faulty(Fault.TRUNCATED_JSON))
    assert [json.loads(payload)["object"] for payload in reply.payloads[:-1]] == [
        "chat.completion.chunk"
    ] * 3
    for at in (0, 0.5, 1):
        broken = reply.payloads[-1]
        with pytest.raises(json.JSONDecodeError):
            json.loads(broken)
        broken = (await client.ask(**faulty(Fault.TRUNCATED_JSON, at=at))).raw.decode()
        with pytest.raises(json.JSONDecodeError):
            json.loads(broken)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "wire"), [(Fault.LONE_SURROGATE, b"\\ud83d"), (Fault.INVALID_UTF8, b"\xff")]
)
async def test_bytes_that_are_no_text(
    client: Client, fault: Fault, wire: bytes, stream: bool
) -> None:
    reply = await client.ask(stream=stream, **faulty(fault))
    assert reply.raw.count(wire) == 1
    reply.raw = reply.raw.replace(wire, b"")
    text = reply.text() if stream else reply.json["choices"][0]["message"]["content"]
    assert text == TEXT


async def test_slow_sends_single_bytes(client: Client) -> None:
    sizes = []
    async with client.post(client.body(stream=True, **faulty(Fault.SLOW))) as response:
        whole = b""
        async for data, _ in response.content.iter_chunks():
            whole += data
            sizes.append(len(data))
    # Neighbours may be joined on the way, but not all of them.
    assert len(sizes) > 4 * whole.count(b"\n\n")
    assert whole.endswith(b"data: [DONE]\n\n")
    plain = await client.ask(**faulty(Fault.SLOW))
    assert plain.json["choices"][0]["message"]["content"] == TEXT


async def test_a_fault_for_the_first_requests_of_an_id(client: Client) -> None:
    async def status(name: str) -> int:
        limited = faulty(Fault.RATE_LIMITED, times=2, id=name)
        return (await client.ask(**limited)).status

    assert [await status("a") for _ in range(4)] == [429, 429, 200, 200]
    assert [await status("b") for _ in range(3)] == [429, 429, 200]
    assert client.simulator.stats.by_id["a"] == {"requests": 4, "faults": 2}
    assert client.simulator.stats.by_fault == {"rate_limited": 4}
    client.simulator.stats.reset()
    assert await status("a") == 429


async def test_a_fault_for_some_keys(client: Client) -> None:
    body = client.body(**faulty(Fault.INVALID_API_KEY, keys=["bbbb", "c"], times=2, id="x"))
    keys = ["key-aaaa", "key-bbbb", "c", "ccc", "key-bbbb"]
    statuses = [(await client.send(body, key=key)).status for key in keys]
    assert statuses == [200, 401, 401, 200, 200]
    assert client.simulator.stats.by_key == {"aaaa": 1, "bbbb": 2, "c": 1, "ccc": 1}


@pytest.mark.parametrize(
    ("simulate", "expected"),
    [
        ({"fault": "meltdown"}, "Invalid enum value 'meltdown' - at `$.fault`"),
        ({"fault": 3}, "Expected `str | null`, got `int` - at `$.fault`"),
        ({"speed": 3}, "unknown field `speed`"),
        ([], "Expected `object`, got `array`"),
        ({"at": 1.5}, "<= 1.0"),
        ({"times": 0, "id": "a"}, ">= 1"),
        ({"times": 1}, "expected an `id`"),
        ({"keys": ["sk-a-whole-key"]}, "length <= 4"),
        ({"tokens_per_second": -1}, ">= 0"),
        ({"tokens": 1.5}, "Expected `int"),
        ({"chunks": [1]}, "Expected `str`"),
        ({"text": "a", "chunks": ["a"]}, "at most one of tokens, text, chunks, raw_events"),
    ],
)
async def test_a_wrong_simulate(client: Client, simulate: Any, expected: str) -> None:
    reply = await client.ask(simulate=simulate)
    assert reply.status == 400
    assert expected in reply.error["message"]
    assert reply.error["param"] == "simulate"
    if "Fields:" in reply.error["message"]:
        assert all(fault in reply.error["message"] for fault in Fault)
        assert all(field in reply.error["message"] for field in Directives.__struct_fields__)
    else:
        assert "expected" in reply.error["message"]
