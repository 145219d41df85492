"""Keys never leave: whatever an upstream echoes, they are in no status, log, record or repr."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from harness import (
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    item_failure,
    provider,
    receive,
    request,
    stream_request,
)
from tokenwire.v1 import chat_service_pb2
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
