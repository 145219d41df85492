"""A stream as lagent's stream_chat yields it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from tokenwire import TokenwireError
from tokenwire.legacy import ModelStatusCode, async_states, state_of, states
from tokenwire.testing import FakeGateway

ING, END = ModelStatusCode.STREAM_ING, ModelStatusCode.END


def collected(gateway: FakeGateway, asyncio_too: bool) -> tuple[list[Any], str]:
    """(what was yielded, the reason of the error after it)."""
    seen: list[Any] = []

    async def read() -> None:
        async with gateway.async_client() as client:
            async for state in async_states(client.stream("Hi", model="m")):
                seen.append(state)  # noqa: PERF401 - kept also when the next one raises

    try:
        if asyncio_too:
            asyncio.run(read())
        else:
            with gateway.client() as client:
                for state in states(client.stream("Hi", model="m")):
                    seen.append(state)  # noqa: PERF402 - kept also when the next one raises
    except TokenwireError as error:
        return seen, error.reason
    return seen, ""


both = pytest.mark.parametrize("asyncio_too", [False, True], ids=["blocking", "asyncio"])


@both
def test_all_text_so_far_then_the_end(gateway: FakeGateway, asyncio_too: bool) -> None:
    gateway.reply("a", "b")
    assert collected(gateway, asyncio_too) == (
        [(ING, "a", None), (ING, "ab", None), (END, "ab", None)],
        "",
    )


@both
@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("UPSTREAM_STREAM_INTERRUPTED", ModelStatusCode.SERVER_ERR),
        ("CONTEXT_LENGTH_EXCEEDED", ModelStatusCode.SESSION_OUT_OF_LIMIT),
        ("INVALID_REQUEST", ModelStatusCode.SESSION_INVALID_ARG),
        ("GATEWAY_DRAINING", ModelStatusCode.SESSION_CLOSED),
    ],
)
def test_an_error_is_a_state_and_then_itself(
    gateway: FakeGateway, asyncio_too: bool, reason: str, state: ModelStatusCode
) -> None:
    gateway.fail(reason, after=["a"])
    assert collected(gateway, asyncio_too) == ([(ING, "a", None), (state, "a", None)], reason)


def test_a_deadline_that_passed_here_has_no_reason_but_a_state() -> None:
    error = TokenwireError("late", code=grpc.StatusCode.DEADLINE_EXCEEDED)
    assert state_of(error) is ModelStatusCode.SESSION_CLOSED
    lost = TokenwireError("lost", code=grpc.StatusCode.UNAVAILABLE)
    assert state_of(lost) is ModelStatusCode.SERVER_ERR
