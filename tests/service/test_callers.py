"""Callers over real sockets: tokens, certificates, models, quotas. Nobody else is served."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import msgspec
import pytest
import trustme
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from harness import (
    Start,
    Stubs,
    failing,
    item_failure,
    receive,
    request,
    simulate,
    stream_request,
    upstream,
)
from tokenwire.v1 import (
    chat_pb2,
    chat_service_pb2,
    chat_service_pb2_grpc,
    model_service_pb2,
    tokenizer_service_pb2,
)
from tokenwire_service.config import Caller, Config, Model, Tls
from tokenwire_service.interceptors import OPEN_RPCS
from tokenwire_service.secret import Digest
from tokenwire_service.settings import HealthPort, Metrics
from tokenwire_service.simulator import Simulator

ROOT = Path(__file__).parents[2]
Simulated = tuple[Simulator, str]
Code = grpc.StatusCode
TOKEN = "token-of-search"


def bearer(token: str = TOKEN) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def search(**limits: Any) -> Caller:
    return Caller(name="search", tokens=(Digest.of(TOKEN),), **limits)


# Every RPC of the contract: one that is added without a row here fails the test of the table.
RPCS: dict[str, Message] = {
    "/tokenwire.v1.ChatService/Chat": request(),
    "/tokenwire.v1.ChatService/StreamChat": stream_request(request()),
    "/tokenwire.v1.ChatService/BatchChat": chat_service_pb2.BatchChatRequest(
        items=[chat_service_pb2.BatchChatItem(chat=request())]
    ),
    "/tokenwire.v1.TokenizerService/CountTokens": tokenizer_service_pb2.CountTokensRequest(
        model="m", text="t"
    ),
    "/tokenwire.v1.TokenizerService/Tokenize": tokenizer_service_pb2.TokenizeRequest(
        model="m", texts=["t"]
    ),
    "/tokenwire.v1.ModelService/ListModels": model_service_pb2.ListModelsRequest(),
    "/tokenwire.v1.ModelService/GetModel": model_service_pb2.GetModelRequest(
        name="simulated-small"
    ),
}


def test_every_rpc_has_its_row() -> None:
    files = (chat_service_pb2, tokenizer_service_pb2, model_service_pb2)
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(RPCS) == methods


def call(gateway: Stubs, path: str, metadata: Any = None) -> Any:
    name = path.rpartition("/")[2]
    stub = next(s for s in (gateway.chat, gateway.tokens, gateway.models) if hasattr(s, name))
    return getattr(stub, name)(RPCS[path], metadata=metadata)


@pytest.mark.parametrize("path", RPCS)
@pytest.mark.parametrize("metadata", [None, bearer("wrong"), (("authorization", TOKEN),)])
async def test_nobody_else_is_served(
    start: Start, simulator: Simulated, path: str, metadata: Any
) -> None:
    gateway = await start(upstream(simulator[1]), callers=(search(),))
    failure = await failing(call(gateway, path, metadata))
    assert failure.code is Code.UNAUTHENTICATED
    assert failure.reason == "CALLER_UNAUTHENTICATED"
    assert failure.pushback == "-1"
    assert TOKEN not in failure.everything
    assert simulator[0].stats.requests == 0


@pytest.mark.parametrize("path", RPCS)
async def test_a_known_caller_is_and_stands_in_the_record(
    start: Start, simulator: Simulated, path: str
) -> None:
    gateway = await start(upstream(simulator[1]), callers=(search(),))
    answer = call(gateway, path, bearer())
    if isinstance(answer, grpc.aio.UnaryUnaryCall):
        await answer
    else:
        assert [message async for message in answer]
    assert gateway.events.calls[-1].caller == "search"
    assert TOKEN not in repr(gateway.events.calls)


async def test_what_needs_no_token_is_on_the_list_and_nothing_else(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]), callers=(search(),))

    async def needs_a_token(path: str) -> bool:
        call = gateway.channel.unary_stream(path)(b"", timeout=10.0)
        with contextlib.suppress(grpc.aio.AioRpcError):
            if await call.read() is not grpc.aio.EOF:
                call.cancel()  # it answers; some do so for ever
        assert await call.code() is not Code.UNIMPLEMENTED, path
        return await call.code() is Code.UNAUTHENTICATED

    served = set(RPCS) | {
        f"/{service}/{method}"
        for service, methods in (
            ("grpc.health.v1.Health", ("Check", "List", "Watch")),
            ("grpc.reflection.v1.ServerReflection", ("ServerReflectionInfo",)),
            ("grpc.reflection.v1alpha.ServerReflection", ("ServerReflectionInfo",)),
        )
        for method in methods
    }
    assert {path for path in served if not await needs_a_token(path)} == OPEN_RPCS
    documented = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    section = documented.partition("## What needs no token")[2].partition("## ")[0]
    assert set(re.findall(r"`(/[\w./]+)`", section)) == OPEN_RPCS


async def test_a_service_that_is_on_no_list_needs_a_token(
    start: Start, simulator: Simulated
) -> None:
    """One that somebody adds beside the contract, and forgets."""

    async def tell(request: bytes, context: object) -> bytes:
        return b"told"

    new = grpc.method_handlers_generic_handler(
        "somebody.v1.Elses", {"Tell": grpc.unary_unary_rpc_method_handler(tell)}
    )
    gateway = await start(upstream(simulator[1]), callers=(search(),))
    gateway.running.server.add_generic_rpc_handlers((new,))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.channel.unary_unary("/somebody.v1.Elses/Tell")(b"")
    assert refused.value.code() is Code.UNAUTHENTICATED


async def test_health_is_open(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), callers=(search(),))
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_models_a_caller_may_not_use(start: Start, simulator: Simulated) -> None:
    limited = search(models=("simulated-s*", "m"))
    gateway = await start(upstream(simulator[1]), callers=(limited,))
    other = request(model="simulated-large")
    for forbidden in (
        gateway.chat.Chat(other, metadata=bearer()),
        gateway.chat.StreamChat(stream_request(other), metadata=bearer()),
        gateway.tokens.CountTokens(
            tokenizer_service_pb2.CountTokensRequest(model="simulated-large", text="t"),
            metadata=bearer(),
        ),
        gateway.models.GetModel(
            model_service_pb2.GetModelRequest(name="simulated-large"), metadata=bearer()
        ),
    ):
        failure = await failing(forbidden)
        assert failure.code is Code.PERMISSION_DENIED
        assert failure.reason == "CALLER_FORBIDDEN"
    batch = chat_service_pb2.BatchChatRequest(
        items=[chat_service_pb2.BatchChatItem(chat=each) for each in (other, request())]
    )
    answers = {a.index: a async for a in gateway.chat.BatchChat(batch, metadata=bearer())}
    assert item_failure(answers[0]).reason == "CALLER_FORBIDDEN"
    assert answers[1].HasField("response")
    listed = await gateway.models.ListModels(
        model_service_pb2.ListModelsRequest(), metadata=bearer()
    )
    assert [model.name for model in listed.models] == ["simulated-small"]


async def test_a_cumulative_stream_refused_for_its_caller_tells_its_state_where_no_retry_helps(
    start: Start, simulator: Simulated
) -> None:
    """As any other error before the first text; who is not known is not asked what it wants."""
    caller = search(models=("simulated-*",), requests_per_minute=1)
    gateway = await start(upstream(simulator[1]), callers=(caller,))
    server_error = chat_service_pb2.Snapshot.STATE_SERVER_ERROR
    for model, token, reason, states in (
        ("forbidden", TOKEN, "CALLER_FORBIDDEN", [server_error]),
        ("simulated-small", "unknown", "CALLER_UNAUTHENTICATED", []),
        ("simulated-small", TOKEN, "", None),
        ("simulated-small", TOKEN, "CALLER_QUOTA_EXCEEDED", []),
    ):
        asked = stream_request(request(model=model), mode=chat_service_pb2.STREAM_MODE_CUMULATIVE)
        received = await receive(gateway.chat.StreamChat(asked, metadata=bearer(token)))
        if states is None:
            assert received.failure is None
            continue
        assert received.failure is not None
        assert received.failure.reason == reason
        assert [each.state for each in received.snapshots] == states
        assert all(each.message.content == "" for each in received.snapshots)


async def test_a_quota_names_what_is_used_up_and_when_it_is_not(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]), callers=(search(requests_per_minute=2),))
    for _ in range(2):
        await gateway.chat.Chat(request(), metadata=bearer())
    failure = await failing(gateway.chat.Chat(request(), metadata=bearer()))
    assert failure.code is Code.RESOURCE_EXHAUSTED
    assert failure.reason == "CALLER_QUOTA_EXCEEDED"
    assert 0 < failure.retry_seconds <= 60
    assert int(failure.pushback) > 0
    assert failure.details["QuotaFailure"].violations[0].subject == "caller:search"
    assert simulator[0].stats.requests == 2


async def test_tokens_are_counted_as_the_upstream_told_them(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]), callers=(search(tokens_per_day=55),))
    chat = request(extra_body_json=simulate(tokens=50))
    received = await receive(gateway.chat.StreamChat(stream_request(chat), metadata=bearer()))
    assert received.trailer.usage.total_tokens >= 55 > received.trailer.usage.completion_tokens
    failure = await failing(gateway.chat.Chat(chat, metadata=bearer()))
    assert failure.reason == "CALLER_QUOTA_EXCEEDED"


async def test_chats_at_once_that_name_no_length_do_not_take_many_times_what_is_left(
    start: Start, simulator: Simulated
) -> None:
    """Each is expected to take what its model may."""
    model = Model(name="m", upstream="test", max_completion_tokens=60)
    config = Config(
        listen="127.0.0.1:0",
        upstreams=(upstream(simulator[1]),),
        models=(model,),
        callers=(search(tokens_per_minute=100),),
    )
    gateway = await start(config=config)
    held = request(model="m", extra_body_json=simulate(chunks=["a", "b"], fault="stall_midway"))
    stream = gateway.chat.StreamChat(stream_request(held), metadata=bearer())
    await stream.read()
    failure = await failing(gateway.chat.Chat(request(model="m"), metadata=bearer()))
    assert failure.reason == "CALLER_QUOTA_EXCEEDED"
    short = request(model="m", params=chat_pb2.GenerationParams(max_completion_tokens=20))
    await gateway.chat.Chat(short, metadata=bearer())
    stream.cancel()


async def test_a_stream_counts_until_it_has_ended(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), callers=(search(in_flight=1),))
    held = request(extra_body_json=simulate(chunks=["a", "b"], fault="stall_midway"))
    stream = gateway.chat.StreamChat(stream_request(held), metadata=bearer())
    await stream.read()
    assert (
        await failing(gateway.chat.Chat(request(), metadata=bearer()))
    ).reason == "CALLER_QUOTA_EXCEEDED"
    stream.cancel()
    async with asyncio.timeout(10):
        while True:  # until the gateway has noticed
            try:
                await gateway.chat.Chat(request(), metadata=bearer())
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.01)


# --- TLS --------------------------------------------------------------------------------------


@dataclass
class Pki:
    """An authority, and what it vouches for, as files."""

    folder: Path
    authority: trustme.CA

    @property
    def tls(self) -> Tls:
        return Tls(certificate=str(self.folder / "tls.crt"), key=str(self.folder / "tls.key"))

    @property
    def mutual(self) -> Tls:
        return Tls(
            certificate=self.tls.certificate,
            key=self.tls.key,
            client_authorities=str(self.folder / "ca.crt"),
        )

    def renew(self, authority: trustme.CA | None = None) -> None:
        leaf = (authority or self.authority).issue_cert("localhost", "127.0.0.1")
        leaf.private_key_pem.write_to_path(self.folder / "tls.key")
        leaf.cert_chain_pems[0].write_to_path(self.folder / "tls.crt")

    def client(self, name: str) -> dict[str, bytes]:
        leaf = self.authority.issue_cert(name)
        return {
            "private_key": leaf.private_key_pem.bytes(),
            "certificate_chain": leaf.cert_chain_pems[0].bytes(),
        }


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    made = Pki(tmp_path, trustme.CA())
    made.authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    made.renew()
    return made


def secure(gateway: Stubs, authority: trustme.CA, **own: bytes) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), **own)
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(gateway.running.address, credentials, options=options)


def config(base_url: str, tls: Tls, *callers: Caller) -> Config:
    return Config(
        listen="127.0.0.1:0", upstreams=(upstream(base_url),), tls=tls, callers=tuple(callers)
    )


async def chat(channel: grpc.aio.Channel, **call: Any) -> chat_service_pb2.ChatResponse:
    stub = chat_service_pb2_grpc.ChatServiceStub(channel)
    answer: chat_service_pb2.ChatResponse = await stub.Chat(request(), timeout=20, **call)
    return answer


async def unreachable(channel: grpc.aio.Channel) -> None:
    failure = await failing(
        chat_service_pb2_grpc.ChatServiceStub(channel).Chat(request(), timeout=20)
    )
    assert failure.code is Code.UNAVAILABLE
    assert failure.reason == ""


async def test_tls(start: Start, simulator: Simulated, pki: Pki) -> None:
    gateway = await start(config=config(simulator[1], pki.tls))
    async with secure(gateway, pki.authority) as channel:
        assert (await chat(channel)).choices
    async with secure(gateway, trustme.CA()) as channel:
        await unreachable(channel)
    await unreachable(gateway.channel)  # plaintext


async def test_probes_that_speak_no_tls_have_a_port_that_answers_nothing_else(
    start: Start, simulator: Simulated, pki: Pki
) -> None:
    plain = msgspec.structs.replace(
        config(simulator[1], pki.mutual, search()), health=HealthPort(listen="127.0.0.1:0")
    )
    gateway = await start(config=plain)
    async with grpc.aio.insecure_channel(gateway.running.probes) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tokenwire.v1.ChatService", "liveness"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = chat_service_pb2_grpc.ChatServiceStub(channel)
        failure = await failing(stub.Chat(request(), metadata=bearer()))
        assert failure.code is Code.UNIMPLEMENTED
        await gateway.running.health.draining()
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_mutual_tls_names_the_caller(start: Start, simulator: Simulated, pki: Pki) -> None:
    billing = Caller(name="billing", certificates=("billing.internal",))
    gateway = await start(config=config(simulator[1], pki.mutual, billing, search()))
    async with secure(gateway, pki.authority, **pki.client("billing.internal")) as channel:
        await chat(channel)
        assert gateway.events.calls[-1].caller == "billing"
        await chat(channel, metadata=bearer())
        assert gateway.events.calls[-1].caller == "search"
    async with secure(gateway, pki.authority, **pki.client("other.internal")) as channel:
        stub = chat_service_pb2_grpc.ChatServiceStub(channel)
        failure = await failing(stub.Chat(request(), timeout=20))
        assert failure.reason == "CALLER_UNAUTHENTICATED"
    async with secure(gateway, pki.authority) as channel:
        await unreachable(channel)


async def test_a_renewed_certificate_serves_without_a_restart(
    start: Start, simulator: Simulated, pki: Pki
) -> None:
    gateway = await start(config=config(simulator[1], pki.tls))
    async with secure(gateway, pki.authority) as channel:
        await chat(channel)
        other = trustme.CA()
        pki.renew(other)
        async with secure(gateway, other) as renewed:
            await chat(renewed)
        async with secure(gateway, pki.authority) as late:
            await unreachable(late)
        await chat(channel)  # a connection that stands goes on


async def test_another_authority_vouches_for_callers_without_a_restart(
    start: Start, simulator: Simulated, pki: Pki
) -> None:
    billing = Caller(name="billing", certificates=("billing.internal",))
    gateway = await start(config=config(simulator[1], pki.mutual, billing))
    old = pki.client("billing.internal")
    async with secure(gateway, pki.authority, **old) as channel:
        await chat(channel)
        other = Pki(pki.folder, trustme.CA())
        other.authority.cert_pem.write_to_path(pki.folder / "ca.crt")
        async with secure(gateway, pki.authority, **other.client("billing.internal")) as renewed:
            await chat(renewed)
        assert gateway.events.calls[-1].caller == "billing"
        async with secure(gateway, pki.authority, **old) as late:
            await unreachable(late)


@pytest.mark.parametrize("broken", [b"", b"-----BEGIN CERTIFICATE-----\nnonsense\n", None])
async def test_broken_files_leave_the_last_good_certificate(
    start: Start,
    simulator: Simulated,
    pki: Pki,
    broken: bytes | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = msgspec.structs.replace(
        config(simulator[1], pki.tls), metrics=Metrics(listen="127.0.0.1:0")
    )
    gateway = await start(config=watched)

    async def refused() -> bool:
        url = f"http://{gateway.running.metrics}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as page:
            [told] = re.findall(r"^tokenwire_certificates_refused (\S+)$", await page.text(), re.M)
        return bool(float(told))

    assert not await refused()
    path = Path(pki.tls.certificate)
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)
    for _ in range(3):
        async with secure(gateway, pki.authority) as channel:
            await chat(channel)
        assert await refused()
    assert [each.levelname for each in caplog.records if each.message == "certificates"] == [
        "WARNING"  # once, however many connect
    ]
    pki.renew()
    async with secure(gateway, pki.authority) as channel:
        await chat(channel)
    assert not await refused()
