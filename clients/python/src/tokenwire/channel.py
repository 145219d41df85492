"""How a client reaches its gateway: address, credentials, channel options, retries."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from tokenwire.version import __version__

DEFAULT_TARGET = "localhost:50051"
MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""Largest message in either direction: room for inline images. The gateway has the same."""

Token: TypeAlias = str | Callable[[], str]
"""A bearer token, or what returns the current one; asked once per call."""

AsyncToken: TypeAlias = Token | Callable[[], Awaitable[str]]
"""The same, or a coroutine function."""

Tls: TypeAlias = bool | str | os.PathLike[str] | grpc.ChannelCredentials
"""True: the system's authorities. A path: a PEM file of authorities. Credentials from
`grpc.ssl_channel_credentials` for mutual TLS. False: plaintext."""

# Chats are retried only when the gateway (or no gateway) answered UNAVAILABLE before the
# first byte of an answer: gRPC commits a call once its headers arrive. The gateway sends
# `grpc-retry-pushback-ms: -1` when it has used up its own retries, which ends these too. CANCELLED
# is what gRPC itself answers for a server that is told to end, to calls that cross its GOAWAY; a
# cancel of one's own is never retried. No other code is retried: it would repeat what is billed, or
# what cannot succeed.
_RETRIED = {
    "tokenwire.v1.ChatService": ("Chat", "StreamChat", "BatchChat"),
    "tokenwire.v1.TokenizerService": ("CountTokens", "Tokenize"),
    "tokenwire.v1.ModelService": ("ListModels", "GetModel"),
}


class Endpoint:
    """Where the gateway is, and how to open a channel to it. Holds no token in its repr."""

    def __init__(
        self,
        target: str | None,
        token: AsyncToken | None,
        tls: Tls,
        options: Iterable[tuple[str, Any]],
        environ: Mapping[str, str],
    ) -> None:
        if target is None:
            target = environ.get("TOKENWIRE_TARGET") or DEFAULT_TARGET
        if not isinstance(target, str) or not target:
            raise ValueError(f'target: expected an address such as "{DEFAULT_TARGET}"')
        if "://" in target and target.split("://")[0] in ("http", "https", "grpc", "grpcs"):
            raise ValueError(f'target: expected HOST:PORT, without a scheme, got "{target}"')
        if token is None:
            token = environ.get("TOKENWIRE_TOKEN") or ""
        if not isinstance(token, str) and not callable(token):
            raise TypeError("token: expected a str or a function that returns one")
        if isinstance(token, str):
            _checked(token)
        self.target = target
        self.options = _options(options)
        self._credentials = _credentials(tls)
        self._token = token

    @property
    def is_secure(self) -> bool:
        """Whether the channel is encrypted."""
        return self._credentials is not None

    def open(self, transport: Any) -> Any:
        """A channel of `transport`: the module `grpc` or `grpc.aio`."""
        if self._credentials is None:
            return transport.insecure_channel(self.target, options=self.options)
        return transport.secure_channel(self.target, self._credentials, options=self.options)

    def token(self) -> str | Awaitable[str]:
        """The token to present, "" for none; or what it is to be awaited from, unchecked."""
        if isinstance(self._token, str):
            return self._token
        token = self._token()
        return token if inspect.isawaitable(token) else _checked(token)

    def __repr__(self) -> str:
        return f"Endpoint({self.target!r}, tls={self.is_secure})"


def authorization(token: Any) -> tuple[tuple[str, str], ...]:
    """The metadata that proves who calls.

    Plain metadata rather than call credentials: gRPC refuses those on a plaintext channel, which
    is what a client behind a service mesh has.
    """
    return (("authorization", f"Bearer {token}"),) if _checked(token) else ()


def _checked(token: Any) -> str:
    if not isinstance(token, str):
        raise TypeError(f"token: expected a str, got {type(token).__name__}")
    if not token.isascii() or not token.isprintable() or " " in token:
        # Never the token itself: this text ends up in logs.
        raise ValueError("token: holds a space, a line end or a character outside ASCII")
    return token


def _credentials(tls: Tls) -> grpc.ChannelCredentials | None:
    if tls is False or tls is None:
        return None
    if tls is True:
        return grpc.ssl_channel_credentials()
    if isinstance(tls, grpc.ChannelCredentials):
        return tls
    if isinstance(tls, (str, os.PathLike)):
        return grpc.ssl_channel_credentials(Path(tls).read_bytes())
    raise TypeError(
        "tls: expected True, False, a path to a PEM file or grpc.ChannelCredentials, "
        f"got {type(tls).__name__}"
    )


def _options(overrides: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    options: dict[str, Any] = {
        "grpc.primary_user_agent": f"tokenwire-python/{__version__}",
        "grpc.service_config": json.dumps(_service_config()),
        "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
        "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
        # A model may think for minutes in silence. These pings notice a dead connection,
        # and keep proxies from dropping a live one; the gateway allows one per 10 s.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }
    options.update(overrides)
    return list(options.items())


def _service_config() -> dict[str, Any]:
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [
                    {"service": service, "method": method}
                    for service, methods in _RETRIED.items()
                    for method in methods
                ],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
        # Retries end while half of these are used up: a failure costs one, and ten calls that
        # succeed earn one. Enough for the calls of a replica that dies, not for an outage.
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
