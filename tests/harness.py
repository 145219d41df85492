"""What service tests share: a gateway as its callers see it, requests, upstreams."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from aiohttp import web
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tokenwire.v1 import (
    chat_service_pb2,
    chat_service_pb2_grpc,
    model_service_pb2_grpc,
    tokenizer_service_pb2_grpc,
)
from tokenwire_service.config import Key, Upstream
from tokenwire_service.secret import Secret
from tokenwire_service.server import Running
from tokenwire_service.telemetry import AttemptEvent, CallEvent


class Recorder:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.attempts: list[AttemptEvent] = []
        self.calls: list[CallEvent] = []

    def attempt(self, event: AttemptEvent) -> None:
        self.attempts.append(event)

    def call(self, event: CallEvent) -> None:
        self.calls.append(event)


@dataclass
class Stubs:
    """A started gateway as a caller sees it, and from inside."""

    running: Running
    channel: grpc.aio.Channel
    chat: chat_service_pb2_grpc.ChatServiceAsyncStub
    tokens: tokenizer_service_pb2_grpc.TokenizerServiceAsyncStub
    models: model_service_pb2_grpc.ModelServiceAsyncStub
    events: Recorder


Start = Callable[..., Awaitable[Stubs]]
Figures = Callable[[str, float, str], None]  # what was measured, the value, its unit


def upstream(base_url: str, keys: int = 2, **settings: Any) -> Upstream:
    """An upstream with keys named k1, k2, ... whose secrets are sk-test-k1, ..."""
    settings.setdefault("name", "test")
    settings.setdefault("passthrough", True)
    return Upstream(
        base_url=base_url,
        keys=tuple(
            Key(id=f"k{i}", secret=Secret(f"sk-test-k{i}"), quota_group=f"g{i}")
            for i in range(1, keys + 1)
        ),
        **settings,
    )


def request(text: str = "hello", model: str = "m", **fields: Any) -> chat_service_pb2.ChatRequest:
    """A request of one user message."""
    chat = chat_service_pb2.ChatRequest(model=model, **fields)
    chat.messages.add(role="user", content=text)
    return chat


def simulate(**directives: Any) -> str:
    """The `extra_body_json` that carries directives to the simulator: see docs/simulator.md."""
    return json.dumps({"simulate": directives})


def stream_request(
    chat: chat_service_pb2.ChatRequest, **fields: Any
) -> chat_service_pb2.StreamChatRequest:
    """A StreamChat of `chat`."""
    return chat_service_pb2.StreamChatRequest(chat=chat, **fields)


async def until(holds: Callable[[], bool]) -> None:
    """Waits for something that another side of a connection notices; fails after 10 s."""
    async with asyncio.timeout(10):
        while not holds():  # there is no event to wait for
            await asyncio.sleep(0.005)


# --- what a caller hears ----------------------------------------------------------------

_DETAILS = {
    detail.DESCRIPTOR.full_name: detail
    for detail in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
        error_details_pb2.QuotaFailure,
        error_details_pb2.ResourceInfo,
    )
}


@dataclass
class Failure:
    """One status that is not OK, taken apart. `details` go by message name: `RetryInfo`, ..."""

    code: grpc.StatusCode
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    trailers: dict[str, str | bytes] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The ErrorInfo's; empty without one."""
        info = self.details.get("ErrorInfo")
        return info.reason if info is not None else ""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The ErrorInfo's."""
        return self.details["ErrorInfo"].metadata

    @property
    def fields(self) -> dict[str, str]:
        """BadRequest: field -> description."""
        violations = self.details["BadRequest"].field_violations
        return {v.field: v.description for v in violations}

    @property
    def retry_seconds(self) -> float:
        """RetryInfo's delay."""
        return self.details["RetryInfo"].retry_delay.ToNanoseconds() / 1e9

    @property
    def pushback(self) -> str:
        """The trailer grpc-retry-pushback-ms; empty without one."""
        return str(self.trailers.get("grpc-retry-pushback-ms", ""))

    @property
    def everything(self) -> str:
        """All that a caller could read of it, as text."""
        return repr((self.message, self.details, self.trailers))


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """The failure a call raised. A status in the trailers must agree with the call's own."""
    trailers = dict(error.trailing_metadata() or ())
    found = Failure(error.code(), error.details() or "", trailers=trailers)
    if (packed := trailers.get("grpc-status-details-bin")) is not None:
        status = status_pb2.Status.FromString(packed)
        assert status.code == error.code().value[0]
        assert status.message == found.message
        found.details = unpacked(status)
    return found


def unpacked(status: status_pb2.Status) -> dict[str, Message]:
    """The details of a status by name; each kind stands there once, ErrorInfo always."""
    found: dict[str, Message] = {}
    for packed in status.details:
        name = packed.type_url.rpartition("/")[2]
        detail = _DETAILS[name]()
        assert packed.Unpack(detail)
        assert name.rpartition(".")[2] not in found
        found[name.rpartition(".")[2]] = detail
    info = found["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.domain == "tokenwire"
    return found


def item_failure(answer: chat_service_pb2.BatchChatResponse) -> Failure:
    """The failure of one item of a batch."""
    assert answer.WhichOneof("result") == "error"
    code = next(c for c in grpc.StatusCode if c.value[0] == answer.error.code)
    return Failure(code, answer.error.message, unpacked(answer.error))


async def failing(call: Any) -> Failure:
    """The failure of a call, unary or streaming, that must not end with OK."""
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            answer = await call
        else:
            answer = [message async for message in call]
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError(f"the call succeeded: {answer}")


@dataclass
class Received:
    """All that one StreamChat gave, up to its end or its failure."""

    events: list[chat_service_pb2.StreamChatResponse] = field(default_factory=list)
    failure: Failure | None = None
    trailers: dict[str, str | bytes] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """What the events are, in order; "none" for a heartbeat."""
        return [event.WhichOneof("event") or "none" for event in self.events]

    @property
    def header(self) -> chat_service_pb2.ResponseHeader:
        """The first event."""
        assert self.kinds[0] == "header"
        return self.events[0].header

    @property
    def trailer(self) -> chat_service_pb2.StreamTrailer:
        """The last event."""
        assert self.kinds[-1] == "trailer"
        return self.events[-1].trailer

    @property
    def finishes(self) -> dict[int, chat_service_pb2.Finish]:
        """By choice."""
        return {
            event.finish.choice_index: event.finish
            for event in self.events
            if event.WhichOneof("event") == "finish"
        }

    @property
    def deltas(self) -> list[chat_service_pb2.Delta]:
        """In order."""
        return [event.delta for event in self.events if event.WhichOneof("event") == "delta"]

    @property
    def texts(self) -> dict[int, str]:
        """Content by choice."""
        texts: defaultdict[int, str] = defaultdict(str)
        for delta in self.deltas:
            texts[delta.choice_index] += delta.content
        return dict(texts)

    @property
    def text(self) -> str:
        """Content of choice 0."""
        return self.texts.get(0, "")

    @property
    def snapshots(self) -> list[chat_service_pb2.Snapshot]:
        """In order."""
        return [e.snapshot for e in self.events if e.WhichOneof("event") == "snapshot"]


async def receive(call: Any) -> Received:
    """Reads one stream to its end. A failure is part of what is received."""
    received = Received()
    try:
        async for event in call:
            received.events.append(event)
        received.trailers = dict(await call.trailing_metadata())
    except grpc.aio.AioRpcError as error:
        received.failure = failure_of(error)
    return received


# --- upstreams --------------------------------------------------------------------------


@dataclass
class Asked:
    """One request as an upstream got it. Header names in lower case."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Provider:
    """A real HTTP upstream whose answers a test writes. `open` counts requests under way."""

    base_url: str = ""
    asked: list[Asked] = field(default_factory=list)
    open: int = 0
    ended: int = 0


@asynccontextmanager
async def provider(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Provider]:
    """Serves `answer` for every path until left. A caller that leaves cancels its `answer`."""
    served = Provider()

    async def handle(asked: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in asked.headers.items()}
        served.open += 1
        try:
            body = await asked.read()
            served.asked.append(Asked(asked.path_qs, headers, json.loads(body) if body else None))
            return await answer(asked)
        except ConnectionError:
            return web.Response()  # nobody is there to read it
        finally:
            served.open -= 1
            served.ended += 1

    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        served.base_url = f"http://{host}:{runner.addresses[0][1]}/v1"
        yield served
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_provider(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Provider]:
    """As `provider`, for what no HTTP library would send: `answer` writes to the socket itself,
    after one request was read. The connection closes when it returns."""
    served = Provider()
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        served.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = head.split("\r\n")
            pairs = (line.partition(": ") for line in lines[1:] if line)
            headers = {name.lower(): value for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            served.asked.append(
                Asked(lines[0].split()[1], headers, json.loads(body) if body else None)
            )
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            served.open -= 1
            served.ended += 1
            tasks.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    served.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield served
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def completion(text: str = "hello", **fields: Any) -> web.Response:
    """A plain chat completion."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    return web.json_response(
        {"id": "c1", "object": "chat.completion", "model": "m", "choices": [choice], **fields}
    )


def chunk(text: str, **choice: Any) -> bytes:
    """One event of a stream with a delta of `text`."""
    choices = [{"index": 0, "delta": {"content": text}, **choice}]
    payload = {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": choices}
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


async def event_stream(asked: web.Request) -> web.StreamResponse:
    """A stream whose head is sent; the caller writes the events."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(asked)
    return response
