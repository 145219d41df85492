"""The image: what is in it, that it comes out the same twice, and that it serves with no rights."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.containers import IMAGE, LOCKED_DOWN, Container, Engine
from deploy.tools import ROOT, rendered, run, tool
from harness import request, simulate, stream_request
from processes import begun, paced
from tokenwire.v1 import (
    chat_service_pb2_grpc,
    tokenizer_service_pb2,
    tokenizer_service_pb2_grpc,
)
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
DATE = 1_700_000_000  # seconds since 1970
LABELS = {"VERSION": "1.2.3", "REVISION": "abcdef", "SOURCE": "https://example.com/tokenwire"}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HELLO = tokenizer_service_pb2.TokenizeRequest(model="gpt-4o", texts=["hello world"])
# Longer than the rest of the suite's: a build on a busy machine takes a minute.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.found(tmp_path_factory.mktemp("containers"))


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    """Its tag. Built once for all tests."""
    return engine.built(SOURCE_DATE_EPOCH=str(DATE), **LABELS)


def test_hadolint_finds_nothing() -> None:
    assert run(tool("hadolint"), "Dockerfile") == ""


def test_the_base_is_pinned_by_digest_and_an_argument() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (base,) = [line for line in lines if line.startswith("ARG BASE=")]
    _, _, digest = base.partition("@sha256:")
    assert len(digest) == 64
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM ${BASE} AS build",
        "FROM scratch",
    ]


def test_the_bill_of_materials_lists_every_package(tmp_path: Path) -> None:
    path = tmp_path / "sbom.cdx.json"
    tool("cyclonedx-py")  # else the target would install it now
    run("make", "sbom", f"SBOM={path}")
    listed = {
        (component["name"], component["version"]): component["externalReferences"]
        for component in json.loads(path.read_text())["components"]
    }
    pinned = re.findall(
        r"^([\w.-]+)==([^\s;]+)", (ROOT / "service/requirements.txt").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(pinned)
    assert all(any(one.get("hashes") for one in references) for references in listed.values())


def test_a_second_build_gives_the_same_image(engine: Engine, image: str) -> None:
    engine.build(f"{IMAGE}:again", SOURCE_DATE_EPOCH=str(DATE), **LABELS)
    known, again = engine.image(image), engine.image(f"{IMAGE}:again")
    engine.podman("image", "rm", f"{IMAGE}:again")
    assert again["RootFS"] == known["RootFS"]
    assert again["Digest"] == known["Digest"]


def test_it_says_what_it_is(engine: Engine, image: str) -> None:
    known = engine.image(image)
    labels = {name.rpartition(".")[2]: value for name, value in known["Labels"].items()}
    assert labels | {"name": "", "version": "1.2.3"} == {
        "title": "tokenwire",
        "description": "A gRPC gateway for LLM chat",
        "licenses": "Apache-2.0",
        "version": "1.2.3",
        "revision": "abcdef",
        "source": "https://example.com/tokenwire",
        "name": "",
    }
    config = known["Config"]
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["tokenwire"]
    assert len(known["RootFS"]["Layers"]) == 1


def test_nothing_in_it_can_be_started_but_python(engine: Engine, image: str) -> None:
    with engine.files(image) as root:
        files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        programs = {path.name for path in files if path.stat().st_mode & 0o111}
        (loader,) = {name for name in programs if name.startswith("ld-linux")}
        (python,) = {name for name in programs if name.startswith("python3")}
        assert programs == {"tokenwire", python, loader}
        assert not any((root / name).exists() for name in ("bin", "usr/bin/sh", "usr/bin/dpkg"))
        assert not any(path.name == "pip" for path in root.rglob("pip"))
        assert {path.stat().st_mtime for path in root.rglob("*") if not path.is_symlink()} == {DATE}
        assert not any(path.stat().st_mode & 0o022 for path in files)
        # Compiled code belongs to its source by content, and is not compared with it at each start.
        compiled = [path for path in files if path.suffix == ".pyc"]
        assert len(compiled) > 500
        assert {path.read_bytes()[4] for path in compiled} == {0b01}
        if Path("/var/lib/dpkg/status").exists():  # where this machine is a Debian
            assert "Package: libssl3" in (root / "var/lib/dpkg/status.d/libssl3").read_text()


async def test_it_serves_without_rights_network_or_a_place_to_write(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    os.chown(sockets, 65532, 65532)
    mount = ("--volume", f"{sockets}:/run/tokenwire")
    listen = ("--env", "TOKENWIRE_LISTEN=unix:/run/tokenwire/grpc.sock")
    with engine.running(image, *LOCKED_DOWN, *mount, *listen) as gateway:
        gateway.event("serving")
        known = gateway.inspect()
        assert known["HostConfig"]["ReadonlyRootfs"] is True
        assert known["EffectiveCaps"] in (None, [])
        async with grpc.aio.insecure_channel(f"unix:{sockets}/grpc.sock") as channel:
            chat = chat_service_pb2_grpc.ChatServiceStub(channel)
            answer = await chat.Chat(request(extra_body_json=simulate(text="pong")))
            assert answer.choices[0].message.content == "pong"
            tokens = tokenizer_service_pb2_grpc.TokenizerServiceStub(channel)
            told = await tokens.Tokenize(HELLO)
            assert (told.tokenizer, list(told.lists[0].ids)) == ("o200k_base", [24912, 2375])
        who = "import os; print(os.getuid(), os.getgid(), open('/proc/1/cmdline').read())"
        uid, gid, first = gateway.execute("/app/bin/python", "-c", who).split(" ", 2)
        assert (uid, gid) == ("65532", "65532")
        assert first.rstrip("\0").split("\0")[-2:] == ["/app/bin/tokenwire", "serve"]
        assert "upstream simulator" in gateway.execute("tokenwire", "keys")
        # Where the engine mounts something; nothing that the gateway would have written.
        assert engine.podman("diff", gateway.name).splitlines() == ["C /etc", "A /run/tokenwire"]
        assert gateway.terminated() == 0
        assert gateway.event("draining")["signal"] == "SIGTERM"
        assert gateway.event("stopped")["cut_short"] is False


@pytest.fixture
def pod(
    engine: Engine, image: str, simulator: Simulated
) -> Iterator[tuple[Container, dict[str, Any]]]:
    """The chart's Deployment as a Pod on this machine, its upstream the simulator of the tests; and
    what the chart says of its container."""
    config = {
        "upstreams": {
            "test": {
                "base_url": simulator[1],
                "keys": [{"file": "/etc/tokenwire/keys/test"}],
                "passthrough": True,
            }
        },
        "drain": {"propagation": "1s", "grace": "20s"},
        "admin": {"listen": "off"},
    }
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (manifests,) = rendered(
        {
            "image": {"repository": IMAGE, "tag": image.rpartition(":")[2], "pullPolicy": "Never"},
            "config": json.dumps(config),
            "port": port,
            "listenHost": "127.0.0.1",
        }
    )
    (deployment,) = yaml.safe_load_all(manifests["deployment.yaml"])
    deployment["spec"]["replicas"] = 1
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    del container["ports"]  # podman maps none into the machine's own network
    for volume in spec["volumes"]:
        for source in ("secret", "configMap"):
            if source in volume:
                volume[source]["optional"] = False  # the default, which podman 4.3 wants to hear
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "tokenwire-keys"},
        "data": {"test": b64encode(b"sk-test-k1").decode()},
    }
    parts = (manifests["configmap.yaml"], yaml.safe_dump(secret), yaml.safe_dump(deployment))
    with engine.playing("---\n".join(parts), "tokenwire-pod-0", "tokenwire") as played:
        yield played, container


async def test_the_charts_pod_serves_and_leaves_as_its_probes_say(
    pod: tuple[Container, dict[str, Any]],
) -> None:
    gateway, container = pod
    known = gateway.inspect()
    assert known["HostConfig"]["ReadonlyRootfs"] is True
    assert known["EffectiveCaps"] in (None, [])
    assert known["Config"]["User"] == "65532:65532"

    async with grpc.aio.insecure_channel(gateway.event("serving")["address"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def probed() -> dict[str, int]:
            return {
                name: (
                    await health.Check(
                        health_pb2.HealthCheckRequest(
                            service=container[f"{name}Probe"]["grpc"]["service"]
                        )
                    )
                ).status
                for name in ("startup", "readiness", "liveness")
            }

        assert await probed() == {"startup": SERVING, "readiness": SERVING, "liveness": SERVING}
        readiness = container["readinessProbe"]["grpc"]["service"]
        watch = health.Watch(health_pb2.HealthCheckRequest(service=readiness))
        assert (await watch.read()).status == SERVING
        chat = chat_service_pb2_grpc.ChatServiceStub(channel)
        stream = await begun(chat.StreamChat(stream_request(paced(300))))
        stopped = asyncio.create_task(asyncio.to_thread(gateway.terminated))
        assert (await watch.read()).status == NOT_SERVING
        drained = await probed()
        assert (drained["readiness"], drained["liveness"]) == (NOT_SERVING, SERVING)
        received = await stream
    assert received.failure is None
    assert received.kinds[-1] == "trailer"
    assert await stopped == 0
