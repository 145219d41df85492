"""Upstreams behind an HTTP proxy, which is a real one here: CONNECT, absolute URLs, a login."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trustme
from aiohttp import web

from harness import (
    Start,
    chunk,
    completion,
    event_stream,
    failing,
    receive,
    request,
    stream_request,
    upstream,
)
from tokenwire_service.config import Retries
from tokenwire_service.keyring import Lease
from tokenwire_service.secret import Secret

LOGIN = "us@er:pass:w\u00f6rd"
QUICK = Retries(max_attempts=2, backoff=0.001, backoff_cap=0.001, budget_floor=1000)


@dataclass
class Proxy:
    """`heads`: request line and headers of each connection, as text."""

    url: str = ""
    heads: list[str] = field(default_factory=list)
    open: int = 0


@asynccontextmanager
async def proxying(login: str = "", status: int = 407) -> AsyncIterator[Proxy]:
    """An HTTP proxy: it tunnels CONNECT, and forwards absolute URLs. With a `login` it asks for
    it, and answers `status` without."""
    proxy = Proxy()
    tasks: set[asyncio.Task[None]] = set()
    wanted = "Basic " + base64.b64encode(login.encode()).decode()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(ConnectionError, OSError):
            writer.write_eof() if writer.can_write_eof() else writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        proxy.open += 1
        there: asyncio.StreamWriter | None = None
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            proxy.heads.append(head)
            lines = head.split("\r\n")
            method, target, _ = lines[0].split()
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            given = [line.split(": ", 1)[1] for line in lines if line.startswith("Proxy-Auth")]
            if login and given != [wanted]:
                words = b"login sk-proxy-secret please"
                length = f"content-length: {len(words)}\r\n".encode()
                writer.write(b"HTTP/1.1 %d No\r\n" % status + length + b"\r\n" + words)
                await writer.drain()
                return
            address = target.split("/")[2] if method != "CONNECT" else target
            host, _, port = address.partition(":")
            back, there = await asyncio.open_connection(host, int(port))
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await writer.drain()
            else:
                path = "/" + target.split("/", 3)[3]
                kept = [line for line in lines[1:] if not line.startswith("Proxy-")]
                there.write("\r\n".join([f"{method} {path} HTTP/1.1", *kept]).encode("latin-1"))
                there.write(await reader.readexactly(int(headers.get("content-length", "0"))))
            await asyncio.gather(pump(reader, there), pump(back, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for each in (writer, there):
                if each is not None:
                    each.close()
            proxy.open -= 1
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


@asynccontextmanager
async def serving(context: ssl.SSLContext | None = None) -> AsyncIterator[tuple[str, list[str]]]:
    """(address, authorization headers seen) of an upstream, with TLS or without."""
    seen: list[str] = []

    async def answer(asked: web.Request) -> web.StreamResponse:
        seen.append(asked.headers.get("authorization", ""))
        assert "proxy-authorization" not in asked.headers, "the login is the proxy's alone"
        if not (await asked.json()).get("stream"):
            return completion("hello")
        response = await event_stream(asked)
        await response.write(chunk("hel"))
        await response.write(chunk("lo", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield f"localhost:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("login", ["", LOGIN], ids=["open", "with a login"])
async def test_a_plain_upstream_is_asked_by_its_whole_address(start: Start, login: str) -> None:
    async with serving() as (address, seen), proxying(login) as proxy:
        gateway = await start(
            upstream(
                f"http://{address}/v1",
                proxy=proxy.url,
                proxy_login=Secret(login) if login else None,
            )
        )
        answer = await gateway.chat.Chat(request())
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
    assert answer.choices[0].message.content == received.text == "hello"
    assert proxy.heads[0].startswith(f"POST http://{address}/v1/chat/completions HTTP/1.1")
    assert seen[0].startswith("Bearer sk-test-")


async def test_variables_for_proxies_are_not_read(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as (address, seen), proxying("") as proxy:
        gateway = await start(upstream(f"http://{address}/v1"))
        await gateway.chat.Chat(request())  # so that the caller, which reads them, is connected
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        answer = await gateway.chat.Chat(request())
    assert answer.choices[0].message.content == "hello"
    assert len(seen) == 2
    assert proxy.heads == []


@pytest.mark.parametrize("login", ["", LOGIN], ids=["open", "with a login"])
async def test_an_upstream_with_tls_is_reached_through_a_tunnel(
    start: Start,
    login: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
    async with serving(context) as (address, seen), proxying(login) as proxy:
        gateway = await start(
            upstream(
                f"https://{address}/v1",
                proxy=proxy.url,
                proxy_login=Secret(login) if login else None,
            )
        )
        answer = await gateway.chat.Chat(request())
        received = await receive(gateway.chat.StreamChat(stream_request(request())))
        assert received.failure is None
        await gateway.running.pools["test"].client.close()
    assert answer.choices[0].message.content == received.text == "hello"
    assert proxy.heads[0].startswith(f"CONNECT {address} HTTP/1.1")
    assert not any("sk-test" in head for head in proxy.heads), "a tunnel hides the key"
    assert seen[0].startswith("Bearer sk-test-")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status", [407, 403, 502])
async def test_a_proxy_that_refuses_is_no_fault_of_a_key(
    start: Start, scheme: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (address, seen), proxying(LOGIN, status) as proxy:
        gateway = await start(
            upstream(
                f"{scheme}://{address}/v1",
                proxy=proxy.url,
                proxy_login=Secret("someone:with-a-wrong-password"),
            ),
            retries=QUICK,
        )
        failure = await failing(gateway.chat.Chat(request()))
        pool = gateway.running.pools["test"]
        if status == 407 or scheme == "https":
            assert (failure.code.name, failure.reason) == ("UNAVAILABLE", "UPSTREAM_UNREACHABLE")
            assert f"the proxy answered {status}" in failure.message
            lease = pool.ring.lease("m", time.monotonic())
            assert isinstance(lease, Lease), "no key is retired or cools"
            pool.ring.release(lease)
    assert seen == []
    shown = failure.everything + caplog.text
    for secret in ("wrong-password", "sk-proxy-secret", "sk-test", "Basic "):
        assert secret not in shown


async def test_a_proxy_that_is_not_there_is_unreachable(start: Start) -> None:
    async with proxying() as proxy:
        gone = proxy.url
    gateway = await start(
        upstream("http://127.0.0.1:9/v1", proxy=gone, proxy_login=Secret(LOGIN)), retries=QUICK
    )
    failure = await failing(gateway.chat.Chat(request()))
    assert failure.reason == "UPSTREAM_UNREACHABLE"
    assert "rd" not in failure.message.split()
