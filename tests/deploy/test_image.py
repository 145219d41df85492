"""The image: what is in it, that it comes out the same twice, and that it serves with no rights."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import trustme
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
pytestmark = pytest.mark.timeout(600)


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


def test_the_page_states_its_size(engine: Engine, image: str) -> None:
    (stated,) = re.findall(
        r"(\d+) MB \(\d+ MB to pull\)", (ROOT / "docs/kubernetes.md").read_text()
    )
    assert engine.image(image)["Size"] / 1e6 == pytest.approx(int(stated), rel=0.1)


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


@dataclass
class Pod:
    """The chart's Deployment as a Pod on this machine, its upstream the simulator of the tests."""

    gateway: Container
    spec: dict[str, Any]  # what the chart says of the container
    authority: trustme.CA  # that vouches for its certificate
    metrics: str  # URL

    async def probed(self) -> dict[str, int]:
        """What its probes are told, asked as Kubernetes does: in plaintext."""
        told = {}
        for name in ("startup", "readiness", "liveness"):
            probe = self.spec[f"{name}Probe"]["grpc"]
            asked = health_pb2.HealthCheckRequest(service=probe["service"])
            async with grpc.aio.insecure_channel(f"127.0.0.1:{probe['port']}") as channel:
                told[name] = (await health_pb2_grpc.HealthStub(channel).Check(asked)).status
        return told


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in taken]


@pytest.fixture
def pod(engine: Engine, image: str, simulator: Simulated) -> Iterator[Pod]:
    port, health, metrics = free_ports(3)
    mounts = {"tokenwire-keys": "/etc/tokenwire/keys", "tokenwire-tls": "/etc/tokenwire/tls"}
    config = {
        "tls": {
            "certificate": f"{mounts['tokenwire-tls']}/tls.crt",
            "key": f"{mounts['tokenwire-tls']}/tls.key",
        },
        "health": {"listen": f"0.0.0.0:{health}"},
        "metrics": {"listen": f"0.0.0.0:{metrics}"},
        # Neither is there, which holds nothing up; what would speak with them is in the image.
        "otlp": {"endpoint": "http://127.0.0.1:9"},
        "redis": {"url": "redis://127.0.0.1:9", "on_failure": "open"},
        "upstreams": {
            "test": {
                "base_url": simulator[1],
                "keys": [{"file": f"{mounts['tokenwire-keys']}/test"}],
                "passthrough": True,
            }
        },
        "drain": {"propagation": "1s", "grace": "20s"},
        "admin": {"listen": "off"},
    }
    (manifests,) = rendered(
        {
            "image": {"repository": IMAGE, "tag": image.rpartition(":")[2], "pullPolicy": "Never"},
            "config": json.dumps(config),
            "port": port,
            "listenHost": "127.0.0.1",
            "secretMounts": [{"secret": name, "path": path} for name, path in mounts.items()],
        }
    )
    (deployment,) = yaml.safe_load_all(manifests["deployment.yaml"])
    deployment["spec"]["replicas"] = 1
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    del container["ports"]  # podman maps none into the machine's own network
    for volume in spec["volumes"]:
        # podman 4.3 mounts Secrets without decoding them, and wants to hear the default.
        if secret := volume.pop("secret", None):
            volume["configMap"] = {"name": secret["secretName"]}
        volume["configMap"]["optional"] = False
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", "127.0.0.1")
    secrets = {
        "tokenwire-keys": {"test": "sk-test-k1"},
        "tokenwire-tls": {
            "tls.crt": leaf.cert_chain_pems[0].bytes().decode(),
            "tls.key": leaf.private_key_pem.bytes().decode(),
        },
    }
    # The network is this machine's own, which nobody else need reach.
    parts = [
        manifests["configmap.yaml"].replace("0.0.0.0", "127.0.0.1"),
        yaml.safe_dump(deployment),
    ]
    for name, data in secrets.items():
        given = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}
        parts.insert(0, yaml.safe_dump(given))
    with engine.playing("---\n".join(parts), "tokenwire-pod-0", "tokenwire") as played:
        yield Pod(played, container, authority, f"http://127.0.0.1:{metrics}/metrics")


async def test_the_charts_pod_serves_and_leaves_as_its_probes_say(pod: Pod) -> None:
    address = pod.gateway.event("serving")["address"]
    known = pod.gateway.inspect()
    assert known["HostConfig"]["ReadonlyRootfs"] is True
    assert known["EffectiveCaps"] in (None, [])
    assert known["Config"]["User"] == "65532:65532"
    assert set((await pod.probed()).values()) == {SERVING}

    credentials = grpc.ssl_channel_credentials(pod.authority.cert_pem.bytes())
    async with grpc.aio.secure_channel(address, credentials) as channel:
        readiness = pod.spec["readinessProbe"]["grpc"]["service"]
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=readiness)
        )
        assert (await watch.read()).status == SERVING
        chat = chat_service_pb2_grpc.ChatServiceStub(channel)
        stream = await begun(chat.StreamChat(stream_request(paced(300))))
        async with aiohttp.ClientSession() as session, session.get(pod.metrics) as scraped:
            assert "tokenwire_in_flight_calls 1.0" in await scraped.text()
        stopped = asyncio.create_task(asyncio.to_thread(pod.gateway.terminated))
        assert (await watch.read()).status == NOT_SERVING
        drained = await pod.probed()
        assert (drained["readiness"], drained["liveness"]) == (NOT_SERVING, SERVING)
        received = await stream
    assert received.failure is None
    assert received.kinds[-1] == "trailer"
    assert await stopped == 0
