"""What tests of whole processes share: `tokenwire` commands that run, are watched, and end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from harness import Received, receive, request, simulate, until
from tokenwire.v1 import chat_service_pb2, chat_service_pb2_grpc

COMMAND = str(Path(sys.executable).parent / "tokenwire")
PROMPT = "a prompt that no log may hold"


@dataclass
class Program:
    """A started command. `lines` is its standard error so far."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    out: str = ""
    channel: grpc.aio.Channel | None = None

    def event(self, name: str) -> dict[str, Any] | None:
        """The first line of the log with this event."""
        for line in self.lines:
            if line.startswith("{") and json.loads(line)["event"] == name:
                found: dict[str, Any] = json.loads(line)
                return found
        return None

    @property
    def resident_kib(self) -> int:
        """Its memory now, without what is swapped out."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self) -> int:
        """Waits for the end; all of standard error is in `lines` then."""
        async with asyncio.timeout(20):
            return await self.process.wait()

    @property
    def chat(self) -> Any:
        return chat_service_pb2_grpc.ChatServiceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)


def environment(**variables: str) -> dict[str, str]:
    """This process's, without what configures the gateway."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "TOKENWIRE_"))
    }
    return kept | variables


@asynccontextmanager
async def run(
    *arguments: str, program: tuple[str, ...] = (COMMAND,), **variables: str
) -> AsyncIterator[Program]:
    """Runs a command; kills it if it is still there in the end."""
    process = await asyncio.create_subprocess_exec(
        *program,
        *arguments,
        env=environment(**variables),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    started = Program(process)

    async def read_errors() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            started.lines.append(line.decode().rstrip("\n"))

    async def read_output() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            started.out += line.decode()

    async with asyncio.TaskGroup() as readers:
        readers.create_task(read_errors())
        readers.create_task(read_output())
        try:
            yield started
        finally:
            if started.channel is not None:
                await started.channel.close()
            if process.returncode is None:
                await asyncio.sleep(0.1)  # the gateway holds the lines of its log for half as long
            if process.returncode is None:
                process.kill()
            await process.wait()


@asynccontextmanager
async def serve(
    *arguments: str, program: tuple[str, ...] = (COMMAND,), **variables: str
) -> AsyncIterator[Program]:
    """`tokenwire serve` on a free port, once it serves."""
    listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
    async with run("serve", *arguments, *listen, program=program, **variables) as started:
        await until(
            lambda: started.event("serving") is not None or started.process.returncode is not None
        )
        serving = started.event("serving")
        assert serving is not None, started.lines
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        started.channel = grpc.aio.insecure_channel(serving["address"], options=options)
        yield started


async def ended(*arguments: str, **variables: str) -> Program:
    """A command that ends by itself."""
    async with run(*arguments, **variables) as started:
        await started.exit_code()
    return started


def paced(tokens: int, **fields: Any) -> chat_service_pb2.ChatRequest:
    """One whose answer takes about a hundredth of a second per token."""
    pace = simulate(tokens=tokens, tokens_per_second=100, first_token_ms=0)
    return request(PROMPT, extra_body_json=pace, **fields)


STALLED = simulate(fault="stall_midway", first_token_ms=0)


async def begun(call: Any) -> asyncio.Task[Received]:
    """A stream that is read in the background, once its first text is there."""
    events = aiter(call)
    await anext(events)
    assert (await anext(events)).delta.content != ""
    return asyncio.ensure_future(receive(call))


def write_config(folder: Path, base_url: str, **top: Any) -> str:
    """A configuration with one upstream."""
    path = folder / "tokenwire.yaml"
    upstreams = {"test": {"base_url": base_url, "keys": [{"env": "TEST_KEY"}], "passthrough": True}}
    path.write_text(json.dumps({"upstreams": upstreams, **top}))  # JSON is YAML
    return str(path)
