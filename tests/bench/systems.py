"""The systems that are measured: how each is started, how it is set, where it is called."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench import interpreter, machine
from bench.scenarios import DIRECT, FLOOR, LITELLM, OURS, PORTKEY, RELAY
from bench.traffic import BUILT, KEYS, LOAD_CORE, ROOT, SYSTEM_CORE, Mock, Target, program

HERE = Path(__file__).resolve().parent
SOURCES = (ROOT / "service", ROOT / "clients/python/src")
TOKEN = "bench-caller-token"  # of the one caller
_STARTS_WITHIN = 120.0  # seconds; LiteLLM takes ten on a quiet machine


@dataclass(frozen=True)
class System:
    """One that serves. `pid` 0: there is none, the mock itself is called."""

    name: str
    target: Target
    pid: int
    settings: str
    start_seconds: float = 0.0  # from spawn to the first answer


# Everything a user would have on, with limits that are kept but not reached.
CONFIG = """\
listen: 127.0.0.1:{port}
log: {{format: json, level: info}}
admin: {{listen: "127.0.0.1:{admin}"}}
limits: {{in_flight: {in_flight}, pending: {pending}}}
drain: {{propagation: 0s, grace: 1s}}
callers:
  bench:
    tokens: [{{env: BENCH_TOKEN}}]
    models: ["bench*"]
    requests_per_minute: 1000000
    tokens_per_minute: 1000000000
    in_flight: 100000
    tokens_per_day: 1000000000000
upstreams:
  mock:
    base_url: {base_url}
    passthrough: true
    keys:
      - env: BENCH_KEYS
        requests_per_minute: 1000000
        tokens_per_minute: 1000000000
        in_flight: 100000
"""

MANY = 10_000  # slots: more than any scenario has in flight
DEFAULT = 1000  # limits.in_flight where nothing is configured
PENDING = 1000  # limits.pending, likewise


@contextlib.contextmanager
def tokenwire(mock: Mock, folder: Path, *, in_flight: int = MANY) -> Iterator[System]:
    """The gateway, set as users set it."""
    port, admin = _free_port(), _free_port()
    config = folder / "tokenwire.yaml"
    config.write_text(
        CONFIG.format(
            port=port,
            admin=admin,
            in_flight=in_flight,
            pending=PENDING if in_flight == DEFAULT else MANY,
            base_url=mock.base_url,
        )
    )
    environ = interpreter.path(*SOURCES)
    environ |= {"BENCH_TOKEN": TOKEN, "BENCH_KEYS": ",".join(KEYS)}
    python = interpreter.environment("gateway", Path(sys.prefix)) / "bin/python"
    command = [python, "-m", "tokenwire_service", "serve", "--config", config]
    began = time.monotonic()
    with program(command, SYSTEM_CORE, log=folder / "tokenwire.log", environ=environ) as process:
        address = f"127.0.0.1:{port}"
        _wait(process, folder / "tokenwire.log", lambda: _healthy(address))
        took = time.monotonic() - began
        yield System(
            OURS,
            Target(grpc=address, headers={"authorization": f"Bearer {TOKEN}"}),
            process.pid,
            f"`tokenwire serve`, one process; caller with a token, patterns of models and limits; "
            f"{len(KEYS)} keys with limits; json log at level info, to a file; admin port; "
            f"limits.in_flight {in_flight}; {machine.scheduling(process.pid)}",
            took,
        )


@contextlib.contextmanager
def floor(_mock: Mock, folder: Path) -> Iterator[System]:
    """A bare grpc.aio server, in the gateway's interpreter."""
    address = f"127.0.0.1:{_free_port()}"
    python = interpreter.environment("gateway", Path(sys.prefix)) / "bin/python"
    command = [python, "-m", "bench.floor", address]
    environ = interpreter.path(ROOT / "tests", *SOURCES)
    with program(command, SYSTEM_CORE, log=folder / "floor.log", environ=environ) as process:
        _wait(process, folder / "floor.log", lambda: _open(address))
        settings = (
            "bench/floor.py: prepared bytes, no parsing, no upstream; uvloop, the gateway's "
            f"channel options; {machine.scheduling(process.pid)}"
        )
        yield System(FLOOR, Target(grpc=address), process.pid, settings)


@contextlib.contextmanager
def relay(mock: Mock, folder: Path) -> Iterator[System]:
    """The plain relay in Go."""
    address = f"127.0.0.1:{_free_port()}"
    command: list[str | Path] = [BUILT / "relay", address, mock.base_url, KEYS[-1]]
    with program(command, SYSTEM_CORE, log=folder / "relay.log") as process:
        _wait(process, folder / "relay.log", lambda: _open(address))
        settings = (
            "bench/go/relay: no callers, keys, limits, retries, log; a message for each chunk"
        )
        yield System(RELAY, Target(grpc=address), process.pid, settings)


@contextlib.contextmanager
def direct(mock: Mock, _folder: Path) -> Iterator[System]:
    """The mock itself: what the two programs around a system cost, and how fast they are."""
    to = Target(http=mock.base_url + "/chat/completions", headers=_bearer(KEYS[-1]))
    yield System(DIRECT, to, 0, "the generator calls the mock over HTTP/1.1")


@contextlib.contextmanager
def litellm(mock: Mock, folder: Path) -> Iterator[System]:
    """LiteLLM's proxy, one worker, from build/servers/litellm."""
    port = _free_port()
    config = folder / "litellm.yaml"
    config.write_text((HERE / "litellm.yaml").read_text().replace("BASE_URL", mock.base_url))
    venv = interpreter.environment("litellm", ROOT / "build/servers/litellm/venv")
    command: list[str | Path] = [
        venv / "bin/litellm",
        "--config",
        config,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environ = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "LITELLM_LOG": "ERROR",
    }
    with program(command, SYSTEM_CORE, log=folder / "litellm.log", environ=environ) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(process, folder / "litellm.log", lambda: _answers(url + "/health/liveliness"))
        to = Target(http=url + "/v1/chat/completions", headers=_bearer("sk-bench-master"))
        settings = (
            "one worker, master key, no database, telemetry off, LITELLM_LOG=ERROR, no retries"
        )
        yield System(LITELLM, to, process.pid, settings)


@contextlib.contextmanager
def portkey(mock: Mock, folder: Path) -> Iterator[System]:
    """Portkey's gateway, from build/bench/portkey (see portkey/patch.py)."""
    port = _free_port()
    server = BUILT / "portkey/node_modules/@portkey-ai/gateway/build/start-server.js"
    command: list[str | Path] = [_node(), server, f"--port={port}", "--headless"]
    environ = {"NODE_ENV": "production"}
    with program(command, SYSTEM_CORE, log=folder / "portkey.log", environ=environ) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(process, folder / "portkey.log", lambda: _answers(url + "/"))
        headers = {
            **_bearer(KEYS[-1]),
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": mock.base_url,
        }
        to = Target(http=url + "/v1/chat/completions", headers=headers)
        settings = "headless, NODE_ENV=production, patched where its streams fail on Node 20"
        yield System(PORTKEY, to, process.pid, settings)


Starter = Callable[[Mock, Path], contextlib.AbstractContextManager[System]]

STARTERS: dict[str, Starter] = {
    OURS: tokenwire,
    FLOOR: floor,
    RELAY: relay,
    DIRECT: direct,
    LITELLM: litellm,
    PORTKEY: portkey,
}
PEERS = (LITELLM, PORTKEY)

# Peers that are not measured, and why.
UNOBTAINABLE = {
    "Bifrost": (
        "`go install github.com/maximhq/bifrost/transports/bifrost-http@v1.3.0` is refused by the "
        "Go module proxy (403), and its npm package only downloads a program"
    ),
    "agentgateway": "not published as a crate",
    "Busbar": "the crate of that name is reserved, without code",
}


def unavailable(name: str) -> str:
    """Why a peer cannot be measured here; empty if it can."""
    if name == LITELLM and not (ROOT / "build/servers/litellm/.complete").exists():
        return "not installed: make build/servers/litellm/.complete"
    if name == PORTKEY and not (BUILT / "portkey/.complete").exists():
        return "not installed: make build/bench/portkey/.complete"
    return ""


@contextlib.contextmanager
def mock_upstream(folder: Path) -> Iterator[Mock]:
    """The mock, on the generator's core."""
    address = f"127.0.0.1:{_free_port()}"
    with program([BUILT / "mock", address], LOAD_CORE, log=folder / "mock.log") as process:
        _wait(process, folder / "mock.log", lambda: _open(address))
        yield Mock(address)


def versions() -> dict[str, str]:
    """Of all that takes part, as far as it is installed."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    found["go"] = _output(["go", "version"]).removeprefix("go version ")
    found["node"] = _output(["node", "--version"])
    found["tokenwire"] = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    python = ROOT / "build/servers/litellm/venv/bin/python"
    if python.exists():
        code = "from importlib.metadata import version; print(version('litellm'))"
        found["litellm"] = _output([str(python), "-c", code])
    lock = HERE / "portkey/package.json"
    found["portkey"] = lock.read_text().partition('@portkey-ai/gateway": "')[2].partition('"')[0]
    return found


_PACKAGES = ("grpcio", "protobuf", "aiohttp", "uvloop", "msgspec")


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _node() -> str:
    found = shutil.which("node")
    assert found is not None, "Portkey needs Node.js"
    return found


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    give_up = time.monotonic() + _STARTS_WITHIN
    while not ready():
        if process.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError(f"{process.args!r} does not serve: {log.read_text()[-2000:]}")
        time.sleep(0.002)


def _open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _healthy(address: str) -> bool:
    """One call of the health service, tried when the port is open: gRPC's own wait for a
    connection goes in steps of a second."""
    if not _open(address):
        return False
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
