"""TLS and mutual TLS against the fake gateway, with authorities made for the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from tokenwire import TokenwireError
from tokenwire.testing import FakeGateway

SECRET = "tw-secret-token"


class Pki:
    """Two authorities, who trust nobody of each other."""

    def __init__(self) -> None:
        self.ours, self.strangers = trustme.CA(), trustme.CA()
        self.trusted = self.ours.cert_pem.bytes()

    def server(self, host: str, *, mutual: bool) -> grpc.ServerCredentials:
        """What answers as `host`, and if `mutual` only to whom we know."""
        issued = self.ours.issue_cert(host)
        pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
        return grpc.ssl_server_credentials([pair], self.trusted if mutual else None, mutual)

    def client(self, authority: trustme.CA) -> grpc.ChannelCredentials:
        """Who has a certificate of that authority, and trusts ours."""
        issued = authority.issue_cert("me@example.com")
        return grpc.ssl_channel_credentials(
            self.trusted, issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes()
        )


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


def tls_of(name: str, pki: Pki, folder: Path) -> Any:
    """What a caller passes as `tls`."""
    authorities = folder / "ca.pem"
    authorities.write_bytes(pki.trusted)
    strangers = folder / "strangers.pem"
    strangers.write_bytes(pki.strangers.cert_pem.bytes())
    return {
        "path": authorities,
        "path as text": str(authorities),
        "credentials": grpc.ssl_channel_credentials(pki.trusted),
        "strangers": strangers,
        "the system's": True,
        "plaintext": False,
        "mutual": pki.client(pki.ours),
        "mutual by a stranger": pki.client(pki.strangers),
    }[name]


@pytest.mark.parametrize(
    ("name", "host", "mutual"),
    [
        ("path", "127.0.0.1", False),
        ("path as text", "127.0.0.1", False),
        ("credentials", "127.0.0.1", False),
        ("mutual", "127.0.0.1", True),
    ],
)
def test_who_is_trusted_is_served(
    client: Any, tmp_path: Path, pki: Pki, name: str, host: str, mutual: bool
) -> None:
    tls = tls_of(name, pki, tmp_path)
    with FakeGateway(token=SECRET, credentials=pki.server(host, mutual=mutual)) as gateway:
        client.move(gateway, tls=tls, token=SECRET)
        gateway.reply("ok").reply("ok")
        assert client.call("chat", "Hi", model="m").text == "ok"
        assert client.read("stream", "Hi", model="m")[0].reply().text == "ok"


@pytest.mark.parametrize(
    ("name", "host", "mutual"),
    [
        ("path", "another.example", False),
        ("strangers", "127.0.0.1", False),
        ("the system's", "127.0.0.1", False),
        ("plaintext", "127.0.0.1", False),
        ("path", "127.0.0.1", True),
        ("mutual by a stranger", "127.0.0.1", True),
    ],
)
def test_who_is_not_is_told_nothing(
    client: Any, tmp_path: Path, pki: Pki, name: str, host: str, mutual: bool
) -> None:
    tls = tls_of(name, pki, tmp_path)
    with FakeGateway(token=SECRET, credentials=pki.server(host, mutual=mutual)) as gateway:
        client.move(gateway, tls=tls, token=SECRET)
        with pytest.raises(TokenwireError) as caught:
            client.call("chat", "Hi", model="m")
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")
        assert gateway.calls == []


def test_a_name_of_the_gateways_own(client: Any, tmp_path: Path, pki: Pki) -> None:
    """Reached by an address that its certificate does not have."""
    with FakeGateway(credentials=pki.server("gateway.example", mutual=False)) as gateway:
        options = [("grpc.ssl_target_name_override", "gateway.example")]
        client.move(gateway, tls=tls_of("path", pki, tmp_path), options=options)
        assert client.call("model", "gpt-4o-mini").name == "gpt-4o-mini"
