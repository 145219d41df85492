"""Headers that providers really sent: what delay they ask for, and that a 200 asks for none."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web

from corpus import runner, verdicts
from harness import Start, chunk, completion, provider, upstream
from tokenwire_service.config import Config, Key, Model, Upstream
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import (
    COOLDOWN_CAP,
    FIRST_COOLDOWN,
    JITTER,
    KeyRing,
    Lease,
    Unavailable,
)
from tokenwire_service.secret import Secret
from tokenwire_service.upstream.classify import classify, go_duration, retry_delay

CORPUS_CAP = 120.0  # seconds above which the delay cases call a delay too long


def read(name: str) -> dict[str, Any]:
    """One file of the folder."""
    found: dict[str, Any] = json.loads((runner.CORPUS / "headers" / name).read_bytes())
    return found


def lowered(headers: Mapping[str, list[str]]) -> dict[str, str]:
    """As the client hands headers on."""
    return {name.lower(): values[0] for name, values in headers.items()}


def test_a_stated_delay_is_understood_or_nothing_is_assumed() -> None:
    cases = read("delay_cases.json")["retry_after"]
    assert len(cases) == 18
    for case in cases:
        now = datetime.datetime.fromisoformat(case["now"]).timestamp()
        delay = retry_delay(lowered(case["headers"]), now=lambda now=now: now)  # type: ignore[misc]
        if case["too_long"]:
            assert delay is not None
            assert delay > CORPUS_CAP, case
        else:
            assert delay == pytest.approx(case["delay_s"]), case


def test_a_delay_that_is_too_long_cools_no_longer_than_the_cap() -> None:
    for case in read("delay_cases.json")["retry_after"]:
        if case["too_long"]:
            ring = KeyRing(upstream("http://unused", keys=1), random=lambda: 1.0)
            lease = ring.lease("m", now=0.0)
            assert isinstance(lease, Lease)
            fault = classify(429, lowered(case["headers"]), b"")
            assert fault.fault is Fault.RATE_LIMITED
            ring.fail(lease, fault, now=0.0)
            ring.release(lease)
            found = ring.lease("m", now=0.0)
            assert isinstance(found, Unavailable)
            assert CORPUS_CAP < found.until <= COOLDOWN_CAP * (1 + JITTER), case


def ring_after(fault: UpstreamFault) -> KeyRing:
    """Three keys, the first two of one account, after the first met a fault at second 0."""
    keys = tuple(
        Key(id=f"k{i}", secret=Secret(f"s{i}"), quota_group=group)
        for i, group in enumerate(("acme", "acme", "other"), 1)
    )
    of = Upstream(name="u", base_url="http://unused", keys=keys)
    ring = KeyRing(of, random=lambda: 0.0)
    lease = ring.lease("m", now=0.0)
    assert isinstance(lease, Lease)
    assert lease.key.id == "k1"
    ring.fail(lease, fault, now=0.0)
    ring.release(lease)
    return ring


def serving(ring: KeyRing, model: str, now: float) -> set[str]:
    """The keys that may be leased now, each once."""
    leases = []
    while isinstance(found := ring.lease(model, now), Lease) and len(leases) < 9:
        leases.append(found)
    for lease in leases:
        ring.release(lease)
    return {lease.key.id for lease in leases}


def cools_until(ring: KeyRing, moment: float) -> None:
    """Exactly until then, the whole account, for this model, and nobody and nothing else."""
    assert serving(ring, "m", 0.0) == {"k3"}
    assert serving(ring, "m", moment * (1 - 1e-9)) == {"k3"}
    assert serving(ring, "m2", 0.0) == {"k1", "k2", "k3"}
    # One probes it, and with it the account is open again.
    leases = [ring.lease("m", moment * (1 + 1e-9)) for _ in range(4)]
    probes = [each for each in leases if isinstance(each, Lease) and each.key.id != "k3"]
    (probe,) = probes
    ring.succeed(probe)
    for each in leases:
        assert isinstance(each, Lease)
        ring.release(each)
    assert serving(ring, "m", moment + 10.0) == {"k1", "k2", "k3"}


def test_every_stated_delay_cools_the_account_for_just_as_long() -> None:
    for case in read("delay_cases.json")["retry_after"]:
        now = datetime.datetime.fromisoformat(case["now"]).timestamp()
        fault = classify(429, lowered(case["headers"]), b"", lambda now=now: now)  # type: ignore[misc]
        stated = fault.retry_after if case["too_long"] else case["delay_s"]
        cools_until(
            ring_after(fault), FIRST_COOLDOWN if stated is None else min(stated, COOLDOWN_CAP)
        )


def test_every_recorded_reset_of_an_exhausted_dimension_cools_for_just_as_long() -> None:
    """The recorded sets with the recorded limits used up: one, the other, both."""
    tried = 0
    for case in read("ratelimit_headers.json")["cases"]:
        parsed = case["expected"]["parsed"]
        resets = {
            dimension: reset[0]["seconds"]
            for dimension in ("requests", "tokens")
            if (reset := parsed.get(f"x-ratelimit-reset-{dimension}")) and reset[0].get("seconds")
        }
        for exhausted in (["requests"], ["tokens"], ["requests", "tokens"]):
            headers = lowered(case["headers"])
            if "retry-after" in headers or not set(exhausted) <= set(resets):
                continue
            headers |= {f"x-ratelimit-remaining-{dimension}": "0" for dimension in exhausted}
            fault = classify(429, headers, b"")
            longest = max(resets[dimension] for dimension in exhausted)
            cools_until(ring_after(fault), min(longest, COOLDOWN_CAP))
            tried += 1
    assert tried > 30


def test_a_recorded_retry_after_wins_over_every_reset() -> None:
    cases = [c for c in read("ratelimit_headers.json")["cases"] if "retry-after" in c["headers"]]
    assert len(cases) == 3
    for case in cases:
        headers = lowered(case["headers"])
        headers |= {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "17s"}
        cools_until(ring_after(classify(429, headers, b"")), float(headers["retry-after"]))


def test_what_a_recorded_answer_says_is_left_lowers_no_limit_below_it() -> None:
    """Also where little is left: as many as that may be under way, and what is already."""
    told = 0
    for case in read("ratelimit_headers.json")["cases"]:
        left = lowered(case["headers"]).get("x-ratelimit-remaining-requests", "")
        if not left.isdigit():
            continue
        ring = KeyRing(upstream("http://unused", keys=1))
        first = ring.lease("m", 0.0)
        assert isinstance(first, Lease)
        ring.succeed(first)
        ring.remaining(first, int(left), None, 0.0)
        many = [ring.lease("m", 0.0) for _ in range(60)]
        assert sum(isinstance(each, Lease) for each in many) == min(60, int(left)), case
        told += 1
    assert told > 20


def test_resets_are_read_as_go_durations() -> None:
    cases = read("delay_cases.json")["go_duration_reset_values"]
    assert len(cases) == 9
    for case in cases:
        seconds = None if case["seconds"] == "absolute" else case["seconds"]
        assert go_duration(case["value"]) == pytest.approx(seconds), case


def test_every_recorded_reset_is_read() -> None:
    read_values = 0
    for case in read("ratelimit_headers.json")["cases"]:
        for name, parsed in case["expected"]["parsed"].items():
            if "-reset" in name:
                value = lowered(case["headers"])[name]
                assert go_duration(value) == pytest.approx(parsed[0].get("seconds")), case
                read_values += 1
    assert read_values > 40


def test_the_exhausted_dimension_says_how_long_to_wait() -> None:
    """The recorded sets, had the recorded limit been used up."""
    for case in read("ratelimit_headers.json")["cases"]:
        for dimension in ("requests", "tokens"):
            headers = lowered(case["headers"])
            reset = case["expected"]["parsed"].get(f"x-ratelimit-reset-{dimension}")
            if reset and reset[0].get("seconds") and "retry-after" not in headers:
                headers[f"x-ratelimit-remaining-{dimension}"] = "0"
                fault = classify(429, headers, b"")
                assert isinstance(fault, UpstreamFault)
                assert fault.retry_after == pytest.approx(reset[0]["seconds"]), case


async def test_no_answer_that_is_not_a_rate_limit_cools_a_key(start: Start) -> None:
    cases = read("ratelimit_headers.json")["cases"]
    assert {case["expected"]["must_cool_down"] for case in cases} == {False}

    async def answer(asked: web.Request) -> web.StreamResponse:
        case = cases[int(asked.path.split("/")[1])]
        headers = lowered(case["headers"])
        if case["status"] != 200:
            return web.json_response({"error": {}}, status=case["status"], headers=headers)
        if "stream" not in await asked.json():
            whole = completion()
            whole.headers.update(headers)
            return whole
        body = chunk("hello", finish_reason="stop") + b"data: [DONE]\n\n"
        return web.Response(body=body, content_type="text/event-stream", headers=headers)

    async with provider(answer) as served:
        root = served.base_url.removesuffix("/v1")
        names = [f"case-{i}" for i in range(len(cases))]
        gateway = await start(
            config=Config(
                listen="127.0.0.1:0",
                upstreams=tuple(
                    upstream(f"{root}/{i}", keys=1, name=name, passthrough=False)
                    for i, name in enumerate(names)
                ),
                models=tuple(Model(name=name, upstream=name) for name in names),
            )
        )
        for name, case in zip(names, cases, strict=True):
            for unary in (True, False):
                ask = runner.whole if unary else runner.stream
                answered = await ask(gateway.chat, name, timeout=100.0)
                assert (answered.failure is None) == (case["status"] == 200), case
                ring = gateway.running.pools[name].ring
                assert verdicts.standing(ring, name) == "serves", case
