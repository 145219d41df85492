"""What an OpenTelemetry Collector receives of a gateway at work: traces that hang together, from
the caller's `traceparent` to the upstream's, metrics, and nothing that is nobody's business."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web

from harness import Asked, completion, failing, provider, receive, request, simulate, stream_request
from processes import PROMPT, Program, serve, write_config
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.errors import Fault
from tokenwire_service.simulator import Simulator

ROOT = Path(__file__).parents[2]
KEYS = ",".join(f"sk-test-number-{n}" for n in range(1, 3))
TOKEN = ("authorization", "Bearer token-of-search")
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
UNSAMPLED = "1af7651916cd43dd8448eb211c80319c"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Collector:
    """A running one. `endpoint`: for OTLP."""

    endpoint: str
    folder: Path

    def received(self, kind: str) -> list[dict[str, Any]]:
        """What came so far. `kind`: resourceSpans, resourceMetrics."""
        path = self.folder / f"{kind}.json"
        lines = path.read_text().splitlines() if path.exists() else []
        return [each for line in lines for each in json.loads(line)[kind]]


@asynccontextmanager
async def collecting(
    program: str, folder: Path, tls: dict[str, str] | None = None
) -> AsyncIterator[Collector]:
    endpoint = f"localhost:{free_port()}"
    folder.mkdir(exist_ok=True)
    kinds = {"traces": "resourceSpans", "metrics": "resourceMetrics"}
    config = {
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": endpoint, "tls": tls}}}},
        "exporters": {
            f"file/{signal_}": {"path": f"{folder}/{kind}.json", "flush_interval": "50ms"}
            for signal_, kind in kinds.items()
        },
        "service": {
            "telemetry": {"metrics": {"level": "none"}},
            "pipelines": {
                signal_: {"receivers": ["otlp"], "exporters": [f"file/{signal_}"]}
                for signal_ in kinds
            },
        },
    }
    (folder / "otelcol.yaml").write_text(json.dumps(config))
    with (folder / "otelcol.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, "--config", f"{folder}/otelcol.yaml", stdout=log, stderr=log
        )
        try:
            async with asyncio.timeout(30):
                while b"Everything is ready" not in (folder / "otelcol.log").read_bytes():
                    assert process.returncode is None, (folder / "otelcol.log").read_text()
                    await asyncio.sleep(0.05)
            yield Collector(f"http{'s' if tls else ''}://{endpoint}", folder)
            process.terminate()  # it writes what it has
            async with asyncio.timeout(20):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@dataclass
class Span:
    """One that was received."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    failed: bool
    seconds: float
    attributes: dict[str, Any]


def value(written: dict[str, Any]) -> Any:
    [(kind, found)] = written.items()
    if kind == "arrayValue":
        return [value(each) for each in found["values"]]
    return int(found) if kind == "intValue" else found


def attributes(written: list[dict[str, Any]]) -> dict[str, Any]:
    return {each["key"]: value(each["value"]) for each in written}


def spans(received: list[dict[str, Any]]) -> list[Span]:
    return [
        Span(
            each["name"],
            each["kind"],
            each["traceId"],
            each["spanId"],
            each.get("parentSpanId", ""),
            each.get("status", {}).get("code") == 2,
            (int(each["endTimeUnixNano"]) - int(each["startTimeUnixNano"])) / 1e9,
            attributes(each["attributes"]),
        )
        for resource in received
        for scope in resource["scopeSpans"]
        for each in scope["spans"]
    ]


@dataclass
class Seen:
    """What came of one run. `calls`: trace id by what was asked."""

    spans: list[Span]
    metrics: dict[str, dict[str, Any]]
    resource: dict[str, Any]
    everything: str
    log: list[dict[str, Any]]
    asked: list[Asked]
    requests: dict[str, str] = field(default_factory=dict)

    def tree(self, name: str) -> tuple[Span, list[Span]]:
        """A call's server span and those of its attempts, in order."""
        mine = [s for s in self.spans if s.attributes["tokenwire.request_id"] == name]
        [server] = [s for s in mine if s.kind == 2]
        attempts = [s for s in mine if s.kind == 3]
        return server, sorted(attempts, key=lambda s: s.attributes["tokenwire.attempt"])


@pytest.fixture(scope="module")
def seen(otelcol: str, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return asyncio.run(look(otelcol, tmp_path_factory.mktemp("otlp")))


async def look(otelcol: str, folder: Path) -> Seen:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion(usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})

    async with (
        Simulator(tokens_per_second=0).serving() as url,
        provider(answer) as plain,
        collecting(otelcol, folder / "collector") as collector,
    ):
        config = write_config(
            folder,
            url,
            admin={"listen": "off"},
            otlp={"endpoint": collector.endpoint, "interval": "1h"},
            retries={"max_attempts": 3, "backoff": "1ms", "backoff_cap": "1ms"},
            callers={"search": {"tokens": [{"env": "SEARCH_TOKEN"}]}},
        )
        written = json.loads(Path(config).read_text())
        written["upstreams"]["plain"] = {"base_url": plain.base_url, "keys": [{"env": "TEST_KEY"}]}
        written["models"] = {"mine": {"upstream": "plain", "upstream_model": "theirs"}}
        Path(config).write_text(json.dumps(written))
        async with serve(
            "--config", config, TEST_KEY=KEYS, SEARCH_TOKEN="token-of-search"
        ) as gateway:
            await work(gateway)
            gateway.signal(signal.SIGINT)  # what waits is sent at the end, whatever the interval
            assert await gateway.exit_code() == 0
        lines = [json.loads(line) for line in gateway.lines if line.startswith("{")]
    got = collector.received("resourceSpans")
    measured = collector.received("resourceMetrics")
    return Seen(
        spans(got),
        {
            metric["name"]: metric
            for resource in measured
            for scope in resource["scopeMetrics"]
            for metric in scope["metrics"]
        },
        attributes(got[0]["resource"]["attributes"]),
        json.dumps([got, measured]),
        lines,
        plain.asked,
    )


async def work(gateway: Program) -> None:
    """Calls whose request ids say what they are."""

    def by(name: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
        return [TOKEN, ("x-request-id", name), *more]

    def chat(model: str = "m", **directives: Any) -> chat_service_pb2.ChatRequest:
        made = request(PROMPT, model=model, extra_body_json=simulate(**directives))
        made.params.temperature = 0.5
        made.params.max_completion_tokens = 50
        return made

    caller = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    stream = gateway.chat.StreamChat
    await receive(stream(stream_request(chat(tokens=5)), metadata=by("stream", caller)))
    flaky = chat(tokens=5, fault="server_error", times=1, id="flaky")
    await gateway.chat.Chat(flaky, metadata=by("retried"))
    await failing(gateway.chat.Chat(chat(fault="server_error"), metadata=by("failed")))
    await failing(gateway.chat.Chat(chat(fault="refused"), metadata=by("refused")))
    bad = chat()
    bad.params.temperature = 9
    await failing(gateway.chat.Chat(bad, metadata=by("invalid")))
    await failing(gateway.chat.Chat(chat(), metadata=[("x-request-id", "stranger")]))
    state = ("tracestate", "vendor=1")
    plain = request(PROMPT, model="mine")
    await gateway.chat.Chat(plain, metadata=by("plain", caller, state))
    await gateway.chat.Chat(plain, metadata=by("broken", ("traceparent", "00-nonsense-01")))
    unsampled = ("traceparent", f"00-{UNSAMPLED}-{PARENT}-00")
    await gateway.chat.Chat(plain, metadata=by("unsampled", unsampled))
    batch = chat_service_pb2.BatchChatRequest()
    for _ in range(3):
        batch.items.add(chat=chat(tokens=2))
    async for _ in gateway.chat.BatchChat(batch, metadata=by("batch")):
        pass
    await gateway.chat.Chat(chat("sk-test-number-1"), metadata=by("key"))
    left = stream(stream_request(chat(fault="stall_midway", first_token_ms=0)), metadata=by("left"))
    async for event in left:
        if event.HasField("delta"):
            break
    left.cancel()


def test_a_stream_is_one_span_with_one_attempt_in_the_callers_trace(seen: Seen) -> None:
    server, [attempt] = seen.tree("stream")
    assert (server.trace, server.parent) == (TRACE, PARENT)
    assert (attempt.trace, attempt.parent) == (TRACE, server.id)
    assert server.name == "tokenwire.v1.ChatService/StreamChat"
    assert attempt.name == "chat m"
    assert not server.failed
    assert not attempt.failed
    assert server.seconds >= attempt.seconds > 0
    told = server.attributes
    assert told["rpc.system.name"] == "grpc"
    assert told["rpc.method"] == "tokenwire.v1.ChatService/StreamChat"
    assert told["rpc.status_code"] == "OK"
    assert told["tokenwire.caller"] == "search"
    assert told["tokenwire.attempts"] == 1
    assert told["tokenwire.first_token_seconds"] > 0
    told = attempt.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "openai"
    assert told["gen_ai.request.model"] == "m"
    assert told["gen_ai.request.stream"] is True
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.request.max_tokens"] == 50
    assert told["gen_ai.response.finish_reasons"] == ["stop"]
    assert told["gen_ai.response.id"]
    assert told["gen_ai.response.time_to_first_chunk"] > 0
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["server.address"] == "127.0.0.1"
    assert told["server.port"] > 0
    assert told["http.response.status_code"] == 200
    assert told["tokenwire.key_id"].startswith("key-")


def test_each_attempt_has_a_span_and_what_failed_says_why(seen: Seen) -> None:
    server, [first, second] = seen.tree("retried")
    assert not server.failed
    assert server.parent == ""
    assert server.trace != TRACE
    assert server.attributes["tokenwire.retries"] == 1
    assert first.failed
    assert first.attributes["error.type"] == Fault.SERVER_ERROR.value
    assert first.attributes["http.response.status_code"] == 500
    assert not second.failed
    assert "error.type" not in second.attributes
    assert {first.parent, second.parent} == {server.id}
    server, attempts = seen.tree("failed")
    assert server.failed
    assert server.attributes["rpc.status_code"] == server.attributes["error.type"] == "UNAVAILABLE"
    assert server.attributes["tokenwire.reason"] == "UPSTREAM_ERROR"
    assert len(attempts) == 3


def test_what_is_the_callers_affair_is_no_error_of_the_server(seen: Seen) -> None:
    for name, code in (("refused", "INVALID_ARGUMENT"), ("invalid", "INVALID_ARGUMENT")):
        server, _ = seen.tree(name)
        assert server.attributes["rpc.status_code"] == code
        assert not server.failed
    server, attempts = seen.tree("stranger")
    assert server.attributes["rpc.status_code"] == "UNAUTHENTICATED"
    assert attempts == []
    server, [attempt] = seen.tree("left")
    assert server.attributes["rpc.status_code"] == "CANCELLED"
    assert attempt.attributes["tokenwire.abandoned"] is True
    assert not attempt.failed


def test_upstreams_get_the_trace_of_their_attempt(seen: Seen) -> None:
    plain, broken, unsampled = seen.asked
    server, [attempt] = seen.tree("plain")
    assert attempt.attributes["gen_ai.request.model"] == "theirs"
    assert server.attributes["gen_ai.request.model"] == "mine"
    assert plain.headers["traceparent"] == f"00-{TRACE}-{attempt.id}-01"
    assert plain.headers["tracestate"] == "vendor=1"
    server, [attempt] = seen.tree("broken")  # a new trace where the caller's is none
    assert server.parent == ""
    sampled = f"00-{server.trace}-{attempt.id}-0[13]"  # 2: the trace's id is random
    assert re.fullmatch(sampled, broken.headers["traceparent"])
    # The caller has decided that this trace is not recorded: it goes on all the same.
    assert unsampled.headers["traceparent"].startswith(f"00-{UNSAMPLED}-")
    assert unsampled.headers["traceparent"].endswith("-00")
    assert UNSAMPLED not in {span.trace for span in seen.spans}


def test_a_batch_is_one_span_around_all_attempts(seen: Seen) -> None:
    server, attempts = seen.tree("batch")
    assert len(attempts) == 3
    assert {each.parent for each in attempts} == {server.id}


def test_metrics_are_those_of_the_conventions(seen: Seen) -> None:
    calls = {
        attributes(point["attributes"])["rpc.status_code"]: int(point["count"])
        for point in seen.metrics["rpc.server.call.duration"]["histogram"]["dataPoints"]
        if attributes(point["attributes"])["rpc.method"].endswith("/Chat")
    }
    assert calls == {"OK": 5, "UNAVAILABLE": 1, "INVALID_ARGUMENT": 2, "UNAUTHENTICATED": 1}
    points = seen.metrics["gen_ai.client.token.usage"]["histogram"]["dataPoints"]
    mine = [attributes(point["attributes"]) for point in points]
    assert {each["gen_ai.token.type"] for each in mine} == {"input", "output"}
    assert {each["gen_ai.request.model"] for each in mine} == {"m", "theirs", "other"}
    points = seen.metrics["gen_ai.client.operation.duration"]["histogram"]["dataPoints"]
    failed = [attributes(p["attributes"]) for p in points if "error.type" in str(p)]
    assert {each["error.type"] for each in failed} == {"server_error", "refused", "abandoned"}
    [first] = seen.metrics["gen_ai.client.operation.time_to_first_chunk"]["histogram"]["dataPoints"]
    assert int(first["count"]) == 2
    assert first["explicitBounds"][:3] == [0.001, 0.005, 0.01]


def test_the_log_knows_the_trace(seen: Seen) -> None:
    for name in ("stream", "retried"):
        server, _ = seen.tree(name)
        lines = [line for line in seen.log if line.get("request_id") == name]
        assert {line["trace_id"] for line in lines} == {server.trace}
        assert len([line for line in lines if line["event"] == "call"]) == 1


def test_nothing_was_lost(seen: Seen) -> None:
    assert not [line for line in seen.log if line["event"] == "spans lost"]


def test_nothing_that_is_nobodys_business(seen: Seen) -> None:
    for text in (PROMPT, "sk-test", "token-of-search"):
        assert text not in seen.everything, text
    assert seen.resource["service.name"] == "tokenwire"
    assert seen.resource["service.instance.id"]


def test_the_page_tells_every_attribute_and_metric(seen: Seen) -> None:
    page = (ROOT / "docs/metrics.md").read_text().partition("## OpenTelemetry")[2]
    told = {
        row: set(re.findall(r"`([\w.]+)`", cells))
        for row, cells in re.findall(
            r"^\| (the server span|an attempt's span) \| (.*)$", page, re.M
        )
    }
    for row, kind in (("the server span", 2), ("an attempt's span", 3)):
        sent = {name for span in seen.spans if span.kind == kind for name in span.attributes}
        assert sent <= told[row]
    assert set(seen.metrics) == set(re.findall(r"^\| `((?:rpc|gen_ai)\.[\w.]+)` \|", page, re.M))
    for metric in seen.metrics.values():
        points = metric["histogram"]["dataPoints"]
        names = {name for point in points for name in attributes(point["attributes"])}
        assert names <= set(re.findall(r"`([\w.]+)`", page)), metric["name"]


async def test_by_tls_to_a_collector_whose_authority_a_standard_variable_names(
    otelcol: str, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own = authority.issue_cert("localhost")
    own.private_key_pem.write_to_path(tmp_path / "tls.key")
    own.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    tls = {"cert_file": f"{tmp_path}/tls.crt", "key_file": f"{tmp_path}/tls.key"}
    async with (
        Simulator(tokens_per_second=0).serving() as url,
        collecting(otelcol, tmp_path / "collector", tls) as collector,
    ):
        otlp = {"endpoint": collector.endpoint, "metrics": False}
        top: dict[str, Any] = {"admin": {"listen": "off"}, "drain": {"propagation": "0s"}}
        config = write_config(tmp_path, url, otlp=otlp, **top)
        variables = {"TEST_KEY": KEYS, "OTEL_EXPORTER_OTLP_CERTIFICATE": f"{tmp_path}/ca.pem"}
        async with serve("--config", config, **variables) as gateway:
            await gateway.chat.Chat(request())
            gateway.signal(signal.SIGTERM)  # the drain, too, sends what waits
            assert await gateway.exit_code() == 0
        assert gateway.event("spans lost") is None, gateway.lines
    assert len(spans(collector.received("resourceSpans"))) == 2


# --- a collector that is away ---------------------------------------------------------------


@asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """Takes connections and says nothing."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def away() -> AsyncIterator[str]:
    """Nobody listens there."""
    yield f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("collector", [away, silent])
async def test_a_collector_that_is_away_holds_up_nobody_and_is_counted(
    tmp_path: Path, collector: Any
) -> None:
    async with Simulator(tokens_per_second=0).serving() as url, collector() as endpoint:
        config = write_config(
            tmp_path,
            url,
            admin={"listen": "off"},
            metrics={"listen": "127.0.0.1:0"},
            otlp={"endpoint": endpoint, "queue": 5},
        )
        async with serve("--config", config, TEST_KEY=KEYS) as gateway:
            for _ in range(20):
                received = await receive(gateway.chat.StreamChat(stream_request(request())))
                assert received.failure is None
            serving = gateway.event("serving")
            assert serving is not None
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://{serving['metrics']}/metrics") as answer,
            ):
                page = await answer.text()
            [dropped] = re.findall(r'otlp_spans_total\{outcome="dropped"\} (\S+)', page)
            assert 30 <= float(dropped) <= 35  # two a call; as many as wait, or are on their way
            gateway.signal(signal.SIGINT)
            assert await gateway.exit_code() == 0
        lost = gateway.event("spans lost")
        assert lost is not None
        assert (lost["ended"], lost["sent"]) == (40, 0)
        assert not any("Traceback" in line for line in gateway.lines)
