"""The floor under any grpc.aio server: the contract answered without parsing, upstream or policy.

`python -m bench.floor HOST:PORT`. Chat answers bytes that were made beforehand. StreamChat writes
one message for each token, by the plan in the model's name (package answer of tests/bench/go): at
full speed, or paced by the loop's own timers, each with the time it is written at. What a gateway
costs above this is its own work and its upstream's; what this costs nothing in grpc.aio avoids.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from typing import Any

import grpc
import uvloop

from tokenwire.v1 import chat_pb2, chat_service_pb2

# As package answer has them; the load generator checks every byte.
WHOLE = (
    "Gateways relay requests from clients to model servers. They add authentication, retries, rate "
    "limits, accounting and observability, and they ought to cost little: a few hundred "
    "microseconds of CPU per request and a few tens of microseconds per streamed token.\n"
    "Keep-alive connections and typed decoding help most."
)
TOKENS = (
    *(" the", " quick", ",", " model", "s", " can", " relay", ".\n", ' "quote', "été", " tokens"),
    *(" with", " low", " cost", " per", " step"),
)

_MODEL = re.compile(rb"bench(?:-[a-z][0-9.]+)*")

Event = chat_service_pb2.StreamChatResponse
_FACTS = chat_service_pb2.ResponseHeader(id="floor", model="bench")
_USED = chat_pb2.Usage(total_tokens=77)
_HEADER = Event(header=_FACTS).SerializeToString()
_FINISH = Event(
    finish=chat_service_pb2.Finish(finish_reason=chat_pb2.FINISH_REASON_STOP)
).SerializeToString()
_TRAILER = Event(trailer=chat_service_pb2.StreamTrailer(usage=_USED)).SerializeToString()


def _delta(text: str) -> bytes:
    return Event(delta=chat_service_pb2.Delta(content=text)).SerializeToString()


_DELTAS = tuple(_delta(token) for token in TOKENS)
_STAMPED = _delta(" T" + "0" * 19)
_CHAT = chat_service_pb2.ChatResponse(
    header=_FACTS,
    choices=[
        chat_service_pb2.Choice(
            message=chat_pb2.ChatMessage(role="assistant", content=WHOLE),
            finish_reason=chat_pb2.FINISH_REASON_STOP,
        )
    ],
    usage=_USED,
).SerializeToString()


def plan(request: bytes) -> tuple[int, float]:
    """(tokens, tokens a second or 0) that a request's model asks for."""
    found = _MODEL.search(request)
    fields = found[0].decode().split("-")[1:] if found else []
    numbers = {field[0]: float(field[1:]) for field in fields}
    return int(numbers.get("n", 16)), numbers.get("r", 0.0)


async def chat(_request: bytes, _context: Any) -> bytes:
    """The one answer."""
    return _CHAT


async def stream_chat(request: bytes, context: Any) -> None:
    """One message for each token, awaited as a gateway must."""
    tokens, rate = plan(request)
    await context.write(_HEADER)
    if rate:
        await _paced(context, tokens, rate)
    else:
        for i in range(tokens):
            await context.write(_DELTAS[i % len(_DELTAS)])
    await context.write(_FINISH)
    await context.write(_TRAILER)


async def _paced(context: Any, tokens: int, rate: float) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    for _ in range(tokens):
        due = max(due + 1 / rate, loop.time() - 1 / rate)
        await asyncio.sleep(due - loop.time())
        await context.write(_STAMPED[:-19] + b"%019d" % time.time_ns())


async def serve(address: str) -> None:
    """Serves until killed, with the gateway's own options for messages and connections."""
    handlers: dict[str, Any] = {
        "Chat": grpc.unary_unary_rpc_method_handler(chat),
        "StreamChat": grpc.unary_stream_rpc_method_handler(stream_chat),
    }
    server = grpc.aio.server(
        options=(
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_receive_message_length", 32 << 20),
            ("grpc.max_send_message_length", 32 << 20),
        )
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("tokenwire.v1.ChatService", handlers),)
    )
    server.add_insecure_port(address)
    await server.start()
    print(address, flush=True)  # whoever started it waits for this line
    await server.wait_for_termination()


if __name__ == "__main__":
    with contextlib.suppress(OSError, AttributeError):  # as the gateway, where it may
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1]))
