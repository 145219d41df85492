"""How many calls wait in gRPC's core, which decides whether the next one is refused.

grpc.aio takes one call at a time, in some six turns of the event loop, whatever waits behind it:
calls that come faster than they can begin are seen neither by slots nor by the loop's lag. The core
counts calls as they come (channelz). What it has handed over is counted here; of the rest waits
what came since nothing waited: some calls never end for the core (those that it cut off, those
whose headers never came whole), and while there is processor time to spare nothing waits.

A burst may wait. Where more wait than `most`, or a fifth of them and for GROWS ever more, that is
overload: from then on only KEPT may wait, until for CALM nobody had to be refused. Those in front
are refused, since they are the ones at hand. A few of them are served even so, and more where
refusing does not shorten the queue: whoever then goes on to refuse nearly all has no time left to
serve, and nobody waits less for it.
"""

from __future__ import annotations

from collections.abc import Callable

from grpc_channelz.v1 import channelz, channelz_pb2

from tokenwire_service.looplag import IN_TIME, LoopLag

INTERVAL = 0.05  # seconds between two looks, each of which takes some 0.25 ms
FEW = 8  # calls in an interval: where fewer begin, and the loop is in time, none wait
INTERVAL_OVERLOADED = 0.02  # seconds
GROWS = 0.5  # seconds: what comes for longer than that is no burst
KEPT = 8  # calls that may wait during overload: enough that the next one is there
SERVED = 16  # of so many calls in front one is served even so
SERVED_IN_VAIN = 4  # the same while refusing does not shorten the queue
SHRINKS = 1.0  # seconds in which a queue that is being shortened has become so by KEPT
IN_VAIN = 5.0  # seconds until shortening it is tried again
CALM = 1.0  # seconds without a refusal until overload is over
# Share of an interval for which the process ran: below it, and with the loop in time (else others
# have the processor), the loop had nothing to do for a while. In a flood it is 0.98. Taken wrongly
# it hides calls that wait, but only until they have begun.
BUSY = 0.85


class Backlog:
    """Counts the calls of one server. `in_core`: those that it has begun to read and not ended.
    `most`: calls that may wait. `now`: monotonic seconds. `ran`: seconds that the process has run,
    on all processors together."""

    def __init__(
        self,
        in_core: Callable[[], int],
        most: int,
        lag: LoopLag,
        now: Callable[[], float],
        ran: Callable[[], float],
    ) -> None:
        self._in_core = in_core
        self._most = most
        self._lag = lag
        self._now = now
        self.ran = ran
        self.running = 0  # calls that were handed over and have not ended
        self._stray = 0  # calls that the core counts though they neither run nor wait
        self._since = self._overloaded_until = now()
        self._ran_since = ran()
        self._begun = 0  # calls since `_since`
        self._waited = 0  # calls, at `_since`
        self._coming = 0.0  # calls a second, in the interval before that
        self._grows_since = now()
        self._turn = 0  # calls in front since one of them was served
        self._fewest = 0  # that have waited since overload began
        self._shrank_at = self._in_vain_until = now()
        self.refused = 0  # calls, since the start

    @property
    def waiting(self) -> int:
        """Calls that have come and are not handed over. Takes 0.25 ms."""
        return max(0, self._in_core() - self.running - self._stray)

    def begins(self, *, refusable: bool = True) -> bool:
        """Counts a call that is handed over, to be given to `ended`. False: it is refused."""
        self.running += 1
        self._begun += 1
        now = self._now()
        interval = INTERVAL_OVERLOADED if now < self._overloaded_until else INTERVAL
        if now - self._since >= interval:
            self._look(now)
            self._since, self._ran_since, self._begun = now, self.ran(), 0
        if not refusable or now >= self._overloaded_until:
            return True
        # Looking is dear: since the last look calls have come as they came before it.
        if self._waited + self._coming * (now - self._since) - self._begun <= KEPT:
            return True
        self._overloaded_until = now + CALM
        self._turn += 1
        if self._turn >= (SERVED_IN_VAIN if now < self._in_vain_until else SERVED):
            self._turn = 0
            return True
        self.refused += 1
        return False

    def _look(self, now: float) -> None:
        overloaded = now < self._overloaded_until
        if not overloaded and self._begun < FEW and self._lag.seconds <= IN_TIME:
            self._waited, self._grows_since = 0, now
            return
        ran, took = self.ran() - self._ran_since, now - self._since
        others = self._in_core() - self.running
        if ran < BUSY * took and self._lag.seconds < IN_TIME:
            self._stray, self._waited, self._coming = others, 0, 0.0
            self._grows_since = now
            return
        self._stray = max(0, min(self._stray, others))
        waiting = max(0, others - self._stray)
        self._coming = max(0, waiting + self._begun - self._waited) / took
        if waiting <= self._waited:
            self._grows_since = now
        self._waited = waiting
        grows = now - self._grows_since > GROWS
        if waiting <= (KEPT if overloaded else self._most // 5 if grows else self._most):
            return
        self._overloaded_until = now + CALM
        if not overloaded or waiting < 2 * KEPT or waiting < self._fewest - KEPT:
            self._fewest, self._shrank_at = waiting, now
        elif now > self._in_vain_until and now - self._shrank_at > SHRINKS:
            self._in_vain_until = now + IN_VAIN
            self._fewest, self._shrank_at = waiting, self._in_vain_until

    def ended(self) -> None:
        """A call that was handed over has ended."""
        self.running -= 1


def servers() -> frozenset[int]:
    """The channelz ids of this process's servers. A server has none until it is listed here: which
    is which is known only of one that was made between two lists."""
    found: set[int] = set()
    end = False
    while not end:
        request = channelz_pb2.GetServersRequest(start_server_id=max(found, default=0) + 1)
        listed = channelz.ChannelzServicer.GetServers(request, None)
        found.update(each.ref.server_id for each in listed.server)
        end = listed.end
    return frozenset(found)


def calls_in_core(server_id: int) -> int:
    """Calls that a server has begun to read and not ended, by channelz. A call that its caller
    gave up while it waited is among them until its turn comes; one that the core cut off, for ever.
    """
    request = channelz_pb2.GetServerRequest(server_id=server_id)
    try:
        calls = channelz.ChannelzServicer.GetServer(request, None).server.data
    except AttributeError:  # the server has stopped, which it tells a context that is not there
        return 0
    return int(calls.calls_started - calls.calls_succeeded - calls.calls_failed)
