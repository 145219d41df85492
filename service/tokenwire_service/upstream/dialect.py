"""What the gateway needs of a provider's language: the Dialect protocol and its values.

A dialect turns a ChatRequest into an HTTP body, and what comes back into the contract's messages.
It opens no socket and keeps nothing between calls; the time of day it reads only where an error
answer names a date (`retry-after`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol
from urllib.parse import quote

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Key, Model, Upstream
from tokenwire_service.errors import UpstreamFault, Violation, invalid
from tokenwire_service.settings import dialect_of, profile_of
from tokenwire_service.upstream import sse


@dataclass(frozen=True)
class Route:
    """Where a request goes: an upstream, and the model's name there.

    `model` is its configuration, None when the name passes through unchanged.
    """

    upstream: Upstream
    model: Model | None
    model_name: str

    @cached_property
    def dialect_name(self) -> str:
        """What is spoken there."""
        return dialect_of(self.upstream, self.model, self.model_name)

    @cached_property
    def profile_name(self) -> str:
        """What is taken there of OpenAI's language; "" where another one is spoken."""
        return profile_of(self.upstream, self.model, self.model_name)

    @cached_property
    def streaming(self) -> str:
        """When the upstream is asked for a stream: the model's setting, else the upstream's."""
        configured = self.model.streaming if self.model is not None else None
        return configured or self.upstream.streaming


@dataclass(frozen=True)
class Encoded:
    """One HTTP request, the same for every attempt and key, and the dialect that reads its answer.

    `path` follows the base URL; it is a valid URL's path with its query, already escaped.
    """

    dialect: Dialect
    path: str
    body: bytes  # empty: a GET, else a POST of JSON
    max_completion_tokens: int = 0  # the cap in force, 0 when none was sent
    dropped: tuple[str, ...] = ()  # proto paths of fields that were left out
    stop: tuple[str, ...] = ()  # strings that must not be part of the text
    choices: int = 1  # answers asked for
    headers: Mapping[str, str] = field(default_factory=dict)  # of this request; no secrets
    # What the reader of the answer must know of the request, in the dialect's own words.
    notes: frozenset[str] = frozenset()


class StreamDecoder(Protocol):
    """Turns one upstream stream into the events of the contract.

    `done`: the upstream said that nothing follows. `usage`: the last one seen, never a sum.
    """

    done: bool
    usage: chat_pb2.Usage | None

    def feed(self, event: sse.Event) -> list[chat_service_pb2.StreamChatResponse]:
        """The header (once, right before the first delta) and deltas of one event.

        Raises UpstreamFault for an error in the stream or a payload that is not the protocol.
        """

    def feed_all(
        self, events: Iterable[sse.Event], out: list[chat_service_pb2.StreamChatResponse]
    ) -> int:
        """What `feed` says of each goes to `out`, also of those before one that raises; pieces of
        one text may go together. Returns of how many pieces, each a delta of its own in `feed`."""
        pieces = 0
        for event in events:
            said = self.feed(event)
            pieces += sum(each.HasField("delta") for each in said)
            out += said
        return pieces

    def finish(self, error_field: bytes | None) -> list[chat_service_pb2.StreamChatResponse]:
        """One finish per choice, then the trailer.

        Raises UpstreamFault unless the upstream proved that the answer is complete.
        """


class Dialect(Protocol):
    """One provider language. Stateless: one instance serves every call. Those who implement it
    name it as their base, so that types are checked where they are written."""

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The HTTP request. Raises GatewayError with paths relative to `chat`."""

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """The headers that authenticate `key`. Secret: never logged."""

    def decode(self, encoded: Encoded, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole answer to that request. Raises UpstreamFault."""

    def stream_decoder(self, encoded: Encoded) -> StreamDecoder:
        """A decoder for one streamed answer to that request."""

    def classify(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFault:
        """What a non-200 answer means."""

    def list_models(self, upstream: Upstream) -> Encoded | None:
        """The request for the provider's own model list; None if there is no such list."""

    def decode_models(self, body: bytes) -> list[model_service_pb2.Model]:
        """The answer to it. Raises UpstreamFault."""


def path_segment(model_name: str) -> str:
    """A model's name as one segment of a path: callers choose it, and must not choose the path.
    Raises GatewayError for names that no escape can hold there."""
    if model_name in (".", ".."):
        raise invalid(Violation("model", f"got {model_name!r}, expected a model's name"))
    return quote(model_name, safe="")
