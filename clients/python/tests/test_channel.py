"""Where a client connects, with what, and what never shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor

from tokenwire import AsyncClient, Client
from tokenwire.channel import Endpoint, authorization
from tokenwire.core import Core
from tokenwire.v1 import chat_service_pb2, model_service_pb2, tokenizer_service_pb2

SECRET = "tw-secret-token"


def endpoint(
    target: str | None = None,
    token: Any = None,
    tls: Any = False,
    options: Any = (),
    environ: Any = (),
) -> Endpoint:
    return Endpoint(target, token, tls, options, dict(environ))


class Transport:
    """Stands for the module grpc: notes which channel is asked for."""

    def __init__(self) -> None:
        self.opened: tuple[Any, ...] = ()

    def insecure_channel(self, target: str, options: Any) -> None:
        self.opened = ("plaintext", target)

    def secure_channel(self, target: str, credentials: Any, options: Any) -> None:
        self.opened = ("tls", target, credentials)


def test_the_environment_fills_in_what_is_not_given() -> None:
    environ = {"TOKENWIRE_TARGET": "there:1", "TOKENWIRE_TOKEN": SECRET}
    assert endpoint().target == "localhost:50051"
    assert authorization(endpoint().token()) == ()
    assert endpoint(environ=environ).target == "there:1"
    assert authorization(endpoint(environ=environ).token()) == (
        ("authorization", f"Bearer {SECRET}"),
    )
    assert endpoint("here:2", "own", environ=environ).target == "here:2"
    assert authorization(endpoint("here:2", "own", environ=environ).token()) == (
        ("authorization", "Bearer own"),
    )
    assert authorization(endpoint(token="", environ=environ).token()) == ()
    assert authorization(endpoint(token=lambda: "", environ=environ).token()) == ()


def test_the_clients_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENWIRE_TARGET", "there:1")
    with Client() as client:
        assert repr(client) == "Client('there:1', tls=False)"
    assert repr(AsyncClient()) == "AsyncClient('there:1', tls=False)"


def test_plaintext_or_tls(tmp_path: Path) -> None:
    authorities = tmp_path / "ca.pem"
    authorities.write_bytes(b"any bytes: gRPC reads them when it connects")
    own = grpc.ssl_channel_credentials()
    for tls, kind in [
        (False, "plaintext"),
        (True, "tls"),
        (authorities, "tls"),
        (str(authorities), "tls"),
        (own, "tls"),
    ]:
        transport = Transport()
        endpoint("a:1", tls=tls).open(transport)
        assert transport.opened[:2] == (kind, "a:1")
    assert transport.opened[2] is own
    with pytest.raises(FileNotFoundError):
        endpoint(tls=tmp_path / "missing.pem")
    with pytest.raises(TypeError, match=r"tls: expected True, False, a path .*, got int"):
        endpoint(tls=1)


@pytest.mark.parametrize("target", ["http://a:1", "https://a", "grpcs://a:1", ""])
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(ValueError, match="target: expected"):
        endpoint(target)


def test_targets_of_grpc_pass() -> None:
    for target in ("dns:///gateway:50051", "unix:///run/tokenwire.sock", "[::1]:50051"):
        assert endpoint(target).target == target


@pytest.mark.parametrize("token", [f"{SECRET}\n", f" {SECRET}", f"{SECRET}é", f"{SECRET}\x00"])
def test_a_token_no_header_can_carry_is_not_repeated_in_the_error(token: str) -> None:
    with pytest.raises(ValueError, match="token: holds") as given:
        endpoint(token=token)
    with pytest.raises(ValueError, match="token: holds") as supplied:
        authorization(endpoint(token=lambda: token).token())
    assert SECRET not in str(given.value) + str(supplied.value)


def test_no_token_in_any_repr() -> None:
    core = Core("a:1", token=SECRET, environ={})
    call = next(core.chat("Hi", "m", {}))
    assert ("authorization", f"Bearer {SECRET}") in call.metadata
    with Client("a:1", token=SECRET) as client:
        shown = repr(client) + repr(AsyncClient("a:1", token=SECRET)) + repr(core.endpoint)
    assert SECRET not in shown + repr(call)


def test_options() -> None:
    built_in = dict(endpoint().options)
    assert {name: value for name, value in built_in.items() if isinstance(value, int)} == {
        "grpc.max_send_message_length": 32 * 1024 * 1024,
        "grpc.max_receive_message_length": 32 * 1024 * 1024,
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }
    own = dict(endpoint(options=[("grpc.keepalive_time_ms", 5), ("grpc.x", 1)]).options)
    assert own == {**built_in, "grpc.keepalive_time_ms": 5, "grpc.x": 1}


def test_every_method_of_the_contract_retries_what_no_gateway_has_answered() -> None:
    config = json.loads(dict(endpoint().options)["grpc.service_config"])
    services: list[ServiceDescriptor] = [
        service
        for module in (chat_service_pb2, tokenizer_service_pb2, model_service_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    [method_config] = config["methodConfig"]
    assert {(name["service"], name["method"]) for name in method_config["name"]} == {
        (service.full_name, method.name) for service in services for method in service.methods
    }
    assert method_config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
    assert method_config["retryPolicy"]["maxAttempts"] == 3
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert config["retryThrottling"] == {"maxTokens": 100, "tokenRatio": 0.1}


def test_deadlines() -> None:
    core = Core(environ={})
    assert next(core.chat("Hi", "m", {})).timeout == 600
    assert next(core.chat("Hi", "m", {"timeout": 5})).timeout == 5
    assert next(core.chat("Hi", "m", {"timeout": None})).timeout is None
    assert next(core.models({})).timeout == 600
    assert next(Core(timeout=7, environ={}).count_tokens("a", "m", {})).timeout == 7
    assert next(Core(timeout=None, environ={}).model("m", {})).timeout is None
    # A stream shows that it lives, so it may live as long as it likes.
    assert core.stream("Hi", "m", "delta", 0, {}).call.timeout is None
    assert core.stream("Hi", "m", "delta", 0, {"timeout": 9}).call.timeout == 9
    assert core.batch(["Hi"], "m", 0, {}).call.timeout is None
    for wrong in (0, -1, float("nan"), "5", True):
        with pytest.raises(ValueError, match="timeout: expected seconds above 0 or None"):
            Core(timeout=wrong, environ={})  # type: ignore[arg-type]
