"""Who calls: whom a token or certificate stands for, which models it may ask, and how much.

Decides at once on the state it finds, or has Redis decide where replicas share limits. It fails
closed: where callers are configured, nobody else is served. Times are monotonic seconds but for the
day of a budget, which is a calendar day in UTC.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import translate

from tokenwire.v1 import error_reason_pb2
from tokenwire_service.config import Caller
from tokenwire_service.errors import GatewayError
from tokenwire_service.keyring import MinuteWindow, window
from tokenwire_service.quotas import Grant, Limits, Quotas, Refusal
from tokenwire_service.secret import Digest
from tokenwire_service.store import AwayError

_DAY = 86_400.0  # seconds
_SOON = 1.0  # seconds: when a slot of one's own may be free again, which nobody knows


class Spending:
    """What one admitted chat has taken from its caller's limits."""

    def __init__(self, correct: Callable[[int], None]) -> None:
        self._correct = correct

    def settle(self, tokens: int) -> None:
        """What the chat has really cost, in place of what it was expected to."""
        self._correct(tokens)


class Tenant:
    """One caller with its limits. Without a configuration: everyone, without any."""

    def __init__(
        self,
        caller: Caller | None = None,
        *,
        quotas: Quotas | None = None,
        now: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._now = now
        self._clock = clock
        self._in_flight = 0
        self._requests: MinuteWindow | None = None
        self._tokens: MinuteWindow | None = None
        self._shared = quotas
        self._limits = Limits()
        self._spent_today = 0
        self._today = 0
        self.change(caller)

    def change(self, caller: Caller | None) -> None:
        """Other limits and models from now on. What it has used counts."""
        self._caller = caller
        self._allowed = None  # any model
        if caller is not None and caller.models:
            allowed = "|".join(translate(_literal(pattern)) for pattern in caller.models)
            self._allowed = re.compile(allowed)
        if caller is not None:
            self._requests = window(self._requests, caller.requests_per_minute)
            self._tokens = window(self._tokens, caller.tokens_per_minute)
            self._limits = Limits(
                caller.requests_per_minute,
                caller.tokens_per_minute,
                caller.in_flight,
                caller.tokens_per_day,
            )

    @property
    def _quotas(self) -> Quotas | None:
        """Where its limits are shared; None where it has none."""
        return self._shared if self._limits else None

    @property
    def name(self) -> str:
        """As configured; empty where there are no callers."""
        return self._caller.name if self._caller is not None else ""

    @property
    def counts_tokens(self) -> bool:
        """Whether what a chat may cost matters."""
        caller = self._caller
        return caller is not None and bool(caller.tokens_per_minute or caller.tokens_per_day)

    def may_ask(self, model: str) -> bool:
        """Whether a model's name is among those it may use."""
        return self._allowed is None or self._allowed.match(model) is not None

    def check(self, model: str) -> None:
        """Raises CALLER_FORBIDDEN for a model it may not ask."""
        if not self.may_ask(model):
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_CALLER_FORBIDDEN,
                f"caller {self.name} may not use model {model[:80]!r}",
                resource=("model", model[:200]),
            )

    async def reserve(self, tokens: int) -> Grant | None:
        """What one chat takes of the limits that replicas share, for `admitted`, which must follow
        at once; None where nothing is shared, or while that is away and on_failure is open.

        Raises CALLER_QUOTA_EXCEEDED, and GATEWAY_OVERLOADED while it is away and on_failure is
        closed.
        """
        if self._quotas is None or self._caller is None:
            return None
        self._refuse(self._caller, tokens)  # its share here alone is too much: nobody need be asked
        try:
            found = await self._quotas.reserve(self._subject, self._limits, tokens)
        except AwayError:
            if not self._quotas.closed:
                return None
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
                f"the limits of caller {self.name} cannot be looked up now",
                retry_after=_SOON,
                retry_helps=True,
            ) from None
        if isinstance(found, Refusal):
            raise self._over(self._words(found.limit), found.retry_after or _SOON)
        return found

    @contextlib.contextmanager
    def admitted(self, tokens: int, grant: Grant | None = None) -> Iterator[Spending]:
        """Counts one chat, expected to cost so many `tokens`, while it runs. `grant`: of `reserve`.

        Raises CALLER_QUOTA_EXCEEDED with the seconds until it would be admitted.
        """
        caller = self._caller
        if caller is None:
            yield Spending(lambda _: None)
            return
        if grant is None:
            self._refuse(caller, tokens)
            if self._quotas is not None:
                grant = self._quotas.take(self._subject, self._limits, tokens)
        now = self._now()
        if self._requests is not None:
            self._requests.spend(now, 1)
        window, spent = self._tokens, None
        if window is not None:
            spent = window.spend(now, tokens)
        day = self._day()
        self._spent_today += tokens
        counted = tokens

        def correct(real: int) -> None:
            nonlocal counted
            if window is not None and spent is not None:
                window.correct(spent, real)
            if self._day() == day:
                self._spent_today += real - counted
            counted = real
            if grant is not None:
                grant.settle(real)

        self._in_flight += 1
        try:
            yield Spending(correct)
        finally:
            self._in_flight -= 1
            if grant is not None:
                grant.close()

    def _refuse(self, caller: Caller, tokens: int) -> None:
        now = self._now()
        limit = caller.in_flight
        if limit is not None and self._in_flight >= limit:
            raise self._over(self._words("in_flight"), _SOON)
        if self._requests is not None and (at := self._requests.opens_at(now, 1)) > now:
            raise self._over(self._words("requests"), at - now)
        if self._tokens is not None and (at := self._tokens.opens_at(now, tokens)) > now:
            raise self._over(self._words("tokens"), at - now)
        if caller.tokens_per_day is not None:
            day = self._day()
            if self._spent_today >= caller.tokens_per_day:
                rest = (day + 1) * _DAY - self._clock()
                raise self._over(self._words("day"), rest)

    def _day(self) -> int:
        """Today, in days since 1970; a new one begins with nothing spent."""
        today = int(self._clock() // _DAY)
        if today > self._today:  # a clock that is put back gives nobody a second budget
            self._today, self._spent_today = today, 0
        return self._today

    @property
    def _subject(self) -> str:
        return f"caller:{self.name}"

    def _words(self, limit: str) -> str:
        limits = self._limits
        return {
            "in_flight": f"{limits.in_flight} chats at once",
            "requests": f"{limits.requests_per_minute} chats a minute",
            "tokens": f"{limits.tokens_per_minute} tokens a minute",
            "day": f"{limits.tokens_per_day} tokens a day",
        }[limit]

    def _over(self, what: str, retry_after: float) -> GatewayError:
        return GatewayError(
            error_reason_pb2.ERROR_REASON_CALLER_QUOTA_EXCEEDED,
            f"caller {self.name} has its {what} already",
            retry_after=retry_after,
            retry_helps=True,
            quota=(f"caller:{self.name}", what),
        )


class Callers:
    """Every configured caller. Without any the gateway is open, and everyone is one tenant."""

    def __init__(
        self,
        callers: Sequence[Caller],
        *,
        quotas: Quotas | None = None,
        now: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._quotas = quotas
        self._now = now
        self._clock = clock
        self._tenants: dict[str, Tenant] = {}
        self.replace(callers)

    def replace(self, callers: Sequence[Caller]) -> None:
        """Others from now on. Who stays, by name, keeps what it has used."""
        before, self._tenants = self._tenants, {}
        self._open = None if callers else Tenant()
        self._by_token: list[tuple[Digest, Tenant]] = []
        self._by_certificate: dict[str, Tenant] = {}
        for caller in callers:
            tenant = before.get(caller.name) or Tenant(
                quotas=self._quotas, now=self._now, clock=self._clock
            )
            tenant.change(caller)
            self._tenants[caller.name] = tenant
            self._by_token += [(token, tenant) for token in caller.tokens]
            self._by_certificate |= dict.fromkeys(caller.certificates, tenant)

    def identify(self, authorization: Sequence[str], certificate: Iterable[str]) -> Tenant:
        """Who calls, by the values of the header `authorization`, else by the names in the
        client's certificate. Raises CALLER_UNAUTHENTICATED."""
        if self._open is not None:
            return self._open
        if authorization:
            scheme, _, token = authorization[0].partition(" ")
            found = None
            if len(authorization) == 1 and scheme.lower() == "bearer":
                digest = Digest.of(token.strip())
                for known, tenant in self._by_token:  # all of them: time must tell nothing
                    if known == digest:
                        found = tenant
            if found is None:
                raise _unknown("the bearer token is not known here")
            return found
        for name in certificate:
            if name in self._by_certificate:
                return self._by_certificate[name]
        raise _unknown('expected metadata "authorization: Bearer ..."')


def _unknown(why: str) -> GatewayError:
    return GatewayError(error_reason_pb2.ERROR_REASON_CALLER_UNAUTHENTICATED, why)


def _literal(pattern: str) -> str:
    """A pattern in which `*` alone stands for more than itself: names of models have brackets."""
    return re.sub(r"[?[]", r"[\g<0>]", pattern)
