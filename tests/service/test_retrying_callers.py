"""Callers whose channel retries by itself: what the pushback trailer makes them do."""

from __future__ import annotations

import json
from collections.abc import Callable

import grpc
import pytest

from harness import Start, Stubs, failing, request, upstream
from tokenwire.v1 import chat_service_pb2_grpc
from tokenwire_service.simulator import Simulator

_POLICY = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.01s",
                "maxBackoff": "0.01s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def _draining(gateway: Stubs) -> None:
    gateway.running.gateway.draining = True


def _overloaded(gateway: Stubs) -> None:
    backlog = gateway.running.boundary.backlog
    assert backlog is not None
    begins = backlog.begins

    def refuses(*, refusable: bool = True) -> bool:
        return begins(refusable=refusable) and not refusable

    backlog.begins = refuses  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("refuses", "reason"),
    [(_draining, "GATEWAY_DRAINING"), (_overloaded, "GATEWAY_OVERLOADED")],
    ids=["draining", "overloaded"],
)
async def test_a_client_that_retries_does_so_where_it_is_told_a_delay(
    start: Start,
    simulator: tuple[Simulator, str],
    refuses: Callable[[Stubs], None],
    reason: str,
) -> None:
    """Which is never 0: on that clients on gRPC's C core hang until their deadline. And no header
    nor message goes before the status: a call that has been answered is not retried."""
    gateway = await start(upstream(simulator[1]))
    await gateway.chat.Chat(request())  # until then its method is none that can be refused unread
    gateway.events.calls.clear()
    refuses(gateway)
    options = [("grpc.service_config", json.dumps(_POLICY))]
    async with grpc.aio.insecure_channel(gateway.running.address, options=options) as channel:
        stub = chat_service_pb2_grpc.ChatServiceStub(channel)
        failure = await failing(stub.Chat(request(), timeout=30))
    assert failure.reason == reason
    assert len(gateway.events.calls) == 3
