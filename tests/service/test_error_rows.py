"""Each row of the table of faults, over real sockets: what it costs the key that met it, what it
costs the request, and what the caller hears in the end.

The rows are those of the design the gateway was built from; docs/errors.md tells the same by the
names of the faults. Each case asks by Chat and by StreamChat, looks at which keys the upstream saw,
and asks again to see which of them are still used.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import msgspec
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
    failure_of,
    provider,
    raw_provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_pb2
from tokenwire_service.config import Caller, Key, Limits, Model, Retries, UpstreamTimeouts
from tokenwire_service.secret import Digest, Secret

Code = grpc.StatusCode

QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)
SECONDS = 20.0  # of a deadline that nothing here should need

INFO = {"ErrorInfo"}
RATE = {"ErrorInfo", "RetryInfo", "QuotaFailure"}

Body = Mapping[str, Any] | Sequence[Any] | bytes
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


# --- upstreams --------------------------------------------------------------------------

HELLO = chunk("hello", finish_reason="stop") + b"data: [DONE]\n\n"


def key_of(asked: web.Request) -> str:
    """The id of the key that a request came with."""
    return asked.headers["authorization"].rpartition("-")[2]


async def good(asked: web.Request) -> web.StreamResponse:
    """The answer of an upstream that is well: plain or as a stream, as it was asked for."""
    if not (await asked.json()).get("stream"):
        return completion()
    return web.Response(body=HELLO, content_type="text/event-stream")


def bad(status: int, body: Body, **headers: str) -> Answer:
    """An answer that fails."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        packed = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if status == 200 and (await asked.json()).get("stream"):
            return web.Response(body=b"data: " + packed + b"\n\n", content_type="text/event-stream")
        fields = {"content-type": "application/json", **fields}
        return web.Response(status=status, body=packed, headers=fields)

    return answer


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


@dataclass
class Row:
    """A gateway in front of one upstream, whose keys fail as `faults` says: key id -> answer, `*`
    for all of them."""

    gateway: Stubs
    served: Provider
    faults: dict[str, Answer]

    @property
    def keys(self) -> list[str]:
        """Those of the requests that the upstream saw, in order."""
        return [a.headers["authorization"].rpartition("-")[2] for a in self.served.asked]

    def forget(self) -> None:
        """Counts requests anew."""
        self.served.asked.clear()


def accounts(*groups: str) -> tuple[Key, ...]:
    """Keys k1, k2, ... of these quota groups."""
    return tuple(
        Key(id=f"k{i}", secret=Secret(f"sk-test-k{i}"), quota_group=group)
        for i, group in enumerate(groups, 1)
    )


@asynccontextmanager
async def row(
    start: Start,
    faults: dict[str, Answer],
    *groups: str,
    models: tuple[Model, ...] = (),
    retries: Retries = QUICK,
    limits: Limits | None = None,
    callers: tuple[Caller, ...] = (),
    **settings: Any,
) -> AsyncIterator[Row]:
    """`groups`: the quota group of each key; two keys of two accounts if not given. Models named
    with the upstream `other` go to a second one, which always answers."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        met = faults.get(key_of(asked)) or faults.get("*") or good
        return await met(asked)

    async with provider(answer) as served, provider(good) as other:
        test = upstream(served.base_url, **{"keys": 2, **settings})
        if groups:
            test = msgspec.structs.replace(test, keys=accounts(*groups))
        second = upstream(other.base_url, keys=1, name="other", passthrough=False)
        gateway = await start(
            test,
            second,
            models=models,
            retries=retries,
            limits=limits or Limits(),
            callers=callers,
        )
        yield Row(gateway, served, faults)


# --- callers ----------------------------------------------------------------------------


class Ask:
    """One call, by Chat or by StreamChat."""

    def __init__(self, method: str) -> None:
        self.method = method

    async def __call__(
        self, of: Row, *, timeout: float = SECONDS, model: str = "m", **fields: Any
    ) -> Failure | list[str]:
        """The failure; or the keys of all attempts, the last of which answered."""
        chat = request(model=model, **fields)
        if self.method == "Chat":
            try:
                whole = await of.gateway.chat.Chat(chat, timeout=timeout)
            except grpc.aio.AioRpcError as raised:
                return failure_of(raised)
            assert whole.choices[0].message.content == "hello"
            return [attempt.key_id for attempt in whole.header.attempts]
        call = of.gateway.chat.StreamChat(stream_request(chat), timeout=timeout)
        received = await receive(call)
        if received.failure is not None:
            assert received.events == [], "something was delivered"
            return received.failure
        assert received.text == "hello"
        return [attempt.key_id for attempt in received.header.attempts]

    async def fails(self, of: Row, **wanted: Any) -> Failure:
        found = await self(of, **wanted)
        assert isinstance(found, Failure), f"answered by {found}"
        assert found.metadata["requestId"] == found.trailers["x-request-id"]
        assert len(found.message) <= 300
        assert "sk-test" not in found.everything
        return found

    async def used(self, of: Row, count: int, model: str = "m") -> set[str]:
        """The keys that so many further calls are answered with, none of which is retried."""
        keys: set[str] = set()
        for _ in range(count):
            answered = await self(of, model=model)
            assert isinstance(answered, list), answered
            assert len(answered) == 1, f"tried {answered}"
            keys.update(answered)
        return keys


@pytest.fixture(params=["Chat", "StreamChat"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return Ask(request.param)


def hears(
    failure: Failure,
    code: Code,
    reason: str,
    details: set[str],
    *,
    requests: int,
    wait: float | None = None,
) -> None:
    """Compares a status. `wait`: seconds that RetryInfo and the pushback should tell, less what has
    passed meanwhile and up to a tenth more; None: a pushback of -1."""
    found = (failure.code, failure.reason, set(failure.details))
    assert found == (code, reason, details), failure.message
    assert failure.metadata["attempts"] == str(requests)
    if wait is None:
        assert failure.pushback == "-1"
    else:
        assert wait - SECONDS < failure.retry_seconds <= 1.1 * wait
        assert abs(int(failure.pushback) - 1000 * failure.retry_seconds) <= 1


# --- rows -------------------------------------------------------------------------------

REJECTED = bad(401, error("Incorrect API key provided", code="invalid_api_key"))


async def test_row_01_a_rejected_key_is_retired_and_another_asked_at_once(
    start: Start, ask: Ask
) -> None:
    async with row(start, {"k1": REJECTED}) as of:
        assert await ask(of) == ["k1", "k2"]
        assert await ask.used(of, 4) == {"k2"}
        assert await ask.used(of, 2, model="other") == {"k2"}, "for every model"
    async with row(start, {"*": bad(400, [error("API key not valid.", code=400)])}) as of:
        failure = await ask.fails(of)
        wanted = (Code.FAILED_PRECONDITION, "UPSTREAM_CREDENTIALS_REJECTED", INFO)
        hears(failure, *wanted, requests=2)
        assert failure.metadata["upstreamStatus"] == "400"
        assert of.keys == ["k1", "k2"]
        hears(await ask.fails(of), *wanted, requests=0)
        assert len(of.keys) == 2, "a retired key was used"


async def test_row_02_a_dead_account_takes_all_of_its_keys_with_it(start: Start, ask: Ask) -> None:
    dead = bad(400, error("restricted", code="organization_restricted"))
    async with row(start, {"k1": dead}, "acme", "acme", "other") as of:
        assert await ask(of) == ["k1", "k3"]
        assert await ask.used(of, 4) == {"k3"}
    async with row(start, {"*": dead}, "acme", "acme", "other") as of:
        failure = await ask.fails(of)
        hears(
            failure,
            Code.FAILED_PRECONDITION,
            "UPSTREAM_CREDENTIALS_REJECTED",
            INFO,
            requests=2,
        )
        assert of.keys == ["k1", "k3"]


async def test_row_03_denied_access_retires_the_key_for_that_model_alone(
    start: Start, ask: Ask
) -> None:
    denied = bad(403, error("no", code="unsupported_country_region_territory"))
    models = (Model(name="safe", upstream="test", fallbacks=("spare",)),)
    models += (Model(name="spare", upstream="other"),)
    faults = {"k1": denied}
    async with row(start, faults, models=models) as of:
        assert await ask(of) == ["k1", "k2"]
        assert await ask.used(of, 4) == {"k2"}
        del faults["k1"]
        assert await ask.used(of, 4, model="m2") == {"k1", "k2"}
        faults["*"] = denied
        assert await ask(of, model="safe") in (["k1", "k2", "k1"], ["k2", "k1", "k1"])
        failure = await ask.fails(of)
        hears(failure, Code.FAILED_PRECONDITION, "UPSTREAM_ACCESS_DENIED", INFO, requests=1)


LIMITED = bad(429, error("slow down", code="rate_limit_exceeded"), retry_after="60")


async def limits_rate(start: Start, ask: Ask, limited: Answer) -> None:
    """What rows 4, 6 and 19 have in common, where the provider asks for a minute."""
    async with row(start, {"k1": limited}, "acme", "other", "acme") as of:
        assert await ask(of) == ["k1", "k2"]
        assert await ask.used(of, 4) == {"k2"}, "k3 shares the limit"
        of.faults.clear()
        assert await ask.used(of, 6, model="m2") == {"k1", "k2", "k3"}, "it is the model's"
    async with row(start, {"*": limited}) as of:
        wanted = (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED", RATE)
        failure = await ask.fails(of)
        hears(failure, *wanted, requests=2, wait=60.0)
        assert of.keys == ["k1", "k2"]
        (violation,) = failure.details["QuotaFailure"].violations
        assert violation.subject == "upstream:test"
        hears(await ask.fails(of), *wanted, requests=0, wait=60.0)
        assert len(of.keys) == 2, "a key was used while it cools"


async def test_row_04_a_rate_limit_cools_the_account_for_the_model(start: Start, ask: Ask) -> None:
    await limits_rate(start, ask, LIMITED)


async def test_row_04_the_soonest_key_is_waited_for_if_the_deadline_allows(
    start: Start, ask: Ask
) -> None:
    async def soon(asked: web.Request) -> web.StreamResponse:
        del of.faults["*"]
        return await bad(429, b"", retry_after_ms="300")(asked)

    async with row(start, {"*": soon}, "acme") as of:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await ask(of) == ["k1", "k1"]
        assert loop.time() - began >= 0.3


async def test_row_05_an_account_without_credit_is_retired_for_every_model(
    start: Start, ask: Ask
) -> None:
    broke = bad(429, error("You exceeded your current quota", code="insufficient_quota"))
    async with row(start, {"k1": broke}, "acme", "acme", "other") as of:
        assert await ask(of) == ["k1", "k3"]
        of.faults.clear()
        assert await ask.used(of, 4) == {"k3"}
        assert await ask.used(of, 2, model="m2") == {"k3"}
    async with row(start, {"*": bad(402, error("Insufficient Balance"))}) as of:
        wanted = (Code.RESOURCE_EXHAUSTED, "UPSTREAM_QUOTA_EXHAUSTED", INFO | {"QuotaFailure"})
        hears(await ask.fails(of), *wanted, requests=2)
        hears(await ask.fails(of), *wanted, requests=0)
        assert of.keys == ["k1", "k2"]


async def test_row_06_a_throttle_under_the_name_of_money_is_a_rate_limit(
    start: Start, ask: Ask
) -> None:
    said = error("You exceeded your current token-limit", code="insufficient_quota")
    await limits_rate(start, ask, bad(429, said, retry_after="60"))


async def test_row_07_what_is_too_large_for_one_account_is_offered_to_another_and_never_waits(
    start: Start, ask: Ask
) -> None:
    said = error("on tokens per min (TPM): Limit 30000, Requested 47000.", code="tokens")
    large = bad(429, said, retry_after="1")
    async with row(start, {"k1": large}) as of:
        assert await ask(of) == ["k1", "k2"]
        of.faults.clear()
        assert await ask.used(of, 4) == {"k1", "k2"}, "no key is to blame"
    async with row(start, {"*": large}, "acme", "acme", "other") as of:
        failure = await ask.fails(of)
        hears(failure, Code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", INFO, requests=2)
        assert of.keys in (["k1", "k3"], ["k3", "k1"]), "each account once"
        of.faults.clear()
        assert await ask.used(of, 6) == {"k1", "k2", "k3"}


async def test_row_08_a_quota_of_a_day_cools_for_an_hour_whatever_the_minute_says(
    start: Start, ask: Ask
) -> None:
    details = [
        {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
        },
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.2s"},
    ]
    spent = bad(429, [error("Quota exceeded", status="RESOURCE_EXHAUSTED", details=details)])
    async with row(start, {"k1": spent}) as of:
        assert await ask(of) == ["k1", "k2"]
        of.faults.clear()
        await asyncio.sleep(0.3)
        assert await ask.used(of, 4) == {"k2"}
        assert await ask.used(of, 4, model="m2") == {"k1", "k2"}
    async with row(start, {"*": spent}) as of:
        wanted = (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED", RATE)
        failure = await ask.fails(of)
        hears(failure, *wanted, requests=2, wait=3600.0)
        assert "of the day" in failure.message
        hears(await ask.fails(of), *wanted, requests=0, wait=3600.0)
        assert of.keys == ["k1", "k2"]


async def test_row_09_a_full_provider_cools_every_key_for_the_model_and_blames_none(
    start: Start, ask: Ask
) -> None:
    full = bad(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Full"}})
    wanted = (Code.UNAVAILABLE, "UPSTREAM_OVERLOADED", {"ErrorInfo", "RetryInfo"})
    models = (Model(name="safe", upstream="test", fallbacks=("spare",)),)
    models += (Model(name="spare", upstream="other"),)
    async with row(start, {"*": full}, models=models) as of:
        hears(await ask.fails(of), *wanted, requests=3)
        of.forget()
        hears(await ask.fails(of, timeout=0.5), *wanted, requests=0, wait=1.0)
        assert of.keys == [], "a full provider was asked again"
        answered = await ask(of, model="safe")
        assert isinstance(answered, list)
        assert len(of.keys) == 3, "as often as for a model without fallbacks"
        of.faults.clear()
        assert await ask.used(of, 4, model="m2") == {"k1", "k2"}
    stated = bad(503, error("busy", code="engine_overloaded"), retry_after="40")
    async with row(start, {"*": stated}) as of:
        hears(await ask.fails(of), *wanted, requests=1, wait=40.0)
        hears(await ask.fails(of), *wanted, requests=0, wait=40.0)
        assert len(of.keys) == 1


async def test_row_10_a_server_error_is_tried_again_and_blames_no_key(
    start: Start, ask: Ask
) -> None:
    wanted = (Code.UNAVAILABLE, "UPSTREAM_ERROR", INFO)
    for status in (500, 502, 504, 520, 524, 408, 409):
        async with row(start, {"*": bad(status, b"")}) as of:
            failure = await ask.fails(of)
            hears(failure, *wanted, requests=3)
            assert failure.metadata["upstreamStatus"] == str(status)
            assert len(of.keys) == 3
            of.faults.clear()
            assert await ask.used(of, 4) == {"k1", "k2"}


async def test_row_10_the_breaker_counts_server_errors(start: Start, ask: Ask) -> None:
    async with row(start, {"*": bad(500, b"")}) as of:
        for _ in range(4):
            await ask.fails(of)
        of.forget()
        hears(await ask.fails(of), Code.UNAVAILABLE, "UPSTREAM_ERROR", INFO, requests=0)
        assert of.keys == []


async def test_row_11_an_unreachable_upstream_is_tried_again_and_blames_no_key(
    start: Start, ask: Ask
) -> None:
    with socket.socket() as taken:  # bound, and not yet listening
        taken.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        gateway = await start(upstream(base_url), retries=QUICK)
        of = Row(gateway, Provider(), {})
        failure = await ask.fails(of)
        hears(failure, Code.UNAVAILABLE, "UPSTREAM_UNREACHABLE", INFO, requests=3)
        assert "upstreamStatus" not in failure.metadata
        app = web.Application()
        app.router.add_post("/v1/chat/completions", good)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, taken).start()
        assert await ask.used(of, 4) == {"k1", "k2"}
        await runner.cleanup()


async def test_row_12_a_connection_that_died_while_idle_costs_neither_attempt_nor_retry(
    start: Start, ask: Ask
) -> None:
    plain = completion().body
    assert isinstance(plain, bytes)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streamed = bool(served.asked[-1].body.get("stream"))
        body, kind = (HELLO, b"text/event-stream") if streamed else (plain, b"application/json")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % (kind, len(body)) + body)
        await reader.readuntil(b"\r\n\r\n")  # the second request on this connection is its end

    async with raw_provider(answer) as served:
        retries = Retries(max_attempts=1, budget=0, budget_floor=0)
        gateway = await start(upstream(served.base_url), retries=retries)
        of = Row(gateway, served, {})
        assert await ask(of) == ["k1"]
        answered = await ask(of)
        assert isinstance(answered, list)
        assert len(answered) == 2
        assert len(served.asked) == 2, "those that were answered"
        unanswered = gateway.events.attempts[1]
        assert (unanswered.fault, unanswered.reused_connection) == ("stale_connection", True)


async def test_row_12_where_one_idle_connection_died_a_fresh_one_is_made(
    start: Start, ask: Ask
) -> None:
    """After a restart of the upstream all of them have: another of them is no second try."""
    together = 3
    everyone = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(served.asked) == together:
            everyone.set()
        await everyone.wait()  # so that each has a connection of its own
        body, kind = completion().body, b"application/json"
        if served.asked[-1].body.get("stream"):
            body, kind = HELLO, b"text/event-stream"
        assert isinstance(body, bytes)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % (kind, len(body)) + body)
        await reader.readuntil(b"\r\n\r\n")  # the second request on each connection is its end

    async with raw_provider(answer) as served:
        retries = Retries(max_attempts=1, budget=0, budget_floor=0)
        gateway = await start(upstream(served.base_url), retries=retries)
        of = Row(gateway, served, {})
        await asyncio.gather(*(ask(of) for _ in range(together)))
        answered = await ask(of)
        assert isinstance(answered, list)
        assert len(answered) == 2
        reused = [event.reused_connection for event in gateway.events.attempts]
        assert reused == [False] * together + [True, False]


async def silent(asked: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("nobody hung up")


async def test_row_13_a_silent_upstream_is_asked_once_more(start: Start, ask: Ask) -> None:
    timeouts = UpstreamTimeouts(first_byte=0.3)
    async with row(start, {"*": silent}, timeouts=timeouts) as of:
        failure = await ask.fails(of)
        hears(failure, Code.UNAVAILABLE, "UPSTREAM_TIMEOUT", INFO, requests=2)
        assert failure.metadata["timer"] == "first_byte"
        of.faults.clear()
        assert await ask.used(of, 4) == {"k1", "k2"}


async def test_row_13_deadline_exceeded_is_only_the_callers_own(start: Start, ask: Ask) -> None:
    async with row(start, {"*": silent}) as of:
        failure = await ask(of, timeout=0.5)
        assert isinstance(failure, Failure)
        assert failure.code is Code.DEADLINE_EXCEEDED  # the caller's own library may say so first
        await until(lambda: of.served.open == 0)
        of.faults.clear()
        assert await ask.used(of, 4) == {"k1", "k2"}


async def refuses(
    start: Start, ask: Ask, refusal: Answer, wanted: tuple[Code, str, set[str]]
) -> Failure:
    """What rows 14, 15 and 17 have in common: one request, no key to blame."""
    async with row(start, {"*": refusal}) as of:
        failure = await ask.fails(of)
        hears(failure, *wanted, requests=1)
        assert of.keys == ["k1"]
        of.faults.clear()
        assert await ask.used(of, 4) == {"k1", "k2"}
        return failure


async def test_row_14_a_prompt_that_is_too_long_fails_at_once(start: Start, ask: Ask) -> None:
    said = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens"
    wanted = (Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", INFO)
    refusal = bad(400, error(said, code="context_length_exceeded"))
    failure = await refuses(start, ask, refusal, wanted)
    assert failure.metadata["maxContextTokens"] == "8192"
    assert failure.metadata["promptTokens"] == "9000"
    await refuses(start, ask, bad(200, error("too long", code="-20003")), wanted)  # InternLM


async def test_row_15_a_filtered_prompt_fails_at_once(start: Start, ask: Ask) -> None:
    inner = {"code": "ResponsibleAIPolicyViolation"}
    refusals = (
        bad(400, error("filtered", code="content_filter", innererror=inner)),
        bad(400, {"code": "data_inspection_failed", "message": "inappropriate"}),
    )
    for refusal in refusals:
        wanted = (Code.INVALID_ARGUMENT, "CONTENT_FILTERED", INFO)
        await refuses(start, ask, refusal, wanted)


async def test_row_15_filtered_midway_is_a_finish_reason(start: Start) -> None:
    async def filtered(asked: web.Request) -> web.StreamResponse:
        body = chunk("a beginning") + chunk("", finish_reason="content_filter")
        return web.Response(body=body + b"data: [DONE]\n\n", content_type="text/event-stream")

    async with row(start, {"*": filtered}) as of:
        received = await receive(of.gateway.chat.StreamChat(stream_request(request())))
        assert received.failure is None
        assert received.finishes[0].finish_reason == chat_pb2.FINISH_REASON_CONTENT_FILTER


LACKING = bad(404, error("The model does not exist", code="model_not_found"))


async def test_row_16_an_unknown_model_is_asked_for_once_unless_another_key_serves_it(
    start: Start, ask: Ask
) -> None:
    wanted = (Code.NOT_FOUND, "MODEL_NOT_FOUND", INFO | {"ResourceInfo"})
    async with row(start, {"*": LACKING}) as of:
        for number in (1, 2):
            failure = await ask.fails(of, model="gpt-typo")
            hears(failure, *wanted, requests=1)
            assert failure.details["ResourceInfo"].resource_name == "gpt-typo"
            assert len(of.keys) == number
        of.faults.clear()
        assert await ask.used(of, 4, model="gpt-typo") == {"k1", "k2"}, "no key is to blame"
    async with row(start, {"k2": LACKING}) as of:
        assert await ask(of) == ["k1"]
        assert await ask(of) == ["k2", "k1"]
        assert await ask.used(of, 4) == {"k1"}, "what k2 lacks is remembered"
        of.faults.clear()
        assert await ask.used(of, 4, model="m2") == {"k1", "k2"}


async def test_row_16_a_name_that_the_configuration_chose_is_no_mistake_of_the_caller(
    start: Start, ask: Ask
) -> None:
    models = (
        Model(name="wrong", upstream="test", upstream_model="typo"),
        Model(name="safe", upstream="test", upstream_model="typo", fallbacks=("spare",)),
        Model(name="spare", upstream="other"),
    )
    async with row(start, {"*": LACKING}, models=models) as of:
        failure = await ask.fails(of, model="wrong")
        hears(failure, Code.UNAVAILABLE, "UPSTREAM_ERROR", INFO, requests=1)
        answered = await ask(of, model="safe")
        assert isinstance(answered, list)
        assert len(of.keys) == 2, "one for each call"


async def test_row_17_a_refused_request_fails_at_once_and_names_the_field(
    start: Start, ask: Ask
) -> None:
    wanted = (Code.INVALID_ARGUMENT, "INVALID_REQUEST", INFO | {"BadRequest"})
    prefix = "" if ask.method == "Chat" else "chat."
    for status in (400, 404, 405, 415, 422):
        refusal = bad(status, error("too hot", param="temperature"))
        failure = await refuses(start, ask, refusal, wanted)
        assert failure.fields == {f"{prefix}params.temperature": "too hot"}
    wanted = (Code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", INFO)
    await refuses(start, ask, bad(413, b""), wanted)


async def test_row_18_what_is_not_the_protocol_is_tried_once_more_and_blames_no_key(
    start: Start, ask: Ask
) -> None:
    wanted = (Code.UNAVAILABLE, "UPSTREAM_PROTOCOL_ERROR", INFO)
    foreign = (
        bad(307, b"", location="/v1/elsewhere"),
        bad(200, b"<html>Welcome</html>"),
        bad(200, b""),
        bad(200, {"hello": "world"}),
        bad(200, {"type": "message_start", "message": {"role": "assistant", "content": []}}),
    )
    for answer in foreign:
        async with row(start, {"*": answer}) as of:
            hears(await ask.fails(of), *wanted, requests=2)
            assert [asked.path for asked in of.served.asked] == ["/v1/chat/completions"] * 2
            of.faults.clear()
            assert await ask.used(of, 4) == {"k1", "k2"}


async def test_row_19_an_error_inside_a_200_has_the_row_of_its_code(start: Start, ask: Ask) -> None:
    said = "Rate limit reached. Please try again in 60s."
    await limits_rate(start, ask, bad(200, error(said, code="rate_limit_exceeded")))
    async with row(start, {"k1": bad(200, error("no", code="invalid_api_key"))}) as of:
        assert await ask(of) == ["k1", "k2"]
        assert await ask.used(of, 4) == {"k2"}


@pytest.mark.parametrize("ending", ["cut", "rate limit", "rejected key"])
async def test_row_20_after_the_first_text_nothing_is_tried_again_and_nothing_is_ok(
    start: Start, ending: str
) -> None:
    said = {
        "cut": None,
        "rate limit": error("Please try again in 60s.", code="rate_limit_exceeded"),
        "rejected key": error("no", code="invalid_api_key"),
    }[ending]

    async def broken(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("a beginning"))
        if said is not None:
            await response.write(b"data: " + json.dumps(said).encode() + b"\n\n")
        return response

    async with row(start, {"k1": broken}) as of:
        received = await receive(of.gateway.chat.StreamChat(stream_request(request())))
        assert received.failure is not None
        assert received.text == "a beginning"
        assert set(received.kinds) == {"header", "delta"}
        wanted = (Code.UNAVAILABLE, "UPSTREAM_STREAM_INTERRUPTED", INFO)
        hears(received.failure, *wanted, requests=1)
        assert received.failure.metadata["usageEstimated"] == "true"
        assert int(received.failure.metadata["completionTokens"]) > 0
        assert of.keys == ["k1"]
        of.faults.clear()
        left = {"k1", "k2"} if ending == "cut" else {"k2"}
        assert await Ask("StreamChat").used(of, 4) == left, "the key has the row of the code"


async def test_row_21_a_cancel_closes_the_upstream_connection_and_blames_no_key(
    start: Start, ask: Ask
) -> None:
    async with row(start, {"*": silent}) as of:
        chat = of.gateway.chat
        call = (
            chat.Chat(request())
            if ask.method == "Chat"
            else chat.StreamChat(stream_request(request()))
        )
        reading = asyncio.ensure_future(failing(call))
        await until(lambda: of.served.open == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda: of.served.open == 0)
        await until(lambda: bool(of.gateway.events.calls))
        assert [c.code for c in of.gateway.events.calls] == ["CANCELLED"]
        assert [a.fault for a in of.gateway.events.attempts] == ["abandoned"]
        of.faults.clear()
        assert await ask.used(of, 4) == {"k1", "k2"}


async def test_row_22_a_callers_own_mistakes_and_limits_reach_no_upstream(start: Start) -> None:
    token = "token-of-search"
    known = Caller(name="search", tokens=(Digest.of(token),), models=("m",), requests_per_minute=1)
    async with row(start, {}, callers=(known,)) as of:
        metadata = (("authorization", f"Bearer {token}"),)

        async def heard(model: str, **credentials: Any) -> tuple[Code, str, set[str]]:
            call = of.gateway.chat.Chat(request(model=model), **credentials)
            failure = await failing(call)
            return failure.code, failure.reason, set(failure.details)

        nobody = (Code.UNAUTHENTICATED, "CALLER_UNAUTHENTICATED", INFO)
        assert await heard("m") == nobody
        assert await heard("m2", metadata=metadata) == (
            Code.PERMISSION_DENIED,
            "CALLER_FORBIDDEN",
            INFO | {"ResourceInfo"},
        )
        assert of.keys == []
        await of.gateway.chat.Chat(request(), metadata=metadata)
        spent = (Code.RESOURCE_EXHAUSTED, "CALLER_QUOTA_EXCEEDED", RATE)
        assert await heard("m", metadata=metadata) == spent
        (asked,) = of.served.asked
        assert asked.headers["authorization"] == "Bearer sk-test-k1", "its token goes no further"


async def test_row_23_a_full_gateway_and_one_that_drains_ask_no_upstream(
    start: Start, ask: Ask
) -> None:
    limits = Limits(in_flight=1, queue=0)
    async with row(start, {"*": silent}, limits=limits) as of:
        running = of.gateway.chat.Chat(request())
        await until(lambda: of.served.open == 1)
        failure = await ask.fails(of)
        hears(
            failure,
            Code.UNAVAILABLE,
            "GATEWAY_OVERLOADED",
            {"ErrorInfo", "RetryInfo"},
            requests=0,
            wait=failure.retry_seconds,
        )
        running.cancel()
        await until(lambda: of.gateway.running.gateway.in_flight == 0)
        of.faults.clear()
        assert await ask.used(of, 2) == {"k1", "k2"}
        of.gateway.running.gateway.draining = True
        failure = await ask.fails(of)
        assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "GATEWAY_DRAINING")
        assert int(failure.pushback) >= 0
        assert len(of.keys) == 3


async def test_row_24_a_request_that_cannot_be_said_upstream_reaches_none(
    start: Start, ask: Ask
) -> None:
    prefix = "" if ask.method == "Chat" else "chat."
    unsupported = frozenset({"top_k"})
    async with row(start, {}, unsupported_parameters=unsupported) as of:
        failure = await ask.fails(of, params=chat_pb2.GenerationParams(top_k=3))
        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "UNSUPPORTED_PARAMETER")
        assert set(failure.fields) == {f"{prefix}params.top_k"}
        assert failure.pushback == "-1"
        narrator = chat_pb2.ChatMessage(role="narrator", content="Once upon a time")
        failure = await ask.fails(of, messages=[narrator])
        assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "UNKNOWN_ROLE")
        assert set(failure.fields) == {f"{prefix}messages[0].role"}
        assert failure.pushback == "-1"
        assert of.keys == []
        assert await ask.used(of, 4) == {"k1", "k2"}


def test_every_row_has_its_case() -> None:
    rows = {int(found[1]) for name in globals() if (found := re.match(r"test_row_(\d\d)_", name))}
    assert rows == set(range(1, 25))
