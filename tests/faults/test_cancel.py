"""F10, F26: a caller may leave at any moment, in any way, and as often as it likes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    "a backoff": (first_refused(500), {}, "gateway._attempts"),
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
