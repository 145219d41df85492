"""Who calls, and how much: identification, models, windows, the day's budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tokenwire_service.callers import Callers, Tenant
from tokenwire_service.config import Caller
from tokenwire_service.errors import GatewayError
from tokenwire_service.secret import Digest

DAY = 86_400.0


class Clock:
    """Monotonic and wall time, both moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall = 20_000 * DAY + 3600

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


def tenant(clock: Clock, **limits: int) -> Tenant:
    caller = Caller(name="a", **limits)
    return Tenant(caller, now=lambda: clock.now, clock=lambda: clock.wall)


def refused(call: Callable[[], object]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        call()
    return caught.value


def spend(who: Tenant, expected: int, real: int | None = None) -> None:
    with who.admitted(expected) as spending:
        if real is not None:
            spending.settle(real)


# --- who ------------------------------------------------------------------------------------


CALLERS = Callers(
    (
        Caller(name="a", tokens=(Digest.of("token-a1"), Digest.of("token-a2"))),
        Caller(name="b", tokens=(Digest.of("token-b1"),), certificates=("b.internal",)),
    )
)


@pytest.mark.parametrize(
    ("authorization", "certificate", "name"),
    [
        (["Bearer token-a1"], [], "a"),
        (["bearer token-a2"], [], "a"),
        (["Bearer token-b1"], [], "b"),
        (["Bearer token-a1"], ["b.internal"], "a"),  # a token that is brought decides
        ([], ["other", "b.internal"], "b"),
    ],
)
def test_who_is_known(authorization: list[str], certificate: list[str], name: str) -> None:
    assert CALLERS.identify(authorization, certificate).name == name


@pytest.mark.parametrize(
    ("authorization", "certificate"),
    [
        ([], []),
        ([], ["other"]),
        (["Bearer wrong"], ["b.internal"]),  # a wrong token is no reason to look further
        (["Bearer "], []),
        (["Bearer"], []),
        (["token-a1"], []),
        (["Basic token-a1"], []),
        (["Bearer token-a1", "Bearer token-a1"], []),
        (["Bearer token-a1 token-b1"], []),
        (["Bearer Digest(***)"], []),
    ],
)
def test_who_is_not(authorization: list[str], certificate: list[str]) -> None:
    error = refused(lambda: CALLERS.identify(authorization, certificate))
    assert error.reason_name == "CALLER_UNAUTHENTICATED"
    assert "token-a1" not in str(error)


def test_a_token_is_compared_with_every_callers_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("tokenwire_service.secret.hmac.compare_digest", compare_digest)
    assert CALLERS.identify(["Bearer token-a1"], ()).name == "a"
    refused(lambda: CALLERS.identify(["Bearer token-of-nobody"], ()))
    assert len(compared) == 2 * 3


def test_without_callers_everyone_is_one_tenant_without_limits() -> None:
    anyone = Callers(()).identify(["Bearer whatever"], [])
    assert anyone is Callers(()).identify([], []) or anyone.name == ""
    assert anyone.may_ask("any model")
    with anyone.admitted(10**9) as spending:
        spending.settle(1)


# --- what -----------------------------------------------------------------------------------


def test_models() -> None:
    who = Tenant(Caller(name="a", models=("fast", "qwen*")))
    assert [who.may_ask(m) for m in ("fast", "qwen3-8b", "qwen")] == [True, True, True]
    assert [who.may_ask(m) for m in ("Fast", "faster", "a-qwen", "")] == [False] * 4
    assert refused(lambda: who.check("gpt-4o")).reason_name == "CALLER_FORBIDDEN"


@pytest.mark.parametrize("name", ["gpt-4?", "m[12]", "[!a]*"])
def test_only_a_star_stands_for_other_characters(name: str) -> None:
    who = Tenant(Caller(name="a", models=(name,)))
    assert who.may_ask(name)
    assert [who.may_ask(m) for m in ("gpt-4o", "m1", "b")] == [False] * 3


# --- how much ---------------------------------------------------------------------------------


def test_chats_a_minute_are_exact() -> None:
    clock = Clock()
    who = tenant(clock, requests_per_minute=3)
    for _ in range(3):
        spend(who, 0)
        clock.pass_by(10)
    error = refused(lambda: spend(who, 0))
    assert error.reason_name == "CALLER_QUOTA_EXCEEDED"
    assert error.retry_after == pytest.approx(30)
    assert error.retry_helps
    clock.pass_by(30)
    spend(who, 0)
    refused(lambda: spend(who, 0))


def test_tokens_a_minute_are_corrected_by_what_they_really_were() -> None:
    clock = Clock()
    who = tenant(clock, tokens_per_minute=100)
    spend(who, 90, 10)
    spend(who, 90, 90)
    assert refused(lambda: spend(who, 1)).retry_after == pytest.approx(60)


def test_chats_at_once_end_with_their_block_whatever_ends_it() -> None:
    who = tenant(Clock(), in_flight=2)
    with ExitStack() as stack:
        stack.enter_context(who.admitted(0))
        stack.enter_context(who.admitted(0))
        assert refused(lambda: spend(who, 0)).retry_after is not None
    with pytest.raises(KeyError), who.admitted(0):
        raise KeyError
    for _ in range(5):
        spend(who, 0)


def test_the_days_budget_begins_anew_at_midnight_utc() -> None:
    clock = Clock()
    who = tenant(clock, tokens_per_day=100)
    spend(who, 5, 60)
    spend(who, 5, 60)  # the one that reaches it is the last
    assert refused(lambda: spend(who, 1)).retry_after == pytest.approx(23 * 3600)
    clock.pass_by(23 * 3600)
    spend(who, 1)


def test_a_chat_over_midnight_counts_for_the_day_it_began() -> None:
    clock = Clock()
    who = tenant(clock, tokens_per_day=100)
    clock.pass_by(22.9 * 3600)
    with who.admitted(10) as spending:
        clock.pass_by(3600)
        spending.settle(1000)
    spend(who, 1)


def test_a_clock_put_back_gives_nobody_a_second_budget() -> None:
    clock = Clock()
    who = tenant(clock, tokens_per_day=100)
    spend(who, 0, 200)
    clock.wall -= 2 * DAY
    refused(lambda: spend(who, 1))


def test_what_is_refused_counts_for_nothing() -> None:
    clock = Clock()
    who = tenant(clock, requests_per_minute=100, in_flight=1, tokens_per_day=10)
    with who.admitted(5):
        for _ in range(1000):
            refused(lambda: spend(who, 5))
    spend(who, 1)
