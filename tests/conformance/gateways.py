"""The gateways that cases run against, each with a simulator of its own behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import trustme

from conformance.expect import differences
from harness import Recorder, upstream
from tokenwire_service import server
from tokenwire_service.config import (
    Admin,
    Caller,
    Config,
    Limits,
    Model,
    Retries,
    Timeouts,
    Tls,
    UpstreamTimeouts,
)
from tokenwire_service.secret import Digest
from tokenwire_service.simulator import Simulator
from tokenwire_service.upstream import dialects
from tokenwire_service.upstream.openai import OpenAI

_HEARTBEAT = 0.2  # seconds; the gateway's own is 15
_NEVER = 3600.0  # seconds
_SETTLES = 5.0  # seconds for what ends in the background
_LOGGER = logging.getLogger("tokenwire.conformance")


class _Defective(OpenAI):
    """A dialect with a defect, for what callers hear of one."""

    def encode(self, *_args: Any, **_options: Any) -> Any:
        raise RuntimeError("sk-test-k1 is in the text of this exception")


def _config(base_url: str, **settings: Any) -> Config:
    listen = settings.pop("listen", "127.0.0.1:0")
    models = settings.pop("models", ())
    limits = settings.pop("limits", Limits())
    whole = settings.pop("whole", Timeouts())
    retries = settings.pop("retries", Retries(max_attempts=3, backoff=0.01))
    settings.setdefault("name", "sim")
    return Config(
        listen=listen,
        admin=Admin(listen="off"),  # several run at a time
        upstreams=(upstream(base_url, **settings),),
        models=models,
        limits=limits,
        timeouts=whole,
        retries=retries,
    )


# Token of each caller by the word the cases have for it.
_TOKENS = {name: f"token-of-{name}-caller" for name in ("good", "other", "poor", "wrong")}
_CALLERS = (
    Caller(name="good", tokens=(Digest.of(_TOKENS["good"]),)),
    Caller(name="other", tokens=(Digest.of(_TOKENS["other"]),), models=("nothing",)),
    Caller(name="poor", tokens=(Digest.of(_TOKENS["poor"]),), requests_per_minute=1),
)


@dataclass(frozen=True)
class Pki:
    """An authority, what it vouches for, and one that nobody knows, as files in `folder`."""

    folder: Path

    def make(self) -> Pki:
        """Writes them."""
        authority, stranger = trustme.CA(), trustme.CA()
        authority.cert_pem.write_to_path(self.folder / "ca.pem")
        stranger.cert_pem.write_to_path(self.folder / "stranger.pem")
        for name in ("gateway", "client"):
            # No address: a client that reaches it by one must still look for the target's name.
            leaf = authority.issue_cert("localhost", common_name=name)
            leaf.cert_chain_pems[0].write_to_path(self.folder / f"{name}.pem")
            leaf.private_key_pem.write_to_path(self.folder / f"{name}.key")
        return self

    def tls(self, *, mutual: bool) -> Tls:
        """For the gateway."""
        return Tls(
            certificate=self.file("gateway.pem"),
            key=self.file("gateway.key"),
            client_authorities=self.file("ca.pem") if mutual else None,
        )

    def file(self, name: str) -> str:
        """The path of one of them."""
        return str(self.folder / name)


GATEWAYS: dict[str, Callable[[str], Config]] = {
    "plain": _config,
    "fresh": _config,
    "restarting": _config,
    "draining": _config,
    "broken": _config,
    "strict": lambda url: _config(
        url,
        passthrough=False,
        unsupported_parameters=frozenset({"top_k"}),
        models=(Model(name="strict", upstream="sim", upstream_model="simulated-small"),),
    ),
    "hasty": lambda url: _config(url, timeouts=UpstreamTimeouts(first_byte=0.3)),
    "nowhere": lambda _url: _config("http://127.0.0.1:1/v1"),
    "uncounted": lambda url: _config(
        url,
        models=(
            Model(name="uncounted", upstream="sim", tokenizer_file="/nowhere/tokenizer.model"),
        ),
    ),
    "narrow": lambda url: _config(url, limits=Limits(in_flight=1, queue=0)),
    "auth": lambda url: msgspec.structs.replace(_config(url), callers=_CALLERS),
    "tls": _config,
    "mtls": _config,
    "silent": lambda url: _config(url, timeouts=UpstreamTimeouts(first_byte=600, idle=600)),
    "stalling": lambda url: _config(url, whole=Timeouts(write=1.0)),
}


@dataclass
class Scene:
    """A running gateway with its simulator, and what the driver does to it meanwhile."""

    simulator: Simulator
    config: Config
    seen: Recorder
    running: server.Running
    restart: Callable[[], Any]
    pki: Pki
    hold: list[Any] = field(default_factory=list)
    forgotten: int = 0  # calls that were the driver's own

    def connect(self, wanted: dict[str, str]) -> dict[str, str]:
        """How a program reaches it."""
        connect = {"target": self.running.address.replace("127.0.0.1", "localhost")}
        if "token" in wanted:
            connect["token"] = _TOKENS[wanted["token"]]
        if "tls" in wanted:
            untrusted = wanted["tls"] == "untrusted"
            connect["ca_file"] = self.pki.file("stranger.pem" if untrusted else "ca.pem")
        if wanted.get("tls") == "mutual":
            connect["cert_file"] = self.pki.file("client.pem")
            connect["key_file"] = self.pki.file("client.key")
        return connect

    async def meanwhile(self, deed: str) -> None:
        """What happens to the gateway while the program runs."""
        if deed == "restart_after_first":
            while not self.seen.calls:
                await asyncio.sleep(0.01)
            await self.restart()
        elif deed == "free_slot_after_refusal":
            while not any(call.reason == "GATEWAY_OVERLOADED" for call in self.seen.calls):
                await asyncio.sleep(0.005)
            await self.free()

    async def take(self) -> None:
        """Takes the gateway's only slot."""
        slot = self.running.gateway._admission.slot(float("inf"))
        await slot.__aenter__()
        self.hold.append(slot)

    async def free(self) -> None:
        """Gives it back."""
        while self.hold:
            await self.hold.pop().__aexit__(None, None, None)

    async def differences(self, case: dict[str, Any]) -> list[str]:
        """Where the upstream or the gateway saw something else than the case says."""
        wanted, saw = case.get("upstream", {}), case.get("gateway_saw", {})

        def found() -> list[str]:
            stats = self.simulator.stats
            upstream = {
                "requests": stats.requests,
                "aborted": stats.aborted_requests,
            }
            calls = {
                "calls": len(self.seen.calls),
                "request_id": self.seen.calls[-1].request_id if self.seen.calls else "",
            }
            problems = differences(upstream, wanted, "upstream") + differences(
                calls, saw, "gateway"
            )
            if self.running.leases or self.running.connections_busy:
                problems.append("gateway: a lease is held, or an upstream answer open")
            return problems

        async with _deadline() as over:
            while (problems := found()) and not over():
                await asyncio.sleep(0.02)
        return problems


@asynccontextmanager
async def _deadline() -> AsyncIterator[Callable[[], bool]]:
    loop = asyncio.get_running_loop()
    end = loop.time() + _SETTLES
    yield lambda: loop.time() > end


@asynccontextmanager
async def serving(case: dict[str, Any]) -> AsyncIterator[Scene]:
    """The gateway a case asks for, until left."""
    name = case["gateway"]
    simulator = Simulator(tokens_per_second=0)
    async with AsyncExitStack() as outer:
        base_url = await outer.enter_async_context(simulator.serving())
        config = GATEWAYS[name](base_url)
        pki = Pki(Path(outer.enter_context(TemporaryDirectory())))
        if name in ("tls", "mtls"):
            config = msgspec.structs.replace(config, tls=pki.make().tls(mutual=name == "mtls"))
        seen = Recorder()
        heartbeat = _NEVER if name == "silent" else _HEARTBEAT
        stack = await outer.enter_async_context(AsyncExitStack())
        if name == "broken":
            defective = {**dialects.loaded(), "openai": _Defective()}
            stack.callback(setattr, dialects, "loaded", dialects.loaded)
            dialects.loaded = lambda: defective

        async def start(config: Config) -> server.Running:
            return await stack.enter_async_context(
                server.serving(config, _LOGGER, observer=seen, heartbeat=heartbeat)
            )

        running = await start(config)

        async def restart() -> None:
            await stack.aclose()
            scene.running = await start(msgspec.structs.replace(config, listen=running.address))

        scene = Scene(simulator, config, seen, running, restart, pki)
        running.gateway.draining = name == "draining"
        if name == "narrow":
            await scene.take()
        try:
            yield scene
        finally:
            await scene.free()
