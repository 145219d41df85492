"""A gateway inside your test process: real gRPC on a loopback port, answers from a script.

    with FakeGateway() as gateway, gateway.client() as client:
        gateway.reply("Hello", " world")
        assert client.chat("Hi", model="any").text == "Hello world"

It speaks the contract as the gateway does (order of events, error details, trailers),
except where a test asks it not to (`cut`). It calls no model and counts words as tokens.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from tokenwire.channel import MAX_MESSAGE_BYTES
from tokenwire.client import AsyncClient, Client
from tokenwire.errors import DETAILS_KEY, PUSHBACK_KEY, REQUEST_ID_KEY
from tokenwire.replies import Accumulator
from tokenwire.v1.chat_pb2 import FinishReason, Usage
from tokenwire.v1.chat_service_pb2 import (
    STREAM_MODE_CUMULATIVE,
    BatchChatRequest,
    BatchChatResponse,
    ChatRequest,
    ChatResponse,
    Delta,
    Finish,
    ResponseHeader,
    Snapshot,
    StreamChatRequest,
    StreamChatResponse,
    StreamTrailer,
    ToolCallDelta,
)
from tokenwire.v1.chat_service_pb2_grpc import (
    ChatServiceServicer,
    add_ChatServiceServicer_to_server,
)
from tokenwire.v1.model_service_pb2 import (
    GetModelRequest,
    GetModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
)
from tokenwire.v1.model_service_pb2_grpc import (
    ModelServiceServicer,
    add_ModelServiceServicer_to_server,
)
from tokenwire.v1.tokenizer_service_pb2 import (
    CountTokensRequest,
    CountTokensResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenList,
)
from tokenwire.v1.tokenizer_service_pb2_grpc import (
    TokenizerServiceServicer,
    add_TokenizerServiceServicer_to_server,
)

Part: TypeAlias = str | Delta | StreamChatResponse
"""Text, a Delta, or any event; an empty StreamChatResponse is a heartbeat."""

CODES: Mapping[str, grpc.StatusCode] = {
    "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "CONTEXT_LENGTH_EXCEEDED": grpc.StatusCode.INVALID_ARGUMENT,
    "UNSUPPORTED_PARAMETER": grpc.StatusCode.INVALID_ARGUMENT,
    "UNKNOWN_ROLE": grpc.StatusCode.INVALID_ARGUMENT,
    "REQUEST_TOO_LARGE": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "CONTENT_FILTERED": grpc.StatusCode.INVALID_ARGUMENT,
    "MODEL_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "CALLER_UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
    "CALLER_FORBIDDEN": grpc.StatusCode.PERMISSION_DENIED,
    "CALLER_QUOTA_EXCEEDED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "RATE_LIMITED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "UPSTREAM_QUOTA_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "UPSTREAM_CREDENTIALS_REJECTED": grpc.StatusCode.FAILED_PRECONDITION,
    "UPSTREAM_ACCESS_DENIED": grpc.StatusCode.FAILED_PRECONDITION,
    "UPSTREAM_UNREACHABLE": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_TIMEOUT": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_OVERLOADED": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_ERROR": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_PROTOCOL_ERROR": grpc.StatusCode.UNAVAILABLE,
    "UPSTREAM_STREAM_INTERRUPTED": grpc.StatusCode.UNAVAILABLE,
    "GATEWAY_OVERLOADED": grpc.StatusCode.UNAVAILABLE,
    "GATEWAY_DRAINING": grpc.StatusCode.UNAVAILABLE,
    "DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
    "CANCELLED": grpc.StatusCode.CANCELLED,
    "CALLER_STALLED": grpc.StatusCode.ABORTED,
    "TOKENIZER_UNAVAILABLE": grpc.StatusCode.FAILED_PRECONDITION,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}
"""The status code that goes with each reason, as error_reason.proto says."""

# What another instance may serve at once: the gateway leaves these to the client's retries.
_ELSEWHERE = ("GATEWAY_OVERLOADED", "GATEWAY_DRAINING")


def tool_call(name: str, arguments: Any, *, id: str = "call_1", index: int = 0) -> Delta:  # noqa: A002 - the contract's word
    """A part that calls a function; `arguments` is text as is, anything else as JSON."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return Delta(tool_calls=[ToolCallDelta(index=index, id=id, name=name, arguments=text)])


@dataclass(eq=False)
class ReceivedCall:
    """One RPC as it arrived."""

    method: str
    """For example "StreamChat"."""
    request: Any
    """The request message; of a StreamChat, `request.chat` is the ChatRequest."""
    metadata: Mapping[str, str | bytes]
    _answered: bool = False
    _over: threading.Event = field(default_factory=threading.Event)

    def wait_cancelled(self, timeout: float = 10.0) -> bool:
        """Wait (seconds) for the call to be over; whether the caller left before its end."""
        return self._over.wait(timeout) and not self._answered


@dataclass(frozen=True)
class _Ending:
    kind: str = "whole"
    status: status_pb2.Status | None = None
    pushback_ms: int | None = None


@dataclass(frozen=True)
class _Script:
    events: tuple[StreamChatResponse, ...]
    ending: _Ending
    finish_reason: str = ""
    usage: Usage | None = None


class FakeGateway:
    """Answers calls from a script, in the order they were scripted.

    Each Chat, StreamChat, retry of one, or item of a BatchChat takes the next answer; a
    call that finds none fails with INTERNAL. Use as a context manager, or `close` it.

    Args:
        token: what callers must present; "" for no check.
        models: what ListModels lists and GetModel finds.
        credentials: of `grpc.ssl_server_credentials`, for TLS; plaintext unless given. `client`
            then needs `tls=`, and `target` names an address: give the certificate 127.0.0.1.
    """

    def __init__(
        self,
        *,
        token: str = "",
        models: Iterable[str] = ("gpt-4o-mini",),
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.calls: list[ReceivedCall] = []
        """Every RPC received, oldest first."""
        self._script: deque[_Script] = deque()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="fake-gateway")
        self._server = grpc.server(
            self._pool,
            options=[
                ("grpc.so_reuseport", 0),  # two fakes must never share a port
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # As the gateway: a client may ping each 10 s, also while nothing runs.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        service = _Services(self, token, list(models))
        add_ChatServiceServicer_to_server(service, self._server)
        add_TokenizerServiceServicer_to_server(service, self._server)
        add_ModelServiceServicer_to_server(service, self._server)
        address = "127.0.0.1:0"
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.target = f"127.0.0.1:{port}"
        """HOST:PORT to connect to."""
        self._server.start()

    # --- the script

    def reply(self, *parts: Part, finish_reason: str = "", usage: Usage | None = None) -> Self:
        """Answer the next call with these parts.

        `finish_reason` is "stop" or, after tool calls, "tool_calls" unless given.
        """
        return self._add(parts, _Ending(), finish_reason, usage)

    def fail(
        self,
        reason: str,
        *,
        message: str = "scripted by the test",
        after: Iterable[Part] = (),
        code: grpc.StatusCode | None = None,
        retry_after: float | None = None,
        field_violations: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        pushback_ms: int | None = None,
    ) -> Self:
        """Fail the next call, as the gateway does, after the parts in `after` if it streams.

        `reason` is from ErrorReason, "" for a status without details, as a proxy sends.
        `code` is the reason's own unless given. `retry_after` is in seconds.
        `pushback_ms` is what the client's own retries are told; unless given it is the
        gateway's way: silence where another instance may help, else `retry_after`, else
        -1, for no retry.
        """
        details: list[Message] = []
        if retry_after is not None:
            delay = Duration()
            delay.FromNanoseconds(round(retry_after * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if field_violations:
            refused = error_details_pb2.BadRequest()
            for path, description in field_violations.items():
                refused.field_violations.add(field=path, description=description)
            details.append(refused)
        if pushback_ms is None and reason and reason not in _ELSEWHERE:
            pushback_ms = -1 if retry_after is None else round(retry_after * 1000)
        status = _status(reason, message, code=code, metadata=metadata, details=details)
        return self._add(after, _Ending("fail", status, pushback_ms))

    def cut(self, *parts: Part) -> Self:
        """Answer with these parts, then end with OK although the answer is not whole.

        The gateway never does this; a broken proxy might. Streams only: a unary call
        fails with UPSTREAM_STREAM_INTERRUPTED.
        """
        return self._add(parts, _Ending("cut"))

    def hang(self, *parts: Part) -> Self:
        """Answer with these parts, then stay silent until the caller leaves."""
        return self._add(parts, _Ending("hang"))

    def _add(
        self,
        parts: Iterable[Part],
        ending: _Ending,
        finish_reason: str = "",
        usage: Usage | None = None,
    ) -> Self:
        events = tuple(_event(part) for part in parts)
        if not finish_reason:
            calls = any(event.delta.tool_calls for event in events)
            finish_reason = "tool_calls" if calls else "stop"
        FinishReason.Value(f"FINISH_REASON_{finish_reason.upper()}")  # ValueError if unknown
        with self._lock:
            self._script.append(_Script(events, ending, finish_reason, usage))
        return self

    # --- the server

    def client(self, **options: Any) -> Client:
        """A client of this gateway; `options` as for Client."""
        return Client(self.target, **{"token": "", **options})

    def async_client(self, **options: Any) -> AsyncClient:
        """An asyncio client of this gateway; `options` as for AsyncClient."""
        return AsyncClient(self.target, **{"token": "", **options})

    def close(self) -> None:
        """Cancel what runs and free the port."""
        self._server.stop(0).wait()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> _Script:
        with self._lock:
            if self._script:
                return self._script.popleft()
        message = "FakeGateway has no answer left: script one with reply, fail, cut or hang"
        return _Script((), _Ending("fail", _status("INTERNAL", message), -1))


def _status(
    reason: str,
    message: str,
    *,
    code: grpc.StatusCode | None = None,
    metadata: Mapping[str, str] | None = None,
    details: Iterable[Message] = (),
) -> status_pb2.Status:
    code = code or CODES[reason]
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(
        reason=reason, domain="tokenwire", metadata=dict(metadata or {})
    )
    for detail in (info, *details) if reason else details:
        packed = AnyProto()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _event(part: Part) -> StreamChatResponse:
    if isinstance(part, StreamChatResponse):
        return part
    return StreamChatResponse(delta=Delta(content=part) if isinstance(part, str) else part)


class _Services(ChatServiceServicer, TokenizerServiceServicer, ModelServiceServicer):
    """The three services of the contract, answering from the script of a FakeGateway."""

    def __init__(self, gateway: FakeGateway, token: str, models: list[str]) -> None:
        self._gateway = gateway
        self._token = token
        self._models = models

    # --- chat

    def Chat(self, request: ChatRequest, context: Any) -> ChatResponse:  # noqa: N802 - gRPC's name
        call = self._accept("Chat", request, context)
        script = self._gateway._next()
        if script.ending.kind == "hang":
            call._over.wait()
            return ChatResponse()  # to nobody
        result = self._fold(script, request)
        if isinstance(result, _Ending):
            self._abort(context, call, result)
        call._answered = True
        return result

    def StreamChat(  # noqa: N802 - gRPC's name
        self, request: StreamChatRequest, context: Any
    ) -> Iterator[StreamChatResponse]:
        call = self._accept("StreamChat", request, context)
        script = self._gateway._next()
        if script.ending.kind == "fail" and not script.events:
            self._abort(context, call, script.ending)
        answer = Accumulator()
        for event in self._events(script, request.chat):
            answer.add(event)
            if request.mode == STREAM_MODE_CUMULATIVE and event.HasField("delta"):
                yield _snapshot(answer, event.delta.choice_index)
            else:
                yield event
        if script.ending.kind == "hang":
            call._over.wait()
            return
        if script.ending.kind == "fail":
            self._abort(context, call, script.ending)
        call._answered = True

    def BatchChat(  # noqa: N802 - gRPC's name
        self, request: BatchChatRequest, context: Any
    ) -> Iterator[BatchChatResponse]:
        call = self._accept("BatchChat", request, context)
        scripts = [self._gateway._next() for _ in request.items]
        # Last item first: results come in order of completion, and code that takes it
        # for the order of the items should notice in a test.
        for index in reversed(range(len(scripts))):
            item, script = request.items[index], scripts[index]
            if script.ending.kind == "hang":
                call._over.wait()
                return
            result = self._fold(script, item.chat)
            if isinstance(result, _Ending):
                yield BatchChatResponse(index=index, custom_id=item.custom_id, error=result.status)
            else:
                yield BatchChatResponse(index=index, custom_id=item.custom_id, response=result)
        call._answered = True

    def _events(self, script: _Script, chat: ChatRequest) -> Iterator[StreamChatResponse]:
        yield StreamChatResponse(
            header=ResponseHeader(
                id=f"fake-{len(self._gateway.calls)}", model=chat.model, upstream="fake"
            )
        )
        yield from script.events
        if script.ending.kind != "whole":
            return
        reason = FinishReason.Value(f"FINISH_REASON_{script.finish_reason.upper()}")
        finished = {
            event.finish.choice_index for event in script.events if event.HasField("finish")
        }
        begun = {event.delta.choice_index for event in script.events if event.HasField("delta")}
        for index in sorted((begun or {0}) - finished):
            yield StreamChatResponse(
                finish=Finish(
                    choice_index=index, finish_reason=reason, finish_reason_raw=script.finish_reason
                )
            )
        yield StreamChatResponse(trailer=StreamTrailer(usage=script.usage or _usage(script, chat)))

    def _fold(self, script: _Script, chat: ChatRequest) -> ChatResponse | _Ending:
        if script.ending.kind == "fail":
            return script.ending
        if script.ending.kind == "cut":
            status = _status("UPSTREAM_STREAM_INTERRUPTED", "cut by the test")
            return _Ending("fail", status, -1)
        answer = Accumulator()
        for event in self._events(script, chat):
            answer.add(event)
        return answer.so_far().proto

    # --- tokens

    def CountTokens(self, request: CountTokensRequest, context: Any) -> CountTokensResponse:  # noqa: N802 - gRPC's name
        call = self._accept("CountTokens", request, context)
        texts = [request.text, *(message.content for message in request.chat.messages)]
        call._answered = True
        return CountTokensResponse(
            total_tokens=sum(len(text.split()) for text in texts), tokenizer="words", exact=False
        )

    def Tokenize(self, request: TokenizeRequest, context: Any) -> TokenizeResponse:  # noqa: N802 - gRPC's name
        call = self._accept("Tokenize", request, context)
        response = TokenizeResponse(tokenizer="words")
        for text in request.texts:
            words = [word.encode() for word in text.split()]
            response.lists.append(TokenList(ids=range(len(words)), pieces=words))
        call._answered = True
        return response

    # --- models

    def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:  # noqa: N802 - gRPC's name
        call = self._accept("ListModels", request, context)
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        call._answered = True
        return ListModelsResponse(
            models=[_model(name) for name in self._models[start:end]],
            next_page_token=str(end) if end < len(self._models) else "",
        )

    def GetModel(self, request: GetModelRequest, context: Any) -> GetModelResponse:  # noqa: N802 - gRPC's name
        call = self._accept("GetModel", request, context)
        if request.name not in self._models:
            self._refuse(context, call, "MODEL_NOT_FOUND", f"no model {request.name!r}")
        call._answered = True
        return GetModelResponse(model=_model(request.name))

    # --- every call

    def _accept(self, method: str, request: Message, context: Any) -> ReceivedCall:
        metadata = dict(context.invocation_metadata())
        call = ReceivedCall(method, request, metadata)
        self._gateway.calls.append(call)
        if not context.add_callback(call._over.set):
            call._over.set()
        context.set_trailing_metadata(self._trailers(call))
        if self._token and metadata.get("authorization") != f"Bearer {self._token}":
            self._refuse(context, call, "CALLER_UNAUTHENTICATED", "missing or wrong token")
        return call

    def _trailers(self, call: ReceivedCall) -> list[tuple[str, str | bytes]]:
        request_id = call.metadata.get(REQUEST_ID_KEY)
        return [(REQUEST_ID_KEY, request_id)] if request_id else []

    def _refuse(self, context: Any, call: ReceivedCall, reason: str, message: str) -> NoReturn:
        self._abort(context, call, _Ending("fail", _status(reason, message), -1))

    def _abort(self, context: Any, call: ReceivedCall, ending: _Ending) -> NoReturn:
        assert ending.status is not None
        call._answered = True
        trailers = self._trailers(call)
        if ending.status.details:
            trailers.append((DETAILS_KEY, ending.status.SerializeToString()))
        if ending.pushback_ms is not None:
            trailers.append((PUSHBACK_KEY, str(ending.pushback_ms)))
        context.set_trailing_metadata(trailers)
        codes: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
        context.abort(codes[ending.status.code], ending.status.message)
        raise AssertionError("abort returned")


def _snapshot(answer: Accumulator, index: int) -> StreamChatResponse:
    choice = next(choice for choice in answer.choices if choice.index == index)
    return StreamChatResponse(
        snapshot=Snapshot(
            state=Snapshot.STATE_STREAMING, choice_index=index, message=choice.message
        )
    )


def _usage(script: _Script, chat: ChatRequest) -> Usage:
    prompt = sum(len(message.content.split()) for message in chat.messages)
    answer = len("".join(event.delta.content for event in script.events).split())
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        estimated=True,
    )


def _model(name: str) -> Model:
    return Model(name=name, upstream="fake", upstream_model=name, tokenizer="words")
