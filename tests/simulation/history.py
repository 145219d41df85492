"""What happened in a world, as plain records: the world writes them, the judge reads them."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from tokenwire.v1 import chat_pb2
from tokenwire_service.config import Key
from tokenwire_service.errors import UpstreamFault
from tokenwire_service.keyring import Lease, Unavailable

OK, CANCELLED, DEFECT = "OK", "CANCELLED", "DEFECT"  # outcomes beside the reasons

# Where a call can be when its caller leaves.
QUEUE = "in the gateway's queue"
BULKHEAD = "in the upstream's queue"
WAITING = "waiting for a key"
BACKOFF = "between two attempts"
FIRST_BYTE = "before the first byte"
UNARY = "within a whole answer"
DELTAS = "between deltas"
WRITE = "blocked in a write"
FINISH = "writing the end"
PLACES = (QUEUE, BULKHEAD, WAITING, BACKOFF, FIRST_BYTE, UNARY, DELTAS, WRITE, FINISH)


@dataclass(slots=True, eq=False)
class Request:
    """One request as its provider saw it."""

    call: str
    upstream: str
    lease: Lease
    at: float
    words: list[str] = field(default_factory=list)  # what the provider means to say
    complete: bool = False  # whether it has said all of it, and that it has
    answered: bool = False  # with a 200, whatever came of it
    fault: UpstreamFault | None = None
    usage: chat_pb2.Usage | None = None  # the last that it told
    fresh: bool = False  # over a connection that never served before
    retries_left: float = math.inf  # in the budget when the fault was met
    closed_at: float = math.inf
    read_while_writing: bool = False

    @property
    def text(self) -> str:
        return "".join(self.words)

    def __str__(self) -> str:
        met = "all" if self.complete else "left"
        if self.fault is not None:
            asked, should = self.fault.retry_after, self.fault.should_retry
            met = self.fault.fault.value
            met += "" if asked is None else f", wait {asked:g} s"
            met += "" if should is None else f", x-should-retry {should}"
        return (
            f"{self.at:.3f}-{self.closed_at:.3f} {self.upstream}/{self.lease.key.id} "
            f"({self.lease.key.quota_group}) for {self.lease.model}: {met}"
        )


@dataclass(slots=True, eq=False)
class CallRecord:
    """One call as its caller saw it."""

    name: str
    method: str  # chat, stream, cumulative or item
    models: tuple[str, ...]  # the one asked for, then its fallbacks
    began: float
    deadline: float
    callers_deadline: bool
    tokens: int = 0  # of its prompt
    slow: bool = False  # it does not always read at once
    while_draining: bool = False  # it began after the drain did
    requests: list[Request] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)  # models whose upstream was turned to
    refusals: list[tuple[float, str]] = field(default_factory=list)  # no key: (when, upstream)
    full: int = 0  # how often a queue refused it
    slot_at: float = math.inf  # when it had its first slot of the gateway
    place: str = ""
    folded: bool = False  # its upstream was asked for the other form, a stream or a whole
    told: int = 0  # attempts that the observer heard of
    text: str = ""
    kinds: str = ""  # initials of the messages it received, each once in a row
    states: str = ""  # initials of the snapshots' states, each once in a row
    first_delta_at: float | None = None
    writing: bool = False  # a write is under way, or never came back
    last_write_at: float = -math.inf  # when the last write came back
    left_at: float | None = None  # when the caller cancelled
    left_in: str = ""
    ended: float = math.inf
    outcome: str = ""
    error: str = ""  # all that the caller was told
    about: str = ""  # the upstream that the error names
    timer: str = ""  # that ended it, as the error says
    retry_after: float | None = None
    usage: chat_pb2.Usage | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.name} {self.method} {'>'.join(self.models)}: {self.began:.3f} until "
            f"{self.deadline:.3f}, {self.outcome} at {self.ended:.3f} {self.error}"
        ]
        if self.left_at is not None:
            lines.append(f"    {self.left_at:.3f} the caller left {self.left_in}")
        lines += [f"    {request}" for request in self.requests]
        lines += [f"    {at:.3f} {upstream} has no key" for at, upstream in self.refusals]
        return "\n".join(lines)


Changes = list[tuple[Hashable, float, float]]  # (scope of a block, its `until` before and after)


@dataclass(slots=True)
class Leased:
    """A key ring gave a key."""

    at: float
    upstream: str
    lease: Lease
    sticky: bool
    avoid: frozenset[str] = frozenset()


@dataclass(slots=True)
class Denied:
    """A key ring said that no key is open, nor merely busy."""

    at: float
    upstream: str
    model: str
    found: Unavailable
    avoid: frozenset[str] = frozenset()


@dataclass(slots=True)
class Failed:
    """A key ring was told of a fault; what that changed."""

    at: float
    upstream: str
    lease: Lease
    fault: UpstreamFault
    changes: Changes


@dataclass(slots=True)
class Succeeded:
    """A key ring was told of an answer; what that changed."""

    at: float
    upstream: str
    lease: Lease
    changes: Changes


@dataclass(slots=True)
class Told:
    """A key ring was told with an answer how much is left; what that changed."""

    at: float
    upstream: str
    lease: Lease
    changes: Changes


@dataclass(slots=True)
class Released:
    """A lease ended."""

    at: float
    upstream: str
    lease: Lease


@dataclass(slots=True)
class Replaced:
    """A key ring has other keys from now on."""

    at: float
    upstream: str
    keys: tuple[Key, ...]


RingEvent = Leased | Denied | Failed | Succeeded | Told | Released | Replaced


@dataclass(slots=True, repr=False)  # asyncio would show all of it as the result of a task
class History:
    """What happened, in order."""

    seed: int
    upstreams: dict[str, str]  # of each model
    max_attempts: int = 0
    budget: float = 0.0
    budget_floor: int = 0
    began: float = 0.0
    calls: list[CallRecord] = field(default_factory=list)  # as they ended
    ring: list[RingEvent] = field(default_factory=list)
    stalls: list[tuple[float, float]] = field(default_factory=list)  # (from, to) of the loop
    reloads: int = 0
    drained_at: float = math.inf
    closed_at: float = math.inf  # when the grace of the drain was over
    rounds: int = 0  # of the event loop
    seen: list[str] = field(default_factory=list)  # what was found broken while it ran
    at_rest: list[str] = field(default_factory=list)  # what was not given back in the end
    # By the judge: leases whose MODEL_NOT_FOUND came when another key had served the model.
    served_elsewhere: set[Lease] = field(default_factory=set)
