"""What the admin port and the status page tell of a gateway that works, and to whom."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from pathlib import Path

import grpc
import pytest
from aiohttp import ClientSession, TCPConnector, UnixConnector

from harness import Start, Stubs, receive, request, simulate, stream_request, upstream
from tokenwire.admin.v1 import admin_service_pb2, admin_service_pb2_grpc
from tokenwire_service.config import Admin, Config
from tokenwire_service.server import ListenError
from tokenwire_service.settings import StatusPage
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
FAST = simulate(tokens=30, tokens_per_second=0)


def config(url: str, page: str = "off") -> Config:
    return Config(
        listen="127.0.0.1:0",
        admin=Admin(listen="127.0.0.1:0"),
        status_page=StatusPage(listen=page),
        upstreams=(upstream(url),),
    )


async def watched(
    gateway: Stubs, count: int, interval: float = 0.1
) -> list[admin_service_pb2.WatchStatusResponse]:
    """The first messages of a watch."""
    asked = admin_service_pb2.WatchStatusRequest()
    asked.interval.FromNanoseconds(int(interval * 1e9))
    async with grpc.aio.insecure_channel(gateway.running.admin) as channel:
        call = admin_service_pb2_grpc.AdminServiceStub(channel).WatchStatus(asked)
        messages = [await anext(aiter(call)) for _ in range(count)]
        call.cancel()
    return messages


async def test_a_watch_tells_each_second_once(start: Start, simulator: Simulated) -> None:
    gateway = await start(config=config(simulator[1]))
    received = await receive(gateway.chat.StreamChat(stream_request(request(extra_body_json=FAST))))
    assert received.failure is None
    failing_call = gateway.chat.Chat(request(extra_body_json=simulate(fault="bad_request")))
    with pytest.raises(grpc.aio.AioRpcError):
        await failing_call
    messages = await watched(gateway, 25)
    assert len({m.listing.upstreams[0].keys[0].id for m in messages}) == 1
    seconds = list(itertools.chain.from_iterable(m.seconds for m in messages))
    assert [each.number for each in seconds] == list(range(len(seconds)))
    assert len(seconds) >= 2
    assert sum(each.succeeded for each in seconds) == 1
    assert sum(found.count for each in seconds for found in each.failed) == 1
    assert sum(each.deltas for each in seconds) == 30
    assert (
        sum(each.completion_tokens for each in seconds) == received.trailer.usage.completion_tokens
    )
    (first,) = [each for each in seconds if each.HasField("first_text_p50")]
    assert 0 < first.first_text_p50.ToNanoseconds() <= first.first_text_p99.ToNanoseconds()


async def test_deltas_are_told_while_their_stream_runs(start: Start, simulator: Simulated) -> None:
    gateway = await start(config=config(simulator[1]))
    slow = simulate(tokens=1000, tokens_per_second=50, first_token_ms=0)
    call = gateway.chat.StreamChat(stream_request(request(extra_body_json=slow)))
    async for _ in call:
        break
    messages = await watched(gateway, 22)
    seconds = list(itertools.chain.from_iterable(m.seconds for m in messages))
    assert sum(each.deltas for each in seconds) > 20
    assert seconds[-1].in_flight == 1
    assert not any(each.succeeded for each in seconds)
    call.cancel()


@pytest.mark.parametrize("interval", [0.0, 0.05, 61.0, -1.0])
async def test_an_interval_out_of_range_is_refused(
    start: Start, simulator: Simulated, interval: float
) -> None:
    gateway = await start(config=config(simulator[1]))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await watched(gateway, 1, interval)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "interval: got" in str(refused.value.details())
    assert "0.1 to 60 s" in str(refused.value.details())


async def test_the_page_is_served_with_what_it_needs_and_nothing_else(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(config=config(simulator[1], "127.0.0.1:0"))
    await gateway.chat.Chat(request(extra_body_json=FAST))
    await asyncio.sleep(1.1)
    base = f"http://{gateway.running.page}"
    async with ClientSession() as browser:
        for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")):
            async with browser.get(base + path) as answer:
                assert answer.status == 200
                assert kind in answer.content_type
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                text = await answer.text()
                assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
                assert "https:" not in text
        async with browser.get(f"{base}/status.json?since=0") as answer:
            told = json.loads(await answer.text())
        assert told["listing"]["upstreams"][0]["name"] == "test"
        assert sum(int(each["succeeded"]) for each in told["seconds"]) == 1
        async with browser.get(f"{base}/status.json?since=999999") as answer:
            assert json.loads(await answer.text())["seconds"] == []
        for since in ("-1", "x", "1" * 13, ""):
            async with browser.get(f"{base}/status.json?since={since}") as answer:
                assert answer.status == 400, since
        for method, path, status in (("POST", "/", 405), ("GET", "/../server.py", 404)):
            async with browser.request(method, base + path) as answer:
                assert answer.status == status
                assert "Content-Security-Policy" in answer.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("localhost.evil.example", 403),
    ],
)
async def test_a_name_that_was_made_to_point_here_is_refused(
    start: Start, simulator: Simulated, host: str, status: int
) -> None:
    """DNS rebinding: a browser sends the foreign name."""
    gateway = await start(config=config(simulator[1], "127.0.0.1:0"))
    async with (
        ClientSession(connector=TCPConnector()) as browser,
        browser.get(f"http://{gateway.running.page}/", headers={"Host": host}) as answer,
    ):
        assert answer.status == status


async def test_the_page_may_be_at_a_unix_socket_for_its_own_user(
    start: Start, simulator: Simulated, tmp_path: Path
) -> None:
    left = socket.socket(socket.AF_UNIX)  # by a gateway before
    left.bind(f"{tmp_path}/page.sock")
    left.close()
    gateway = await start(config=config(simulator[1], f"unix:{tmp_path}/page.sock"))
    assert (tmp_path / "page.sock").stat().st_mode & 0o777 == 0o600
    assert gateway.running.page == f"unix:{tmp_path}/page.sock"
    async with (
        ClientSession(connector=UnixConnector(f"{tmp_path}/page.sock")) as browser,
        browser.get("http://localhost/status.json") as answer,
    ):
        assert answer.status == 200


async def test_a_place_where_no_socket_can_be_ends_the_start(
    start: Start, simulator: Simulated, tmp_path: Path
) -> None:
    (tmp_path / "page.sock").write_text("somebody's")
    with pytest.raises(ListenError, match=r"page.sock .* Address already in use"):
        await start(config=config(simulator[1], f"unix:{tmp_path}/page.sock"))
    assert (tmp_path / "page.sock").read_text() == "somebody's"


async def test_a_port_that_is_taken_ends_the_start_and_names_the_setting(
    start: Start, simulator: Simulated
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"127.0.0.1:{port} .status_page.listen.: "):
            await start(config=config(simulator[1], f"127.0.0.1:{port}"))
