"""The wire is plain gRPC: clients that share no code with ours call a running gateway.

One test for each. `make setup-wire` installs them; which, and why: docs/dependencies.md.
"""

from __future__ import annotations

import json
import signal
from base64 import b64decode
from pathlib import Path
from typing import Any

from google.rpc import error_details_pb2

from harness import Start, simulate, until, upstream
from processes import serve, write_config
from tokenwire_service.simulator import Simulator
from wire.programs import ROOT, messages, program, run

Simulated = tuple[Simulator, str]
CHAT = "tokenwire.v1.ChatService/Chat"
STREAM = "tokenwire.v1.ChatService/StreamChat"
KINDS = ["header", "delta", "finish", "trailer"]


def asking(**directives: Any) -> dict[str, Any]:
    """A ChatRequest in protobuf's JSON."""
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "extraBodyJson": simulate(**directives),
    }


def as_stream(chat: dict[str, Any]) -> str:
    return json.dumps({"chat": chat})


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """What the events are, repetitions in a row counted once."""
    names = [next(iter(event)) for event in events]
    return [name for i, name in enumerate(names) if names[i - 1 : i] != [name]]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"]["content"] for event in events if "delta" in event)


WRONG = {**asking(text="never"), "params": {"temperature": 3}}
CHUNKS = asking(chunks=["你", "好", ", pong"])


async def test_buf_curl(start: Start, simulator: Simulated) -> None:
    buf = program("contract/venv/bin/buf")
    gateway = await start(upstream(simulator[1]))
    curl = (buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge")
    address = f"http://{gateway.running.address}"

    ran = await run(*curl, "-d", json.dumps(asking(text="pong")), f"{address}/{CHAT}")
    assert ran.code == 0, ran.err
    (answer,) = messages(ran.out)
    assert answer["choices"][0]["message"]["content"] == "pong"

    ran = await run(*curl, "-d", as_stream(CHUNKS), f"{address}/{STREAM}")
    assert ran.code == 0, ran.err
    events = messages(ran.out)
    assert kinds(events) == KINDS
    assert text_of(events) == "你好, pong"

    ran = await run(*curl, "-d", json.dumps(WRONG), f"{address}/{CHAT}")
    assert ran.code != 0
    error = json.loads(ran.err)
    assert error["code"] == "invalid_argument"
    told = {detail["type"]: b64decode(detail["value"] + "==") for detail in error["details"]}
    info = error_details_pb2.ErrorInfo.FromString(told["google.rpc.ErrorInfo"])
    assert (info.domain, info.reason) == ("tokenwire", "INVALID_REQUEST")
    (violation,) = error_details_pb2.BadRequest.FromString(
        told["google.rpc.BadRequest"]
    ).field_violations
    assert violation.field == "params.temperature"


async def test_grpcurl(start: Start, simulator: Simulated) -> None:
    grpcurl = program("wire/bin/grpcurl")
    gateway = await start(upstream(simulator[1]))
    address = gateway.running.address

    async def ask(data: str, method: str) -> tuple[int, str, str]:
        ran = await run(grpcurl, "-plaintext", "-format-error", "-d", data, address, method)
        return ran.code, ran.out, ran.err

    listed = await run(grpcurl, "-plaintext", address, "list")
    services = {"ChatService", "TokenizerService", "ModelService"}
    assert {f"tokenwire.v1.{name}" for name in services} <= set(listed.out.split())
    assert "grpc.health.v1.Health" in listed.out

    described = await run(grpcurl, "-plaintext", address, "describe", STREAM.replace("/", "."))
    signature = (
        "( .tokenwire.v1.StreamChatRequest ) returns ( stream .tokenwire.v1.StreamChatResponse )"
    )
    assert signature in described.out

    code, out, err = await ask(json.dumps(asking(text="pong")), CHAT)
    assert code == 0, err
    assert json.loads(out)["choices"][0]["message"]["content"] == "pong"

    code, out, err = await ask(as_stream(CHUNKS), STREAM)
    assert code == 0, err
    events = messages(out)
    assert kinds(events) == KINDS
    assert text_of(events) == "你好, pong"

    code, out, err = await ask(json.dumps(WRONG), CHAT)
    assert code == 64 + 3  # INVALID_ARGUMENT
    error = json.loads(err)
    assert error["code"] == 3
    told = {detail["@type"].rpartition("/")[2]: detail for detail in error["details"]}
    assert told["google.rpc.ErrorInfo"]["reason"] == "INVALID_REQUEST"
    (violation,) = told["google.rpc.BadRequest"]["field_violations"]
    assert violation["field"] == "params.temperature"


async def test_ghz(start: Start, simulator: Simulated) -> None:
    ghz = program("wire/bin/ghz")
    gateway = await start(upstream(simulator[1]))
    calls, at_once = 200, 10
    for method, data in ((CHAT, json.dumps(asking(text="pong"))), (STREAM, as_stream(CHUNKS))):
        before = simulator[0].stats.requests
        load = ("--insecure", "--total", str(calls), "--concurrency", str(at_once))
        ran = await run(
            ghz,
            *load,
            "--call",
            method,
            "--data",
            data,
            "--format",
            "json",
            gateway.running.address,
        )
        assert ran.code == 0, ran.err
        report = json.loads(ran.out)
        assert report["count"] == calls
        assert report["statusCodeDistribution"] == {"OK": calls}
        assert simulator[0].stats.requests == before + calls


async def test_grpc_health_probe(tmp_path: Path, simulator: Simulated) -> None:
    probe = program("wire/bin/grpc-health-probe")
    config = write_config(tmp_path, simulator[1], drain={"propagation": "5m", "grace": "5m"})
    async with serve("--config", config, TEST_KEY="sk-test-k1") as gateway:
        serving = gateway.event("serving")
        assert serving is not None
        address = f"-addr={serving['address']}"
        for service in ("", "tokenwire.v1.ChatService"):
            ran = await run(probe, address, f"-service={service}")
            assert ran.code == 0, ran.err
            assert "status: SERVING" in ran.err
        gateway.signal(signal.SIGTERM)
        await until(lambda: gateway.event("draining") is not None)
        ran = await run(probe, address)
        assert ran.code == 4, ran.err  # its word for: answers, and is not healthy
        assert "NOT_SERVING" in ran.err


async def test_grpclib(start: Start, simulator: Simulated, tmp_path: Path) -> None:
    python = program("wire/venv/bin/python")
    contract = program("contract/venv/bin/python")
    protos = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "protos/tokenwire/v1").glob("*.proto")
    )
    plugin = ROOT / "build/wire/venv/bin/protoc-gen-grpclib_python"
    generated = await run(
        contract,
        *("-m", "grpc_tools.protoc", "-Iprotos", "-Ibuild/contract/include"),
        f"--plugin=protoc-gen-grpclib_python={plugin}",
        f"--python_out={tmp_path}",
        f"--grpclib_python_out={tmp_path}",
        *protos,
    )
    assert generated.code == 0, generated.err

    gateway = await start(upstream(simulator[1]))
    ran = await run(
        python,
        ROOT / "tests/wire/grpclib_client.py",
        *gateway.running.address.rsplit(":", 1),
        PYTHONPATH=str(tmp_path),
        PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python",
    )
    assert ran.code == 0, ran.err
    error = {
        "status": "INVALID_ARGUMENT",
        "reason": "INVALID_REQUEST",
        "fields": ["params.temperature"],
    }
    saw = json.loads(ran.out)
    stream = saw.pop("stream")
    assert saw == {
        "chat": ["你好, pong"],
        "error": error,
        "cancel": "po",
        "protobuf": "python",
        "grpcio": False,
    }
    names = stream["kinds"]
    assert [name for i, name in enumerate(names) if names[i - 1 : i] != [name]] == KINDS
    assert (stream["text"], stream["has_request_id"]) == ("pong", True)
    await until(lambda: simulator[0].stats.aborted_requests == 1)  # the cancel got there
