"""What surrounds every RPC of the contract: request id, error boundary, access log.

Nothing but a GatewayError's own text ever reaches a caller: any other exception becomes
INTERNAL with a request id, and its traceback goes to the log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from tokenwire.v1 import error_reason_pb2
from tokenwire_service.attempts import Call
from tokenwire_service.backlog import Backlog
from tokenwire_service.callers import Callers, Tenant
from tokenwire_service.errors import GatewayError, Violation, bare, invalid
from tokenwire_service.telemetry import CallEvent, CallSpan, Observer, Tracer
from tokenwire_service.wording import printable

# What may be asked without saying who asks. Every other RPC, whatever service it is of, passes the
# boundary. docs/security.md has the same list.
OPEN_RPCS = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        # Only where the setting `reflection` has them answered at all.
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_MOMENT = 0.05  # seconds
_RETRY_AFTER = 1.0  # seconds: during overload, what a caller is told to wait
_MAX_DETAIL_BYTES = 2048  # trailers beyond about 8 kB turn into RESOURCE_EXHAUSTED
_MAX_FIELD_BYTES = 100
_MAX_DESCRIPTION_BYTES = 1000
_MAX_RETRY_SECONDS = 31_622_400.0  # a year: no provider means more
_MAX_PUSHBACK_MS = 2**31 - 1  # clients read a signed 32-bit number

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str | bytes], ...]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Handler = Callable[[Any, Any], Awaitable[Any]]
Read = Callable[[bytes], Message]


class CallContext:
    """What the servicer sees of one RPC."""

    def __init__(
        self, context: Context, request_id: str, started: float, max_message_bytes: int
    ) -> None:
        self._context = context
        self._max_message_bytes = max_message_bytes
        self.request_id = request_id
        self.started = started
        self.tenant = Tenant()  # who calls; filled before any servicer sees this
        self.labels: dict[str, str] = {}
        self.model = ""  # filled by the servicer, for the log
        # What its calls cost: one, or as many as a batch has items.
        self.attempts = 0
        self.retries = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.usage_estimated = False  # at least a part of the tokens
        self.queue_seconds = self.key_seconds = self.backoff_seconds = 0.0
        self.first_token_seconds: float | None = None
        self.upstream = self.key_id = ""  # of the last attempt
        self.span: CallSpan | None = None  # where the RPC is traced

    def account(self, call: Call) -> None:
        """Adds what one call of the RPC cost."""
        self.attempts += len(call.attempts)
        self.retries += max(0, len(call.attempts) - 1)
        if call.usage is not None:
            self.prompt_tokens += call.usage.prompt_tokens
            self.completion_tokens += call.usage.completion_tokens
            self.usage_estimated |= call.usage.estimated
        self.queue_seconds += call.queue_seconds
        self.key_seconds += call.key_seconds
        self.backoff_seconds += call.backoff_seconds
        if call.first_token_at is not None:
            self.first_token_seconds = max(0.0, call.first_token_at - self.started)
        if call.attempts:
            self.upstream, self.key_id = call.attempts[-1].upstream, call.attempts[-1].key_id

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline, None when there is none."""
        return self._context.time_remaining()

    async def write(self, message: Message) -> None:
        """Sends one message of a stream; waits while the caller does not read.

        Raises GatewayError: CANCELLED when the caller is gone, REQUEST_TOO_LARGE.
        """
        packed = self.pack(message)
        try:
            await self._context.write(packed)
        except grpc.aio.BaseError:
            # A caller that leaves fails the write a moment before gRPC cancels this task.
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_CANCELLED, "the caller no longer reads"
            ) from None

    def pack(self, message: Message) -> bytes:
        """The message as it is sent. Raises REQUEST_TOO_LARGE, which gRPC would say without
        details, and to nobody but the caller."""
        packed = message.SerializeToString()
        if len(packed) > self._max_message_bytes:
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE,
                f"the answer takes {len(packed)} bytes, more than the {self._max_message_bytes} "
                "that one message may have here",
            )
        return packed


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every handler but those of OPEN_RPCS, which pass untouched.

    Messages pass gRPC as bytes: what cannot be read or is too large to send is then an error
    like any other, with details.
    """

    def __init__(
        self,
        observer: Observer,
        logger: logging.Logger,
        max_message_bytes: int,
        *,
        callers: Callers | None = None,
        tracer: Tracer | None = None,
        backlog: Backlog | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callers = callers or Callers(())
        self.backlog = backlog
        self._tracer = tracer
        self._observer = observer
        self._logger = logger
        self._max_message_bytes = max_message_bytes
        self._now = now
        self._handlers: dict[str, Any] = {}
        self._refusals: dict[str, Any] = {}
        self._number = 0
        self._running: set[int] = set()
        # Who waits for some of them, with those that they wait for yet.
        self._passing: list[tuple[set[int], asyncio.Future[None]]] = []

    async def idle(self) -> None:
        """Returns once no RPC of tokenwire.v1 runs, their statuses sent."""
        while self._running:
            await self.passed()

    async def passed(self) -> None:
        """Returns once those have ended that run now, whatever has begun meanwhile."""
        if self._running:
            passed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._passing.append((set(self._running), passed))
            await passed

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The wrapped handler, of each method one: servicers are never added later. Where too many
        calls wait behind this one, a handler that refuses it unread."""
        method = handler_call_details.method
        known = self._handlers.get(method)
        begins = self._begins(refusable=known is not None)
        if known is not None:
            return known if begins else self._refusing(method)
        handler = await continuation(handler_call_details)
        if handler is None or method in OPEN_RPCS:
            return handler
        if handler.request_streaming:
            return None  # not served: the boundary knows none of that kind
        read = handler.request_deserializer
        if handler.response_streaming:
            wrapped: Any = grpc.unary_stream_rpc_method_handler(
                self._wrap(handler.unary_stream, read, method)
            )
        else:
            wrapped = grpc.unary_unary_rpc_method_handler(
                self._wrap(handler.unary_unary, read, method)
            )
        return self._handlers.setdefault(method, wrapped)

    def _begins(self, *, refusable: bool) -> bool:
        backlog, task = self.backlog, asyncio.current_task()
        if backlog is None or task is None:
            return True
        # grpc.aio's own for this call, to its end: those that never come to a handler end, too.
        task.add_done_callback(lambda _: backlog.ended())
        return backlog.begins(refusable=refusable)

    def _wrap(self, handler: Handler, read: Read, method: str) -> Handler:
        # Any: grpc types handlers as sync ones, or as generators.
        async def wrapped(request: Any, context: Context) -> Any:
            metadata = tuple(context.invocation_metadata() or ())
            authorization = [str(value) for name, value in metadata if name == "authorization"]
            call = self._call(method, context, metadata)
            context.set_trailing_metadata((("x-request-id", call.request_id),))
            answer = None
            error: GatewayError | None = None
            try:
                call.tenant = self._callers.identify(authorization, _certificate(context))
                message = await handler(_parsed(read, request), call)
                if message is not None:  # streams have written theirs
                    answer = call.pack(message)
            except GatewayError as failure:
                error = bare(failure)
            except asyncio.CancelledError:
                if callers_cancel():
                    self._gone(call, method)
                    raise
                # A stray one, of a future somebody cancelled: gRPC would send no status at all.
                error = self._defect(call, method)
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException:  # noqa: BLE001  # any other, too, would leave the caller without a status
                error = self._defect(call, method)
            if error is None:
                self._ended(call, method, "OK", "", "")
                return answer
            if error.reason == error_reason_pb2.ERROR_REASON_CANCELLED:
                self._gone(call, method)
                raise asyncio.CancelledError
            status, details = _CODES[error.code], printable(error.message)
            self._ended(call, method, status.name, error.reason_name, error.message)
            # Not set_code: a unary call would get an empty message first, and clients retry none
            # that has begun to answer. gRPC keeps what an abort raises, with this frame: were the
            # call still known here, that would be a cycle.
            ending = context.abort(status, details, trailers(error, call.request_id))
            del request, context, call, metadata, error
            try:
                await ending
            except (grpc.aio.InternalError, grpc.aio.UsageError):
                raise asyncio.CancelledError from None  # nobody is there to hear it

        return wrapped

    def _refusing(self, method: str) -> Any:
        """Of the kind that reads nothing before it answers. Who calls is not looked at either."""
        if (known := self._refusals.get(method)) is not None:
            return known
        error = GatewayError(
            error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
            "more calls come than this instance can begin",
            retry_after=_RETRY_AFTER,
            retry_helps=True,
        )
        status = _CODES[error.code]
        trailers_for = prepared_trailers(error)

        async def refuse(_requests: Any, context: Context) -> None:
            call = self._call(method, context, tuple(context.invocation_metadata() or ()))
            # An abort, which raises, would take half as long again. Nothing is sent before this
            # status: clients may retry.
            context.set_code(status)
            context.set_details(error.message)
            context.set_trailing_metadata(trailers_for(call.request_id))
            self._ended(call, method, status.name, error.reason_name, error.message)

        return self._refusals.setdefault(method, grpc.stream_stream_rpc_method_handler(refuse))

    def _call(self, method: str, context: Context, metadata: Metadata) -> CallContext:
        """One that begins."""
        request_id = _request_id(metadata)
        call = CallContext(context, request_id, self._now(), self._max_message_bytes)
        if self._tracer is not None:
            call.span = self._tracer.call(method.removeprefix("/"), metadata)
        self._began()
        return call

    def _began(self) -> None:
        self._number += 1
        number = self._number
        self._running.add(number)
        # grpc.aio's task of this call: when it ends, the status has been sent. A callback of the
        # context would hold the context, and that the callback, until the collector runs.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self._done(number))

    def _done(self, number: int) -> None:
        self._running.discard(number)
        for numbers, passed in self._passing:
            numbers.discard(number)
            if not numbers and not passed.done():
                passed.set_result(None)
        if self._passing:
            self._passing = [each for each in self._passing if not each[1].done()]

    def _gone(self, call: CallContext, method: str) -> None:
        # At its deadline a caller resets the stream, often a moment before our own timer.
        remaining = call.time_remaining()
        late = remaining is not None and remaining < _MOMENT
        code = "DEADLINE_EXCEEDED" if late else "CANCELLED"
        self._ended(call, method, code, code, "the caller no longer waits")

    def _defect(self, call: CallContext, method: str) -> GatewayError:
        self._logger.exception(
            "defect", extra={"fields": {"request_id": call.request_id, "method": method}}
        )
        return internal_error()

    def _ended(self, call: CallContext, method: str, code: str, reason: str, message: str) -> None:
        event = CallEvent(
            call.request_id,
            method.removeprefix("/"),
            code,
            reason,
            message,
            call.model,
            call.attempts,
            call.prompt_tokens,
            call.completion_tokens,
            call.usage_estimated,
            self._now() - call.started,
            call.labels,
            call.tenant.name,
            upstream=call.upstream,
            key_id=call.key_id,
            retries=call.retries,
            queue_seconds=call.queue_seconds,
            key_seconds=call.key_seconds,
            backoff_seconds=call.backoff_seconds,
            first_token_seconds=call.first_token_seconds,
            trace_id="" if call.span is None else call.span.trace_id,
        )
        self._observer.call(event)
        if call.span is not None:
            call.span.end(event)


def callers_cancel() -> bool:
    """Whether a CancelledError that is being handled is the caller's: this task was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _parsed(read: Read, request: bytes) -> Message:
    try:
        return read(request)
    except DecodeError:
        raise invalid(
            Violation("request", "not a message of this method, or text in it that is not UTF-8")
        ) from None


def internal_error() -> GatewayError:
    """What a caller hears of a defect: nothing but where to look."""
    return GatewayError(
        error_reason_pb2.ERROR_REASON_INTERNAL,
        "the gateway failed; its log tells more under this request id",
    )


def rpc_status(error: GatewayError, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status with every detail that fits."""
    status = status_pb2.Status(code=error.code, message=printable(error.message))
    info = error_details_pb2.ErrorInfo(
        reason=error.reason_name,
        domain="tokenwire",
        metadata={"requestId": request_id, **error.metadata},
    )
    details: list[Message] = [info]
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        seconds = min(max(0.0, error.retry_after), _MAX_RETRY_SECONDS)
        retry.retry_delay.FromNanoseconds(math.ceil(seconds * 1e9))
        details.append(retry)
    if error.quota is not None:
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.quota[0], description=error.quota[1])
        details.append(quota)
    if error.resource is not None:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.resource[0], resource_name=error.resource[1]
            )
        )
    if error.violations:
        details.insert(1, _bad_request(error.violations, _MAX_DETAIL_BYTES - _packed_size(details)))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _bad_request(violations: Sequence[Violation], room: int) -> error_details_pb2.BadRequest:
    """The first violations, as many as fit."""
    bad = error_details_pb2.BadRequest()
    for violation in violations:
        bad.field_violations.add(
            field=_cut(printable(violation.field), _MAX_FIELD_BYTES),
            description=_cut(printable(violation.description), _MAX_DESCRIPTION_BYTES),
        )
        if _packed_size([bad]) > room:
            del bad.field_violations[-1]
            break
    return bad


def _packed_size(details: Sequence[Message]) -> int:
    status = status_pb2.Status()
    for detail in details:
        status.details.add().Pack(detail)
    return int(status.ByteSize())


def _cut(text: str, size: int) -> str:
    """The start of `text` that takes at most `size` bytes of UTF-8."""
    return text.encode()[:size].decode("utf-8", "ignore")


def trailers(error: GatewayError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of a failed call."""
    helps = error.retry_helps and error.retry_after is not None
    wait = min(max(0.0, error.retry_after or 0.0) * 1000, _MAX_PUSHBACK_MS)
    # Never 0: on it clients built on gRPC's C core do not retry at once, but hang until their
    # deadline (seen with grpcio 1.85).
    pushback = str(max(1, math.ceil(wait))) if helps else "-1"
    return (
        ("grpc-status-details-bin", rpc_status(error, request_id).SerializeToString()),
        ("grpc-retry-pushback-ms", pushback),
        ("x-request-id", request_id),
    )


def prepared_trailers(error: GatewayError) -> Callable[[str], Metadata]:
    """`trailers` of one error, for many request ids: 84 of the 394 us that a refusal took went into
    making them anew. An id, which is ASCII and not empty, stands in the packed status as it is,
    after lengths that are those of any id as long."""
    parts: dict[int, tuple[bytes, bytes]] = {}
    _, pushback, _ = trailers(error, "")

    def prepared(request_id: str) -> Metadata:
        length = len(request_id)
        if length not in parts:
            status = rpc_status(error, "\0" * length).SerializeToString()
            start, _, end = status.partition(b"\0" * length)
            parts[length] = (start, end)
        start, end = parts[length]
        return (
            ("grpc-status-details-bin", start + request_id.encode() + end),
            pushback,
            ("x-request-id", request_id),
        )

    return prepared


def _certificate(context: Context) -> Iterator[str]:
    """The names in the caller's certificate; none without one. Looked up only where asked for."""
    found = context.auth_context()
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        for name in found.get(kind, ()):
            yield name.decode("utf-8", "replace")


def _request_id(metadata: Any) -> str:
    """The caller's x-request-id if it is fit to be logged and sent back, else a new one."""
    for name, value in metadata or ():
        if name == "x-request-id" and re.fullmatch(r"[!-~]{1,128}", str(value)):
            return str(value)
    return os.urandom(16).hex()
