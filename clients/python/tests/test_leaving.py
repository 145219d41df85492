"""Every way to leave a stream ends the call at the gateway, and so the upstream's bill."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
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


# Seconds after which who calls waits. An interrupt amid the begin of a call leaves grpcio with one
# that nobody ends, so that closing its channel hangs.
SETTLED = 0.3


def leave_by_an_interrupt_while_it_waits(client: Client, kept: list[object]) -> None:
    """Its traceback, which somebody looks at, has the loop itself in it."""
    stream = client.stream("Hi", model="m")

    def interrupt() -> None:
        while stream.text != "Hel":
            time.sleep(0.01)
        time.sleep(SETTLED)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt as error:
        kept += [stream, error]
    thread.join()
    assert kept


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """What runs in the background is often started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
        leave_by_an_interrupt_while_it_waits,
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


@pytest.mark.parametrize("method", ["chat", "batch_ordered"])
@pytest.mark.parametrize("by", ["closing the client", "an interrupt"])
def test_leaving_a_call_that_waits(gateway: FakeGateway, method: str, by: str) -> None:
    gateway.hang()
    with gateway.client() as client:

        def leave() -> None:
            while not gateway.calls:
                time.sleep(0.01)
            time.sleep(SETTLED)
            if by == "an interrupt":
                signal.raise_signal(signal.SIGINT)
            else:
                client.close()

        thread = threading.Thread(target=leave)
        thread.start()
        with pytest.raises((TokenwireError, KeyboardInterrupt)) as caught:
            getattr(client, method)(["Hi"] if method == "batch_ordered" else "Hi", model="m")
        thread.join()
        assert isinstance(caught.value, KeyboardInterrupt) == (by == "an interrupt")
        if isinstance(caught.value, TokenwireError):
            assert caught.value.code is grpc.StatusCode.CANCELLED
        assert gateway.calls[0].wait_cancelled()


# --- while a write is blocked -------------------------------------------------------


class Deaf:
    """A server that reads the headers and 64 kB of a call, and lets no more in.

    `blocked` is set when those have come, `reset` when the client has left.
    """

    def __init__(self) -> None:
        self.blocked, self.reset = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        side, _ = self._listener.accept()
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        http.initiate_connection()
        got = 0
        side.settimeout(0.05)
        with side:
            while not self._over.is_set():
                side.sendall(http.data_to_send())
                try:
                    data = side.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    return
                for event in http.receive_data(data):
                    if isinstance(event, h2.events.DataReceived):
                        got += len(event.data)
                    if got >= 65535:
                        self.blocked.set()
                    if isinstance(event, h2.events.StreamReset):
                        self.reset.set()

    def close(self) -> None:
        self._over.set()
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    server = Deaf()
    yield server
    server.close()


LARGE = "x" * 1_000_000


@pytest.mark.parametrize("by", ["timeout", "closing the client", "an interrupt"])
@pytest.mark.parametrize("method", ["chat", "stream"])
def test_leaving_while_a_write_is_blocked(deaf: Deaf, method: str, by: str) -> None:
    client = Client(deaf.target, token="")

    def leave() -> None:
        deaf.blocked.wait(20)
        time.sleep(SETTLED)
        if by == "an interrupt":
            signal.raise_signal(signal.SIGINT)
        elif by == "closing the client":
            client.close()

    thread = threading.Thread(target=leave)
    thread.start()
    timeout = 1.0 if by == "timeout" else 60.0

    def ask() -> None:
        answer = getattr(client, method)(LARGE, model="m", timeout=timeout)
        for _ in answer if method == "stream" else ():
            pass

    with client, pytest.raises((TokenwireError, KeyboardInterrupt)) as caught:
        ask()
    assert deaf.reset.wait(20)
    thread.join()
    if by == "an interrupt":
        assert isinstance(caught.value, KeyboardInterrupt)
    else:
        assert isinstance(caught.value, TokenwireError)
        codes = {"timeout": "DEADLINE_EXCEEDED", "closing the client": "CANCELLED"}
        assert caught.value.code.name == codes[by]


@pytest.mark.parametrize("by", ["timeout", "closing the client", "cancelling the task"])
@pytest.mark.parametrize("method", ["chat", "stream", "batch_ordered"])
async def test_leaving_in_asyncio_while_a_write_is_blocked(
    deaf: Deaf, method: str, by: str, no_task_left: Callable[[], Awaitable[None]]
) -> None:
    async with AsyncClient(deaf.target, token="") as client:

        async def ask() -> None:
            timeout = 1.0 if by == "timeout" else 60.0
            prompt: Any = [LARGE] if method == "batch_ordered" else LARGE
            answer = getattr(client, method)(prompt, model="m", timeout=timeout)
            if method != "stream":
                await answer
                return
            async for _ in answer:
                pass

        task = asyncio.create_task(ask())
        assert await asyncio.to_thread(deaf.blocked.wait, 20)
        if by == "cancelling the task":
            task.cancel()
        elif by == "closing the client":
            await client.close()
        with pytest.raises((TokenwireError, asyncio.CancelledError)) as caught:
            await task
    assert task.cancelled() == (by == "cancelling the task")
    if isinstance(caught.value, TokenwireError):
        codes = {"timeout": "DEADLINE_EXCEEDED", "closing the client": "CANCELLED"}
        assert caught.value.code.name == codes[by]
    assert await asyncio.to_thread(deaf.reset.wait, 20)
    await no_task_left()


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


async def aleave_by_cancelling_the_task_while_it_works_on_an_event(
    client: AsyncClient, kept: list[object]
) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for event in client.stream("Hi", model="m"):
            if event.text:
                begun.set()
                await asyncio.sleep(3600)

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    kept.append(caught.value)


async def aleave_by_abandoning_a_generator_around_it(
    client: AsyncClient, kept: list[object]
) -> None:
    async def words() -> AsyncIterator[str]:
        async for event in client.stream("Hi", model="m"):
            if event.text:
                yield event.text

    async for _ in words():
        break


async def aleave_by_abandoning_an_iterator(client: AsyncClient, kept: list[object]) -> None:
    stream = client.stream("Hi", model="m")
    texts = stream.text_deltas()
    assert await anext(texts) == "Hel"
    del texts
    kept.append(stream)


async def aleave_before_the_first_byte(client: AsyncClient, kept: list[object]) -> None:
    async def read() -> None:
        async for _ in client.stream("Hi", model="m"):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.1)
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
        aleave_by_cancelling_the_task_while_it_works_on_an_event,
        aleave_by_abandoning_a_generator_around_it,
        aleave_by_abandoning_an_iterator,
        aleave_before_the_first_byte,
        aleave_by_timeout,
    ],
)
async def test_asyncio(
    gateway: FakeGateway,
    aclient: AsyncClient,
    leave: Callable[..., Awaitable[None]],
    kept: list[object],
) -> None:
    await aclient.models()  # so that the connection stands, and the call reaches the gateway
    gateway.hang(*(() if leave is aleave_before_the_first_byte else ("Hel",)))
    await leave(aclient, kept)
    assert await asyncio.to_thread(gateway.calls[1].wait_cancelled)


@pytest.mark.parametrize("method", ["chat", "batch_ordered"])
async def test_cancelling_a_task_that_waits_for_an_answer(
    gateway: FakeGateway, aclient: AsyncClient, method: str
) -> None:
    gateway.hang()
    await aclient.models()
    prompt: Any = ["Hi"] if method == "batch_ordered" else "Hi"
    task = asyncio.create_task(getattr(aclient, method)(prompt, model="m"))
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


def test_an_ordered_batch_that_was_left_is_no_result(gateway: FakeGateway) -> None:
    gateway.hang().reply("two")
    with gateway.client() as client, client.batch(["1", "2"], model="m") as batch:
        assert next(batch).unwrap().text == "two"
        batch.close()
        with pytest.raises(TokenwireError) as caught:
            batch.ordered()
        assert caught.value.code is grpc.StatusCode.CANCELLED


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


def test_a_client_of_another_loop_says_so(gateway: FakeGateway) -> None:
    client = gateway.async_client()
    gateway.reply("ok")

    async def ask() -> str:
        return (await client.chat("Hi", model="m")).text

    assert asyncio.run(ask()) == "ok"
    with pytest.raises(RuntimeError, match="belongs to another event loop: make one for each"):
        asyncio.run(ask())


# Programs that end without having closed anything.
ENDS = {
    "a stream in a hand": "s = Client().stream('Hi', model='m'); next(s), next(s)",
    "amid a loop": "for e in Client().stream('Hi', model='m'):\n  if e.text: sys.exit()",
    "a thread that reads": """
s = Client().stream('Hi', model='m')
threading.Thread(target=list, args=(s,), daemon=True).start()
while s.text != 'Hel': time.sleep(0.01)
""",
    "asyncio, a stream in a hand": """
async def main():
    global s
    s = AsyncClient().stream('Hi', model='m'); await anext(s); await anext(s)
asyncio.run(main())
""",
    "asyncio, amid a loop": """
async def main():
    async for e in AsyncClient().stream('Hi', model='m'):
        if e.text: sys.exit()
asyncio.run(main())
""",
}


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_a_program_that_ends_amid_a_stream_ends_the_call_in_silence(
    gateway: FakeGateway, program: str
) -> None:
    gateway.hang("Hel")
    imports = "import asyncio, sys, threading, time\nfrom tokenwire import AsyncClient, Client\n"
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-c", imports + program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TOKENWIRE_TARGET": gateway.target, "GRPC_VERBOSITY": "NONE"},
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert gateway.calls[0].wait_cancelled()
