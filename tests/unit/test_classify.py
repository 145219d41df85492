"""What an upstream's error answer means: every provider's shape, delays, facts, hostile bodies."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.upstream import classify as module
from tokenwire_service.upstream.classify import classify, classify_payload, go_duration, retry_delay

NOON = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


class Case(NamedTuple):
    """One error answer. `code` is what the caller may see of the provider's own word."""

    status: int
    body: Any
    fault: Fault
    code: str = ""
    headers: Mapping[str, str] = {}
    retry_after: float | None = None
    facts: Mapping[str, str] = {}


def openai(message: str, code: str | None = None, kind: str = "invalid_request_error") -> Any:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def google(status: int, message: str, *details: Any) -> Any:
    return [{"error": {"code": status, "message": message, "status": "X", "details": details}}]


def claude(kind: str, message: str) -> Any:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "r"}


def vllm(status: int, message: str, kind: str = "BadRequestError") -> Any:
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


CASES: dict[str, Case] = {
    # --- keys, accounts, access
    "Anthropic: no credit with 400": Case(
        400,
        claude("invalid_request_error", "Your credit balance is too low to access the API."),
        Fault.QUOTA_EXHAUSTED,
        "invalid_request_error",
    ),
    "Anthropic: organization disabled": Case(
        400,
        claude("invalid_request_error", "This organization has been disabled."),
        Fault.ACCOUNT_DEAD,
        "invalid_request_error",
    ),
    "Anthropic: prompt and answer together too long": Case(
        400,
        claude(
            "invalid_request_error",
            "input length and `max_tokens` exceed context limit: 199000 + 20000 > 200000, decrease",
        ),
        Fault.CONTEXT_TOO_LONG,
        "invalid_request_error",
        facts={"maxContextTokens": "200000"},
    ),
    "Anthropic: timeout with 504": Case(
        504, claude("timeout_error", "x"), Fault.SERVER_ERROR, "timeout_error"
    ),
    "Google: leaked key": Case(
        403,
        google(403, "Your API key was reported as leaked. Please use another API key."),
        Fault.KEY_REJECTED,
        "403",
    ),
    "DashScope: too long": Case(
        400,
        {"code": "InvalidParameter", "message": "Range of input length should be [1, 30720]"},
        Fault.CONTEXT_TOO_LONG,
        "InvalidParameter",
        facts={"maxContextTokens": "30720"},
    ),
    "DashScope: overdue": Case(
        400,
        {"code": "PrepaidBillOverdue", "message": "x"},
        Fault.QUOTA_EXHAUSTED,
        "PrepaidBillOverdue",
    ),
    "DashScope: not for this model": Case(
        403,
        {"code": "Model.AccessDenied", "message": "x"},
        Fault.ACCESS_DENIED,
        "Model.AccessDenied",
    ),
    "DashScope: too many at once": Case(
        429,
        {"code": "Throttling.BurstRate", "message": "x"},
        Fault.RATE_LIMITED,
        "Throttling.BurstRate",
    ),
    "DashScope: busy within a stream": Case(
        0, {"code": "ModelServing", "message": "x"}, Fault.OVERLOADED, "ModelServing"
    ),
    "Anthropic: refused within a stream": Case(
        0, claude("invalid_request_error", "x"), Fault.REFUSED, "invalid_request_error"
    ),
    "a status says more than a word for all": Case(
        429, claude("invalid_request_error", "x"), Fault.RATE_LIMITED, "invalid_request_error"
    ),
    "OpenAI: wrong key": Case(
        401,
        openai("Incorrect API key provided: sk-***", "invalid_api_key"),
        Fault.KEY_REJECTED,
        "invalid_api_key",
    ),
    "Anthropic: wrong key": Case(
        401,
        {"type": "error", "error": {"type": "authentication_error", "message": "invalid"}},
        Fault.KEY_REJECTED,
        "authentication_error",
    ),
    "xAI: wrong key with 400": Case(
        400,
        {"code": "Client specified an invalid argument", "error": "Incorrect API key provided"},
        Fault.KEY_REJECTED,
        "Client specified an invalid argument",
    ),
    "Google: wrong key with 400, in an array": Case(
        400,
        google(400, "API key not valid. Please pass a valid API key."),
        Fault.KEY_REJECTED,
        "400",
    ),
    "Bedrock: token expired": Case(
        403,
        {"message": "The security token included in the request is expired"},
        Fault.KEY_REJECTED,
    ),
    "DashScope: wrong key": Case(
        401,
        {"code": "InvalidApiKey", "message": "Invalid API-key provided.", "request_id": "r"},
        Fault.KEY_REJECTED,
        "InvalidApiKey",
    ),
    "Cohere: wrong key, text alone": Case(
        401, {"message": "invalid api token"}, Fault.KEY_REJECTED
    ),
    "401 without a body": Case(401, b"", Fault.KEY_REJECTED),
    "OpenAI: account deactivated": Case(
        401, openai("x", "account_deactivated"), Fault.ACCOUNT_DEAD, "account_deactivated"
    ),
    "text alone: account deactivated": Case(
        403, {"message": "Your account was deactivated"}, Fault.ACCOUNT_DEAD
    ),
    "Groq: organization restricted with 400": Case(
        400,
        openai("Organization has been restricted.", "organization_restricted"),
        Fault.ACCOUNT_DEAD,
        "organization_restricted",
    ),
    "OpenAI: region": Case(
        403,
        openai("not supported", "unsupported_country_region_territory", "request_forbidden"),
        Fault.ACCESS_DENIED,
        "unsupported_country_region_territory",
    ),
    "Anthropic: permission": Case(
        403,
        {"type": "error", "error": {"type": "permission_error", "message": "no"}},
        Fault.ACCESS_DENIED,
        "permission_error",
    ),
    "403 with HTML": Case(403, b"<html>Forbidden</html>", Fault.ACCESS_DENIED),
    # --- rate
    "OpenAI: requests per minute": Case(
        429,
        openai(
            "Rate limit reached for m on requests per min (RPM): Limit 3, Used 3, Requested 1. "
            "Please try again in 20s.",
            "rate_limit_exceeded",
            "requests",
        ),
        Fault.RATE_LIMITED,
        "rate_limit_exceeded",
        retry_after=20.0,
    ),
    "OpenAI: larger than the tier": Case(
        429,
        openai(
            "Request too large for m on tokens per min (TPM): Limit 10000, Requested 12001.",
            "rate_limit_exceeded",
            "tokens",
        ),
        Fault.OVER_TIER,
        "rate_limit_exceeded",
    ),
    "Groq: larger than the tier with 413": Case(
        413,
        openai("Limit 6000, Requested 8000, please reduce", "rate_limit_exceeded", "tokens"),
        Fault.OVER_TIER,
        "rate_limit_exceeded",
    ),
    "Azure: larger than the tier": Case(
        429,
        openai("Requests have exceeded the rate. Please retry after 86400 seconds.", "429"),
        Fault.OVER_TIER,
        "429",
    ),
    "Anthropic: rate": Case(
        429,
        {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}},
        Fault.RATE_LIMITED,
        "rate_limit_error",
        {"retry-after": "12"},
        12.0,
    ),
    "Mistral: rate without an error object": Case(
        429, {"message": "Requests rate limit exceeded"}, Fault.RATE_LIMITED
    ),
    "Google: rate with RetryInfo": Case(
        429,
        google(
            429,
            "Quota exceeded",
            {"@type": "type.googleapis.com/google.rpc.QuotaFailure"},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "39s"},
        ),
        Fault.RATE_LIMITED,
        "429",
        retry_after=39.0,
    ),
    "Google: quota of a day, beside the rest of a minute": Case(
        429,
        google(
            429,
            "You exceeded your current quota. Please retry in 39.4s.",
            {
                "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                "violations": [
                    {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"},
                ],
            },
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "39s"},
        ),
        Fault.DAILY_QUOTA,
        "429",
    ),
    "Google: quota of a minute": Case(
        429,
        google(
            429,
            "You exceeded your current quota. Please retry in 39.4s.",
            {
                "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                "violations": [
                    {"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"},
                ],
            },
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "39s"},
        ),
        Fault.RATE_LIMITED,
        "429",
        retry_after=39.0,
    ),
    "OpenRouter: quota of a day": Case(
        429,
        openai("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock more", 429),
        Fault.DAILY_QUOTA,
        "429",
    ),
    "OpenAI: quota of a day that says when it opens": Case(
        429,
        openai(
            "Rate limit reached for m on requests per day (RPD): Limit 200, Used 200, Requested 1. "
            "Please try again in 7m12s.",
            "rate_limit_exceeded",
            "requests",
        ),
        Fault.RATE_LIMITED,
        "rate_limit_exceeded",
        retry_after=432.0,
    ),
    "DashScope: throttle under the name of a quota": Case(
        429,
        {"code": "insufficient_quota", "message": "see ... #token-limit"},
        Fault.RATE_LIMITED,
        "insufficient_quota",
    ),
    "429 without a body": Case(429, b"", Fault.RATE_LIMITED),
    # --- money
    "OpenAI: quota": Case(
        429,
        openai("You exceeded your current quota", "insufficient_quota", "insufficient_quota"),
        Fault.QUOTA_EXHAUSTED,
        "insufficient_quota",
    ),
    "OpenAI: hard limit with 400": Case(
        400,
        openai("Billing hard limit", "billing_hard_limit_reached"),
        Fault.QUOTA_EXHAUSTED,
        "billing_hard_limit_reached",
    ),
    "DeepSeek: balance": Case(
        402,
        openai("Insufficient Balance", "invalid_request_error"),
        Fault.QUOTA_EXHAUSTED,
        "invalid_request_error",
    ),
    "DashScope: arrears with 400": Case(
        400, {"code": "Arrearage", "message": "Access denied"}, Fault.QUOTA_EXHAUSTED, "Arrearage"
    ),
    "Zhipu: arrears": Case(
        429, {"error": {"code": "1113", "message": "…"}}, Fault.QUOTA_EXHAUSTED, "1113"
    ),
    "Moonshot: quota": Case(
        429,
        {"error": {"type": "exceeded_current_quota_error", "message": "…"}},
        Fault.QUOTA_EXHAUSTED,
        "exceeded_current_quota_error",
    ),
    "OpenRouter: credit for less": Case(
        402,
        {"error": {"code": 402, "message": "You requested 9 tokens, but can only afford 5"}},
        Fault.CREDIT_TOO_SMALL,
        "402",
    ),
    # --- the provider
    "503 in HTML": Case(503, b"<html>", Fault.OVERLOADED),
    "Anthropic: 529": Case(
        529,
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        Fault.OVERLOADED,
        "overloaded_error",
    ),
    "OpenAI: slow down": Case(
        503, openai("Slow down", "slow_down", "server_error"), Fault.OVERLOADED, "slow_down"
    ),
    "Mistral: capacity with 429": Case(
        429,
        {"object": "error", "message": "Service tier capacity exceeded for this model."},
        Fault.OVERLOADED,
    ),
    "Moonshot: engine": Case(
        429,
        {"error": {"message": "The engine is currently overloaded", "type": "x"}},
        Fault.OVERLOADED,
        "x",
    ),
    "Vertex: shared capacity": Case(
        429,
        google(429, "Resource exhausted. Please try again later. See …"),
        Fault.OVERLOADED,
        "429",
    ),
    "500": Case(500, openai("error", None, "server_error"), Fault.SERVER_ERROR, "server_error"),
    "502 in HTML": Case(502, b"<html>Bad gateway</html>", Fault.SERVER_ERROR),
    "Cloudflare: 524": Case(524, b"error code: 524", Fault.SERVER_ERROR),
    "408": Case(408, b"", Fault.SERVER_ERROR),
    "409": Case(409, b"", Fault.SERVER_ERROR),
    # --- the request
    "OpenAI: too long": Case(
        400,
        openai(
            "This model's maximum context length is 8192 tokens. However, your messages resulted "
            "in 9000 tokens.",
            "context_length_exceeded",
        ),
        Fault.CONTEXT_TOO_LONG,
        "context_length_exceeded",
        facts={"maxContextTokens": "8192", "promptTokens": "9000"},
    ),
    "vLLM: too long": Case(
        400,
        vllm(400, "This model's maximum context length is 4096 tokens. You requested 5000 tokens"),
        Fault.CONTEXT_TOO_LONG,
        "400",
        facts={"maxContextTokens": "4096", "promptTokens": "5000"},
    ),
    "Anthropic: too long": Case(
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "prompt is too long: 210000 tokens > 200000 maximum",
            },
        },
        Fault.CONTEXT_TOO_LONG,
        "invalid_request_error",
        facts={"maxContextTokens": "200000", "promptTokens": "210000"},
    ),
    "Google: too long": Case(
        400,
        google(
            400,
            "The input token count (2000000) exceeds the maximum number of tokens allowed "
            "(1048576).",
        ),
        Fault.CONTEXT_TOO_LONG,
        "400",
        facts={"maxContextTokens": "1048576", "promptTokens": "2000000"},
    ),
    "llama.cpp: too long": Case(
        400,
        {"error": {"code": 400, "message": "the request exceeds the available context size"}},
        Fault.CONTEXT_TOO_LONG,
        "400",
    ),
    "InternLM: too long, inside a 200": Case(
        0, {"code": -20003, "msg": "…"}, Fault.CONTEXT_TOO_LONG, "-20003"
    ),
    "Azure: filtered": Case(
        400,
        {
            "error": {
                "message": "filtered",
                "code": "content_filter",
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
            }
        },
        Fault.CONTENT_FILTERED,
        "content_filter",
    ),
    "Azure: filtered by the inner error alone": Case(
        400,
        {"error": {"code": "other", "innererror": {"code": "ResponsibleAIPolicyViolation"}}},
        Fault.CONTENT_FILTERED,
        "other",
    ),
    "OpenRouter: flagged by its moderation": Case(
        403,
        {
            "error": {
                "code": 403,
                "message": "This model requires moderation on OpenRouter. Your input was flagged.",
                "metadata": {"reasons": ["violence"], "flagged_input": "...", "model_slug": "m"},
            }
        },
        Fault.CONTENT_FILTERED,
        "403",
    ),
    "OpenRouter: flagged, inside a 200": Case(
        0,
        {"error": {"code": 403, "message": "Forbidden", "metadata": {"flagged_input": "..."}}},
        Fault.CONTENT_FILTERED,
        "403",
    ),
    "xAI: flagged": Case(
        403,
        {
            "code": "The caller does not have permission to execute the specified operation",
            "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO",
        },
        Fault.CONTENT_FILTERED,
        "The caller does not have permission to execute the specified operation",
    ),
    "DashScope: filtered": Case(
        400,
        {"code": "DataInspectionFailed", "message": "inappropriate"},
        Fault.CONTENT_FILTERED,
        "DataInspectionFailed",
    ),
    "OpenAI: no such model": Case(
        404,
        openai("The model `x` does not exist", "model_not_found"),
        Fault.MODEL_NOT_FOUND,
        "model_not_found",
    ),
    "vLLM: no such model": Case(
        404,
        vllm(404, "The model `x` does not exist.", "NotFoundError"),
        Fault.MODEL_NOT_FOUND,
        "404",
    ),
    "Azure: no such deployment": Case(
        404, openai("…", "DeploymentNotFound"), Fault.MODEL_NOT_FOUND, "DeploymentNotFound"
    ),
    "Ollama: no such model": Case(404, {"error": "model 'x' not found"}, Fault.MODEL_NOT_FOUND),
    "Google: no such model": Case(
        404,
        google(404, "models/x is not found for API version v1"),
        Fault.MODEL_NOT_FOUND,
        "404",
    ),
    "Anthropic: no such model": Case(
        404,
        {"type": "error", "error": {"type": "not_found_error", "message": "model: x"}},
        Fault.MODEL_NOT_FOUND,
        "not_found_error",
    ),
    "404 of a path": Case(404, {"detail": "Not Found"}, Fault.REFUSED),
    "FastAPI: list of details": Case(
        422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, Fault.REFUSED
    ),
    "400": Case(400, openai("bad"), Fault.REFUSED, "invalid_request_error"),
    "405": Case(405, b"", Fault.REFUSED),
    "Groq: the model broke the tool format": Case(
        400, openai("Failed", "tool_use_failed"), Fault.OUTPUT_INVALID, "tool_use_failed"
    ),
    "413 in HTML": Case(413, b"<html>", Fault.TOO_LARGE),
    "Anthropic: too large": Case(
        413,
        {"type": "error", "error": {"type": "request_too_large", "message": "…"}},
        Fault.TOO_LARGE,
        "request_too_large",
    ),
    # --- not the protocol
    "redirect": Case(307, b"", Fault.PROTOCOL),
    "200 without anything": Case(200, b"", Fault.PROTOCOL),
    # --- inside a 200
    "OpenRouter: status in the code": Case(
        0, {"error": {"code": 429, "message": "slow"}}, Fault.RATE_LIMITED, "429"
    ),
    "OpenRouter: 502 in the code": Case(
        0, {"error": {"code": 502, "message": "down"}}, Fault.SERVER_ERROR, "502"
    ),
    "an error that names nothing": Case(0, {"error": {"message": "?"}}, Fault.SERVER_ERROR),
}


def run(case: Case) -> UpstreamFault:
    if case.status == 0:
        return classify_payload(case.body, 0, case.headers)
    body = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    return classify(case.status, case.headers, body)


@pytest.mark.parametrize("name", CASES)
def test_an_error_answer_means_what_its_provider_means(name: str) -> None:
    case = CASES[name]
    fault = run(case)
    assert (fault.fault, fault.code) == (case.fault, case.code)
    assert (fault.retry_after, dict(fault.facts)) == (case.retry_after, dict(case.facts))


def test_every_fault_that_an_answer_can_be_is_tried() -> None:
    met_on_the_way = {Fault.UNREACHABLE, Fault.STALE_CONNECTION, Fault.TIMEOUT, Fault.TRUNCATED}
    assert {case.fault for case in CASES.values()} == set(Fault) - met_on_the_way


@pytest.mark.parametrize("row", module._TEXTS, ids=lambda row: row[1].pattern[:40])
def test_every_text_pattern_is_needed_for_a_real_body(row) -> None:
    statuses, pattern, fault = row
    assert any(
        case.status in statuses and pattern.search(run(case).message) and case.fault is fault
        for case in CASES.values()
    )


@pytest.mark.parametrize("code", module._CODES)
def test_a_code_decides_wherever_it_stands_and_however_it_is_spelled(code: str) -> None:
    fault = module._CODES[code]
    for shape in (
        {"error": {"code": code}},
        {"error": {"type": code.upper()}},
        [{"error": {"code": code.title()}}],
        {"code": code, "message": "flat"},
        {"object": "error", "type": code},
    ):
        for status in (400, 418, 429, 500, 0):
            assert classify_payload(shape, status, {}).fault is fault


def test_xais_word_on_a_prompt_names_neither_team_nor_key() -> None:
    text = "Content violates usage guidelines. Team: t-1, API key ID: k-1, Failed check: BIO"
    fault = classify(403, {}, json.dumps({"code": "c", "error": text}).encode())
    assert fault.fault is Fault.CONTENT_FILTERED
    assert fault.message == "Content violates usage guidelines."


def test_what_a_provider_says_is_handed_on() -> None:
    body = {"error": {"message": "too hot", "param": "temperature", "code": "c", "type": "t"}}
    fault = classify(400, {}, json.dumps(body).encode())
    assert (fault.message, fault.param, fault.code) == ("too hot", "temperature", "c")
    assert fault.http_status == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "text"}, "text"),
        ({"message": "text"}, "text"),
        ({"detail": "text"}, "text"),
        ({"code": -20003, "msg": "text"}, "text"),
        ({"error": {"message": "text"}}, "text"),
        ([{"error": {"message": "text"}}], "text"),
        ({"error": {"message": {"no": "text"}}}, ""),
        ("text", ""),
    ],
)
def test_the_message_is_found_in_every_shape(body: Any, message: str) -> None:
    assert classify_payload(body, 400, {}).message == message


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), ("false", False), ("", None), ("maybe", None)]
)
def test_the_providers_own_word_on_retries_is_kept(value: str, expected: bool | None) -> None:
    assert classify(500, {"x-should-retry": value}, b"").should_retry is expected


def test_a_quote_cut_within_a_character_does_not_hide_the_code() -> None:
    body = b'{"error":{"code":"context_length_exceeded","message":"\\ud83d","param":"\\ude00"}}'
    fault = classify(400, {}, body)
    assert fault.fault is Fault.CONTEXT_TOO_LONG
    (fault.message + fault.param).encode()  # no half surrogate is left
    assert classify(400, {}, b'{"error":{"code":"context_length_exceeded","x":"\xff"}}').fault is (
        Fault.CONTEXT_TOO_LONG
    )


# --- delays -----------------------------------------------------------------------------

RESET = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}

# (headers, message, seconds).
DELAYS: list[tuple[Mapping[str, str], str, float | None]] = [
    ({}, "", None),
    ({"retry-after-ms": "1500"}, "", 1.5),
    ({"retry-after-ms": "1500", "retry-after": "9"}, "", 1.5),
    ({"retry-after-ms": "0", "retry-after": "1"}, "", 1.0),  # a real Azure 429
    ({"retry-after-ms": "-5", "retry-after": "1"}, "", 1.0),
    ({"retry-after-ms": "nan", "retry-after": "inf"}, "", None),
    ({"retry-after": "20"}, "", 20.0),
    ({"retry-after": "0.25"}, "", 0.25),
    ({"retry-after": "0"}, "", None),
    ({"retry-after": "-10"}, "", None),
    ({"retry-after": "soon"}, "", None),
    ({"retry-after": ""}, "", None),
    ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, "", 30.0),
    ({"retry-after": "Tue, 14 Nov 2023 22:13:10 GMT"}, "", None),
    (  # by the provider's clock, not by ours
        {"retry-after": "Tue, 14 Nov 2023 23:13:50 GMT", "date": "Tue, 14 Nov 2023 23:13:20 GMT"},
        "",
        30.0,
    ),
    ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT", "date": "no date"}, "", 30.0),
    ({"retry-after": "Tue, 99 Nov 2023 22:13:50 GMT"}, "", None),
    ({"retry-after": "0001-01-01"}, "", None),
    ({"retry-after": "20", **RESET}, "", 20.0),
    (RESET, "", 90.0),
    (RESET, "try again in 2s", 90.0),
    ({**RESET, "x-ratelimit-remaining-requests": "1"}, "", None),
    ({**RESET, "x-ratelimit-reset-requests": "60"}, "", None),  # ms or s: Azure means both
    ({**RESET, "x-ratelimit-reset-requests": "0s"}, "", None),
    (
        {
            "x-ratelimit-remaining-requests": "7",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "120ms",
        },
        "",
        0.12,
    ),
    ({}, "Please try again in 9m38.016s. Visit", 578.016),
    ({}, "Please try again in 120ms.", 0.12),
    ({}, "Please retry after 7 seconds.", 7.0),
    ({}, "Please retry after 1 second.", 1.0),
    ({}, "try again in 1h2m3s", 3723.0),
    ({}, "Please retry after 86400 seconds.", None),  # Azure, for a limit per minute
    ({}, "try again in a while", None),
    ({}, "try again in 5", None),
]


@pytest.mark.parametrize(("headers", "message", "seconds"), DELAYS)
def test_a_delay_is_what_the_provider_asks_for(
    headers: Mapping[str, str], message: str, seconds: float | None
) -> None:
    assert retry_delay(headers, message, lambda: NOON) == (
        None if seconds is None else pytest.approx(seconds)
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("1h", 3600), ("1m30.5s", 90.5), ("120ms", 0.12), ("5us", 5e-6), ("5µs", 5e-6)),
        *(("", None), ("5", None), ("1s ", None), (" 1s", None), ("1s2", None), ("s", None)),
        *(("-1s", None), ("1d", None), ("1m 3s", None), ("0s", 0.0)),
    ],
)
def test_a_duration_of_go_is_read_whole_or_not_at_all(text: str, seconds: float | None) -> None:
    assert go_duration(text) == (None if seconds is None else pytest.approx(seconds))


@given(st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms", *RESET]), st.text()))
def test_no_header_raises_and_a_delay_is_positive_and_finite(headers: dict[str, str]) -> None:
    delay = retry_delay(headers, "", lambda: NOON)
    assert delay is None or (delay > 0 and math.isfinite(delay))


@given(
    st.one_of(
        st.text("0123456789 ,:+-GMTJanFebTueZ", max_size=60),
        st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S -9999")),
        st.from_regex(r"[0-9]{1,6}-[0-9]{1,20} [A-Z]{3} [0-9]{1,9}:[0-9]{2} [+-]?[0-9]{0,12}"),
    )
)
@settings(max_examples=400)
def test_no_date_raises(text: str) -> None:
    delay = retry_delay({"retry-after": text}, "", lambda: NOON)
    assert delay is None or (delay > 0 and math.isfinite(delay))


# --- hostile bodies ---------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("\ud83d")
)
names = st.sampled_from(
    [
        *("error", "message", "code", "type", "param", "detail", "details", "innererror"),
        *("object", "error_type", "@type", "retryDelay", "x"),
    ]
)
payloads = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5)
)


@given(payloads, st.sampled_from([0, 200, 301, 400, 401, 402, 403, 404, 413, 429, 500, 503, 999]))
@settings(max_examples=400)
def test_no_payload_raises(payload: Any, status: int) -> None:
    fault = classify_payload(payload, status, {})
    assert isinstance(fault.fault, Fault)
    for text in (fault.message, fault.code, fault.param):
        text.encode()


@given(st.one_of(st.binary(max_size=200), payloads.map(lambda p: json.dumps(p).encode())))
def test_no_body_raises(body: bytes) -> None:
    assert isinstance(classify(400, {}, body), UpstreamFault)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"error":' * 100_000,
        b"9" * 50_000,
        b'{"error":{"code":' + b"9" * 4400 + b"}}",
        b'{"error":{"code":' + b"9" * 4200 + b"}}",
        b'{"error":{"message":NaN,"code":Infinity}}',
        b"\x00" * 1000,
        "¿".encode("utf-16"),
    ],
    ids=["arrays", "objects", "digits", "huge code", "large code", "NaN", "zeros", "UTF-16"],
)
def test_a_hostile_body_is_just_a_refusal(body: bytes) -> None:
    assert classify(400, {}, body).fault is Fault.REFUSED


# What makes a backtracking pattern slow: long runs of what nearly matches.
SLOW = [
    *("try again in " + "1h" * 3, "try again in " + "1" * 50, "Limit 1, Used 1, Requested "),
    *("security token ", "account ", "model ", "models/", "The model `", "Model ", "model: "),
    *("maximum context length is ", "> 1", "requested ", "too long:", "exceeds the maximum "),
    *("does not exist", " ", "9", "capacity exceeded "),
]


@pytest.mark.parametrize("unit", SLOW)
@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 429])
def test_time_is_linear_in_the_message(unit: str, status: int) -> None:
    """Half a megabyte, which a quadratic pattern would not get through before the timeout."""
    message = unit * (8_000_000 // len(unit) // 16)
    classify_payload({"error": {"message": message}}, status, {})
    classify_payload({"error": {"message": "The model `" + message}}, status, {})


def test_dates_of_any_length_are_read_in_linear_time() -> None:
    for unit in ("1 ", ",", "(", "()", "Mon, ", "1:", "-", '"\\'):
        retry_delay({"retry-after": unit * 30_000}, "", lambda: NOON)
