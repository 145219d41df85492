"""The invariants of docs/invariants.md, judged from a history alone: one function for each.

A rule gets what it needs and yields a sentence for each breach. Rules about calls look at one call
after the other; rules about keys follow the key rings event by event beside a `Book` (book.py),
which keeps what the state of the keys must be by docs/errors.md. Nothing here is taken from the
gateway's own tables: the same numbers stand here again, as the documents promise them.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from simulation.book import Book, scopes_of
from simulation.history import (
    CANCELLED,
    DEFECT,
    OK,
    CallRecord,
    Denied,
    Failed,
    History,
    Leased,
    Released,
    Replaced,
    Request,
    Succeeded,
    Told,
)

from tokenwire_service.admission import Admission
from tokenwire_service.errors import Fault
from tokenwire_service.pool import Pool

EPSILON = 1e-6
LAST_WORDS = 1.0  # seconds after the deadline for what is held, to a caller who reads slowly
SECRET = "sk-secret-"
INTERRUPTED = "UPSTREAM_STREAM_INTERRUPTED"

# What docs/errors.md says of a request that met a fault, while nothing has been delivered.
CALLERS_MISTAKES = {
    Fault.CONTEXT_TOO_LONG,
    Fault.CONTENT_FILTERED,
    Fault.REFUSED,
    Fault.TOO_LARGE,
}
ONCE_MORE = {
    Fault.CREDIT_TOO_SMALL,
    Fault.STALE_CONNECTION,
    Fault.TIMEOUT,
    Fault.OUTPUT_INVALID,
    Fault.PROTOCOL,
    Fault.TRUNCATED,
}
OTHER_KEY = {
    Fault.KEY_REJECTED,
    Fault.ACCOUNT_DEAD,
    Fault.ACCESS_DENIED,
    Fault.RATE_LIMITED,
    Fault.DAILY_QUOTA,
    Fault.QUOTA_EXHAUSTED,
    Fault.OVER_TIER,  # of another group
    Fault.MODEL_NOT_FOUND,  # if another is known to serve the model
}
# Reasons after which the next model has its turn; MODEL_NOT_FOUND, since it is configured here.
FALL_OVER = {
    "RATE_LIMITED",
    "UPSTREAM_QUOTA_EXHAUSTED",
    "UPSTREAM_CREDENTIALS_REJECTED",
    "UPSTREAM_ACCESS_DENIED",
    "UPSTREAM_UNREACHABLE",
    "UPSTREAM_TIMEOUT",
    "UPSTREAM_OVERLOADED",
    "UPSTREAM_ERROR",
    "UPSTREAM_PROTOCOL_ERROR",
    "MODEL_NOT_FOUND",
    "GATEWAY_OVERLOADED",
}
# Whose timer ended a call, by the reason that it hears.
TIMERS = {
    "DEADLINE_EXCEEDED": {"deadline"},
    "CALLER_STALLED": {"write"},
    "UPSTREAM_TIMEOUT": {"first_byte", "idle", "total"},
}
# Ends of a call that its caller, or its time, brought about.
OWN_ENDS = {CANCELLED, "DEADLINE_EXCEEDED", "CALLER_STALLED"}
# What is said to a call without an upstream's doing.
GATEWAYS_OWN = {"GATEWAY_OVERLOADED", "GATEWAY_DRAINING", *OWN_ENDS}


def judge(history: History) -> list[str]:
    """Every breach, each beginning with the number of its invariant. Empty when all hold."""
    broken = [*history.seen]
    for rule in OF_THE_WORLD:
        broken += rule(history)
    of_keys = judge_keys(history)  # which tells the next what the keys were known to serve
    for call in history.calls:
        for judged in OF_CALLS:
            broken += judged(history, call)
    return broken + of_keys


# --- the world --------------------------------------------------------------------------


def i11_everything_is_given_back(history: History) -> Iterator[str]:
    """Leases and slots at rest; the rest of I11 is in `i11_leases_end_with_their_request`."""
    for what in history.at_rest:
        yield f"I11 I12: at rest, {what}"


def i5_retries_are_within_the_budget(history: History) -> Iterator[str]:
    """Retries never exceed the share of calls and the floor, over any window of time.

    As a bucket: each call that gets a slot adds its share, time adds the floor per 10 s, a retry
    takes one, when it is granted. The bucket holds at most what may pile up, so it never runs dry
    in any window, not only over all.
    """
    begun = [(call.slot_at, 0.0) for call in history.calls if call.slot_at < math.inf]
    taken: list[tuple[float, float]] = []
    for call in history.calls:
        before: dict[str, Request] = {}  # the last one to each upstream
        for request in call.requests:
            last_one = before.get(request.upstream)
            if last_one is not None and not _is_stale(last_one):
                taken.append((_decided_at(call, last_one, request), 1.0))
            before[request.upstream] = request
    floor = float(history.budget_floor)
    most = floor + 100.0 * history.budget
    level, last = floor, history.began
    for at, cost in sorted([*begun, *taken]):
        level = min(most, level + (at - last) * floor / 10.0 + (0.0 if cost else history.budget))
        last = at
        level -= cost
        if level < -EPSILON:
            yield f"I5: at {at:.3f} retries exceed the budget by {-level:.2f}"
            return


def _is_stale(request: Request) -> bool:
    """Whether it reached nobody: what follows is no retry."""
    return request.fault is not None and request.fault.fault is Fault.STALE_CONNECTION


def _decided_at(call: CallRecord, last: Request, request: Request) -> float:
    """When the retry `request` was granted: when the one before it failed; but where the call asked
    other models first, and only then went back to this one, that is when it did."""
    since = [(at, upstream) for at, upstream in call.refusals if last.closed_at <= at <= request.at]
    if any(upstream == request.upstream for _, upstream in since):
        return last.closed_at  # granted, and then there was no key
    others = [
        r.closed_at
        for r in call.requests
        if r.upstream != request.upstream and last.closed_at <= r.at <= request.at
    ]
    return max([last.closed_at, *others, *(at for at, _ in since)])


def i21_the_loop_is_never_busy_for_nothing(history: History) -> Iterator[str]:
    """Rounds of the loop are bounded by what happens. (vtime ends a loop that spins at once.)"""
    reads = sum(8 + 25 * len(call.requests) for call in history.calls)
    waits = sum(call.ended - call.began for call in history.calls if call.refusals)
    bound = 2000 + 4 * reads + 4 * len(history.ring) + 4 * waits
    if history.rounds > bound:
        yield f"I21: {history.rounds} rounds of the loop, {bound:.0f} are plenty"


OF_THE_WORLD: tuple[Callable[[History], Iterable[str]], ...] = (
    i11_everything_is_given_back,
    i5_retries_are_within_the_budget,
    i21_the_loop_is_never_busy_for_nothing,
)

# --- calls ------------------------------------------------------------------------------


def i1_one_status_in_time(history: History, call: CallRecord) -> Iterator[str]:
    """It ends with one status, by its deadline or the server's maximum."""
    if not call.outcome or call.outcome == DEFECT:
        yield f"I1: {call.name} ended with {call.outcome or 'nothing'} {call.error}"
    until = after_stalls(history, call.deadline)
    if call.states or call.first_delta_at is not None:
        # What is held, and the last snapshots, may still be written for a second.
        latest = after_stalls(history, until + LAST_WORDS)
        until = latest if call.writing else max(until, min(call.last_write_at, latest))
    if call.ended > until + EPSILON:
        yield f"I1: {call.name} ended {call.ended - call.deadline:g} s after its deadline"
    upstreams = {upstream for _, upstream in call.refusals}
    timed = call.requests and call.about not in upstreams  # else the breaker tells what others met
    if call.outcome in TIMERS and timed and call.timer not in TIMERS[call.outcome]:
        yield f"I1: {call.name} ended {call.outcome} by the timer {call.timer!r}"


def i2_ok_is_proved(history: History, call: CallRecord) -> Iterator[str]:
    """OK only if the upstream proved that its answer is complete."""
    if call.outcome == OK and not (call.requests and call.requests[-1].complete):
        yield f"I2: {call.name} is OK, and its answer is not complete"


_ORDERS = {
    # Initials of: header, delta or snapshot, finish, trailer.
    "stream": (re.compile(r"hd?ft"), re.compile(r"(hd?f?t?)?")),
    "cumulative": (re.compile(r"hsft"), re.compile(r"(hs?f?t?)?")),
}
# Initials of: ready, streaming, ended; x for those of an error. Without text only an error that
# no retry helps is told by a snapshot.
_STATES = (re.compile(r"rs?e"), re.compile(r"(rs?(e|x)?|x)?"))


def i3_delivered_is_what_was_sent(history: History, call: CallRecord) -> Iterator[str]:
    """A beginning of what the upstream sent in the one attempt that was delivered, and all of it
    if OK; messages in the contract's order."""
    whole = call.requests[-1].text if call.requests else ""
    if call.outcome == OK and call.text != whole:
        yield f"I3: {call.name} is OK with {call.text!r} of {whole!r}"
    elif not whole.startswith(call.text):
        yield f"I3: {call.name} got {call.text!r}, which is no beginning of {whole!r}"
    if call.method in _ORDERS:
        order = _ORDERS[call.method][call.outcome != OK]
        if not order.fullmatch(call.kinds):
            yield f"I3: {call.name} got its messages in the order {call.kinds}"
    if call.method == "cumulative" and not _STATES[call.outcome != OK].fullmatch(call.states):
        yield f"I3: {call.name} got snapshots of the states {call.states}"


def i4_nothing_is_tried_after_the_first_delta(history: History, call: CallRecord) -> Iterator[str]:
    """After the first delta, no second request for the call."""
    if call.first_delta_at is not None:
        for request in call.requests:
            if request.at > call.first_delta_at:
                yield f"I4: {call.name} was sent again after its first delta"
        if sum(bool(r.words) and r.answered for r in call.requests[:-1]) and not call.requests[
            -1
        ].text.startswith(call.text):
            yield f"I4: {call.name} got text of two attempts"


def i5_attempts_are_bounded(history: History, call: CallRecord) -> Iterator[str]:
    """Requests to each upstream within the maximum; a connection that was stale is not counted,
    and followed by a fresh one, once."""
    counts: Counter[str] = Counter()
    stale: Counter[str] = Counter()
    for request in call.requests:
        route = f"{request.upstream} for {request.lease.model}"
        counts[route] += 1
        if stale[route] and not request.fresh:
            yield f"I5: {call.name} took a pooled connection again for {request}"
        if request.fault is not None and request.fault.fault is Fault.STALE_CONNECTION:
            stale[route] += 1
    for route, count in counts.items():
        if count > history.max_attempts + min(stale[route], 1):
            yield f"I5: {call.name} made {count} requests to {route}"


def i12_no_answer_outlives_its_call(history: History, call: CallRecord) -> Iterator[str]:
    """When a call has ended, or its caller left, its upstream answers are closed."""
    for request in call.requests:
        if request.closed_at > call.ended + EPSILON:
            yield f"I12: {call.name} has ended, and {request} is open"
    if call.left_at is not None and call.ended > after_stalls(history, call.left_at) + EPSILON:
        if call.outcome == CANCELLED:
            yield f"I12: {call.name} went on for {call.ended - call.left_at:g} s after its caller"
    elif call.outcome == CANCELLED and call.left_at is None:
        yield f"I1: {call.name} was cancelled by nobody"


def i14_delays_make_sense(history: History, call: CallRecord) -> Iterator[str]:
    """A caller is told to wait for no negative time, nor for longer than an hour and its jitter,
    unless the provider itself asked for more."""
    after = call.retry_after
    asked = [r.fault.retry_after or 0.0 for r in call.requests if r.fault is not None]
    if after is not None and not 0.0 <= after <= max([3600.0 * 1.1, *asked]):
        yield f"I14: {call.name} is told to wait {after:g} s"


def i16_no_key_shows(history: History, call: CallRecord) -> Iterator[str]:
    """Providers quote keys in their errors here; callers never see one."""
    if SECRET in call.error:
        yield f"I16: {call.name} was told a key: {call.error}"


def i17_usage_is_the_last_one_told(history: History, call: CallRecord) -> Iterator[str]:
    """The last that the upstream told in the attempt that was delivered; or, once text has been
    delivered, an estimate that says so."""
    last = call.requests[-1] if call.requests else None
    delivered = call.outcome == OK or bool(call.kinds)
    if last is None or not delivered:
        return
    if last.usage is not None:
        estimated = call.usage is not None and call.usage.estimated
        if call.outcome != OK and call.usage is not None and estimated:
            # It was cut off: what came cost its estimate at least. Some may be held, unwritten.
            told, tokens = last.usage.completion_tokens, call.usage.completion_tokens
            least, most = (-(-len(text) // 4) for text in (call.text, last.text))
            if not max(told, least) <= tokens <= max(told, most):
                yield f"I17: {call.name} had {len(call.text)} bytes, it reports {call.usage}"
        elif call.usage is None or call.usage.total_tokens != last.usage.total_tokens:
            yield f"I17: {call.name} reports {call.usage}, the upstream said {last.usage}"
    elif call.method not in _ORDERS:
        if call.usage is not None:
            yield f"I17: {call.name} reports usage that nobody told"
    elif call.usage is None or not call.usage.estimated:
        yield f"I17: {call.name} reports {call.usage}, which is no estimate"
    elif call.usage.completion_tokens * 4 < len(call.text):
        yield f"I17: {call.name} had {len(call.text)} bytes, the estimate is {call.usage}"


def i18_nobody_else_ends_an_answer(history: History, call: CallRecord) -> Iterator[str]:
    """Whatever operators do meanwhile, a request runs until its provider, its caller or its time
    ends it. Reloads, drains and stalls end none."""
    for request in call.requests:
        if request.fault is None and not request.complete and call.outcome not in OWN_ENDS:
            at_maximum = call.ended >= call.deadline - EPSILON
            if not at_maximum and not _cut_off(history, call):
                yield f"I18 I22: {call.name} lost {request}, and nobody wanted that"


def i19_nobody_reads_ahead_of_the_caller(history: History, call: CallRecord) -> Iterator[str]:
    """While a write waits for the caller nothing is read, so nothing piles up."""
    if any(request.read_while_writing for request in call.requests):
        yield f"I19: {call.name} was read for while its caller did not read"


def i20_nobody_gives_up_too_soon(history: History, call: CallRecord) -> Iterator[str]:
    """A call that has delivered nothing fails only when the table, its attempts, the budget, the
    deadline or the keys say so; and not before every fallback was asked."""
    if call.outcome in GATEWAYS_OWN | {OK, INTERRUPTED} or call.kinds:
        return
    if call.ended >= call.deadline - EPSILON:
        return
    over_tier = [r for r in call.requests if r.fault and r.fault.fault is Fault.OVER_TIER]
    passed_on = call.outcome in FALL_OVER or (call.outcome == "REQUEST_TOO_LARGE" and over_tier)
    if passed_on and len(call.models) > 1 and set(call.tried) < set(call.models):
        yield f"I20: {call.name} was never tried with all of {call.models}"
    if call.full:
        return  # some upstream could not even be asked
    by_model: dict[str, list[Request]] = defaultdict(list)
    for request in call.requests:
        by_model[request.lease.model].append(request)
    for model, requests in by_model.items():
        last = requests[-1]
        refused = any(
            upstream == last.upstream and at >= last.closed_at - EPSILON
            for at, upstream in call.refusals
        )
        if not refused and not _may_stop(history, call, requests):
            yield f"I20: {call.name} gave up on {model} after {requests[-1]}"


def _may_stop(history: History, call: CallRecord, requests: Sequence[Request]) -> bool:
    last = requests[-1]
    fault = last.fault
    if fault is None:
        return True
    kind = fault.fault
    kinds = Counter(r.fault.fault for r in requests if r.fault is not None)
    counted = sum(kinds.values()) - kinds[Fault.STALE_CONNECTION]
    if fault.should_retry is False or (kind in CALLERS_MISTAKES and not fault.should_retry):
        return True
    unknown = kind is Fault.MODEL_NOT_FOUND and last.lease not in history.served_elsewhere
    if unknown and not fault.should_retry:
        return True
    if (kind in ONCE_MORE and kinds[kind] > 1) or last.retries_left < 1.0:
        return True
    if counted >= history.max_attempts:
        return True
    if kind in OTHER_KEY:
        return False  # a refusal would have been recorded
    if fault.retry_after is not None and len(call.models) > 1:
        return True  # nobody waits while there is another model to ask
    asked = min(fault.retry_after or 0.0, 3600.0)
    longest = max(asked, min(8.0, 0.25 * 2.0 ** (kinds[kind] - 1)))
    return last.closed_at + longest >= call.deadline - EPSILON


def i20_a_request_too_large_for_an_account_asks_the_others(
    history: History, call: CallRecord
) -> Iterator[str]:
    """Each quota group once, at once; it waits for none, since that may refuse it, too."""
    before: dict[str, Request] = {}  # the last one for each model
    too_large: dict[str, set[str]] = defaultdict(set)  # groups, by model
    for request in call.requests:
        model, group = request.lease.model, request.lease.key.quota_group
        if group in too_large[model]:
            yield f"I20: {call.name} asks again a group it is too large for, {request}"
        last = before.get(model)
        over_tier = last and last.fault and last.fault.fault is Fault.OVER_TIER
        if last and over_tier and request.at > after_stalls(history, last.closed_at) + EPSILON:
            yield f"I20: {call.name} waited for {request} since it was too large for {last}"
        before[model] = request
        if request.fault is not None and request.fault.fault is Fault.OVER_TIER:
            too_large[model].add(group)


def i20_the_error_is_about_the_model_asked_for(history: History, call: CallRecord) -> Iterator[str]:
    """Where all models fail, the caller hears of the one it asked for; unless a fallback said no
    to the request itself, in words that another model might not."""
    if len(call.models) < 2 or not call.about or call.outcome in GATEWAYS_OWN | {INTERRUPTED}:
        return
    last = call.requests[-1].fault if call.requests else None
    if last is not None and last.fault is Fault.CONTENT_FILTERED:
        return
    if call.ended >= call.deadline - EPSILON:
        return  # the server's maximum
    upstream = history.upstreams[call.models[0]]
    if call.about != upstream:
        yield f"I20: {call.name} asked for {call.models[0]} and hears of {call.about}"


def i22_a_drain_refuses_the_new_and_only_them(history: History, call: CallRecord) -> Iterator[str]:
    """What was accepted before goes on to its own end; what comes after hears so at once."""
    if call.while_draining != (call.outcome == "GATEWAY_DRAINING") and not (
        _cut_off(history, call) and call.outcome == "GATEWAY_DRAINING"
    ):
        yield f"I22: {call.name} began at {call.began:.3f} and ended {call.outcome}"
    if call.while_draining and call.ended > after_stalls(history, call.began) + EPSILON:
        yield f"I22: {call.name} was refused after {call.ended - call.began:g} s"
    over = after_stalls(history, history.closed_at)
    last_words = max(call.deadline, over + LAST_WORDS) if call.writing else call.last_write_at
    if call.ended > max(over, last_words, call.began) + EPSILON:
        yield f"I22: {call.name} went on for {call.ended - over:g} s after the grace of the drain"


def _cut_off(history: History, call: CallRecord) -> bool:
    """Whether the grace of the drain ended it."""
    return call.ended >= history.closed_at


OF_CALLS: tuple[Callable[[History, CallRecord], Iterable[str]], ...] = (
    i1_one_status_in_time,
    i2_ok_is_proved,
    i3_delivered_is_what_was_sent,
    i4_nothing_is_tried_after_the_first_delta,
    i5_attempts_are_bounded,
    i12_no_answer_outlives_its_call,
    i14_delays_make_sense,
    i16_no_key_shows,
    i17_usage_is_the_last_one_told,
    i18_nobody_else_ends_an_answer,
    i19_nobody_reads_ahead_of_the_caller,
    i20_nobody_gives_up_too_soon,
    i20_a_request_too_large_for_an_account_asks_the_others,
    i20_the_error_is_about_the_model_asked_for,
    i22_a_drain_refuses_the_new_and_only_them,
)


def after_stalls(history: History, at: float) -> float:
    """When something due at `at` could happen at the earliest: the process may have stood still."""
    for began, ended in history.stalls:
        if began <= at < ended:
            at = ended
    return at


# --- keys -------------------------------------------------------------------------------


def judge_keys(history: History) -> list[str]:
    """Follows the key rings: at each event first the rules, then the books."""
    books: dict[str, Book] = defaultdict(Book)
    broken: list[str] = []
    for event in history.ring:
        book = books[event.upstream]
        match event:
            case Leased():
                for at_lease in AT_LEASE:
                    broken += at_lease(book, event)
                book.leased(event)
            case Denied():
                broken += i20_no_key_is_open_when_all_are_said_to_be_closed(book, event)
            case Failed():
                lacks = event.fault.fault is Fault.MODEL_NOT_FOUND
                if lacks and book.served_elsewhere(event.lease):
                    history.served_elsewhere.add(event.lease)
                broken += i7_i8_i10_i14_a_fault_closes_what_it_should(book, event)
            case Succeeded():
                broken += i9_an_answer_closes_nothing(book, event)
                book.succeeded(event)
            case Told():
                broken += i9_little_that_is_left_closes_nothing(book, event)
                book.held_back.add((event.lease.key.quota_group, event.lease.model))
            case Released():
                broken += i11_leases_end_with_their_request(book, event)
                book.released(event)
            case Replaced():
                book.replaced(event)
        if len(broken) > 100:
            break
    for upstream, book in books.items():
        if book.leases:
            broken.append(f"I11: {upstream} has {len(book.leases)} leases that nobody gave back")
    return broken


def i6_closed_keys_are_not_used(book: Book, event: Leased) -> Iterator[str]:
    """No request with a retired key or a cooling group, model or upstream."""
    lease = event.lease
    for name in scopes_of(lease.key, lease.model):
        scope = book.scopes.get(name)
        if scope is not None and scope.until > event.at:
            yield f"I6: at {event.at:.3f} {lease.key.id} is used, {name[0]} is closed until " + (
                f"{scope.until:.3f}"
            )


def i7_one_probe_at_a_time(book: Book, event: Leased) -> Iterator[str]:
    """What was closed opens to one request, until that has an answer."""
    lease = event.lease
    for name in scopes_of(lease.key, lease.model):
        scope = book.scopes.get(name)
        if scope is not None and scope.until and scope.probe is not None:
            yield f"I7: at {event.at:.3f} {lease.key.id} is a second probe of its {name[0]}"


def i13_the_least_busy_key_is_taken(book: Book, event: Leased) -> Iterator[str]:
    """Of the keys that nothing holds back, one with the fewest requests for its weight; and one
    that is known to serve the model, where some key was found to lack it."""
    if event.sticky:
        return
    lease = event.lease
    busy = book.running(lease.key.id) / lease.key.weight
    known = book.knows(lease.key, lease.model)
    for key in book.keys.values():
        if key.quota_group in event.avoid or not book.untouched(key, lease.model):
            continue
        if not known and book.knows(key, lease.model):
            yield f"I13: at {event.at:.3f} {lease.key.id} is taken, {key.id} serves the model"
        fewer = book.running(key.id) / key.weight < busy - EPSILON
        if fewer and book.knows(key, lease.model) == known:
            yield f"I13: at {event.at:.3f} {lease.key.id} is taken, {key.id} is less busy"


def i18_a_removed_key_is_not_leased(book: Book, event: Leased) -> Iterator[str]:
    """A key that left, or its old secret, is leased no more."""
    key = event.lease.key
    if key.id not in book.keys or book.keys[key.id].secret != key.secret:
        yield f"I18: at {event.at:.3f} {key.id} is used, which was removed"


def i20_a_group_to_avoid_is_avoided(book: Book, event: Leased) -> Iterator[str]:
    """Who was told to be too large for a group gets a key of another."""
    if event.lease.key.quota_group in event.avoid:
        yield f"I20: at {event.at:.3f} {event.lease.key.id} is used by one too large for its group"


def limits_are_kept(book: Book, event: Leased) -> Iterator[str]:
    """Requests per minute exactly, and requests at once: docs/configuration.md promises them."""
    key = event.lease.key
    holding = book.holdings.get(key.id)
    if key.requests_per_minute is not None and holding is not None:
        within = [at for at in holding.recent or () if at > event.at - 60.0 + EPSILON]
        if len(within) + 1 > key.requests_per_minute:
            yield f"limits: at {event.at:.3f} {key.id} makes its {len(within) + 1}. in a minute"
    if key.in_flight is not None and book.running(key.id) + 1 > key.in_flight:
        yield f"limits: at {event.at:.3f} {key.id} has {book.running(key.id)} requests already"


AT_LEASE: tuple[Callable[[Book, Leased], Iterable[str]], ...] = (
    i6_closed_keys_are_not_used,
    i7_one_probe_at_a_time,
    i13_the_least_busy_key_is_taken,
    i18_a_removed_key_is_not_leased,
    i20_a_group_to_avoid_is_avoided,
    limits_are_kept,
)


def i20_no_key_is_open_when_all_are_said_to_be_closed(book: Book, event: Denied) -> Iterator[str]:
    """Whoever is sent away, or made to wait for what cools, could not have been served."""
    for key in book.keys.values():
        if key.quota_group in event.avoid:
            continue
        limited = key.requests_per_minute is not None or key.tokens_per_minute is not None
        if not limited and not book.closed(key, event.model, event.at):
            yield f"I20: at {event.at:.3f} {event.model} is told {event.found}, {key.id} is not"


def i7_i8_i10_i14_a_fault_closes_what_it_should(book: Book, event: Failed) -> Iterator[str]:
    """Exactly the scope of its row, for as long as the row says: no less than was asked for (I14),
    no more than the cap and its jitter (I7), nobody else's (I10), and nothing at all where the
    caller is to blame (I8)."""
    expected = {scope: (least, most) for scope, least, most in book.expected(event)}
    key, kind = event.lease.key.id, event.fault.fault
    rule = "I8" if kind in CALLERS_MISTAKES else "I10"
    for name, _, after in event.changes:
        if name not in expected:
            yield f"{rule}: at {event.at:.3f} {kind.value} of {key} changes {name}"
        book.scope(name).until = after
    changed = {name: (before, after) for name, before, after in event.changes}
    for name, (least, most) in expected.items():
        now = book.scope(name).until
        before, after = changed.get(name, (now, now))
        low, high = event.at + least - EPSILON, event.at + most + EPSILON
        if not (low <= after <= high or after == before >= low):
            yield (
                f"I7 I14: at {event.at:.3f} {kind.value} of {key} closes {name[0]} until "  # type: ignore[index]
                f"{after:.3f}, not between {low:.3f} and {high:.3f}"
            )
    if kind is Fault.RATE_LIMITED:
        book.held_back.add((event.lease.key.quota_group, event.lease.model))


def i9_an_answer_closes_nothing(book: Book, event: Succeeded) -> Iterator[str]:
    """A 2xx opens what it probed, and nothing else; unless that was closed again meanwhile."""
    opened = {
        scope
        for scope, until in book.probing.get(event.lease, ())
        if scope in book.scopes and book.scopes[scope].until == until  # else it was renewed
    }
    for scope, before, after in event.changes:
        if after > before:
            yield f"I9: at {event.at:.3f} an answer closes {scope}"
        elif scope not in opened:
            yield f"I6: at {event.at:.3f} an answer opens {scope}, which it did not probe"
    for scope in opened - {scope for scope, _, _ in event.changes}:
        yield f"I7: at {event.at:.3f} a probe was answered, and {scope} stays closed"


def i9_little_that_is_left_closes_nothing(book: Book, event: Told) -> Iterator[str]:
    """That few requests or tokens are left lowers how many run at once, and no more."""
    for scope, _, _ in event.changes:
        yield f"I9: at {event.at:.3f} what is left changes {scope}"


def i11_leases_end_with_their_request(book: Book, event: Released) -> Iterator[str]:
    """Each lease is given back, once."""
    if event.lease not in book.leases:
        yield f"I11: at {event.at:.3f} a lease of {event.lease.key.id} ends that never began"


# --- at a glance: what must hold at any moment -------------------------------------------


def at_a_glance(now: float, pools: Sequence[Pool], slots: Admission) -> list[str]:
    """At a moment when nothing else happens: nobody waits for what is free."""
    broken: list[str] = []
    for pool in pools:
        broken += i20_nobody_waits_for_a_key_that_is_free(pool, now)
        broken += i20_nobody_waits_for_a_slot_that_is_free(pool.bulkhead, now)
    broken += i20_nobody_waits_for_a_slot_that_is_free(slots, now)
    return broken


def i20_nobody_waits_for_a_key_that_is_free(pool: Pool, now: float) -> Iterator[str]:
    """A key that is free is had at once by the first in line for each model, and of those too
    large for the same groups (timers may be a moment late); a limit that grows with time is looked
    at every second. And nobody waits for what cannot come before the deadline (I21)."""
    ring: Any = pool.ring
    heads: dict[Any, Any] = {}
    for waiter in pool._waiting:
        if not waiter.turn.done():
            heads.setdefault((waiter.model, waiter.avoid), waiter)
    for (model, avoid), waiter in heads.items():
        closed = [
            ring._closed(state, model, at, waiter.tokens)
            for state in ring._keys
            if state.key.quota_group not in avoid
            for at in (now, now - 1.01)
        ]
        for found, before in zip(closed[::2], closed[1::2], strict=True):
            if found is None and before is None:
                yield f"I20: at {now:.3f} {model} waits for a key that is free"
        hopeless = all(
            each is not None and not each.worth_waiting(waiter.deadline) for each in closed
        )
        if hopeless and not ring.in_flight:  # else whoever gives a key back tells them
            yield f"I21: at {now:.3f} {model} waits for keys that come too late, or never"


def i20_nobody_waits_for_a_slot_that_is_free(slots: Admission, now: float) -> Iterator[str]:
    """Whoever leaves hands on its slot."""
    if slots.waiting and slots.in_flight < slots.slots:
        yield f"I20: at {now:.3f} {slots.waiting} wait for a slot, and one is free"
