"""What Prometheus reads of a running gateway: the numbers are those of the calls that were made."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

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
from processes import serve, write_config
from tokenwire.v1 import model_service_pb2
from tokenwire_service import httplistener
from tokenwire_service.config import Limits, Model
from tokenwire_service.labels import OTHER
from tokenwire_service.server import ListenError
from tokenwire_service.settings import Metrics, Retries
from tokenwire_service.simulator import Simulator

ROOT = Path(__file__).parents[2]
ON = Metrics(listen="127.0.0.1:0")
ONCE = Retries(max_attempts=1)
Simulated = tuple[Simulator, str]


class Scrape:
    """One reading: sample by name and labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(parser.text_string_to_metric_families(text))
        self._samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The value of one series; 0 where there is none."""
        return self._samples.get((f"tokenwire_{name}", frozenset(labels.items())), 0.0)

    def labels(self, name: str, label: str) -> set[str]:
        """Values that a label has in a metric."""
        return {
            dict(labels)[label] for metric, labels in self._samples if metric == f"tokenwire_{name}"
        }


async def scrape(gateway: Stubs, **headers: str) -> Scrape:
    text, _ = await fetch(gateway, headers)
    return Scrape(text)


async def fetch(gateway: Stubs, headers: Mapping[str, str]) -> tuple[str, str]:
    return await read(gateway.running.metrics, headers)


async def read(address: str, headers: Mapping[str, str]) -> tuple[str, str]:
    url = f"http://{address}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        assert answer.status == 200
        return await answer.text(), answer.headers["Content-Type"]


async def test_calls_attempts_and_tokens_are_counted(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1], keys=2), metrics=ON)
    chat = request("count me", extra_body_json=simulate(tokens=20))
    for _ in range(3):
        await gateway.chat.Chat(chat)
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.failure is None
    await failing(gateway.chat.Chat(request(extra_body_json=simulate(fault="refused"))))
    await failing(gateway.chat.Chat(request(model="")))  # waits for nothing
    found = await scrape(gateway)
    method = "tokenwire.v1.ChatService/Chat"
    assert found("rpcs_total", method=method, code="OK", reason="", caller="") == 3
    assert found("rpc_duration_seconds_count", method=method) == 5
    assert found("attempts_total", upstream="test", model="m", outcome="ok") == 4
    assert found("attempt_duration_seconds_count", upstream="test") == 5
    assert found("tokens_total", upstream="test", model="m", type="completion") == 80
    assert found("caller_tokens_total", caller="", type="completion") == 80
    prompt = sum(event.prompt_tokens for event in gateway.events.calls)
    assert found("caller_tokens_total", caller="", type="prompt") == prompt > 0
    assert found("time_to_first_token_seconds_count", upstream="test", model="m") == 1
    assert found("upstream_first_token_seconds_count", upstream="test", model="m") == 1
    assert found("deltas_total") == 20
    assert found("queue_wait_seconds_count") == found("key_wait_seconds_count") == 5
    outcomes = {
        key: found("key_attempts_total", upstream="test", key=key, outcome="ok")
        for key in ("k1", "k2")
    }
    assert sum(outcomes.values()) == 4


async def test_gaps_are_those_between_deltas(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), metrics=ON)
    paced = simulate(tokens=6, tokens_per_second=20, first_token_ms=0)
    for _ in range(2):
        await receive(gateway.chat.StreamChat(stream_request(request(extra_body_json=paced))))
    found = await scrape(gateway)
    gaps = found("inter_token_gap_seconds_count")
    assert gaps == found("inter_token_gap_seconds_bucket", le="+Inf")
    assert 2 <= gaps <= 10  # of 12 deltas two were the first; some may have come together
    # 50 ms each, or more: on a busy machine those that come late come together.
    assert found("inter_token_gap_seconds_sum") >= 0.3
    counts = [sample for sample in found.text.splitlines() if "inter_token_gap_seconds_b" in sample]
    values = [float(line.split()[-1]) for line in counts]
    assert values == sorted(values)


async def test_keys_tell_their_state_and_why(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1], keys=3), metrics=ON, retries=ONCE)
    faults = (
        {"fault": "rate_limited", "keys": ["t-k1"], "retry_after_s": 100},
        {"fault": "invalid_api_key", "keys": ["t-k2"]},
    )
    for fault in faults:
        for _ in range(6):
            await receive(
                gateway.chat.StreamChat(stream_request(request(extra_body_json=simulate(**fault))))
            )
    found = await scrape(gateway)
    assert found("key_state", upstream="test", key="k1", state="partly") == 1
    assert found("key_state", upstream="test", key="k2", state="retired") == 1
    assert found("key_state", upstream="test", key="k2", state="ready") == 0
    assert found("key_state", upstream="test", key="k3", state="ready") == 1
    for state in ("partly", "retired", "ready"):
        assert found("keys", upstream="test", state=state) == 1
    cooling = {"scope": "group_model", "state": "cooling", "fault": "rate_limited"}
    assert found("closures", upstream="test", **cooling) == 1
    retired = {"scope": "key", "state": "retired", "fault": "key_rejected"}
    assert found("closures", upstream="test", **retired) == 1
    assert found("key_opens_seconds", upstream="test", key="k1") == 0  # but for one model
    assert found("key_opens_seconds", upstream="test", key="k2") == float("inf")
    assert found("key_attempts_total", upstream="test", key="k2", outcome="key_rejected") == 1
    assert found("attempts_total", upstream="test", model=OTHER, outcome="rate_limited") == 1


async def test_retries_count_against_the_budget(start: Start, simulator: Simulated) -> None:
    quick = Retries(max_attempts=3, backoff=0.001, backoff_cap=0.001, budget_floor=50)
    gateway = await start(upstream(simulator[1]), metrics=ON, retries=quick)
    before = (await scrape(gateway))("retry_budget")
    await failing(gateway.chat.Chat(request(extra_body_json=simulate(fault="server_error"))))
    found = await scrape(gateway)
    assert found("retries_total", upstream="test") == 2
    assert before - 2 <= found("retry_budget") <= before
    assert found("backoff_seconds_total") > 0


async def test_slots_queues_and_drops(start: Start) -> None:
    free = asyncio.Event()

    async def answer(_: object) -> object:
        await free.wait()
        return completion()

    async with provider(answer) as served:  # type: ignore[arg-type]
        limits = Limits(in_flight=2, queue=1)
        gateway = await start(upstream(served.base_url, in_flight=2), metrics=ON, limits=limits)
        calls = [asyncio.ensure_future(gateway.chat.Chat(request())) for _ in range(3)]
        await until(
            lambda: served.open == 2 and gateway.running.pools["test"].bulkhead.waiting == 1
        )
        await failing(gateway.chat.Chat(request()))
        found = await scrape(gateway)
        free.set()
        await asyncio.gather(*calls)
    assert found("in_flight_calls") == found("slots") == 2
    assert found("upstream_in_flight_calls", upstream="test") == 2
    assert found("upstream_slots", upstream="test") == 2
    assert found("upstream_queued_calls", upstream="test") == 1
    assert found("drops_total", cause="upstream", upstream="test") == 1
    assert found("drops_total", cause="gateway", upstream="") == 0
    assert (
        sum(found("key_in_flight_requests", upstream="test", key=key) for key in ("k1", "k2")) == 2
    )
    after = await scrape(gateway)
    assert after("in_flight_calls") == after("upstream_queued_calls", upstream="test") == 0


async def test_names_that_callers_invent_make_no_series(start: Start, simulator: Simulated) -> None:
    models = (Model(name="mine", upstream="test", upstream_model="theirs", aliases=("also",)),)
    gateway = await start(
        upstream(simulator[1]),
        models=models,
        metrics=Metrics(listen="127.0.0.1:0", model_names=2),
        retries=ONCE,
    )
    refused = simulate(fault="refused")
    for number in range(20):  # names that nobody answers for take no place
        await failing(gateway.chat.Chat(request(model=f"no-{number}", extra_body_json=refused)))
    for name in ("mine", "also", *(f"yes-{number}" for number in range(20))):
        received = await receive(gateway.chat.StreamChat(stream_request(request(model=name))))
        assert received.failure is None
    with pytest.raises(aiohttp.ClientError):  # a method that callers invent is none either
        async with aiohttp.ClientSession() as session:
            await session.get(f"http://{gateway.running.address}/tokenwire.v1.Invented/Method")
    await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
    found = await scrape(gateway)
    sent = {"theirs", "yes-0", "yes-1", OTHER}
    asked = {"mine", "also", "yes-0", "yes-1", OTHER}
    assert found.labels("attempts_total", "model") - {""} == sent
    assert found.labels("time_to_first_token_seconds_count", "model") == asked
    assert found("attempts_total", upstream="test", model=OTHER, outcome="ok") == 18
    assert found("attempts_total", upstream="test", model=OTHER, outcome="refused") == 20


async def test_a_key_never_becomes_a_label(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), metrics=ON)
    for name in ("sk-test-k1", "x-sk-test-k2-x"):
        received = await receive(gateway.chat.StreamChat(stream_request(request(model=name))))
        assert received.failure is None
    assert "sk-test" not in (await scrape(gateway)).text


async def test_the_page_on_metrics_tells_every_one(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), metrics=ON)
    chat = stream_request(request(extra_body_json=simulate(tokens=3)))
    await receive(gateway.chat.StreamChat(chat))
    await failing(gateway.chat.Chat(request(extra_body_json=simulate(fault="invalid_api_key"))))
    await until(lambda: len(gateway.events.calls) == 2)
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \|([^|]*)\|[^|]*\| .+ \|$",
        (ROOT / "docs/metrics.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    told = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(told) == len(rows)
    kinds = {"counter": "_total", "info": "_info"}
    found = {}
    for family in (await scrape(gateway)).families:
        name = family.name
        if family.type == "counter" and not name.endswith("_total"):
            name += kinds["counter"]
        kind = "info" if name.endswith("_info") else family.type
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (kind, frozenset(labels))
        assert family.documentation
        assert family.samples or name == "tokenwire_retries_total", name
    found["tokenwire_retries_total"] = ("counter", frozenset({"upstream"}))
    assert found == told


async def test_openmetrics_for_who_asks_for_it(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), metrics=ON)
    await gateway.chat.Chat(request())
    _, kind = await fetch(gateway, {})
    assert kind.startswith("text/plain")
    text, kind = await fetch(gateway, {"Accept": "application/openmetrics-text;version=1.0.0"})
    assert kind.startswith("application/openmetrics-text")
    assert "tokenwire_rpcs" in {f.name for f in openmetrics.text_string_to_metric_families(text)}


async def test_it_is_off_by_default(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    assert gateway.running.metrics == ""


def test_what_is_off_costs_no_memory() -> None:
    """Not even that of the libraries."""
    heavy = "sys.modules.keys() & {'opentelemetry', 'prometheus_client', 'aiohttp.web'}"
    code = f"import sys, tokenwire_service.server; sys.exit(str({heavy} or ''))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.strip() == ""


async def test_nothing_else_is_there(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), metrics=ON)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{gateway.running.metrics}/") as answer:
            assert answer.status == 404
        async with session.post(f"http://{gateway.running.metrics}/metrics") as answer:
            assert answer.status == 405


async def test_a_port_that_is_taken_ends_the_start(start: Start, simulator: Simulated) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"{listen} .metrics.listen.: "):
            await start(upstream(simulator[1]), metrics=Metrics(listen=listen))


async def test_another_configuration_is_counted_and_takes_effect(
    simulator: Simulated, tmp_path: Path
) -> None:
    top: dict[str, Any] = {"admin": {"listen": "off"}, "metrics": {"listen": "127.0.0.1:0"}}
    config = write_config(tmp_path, simulator[1], **top)
    async with serve("--config", config, TEST_KEY="sk-test-number-1") as gateway:
        serving = gateway.event("serving")
        assert serving is not None

        async def told() -> Scrape:
            return Scrape((await read(serving["metrics"], {}))[0])

        found = await told()
        assert found("config_generation") == 1
        assert found("config_reload_failures_total") == 0
        models = {"mine": {"upstream": "test", "upstream_model": "theirs"}}
        write_config(tmp_path, simulator[1], limits={"in_flight": 7}, models=models, **top)
        gateway.signal(signal.SIGHUP)
        while (found := await told())("config_generation") < 2:
            await asyncio.sleep(0.05)
        assert found("slots") == 7
        refused = request(model="mine", extra_body_json=simulate(fault="refused"))
        await failing(gateway.chat.Chat(refused))
        found = await told()
        assert found("attempts_total", upstream="test", model="theirs", outcome="refused") == 1
        Path(config).write_text("limits: nonsense")
        gateway.signal(signal.SIGHUP)
        while (found := await told())("config_reload_failures_total") < 1:
            await asyncio.sleep(0.05)
        assert found("config_generation") == 2
        assert found("config_refused") == 1
        write_config(tmp_path, simulator[1], limits={"in_flight": 7}, models=models, **top)
        gateway.signal(signal.SIGHUP)
        while (await told())("config_refused"):
            await asyncio.sleep(0.05)


async def test_a_reader_that_stopped_reading_keeps_no_gateway_from_its_end() -> None:
    body = b"x" * (32 << 20)  # more than any socket takes
    pages = {"/metrics": httplistener.page(lambda _: (body, "text/plain"))}
    logger = logging.getLogger("tokenwire.test")
    with socket.socket() as stalled:
        async with asyncio.timeout(30):  # it was a minute
            async with httplistener.serving(
                "127.0.0.1:0", pages, logger, setting="metrics.listen"
            ) as address:
                host, _, port = address.rpartition(":")
                await asyncio.to_thread(stalled.connect, (host, int(port)))
                stalled.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert await asyncio.to_thread(stalled.recv, 15) == b"HTTP/1.1 200 OK"
