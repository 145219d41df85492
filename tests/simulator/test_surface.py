"""What a client finds at the simulator's port: keys, paths, refusals, counts, start and stop."""

from __future__ import annotations

import ast
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

import tokenwire_service.simulator
from tokenwire_service.simulator import Simulator

if TYPE_CHECKING:
    from tests.simulator.conftest import Client

TOOL = {"type": "function", "function": {"name": "get_weather"}}


def test_it_is_a_program_of_its_own() -> None:
    allowed = {"aiohttp.web", "msgspec", *sys.stdlib_module_names}
    package = Path(tokenwire_service.simulator.__file__).parent
    for module in package.glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, module
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                ours = name.startswith("tokenwire_service.simulator")
                assert ours or name in allowed or name.split(".")[0] in allowed, (module, name)


@pytest.mark.parametrize(
    ("headers", "message", "code"),
    [
        ({}, "You didn't provide an API key.", None),
        ({"authorization": "Basic abc"}, "You didn't provide an API key.", None),
        ({"authorization": "Bearer "}, "You didn't provide an API key.", None),
        ({"authorization": "Bearer wrong-key-9999"}, "********9999", "invalid_api_key"),
        ({"api-key": "bad"}, "Incorrect API key provided: ********.", "invalid_api_key"),
    ],
)
async def test_a_closed_set_of_keys(
    headers: dict[str, str], message: str, code: str | None
) -> None:
    simulator = Simulator(keys=frozenset({"right-key-1"}), tokens_per_second=0)
    async with simulator.serving() as url, aiohttp.ClientSession() as session:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        for good in ({"authorization": "bearer right-key-1"}, {"api-key": "right-key-1"}):
            async with session.post(f"{url}/chat/completions", json=body, headers=good) as response:
                assert response.status == 200
        async with session.post(f"{url}/chat/completions", json=body, headers=headers) as response:
            assert response.status == 401
            assert response.headers["x-request-id"].startswith("req_")
            error = (await response.json())["error"]
        async with session.get(f"{url}/models", headers=headers) as response:
            assert response.status == 401
    assert message in error["message"]
    assert "wrong-key" not in error["message"]
    assert {**error, "message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": None,
        "code": code,
    }
    assert simulator.stats.by_key["ey-1"] == 2


async def test_paths(client: Client) -> None:
    root = client.base_url.removesuffix("/v1")
    plain = await client.ask()
    client.base_url = root
    assert (await client.ask()).json["choices"] == plain.json["choices"]
    auth = {"authorization": "Bearer key-aaaa"}
    async with client.session.get(f"{root}/healthz") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with client.session.get(f"{root}/v1/models", headers=auth) as response:
        listed = await response.json()
    names = [model["id"] for model in listed["data"]]
    assert listed["object"] == "list"
    assert {"simulated-small", "simulated-large"} <= set(names)
    for name in names:
        async with client.session.get(f"{root}/v1/models/{name}", headers=auth) as response:
            assert await response.json() in listed["data"]
    for method, path, status, code in (
        ("GET", "/v1/models/no/such", 404, "model_not_found"),
        ("POST", "/v1/completions", 404, None),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
    ):
        async with client.session.request(method, root + path, headers=auth) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (status, code)
            assert set(error) == {"message", "type", "param", "code"}


async def test_azure_spelling(client: Client) -> None:
    url = client.base_url.removesuffix("/v1") + "/openai/deployments/my-gpt/chat/completions"
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    headers = {"api-key": "azure-key-7777"}
    async with client.session.post(url, json=body, headers=headers) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "404"
    url += "?api-version=2024-10-21"
    async with client.session.post(url, json=body, headers=headers) as response:
        events = (await response.text()).split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[0]["choices"] == []
    assert "prompt_filter_results" in chunks[0]
    assert {chunk["model"] for chunk in chunks[1:]} == {"my-gpt"}
    assert events[-2:] == ["data: [DONE]", ""]


REFUSALS: list[tuple[str, Any, str | None, str | None]] = [
    ("not JSON", b"{", None, None),
    ("not UTF-8", b'{"model": "\xff"}', None, None),
    ("NaN", b'{"model": "m", "temperature": NaN}', None, None),
    ("too deep", b"[" * 100_000, None, None),
    ("an array", [], None, None),
    ("no model", {"model": None}, None, None),
    ("model of a wrong type", {"model": 3}, "model", "invalid_type"),
    ("no messages", {"messages": None}, "messages", "missing_required_parameter"),
    ("messages of a wrong type", {"messages": "hi"}, "messages", "invalid_type"),
    ("empty messages", {"messages": []}, "messages", "empty_array"),
    ("a message that is text", {"messages": ["hi"]}, "messages[0]", "invalid_type"),
    (
        "no role",
        {"messages": [{"content": "hi"}]},
        "messages[0].role",
        "missing_required_parameter",
    ),
    (
        "unknown role",
        {"messages": [{"role": "wizard", "content": "hi"}]},
        "messages[0].role",
        "invalid_value",
    ),
    (
        "role of a wrong type",
        {"messages": [{"role": {}, "content": "hi"}]},
        "messages[0].role",
        "invalid_value",
    ),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content", None),
    (
        "content of a wrong type",
        {"messages": [{"role": "user", "content": 3}]},
        "messages[0].content",
        "invalid_type",
    ),
    (
        "a part without type",
        {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
        "messages[0].content",
        "invalid_type",
    ),
    (
        "a tool result out of nowhere",
        {"messages": [{"role": "tool", "tool_call_id": "call_1", "content": "hi"}]},
        "messages[0].role",
        None,
    ),
    ("hot", {"temperature": 3}, "temperature", "decimal_above_max_value"),
    ("cold", {"temperature": -0.5}, "temperature", "decimal_below_min_value"),
    ("lukewarm", {"temperature": "warm"}, "temperature", "invalid_type"),
    ("true as a number", {"temperature": True}, "temperature", "invalid_type"),
    ("top_p", {"top_p": 1.5}, "top_p", "decimal_above_max_value"),
    ("no choices", {"n": 0}, "n", "integer_below_min_value"),
    ("half a choice", {"n": 1.5}, "n", "invalid_type"),
    ("no tokens", {"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    (
        "two limits",
        {"max_tokens": 1, "max_completion_tokens": 1},
        "max_tokens",
        "invalid_parameter_combination",
    ),
    ("stream of a wrong type", {"stream": "yes"}, "stream", "invalid_type"),
    ("stream options alone", {"stream_options": {"include_usage": True}}, "stream_options", None),
    (
        "stream options of a wrong type",
        {"stream": True, "stream_options": 1},
        "stream_options",
        "invalid_type",
    ),
    ("top_logprobs alone", {"top_logprobs": 2}, "top_logprobs", None),
    (
        "too many logprobs",
        {"logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        "integer_above_max_value",
    ),
    ("five stops", {"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
    ("stop of a wrong type", {"stop": [1]}, "stop", "invalid_type"),
    ("tools of a wrong type", {"tools": {}}, "tools", "invalid_type"),
    ("a tool of an unknown type", {"tools": [{"type": "magic"}]}, "tools[0].type", "invalid_value"),
    (
        "a tool without name",
        {"tools": [{"type": "function", "function": {}}]},
        "tools[0].function.name",
        "missing_required_parameter",
    ),
    (
        "a tool with a bad name",
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        "invalid_value",
    ),
    ("a choice without tools", {"tool_choice": "auto"}, "tool_choice", None),
    (
        "a choice of another tool",
        {
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "other"}},
        },
        "tool_choice",
        None,
    ),
    ("no such choice", {"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "invalid_value"),
    (
        "no such format",
        {"response_format": {"type": "xml"}},
        "response_format.type",
        "invalid_value",
    ),
    ("a format that is text", {"response_format": "json"}, "response_format", "invalid_type"),
    (
        "a format without schema",
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema.schema",
        "missing_required_parameter",
    ),
    ("no such effort", {"reasoning_effort": "some"}, "reasoning_effort", "invalid_value"),
]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [pytest.param(*row[1:], id=row[0]) for row in REFUSALS],
)
async def test_refusals(client: Client, change: Any, param: str | None, code: str | None) -> None:
    body = client.body() | change if isinstance(change, dict) else change
    reply = await client.send(body)
    assert reply.status == 400
    assert reply.headers["content-type"] == "application/json"
    error = reply.error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


async def test_parameters_it_does_not_know_are_ignored(client: Client) -> None:
    reply = await client.ask(top_k=4, store=True, temperature=None, metadata={"a": "b"})
    assert reply.status == 200


async def test_halves_of_characters_are_survived_everywhere(client: Client) -> None:
    half = "\ud83d"
    reply = await client.ask(messages=[{"role": half, "content": half}])
    assert half in reply.error["message"]
    lost = {"fault": "model_not_found", "id": half}
    assert (
        half in (await client.send(client.body(half, model=half, simulate=lost))).error["message"]
    )
    assert half in (await client.ask(half + "?")).json["choices"][0]["message"]["content"]
    assert half in (await client.ask(half + "?", stream=True)).text()
    root = client.base_url.removesuffix("/v1")
    async with client.session.get(f"{root}/_simulator/stats") as response:
        assert half in json.loads(await response.read())["by_id"]


async def test_a_body_over_the_limit(client: Client) -> None:
    reply = await client.send(b" " * (64 * 1024 * 1024 + 1))
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")


async def test_headers_of_an_answer(client: Client) -> None:
    for stream in (False, True):
        first, second = await client.ask(stream=stream), await client.ask(stream=stream)
        for name in ("limit", "remaining", "reset"):
            assert first.headers[f"x-ratelimit-{name}-requests"]
            assert first.headers[f"x-ratelimit-{name}-tokens"]
        assert first.headers["x-request-id"].startswith("req_")
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_a_client_that_leaves_is_noticed(client: Client) -> None:
    stats = client.simulator.stats
    pace = {"tokens_per_second": 1, "first_token_ms": 0}
    async with client.post(client.body(stream=True, simulate=pace)) as response:
        await response.content.readline()
        assert (stats.open_requests, stats.open_streams) == (1, 1)
        response.close()
    await client.until(lambda: stats.open_requests == 0)
    assert (stats.aborted_requests, stats.aborted_streams) == (1, 1)

    plain = asyncio.create_task(client.ask(simulate=pace))
    await client.until(lambda: stats.open_requests == 1)
    plain.cancel()
    await client.until(lambda: stats.open_requests == 0)
    assert (stats.aborted_requests, stats.aborted_streams) == (2, 1)


async def test_a_client_that_reads_to_the_end_has_not_aborted(client: Client) -> None:
    for number in range(20):
        await client.ask(stream=bool(number % 2))
    assert client.simulator.stats.requests == 20
    assert client.simulator.stats.aborted_requests == 0


async def test_stats_over_http(client: Client) -> None:
    root = client.base_url.removesuffix("/v1")
    stall = {"fault": "stall_before_headers"}
    stalled = [
        asyncio.create_task(client.ask(stream=number == 0, simulate=stall)) for number in range(3)
    ]
    await client.until(lambda: client.simulator.stats.open_requests == 3)
    await client.send(client.body(simulate={"id": "one"}), key="key-bbbb")
    async with client.session.get(f"{root}/_simulator/stats") as response:
        assert await response.json() == {
            "requests": 4,
            "open_requests": 3,
            "open_streams": 1,
            "max_concurrent": 4,
            "aborted_requests": 0,
            "aborted_streams": 0,
            "redirects_followed": 0,
            "by_fault": {"stall_before_headers": 3},
            "by_key": {"aaaa": 3, "bbbb": 1},
            "by_id": {"one": {"requests": 1, "faults": 0}},
        }
    async with client.session.post(f"{root}/_simulator/reset") as response:
        fresh = await response.json()
    assert (fresh["requests"], fresh["open_requests"], fresh["max_concurrent"]) == (0, 3, 3)
    assert (fresh["by_fault"], fresh["by_key"], fresh["by_id"]) == ({}, {}, {})
    for task in stalled:
        task.cancel()
    await client.until(lambda: client.simulator.stats.open_requests == 0)


async def test_what_callers_name_is_forgotten_in_the_end(client: Client) -> None:
    for number in range(1030):
        canned = {"fault": "bad_request", "id": f"id-{number}"}
        await client.send(client.body(simulate=canned), key=f"key-{number:04}")
    stats = client.simulator.stats
    assert len(stats.by_id) == len(stats.by_key) == 1024
    assert "id-1029" in stats.by_id
    assert "id-0" not in stats.by_id


async def test_stopping_does_not_wait_for_open_answers() -> None:
    before = asyncio.all_tasks()
    simulator = Simulator()
    async with aiohttp.ClientSession() as session:
        async with simulator.serving() as url:
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
            headers = {"authorization": "Bearer key"}
            stalled = [
                asyncio.create_task(
                    session.post(
                        f"{url}/chat/completions",
                        json=body | {"simulate": {"fault": fault}},
                        headers=headers,
                    ).__aenter__()
                )
                for fault in ("stall_before_headers", "stall_after_headers", "stall_midway")
            ]
            while simulator.stats.open_requests < 3:
                await asyncio.sleep(0.005)
        assert simulator.stats.open_requests == 0
        assert simulator.stats.aborted_requests == 0, "the clients had not left"
        for response in await asyncio.gather(*stalled, return_exceptions=True):
            if isinstance(response, aiohttp.ClientResponse):
                with pytest.raises(aiohttp.ClientError):
                    await response.read()
            else:
                assert isinstance(response, aiohttp.ClientError)
    assert asyncio.all_tasks() <= before


@pytest.mark.parametrize("pace", [-1, float("inf"), float("nan")])
def test_a_pace_that_is_none(pace: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_second"):
        Simulator(tokens_per_second=pace)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_program_says_how_to_try_it_and_stops_on_a_signal(number: int) -> None:
    program = (
        "import asyncio; from tokenwire_service.simulator import run; asyncio.run(run(port=0))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    url = line.split()[3]
    assert f"curl -N {url}/chat/completions" in line
    async with (
        aiohttp.ClientSession() as session,
        session.get(url.removesuffix("/v1") + "/healthz") as response,
    ):
        assert response.status == 200
    process.send_signal(number)
    rest, errors = await process.communicate()
    assert (process.returncode, rest, errors) == (0, b"", b"")


async def test_an_address_that_is_taken() -> None:
    async with Simulator().serving() as url:
        port = int(url.split(":")[2].removesuffix("/v1"))
        with pytest.raises(OSError, match=str(port)):
            await tokenwire_service.simulator.run(port=port)
