"""A configuration that changes while the gateway runs: by its file alone, and by SIGHUP."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import msgspec
from aiohttp import ClientSession, web

from harness import (
    Provider,
    Start,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    stream_request,
    until,
)
from processes import Program, begun, ended, serve, write_config
from tokenwire_service.config import Key, Retries, Upstream
from tokenwire_service.secret import Secret

KEYS = ("sk-test-Planted0-abcdefgh", "sk-test-Planted1-ijklmnop")
FAST = {"key_file_interval": "10ms", "admin": {"listen": "off"}}


def events(gateway: Program, name: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in gateway.lines if line.startswith("{"))
    return [line for line in lines if line["event"] == name]


async def logged(gateway: Program, name: str, times: int = 1) -> dict[str, Any]:
    """The line of the log with this event that came as the n-th."""
    await until(lambda: len(events(gateway, name)) >= times)
    return events(gateway, name)[times - 1]


def renamed(folder: Path, base_url: str, **top: Any) -> None:
    """Another configuration in place of the one before, in one step."""
    (folder / "new").mkdir(exist_ok=True)
    Path(write_config(folder / "new", base_url, **top)).replace(folder / "tokenwire.yaml")


async def answer(asked: web.Request) -> web.StreamResponse:
    return completion()


async def test_calls_to_come_go_by_the_new_file_and_those_that_run_by_the_old_one(
    tmp_path: Path,
) -> None:
    released = asyncio.Event()

    async def slow(asked: web.Request) -> web.StreamResponse:
        response = await event_stream(asked)
        await response.write(chunk("one "))
        await released.wait()
        await response.write(chunk("two", finish_reason="stop") + b"data: [DONE]\n\n")
        return response

    async with provider(slow) as old, provider(answer) as new:
        config = write_config(tmp_path, old.base_url, **FAST)
        async with serve("--config", config, TEST_KEY=KEYS[0]) as gateway:
            stream = await begun(gateway.chat.StreamChat(stream_request(request())))
            renamed(tmp_path, new.base_url, timeouts={"total": "1s"}, **FAST)
            assert (await logged(gateway, "configuration taken"))["generation"] == 2
            await gateway.chat.Chat(request())
            assert (len(old.asked), len(new.asked)) == (1, 1)
            await asyncio.sleep(1.2)  # longer than a call may take that begins now
            released.set()
            received = await stream
            assert received.failure is None
            assert received.text == "two"  # the first word was read before
            # What no call needs any more is closed: the old upstream's connection.
            await until(lambda: sockets(gateway, old) == 0)
            assert sockets(gateway, new) == 1
            gateway.signal(signal.SIGTERM)
    assert not events(gateway, "defect")


def sockets(gateway: Program, served: Provider) -> int:
    """Connections from the gateway to an upstream."""
    port = int(served.base_url.rpartition(":")[2].removesuffix("/v1"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


async def scraped(gateway: Program) -> list[str]:
    """What Prometheus is told, line by line."""
    address = gateway.event("serving")["metrics"]  # type: ignore[index]
    async with ClientSession() as session, session.get(f"http://{address}/metrics") as response:
        return (await response.text()).splitlines()


async def test_what_is_wrong_changes_nothing_until_it_is_right(tmp_path: Path) -> None:
    async with provider(answer) as served:
        told = {**FAST, "metrics": {"listen": "127.0.0.1:0"}, "admin": {"listen": "127.0.0.1:0"}}
        config = write_config(tmp_path, served.base_url, **told)
        keys = tmp_path / "keys"
        upstreams = {
            "test": {"base_url": served.base_url, "keys": [{"file": "keys"}], "passthrough": True}
        }
        async with serve("--config", config, TEST_KEY=KEYS[0]) as gateway:
            (tmp_path / "tokenwire.yaml").write_text("limits: {in_flight: 0}")
            refused = await logged(gateway, "configuration refused")
            assert "limits.in_flight: got 0" in refused["problem"]
            await gateway.chat.Chat(request())
            # A file that is named before it is there is tried again by itself.
            renamed(tmp_path, served.base_url, upstreams=upstreams, **told)
            refused = await logged(gateway, "configuration refused", 2)
            assert "upstreams.test.keys[0].file" in refused["problem"]
            await gateway.chat.Chat(request())
            keys.write_text(KEYS[1])
            assert (await logged(gateway, "configuration taken"))["generation"] == 2
            await gateway.chat.Chat(request())
            (tmp_path / "tokenwire.yaml").unlink()
            await logged(gateway, "configuration refused", 3)
            await gateway.chat.Chat(request())
            metrics = await scraped(gateway)
            target = gateway.event("serving")["admin"]  # type: ignore[index]
            shown = await ended("keys", "--target", target)
            live = await ended("top", "--once", "--target", target)
            gateway.signal(signal.SIGTERM)
    used = [asked.headers["authorization"].removeprefix("Bearer ") for asked in served.asked]
    assert used == [KEYS[0], KEYS[0], KEYS[1], KEYS[1]]
    assert len(events(gateway, "configuration refused")) == 3
    assert "tokenwire_config_generation 2.0" in metrics
    assert "tokenwire_config_reload_failures_total 3.0" in metrics
    says = "configuration 2 stays in force, its file is refused: "
    assert says in shown.out
    assert says in live.out
    assert "Planted" not in "\n".join(gateway.lines)


async def test_sighup_reads_it_at_once_and_says_what_waits_for_a_restart(tmp_path: Path) -> None:
    slow = {"key_file_interval": "1h", "admin": {"listen": "off"}}
    async with provider(answer) as served:
        config = write_config(tmp_path, served.base_url, listen="127.0.0.1:0", **slow)
        async with serve("--config", config, TEST_KEY=KEYS[0]) as gateway:
            gateway.signal(signal.SIGHUP)
            await logged(gateway, "configuration unchanged")
            models = {"fast": {"upstream": "test", "upstream_model": "m-1"}}
            renamed(
                tmp_path,
                served.base_url,
                models=models,
                log={"level": "warning"},
                reflection=False,
                limits={"in_flight": 1, "message_bytes": "1MiB"},
                **slow,
            )
            gateway.signal(signal.SIGHUP)
            waits = await logged(gateway, "configuration needs a restart")
            assert waits["settings"] == "limits.message_bytes,reflection"
            assert (await gateway.chat.Chat(request(model="fast"))).header.upstream == "test"
            gateway.signal(signal.SIGTERM)
            await gateway.exit_code()
    assert served.asked[-1].body["model"] == "m-1"
    assert not events(gateway, "stopped")  # which is told at the level info


async def test_what_is_known_of_keys_and_callers_stays(tmp_path: Path) -> None:
    async def picky(asked: web.Request) -> web.StreamResponse:
        key = asked.headers["authorization"].removeprefix("Bearer ")
        if key == KEYS[0]:
            return web.json_response({"error": {"message": "Incorrect API key"}}, status=401)
        return completion()

    (tmp_path / "keys").write_text("\n".join(KEYS))
    one, two = (("authorization", f"Bearer token-of-{name}") for name in ("one", "two"))
    async with provider(picky) as served:
        test = {"base_url": served.base_url, "keys": [{"file": "keys"}], "passthrough": True}

        def callers(*names: str, chats: int) -> dict[str, Any]:
            return {
                name: {"tokens": [{"env": name.upper()}], "requests_per_minute": chats}
                for name in names
            }

        variables = {"ONE": "token-of-one", "TWO": "token-of-two"}
        config = write_config(
            tmp_path, "", upstreams={"test": test}, callers=callers("one", chats=4), **FAST
        )
        async with serve("--config", config, **variables) as gateway:
            for _ in range(3):
                await gateway.chat.Chat(request(), metadata=(one,))
            refused = await failing(gateway.chat.Chat(request(), metadata=(two,)))
            assert refused.reason == "CALLER_UNAUTHENTICATED"
            # Moved, so that every connection is new, and with another weight for each key.
            test["base_url"] = served.base_url.replace("127.0.0.1", "localhost")
            test["keys"] = [{"file": "keys", "weight": 2}]
            renamed(
                tmp_path,
                "",
                upstreams={"test": test},
                callers=callers("one", "two", chats=4),
                **FAST,
            )
            await logged(gateway, "configuration taken")
            for _ in range(3):
                await gateway.chat.Chat(request(), metadata=(two,))
            await gateway.chat.Chat(request(), metadata=(one,))  # its fourth
            over = await failing(gateway.chat.Chat(request(), metadata=(one,)))
            assert over.reason == "CALLER_QUOTA_EXCEEDED"
            gateway.signal(signal.SIGTERM)
    keys = Counter(asked.headers["authorization"][-1] for asked in served.asked)
    assert keys["h"] == 1  # rejected once, and never asked again


async def test_a_model_that_left_is_gone_and_its_upstream_with_it(tmp_path: Path) -> None:
    async with provider(answer) as first, provider(answer) as second:

        def both(*names: str) -> dict[str, Any]:
            urls = {"first": first.base_url, "second": second.base_url}
            return {
                "upstreams": {
                    name: {"base_url": urls[name], "keys": [{"env": "TEST_KEY"}]} for name in names
                },
                "models": {f"m-{name}": {"upstream": name} for name in names},
            }

        config = write_config(tmp_path, "", **both("first"), **FAST)
        async with serve("--config", config, TEST_KEY=KEYS[0]) as gateway:
            await gateway.chat.Chat(request(model="m-first"))
            renamed(tmp_path, "", **both("first", "second"), **FAST)
            await logged(gateway, "configuration taken")
            await gateway.chat.Chat(request(model="m-second"))
            renamed(tmp_path, "", **both("second"), **FAST)
            await logged(gateway, "configuration taken", 2)
            gone = await failing(gateway.chat.Chat(request(model="m-first")))
            assert gone.code is grpc.StatusCode.NOT_FOUND
            received = await receive(
                gateway.chat.StreamChat(stream_request(request(model="m-second")))
            )
            assert received.failure is not None  # it does not stream, but it was asked
            await until(lambda: sockets(gateway, first) == 0)
            gateway.signal(signal.SIGTERM)
    assert (len(first.asked), len(second.asked)) >= (1, 2)
    assert not events(gateway, "defect")


async def test_tokens_in_a_file_come_and_go_with_it(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("token-of-yesterday")

    async with provider(answer) as served:
        config = write_config(
            tmp_path, served.base_url, callers={"one": {"tokens": [{"file": "tokens"}]}}, **FAST
        )
        async with serve("--config", config, TEST_KEY=KEYS[0]) as gateway:

            async def ask(day: str) -> str:
                token = (("authorization", f"Bearer token-of-{day}"),)
                try:
                    await gateway.chat.Chat(request(), metadata=token)
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return "OK"

            assert await ask("yesterday") == "OK"
            await asyncio.sleep(0.1)  # it is read once more, and nothing is said of that
            assert not [e for e in gateway.lines if '"configuration' in e]
            (tmp_path / "next").write_text("token-of-yesterday\ntoken-of-today")
            (tmp_path / "next").replace(tokens)
            await logged(gateway, "configuration taken")
            assert [await ask(day) for day in ("yesterday", "today")] == ["OK", "OK"]
            (tmp_path / "next").write_text("")  # no token at all: the last good ones stay
            (tmp_path / "next").replace(tokens)
            await logged(gateway, "configuration refused")
            assert await ask("today") == "OK"
            (tmp_path / "next").write_text("token-of-today")
            (tmp_path / "next").replace(tokens)
            await logged(gateway, "configuration taken", 2)
            assert [await ask(day) for day in ("yesterday", "today")] == ["UNAUTHENTICATED", "OK"]
            gateway.signal(signal.SIGTERM)
    assert not [line for line in gateway.lines if "token-of" in line]


async def test_a_file_that_lost_its_callers_does_not_let_everyone_in(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("token-of-one")
    callers = {"one": {"tokens": [{"file": "tokens"}]}}
    async with provider(answer) as served:
        config = write_config(tmp_path, served.base_url, callers=callers, **FAST)
        # Enough for a file of nothing to be a configuration.
        there = {"TEST_KEY": KEYS[0], "OPENAI_API_KEY": KEYS[1], "OPENAI_BASE_URL": served.base_url}
        async with serve("--config", config, **there) as gateway:
            for number, lost in enumerate(("", Path(config).read_text()), 1):
                if lost:
                    lost = json.dumps({k: v for k, v in json.loads(lost).items() if k != "callers"})
                Path(config).write_text(lost)
                refused = await logged(gateway, "configuration refused", number)
                assert "callers: got nothing" in refused["problem"]
                stranger = await failing(gateway.chat.Chat(request()))
                assert stranger.code is grpc.StatusCode.UNAUTHENTICATED
                token = (("authorization", "Bearer token-of-one"),)
                await gateway.chat.Chat(request(), metadata=token)
                renamed(tmp_path, served.base_url, callers=callers, **FAST)
                await logged(gateway, "configuration unchanged", number)
            gateway.signal(signal.SIGTERM)


async def test_keys_for_another_address_are_never_sent_to_the_one_before(start: Start) -> None:
    """A call that began with the address before tries again after the change."""
    go_on = asyncio.Event()

    async def failing_once(asked: web.Request) -> web.StreamResponse:
        await go_on.wait()
        if asked.headers["authorization"] != "Bearer sk-test-before":
            return web.json_response({"error": {"code": "invalid_api_key"}}, status=401)
        return completion() if len(before.asked) > 1 else web.Response(status=500)

    def reached(served: Provider, key: str) -> Upstream:
        keys = (Key(id="k1", secret=Secret(key)),)
        return Upstream(name="test", base_url=served.base_url, keys=keys, passthrough=True)

    async with provider(failing_once) as before, provider(answer) as after:
        gateway = await start(
            reached(before, "sk-test-before"), retries=Retries(backoff=0.001, backoff_cap=0.001)
        )
        running = asyncio.ensure_future(gateway.chat.Chat(request()))
        await until(lambda: len(before.asked) == 1)
        live = gateway.running.live
        upstreams = (reached(after, "sk-test-after"),)
        taken = live.take(msgspec.structs.replace(live.config, upstreams=upstreams))
        go_on.set()
        assert (await running).choices
        assert (await gateway.chat.Chat(request())).choices
        for client in taken.left:
            await client.close()
    assert {asked.headers["authorization"] for asked in before.asked} == {"Bearer sk-test-before"}
    assert [asked.headers["authorization"] for asked in after.asked] == ["Bearer sk-test-after"]
