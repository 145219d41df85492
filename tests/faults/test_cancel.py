"""F10, F26: a caller may leave at any moment, in any way, and as often as it likes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import struct
import sys
import time
import types
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from harness import (
    Figures,
    Provider,
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    provider,
    request,
    stream_request,
    until,
    upstream,
)
from processes import serve, write_config
from tokenwire.v1 import chat_service_pb2_grpc
from tokenwire_service.config import Limits, Retries

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PROMISED = 0.25  # seconds from a caller's leaving to the end of the upstream's request
BOUND = 5.0  # seconds: what a busy machine may make of it


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> object:
    """A caller that leaves is no defect: nothing is logged as an error, by nobody."""
    yield
    loud = [r for when in ("call", "teardown") for r in caplog.get_records(when)]
    assert [r.getMessage() for r in loud if r.levelname in ("ERROR", "CRITICAL")] == []


# --- at each await point ----------------------------------------------------------------


def where(awaited: Any) -> tuple[str, ...]:
    """Where a suspended coroutine waits, from the outside in: `module.function:line`."""
    places: list[str] = []
    while awaited is not None:
        if type(awaited).__name__ in ("async_generator_asend", "async_generator_athrow"):
            awaited = next(each for each in gc.get_referents(awaited) if hasattr(each, "ag_frame"))
        for kind in ("cr", "gi", "ag"):
            if (frame := getattr(awaited, f"{kind}_frame", None)) is not None:
                name = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
                places.append(f"{name}:{frame.f_lineno}")
        inner = (getattr(awaited, name, None) for name in ("cr_await", "gi_yieldfrom", "ag_await"))
        awaited = next((each for each in inner if each is not None), None)
    return tuple(places)


@dataclass
class Cuts:
    """Cancels a call at an await where none was cancelled yet: as it begins to wait there, or, with
    `late`, just when what it waited for has come. Awaits at one place count apart up to the fifth:
    libraries show only where they were called."""

    late: bool
    done: set[tuple[tuple[str, ...], int]] = field(default_factory=set)
    cut: asyncio.Event = field(default_factory=asyncio.Event)

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, watched."""

        @types.coroutine
        def watched(*arguments: Any, **named: Any) -> Generator[Any, Any, Any]:
            inner = method(*arguments, **named)
            times: Counter[tuple[str, ...]] = Counter()
            value, error, cut = None, None, False
            while True:
                try:
                    waited = inner.send(value) if error is None else inner.throw(error)
                except StopIteration as ended:
                    return ended.value
                place = where(inner)
                times[place] += 1
                if times[place] <= 5 and (place, times[place]) not in self.done and not cut:
                    self.done.add((place, times[place]))
                    self._cut(waited)
                    cut = True
                value, error = None, None
                try:
                    value = yield waited
                except BaseException as thrown:
                    error = thrown

        return watched

    def _cut(self, waited: asyncio.Future[Any] | None) -> None:
        task = asyncio.current_task()
        assert task is not None

        def cancel(_: Any) -> None:
            self.cut.set()
            task.cancel()

        if self.late and waited is not None:
            waited.add_done_callback(cancel)  # before the task's own
        else:
            cancel(None)


async def answer_in_steps(asked: web.Request) -> web.StreamResponse:
    """`one two three`, with pauses."""
    body = await asked.json()
    if body["messages"][0]["content"] == "hold":
        await asyncio.sleep(0.02)
    if not body.get("stream"):
        return completion("one two three")
    response = await event_stream(asked)
    for text in ("one ", "two ", "three"):
        await response.write(chunk(text))
        await asyncio.sleep(0.002)
    await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
    return response


def first_refused(status: int, **headers: str) -> Handler:
    """Refuses the first request of each prompt."""
    refused: set[str] = set()

    async def answer(asked: web.Request) -> web.StreamResponse:
        prompt = (await asked.json())["messages"][0]["content"]
        if prompt not in refused:
            refused.add(prompt)
            return web.json_response({"error": {}}, status=status, headers=headers)
        return await answer_in_steps(asked)

    return answer


async def endless(asked: web.Request) -> web.StreamResponse:
    """More than anybody reads."""
    response = await event_stream(asked)
    while True:
        await response.write(chunk("x" * 200_000))


RETRIES = Retries(backoff=0.01, backoff_cap=0.01, budget=1, budget_floor=1000)
# Each way that a call can go: what the upstream answers, what is configured, and a function in
# which it then waits.
PLACES: dict[str, tuple[Handler, dict[str, Any], str]] = {
    "an answer": (answer_in_steps, {}, "client._request"),
    "a backoff": (first_refused(500), {}, "attempts.run"),
    "another key": (first_refused(429, **{"retry-after-ms": "20"}), {"keys": 2}, "client._request"),
    "a wait for the key": (first_refused(429, **{"retry-after-ms": "20"}), {}, "pool.lease"),
    "a queue": (answer_in_steps, {"limits": Limits(in_flight=1)}, "admission._enter"),
    "a slow reader": (endless, {}, "interceptors.write"),
}


async def at_rest(gateway: Stubs, served: Provider) -> None:
    """Waits until nothing is left of any call, at the upstream least of all."""
    running = gateway.running
    pool = running.pools["test"]
    await until(
        lambda: (
            served.open == running.leases == running.connections_busy == 0
            and running.gateway.in_flight == pool.waiting == pool.bulkhead.waiting == 0
        )
    )


async def cancelled(
    gateway: Stubs, served: Provider, place: str, method: str, prompt: str, cuts: Cuts
) -> float | None:
    """One call that is cancelled. Seconds until nothing is left of it; None where no await of it
    was new."""
    core = gateway.running.gateway
    cuts.cut.clear()
    # A kept connection takes fewer awaits.
    await gateway.running.pools["test"].client.close()
    holder = None
    if place == "a queue":  # another has the one slot for a while
        holder = gateway.chat.Chat(request("hold"))
        await until(lambda: core.in_flight == 1)
    name = "chat" if method == "Chat" else "stream"
    original = getattr(core, name)
    setattr(core, name, cuts.around(original))
    chat = request(prompt)
    if method == "Chat":
        call = gateway.chat.Chat(chat)
    else:
        call = gateway.chat.StreamChat(stream_request(chat))

    async def read() -> None:
        if method == "Chat":
            await call
            return
        async for _ in call:
            if place == "a slow reader":
                await asyncio.Event().wait()

    reading = asyncio.ensure_future(read())
    cut = asyncio.ensure_future(cuts.cut.wait())
    # Who does not read is never through: it ends where nothing moves any more.
    patience = 0.5 if place == "a slow reader" else BOUND
    await asyncio.wait({reading, cut}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    left = time.monotonic()
    reached = cuts.cut.is_set()
    setattr(core, name, original)
    call.cancel()
    reading.cancel()
    cut.cancel()
    await asyncio.gather(reading, cut, return_exceptions=True)
    if holder is not None:
        await holder
    await at_rest(gateway, served)
    return time.monotonic() - left if reached else None


@pytest.mark.parametrize("late", [False, True], ids=["as it waits", "as the wait ends"])
@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
@pytest.mark.parametrize("place", PLACES)
async def test_f10_a_cancel_at_any_await_leaves_nothing_behind(
    start: Start, figures: Figures, place: str, method: str, late: bool
) -> None:
    """Every await of a call is cancelled once, until its calls meet no new one."""
    if place == "a slow reader" and method == "Chat":
        pytest.skip("one message needs no reader that is fast")
    answer, settings, waits_in = PLACES[place]
    limits = settings.get("limits", Limits())
    cuts = Cuts(late)
    async with provider(answer) as served:
        wanted = upstream(served.base_url, keys=settings.get("keys", 1))
        gateway = await start(wanted, retries=RETRIES, limits=limits)
        unbroken = 0
        for number in itertools.count():
            prompt = f"{place} {method} {late} {number}"
            took = await cancelled(gateway, served, place, method, prompt, cuts)
            unbroken = unbroken + 1 if took is None else 0
            if unbroken == 2:  # not all of them suspend each time
                break
            if took is not None:
                assert took < BOUND
                figures("F10 from a cancel at an await to nothing left", took * 1000, "ms")
        figures(f"F10 awaits of {method}, {place}", len(cuts.done), "awaits")
        assert any(step.startswith(f"{waits_in}:") for steps, _ in cuts.done for step in steps)
        codes = {call.code for call in gateway.events.calls}
        assert codes <= {"OK", "CANCELLED"}
        if place != "a slow reader":
            whole = await gateway.chat.Chat(request())
            assert whole.choices[0].message.content == "one two three"


# --- in each way ------------------------------------------------------------------------


@dataclass
class Wire:
    """A TCP connection between a caller and the gateway that can be broken."""

    address: str = ""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def reset(self) -> None:
        """RST to both sides."""
        for writer in self.writers:
            pair = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pair)
            writer.transport.abort()


@asynccontextmanager
async def wired(address: str) -> AsyncIterator[Wire]:
    """Passes bytes on to `address`, both ways."""
    wire = Wire()
    tasks: set[asyncio.Task[None]] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        wire.writers += [writer, back]
        for task in (pipe(reader, back), pipe(there, writer)):
            tasks.add(asyncio.ensure_future(task))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    wire.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield wire
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in wire.writers:
            writer.transport.abort()


async def silent(asked: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def silent_after_headers(asked: web.Request) -> web.StreamResponse:
    kind = "text/event-stream" if (await asked.json()).get("stream") else "application/json"
    response = web.StreamResponse(headers={"content-type": kind})
    await response.prepare(asked)
    return await silent(asked)


async def silent_midway(asked: web.Request) -> web.StreamResponse:
    stream = (await asked.json()).get("stream")
    kind = "text/event-stream" if stream else "application/json"
    response = web.StreamResponse(headers={"content-type": kind})
    await response.prepare(asked)
    await response.write(chunk("a beginning") if stream else b'{"id": "c1", "choices": [')
    return await silent(asked)


async def limited(asked: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {}}, status=429, headers={"retry-after": "60"})


async def overloaded(asked: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {}}, status=503, headers={"retry-after": "30"})


async def held(asked: web.Request) -> web.StreamResponse:
    """The first has the slot; the others wait for it."""
    return await silent(asked)


# Where a call is when its caller leaves. An upstream's request is open in all but three of them.
MOMENTS: dict[str, Handler] = {
    "before the headers": silent,
    "after the headers": silent_after_headers,
    "midway": silent_midway,
    "waiting for a key": limited,
    "backing off": overloaded,
    "queued": held,
    "not reading": endless,
}
WAYS = ["cancel", "deadline", "closed channel", "reset", "killed process"]

_CALLER = """
import sys
import grpc
from tokenwire.v1 import chat_service_pb2, chat_service_pb2_grpc
address, method = sys.argv[1:]
chat = chat_service_pb2.ChatRequest(model="m")
chat.messages.add(role="user", content="hello")
stub = chat_service_pb2_grpc.ChatServiceStub(grpc.insecure_channel(address))
if method == "Chat":
    stub.Chat(chat)
else:
    call = stub.StreamChat(chat_service_pb2.StreamChatRequest(chat=chat))
    next(call)
    sys.stdin.read()
"""


class Caller:
    """One call, by a channel of its own or from a process of its own."""

    def __init__(self, address: str, method: str, way: str) -> None:
        self.address, self.method, self.way = address, method, way
        self.process: asyncio.subprocess.Process | None = None
        self.call: Any = None
        self.reading: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        if self.way == "killed process":
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _CALLER,
                self.address,
                self.method,
                stdin=asyncio.subprocess.PIPE,
            )
            return
        self.channel = grpc.aio.insecure_channel(
            self.address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        stub: Any = chat_service_pb2_grpc.ChatServiceStub(self.channel)
        timeout = 0.5 if self.way == "deadline" else None
        self.began = time.monotonic()
        if self.method == "Chat":
            self.call = stub.Chat(request(), timeout=timeout)
            self.reading = asyncio.ensure_future(self.call.wait_for_connection())
        else:
            self.call = stub.StreamChat(stream_request(request()), timeout=timeout)
            self.reading = asyncio.ensure_future(self.call.read())

    async def leave(self, wire: Wire) -> float:
        """When it left."""
        if self.way == "deadline":
            await asyncio.sleep(max(0.0, self.began + 0.5 - time.monotonic()))
            return self.began + 0.5
        left = time.monotonic()
        if self.way == "cancel":
            self.call.cancel()
        elif self.way == "closed channel":
            await self.channel.close()
        elif self.way == "reset":
            wire.reset()
        else:
            assert self.process is not None
            self.process.kill()
        return left

    async def end(self) -> None:
        if self.process is not None:
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()
            return
        assert self.reading is not None
        self.call.cancel()
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)
        await self.channel.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_f10_however_a_caller_leaves_the_upstream_is_let_go(
    start: Start, figures: Figures, moment: str, method: str, way: str
) -> None:
    if moment == "not reading" and method == "Chat":
        pytest.skip("one message needs no reader that is fast")
    if moment in ("waiting for a key", "backing off") and way == "deadline":
        pytest.skip("a wait beyond the deadline is not begun: test_keys.py, test_deadline.py")
    async with provider(MOMENTS[moment]) as served, AsyncExitStack() as stack:
        limits = Limits(in_flight=1 if moment == "queued" else 10)
        gateway = await start(upstream(served.base_url, keys=1), limits=limits)
        running, pool = gateway.running, gateway.running.pools["test"]
        holder = None
        if moment == "queued":
            holder = gateway.chat.Chat(request())
            await until(lambda: served.open == 1)
        wire = await stack.enter_async_context(wired(running.address))
        caller = Caller(wire.address, method, way)
        await caller.begin()
        stack.push_async_callback(caller.end)
        there: dict[str, Callable[[], bool]] = {
            "waiting for a key": lambda: pool.waiting == 1,
            "backing off": lambda: len(gateway.events.attempts) == 1,
            "queued": lambda: pool.bulkhead.waiting == 1,
        }
        await until(there.get(moment, lambda: served.open == 1))
        await asyncio.sleep(0.1)  # until nothing moves any more
        left = await caller.leave(wire)
        gone: dict[str, Callable[[], bool]] = {
            "waiting for a key": lambda: pool.waiting == running.gateway.in_flight == 0,
            "backing off": lambda: running.gateway.in_flight == 0,
            "queued": lambda: pool.bulkhead.waiting == 0,
        }
        await until(gone.get(moment, lambda: served.open == 0))
        took = time.monotonic() - left
        assert took < BOUND
        figures(f"F10 after {way}, {moment}", took * 1000, "ms")
        if holder is not None:
            holder.cancel()
        await until(lambda: running.leases == running.gateway.in_flight == 0)
    codes = {call.code for call in gateway.events.calls}
    assert codes <= {"CANCELLED", "DEADLINE_EXCEEDED"}


# --- often ------------------------------------------------------------------------------


async def test_f26_cancelled_streams_leave_no_memory_behind(
    tmp_path: Path, figures: Figures, long: bool
) -> None:
    """What grows while a process warms up is over after the first of them."""
    warm, count, bound = (20_000, 100_000, 1024) if long else (1000, 2000, 4096)

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("a beginning"))
        return await silent(asked)

    async with provider(answer) as served:
        limits = {"in_flight": 100}
        config = write_config(tmp_path, served.base_url, limits=limits)
        async with serve("--config", config, TEST_KEY="sk-test-k1") as gateway:

            async def cancel_streams(each: int) -> None:
                for _ in range(each):
                    call = gateway.chat.StreamChat(stream_request(request()))
                    await call.read()
                    call.cancel()

            async def cancel(total: int) -> int:
                """Resident memory after so many, in bytes."""
                await asyncio.gather(*(cancel_streams(total // 50) for _ in range(50)))
                await until(lambda: served.open == 0)
                return gateway.resident_kib * 1024

            before = await cancel(warm)
            each = (await cancel(count) - before) / count
    figures("F26 growth of the gateway for each cancelled stream", each, "bytes")
    assert served.ended == warm + count
    assert each < bound
