"""How many calls wait in gRPC's core, which decides whether the next one is refused.

grpc.aio takes one call at a time, in some six turns of the event loop, whatever waits behind it:
calls that come faster than they can begin are seen neither by slots nor by the loop's lag. The core
counts calls as they come (channelz). What it has handed over is counted here; of the rest waits
what came since nothing waited: some calls never end for the core (those that it cut off, those
whose headers never came whole), and while there is processor time to spare nothing waits.

A burst may wait. Where more wait than `most`, or half as many after a time in which only more and
more did, that is overload: for some seconds only KEPT may wait. Those in front are refused,
since they are the ones at hand. A few of them are served even so, and more where refusing does not
shorten the queue: whoever then goes on to refuse nearly all has no time left to serve, and nobody
waits less for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from grpc_channelz.v1 import channelz, channelz_pb2

from tokenwire_service.looplag import IN_TIME, LoopLag

INTERVAL = 0.05  # seconds between two looks, each of which takes some 0.25 ms
FEW = 2  # calls in INTERVAL: of a flood a loop that is in time begins more, so that none wait
INTERVAL_OVERLOADED = 0.02  # seconds
GROWN = 0.5  # of `most`: from so many on a queue that has grown for GROWS is no burst
GROWS = 0.5  # seconds
KEPT = 8  # calls that may wait during overload: enough that the next one is there
# Seconds that overload lasts. Then a queue must grow again to be one: else calls that come in
# clumps, and some that the core counts wrongly, would have others refused for ever. If it does
# within as long a time, overload lasts twice as long, up to LONGEST.
OVERLOAD = 4.0
LONGEST = 32.0
CALM = 1.0  # seconds in which no more than KEPT wait: then it is over before its time
SERVED = 16  # of so many calls in front one is served even so
SERVED_IN_VAIN = 4  # the same while refusing is in vain
SHRINKS = 1.0  # seconds: a queue that KEPT fewer wait in than so long ago is being shortened
IN_VAIN = 5.0  # seconds until shortening it is tried again
# Share of an interval for which the process ran, or its loop ran or waited for a processor. Below
# it, in as many looks as LEISURE in a row, the loop had nothing to do for a while: nothing waits.
# In a flood it is 0.98. Taken wrongly it hides those that wait until fewer do.
BUSY = 0.85
LEISURE = 3


class Backlog:
    """Counts the calls of one server. `in_core`: those that it has begun to read and not ended.
    `most`: calls that may wait. `now`: monotonic seconds. `ran`: seconds that the process has run,
    on all processors together. `wanted`: seconds that its loop has run or waited for a processor
    that others had, where the system tells."""

    def __init__(
        self,
        in_core: Callable[[], int],
        most: int,
        lag: LoopLag,
        now: Callable[[], float],
        ran: Callable[[], float],
        wanted: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._in_core = in_core
        self._most = most
        self._lag = lag
        self._now = now
        self.ran = ran
        self.wanted = wanted
        self.running = 0  # calls that were handed over and have not ended
        self.refused = 0  # calls, since the start
        # Of the last look: when, what `ran` and `wanted` said, how many waited, calls a second that
        # came before.
        self._looked_at = now()
        self._ran_then, self._wanted_then = ran(), wanted()
        self._waited = 0
        self._coming = 0.0
        self._begun = 0  # calls since then
        self._stray = 0  # calls that the core counts though they neither run nor wait
        self._others = 0  # calls that did not run at the last look, as the core counts
        self._leisurely = 0  # looks in a row
        self._grows_since = now()
        self._overloaded = False
        self._lasts = OVERLOAD  # seconds that the last overload was to last
        self._ends_at = -math.inf  # when it is to end, or did
        self._too_many_at = now()  # when more than KEPT waited during it, the last time
        self._turn = 0  # calls in front since one of them was served
        self._shortening = _Shortening(now())

    @property
    def waiting(self) -> int:
        """Calls that have come and are not handed over. Takes 0.25 ms."""
        return max(0, self._in_core() - self.running - self._stray)

    def begins(self, *, refusable: bool = True) -> bool:
        """Counts a call that is handed over, to be given to `ended`. False: it is refused."""
        self.running += 1
        self._begun += 1
        now = self._now()
        if now - self._looked_at >= (INTERVAL_OVERLOADED if self._overloaded else INTERVAL):
            self._look(now)
            self._looked_at, self._begun = now, 0
        if not refusable or not self._overloaded:
            return True
        # To look is dear: since the last time calls have come as they came before it.
        if self._waited + self._coming * (now - self._looked_at) - self._begun <= KEPT:
            return True
        self._too_many_at = now
        self._turn += 1
        if self._turn >= (SERVED_IN_VAIN if self._shortening.in_vain else SERVED):
            self._turn = 0
            return True
        self.refused += 1
        return False

    def _look(self, now: float) -> None:
        ends_at = min(self._ends_at, self._too_many_at + CALM)
        if self._overloaded and now >= ends_at:
            self._overloaded, self._ends_at, self._grows_since = False, ends_at, now
        took = now - self._looked_at
        waiting = self._count(took)
        self._coming = max(0, waiting + self._begun - self._waited) / took
        # A loop that was held up has a queue, not one that grows.
        if waiting <= self._waited or took > 2 * INTERVAL:
            self._grows_since = now
        self._waited = waiting
        grown = now - self._grows_since > GROWS
        if self._overloaded:
            self._shortening.look(waiting, now)
        elif waiting > self._most * (GROWN if grown else 1) and not self._leisurely:
            self._overload(now)

    def _count(self, took: float) -> int:
        """How many wait, after an interval of so many seconds."""
        in_time = self._lag.seconds < IN_TIME
        few = not self._overloaded and self._begun < FEW * took / INTERVAL and in_time
        if few and self._leisurely >= LEISURE:
            return 0  # nor is there a stray call that is not known: what follows takes its time
        ran, wanted = self.ran(), self.wanted()
        busy = max(ran - self._ran_then, wanted - self._wanted_then) / took
        self._ran_then, self._wanted_then = ran, wanted
        self._leisurely = self._leisurely + 1 if in_time and busy < BUSY else 0
        if few and self._leisurely < LEISURE:
            return 0
        # Below 0 where callers have just left: the core knows it before the calls end here.
        others = max(0, self._in_core() - self.running)
        if self._leisurely >= LEISURE:
            self._stray = others
        else:  # not less by one look, as that may be such a moment
            self._stray = min(self._stray, max(others, self._others))
        self._others = others
        return max(0, others - self._stray)

    def _overload(self, now: float) -> None:
        """It begins, or goes on."""
        again = now - self._ends_at < self._lasts
        self._lasts = min(2 * self._lasts, LONGEST) if again else OVERLOAD
        self._overloaded, self._ends_at, self._too_many_at = True, now + self._lasts, now
        if not (again and self._shortening.in_vain):
            self._shortening = _Shortening(now, self._waited)

    def ended(self) -> None:
        """A call that was handed over has ended."""
        self.running -= 1


class _Shortening:
    """Whether the queue of one overload becomes shorter, since nearly all are refused."""

    def __init__(self, now: float, waiting: int = 0) -> None:
        self.in_vain = False
        self._since = now  # when that was found, or when fewer last waited than before
        self._fewest = waiting  # then

    def look(self, waiting: int, now: float) -> None:
        """So many wait."""
        if waiting < max(2 * KEPT, self._fewest - KEPT) or (
            self.in_vain and now - self._since > IN_VAIN
        ):
            self.in_vain, self._since, self._fewest = False, now, waiting
        elif not self.in_vain and now - self._since > SHRINKS:
            self.in_vain, self._since = True, now


def time_wanted() -> float:
    """Seconds that this thread has run, or waited for a processor while others had it. 0 where the
    system does not tell: Linux does (sched-stats in the kernel's documentation). Takes 10 us."""
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_bytes().split()
    except (OSError, ValueError):
        return 0.0
    return (int(ran) + int(waited)) / 1e9


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
