"""A fake gateway per test, and both clients behind one face so that each case runs on both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from tokenwire import TokenwireError
from tokenwire.testing import FakeGateway


async def _no_task_left() -> None:
    """Every task of the client ends. gRPC's own, which wait for a status from another thread, do
    so a moment after the call; what is left after 10 s is left for good."""
    left: set[asyncio.Task[Any]] = set()
    for _ in range(2000):
        left = {
            task
            for task in asyncio.all_tasks() - {asyncio.current_task()}
            if "async_generator" not in repr(task)  # pytest's own, around async fixtures
        }
        if not left:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"tasks left: {left}")


class Blocking:
    """The blocking client."""

    def __init__(self, gateway: FakeGateway) -> None:
        self._gateway = gateway
        self._client = gateway.client()

    def connect(self, **options: Any) -> None:
        """Replace the client by one with these options."""
        self.close()
        self._client = self._gateway.client(**options)

    def move(self, gateway: FakeGateway, **options: Any) -> None:
        """Replace the client by one of another gateway."""
        self._gateway = gateway
        self.connect(**options)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """What a unary method returns."""
        return getattr(self._client, method)(*args, **options)

    def read(self, method: str, *args: Any, **options: Any) -> tuple[Any, list[Any], Any]:
        """The stream, the items it gave, and the error it ended with, if any."""
        stream = getattr(self._client, method)(*args, **options)
        items: list[Any] = []
        try:
            for item in stream:
                items.append(item)  # noqa: PERF402 - kept also when the next one raises
        except TokenwireError as error:
            return stream, items, error
        return stream, items, None

    def texts(self, *args: Any, **options: Any) -> list[str]:
        """The text deltas of a stream."""
        choice = options.pop("choice_index", 0)
        return list(self._client.stream(*args, **options).text_deltas(choice))

    def close(self) -> None:
        self._client.close()


class Asyncio:
    """The asyncio client, with the same face."""

    def __init__(self, gateway: FakeGateway) -> None:
        self._gateway = gateway
        self._runner = asyncio.Runner()
        self._client = gateway.async_client()

    def connect(self, **options: Any) -> None:
        self._runner.run(self._client.close())
        self._client = self._gateway.async_client(**options)

    def move(self, gateway: FakeGateway, **options: Any) -> None:
        self._gateway = gateway
        self.connect(**options)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        async def call() -> Any:
            return await getattr(self._client, method)(*args, **options)

        return self._runner.run(call())

    def read(self, method: str, *args: Any, **options: Any) -> tuple[Any, list[Any], Any]:
        async def read() -> tuple[Any, list[Any], Any]:
            stream = getattr(self._client, method)(*args, **options)
            items: list[Any] = []
            try:
                async for item in stream:
                    items.append(item)  # noqa: PERF401 - kept also when the next one raises
            except TokenwireError as error:
                return stream, items, error
            return stream, items, None

        return self._runner.run(read())

    def texts(self, *args: Any, **options: Any) -> list[str]:
        async def texts() -> list[str]:
            choice = options.pop("choice_index", 0)
            return [t async for t in self._client.stream(*args, **options).text_deltas(choice)]

        return self._runner.run(texts())

    def close(self) -> None:
        async def close() -> None:
            await self._client.close()
            await _no_task_left()

        self._runner.run(close())
        self._runner.close()


@pytest.fixture
def no_task_left() -> Callable[[], Awaitable[None]]:
    """Waits until no task but this one runs; fails if one stays."""
    return _no_task_left


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway() as gateway:
        yield gateway


@pytest.fixture(params=[Blocking, Asyncio])
def client(request: pytest.FixtureRequest, gateway: FakeGateway) -> Iterator[Any]:
    client = request.param(gateway)
    yield client
    client.close()
