"""Reaching a Redis: by TCP, TLS and a unix socket, with a password, with few rights."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from harness import until
from redis_server import RedisServer, both, free_port, redis_server
from tokenwire_service import sharing
from tokenwire_service.config import Redis
from tokenwire_service.quotas import SCRIPTS, Grant, Limits, Quotas
from tokenwire_service.secret import Secret
from tokenwire_service.store import Script, Store
from tokenwire_service.telemetry import configure_logging

PASSWORD = "pass-of-redis-1234"
LIMITS = Limits(requests_per_minute=10, tokens_per_minute=100, in_flight=5, tokens_per_day=100)


@asynccontextmanager
async def reaching(settings: Redis) -> AsyncIterator[tuple[Store, Quotas, io.StringIO]]:
    log = io.StringIO()
    store = Store(settings, SCRIPTS, configure_logging("info", as_json=False, stream=log))
    quotas = Quotas(store, lease=0.1)
    tasks = [asyncio.ensure_future(each) for each in (store.run(), quotas.run())]
    try:
        await store.tried()
        yield store, quotas, log
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def works(settings: Redis) -> str:
    """Uses everything, also what follows a return; the log."""
    async with reaching(settings) as (store, quotas, log):
        for _ in range(2):
            assert store.here, log.getvalue()
            found = await quotas.reserve("caller:a", LIMITS, 10)
            assert isinstance(found, Grant)
            await asyncio.sleep(0.1)  # it is renewed
            found.settle(5)
            found.close()
            await store.drain()
            assert store.here, log.getvalue()
            store.post(Script("it does not know this one"), (), ())
            await until(lambda: not store.here)
            await until(lambda: store.here)
        return log.getvalue()


@both
async def test_with_the_rights_that_the_documentation_asks_for(redis: RedisServer) -> None:
    page = Path(__file__).parents[2] / "docs" / "operations.md"
    (rights,) = re.findall(r"^ACL SETUSER tokenwire .*$", page.read_text(), re.MULTILINE)
    assert await redis.command(*rights.replace("PASSWORD", PASSWORD).split()) == "+OK"
    settings = Redis(
        url=redis.url, on_failure="open", username="tokenwire", password=Secret(PASSWORD)
    )
    assert PASSWORD not in await works(settings)


@pytest.mark.parametrize("password", [PASSWORD, "wrong", None])
async def test_a_password(tmp_path: Path, password: str | None) -> None:
    async with redis_server(tmp_path, "--requirepass", PASSWORD) as server:
        secret = Secret(password) if password else None
        settings = Redis(url=server.url, on_failure="open", password=secret)
        if password == PASSWORD:
            assert PASSWORD not in await works(settings)
            return
        async with reaching(settings) as (store, _, log):
            assert not store.here
            assert "redis is away" in log.getvalue()
            assert "wrong" not in log.getvalue()


async def test_no_log_shows_a_password_that_redis_quotes(tmp_path: Path) -> None:
    """One that does not know AUTH, as some in front of others, says what it was given."""
    async with redis_server(tmp_path, "--rename-command", "AUTH", "ANOTHER") as server:
        settings = Redis(url=server.url, on_failure="open", password=Secret(PASSWORD))
        async with reaching(settings) as (store, _, log):
            assert not store.here
            assert "unknown command" in log.getvalue()
            assert PASSWORD not in log.getvalue()


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    async with redis_server(tmp_path, "--unixsocket", str(path)):
        await works(Redis(url=f"unix:{path}", on_failure="open"))


@pytest.mark.parametrize("trusted", [True, False])
async def test_tls(tmp_path: Path, trusted: bool) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    leaf.private_key_pem.write_to_path(tmp_path / "tls.key")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    (authority if trusted else trustme.CA()).cert_pem.write_to_path(tmp_path / "ca.crt")
    port = free_port()
    options = (
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *(
            "--tls-cert-file",
            str(tmp_path / "tls.crt"),
            "--tls-key-file",
            str(tmp_path / "tls.key"),
        ),
    )
    common: dict[str, Any] = {
        "on_failure": "open",
        "certificate_authorities": str(tmp_path / "ca.crt"),
        "timeout": 2.0,
    }
    async with redis_server(tmp_path, *options):
        settings = Redis(url=f"rediss://localhost:{port}/1", **common)
        if trusted:
            await works(settings)
            # The name in the certificate counts.
            settings = Redis(url=f"rediss://127.0.0.1:{port}", **common)
        async with reaching(settings) as (store, _, log):
            assert not store.here
            assert "certificate" in log.getvalue().lower()


async def test_what_ends_last_is_told_before_the_connection_is_closed(redis: RedisServer) -> None:
    settings = Redis(url=redis.url, on_failure="open", timeout=5.0)
    log = io.StringIO()
    async with sharing.started(settings, configure_logging("info", False, log)) as shared:
        assert shared is not None
        grant = await shared.quotas.reserve("caller:a", Limits(in_flight=1), 0)
        assert isinstance(grant, Grant)
        assert "running" in await redis.contents()
        grant.close()
    assert "running" not in await redis.contents()
    assert "away" not in log.getvalue()
