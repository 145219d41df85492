"""The two clients, blocking and asyncio: shells around `core` that differ in `await`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from tokenwire.channel import AsyncToken, Tls, Token
from tokenwire.core import (
    DEFAULT_TIMEOUT,
    BatchReceiver,
    BatchResult,
    Call,
    Core,
    Procedure,
    Receiver,
    StreamReceiver,
    StreamView,
    methods,
)
from tokenwire.errors import TokenwireError
from tokenwire.replies import Reply, StreamEvent
from tokenwire.requests import BatchItem, CallOptions, ChatOptions, Prompt
from tokenwire.v1.model_service_pb2 import Model
from tokenwire.v1.tokenizer_service_pb2 import CountTokensResponse, TokenList

T = TypeVar("T")
Item = TypeVar("Item")
Picked = TypeVar("Picked")


class Client:
    """A blocking client of one gateway; safe to share between threads.

    Args:
        target: HOST:PORT or any gRPC target; default `TOKENWIRE_TARGET` from the
            environment, else localhost:50051.
        token: bearer token, or a function that returns the current one, asked once per
            call; default `TOKENWIRE_TOKEN` from the environment; "" for none.
        tls: True, a path to a PEM file of authorities, or `grpc.ChannelCredentials`.
        options: gRPC channel options; each replaces the built-in one of its name.
        timeout: seconds for calls with one answer that set none of their own; None for
            no limit. Streams and batches have no limit but their own `timeout`.

    Every call raises TokenwireError when it fails, and TypeError or ValueError, before
    anything is sent, when it is not understood.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: Token | None = None,
        tls: Tls = False,
        options: Iterable[tuple[str, Any]] = (),
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        self._core = Core(target, token=token, tls=tls, options=options, timeout=timeout)
        self._channel = self._core.endpoint.open(grpc)
        self._methods = methods(self._channel)
        self._closed = False

    def chat(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[ChatOptions]
    ) -> Reply:
        """The whole answer to a question or conversation. Options: see `ChatOptions`."""
        return self._run(self._core.chat(prompt, model, options))

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        mode: str = "delta",
        max_delay: float = 0.0,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """The answer as it grows; the call starts now, and ends when its loop is left.

        `mode` "cumulative" has the gateway send the whole text each time. `max_delay`
        (seconds, 0 to 5) lets it hold text back to send fewer, larger messages.
        """
        receiver = self._core.stream(prompt, model, mode, max_delay, options)
        return Stream(self._start(receiver.call), receiver)

    def batch(
        self,
        items: Iterable[BatchItem],
        *,
        model: str | None = None,
        max_concurrency: int = 0,
        **options: Unpack[ChatOptions],
    ) -> Batch:
        """Answers to independent conversations (1 to 256), each as soon as it is there.

        `model` and the options hold for every item without its own. `max_concurrency`
        is how many run at once; 0 for the gateway's default. Leaving the loop cancels
        what has not been answered.
        """
        receiver = self._core.batch(items, model, max_concurrency, options)
        return Batch(self._start(receiver.call), receiver)

    def batch_ordered(
        self,
        items: Iterable[BatchItem],
        *,
        model: str | None = None,
        max_concurrency: int = 0,
        **options: Unpack[ChatOptions],
    ) -> list[BatchResult]:
        """Like `batch`, all at once and in the order of the items.

        When the batch as a whole fails after some results, the items without one have
        that failure as their error; when it fails before any, it is raised.
        """
        return self.batch(items, model=model, max_concurrency=max_concurrency, **options).ordered()

    def count_tokens(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[ChatOptions]
    ) -> CountTokensResponse:
        """Tokens of a text, or of a conversation with its layout, tools and format."""
        return self._run(self._core.count_tokens(prompt, model, options))

    def tokenize(
        self, texts: str | Sequence[str], *, model: str, **options: Unpack[CallOptions]
    ) -> list[TokenList]:
        """The tokens of each text: `ids`, and as `pieces` their bytes."""
        return self._run(self._core.tokenize(texts, model, options))

    def models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """Every model the caller may use, from all pages."""
        return self._run(self._core.models(options))

    def model(self, name: str, **options: Unpack[CallOptions]) -> Model:
        """One model, by name or alias."""
        return self._run(self._core.model(name, options))

    def close(self) -> None:
        """Cancel what runs and close the connection."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._core.endpoint.target!r}, tls={self._core.endpoint.is_secure})"

    def _start(self, call: Call) -> Any:
        if call.token is not None:
            if inspect.iscoroutine(call.token):
                call.token.close()
            raise TypeError("token: expected a function that returns a str; AsyncClient awaits one")
        if self._closed:
            raise RuntimeError("the client is closed")
        return self._methods[call.method](
            call.request, timeout=call.timeout, metadata=call.metadata
        )

    def _run(self, procedure: Procedure[T]) -> T:
        response = None
        while True:
            try:
                call = procedure.send(response)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                response = self._start(call)
            except grpc.RpcError as error:
                raise _failed(call, error) from None


class AsyncClient:
    """The same client for asyncio; belongs to the event loop of its first call.

    Arguments and methods: see `Client`. `stream` and `batch` return at once; what they
    return is for `async for` and `async with`. Cancelling the task cancels the call. The function
    that returns the token may be a coroutine function.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: AsyncToken | None = None,
        tls: Tls = False,
        options: Iterable[tuple[str, Any]] = (),
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        self._core = Core(target, token=token, tls=tls, options=options, timeout=timeout)
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._methods: dict[str, Any] = {}
        self._beginning: set[asyncio.Task[Any]] = set()  # calls that wait for their token
        self._closed = False

    async def chat(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[ChatOptions]
    ) -> Reply:
        """See `Client.chat`."""
        return await self._run(self._core.chat(prompt, model, options))

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        mode: str = "delta",
        max_delay: float = 0.0,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        """See `Client.stream`."""
        receiver = self._core.stream(prompt, model, mode, max_delay, options)
        return AsyncStream(self._start(receiver.call), receiver)

    def batch(
        self,
        items: Iterable[BatchItem],
        *,
        model: str | None = None,
        max_concurrency: int = 0,
        **options: Unpack[ChatOptions],
    ) -> AsyncBatch:
        """See `Client.batch`."""
        receiver = self._core.batch(items, model, max_concurrency, options)
        return AsyncBatch(self._start(receiver.call), receiver)

    async def batch_ordered(
        self,
        items: Iterable[BatchItem],
        *,
        model: str | None = None,
        max_concurrency: int = 0,
        **options: Unpack[ChatOptions],
    ) -> list[BatchResult]:
        """See `Client.batch_ordered`."""
        return await self.batch(
            items, model=model, max_concurrency=max_concurrency, **options
        ).ordered()

    async def count_tokens(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[ChatOptions]
    ) -> CountTokensResponse:
        """See `Client.count_tokens`."""
        return await self._run(self._core.count_tokens(prompt, model, options))

    async def tokenize(
        self, texts: str | Sequence[str], *, model: str, **options: Unpack[CallOptions]
    ) -> list[TokenList]:
        """See `Client.tokenize`."""
        return await self._run(self._core.tokenize(texts, model, options))

    async def models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """See `Client.models`."""
        return await self._run(self._core.models(options))

    async def model(self, name: str, **options: Unpack[CallOptions]) -> Model:
        """See `Client.model`."""
        return await self._run(self._core.model(name, options))

    async def close(self) -> None:
        """See `Client.close`."""
        self._closed = True
        for task in self._beginning:
            task.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._core.endpoint.target!r}, tls={self._core.endpoint.is_secure})"

    def _start(self, call: Call) -> Any:
        if self._closed:
            raise RuntimeError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._channel is None:
            # Not in the constructor: a grpc.aio channel binds itself to an event loop,
            # and clients are often made before there is one.
            self._loop = loop
            self._channel = self._core.endpoint.open(grpc.aio)
            self._methods = methods(self._channel)
        if loop is not self._loop:
            raise RuntimeError("the client belongs to another event loop: make one for each")
        if call.token is None:
            return self._sent(call)
        beginning = loop.create_task(self._begun(call, call.token))
        self._beginning.add(beginning)
        beginning.add_done_callback(self._beginning.discard)
        return _Later(beginning)

    def _sent(self, call: Call) -> Any:
        return self._methods[call.method](
            call.request, timeout=call.timeout, metadata=call.metadata
        )

    async def _begun(self, call: Call, awaited: Awaitable[str]) -> Any:
        """The call, sent once its token is there."""
        loop = asyncio.get_running_loop()
        left, begun = call.timeout, loop.time()
        try:
            async with asyncio.timeout(left) as limit:
                token = await awaited
        except TimeoutError:
            if limit.expired():
                raise _NoToken from None
            raise
        if left is not None:
            left = max(left - (loop.time() - begun), 0.0)
        return self._sent(call.with_token(token, left))

    async def _run(self, procedure: Procedure[T]) -> T:
        response = None
        while True:
            try:
                call = procedure.send(response)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                response = await self._start(call)
            except grpc.RpcError as error:
                raise _failed(call, error) from None
            except asyncio.CancelledError:
                if _task_is_cancelled():
                    raise
                raise call.failed(*_CLOSED) from None


class _NoToken(grpc.RpcError):
    """The deadline passed before there was a token."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return "the deadline passed while a token was awaited"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class _Later:
    """A call that begins once its token is there."""

    def __init__(self, beginning: asyncio.Task[Any]) -> None:
        self._beginning = beginning

    async def read(self) -> Any:
        return await (await self._beginning).read()

    def cancel(self) -> None:
        if self._beginning.cancel() or self._beginning.cancelled():
            return
        if self._beginning.exception() is None:
            self._beginning.result().cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._whole().__await__()

    async def _whole(self) -> Any:
        return await (await self._beginning)


# --- streams ------------------------------------------------------------------------

_CLOSED = (grpc.StatusCode.CANCELLED, "the call was cancelled here", ())


class _Streaming(Generic[Item]):
    """One call with many answers."""

    def __init__(self, call: Any, receiver: Receiver[Item]) -> None:
        self._call = call
        self._receives = receiver
        self._ended = False

    def _cancel(self) -> None:
        if not self._ended:
            # RuntimeError: the event loop is closed, and its connections with it.
            with contextlib.suppress(RuntimeError):
                self._call.cancel()

    def _received(self, message: Any) -> Item | None:
        try:
            return self._receives.receive(message)
        except TokenwireError:  # what is refused here goes on there
            self._cancel()
            self._ended = True
            raise

    def __del__(self) -> None:
        self._cancel()


class _BlockingStream(_Streaming[Item]):
    """Iterator and context manager. Leaving the loop or the block cancels the call."""

    def __iter__(self) -> Iterator[Item]:
        return _Loop(self, lambda item: item)

    def __next__(self) -> Item:
        try:
            return self._next()
        except BaseException:
            # Of a signal, such as KeyboardInterrupt: its traceback holds the loop, so that nothing
            # else would end the call while it is handled. A call that has ended does not mind.
            self._cancel()
            raise

    def _next(self) -> Item:
        while not self._ended:
            try:
                message = next(self._call)
            except StopIteration:
                self._ended = True
                self._receives.end()
                break
            except grpc.RpcError as error:
                self._ended = True
                raise _failed(self._receives, error) from None
            item = self._received(message)
            if item is not None:
                return item
        raise StopIteration

    def close(self) -> None:
        """Cancel the call, unless it has ended."""
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _AsyncStreaming(_Streaming[Item]):
    """Async iterator and context manager. Leaving the loop or the block cancels the call."""

    def __aiter__(self) -> AsyncIterator[Item]:
        return _AsyncLoop(self, lambda item: item)

    async def __anext__(self) -> Item:
        while not self._ended:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                self._ended = True
                raise _failed(self._receives, error) from None
            except asyncio.CancelledError:
                self._cancel()
                self._ended = True
                if _task_is_cancelled():
                    raise
                raise self._receives.failed(*_CLOSED) from None
            if message is grpc.aio.EOF:
                self._ended = True
                self._receives.end()
                break
            item = self._received(message)
            if item is not None:
                return item
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancel the call, unless it has ended."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Loop(Generic[Item, Picked]):
    """What a `for` statement holds while it runs.

    Python does not tell an iterator that its loop was left, but it drops this object,
    also when the caller keeps the stream to look at what has arrived.
    """

    def __init__(
        self, stream: _BlockingStream[Item], pick: Callable[[Item], Picked | None]
    ) -> None:
        self._stream = stream
        self._pick = pick

    def __iter__(self) -> Iterator[Picked]:
        return self

    def __next__(self) -> Picked:
        while True:
            picked = self._pick(next(self._stream))
            if picked is not None:
                return picked

    def __del__(self) -> None:
        self._stream._cancel()


class _AsyncLoop(Generic[Item, Picked]):
    """The same for `async for`."""

    def __init__(
        self, stream: _AsyncStreaming[Item], pick: Callable[[Item], Picked | None]
    ) -> None:
        self._stream = stream
        self._pick = pick

    def __aiter__(self) -> AsyncIterator[Picked]:
        return self

    async def __anext__(self) -> Picked:
        while True:
            picked = self._pick(await anext(self._stream))
            if picked is not None:
                return picked

    def __del__(self) -> None:
        self._stream._cancel()


class Stream(StreamView, _BlockingStream[StreamEvent]):
    """An answer as it grows: iterate over its events, read what is there so far."""

    def __init__(self, call: Any, receiver: StreamReceiver) -> None:
        super().__init__(call, receiver)
        self._receiver = receiver

    def text_deltas(self, choice_index: int = 0) -> Iterator[str]:
        """Only the new text of one choice."""
        return _Loop(self, _text_of(choice_index))


class AsyncStream(StreamView, _AsyncStreaming[StreamEvent]):
    """An answer as it grows: iterate over its events, read what is there so far."""

    def __init__(self, call: Any, receiver: StreamReceiver) -> None:
        super().__init__(call, receiver)
        self._receiver = receiver

    def text_deltas(self, choice_index: int = 0) -> AsyncIterator[str]:
        """Only the new text of one choice."""
        return _AsyncLoop(self, _text_of(choice_index))


class Batch(_BlockingStream[BatchResult]):
    """The results of a batch, in order of completion."""

    def __init__(self, call: Any, receiver: BatchReceiver) -> None:
        super().__init__(call, receiver)
        self._receiver = receiver

    def ordered(self) -> list[BatchResult]:
        """Wait for all and return them by index, see `Client.batch_ordered`."""
        failure = None
        try:
            for _ in self:
                pass
        except TokenwireError as error:
            failure = error
        return self._receiver.ordered(failure)


class AsyncBatch(_AsyncStreaming[BatchResult]):
    """The results of a batch, in order of completion."""

    def __init__(self, call: Any, receiver: BatchReceiver) -> None:
        super().__init__(call, receiver)
        self._receiver = receiver

    async def ordered(self) -> list[BatchResult]:
        """Wait for all and return them by index, see `Client.batch_ordered`."""
        failure = None
        try:
            async for _ in self:
                pass
        except TokenwireError as error:
            failure = error
        return self._receiver.ordered(failure)


def _text_of(choice_index: int) -> Callable[[StreamEvent], str | None]:
    def pick(event: StreamEvent) -> str | None:
        return event.text if event.text and event.choice_index == choice_index else None

    return pick


def _failed(call: Call | Receiver[Any], error: Any) -> TokenwireError:
    # Both of gRPC's kinds of RpcError answer these three without waiting.
    return call.failed(error.code(), error.details(), error.trailing_metadata())


def _task_is_cancelled() -> bool:
    """Whether a CancelledError was meant for this task.

    grpc.aio also raises it when the call was cancelled some other way, for example by
    closing the client; passed on, it would end a task that nobody cancelled.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
