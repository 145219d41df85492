"""How many calls wait in gRPC's core, which decides whether the next one is refused.

grpc.aio takes one call at a time, in some six turns of the event loop, whatever waits behind it:
calls that come faster than they can begin are seen neither by slots nor by the loop's lag. The core
counts calls as they come (channelz). What it has handed over is counted here; the rest waits.

A burst may wait. Where more wait than `most`, that is overload: from then on only KEPT may wait,
until no more come than can be served. Those in front are refused, since they are the ones at hand,
but for one of SERVED: a refusal takes a third of what serving takes, so that who only refuses may
have no time left to serve.
"""

from __future__ import annotations

from collections.abc import Callable

from grpc_channelz.v1 import channelz, channelz_pb2

from tokenwire_service.looplag import LoopLag

INTERVAL = 0.05  # seconds between two looks, each of which takes some 0.25 ms
FEW = 8  # calls in an interval: where fewer begin, and the loop is in time, none wait
INTERVAL_OVERLOADED = 0.02  # seconds
KEPT = 64  # calls that may wait during overload: a tenth of a second's work
SERVED = 4  # of so many calls in front one is served even so
CALM = 1.0  # seconds without a refusal until overload is over


class Backlog:
    """Counts the calls of one server. `in_core`: those that it has begun to read and not ended.
    `most`: calls that may wait. `now`: monotonic seconds."""

    def __init__(
        self, in_core: Callable[[], int], most: int, lag: LoopLag, now: Callable[[], float]
    ) -> None:
        self._in_core = in_core
        self._most = most
        self._lag = lag
        self._now = now
        self.running = 0  # calls that were handed over and have not ended
        self._since, self._begun = now(), 0  # this interval, and how many calls began in it
        self._overloaded_until = self._since
        self._refuse = 0  # how many of the next are refused
        self.refused = 0  # calls, since the start

    @property
    def waiting(self) -> int:
        """Calls that have come and are not handed over. Takes 0.25 ms."""
        return max(0, self._in_core() - self.running)

    def begins(self) -> bool:
        """Counts a call that is handed over, to be given to `ended`. False: it is refused."""
        self.running += 1
        self._begun += 1
        now = self._now()
        overloaded = now < self._overloaded_until
        if now - self._since >= (INTERVAL_OVERLOADED if overloaded else INTERVAL):
            self._refuse = 0  # who waited may have left
            if overloaded or self._begun >= FEW or self._lag.hold:
                self._look(now)
            self._since, self._begun = now, 0
        if not self._refuse:
            return True
        self._refuse -= 1
        if self._refuse % SERVED == 0:
            return True
        self.refused += 1
        return False

    def _look(self, now: float) -> None:
        waiting = self.waiting
        overloaded = now < self._overloaded_until or waiting > self._most
        if overloaded and waiting > KEPT:
            self._refuse = waiting - KEPT
            self._overloaded_until = now + CALM

    def ended(self) -> None:
        """A call that was handed over has ended."""
        self.running -= 1


def newest_server() -> int:
    """The channelz id of the server that was made last in this process."""
    newest, end = 0, False
    while not end:
        request = channelz_pb2.GetServersRequest(start_server_id=newest + 1)
        listed = channelz.ChannelzServicer.GetServers(request, None)
        newest, end = (
            max((each.ref.server_id for each in listed.server), default=newest),
            listed.end,
        )
    return newest


def calls_in_core(server_id: int) -> int:
    """Calls that a server has begun to read and not ended, by channelz. A call that its caller
    gave up while it waited is among them until its turn comes."""
    request = channelz_pb2.GetServerRequest(server_id=server_id)
    calls = channelz.ChannelzServicer.GetServer(request, None).server.data
    return int(calls.calls_started - calls.calls_succeeded - calls.calls_failed)
