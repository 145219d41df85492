"""A defect of the gateway itself: the caller hears INTERNAL and a request id, and nothing else;
the log hears everything; the server goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from harness import Start, Stubs, failing, receive, request, simulate, stream_request, upstream
from tokenwire.v1 import chat_service_pb2, model_service_pb2, tokenizer_service_pb2
from tokenwire_service.gateway import Gateway
from tokenwire_service.relay import Outbox
from tokenwire_service.simulator import Simulator
from tokenwire_service.tokens import TokenCounter

Simulated = tuple[Simulator, str]
INSIDE = "text that is nobody's business"


class PanicException(BaseException):  # what Rust extensions raise is called so
    """No Exception."""


DEFECTS: list[BaseException] = [
    RuntimeError(INSIDE),
    KeyError(INSIDE),
    TimeoutError(INSIDE),
    ExceptionGroup(INSIDE, [ValueError(INSIDE)]),
    PanicException(INSIDE),
    asyncio.CancelledError(INSIDE),  # a stray one: nobody cancelled this call
    StopAsyncIteration(INSIDE),
]


def batch() -> chat_service_pb2.BatchChatRequest:
    items = chat_service_pb2.BatchChatRequest()
    items.items.add(chat=request())
    return items


# RPC -> (where the defect is, the call)
RPCS: dict[str, tuple[type, str, Callable[[Stubs], Any]]] = {
    "Chat": (Gateway, "chat", lambda g: g.chat.Chat(request())),
    "StreamChat": (Gateway, "stream", lambda g: g.chat.StreamChat(stream_request(request()))),
    "BatchChat": (Gateway, "refuse_if_draining", lambda g: g.chat.BatchChat(batch())),
    "CountTokens": (
        TokenCounter,
        "count_text",
        lambda g: g.tokens.CountTokens(
            tokenizer_service_pb2.CountTokensRequest(model="m", text="x")
        ),
    ),
    "Tokenize": (
        TokenCounter,
        "tokenize",
        lambda g: g.tokens.Tokenize(tokenizer_service_pb2.TokenizeRequest(model="m", texts=["x"])),
    ),
    "ListModels": (
        Gateway,
        "models",
        lambda g: g.models.ListModels(model_service_pb2.ListModelsRequest()),
    ),
    "GetModel": (
        Gateway,
        "configured",
        lambda g: g.models.GetModel(model_service_pb2.GetModelRequest(name="simulated-small")),
    ),
}


def test_every_rpc_of_the_contract_has_a_defect() -> None:
    services = [
        chat_service_pb2.DESCRIPTOR.services_by_name["ChatService"],
        tokenizer_service_pb2.DESCRIPTOR.services_by_name["TokenizerService"],
        model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
    ]
    assert {method.name for service in services for method in service.methods} == set(RPCS)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: type(defect).__name__)
@pytest.mark.parametrize("rpc", RPCS)
async def test_a_defect_is_internal_for_the_caller_and_told_in_full_to_the_log(
    start: Start,
    simulator: Simulated,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rpc: str,
    defect: BaseException,
) -> None:
    owner, name, call = RPCS[rpc]
    gateway = await start(upstream(simulator[1]))

    def broken(*_args: object, **_fields: object) -> Any:
        raise defect

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, broken)
        failure = await failing(call(gateway))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert failure.reason == "INTERNAL"
    assert failure.pushback == "-1"
    assert INSIDE not in failure.everything
    assert "Traceback" not in failure.everything
    assert type(defect).__name__ not in failure.everything
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert INSIDE in str(record.exc_info[1])
    fields = record.__dict__["fields"]
    assert fields["request_id"] == failure.metadata["requestId"] == failure.trailers["x-request-id"]
    assert fields["method"].endswith(rpc)
    assert gateway.events.calls[-1].code == "INTERNAL"
    # The same call, now that the defect is gone.
    again = call(gateway)
    if isinstance(again, grpc.aio.UnaryUnaryCall):
        await again
    else:
        assert [message async for message in again] != []


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: type(defect).__name__)
async def test_a_defect_within_a_stream_ends_it_with_a_status(
    start: Start,
    simulator: Simulated,
    monkeypatch: pytest.MonkeyPatch,
    defect: BaseException,
) -> None:
    async def broken(self: Outbox, events: object) -> None:
        raise defect

    gateway = await start(upstream(simulator[1]))
    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "finish", broken)
        chat = request(
            "Count to five", extra_body_json=simulate(tokens_per_second=2000, first_token_ms=0)
        )
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.text != ""
    assert received.failure is not None
    assert received.failure.code is grpc.StatusCode.INTERNAL
    assert INSIDE not in received.failure.everything
    assert gateway.running.leases == 0


async def test_many_defects_at_once_hurt_nobody_else(
    start: Start, simulator: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Gateway.chat

    async def sometimes(self: Gateway, call: Any) -> chat_service_pb2.ChatResponse:
        if call.chat.model == "bad":
            raise DEFECTS[len(call.chat.messages[0].content) % len(DEFECTS)]
        return await real(self, call)

    monkeypatch.setattr(Gateway, "chat", sometimes)
    gateway = await start(upstream(simulator[1]))
    calls = [
        gateway.chat.Chat(request("x" * n, model="bad" if n % 2 else "good")) for n in range(1, 61)
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    codes = [
        outcome.code() if isinstance(outcome, grpc.aio.AioRpcError) else None
        for outcome in outcomes
    ]
    assert codes == [grpc.StatusCode.INTERNAL, None] * 30
