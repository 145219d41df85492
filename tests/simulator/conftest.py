"""A simulator on a real socket, with a client that speaks to it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from tokenwire_service.simulator import Simulator


@dataclass
class Reply:
    """One HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert isinstance(error, dict)
        return error

    @property
    def payloads(self) -> list[str]:
        return [event.removeprefix("data: ") for event in self.raw.decode().split("\n\n")[:-1]]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for payload in self.payloads if payload != "[DONE]"]

    def deltas(self, index: int = 0) -> list[dict[str, Any]]:
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return [choice["delta"] for choice in choices if choice["index"] == index]

    def text(self, index: int = 0) -> str:
        return "".join(delta.get("content") or "" for delta in self.deltas(index))


class Client:
    """Asks one simulator; `simulator` is there to be looked into."""

    def __init__(self, simulator: Simulator, base_url: str, session: aiohttp.ClientSession) -> None:
        self.simulator = simulator
        self.base_url = base_url
        self.session = session

    def body(self, prompt: str = "Why is the sky blue?", **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": "simulated-small", "messages": messages} | fields

    def post(self, body: Any, *, key: str = "key-aaaa", path: str = "/chat/completions") -> Any:
        return self.session.post(
            self.base_url + path,
            data=body if isinstance(body, bytes) else json.dumps(body),
            headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
            allow_redirects=False,
        )

    async def ask(self, prompt: str = "Why is the sky blue?", **fields: Any) -> Reply:
        return await self.send(self.body(prompt, **fields))

    async def send(self, body: Any, **where: str) -> Reply:
        async with self.post(body, **where) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, headers, await response.read())

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for the server side to notice something."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def client(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Client]:
    before = asyncio.all_tasks()
    simulator = Simulator(tokens_per_second=0)
    async with (
        simulator.serving() as base_url,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        yield Client(simulator, base_url, session)
    assert simulator.stats.open_requests == 0
    assert simulator.stats.open_streams == 0
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left
    assert not [record for record in caplog.records if record.name.startswith("aiohttp")]
