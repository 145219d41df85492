"""Statuses, as they come over the wire, to the one exception."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyProto
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from tokenwire import FieldViolation, Reason, Reply, TokenwireError
from tokenwire.errors import DETAILS_KEY, PUSHBACK_KEY, from_call, from_status
from tokenwire.v1.chat_pb2 import ChatMessage
from tokenwire.v1.chat_service_pb2 import ChatResponse, Choice

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def packed(*details: Any) -> bytes:
    status = status_pb2.Status(code=14, message="in the details")
    for detail in details:
        holder = AnyProto()
        holder.Pack(detail)
        status.details.append(holder)
    return status.SerializeToString()


def error(
    *trailers: tuple[str, str | bytes], code: grpc.StatusCode = UNAVAILABLE
) -> TokenwireError:
    return from_call(code, "message", trailers, request_id="mine")


INFO = error_details_pb2.ErrorInfo(
    reason="RATE_LIMITED", domain="tokenwire", metadata={"attempts": "2", "upstream": "u"}
)


def test_all_details() -> None:
    decoded = error(
        (
            DETAILS_KEY,
            packed(
                error_details_pb2.QuotaFailure(),
                INFO,
                error_details_pb2.RetryInfo(retry_delay=Duration(seconds=12, nanos=500_000_000)),
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field="a.b", description="d")
                    ]
                ),
            ),
        ),
        ("x-request-id", "echoed"),
    )
    assert decoded.code is UNAVAILABLE
    assert decoded.reason == "RATE_LIMITED"
    assert decoded.message == "message"
    assert decoded.retry_after == 12.5
    assert decoded.attempts == 2
    assert decoded.metadata == {"attempts": "2", "upstream": "u"}
    assert decoded.request_id == "echoed"
    assert [(v.field, v.description) for v in decoded.field_violations] == [("a.b", "d")]
    assert len(decoded.proto.details) == 4
    assert str(decoded) == (
        "RATE_LIMITED: message (retry after 12.5 s, 2 attempts, request echoed)\n  a.b: d"
    )


def test_reasons_can_be_matched_and_newer_ones_are_kept() -> None:
    match error((DETAILS_KEY, packed(INFO))).reason:
        case Reason.RATE_LIMITED:
            pass
        case other:
            raise AssertionError(other)
    newer = error_details_pb2.ErrorInfo(reason="MODEL_ASLEEP", domain="tokenwire")
    decoded = error((DETAILS_KEY, packed(newer)))
    assert (decoded.reason, decoded.is_retryable) == ("MODEL_ASLEEP", True)
    assert f"{Reason.RATE_LIMITED}" == "RATE_LIMITED"


def test_a_single_refused_field_is_said_once() -> None:
    violation = FieldViolation("a.b", "got 3")
    single = TokenwireError(
        "a.b: got 3", code=grpc.StatusCode.INVALID_ARGUMENT, field_violations=[violation]
    )
    assert str(single) == "INVALID_ARGUMENT: a.b: got 3"


@pytest.mark.parametrize(
    "trailers",
    [
        [],
        [(DETAILS_KEY, b"\xff\xff garbage")],
        [(DETAILS_KEY, packed())],
        [(DETAILS_KEY, packed(error_details_pb2.ErrorInfo(reason="X", domain="istio.io")))],
        [(DETAILS_KEY, packed(error_details_pb2.DebugInfo(detail="x")))],
    ],
)
def test_statuses_of_others(trailers: list[tuple[str, bytes]]) -> None:
    decoded = error(*trailers)
    assert (decoded.code, decoded.reason, decoded.message) == (UNAVAILABLE, "", "message")
    assert (decoded.attempts, decoded.retry_after, decoded.request_id) == (0, None, "mine")
    assert dict(decoded.metadata) == {}


def test_a_damaged_detail_hides_no_other() -> None:
    status = status_pb2.Status.FromString(packed(INFO))
    status.details.insert(0, AnyProto(type_url=status.details[0].type_url, value=b"\xff"))
    assert error((DETAILS_KEY, status.SerializeToString())).reason == "RATE_LIMITED"


@pytest.mark.parametrize(
    ("pushback", "seconds"), [("300", 0.3), ("-1", None), ("0", None), ("soon", None), ("", None)]
)
def test_pushback_tells_when_nothing_else_does(pushback: str, seconds: float | None) -> None:
    assert error((PUSHBACK_KEY, pushback)).retry_after == seconds
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=7))
    assert error((PUSHBACK_KEY, pushback), (DETAILS_KEY, packed(retry))).retry_after == 7


@pytest.mark.parametrize(
    ("code", "retry_after", "retryable"),
    [
        (UNAVAILABLE, None, True),
        (UNAVAILABLE, 1.0, True),
        (EXHAUSTED, 1.0, True),
        (EXHAUSTED, None, False),
        (grpc.StatusCode.INVALID_ARGUMENT, None, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, None, False),
        (grpc.StatusCode.INTERNAL, None, False),
    ],
)
def test_retryable(code: grpc.StatusCode, retry_after: float | None, retryable: bool) -> None:
    assert TokenwireError("m", code=code, retry_after=retry_after).is_retryable is retryable


def test_a_status_inside_a_batch() -> None:
    status = status_pb2.Status.FromString(packed(INFO))
    assert from_status(status, request_id="r").reason == "RATE_LIMITED"
    assert from_status(status_pb2.Status(code=99), request_id="r").code is grpc.StatusCode.UNKNOWN
    # OK where an error must be is still no success.
    assert from_status(status_pb2.Status(code=0), request_id="r").code is grpc.StatusCode.UNKNOWN


def test_an_error_survives_pickling() -> None:
    before = error((DETAILS_KEY, packed(INFO)), ("x-request-id", "r"))
    before.partial = Reply(ChatResponse(choices=[Choice(message=ChatMessage(content="par"))]))

    after = pickle.loads(pickle.dumps(before))

    assert type(after) is TokenwireError
    assert (str(after), repr(after)) == (str(before), repr(before))
    assert (after.partial_text, after.proto) == ("par", before.proto)
    assert after.args == before.args == ("message",)
