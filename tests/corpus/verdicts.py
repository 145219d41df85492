"""What the caller of each recorded error should hear, and what should become of the key.

design/errors.md decides; where the corpus judges otherwise, the reason stands here.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec
from google.rpc import code_pb2

from corpus.runner import Answer, Item, Run, unlike
from tokenwire_service.config import Config, Key
from tokenwire_service.errors import CODES, VERDICTS, Fault, KeyAction, RequestAction
from tokenwire_service.keyring import FIRST_COOLDOWN, FIRST_PROBE, JITTER, KeyRing, Lease
from tokenwire_service.secret import Secret
from tokenwire_service.upstream.classify import classify


class Told(NamedTuple):
    """What the caller hears, and after how many requests. `pushback`: -1, or to wait."""

    code: str
    reason: str
    details: frozenset[str] = frozenset()
    attempts: int = 1
    pushback: str = "-1"


CREDENTIALS_REJECTED = Told("FAILED_PRECONDITION", "UPSTREAM_CREDENTIALS_REJECTED")
RATE_LIMITED = Told(
    "RESOURCE_EXHAUSTED",
    "RATE_LIMITED",
    frozenset({"RetryInfo", "QuotaFailure"}),
    pushback="wait",
)
OVERLOADED = Told("UNAVAILABLE", "UPSTREAM_OVERLOADED", frozenset({"RetryInfo"}), attempts=3)
OVER_TIER = Told("RESOURCE_EXHAUSTED", "REQUEST_TOO_LARGE")
NOT_FOUND = Told("NOT_FOUND", "MODEL_NOT_FOUND", frozenset({"ResourceInfo"}))

# By the corpus' own class.
TOLD: Mapping[str, Told] = {
    "account_deactivated": CREDENTIALS_REJECTED,
    "auth_invalid_key": CREDENTIALS_REJECTED,
    "billing_or_quota_exhausted": Told(
        "RESOURCE_EXHAUSTED", "UPSTREAM_QUOTA_EXHAUSTED", frozenset({"QuotaFailure"})
    ),
    "billing_request_too_expensive": Told(
        "RESOURCE_EXHAUSTED", "UPSTREAM_QUOTA_EXHAUSTED", frozenset({"QuotaFailure"}), attempts=2
    ),
    "content_filter": Told("INVALID_ARGUMENT", "CONTENT_FILTERED"),
    "context_length_exceeded": Told("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED"),
    "endpoint_or_deployment_not_found": NOT_FOUND,
    "invalid_request": Told("INVALID_ARGUMENT", "INVALID_REQUEST"),
    "model_not_found": NOT_FOUND,
    "model_output_invalid": Told("UNAVAILABLE", "UPSTREAM_ERROR", attempts=2),
    "provider_overloaded": OVERLOADED,
    "rate_limit": RATE_LIMITED,
    "rate_limit_or_daily_quota": RATE_LIMITED,
    "rate_limit_shared_capacity": OVERLOADED,
    "rate_limit_suspect_delay": OVER_TIER,
    "request_exceeds_rate_tier": OVER_TIER,
    "server_error": Told("UNAVAILABLE", "UPSTREAM_ERROR", attempts=3),
}
# Items that are told in another way than their class.
TOLD_APART: Mapping[str, Told] = {
    # A wrong path rather than a wrong model: any 404 that does not name a model.
    "err-025-azure-404": Told("INVALID_ARGUMENT", "INVALID_REQUEST"),
    # It asks for 174 ms, which the deadline allows, until the attempts are used up.
    "err-101-openai-429": RATE_LIMITED._replace(attempts=3, pushback="-1"),
}
# Where it is not what the corpus suggests, and why.
ARGUED: Mapping[str, str] = {
    "model_output_invalid": "the provider's model failed by chance: that is neither a defect of "
    "the gateway (INTERNAL) nor a conflict of the caller's (ABORTED)",
    "err-025-azure-404": "a 404 that does not name a model cannot be told from a refused request",
    "err-104-azure-429": "Azure asks for a day when one request alone exceeds the limit: no wait "
    "helps it, and the key is fine for smaller ones",
}
# By the corpus' own word: how the key stands afterwards.
KEYS: Mapping[str, str] = {
    "cool_down": "cools",
    "cool_down_upstream": "cools with its upstream",
    "disable": "is retired",
    "disable_until_probe": "is retired until a probe",
    "keep": "serves",
    "keep (count for breaker)": "serves",
    "keep (mark key lacks model)": "serves",
    "keep key; cool upstream/model": "cools with its upstream",
}
KEYS_APART: Mapping[str, str] = {"err-104-azure-429": "serves"}
# The same as the table of verdicts says it.
KEY_ACTIONS: Mapping[str, frozenset[KeyAction]] = {
    "cool_down": frozenset({KeyAction.COOL_GROUP}),
    "cool_down_upstream": frozenset({KeyAction.COOL_UPSTREAM}),
    "disable": frozenset({KeyAction.RETIRE_KEY, KeyAction.RETIRE_GROUP}),
    "disable_until_probe": frozenset({KeyAction.RETIRE_GROUP}),
    "keep": frozenset({KeyAction.KEEP, KeyAction.NOTE_MODEL}),  # a deployment is a model
    "keep (count for breaker)": frozenset({KeyAction.KEEP}),
    "keep (mark key lacks model)": frozenset({KeyAction.NOTE_MODEL}),
    "keep key; cool upstream/model": frozenset({KeyAction.COOL_UPSTREAM}),
}
# By the corpus' own word: what becomes of the request.
REQUESTS: Mapping[str, RequestAction] = {
    "fail at once": RequestAction.FAIL,
    "fail at once on this tier; may try a key with a higher tier; never wait": (
        RequestAction.OTHER_GROUP
    ),
    "fail at once unless another key/upstream is known to serve it": RequestAction.KNOWN_KEY,
    "fail or other upstream": RequestAction.KNOWN_KEY,
    "optional one retry same key (sampling)": RequestAction.ONCE_MORE,
    "retry later or other upstream; other key of same provider gives nothing": (
        RequestAction.BACKOFF
    ),
    "retry same/other with backoff, within budget": RequestAction.BACKOFF,
    "retry_other_key": RequestAction.OTHER_KEY,
    "retry_other_key (other account)": RequestAction.OTHER_KEY,
    "retry_other_key (then other upstream); wait only if all keys cool and deadline allows": (
        RequestAction.OTHER_KEY
    ),
    "retry_other_key once; else fail": RequestAction.ONCE_MORE,
    "retry_same_or_other after backoff": RequestAction.BACKOFF,
}
REQUESTS_APART: Mapping[str, RequestAction] = {
    "err-025-azure-404": RequestAction.FAIL,
    "err-104-azure-429": RequestAction.OTHER_GROUP,  # another key, too, but only to a larger tier
}
# Of the accounts acme, acme and other, those whose keys are asked, at most three times; as the
# first to serve is chosen by turn, and each fails.
ASKED: Mapping[RequestAction, tuple[str, ...]] = {
    RequestAction.FAIL: ("k1",),
    RequestAction.KNOWN_KEY: ("k1",),
    RequestAction.OTHER_GROUP: ("k1", "k3"),
    RequestAction.OTHER_KEY: ("k1", "k3"),
    RequestAction.ONCE_MORE: ("k1", "k2"),
    RequestAction.BACKOFF: ("k1", "k2", "k3"),
}
ASKED_APART: Mapping[Fault | str, tuple[str, ...]] = {
    Fault.RATE_LIMITED: ("k1", "k3", "k2"),  # for which is waited
    "err-091-google-429": ("k1", "k3"),  # it asks for more time than there is
    Fault.KEY_REJECTED: ("k1", "k2", "k3"),  # the account of a rejected key may have good ones
}
# Seconds that a rate limit asks to wait; FIRST_COOLDOWN where it does not say.
DELAYS: Mapping[str, float] = {"err-091-google-429": 34.4}
# Less than the shortest time that an unstated rate limit cools: nothing waits for it.
TIMEOUT_SECONDS = 0.99
# Names of accounts and parts of keys, blacked out in the corpus or not.
SECRETS = re.compile(r"redacted|\borg[-_]\w|\b(ak|fk|sk)-\w")


def argued(item: Item) -> str | None:
    """The key of ARGUED for a recording that the corpus judges otherwise."""
    expected = item.data["expected"]
    if told(item).code in expected["grpc_code_suggestion"] and item.id not in KEYS_APART:
        return None
    return item.id if item.id in ARGUED else str(expected["class"])


def told(item: Item) -> Told:
    """What the caller should hear."""
    return TOLD_APART.get(item.id, TOLD[item.data["expected"]["class"]])


def stands(item: Item) -> str:
    """How the only key should stand afterwards."""
    return KEYS_APART.get(item.id, KEYS[item.data["expected"]["key_action"]])


def classified(item: Item) -> Fault:
    """What the classifier alone makes of it."""
    headers = {name.lower(): values[0] for name, values in (item.data["headers"] or {}).items()}
    return classify(item.data["status"], headers, (item.data["body"] or "").encode()).fault


def misjudged(item: Item) -> list[str]:
    """Where the table's verdict on a recording is not the corpus' own."""
    expected, verdict = item.data["expected"], VERDICTS[classified(item)]
    key_actions = KEY_ACTIONS[expected["key_action"]]
    if item.id in KEYS_APART:
        key_actions = frozenset({KeyAction.KEEP})
    wrong = []
    if verdict.key not in key_actions:
        wrong.append(f"{item.id}: key: {verdict.key}")
    if verdict.request is not REQUESTS_APART.get(item.id, REQUESTS[expected["request_action"]]):
        wrong.append(f"{item.id}: request: {verdict.request}")
    if code_pb2.Code.Name(CODES[verdict.reason]) != told(item).code:
        wrong.append(f"{item.id}: code: {CODES[verdict.reason]}")
    return wrong


def asked(item: Item) -> tuple[str, ...]:
    """The keys that should be asked, of three in two accounts."""
    fault = classified(item)
    apart = ASKED_APART.get(item.id, ASKED_APART.get(fault))
    return apart or ASKED[VERDICTS[fault].request]


def with_accounts(config: Config, *groups: str) -> Config:
    """The same with a key for each of these quota groups, for every upstream."""
    keys = tuple(
        Key(id=f"k{i}", secret=Secret(f"sk-test-corpus-{i}"), quota_group=group)
        for i, group in enumerate(groups, 1)
    )
    upstreams = tuple(msgspec.structs.replace(each, keys=keys) for each in config.upstreams)
    return msgspec.structs.replace(config, upstreams=upstreams)


def standing(ring: KeyRing, model: str) -> str:
    """How the only key of a ring stands for a model."""
    now = time.monotonic()
    found = ring.lease(model, now)
    if isinstance(found, Lease):
        ring.release(found)
        return "serves"
    if found.until == math.inf:
        return "is retired"
    if found.fault is Fault.QUOTA_EXHAUSTED and found.until - now > FIRST_PROBE / 2:
        return "is retired until a probe"
    if found.fault is Fault.OVERLOADED:
        return "cools with its upstream"
    return "cools" if found.until - now < 60 else "cools for too long"


def differences(run: Run, got: Answer, ring: KeyRing) -> list[str]:
    """Where the caller hears something else, or the key stands otherwise; one line each."""
    return [f"{run.name}: {what}" for what in _differences(run, got, ring)]


def _differences(run: Run, got: Answer, ring: KeyRing) -> Iterator[str]:
    failure, wanted = got.failure, told(run.item)
    yield from unlike("key", standing(ring, run.name), stands(run.item))
    yield from unlike("events", got.events, [])
    if failure is None:
        yield "OK"
        return
    yield from unlike("code", failure.code.name, wanted.code)
    yield from unlike("reason", failure.reason, wanted.reason)
    yield from unlike("attempts", failure.metadata["attempts"], str(wanted.attempts))
    yield from unlike("status", failure.metadata["upstreamStatus"], str(run.item.data["status"]))
    details = set(failure.details) - {"BadRequest"}
    yield from unlike("details", details, {"ErrorInfo", *wanted.details})
    if wanted.pushback != "wait":
        yield from unlike("pushback", failure.pushback, wanted.pushback)
    else:
        seconds = failure.retry_seconds
        asked = DELAYS.get(run.item.id, FIRST_COOLDOWN)
        if not asked - TIMEOUT_SECONDS < seconds <= asked * (1 + JITTER):
            yield f"delay: got {seconds} s, asked for {asked} s"
        if not 0 < int(failure.pushback) - seconds * 1000 + 1 < 2:
            yield f"pushback: got {failure.pushback} ms beside {seconds} s"
    if found := SECRETS.search(failure.everything):
        yield f"an account or a key is named: {found[0]}"
