"""Keys never leave: whatever an upstream echoes, they are in no status, log, record or repr."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import msgspec
import pytest
from aiohttp import web

from harness import (
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    failure_of,
    item_failure,
    provider,
    raw_provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2, model_service_pb2
from tokenwire_service.cli import _serve_config
from tokenwire_service.config import Config, Key, Retries, Upstream
from tokenwire_service.keyring import KeyRing, Lease
from tokenwire_service.secret import Secret
from tokenwire_service.telemetry import LineFormatter, LogObserver, log_scrubber
from tokenwire_service.upstream.client import UpstreamClient

SECRETS = (
    "sk-proj-Planted0_aVeryLongSecretThatNobodyMayEverSee_0123456789abcdefghijklmnopqrstuvwxyz",
    "sk-proj-Planted1-9876543210zyxwvutsrqponmlkjihgfedcba-ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789ab",
)
# Python and JSON both quote it in another way than it is.
ODD = "sk-Planted2-'single\\back\"double-NobodyMayEverSee"
RECOGNISABLE = ("Planted0", "Planted1", "Planted2", "NobodyMay", "9876543210", "0123456789ab")
QUICK = Retries(max_attempts=2, backoff=0.001, backoff_cap=0.001, budget_floor=1000)


def planted(base_url: str, *secrets: str) -> Upstream:
    """An upstream whose keys are easy to recognise, whole or in part."""
    keys = tuple(
        Key(id=f"k{number}", secret=Secret(text)) for number, text in enumerate(secrets or SECRETS)
    )
    return Upstream(name="test", base_url=base_url, keys=keys, passthrough=True)


def clean(text: str) -> bool:
    return not any(part in text for part in RECOGNISABLE)


@dataclass
class Log:
    """Everything that anyone logs, in every form, at every level."""

    stream: io.StringIO

    @property
    def text(self) -> str:
        return self.stream.getvalue()


@pytest.fixture
def log() -> Iterator[Log]:
    stream = io.StringIO()
    root = logging.getLogger()
    level = root.level
    handlers = []
    for formatter in (LineFormatter(as_json=True), LineFormatter(as_json=False)):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        handlers.append(handler)
        root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield Log(stream)
    root.setLevel(level)
    for handler in handlers:
        root.removeHandler(handler)


def logged(gateway: Stubs) -> None:
    """Writes what was observed as the gateway's own log does."""
    observer = LogObserver(logging.getLogger("tokenwire.test"))
    for attempt in gateway.events.attempts:
        observer.attempt(attempt)
    for call in gateway.events.calls:
        observer.call(call)


def echo_in(place: str, authorization: str) -> dict[str, Any]:
    """An error object that repeats the credential."""
    error = {"message": "no", "type": "t", "code": "c", "param": "p"}
    return {"error": error | {place: f"you sent {authorization}"}}


ECHOES = [
    (status, place)
    for status in (400, 401, 403, 404, 413, 422, 429, 500, 503)
    for place in ("message", "code", "type", "param")
] + [(200, place) for place in ("message", "code", "type", "param")]


@pytest.mark.parametrize(("status", "place"), ECHOES)
async def test_an_error_that_repeats_the_key_gives_it_to_nobody(
    start: Start, log: Log, status: int, place: str
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        body = echo_in(place, asked.headers["authorization"])
        headers = {"x-echo": asked.headers["authorization"], "retry-after": "60"}
        if status == 200 and (await asked.json()).get("stream"):
            response = await event_stream(asked)
            await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")
            return response
        return web.json_response(body, status=status, headers=headers)

    async with provider(answer) as served:
        gateway = await start(planted(served.base_url), retries=QUICK)
        items = chat_service_pb2.BatchChatRequest()
        items.items.add(chat=request())
        failures = [
            await failing(gateway.chat.Chat(request(), timeout=20)),
            await failing(gateway.chat.StreamChat(stream_request(request()), timeout=20)),
            *[item_failure(a) async for a in gateway.chat.BatchChat(items, timeout=20)],
        ]
        assert len(served.asked) >= 1
        assert any(secret in served.asked[0].headers["authorization"] for secret in SECRETS)
    logged(gateway)
    assert all(clean(failure.everything) for failure in failures)
    assert all(clean(str(failure.details)) for failure in failures)
    assert clean(repr(gateway.events.attempts) + repr(gateway.events.calls))
    assert "attempt" in log.text
    assert clean(log.text)


BODIES = {
    "text": "Authorization: {}",
    "text far in": "x" * 70 + " {}",
    "HTML": "<html><body>Debug: {}</body></html>",
    "JSON cut within the key": '{{"error": {{"message": "{}',
    "a JSON list": '["{}"]',
    "no completion": '{{"debug": "{}"}}',
}


@pytest.mark.parametrize("status", [200, 400, 429, 500])
@pytest.mark.parametrize("name", BODIES)
async def test_an_unreadable_answer_that_repeats_the_key_gives_it_to_nobody(
    start: Start, log: Log, name: str, status: int
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        text = BODIES[name].format(asked.headers["authorization"])
        if (await asked.json()).get("stream") and status == 200:
            return web.Response(text=f"data: {text}\n\n", content_type="text/event-stream")
        kind = "text/html" if name == "HTML" else "application/json"
        return web.Response(text=text, status=status, content_type=kind)

    async with provider(answer) as served:
        gateway = await start(planted(served.base_url), retries=QUICK)
        plain = await failing(gateway.chat.Chat(request(), timeout=0.9))
        streamed = await failing(gateway.chat.StreamChat(stream_request(request()), timeout=0.9))
    logged(gateway)
    assert clean(plain.everything + str(plain.details))
    assert clean(streamed.everything + str(streamed.details))
    assert clean(log.text)


async def test_an_error_within_a_stream_that_repeats_the_key_gives_it_to_nobody(
    start: Start, log: Log
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("a beginning"))
        body = echo_in("message", asked.headers["authorization"])
        await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        return response

    async with provider(answer) as served:
        gateway = await start(planted(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    logged(gateway)
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    assert clean(received.failure.everything + str(received.failure.details))
    assert clean(log.text)


# How an upstream may quote what it was sent, and what of that nobody may see.
QUOTED: dict[str, Callable[[str], str]] = {
    "as it is": lambda key: key,
    "JSON within JSON": lambda key: json.dumps({"authorization": f"Bearer {key}"}),
    "URL": lambda key: f"https://x/?key={urllib.parse.quote(key, safe='')}&a=b",
    "base64, basic": lambda key: base64.b64encode(f"user:{key}".encode()).decode(),
    "base64, bearer": lambda key: base64.urlsafe_b64encode(f"Bearer {key}\n".encode()).decode(),
    "Python": lambda key: repr({"key": key}),
    "cut off": lambda key: f"{key[:40]}...",
}


def unseen(quoted: str, text: str) -> bool:
    """Whether a text shows nothing of a quoted key, but perhaps the characters at its ends that
    hold bits of what stands beside it."""
    inner = quoted[len(quoted) // 3 : 2 * len(quoted) // 3]
    return clean(text) and inner not in text


@pytest.mark.parametrize("place", ["message", "code", "type", "param"])
@pytest.mark.parametrize("how", QUOTED)
@pytest.mark.parametrize("status", [200, 400, 404, 500])
async def test_a_key_in_disguise_is_given_to_nobody(
    start: Start, log: Log, status: int, how: str, place: str
) -> None:
    said: list[str] = []

    async def answer(asked: web.Request) -> web.StreamResponse:
        key = asked.headers["authorization"].removeprefix("Bearer ")
        said.append(QUOTED[how](key))
        body = {"error": {"message": "no", "code": "c"} | {place: said[-1]}}
        if status == 200 and (await asked.json()).get("stream"):
            events = b"event: error\ndata: " + json.dumps(body).encode() + b"\n\n"
            return web.Response(body=events, content_type="text/event-stream")
        return web.json_response(body, status=status)

    async with provider(answer) as served:
        gateway = await start(planted(served.base_url, *SECRETS, ODD), retries=QUICK)
        for _ in range(3):  # each key has its turn
            failures = [
                await failing(gateway.chat.Chat(request(), timeout=20)),
                await failing(gateway.chat.StreamChat(stream_request(request()), timeout=20)),
            ]
            for failure in failures:
                told = failure.everything + str(failure.details) + failure.message
                assert all(unseen(quoted, told) for quoted in said)
    logged(gateway)
    records = repr(gateway.events.attempts) + repr(gateway.events.calls) + log.text
    assert all(unseen(quoted, records) for quoted in said)


PARTS: dict[str, Callable[[str], list[bytes]]] = {
    "two writes": lambda key: [
        b'data: {"error": {"message": "' + key[:20].encode(),
        key[20:].encode() + b'"}}\n\n',
    ],
    "two lines of one event": lambda key: [
        b'data: {"error": {"message": "' + key[:20].encode() + b"\ndata: ",
        key[20:].encode() + b'"}}\n\n',
    ],
    "two events": lambda key: [
        b'data: {"error": {"message": "' + key[:20].encode() + b'"}}\n\n',
        b'data: {"error": {"message": "' + key[20:].encode() + b'"}}\n\n',
    ],
    "the field that llama.cpp has": lambda key: [
        b'error: {"code": 500, "message": "' + key.encode() + b'"}\n\n'
    ],
    "an id, an event name and a comment": lambda key: [
        f": {key}\nid: {key}\nevent: {key}\ndata: {key}\n\n".encode()
    ],
}


@pytest.mark.parametrize("begun", [False, True], ids=["before the first text", "after it"])
@pytest.mark.parametrize("how", PARTS)
async def test_a_key_in_pieces_of_a_stream_is_given_to_nobody(
    start: Start, log: Log, how: str, begun: bool
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        if begun:
            await response.write(chunk("a beginning"))
        for part in PARTS[how](asked.headers["authorization"].removeprefix("Bearer ")):
            await response.write(part)
            await asyncio.sleep(0.01)
        return response

    async with provider(answer) as served:
        gateway = await start(planted(served.base_url), retries=QUICK)
        received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=20))
    logged(gateway)
    assert received.failure is not None
    assert clean(received.failure.everything + str(received.failure.details))
    assert clean(repr(gateway.events.attempts) + repr(gateway.events.calls))
    assert clean(log.text)


HEADERS = (
    *("content-type", "retry-after", "retry-after-ms", "x-should-retry", "location"),
    *("x-ratelimit-remaining-requests", "x-ratelimit-reset-tokens", "set-cookie"),
    *("www-authenticate", "server", "x-request-id"),
)


@pytest.mark.parametrize("status", [200, 302, 400, 401, 429, 500])
async def test_a_key_in_the_headers_of_an_answer_is_given_to_nobody(
    start: Start, log: Log, status: int
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = served.asked[-1].headers["authorization"].removeprefix("Bearer ")
        lines = [f"HTTP/1.1 {status} {key}", *(f"{name}: {key}" for name in HEADERS)]
        writer.write("\r\n".join([*lines, "content-length: 0", "", ""]).encode())

    async with raw_provider(answer) as served:
        gateway = await start(planted(served.base_url), retries=QUICK)
        failures = [
            await failing(gateway.chat.Chat(request(), timeout=0.9)),
            await failing(gateway.chat.StreamChat(stream_request(request()), timeout=0.9)),
        ]
        listing = gateway.models.GetModel(model_service_pb2.GetModelRequest(name="m"), timeout=0.9)
        failures.append(await failing(listing))
    logged(gateway)
    assert all(clean(f.everything + str(f.details)) for f in failures)
    assert clean(repr(gateway.events.attempts) + repr(gateway.events.calls) + log.text)


# Answers that make aiohttp raise errors which quote them.
BROKEN_HTTP: dict[str, Callable[[str], str]] = {
    "no status line": lambda key: f"{key} {key}\r\n\r\n",
    "a broken header": lambda key: f"HTTP/1.1 200 OK\r\n{key}\r\n\r\n",
    "a header with a control character": lambda key: f"HTTP/1.1 200 OK\r\nx: {key}\x00\r\n\r\n",
    "a broken length": lambda key: f"HTTP/1.1 200 OK\r\ncontent-length: {key}\r\n\r\n",
    "a broken chunk": lambda key: (
        f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{key}\r\n{key}"
    ),
    "an unknown encoding": lambda key: (
        f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(key)}\r\n\r\n{key}"
    ),
    "too long a header": lambda key: f"HTTP/1.1 200 OK\r\nx: {key * 2000}\r\n\r\n",
}


@pytest.mark.parametrize("how", BROKEN_HTTP)
async def test_a_key_in_what_is_not_http_is_given_to_nobody(
    start: Start, log: Log, how: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = served.asked[-1].headers["authorization"].removeprefix("Bearer ")
        writer.write(BROKEN_HTTP[how](key).encode())

    async with raw_provider(answer) as served:
        gateway = await start(planted(served.base_url), retries=QUICK)
        failures = [
            await failing(gateway.chat.Chat(request(), timeout=20)),
            await failing(gateway.chat.StreamChat(stream_request(request()), timeout=20)),
            await failing(gateway.models.ListModels(model_service_pb2.ListModelsRequest())),
        ]
        assert len(served.asked) >= 3
    logged(gateway)
    assert {failure.code.name for failure in failures} == {"UNAVAILABLE"}
    assert all(clean(f.everything + str(f.details)) for f in failures)
    assert clean(repr(gateway.events.attempts) + repr(gateway.events.calls) + log.text)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
async def test_a_key_in_the_error_of_a_model_list_is_given_to_nobody(
    start: Start, log: Log, status: int
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        key = asked.headers["authorization"]
        return web.json_response(
            {"error": {"message": key, "code": key}, "data": key}, status=status
        )

    async with provider(answer) as served:
        gateway = await start(planted(served.base_url), retries=QUICK)
        told = []
        for call in (
            gateway.models.ListModels(model_service_pb2.ListModelsRequest(), timeout=5),
            gateway.models.GetModel(model_service_pb2.GetModelRequest(name="m"), timeout=5),
        ):
            try:
                told.append(str(await call))
            except grpc.aio.AioRpcError as error:
                told.append(failure_of(error).everything)
        assert served.asked
    logged(gateway)
    assert len(told) == 2
    assert clean("".join(told))
    assert clean(repr(gateway.events.attempts) + repr(gateway.events.calls) + log.text)


async def test_an_organization_is_told_to_no_caller(start: Start, log: Log) -> None:
    """It is no secret, but the operator's business."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        said = f"no such project in {asked.headers['openai-organization']}"
        return web.json_response({"error": {"message": said, "param": said}}, status=400)

    async with provider(answer) as served:
        keys = (
            Key(id="own", secret=Secret(SECRETS[0]), organization="org-NobodyMayKnow1"),
            Key(id="any", secret=Secret(SECRETS[1])),
        )
        gateway = await start(
            Upstream(
                name="test",
                base_url=served.base_url,
                keys=keys,
                organizations=("org-NobodyMayKnow2",),
                passthrough=True,
            )
        )
        failures = [await failing(gateway.chat.Chat(request())) for _ in keys]
        sent = {asked.headers["openai-organization"] for asked in served.asked}
        assert sent == {"org-NobodyMayKnow1", "org-NobodyMayKnow2"}
    logged(gateway)
    assert all("no such project in ***" in failure.message for failure in failures)
    assert all(clean(failure.everything) for failure in failures)
    assert clean(repr(gateway.events.attempts) + repr(gateway.events.calls) + log.text)


async def test_an_organization_of_the_configuration_before_is_told_to_nobody_either(
    start: Start,
) -> None:
    go_on = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        await go_on.wait()
        said = f"no such project in {asked.headers['openai-organization']}"
        return web.json_response({"error": {"message": said}}, status=400)

    async with provider(answer) as served:
        before = upstream(served.base_url, organizations=("org-NobodyMayKnow1",))
        gateway = await start(before)
        failing_call = asyncio.ensure_future(failing(gateway.chat.Chat(request())))
        await until(lambda: len(served.asked) == 1)
        live = gateway.running.live
        after = msgspec.structs.replace(before, organizations=("org-AnotherOneSince",))
        taken = live.take(msgspec.structs.replace(live.config, upstreams=(after,)))
        go_on.set()
        failure = await failing_call
        assert "no such project in ***" in failure.message
        assert clean(failure.everything)
        for client in taken.left:
            await client.close()


async def test_the_trail_of_attempts_names_keys_by_their_ids(start: Start, log: Log) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if len(served.asked) == 1:
            return web.json_response(echo_in("message", "x"), status=429)
        return completion()

    async with provider(answer) as served:
        gateway = await start(planted(served.base_url))
        call = gateway.chat.Chat(request())
        whole = await call
        trailers = dict(await call.trailing_metadata())
    assert [attempt.key_id for attempt in whole.header.attempts] == ["k0", "k1"]
    logged(gateway)
    assert clean(str(whole) + repr(trailers) + log.text)


async def test_a_defect_whose_text_holds_a_key_is_logged_without_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: UpstreamClient, encoded: Any, lease: Lease, progress: Any) -> None:
        raise ValueError(f"bad header {dict(encoded.dialect.headers(lease.key, None))}")

    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    monkeypatch.setattr(UpstreamClient, "fetch", broken)
    stream = io.StringIO()
    handlers = []
    secrets = [Secret(text) for text in (*SECRETS, ODD)]
    for as_json in (True, False):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(LineFormatter(as_json, log_scrubber(secrets)))
        logging.getLogger("tokenwire.test").addHandler(handler)
        handlers.append(handler)
    try:
        async with provider(answer) as served:
            gateway = await start(planted(served.base_url, *SECRETS, ODD))
            for _ in secrets:
                failure = await failing(gateway.chat.Chat(request()))
                assert failure.reason == "INTERNAL"
                assert clean(failure.everything)
    finally:
        for handler in handlers:
            logging.getLogger("tokenwire.test").removeHandler(handler)
    assert "bad header" in stream.getvalue()
    assert "***" in stream.getvalue()
    assert clean(stream.getvalue())


async def test_no_object_shows_a_key_in_its_repr(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    async with provider(answer) as served:
        wanted = planted(served.base_url)
        config = Config(listen="127.0.0.1:0", upstreams=(wanted,))
        gateway = await start(config=config)
        await gateway.chat.Chat(request())
        pool = gateway.running.pools["test"]
        ring = KeyRing(wanted)
        lease = ring.lease("m", 0.0)
        assert isinstance(lease, Lease)
        shown = [config, wanted, wanted.keys, ring, lease, pool, pool.ring, pool.client]
        shown += [gateway.running, gateway.running.gateway]
        for thing in shown:
            assert clean(repr(thing))
            assert clean(str(thing))
            assert clean(f"{thing}")


@pytest.fixture
def loggers_restored() -> Iterator[None]:
    """What `tokenwire serve` sets up lasts as long as its process."""
    names = ("tokenwire", "aiohttp", "asyncio", "grpc")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    yield
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers[:] = handlers
        one.propagate = propagate
        one.setLevel(level)


@pytest.mark.usefixtures("loggers_restored")
async def test_serve_hides_its_keys_from_whoever_logs_below_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serving(
        _config: Config, logger: logging.Logger, _announce: object, **_more: object
    ) -> None:
        logger.error(f"one {SECRETS[0]}")
        logging.getLogger("aiohttp.client").warning(f"two {SECRETS[1]}")
        logging.getLogger("asyncio").error(f"three {SECRETS[0]}")
        logging.getLogger("grpc._cython.cygrpc").error(f"four {SECRETS[1]}")

    monkeypatch.setattr("tokenwire_service.server.serve_until_signalled", serving)
    await _serve_config(Config(upstreams=(planted("http://127.0.0.1:1/v1"),)))
    told = capsys.readouterr().err
    assert [json.loads(line)["event"] for line in told.splitlines()] == [
        "one ***",
        "two ***",
        "three ***",
        "four ***",
    ]


def test_the_helper_sees_a_key_where_there_is_one() -> None:
    """So that the tests above can fail."""
    assert all(not clean(f"... {secret} ...") for secret in (*SECRETS, ODD))
    assert all(not clean(secret[:40]) for secret in SECRETS)
