"""Replicas behind a name, replaced one after the other under load, and one of them killed.

Clients are ours, with their default options, and find the replicas by DNS as they would those of a
headless Service. A client of gRPC asks for addresses at most once in 30 seconds, and only when it
has lost a connection: so the last of the replicas that it knows may leave only then. That is what
the test waits for, and why docs/operations.md says how long to wait between two replicas.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from harness import Provider, chunk, completion, event_stream, provider
from processes import Program, serve, write_config
from rolling.zone import Zone, serving
from tokenwire import AsyncClient, TokenwireError
from wire.programs import program

WORDS = 20
PACE = 0.06  # seconds between words
LONG = "long"  # in a call's id: it takes four times as many words
HELD = "held"  # in a call's id: no word comes before the test says so
PATIENCE = 90.0  # seconds until a step counts as stuck

pytestmark = pytest.mark.timeout(240)


def text_of(call: str) -> str:
    """The whole answer to a call, in which every word is another."""
    words = WORDS * (4 if LONG in call else 1)
    return " ".join(f"{call}.{number}" for number in range(words))


@dataclass
class Outcome:
    """What a client got."""

    id: str
    text: str
    code: str = "OK"
    reason: str = ""
    error: str = ""


@dataclass
class Upstream:
    """A provider that answers each call with its own words, and knows who asked for which."""

    served: Provider = field(default_factory=Provider)
    asked_by: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, asked: web.Request) -> web.StreamResponse:
        """Slowly, word by word."""
        body = await asked.json()
        call = body["messages"][0]["content"]
        self.asked_by[call].append(asked.headers["authorization"].removeprefix("Bearer "))
        if HELD in call:
            await self.release.wait()
        if not body.get("stream"):
            await asyncio.sleep(PACE * WORDS / 2)
            return completion(text_of(call))
        response = await event_stream(asked)
        for number, word in enumerate(text_of(call).split(" ")):
            await response.write(chunk(f" {word}" if number else word))
            await asyncio.sleep(PACE)
        await response.write(chunk("", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    def calls_of(self, client: str, replica: str) -> int:
        """How many calls of one client came by one replica."""
        return sum(
            replica in replicas
            for call, replicas in self.asked_by.items()
            if call.startswith(client)
        )


class Replicas:
    """Gateways that differ in their address alone, and in the key by which the upstream knows them:
    `replica-1`, `replica-2`, ..."""

    def __init__(self, stack: AsyncExitStack, zone: Zone, config: str, net: str, port: int) -> None:
        self._stack = stack
        self._zone = zone
        self._config = config
        self._net = net
        self._port = port
        self.running: dict[str, Program] = {}
        self._begun = 0

    async def start(self) -> str:
        """One more, which has its address in the zone once it serves."""
        self._begun += 1
        name = f"replica-{self._begun}"
        self.running[name] = await self._stack.enter_async_context(
            serve(
                "--config",
                self._config,
                "--listen",
                f"{self._address(name)}:{self._port}",
                TEST_KEY=name,
            )
        )
        self._zone.addresses.append(self._address(name))
        return name

    async def replace(self, name: str) -> str:
        """Another in its place, as a Deployment does: first the new one is ready, then the old one
        leaves the zone and is told to end."""
        other = await self.start()
        self._zone.addresses.remove(self._address(name))
        gateway = self.running.pop(name)
        gateway.signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            assert await gateway.process.wait() == 0, gateway.lines[-5:]
        stopped = gateway.event("stopped")
        assert stopped is not None
        assert stopped["cut_short"] is False
        return other

    async def kill(self, name: str) -> None:
        """No notice, no drain."""
        gateway = self.running.pop(name)
        gateway.process.kill()
        await gateway.process.wait()
        self._zone.addresses.remove(self._address(name))

    def _address(self, name: str) -> str:
        return f"{self._net}.{name.rpartition('-')[2]}"


async def ask(client: AsyncClient, call: str, *, whole: bool = False) -> Outcome:
    """One call of the Python client."""
    if whole:
        try:
            return Outcome(call, (await client.chat(call, model="m")).text)
        except TokenwireError as error:
            return Outcome(call, "", error.code.name, error.reason, str(error))
    stream = client.stream(call, model="m")
    try:
        async for _ in stream:
            pass
    except TokenwireError as error:
        return Outcome(call, stream.text, error.code.name, error.reason, str(error))
    return Outcome(call, stream.text)


class Load:
    """Calls without a pause, of both clients, and what came of them."""

    def __init__(self, target: str, go: asyncio.subprocess.Process) -> None:
        self.client = AsyncClient(target)
        self.outcomes: list[Outcome] = []
        self._go = go
        self._ending = False

    @classmethod
    @asynccontextmanager
    async def running(cls, target: str, workers: int) -> AsyncIterator[Load]:
        """`workers` of each client, until left; then every call has ended."""
        go = await asyncio.create_subprocess_exec(
            str(program("go/bin/load")),
            target,
            str(workers),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        load = cls(target, go)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(load._read())
                for worker in range(workers):
                    group.create_task(load._work(worker))
                try:
                    yield load
                finally:
                    load._ending = True
                    assert go.stdin is not None
                    go.stdin.close()
        finally:
            await load.client.close()
            if go.returncode is None:
                go.kill()
            await go.wait()

    async def _read(self) -> None:
        assert self._go.stdout is not None
        async for line in self._go.stdout:
            self.outcomes.append(Outcome(**json.loads(line)))

    async def _work(self, worker: int) -> None:
        number = 0
        while not self._ending:
            call = f"py-{worker}-{number}{LONG if number % 5 == 0 else ''}"
            self.outcomes.append(await ask(self.client, call, whole=number % 4 == 3))
            number += 1


def free_port(address: str) -> int:
    """One that is free there; nobody else listens at addresses like it."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


async def wait_for(holds: Any) -> None:
    """As harness.until, with the patience that DNS asks for."""
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.02)


async def started(stack: AsyncExitStack, folder: Path, upstream: Upstream) -> tuple[Replicas, Zone]:
    """What both tests have. No replica runs yet."""
    net = f"127.{os.getpid() % 200 + 20}.{time.time_ns() % 250}"
    port = free_port(f"{net}.1")
    upstream.served = await stack.enter_async_context(provider(upstream.answer))
    config = write_config(
        folder,
        upstream.served.base_url,
        drain={"propagation": "1s", "grace": "60s"},
        admin={"listen": "off"},
    )
    zone = stack.enter_context(serving(port))
    return Replicas(stack, zone, config, net, port), zone


async def test_replicas_are_replaced_under_load(tmp_path: Path) -> None:
    upstream = Upstream()
    async with AsyncExitStack() as stack:
        replicas, zone = await started(stack, tmp_path, upstream)
        first, second, third = [await replicas.start() for _ in range(3)]

        async with Load.running(zone.target, 4) as load:

            def serves_both(name: str) -> bool:
                return all(upstream.calls_of(client, name) for client in ("go", "py"))

            for name in (first, second, third):
                await wait_for(lambda name=name: serves_both(name))
            fourth = await replicas.replace(first)
            fifth = await replicas.replace(second)
            # From here on only the third is known, until the clients may ask for addresses again.
            await wait_for(lambda: serves_both(fourth) and serves_both(fifth))
            await replicas.replace(third)
            await wait_for(lambda: upstream.calls_of("go", fourth) > 3)
            ended = len(load.outcomes)
            await wait_for(lambda: len(load.outcomes) > ended + 16)  # all with the new ones
        failed = [outcome for outcome in load.outcomes if outcome.code != "OK"]
        assert failed == []
        for outcome in load.outcomes:
            assert outcome.text == text_of(outcome.id)  # no word lost, none twice
        sent = Counter({call: len(replicas) for call, replicas in upstream.asked_by.items()})
        assert set(sent.values()) == {1}  # nor paid for twice
        assert {outcome.id for outcome in load.outcomes} == set(sent)


async def test_of_a_killed_replica_only_what_had_begun_is_lost(tmp_path: Path) -> None:
    upstream = Upstream()
    async with AsyncExitStack() as stack:
        replicas, zone = await started(stack, tmp_path, upstream)
        for _ in range(3):
            await replicas.start()
        async with Load.running(zone.target, 3) as load:
            calls = [f"py-{LONG}-{number}" for number in range(9)]
            calls += [f"py-{HELD}-{number}" for number in range(9)]
            asked = [asyncio.ensure_future(ask(load.client, call)) for call in calls]
            left = asyncio.ensure_future(ask(load.client, f"py-{HELD}-left"))
            await wait_for(lambda: len(upstream.asked_by.keys() & set(calls)) == len(calls))
            await asyncio.sleep(5 * PACE)  # until what streams has begun
            (victim,) = upstream.asked_by[calls[0]]
            left.cancel()
            await replicas.kill(victim)
            # Those that wait for their first word are asked elsewhere, before there is any.
            held = [call for call in calls if HELD in call and upstream.asked_by[call][0] == victim]
            await wait_for(lambda: all(len(upstream.asked_by[call]) == 2 for call in held))
            upstream.release.set()
            outcomes = await asyncio.gather(*asked)
        outcomes += load.outcomes
    assert held
    lost = [outcome for outcome in outcomes if outcome.code != "OK"]
    assert {LONG in outcome.id for outcome in lost} >= {True}
    for outcome in outcomes:
        went = upstream.asked_by[outcome.id]
        if outcome in lost:
            assert outcome.code in ("UNAVAILABLE", "Unavailable"), outcome  # as each client has it
            assert went == [victim]  # and nobody was asked again
            assert text_of(outcome.id).startswith(outcome.text)
            assert outcome.text != text_of(outcome.id)
            if outcome.text:
                assert outcome.reason == "UPSTREAM_STREAM_INTERRUPTED", outcome
        else:
            assert outcome.text == text_of(outcome.id)
            assert len(went) == 1 or (went[0] == victim and len(went) == 2)
    assert len(upstream.asked_by[f"py-{HELD}-left"]) == 1  # its caller left: no retry of that
