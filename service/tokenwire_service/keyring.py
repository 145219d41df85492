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
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from tokenwire_service.concurrency import GROWTH, AdaptiveLimit
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import VERDICTS, Fault, KeyAction, UpstreamFault

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
_SWEEP_FROM = 1024  # blocks and groups; below that many, nothing is forgotten
_PASSING = frozenset({Fault.RATE_LIMITED, Fault.OVERLOADED})
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
    """Why a scope is closed, and until when. Not blocked while `until` is 0."""

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


@dataclass
class _KeyState:
    key: Key
    requests: MinuteWindow | None
    tokens: MinuteWindow | None
    in_flight: int = 0
    served: float = 0.0  # virtual time: grows by 1/weight per lease


@dataclass
class _Group:
    """A quota group with one model: what runs, and what it bears."""

    in_flight: int = 0
    limit: AdaptiveLimit = field(default_factory=AdaptiveLimit)


@dataclass(eq=False)
class Lease:
    """The right to make one request with one key. `organization` is who pays, if named."""

    key: Key
    organization: str | None
    model: str
    started: float
    together: int  # with how many of its group it began, itself included
    spent: Spent | None  # of the key's tokens per minute
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
        self._next_organization = 0
        self._blocks: dict[Hashable, Block] = {}
        self._sweep_from = _SWEEP_FROM
        self._virtual_time = 0.0
        self._random = random
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

    def replace(self, keys: Iterable[Key]) -> None:
        """Takes new keys, for instance after a secret was renewed. A key that stays keeps its
        state, whatever else changed about it; a new secret has a clean record; a key that left is
        leased no more, while what it is doing goes on."""
        before = {state.key.id: state for state in self._keys}
        self._keys = []
        for key in keys:
            state = before.pop(key.id, None)
            if state is None:
                state = _KeyState(key, None, None, served=self._virtual_time)
            elif state.key.secret != key.secret:  # perhaps of an account that has credit
                self._blocks.pop(("group", key.quota_group), None)
            state.key = key
            state.requests = _window(state.requests, key.requests_per_minute)
            state.tokens = _window(state.tokens, key.tokens_per_minute)
            self._keys.append(state)
        self.counts_tokens = any(state.tokens is not None for state in self._keys)

    def lease(
        self, model: str, now: float, *, sticky: str = "", tokens: int = 0
    ) -> Lease | Unavailable:
        """The best key for `model`, or when to ask again.

        With `sticky` the same key as long as it can serve, since providers cache prompts per
        account: by rendezvous hashing, so that every replica chooses alike and a key that fails
        moves only its own. Otherwise least in flight by weight; among equals weighted round
        robin by virtual time, as in start-time fair queueing, so that a key that comes back is
        not flooded. `tokens` is what the request may cost, an estimate.
        """
        best: _KeyState | None = None
        best_rank: tuple[float, float] = (math.inf, math.inf)
        all_closed: list[Unavailable] = []
        for state in self._keys:
            closed = self._closed(state, model, now, tokens)
            if closed is not None:
                all_closed.append(closed)
                continue
            if sticky:
                rank = (-_affinity(sticky, state.key), 0.0)
            else:
                rank = (state.in_flight / state.key.weight, max(state.served, self._virtual_time))
            if rank < best_rank:
                best, best_rank = state, rank
        if best is None:
            return _soonest(all_closed)
        return self._grant(best, model, now, tokens)

    def succeed(self, lease: Lease) -> None:
        """The key serves: what it probed is open again. Call before release; again does no harm."""
        for block, until in lease.probes:
            if block.until == until:
                block.until, block.strikes, block.fault = 0.0, 0, None
        for scope in (("upstream", lease.model), ("upstream",)):
            whole = self._blocks.get(scope)
            if whole is not None and not whole.until:
                whole.strikes = 0
        lease.group.limit.borne(min(lease.together, lease.group.in_flight))

    def remaining(self, lease: Lease, requests: int, now: float) -> None:
        """The provider says with its answer that so many `requests` are left in its window."""
        lease.group.limit.remaining(requests, lease.group.in_flight, now)

    def settle(self, lease: Lease, tokens: int) -> None:
        """What the request has really cost, once that is known."""
        if lease.spent is not None:
            lease.spent.window.correct(lease.spent, tokens)

    def fail(self, lease: Lease, fault: UpstreamFault, now: float) -> None:
        """Applies the key's side of the verdict. Call before release."""
        action = VERDICTS[fault.fault].key
        key, model = lease.key, lease.model
        if fault.fault is Fault.RATE_LIMITED:
            together = max(lease.together, lease.group.in_flight)
            lease.group.limit.limited(together, lease.started, now)
        if action is KeyAction.COOL_GROUP:
            block = self._block(("group", key.quota_group, model))
            delay = _stated(fault, COOLDOWN_CAP)
            if delay is None:
                delay = _doubling(FIRST_COOLDOWN, UNSTATED_COOLDOWN_CAP, block.strike(now))
            self._close(block, fault, now, delay)
        elif action is KeyAction.COOL_UPSTREAM:
            block = self._block(("upstream", model))
            delay = _stated(fault, STATED_OVERLOAD_CAP)
            self._trip(block, fault, now, OVERLOADS_BEFORE_COOLING, OVERLOAD_COOLDOWN_CAP, delay)
        elif action is KeyAction.RETIRE_KEY:
            self._close(self._block(("key", key.id, key.secret)), fault, now, math.inf)
        elif action is KeyAction.RETIRE_FOR_MODEL:
            block = self._block(("key", key.id, key.secret, model))
            self._close(block, fault, now, PROBE_CAP)
        elif action is KeyAction.RETIRE_GROUP and fault.fault is Fault.QUOTA_EXHAUSTED:
            block = self._block(("group", key.quota_group))
            delay = _doubling(FIRST_PROBE, PROBE_CAP, block.strike(now))
            self._close(block, fault, now, delay)
        elif action is KeyAction.RETIRE_GROUP:
            for dead in self._account(lease):
                self._close(self._block(("key", dead.id, dead.secret)), fault, now, math.inf)
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

    # --- inside -------------------------------------------------------------------------

    def _closed(self, state: _KeyState, model: str, now: float, tokens: int) -> Unavailable | None:
        """Why this key cannot serve now, None if it can."""
        at, fault, busy = now, None, False
        for scope in self._scopes(state.key, model):
            block = self._blocks.get(scope)
            if block is None:
                continue
            if block.until > at:
                at, fault = block.until, block.fault
            busy = busy or (0 < block.until <= now and block.probe is not None)
        for window, cost in ((state.requests, 1), (state.tokens, tokens)):
            if window is not None and (opens := window.opens_at(now, cost)) > at:
                at, fault = opens, Fault.RATE_LIMITED
        if at > now:
            return Unavailable(at, fault)  # though it is busy with a probe, too
        if busy:
            return Unavailable(math.inf, None)
        limit = state.key.in_flight or math.inf
        group = self._groups.get((state.key.quota_group, model))
        if group is not None and group.in_flight and group.in_flight + 1 > group.limit.at(now):
            return Unavailable(now + 1.0 / GROWTH, None)
        return Unavailable(math.inf, None) if state.in_flight >= limit else None

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
        if state.requests is not None:
            state.requests.spend(now, 1)
        spent = None if state.tokens is None else state.tokens.spend(now, tokens)
        organization = key.organization or self._organization()
        lease = Lease(key, organization, model, now, group.in_flight, spent, state, group)
        for scope in self._scopes(key, model):
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

    def _organization(self) -> str | None:
        if not self._organizations:
            return None
        self._next_organization = (self._next_organization + 1) % len(self._organizations)
        return self._organizations[self._next_organization - 1]

    def _block(self, scope: Hashable) -> Block:
        return self._blocks.setdefault(scope, Block())

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
        self._blocks = {
            scope: block
            for scope, block in self._blocks.items()
            if block.probe is not None or now < block.until + FORGET_AFTER
        }
        self._groups = {
            scope: group
            for scope, group in self._groups.items()
            if group.in_flight or group.limit.at(now) < math.inf
        }
        self._sweep_from = max(_SWEEP_FROM, 2 * (len(self._blocks) + len(self._groups)))


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
    look_at = min((each.until for each in closed), default=math.inf)
    if any(each.fault is None for each in waited):
        return Unavailable(look_at, None, look_at)
    soonest = min(
        waited or closed,
        key=lambda each: each.until,
        default=Unavailable(math.inf, Fault.KEY_REJECTED),
    )
    return Unavailable(soonest.until, soonest.fault, look_at)


def _window(before: MinuteWindow | None, limit: int | None) -> MinuteWindow | None:
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
