"""Which key serves next: lease, release, cool, retire. No I/O, no clock, no lock, no await.

Every method decides at once on the state it finds, so nothing can come in between. Time is
handed in as `now`, monotonic seconds; jitter comes from `random`.

A key is closed by any of these scopes: itself (rejected), itself for one model (no access), its
quota group for one model (rate limited), its quota group (out of credit, dead), the upstream for
one model (the provider is full) and the upstream (its breaker: it fails or cannot be reached).
A block that runs out does not open the scope to everyone: one lease probes it, and what that
lease meets decides. Beside the blocks stand limits: a key's own requests and tokens per minute
and requests in flight, and the concurrency that its quota group was found to bear.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop

from tokenwire_service.concurrency import GROWTH, AdaptiveLimit
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import VERDICTS, Fault, KeyAction, UpstreamFault
from tokenwire_service.secret import Secret
from tokenwire_service.snapshot import Closure, GroupView, KeyView, RingView, Scope, State, worst

# Seconds. A rate limit without a stated delay starts at FIRST and doubles; the provider's own
# delay is honoured up to CAP, above which a probe asks again. docs/errors.md tells operators the
# same numbers.
FIRST_COOLDOWN = 1.0
COOLDOWN_CAP = 3600.0
UNSTATED_COOLDOWN_CAP = 60.0
OVERLOAD_COOLDOWN_CAP = 10.0
STATED_OVERLOAD_CAP = 60.0  # whoever is full cannot know for how long; it closes every key
OVERLOADS_BEFORE_COOLING = 3  # unless the provider states a delay: one 503 is no outage
FIRST_PROBE = 300.0
PROBE_CAP = 3600.0
JITTER = 0.1  # share added on top, so that replicas do not return in step
BREAKER_FAILURES = 10  # in a row, without one success between them
BREAKER_CAP = 30.0
MINUTE = 60.0
FORGET_AFTER = 3600.0  # a block that nobody has probed for so long tells nothing any more
_FORMER = 1000  # keys that are replaced but in use yet are remembered, the latest
_SWEEP_FROM = 1024  # blocks and groups; below that many, nothing is forgotten
_MOST_MODELS = 1024  # that a key is remembered to serve: callers may choose the names
_COST_SHARE = 0.1  # of the newest request in what one of its group costs
_PASSING = frozenset({Fault.RATE_LIMITED, Fault.DAILY_QUOTA, Fault.OVERLOADED})
_RETIRING = frozenset(
    {
        KeyAction.RETIRE_KEY,
        KeyAction.RETIRE_GROUP,
        KeyAction.RETIRE_FOR_MODEL,
        KeyAction.NOTE_MODEL,
    }
)
_BREAKER_FAULTS = frozenset({Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.TIMEOUT})


class MinuteWindow:
    """At most `limit` units in any 60 seconds, exactly: it remembers each."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._spent: deque[Spent] = deque()
        self._total = 0

    def opens_at(self, now: float, cost: int) -> float:
        """When `cost` units fit. A cost above the whole limit fits into an empty window."""
        while self._spent and self._spent[0].at <= now - MINUTE:
            self._total -= self._spent.popleft().units
        surplus = self._total + min(cost, self.limit) - self.limit
        if surplus <= 0:
            return now
        for spent in self._spent:
            surplus -= spent.units
            if surplus <= 0:
                return spent.at + MINUTE
        return now + MINUTE

    def spend(self, now: float, cost: int) -> Spent:
        """Takes `cost` units. An estimate may be corrected later."""
        spent = Spent(self, now, cost)
        self._spent.append(spent)
        self._total += cost
        return spent

    def correct(self, spent: Spent, cost: int) -> None:
        """Puts right what an estimate took, as of then."""
        if self._spent and spent.at >= self._spent[0].at:  # else it is over a minute ago
            self._total += cost - spent.units
            spent.units = cost


@dataclass(eq=False)
class Spent:
    """What one request took from a window."""

    window: MinuteWindow
    at: float
    units: int


@dataclass
class Block:
    """Why the scope at `place` is closed, and until when. Not blocked while `until` is 0."""

    place: Hashable
    until: float = 0.0
    strikes: int = 0
    fault: Fault | None = None
    probe: Lease | None = None

    def strike(self, now: float) -> int:
        """Counts a failure; returns how many there were in a row. Requests that were under way
        together count as one: the first of them closed the scope."""
        if self.until <= now:
            self.strikes += 1
        return self.strikes


@dataclass(frozen=True)
class Closed:
    """That a key, or its quota group, is closed: what one ring may tell another of it. `key`: who
    met it. `model`: None where for all. `until`: monotonic seconds, inf where nothing opens it."""

    scope: Scope
    key: Key
    model: str | None
    fault: Fault
    until: float
    strikes: int


@dataclass(frozen=True)
class _Shut:
    """That others have used up a key's own limits: for whoever needs `least` tokens or more."""

    until: float  # as it looks now: others may give some of it back
    ask_at: float  # when to ask for it again, at the latest `until`
    fault: Fault | None  # None: they use it now, and may end at any moment
    least: int


_OPEN = _Shut(0.0, 0.0, None, 0)


@dataclass
class _KeyState:
    key: Key
    requests: MinuteWindow | None
    tokens: MinuteWindow | None
    shut: _Shut = _OPEN
    in_flight: int = 0
    served: float = 0.0  # virtual time: grows by 1/weight per lease
    serves: set[str] = field(default_factory=set)  # models that it has answered for
    organizations: dict[str, int] = field(default_factory=dict)  # the turn each was met last


@dataclass
class _Group:
    """A quota group with one model: what runs, and what it bears."""

    in_flight: int = 0
    limit: AdaptiveLimit = field(default_factory=AdaptiveLimit)
    cost: float = 0.0  # tokens of a request, on average; 0 while unknown


@dataclass(eq=False)
class Lease:
    """The right to make one request with one key. `organization` is who pays, if named."""

    key: Key
    organization: str | None
    model: str
    started: float
    together: int  # with how many of its group it began, itself included
    spent: Spent | None  # of the key's tokens per minute
    asked: Spent | None  # of its requests
    state: _KeyState
    group: _Group
    # What it probes, each with the `until` it found: another one later means that an answer to
    # an older request has closed the scope again meanwhile.
    probes: list[tuple[Block, float]] = field(default_factory=list)
    live: bool = True


@dataclass(frozen=True)
class Unavailable:
    """No key can serve now.

    `until`: when the soonest may, inf if no time is known. `fault`: what closed it; None if it is
    only busy, with a probe or up to its limit, so that a release may open it at any moment.
    `look_at`: when the first of all keys may be asked again. Nobody waits for one that is retired
    or behind the breaker; but those who wait for another have it as soon as it opens.
    """

    until: float
    fault: Fault | None
    look_at: float = field(default=math.inf, compare=False)

    def worth_waiting(self, deadline: float) -> bool:
        """Whether a key may serve before `deadline`. A cooling one comes back by itself, a busy
        one when it is released; a retired one, or an upstream that fails, is not waited for."""
        return self.fault is None or (self.fault in _PASSING and self.until < deadline)


class KeyRing:
    """The keys of one upstream."""

    def __init__(self, upstream: Upstream, *, random: Callable[[], float] = random.random) -> None:
        self._keys: list[_KeyState] = []
        self._groups: dict[tuple[str, str], _Group] = {}
        self._leases = 0
        self._organizations = upstream.organizations
        self._turns = 0  # organizations handed out
        self._uneven: set[str] = set()  # models that some key lacks
        self._blocks: dict[Hashable, Block] = {}
        self._sweep_from = _SWEEP_FROM
        self._virtual_time = 0.0
        self._random = random
        # By id and secret, while in use yet: the state that counts it, and the key.
        self._former: dict[tuple[str, Secret], tuple[_KeyState, Key]] = {}
        self.generation = 0  # how often the keys were set
        self.tell: Callable[[Closed], None] | None = None  # of what other rings may want to know
        self.replace(upstream.keys)

    def __repr__(self) -> str:
        rows = ", ".join(f"{s.key.id}: {s.in_flight} in flight" for s in self._keys)
        closed = {str(k): b.fault.value for k, b in self._blocks.items() if b.until and b.fault}
        return f"KeyRing({rows}; closed: {closed})"

    @property
    def in_flight(self) -> int:
        """Leases not yet released."""
        return self._leases

    @property
    def keys(self) -> tuple[Key, ...]:
        """Those that may be leased."""
        return tuple(state.key for state in self._keys)

    @property
    def known_keys(self) -> tuple[Key, ...]:
        """Those that may be leased, and those that were and are in use yet: no text of the
        upstream may show any of them."""
        return (*self.keys, *(key for state, key in self._former.values() if state.in_flight))

    def organize(self, organizations: Sequence[str]) -> None:
        """Other organizations take turns from now on."""
        self._organizations = tuple(organizations)

    def replace(self, keys: Iterable[Key]) -> None:
        """Takes new keys, for instance after a secret was renewed. A key that stays keeps its
        state, whatever else changed about it, and so does one that comes back while it is still
        in use; a new secret has a clean record; a key that left is leased no more, while what it
        is doing goes on."""
        self.generation += 1
        before = {state.key.id: state for state in self._keys}
        former = self._former
        self._keys = []
        for key in keys:
            state = before.pop(key.id, None)
            if state is None:
                state, _ = former.pop((key.id, key.secret), (None, None))
            renewed = state is not None and state.key.secret != key.secret
            if state is None or renewed:  # perhaps of an account that has credit
                self._blocks.pop(("group", key.quota_group), None)
            if state is None:
                state = _KeyState(key, None, None, served=self._virtual_time)
            elif renewed:
                former[key.id, state.key.secret] = (state, state.key)
                state.serves.clear()
            state.key = key
            state.requests = window(state.requests, key.requests_per_minute)
            state.tokens = window(state.tokens, key.tokens_per_minute)
            self._keys.append(state)
        former |= {(s.key.id, s.key.secret): (s, s.key) for s in before.values()}
        in_use = [(name, each) for name, each in former.items() if each[0].in_flight]
        self._former = dict(in_use[-_FORMER:])
        self.counts_tokens = any(state.tokens is not None for state in self._keys)

    def inherit(self, before: KeyRing) -> None:
        """Takes over what another ring has found of the keys that both have: what closes them or
        their groups, and what they have used of their minutes."""
        known = {(state.key.id, state.key.secret): state for state in before._keys}
        places: set[Hashable] = set()
        others: set[Hashable] = set()
        for state in self._keys:
            key = state.key
            was = known.get((key.id, key.secret))
            if was is None:
                others.add(("group", key.quota_group))  # perhaps there is credit, as in `replace`
                continue
            places |= {("key", key.id, key.secret), ("group", key.quota_group)}
            state.requests = window(was.requests, key.requests_per_minute)
            state.tokens = window(was.tokens, key.tokens_per_minute)
        places -= others
        for place, block in before._blocks.items():
            assert isinstance(place, tuple)
            if place[:3] in places or place[:2] in places:
                self._blocks[place] = replace(block, probe=None)

    def lease(
        self,
        model: str,
        now: float,
        *,
        sticky: str = "",
        tokens: int = 0,
        avoid: frozenset[str] = frozenset(),
    ) -> Lease | Unavailable:
        """The best key for `model` outside the quota groups to `avoid`, or when to ask again.

        With `sticky` the same key as long as it can serve, since providers cache prompts per
        account: by rendezvous hashing, so that every replica chooses alike and a key that fails
        moves only its own. Otherwise least in flight by weight; among equals weighted round
        robin by virtual time, as in start-time fair queueing, so that a key that comes back is
        not flooded. `tokens` is what the request may cost, an estimate. Where some key was found
        to lack the model, those known to serve it go before the rest.
        """
        uneven = model in self._uneven
        all_closed: dict[int, Unavailable] = {}  # by the key's place
        ranked: list[tuple[bool, float, float, int]] = []
        for place, state in enumerate(self._keys):
            if avoid and state.key.quota_group in avoid:
                all_closed[place] = Unavailable(math.inf, Fault.OVER_TIER)
                continue
            unknown = uneven and model not in state.serves
            if sticky:
                ranked.append((unknown, -_affinity(sticky, state.key), 0.0, place))
                continue
            served = state.served if state.served > self._virtual_time else self._virtual_time
            ranked.append((unknown, state.in_flight / state.key.weight, served, place))
        # To rank a key takes less time than to see whether it is open, and the first mostly is:
        # a heap gives the next one only where it is asked for.
        heapify(ranked)
        while ranked:
            place = heappop(ranked)[-1]
            state = self._keys[place]
            closed = self._closed(state, model, now, tokens)
            if closed is None:
                return self._grant(state, model, now, tokens)
            all_closed[place] = closed
        return _soonest([all_closed[place] for place in sorted(all_closed)])

    def succeed(self, lease: Lease) -> None:
        """The key serves: what it probed is open again. Call before release; again does no harm."""
        if lease.key.secret == lease.state.key.secret:  # not renewed meanwhile
            if len(lease.state.serves) >= _MOST_MODELS:
                lease.state.serves.clear()
            lease.state.serves.add(lease.model)
        for block, until in lease.probes:
            if block.until == until:
                block.until, block.strikes, block.fault = 0.0, 0, None
        for scope in (("upstream", lease.model), ("upstream",)) if self._blocks else ():
            whole = self._blocks.get(scope)
            if whole is not None and not whole.until:
                whole.strikes = 0
                self._forget(whole)
        lease.group.limit.borne(min(lease.together, lease.group.in_flight))

    def served_elsewhere(self, lease: Lease) -> bool:
        """Whether another key is known to serve the model of a lease."""
        return any(lease.model in state.serves for state in self._keys if state is not lease.state)

    def remaining(self, lease: Lease, requests: int | None, tokens: int | None, now: float) -> None:
        """The provider says with its answer that so many `requests` and `tokens` are left in its
        window. Tokens count as the requests that they are enough for, once one is known to cost
        how many."""
        group = lease.group
        left = [requests] if requests is not None else []
        if tokens is not None and group.cost:
            left.append(int(tokens / group.cost))
        if left:
            group.limit.remaining(min(left), group.in_flight, now)

    def settle(self, lease: Lease, tokens: int) -> None:
        """What the request has really cost, once that is known; 0 if it was refused."""
        if lease.spent is not None:
            lease.spent.window.correct(lease.spent, tokens)
        if tokens > 0:
            group = lease.group
            group.cost += (tokens - group.cost) * (_COST_SHARE if group.cost else 1.0)

    def fail(self, lease: Lease, fault: UpstreamFault, now: float) -> None:
        """Applies the key's side of the verdict. Call before release."""
        action = VERDICTS[fault.fault].key
        key, model = lease.key, lease.model
        if fault.fault is Fault.RATE_LIMITED:
            together = max(lease.together, lease.group.in_flight)
            lease.group.limit.limited(together, lease.started, now)
        if action is KeyAction.COOL_GROUP:
            place: Hashable = ("group", key.quota_group, model)
            block = self._block(place)
            delay = _stated(fault, COOLDOWN_CAP)
            if delay is None and fault.fault is Fault.DAILY_QUOTA:
                delay = COOLDOWN_CAP  # whose midnight ends the day, the answer does not say
            elif delay is None:
                delay = _doubling(FIRST_COOLDOWN, UNSTATED_COOLDOWN_CAP, block.strike(now))
            self._close_told(place, key, fault, now, delay)
        elif action is KeyAction.COOL_UPSTREAM:
            block = self._block(("upstream", model))
            delay = _stated(fault, STATED_OVERLOAD_CAP)
            self._trip(block, fault, now, OVERLOADS_BEFORE_COOLING, OVERLOAD_COOLDOWN_CAP, delay)
        elif action is KeyAction.RETIRE_KEY:
            self._close_told(("key", key.id, key.secret), key, fault, now, math.inf)
        elif action is KeyAction.RETIRE_FOR_MODEL:
            self._close_told(("key", key.id, key.secret, model), key, fault, now, PROBE_CAP)
        elif action is KeyAction.NOTE_MODEL:
            self._note(lease, fault, now)
        elif action is KeyAction.RETIRE_GROUP and fault.fault is Fault.QUOTA_EXHAUSTED:
            place = ("group", key.quota_group)
            delay = _doubling(FIRST_PROBE, PROBE_CAP, self._block(place).strike(now))
            self._close_told(place, key, fault, now, delay)
        elif action is KeyAction.RETIRE_GROUP:
            for dead in self._account(lease):
                self._close_told(("key", dead.id, dead.secret), dead, fault, now, math.inf)
        elif fault.fault in _BREAKER_FAULTS:
            block = self._block(("upstream",))
            self._trip(block, fault, now, BREAKER_FAILURES, BREAKER_CAP, None)

    def release(self, lease: Lease) -> None:
        """Ends the lease; without succeed or fail before it, the key's state stays as it was."""
        if not lease.live:
            return
        lease.live = False
        self._leases -= 1
        lease.state.in_flight -= 1
        lease.group.in_flight -= 1
        for block, _ in lease.probes:
            if block.probe is lease:
                block.probe = None
                self._forget(block)

    def hear(self, closed: Closed) -> bool:
        """Takes in what another ring of the same keys tells; whether it changes anything. It never
        shortens what is known here, and a probe that is under way opens nothing then."""
        key = closed.key
        place: tuple[Hashable, ...] = ("group", key.quota_group)
        if closed.scope in (Scope.KEY, Scope.KEY_MODEL):
            place = ("key", key.id, key.secret)
        if closed.model is not None:
            place = (*place, closed.model)
        block = self._block(place)
        if closed.until <= block.until:
            return False
        block.until, block.fault = closed.until, closed.fault
        block.strikes = max(block.strikes, closed.strikes)
        if closed.fault is Fault.MODEL_NOT_FOUND and closed.model is not None:
            self._uneven.add(closed.model)
        return True

    def closed(self, now: float) -> Iterator[Closed]:
        """Every key and group that is closed, as it would be told."""
        keys: dict[Hashable, Key] = {("key", key.id, key.secret): key for key in self.keys}
        keys |= {("group", key.quota_group): key for key in reversed(self.keys)}
        for place, block in self._blocks.items():
            assert isinstance(place, tuple)
            for whole, model in ((place, None), (place[:-1], place[-1])):
                if whole in keys and block.until > now and block.fault is not None:
                    yield _told(place, keys[whole], block, model)

    def unused(self, lease: Lease) -> None:
        """The lease asked for nothing after all. Call before release."""
        for spent in (lease.spent, lease.asked):
            if spent is not None:
                spent.window.correct(spent, 0)

    def refused(
        self, lease: Lease, until: float, fault: Fault | None, *, ask_at: float, tokens: int = 0
    ) -> None:
        """Others have used up what its key may, until then if they give nothing back: the lease
        asked for nothing. Whoever needs as many `tokens` may ask again at `ask_at`, others at once.
        `fault`: None where they use it now. Call before release."""
        self.unused(lease)
        lease.state.shut = _Shut(until, ask_at, fault, tokens)

    def may_have_room(self, lease: Lease) -> None:
        """One use of its key has ended: whether others still use up all that it may is open."""
        if lease.state.shut.fault is None:
            lease.state.shut = _OPEN

    def snapshot(self, now: float) -> RingView:
        """Everything as it stands. Changes nothing."""
        closures: dict[Hashable, list[Closure]] = {}  # by the scope without its model
        for place, block in self._blocks.items():
            assert isinstance(place, tuple)
            closure = _closure(place, block, now)
            if closure is not None:
                whole = place if closure.model is None else place[:-1]
                closures.setdefault(whole, []).append(closure)
        upstream = tuple(closures.get(("upstream",), ()))
        current = {id(state) for state in self._keys}
        former = {id(state): state for state, _ in self._former.values() if state.in_flight}
        leaving = [state for identity, state in former.items() if identity not in current]
        return RingView(
            self.generation,
            tuple(self._view(state, closures, upstream, now) for state in self._keys)
            + tuple(
                replace(self._view(state, closures, upstream, now), state=State.LEAVING)
                for state in leaving
            ),
            tuple(
                GroupView(group, model, found.in_flight, found.limit.at(now))
                for (group, model), found in self._groups.items()
                if found.in_flight or found.limit.at(now) < math.inf
            ),
            upstream,
        )

    # --- inside -------------------------------------------------------------------------

    def _closed(self, state: _KeyState, model: str, now: float, tokens: int) -> Unavailable | None:
        """Why this key cannot serve now, None if it can."""
        at, fault, busy = now, None, False
        for scope in self._scopes(state.key, model) if self._blocks else ():
            block = self._blocks.get(scope)
            if block is None:
                continue
            if block.until > at:
                at, fault = block.until, block.fault
            busy = busy or (0 < block.until <= now and block.probe is not None)
        for window, cost in ((state.requests, 1), (state.tokens, tokens)):
            if window is not None and (opens := window.opens_at(now, cost)) > at:
                at, fault = opens, Fault.RATE_LIMITED
        shut, look_at = state.shut, at
        if shut.ask_at > now and tokens >= shut.least:
            look_at = max(at, shut.ask_at)
            if shut.until > at:
                at, fault = shut.until, shut.fault
        if at > now:
            return Unavailable(at, fault, look_at)  # though it is busy with a probe, too
        if busy:
            return Unavailable(math.inf, None)
        limit = state.key.in_flight or math.inf
        group = self._groups.get((state.key.quota_group, model))
        if group is not None and group.in_flight and group.in_flight + 1 > group.limit.at(now):
            return Unavailable(now + 1.0 / GROWTH, None)
        return Unavailable(math.inf, None) if state.in_flight >= limit else None

    def _view(
        self,
        state: _KeyState,
        closures: Mapping[Hashable, Sequence[Closure]],
        upstream: tuple[Closure, ...],
        now: float,
    ) -> KeyView:
        key = state.key
        own = (
            *closures.get(("key", key.id, key.secret), ()),
            *closures.get(("group", key.quota_group), ()),
        )
        found = worst((*own, *upstream))
        if found in (State.READY, State.PARTLY):
            windows = [each for each in (state.requests, state.tokens) if each is not None]
            full = state.in_flight >= (key.in_flight or math.inf)
            full = full or state.shut.ask_at > now
            if full or any(window.opens_at(now, 1) > now for window in windows):
                found = State.LIMITED
        return KeyView(key.id, key.quota_group, key.weight, found, state.in_flight, own)

    def _grant(self, state: _KeyState, model: str, now: float, tokens: int) -> Lease:
        self._sweep(now)
        key = state.key
        start = max(state.served, self._virtual_time)
        self._virtual_time = start
        state.served = start + 1 / key.weight
        state.in_flight += 1
        group = self._groups.setdefault((key.quota_group, model), _Group())
        group.in_flight += 1
        self._leases += 1
        asked = None if state.requests is None else state.requests.spend(now, 1)
        spent = None if state.tokens is None else state.tokens.spend(now, tokens)
        organization = key.organization or self._organization(state)
        lease = Lease(key, organization, model, now, group.in_flight, spent, asked, state, group)
        for scope in self._scopes(key, model) if self._blocks else ():
            block = self._blocks.get(scope)
            if block is not None and block.until:
                block.probe = lease
                lease.probes.append((block, block.until))
        return lease

    def _trip(
        self,
        block: Block,
        fault: UpstreamFault,
        now: float,
        enough: int,
        cap: float,
        delay: float | None,
    ) -> None:
        """Counts a failure of the whole upstream. From `enough` in a row on, or where it stated a
        delay, the scope is closed."""
        strikes = block.strike(now)
        if delay is None:
            strikes -= enough - 1
            if block.until == 0 and strikes < 1:
                return
            delay = _doubling(FIRST_COOLDOWN, cap, strikes)
        self._close(block, fault, now, delay)

    def _scopes(self, key: Key, model: str) -> tuple[Hashable, ...]:
        return (
            # By secret: a new one has no record, and what an old one still meets is not its own.
            ("key", key.id, key.secret),
            ("key", key.id, key.secret, model),
            ("group", key.quota_group),
            ("group", key.quota_group, model),
            ("upstream", model),
            ("upstream",),
        )

    def _account(self, lease: Lease) -> list[Key]:
        """The key of a lease and all others of its account, unless it was renewed meanwhile."""
        if not any(key.id == lease.key.id and key.secret == lease.key.secret for key in self.keys):
            return [lease.key]
        return [key for key in self.keys if key.quota_group == lease.key.quota_group]

    def _note(self, lease: Lease, fault: UpstreamFault, now: float) -> None:
        """A key lacks a model that another serves. If none is known to, it may as well be the
        caller who misspelt it, and that closes nothing."""
        if lease.key.secret == lease.state.key.secret:
            lease.state.serves.discard(lease.model)
        if self.served_elsewhere(lease):
            self._uneven.add(lease.model)
            place = ("key", lease.key.id, lease.key.secret, lease.model)
            self._close_told(place, lease.key, fault, now, PROBE_CAP)

    def _organization(self, state: _KeyState) -> str | None:
        """They take turns, but a key goes on with the one that it met longest ago: with as many
        keys as organizations both turns would else run in step, and a key see only one."""
        count = len(self._organizations)
        if not count:
            return None
        turn = self._turns
        self._turns += 1
        by_turn = (self._organizations[(turn + i) % count] for i in range(count))
        chosen = min(by_turn, key=lambda each: state.organizations.get(each, -1))
        state.organizations[chosen] = turn
        return chosen

    def _block(self, scope: Hashable) -> Block:
        return self._blocks.setdefault(scope, Block(scope))

    def _forget(self, block: Block) -> None:
        """Lets go of one that is open and has nothing held against it: where there are no blocks
        at all, as nearly always, no scope is looked up."""
        nothing = not block.until and not block.strikes and block.probe is None
        if nothing and self._blocks.get(block.place) is block:  # not one that was closed anew since
            del self._blocks[block.place]

    def _close_told(
        self, place: Hashable, key: Key, fault: UpstreamFault, now: float, delay: float
    ) -> None:
        """As `_close`; and others are told."""
        block = self._block(place)
        before = block.until
        self._close(block, fault, now, delay)
        if self.tell is not None and block.until > before:
            assert isinstance(place, tuple)
            _, _, parts = _SCOPES[place[0]]
            self.tell(_told(place, key, block, None if len(place) == parts else place[-1]))

    def _close(self, block: Block, fault: UpstreamFault, now: float, delay: float) -> None:
        """Closes for `delay` and up to 10 % more. A late answer never shortens what an earlier
        one asked for, so what is retired stays so."""
        until = now + delay * (1 + JITTER * self._random())
        if until > block.until:
            block.until, block.fault = until, fault.fault

    def _sweep(self, now: float) -> None:
        """Forgets old blocks and idle groups: callers choose model names, so they have no end."""
        if len(self._blocks) + len(self._groups) < self._sweep_from:
            return
        known = {(key.id, key.secret) for key in self.known_keys}
        self._blocks = {
            scope: block
            for scope, block in self._blocks.items()
            if block.probe is not None
            or (now < block.until + FORGET_AFTER and _is_known(scope, known))
        }
        self._groups = {
            scope: group
            for scope, group in self._groups.items()
            if group.in_flight or group.limit.at(now) < math.inf
        }
        self._sweep_from = max(_SWEEP_FROM, 2 * (len(self._blocks) + len(self._groups)))


def _is_known(place: Hashable, known: Set[tuple[str, Secret]]) -> bool:
    """Whether a block is not that of a key which left. A rejected one would else stay for ever."""
    assert isinstance(place, tuple)
    return place[0] != "key" or place[1:3] in known


def _closure(place: tuple[Hashable, ...], block: Block, now: float) -> Closure | None:
    """What a block means to whoever looks; None if it closes nothing."""
    if block.until == 0:
        return None
    retired = block.fault is not None and VERDICTS[block.fault].key in _RETIRING
    if block.probe is not None:
        state = State.PROBING
    elif block.until <= now:
        state = State.PROBE_DUE
    else:
        state = State.RETIRED if retired else State.COOLING
    scope, scope_with_model, parts = _SCOPES[str(place[0])]
    if len(place) == parts:
        return Closure(scope, state, block.fault, block.until)
    return Closure(scope_with_model, state, block.fault, block.until, str(place[-1]))


def _told(place: tuple[Hashable, ...], key: Key, block: Block, model: Hashable) -> Closed:
    assert block.fault is not None
    scope, scope_with_model, _ = _SCOPES[str(place[0])]
    if model is None:
        return Closed(scope, key, None, block.fault, block.until, block.strikes)
    name = str(model)
    return Closed(scope_with_model, key, name, block.fault, block.until, block.strikes)


# By what a block's place begins with: the scope, the same with a model, and the length without.
_SCOPES = {
    "key": (Scope.KEY, Scope.KEY_MODEL, 3),
    "group": (Scope.GROUP, Scope.GROUP_MODEL, 2),
    "upstream": (Scope.UPSTREAM, Scope.UPSTREAM_MODEL, 1),
}


def _stated(fault: UpstreamFault, cap: float) -> float | None:
    """The delay the provider asked for, up to the cap: above that a probe asks again."""
    return None if fault.retry_after is None else min(fault.retry_after, cap)


def _doubling(first: float, cap: float, strikes: int) -> float:
    """No strike at all is as the first: the scope was closed for a stated delay already."""
    return min(cap, first * 2.0 ** min(max(strikes, 1) - 1, 20))


def _soonest(closed: Sequence[Unavailable]) -> Unavailable:
    """What several closed keys come to: when the soonest that is worth waiting for may serve, and
    no fault as soon as one is only busy."""
    waited = [each for each in closed if each.worth_waiting(math.inf)]
    look_at = min((min(each.until, each.look_at) for each in closed), default=math.inf)
    if any(each.fault is None for each in waited):
        return Unavailable(look_at, None, look_at)
    # That a key lacks the model is told only if nothing else is wrong with any other.
    other = [each for each in closed if each.fault is not Fault.MODEL_NOT_FOUND]
    soonest = min(
        waited or other or closed,
        key=lambda each: each.until,
        default=Unavailable(math.inf, Fault.KEY_REJECTED),
    )
    return Unavailable(soonest.until, soonest.fault, look_at)


def window(before: MinuteWindow | None, limit: int | None) -> MinuteWindow | None:
    """The window of a limit that may be new, changed or gone."""
    if limit is None:
        return None
    if before is None:
        return MinuteWindow(limit)
    before.limit = limit
    return before


def _affinity(sticky: str, key: Key) -> float:
    """Weighted rendezvous hashing: the key with the highest score serves."""
    digest = hashlib.blake2b(f"{sticky}\0{key.id}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 0.5) / 2.0**64
    return -key.weight / math.log(uniform)
