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
from tokenwire_service.config import Config, Model
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import COOLDOWN_CAP, JITTER, KeyRing, Lease, Unavailable
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
