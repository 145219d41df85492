"""Every legacy state of a cumulative stream reaches a caller, and each error state is followed by
the same error as the status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from harness import (
    Failure,
    Start,
    chunk,
    event_stream,
    failing,
    provider,
    receive,
    request,
    simulate,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.config import Retries
from tokenwire_service.simulator import Simulator

Snapshot = chat_service_pb2.Snapshot
CUMULATIVE = chat_service_pb2.STREAM_MODE_CUMULATIVE
QUICK = Retries(max_attempts=20, backoff=0.001, backoff_cap=0.001, budget_floor=1000)


def states(snapshots: list[Snapshot]) -> list[str]:
    """Their names, each once in a row."""
    names = [Snapshot.State.Name(s.state).removeprefix("STATE_") for s in snapshots]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def refused(chat: chat_service_pb2.ChatRequest) -> None:
    chat.params.temperature = 3.0


def unknown_role(chat: chat_service_pb2.ChatRequest) -> None:
    chat.messages.add(role="stranger", content="hello")


def unsupported(chat: chat_service_pb2.ChatRequest) -> None:
    chat.params.top_k = 3


def with_fault(name: str) -> Callable[[chat_service_pb2.ChatRequest], None]:
    def change(chat: chat_service_pb2.ChatRequest) -> None:
        chat.extra_body_json = simulate(fault=name)

    return change


ENDS: Mapping[str, tuple[Callable[[chat_service_pb2.ChatRequest], None], list[str], str]] = {
    "an answer": (lambda _: None, ["READY", "STREAMING", "ENDED"], ""),
    "a broken stream": (
        with_fault("cut"),
        ["READY", "STREAMING", "SERVER_ERROR"],
        "UPSTREAM_STREAM_INTERRUPTED",
    ),
    "an upstream that is down": (with_fault("server_error"), ["SERVER_ERROR"], "UPSTREAM_ERROR"),
    "a prompt that is too long": (
        with_fault("context_length_exceeded"),
        ["OUT_OF_LIMIT"],
        "CONTEXT_LENGTH_EXCEEDED",
    ),
    "a value out of range": (refused, ["INVALID_ARGUMENT"], "INVALID_REQUEST"),
    "an unknown role": (unknown_role, ["INVALID_ARGUMENT"], "UNKNOWN_ROLE"),
    "a parameter it does not take": (unsupported, ["INVALID_ARGUMENT"], "UNSUPPORTED_PARAMETER"),
    # Trying again later helps: the status alone leaves the caller free to do so.
    "keys that cool": (with_fault("rate_limited"), [], "RATE_LIMITED"),
}


@pytest.mark.parametrize("way", ENDS)
async def test_a_cumulative_stream_ends_in_its_state(
    start: Start, simulator: tuple[Simulator, str], way: str
) -> None:
    change, expected, reason = ENDS[way]
    gateway = await start(
        upstream(simulator[1], keys=1, unsupported_parameters=frozenset({"top_k"})), retries=QUICK
    )
    chat = request("Tell me a story")
    change(chat)
    received = await receive(
        gateway.chat.StreamChat(stream_request(chat, mode=CUMULATIVE), timeout=2)
    )
    assert states(received.snapshots) == expected
    if not reason:
        assert received.failure is None
        return
    assert received.failure is not None
    assert received.failure.reason == reason
    # The status is the one that a caller hears who does not ask for snapshots.
    same: Failure = await failing(gateway.chat.StreamChat(stream_request(chat), timeout=2))
    assert (same.code, same.reason, same.fields if "BadRequest" in same.details else None) == (
        received.failure.code,
        received.failure.reason,
        received.failure.fields if "BadRequest" in received.failure.details else None,
    )
    if expected:
        assert received.failure.pushback in ("", "-1"), "a message went out: no other try"


# --- closed ------------------------------------------------------------------------------


@asynccontextmanager
async def stalling() -> AsyncIterator[Any]:
    """An upstream that says one word and no more."""

    async def answer(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("one "))
        await asyncio.Event().wait()
        return response

    async with provider(answer) as served:
        yield served


async def test_a_session_that_the_gateway_ends_is_closed(start: Start) -> None:
    """A caller whose own deadline passes, or who cancels, is not there to hear of it."""
    async with stalling() as served:
        gateway = await start(upstream(served.base_url))
        streaming = gateway.chat.StreamChat(stream_request(request(), mode=CUMULATIVE), timeout=20)
        snapshots: list[Snapshot] = []
        while "STREAMING" not in states(snapshots):
            snapshots.append((await anext(aiter(streaming))).snapshot)
        waiting = asyncio.ensure_future(failing(gateway.chat.Chat(request(), timeout=20)))
        await until(lambda: served.open == 2)
        gateway.running.gateway.close()
        received, refused = await receive(streaming), await waiting
    assert states([*snapshots[1:], *received.snapshots]) == ["READY", "STREAMING", "CLOSED"]
    assert received.snapshots[-1].message.content == "one "
    assert received.failure is not None
    assert (received.failure.code.name, received.failure.reason) == (
        "UNAVAILABLE",
        "GATEWAY_DRAINING",
    )
    assert received.failure.pushback == "-1", "another try would repeat the text"
    assert refused.reason == "GATEWAY_DRAINING"
    assert int(refused.pushback) >= 0, "nothing was delivered: another instance may answer"


def test_every_state_is_reached() -> None:
    reached = {state for _, expected, _ in ENDS.values() for state in expected} | {"CLOSED"}
    every = {name.removeprefix("STATE_") for name in Snapshot.State.keys()}  # noqa: SIM118
    assert reached == every - {"UNSPECIFIED"}
