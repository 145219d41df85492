"""What an upstream's error answer means, by structured evidence: status, codes, types, headers.

A text pattern stands only where a provider gives nothing else; each is linear and names its
provider. Shapes: {"error": {...}}, {"error": "text"}, flat vLLM / Mistral / DashScope / Cohere
objects, Google's array, FastAPI's {"detail": ...}, Bedrock's {"message": ...}.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tokenwire_service.errors import Fault, UpstreamFault

# Codes and types that decide by themselves, whatever the status. Keys are lower case.
_CODES: Mapping[str, Fault] = {
    # keys
    "invalid_api_key": Fault.KEY_REJECTED,
    "invalidapikey": Fault.KEY_REJECTED,  # DashScope
    "authentication_error": Fault.KEY_REJECTED,  # Anthropic, DeepSeek
    "api_key_invalid": Fault.KEY_REJECTED,  # Google
    "api_key_expired": Fault.KEY_REJECTED,
    "account_deactivated": Fault.ACCOUNT_DEAD,
    "organization_restricted": Fault.ACCOUNT_DEAD,  # Groq, with status 400
    # access
    "unsupported_country_region_territory": Fault.ACCESS_DENIED,
    "ip_not_authorized": Fault.ACCESS_DENIED,
    "permission_error": Fault.ACCESS_DENIED,  # Anthropic
    "permission_denied": Fault.ACCESS_DENIED,
    "accessdenied": Fault.ACCESS_DENIED,  # DashScope
    "access_denied": Fault.ACCESS_DENIED,
    "accessdenied.unpurchased": Fault.ACCESS_DENIED,
    "model.accessdenied": Fault.ACCESS_DENIED,
    "workspace.accessdenied": Fault.ACCESS_DENIED,
    # money
    "insufficient_quota": Fault.QUOTA_EXHAUSTED,
    "billing_not_active": Fault.QUOTA_EXHAUSTED,
    "billing_hard_limit_reached": Fault.QUOTA_EXHAUSTED,
    "billing_error": Fault.QUOTA_EXHAUSTED,  # Anthropic
    "arrearage": Fault.QUOTA_EXHAUSTED,  # DashScope, with status 400
    "prepaidbilloverdue": Fault.QUOTA_EXHAUSTED,
    "postpaidbilloverdue": Fault.QUOTA_EXHAUSTED,
    "commoditynotpurchased": Fault.QUOTA_EXHAUSTED,
    "allocationquota.freetieronly": Fault.QUOTA_EXHAUSTED,
    "1113": Fault.QUOTA_EXHAUSTED,  # Zhipu
    "exceeded_current_quota_error": Fault.QUOTA_EXHAUSTED,  # Moonshot
    # rate
    "rate_limit_exceeded": Fault.RATE_LIMITED,
    "rate_limit_reached_error": Fault.RATE_LIMITED,  # Moonshot
    "rate_limited": Fault.RATE_LIMITED,  # Mistral
    "rate_limit_error": Fault.RATE_LIMITED,  # Anthropic
    "throttling.ratequota": Fault.RATE_LIMITED,  # DashScope
    "throttling.allocationquota": Fault.RATE_LIMITED,
    "throttling.burstrate": Fault.RATE_LIMITED,
    "throttling": Fault.RATE_LIMITED,
    # the provider
    "engine_overloaded": Fault.OVERLOADED,
    "engine_overloaded_error": Fault.OVERLOADED,  # Moonshot
    "overloaded_error": Fault.OVERLOADED,  # Anthropic
    "slow_down": Fault.OVERLOADED,
    "server_error": Fault.SERVER_ERROR,
    # the request
    "context_length_exceeded": Fault.CONTEXT_TOO_LONG,
    "string_above_max_length": Fault.CONTEXT_TOO_LONG,
    "too_many_prompt_tokens": Fault.CONTEXT_TOO_LONG,  # Perplexity
    "too_many_tokens": Fault.CONTEXT_TOO_LONG,  # Cohere
    "-20003": Fault.CONTEXT_TOO_LONG,  # InternLM, inside a 200
    "content_filter": Fault.CONTENT_FILTERED,  # Azure
    "content_policy_violation": Fault.CONTENT_FILTERED,
    "data_inspection_failed": Fault.CONTENT_FILTERED,  # DashScope
    "datainspectionfailed": Fault.CONTENT_FILTERED,
    "responsibleaipolicyviolation": Fault.CONTENT_FILTERED,  # Azure innererror
    "model_not_found": Fault.MODEL_NOT_FOUND,
    "modelnotfound": Fault.MODEL_NOT_FOUND,  # DashScope
    "model.notexist": Fault.MODEL_NOT_FOUND,
    "deploymentnotfound": Fault.MODEL_NOT_FOUND,  # Azure
    "model_not_supported": Fault.MODEL_NOT_FOUND,
    "tool_use_failed": Fault.OUTPUT_INVALID,  # Groq
    "json_validate_failed": Fault.OUTPUT_INVALID,  # Groq
    "request_too_large": Fault.TOO_LARGE,  # Anthropic
}

# The same where there is no status, in a stream or inside a 200; elsewhere the status says more.
_CODES_ALONE: Mapping[str, Fault] = {
    # Anthropic
    "invalid_request_error": Fault.REFUSED,
    "not_found_error": Fault.MODEL_NOT_FOUND,
    "timeout_error": Fault.SERVER_ERROR,
    "api_error": Fault.SERVER_ERROR,
    # DashScope
    "invalidparameter": Fault.REFUSED,
    "invalidparameter.dataexist": Fault.REFUSED,
    "invalidurl": Fault.REFUSED,
    "serviceunavailable": Fault.OVERLOADED,
    "modelunavailable": Fault.OVERLOADED,
    "modelserving": Fault.OVERLOADED,
}

_STATUSES: Mapping[int, Fault] = {
    401: Fault.KEY_REJECTED,
    402: Fault.QUOTA_EXHAUSTED,
    403: Fault.ACCESS_DENIED,
    404: Fault.REFUSED,
    408: Fault.SERVER_ERROR,
    409: Fault.SERVER_ERROR,
    413: Fault.TOO_LARGE,
    429: Fault.RATE_LIMITED,
    503: Fault.OVERLOADED,
    529: Fault.OVERLOADED,
}

# (statuses, pattern, fault): only where neither code nor type tells. First match wins.
_TEXTS: tuple[tuple[frozenset[int], re.Pattern[str], Fault], ...] = (
    (
        frozenset({400}),
        re.compile(r"API key not valid|Incorrect API key"),
        Fault.KEY_REJECTED,
    ),  # Google, xAI
    (
        frozenset({403}),
        re.compile(r"security token .{0,100} (expired|invalid)"),
        Fault.KEY_REJECTED,
    ),  # Bedrock
    (
        frozenset({401, 403}),
        re.compile(r"account .{0,100}deactivated|deactivated account"),
        Fault.ACCOUNT_DEAD,
    ),
    (
        frozenset({400, 403}),
        re.compile(r"organization has been disabled"),
        Fault.ACCOUNT_DEAD,
    ),  # Anthropic
    (frozenset({400}), re.compile(r"credit balance is too low"), Fault.QUOTA_EXHAUSTED),
    (frozenset({403}), re.compile(r"key was reported as leaked"), Fault.KEY_REJECTED),  # Google
    (
        frozenset({403}),
        re.compile(r"^Content violates usage guidelines"),
        Fault.CONTENT_FILTERED,
    ),  # xAI
    (frozenset({0, 400}), re.compile(r"prompt is too long"), Fault.CONTEXT_TOO_LONG),  # Anthropic
    (
        frozenset({0, 400}),
        re.compile(r"`max_tokens` exceed context limit"),
        Fault.CONTEXT_TOO_LONG,
    ),
    (
        frozenset({0, 400}),
        re.compile(r"Range of input length should be"),
        Fault.CONTEXT_TOO_LONG,
    ),  # DashScope
    (frozenset({400}), re.compile(r"maximum context length"), Fault.CONTEXT_TOO_LONG),  # vLLM
    (
        frozenset({400}),
        re.compile(r"exceeds? the (maximum number of tokens|available context size)"),
        Fault.CONTEXT_TOO_LONG,
    ),  # Google, llama.cpp
    (
        frozenset({400, 404}),
        re.compile(
            r"^models?[ /:`'].{0,200}not found|^Publisher Model"
            r"|^The model `.*(does not exist|deprecated)"
            r"|^Model .{0,100} is not supported|^model: "
        ),
        Fault.MODEL_NOT_FOUND,
    ),  # Ollama, Cohere, Google, vLLM, Voyage, Anthropic
    (frozenset({402}), re.compile(r"can only afford"), Fault.CREDIT_TOO_SMALL),  # OpenRouter
    # Azure, when one request alone exceeds the deployment's rate, whatever it has left.
    (frozenset({429}), re.compile(r"retry after 86400 seconds"), Fault.OVER_TIER),
    (frozenset({429}), re.compile(r"free-models-per-day"), Fault.DAILY_QUOTA),  # OpenRouter
    (frozenset({429}), re.compile(r"capacity exceeded"), Fault.OVERLOADED),  # Mistral
    (frozenset({429}), re.compile(r"engine is currently overloaded"), Fault.OVERLOADED),  # Moonshot
    (
        frozenset({429}),
        re.compile(r"^Resource exhausted\. Please try again later"),
        Fault.OVERLOADED,
    ),  # Vertex shared capacity
)

_CONTEXT_LIMIT = re.compile(
    r"maximum context length is (\d{1,9})|> (\d{1,9}) maximum"
    r"|context limit: [\d+ ]{1,40} > (\d{1,9})|input length should be \[1, (\d{1,9})\]"
    r"|maximum number of tokens allowed \((\d{1,9})\)|limit for this model is (\d{1,9})"
)
_PROMPT_TOKENS = re.compile(r"(?:resulted in|requested|too long:|input token count \() ?(\d{1,9})")
# What xAI adds to its words on a prompt: whose account and which key it is.
_XAI_ACCOUNT = re.compile(r"(?<=guidelines\.) .{0,20}(?:Team|API key)\b.*", re.DOTALL)
_TIER = re.compile(r"Limit (\d{1,12}), (?:Used \d{1,12}, )?Requested ~?(\d{1,12})")
_TRY_AGAIN = re.compile(
    r"(?:try again in|retry after|try again after) "
    r"((?:\d{1,9}(?:\.\d{1,12})?(?:ms|h|m|s| seconds?)){1,5})"
)
_GO_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|us|µs|ns|h|m|s)")
_UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_ONE_DAY = 86_400.0


def classify(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    now: Callable[[], float] = time.time,
) -> UpstreamFault:
    """What a non-200 answer means. `headers` has lower-case names; `now` is Unix time in
    seconds, for dates in headers."""
    return classify_payload(_payload(body), status, headers, now)


def classify_payload(
    payload: Any,
    status: int,
    headers: Mapping[str, str],
    now: Callable[[], float] = time.time,
) -> UpstreamFault:
    """As `classify`, for JSON already decoded: also an error inside a 200 or a stream, where
    `status` is what the payload itself names, or 0."""
    error = _error_object(payload)
    message = _text(
        error.get("message") or error.get("detail") or error.get("msg") or error.get("error")
    )
    code = _text(error.get("code"))
    kind = _text(error.get("type") or error.get("error_type"))
    inner = error.get("innererror")
    inner_code = _text(inner.get("code")) if isinstance(inner, dict) else ""
    if not 400 <= status <= 599 and code.isascii() and code.isdigit() and len(code) == 3:
        status = int(code)  # OpenRouter and Google put the status into `code`
    fault = _fault(status, code, kind, inner_code, message, error)
    facts = {}
    if fault is Fault.CONTENT_FILTERED:
        message = _XAI_ACCOUNT.sub("", message)
    if fault is Fault.CONTEXT_TOO_LONG:
        facts = _context_facts(message)
    if (
        fault is Fault.RATE_LIMITED
        and (tier := _TIER.search(message))
        and int(tier[2]) > int(tier[1])
    ):
        fault = Fault.OVER_TIER
    # Groq states a delay even where no wait can help.
    retry_after = None if fault is Fault.OVER_TIER else retry_delay(headers, message, now)
    if fault is Fault.RATE_LIMITED and retry_after is None:
        retry_after = _google_retry_info(error)
    if fault is Fault.RATE_LIMITED and _is_googles_day(error):
        # Its RetryInfo is the rest of a minute: that is when its other limits would be reset.
        fault, retry_after = Fault.DAILY_QUOTA, retry_delay(headers, now=now)
    return UpstreamFault(
        fault,
        message=message,
        http_status=status,
        code=code or kind,
        param=_text(error.get("param")),
        retry_after=retry_after,
        should_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "")),
        facts=facts,
    )


def _fault(
    status: int, code: str, kind: str, inner: str, message: str, error: Mapping[str, Any]
) -> Fault:
    if 300 <= status < 400:
        return Fault.PROTOCOL
    if inner and inner.lower() in _CODES:
        return _CODES[inner.lower()]
    if status == 403 and _is_flagged(error):
        return Fault.CONTENT_FILTERED  # of this caller's prompt: any key would be told the same
    for statuses, pattern, fault in _TEXTS:
        if status in statuses and pattern.search(message):
            return fault
    for name in (code.lower(), kind.lower()):
        found = _CODES.get(name)
        if found is None:
            continue
        if found is Fault.QUOTA_EXHAUSTED and "token-limit" in message:
            return Fault.RATE_LIMITED  # DashScope's per-minute throttle under the same name
        return found
    if not status:
        for name in (code.lower(), kind.lower()):
            if name in _CODES_ALONE:
                return _CODES_ALONE[name]
    if status == 404 and kind.lower() == "not_found_error":
        return Fault.MODEL_NOT_FOUND  # Anthropic
    if status in _STATUSES:
        return _STATUSES[status]
    if 400 <= status < 500:
        return Fault.REFUSED
    if 500 <= status < 600:
        return Fault.SERVER_ERROR
    return Fault.SERVER_ERROR if error else Fault.PROTOCOL


def _payload(body: bytes) -> Any:
    """The JSON of an error body, None for anything else. Providers cut what they quote, which
    leaves half surrogates: msgspec refuses them, the standard library reads them."""
    try:
        return msgspec.json.decode(body)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _error_object(payload: Any) -> Mapping[str, Any]:
    """The object that describes the error, whatever wraps it."""
    if isinstance(payload, list) and payload:
        payload = payload[0]  # Google wraps it in an array
    if not isinstance(payload, dict):
        return {}
    error = payload.get("error")
    if isinstance(error, dict):
        return error
    return payload


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # without half surrogates
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return ""


def _context_facts(message: str) -> dict[str, str]:
    facts = {}
    if found := _CONTEXT_LIMIT.search(message):
        facts["maxContextTokens"] = next(group for group in found.groups() if group)
    if found := _PROMPT_TOKENS.search(message):
        facts["promptTokens"] = found[1]
    return facts


def retry_delay(
    headers: Mapping[str, str], message: str = "", now: Callable[[], float] = time.time
) -> float | None:
    """Seconds to wait as the upstream asks, None when it says nothing usable.

    retry-after-ms, then retry-after (seconds or an HTTP date), then the reset of the dimension
    whose remaining is 0 (the later one of two), then "try again in 9m38.016s". Zero and negative
    values are unusable: one real Azure 429 carries `retry-after-ms: 0` beside `retry-after: 1`.
    Azure's bare-integer resets are ms in one recording and s in another, so only values with a
    unit count.
    """
    if (ms := _positive(headers.get("retry-after-ms"))) is not None:
        return ms / 1000
    if value := headers.get("retry-after"):
        if (seconds := _positive(value)) is not None:
            return seconds
        if (date := _http_date(value)) is not None:
            # By the clock that made the date, where it tells its time: ours may be an hour off.
            sent = _http_date(headers.get("date", ""))
            wait = date - (sent if sent is not None else now())
            if wait > 0:
                return wait
    resets = [
        go_duration(headers.get(f"x-ratelimit-reset-{dimension}", "")) or 0.0
        for dimension in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{dimension}") == "0"
    ]
    if any(resets):
        return max(resets)
    if found := _TRY_AGAIN.search(message):
        delay = go_duration(re.sub(r" seconds?", "s", found[1]))
        if delay and delay < _ONE_DAY:  # Azure once said 86400 for a per-minute limit
            return delay
    return None


def go_duration(text: str) -> float | None:
    """Seconds of a Go duration such as `1m30.5s` or `120ms`; None when it is not one."""
    total, end = 0.0, 0
    for match in _GO_DURATION.finditer(text):
        if match.start() != end:
            return None
        total += float(match[1]) * _UNIT_SECONDS[match[2]]
        end = match.end()
    return total if end and end == len(text) else None


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _http_date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _is_flagged(error: Mapping[str, Any]) -> bool:
    """Whether OpenRouter's moderation refused the prompt: only then it says why, or quotes it."""
    metadata = error.get("metadata")
    return isinstance(metadata, dict) and bool(
        metadata.get("flagged_input") or metadata.get("reasons")
    )


def _is_googles_day(error: Mapping[str, Any]) -> bool:
    """Whether a quota of a whole day is used up: its quotaId says so."""
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        violations = detail.get("violations") if isinstance(detail, dict) else None
        for violation in violations if isinstance(violations, list) else ():
            if isinstance(violation, dict) and "PerDay" in _text(violation.get("quotaId")):
                return True
    return False


def _google_retry_info(error: Mapping[str, Any]) -> float | None:
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and str(detail.get("@type", "")).endswith(
            "google.rpc.RetryInfo"
        ):
            return go_duration(_text(detail.get("retryDelay")))
    return None
