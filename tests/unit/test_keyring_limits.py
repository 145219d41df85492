"""The key ring's bounds: per minute, at once, per prompt, per outage, and over a change of keys."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import MINUTE, KeyRing, Lease, MinuteWindow, Unavailable
from tokenwire_service.secret import Secret


def key(name: str = "k", secret: str = "", **limits: Any) -> Key:
    return Key(id=name, secret=Secret(secret or f"secret of {name}"), **limits)


def ring(*keys: Key) -> KeyRing:
    return KeyRing(Upstream(name="u", base_url="http://u", keys=keys), random=lambda: 0.0)


def lease(of: KeyRing, now: float = 0.0, model: str = "m", **needs: Any) -> Lease:
    found = of.lease(model, now, **needs)
    assert isinstance(found, Lease), found
    return found


def closed(of: KeyRing, now: float = 0.0, model: str = "m", **needs: Any) -> Unavailable:
    found = of.lease(model, now, **needs)
    assert isinstance(found, Unavailable), found
    return found


def fail(of: KeyRing, held: Lease, kind: Fault, now: float = 0.0) -> None:
    of.fail(held, UpstreamFault(kind), now)
    of.release(held)


def meet(of: KeyRing, kind: Fault, now: float = 0.0, model: str = "m") -> str:
    held = lease(of, now, model)
    fail(of, held, kind, now)
    return held.key.id


def use(of: KeyRing, now: float = 0.0, **needs: Any) -> str:
    held = lease(of, now, **needs)
    of.succeed(held)
    of.release(held)
    return held.key.id


# --- per minute -------------------------------------------------------------------------

# Seconds between events: some that add up to a minute exactly, and any others.
pauses = st.sampled_from([0.0, 0.1, 1.0, 15.0, 30.0, 59.9, 60.0]) | st.floats(0, 70)


def most_in_a_minute(spent: Sequence[tuple[float, int]]) -> int:
    """The largest sum within any 60 seconds, the end not included."""
    return max(
        (sum(units for at, units in spent if start <= at < start + MINUTE) for start, _ in spent),
        default=0,
    )


@given(limit=st.integers(1, 8), waits=st.lists(pauses, max_size=40))
def test_never_more_requests_than_allowed_in_any_minute(limit: int, waits: list[float]) -> None:
    of, now = ring(key(requests_per_minute=limit)), 1000.0
    served: list[tuple[float, int]] = []
    for wait in waits:
        now += wait
        found = of.lease("m", now)
        if isinstance(found, Lease):
            of.release(found)
            served.append((now, 1))
        else:
            recent = sum(at + MINUTE > now for at, _ in served)
            assert recent >= limit, "refused, though there was room"
            assert found == Unavailable(served[-limit][0] + MINUTE, Fault.RATE_LIMITED)
    assert most_in_a_minute(served) <= limit


@given(
    limit=st.integers(1, 100),
    script=st.lists(
        st.tuples(pauses, st.integers(0, 120), st.floats(0, 1), st.integers(0, 5)), max_size=40
    ),
)
def test_never_more_tokens_than_allowed_in_any_minute(
    limit: int, script: list[tuple[float, int, float, int]]
) -> None:
    """What a request costs is at most what was expected, and known some requests later. One that
    is larger than the limit has a minute for itself."""
    of, now = ring(key(tokens_per_minute=limit)), 1000.0
    costs: list[tuple[float, int]] = []
    answers: list[tuple[int, int, Lease]] = []  # (when, tokens, for whom)
    for step, (wait, expected, share, later) in enumerate(script):
        now += wait
        for _, cost, held in [each for each in answers if each[0] <= step]:
            of.settle(held, cost)
            of.release(held)
        answers = [each for each in answers if each[0] > step]
        found = of.lease("m", now, tokens=expected)
        if isinstance(found, Lease):
            costs.append((now, min(limit, int(expected * share))))
            answers.append((step + later, int(expected * share), found))
        else:
            assert now < found.until <= now + MINUTE
            assert found.fault is Fault.RATE_LIMITED
    assert most_in_a_minute(costs) <= limit


@given(
    limit=st.integers(1, 50),
    script=st.lists(st.tuples(pauses, st.integers(0, 60), st.integers(0, 60)), max_size=40),
)
def test_a_window_says_exactly_when_it_opens(
    limit: int, script: list[tuple[float, int, int]]
) -> None:
    window, now = MinuteWindow(limit), 1000.0
    for wait, cost, real in script:
        now += wait
        opens = window.opens_at(now, cost)
        if opens > now:
            assert window.opens_at(opens - 0.01, cost) > opens - 0.01
            now = opens
            assert window.opens_at(now, cost) == now
        window.correct(window.spend(now, cost), min(cost, real))


def test_what_was_not_used_is_given_back_as_of_then() -> None:
    of = ring(key(tokens_per_minute=100))
    first = lease(of, 0.0, tokens=100)
    assert closed(of, 10.0, tokens=1).until == 60.0
    of.settle(first, 40)
    of.release(lease(of, 50.0, tokens=60))
    assert closed(of, 59.0, tokens=1).until == 60.0
    of.release(lease(of, 60.0, tokens=40))  # the first 40 are a minute ago, and not the given 60
    assert closed(of, 60.0, tokens=1).until == 110.0


def test_what_was_used_beyond_the_estimate_counts() -> None:
    of = ring(key(tokens_per_minute=100))
    of.settle(lease(of, 0.0, tokens=10), 95)
    assert closed(of, 1.0, tokens=10).until == 60.0
    of.release(lease(of, 1.0, tokens=5))


def test_what_is_known_after_a_minute_changes_nothing_any_more() -> None:
    of = ring(key(tokens_per_minute=100))
    slow = lease(of, 0.0, tokens=100)
    of.release(lease(of, 60.0, tokens=60))
    of.settle(slow, 0)
    assert closed(of, 61.0, tokens=41).until == 120.0
    of.settle(slow, 5000)
    of.release(lease(of, 61.0, tokens=40))


def test_a_request_larger_than_the_limit_is_served_by_itself() -> None:
    of = ring(key(tokens_per_minute=100))
    of.release(lease(of, 0.0, tokens=1))
    assert closed(of, 1.0, tokens=5000).until == 60.0
    of.release(lease(of, 60.0, tokens=5000))
    assert closed(of, 61.0, tokens=1).until == 120.0


def test_each_key_has_a_window_of_its_own_and_those_without_have_none() -> None:
    of = ring(key("a", requests_per_minute=2), key("b", requests_per_minute=1), key("c"))
    served = Counter(use(of) for _ in range(20))
    assert served == {"a": 2, "b": 1, "c": 17}
    assert not ring(key("a")).counts_tokens
    assert ring(key("a"), key("b", tokens_per_minute=1)).counts_tokens


# --- at once ----------------------------------------------------------------------------


@given(
    limits=st.lists(st.none() | st.integers(1, 3), min_size=1, max_size=4),
    script=st.lists(st.none() | st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=40),
)
def test_a_key_never_has_more_requests_at_once_than_allowed(
    limits: list[int | None], script: list[tuple[str, int] | None]
) -> None:
    of = ring(*(key(f"k{n}", in_flight=limit) for n, limit in enumerate(limits)))
    held: list[Lease] = []
    for step in script:
        if step is None and held:
            of.release(held.pop(0))
        elif step is not None:
            model, _ = step
            found = of.lease(model, 0.0)
            busy = Counter(each.key.id for each in held)
            if isinstance(found, Lease):
                held.append(found)
                assert busy[found.key.id] < (found.key.in_flight or math.inf)
            else:
                assert found == Unavailable(math.inf, None), "it is only busy"
                assert all(limit and busy[f"k{n}"] >= limit for n, limit in enumerate(limits))


# --- by prompt --------------------------------------------------------------------------

PROMPTS = [f"prompt {n}" for n in range(2000)]


def homes(of: KeyRing) -> dict[str, str]:
    """Where each prompt goes."""
    return {prompt: use(of, sticky=prompt) for prompt in PROMPTS}


def test_a_prompt_stays_with_its_key_whatever_else_runs() -> None:
    of = ring(*(key(f"k{n}") for n in range(5)))
    home = use(of, sticky="p")
    for n in range(50):
        assert lease(of, sticky="p").key.id == home
        lease(of, sticky=f"other {n}")
        lease(of)


def test_a_prompt_falls_over_to_one_other_key_and_comes_back() -> None:
    of = ring(*(key(f"k{n}") for n in range(5)))
    home = use(of, sticky="p")
    held = lease(of, sticky="p")
    of.fail(held, UpstreamFault(Fault.RATE_LIMITED, retry_after=10.0), 0.0)
    of.release(held)
    second = {use(of, 5.0, sticky="p") for _ in range(20)}
    assert len(second) == 1
    assert second != {home}
    assert use(of, 10.0, sticky="p") == home


def test_every_replica_sends_a_prompt_to_the_same_key() -> None:
    keys = [key(f"k{n}") for n in range(5)]
    assert homes(ring(*keys)) == homes(ring(*reversed(keys)))


def test_when_a_key_leaves_only_its_prompts_move_and_when_one_comes_only_to_it() -> None:
    five = [key(f"k{n}") for n in range(5)]
    before, after = homes(ring(*five)), homes(ring(*five[1:]))
    moved = {prompt for prompt in PROMPTS if before[prompt] != after[prompt]}
    assert moved == {prompt for prompt in PROMPTS if before[prompt] == "k0"}
    spread = Counter(after[prompt] for prompt in moved)
    assert min(spread[f"k{n}"] for n in range(1, 5)) > len(moved) / 4 * 0.7


def test_prompts_are_shared_by_weight() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    share = Counter(homes(ring(*(key(name, weight=w) for name, w in weights.items()))).values())
    for name, weight in weights.items():
        assert share[name] / len(PROMPTS) == pytest.approx(weight / 8, abs=0.03)


def test_a_change_of_one_weight_moves_prompts_to_or_from_that_key_alone() -> None:
    others = [key("a"), key("b")]
    before, after = homes(ring(*others, key("c"))), homes(ring(*others, key("c", weight=3.0)))
    moved = [prompt for prompt in PROMPTS if before[prompt] != after[prompt]]
    assert moved
    assert {after[prompt] for prompt in moved} == {"c"}


# --- an outage --------------------------------------------------------------------------

OPENS_THE_BREAKER = {
    Fault.KEY_REJECTED: False,
    Fault.ACCOUNT_DEAD: False,
    Fault.ACCESS_DENIED: False,
    Fault.RATE_LIMITED: False,
    Fault.DAILY_QUOTA: False,
    Fault.QUOTA_EXHAUSTED: False,
    Fault.CREDIT_TOO_SMALL: False,
    Fault.OVER_TIER: False,
    Fault.OVERLOADED: False,
    Fault.SERVER_ERROR: True,
    Fault.UNREACHABLE: True,
    Fault.STALE_CONNECTION: False,
    Fault.TIMEOUT: True,
    Fault.CONTEXT_TOO_LONG: False,
    Fault.CONTENT_FILTERED: False,
    Fault.MODEL_NOT_FOUND: False,
    Fault.REFUSED: False,
    Fault.OUTPUT_INVALID: False,
    Fault.TOO_LARGE: False,
    Fault.PROTOCOL: False,
    Fault.TRUNCATED: False,
}


def test_every_fault_has_its_row() -> None:
    assert set(OPENS_THE_BREAKER) == set(Fault)


@pytest.mark.parametrize("kind", Fault)
def test_only_an_upstream_that_fails_opens_the_breaker(kind: Fault) -> None:
    of = ring(*(key(f"k{n}") for n in range(40)))
    for n in range(10):
        assert isinstance(of.lease("other", 0.0), Lease), f"closed after {n}"
        found = of.lease("m", 0.0)
        if isinstance(found, Lease):
            fail(of, found, kind)
    found = of.lease("other", 0.0)
    assert isinstance(found, Unavailable) is OPENS_THE_BREAKER[kind]
    if isinstance(found, Unavailable):
        assert found == Unavailable(1.0, kind)
        assert not found.worth_waiting(math.inf), "the next upstream is asked at once"


def test_faults_of_several_kinds_and_models_are_one_row() -> None:
    of = ring(key("a"), key("b"))
    for n in range(10):
        kind = (Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.TIMEOUT)[n % 3]
        meet(of, kind, model=f"m{n % 4}")
    assert closed(of).until == 1.0


def test_one_success_begins_the_row_anew() -> None:
    of = ring(key("a"), key("b"))
    for _ in range(5):
        for _ in range(9):
            meet(of, Fault.SERVER_ERROR)
        use(of, model="other")
    use(of)


def test_a_callers_mistake_neither_counts_nor_ends_the_row() -> None:
    of = ring(key("a"))
    for _ in range(9):
        meet(of, Fault.SERVER_ERROR)
        meet(of, Fault.REFUSED)
    use_of_it = lease(of)
    fail(of, use_of_it, Fault.SERVER_ERROR)
    assert closed(of).fault is Fault.SERVER_ERROR


def test_one_probe_asks_again_after_1_s_doubling_to_30() -> None:
    of, now, waits = ring(key("a"), key("b")), 0.0, []
    for _ in range(9):
        meet(of, Fault.SERVER_ERROR, now)
    for _ in range(8):
        probe = lease(of, now)
        if waits:
            assert closed(of, now) == Unavailable(math.inf, None), "one probe at a time"
        fail(of, probe, Fault.SERVER_ERROR, now)
        waits.append(closed(of, now).until - now)
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    use(of, now)
    for _ in range(9):
        meet(of, Fault.SERVER_ERROR, now)
    use(of, now)


def test_what_was_under_way_when_the_breaker_opened_does_not_count_again() -> None:
    of = ring(key("a"))
    together = [lease(of) for _ in range(40)]
    for held in together:
        fail(of, held, Fault.UNREACHABLE)
    assert closed(of).until == 1.0
    fail(of, lease(of, 1.0), Fault.UNREACHABLE, 1.0)
    assert closed(of, 1.0).until == 3.0


# --- other keys -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [Fault.KEY_REJECTED, Fault.ACCOUNT_DEAD, Fault.ACCESS_DENIED, Fault.QUOTA_EXHAUSTED]
)
def test_a_renewed_secret_serves_at_once_whatever_the_old_one_met(kind: Fault) -> None:
    of = ring(key(secret="old"))
    meet(of, kind)
    assert closed(of, 1.0).fault is kind
    of.replace([key(secret="new")])
    assert lease(of, 1.0).key.secret.reveal() == "new"


@pytest.mark.parametrize("kind", [Fault.KEY_REJECTED, Fault.ACCOUNT_DEAD, Fault.ACCESS_DENIED])
def test_what_an_old_secret_still_meets_is_not_held_against_the_new_one(kind: Fault) -> None:
    of = ring(key(secret="old"), key("sibling", quota_group="k"))
    late = [lease(of) for _ in range(2)]
    old = next(held for held in late if held.key.id == "k")
    of.replace([key(secret="new"), key("sibling", quota_group="k")])
    for held in late:
        if held is not old:
            of.release(held)
    fail(of, old, kind)
    assert {use(of, 1.0) for _ in range(4)} == {"k", "sibling"}


def test_a_dead_account_is_dead_for_the_secrets_it_had() -> None:
    of = ring(key("a", quota_group="g"), key("b", quota_group="g"), key("c", quota_group="other"))
    of.release(lease(of))
    assert meet(of, Fault.ACCOUNT_DEAD) in ("a", "b")
    assert {use(of) for _ in range(4)} == {"c"}
    renewed = [key("a", "new", quota_group="g"), key("b", quota_group="g")]
    of.replace(renewed)
    assert {use(of) for _ in range(4)} == {"a"}


def test_a_renewed_secret_is_still_bound_by_the_accounts_rate_limit() -> None:
    of = ring(key(secret="old"))
    held = lease(of)
    of.fail(held, UpstreamFault(Fault.RATE_LIMITED, retry_after=10.0), 0.0)
    of.release(held)
    of.replace([key(secret="new")])
    assert closed(of, 1.0) == Unavailable(10.0, Fault.RATE_LIMITED)


def test_a_removed_key_is_never_leased_again_and_ends_what_it_does() -> None:
    of = ring(key("a"), key("b"))
    held = {each.key.id: each for each in (lease(of), lease(of))}
    of.replace([key("b")])
    assert {use(of) for _ in range(6)} == {"b"}
    assert of.in_flight == 2
    of.succeed(held["a"])
    of.release(held["a"])
    of.release(held["b"])
    assert of.in_flight == 0


def test_a_rejected_key_that_goes_and_comes_is_still_rejected_unless_it_changed() -> None:
    of = ring(key("a"), key("b"))
    gone = meet(of, Fault.KEY_REJECTED)
    stays = ({"a", "b"} - {gone}).pop()
    of.replace([key(stays)])
    of.replace([key(stays), key(gone)])
    assert {use(of) for _ in range(4)} == {stays}
    of.replace([key(stays)])
    of.replace([key(stays), key(gone, "new")])
    assert {use(of) for _ in range(4)} == {"a", "b"}


@pytest.mark.parametrize(
    "changed",
    [{}, {"weight": 7.0}, {"organization": "o"}, {"secret": "new"}],
    ids=["nothing", "the weight", "the organization", "the secret"],
)
def test_a_key_that_stays_keeps_its_counts_whatever_changed_about_it(
    changed: dict[str, Any],
) -> None:
    limits: dict[str, Any] = {"quota_group": "g", "in_flight": 2, "requests_per_minute": 3}
    of = ring(key(**limits))
    held = [lease(of, 0.0), lease(of, 0.0)]
    of.replace([key(**limits, **changed)])
    assert closed(of, 1.0) == Unavailable(math.inf, None), "two at once"
    of.release(held.pop())
    of.release(lease(of, 2.0))
    assert closed(of, 3.0) == Unavailable(60.0, Fault.RATE_LIMITED), "three in a minute"
    of.release(held.pop())
    assert of.in_flight == 0


def test_limits_that_change_hold_for_what_was_already_spent() -> None:
    of = ring(key(requests_per_minute=5))
    for _ in range(3):
        use(of)
    of.replace([key(requests_per_minute=2)])
    assert closed(of, 1.0).until == 60.0
    of.replace([key()])
    use(of, 2.0)
    of.replace([key(in_flight=1)])
    held = lease(of, 3.0)
    assert closed(of, 3.0) == Unavailable(math.inf, None)
    of.release(held)


reloads = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["s1", "s2"]), st.booleans()),
    max_size=4,
    unique_by=lambda row: row[0],
)


@given(
    script=st.lists(
        st.tuples(
            st.floats(0, 90),
            st.none() | reloads,
            st.sampled_from([None, None, Fault.KEY_REJECTED, Fault.ACCOUNT_DEAD, Fault.REFUSED]),
        ),
        max_size=40,
    )
)
def test_over_any_change_of_keys_none_serves_that_is_gone_or_rejected(
    script: Iterable[tuple[float, list[tuple[str, str, bool]] | None, Fault | None]],
) -> None:
    of, now = ring(key("a", "s1")), 1000.0
    current = {("a", "s1")}
    rejected: set[tuple[str, str]] = set()
    held: list[Lease] = []
    for wait, keys, ends in script:
        now += wait
        if keys is not None:
            of.replace(
                [key(name, secret, in_flight=2 if few else None) for name, secret, few in keys]
            )
            current = {(name, secret) for name, secret, _ in keys}
        found = of.lease("m", now)
        usable = current - rejected
        if isinstance(found, Lease):
            who = (found.key.id, found.key.secret.reveal())
            assert who in usable
            held.append(found)
        elif found.fault is not None:
            assert not usable
        if held and ends is not None:
            first = held.pop(0)
            fail(of, first, ends, now)
            if ends in (Fault.KEY_REJECTED, Fault.ACCOUNT_DEAD):
                rejected.add((first.key.id, first.key.secret.reveal()))
        elif len(held) > 3:
            of.release(held.pop(0))
        assert of.in_flight == len(held)
