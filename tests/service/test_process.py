"""`tokenwire serve` and its neighbours as processes: how they start, refuse to, and leave."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
import pytest
from aiohttp import ClientSession, web
from grpc_health.v1 import health_pb2

from harness import (
    completion,
    failing,
    provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from processes import (
    COMMAND,
    PROMPT,
    STALLED,
    Program,
    begun,
    ended,
    environment,
    paced,
    run,
    serve,
    write_config,
)
from tokenwire.v1 import chat_service_pb2, chat_service_pb2_grpc
from tokenwire_service.config import Config, Drain, check
from tokenwire_service.server import Running, ServerEndedError, serve_until_signalled
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
SECRETS = ("sk-test-Planted0-abcdefgh", "sk-test-Planted1-ijklmnop")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


# --- starting ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program", [(COMMAND,), (sys.executable, "-m", "tokenwire_service")], ids=["tokenwire", "-m"]
)
async def test_without_a_key_it_starts_on_the_simulator_and_says_so(
    program: tuple[str, ...],
) -> None:
    async with serve(program=program) as gateway:
        assert gateway.event("serving")["upstreams"] == "simulator"  # type: ignore[index]
        await until(lambda: any("SIMULATED ANSWERS" in line for line in gateway.lines))
        received = await receive(gateway.chat.StreamChat(stream_request(paced(5))))
        assert received.failure is None
        assert received.header.upstream == "simulator"
        assert received.text != ""
        gateway.signal(signal.SIGINT)
        assert await gateway.exit_code() == 0
    assert gateway.event("stopped")["cut_short"] is False  # type: ignore[index]
    assert PROMPT not in "\n".join(gateway.lines)


@pytest.mark.skipif(sys.platform != "linux", reason="a policy of Linux")
@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, "SCHED_BATCH"),
        ({"scheduling": "batch"}, "SCHED_BATCH"),
        ({"scheduling": "normal"}, "SCHED_OTHER"),
    ],
)
async def test_all_its_threads_are_scheduled_as_configured(
    settings: dict[str, str], policy: str, tmp_path: Path
) -> None:
    config = write_config(tmp_path, "http://127.0.0.1:1/v1", **settings)
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        await failing(gateway.chat.Chat(request()))
        threads = [int(each.name) for each in Path(f"/proc/{gateway.process.pid}/task").iterdir()]
        assert len(threads) > 1
        assert {os.sched_getscheduler(each) for each in threads} == {getattr(os, policy)}


@pytest.mark.skipif(sys.platform != "linux", reason="a policy of Linux")
def test_a_policy_that_somebody_chose_stays() -> None:
    chosen = (
        "import os; from tokenwire_service import cli; "
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); "
        "cli._schedule_as_batch(); print(os.sched_getscheduler(0) == os.SCHED_IDLE)"
    )
    done = subprocess.run([sys.executable, "-c", chosen], capture_output=True, check=True)
    assert done.stdout == b"True\n"


async def test_its_collector_leaves_alone_what_was_there_when_it_began_to_serve() -> None:
    telling = (
        "import atexit, gc, sys; from tokenwire_service.cli import main; "
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 10_000, "
        "gc.get_threshold()[0], file=sys.stderr)); sys.exit(main())"
    )
    async with serve(program=(sys.executable, "-c", telling)) as gateway:
        gateway.signal(signal.SIGINT)
        assert await gateway.exit_code() == 0
    assert "frozen True 10000" in gateway.lines


async def test_with_keys_in_the_environment_any_model_goes_through_unchanged() -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    names = ["gpt-4o", "vendor/model:v1@x", "模型", "UPPER lower", "a" * 200]
    async with provider(answer) as served:
        variables = {
            "OPENAI_API_KEY": ",".join(SECRETS),
            "OPENAI_BASE_URL": served.base_url,
            "OPENAI_ORG_ID": "org-a,org-b",
        }
        async with serve(**variables) as gateway:
            assert gateway.event("serving")["keys"] == 2  # type: ignore[index]
            for name in names:
                whole = await gateway.chat.Chat(request("hello", model=name))
                assert whole.header.upstream == "openai"
            gateway.signal(signal.SIGINT)
            assert await gateway.exit_code() == 0
    assert [asked.body["model"] for asked in served.asked] == names
    assert served.asked[0].body == {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "hello"}],
    }
    assert {asked.path for asked in served.asked} == {"/v1/chat/completions"}
    keys = [asked.headers["authorization"].removeprefix("Bearer ") for asked in served.asked]
    assert sorted(set(keys)) == sorted(SECRETS)
    assert all(one != other for one, other in itertools.pairwise(keys))
    organizations = [asked.headers["openai-organization"] for asked in served.asked]
    assert organizations == ["org-a", "org-b", "org-b", "org-a", "org-a"]  # each with each key
    assert "Planted" not in "\n".join(gateway.lines)
    assert "SIMULATED" not in "\n".join(gateway.lines)


async def test_a_429_of_one_key_is_absorbed_and_logged_without_the_key(tmp_path: Path) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if len(served.asked) == 1:
            body = {"error": {"message": f"no {asked.headers['authorization']}", "code": "x"}}
            return web.json_response(body, status=429, headers={"retry-after": "60"})
        return completion()

    async with provider(answer) as served:
        config = write_config(tmp_path, served.base_url, log={"level": "debug"})
        async with serve("--config", config, TEST_KEY=",".join(SECRETS)) as gateway:
            call = gateway.chat.Chat(request(), metadata=(("x-request-id", "find-me"),))
            whole = await call
            assert [attempt.http_status for attempt in whole.header.attempts] == [429, 200]
            gateway.signal(signal.SIGINT)
            await gateway.exit_code()
    attempt = gateway.event("attempt")
    assert attempt is not None
    assert (attempt["level"], attempt["fault"]) == ("warning", "rate_limited")
    call_line = gateway.event("call")
    assert call_line is not None
    assert (call_line["code"], call_line["attempts"]) == ("OK", 2)
    assert attempt["request_id"] == call_line["request_id"] == "find-me"
    assert "Planted" not in "\n".join(gateway.lines)


async def test_a_port_in_use_ends_it_with_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        program = await ended("serve", "--listen", address)
    assert program.process.returncode == 1
    hint = "is it in use? --listen takes another"
    assert program.lines == [f"tokenwire: cannot listen on {address}: {hint}"]


async def test_two_gateways_do_not_share_a_port_without_a_word() -> None:
    async with serve() as first:
        address = first.event("serving")["address"]  # type: ignore[index]
        second = await ended("serve", "--listen", address)
        assert second.process.returncode == 1
        assert (await first.chat.Chat(paced(1))).choices[0].message.content != ""


UPSTREAMS = "upstreams: {test: {base_url: 'http://127.0.0.1:1/v1', keys: [{env: TEST_KEY}]}}"
MALFORMED: dict[str, tuple[str, list[str]]] = {
    "no YAML": ("upstreams: [", ["tokenwire.yaml:1"]),
    "an unknown key": (f"{UPSTREAMS}\nlisten_on: x", ["tokenwire.yaml:2", "listen_on"]),
    "a wrong type": (
        f"{UPSTREAMS}\nlimits:\n  in_flight: many",
        ["tokenwire.yaml:3", "limits.in_flight", '"many"'],
    ),
    "a missing secret": (
        UPSTREAMS.replace("TEST_KEY", "NOT_SET"),
        ["tokenwire.yaml:1", "NOT_SET", "not set"],
    ),
    "a model that leads nowhere": (
        f"{UPSTREAMS}\nmodels: {{fast: {{upstream: tset}}}}",
        ["tokenwire.yaml:2", "models.fast.upstream", "did you mean test?"],
    ),
    "several at once": (
        f"{UPSTREAMS}\nlisten: nowhere\ndrain: {{grace: 5}}",
        ["tokenwire.yaml:2: listen", "tokenwire.yaml:3: drain.grace"],
    ),
    "a key in the file": (
        UPSTREAMS.replace("env: TEST_KEY", f"env: {SECRETS[0]}"),
        ["tokenwire.yaml:1", "upstreams.test.keys"],
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_configuration_is_told_before_the_port_opens(
    tmp_path: Path, name: str
) -> None:
    text, told = MALFORMED[name]
    (tmp_path / "tokenwire.yaml").write_text(text)
    path = str(tmp_path / "tokenwire.yaml")
    with socket.socket() as taken:  # so that opening the port would be another error
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        program = await ended("serve", "--config", path, "--listen", listen, TEST_KEY=SECRETS[0])
    assert program.process.returncode == 2
    errors = "\n".join(program.lines)
    for part in told:
        assert part in errors
    assert program.lines[-1] == "nothing was started"
    assert "in use" not in errors
    assert "Traceback" not in errors
    assert "Planted" not in errors
    # `check-config` says the same.
    checked = io.StringIO()
    assert check(Path(path), {"TEST_KEY": SECRETS[0]}, checked) == 1
    assert checked.getvalue().splitlines()[:-1] == program.lines[:-1]


async def test_a_configuration_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.yaml")
    program = await ended("serve", "--config", path)
    checked = await ended("check-config", "--config", path)
    assert program.process.returncode == checked.process.returncode == 2
    assert "nowhere.yaml" in program.lines[0]
    assert "nowhere.yaml" in checked.out


@pytest.mark.parametrize("option", [(), ("--config",)])
async def test_check_config_shows_what_would_run_and_no_key(
    tmp_path: Path, option: tuple[str, ...]
) -> None:
    path = write_config(tmp_path, "http://127.0.0.1:1/v1", models={"fast": {"upstream": "test"}})
    checked = await ended("check-config", *option, path, TEST_KEY=",".join(SECRETS))
    assert checked.process.returncode == 0
    assert "http://127.0.0.1:1/v1" in checked.out
    assert "fast" in checked.out
    assert "Planted" not in checked.out
    assert checked.lines == []


async def test_help_names_every_command_and_an_unknown_one_is_refused() -> None:
    told = await ended("--help")
    assert told.process.returncode == 0
    for command in ("serve", "keys", "check-config", "simulate", "chat", "demo"):
        assert command in told.out
    refused = await ended("nonsense")
    assert refused.process.returncode == 2


async def test_the_simulator_runs_as_a_program_of_its_own() -> None:
    async with run("simulate", "--listen", "127.0.0.1:0", "--tokens-per-second", "0") as program:
        await until(lambda: program.out != "")
        url = program.out.split()[3]
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        async with (
            ClientSession(headers={"authorization": "Bearer demo"}) as session,
            session.post(f"{url}/chat/completions", json=body) as response,
        ):
            assert (await response.json())["choices"][0]["message"]["content"] != ""
        program.signal(signal.SIGTERM)
        assert await program.exit_code() == 0
    refused = await ended("simulate", "--listen", "nowhere")
    assert refused.process.returncode == 2


# --- looking in -------------------------------------------------------------------------


async def test_tokenwire_keys_shows_the_keys_of_a_gateway_that_runs(tmp_path: Path) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        key = asked.headers["authorization"].removeprefix("Bearer ")
        if key == SECRETS[0]:
            return web.json_response({"error": {"message": f"Incorrect: {key}"}}, status=401)
        if (await asked.json())["model"] == "full":
            headers = {"retry-after": "300"}
            error = {"error": {"message": "slow down", "code": f"limit {key}"}}
            return web.json_response(error, status=429, headers=headers)
        return completion(usage={"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7})

    (tmp_path / "keys").write_text("\n".join(SECRETS))
    async with provider(answer) as served:
        entry = {"file": "keys", "id": "team"}
        one = {"base_url": served.base_url, "keys": [entry], "passthrough": True}
        config = write_config(
            tmp_path,
            served.base_url,
            upstreams={"test": one},
            admin={"listen": "127.0.0.1:0"},
            key_file_interval="10ms",
            log={"level": "debug"},
        )
        async with serve("--config", config) as gateway:
            target = gateway.event("serving")["admin"]  # type: ignore[index]
            await gateway.chat.Chat(request(PROMPT))
            await failing(gateway.chat.Chat(request(PROMPT, model="full"), timeout=1.0))
            table = await ended("keys", "--target", target)
            as_json = await ended("keys", "--json", TOKENWIRE_ADMIN=target)
            # The rejected key is renewed, and what the log is told of is known as a secret.
            renewed = "sk-test-Planted2-qrstuvwx"
            (tmp_path / "keys").write_text(f"{SECRETS[1]}\n{renewed}")
            await until(lambda: gateway.event("keys changed") is not None)
            models = [f"a {secret} b" for secret in (*SECRETS, renewed)]
            for model in models:
                await gateway.chat.Chat(request(PROMPT, model=model))
            (tmp_path / "keys").unlink()
            await until(lambda: gateway.event("key file unusable") is not None)
            later = await ended("keys", "--target", target)
            gateway.signal(signal.SIGINT)
            assert await gateway.exit_code() == 0
        gone = await ended("keys", "--target", target)
    assert table.process.returncode == as_json.process.returncode == 0
    lines = [line.split() for line in table.out.splitlines()]
    (first,) = (line for line in lines if line[0:1] == ["team-1"])
    (second,) = (line for line in lines if line[0:1] == ["team-2"])
    assert first[:7] == ["team-1", "retired", "team-1", "0", "1", "0", "key_rejected:1"]
    assert second[1] == "partly"
    assert "retired: the key (key_rejected)" in table.out
    assert ": its quota group, for full (rate_limited)" in table.out
    assert table.lines == []

    found = json.loads(as_json.out)
    assert found["gateway"]["inFlight"] == 0
    (upstream_now,) = found["upstreams"]
    assert (upstream_now["name"], upstream_now["keysGeneration"]) == ("test", "1")
    states = {key["id"]: key["state"] for key in upstream_now["keys"]}
    assert states == {"team-1": "KEY_STATE_RETIRED", "team-2": "KEY_STATE_PARTLY"}
    counts = {key["id"]: key["counters"] for key in upstream_now["keys"]}
    assert counts["team-1"]["faults"] == [{"fault": "key_rejected", "count": "1"}]
    assert counts["team-2"]["successes"] == "1"
    assert (counts["team-2"]["promptTokens"], counts["team-2"]["completionTokens"]) == ("3", "4")

    assert "keys set 2 times" in later.out
    assert "unreadable (No such file or directory); its last good keys stay (test)" in later.out
    assert "ready" in next(line for line in later.out.splitlines() if "team-1" in line)
    everything = "\n".join((table.out, as_json.out, later.out, *gateway.lines))
    assert "Planted" not in everything
    assert PROMPT not in everything
    changed = gateway.event("keys changed")
    assert changed is not None
    assert (changed["changed"], changed["added"], changed["removed"]) == ("team-1", "", "")
    logged = [json.loads(line).get("model") for line in gateway.lines if line.startswith("{")]
    assert logged.count("a *** b") >= len(models)

    assert gone.process.returncode == 1
    (line,) = gone.lines
    assert line.startswith(f"tokenwire keys: no gateway answers at {target}: is it running")


async def test_tokenwire_keys_says_when_it_asks_at_the_port_for_callers() -> None:
    async with serve() as gateway:
        asked = await ended("keys", "--target", gateway.event("serving")["address"])  # type: ignore[index]
    assert asked.process.returncode == 1
    (line,) = asked.lines
    assert "that may be the port for callers" in line


async def test_the_admin_port_is_not_for_callers_nor_theirs_for_operators(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    config = write_config(
        tmp_path, "http://127.0.0.1:1/v1", admin={"listen": f"unix:{path}"}, reflection=False
    )
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        assert gateway.event("serving")["admin"] == f"unix:{path}"  # type: ignore[index]
        assert path.stat().st_mode & 0o077 == 0  # nobody else may ask
        told = await ended("keys", "--target", f"unix:{path}")
        assert told.process.returncode == 0
        assert "upstream test" in told.out
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            failure = await failing(chat_service_pb2_grpc.ChatServiceStub(channel).Chat(request()))
    assert failure.code is grpc.StatusCode.UNIMPLEMENTED


async def test_the_admin_port_can_be_switched_off(tmp_path: Path) -> None:
    config = write_config(tmp_path, "http://127.0.0.1:1/v1", admin={"listen": "off"})
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        assert gateway.event("serving")["admin"] == "off"  # type: ignore[index]
        assert gateway.event("no admin port") is None


async def test_a_configured_admin_port_in_use_ends_it_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = write_config(tmp_path, "http://127.0.0.1:1/v1", admin={"listen": address})
        listen = ("--listen", "127.0.0.1:0")
        program = await ended("serve", "--config", config, *listen, TEST_KEY=SECRETS[0])
    assert program.process.returncode == 1
    hint = "is it in use? admin.listen takes another"
    assert program.lines == [f"tokenwire: cannot listen on {address}: {hint}"]


async def test_a_gateway_whose_default_admin_port_is_taken_serves_without() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def have() -> bool:
            with contextlib.suppress(OSError):
                taken.bind(("127.0.0.1", 50052))
                taken.listen()
                return True
            return False

        # A gateway of another test may have it for a moment, somebody else for good: either does.
        with contextlib.suppress(AssertionError, TimeoutError):
            await until(have)
        async with serve() as gateway:
            assert gateway.event("serving")["admin"] == "off"  # type: ignore[index]
            told = gateway.event("no admin port")
            assert told is not None
            assert told["level"] == "warning"
            assert "127.0.0.1:50052" in told["why"]
            assert (await gateway.chat.Chat(paced(1))).choices[0].message.content != ""


# --- leaving ----------------------------------------------------------------------------


async def test_sigint_lets_running_streams_finish() -> None:
    async with serve() as gateway:
        streams = [
            await begun(gateway.chat.StreamChat(stream_request(paced(40)))) for _ in range(20)
        ]
        gateway.signal(signal.SIGINT)
        await until(lambda: gateway.event("draining") is not None)
        for received in await asyncio.gather(*streams):
            assert received.failure is None
            assert received.kinds[-1] == "trailer"
        assert await gateway.exit_code() == 0
        refused = await failing(gateway.chat.Chat(paced(1)))
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert gateway.event("draining")["in_flight"] > 0  # type: ignore[index]
    assert gateway.event("stopped")["cut_short"] is False  # type: ignore[index]


async def test_sigint_lets_a_running_batch_finish_with_all_its_items() -> None:
    async with serve() as gateway:
        items = chat_service_pb2.BatchChatRequest(max_concurrency=2)
        for _ in range(10):
            items.items.add(chat=paced(5))
        call = gateway.chat.BatchChat(items)
        answers = [await call.read()]
        gateway.signal(signal.SIGINT)
        while (answer := await call.read()) is not grpc.aio.EOF:
            answers.append(answer)
        assert await gateway.exit_code() == 0
    assert [answer.WhichOneof("result") for answer in answers] == ["response"] * 10


async def test_sigterm_takes_new_calls_until_balancers_know_and_then_drains(
    tmp_path: Path, simulator: Simulated
) -> None:
    config = write_config(tmp_path, simulator[1], drain={"propagation": "500ms", "grace": "20s"})
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        watch = gateway.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        running = await begun(gateway.chat.StreamChat(stream_request(paced(100))))
        gateway.signal(signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        for service, status in (("tokenwire.v1.ChatService", NOT_SERVING), ("liveness", SERVING)):
            asked = health_pb2.HealthCheckRequest(service=service)
            assert (await gateway.health.Check(asked)).status == status
        late = await begun(gateway.chat.StreamChat(stream_request(paced(60))))
        for received in await asyncio.gather(running, late):
            assert received.failure is None
            assert received.kinds[-1] == "trailer"
        assert await gateway.exit_code() == 0
    assert gateway.event("stopped")["cut_short"] is False  # type: ignore[index]


def callers_ports(gateway: Program) -> set[str]:
    """The far ends of the connections to its port."""
    port = int(gateway.event("serving")["address"].rpartition(":")[2])  # type: ignore[index]
    tables = (Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {row[2] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"}


async def test_connections_end_with_age_and_no_call_ends_with_them(
    tmp_path: Path, simulator: Simulated
) -> None:
    config = write_config(tmp_path, simulator[1], connections={"max_age": "1s"})
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        # Longer than the age and what chance adds to it.
        longest = await begun(gateway.chat.StreamChat(stream_request(paced(250))))
        first = callers_ports(gateway)
        seen: set[str] = set()
        while not longest.done():
            received = await receive(gateway.chat.StreamChat(stream_request(paced(2))))
            assert received.failure is None
            seen |= callers_ports(gateway)
        received = await longest
        assert received.failure is None
        assert received.kinds[-1] == "trailer"
        assert len(first) == 1
        assert seen > first  # new calls went on over another one
        await until(lambda: not first & callers_ports(gateway))


async def test_who_watches_health_does_not_hold_up_the_end(
    tmp_path: Path, simulator: Simulated
) -> None:
    config = write_config(tmp_path, simulator[1], drain={"propagation": "0s", "grace": "10m"})
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        watch = gateway.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        gateway.signal(signal.SIGTERM)
        assert await gateway.exit_code() == 0  # long before ten minutes are over


async def test_the_grace_ends_what_does_not_end_by_itself(
    tmp_path: Path, simulator: Simulated
) -> None:
    config = write_config(tmp_path, simulator[1], drain={"propagation": "0s", "grace": "300ms"})
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        stalled = request(PROMPT, extra_body_json=STALLED)
        stream = await begun(gateway.chat.StreamChat(stream_request(stalled)))
        gateway.signal(signal.SIGTERM)
        received = await stream
        assert received.failure is not None
        assert "trailer" not in received.kinds
        assert await gateway.exit_code() == 0
        await until(lambda: simulator[0].stats.aborted_streams == 1)
    assert "Traceback" not in "\n".join(gateway.lines)


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGINT),
    ],
    ids=lambda signals: " ".join(number.name for number in signals),
)
async def test_a_second_signal_ends_it_at_once(
    simulator: Simulated, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    config = write_config(tmp_path, simulator[1], drain={"propagation": "5m", "grace": "5m"})
    async with serve("--config", config, TEST_KEY=SECRETS[0]) as gateway:
        stalled = request(PROMPT, extra_body_json=STALLED)
        stream = await begun(gateway.chat.StreamChat(stream_request(stalled)))
        for number in signals:
            gateway.signal(number)
            await until(lambda: gateway.event("draining") is not None)
        assert (await stream).failure is not None
        assert await gateway.exit_code() == 1
        await until(lambda: simulator[0].stats.aborted_streams == 1)
    assert gateway.event("stopped")["cut_short"] is True  # type: ignore[index]
    assert gateway.lines[-1] == f"tokenwire: a second signal, {signals[1].name}, ended it at once"
    assert "Traceback" not in "\n".join(gateway.lines)


async def test_a_server_that_ends_by_itself_is_an_error(simulator: Simulated) -> None:
    """So that a supervisor starts it again."""
    config = Config(listen="127.0.0.1:0", upstreams=(upstream(simulator[1]),))
    stopping: list[asyncio.Task[None]] = []

    def announce(running: Running) -> None:
        stopping.append(asyncio.ensure_future(running.server.stop(0)))

    with pytest.raises(ServerEndedError):
        await serve_until_signalled(config, logging.getLogger("tokenwire.test"), announce)
    await asyncio.gather(*stopping)


async def test_a_server_that_ends_by_itself_before_it_was_to_is_an_error(
    simulator: Simulated,
) -> None:
    """Calls were promised the time of the propagation, also after SIGTERM."""
    drain = Drain(propagation=60.0)
    config = Config(listen="127.0.0.1:0", upstreams=(upstream(simulator[1]),), drain=drain)
    ending: list[asyncio.Task[None]] = []

    async def end(running: Running) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        asked = health_pb2.HealthListRequest()
        while (await running.health.List(asked, None)).statuses[
            ""
        ].status == health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.01)
        await running.server.stop(0)

    def announce(running: Running) -> None:
        ending.append(asyncio.ensure_future(end(running)))

    with pytest.raises(ServerEndedError):
        await serve_until_signalled(config, logging.getLogger("tokenwire.test"), announce)
    await asyncio.gather(*ending)


def test_the_environment_of_the_tests_configures_no_gateway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    cleaned: Mapping[str, str] = environment()
    assert "OPENAI_API_KEY" not in cleaned
