"""What went wrong, and the table from what an upstream did to what a caller hears.

The table of docs/errors.md in code: Fault -> Verdict -> reason -> code. `Verdict` keeps the
two judgements apart: what a fault means for the key that met it, and for the request that did.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from google.rpc import code_pb2

from tokenwire.v1 import error_reason_pb2 as reasons

E = TypeVar("E", bound=BaseException)

if TYPE_CHECKING:  # an attribute of the stubs alone
    Reason: TypeAlias = reasons.ErrorReason.ValueType


class Fault(enum.Enum):
    """What one attempt at an upstream met."""

    KEY_REJECTED = "key_rejected"
    ACCOUNT_DEAD = "account_dead"
    ACCESS_DENIED = "access_denied"
    RATE_LIMITED = "rate_limited"
    DAILY_QUOTA = "daily_quota"  # a rate limit of a whole day: it says nothing of how fast to go
    QUOTA_EXHAUSTED = "quota_exhausted"
    CREDIT_TOO_SMALL = "credit_too_small"  # the account pays, but not for a request this large
    OVER_TIER = "over_tier"  # one request above the account's whole rate: waiting never helps
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    UNREACHABLE = "unreachable"
    STALE_CONNECTION = "stale_connection"  # a reused connection died before any byte came back
    TIMEOUT = "timeout"
    CONTEXT_TOO_LONG = "context_too_long"
    CONTENT_FILTERED = "content_filtered"
    MODEL_NOT_FOUND = "model_not_found"
    REFUSED = "refused"
    OUTPUT_INVALID = "output_invalid"  # the provider's own model broke its own format
    TOO_LARGE = "too_large"
    PROTOCOL = "protocol"
    TRUNCATED = "truncated"  # the stream ended without proof of completion


class KeyAction(enum.Enum):
    """What a fault means for the key."""

    KEEP = "keep"
    COOL_GROUP = "cool_group"  # its quota group, for this model
    COOL_UPSTREAM = "cool_upstream"  # every key, for this model: the provider is full
    RETIRE_KEY = "retire_key"
    RETIRE_GROUP = "retire_group"  # until a probe succeeds
    RETIRE_FOR_MODEL = "retire_for_model"
    NOTE_MODEL = "note_model"  # it lacks this model, if another key is known to serve it


class RequestAction(enum.Enum):
    """What a fault means for a request of which nothing has been delivered."""

    OTHER_KEY = "other_key"  # at once, on another quota group; wait for one where that can help
    OTHER_GROUP = "other_group"  # at once, on a quota group not asked before; never wait for one
    KNOWN_KEY = "known_key"  # at once, if another key is known to serve the model; else fail
    BACKOFF = "backoff"  # again after exponential backoff
    ONCE_MORE = "once_more"  # again, but only once for this fault
    FAIL = "fail"


class Verdict(NamedTuple):
    """Both judgements, and the reason the caller hears if the request fails in the end."""

    key: KeyAction
    request: RequestAction
    reason: Reason


VERDICTS: Mapping[Fault, Verdict] = {
    Fault.KEY_REJECTED: Verdict(
        KeyAction.RETIRE_KEY,
        RequestAction.OTHER_KEY,
        reasons.ERROR_REASON_UPSTREAM_CREDENTIALS_REJECTED,
    ),
    Fault.ACCOUNT_DEAD: Verdict(
        KeyAction.RETIRE_GROUP,
        RequestAction.OTHER_KEY,
        reasons.ERROR_REASON_UPSTREAM_CREDENTIALS_REJECTED,
    ),
    Fault.ACCESS_DENIED: Verdict(
        KeyAction.RETIRE_FOR_MODEL,
        RequestAction.OTHER_KEY,
        reasons.ERROR_REASON_UPSTREAM_ACCESS_DENIED,
    ),
    Fault.RATE_LIMITED: Verdict(
        KeyAction.COOL_GROUP, RequestAction.OTHER_KEY, reasons.ERROR_REASON_RATE_LIMITED
    ),
    Fault.DAILY_QUOTA: Verdict(
        KeyAction.COOL_GROUP, RequestAction.OTHER_KEY, reasons.ERROR_REASON_RATE_LIMITED
    ),
    Fault.QUOTA_EXHAUSTED: Verdict(
        KeyAction.RETIRE_GROUP,
        RequestAction.OTHER_KEY,
        reasons.ERROR_REASON_UPSTREAM_QUOTA_EXHAUSTED,
    ),
    Fault.CREDIT_TOO_SMALL: Verdict(
        KeyAction.KEEP,
        RequestAction.ONCE_MORE,
        reasons.ERROR_REASON_UPSTREAM_QUOTA_EXHAUSTED,
    ),
    Fault.OVER_TIER: Verdict(
        KeyAction.KEEP, RequestAction.OTHER_GROUP, reasons.ERROR_REASON_REQUEST_TOO_LARGE
    ),
    Fault.OVERLOADED: Verdict(
        KeyAction.COOL_UPSTREAM, RequestAction.BACKOFF, reasons.ERROR_REASON_UPSTREAM_OVERLOADED
    ),
    Fault.SERVER_ERROR: Verdict(
        KeyAction.KEEP, RequestAction.BACKOFF, reasons.ERROR_REASON_UPSTREAM_ERROR
    ),
    Fault.UNREACHABLE: Verdict(
        KeyAction.KEEP, RequestAction.BACKOFF, reasons.ERROR_REASON_UPSTREAM_UNREACHABLE
    ),
    Fault.STALE_CONNECTION: Verdict(
        KeyAction.KEEP, RequestAction.ONCE_MORE, reasons.ERROR_REASON_UPSTREAM_UNREACHABLE
    ),
    Fault.TIMEOUT: Verdict(
        KeyAction.KEEP, RequestAction.ONCE_MORE, reasons.ERROR_REASON_UPSTREAM_TIMEOUT
    ),
    Fault.CONTEXT_TOO_LONG: Verdict(
        KeyAction.KEEP, RequestAction.FAIL, reasons.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED
    ),
    Fault.CONTENT_FILTERED: Verdict(
        KeyAction.KEEP, RequestAction.FAIL, reasons.ERROR_REASON_CONTENT_FILTERED
    ),
    Fault.MODEL_NOT_FOUND: Verdict(
        KeyAction.NOTE_MODEL, RequestAction.KNOWN_KEY, reasons.ERROR_REASON_MODEL_NOT_FOUND
    ),
    Fault.REFUSED: Verdict(
        KeyAction.KEEP, RequestAction.FAIL, reasons.ERROR_REASON_INVALID_REQUEST
    ),
    Fault.OUTPUT_INVALID: Verdict(
        KeyAction.KEEP, RequestAction.ONCE_MORE, reasons.ERROR_REASON_UPSTREAM_ERROR
    ),
    Fault.TOO_LARGE: Verdict(
        KeyAction.KEEP, RequestAction.FAIL, reasons.ERROR_REASON_REQUEST_TOO_LARGE
    ),
    Fault.PROTOCOL: Verdict(
        KeyAction.KEEP, RequestAction.ONCE_MORE, reasons.ERROR_REASON_UPSTREAM_PROTOCOL_ERROR
    ),
    Fault.TRUNCATED: Verdict(
        # Nothing had been delivered: after the first message it is always the interruption.
        KeyAction.KEEP,
        RequestAction.ONCE_MORE,
        reasons.ERROR_REASON_UPSTREAM_ERROR,
    ),
}

CODES: Mapping[Reason, int] = {
    reasons.ERROR_REASON_INVALID_REQUEST: code_pb2.INVALID_ARGUMENT,
    reasons.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED: code_pb2.INVALID_ARGUMENT,
    reasons.ERROR_REASON_UNSUPPORTED_PARAMETER: code_pb2.INVALID_ARGUMENT,
    reasons.ERROR_REASON_UNKNOWN_ROLE: code_pb2.INVALID_ARGUMENT,
    reasons.ERROR_REASON_REQUEST_TOO_LARGE: code_pb2.RESOURCE_EXHAUSTED,
    reasons.ERROR_REASON_CONTENT_FILTERED: code_pb2.INVALID_ARGUMENT,
    reasons.ERROR_REASON_MODEL_NOT_FOUND: code_pb2.NOT_FOUND,
    reasons.ERROR_REASON_CALLER_UNAUTHENTICATED: code_pb2.UNAUTHENTICATED,
    reasons.ERROR_REASON_CALLER_FORBIDDEN: code_pb2.PERMISSION_DENIED,
    reasons.ERROR_REASON_CALLER_QUOTA_EXCEEDED: code_pb2.RESOURCE_EXHAUSTED,
    reasons.ERROR_REASON_RATE_LIMITED: code_pb2.RESOURCE_EXHAUSTED,
    reasons.ERROR_REASON_UPSTREAM_QUOTA_EXHAUSTED: code_pb2.RESOURCE_EXHAUSTED,
    reasons.ERROR_REASON_UPSTREAM_CREDENTIALS_REJECTED: code_pb2.FAILED_PRECONDITION,
    reasons.ERROR_REASON_UPSTREAM_ACCESS_DENIED: code_pb2.FAILED_PRECONDITION,
    reasons.ERROR_REASON_UPSTREAM_UNREACHABLE: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_UPSTREAM_TIMEOUT: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_UPSTREAM_OVERLOADED: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_UPSTREAM_ERROR: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_UPSTREAM_PROTOCOL_ERROR: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_UPSTREAM_STREAM_INTERRUPTED: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_GATEWAY_OVERLOADED: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_GATEWAY_DRAINING: code_pb2.UNAVAILABLE,
    reasons.ERROR_REASON_DEADLINE_EXCEEDED: code_pb2.DEADLINE_EXCEEDED,
    reasons.ERROR_REASON_CANCELLED: code_pb2.CANCELLED,
    reasons.ERROR_REASON_INTERNAL: code_pb2.INTERNAL,
    reasons.ERROR_REASON_CALLER_STALLED: code_pb2.ABORTED,
    reasons.ERROR_REASON_TOKENIZER_UNAVAILABLE: code_pb2.FAILED_PRECONDITION,
}


# ErrorInfo metadata that says which timer ended the call or its last attempt. Its values: connect,
# first_byte, idle (of an upstream); total, write (of the gateway); deadline (the caller's).
TIMER = "timer"


def reason_name(reason: Reason) -> str:
    """A reason as ErrorInfo spells it; empty for none."""
    return reasons.ErrorReason.Name(reason).removeprefix("ERROR_REASON_") if reason else ""


@dataclass
class UpstreamFault(Exception):
    """One attempt failed. `message` is the upstream's own text: untrusted, not yet scrubbed.

    `retry_after`: seconds the upstream asked to wait, None when it did not say.
    `should_retry`: the upstream's own `x-should-retry`, which wins over the table.
    `facts`: ErrorInfo metadata such as maxContextTokens.
    """

    fault: Fault
    message: str = ""
    http_status: int = 0
    code: str = ""
    param: str = ""
    retry_after: float | None = None
    should_retry: bool | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.message}"


@dataclass(frozen=True)
class Violation:
    """One bad request field: its proto path, and what was expected."""

    field: str
    description: str


@dataclass
class GatewayError(Exception):
    """What the caller hears: one status with its details.

    `message` is shown to callers and must hold no secret. `retry_after` in seconds becomes
    RetryInfo and the pushback trailer; `retry_helps=False` sends pushback -1.
    """

    reason: Reason
    message: str
    violations: tuple[Violation, ...] = ()
    retry_after: float | None = None
    retry_helps: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    resource: tuple[str, str] | None = None  # (type, name) for ResourceInfo
    quota: tuple[str, str] | None = None  # (subject, description) for QuotaFailure

    @property
    def code(self) -> int:
        """The google.rpc code number, equal to the gRPC one."""
        return CODES[self.reason]

    @property
    def reason_name(self) -> str:
        """The reason as ErrorInfo spells it."""
        return reason_name(self.reason)

    def __str__(self) -> str:
        return f"{self.reason_name}: {self.message}"


def bare(error: E) -> E:
    """The same error, without the frames that it came through and the errors before it. Whoever
    keeps an error keeps them, and some of them know who keeps it: a cycle, with all that they hold,
    until the collector runs."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def invalid(
    *violations: Violation, reason: Reason = reasons.ERROR_REASON_INVALID_REQUEST
) -> GatewayError:
    """The error of a request that is wrong at the given fields."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return GatewayError(reason, f"{first.field}: {first.description}{more}", violations)
