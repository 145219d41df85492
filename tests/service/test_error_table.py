"""The table of errors, row by row, over real sockets: what each fault of an upstream costs, and
what the caller hears of it."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from aiohttp import web

from harness import (
    Failure,
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
from tokenwire_service.config import Limits, Model, Retries, UpstreamTimeouts
from tokenwire_service.simulator import Fault, Simulator

Simulated = tuple[Simulator, str]
Code = grpc.StatusCode

QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)
IMPATIENT = UpstreamTimeouts(first_byte=0.3, idle=0.3)
INFO = frozenset({"ErrorInfo"})
WAIT = INFO | {"RetryInfo"}
QUOTA = INFO | {"QuotaFailure"}
BAD = INFO | {"BadRequest"}


@dataclass(frozen=True)
class Heard:
    """What the caller hears at the end. `status`: upstreamStatus, empty where there is none."""

    code: Code
    reason: str
    attempts: int
    status: str = ""
    upstream_code: str = ""
    details: frozenset[str] = INFO
    waits: bool = False  # whether the pushback is a delay; else it is -1
    metadata: dict[str, str] = field(default_factory=dict)


def agrees(failure: Failure, heard: Heard) -> None:
    """Compares all there is to compare."""
    found = Heard(
        failure.code,
        failure.reason,
        int(failure.metadata["attempts"]),
        failure.metadata.get("upstreamStatus", ""),
        failure.metadata.get("upstreamCode", ""),
        frozenset(failure.details),
        failure.pushback != "-1",
        {n: failure.metadata[n] for n in heard.metadata if n in failure.metadata},
    )
    assert found == heard, failure.message
    assert failure.metadata["upstream"] == "test"
    assert failure.metadata["requestId"] == failure.trailers["x-request-id"]
    assert failure.message.startswith("upstream test: ")
    assert len(failure.message) <= 300
    assert "Traceback" not in failure.everything
    assert "sk-test" not in failure.everything


def unavailable(reason: str, attempts: int, status: str = "", code: str = "") -> Heard:
    return Heard(Code.UNAVAILABLE, reason, attempts, status, code)


def interrupted(status: str = "200", code: str = "") -> Heard:
    return unavailable("UPSTREAM_STREAM_INTERRUPTED", 1, status, code)


PROTOCOL = unavailable("UPSTREAM_PROTOCOL_ERROR", 2, "200")
TRUNCATED = unavailable("UPSTREAM_ERROR", 2, "200")
INVALID = Code.INVALID_ARGUMENT
FACTS = {"maxContextTokens": "8192", "promptTokens": "9000"}

# What a caller of Chat hears. None: the answer, in the end. With two keys, three attempts at
# most, and a deadline that is sooner than what a rate limit asks for.
CHAT: dict[Fault, Heard | None] = {
    Fault.INVALID_API_KEY: Heard(
        Code.FAILED_PRECONDITION, "UPSTREAM_CREDENTIALS_REJECTED", 2, "401", "invalid_api_key"
    ),
    Fault.ACCOUNT_DEACTIVATED: Heard(
        Code.FAILED_PRECONDITION, "UPSTREAM_CREDENTIALS_REJECTED", 2, "401", "account_deactivated"
    ),
    Fault.ACCESS_DENIED: Heard(
        Code.FAILED_PRECONDITION,
        "UPSTREAM_ACCESS_DENIED",
        2,
        "403",
        "unsupported_country_region_territory",
    ),
    Fault.RATE_LIMITED: Heard(
        Code.RESOURCE_EXHAUSTED,
        "RATE_LIMITED",
        2,
        "429",
        "rate_limit_exceeded",
        WAIT | QUOTA,
        waits=True,
    ),
    Fault.QUOTA_EXHAUSTED: Heard(
        Code.RESOURCE_EXHAUSTED,
        "UPSTREAM_QUOTA_EXHAUSTED",
        2,
        "429",
        "insufficient_quota",
        QUOTA,
    ),
    Fault.PAYMENT_REQUIRED: Heard(
        Code.RESOURCE_EXHAUSTED,
        "UPSTREAM_QUOTA_EXHAUSTED",
        2,
        "402",
        "invalid_request_error",
        QUOTA,
    ),
    Fault.OVERLOADED: Heard(
        Code.UNAVAILABLE, "UPSTREAM_OVERLOADED", 3, "503", "engine_overloaded", WAIT
    ),
    Fault.SERVER_ERROR: unavailable("UPSTREAM_ERROR", 3, "500", "server_error"),
    Fault.BAD_GATEWAY: unavailable("UPSTREAM_ERROR", 3, "502"),
    Fault.CONTEXT_LENGTH_EXCEEDED: Heard(
        INVALID, "CONTEXT_LENGTH_EXCEEDED", 1, "400", "context_length_exceeded", metadata=FACTS
    ),
    Fault.CONTENT_FILTER: Heard(INVALID, "CONTENT_FILTERED", 1, "400", "content_filter"),
    Fault.MODEL_NOT_FOUND: Heard(
        Code.NOT_FOUND, "MODEL_NOT_FOUND", 1, "404", "model_not_found", INFO | {"ResourceInfo"}
    ),
    Fault.BAD_REQUEST: Heard(INVALID, "INVALID_REQUEST", 1, "400", "unsupported_value", BAD),
    Fault.REQUEST_TOO_LARGE: Heard(
        Code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", 1, "413", "request_too_large"
    ),
    Fault.REDIRECT: unavailable("UPSTREAM_PROTOCOL_ERROR", 2, "307"),
    Fault.HTML: PROTOCOL,
    Fault.EMPTY_BODY: PROTOCOL,
    Fault.STALL_BEFORE_HEADERS: unavailable("UPSTREAM_TIMEOUT", 2),
    Fault.STALL_AFTER_HEADERS: unavailable("UPSTREAM_TIMEOUT", 2, "200"),
    Fault.STALL_MIDWAY: unavailable("UPSTREAM_TIMEOUT", 2, "200"),
    Fault.RESET_BEFORE_HEADERS: unavailable("UPSTREAM_ERROR", 3),
    Fault.RESET_MIDWAY: TRUNCATED,
    Fault.CUT: TRUNCATED,
    Fault.ERROR_EVENT: unavailable("UPSTREAM_ERROR", 3, "200", "server_error"),
    Fault.GARBAGE_MIDWAY: PROTOCOL,
    Fault.TRUNCATED_JSON: PROTOCOL,
    Fault.LONE_SURROGATE: None,
    Fault.INVALID_UTF8: None,
    Fault.SLOW: None,
}

# The same for StreamChat, where it differs: what strikes midway does so after the first text.
STREAM: dict[Fault, Heard | None] = CHAT | {
    Fault.STALL_MIDWAY: interrupted(),
    Fault.RESET_MIDWAY: interrupted(),
    Fault.CUT: interrupted(),
    Fault.ERROR_EVENT: interrupted(code="server_error"),
    Fault.GARBAGE_MIDWAY: interrupted(),
    Fault.TRUNCATED_JSON: interrupted(),
}

# And where it strikes before the first text, so that another attempt is allowed.
STREAM_AT_0: dict[Fault, Heard] = {
    Fault.STALL_MIDWAY: unavailable("UPSTREAM_TIMEOUT", 2, "200"),
    Fault.RESET_MIDWAY: TRUNCATED,
    Fault.CUT: TRUNCATED,
    Fault.ERROR_EVENT: unavailable("UPSTREAM_ERROR", 3, "200", "server_error"),
    Fault.GARBAGE_MIDWAY: PROTOCOL,
    Fault.TRUNCATED_JSON: PROTOCOL,
}


def test_every_fault_of_the_simulator_has_its_rows() -> None:
    assert set(CHAT) == set(STREAM) == set(Fault)
    assert set(STREAM_AT_0) == {fault for fault in Fault if CHAT[fault] != STREAM[fault]}


async def prepared(start: Start, simulator: Simulated, fault: Fault) -> Stubs:
    stalls = fault.value.startswith("stall_")
    timeouts = IMPATIENT if stalls else UpstreamTimeouts()
    return await start(upstream(simulator[1], timeouts=timeouts), retries=QUICK)


def requests_made(simulator: Simulated, attempts: int) -> int:
    """How many the upstream saw; with stalls among them, on a busy machine, some come too late."""
    made = simulator[0].stats.requests
    stalls = sum(n for name, n in simulator[0].stats.by_fault.items() if name.startswith("stall_"))
    return attempts if stalls and made < attempts else made


def struck(fault: Fault, **directives: Any) -> str:
    if fault is Fault.SLOW:
        return simulate(fault=fault, tokens=2)
    if fault is Fault.RATE_LIMITED:
        directives["retry_after_s"] = 60
    return simulate(fault=fault, **directives)


@pytest.mark.parametrize("fault", Fault)
async def test_what_a_caller_of_chat_hears(
    start: Start, simulator: Simulated, fault: Fault
) -> None:
    gateway = await prepared(start, simulator, fault)
    heard = CHAT[fault]
    # Garbage within a string of the JSON would be a part of the text, for all that anyone knows.
    where = {"at": 0} if fault is Fault.GARBAGE_MIDWAY else {}
    chat = request("Tell me a story", extra_body_json=struck(fault, **where))
    call = gateway.chat.Chat(chat, timeout=20)
    if heard is None:
        assert (await call).choices[0].message.content != ""
        assert simulator[0].stats.requests == 1
        return
    agrees(await failing(call), heard)
    assert requests_made(simulator, heard.attempts) == heard.attempts
    assert simulator[0].stats.redirects_followed == 0
    assert [(c.code, c.attempts) for c in gateway.events.calls] == [
        (heard.code.name, heard.attempts)
    ]


@pytest.mark.parametrize("fault", Fault)
async def test_what_a_caller_of_stream_chat_hears(
    start: Start, simulator: Simulated, fault: Fault
) -> None:
    gateway = await prepared(start, simulator, fault)
    heard = STREAM[fault]
    chat = request("Tell me a story", extra_body_json=struck(fault))
    received = await receive(gateway.chat.StreamChat(stream_request(chat), timeout=20))
    if heard is None:
        assert received.failure is None
        assert received.text != ""
        assert received.kinds[-1] == "trailer"
        assert simulator[0].stats.requests == 1
        return
    assert received.failure is not None, "a broken stream must never end with OK"
    failure = received.failure
    if fault is Fault.BAD_REQUEST:
        assert set(failure.fields) == {"chat.params.temperature"}
    agrees(failure, heard)
    assert requests_made(simulator, heard.attempts) == heard.attempts
    assert simulator[0].stats.redirects_followed == 0
    if heard.reason == "UPSTREAM_STREAM_INTERRUPTED" and heard.attempts == 1:
        whole = await gateway.chat.Chat(request("Tell me a story"))
        text = whole.choices[0].message.content
        assert received.text != ""
        assert text.startswith(received.text)
        assert received.text != text
        assert "trailer" not in received.kinds
        assert "finish" not in received.kinds
    else:
        assert received.events == []


@pytest.mark.parametrize("fault", STREAM_AT_0)
async def test_a_stream_that_breaks_before_its_first_text_is_tried_again(
    start: Start, simulator: Simulated, fault: Fault
) -> None:
    gateway = await prepared(start, simulator, fault)
    chat = request("Tell me a story", extra_body_json=struck(fault, at=0))
    received = await receive(gateway.chat.StreamChat(stream_request(chat), timeout=20))
    assert received.events == []
    assert received.failure is not None
    agrees(received.failure, STREAM_AT_0[fault])
    assert requests_made(simulator, STREAM_AT_0[fault].attempts) == STREAM_AT_0[fault].attempts


@pytest.mark.parametrize("fault", [f for f, heard in CHAT.items() if heard and heard.attempts > 1])
async def test_one_fault_before_the_first_text_is_never_seen(
    start: Start, simulator: Simulated, fault: Fault
) -> None:
    gateway = await prepared(start, simulator, fault)
    once = struck(fault, at=0, id="once", times=1)
    chat = request("Tell me a story", extra_body_json=once)
    received = await receive(gateway.chat.StreamChat(stream_request(chat), timeout=20))
    assert received.failure is None
    assert received.kinds.count("header") == 1
    assert len(received.header.attempts) == 2
    plain = await gateway.chat.Chat(request("Tell me a story"))
    assert received.text == plain.choices[0].message.content


# --- rows that the simulator does not have ---------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer of a provider, the same to every request."""

    row: int  # of the table in errors.md
    status: int
    body: Any
    heard: Heard
    headers: dict[str, str] = field(default_factory=dict)


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


REJECTED = (Code.FAILED_PRECONDITION, "UPSTREAM_CREDENTIALS_REJECTED", 2)
EXHAUSTED = (Code.RESOURCE_EXHAUSTED, "UPSTREAM_QUOTA_EXHAUSTED", 2)
LIMITED = (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED", 2)
RATE = WAIT | QUOTA

ANSWERS = {
    "xAI 400 with a wrong key": Answer(
        1,
        400,
        {"code": "Client specified an invalid argument", "error": "Incorrect API key provided"},
        Heard(*REJECTED, "400", "Client specified an invalid argument"),
    ),
    "Google 400 with a wrong key, in an array": Answer(
        1,
        400,
        [error("API key not valid. Please pass a valid API key.", code=400)],
        Heard(*REJECTED, "400", "400"),
    ),
    "Groq 400 restricted organization": Answer(
        2,
        400,
        error("Organization has been restricted.", code="organization_restricted"),
        Heard(*REJECTED, "400", "organization_restricted"),
    ),
    "403 permission": Answer(
        3,
        403,
        error("no", type="permission_error"),
        Heard(Code.FAILED_PRECONDITION, "UPSTREAM_ACCESS_DENIED", 2, "403", "permission_error"),
    ),
    "Anthropic rate limit": Answer(
        4,
        429,
        {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}},
        Heard(*LIMITED, "429", "rate_limit_error", RATE, waits=True),
        {"retry-after": "60"},
    ),
    "Mistral 429 without an error object": Answer(
        4,
        429,
        {"message": "Requests rate limit exceeded"},
        Heard(*LIMITED, "429", "", RATE, waits=True),
        {"retry-after": "60"},
    ),
    "billing not active": Answer(
        5,
        429,
        error("billing", code="billing_not_active"),
        Heard(*EXHAUSTED, "429", "billing_not_active", QUOTA),
    ),
    "DashScope arrearage": Answer(
        5,
        400,
        {"code": "Arrearage", "message": "Access denied, overdue payment."},
        Heard(*EXHAUSTED, "400", "Arrearage", QUOTA),
    ),
    "DashScope throttle under the name of money": Answer(
        6,
        429,
        error("You exceeded your current token-limit", code="insufficient_quota"),
        Heard(*LIMITED, "429", "insufficient_quota", RATE, waits=True),
        {"retry-after": "60"},
    ),
    "larger than the tier": Answer(
        7,
        429,
        error("on tokens per min (TPM): Limit 30000, Requested 47000.", code="rate_limit_exceeded"),
        Heard(Code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", 2, "429", "rate_limit_exceeded"),
    ),
    "Google quota per day": Answer(
        8,
        429,
        error(
            "Quota exceeded",
            status="RESOURCE_EXHAUSTED",
            details=[{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "61s"}],
        ),
        Heard(*LIMITED, "429", "", RATE, waits=True),
    ),
    "529": Answer(
        9,
        529,
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        Heard(Code.UNAVAILABLE, "UPSTREAM_OVERLOADED", 3, "529", "overloaded_error", WAIT),
    ),
    **{
        str(status): Answer(10, status, b"", unavailable("UPSTREAM_ERROR", 3, str(status)))
        for status in (408, 409, 500, 502, 504, 520, 524)
    },
    "vLLM too long": Answer(
        14,
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 4096 tokens. However, you "
            "requested 5000 tokens",
            "type": "BadRequestError",
            "code": 400,
        },
        Heard(
            INVALID,
            "CONTEXT_LENGTH_EXCEEDED",
            1,
            "400",
            "400",
            metadata={"maxContextTokens": "4096", "promptTokens": "5000"},
        ),
    ),
    "InternLM too long inside a 200": Answer(
        14,
        200,
        error("too long", code="-20003"),
        Heard(INVALID, "CONTEXT_LENGTH_EXCEEDED", 1, "200", "-20003"),
    ),
    "DashScope filter": Answer(
        15,
        400,
        {"code": "data_inspection_failed", "message": "inappropriate"},
        Heard(INVALID, "CONTENT_FILTERED", 1, "400", "data_inspection_failed"),
    ),
    "Azure deployment": Answer(
        16,
        404,
        error("The API deployment for this resource does not exist.", code="DeploymentNotFound"),
        Heard(
            Code.NOT_FOUND,
            "MODEL_NOT_FOUND",
            1,
            "404",
            "DeploymentNotFound",
            INFO | {"ResourceInfo"},
        ),
    ),
    **{
        f"{status} of another kind": Answer(
            17,
            status,
            error("no", param="max_tokens"),
            Heard(INVALID, "INVALID_REQUEST", 1, str(status), "", BAD),
        )
        for status in (400, 404, 405, 415, 422)
    },
    "413": Answer(17, 413, b"", Heard(Code.RESOURCE_EXHAUSTED, "REQUEST_TOO_LARGE", 1, "413")),
    "301": Answer(
        18,
        301,
        b"",
        unavailable("UPSTREAM_PROTOCOL_ERROR", 2, "301"),
        {"location": "https://evil.example/"},
    ),
    "204": Answer(18, 204, b"", unavailable("UPSTREAM_PROTOCOL_ERROR", 2, "204")),
    "JSON that is no completion": Answer(18, 200, {"hello": "world"}, PROTOCOL),
    "JSON that is no object": Answer(18, 200, ["x"], PROTOCOL),
    "a completion without choices": Answer(18, 200, {"object": "x", "choices": []}, PROTOCOL),
    "text": Answer(18, 200, b"It works!", PROTOCOL),
    "a rate limit inside a 200": Answer(
        19,
        200,
        error("slow down", code="rate_limit_exceeded"),
        Heard(*LIMITED, "200", "rate_limit_exceeded", RATE, waits=True),
    ),
    "a rejected key inside a 200": Answer(
        19,
        200,
        error("no", code="invalid_api_key"),
        Heard(*REJECTED, "200", "invalid_api_key"),
    ),
    "a server error inside a 200": Answer(
        19, 200, error("oops", code=502), unavailable("UPSTREAM_ERROR", 3, "200", "502")
    ),
    "a flat vLLM error inside a 200": Answer(
        19,
        200,
        {"object": "error", "message": "no", "type": "BadRequestError", "code": 400},
        Heard(INVALID, "INVALID_REQUEST", 1, "200", "400"),
    ),
}

# Rows of the table, and where they are proved if not by ANSWERS.
ELSEWHERE = {
    11: "test_an_upstream_that_cannot_be_connected_to_is_unreachable",
    12: "test_a_connection_that_died_while_idle_costs_no_attempt",
    13: "test_what_a_caller_of_chat_hears: the stalls; test_deadline.py",
    20: "test_what_a_caller_of_stream_chat_hears: whatever strikes midway",
    21: "test_cancel.py",
    22: "test_callers.py",
    23: "test_a_full_gateway_says_so, test_a_draining_gateway_says_so",
    24: "test_chat.py, test_bad_requests.py",
}


def test_every_row_of_the_table_is_proved_somewhere() -> None:
    assert {answer.row for answer in ANSWERS.values()} | set(ELSEWHERE) == set(range(1, 25))


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
@pytest.mark.parametrize("name", ANSWERS)
async def test_what_a_caller_hears_of_a_providers_answer(
    start: Start, name: str, method: str
) -> None:
    wanted = ANSWERS[name]
    body = wanted.body if isinstance(wanted.body, bytes) else json.dumps(wanted.body).encode()

    async def answer(asked: web.Request) -> web.StreamResponse:
        headers = {"content-type": "application/json", **wanted.headers}
        if wanted.status == 200 and method == "StreamChat":
            headers["content-type"] = "text/event-stream"
            return web.Response(headers=headers, body=b"data: " + body + b"\n\n")
        return web.Response(status=wanted.status, headers=headers, body=body)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), retries=QUICK)
        # Sooner than any wait that an answer above asks for.
        timeout = 20 if wanted.headers or wanted.row == 8 else 0.9
        if method == "Chat":
            failure = await failing(gateway.chat.Chat(request(), timeout=timeout))
        else:
            call = gateway.chat.StreamChat(stream_request(request()), timeout=timeout)
            failure = await failing(call)
        agrees(failure, wanted.heard)
        assert len(served.asked) == wanted.heard.attempts
        if wanted.row == 17 and wanted.status != 413:
            prefix = "chat." if method == "StreamChat" else ""
            assert set(failure.fields) == {f"{prefix}params.max_completion_tokens"}


@pytest.mark.parametrize("how", ["closed port", "no such name", "TLS to a plain port"])
async def test_an_upstream_that_cannot_be_connected_to_is_unreachable(
    start: Start, simulator: Simulated, how: str
) -> None:
    with socket.socket() as taken:  # bound, and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        base_url = {
            "closed port": f"http://127.0.0.1:{taken.getsockname()[1]}/v1",
            "no such name": "http://nowhere.invalid/v1",
            "TLS to a plain port": simulator[1].replace("http:", "https:"),
        }[how]
        gateway = await start(upstream(base_url), retries=QUICK)
        for call in (
            gateway.chat.Chat(request()),
            gateway.chat.StreamChat(stream_request(request())),
        ):
            agrees(await failing(call), unavailable("UPSTREAM_UNREACHABLE", 3))


async def test_a_connection_that_died_while_idle_costs_no_attempt(start: Start) -> None:
    body = completion().body
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    assert isinstance(body, bytes)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head % len(body) + body)
        await reader.readuntil(b"\r\n\r\n")  # the second request on this connection is its end

    async with raw_provider(answer) as served:
        retries = Retries(max_attempts=1, budget=0, budget_floor=0)
        gateway = await start(upstream(served.base_url), retries=retries)
        await gateway.chat.Chat(request())
        again = await gateway.chat.Chat(request())
        assert again.choices[0].message.content == "hello"
        assert [attempt.http_status for attempt in again.header.attempts] == [0, 200]
        assert len(served.asked) == 2


async def test_an_upstream_that_asks_not_to_be_retried_is_not(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.Response(status=500, headers={"x-should-retry": "false"})

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), retries=QUICK)
        agrees(await failing(gateway.chat.Chat(request())), unavailable("UPSTREAM_ERROR", 1, "500"))


async def test_an_upstream_that_asks_to_be_retried_is(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if len(served.asked) == 1:
            return web.Response(status=400, headers={"x-should-retry": "true"})
        return completion()

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), retries=QUICK)
        assert len((await gateway.chat.Chat(request())).header.attempts) == 2


async def test_retry_after_of_a_good_answer_cools_no_key(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = completion()
        response.headers["retry-after"] = "60"
        response.headers["x-ratelimit-remaining-tokens"] = "0"
        return response

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=1))
        for _ in range(3):
            await gateway.chat.Chat(request(), timeout=5)


async def test_a_model_that_the_configuration_misnames_is_no_mistake_of_the_caller(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(
        upstream(simulator[1]), models=(Model(name="good", upstream="test", upstream_model="bad"),)
    )
    chat = request(model="good", extra_body_json=simulate(fault="model_not_found"))
    failure = await failing(gateway.chat.Chat(chat))
    agrees(failure, unavailable("UPSTREAM_ERROR", 1, "404", "model_not_found"))


async def test_an_interrupted_stream_tells_the_usage_it_had_heard_of(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        await response.write(chunk("a "))
        body = {"object": "chat.completion.chunk", "choices": [], "usage": usage}
        await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        return response  # neither a finish reason nor [DONE]

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert received.failure is not None
    heard = Heard(
        Code.UNAVAILABLE,
        "UPSTREAM_STREAM_INTERRUPTED",
        1,
        "200",
        metadata={"promptTokens": "7", "completionTokens": "2"},
    )
    agrees(received.failure, heard)


@pytest.mark.parametrize(
    ("fault", "state"),
    [(Fault.STALL_MIDWAY, "STATE_SERVER_ERROR"), (Fault.CUT, "STATE_SERVER_ERROR")],
)
async def test_the_last_snapshot_of_a_broken_stream_has_the_legacy_state(
    start: Start, simulator: Simulated, fault: Fault, state: str
) -> None:
    gateway = await prepared(start, simulator, fault)
    chat = request("Tell me a story", extra_body_json=simulate(fault=fault))
    received = await receive(gateway.chat.StreamChat(stream_request(chat, mode=2)))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
    last = received.snapshots[-1]
    assert last.State.Name(last.state) == state
    assert last.message.content == received.snapshots[-2].message.content != ""


async def test_a_full_gateway_says_so(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), limits=Limits(in_flight=1, queue=0))
    stalled = request(extra_body_json=simulate(fault="stall_before_headers"))
    running = gateway.chat.Chat(stalled)
    await until(lambda: simulator[0].stats.open_requests == 1)
    for call in (gateway.chat.Chat(request()), gateway.chat.StreamChat(stream_request(request()))):
        failure = await failing(call)
        assert failure.code is Code.UNAVAILABLE
        assert failure.reason == "GATEWAY_OVERLOADED"
        assert failure.retry_seconds > 0
        assert int(failure.pushback) > 0
    running.cancel()
    await until(lambda: gateway.running.gateway.in_flight == 0)
    assert (await gateway.chat.Chat(request())).choices[0].message.content != ""


async def test_a_draining_gateway_says_so(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    gateway.running.gateway.draining = True
    for call in (
        gateway.chat.Chat(request()),
        gateway.chat.StreamChat(stream_request(request())),
        gateway.models.ListModels(model_service_pb2.ListModelsRequest()),
    ):
        failure = await failing(call)
        assert failure.code is Code.UNAVAILABLE
        assert failure.reason == "GATEWAY_DRAINING"
        assert int(failure.pushback) >= 0
    assert simulator[0].stats.requests == 0
