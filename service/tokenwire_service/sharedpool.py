"""A pool whose keys have their own limits in common with the pools of other replicas."""

from __future__ import annotations

import time
from collections.abc import Callable

from tokenwire.v1 import error_reason_pb2
from tokenwire_service.admission import Admission
from tokenwire_service.errors import Fault, GatewayError
from tokenwire_service.keyring import KeyRing, Lease, Unavailable
from tokenwire_service.keyset import shared_name
from tokenwire_service.pool import Pool
from tokenwire_service.quotas import Grant, Limits, Quotas, Refusal
from tokenwire_service.store import AwayError
from tokenwire_service.upstream.client import UpstreamClient

_BUSY_FOR = 0.1  # seconds until it is asked again whether another replica has ended a request
_SOON = 1.0  # seconds; also until tokens are asked for again that others may give back


class SharedPool(Pool):
    """As Pool: the ring grants a key by what this replica knows, then one call of Redis takes what
    the key's own limits allow, or the ring is told that others have it, and asked for another."""

    def __init__(
        self,
        client: UpstreamClient,
        ring: KeyRing,
        bulkhead: Admission,
        quotas: Quotas,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(client, ring, bulkhead, now=now)
        self._quotas = quotas
        self._grants: dict[Lease, Grant] = {}

    async def lease(
        self,
        model: str,
        deadline: float,
        *,
        sticky: str = "",
        tokens: int = 0,
        avoid: frozenset[str] = frozenset(),
        wait: bool = True,
    ) -> Lease | Unavailable:
        """As Pool.lease. Raises GATEWAY_OVERLOADED while Redis is away and on_failure is closed."""
        while True:
            found = await super().lease(
                model, deadline, sticky=sticky, tokens=tokens, avoid=avoid, wait=wait
            )
            if not isinstance(found, Lease) or await self._granted(found, tokens):
                return found

    def release(self, lease: Lease) -> None:
        """As Pool.release; others may have what it took."""
        grant = self._grants.pop(lease, None)
        if grant is not None:
            if lease.spent is not None:
                grant.settle(lease.spent.units)
            grant.close()
            self.ring.may_have_room(lease)
        super().release(lease)

    async def _granted(self, lease: Lease, tokens: int) -> bool:
        """Whether its key may be used. If not, the lease has ended."""
        key = lease.key
        limits = Limits(key.requests_per_minute, key.tokens_per_minute, key.in_flight)
        if not limits:
            return True
        subject = f"key:{shared_name(self.upstream.name, key)}"
        found: Grant | Refusal | None = None
        try:
            found = await self._quotas.reserve(subject, limits, tokens)
        except AwayError:
            if self._quotas.closed:
                raise GatewayError(
                    error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
                    f"the limits of the keys of upstream {self.upstream.name} cannot be looked up "
                    "now",
                    retry_after=_SOON,
                    retry_helps=True,
                ) from None
            found = self._quotas.take(subject, limits, tokens)
        finally:
            now = self._now()
            if isinstance(found, Grant):
                self._grants[lease] = found
            elif found is None:  # nobody may be asked, or the caller has left
                self.ring.unused(lease)
            elif found.limit == "in_flight":
                until = now + _BUSY_FOR
                self.ring.refused(lease, until, None, ask_at=until)
            else:
                until = now + max(found.retry_after, _BUSY_FOR)
                least, ask_at = 0, until
                if found.limit == "tokens":
                    least, ask_at = tokens, min(until, now + _SOON)
                self.ring.refused(lease, until, Fault.RATE_LIMITED, ask_at=ask_at, tokens=least)
            if not isinstance(found, Grant):
                super().release(lease)
        return isinstance(found, Grant)
