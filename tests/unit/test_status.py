"""An error fits into the trailers with every detail that matters, and says when to come back."""

import base64
import math
from typing import TypeVar
from urllib.parse import quote

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.errors import CODES, GatewayError, Violation, invalid
from tokenwire_service.interceptors import internal_error, prepared_trailers, rpc_status, trailers
from tokenwire_service.validation import check

D = TypeVar("D", bound=Message)

LONG_ID = "r" * 128
RATE_LIMITED = error_reason_pb2.ERROR_REASON_RATE_LIMITED
# As much as the gateway ever puts there.
METADATA = {
    "upstream": "u" * 63,
    "upstreamStatus": "429",
    "upstreamCode": "c" * 64,
    "attempts": "20",
    "maxContextTokens": "9" * 9,
    "promptTokens": "9" * 9,
}


def detail(status: status_pb2.Status, kind: type[D]) -> D:
    found = [each for each in status.details if each.Is(kind.DESCRIPTOR)]
    assert len(found) == 1, f"{len(found)} {kind.__name__}"
    unpacked = kind()
    found[0].Unpack(unpacked)
    return unpacked


@given(
    ids=st.lists(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=128)
    )
)
def test_prepared_trailers_are_those_of_the_error(ids: list[str]) -> None:
    error = GatewayError(RATE_LIMITED, "later", retry_after=1.5, retry_helps=True)
    prepared = prepared_trailers(error)
    for request_id in (*ids, *ids):
        assert prepared(request_id) == trailers(error, request_id)


def trailer(error: GatewayError, name: str) -> str | bytes:
    [value] = [value for key, value in trailers(error, "r") if key == name]
    return value


def check_size(error: GatewayError) -> status_pb2.Status:
    """What docs/errors.md promises, and that gRPC can carry it: it replaces more than 8 kB."""
    status = rpc_status(error, LONG_ID)
    assert len(status.message) <= 300
    assert status.message.isprintable()
    assert sum(each.ByteSize() for each in status.details) <= 2048
    sent = sum(
        len(key) + (len(value) if isinstance(value, str) else len(base64.b64encode(value)))
        for key, value in trailers(error, LONG_ID)
    )
    assert sent + len(quote(status.message)) < 7500
    return status


# --- what is told -----------------------------------------------------------------------


@pytest.mark.parametrize("reason", CODES)
def test_every_error_carries_its_reason_and_the_request_id(reason: int) -> None:
    status = rpc_status(GatewayError(reason, "text", metadata={"upstream": "u"}), "r1")
    assert (status.code, status.message) == (CODES[reason], "text")
    info = detail(status, error_details_pb2.ErrorInfo)
    assert f"ERROR_REASON_{info.reason}" == error_reason_pb2.ErrorReason.Name(reason)
    assert info.domain == "tokenwire"
    assert dict(info.metadata) == {"requestId": "r1", "upstream": "u"}
    assert len(status.details) == 1


def test_violations_quota_resource_and_delay_have_details_of_their_own() -> None:
    error = GatewayError(
        RATE_LIMITED,
        "text",
        violations=(Violation("a.b", "wrong"),),
        retry_after=12.5,
        quota=("upstream:u", "every key"),
        resource=("model", "m"),
    )
    status = rpc_status(error, "r")
    [violation] = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("a.b", "wrong")
    retry = detail(status, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToNanoseconds() == 12_500_000_000
    [quota] = detail(status, error_details_pb2.QuotaFailure).violations
    assert (quota.subject, quota.description) == ("upstream:u", "every key")
    resource = detail(status, error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("model", "m")


def test_a_defect_tells_nothing_but_where_to_look() -> None:
    status = rpc_status(internal_error(), "r1")
    assert detail(status, error_details_pb2.ErrorInfo).reason == "INTERNAL"
    assert len(status.details) == 1


def test_the_trailers_are_the_status_the_pushback_and_the_request_id() -> None:
    error = GatewayError(RATE_LIMITED, "text")
    names = [name for name, _ in trailers(error, "r1")]
    assert names == ["grpc-status-details-bin", "grpc-retry-pushback-ms", "x-request-id"]
    packed = dict(trailers(error, "r1"))["grpc-status-details-bin"]
    assert status_pb2.Status.FromString(packed) == rpc_status(error, "r1")


# --- when to come back ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry_after", "helps", "pushback"),
    [
        (None, False, "-1"),
        (None, True, "-1"),
        (2.0, False, "-1"),  # the gateway has used up its own retries
        (2.0, True, "2000"),
        (0.0, True, "1"),  # another instance may serve at once
        (0.0001, True, "1"),  # never sooner than asked
        (1.2344, True, "1235"),
        (-1.0, True, "1"),
        (3600.0, True, "3600000"),
        (1e9, True, str(2**31 - 1)),
        (1e300, True, str(2**31 - 1)),
        (math.inf, True, str(2**31 - 1)),
    ],
)
def test_pushback_is_a_delay_where_waiting_helps_and_minus_one_elsewhere(
    retry_after: float | None, helps: bool, pushback: str
) -> None:
    error = GatewayError(RATE_LIMITED, "text", retry_after=retry_after, retry_helps=helps)
    assert trailer(error, "grpc-retry-pushback-ms") == pushback


@given(st.floats(min_value=0, allow_nan=False))
def test_any_delay_makes_a_valid_duration_that_is_not_shorter(seconds: float) -> None:
    status = rpc_status(GatewayError(RATE_LIMITED, "text", retry_after=seconds), "r")
    told = detail(status, error_details_pb2.RetryInfo).retry_delay
    year = 366 * 86_400
    assert told.ToNanoseconds() / 1e9 >= min(seconds, year) * (1 - 1e-15)
    assert told.seconds <= year
    assert 0 <= told.nanos < 10**9


# --- size -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    ["错" * 900, "e" * 6000, "😀" * 900, "%" * 900, "\u0301" * 900, "a\n\x00\x1b\u2028b" * 200],
    ids=["Chinese", "ASCII", "emoji", "percent", "combining", "controls"],
)
def test_any_message_fits(message: str) -> None:
    error = GatewayError(RATE_LIMITED, message, retry_after=1.0, metadata=METADATA)
    error.quota = ("upstream:" + "u" * 63, "every key is rate limited")
    check_size(error)
    check_size(invalid(Violation("messages[0].role", message)))
    check_size(invalid(Violation(message, message), Violation(message, message)))


def test_a_message_that_fits_is_not_changed() -> None:
    for text in ("错" * 300, "e" * 300, "one line"):
        assert rpc_status(GatewayError(RATE_LIMITED, text), "r").message == text


def test_a_message_that_is_cut_says_so() -> None:
    assert rpc_status(GatewayError(RATE_LIMITED, "e" * 301), "r").message == "e" * 299 + "…"


def test_of_ten_thousand_violations_the_first_are_told() -> None:
    wrong = chat_service_pb2.ChatRequest(model="m")
    wrong.messages.extend([chat_pb2.ChatMessage()] * 10_000)
    with pytest.raises(GatewayError) as caught:
        check(wrong)
    assert len(caught.value.violations) == 10_000
    status = check_size(caught.value)
    told = detail(status, error_details_pb2.BadRequest).field_violations
    assert [v.field for v in told] == [f"messages[{i}].role" for i in range(len(told))]
    assert len(told) > 10
    assert status.message.endswith("(and 9999 more)")


def test_one_violation_as_long_as_can_be_is_still_told() -> None:
    error = invalid(Violation("f" * 5000, "ä😀" * 5000))
    error.metadata = METADATA
    [violation] = detail(check_size(error), error_details_pb2.BadRequest).field_violations
    assert violation.field == "f" * 100
    assert violation.description.startswith("ä😀ä😀")


@given(
    st.lists(st.builds(Violation, st.text(max_size=400), st.text(max_size=2000)), max_size=6),
    st.text(max_size=2000),
)
@settings(max_examples=60)
def test_whatever_is_wrong_fits(violations: list[Violation], message: str) -> None:
    check_size(
        GatewayError(
            error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
            message,
            violations=tuple(violations),
            metadata=METADATA,
        )
    )


def test_the_longest_model_name_fits() -> None:
    error = GatewayError(
        error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND,
        "no model",
        metadata=METADATA,
        resource=("model", "😀" * 200),
    )
    check_size(error)
