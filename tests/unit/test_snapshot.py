"""A ring seen from outside: what it shows is what it does, and looking changes nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import VERDICTS, Fault, KeyAction, UpstreamFault
from tokenwire_service.keyring import BREAKER_FAILURES, KeyRing, Lease, Unavailable
from tokenwire_service.secret import Secret
from tokenwire_service.snapshot import Closure, GroupView, KeyView, Scope, State, worst

KEYS = (
    Key(id="k1", secret=Secret("sk-Planted1"), quota_group="g1"),
    Key(id="k2", secret=Secret("sk-Planted2"), quota_group="g1"),
    Key(id="k3", secret=Secret("sk-Planted3"), quota_group="g2", weight=2.0),
)


def ring(*keys: Key) -> KeyRing:
    upstream = Upstream(name="u", base_url="http://u", keys=keys or KEYS)
    return KeyRing(upstream, random=lambda: 0.0)


def take(of: KeyRing, now: float = 0.0, model: str = "m") -> Lease:
    found = of.lease(model, now)
    assert isinstance(found, Lease)
    return found


def view(of: KeyRing, key_id: str, now: float = 0.0) -> KeyView:
    (found,) = (key for key in of.snapshot(now).keys if key.id == key_id)
    return found


def meet(of: KeyRing, fault: Fault, now: float = 0.0, after: float | None = None) -> str:
    lease = take(of, now)
    of.fail(lease, UpstreamFault(fault, retry_after=after), now)
    of.release(lease)
    return lease.key.id


def test_a_new_ring_is_ready() -> None:
    found = ring().snapshot(0.0)
    assert found.generation == 1
    assert found.closures == found.groups == ()
    assert found.keys[2] == KeyView("k3", "g2", 2.0, State.READY, 0, ())
    assert "Planted" not in repr(found)


WHAT_IT_SHOWS: dict[Fault, tuple[State, Scope, State, str | None]] = {
    # the key's state, then of the closure its scope, state and model
    Fault.KEY_REJECTED: (State.RETIRED, Scope.KEY, State.RETIRED, None),
    Fault.ACCOUNT_DEAD: (State.RETIRED, Scope.KEY, State.RETIRED, None),
    Fault.ACCESS_DENIED: (State.PARTLY, Scope.KEY_MODEL, State.RETIRED, "m"),
    Fault.RATE_LIMITED: (State.PARTLY, Scope.GROUP_MODEL, State.COOLING, "m"),
    Fault.DAILY_QUOTA: (State.PARTLY, Scope.GROUP_MODEL, State.COOLING, "m"),
    Fault.QUOTA_EXHAUSTED: (State.RETIRED, Scope.GROUP, State.RETIRED, None),
    Fault.OVERLOADED: (State.PARTLY, Scope.UPSTREAM_MODEL, State.COOLING, "m"),
}


def test_every_fault_that_closes_something_is_in_the_table() -> None:
    open_still = {KeyAction.KEEP, KeyAction.NOTE_MODEL}  # the latter has a case of its own
    closing = {fault for fault in Fault if VERDICTS[fault].key not in open_still}
    assert set(WHAT_IT_SHOWS) == closing


@pytest.mark.parametrize("fault", WHAT_IT_SHOWS)
def test_what_a_fault_closes_is_shown(fault: Fault) -> None:
    of = ring()
    met = meet(of, fault, 100.0, 30.0)
    state, scope, closed, model = WHAT_IT_SHOWS[fault]
    found = view(of, met, 100.0)
    assert found.state is state
    shown = (*found.closures, *of.snapshot(100.0).closures)
    assert [(each.scope, each.state, each.fault, each.model) for each in shown] == [
        (scope, closed, fault, model)
    ]
    assert shown[0].until > 100.0


def test_a_key_that_lacks_a_model_which_another_serves_is_shown() -> None:
    of = ring(KEYS[0], KEYS[2])
    serving = take(of)
    lacking = take(of)
    of.succeed(serving)
    of.fail(lacking, UpstreamFault(Fault.MODEL_NOT_FOUND), 0.0)
    (closure,) = view(of, lacking.key.id).closures
    assert (closure.scope, closure.state, closure.model) == (Scope.KEY_MODEL, State.RETIRED, "m")
    assert view(of, serving.key.id).state is State.READY


def test_a_key_of_the_same_group_shows_what_closes_the_group() -> None:
    of = ring()
    assert meet(of, Fault.RATE_LIMITED, 0.0, 30.0) == "k1"
    (closure,) = view(of, "k2").closures
    assert closure == Closure(Scope.GROUP_MODEL, State.COOLING, Fault.RATE_LIMITED, 30.0, "m")
    assert view(of, "k3").state is State.READY


def test_the_breaker_closes_all() -> None:
    of = ring()
    for _ in range(BREAKER_FAILURES):
        meet(of, Fault.SERVER_ERROR)
    found = of.snapshot(0.0)
    assert [(each.scope, each.state) for each in found.closures] == [
        (Scope.UPSTREAM, State.COOLING)
    ]
    assert {key.state for key in found.keys} == {State.COOLING}


def test_after_the_cooldown_a_probe_is_due_then_under_way_then_over() -> None:
    of = ring(KEYS[0])
    meet(of, Fault.QUOTA_EXHAUSTED, 0.0)
    until = view(of, "k1").closures[0].until
    assert view(of, "k1", until - 1).state is State.RETIRED
    assert view(of, "k1", until).state is State.PROBE_DUE
    lease = take(of, until)
    assert view(of, "k1", until).state is State.PROBING
    of.succeed(lease)
    of.release(lease)
    assert view(of, "k1", until).state is State.READY


@pytest.mark.parametrize("limits", [{"in_flight": 1}, {"requests_per_minute": 1}])
def test_a_key_at_its_own_limit_is_limited(limits: dict[str, int]) -> None:
    of = ring(Key(id="k", secret=Secret("s"), **limits))
    take(of)
    assert view(of, "k").state is State.LIMITED
    assert view(of, "k").in_flight == 1


def test_a_key_without_tokens_left_is_limited() -> None:
    of = ring(Key(id="k", secret=Secret("s"), tokens_per_minute=10))
    of.lease("m", 0.0, tokens=10)
    assert view(of, "k").state is State.LIMITED
    assert view(of, "k", 60.0).state is State.READY


def test_what_a_group_was_found_to_bear_is_shown() -> None:
    of = ring()
    leases = [take(of) for _ in range(6)]
    of.fail(leases[0], UpstreamFault(Fault.RATE_LIMITED, retry_after=1.0), 0.0)
    (one, other) = of.snapshot(0.0).groups
    group = leases[0].key.quota_group
    limited, free = (one, other) if one.quota_group == group else (other, one)
    running = sum(lease.key.quota_group == group for lease in leases)
    assert limited == GroupView(group, "m", running, (running - 1) * 0.7)
    assert free.limit == math.inf


def test_a_key_that_left_is_shown_until_its_last_call_ends() -> None:
    of = ring()
    lease = take(of)
    of.replace(KEYS[1:])
    found = of.snapshot(0.0)
    assert [(key.id, key.state, key.in_flight) for key in found.keys] == [
        ("k2", State.READY, 0),
        ("k3", State.READY, 0),
        ("k1", State.LEAVING, 1),
    ]
    assert found.generation == 2
    assert KEYS[0] in of.known_keys
    of.release(lease)
    assert [key.id for key in of.snapshot(0.0).keys] == ["k2", "k3"]
    assert KEYS[0] not in of.known_keys


def test_a_key_that_comes_back_while_in_use_has_its_state() -> None:
    limited = Key(id="k", secret=Secret("s"), in_flight=1, requests_per_minute=5)
    of = ring(limited)
    lease = take(of)
    of.replace(KEYS)
    of.replace([limited])
    assert isinstance(of.lease("m", 0.0), Unavailable)
    assert view(of, "k").state is State.LIMITED
    of.release(lease)
    assert take(of).key == limited


def test_a_renewed_secret_is_known_while_the_old_one_is_in_use() -> None:
    of = ring(KEYS[0])
    lease = take(of)
    renewed = Key(id="k1", secret=Secret("sk-new"), quota_group="g1")
    of.replace([renewed])
    assert of.known_keys == (renewed, KEYS[0])
    assert [key.id for key in of.snapshot(0.0).keys] == ["k1"]
    of.release(lease)
    of.replace([renewed])
    assert of.known_keys == (renewed,)


def test_what_came_and_went_leaves_nothing_behind() -> None:
    of = ring()
    lease = take(of)
    for number in range(5000):
        of.replace([Key(id="k1", secret=Secret(f"s{number}"))])
    of.release(lease)
    of.replace(KEYS)
    assert of.known_keys == KEYS
    assert not of._former


STATES = [
    ((), State.READY),
    ((State.PROBE_DUE,), State.PROBE_DUE),
    ((State.COOLING, State.PROBING), State.COOLING),
    ((State.COOLING, State.RETIRED), State.RETIRED),
]


@pytest.mark.parametrize(("states", "expected"), STATES)
def test_the_worst_counts(states: tuple[State, ...], expected: State) -> None:
    def closures(model: str | None) -> tuple[Closure, ...]:
        return tuple(Closure(Scope.KEY, each, None, 1.0, model) for each in states)

    assert worst(closures(None)) is expected
    assert worst(closures("m")) is (State.PARTLY if states else State.READY)


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, object, float]]:
    """What happens to a ring, and when."""
    kinds = st.sampled_from(["lease", "fail", "succeed", "release", "replace"])
    return [
        (
            draw(kinds),
            draw(st.sampled_from([*Fault])) if n % 2 else draw(st.integers(0, 7)),
            draw(st.sampled_from([0.0, 0.5, 20.0, 400.0, 4000.0])),
        )
        for n in range(draw(st.integers(0, 40)))
    ]


@given(steps())
def test_looking_changes_nothing_and_tells_what_a_lease_would_meet(
    script: list[tuple[str, object, float]],
) -> None:
    seen, unseen = ring(), ring()
    now = 0.0
    live: list[tuple[Lease, Lease]] = []
    for kind, detail, passes in script:
        now += passes
        found = seen.snapshot(now)
        if kind == "lease":
            for model in ("m", "n"):
                one, other = seen.lease(model, now), unseen.lease(model, now)
                assert type(one) is type(other)
                if isinstance(one, Lease) and isinstance(other, Lease):
                    assert one.key == other.key
                    live.append((one, other))
                    found = seen.snapshot(now)
                    continue
                assert one == other
                if isinstance(one, Unavailable) and one.fault is not None:
                    shut = {State.COOLING, State.RETIRED, State.PROBING}
                    for key in found.keys:
                        closures = (*key.closures, *found.closures)
                        for_model = [c.state for c in closures if c.model in (None, model)]
                        assert key.state is State.LEAVING or shut & set(for_model)
        elif kind == "replace":
            chosen = [
                key for n, key in enumerate(KEYS) if isinstance(detail, Fault) or detail >> n & 1
            ]
            for each in (seen, unseen):
                each.replace(chosen)
        elif live:
            for each, lease in zip((seen, unseen), live[0], strict=True):
                if kind == "succeed":
                    each.succeed(lease)
                elif kind == "fail" and isinstance(detail, Fault):
                    each.fail(lease, UpstreamFault(detail), now)
                each.release(lease)
            live.pop(0)
    for pair in live:
        for each, lease in zip((seen, unseen), pair, strict=True):
            each.release(lease)
    assert seen.in_flight == 0
    assert all(
        key.in_flight == 0 and key.state is not State.LEAVING for key in seen.snapshot(now).keys
    )
