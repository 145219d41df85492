"""What the gateway needs of a provider's language: the Dialect protocol and its values.

A dialect turns a ChatRequest into an HTTP body, and what comes back into the contract's messages.
It opens no socket and keeps nothing between calls; the time of day it reads only where an error
answer names a date (`retry-after`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Key, Model, Upstream
from tokenwire_service.errors import UpstreamFault
from tokenwire_service.upstream import sse


@dataclass(frozen=True)
class Route:
    """Where a request goes: an upstream, and the model's name there.

    `model` is its configuration, None when the name passes through unchanged.
    """

    upstream: Upstream
    model: Model | None
    model_name: str


@dataclass(frozen=True)
class Encoded:
    """One HTTP request, the same for every attempt and key. `path` follows the base URL."""

    path: str
    body: bytes
    max_completion_tokens: int = 0  # the cap in force, 0 when none was sent
    dropped: tuple[str, ...] = ()  # proto paths of fields that were left out
    stop: tuple[str, ...] = ()  # strings that must not be part of the text
    choices: int = 1  # answers asked for


class StreamDecoder(Protocol):
    """Turns one upstream stream into the events of the contract."""

    @property
    def done(self) -> bool:
        """True once the upstream said that nothing follows."""

    @property
    def usage(self) -> chat_pb2.Usage | None:
        """The last usage seen, never a sum."""

    def feed(self, event: sse.Event) -> list[chat_service_pb2.StreamChatResponse]:
        """The header (once, right before the first delta) and deltas of one event.

        Raises UpstreamFault for an error in the stream or a payload that is not the protocol.
        """

    def finish(self, error_field: bytes | None) -> list[chat_service_pb2.StreamChatResponse]:
        """One finish per choice, then the trailer.

        Raises UpstreamFault unless the upstream proved that the answer is complete.
        """


class Dialect(Protocol):
    """One provider language."""

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """The HTTP request. Raises GatewayError with paths relative to `chat`."""

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """The headers that authenticate `key`. Secret: never logged."""

    def decode(self, body: bytes) -> chat_service_pb2.ChatResponse:
        """A whole answer. Raises UpstreamFault."""

    def stream_decoder(self, choices: int = 1) -> StreamDecoder:
        """A decoder for one answer of so many choices."""

    def classify(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFault:
        """What a non-200 answer means."""

    def decode_models(self, body: bytes) -> list[model_service_pb2.Model]:
        """The provider's own model list. Raises UpstreamFault."""
