"""The key ring beside a slow, obvious model of itself, under any order of calls.

The model keeps every lease and every request of the last minute, and the simulation's `Book` keeps
what is closed by docs/errors.md. Without jitter it knows the ring's every answer exactly: which key
serves, or when which fault lets one serve again. Times are multiples of a quarter second, so that
no sum is rounded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation.book import Book, Holding, Scope, scopes_of
from simulation.history import Failed, Leased, Released, Replaced, Succeeded

from tokenwire_service.concurrency import AdaptiveLimit
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import KeyRing, Lease, Unavailable
from tokenwire_service.secret import Secret
from tokenwire_service.snapshot import State

UPSTREAM = "u"
PASSING = (Fault.RATE_LIMITED, Fault.DAILY_QUOTA, Fault.OVERLOADED)  # what is waited for
RETIRED = (
    Fault.KEY_REJECTED,
    Fault.ACCOUNT_DEAD,
    Fault.ACCESS_DENIED,
    Fault.QUOTA_EXHAUSTED,
    Fault.MODEL_NOT_FOUND,
)
MODELS = ("m", "n")

quarters = st.integers(0, 40).map(lambda n: n / 4)
hours = st.sampled_from([60.0, 300.0, 3600.0, 7200.0])
names = st.sampled_from(["k0", "k1", "k2", "k3"])
keys = st.lists(
    st.builds(
        lambda name, secret, group, weight, in_flight, requests, tokens: Key(
            id=name,
            secret=Secret(f"{name}-{secret}"),
            quota_group=group,
            weight=weight,
            in_flight=in_flight,
            requests_per_minute=requests,
            tokens_per_minute=tokens,
        ),
        names,
        st.integers(0, 1),
        st.sampled_from(["g0", "g1"]),
        st.sampled_from([1.0, 1.0, 2.0]),
        st.sampled_from([None, None, 1, 2]),
        st.sampled_from([None, None, 1, 3]),
        st.sampled_from([None, None, 100]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda key: key.id,
)


@dataclass(eq=False)
class Spending:
    """One request in a key's last minute."""

    at: float
    tokens: int


class Model:
    """What the ring must answer."""

    def __init__(self) -> None:
        self.book = Book()
        self.requests: dict[Holding, list[Spending]] = {}  # while it has such a limit
        self.tokens: dict[Holding, list[Spending]] = {}
        self.spent: dict[Lease, Spending] = {}
        self.limits: dict[tuple[str, str], AdaptiveLimit] = defaultdict(AdaptiveLimit)
        self.costs: dict[tuple[str, str], float] = {}  # of a request, in tokens, on average
        self.served: dict[Holding, float] = {}  # turns taken, by weight
        self.turn = 0.0

    def replace(self, new: list[Key], now: float) -> None:
        self.book.replaced(Replaced(now, UPSTREAM, tuple(new)))
        for holding in self.book.holdings.values():
            self.served.setdefault(holding, self.turn)
            for spent, limit in (
                (self.requests, holding.key.requests_per_minute),
                (self.tokens, holding.key.tokens_per_minute),
            ):
                if limit is None:
                    spent.pop(holding, None)
                else:
                    spent.setdefault(holding, [])

    def together(self, key: Key, model: str) -> int:
        """Requests of the key's quota group for the model."""
        return sum(
            lease.key.quota_group == key.quota_group and lease.model == model
            for lease in self.book.leases
        )

    def verdict(
        self, key: Key, model: str, now: float, tokens: int, avoid: frozenset[str]
    ) -> Unavailable | None:
        """Why the key cannot serve now; None if it can."""
        if key.quota_group in avoid:
            return Unavailable(math.inf, Fault.OVER_TIER)
        holding = self.book.holdings[key.id]
        scopes = [self.book.scopes[s] for s in scopes_of(key, model) if s in self.book.scopes]
        waits = [(scope.until, scope.fault) for scope in scopes if scope.until > now]
        if key.requests_per_minute is not None:
            opens = fits(self.requests[holding], key.requests_per_minute, now, 1, count=True)
            waits += [(opens, Fault.RATE_LIMITED)] if opens > now else []
        if key.tokens_per_minute is not None:
            opens = fits(self.tokens[holding], key.tokens_per_minute, now, tokens, count=False)
            waits += [(opens, Fault.RATE_LIMITED)] if opens > now else []
        if waits:
            until = max(at for at, _ in waits)
            return Unavailable(until, next(fault for at, fault in waits if at == until))
        if any(scope.until and scope.probe is not None for scope in scopes):
            return Unavailable(math.inf, None)
        running = self.together(key, model)
        if running and running + 1 > self.limits[key.quota_group, model].at(now):
            return Unavailable(now + 1.0, None)
        if key.in_flight is not None and self.book.running(key.id) >= key.in_flight:
            return Unavailable(math.inf, None)
        return None

    def verdicts(
        self, model: str, now: float, tokens: int, avoid: frozenset[str]
    ) -> list[tuple[Key, Unavailable | None]]:
        """Of every key."""
        keys = self.book.keys.values()
        return [(key, self.verdict(key, model, now, tokens, avoid)) for key in keys]

    def answer(
        self, model: str, now: float, tokens: int, avoid: frozenset[str]
    ) -> list[Key] | Unavailable:
        """The keys that can serve, those known to serve the model if there are any; or what the
        ring must say if none can."""
        verdicts = self.verdicts(model, now, tokens, avoid)
        free = [key for key, verdict in verdicts if verdict is None]
        closed = [verdict for _, verdict in verdicts if verdict is not None]
        if free:
            return [key for key in free if self.book.knows(key, model)] or free
        if any(verdict.fault is None for verdict in closed):
            return Unavailable(min(verdict.until for verdict in closed), None)
        passing = [verdict for verdict in closed if verdict.fault in PASSING]
        other = [verdict for verdict in closed if verdict.fault is not Fault.MODEL_NOT_FOUND]
        return min(passing or other or closed, key=lambda verdict: verdict.until)

    def rank(self, key: Key) -> tuple[float, float]:
        """The least busy for its weight, then whose turn it is."""
        turn = max(self.served[self.book.holdings[key.id]], self.turn)
        return self.book.running(key.id) / key.weight, turn

    def leased(self, lease: Lease, now: float, tokens: int) -> None:
        key = lease.key
        holding = self.book.holdings[key.id]
        self.turn = max(self.served[holding], self.turn)
        self.served[holding] = self.turn + 1 / key.weight
        self.book.leased(Leased(now, UPSTREAM, lease, False))
        if key.requests_per_minute is not None:
            self.requests[holding].append(Spending(now, 1))
        if key.tokens_per_minute is not None:
            self.spent[lease] = Spending(now, tokens)
            self.tokens[holding].append(self.spent[lease])

    def failed(self, lease: Lease, fault: UpstreamFault, now: float) -> None:
        key = lease.key
        if fault.fault is Fault.RATE_LIMITED:
            together = max(lease.together, self.together(key, lease.model))
            self.limits[key.quota_group, lease.model].limited(together, lease.started, now)
        for name, least, _ in self.book.expected(Failed(now, UPSTREAM, lease, fault, [])):
            scope = self.book.scope(name)
            if now + least > scope.until:
                scope.until, scope.fault = now + least, fault.fault

    def succeeded(self, lease: Lease, now: float) -> None:
        opened = [
            (name, until, 0.0)
            for name, until in self.book.probing.get(lease, ())
            if name in self.book.scopes and self.book.scopes[name].until == until
        ]
        self.book.succeeded(Succeeded(now, UPSTREAM, lease, opened))
        running = self.together(lease.key, lease.model)
        self.limits[lease.key.quota_group, lease.model].borne(min(lease.together, running))

    def remaining(self, lease: Lease, requests: int | None, tokens: int | None, now: float) -> None:
        place = lease.key.quota_group, lease.model
        left = [] if requests is None else [requests]
        if tokens is not None and place in self.costs:
            left.append(int(tokens / self.costs[place]))
        if left:
            self.limits[place].remaining(min(left), self.together(lease.key, lease.model), now)

    def settled(self, lease: Lease, tokens: int) -> None:
        if lease in self.spent:
            self.spent[lease].tokens = tokens
        if tokens > 0:
            place = lease.key.quota_group, lease.model
            before = self.costs.get(place)
            self.costs[place] = tokens if before is None else before + (tokens - before) * 0.1

    def closures(self, key: Key, now: float) -> set[tuple[float, Fault | None, State, str | None]]:
        """What the ring must show as closed of the key itself and of its group."""
        names: list[tuple[Hashable, str | None]] = []
        for model in MODELS:
            own, own_for_model, group, group_for_model, *_ = scopes_of(key, model)
            names += [(own, None), (group, None), (own_for_model, model), (group_for_model, model)]
        scopes = [(self.book.scopes.get(name), model) for name, model in names]
        return {
            (scope.until, scope.fault, state_of(scope, now), model)
            for scope, model in scopes
            if scope is not None and scope.until
        }


def state_of(scope: Scope, now: float) -> State:
    """How far a closed scope is from serving again."""
    if scope.probe is not None:
        return State.PROBING
    if scope.until <= now:
        return State.PROBE_DUE
    return State.RETIRED if scope.fault in RETIRED else State.COOLING


def fits(spent: list[Spending], limit: int, now: float, cost: int, *, count: bool) -> float:
    """When so much fits into a minute; more than the limit fits into an empty one."""
    for at in [now, *sorted(s.at + 60.0 for s in spent if s.at + 60.0 > now)]:
        within = [s for s in spent if s.at > at - 60.0]
        used = len(within) if count else sum(s.tokens for s in within)
        if used + min(cost, limit) <= limit:
            return at
    return now + 60.0


class KeyRingMachine(RuleBasedStateMachine):
    """Every method of the ring in any order, each beside the model."""

    @initialize(new=keys)
    def begin(self, new: list[Key]) -> None:
        self.now = 1000.0
        upstream = Upstream(name=UPSTREAM, base_url="http://u/v1", keys=tuple(new))
        self.ring = KeyRing(upstream, random=lambda: 0.0)
        self.model = Model()
        self.model.replace(new, self.now)
        self.held: list[Lease] = []
        self.prefers: dict[tuple[str, str, float, str, float], bool] = {}

    @rule(
        model=st.sampled_from(MODELS),
        tokens=st.sampled_from([0, 30, 60, 500]),
        sticky=st.sampled_from(["", "", "", "s"]),
        avoid=st.sampled_from([(), (), (), ("g0",), ("g1",), ("g0", "g1")]).map(frozenset),
    )
    def lease(self, model: str, tokens: int, sticky: str, avoid: frozenset[str]) -> None:
        expected = self.model.answer(model, self.now, tokens, avoid)
        found = self.ring.lease(model, self.now, sticky=sticky, tokens=tokens, avoid=avoid)
        if isinstance(found, Unavailable):
            assert found == expected
            verdicts = self.model.verdicts(model, self.now, tokens, avoid)
            assert found.look_at == min(each.until for _, each in verdicts if each is not None)
            return
        assert isinstance(expected, list), f"{found.key.id} serves, though {expected}"
        assert found.key in expected
        if sticky:
            self._remember(sticky, found.key, expected)
        else:
            best = min(map(self.model.rank, expected))
            assert self.model.rank(found.key) == best
        self.model.leased(found, self.now, tokens)
        self.held.append(found)
        assert found.together == self.model.together(found.key, model)

    def _remember(self, sticky: str, chosen: Key, free: list[Key]) -> None:
        """A name likes one key better than another always or never, as long as they weigh the
        same: so it stays with its key, and goes to one other when that is closed."""
        for other in free:
            if other.id != chosen.id:
                pair = (chosen.id, chosen.weight, other.id, other.weight)
                assert self.prefers.setdefault((sticky, *pair), True)
                back = (other.id, other.weight, chosen.id, chosen.weight)
                assert not self.prefers.setdefault((sticky, *back), False)

    @rule(seconds=quarters | hours)
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        kind=st.sampled_from(Fault),
        after=st.sampled_from([None, None, 0.0, 2.0, 30.0, 1e6]),
    )
    def fail(self, data: st.DataObject, kind: Fault, after: float | None) -> None:
        lease = data.draw(st.sampled_from(self.held))
        fault = UpstreamFault(kind, retry_after=after)
        self.ring.fail(lease, fault, self.now)
        self.model.failed(lease, fault, self.now)
        assert self.ring.served_elsewhere(lease) == self.model.book.served_elsewhere(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), times=st.integers(1, 12), kind=st.sampled_from(Fault))
    def fail_in_a_row(self, data: st.DataObject, times: int, kind: Fault) -> None:
        for _ in range(times):
            self.fail(data, kind, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.held))
        self.ring.succeed(lease)
        self.model.succeeded(lease, self.now)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        requests=st.none() | st.integers(0, 3),
        tokens=st.none() | st.integers(0, 300),
    )
    def remaining(self, data: st.DataObject, requests: int | None, tokens: int | None) -> None:
        lease = data.draw(st.sampled_from(self.held))
        self.ring.remaining(lease, requests, tokens, self.now)
        self.model.remaining(lease, requests, tokens, self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), tokens=st.integers(0, 120))
    def settle(self, data: st.DataObject, tokens: int) -> None:
        lease = data.draw(st.sampled_from(self.held))
        self.ring.settle(lease, tokens)
        self.model.settled(lease, tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), again=st.booleans())
    def release(self, data: st.DataObject, again: bool) -> None:
        lease = data.draw(st.sampled_from(self.held))
        self.held.remove(lease)
        self.ring.release(lease)
        if again:
            self.ring.release(lease)
        self.model.book.released(Released(self.now, UPSTREAM, lease))

    @rule(new=keys)
    def replace(self, new: list[Key]) -> None:
        self.ring.replace(new)
        self.model.replace(new, self.now)

    @invariant()
    def what_is_in_flight_is_what_was_leased_and_not_released(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.in_flight == len(self.held)
            assert self.ring.keys == tuple(self.model.book.keys.values())
            former = self.model.book.former.items()
            known = {(key.id, key.secret) for key in self.ring.keys}
            known |= {name for name, holding in former if holding.leases}
            assert {(key.id, key.secret) for key in self.ring.known_keys} == known

    @invariant()
    def what_is_shown_is_what_is_so(self) -> None:
        if not hasattr(self, "ring"):
            return
        shown = self.ring.snapshot(self.now)
        book = self.model.book
        for key, view in zip(book.keys.values(), shown.keys, strict=False):
            assert (view.id, view.in_flight) == (key.id, book.running(key.id))
            own = {(c.until, c.fault, c.state, c.model) for c in view.closures}
            assert own == self.model.closures(key, self.now)
        leaving = [view for view in shown.keys[len(book.keys) :] if view.state is State.LEAVING]
        assert len(shown.keys) == len(book.keys) + len(leaving)
        known = {*book.holdings.values(), *book.former.values()}
        assert sum(v.in_flight for v in shown.keys) == sum(len(held.leases) for held in known)


KeyRingMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, derandomize=True, deadline=None
)
TestKeyRingBesideItsModel = pytest.mark.timeout(400)(KeyRingMachine.TestCase)
