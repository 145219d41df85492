"""What callers are told: the words for each fault, the trail of attempts, places in a request.

All of it ends up in a status and its trailers, so all of it is bounded. What an upstream said comes
here without secrets: the gateway has scrubbed it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.errors import Fault, UpstreamFault, reason_name
from tokenwire_service.providers import proto_path as field_path

# Longer status messages risk the 8 kB of trailers, where every byte beyond ASCII takes three:
# see docs/errors.md.
MESSAGE_CHARACTERS = 300
MESSAGE_BYTES = 900
TRAIL_CHARACTERS = 300
_MORE = "..., "  # for the attempts that do not fit

# What providers call a place below a parameter. Each is linear: the text is an upstream's.
_PARAM_STEPS = tuple(
    (re.compile(pattern), path)
    for pattern, path in (
        (r"^(\[\d+\])\.(?:function\.)?parameters\b.*", r"\1.function.parameters_schema_json"),
        (r"^\.json_schema\.schema\b.*", ".json_schema.schema_json"),
        (r"\.function\.arguments\b.*", ".function.arguments_json"),
        (r"\.content\[(\d+)\].*", r".parts[\1]"),
    )
)

# What each fault is called towards callers.
SAYINGS: Mapping[Fault, str] = {
    Fault.KEY_REJECTED: "it rejected every key it was offered",
    Fault.ACCOUNT_DEAD: "the account of every key is deactivated",
    Fault.ACCESS_DENIED: "it denied access to every key",
    Fault.RATE_LIMITED: "every key is rate limited",
    Fault.DAILY_QUOTA: "every key has used up its quota of the day",
    Fault.QUOTA_EXHAUSTED: "every key is out of credit",
    Fault.CREDIT_TOO_SMALL: "the credit left does not cover a request of this size",
    Fault.OVER_TIER: "one request of this size exceeds the account's whole rate",
    Fault.OVERLOADED: "it is overloaded",
    Fault.SERVER_ERROR: "it failed",
    Fault.UNREACHABLE: "it cannot be reached",
    Fault.STALE_CONNECTION: "it closed the connection",
    Fault.TIMEOUT: "it was too slow",
    Fault.CONTEXT_TOO_LONG: "the prompt and the reserved output exceed the context window",
    Fault.CONTENT_FILTERED: "its content filter refused the prompt",
    Fault.MODEL_NOT_FOUND: "it does not serve this model",
    Fault.REFUSED: "it refused the request",
    Fault.OUTPUT_INVALID: "the model broke the format that was asked for",
    Fault.TOO_LARGE: "the request is too large for it",
    Fault.PROTOCOL: "its answer is not a chat completion",
    Fault.TRUNCATED: "its answer is incomplete",
}

# Faults whose upstream text is never passed on: it may name keys, organizations or accounts.
_OWN_WORDS = frozenset(
    {
        Fault.KEY_REJECTED,
        Fault.ACCOUNT_DEAD,
        Fault.ACCESS_DENIED,
        Fault.RATE_LIMITED,
        Fault.DAILY_QUOTA,
        Fault.QUOTA_EXHAUSTED,
        Fault.OVER_TIER,
    }
)


def said(fault: UpstreamFault) -> str:
    """What went wrong, in the gateway's words, and in its upstream's where these are safe."""
    if not fault.message or fault.fault in _OWN_WORDS:
        return SAYINGS[fault.fault]
    return f"{SAYINGS[fault.fault]}: {fault.message}"


def proto_path(param: str, chat: chat_service_pb2.ChatRequest) -> str:
    """Where in the request a parameter stands that an upstream names in its own way; as it is if
    that is nowhere."""
    param = re.sub(r"\.\[?(\d{1,9})\b\]?", r"[\1]", param[:MESSAGE_CHARACTERS])
    name = re.match(r"\w*", param)[0]  # type: ignore[index]  # it matches nothing at least
    rest = param[len(name) :]
    if name in chat_pb2.GenerationParams.DESCRIPTOR.fields_by_name:
        return f"params.{name}{rest}"
    if name not in chat.DESCRIPTOR.fields_by_name and f'"{name}"' in chat.extra_body_json:
        return "extra_body_json"
    for pattern, path in _PARAM_STEPS:
        rest = pattern.sub(path, rest)
    return field_path(name) + rest


def printable(text: str) -> str:
    """`text` as a status message can carry it: one line, no control characters, not too long."""
    text = text[: 4 * MESSAGE_CHARACTERS]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    short = text[:MESSAGE_CHARACTERS].encode()[:MESSAGE_BYTES].decode(errors="ignore")
    return text if short == text else short[:-1] + "\u2026"


def usage_facts(usage: chat_pb2.Usage) -> dict[str, str]:
    return {
        "promptTokens": str(usage.prompt_tokens),
        "completionTokens": str(usage.completion_tokens),
        "usageEstimated": "true" if usage.estimated else "false",
    }


def trail(attempts: Sequence[chat_service_pb2.UpstreamAttempt]) -> dict[str, str]:
    """How many attempts there were, and what became of the latest ones, as many as fit."""
    facts = {"attempts": str(len(attempts))}
    shown = ""
    for attempt in reversed(attempts):
        status = f" {attempt.http_status}" if attempt.http_status else ""
        ended = reason_name(attempt.error_reason) or "unfinished"
        step = f"{attempt.upstream}/{attempt.key_id}{status} {ended}"
        if len(shown) + len(step) > TRAIL_CHARACTERS - 2 * len(_MORE):
            shown = _MORE + shown
            break
        shown = f"{step}, {shown}" if shown else step
    return {**facts, "trail": shown} if shown else facts
