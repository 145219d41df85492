"""grpc.health.v1 and grpc.reflection, as load balancers and people at a terminal use them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from harness import Start, Stubs, failing, request, upstream
from tokenwire_service.settings import Admin
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]

OURS = {
    "tokenwire.v1.ChatService",
    "tokenwire.v1.ModelService",
    "tokenwire.v1.TokenizerService",
}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def health_of(gateway: Stubs) -> Any:
    return health_pb2_grpc.HealthStub(gateway.channel)


@pytest.mark.parametrize("service", ["", *sorted(OURS)])
async def test_each_service_says_how_it_is(
    start: Start, simulator: Simulated, service: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    asked = health_pb2.HealthCheckRequest(service=service)
    assert (await health_of(gateway).Check(asked)).status == SERVING
    await gateway.running.health.draining()
    assert (await health_of(gateway).Check(asked)).status == NOT_SERVING
    # Health is a hint to balancers: calls are still served.
    assert (await gateway.chat.Chat(request())).choices[0].message.content != ""


async def test_all_services_are_listed_at_once(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    listed = await health_of(gateway).List(health_pb2.HealthListRequest())
    assert {name: answer.status for name, answer in listed.statuses.items()} == dict.fromkeys(
        {"", "liveness", *OURS}, SERVING
    )
    await gateway.running.health.draining()
    listed = await health_of(gateway).List(health_pb2.HealthListRequest())
    alive = [name for name, answer in listed.statuses.items() if answer.status == SERVING]
    assert alive == ["liveness"]  # who restarted what drains would lose its calls


async def test_an_unknown_service_is_not_found(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    asked = health_pb2.HealthCheckRequest(service="tokenwire.v2.ChatService")
    failure = await failing(health_of(gateway).Check(asked))
    assert failure.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("service", ["", *sorted(OURS)])
async def test_a_watcher_hears_of_each_change(
    start: Start, simulator: Simulated, service: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    watch = health_of(gateway).Watch(health_pb2.HealthCheckRequest(service=service))
    assert (await watch.read()).status == SERVING
    await gateway.running.health.draining()
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()


async def test_a_watcher_of_an_unknown_service_waits_for_it(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    watch = health_of(gateway).Watch(health_pb2.HealthCheckRequest(service="later"))
    assert (await watch.read()).status == SERVICE_UNKNOWN
    await gateway.running.health.set("later", SERVING)
    assert (await watch.read()).status == SERVING
    watch.cancel()


async def reflect(
    gateway: Stubs, version: str, *requests: reflection_pb2.ServerReflectionRequest
) -> list[reflection_pb2.ServerReflectionResponse]:
    call = gateway.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )(iter(requests))
    return [answer async for answer in call]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services_and_describes_them(
    start: Start, simulator: Simulated, version: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    Asked = reflection_pb2.ServerReflectionRequest  # noqa: N806
    listed, described, method, unknown, no_method = await reflect(
        gateway,
        version,
        Asked(list_services=""),
        Asked(file_containing_symbol="tokenwire.v1.ChatService"),
        Asked(file_containing_symbol="tokenwire.v1.ChatService.StreamChat"),
        Asked(file_containing_symbol="tokenwire.v1.Nobody"),
        Asked(file_containing_symbol="tokenwire.v1.ChatService.Nothing"),
    )
    names = {service.name for service in listed.list_services_response.service}
    assert names >= OURS | {"grpc.health.v1.Health"}
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(packed)
        for packed in described.file_descriptor_response.file_descriptor_proto
    ]
    assert "tokenwire/v1/chat_service.proto" in {file.name for file in files}
    assert method.file_descriptor_response == described.file_descriptor_response
    for nothing in (unknown, no_method):
        assert nothing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_reflection_can_be_switched_off(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), reflection=False)
    for version in ("v1", "v1alpha"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflect(
                gateway, version, reflection_pb2.ServerReflectionRequest(list_services="")
            )
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert (await gateway.chat.Chat(request())).choices[0].message.content != ""


async def test_the_port_for_operators_answers_reflection_where_that_for_callers_does_not(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(
        upstream(simulator[1]), reflection=False, admin=Admin(listen="127.0.0.1:0")
    )
    async with grpc.aio.insecure_channel(gateway.running.admin) as channel:
        call = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        (listed,) = [answer async for answer in call]
    names = {service.name for service in listed.list_services_response.service}
    assert names >= OURS | {"tokenwire.admin.v1.AdminService"}


def frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """One HTTP/2 frame of the connection as such."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload


async def test_clients_may_ping_a_silent_connection(start: Start, simulator: Simulated) -> None:
    """Go, Java and TypeScript clients do; a default server cuts them off for it."""
    settings, ping, goaway = 4, 6, 7
    gateway = await start(upstream(simulator[1]))
    host, _, port = gateway.running.address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings))
    kinds: list[int] = []
    try:
        for number in range(20):
            writer.write(frame(ping, number.to_bytes(8, "big")))
            while True:
                head = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                kinds.append(head[3])
                if head[3] == ping and payload == number.to_bytes(8, "big"):
                    break  # acknowledged
                assert head[3] != goaway, payload
    finally:
        writer.close()
    assert kinds.count(ping) >= 20
