"""A caller's trace goes on to the upstream, whether or not it is recorded here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from aiohttp import web

from harness import Start, completion, provider, request, upstream
from tokenwire_service.settings import Otlp

# Nobody listens there, and nothing is recorded: only what is passed on matters here.
QUIET: dict[str, Any] = {"endpoint": "http://127.0.0.1:1", "metrics": False, "sampling": 0.0}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


async def answer(_: web.Request) -> web.StreamResponse:
    return completion()


async def passed_on(
    start: Start, metadata: tuple[tuple[str, str], ...], **settings: Any
) -> dict[str, str]:
    """The headers that an upstream gets."""
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), otlp=Otlp(**QUIET | settings))
        await gateway.chat.Chat(request(), metadata=metadata)
        [asked] = served.asked
        [attempt], [call] = gateway.events.attempts, gateway.events.calls
        assert attempt.trace_id == call.trace_id
        assert call.trace_id in asked.headers.get("traceparent", call.trace_id)
    return asked.headers


async def test_within_the_callers_trace(start: Start) -> None:
    caller = (("traceparent", f"00-{TRACE}-{PARENT}-00"), ("tracestate", "a=1"))
    headers = await passed_on(start, caller)
    found = re.fullmatch(rf"00-{TRACE}-([0-9a-f]{{16}})-00", headers["traceparent"])
    assert found
    assert found[1] != PARENT
    assert headers["tracestate"] == "a=1"


@pytest.mark.parametrize(
    "caller",
    [
        (),
        (("traceparent", "nonsense"),),
        (("traceparent", f"00-{'0' * 32}-{PARENT}-01"),),
    ],
)
async def test_in_a_new_one_where_the_callers_is_none(
    start: Start, caller: tuple[tuple[str, str], ...]
) -> None:
    headers = await passed_on(start, caller)
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[02]", headers["traceparent"])
    assert TRACE not in headers["traceparent"]


async def test_not_at_all_where_that_is_not_wanted(start: Start) -> None:
    caller = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
    headers = await passed_on(start, caller, propagate=False)
    assert "traceparent" not in headers


async def test_not_where_traces_are_off(start: Start) -> None:
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        await gateway.chat.Chat(request(), metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),))
        assert "traceparent" not in served.asked[0].headers
        assert gateway.events.calls[0].trace_id == ""
