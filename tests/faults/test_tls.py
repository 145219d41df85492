"""F15: an upstream whose certificate is not to be trusted never hears a key, nor a prompt."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import trustme

from harness import completion, failing, request
from processes import serve, write_config

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
SECRET = "sk-test-planted-0123456789"
PROMPT = "a prompt for no stranger"


Shown = Callable[[trustme.CA, ssl.SSLContext], None]


def issued(host: str, begins: int, ends: int) -> Shown:
    """A certificate of the authority for a host, valid between these days from now."""

    def show(authority: trustme.CA, context: ssl.SSLContext) -> None:
        authority.issue_cert(
            host, not_before=NOW + begins * DAY, not_after=NOW + ends * DAY
        ).configure_cert(context)

    return show


def own(authority: trustme.CA, context: ssl.SSLContext) -> None:
    """One that nobody else has signed."""
    alone = trustme.CA()
    both = alone.private_key_pem.bytes() + alone.cert_pem.bytes()
    with trustme.Blob(both).tempfile() as path:
        context.load_cert_chain(path)


def strangers(authority: trustme.CA, context: ssl.SSLContext) -> None:
    """One of another authority."""
    issued("127.0.0.1", -1, 1)(trustme.CA(), context)


GOOD = issued("127.0.0.1", -1, 1)
BAD: dict[str, Shown] = {
    "expired": issued("127.0.0.1", -9, -1),
    "not yet valid": issued("127.0.0.1", 1, 9),
    "of another host": issued("elsewhere.test", -1, 1),
    "signed by itself": own,
    "of an unknown authority": strangers,
}


def showing(show: Shown, authority: trustme.CA) -> ssl.SSLContext:
    """Of a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    show(authority, context)
    return context


@dataclass
class Heard:
    """What a server got, decrypted where it could be."""

    port: int = 0
    connections: int = 0
    bytes: bytearray = field(default_factory=bytearray)


@asynccontextmanager
async def listening(context: ssl.SSLContext | None) -> AsyncIterator[Heard]:
    """A server that answers `hello`, with TLS or without."""
    heard = Heard()
    body = completion().body
    assert isinstance(body, bytes)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.connections += 1
        while data := await reader.read(2**16):
            heard.bytes += data
            if b"\r\n\r\n" in heard.bytes:
                head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                break
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    heard.port = server.sockets[0].getsockname()[1]
    try:
        yield heard
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("what", BAD)
async def test_f15_a_certificate_that_is_not_trusted_ends_it_before_the_key(
    tmp_path: Path, what: str
) -> None:
    """All but the last two are of an authority that the gateway trusts: a good one is served."""
    authority = trustme.CA()
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    retries = {"max_attempts": 2, "backoff": "1ms", "backoff_cap": "1ms"}
    async with (
        listening(showing(GOOD, authority)) as good,
        listening(showing(BAD[what], authority)) as bad,
    ):
        upstreams = {
            name: {"base_url": f"https://127.0.0.1:{heard.port}/v1", "keys": [{"env": "TEST_KEY"}]}
            for name, heard in (("good", good), ("bad", bad))
        }
        models = {name: {"upstream": name} for name in upstreams}
        config = write_config(
            tmp_path, "http://unused", upstreams=upstreams, models=models, retries=retries
        )
        environment = {"TEST_KEY": SECRET, "SSL_CERT_FILE": str(trusted)}
        async with serve("--config", config, **environment) as gateway:
            whole = await gateway.chat.Chat(request(PROMPT, model="good"))
            assert whole.choices[0].message.content == "hello"
            failure = await failing(gateway.chat.Chat(request(PROMPT, model="bad")))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.reason == "UPSTREAM_UNREACHABLE"
    assert "certificate" in failure.message
    assert SECRET.encode() in good.bytes  # the server sees what it is sent
    assert bytes(bad.bytes) == b""


async def test_f15_an_upstream_without_tls_is_never_spoken_to_in_the_clear(tmp_path: Path) -> None:
    async with listening(None) as plain:
        upstream = {
            "base_url": f"https://127.0.0.1:{plain.port}/v1",
            "keys": [{"env": "TEST_KEY"}],
            "passthrough": True,
            "timeouts": {"connect": "500ms"},
        }
        config = write_config(tmp_path, "http://unused", upstreams={"test": upstream})
        async with serve("--config", config, TEST_KEY=SECRET) as gateway:
            failure = await failing(gateway.chat.Chat(request(PROMPT), timeout=20))
    assert failure.reason == "UPSTREAM_UNREACHABLE"
    assert plain.connections >= 1
    assert bytes(plain.bytes).startswith(b"\x16\x03")  # a TLS handshake, and nothing after it
    assert SECRET.encode() not in plain.bytes
    assert PROMPT.encode() not in plain.bytes
