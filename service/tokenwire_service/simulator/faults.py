"""The closed list of faults the simulator can be asked for, with how each one misbehaves."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta


class Fault(StrEnum):
    """What a request may ask to go wrong, as `simulate.fault`. FAULTS says how."""

    INVALID_API_KEY = "invalid_api_key"
    ACCOUNT_DEACTIVATED = "account_deactivated"
    ACCESS_DENIED = "access_denied"
    RATE_LIMITED = "rate_limited"
    QUOTA_EXHAUSTED = "quota_exhausted"
    PAYMENT_REQUIRED = "payment_required"
    OVERLOADED = "overloaded"
    SERVER_ERROR = "server_error"
    BAD_GATEWAY = "bad_gateway"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    CONTENT_FILTER = "content_filter"
    MODEL_NOT_FOUND = "model_not_found"
    BAD_REQUEST = "bad_request"
    REQUEST_TOO_LARGE = "request_too_large"
    REDIRECT = "redirect"
    HTML = "html"
    EMPTY_BODY = "empty_body"
    STALL_BEFORE_HEADERS = "stall_before_headers"
    STALL_AFTER_HEADERS = "stall_after_headers"
    STALL_MIDWAY = "stall_midway"
    RESET_BEFORE_HEADERS = "reset_before_headers"
    RESET_MIDWAY = "reset_midway"
    CUT = "cut"
    ERROR_EVENT = "error_event"
    GARBAGE_MIDWAY = "garbage_midway"
    TRUNCATED_JSON = "truncated_json"
    LONE_SURROGATE = "lone_surrogate"
    INVALID_UTF8 = "invalid_utf8"
    SLOW = "slow"


class Directives(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `simulate` object of a request body. docs/simulator.md tells each field."""

    fault: Fault | None = None
    times: Annotated[int, Meta(ge=1)] | None = None
    id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    keys: list[Annotated[str, Meta(min_length=1, max_length=4)]] | None = None
    retry_after_s: Annotated[float, Meta(ge=0, le=86400)] | None = None
    at: Annotated[float, Meta(ge=0, le=1)] = 0.5
    tokens_per_second: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    first_token_ms: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    tokens: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    text: str | None = None
    chunks: list[str] | None = None
    raw_events: list[str] | None = None
    reasoning: str | None = None
    done: bool = True


_ONE_OF: Final = ("tokens", "text", "chunks", "raw_events")


def read_directives(value: object) -> Directives:
    """Checks a `simulate` object.

    Raises ValueError with a text that names what was expected, and every fault there is.
    """
    try:
        directives = msgspec.convert(value, Directives)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"Invalid 'simulate': {error}. Fields: {', '.join(Directives.__struct_fields__)}. "
            f"Faults: {', '.join(Fault)}."
        ) from None
    if directives.times is not None and directives.id is None:
        raise ValueError("Invalid 'simulate': `times` counts per `id`; expected an `id` beside it.")
    scripted = [name for name in _ONE_OF if getattr(directives, name) is not None]
    if len(scripted) > 1:
        raise ValueError(
            f"Invalid 'simulate': expected at most one of {', '.join(_ONE_OF)}, "
            f"but got {' and '.join(scripted)}."
        )
    return directives


class Where(Enum):
    """When a strike happens."""

    BEFORE_HEADERS = "before headers"
    AFTER_HEADERS = "after headers"
    MIDWAY = "midway"


class Then(Enum):
    """What follows a strike."""

    CONTINUE = "the answer goes on as if nothing had happened"
    END = "the connection ends cleanly"
    STALL = "silence until the client leaves"
    RESET = "a TCP reset"


def _unchanged(body: bytes, _point: int) -> bytes:
    return body


@dataclass(frozen=True, slots=True)
class Canned:
    """Answers at once with this, and nothing of the real answer."""

    about: str
    status: int
    error: Mapping[str, Any] | None = None
    page: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Strike:
    """Breaks an answer that is under way.

    event: SSE bytes written at that point.
    plain: what becomes of the JSON body of an answer that is not streamed, struck at an offset.
    """

    about: str
    where: Where
    then: Then
    event: bytes = b""
    plain: Callable[[bytes, int], bytes] = _unchanged


@dataclass(frozen=True, slots=True)
class Slip:
    """Slips a piece into the text of the answer, which otherwise is whole."""

    about: str
    piece: str


@dataclass(frozen=True, slots=True)
class Slow:
    """Sends one byte at a time, this many times slower than the pace."""

    about: str
    factor: float


def encode(value: object) -> bytes:
    """JSON. Lone surrogates, which callers may send in any string, become escapes."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def error_body(
    message: str,
    *,
    kind: str | None = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """An OpenAI error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_PAGE: Final = (
    "<!DOCTYPE html>\n<html><head><title>{title}</title></head>\n"
    "<body><h1>{title}</h1><hr><p>simulated-proxy</p></body></html>\n"
)
_CONTENT_FILTERED: Final = {
    "error": {
        "message": "The response was filtered because the prompt triggered the content management "
        "policy. Please modify your prompt and retry.",
        "type": None,
        "param": "prompt",
        "code": "content_filter",
        "status": 400,
        "innererror": {
            "code": "ResponsibleAIPolicyViolation",
            "content_filter_result": {
                "hate": {"filtered": False, "severity": "safe"},
                "jailbreak": {"filtered": False, "detected": False},
                "self_harm": {"filtered": False, "severity": "safe"},
                "sexual": {"filtered": False, "severity": "safe"},
                "violence": {"filtered": True, "severity": "medium"},
            },
        },
    }
}
_SERVER_ERROR: Final = error_body(
    "The server had an error while processing your request. Sorry about that!", kind="server_error"
)
_SERVER_ERROR_JSON: Final = encode(_SERVER_ERROR)
_GARBAGE: Final = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
# A noncharacter: it stands for the single byte 0xFF until the text is encoded.
INVALID_BYTE: Final = "\uffff"

FAULTS: Final[Mapping[Fault, Canned | Strike | Slip | Slow]] = MappingProxyType(
    {
        Fault.INVALID_API_KEY: Canned(
            "401, the key is wrong",
            401,
            error_body(
                "Incorrect API key provided: {key}. You can find your API keys in your account "
                "settings.",
                code="invalid_api_key",
            ),
        ),
        Fault.ACCOUNT_DEACTIVATED: Canned(
            "401, the account behind the key is closed",
            401,
            error_body(
                "The account associated with this API key has been deactivated. Please check your "
                "email for more information.",
                code="account_deactivated",
            ),
        ),
        Fault.ACCESS_DENIED: Canned(
            "403, region or permission",
            403,
            error_body(
                "Country, region, or territory not supported",
                kind="request_forbidden",
                code="unsupported_country_region_territory",
            ),
        ),
        Fault.RATE_LIMITED: Canned(
            "429 `rate_limit_exceeded`, with `retry-after` and `x-ratelimit-*`; `retry_after_s` "
            "sets the delay (default 1)",
            429,
            error_body(
                "Rate limit reached for {model} in organization org-simulated on requests per min "
                "(RPM): Limit 3, Used 3, Requested 1. Please try again in {delay}.",
                kind="requests",
                code="rate_limit_exceeded",
            ),
            headers={
                "x-ratelimit-limit-requests": "3",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "{delay}",
            },
            retry_after_s=1,
        ),
        Fault.QUOTA_EXHAUSTED: Canned(
            "429 `insufficient_quota`: out of credit",
            429,
            error_body(
                "You exceeded your current quota, please check your plan and billing details.",
                kind="insufficient_quota",
                code="insufficient_quota",
            ),
        ),
        Fault.PAYMENT_REQUIRED: Canned(
            "402, the balance is empty",
            402,
            error_body("Insufficient Balance", kind="unknown_error", code="invalid_request_error"),
        ),
        Fault.OVERLOADED: Canned(
            "503, the engine is full; `retry_after_s` adds `retry-after`",
            503,
            error_body(
                "The engine is currently overloaded, please try again later",
                kind="server_error",
                code="engine_overloaded",
            ),
        ),
        Fault.SERVER_ERROR: Canned("500 with a JSON error", 500, _SERVER_ERROR),
        Fault.BAD_GATEWAY: Canned(
            "502 with an HTML page", 502, page=_PAGE.format(title="502 Bad Gateway")
        ),
        Fault.CONTEXT_LENGTH_EXCEEDED: Canned(
            "400, the prompt is too long",
            400,
            error_body(
                "This model's maximum context length is 8192 tokens. However, your messages "
                "resulted in 9000 tokens. Please reduce the length of the messages.",
                param="messages",
                code="context_length_exceeded",
            ),
        ),
        Fault.CONTENT_FILTER: Canned(
            "400 `content_filter` with Azure's `innererror`", 400, _CONTENT_FILTERED
        ),
        Fault.MODEL_NOT_FOUND: Canned(
            "404, no such model",
            404,
            error_body(
                "The model `{model}` does not exist or you do not have access to it.",
                code="model_not_found",
            ),
        ),
        Fault.BAD_REQUEST: Canned(
            "400 with `param`, a value is refused",
            400,
            error_body(
                "Unsupported value: 'temperature' does not support 0.7 with this model. Only the "
                "default (1) value is supported.",
                param="temperature",
                code="unsupported_value",
            ),
        ),
        Fault.REQUEST_TOO_LARGE: Canned(
            "413, the body is too large",
            413,
            error_body(
                "Request too large. Please reduce the size of your request.",
                code="request_too_large",
            ),
        ),
        Fault.REDIRECT: Canned(
            "307 to another path; a client that follows it is counted in `redirects_followed`",
            307,
            headers={"location": "/v1/moved/chat/completions"},
        ),
        Fault.HTML: Canned(
            "200 with an HTML page instead of JSON or events",
            200,
            page=_PAGE.format(title="One moment, please..."),
        ),
        Fault.EMPTY_BODY: Canned("200 with the right content type and no body", 200),
        Fault.STALL_BEFORE_HEADERS: Strike(
            "silence instead of headers", Where.BEFORE_HEADERS, Then.STALL
        ),
        Fault.STALL_AFTER_HEADERS: Strike("headers, then silence", Where.AFTER_HEADERS, Then.STALL),
        Fault.STALL_MIDWAY: Strike("part of the answer, then silence", Where.MIDWAY, Then.STALL),
        Fault.RESET_BEFORE_HEADERS: Strike(
            "TCP reset instead of headers", Where.BEFORE_HEADERS, Then.RESET
        ),
        Fault.RESET_MIDWAY: Strike(
            "part of the answer, then a TCP reset", Where.MIDWAY, Then.RESET
        ),
        Fault.CUT: Strike(
            "the stream ends cleanly without finish reason and `[DONE]`; a plain answer stops "
            "short of its Content-Length",
            Where.MIDWAY,
            Then.END,
        ),
        Fault.ERROR_EVENT: Strike(
            "200, part of the answer, then an error event and the end; a plain answer is a 200 "
            "with an error object",
            Where.MIDWAY,
            Then.END,
            event=b"data: " + _SERVER_ERROR_JSON + b"\n\n",
            plain=lambda _body, _point: _SERVER_ERROR_JSON,
        ),
        Fault.GARBAGE_MIDWAY: Strike(
            "HTML in the middle of the stream, or of the JSON, which then goes on",
            Where.MIDWAY,
            Then.CONTINUE,
            event=b"data: " + _GARBAGE + b"\n\n",
            plain=lambda body, point: body[:point] + _GARBAGE + body[point:],
        ),
        Fault.TRUNCATED_JSON: Strike(
            "the last event stops in the middle of its JSON; a plain answer is a part of its JSON "
            "with a Content-Length to match",
            Where.MIDWAY,
            Then.END,
            event=b'data: {"id":"chatcmpl-simulated","object":"chat.completion.chunk","choi\n\n',
            plain=lambda body, point: body[:point],
        ),
        Fault.LONE_SURROGATE: Slip("the JSON escape `\\ud83d` alone in the text", "\ud83d"),
        Fault.INVALID_UTF8: Slip("the byte 0xFF in the text", INVALID_BYTE),
        Fault.SLOW: Slow("one byte at a time, ten times slower than the pace", 10),
    }
)


def canned_answer(
    canned: Canned, model: str, key: str, retry_after_s: float | None
) -> tuple[int, dict[str, str], bytes]:
    """Status, changed headers, body. `retry_after_s` overrides the table's; `key` is masked."""
    delay = canned.retry_after_s if retry_after_s is None else retry_after_s
    values = {"model": model, "key": mask(key), "delay": _go_duration(delay or 0)}
    headers = {name: value.format(**values) for name, value in canned.headers.items()}
    if delay is not None and canned.status in (429, 503):
        headers["retry-after"] = str(math.ceil(delay))
        headers["retry-after-ms"] = str(round(delay * 1000))
    if canned.page:
        return canned.status, headers | {"content-type": "text/html"}, canned.page.encode()
    if canned.error is None:
        return canned.status, headers, b""
    error = dict(canned.error["error"])
    error["message"] = error["message"].format(**values)
    headers["content-type"] = "application/json"
    return canned.status, headers, encode({"error": error})


def mask(key: str) -> str:
    """A key as error texts of providers show it: the last four characters at most."""
    return "*" * 8 + key[-4:] if len(key) > 8 else "*" * 8


def _go_duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms" if seconds < 1 else f"{seconds:g}s"
