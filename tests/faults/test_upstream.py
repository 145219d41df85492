"""F2 to F8, F14: upstreams that break off, stall, refuse, fail, and move."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from corpus import runner
from harness import (
    Figures,
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
    simulate,
    stream_request,
    until,
    upstream,
)
from tokenwire_service.config import Config, Model, Retries, UpstreamTimeouts
from tokenwire_service.keyring import COOLDOWN_CAP, FIRST_COOLDOWN, JITTER, Lease, Unavailable
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
METHODS = ["Chat", "StreamChat"]
ONCE = Retries(max_attempts=1)
QUICK = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=1000)
DONE = b"data: [DONE]\n\n"
corpus = pytest.mark.skipif(  # CI has it, and fails without
    not runner.CORPUS.is_dir() and not os.environ.get("CI"),
    reason="no corpus in ../shared/corpus",
)


def call_of(gateway: Stubs, method: str, timeout: float = 60, **fields: Any) -> Any:
    chat = request("Tell me a story", **fields)
    if method == "Chat":
        return gateway.chat.Chat(chat, timeout=timeout)
    return gateway.chat.StreamChat(stream_request(chat), timeout=timeout)


async def answered(asked: web.Request) -> web.StreamResponse:
    """`hello`, plain or as a stream."""
    if not (await asked.json()).get("stream"):
        return completion()
    body = chunk("hello", finish_reason="stop") + DONE
    return web.Response(body=body, content_type="text/event-stream")


# --- F2 ---------------------------------------------------------------------------------

_BOUNDARIES = 5  # of one stream in CI; the first and the last of them always


def cuts_of(body: bytes, every: bool) -> list[int]:
    """Where to cut a stream: at the ends of events, one byte before and after them, and within."""
    ends = [at + 2 for at in range(len(body)) if body.startswith(b"\n\n", at)]
    ends += [at + 4 for at in range(len(body)) if body.startswith(b"\r\n\r\n", at)]
    ends.sort()
    if not every and len(ends) > _BOUNDARIES:
        step = (len(ends) - 1) / (_BOUNDARIES - 1)
        ends = sorted({ends[round(i * step)] for i in range(_BOUNDARIES)})
    before = [0, *ends]
    inside = [(start + end) // 2 for start, end in itertools.pairwise(before)]
    near = [end + by for end in ends for by in (-1, 1)]
    return sorted({at for at in (*before, *inside, *near) if at <= len(body)})


@corpus
async def test_f02_a_stream_cut_anywhere_is_a_prefix_and_ok_only_with_proof(
    start: Start, figures: Figures, long: bool
) -> None:
    items = runner.items("streams")
    bodies = [item.data["body"].encode() for item in items]

    async def answer(asked: web.Request) -> web.StreamResponse:
        index, at = (await asked.json())["messages"][0]["content"].split()
        # Without a length: where it ends, nothing says that more should have come.
        response = await event_stream(asked)
        response.force_close()
        await response.write(bodies[int(index)][: int(at)])
        return response

    wrong: list[str] = []
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=1), retries=QUICK)

        async def cut(index: int, at: int) -> None:
            chat = request(f"{index} {at}")
            got = runner.Answer()
            received = await receive(gateway.chat.StreamChat(stream_request(chat), timeout=90))
            got.failure = received.failure
            for event in received.events:
                got.add(event)
            arrived, expected = bodies[index][:at], items[index].data["expected"]
            wrong.extend(
                f"{items[index].id} at {at}: {what}"
                for what in runner.of_cut(arrived, expected, got, reset=False)
            )

        waiting = iter([(i, at) for i, body in enumerate(bodies) for at in cuts_of(body, long)])
        count = 0

        async def work() -> None:
            nonlocal count
            for index, at in waiting:
                await cut(index, at)
                count += 1

        await asyncio.gather(*(work() for _ in range(8)))
    figures("F2 cuts", count, "cuts")
    assert not wrong, "\n".join(wrong[:50])


# --- F3 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 0.5, 0.99])
@pytest.mark.parametrize("method", METHODS)
async def test_f03_a_reset_is_retried_before_the_first_text_and_told_after(
    start: Start, simulator: Simulated, method: str, at: float
) -> None:
    gateway = await start(upstream(simulator[1]), retries=QUICK)
    stats = simulator[0].stats
    text = "several words of an answer " * 20
    fault = {"fault": "reset_midway", "at": at, "text": text}
    delivered = method == "StreamChat" and at > 0

    async def ask(**more: Any) -> tuple[str, Any]:
        call = call_of(gateway, method, extra_body_json=simulate(**fault, **more))
        if method == "StreamChat":
            received = await receive(call)
            return received.text, received.failure
        try:
            return (await call).choices[0].message.content, None
        except grpc.aio.AioRpcError as error:
            return "", failure_of(error)

    got, failure = await ask(id="once", times=1)
    if delivered:
        assert failure.reason == "UPSTREAM_STREAM_INTERRUPTED"
        assert text.startswith(got)
        assert 0 < len(got) < len(text)
        assert stats.requests == 1
    else:
        assert (got, failure) == (text, None)
        assert stats.requests == 2
    _, failure = await ask()
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.pushback == "-1"
    if not delivered:
        assert failure.reason in ("UPSTREAM_PROTOCOL_ERROR", "UPSTREAM_ERROR")
        assert failure.metadata["attempts"] in ("2", "3")
    ring = gateway.running.pools["test"].ring
    found = ring.lease("m", time.monotonic())
    assert isinstance(found, Lease)  # no key is to blame
    ring.release(found)


@pytest.mark.parametrize("method", METHODS)
async def test_f03_connections_that_died_in_the_pool_cost_no_call(
    start: Start, method: str
) -> None:
    """As after a restart of the upstream, or behind a balancer that forgets idle connections."""
    body = chunk("hello", finish_reason="stop") + DONE
    if method == "Chat":
        whole = completion().body
        assert isinstance(whole, bytes)
        body = whole
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    first = asyncio.Barrier(8)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(served.asked) <= 8:
            await first.wait()  # so that each has a connection of its own
        writer.write(head + body)
        await writer.drain()
        await reader.readuntil(b"\r\n\r\n")  # and no answer to that

    async with raw_provider(answer) as served:
        gateway = await start(upstream(served.base_url), retries=QUICK)
        for _ in range(2):
            for outcome in await asyncio.gather(*(header_of(gateway, method) for _ in range(8))):
                assert [attempt.http_status for attempt in outcome.attempts][-1] == 200
        assert {call.code for call in gateway.events.calls} == {"OK"}
        assert "stale_connection" in {attempt.fault for attempt in gateway.events.attempts}


async def header_of(gateway: Stubs, method: str) -> Any:
    """What an answer says of itself."""
    call = call_of(gateway, method)
    if method == "Chat":
        return (await call).header
    received = await receive(call)
    assert received.failure is None, received.failure.message
    return received.header


# --- F4 ---------------------------------------------------------------------------------

TEXT = chunk("a beginning")


@pytest.mark.parametrize("alive", [b"", b": keep-alive\n\n"], ids=["silent", "comments"])
@pytest.mark.parametrize("stage", ["before the headers", "after the headers", "midway"])
async def test_f04_a_stall_ends_by_its_own_timer_and_frees_the_key(
    start: Start, stage: str, alive: bytes
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if stage == "before the headers":
            await asyncio.Event().wait()
        response = await event_stream(asked)
        if stage == "midway":
            await response.write(TEXT)
        while True:
            await asyncio.sleep(0.02)
            if alive:
                await response.write(alive)

    if stage == "before the headers" and alive:
        pytest.skip("no event can come before the headers")
    # Each timer has another length: the message says which it was.
    timeouts = UpstreamTimeouts(connect=30, first_byte=0.2, idle=0.3)
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, timeouts=timeouts), retries=ONCE)
        received = await receive(call_of(gateway, "StreamChat"))
        assert received.failure is not None
        reasons = {
            "before the headers": ("UPSTREAM_TIMEOUT", "no answer within 0.2 s"),
            "after the headers": ("UPSTREAM_TIMEOUT", "no text in time"),
            "midway": ("UPSTREAM_STREAM_INTERRUPTED", "silent for 0.3 s"),
        }
        assert received.failure.reason == reasons[stage][0]
        assert reasons[stage][1] in received.failure.message
        assert received.text == ("a beginning" if stage == "midway" else "")
        await until(lambda: served.open == 0)
        assert gateway.running.leases == 0


# --- F5 ---------------------------------------------------------------------------------


def limits_recorded() -> list[tuple[dict[str, str], float, float]]:
    """(headers, least delay, most delay) of every recorded set, in seconds; of those that tell no
    delay, what the gateway takes instead."""
    folder = runner.CORPUS / "headers"
    found = []
    for case in json.loads((folder / "delay_cases.json").read_bytes())["retry_after"]:
        headers = {name: values[0] for name, values in case["headers"].items()}
        headers["date"] = case["now"]
        if not headers.get("retry-after", "").isdigit():
            moment = time.strptime(case["now"], "%Y-%m-%dT%H:%M:%SZ")
            headers["date"] = time.strftime("%a, %d %b %Y %H:%M:%S GMT", moment)
        delay = case["delay_s"] or FIRST_COOLDOWN
        found.append((headers, 121.0 if case["too_long"] else delay, delay))
        if case["too_long"]:
            found[-1] = (headers, 121.0, float("inf"))
    for case in json.loads((folder / "ratelimit_headers.json").read_bytes())["cases"]:
        parsed = case["expected"]["parsed"]
        headers = {name.lower(): values[0] for name, values in case["headers"].items()}
        delay = float(headers.get("retry-after", FIRST_COOLDOWN))
        found.append((headers, delay, delay))
        for dimension in ("requests", "tokens"):
            reset = parsed.get(f"x-ratelimit-reset-{dimension}")
            if reset and reset[0].get("seconds") and "retry-after" not in headers:
                spent = {**headers, f"x-ratelimit-remaining-{dimension}": "0"}
                found.append((spent, reset[0]["seconds"], reset[0]["seconds"]))
    return found


@corpus
async def test_f05_callers_and_keys_hear_the_delay_that_a_429_states(start: Start) -> None:
    cases = limits_recorded()
    assert len(cases) == 80

    async def answer(asked: web.Request) -> web.StreamResponse:
        headers = cases[int(asked.path.split("/")[1])][0]
        return web.json_response({"error": {}}, status=429, headers=headers)

    names = [f"case-{i}" for i in range(len(cases))]
    async with provider(answer) as served:
        root = served.base_url.removesuffix("/v1")
        gateway = await start(
            config=Config(
                listen="127.0.0.1:0",
                retries=ONCE,
                upstreams=tuple(
                    upstream(f"{root}/{i}", keys=1, name=name, passthrough=False)
                    for i, name in enumerate(names)
                ),
                models=tuple(Model(name=name, upstream=name) for name in names),
            )
        )
        for name, (headers, least, most) in zip(names, cases, strict=True):
            began = time.monotonic()
            failure = await failing(gateway.chat.Chat(request(model=name)))
            ended = time.monotonic()
            assert failure.reason == "RATE_LIMITED", headers
            told = failure.retry_seconds
            assert least - 1e-6 <= told <= most + 1e-6, headers
            # The key: as long at least, up to the cap, and at most a tenth more.
            found = gateway.running.pools[name].ring.lease(name, began)
            assert isinstance(found, Unavailable), headers
            capped = min(told, COOLDOWN_CAP)
            assert began + capped <= found.until <= ended + capped * (1 + JITTER), headers
    assert len(served.asked) == len(cases)


# --- F6 ---------------------------------------------------------------------------------


async def test_f06_all_keys_limited_is_told_at_once_and_ends_without_a_herd(start: Start) -> None:
    limited = True
    now: Counter[str] = Counter()
    most: defaultdict[str, int] = defaultdict(int)  # at once, of each key before its first success
    served_once: set[str] = set()

    async def answer(asked: web.Request) -> web.StreamResponse:
        key = asked.headers["authorization"]
        if limited:
            return web.json_response({"error": {}}, status=429, headers={"retry-after": "2"})
        now[key] += 1
        try:
            if key not in served_once:
                most[key] = max(most[key], now[key])
                await asyncio.sleep(0.2)
            served_once.add(key)
            return await answered(asked)
        finally:
            now[key] -= 1

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=4))
        hasty = await failing(gateway.chat.Chat(request(), timeout=1.5))
        assert hasty.reason == "RATE_LIMITED"  # and no wait for a deadline that is too soon
        assert 0 < hasty.retry_seconds <= 2.2
        assert int(hasty.pushback) >= hasty.retry_seconds * 1000 - 1
        assert len(served.asked) == 4
        asked_then = len(served.asked)
        again = await failing(gateway.chat.Chat(request(), timeout=0.8))
        assert again.reason == "RATE_LIMITED"
        assert len(served.asked) == asked_then  # a cooling key is not asked
        limited = False
        calls = [gateway.chat.Chat(request(), timeout=60) for _ in range(40)]
        for whole in await asyncio.gather(*calls):
            assert whole.choices[0].message.content == "hello"
    assert set(most.values()) == {1}  # one probe of each
    assert len(served.asked) == 44


# --- F7 ---------------------------------------------------------------------------------


async def test_f07_one_rejected_key_of_ten_is_noticed_by_nobody(start: Start) -> None:
    asked_with: Counter[str] = Counter()

    async def answer(asked: web.Request) -> web.StreamResponse:
        key = asked.headers["authorization"].removeprefix("Bearer ")
        asked_with[key] += 1
        await asyncio.sleep(0.005)
        if key == "sk-test-k7":
            error = {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}
            return web.json_response(error, status=401)
        return await answered(asked)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, keys=10))
        waiting = iter(range(300))

        async def work(method: str) -> None:
            for _ in waiting:
                call = call_of(gateway, method)
                if method == "Chat":
                    assert (await call).choices[0].message.content == "hello"
                else:
                    assert (await receive(call)).text == "hello"

        await asyncio.gather(*(work(METHODS[i % 2]) for i in range(10)))
    assert 1 <= asked_with["sk-test-k7"] <= 2
    assert {call.code for call in gateway.events.calls} == {"OK"}
    assert len(gateway.events.calls) == 300
    counts = [count for key, count in asked_with.items() if key != "sk-test-k7"]
    assert len(counts) == 9


# --- F8 ---------------------------------------------------------------------------------


async def test_f08_an_outage_meets_no_storm_and_ends_by_itself(
    start: Start, figures: Figures, long: bool
) -> None:
    """Every request fails, under load; then none."""
    seconds, pause = (180.0, 0.01) if long else (4.0, 0.01)
    down = True

    async def answer(asked: web.Request) -> web.StreamResponse:
        if down:
            return web.json_response({"error": {"message": "no"}}, status=500)
        return await answered(asked)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        ending = time.monotonic() + seconds
        calls: list[Any] = []
        while time.monotonic() < ending:
            calls.append(gateway.chat.Chat(request(), timeout=60))
            await asyncio.sleep(pause)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {failure_of(each).reason for each in outcomes} == {"UPSTREAM_ERROR"}  # type: ignore[arg-type]
        offered, asked = len(calls), len(served.asked)
        retries = Retries()
        floor = retries.budget_floor * (1 + seconds / 10)
        assert asked <= offered * (1 + retries.budget) + floor
        figures(
            "F8 requests to a failing upstream for 100 calls", asked / offered * 100, "requests"
        )
        # Calls go on: they are what finds out.
        down = False
        healed = time.monotonic()
        while True:
            outcome = (await asyncio.gather(gateway.chat.Chat(request()), return_exceptions=True))[
                0
            ]
            if not isinstance(outcome, BaseException):
                break
            await asyncio.sleep(0.05)
        took = time.monotonic() - healed
        assert took < 30 * (1 + JITTER) + 5  # the breaker's longest pause
        figures("F8 from the end of an outage to the first answer", took, "s")
        after = [gateway.chat.Chat(request(), timeout=60) for _ in range(100)]
        for whole in await asyncio.gather(*after):
            assert whole.choices[0].message.content == "hello"


# --- F14 --------------------------------------------------------------------------------


class Names(AbstractResolver):
    """A DNS of one name: `address`, or a failure where it is None."""

    def __init__(self) -> None:
        self.address: str | None = "127.0.0.1"
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        """As the real one: OSError where there is no answer."""
        self.asked += 1
        if self.address is None:
            raise OSError(-3, "Temporary failure in name resolution")
        found: ResolveResult = {
            "hostname": host,
            "host": self.address,
            "port": port,
            "family": 2,
            "proto": 0,
            "flags": 0,
        }
        return [found]

    async def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """What the gateway's own connector asks instead of the system's resolver."""
    found = Names()
    monkeypatch.setattr("aiohttp.connector.DefaultResolver", lambda **_: found)
    return found


async def test_f14_a_name_that_does_not_resolve_is_unreachable_and_no_fault_of_the_key(
    start: Start, names: Names
) -> None:
    async with provider(answered) as served:
        url = served.base_url.replace("127.0.0.1", "upstream.test")
        gateway = await start(upstream(url, keys=1), retries=QUICK)
        names.address = None
        failure = await failing(gateway.chat.Chat(request()))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == "UPSTREAM_UNREACHABLE"
        assert failure.metadata["attempts"] == str(names.asked) == "3"
        names.address = "127.0.0.1"
        whole = await gateway.chat.Chat(request())
    assert whole.choices[0].message.content == "hello"
    assert len(whole.header.attempts) == 1


@pytest.mark.parametrize("kept", [True, False], ids=["kept connection", "new connection"])
async def test_f14_an_endpoint_that_moves_is_followed_by_the_same_call(
    start: Start, names: Names, kept: bool
) -> None:
    async def closing(asked: web.Request) -> web.StreamResponse:
        response = await answered(asked)
        if not kept:
            response.force_close()
        return response

    async with provider(closing) as old:
        url = old.base_url.replace("127.0.0.1", "upstream.test")
        port = int(url.rpartition(":")[2].partition("/")[0])
        gateway = await start(upstream(url, keys=1), retries=QUICK)
        await gateway.chat.Chat(request())
    # The old endpoint is gone, and the DNS says so; what it said before is seconds old.
    names.address = "127.0.0.2"
    async with provider(answered, host="127.0.0.2", port=port) as new:
        whole = await gateway.chat.Chat(request())
        assert whole.choices[0].message.content == "hello"
        assert len(new.asked) == 1
