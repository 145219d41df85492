"""Which key serves: the invariants of the key ring under any order of calls, in virtual time."""

import math
from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import VERDICTS, Fault, KeyAction, UpstreamFault
from tokenwire_service.keyring import KeyRing, Lease, MinuteWindow, Spent, Unavailable
from tokenwire_service.secret import Secret

CAP = 3600.0  # seconds: no key stays away longer without a probe
JITTER = 1.1


def ring(*keys: Key, organizations: tuple[str, ...] = (), jitter: float = 0.0) -> KeyRing:
    upstream = Upstream(
        name="u", base_url="http://u/v1", keys=keys or keys_of(2), organizations=organizations
    )
    return KeyRing(upstream, random=lambda: jitter)


def keys_of(count: int, **settings: object) -> tuple[Key, ...]:
    return tuple(Key(id=f"k{i}", secret=Secret(f"s{i}"), **settings) for i in range(count))


def lease(of: KeyRing, now: float = 0.0, model: str = "m") -> Lease:
    found = of.lease(model, now)
    assert isinstance(found, Lease), found
    return found


def closed(of: KeyRing, now: float, model: str = "m") -> Unavailable:
    found = of.lease(model, now)
    assert isinstance(found, Unavailable), found
    return found


def fault(kind: Fault, retry_after: float | None = None) -> UpstreamFault:
    return UpstreamFault(kind, retry_after=retry_after)


def meet(of: KeyRing, kind: Fault, now: float, after: float | None = None, model: str = "m") -> str:
    """One request meets a fault; returns the id of its key."""
    taken = lease(of, now, model)
    of.fail(taken, fault(kind, after), now)
    of.release(taken)
    return taken.key.id


# --- every order of calls ---------------------------------------------------------------


class Ring(RuleBasedStateMachine):
    """Leases, verdicts and releases in any order, beside a record of what may be given out.

    The record knows of each closed scope only the soonest and the latest moment at which a probe
    may be let through, so it does not repeat the ring's own arithmetic.
    """

    KEYS = (
        Key(id="k1", secret=Secret("s1"), quota_group="g1"),
        Key(id="k2", secret=Secret("s2"), quota_group="g1"),
        Key(id="k3", secret=Secret("s3"), quota_group="g2", weight=2.0),
        Key(id="k4", secret=Secret("s4"), quota_group="g3"),
    )

    @initialize(jitter=st.floats(0, 1, exclude_max=True))
    def start(self, jitter: float) -> None:
        self.ring = ring(*self.KEYS, jitter=jitter)
        self.now = 1000.0
        self.live: list[Lease] = []
        self.soonest: dict[Hashable, float] = {}  # closed scopes alone
        self.latest: dict[Hashable, float] = {}
        self.closings: Counter[Hashable] = Counter()
        self.probe: dict[Hashable, Lease] = {}
        self.seen: dict[Lease, dict[Hashable, int]] = {}
        self.overloads: Counter[str] = Counter()
        self.serves: set[tuple[str, str]] = set()  # (key, model) that has answered
        self.uneven: set[str] = set()  # models that some key was found to lack
        self.outage = 0  # failures of the whole upstream in a row
        self.limited: set[tuple[str, str]] = set()  # groups whose concurrency is being found

    def scopes(self, key: Key, model: str) -> list[Hashable]:
        group = key.quota_group
        own = [("K", key.id), ("KM", key.id, model), ("G", group), ("GM", group, model)]
        return [*own, model, "whole upstream"]

    def may_be_full(self, key: Key, model: str) -> bool:
        """Whether its group may have found that it bears no more at once."""
        group = (key.quota_group, model)
        return group in self.limited and any(
            (held.key.quota_group, held.model) == group for held in self.live
        )

    def close(self, scope: Hashable, least: float, most: float) -> None:
        self.soonest[scope] = max(self.soonest.get(scope, 0.0), self.now + least)
        self.latest[scope] = max(self.latest.get(scope, 0.0), self.now + most * JITTER)
        self.closings[scope] += 1

    def probing(self, scope: Hashable) -> bool:
        return self.probe.get(scope) in self.live

    @rule(seconds=st.sampled_from([0.0, 0.04, 0.5, 1.0, 3.0, 30.0, 301.0, 3700.0, 4000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(model=st.sampled_from(["a", "b"]))
    def take(self, model: str) -> None:
        before = Counter(held.key.id for held in self.live)
        found = self.ring.lease(model, self.now)
        if isinstance(found, Unavailable):
            self.check_unavailable(found, model)
            return
        probed = [s for s in self.scopes(found.key, model) if s in self.soonest]
        for scope in probed:
            assert self.now >= self.soonest[scope], f"{scope} is closed (I6)"
            assert not self.probing(scope), f"{scope} is being probed (I7)"
            self.probe[scope] = found
        for key in self.KEYS:  # the least busy of those that are certainly open (I13)
            if self.may_be_full(key, model):
                continue
            if model in self.uneven and (key.id, model) not in self.serves:
                continue  # only the next best
            if model in self.uneven and (found.key.id, model) not in self.serves:
                assert any(scope in self.soonest for scope in self.scopes(key, model)), (
                    "a key that serves the model was passed over"
                )
                continue
            if not any(scope in self.soonest for scope in self.scopes(key, model)):
                assert before[found.key.id] / found.key.weight <= before[key.id] / key.weight, (
                    "a busier key was chosen"
                )
        self.live.append(found)
        self.seen[found] = {scope: self.closings[scope] for scope in probed}

    def check_unavailable(self, found: Unavailable, model: str) -> None:
        """Right to refuse only if every key is closed (I8, I9, I10), none beyond its cap (I7)."""
        assert found.until > self.now
        if found.fault is None:
            assert self.live, "busy, though nothing will ever be released"
        for key in self.KEYS:
            assert self.may_be_full(key, model) or any(
                self.now < self.latest[scope] or self.probing(scope)
                for scope in self.scopes(key, model)
                if scope in self.soonest
            ), f"{key.id} could serve"

    @precondition(lambda self: not self.live)
    @rule(model=st.sampled_from(["a", "b"]))
    def wait_for_the_soonest(self, model: str) -> None:
        found = self.ring.lease(model, self.now)
        if isinstance(found, Lease):
            self.ring.release(found)
        elif found.until < math.inf:
            self.now = found.until
            self.ring.release(lease(self.ring, self.now, model))

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def succeed(self, pick: int) -> None:
        held = self.live[pick % len(self.live)]
        self.ring.succeed(held)
        self.serves.add((held.key.id, held.model))
        for scope, closings in self.seen[held].items():
            if self.closings[scope] == closings and scope in self.soonest:
                del self.soonest[scope], self.latest[scope]
                if scope == held.model:
                    self.overloads[held.model] = 0
                if scope == "whole upstream":
                    self.outage = 0
        if held.model not in self.soonest:
            self.overloads[held.model] = 0
        if "whole upstream" not in self.soonest:
            self.outage = 0

    @precondition(lambda self: self.live)
    @rule(
        pick=st.integers(0, 99),
        kind=st.sampled_from(Fault),
        stated=st.sampled_from([None, 0.001, 2.0, 20.0, 3600.0, 1e9]),
    )
    def fail(self, pick: int, kind: Fault, stated: float | None) -> None:
        held = self.live.pop(pick % len(self.live))
        self.ring.fail(held, fault(kind, stated), self.now)
        self.ring.release(held)
        key, model = held.key, held.model
        asked = None if stated is None else min(stated, CAP)
        if kind is Fault.RATE_LIMITED:
            self.limited.add((key.quota_group, model))
        if kind in (Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.TIMEOUT):
            self.outage += 1
            if "whole upstream" in self.soonest or self.outage >= 10:
                self.close("whole upstream", 1.0, 30.0)
        match VERDICTS[kind].key:
            case KeyAction.COOL_GROUP:
                unstated = (CAP, CAP) if kind is Fault.DAILY_QUOTA else (1.0, 60.0)
                least, most = unstated if asked is None else (asked, asked)
                self.close(("GM", key.quota_group, model), least, most)
            case KeyAction.COOL_UPSTREAM:
                self.overloads[model] += 1
                if asked is not None:
                    self.close(model, min(asked, 60.0), min(asked, 60.0))
                elif model in self.soonest or self.overloads[model] >= 3:
                    self.close(model, 1.0, 10.0)
            case KeyAction.RETIRE_KEY:
                self.close(("K", key.id), math.inf, math.inf)
            case KeyAction.RETIRE_FOR_MODEL:
                self.close(("KM", key.id, model), CAP, CAP)
            case KeyAction.NOTE_MODEL:
                self.serves.discard((key.id, model))
                elsewhere = {other for other, served in self.serves if served == model}
                assert self.ring.served_elsewhere(held) == bool(elsewhere)
                if elsewhere:
                    self.uneven.add(model)
                    self.close(("KM", key.id, model), CAP, CAP)
            case KeyAction.RETIRE_GROUP if kind is Fault.QUOTA_EXHAUSTED:
                self.close(("G", key.quota_group), 300.0, CAP)
            case KeyAction.RETIRE_GROUP:
                self.close(("G", key.quota_group), math.inf, math.inf)

    @rule(model=st.sampled_from(["a", "b"]), failures=st.integers(8, 12))
    def nothing_works_for_a_while(self, model: str, failures: int) -> None:
        for _ in range(failures):
            before = len(self.live)
            self.take(model)
            if len(self.live) > before:
                self.fail(before, Fault.UNREACHABLE, None)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), times=st.integers(1, 2))
    def release(self, pick: int, times: int) -> None:
        held = self.live.pop(pick % len(self.live))
        for _ in range(times):
            self.ring.release(held)

    @invariant()
    def in_flight_is_leases_minus_releases(self) -> None:
        assert self.ring.in_flight == len(self.live)  # I11

    def teardown(self) -> None:
        for held in getattr(self, "live", []):
            self.ring.release(held)
            self.ring.release(held)
        if hasattr(self, "ring"):
            assert self.ring.in_flight == 0


TestAnyOrderOfCalls = Ring.TestCase
TestAnyOrderOfCalls.settings = settings(max_examples=150, stateful_step_count=40)


# --- turns ------------------------------------------------------------------------------


@given(keys=st.integers(1, 6), calls=st.integers(1, 60))
def test_equal_keys_take_turns(keys: int, calls: int) -> None:
    of, served = ring(*keys_of(keys)), Counter({f"k{i}": 0 for i in range(keys)})
    for _ in range(calls):
        taken = lease(of)
        of.release(taken)
        served[taken.key.id] += 1
        assert max(served.values()) - min(served.values()) <= 1


@given(keys=st.integers(1, 6), calls=st.integers(1, 60))
def test_calls_at_once_spread_evenly(keys: int, calls: int) -> None:
    of = ring(*keys_of(keys))
    held = Counter(lease(of).key.id for _ in range(calls))
    assert max(held.values()) - min(held.get(f"k{i}", 0) for i in range(keys)) <= 1


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.booleans())
def test_weights_share_the_traffic(weights: list[int], at_once: bool) -> None:
    of = ring(*(Key(id=f"k{i}", secret=Secret("s"), weight=w) for i, w in enumerate(weights)))
    served: Counter[str] = Counter()
    for _ in range(sum(weights) * 4):
        taken = lease(of)
        served[taken.key.id] += 1
        if not at_once:
            of.release(taken)
    assert [served[f"k{i}"] for i in range(len(weights))] == [4 * w for w in weights]


def test_a_key_that_returns_is_not_flooded() -> None:
    of = ring()
    away = meet(of, Fault.RATE_LIMITED, now=0.0, after=100.0)
    for _ in range(1000):
        other = lease(of, now=50.0)
        assert other.key.id != away
        of.release(other)
    served: Counter[str] = Counter()
    for _ in range(10):
        taken = lease(of, now=101.0)
        of.succeed(taken)
        of.release(taken)
        served[taken.key.id] += 1
    assert abs(served["k0"] - served["k1"]) <= 2, "1,000 turns are not made up for"


def test_organizations_take_turns_with_keys_that_have_none() -> None:
    of = ring(*keys_of(1), organizations=("o1", "o2", "o3"))
    paid = [lease(of).organization for _ in range(7)]
    assert paid == ["o1", "o2", "o3", "o1", "o2", "o3", "o1"]


@pytest.mark.parametrize(("keys", "organizations"), [(2, 2), (4, 2), (2, 4), (3, 3), (6, 4)])
def test_every_key_meets_every_organization_though_both_turns_run_in_step(
    keys: int, organizations: int
) -> None:
    names = tuple(f"o{i}" for i in range(organizations))
    of = ring(*keys_of(keys), organizations=names)
    met: Counter[tuple[str, str | None]] = Counter()
    for _ in range(5 * keys * organizations):
        taken = lease(of)
        met[taken.key.id, taken.organization] += 1
        of.release(taken)
    assert set(met.values()) == {5}
    assert len(met) == keys * organizations


def test_organizations_take_strict_turns_where_nothing_runs_in_step() -> None:
    of = ring(*keys_of(2), organizations=("o1", "o2", "o3"))
    assert [lease(of).organization for _ in range(9)] == ["o1", "o2", "o3"] * 3


def test_the_organization_of_a_key_is_its_own() -> None:
    of = ring(Key(id="k", secret=Secret("s"), organization="own"), organizations=("o1", "o2"))
    assert [lease(of).organization for _ in range(3)] == ["own"] * 3
    assert lease(ring()).organization is None


# --- who serves which model -------------------------------------------------------------


def served(of: KeyRing, model: str = "m", now: float = 0.0) -> str:
    """One request is answered; the id of its key."""
    taken = lease(of, now, model)
    of.succeed(taken)
    of.release(taken)
    return taken.key.id


def test_a_model_that_nobody_is_known_to_serve_is_remembered_of_no_key() -> None:
    of = ring()
    for _ in range(6):
        taken = lease(of)
        assert not of.served_elsewhere(taken)
        of.fail(taken, fault(Fault.MODEL_NOT_FOUND), 0.0)
        of.release(taken)
    assert {served(of) for _ in range(2)} == {"k0", "k1"}


def test_a_key_that_lacks_a_model_is_not_asked_for_it_again_where_another_serves_it() -> None:
    of = ring(*keys_of(3))
    assert served(of) == "k0"
    assert served(of, "other") == "k1"
    assert meet(of, Fault.MODEL_NOT_FOUND, now=0.0) == "k2"
    assert [served(of) for _ in range(4)] == ["k0"] * 4, "k1 is not known to serve it"
    assert {served(of, "other") for _ in range(6)} == {"k0", "k1", "k2"}, "it lacks only the one"


def test_a_key_that_may_lack_a_model_serves_where_no_better_one_can() -> None:
    of = ring(*keys_of(3))
    assert served(of) == "k0"
    assert meet(of, Fault.MODEL_NOT_FOUND, now=0.0) == "k1"
    assert meet(of, Fault.RATE_LIMITED, now=0.0, after=30.0) == "k0"
    assert served(of) == "k2"
    assert served(of, now=31.0) in {"k0", "k2"}


def test_a_key_that_gets_the_model_later_serves_it_after_an_hour() -> None:
    of = ring()
    assert served(of) == "k0"
    assert meet(of, Fault.MODEL_NOT_FOUND, now=0.0) == "k1"
    assert meet(of, Fault.KEY_REJECTED, now=0.0) == "k0"
    assert closed(of, now=1.0).fault is Fault.KEY_REJECTED, "what a caller hears first"
    assert served(of, now=CAP + 1) == "k1"


def test_a_model_that_its_provider_takes_away_is_told_to_callers_at_once() -> None:
    of = ring()
    assert {served(of), served(of)} == {"k0", "k1"}
    first = meet(of, Fault.MODEL_NOT_FOUND, now=0.0)
    assert {meet(of, Fault.MODEL_NOT_FOUND, now=0.0) for _ in range(3)} == {"k0", "k1"} - {first}


def test_a_renewed_key_may_serve_what_it_lacked() -> None:
    of = ring()
    assert served(of) == "k0"
    assert meet(of, Fault.MODEL_NOT_FOUND, now=0.0) == "k1"
    k0, _ = of.keys
    of.replace([k0, Key(id="k1", secret=Secret("renewed"))])
    assert meet(of, Fault.RATE_LIMITED, now=0.0) == "k0"
    assert served(of) == "k1"


def test_the_quota_of_a_day_is_asked_for_again_after_an_hour_by_one() -> None:
    of = ring(*keys_of(1))
    meet(of, Fault.DAILY_QUOTA, now=0.0)
    found = closed(of, now=CAP - 1)
    assert (found.until, found.fault) == (CAP, Fault.DAILY_QUOTA)
    lease(of, now=CAP)
    closed(of, now=CAP)
    lease(of, now=1.0, model="other")


def test_a_quota_of_a_day_says_nothing_of_how_many_requests_at_once_are_borne() -> None:
    of = ring(*keys_of(1))
    leases = [lease(of) for _ in range(10)]
    of.fail(leases[0], fault(Fault.DAILY_QUOTA, 1.0), 0.0)
    for each in leases:
        of.release(each)
    served(of, now=2.0)
    assert len([lease(of, now=2.0) for _ in range(10)]) == 10  # else one of them raises


def test_groups_to_avoid_are_passed_over() -> None:
    keys = keys_of(3)
    of = ring(*keys)
    avoid = frozenset({"k0", "k2"})
    assert {
        found.key.id
        for _ in range(4)
        if isinstance(found := of.lease("m", 0.0, avoid=avoid), Lease)
    } == {"k1"}
    nothing = of.lease("m", 0.0, avoid=avoid | {"k1"})
    assert isinstance(nothing, Unavailable)
    assert not nothing.worth_waiting(math.inf)


# --- what the provider says is left -----------------------------------------------------


def test_tokens_that_are_left_count_as_the_requests_they_are_enough_for() -> None:
    of = ring(*keys_of(1))
    first = lease(of)
    of.remaining(first, None, 100, 0.0)
    assert isinstance(of.lease("m", 0.0), Lease), "nobody knows yet what one costs"
    of.settle(first, 1000)
    second = lease(of)  # the third under way
    of.remaining(second, 50, 2500, 0.0)  # enough for two more
    assert [isinstance(of.lease("m", 0.0), Lease) for _ in range(3)] == [True, True, False]
    of.remaining(second, 1, 1_000_000, 0.0)
    closed(of, now=0.0)


def test_a_ring_without_keys_never_serves() -> None:
    assert KeyRing(Upstream(name="u", base_url="http://u", keys=())).lease("m", 0.0) == Unavailable(
        math.inf, Fault.KEY_REJECTED
    )


# --- how long ---------------------------------------------------------------------------

SHARED = keys_of(2, quota_group="g")


def blocked_for(of: KeyRing, now: float, model: str = "m") -> float:
    return closed(of, now, model).until - now


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("asked", "least"), [(0.3, 0.3), (20.0, 20.0), (3600.0, 3600.0), (86_400.0, CAP), (1e12, CAP)]
)
def test_a_stated_delay_is_kept_up_to_the_cap(asked: float, least: float, jitter: float) -> None:
    of = ring(*SHARED, jitter=jitter)
    meet(of, Fault.RATE_LIMITED, now=5.0, after=asked)
    assert blocked_for(of, 5.0) == pytest.approx(least * (1 + 0.1 * jitter))


def test_an_unstated_delay_doubles_with_every_failed_probe() -> None:
    of, now, waits = ring(*SHARED), 0.0, []
    for _ in range(8):
        meet(of, Fault.RATE_LIMITED, now)
        waits.append(blocked_for(of, now))
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_credit_is_asked_for_every_5_to_60_minutes() -> None:
    of, now, waits = ring(*SHARED), 0.0, []
    for _ in range(6):
        meet(of, Fault.QUOTA_EXHAUSTED, now)
        waits.append(blocked_for(of, now))
        now += waits[-1]
    assert waits == [300, 600, 1200, 2400, 3600, 3600]


@pytest.mark.parametrize(
    ("kind", "wait"), [(Fault.RATE_LIMITED, 1.0), (Fault.QUOTA_EXHAUSTED, 300.0)]
)
def test_requests_that_fail_together_count_once(kind: Fault, wait: float) -> None:
    of = ring(*SHARED)
    together = [lease(of) for _ in range(20)]
    for taken in together:
        of.fail(taken, fault(kind), now=3.0)
        of.release(taken)
    assert blocked_for(of, 3.0) == wait


def test_a_success_of_the_probe_ends_the_doubling() -> None:
    of = ring(*SHARED)
    meet(of, Fault.RATE_LIMITED, now=0.0)
    meet(of, Fault.RATE_LIMITED, now=1.0)
    probe = lease(of, now=3.0)
    of.succeed(probe)
    of.release(probe)
    meet(of, Fault.RATE_LIMITED, now=4.0)
    assert blocked_for(of, 4.0) == 1.0


def test_an_upstream_cools_from_the_third_overload_in_a_row() -> None:
    of, now, waits = ring(), 0.0, []
    for _ in range(2):
        meet(of, Fault.OVERLOADED, now)
    of.release(lease(of, now))
    for _ in range(6):
        meet(of, Fault.OVERLOADED, now)
        waits.append(blocked_for(of, now))
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 10, 10]


def test_a_success_between_overloads_begins_the_row_anew() -> None:
    of = ring()
    for _ in range(9):
        meet(of, Fault.OVERLOADED, now=0.0)
        meet(of, Fault.OVERLOADED, now=0.0)
        good = lease(of)
        of.succeed(good)
        of.release(good)


@pytest.mark.parametrize(("asked", "until"), [(7.0, 7.0), (60.0, 60.0), (1e6, 60.0)])
def test_one_overload_with_a_stated_delay_cools_every_key_for_that_model(
    asked: float, until: float
) -> None:
    of = ring()
    meet(of, Fault.OVERLOADED, now=0.0, after=asked)
    assert closed(of, 0.0) == Unavailable(until, Fault.OVERLOADED)
    assert lease(of, 0.0, model="other")


# --- what is closed to whom -------------------------------------------------------------


def test_a_rate_limit_closes_its_group_for_its_model_alone() -> None:
    of = ring(*SHARED, *keys_of(3)[2:])
    meet(of, Fault.RATE_LIMITED, now=0.0, after=9.0)
    assert {lease(of, 1.0).key.id for _ in range(5)} == {"k2"}
    assert {lease(of, 1.0, model="other").key.id for _ in range(6)} >= {"k0", "k1"}


def test_no_access_retires_one_key_for_one_model() -> None:
    of = ring(*SHARED)
    gone = meet(of, Fault.ACCESS_DENIED, now=0.0)
    assert {lease(of, 1.0).key.id for _ in range(4)} == {"k0", "k1"} - {gone}
    assert {lease(of, 1.0, model="other").key.id for _ in range(6)} == {"k0", "k1"}


@pytest.mark.parametrize("kind", [Fault.KEY_REJECTED, Fault.ACCOUNT_DEAD])
def test_a_retirement_never_lifts(kind: Fault) -> None:
    of = ring(*keys_of(1))
    meet(of, kind, now=0.0)
    assert closed(of, 1e9) == Unavailable(math.inf, kind)


def test_not_even_the_success_of_a_probe_lifts_a_retirement_that_came_meanwhile() -> None:
    of = ring(*keys_of(1))
    late = lease(of)
    meet(of, Fault.QUOTA_EXHAUSTED, now=0.0)
    probe = lease(of, now=400.0)
    of.fail(late, fault(Fault.ACCOUNT_DEAD), now=401.0)
    of.succeed(probe)
    of.release(probe)
    of.release(late)
    assert closed(of, 1e9) == Unavailable(math.inf, Fault.ACCOUNT_DEAD)


def test_a_late_answer_neither_frees_the_probe_nor_is_undone_by_it() -> None:
    of = ring(*keys_of(1))
    late = lease(of)
    meet(of, Fault.RATE_LIMITED, now=0.0, after=10.0)
    probe = lease(of, now=10.0)
    of.fail(late, fault(Fault.RATE_LIMITED, 5.0), now=11.0)
    of.release(late)
    assert closed(of, 20.0).until > 20.0  # the first probe is still under way
    of.succeed(probe)
    of.release(probe)
    assert closed(of, 15.0).until == 16.0


def test_a_late_answer_never_shortens_a_delay() -> None:
    of = ring(*keys_of(1))
    late = lease(of)
    meet(of, Fault.RATE_LIMITED, now=0.0, after=100.0)
    of.fail(late, fault(Fault.RATE_LIMITED, 1.0), now=1.0)
    assert closed(of, 1.0).until == 100.0


def test_others_wait_while_one_probes_and_go_on_as_soon_as_it_is_known() -> None:
    of = ring(*keys_of(1))
    meet(of, Fault.RATE_LIMITED, now=0.0, after=10.0)
    probe = lease(of, now=10.0)
    assert closed(of, 10.0) == Unavailable(math.inf, None), "busy until the probe is back"
    of.succeed(probe)  # though its stream still runs
    assert lease(of, now=10.0)


def test_a_probe_that_tells_nothing_leaves_its_place_to_the_next() -> None:
    of = ring(*keys_of(1))
    meet(of, Fault.RATE_LIMITED, now=0.0, after=10.0)
    of.release(lease(of, now=10.0))
    meet(of, Fault.REFUSED, now=10.0)
    assert lease(of, now=10.0)
    assert closed(of, 10.0) == Unavailable(math.inf, None)


def test_a_stream_that_breaks_after_its_success_is_still_judged() -> None:
    of = ring(*keys_of(1))
    taken = lease(of)
    of.succeed(taken)
    of.fail(taken, fault(Fault.KEY_REJECTED), now=1.0)
    of.release(taken)
    assert closed(of, 2.0).fault is Fault.KEY_REJECTED


def test_the_soonest_key_is_named_with_what_closed_it() -> None:
    of = ring()
    first = lease(of)
    second = lease(of)
    of.fail(first, fault(Fault.KEY_REJECTED), now=0.0)
    of.fail(second, fault(Fault.RATE_LIMITED, 30.0), now=0.0)
    assert closed(of, 1.0) == Unavailable(30.0, Fault.RATE_LIMITED)


# --- the limits of a key ----------------------------------------------------------------

steps = st.tuples(
    st.integers(0, 100).map(lambda half: half / 2),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(0, 12)),
)


@given(limit=st.integers(1, 20), steps=st.lists(steps, max_size=30))
def test_no_minute_holds_more_than_the_limit(
    limit: int, steps: list[tuple[float, int, int | None]]
) -> None:
    """Whatever is estimated and later corrected downwards, and for costs within the limit."""
    window, now = MinuteWindow(limit), 0.0
    spent: list[Spent] = []

    def total(ending: float) -> int:
        return sum(each.units for each in spent if ending - 60 < each.at <= ending)

    for pause, cost, corrected in steps:
        now += pause
        cost = min(cost, limit)
        opens = window.opens_at(now, cost)
        if opens > now:  # not a moment too early, nor too late
            assert total(now) + cost > limit
            assert total(opens) + cost <= limit
            assert max(e.at for e in spent if e.at + 60 <= opens) + 60 == opens
            now = opens
        spent.append(window.spend(now, cost))
        assert total(now) <= limit
        if corrected is not None:
            window.correct(spent[len(spent) // 2], min(corrected, spent[len(spent) // 2].units))


def test_a_request_above_the_whole_limit_goes_alone() -> None:
    window = MinuteWindow(10)
    assert window.opens_at(0.0, 1000) == 0.0
    window.spend(0.0, 1)
    assert window.opens_at(1.0, 1000) == 60.0


def test_requests_per_minute_of_a_key_are_kept() -> None:
    of = ring(*keys_of(1, requests_per_minute=2))
    for now in (0.0, 10.0):
        of.release(lease(of, now))
    assert closed(of, 20.0) == Unavailable(60.0, Fault.RATE_LIMITED)
    of.release(lease(of, 60.0))
    assert closed(of, 61.0).until == 70.0


def test_tokens_per_minute_go_by_the_estimate_until_the_cost_is_known() -> None:
    of = ring(*keys_of(1, tokens_per_minute=100))
    taken = of.lease("m", 0.0, tokens=80)
    assert isinstance(taken, Lease)
    assert isinstance(of.lease("m", 1.0, tokens=30), Unavailable)
    of.settle(taken, 60)
    assert isinstance(of.lease("m", 1.0, tokens=30), Lease)


def test_a_cost_that_is_known_late_gives_nothing_away() -> None:
    of = ring(*keys_of(1, tokens_per_minute=100))
    slow = of.lease("m", 0.0, tokens=100)
    assert isinstance(slow, Lease)
    assert isinstance(of.lease("m", 61.0, tokens=100), Lease)
    of.settle(slow, 1)  # its minute is over
    assert isinstance(of.lease("m", 62.0, tokens=1), Unavailable)


def test_requests_at_once_of_a_key_are_kept_and_a_release_makes_room() -> None:
    of = ring(*keys_of(2, in_flight=1))
    held = [lease(of), lease(of)]
    assert closed(of, 0.0).fault is None
    of.release(held[0])
    assert lease(of).key is held[0].key


# --- sticky -----------------------------------------------------------------------------


def sticky(of: KeyRing, name: str, now: float = 0.0) -> str:
    found = of.lease("m", now, sticky=name)
    assert isinstance(found, Lease)
    of.release(found)
    return found.key.id


def test_one_name_gets_one_key_and_many_names_get_all() -> None:
    first, second = ring(*keys_of(4)), ring(*reversed(keys_of(4)))
    chosen = {name: sticky(first, name) for name in map(str, range(200))}
    assert {name: sticky(first, name) for name in chosen} == chosen
    assert {name: sticky(second, name) for name in chosen} == chosen, "replicas agree"
    assert min(Counter(chosen.values()).values()) > 25
    assert len(set(chosen.values())) == 4


def test_a_key_that_fails_moves_only_its_own_names() -> None:
    of = ring(*keys_of(4))
    before = {name: sticky(of, name) for name in map(str, range(100))}
    gone = meet(of, Fault.KEY_REJECTED, now=0.0)
    after = {name: sticky(of, name) for name in before}
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {name for name in before if before[name] == gone}


def test_names_are_shared_by_weight() -> None:
    of = ring(*keys_of(1), Key(id="heavy", secret=Secret("s"), weight=3.0))
    chosen = Counter(sticky(of, str(i)) for i in range(2000))
    assert 1400 < chosen["heavy"] < 1600


# --- other keys -------------------------------------------------------------------------


def test_a_new_secret_opens_what_its_predecessor_closed_and_no_other() -> None:
    of = ring()
    rejected = {meet(of, Fault.KEY_REJECTED, now=0.0) for _ in range(2)}
    assert rejected == {"k0", "k1"}
    of.replace([Key(id="k0", secret=Secret("renewed")), keys_of(2)[1]])
    assert {lease(of).key.id for _ in range(3)} == {"k0"}


def test_a_key_that_left_finishes_what_it_does_and_is_leased_no_more() -> None:
    of = ring()
    held = [lease(of), lease(of)]
    of.replace(keys_of(1))
    assert {lease(of).key.id for _ in range(3)} == {"k0"}
    assert of.in_flight == 5
    for each in held:
        of.fail(each, fault(Fault.RATE_LIMITED), now=1.0)
        of.release(each)
    assert of.in_flight == 3


def test_a_key_that_stays_keeps_its_state() -> None:
    of = ring(*keys_of(1, requests_per_minute=1))
    taken = lease(of)
    of.replace(keys_of(1, requests_per_minute=1))
    assert of.in_flight == 1
    assert closed(of, 1.0).until == 60.0
    of.release(taken)


@pytest.mark.parametrize("key_id", ["k0", "new"])
def test_a_new_secret_may_be_of_an_account_that_has_credit(key_id: str) -> None:
    of = ring(*keys_of(2, quota_group="g"))
    meet(of, Fault.QUOTA_EXHAUSTED, now=0.0)
    of.replace(keys_of(2, quota_group="g"))
    assert closed(of, 1.0).fault is Fault.QUOTA_EXHAUSTED
    of.replace([Key(id=key_id, secret=Secret("other"), quota_group="g")])
    assert lease(of, 1.0).key.id == key_id


def test_a_probe_of_before_opens_nothing_that_was_closed_since() -> None:
    of = ring(*keys_of(1, quota_group="g"))
    meet(of, Fault.QUOTA_EXHAUSTED, now=0.0)
    probe = lease(of, now=400.0)
    of.replace(keys_of(2, quota_group="g"))  # one more: perhaps the account has credit
    meet(of, Fault.QUOTA_EXHAUSTED, now=401.0)
    of.succeed(probe)
    of.release(probe)
    assert closed(of, 402.0).fault is Fault.QUOTA_EXHAUSTED


def test_a_ring_inherits_what_is_known_of_the_keys_that_both_have_and_nothing_else() -> None:
    before = ring(*keys_of(3, requests_per_minute=1))
    assert {meet(before, Fault.KEY_REJECTED, 0.0), meet(before, Fault.RATE_LIMITED, 0.0, 50.0)} == {
        "k0",
        "k1",
    }
    probed = lease(before, 1.0)  # the only request of k2 in its minute
    renewed = Key(id="k1", secret=Secret("renewed"), requests_per_minute=1)
    first, _, third = keys_of(3, requests_per_minute=1)
    after = ring(first, renewed, third)
    after.inherit(before)
    assert lease(after, 2.0).key == renewed
    assert closed(after, 2.0) == Unavailable(61.0, Fault.RATE_LIMITED)
    assert lease(after, 61.0).key.id == "k2"
    before.release(probed)
    assert after.in_flight == 2


def test_a_rejected_key_that_comes_back_is_still_rejected() -> None:
    of = ring(*keys_of(1))
    meet(of, Fault.KEY_REJECTED, now=0.0)
    of.replace([Key(id="k0", secret=Secret("renewed"))])
    of.replace(keys_of(1))
    assert closed(of, 1.0).fault is Fault.KEY_REJECTED


# --- the whole upstream -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.TIMEOUT])
def test_an_upstream_that_only_fails_is_left_alone_for_a_while(kind: Fault) -> None:
    of = ring()
    for _ in range(9):
        meet(of, kind, now=0.0)
    good = lease(of)
    of.succeed(good)
    of.release(good)
    for _ in range(10):
        meet(of, kind, now=0.0)
    waits, now = [], 0.0
    for _ in range(7):
        waits.append(blocked_for(of, now, model="any"))
        now += waits[-1]
        meet(of, kind, now)
    assert waits == [1, 2, 4, 8, 16, 30, 30]


# --- bounds -----------------------------------------------------------------------------


def test_model_names_without_end_do_not_fill_the_memory() -> None:
    of = ring(*keys_of(1))
    for i in range(20_000):
        meet(of, Fault.RATE_LIMITED, now=float(10 * i), after=1.0, model=f"invented-{i}")
    assert repr(of).count("invented") < 2500


def test_rejected_keys_without_end_do_not_fill_the_memory() -> None:
    of = ring(*keys_of(1))
    for number in range(5_000):
        of.replace([Key(id="k0", secret=Secret(f"s{number}"))])
        meet(of, Fault.KEY_REJECTED, now=float(number))
    assert repr(of).count("key_rejected") < 1100
    assert closed(of, 5_000.0).fault is Fault.KEY_REJECTED


def test_a_scope_that_is_still_closed_is_never_forgotten() -> None:
    of = ring(*keys_of(1))
    meet(of, Fault.RATE_LIMITED, now=0.0, after=3600.0, model="closed")
    for i in range(5_000):
        meet(of, Fault.RATE_LIMITED, now=0.5 * i, after=0.1, model=f"invented-{i}")
    assert closed(of, 3599.0, model="closed").fault is Fault.RATE_LIMITED


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=40))
def test_no_secret_shows(text: str) -> None:
    secret = f"sk-{text}"
    of = ring(Key(id="k", secret=Secret(secret)), Key(id="l", secret=Secret(secret)))
    taken = lease(of)
    of.fail(taken, UpstreamFault(Fault.KEY_REJECTED, f"no such key {secret}"), now=0.0)
    shown = f"{of!r} {taken!r} {of.lease('m', 0.0)!r} {vars(of)!r} {vars(taken)!r}"
    assert secret not in shown
    assert "k: 1 in flight" in repr(of)
    assert "key_rejected" in repr(of)
