"""What the state of one upstream's keys must be by docs/errors.md, kept from events alone."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from simulation.history import Failed, Leased, Released, Replaced, Succeeded

from tokenwire_service.config import Key
from tokenwire_service.errors import Fault
from tokenwire_service.keyring import Lease

BREAKER = {Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.TIMEOUT}


@dataclass(slots=True)
class Scope:
    """What is closed until a time, then open to one probe."""

    until: float = 0.0  # 0: open
    strikes: int = 0  # failures in a row
    fault: Fault | None = None  # that closed it, where somebody keeps that
    probe: Lease | None = None


@dataclass(slots=True)
class Book:
    """The keys of one upstream as they must be, from what happened to them."""

    keys: dict[str, Key] = field(default_factory=dict)
    scopes: dict[Hashable, Scope] = field(default_factory=dict)
    probing: dict[Lease, list[tuple[Hashable, float]]] = field(default_factory=dict)
    leases: set[Lease] = field(default_factory=set)
    # By key id, since the key came: who has it; and if it is limited, when it was had.
    holders: dict[str, set[Lease]] = field(default_factory=lambda: defaultdict(set))
    recent: dict[str, deque[float]] = field(default_factory=dict)
    held_back: set[tuple[str, str]] = field(default_factory=set)  # (group, model) with a limit

    def scope(self, name: Hashable) -> Scope:
        """One scope, open if nothing has been heard of it."""
        return self.scopes.setdefault(name, Scope())

    def running(self, key_id: str) -> int:
        """How many requests the key has under way."""
        return len(self.holders[key_id])

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
        self.leases.add(lease)
        self.holders[lease.key.id].add(lease)
        if lease.key.id in self.recent:
            recent = self.recent[lease.key.id]
            recent.append(event.at)
            while recent[0] <= event.at - 60.0:
                recent.popleft()
        for name in scopes_of(lease.key, lease.model):
            scope = self.scopes.get(name)
            if scope is not None and scope.until:
                scope.probe = lease
                self.probing.setdefault(lease, []).append((name, scope.until))

    def succeeded(self, event: Succeeded) -> None:
        """What was opened is forgotten; so are single failures of the whole upstream."""
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
        self.leases.discard(lease)
        self.holders[lease.key.id].discard(lease)
        for name, _ in self.probing.pop(lease, ()):
            if name in self.scopes and self.scopes[name].probe is lease:
                self.scopes[name].probe = None

    def replaced(self, event: Replaced) -> None:
        """A key that stays keeps its state; a new secret clears its account's debts."""
        before, self.keys = self.keys, {key.id: key for key in event.keys}
        for key in event.keys:
            old = before.get(key.id)
            if old is None:
                self.holders[key.id] = set()  # what its namesake still does is not its own
            elif old.secret != key.secret:
                self.scopes.pop(("group", key.quota_group), None)
            if key.requests_per_minute is None or old is None:
                self.recent.pop(key.id, None)
            if key.requests_per_minute is not None:
                self.recent.setdefault(key.id, deque())


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
