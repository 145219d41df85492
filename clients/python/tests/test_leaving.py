"""Every way to leave a stream ends the call at the gateway, and so the upstream's bill."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc
import pytest

from tokenwire import AsyncClient, Client, TokenwireError
from tokenwire.testing import FakeGateway


def leave_by_break(client: Client, kept: list[object]) -> None:
    for event in client.stream("Hi", model="m"):
        if event.text:
            break


def leave_by_break_but_keep_the_stream(client: Client, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    for event in stream:
        if event.text:
            break
    kept.append(stream)
    assert stream.text == "Hel"
    with pytest.raises(TokenwireError) as caught:
        next(stream)
    assert caught.value.code is grpc.StatusCode.CANCELLED


def leave_by_break_from_text_deltas(client: Client, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    for _ in stream.text_deltas():
        break
    kept.append(stream)


def leave_by_exception(client: Client, kept: list[object]) -> None:
    try:
        for event in client.stream("Hi", model="m"):
            if event.text:
                raise KeyError(event)
    except KeyError as error:
        kept.append(error)  # a traceback in somebody's hands must not keep the call


def leave_by_the_end_of_a_block(client: Client, kept: list[object]) -> None:
    with client.stream("Hi", model="m") as stream:
        kept.append(stream)
        next(stream)


def leave_by_close(client: Client, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    kept.append(stream)
    next(stream)
    stream.close()
    stream.close()


def leave_by_closing_the_client(client: Client, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    kept.append(stream)
    next(stream)
    client.close()


def leave_from_another_thread(client: Client, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    kept.append(stream)
    next(stream)
    next(stream)
    timer = threading.Timer(0.05, stream.close)
    timer.start()
    with pytest.raises(TokenwireError) as caught:  # never a quiet end of the loop
        next(stream)
    timer.join()
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert caught.value.partial_text == "Hel"


@pytest.fixture
def kept() -> Iterator[list[object]]:
    """What a caller still holds after leaving."""
    kept: list[object] = []
    yield kept
    kept.clear()


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_break_but_keep_the_stream,
        leave_by_break_from_text_deltas,
        leave_by_exception,
        leave_by_the_end_of_a_block,
        leave_by_close,
        leave_by_closing_the_client,
        leave_from_another_thread,
    ],
)
def test_blocking(gateway: FakeGateway, leave: Callable[..., None], kept: list[object]) -> None:
    gateway.hang("Hel")
    with gateway.client() as client:
        leave(client, kept)
        assert gateway.calls[0].wait_cancelled()


def test_a_stream_dropped_unread(gateway: FakeGateway) -> None:
    gateway.hang()
    with gateway.client() as client:
        client.models()  # so that the connection stands, and the call reaches the gateway
        stream = client.stream("Hi", model="m")
        next(stream)
        del stream
        assert gateway.calls[1].wait_cancelled()


def test_leaving_a_batch(gateway: FakeGateway) -> None:
    gateway.hang().reply("two")
    with gateway.client() as client:
        for result in client.batch(["1", "2"], model="m"):
            assert result.unwrap().text == "two"
            break
        assert gateway.calls[0].wait_cancelled()


# --- asyncio ------------------------------------------------------------------------


async def aleave_by_break(client: AsyncClient, kept: list[object]) -> None:
    async for event in client.stream("Hi", model="m"):
        if event.text:
            break


async def aleave_by_break_but_keep_the_stream(client: AsyncClient, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    async for event in stream:
        if event.text:
            break
    kept.append(stream)
    assert stream.text == "Hel"
    with pytest.raises(TokenwireError) as caught:
        await anext(stream)
    assert caught.value.code is grpc.StatusCode.CANCELLED


async def aleave_by_break_from_text_deltas(client: AsyncClient, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    async for _ in stream.text_deltas():
        break
    kept.append(stream)


async def aleave_by_exception(client: AsyncClient, kept: list[object]) -> None:
    try:
        async for event in client.stream("Hi", model="m"):
            if event.text:
                raise KeyError(event)
    except KeyError as error:
        kept.append(error)


async def aleave_by_the_end_of_a_block(client: AsyncClient, kept: list[object]) -> None:
    async with client.stream("Hi", model="m") as stream:
        kept.append(stream)
        await anext(stream)


async def aleave_by_close(client: AsyncClient, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    kept.append(stream)
    await anext(stream)
    await stream.close()
    await stream.close()


async def aleave_by_closing_the_client(client: AsyncClient, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    kept.append(stream)
    await anext(stream)
    await client.close()


async def aleave_by_cancelling_the_task(client: AsyncClient, kept: list[object]) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for event in client.stream("Hi", model="m"):
            if event.text:
                begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def aleave_by_timeout(client: AsyncClient, kept: list[object]) -> None:
    async def read() -> None:
        async for _ in client.stream("Hi", model="m"):
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.2)


@pytest.fixture
async def aclient(
    gateway: FakeGateway, no_task_left: Callable[[], Awaitable[None]]
) -> AsyncIterator[AsyncClient]:
    async with gateway.async_client() as client:
        yield client
    await no_task_left()


@pytest.mark.parametrize(
    "leave",
    [
        aleave_by_break,
        aleave_by_break_but_keep_the_stream,
        aleave_by_break_from_text_deltas,
        aleave_by_exception,
        aleave_by_the_end_of_a_block,
        aleave_by_close,
        aleave_by_closing_the_client,
        aleave_by_cancelling_the_task,
        aleave_by_timeout,
    ],
)
async def test_asyncio(
    gateway: FakeGateway,
    aclient: AsyncClient,
    leave: Callable[..., Awaitable[None]],
    kept: list[object],
) -> None:
    gateway.hang("Hel")
    await leave(aclient, kept)
    assert await asyncio.to_thread(gateway.calls[0].wait_cancelled)


async def test_cancelling_a_task_that_waits_for_chat(
    gateway: FakeGateway, aclient: AsyncClient
) -> None:
    gateway.hang()
    await aclient.models()
    task = asyncio.create_task(aclient.chat("Hi", model="m"))
    while len(gateway.calls) < 2:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(gateway.calls[1].wait_cancelled)


@pytest.mark.parametrize("method", ["chat", "stream"])
async def test_closing_the_client_does_not_cancel_the_tasks_that_use_it(
    gateway: FakeGateway, aclient: AsyncClient, method: str
) -> None:
    gateway.hang("Hel")

    async def use() -> None:
        if method == "chat":
            await aclient.chat("Hi", model="m")
        else:
            async for _ in aclient.stream("Hi", model="m"):
                pass

    task = asyncio.create_task(use())
    while not gateway.calls:
        await asyncio.sleep(0.01)
    await aclient.close()
    with pytest.raises(TokenwireError) as caught:
        await task
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert not task.cancelled()


async def test_leaving_an_async_batch(gateway: FakeGateway, aclient: AsyncClient) -> None:
    gateway.hang().reply("two")
    async for result in aclient.batch(["1", "2"], model="m"):
        assert result.unwrap().text == "two"
        break
    assert await asyncio.to_thread(gateway.calls[0].wait_cancelled)


def test_a_stream_that_outlives_its_event_loop(gateway: FakeGateway) -> None:
    gateway.hang("Hel")

    async def begin() -> object:
        client = gateway.async_client()
        stream = client.stream("Hi", model="m")
        await anext(stream)
        return client, stream

    client, stream = asyncio.run(begin())  # type: ignore[misc]
    del stream  # its __del__ must not complain about the closed loop
    del client


def test_one_client_made_before_any_loop(gateway: FakeGateway) -> None:
    client = gateway.async_client()

    async def use() -> str:
        async with client:
            return (await client.chat("Hi", model="m")).text

    gateway.reply("ok")
    assert asyncio.run(use()) == "ok"
