"""F15: an upstream whose certificate is not to be trusted never hears a key, nor a prompt."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from harness import completion, failing, request
from processes import serve, write_config

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
SECRET = "sk-test-planted-0123456789"
PROMPT = "a prompt for no stranger"


@dataclass
class Signed:
    """A certificate with its key, and who may sign with it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def context(self, folder: Path) -> ssl.SSLContext:
        """For a server that shows it."""
        pem = folder / "server.pem"
        pem.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + self.certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context


def signed(
    *names: x509.GeneralName,
    by: Signed | None = None,
    begins: datetime.datetime = NOW - DAY,
    ends: datetime.datetime = NOW + DAY,
) -> Signed:
    """A certificate for these names; without `by` it is its own issuer, as an authority is."""
    key = ec.generate_private_key(ec.SECP256R1())
    common = "an authority" if by is None else "a server"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    issuer = key if by is None else by.key
    public = issuer.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if by is None else by.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return Signed(builder.sign(issuer, hashes.SHA256()), key)


HERE = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
ELSEWHERE = x509.DNSName("elsewhere.test")


def shown(what: str, authority: Signed) -> Signed:
    """The certificate of a server."""
    return {
        "good": lambda: signed(HERE, by=authority),
        "expired": lambda: signed(HERE, by=authority, begins=NOW - 9 * DAY, ends=NOW - DAY),
        "not yet valid": lambda: signed(HERE, by=authority, begins=NOW + DAY, ends=NOW + 9 * DAY),
        "of another host": lambda: signed(ELSEWHERE, by=authority),
        "signed by itself": lambda: signed(HERE),
        "of an unknown authority": lambda: signed(HERE, by=signed()),
    }[what]()


@dataclass
class Heard:
    """What a server got, decrypted where it could be."""

    port: int = 0
    connections: int = 0
    bytes: bytearray = field(default_factory=bytearray)


@asynccontextmanager
async def listening(context: ssl.SSLContext | None) -> AsyncIterator[Heard]:
    """A server that answers `hello`, with TLS or without."""
    heard = Heard()
    body = completion().body
    assert isinstance(body, bytes)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.connections += 1
        while data := await reader.read(2**16):
            heard.bytes += data
            if b"\r\n\r\n" in heard.bytes:
                head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                break
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    heard.port = server.sockets[0].getsockname()[1]
    try:
        yield heard
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    "what",
    ["expired", "not yet valid", "of another host", "signed by itself", "of an unknown authority"],
)
async def test_f15_a_certificate_that_is_not_trusted_ends_it_before_the_key(
    tmp_path: Path, what: str
) -> None:
    """All but the last two are of an authority that the gateway trusts: a good one is served."""
    authority = signed()
    trusted = tmp_path / "authority.pem"
    trusted.write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
    retries = {"max_attempts": 2, "backoff": "1ms", "backoff_cap": "1ms"}
    async with (
        listening(shown("good", authority).context(tmp_path)) as good,
        listening(shown(what, authority).context(tmp_path)) as bad,
    ):
        upstreams = {
            name: {"base_url": f"https://127.0.0.1:{heard.port}/v1", "keys": [{"env": "TEST_KEY"}]}
            for name, heard in (("good", good), ("bad", bad))
        }
        models = {name: {"upstream": name} for name in upstreams}
        config = write_config(
            tmp_path, "http://unused", upstreams=upstreams, models=models, retries=retries
        )
        environment = {"TEST_KEY": SECRET, "SSL_CERT_FILE": str(trusted)}
        async with serve("--config", config, **environment) as gateway:
            whole = await gateway.chat.Chat(request(PROMPT, model="good"))
            assert whole.choices[0].message.content == "hello"
            failure = await failing(gateway.chat.Chat(request(PROMPT, model="bad")))
    assert failure.code is grpc.StatusCode.UNAVAILABLE
    assert failure.reason == "UPSTREAM_UNREACHABLE"
    assert "certificate" in failure.message
    assert SECRET.encode() in good.bytes  # the server sees what it is sent
    assert bytes(bad.bytes) == b""


async def test_f15_an_upstream_without_tls_is_never_spoken_to_in_the_clear(tmp_path: Path) -> None:
    async with listening(None) as plain:
        upstream = {
            "base_url": f"https://127.0.0.1:{plain.port}/v1",
            "keys": [{"env": "TEST_KEY"}],
            "passthrough": True,
            "timeouts": {"connect": "500ms"},
        }
        config = write_config(tmp_path, "http://unused", upstreams={"test": upstream})
        async with serve("--config", config, TEST_KEY=SECRET) as gateway:
            failure = await failing(gateway.chat.Chat(request(PROMPT), timeout=20))
    assert failure.reason == "UPSTREAM_UNREACHABLE"
    assert plain.connections >= 1
    assert bytes(plain.bytes).startswith(b"\x16\x03")  # a TLS handshake, and nothing after it
    assert SECRET.encode() not in plain.bytes
    assert PROMPT.encode() not in plain.bytes
