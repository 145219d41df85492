"""Every call of the API as data: what to send, what comes of the answer. No I/O.

`Client` and `AsyncClient` are shells around this: they carry a `Call` over the wire and
hand back what arrived, the one with `await` and the other without.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from tokenwire.channel import AsyncToken, Endpoint, Tls, authorization
from tokenwire.errors import REQUEST_ID_KEY, Reason, TokenwireError, from_call, from_status
from tokenwire.replies import Accumulator, Answer, Choice, Reply, StreamEvent
from tokenwire.requests import (
    BatchItem,
    CallOptions,
    ChatOptions,
    Prompt,
    batch_request,
    chat_request,
    count_request,
    only_call_options,
    stream_request,
    tokenize_request,
)
from tokenwire.v1.chat_pb2 import Usage
from tokenwire.v1.chat_service_pb2 import (
    BatchChatResponse,
    ChatResponse,
    ResponseHeader,
    StreamChatResponse,
)
from tokenwire.v1.chat_service_pb2_grpc import ChatServiceStub
from tokenwire.v1.model_service_pb2 import GetModelRequest, ListModelsRequest, Model
from tokenwire.v1.model_service_pb2_grpc import ModelServiceStub
from tokenwire.v1.tokenizer_service_pb2 import CountTokensResponse, TokenList
from tokenwire.v1.tokenizer_service_pb2_grpc import TokenizerServiceStub

T = TypeVar("T")
Item_co = TypeVar("Item_co", covariant=True)

DEFAULT_TIMEOUT = 600.0
"""Seconds a unary call may take when nobody said: long answers take minutes."""


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC to make."""

    method: str
    request: Message = field(repr=False)
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)  # has the token
    request_id: str
    token: Awaitable[str] | None = field(default=None, repr=False)
    """What the token is to be awaited from; the metadata lacks it then."""

    def with_token(self, token: str, timeout: float | None) -> Call:
        """The call with that token, and what is left of its timeout."""
        metadata = (*self.metadata, *authorization(token))
        return replace(self, metadata=metadata, timeout=timeout, token=None)

    def failed(
        self,
        code: grpc.StatusCode,
        message: str | None,
        trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> TokenwireError:
        """The error this call ended with."""
        return from_call(code, message, trailing_metadata, request_id=self.request_id)


Procedure: TypeAlias = Generator[Call, Any, T]
"""Yields calls, is sent their responses, returns what the caller asked for."""


class Receiver(Protocol[Item_co]):
    """What takes the messages of a stream in; the shells drive it."""

    call: Call

    def receive(self, message: Any) -> Item_co | None:
        """What to hand to the caller for `message`; None for nothing."""

    def end(self) -> None:
        """The server said OK; raises TokenwireError if that cannot be."""

    def failed(
        self,
        code: grpc.StatusCode,
        message: str | None,
        trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> TokenwireError:
        """The error the stream ended with."""


# --- streams ------------------------------------------------------------------------


_BROKEN = grpc.StatusCode.UNAVAILABLE  # what gRPC says of a connection that broke


class StreamReceiver:
    """Takes in one StreamChat."""

    def __init__(self, call: Call, clock: Callable[[], float] = time.monotonic) -> None:
        self.call = call
        self.answer = Accumulator()
        self.error: TokenwireError | None = None
        self.time_to_first_token: float | None = None
        self._clock = clock
        self._started = clock()

    def receive(self, message: StreamChatResponse) -> StreamEvent | None:
        event = self.answer.add(message)
        if self.time_to_first_token is None and event is not None and _has_token(event):
            self.time_to_first_token = self._clock() - self._started
        return event

    def end(self) -> None:
        if self.answer.is_complete:
            return
        # A wrong OK is worse than any error: the caller would take a part for the whole.
        self.error = TokenwireError(
            "the stream ended with OK but without its trailer: the answer is not whole",
            code=grpc.StatusCode.INTERNAL,
            reason=Reason.STREAM_INCOMPLETE.value,
            request_id=self.call.request_id,
            partial=self.answer.so_far(self.call.request_id),
        )
        raise self.error

    def failed(
        self,
        code: grpc.StatusCode,
        message: str | None,
        trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> TokenwireError:
        self.error = self.call.failed(code, message, trailing_metadata)
        self.error.partial = self.answer.so_far(self.call.request_id)
        if self.error.partial.choices and not self.error.reason and code is _BROKEN:
            # The gateway is gone, or what lies between: nobody was left to say so.
            self.error.reason = Reason.UPSTREAM_STREAM_INTERRUPTED.value
        return self.error


def _has_token(event: StreamEvent) -> bool:
    delta = event.proto.delta
    return bool(event.text or delta.reasoning or delta.refusal or delta.tool_calls)


class StreamView(Answer):
    """What a stream shows of the answer while it grows; the same for both clients."""

    _receiver: StreamReceiver

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Answers so far, by index."""
        return self._receiver.answer.choices

    @property
    def header(self) -> ResponseHeader | None:
        """Model, upstream, attempts; None before the first event."""
        return self._receiver.answer.header

    @property
    def usage(self) -> Usage | None:
        """Tokens used; None until the stream is complete."""
        return self._receiver.answer.usage

    @property
    def request_id(self) -> str:
        """The call's `x-request-id`."""
        return self._receiver.call.request_id

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the call to the first text, reasoning or tool call, measured here."""
        return self._receiver.time_to_first_token

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer is here."""
        return self._receiver.answer.is_complete

    def reply(self) -> Reply:
        """The whole answer, once the stream has been read to its end.

        Raises the stream's TokenwireError if it failed, RuntimeError if it was not read
        to its end.
        """
        if self._receiver.error is not None:
            raise self._receiver.error
        if not self.is_complete:
            raise RuntimeError(
                "the stream was not read to its end; what has arrived is in .choices and .text"
            )
        return self._receiver.answer.so_far(self.request_id)


# --- batches ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchResult:
    """How one item of a batch ended: exactly one of `reply` and `error` is set."""

    index: int
    """Position among the items."""
    custom_id: str
    """The item's own name; "" when it had none."""
    reply: Reply | None = None
    error: TokenwireError | None = None

    def unwrap(self) -> Reply:
        """The reply; raises the error if there is none."""
        if self.reply is None:
            assert self.error is not None
            raise self.error
        return self.reply


class BatchReceiver:
    """Takes in one BatchChat."""

    def __init__(self, call: Call, custom_ids: Sequence[str]) -> None:
        self.call = call
        self._custom_ids = custom_ids
        self._results: dict[int, BatchResult] = {}
        self._mixed_up = False

    def receive(self, message: BatchChatResponse) -> BatchResult | None:
        kind = message.WhichOneof("result")
        if kind is None:
            return None
        if not 0 <= message.index < len(self._custom_ids) or message.index in self._results:
            self._mixed_up = True
            raise self._lost(
                f"got a result of item {message.index}, which is none of the batch or had one"
            )
        reply = error = None
        if kind == "response":
            reply = Reply(message.response, self.call.request_id)
        else:
            error = from_status(message.error, request_id=self.call.request_id)
        result = BatchResult(message.index, message.custom_id, reply, error)
        self._results[result.index] = result
        return result

    def end(self) -> None:
        if missing := self._missing():
            raise self._lost(
                f"the batch ended with OK but without the result of {len(missing)} "
                f"of {len(self._custom_ids)} items"
            )

    def failed(
        self,
        code: grpc.StatusCode,
        message: str | None,
        trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> TokenwireError:
        return self.call.failed(code, message, trailing_metadata)

    def ordered(self, failure: TokenwireError | None) -> list[BatchResult]:
        """All results by index.

        With a `failure` of the batch as a whole, the items it left without a result have
        it as their error: the results that did arrive have been paid for. Raises it when
        there is none, when the call was cancelled, and when some were of no item: nobody
        knows then whose the others are.
        """
        if failure is not None:
            left = failure.code is grpc.StatusCode.CANCELLED
            if left or self._mixed_up or not self._results:
                raise failure
            for index in self._missing():
                custom_id = self._custom_ids[index]
                self._results[index] = BatchResult(index, custom_id, error=failure)
        return [self._results[index] for index in range(len(self._custom_ids))]

    def _missing(self) -> list[int]:
        return [i for i in range(len(self._custom_ids)) if i not in self._results]

    def _lost(self, message: str) -> TokenwireError:
        return _incomplete(message, self.call)


def _incomplete(message: str, call: Call) -> TokenwireError:
    """An OK that lacks what was asked for is none."""
    return TokenwireError(
        message,
        code=grpc.StatusCode.INTERNAL,
        reason=Reason.STREAM_INCOMPLETE.value,
        request_id=call.request_id,
    )


# --- calls --------------------------------------------------------------------------


class Core:
    """Builds the calls of one client."""

    def __init__(
        self,
        target: str | None = None,
        *,
        token: AsyncToken | None = None,
        tls: Tls = False,
        options: Iterable[tuple[str, Any]] = (),
        timeout: float | None = DEFAULT_TIMEOUT,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.endpoint = Endpoint(target, token, tls, options, environ)
        self._timeout = _seconds(timeout)

    def chat(self, prompt: Prompt, model: str | None, options: ChatOptions) -> Procedure[Reply]:
        request = chat_request(prompt, model, **options)
        call = self._unary("Chat", request, options)
        response: ChatResponse = yield call
        return Reply(response, call.request_id)

    def stream(
        self, prompt: Prompt, model: str | None, mode: str, max_delay: float, options: ChatOptions
    ) -> StreamReceiver:
        request = stream_request(prompt, model, mode, max_delay, **options)
        return StreamReceiver(self._call("StreamChat", request, options, None))

    def batch(
        self,
        items: Iterable[BatchItem],
        model: str | None,
        max_concurrency: int,
        options: ChatOptions,
    ) -> BatchReceiver:
        request = batch_request(items, model, max_concurrency, **options)
        call = self._call("BatchChat", request, options, None)
        return BatchReceiver(call, [item.custom_id for item in request.items])

    def count_tokens(
        self, prompt: Prompt, model: str | None, options: ChatOptions
    ) -> Procedure[CountTokensResponse]:
        request = count_request(prompt, model, **options)
        counted: CountTokensResponse = yield self._unary("CountTokens", request, options)
        return counted

    def tokenize(
        self, texts: str | Sequence[str], model: str, options: CallOptions
    ) -> Procedure[list[TokenList]]:
        only_call_options(options)
        request = tokenize_request(texts, model)
        call = self._unary("Tokenize", request, options)
        response = yield call
        got, asked = len(response.lists), len(request.texts)
        if got != asked:
            raise _incomplete(f"got the tokens of {got} of {asked} texts", call)
        return list(response.lists)

    def models(self, options: CallOptions) -> Procedure[list[Model]]:
        only_call_options(options)
        models: list[Model] = []
        read: set[str] = set()  # tokens of pages
        token = ""
        while True:
            request = ListModelsRequest(page_token=token)
            call = self._unary("ListModels", request, options)
            response = yield call
            models.extend(response.models)
            token = response.next_page_token
            if not token:
                return models
            if token in read:
                raise _incomplete("the list of models goes on with a page that was read", call)
            read.add(token)

    def model(self, name: str, options: CallOptions) -> Procedure[Model]:
        only_call_options(options)
        call = self._unary("GetModel", GetModelRequest(name=name), options)
        response = yield call
        if not response.HasField("model"):
            raise _incomplete("got an answer without a model", call)
        found: Model = response.model
        return found

    def _unary(self, method: str, request: Message, options: CallOptions | ChatOptions) -> Call:
        return self._call(method, request, options, self._timeout)

    def _call(
        self,
        method: str,
        request: Message,
        options: CallOptions | ChatOptions,
        default_timeout: float | None,
    ) -> Call:
        request_id = options.get("request_id")
        if request_id is None:
            request_id = uuid.uuid4().hex
        elif not request_id or not request_id.isascii() or not request_id.isprintable():
            raise ValueError(f"request_id: expected printable ASCII, got {request_id!r}")
        metadata: list[tuple[str, str | bytes]] = [(REQUEST_ID_KEY, request_id)]
        token = self.endpoint.token()
        if isinstance(token, str):
            metadata += authorization(token)
        for key, value in options.get("metadata", {}).items():
            if key.lower() in (REQUEST_ID_KEY, "authorization"):
                raise ValueError(f"metadata: {key!r} has its own argument (request_id, token)")
            metadata.append((key.lower(), value))
        timeout = _seconds(options["timeout"]) if "timeout" in options else default_timeout
        awaited = None if isinstance(token, str) else token
        return Call(method, request, timeout, tuple(metadata), request_id, awaited)


def _seconds(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout: expected seconds above 0 or None, got {timeout!r}")
    return float(timeout)


def methods(channel: Any) -> dict[str, Any]:
    """The multi-callables of `channel`, by the names `Call.method` has."""
    chat, tokenizer, model = (
        ChatServiceStub(channel),
        TokenizerServiceStub(channel),
        ModelServiceStub(channel),
    )
    return {
        "Chat": chat.Chat,
        "StreamChat": chat.StreamChat,
        "BatchChat": chat.BatchChat,
        "CountTokens": tokenizer.CountTokens,
        "Tokenize": tokenizer.Tokenize,
        "ListModels": model.ListModels,
        "GetModel": model.GetModel,
    }
