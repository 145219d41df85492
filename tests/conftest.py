"""A real gateway on a real port in front of a real HTTP upstream, and a look for leaks after."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

# uvloop forks, and gRPC's core has handlers for that which ruin a child now and then, before it
# becomes another program ("next_worker->state == KICKED", or it hangs): read as core is loaded.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import grpc
import msgspec
import pytest

from harness import Recorder, Start, Stubs
from tokenwire.v1 import (
    chat_service_pb2_grpc,
    model_service_pb2_grpc,
    tokenizer_service_pb2_grpc,
)
from tokenwire_service.config import Admin, Config, Upstream
from tokenwire_service.relay import HEARTBEAT_SECONDS
from tokenwire_service.server import serving
from tokenwire_service.simulator import Simulator


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long`: what `make faults` runs."""
    parser.addoption(
        "--long", action="store_true", help="tests/faults: minutes where CI has seconds"
    )


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """`configure_logging` is for a process of its own: no test leaves it to the next."""
    loggers = [logging.getLogger(n) for n in ("tokenwire", "aiohttp", "asyncio", "grpc")]
    before = [(each, each.handlers[:], each.propagate, each.level) for each in loggers]
    yield
    for each, handlers, propagate, level in before:
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.fixture
async def simulator() -> AsyncIterator[tuple[Simulator, str]]:
    """(simulator, base URL), as fast as possible."""
    simulated = Simulator(tokens_per_second=0)
    async with simulated.serving() as base_url:
        yield simulated, base_url


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts gateways: `await start(upstream(...), ...)` or `await start(config=...)`.

    After the case: no call in flight, no lease held, no task left.
    """
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        started: list[Stubs] = []

        async def begin(
            *upstreams: Upstream,
            config: Config | None = None,
            heartbeat: float = HEARTBEAT_SECONDS,
            **settings: Any,
        ) -> Stubs:
            if config is None:
                config = Config(listen="127.0.0.1:0", upstreams=upstreams, **settings)
            if config.admin.listen is None:  # gateways of other tests have the default port
                config = msgspec.structs.replace(config, admin=Admin(listen="off"))
            recorder = Recorder()
            logger = logging.getLogger("tokenwire.test")
            running = await stack.enter_async_context(
                serving(config, logger, observer=recorder, heartbeat=heartbeat)
            )
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    running.address,
                    options=[
                        ("grpc.max_receive_message_length", 64 << 20),
                        ("grpc.max_send_message_length", 64 << 20),
                        ("grpc.use_local_subchannel_pool", 1),
                    ],
                )
            )
            stubs = Stubs(
                running,
                channel,
                chat_service_pb2_grpc.ChatServiceStub(channel),
                tokenizer_service_pb2_grpc.TokenizerServiceStub(channel),
                model_service_pb2_grpc.ModelServiceStub(channel),
                recorder,
            )
            started.append(stubs)
            return stubs

        yield begin
        for stubs in started:
            await _settled(lambda s=stubs: s.running.gateway.in_flight == 0, "calls in flight")
            await _settled(lambda s=stubs: s.running.leases == 0, "leases held")
            await _settled(lambda s=stubs: s.running.connections_busy == 0, "open upstream answers")

    def leaked() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - before - {asyncio.current_task()}

    for _ in range(200):  # gRPC's own tasks end a moment after the server has
        if leaked():
            await asyncio.sleep(0.01)
    assert not leaked(), f"tasks left behind: {leaked()}"


async def _settled(holds: Callable[[], bool], what: str) -> None:
    """Waits a moment for what ends in the background, then insists."""
    for _ in range(200):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what} after the case")
