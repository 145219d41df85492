"""The one exception of the client: what a failed call said, decoded."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

if TYPE_CHECKING:
    from tokenwire.replies import Reply

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
REQUEST_ID_KEY = "x-request-id"

M = TypeVar("M", bound=Message)


class FieldViolation(NamedTuple):
    """One field the server did not accept."""

    field: str
    """Path in the request, for example `messages[0].role`."""
    description: str
    """What was there and what was expected."""

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class Reason(StrEnum):
    """The reasons this package knows; what each asks of you is in docs/errors.md of the repository.

    They are texts, so that `error.reason == Reason.RATE_LIMITED` and `match` hold. New ones may
    come: treat one that you do not know by its code.
    """

    INVALID_REQUEST = "INVALID_REQUEST"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    UNSUPPORTED_PARAMETER = "UNSUPPORTED_PARAMETER"
    UNKNOWN_ROLE = "UNKNOWN_ROLE"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    CONTENT_FILTERED = "CONTENT_FILTERED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    CALLER_UNAUTHENTICATED = "CALLER_UNAUTHENTICATED"
    CALLER_FORBIDDEN = "CALLER_FORBIDDEN"
    CALLER_QUOTA_EXCEEDED = "CALLER_QUOTA_EXCEEDED"
    RATE_LIMITED = "RATE_LIMITED"
    UPSTREAM_QUOTA_EXHAUSTED = "UPSTREAM_QUOTA_EXHAUSTED"
    UPSTREAM_CREDENTIALS_REJECTED = "UPSTREAM_CREDENTIALS_REJECTED"
    UPSTREAM_ACCESS_DENIED = "UPSTREAM_ACCESS_DENIED"
    UPSTREAM_UNREACHABLE = "UPSTREAM_UNREACHABLE"
    UPSTREAM_TIMEOUT = "UPSTREAM_TIMEOUT"
    UPSTREAM_OVERLOADED = "UPSTREAM_OVERLOADED"
    UPSTREAM_ERROR = "UPSTREAM_ERROR"
    UPSTREAM_PROTOCOL_ERROR = "UPSTREAM_PROTOCOL_ERROR"
    UPSTREAM_STREAM_INTERRUPTED = "UPSTREAM_STREAM_INTERRUPTED"
    GATEWAY_OVERLOADED = "GATEWAY_OVERLOADED"
    GATEWAY_DRAINING = "GATEWAY_DRAINING"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"
    CALLER_STALLED = "CALLER_STALLED"
    TOKENIZER_UNAVAILABLE = "TOKENIZER_UNAVAILABLE"
    STREAM_INCOMPLETE = "STREAM_INCOMPLETE"
    """The only one this package makes itself: the server said OK, yet did not finish."""


class TokenwireError(Exception):
    """A call that failed.

    Attributes:
        code: the gRPC status code.
        reason: a name from `ErrorReason` without its prefix, for example "RATE_LIMITED", see
            `Reason`; "" when the status did not come from a Tokenwire gateway (no connection, a
            proxy, a deadline that passed here); "STREAM_INCOMPLETE" when the server
            ended with OK before the answer was whole. A stream whose connection broke after some of
            its answer had come has the reason that the gateway would give:
            "UPSTREAM_STREAM_INTERRUPTED".
        message: one line for people.
        retry_after: seconds to wait before another try, None when nobody said.
        request_id: the call's `x-request-id`, to quote to whoever runs the gateway.
        field_violations: the fields that were not accepted.
        metadata: the ErrorInfo metadata: `upstream`, `upstreamStatus`, `attempts`, ...
        partial: for a stream, what had arrived before it failed; else None.
        proto: the google.rpc.Status with every detail as it was sent.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        retry_after: float | None = None,
        request_id: str = "",
        field_violations: Iterable[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        partial: Reply | None = None,
        proto: status_pb2.Status | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.retry_after = retry_after
        self.request_id = request_id
        self.field_violations = tuple(field_violations)
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.partial = partial
        self.proto = proto or status_pb2.Status(code=code.value[0], message=message)

    @property
    def attempts(self) -> int:
        """Upstream requests the gateway made for this call; 0 when it did not say."""
        text = self.metadata.get("attempts", "")
        return int(text) if text.isdecimal() else 0

    @property
    def partial_text(self) -> str:
        """Text of the first choice that had arrived; "" when none had."""
        return self.partial.text if self.partial is not None else ""

    @property
    def is_retryable(self) -> bool:
        """Whether the same call may succeed later, after `retry_after` if that is set.

        The channel and the gateway have made their own retries by then. Repeating a
        stream repeats, and bills, the part that had arrived.
        """
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Without a time to wait for, what is exhausted does not refill by itself:
            # credit, or a request larger than the limit.
            return self.retry_after is not None
        return self.code is grpc.StatusCode.UNAVAILABLE

    def __str__(self) -> str:
        facts = []
        if self.retry_after is not None:
            facts.append(f"retry after {self.retry_after:g} s")
        if self.attempts > 1:
            facts.append(f"{self.attempts} attempts")
        if self.request_id:
            facts.append(f"request {self.request_id}")
        lines = [f"{self.reason or self.code.name}: {self.message}"]
        if facts:
            lines[0] += f" ({', '.join(facts)})"
        # A message made of its only violation does not need it again.
        rest = [each for each in self.field_violations if str(each) not in self.message]
        lines += [f"  {violation}" for violation in rest]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.message!r}, code={self.code.name}, "
            f"reason={self.reason!r}, request_id={self.request_id!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments are lost by BaseException's own way of pickling.
        again = functools.partial(
            type(self),
            self.message,
            code=self.code,
            reason=self.reason,
            retry_after=self.retry_after,
            request_id=self.request_id,
            field_violations=self.field_violations,
            metadata=dict(self.metadata),
            partial=self.partial,
            proto=self.proto,
        )
        return again, ()


def from_call(
    code: grpc.StatusCode,
    message: str | None,
    trailing_metadata: Iterable[tuple[str, str | bytes]] | None,
    *,
    request_id: str,
    partial: Reply | None = None,
) -> TokenwireError:
    """The error a finished RPC stands for."""
    trailers = dict(trailing_metadata or ())
    status = status_pb2.Status()
    details = trailers.get(DETAILS_KEY)
    if isinstance(details, bytes):
        try:
            status.ParseFromString(details)
        except DecodeError:
            status.Clear()  # somebody else's details: the code and the message still hold
    status.code, status.message = code.value[0], message or ""
    error = from_status(status, request_id=request_id)
    error.partial = partial
    echoed = trailers.get(REQUEST_ID_KEY)
    if isinstance(echoed, str) and "requestId" not in error.metadata:
        error.request_id = echoed
    pushback = str(trailers.get(PUSHBACK_KEY, ""))
    if error.retry_after is None and pushback.isdecimal() and int(pushback) > 0:
        error.retry_after = int(pushback) / 1000
    return error


def from_status(status: status_pb2.Status, *, request_id: str) -> TokenwireError:
    """The error a google.rpc.Status stands for."""
    codes = {code.value[0]: code for code in grpc.StatusCode if code is not grpc.StatusCode.OK}
    info = _detail(status, error_details_pb2.ErrorInfo)
    retry = _detail(status, error_details_pb2.RetryInfo)
    refused = _detail(status, error_details_pb2.BadRequest)
    ours = info is not None and info.domain == "tokenwire"
    metadata = dict(info.metadata) if info is not None and ours else {}
    return TokenwireError(
        status.message or "no message",
        code=codes.get(status.code, grpc.StatusCode.UNKNOWN),
        reason=info.reason if info is not None and ours else "",
        retry_after=(
            retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry is not None else None
        ),
        request_id=metadata.get("requestId") or request_id,
        field_violations=[
            FieldViolation(violation.field, violation.description)
            for violation in (refused.field_violations if refused is not None else ())
        ],
        metadata=metadata,
        proto=status,
    )


def _detail(status: status_pb2.Status, kind: type[M]) -> M | None:
    for packed in status.details:
        message = kind()
        try:
            if packed.Unpack(message):
                return message
        except DecodeError:
            continue  # a damaged detail is no reason to hide the error it came with
    return None
