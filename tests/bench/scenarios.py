"""The scenarios, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

OURS = "tokenwire"
FLOOR = "grpc.aio floor"
RELAY = "Go relay"
DIRECT = "direct"  # the generator on the mock itself: no system between, so no CPU of one
LITELLM = "LiteLLM"
PORTKEY = "Portkey"

_GRPC = (OURS, RELAY)
_ALL = (OURS, FLOOR, RELAY)
_PEERS = (LITELLM, PORTKEY)


@dataclass(frozen=True)
class Scenario:
    """One kind of traffic. `systems`: those that it says something about.

    Without `rate` a closed loop of `connections` x `streams` calls at once; HTTP, which carries one
    call on a connection, opens as many connections. With it an open loop of `rate` calls a second.
    """

    name: str
    title: str
    systems: tuple[str, ...] = _GRPC
    stream: bool = False
    chunks: int = 16
    pace: float = 0.0  # tokens a second of each stream; with it, chunks follow from the seconds
    connections: int = 4
    streams: int = 4
    rate: float = 0.0
    ramp: float = 0.0  # seconds over which the first calls begin
    at_least: float = 0.0  # seconds, where a shorter run would measure its beginning
    prompt_bytes: int = 600
    options: str = ""  # more of the plan in the model's name
    slow: int = 0  # slow readers beside
    per: str = "token"  # what CPU is divided by

    @property
    def at_once(self) -> int:
        """Calls in flight."""
        return self.connections * self.streams

    def lasting(self, seconds: float) -> float:
        """How long it runs, in seconds, where runs are asked to last so long."""
        return max(seconds, self.at_least)

    def model(self, seconds: float) -> str:
        """The plan of its answers."""
        chunks = self.chunks
        if self.pace:
            chunks = max(2, math.ceil(self.pace * seconds))
        return f"bench-n{chunks}" + (f"-r{self.pace:g}" if self.pace else "") + self.options

    def miniature(self) -> Scenario:
        """The same shape, for machines that have a second for it."""
        connections = min(self.connections, 2)
        return replace(
            self,
            connections=connections,
            streams=min(self.streams, 4),
            chunks=min(self.chunks, 64),
            ramp=min(self.ramp, 0.1),
            at_least=0.0,
        )


def _paced(pace: int, streams: int, systems: tuple[str, ...], **more: float) -> Scenario:
    return Scenario(
        f"paced-{streams}x{pace}",
        f"{streams} streams x {pace} tokens/s",
        systems,
        stream=True,
        pace=pace,
        connections=min(8, streams),
        streams=streams // min(8, streams),
        ramp=more.get("ramp", 0.5),
        at_least=more.get("at_least", 0.0),
    )


SCENARIOS = (
    Scenario(
        "unary",
        "unary, 32 at once",
        (*_ALL, *_PEERS, DIRECT),
        connections=4,
        streams=8,
        per="request",
    ),
    Scenario("stream-16", "streams of 16 chunks, 16 at once", (*_ALL, PORTKEY), stream=True),
    Scenario(
        "stream-256",
        "streams of 256 chunks, 16 at once",
        (*_ALL, *_PEERS, DIRECT),
        stream=True,
        chunks=256,
    ),
    Scenario("stream-2000", "streams of 2,000 chunks, 16 at once", _ALL, stream=True, chunks=2000),
    _paced(50, 20, (*_ALL, *_PEERS)),
    _paced(50, 100, (*_ALL, PORTKEY, DIRECT)),
    _paced(50, 200, _ALL),
    _paced(10, 1000, (*_ALL, PORTKEY, DIRECT), ramp=3.0, at_least=10.0),
    _paced(20, 1000, (*_ALL, DIRECT), ramp=3.0, at_least=10.0),
    _paced(2, 5000, (*_GRPC, DIRECT), ramp=12.0, at_least=40.0),
    Scenario(
        "tools",
        "tool calls, arguments in 32 chunks, 16 at once",
        stream=True,
        chunks=32,
        options="-t1",
    ),
    Scenario(
        "prompt-100kB",
        "unary, prompt of 100 kB, 8 at once",
        _GRPC,
        streams=2,
        prompt_bytes=100_000,
        per="request",
    ),
    Scenario(
        "prompt-4MB",
        "unary, prompt of 4 MB, 2 at once",
        _GRPC,
        connections=2,
        streams=1,
        prompt_bytes=4_000_000,
        per="request",
    ),
    replace(
        _paced(50, 100, (OURS,)),
        name="slow-reader",
        title="100 streams x 50 tokens/s, and one that reads a message in 100 ms",
        slow=1,
    ),
    Scenario(
        "keys-at-429",
        "unary, 32 at once, 30 % of keys at 429",
        (OURS,),
        streams=8,
        options="-e30",
        per="request",
    ),
    Scenario(
        "unary-calm", "unary, 20 a second", (OURS, RELAY, *_PEERS, DIRECT), rate=20.0, per="request"
    ),
    Scenario(
        "stream-calm",
        "streams of 16 chunks, 20 a second",
        (OURS, RELAY, *_PEERS, DIRECT),
        stream=True,
        rate=20.0,
    ),
    replace(
        _paced(50, 10, (OURS, RELAY, *_PEERS, DIRECT)),
        name="gap-calm",
        title="10 streams x 50 tokens/s: the gap between two tokens",
    ),
)

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
