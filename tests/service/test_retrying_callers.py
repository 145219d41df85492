"""Callers whose channel retries by itself: what the pushback trailer makes them do."""

from __future__ import annotations

import json

import grpc

from harness import Start, failing, request, upstream
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


async def test_a_client_that_retries_is_told_a_delay_above_zero(
    start: Start, simulator: tuple[Simulator, str]
) -> None:
    """A pushback of 0 makes clients on gRPC's C core hang until their deadline."""
    gateway = await start(upstream(simulator[1]))
    gateway.running.gateway.draining = True
    options = [("grpc.service_config", json.dumps(_POLICY))]
    async with grpc.aio.insecure_channel(gateway.running.address, options=options) as channel:
        stub = chat_service_pb2_grpc.ChatServiceStub(channel)
        failure = await failing(stub.Chat(request(), timeout=30))
    assert failure.reason == "GATEWAY_DRAINING"
    assert len(gateway.events.calls) == 3
