"""Keys: which one serves, which rests, which is never used again, and what the caller hears."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import pytest
from aiohttp import web

from harness import (
    Start,
    Stubs,
    completion,
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
from tokenwire_service.config import Key, Retries, Upstream
from tokenwire_service.secret import Secret
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
K1, K2, K3 = "t-k1", "t-k2", "t-k3"  # how the simulator names the harness's keys


def grouped(base_url: str, *groups: str) -> Upstream:
    """An upstream whose keys k1, k2, ... belong to these quota groups."""
    keys = tuple(
        Key(id=f"k{n}", secret=Secret(f"sk-test-k{n}"), quota_group=group)
        for n, group in enumerate(groups, 1)
    )
    return Upstream(name="test", base_url=base_url, keys=keys, passthrough=True)


async def serve_many(gateway: Stubs, number: int, **directives: object) -> list[str]:
    """Makes calls one after the other; the ids of the keys that answered."""
    ids = []
    for _ in range(number):
        whole = await gateway.chat.Chat(request(extra_body_json=simulate(**directives)))
        ids.append(whole.header.attempts[-1].key_id)
    return ids


@pytest.mark.parametrize("fault", ["rate_limited", "quota_exhausted", "payment_required"])
@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_a_limit_on_one_key_is_absorbed_by_the_next(
    start: Start, simulator: Simulated, method: str, fault: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request("Count to five", extra_body_json=simulate(fault=fault, keys=[K1]))
    if method == "Chat":
        assert (await gateway.chat.Chat(chat)).choices[0].message.content != ""
    else:
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
        assert received.failure is None
        assert received.text != ""
    assert simulator[0].stats.by_key == {K1: 1, K2: 1}


async def test_a_limited_key_rests_as_long_as_it_was_told_and_then_serves_again(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    once = {"fault": "rate_limited", "keys": [K1], "times": 1, "id": "once", "retry_after_s": 0.4}
    assert await serve_many(gateway, 5, **once) == ["k2"] * 5
    await asyncio.sleep(0.5)  # 0.4 s and up to 10 % on top
    assert "k1" in await serve_many(gateway, 2, **once)
    assert simulator[0].stats.by_id["once"]["faults"] == 1


@pytest.mark.parametrize("fault", ["invalid_api_key", "account_deactivated"])
async def test_a_rejected_key_is_never_used_again(
    start: Start, simulator: Simulated, fault: str
) -> None:
    gateway = await start(upstream(simulator[1], keys=3))
    served = await serve_many(gateway, 20, fault=fault, keys=[K2])
    assert simulator[0].stats.by_key[K2] == 1
    assert Counter(served) == {"k1": 10, "k3": 10}


async def test_a_key_without_access_to_one_model_serves_the_others(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    denied = simulate(fault="access_denied", keys=[K1])
    for _ in range(5):
        await gateway.chat.Chat(request(model="closed", extra_body_json=denied))
    assert simulator[0].stats.by_key == {K1: 1, K2: 5}
    for _ in range(4):
        await gateway.chat.Chat(request(model="open"))
    assert simulator[0].stats.by_key[K1] > 1


async def test_all_keys_limited_beyond_the_deadline_is_told_at_once(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=simulate(fault="rate_limited", retry_after_s=30))
    failure = await failing(gateway.chat.Chat(chat, timeout=20))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.reason == "RATE_LIMITED"
    assert failure.metadata["upstream"] == "test"
    assert failure.metadata["upstreamStatus"] == "429"
    assert failure.metadata["upstreamCode"] == "rate_limit_exceeded"
    assert failure.metadata["attempts"] == "2"
    assert 29 < failure.retry_seconds <= 33
    assert 29_000 < int(failure.pushback) <= 33_000
    violation = failure.details["QuotaFailure"].violations[0]
    assert violation.subject == "upstream:test"
    assert simulator[0].stats.by_key == {K1: 1, K2: 1}
    # The next caller is told the same without any request, and only of the time that is left.
    failure = await failing(gateway.chat.Chat(request(), timeout=20))
    assert failure.reason == "RATE_LIMITED"
    assert failure.metadata["attempts"] == "0"
    assert failure.retry_seconds <= 33
    assert simulator[0].stats.requests == 2


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_all_keys_limited_within_the_deadline_is_waited_for(
    start: Start, simulator: Simulated, method: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    limited = simulate(fault="rate_limited", times=2, id="both", retry_after_s=0.2)
    chat = request("Count to five", extra_body_json=limited)
    if method == "Chat":
        header = (await gateway.chat.Chat(chat, timeout=20)).header
    else:
        received = await receive(gateway.chat.StreamChat(stream_request(chat), timeout=20))
        assert received.failure is None
        header = received.header
    reasons = [attempt.error_reason for attempt in header.attempts]
    assert reasons == [error_reason_pb2.ERROR_REASON_RATE_LIMITED] * 2 + [0]
    assert simulator[0].stats.requests == 3


async def test_callers_that_wait_for_one_key_return_one_at_a_time(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1], keys=1))
    stats = simulator[0].stats
    # Twice: the probe after the first rest is refused again, and costs one request, not ten.
    limited = simulate(fault="rate_limited", times=2, id="both", retry_after_s=0.2)
    # One that starts the rest, ten that meet it.
    first = gateway.chat.Chat(request(extra_body_json=limited), timeout=20)
    await until(lambda: stats.requests == 1)
    calls = [gateway.chat.Chat(request(extra_body_json=limited), timeout=20) for _ in range(10)]
    answers = await asyncio.gather(first, *calls)
    assert all(answer.choices for answer in answers)
    assert stats.by_id["both"]["faults"] == 2


async def test_all_keys_out_of_credit_is_no_matter_of_waiting(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=simulate(fault="quota_exhausted"))
    failure = await failing(gateway.chat.Chat(chat))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.reason == "UPSTREAM_QUOTA_EXHAUSTED"
    assert failure.pushback == "-1"
    assert "RetryInfo" not in failure.details
    assert failure.details["QuotaFailure"].violations[0].subject == "upstream:test"
    again = await failing(gateway.chat.Chat(request()))
    assert (again.reason, again.pushback) == ("UPSTREAM_QUOTA_EXHAUSTED", "-1")
    assert again.metadata["attempts"] == "0"
    assert simulator[0].stats.requests == 2


async def test_all_keys_rejected_is_the_operators_matter_and_never_the_callers_token(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request(extra_body_json=simulate(fault="invalid_api_key"))
    failure = await failing(gateway.chat.Chat(chat))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "UPSTREAM_CREDENTIALS_REJECTED"
    assert failure.pushback == "-1"
    again = await failing(gateway.chat.Chat(request()))
    assert again.reason == "UPSTREAM_CREDENTIALS_REJECTED"
    assert simulator[0].stats.requests == 2


async def test_keys_of_one_account_share_its_limit(start: Start, simulator: Simulated) -> None:
    gateway = await start(grouped(simulator[1], "a", "a", "b"))
    limited = {"fault": "rate_limited", "keys": [K1], "retry_after_s": 30}
    assert await serve_many(gateway, 6, **limited) == ["k3"] * 6
    assert simulator[0].stats.by_key == {K1: 1, K3: 6}


async def test_a_dead_account_takes_all_its_keys_along(start: Start, simulator: Simulated) -> None:
    gateway = await start(grouped(simulator[1], "a", "a", "b"))
    served = await serve_many(gateway, 6, fault="account_deactivated", keys=[K1])
    assert served == ["k3"] * 6
    assert K2 not in simulator[0].stats.by_key


async def test_a_rejected_key_says_nothing_about_the_others_of_its_account(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(grouped(simulator[1], "a", "a"))
    assert await serve_many(gateway, 4, fault="invalid_api_key", keys=[K1]) == ["k2"] * 4


async def test_a_limit_for_one_model_leaves_the_key_to_the_others(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1], keys=1))
    limited = simulate(fault="rate_limited", retry_after_s=60)
    chat = request(model="a", extra_body_json=limited)
    failure = await failing(gateway.chat.Chat(chat, timeout=20))
    assert failure.reason == "RATE_LIMITED"
    assert (await gateway.chat.Chat(request(model="b"))).choices[0].message.content != ""


async def test_equal_keys_take_turns(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1], keys=3))
    assert Counter(await serve_many(gateway, 12)) == {"k1": 4, "k2": 4, "k3": 4}


async def test_weights_share_the_traffic(start: Start, simulator: Simulated) -> None:
    keys = (
        Key(id="k1", secret=Secret("sk-test-k1"), weight=3),
        Key(id="k2", secret=Secret("sk-test-k2"), weight=1),
    )
    gateway = await start(Upstream(name="test", base_url=simulator[1], keys=keys, passthrough=True))
    assert Counter(await serve_many(gateway, 20)) == {"k1": 15, "k2": 5}


async def test_organizations_take_turns_with_keys_that_have_none(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    keys = (
        Key(id="k1", secret=Secret("sk-test-k1")),
        Key(id="own", secret=Secret("sk-test-own"), organization="org-own"),
    )
    async with provider(answer) as served:
        gateway = await start(
            Upstream(
                name="test",
                base_url=served.base_url,
                keys=keys,
                organizations=("org-a", "org-b"),
                passthrough=True,
            )
        )
        for _ in range(8):
            await gateway.chat.Chat(request())
    by_key: dict[str, list[str]] = {}
    for asked in served.asked:
        key = asked.headers["authorization"].rpartition("-")[2]
        by_key.setdefault(key, []).append(asked.headers["openai-organization"])
    assert by_key == {"k1": ["org-a", "org-b"] * 2, "own": ["org-own"] * 4}


async def test_attempts_end_at_the_configured_maximum(start: Start, simulator: Simulated) -> None:
    retries = Retries(max_attempts=4, backoff=0.001, backoff_cap=0.001)
    gateway = await start(upstream(simulator[1], keys=10), retries=retries)
    for fault, reason in (
        ("server_error", "UPSTREAM_ERROR"),
        ("rate_limited", "RATE_LIMITED"),
        ("invalid_api_key", "UPSTREAM_CREDENTIALS_REJECTED"),
    ):
        simulator[0].stats.reset()
        chat = request(model=fault, extra_body_json=simulate(fault=fault, retry_after_s=30))
        failure = await failing(gateway.chat.Chat(chat))
        assert failure.reason == reason
        assert failure.metadata["attempts"] == "4"
        assert failure.pushback == "-1"
        assert simulator[0].stats.requests == 4


async def test_an_outage_is_not_answered_with_a_storm(start: Start, simulator: Simulated) -> None:
    retries = Retries(budget=0, budget_floor=3, backoff=0.001, backoff_cap=0.001)
    gateway = await start(upstream(simulator[1]), retries=retries)
    chat = request(extra_body_json=simulate(fault="server_error"))
    failures = await asyncio.gather(*(failing(gateway.chat.Chat(chat)) for _ in range(30)))
    assert {failure.reason for failure in failures} == {"UPSTREAM_ERROR"}
    # Three retries at most, and the breaker ends it after ten failures in a row.
    assert 10 <= simulator[0].stats.requests <= 34
