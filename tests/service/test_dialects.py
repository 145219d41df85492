"""Each dialect over real sockets: a call works, keys go where they belong, errors mean the same."""

from __future__ import annotations

import json

import pytest
from aiohttp import web

from everything import everything
from harness import (
    Start,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    stream_request,
    upstream,
)
from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Model
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]
OPENAI_SHAPED = ["openai", "azure", "qwen", "internlm"]
VERSION = "2024-10-21"


async def answer(asked: web.Request) -> web.StreamResponse:
    """Whatever chat completions are asked for."""
    if asked.method == "GET":
        return web.json_response({"data": [{"id": "listed"}]})
    if (await asked.json()).get("stream"):
        response = await event_stream(asked)
        await response.write(chunk("hello") + chunk(" you", finish_reason="stop"))
        await response.write(b"data: [DONE]\n\n")
        return response
    return completion("hello")


def settings(dialect: str) -> dict[str, str]:
    return {"dialect": dialect, **({"api_version": VERSION} if dialect == "azure" else {})}


@pytest.mark.parametrize("dialect", OPENAI_SHAPED)
async def test_a_call_works_and_its_key_is_in_the_right_header_only(
    start: Start, dialect: str
) -> None:
    async with provider(answer) as served:
        gateway = await start(
            upstream(served.base_url, 1, organizations=("org-7",), **settings(dialect))
        )
        whole = await gateway.chat.Chat(request("hi", "my model"))
        received = await receive(gateway.chat.StreamChat(stream_request(request("hi", "my model"))))
    assert whole.choices[0].message.content == "hello"
    assert received.failure is None
    assert received.text != ""
    assert len(served.asked) == 2
    for asked in served.asked:
        names = [n for n, value in asked.headers.items() if "sk-test-k1" in value]
        assert names == ["api-key" if dialect == "azure" else "authorization"]
        assert asked.body["model"] == "my model"
        assert "sk-test" not in asked.path
        assert "sk-test" not in json.dumps(asked.body)
        assert ("openai-organization" in asked.headers) == (dialect != "azure")
        if dialect == "azure":
            assert asked.path == (
                f"/v1/openai/deployments/my%20model/chat/completions?api-version={VERSION}"
            )
        else:
            assert asked.path == "/v1/chat/completions"


@pytest.mark.parametrize("dialect", OPENAI_SHAPED)
async def test_the_model_list_is_asked_for_where_there_is_one(start: Start, dialect: str) -> None:
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, 1, **settings(dialect)))
        listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
    found = [model.name for model in listed.models]
    assert found == ([] if dialect == "azure" else ["listed"])
    assert [asked.path for asked in served.asked] == ([] if dialect == "azure" else ["/v1/models"])


async def test_each_model_of_one_upstream_may_speak_its_own(start: Start) -> None:
    models = (
        Model(name="a", upstream="test"),
        Model(name="b", upstream="test", dialect="azure", profile="azure-reasoning"),
        Model(name="c", upstream="test", profile="llama.cpp"),
    )
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, 1, api_version=VERSION), models=models)
        for name in "abc":
            params = chat_pb2.GenerationParams(max_completion_tokens=7)
            if name == "c":
                params.repetition_penalty = 1.5
            await gateway.chat.Chat(request(model=name, params=params))
    bodies = {asked.body["model"]: asked.body for asked in served.asked}
    paths = [asked.path.rpartition("/v1")[2].partition("?")[0] for asked in served.asked]
    assert paths == [
        "/chat/completions",
        "/openai/deployments/b/chat/completions",
        "/chat/completions",
    ]
    assert (bodies["a"]["max_tokens"], bodies["b"]["max_completion_tokens"]) == (7, 7)
    assert bodies["c"]["repeat_penalty"] == 1.5


async def test_what_is_left_out_is_named_in_the_header(start: Start) -> None:
    chat = everything()
    chat.params.choice_count = 1
    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url, 1, profile="mistral"))
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.failure is None
    dropped = set(received.header.dropped_parameters)
    assert {"params.top_k", "end_user_id", "messages[2].name", "messages[4].reasoning"} <= dropped
    assert not {"top_k", "user", "seed"} & served.asked[0].body.keys()
    assert "random_seed" in served.asked[0].body


# --- azure, as the simulator plays it ----------------------------------------------------


@pytest.mark.parametrize("versionless", [False, True])
async def test_azure_answers_a_deployment(
    start: Start, simulator: Simulated, versionless: bool
) -> None:
    root = simulator[1].removesuffix("/v1")
    base_url = f"{root}/openai/v1" if versionless else root
    version = None if versionless else VERSION
    gateway = await start(upstream(base_url, 1, dialect="azure", api_version=version))
    received = await receive(
        gateway.chat.StreamChat(stream_request(request("hi", "simulated-small")))
    )
    assert received.failure is None
    assert received.text != ""
    assert received.header.model == "simulated-small"
    if not versionless:
        filtered = json.loads(received.header.extra_json or received.trailer.extra_json)
        assert filtered["prompt_filter_results"], "what the filter found is passed on"
    whole = await gateway.chat.Chat(request("hi", "simulated-small"))
    assert whole.choices[0].message.content != ""


async def test_azure_without_a_version_is_azures_own_error(
    start: Start, simulator: Simulated
) -> None:
    root = simulator[1].removesuffix("/v1")
    gateway = await start(upstream(root, 1, dialect="azure"))
    failure = await failing(gateway.chat.Chat(request("hi", "simulated-small")))
    assert failure.reason == "INVALID_REQUEST"
    assert failure.metadata["upstreamStatus"] == "404"
    assert "Resource not found" in failure.message


async def test_azure_refuses_a_key_like_any_other(start: Start) -> None:
    simulated = Simulator(keys=frozenset({"other"}), tokens_per_second=0)
    async with simulated.serving() as base_url:
        gateway = await start(
            upstream(base_url.removesuffix("/v1"), 2, dialect="azure", api_version=VERSION)
        )
        failure = await failing(gateway.chat.Chat(request("hi", "simulated-small")))
    assert failure.reason == "UPSTREAM_CREDENTIALS_REJECTED"
    assert failure.metadata["attempts"] == "2"


# --- internlm ---------------------------------------------------------------------------


async def too_long(asked: web.Request) -> web.StreamResponse:
    """InternLM's way to say so: 200, whether a stream was asked for or not."""
    code = b'{"code": -20003, "msg": "the context is too long"}'
    if (await asked.json()).get("stream"):
        return web.Response(body=b"data: " + code + b"\n\n", content_type="text/event-stream")
    return web.Response(body=code, content_type="application/json")


async def test_internlms_code_is_no_empty_answer(start: Start) -> None:
    async with provider(too_long) as served:
        gateway = await start(upstream(served.base_url, 2, dialect="internlm"))
        whole = await failing(gateway.chat.Chat(request()))
        streamed = await receive(gateway.chat.StreamChat(stream_request(request())))
        cumulative = await receive(
            gateway.chat.StreamChat(
                stream_request(request(), mode=chat_service_pb2.STREAM_MODE_CUMULATIVE)
            )
        )
    for failure in (whole, streamed.failure, cumulative.failure):
        assert failure is not None
        assert failure.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert failure.metadata["upstreamCode"] == "-20003"
    assert streamed.events == []
    assert len(served.asked) == 3, "a request that is too long is not tried again"


# --- stop strings that are not sent -----------------------------------------------------


async def test_a_stop_string_that_the_upstream_does_not_take_is_kept_all_the_same(
    start: Start,
) -> None:
    async def prolix(asked: web.Request) -> web.StreamResponse:
        if (await asked.json()).get("stream"):
            response = await event_stream(asked)
            await response.write(chunk("one #") + chunk("## two", finish_reason="length"))
            await response.write(b"data: [DONE]\n\n")
            return response
        message = {"role": "assistant", "content": "one ### two"}
        return completion(choices=[{"index": 0, "message": message, "finish_reason": "length"}])

    chat = request(params=chat_pb2.GenerationParams(stop=["###"]))
    async with provider(prolix) as served:
        gateway = await start(upstream(served.base_url, 1, profile="openai-reasoning"))
        whole = await gateway.chat.Chat(chat)
        received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert all("stop" not in asked.body for asked in served.asked)
    assert (whole.choices[0].message.content, received.text) == ("one ", "one ")
    for ended in (whole.choices[0], received.finishes[0]):
        assert ended.finish_reason == chat_pb2.FINISH_REASON_STOP
        assert ended.finish_reason_raw == "length"
