"""What the state of one upstream's keys must be by docs/errors.md, kept from events alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from simulation.history import Failed, Leased, Released, Replaced, Succeeded

from tokenwire_service.config import Key
from tokenwire_service.errors import Fault
from tokenwire_service.keyring import Lease
from tokenwire_service.secret import Secret

BREAKER = {Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.TIMEOUT}


@dataclass(slots=True)
class Scope:
    """What is closed until a time, then open to one probe."""

    until: float = 0.0  # 0: open
    strikes: int = 0  # failures in a row
    fault: Fault | None = None  # that closed it, where somebody keeps that
    probe: Lease | None = None


@dataclass(slots=True, eq=False)
class Holding:
    """What belongs to one key from when it came, for as long as it stays or is in use."""

    key: Key
    leases: set[Lease] = field(default_factory=set)
    recent: deque[float] | None = None  # if it is limited, when it was had
    serves: set[str] = field(default_factory=set)  # models that it has answered for


@dataclass(slots=True)
class Book:
    """The keys of one upstream as they must be, from what happened to them."""

    keys: dict[str, Key] = field(default_factory=dict)
    scopes: dict[Hashable, Scope] = field(default_factory=dict)
    probing: dict[Lease, list[tuple[Hashable, float]]] = field(default_factory=dict)
    leases: dict[Lease, Holding] = field(default_factory=dict)
    holdings: dict[str, Holding] = field(default_factory=dict)  # by key id
    # Keys that left, or their old secrets, in use yet: by id and secret.
    former: dict[tuple[str, Secret], Holding] = field(default_factory=dict)
    held_back: set[tuple[str, str]] = field(default_factory=set)  # (group, model) with a limit
    uneven: set[str] = field(default_factory=set)  # models that some key was found to lack

    def scope(self, name: Hashable) -> Scope:
        """One scope, open if nothing has been heard of it."""
        return self.scopes.setdefault(name, Scope())

    def running(self, key_id: str) -> int:
        """How many requests the key has under way."""
        holding = self.holdings.get(key_id)
        return len(holding.leases) if holding is not None else 0

    def knows(self, key: Key, model: str) -> bool:
        """Whether the key has answered for the model; or no key was found to lack it."""
        return model not in self.uneven or model in self.holdings[key.id].serves

    def served_elsewhere(self, lease: Lease) -> bool:
        """Whether another key than that of the lease has answered for its model."""
        own = self.leases.get(lease)
        return any(
            lease.model in holding.serves
            for holding in self.holdings.values()
            if holding is not own
        )

    def closed(self, key: Key, model: str, at: float) -> bool:
        """Whether some scope is closed to the key; not: merely busy with a probe."""
        return any(
            scope is not None and scope.until > at
            for scope in map(self.scopes.get, scopes_of(key, model))
        )

    def untouched(self, key: Key, model: str) -> bool:
        """Whether nothing at all holds the key back."""
        return (
            key.in_flight is None
            and key.requests_per_minute is None
            and key.tokens_per_minute is None
            and (key.quota_group, model) not in self.held_back
            and not any(
                scope is not None and scope.until
                for scope in map(self.scopes.get, scopes_of(key, model))
            )
        )

    def expected(self, event: Failed) -> list[tuple[Hashable, float, float]]:
        """What docs/errors.md says the fault closes: (scope, least and most seconds)."""
        fault, key, model = event.fault, event.lease.key, event.lease.model
        match fault.fault:
            case Fault.RATE_LIMITED:
                scope: Hashable = ("group", key.quota_group, model)
                if fault.retry_after is not None:
                    delay = min(fault.retry_after, 3600.0)
                else:
                    delay = min(60.0, 2.0 ** (self.strike(scope, event.at) - 1))
            case Fault.DAILY_QUOTA:
                scope = ("group", key.quota_group, model)
                delay = 3600.0 if fault.retry_after is None else min(fault.retry_after, 3600.0)
            case Fault.MODEL_NOT_FOUND:
                holding = self.leases[event.lease]
                if holding.key.secret == key.secret:
                    holding.serves.discard(model)
                if not self.served_elsewhere(event.lease):
                    return []  # it may as well be the caller who misspelt it
                self.uneven.add(model)
                scope, delay = ("key", key.id, key.secret, model), 3600.0
            case Fault.QUOTA_EXHAUSTED:
                scope = ("group", key.quota_group)
                delay = min(3600.0, 300.0 * 2.0 ** (self.strike(scope, event.at) - 1))
            case Fault.KEY_REJECTED:
                scope, delay = ("key", key.id, key.secret), math.inf
            case Fault.ACCESS_DENIED:
                scope, delay = ("key", key.id, key.secret, model), 3600.0
            case Fault.ACCOUNT_DEAD:
                still = self.keys.get(key.id)
                if still is None or still.secret != key.secret:
                    dead = [key]  # it was renewed meanwhile: perhaps of another account
                else:
                    dead = [k for k in self.keys.values() if k.quota_group == key.quota_group]
                return [(("key", k.id, k.secret), math.inf, math.inf) for k in dead]
            case Fault.OVERLOADED:
                scope = ("upstream", model)
                strikes = self.strike(scope, event.at)
                if fault.retry_after is not None:
                    delay = min(fault.retry_after, 60.0)
                elif self.is_open(scope) and strikes < 3:
                    return []
                else:
                    delay = min(10.0, 2.0 ** max(0, strikes - 3))
            case kind if kind in BREAKER:
                scope = ("upstream",)
                strikes = self.strike(scope, event.at)
                if self.is_open(scope) and strikes < 10:
                    return []
                delay = min(30.0, 2.0 ** max(0, strikes - 10))
            case _:
                return []
        return [(scope, delay, delay * 1.1)]

    def strike(self, scope: Hashable, at: float) -> int:
        """Counts a failure; those under way together are one."""
        state = self.scope(scope)
        if state.until <= at:
            state.strikes += 1
        return max(1, state.strikes)

    def is_open(self, scope: Hashable) -> bool:
        return not self.scopes[scope].until

    # --- what happened ----------------------------------------------------------------

    def leased(self, event: Leased) -> None:
        """The lease probes whatever was closed."""
        lease = event.lease
        holding = self.leases[lease] = self.holdings.setdefault(lease.key.id, Holding(lease.key))
        holding.leases.add(lease)
        recent = holding.recent
        if recent is not None:
            recent.append(event.at)
            while recent[0] <= event.at - 60.0:
                recent.popleft()
        for name in scopes_of(lease.key, lease.model):
            scope = self.scopes.get(name)
            if scope is not None and scope.until:
                scope.probe = lease
                self.probing.setdefault(lease, []).append((name, scope.until))

    def succeeded(self, event: Succeeded) -> None:
        """The key serves the model. What was opened is forgotten; so are single failures of the
        whole upstream."""
        holding = self.leases[event.lease]
        if holding.key.secret == event.lease.key.secret:  # not renewed meanwhile
            holding.serves.add(event.lease.model)
        for name, _, after in event.changes:
            scope = self.scopes[name]
            scope.until = after
            if not after:
                scope.strikes = 0
        for whole in (("upstream", event.lease.model), ("upstream",)):
            state = self.scopes.get(whole)
            if state is not None and not state.until:
                state.strikes = 0

    def released(self, event: Released) -> None:
        """The lease is over, and what it probed may be probed again."""
        lease = event.lease
        holding = self.leases.pop(lease, None)
        if holding is not None:
            holding.leases.discard(lease)
        for name, _ in self.probing.pop(lease, ()):
            if name in self.scopes and self.scopes[name].probe is lease:
                self.scopes[name].probe = None

    def replaced(self, event: Replaced) -> None:
        """A key that stays keeps its state, and so does one that comes back while in use; what
        another of its name still does is not its own. A new secret clears its account's debts."""
        before, self.holdings = self.holdings, {}
        self.keys = {key.id: key for key in event.keys}
        for key in event.keys:
            holding = before.pop(key.id, None) or self.former.pop((key.id, key.secret), None)
            if holding is None or holding.key.secret != key.secret:
                self.scopes.pop(("group", key.quota_group), None)
            if holding is None:
                holding = Holding(key)
            elif holding.key.secret != key.secret:
                self.former[key.id, holding.key.secret] = holding
                holding.serves.clear()
            holding.key = key
            if key.requests_per_minute is None:
                holding.recent = None
            elif holding.recent is None:
                holding.recent = deque()
            self.holdings[key.id] = holding
        self.former |= {(h.key.id, h.key.secret): h for h in before.values()}
        self.former = {name: holding for name, holding in self.former.items() if holding.leases}


def scopes_of(key: Key, model: str) -> tuple[Hashable, ...]:
    """What can close a key to a model, as docs/errors.md has it."""
    return (
        ("key", key.id, key.secret),
        ("key", key.id, key.secret, model),
        ("group", key.quota_group),
        ("group", key.quota_group, model),
        ("upstream", model),
        ("upstream",),
    )
