"""The invariants of docs/invariants.md about what replicas share, judged from what happened alone.

Moments count as calm if Redis was there for every replica from a while before until a while after,
however often it had failed: what ADR 0016 promises holds then, with all that was taken meanwhile.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence

from simulation.replicas import (
    CALM,
    CANCELLED,
    FREE,
    LEASE,
    OK,
    TIMEOUT,
    Rpc,
    Sent,
    Shared,
    Told,
)

MINUTE = 60.0
# Seconds: for how long a replica may not know that Redis has gone, or is an empty one; and until it
# has told what it should, or is away again.
NOTICE = 1.0
LATE = 2 * TIMEOUT + 0.01  # by as much others hear of what has begun or ended
KNOWN = 1.0  # seconds until all know of a closed key
GROWTH = 1.1  # a closure that grows by less is not told again
REASONS = {
    OK,
    CANCELLED,
    "CALLER_QUOTA_EXCEEDED",
    "RATE_LIMITED",
    "DEADLINE_EXCEEDED",
}


def judge_shared(history: Shared) -> list[str]:
    """Every breach, each beginning with the number of its invariant. Empty when all hold."""
    rules = (
        i24_limits_hold_over_all_replicas,
        i24_each_replica_holds_them_alone,
        i24_nobody_is_refused_what_is_free,
        i25_nothing_is_held_at_rest,
        i26_others_leave_a_closed_key_alone,
        i27_no_chat_is_lost,
    )
    return [breach for rule in rules for breach in rule(history)]


def calm(history: Shared, since: float, until: float) -> bool:
    """Whether Redis was there all the time, as every replica knew, and had forgotten nothing."""
    around = (since - NOTICE, until + NOTICE)
    return not any(
        began < around[1] and around[0] < ended for each in history.away for began, ended in each
    ) and not any(around[0] - NOTICE < at < around[1] for at in history.flushes)


def i24_limits_hold_over_all_replicas(history: Shared) -> Iterator[str]:
    """What is admitted in a calm moment is within the limits, with what all have taken before, also
    while Redis was away."""
    window = MINUTE - LATE
    for name, rpcs in _by_caller(history).items():
        limits = history.callers[name]
        for i, rpc in enumerate(rpcs):
            at = rpc.admitted_at
            if not calm(history, at, at):
                continue
            recent = [r for r in rpcs[: i + 1] if r.admitted_at > at - window]
            running = [r for r in rpcs[: i + 1] if r.ended > at]
            tokens = sum(
                r.expected if r.ended >= at else r.real for r in recent if r is not rpc
            ) + min(rpc.expected, limits.tokens_per_minute or 0)
            for what, count, limit in (
                ("chats a minute", len(recent), limits.requests_per_minute),
                ("chats at once", len(running), limits.in_flight),
                ("tokens a minute", tokens, limits.tokens_per_minute),
            ):
                if limit is not None and count > limit:
                    yield f"I24: {name} has {count} {what} at {at:.3f}, {limit} are allowed"
    for secret, sent in _by_key(history).items():
        key = history.keys[secret]
        for i, one in enumerate(sent):
            if not calm(history, one.at, one.at):
                continue
            recently = sum(s.at > one.at - window for s in sent[: i + 1])
            at_once = sum(s.ended > one.at for s in sent[: i + 1])
            for what, count, limit in (
                ("requests a minute", recently, key.requests_per_minute),
                ("requests at once", at_once, key.in_flight),
            ):
                if limit is not None and count > limit:
                    yield f"I24: {secret} has {count} {what} at {one.at:.3f}, {limit} are allowed"


def i24_each_replica_holds_them_alone(history: Shared) -> Iterator[str]:
    """Whatever becomes of Redis, no replica lets through more than the limit by itself."""
    for name, rpcs in _by_caller(history).items():
        limit = history.callers[name].requests_per_minute
        for replica in range(len(history.away)):
            times = [r.admitted_at for r in rpcs if r.replica == replica]
            yield from _dense(f"{name} over {replica}", times, limit)
    for secret, sent in _by_key(history).items():
        limit = history.keys[secret].requests_per_minute
        for replica in range(len(history.away)):
            times = [s.at for s in sent if s.replica == replica]
            yield from _dense(f"{secret} over {replica}", times, limit)


def _dense(what: str, times: Sequence[float], limit: int | None) -> Iterator[str]:
    if limit is not None:
        for first, last in zip(times, times[limit:], strict=False):
            if last - first < MINUTE - LATE:
                yield f"I24: {what} has more than {limit} within a minute until {last:.3f}"


def i24_nobody_is_refused_what_is_free(history: Shared) -> Iterator[str]:
    """Who hears that so much is used up, has used it: nothing counts twice but reservations whose
    answer was lost, and those of an emptied Redis before that was noticed; and what has ended gives
    its place back."""
    admitted = {name: [r.admitted_at for r in rpcs] for name, rpcs in _by_caller(history).items()}
    unheard = defaultdict(list)
    for at, subject in history.unheard:
        unheard[subject].append(at)
    for rpc in history.rpcs:
        if rpc.outcome != "CALLER_QUOTA_EXCEEDED":
            continue
        limits, at = history.callers[rpc.caller], rpc.ended
        if "chats a minute" in rpc.error and limits.requests_per_minute is not None:
            lost = unheard[f"caller:{rpc.caller}"]
            span = MINUTE + LATE + 0.1
            used = _count(admitted.get(rpc.caller, []), at - span, at + LATE)
            used += _count(lost, at - span, at + LATE)
            for emptied in history.flushes:
                if at - span < emptied < at:
                    used += _count(admitted.get(rpc.caller, []), emptied - LATE, emptied + NOTICE)
            if used < limits.requests_per_minute:
                yield f"I24: {rpc} has used {used} of {limits.requests_per_minute}"
        if "chats at once" in rpc.error and limits.in_flight is not None:
            if not calm(history, at - LEASE, at):
                continue
            running = sum(
                r.began <= at and r.ended >= at - LATE
                for r in history.rpcs
                if r.caller == rpc.caller and r is not rpc
            )
            if running < limits.in_flight:
                yield f"I24: {rpc}, {running} run of {limits.in_flight}"


def i25_nothing_is_held_at_rest(history: Shared) -> Iterator[str]:
    """No lease is left, neither in Redis nor in a replica."""
    for what in history.at_rest:
        yield f"I25: at rest, {what}"


def i26_others_leave_a_closed_key_alone(history: Shared) -> Iterator[str]:
    """Within a second, once Redis is there for all; until its time is over."""
    sent = _by_key(history)
    for told in history.told:
        for one in sent.get(told.secret, ()):
            known = told.at + KNOWN < one.at < _over(told) and told.model in (None, one.model)
            if known and calm(history, one.at - KNOWN, one.at):
                yield (
                    f"I26: {told.secret} was used at {one.at:.3f} over {one.replica}, closed "
                    f"at {told.at:.3f} over {told.replica}"
                )


def _over(told: Told) -> float:
    """Until when others must know it to be closed."""
    return told.at + (told.until - told.at) / GROWTH - KNOWN


def known_elsewhere(history: Shared) -> int:
    """How many chats other replicas served, in calm moments, while they had a closed key."""
    return sum(
        told.at + KNOWN < rpc.admitted_at < _over(told)
        and rpc.replica != told.replica
        and told.secret.startswith(f"sk-{rpc.model}-")
        and calm(history, rpc.admitted_at - KNOWN, rpc.admitted_at)
        for told in history.told
        for rpc in history.rpcs
    )


def i27_no_chat_is_lost(history: Shared) -> Iterator[str]:
    """While Redis is away and `open`, no chat fails for that; and while `closed`, those alone who
    have limits, with a reason of their own."""
    for rpc in history.rpcs:
        limited = (rpc.caller != FREE, rpc.model == "limited")
        if rpc.outcome == "GATEWAY_OVERLOADED" and history.on_failure == "closed":
            said = "cannot be looked up" in rpc.error and any(limited)
            quiet = calm(history, rpc.ended - TIMEOUT, rpc.ended)
            if not said or quiet:
                yield f"I27: {rpc}"
            continue
        expected = REASONS
        if not limited[0]:
            expected = expected - {"CALLER_QUOTA_EXCEEDED"}
        if rpc.model == CALM:
            expected = expected - {"RATE_LIMITED", "DEADLINE_EXCEEDED"}
        if rpc.outcome not in expected:
            yield f"I27: {rpc}"
        if history.on_failure == "closed" and rpc.admitted_at < math.inf and limited[0]:
            at = rpc.admitted_at
            away = [(a, b) for a, b in history.away[rpc.replica] if a < at - LATE and at < b]
            if away:
                yield f"I27: {rpc} was admitted while Redis was away"


def _by_caller(history: Shared) -> dict[str, list[Rpc]]:
    """What was admitted, by time."""
    found: dict[str, list[Rpc]] = defaultdict(list)
    for rpc in sorted(history.rpcs, key=lambda r: r.admitted_at):
        if rpc.admitted_at < math.inf:
            found[rpc.caller].append(rpc)
    return found


def _by_key(history: Shared) -> dict[str, list[Sent]]:
    """What was sent, by time."""
    found: dict[str, list[Sent]] = defaultdict(list)
    for sent in history.sent:
        found[sent.secret].append(sent)
    return found


def _count(times: Sequence[float], first: float, last: float) -> int:
    return bisect_right(times, last) - bisect_left(times, first)
