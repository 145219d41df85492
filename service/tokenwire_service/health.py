"""What probes and load balancers are told by grpc.health.v1, under a name for each question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpc_health.v1 import health, health_pb2

HEALTH_SERVICE: str = health.SERVICE_NAME

# Not `""` and not a service of the contract: whoever balances load must not take it for ready.
LIVENESS = "liveness"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # no types are published for it
    """`""` for the whole and each of `services` by its full name: whether to send calls here.
    `liveness`: whether the process works, which it does while it drains, too; one that is
    restarted for draining would lose the calls that it drains.

    With List, which grpcio-health-checking has for sync servers only.
    """

    def __init__(self, services: Iterable[str]) -> None:
        super().__init__()
        self._ready = ("", *services)

    async def started(self) -> None:
        """Everything serves."""
        for name in (*self._ready, LIVENESS):
            await self.set(name, _SERVING)

    async def draining(self) -> None:
        """No new calls, please. Those that come are served all the same."""
        for name in self._ready:
            await self.set(name, _NOT_SERVING)

    async def List(  # noqa: N802  # the contract's name
        self, request: health_pb2.HealthListRequest, context: Any
    ) -> health_pb2.HealthListResponse:
        """Every name at once."""
        return health_pb2.HealthListResponse(
            statuses={
                name: health_pb2.HealthCheckResponse(status=status)
                for name, status in self._server_status.items()
            }
        )
