"""The gateway in front of LiteLLM's proxy, whose models are mocks of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from servers.process import HERE, listening, programs

from harness import Start, failing, receive, request, stream_request, upstream
from tokenwire.v1 import chat_pb2, model_service_pb2
from tokenwire_service.config import Key, Retries, Upstream
from tokenwire_service.secret import Secret

HAIKU = "An old silent pond / a frog jumps into the pond / splash! Silence again."
QUICK = Retries(max_attempts=2, backoff=0.001, backoff_cap=0.001, budget_floor=1000)

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a proxy that takes the key sk-test-k1."""
    command = [programs("litellm") / "litellm", "--config", HERE / "litellm.yaml"]
    command += ["--host", "127.0.0.1", "--port", "{port}"]
    environ = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    folder = tmp_path_factory.mktemp("litellm")
    with listening(command, "/health/liveliness", folder, environ) as url:
        yield url + "/v1"


async def test_a_plain_answer_comes_through(start: Start, litellm: str) -> None:
    gateway = await start(upstream(litellm, keys=1))
    answer = await gateway.chat.Chat(request(model="haiku"))
    assert answer.choices[0].message.content == HAIKU
    assert answer.choices[0].finish_reason == chat_pb2.FINISH_REASON_STOP
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_whose_usage_comes_in_a_chunk_with_choices(
    start: Start, litellm: str
) -> None:
    """After its finish_reason, where OpenAI's has none: it is neither text nor a second end."""
    gateway = await start(upstream(litellm, keys=1))
    received = await receive(gateway.chat.StreamChat(stream_request(request(model="haiku"))))
    assert received.failure is None
    assert received.text == HAIKU
    assert received.kinds[-2:] == ["finish", "trailer"]
    assert received.finishes[0].finish_reason_raw == "stop"
    usage = received.trailer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0


@pytest.mark.parametrize("streaming", ["always", "never"])
async def test_answers_fold_both_ways(start: Start, litellm: str, streaming: str) -> None:
    gateway = await start(upstream(litellm, keys=1, streaming=streaming))
    answer = await gateway.chat.Chat(request(model="haiku"))
    received = await receive(gateway.chat.StreamChat(stream_request(request(model="haiku"))))
    assert received.failure is None
    assert answer.choices[0].message.content == received.text == HAIKU
    if streaming == "never":
        assert len(received.deltas) == 1


async def test_tools_are_called(start: Start, litellm: str) -> None:
    gateway = await start(upstream(litellm, keys=1))
    chat = request(model="tools")
    chat.tools.add().function.name = "get_weather"
    message = (await gateway.chat.Chat(chat)).choices[0].message
    assert message.content == "Let me look."
    (call,) = message.tool_calls
    assert (call.id, call.function.name) == ("call_1", "get_weather")
    assert json.loads(call.function.arguments_json) == {"city": "Paris"}


FAULTS = {
    "limited": ("RESOURCE_EXHAUSTED", "RATE_LIMITED"),
    # Its mock has none of the words or codes of a real provider's error of this kind.
    "too-long": ("INVALID_ARGUMENT", "INVALID_REQUEST"),
    "broken": ("UNAVAILABLE", "UPSTREAM_ERROR"),
    "unreachable": ("UNAVAILABLE", "UPSTREAM_ERROR"),
}


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_is_told_by_its_row(
    start: Start, litellm: str, fault: str, unary: bool
) -> None:
    gateway = await start(upstream(litellm, keys=1), retries=QUICK)
    chat = request(model=fault)
    if unary:
        failure = await failing(gateway.chat.Chat(chat, timeout=30))
    else:
        failure = await failing(gateway.chat.StreamChat(stream_request(chat), timeout=30))
    assert (failure.code.name, failure.reason) == FAULTS[fault], failure.message


async def test_a_key_it_does_not_know_is_no_answer(start: Start, litellm: str) -> None:
    """Without a database it says 400 to keys that it cannot look up: a refusal, no rejected key."""
    keys = (Key(id="unknown", secret=Secret("sk-test-unknown")),)
    gateway = await start(Upstream(name="test", base_url=litellm, keys=keys, passthrough=True))
    failure = await failing(gateway.chat.Chat(request(model="haiku")))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")


async def test_the_models_are_the_upstreams(start: Start, litellm: str) -> None:
    gateway = await start(upstream(litellm, keys=1))
    listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
    assert {"haiku", "tools"} <= {model.name for model in listed.models}
