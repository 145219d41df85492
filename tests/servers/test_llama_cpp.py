"""The gateway in front of llama_cpp.server, with a tiny model of random weights, written here."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.process import HERE, listening, programs

from harness import Start, failing, receive, request, stream_request, upstream
from tokenwire.v1 import chat_pb2, chat_service_pb2, model_service_pb2
from tokenwire_service.config import Retries

QUICK = Retries(max_attempts=2, backoff=0.001, backoff_cap=0.001, budget_floor=1000)
WINDOW = 256  # tokens; the server's templates take some thirty of them

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL."""
    python = programs("llama_cpp") / "python"
    folder = tmp_path_factory.mktemp("llama_cpp")
    model = folder / "tiny.gguf"
    subprocess.run([python, HERE / "tiny_gguf.py", model], check=True)
    command: list[str | Path] = [python, "-m", "llama_cpp.server", "--model", model]
    command += ["--model_alias", "tiny", "--n_ctx", str(WINDOW), "--n_threads", "1"]
    command += ["--host", "127.0.0.1", "--port", "{port}"]
    with listening(command, "/v1/models", folder, {}) as url:
        yield url + "/v1"


def asked(text: str = "hi", tokens: int = 6) -> chat_service_pb2.ChatRequest:
    chat = request(text, model="tiny")
    chat.params.max_completion_tokens = tokens
    chat.params.seed = 1
    chat.params.temperature = 0.0
    return chat


async def test_a_plain_answer_and_a_stream_say_the_same(start: Start, served: str) -> None:
    gateway = await start(upstream(served))
    answer = await gateway.chat.Chat(asked())
    received = await receive(gateway.chat.StreamChat(stream_request(asked())))
    assert received.failure is None
    (choice,) = answer.choices
    assert choice.finish_reason == chat_pb2.FINISH_REASON_LENGTH
    assert received.finishes[0].finish_reason_raw == "length"
    assert received.text == choice.message.content != ""
    assert answer.usage.completion_tokens == 6


@pytest.mark.parametrize("streaming", ["always", "never"])
async def test_answers_fold_both_ways(start: Start, served: str, streaming: str) -> None:
    gateway = await start(upstream(served, streaming=streaming))
    answer = await gateway.chat.Chat(asked())
    received = await receive(gateway.chat.StreamChat(stream_request(asked())))
    assert received.failure is None
    assert answer.choices[0].message.content == received.text != ""


async def test_a_stop_string_is_no_part_of_the_text(start: Start, served: str) -> None:
    gateway = await start(upstream(served))
    text = (await gateway.chat.Chat(asked(tokens=20))).choices[0].message.content
    chat = asked(tokens=20)
    chat.params.stop.append(text[len(text) // 2 :][:2])
    answer = await gateway.chat.Chat(chat)
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert (
        received.text == answer.choices[0].message.content == text.partition(chat.params.stop[0])[0]
    )
    assert answer.choices[0].finish_reason == chat_pb2.FINISH_REASON_STOP


async def test_a_prompt_that_is_too_long_is_told_when_it_is_asked_whole(
    start: Start, served: str
) -> None:
    gateway = await start(upstream(served), retries=QUICK)
    failure = await failing(gateway.chat.Chat(asked("x" * 2 * WINDOW), timeout=30))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")


async def test_a_stream_of_nothing_is_never_an_answer(start: Start, served: str) -> None:
    """Asked for a stream, the server answers the same prompt with 200 and not one event."""
    gateway = await start(upstream(served), retries=QUICK)
    chat = asked("x" * 2 * WINDOW)
    received = await receive(gateway.chat.StreamChat(stream_request(chat), timeout=30))
    assert received.failure is not None
    assert (received.failure.code.name, received.failure.reason) == (
        "UNAVAILABLE",
        "UPSTREAM_PROTOCOL_ERROR",
    )
    assert received.kinds == []
    gateway = await start(upstream(served, streaming="never"), retries=QUICK)
    told = await failing(gateway.chat.StreamChat(stream_request(chat), timeout=30))
    assert told.reason == "CONTEXT_LENGTH_EXCEEDED", "asked for whole answers, it says why"


async def test_the_models_are_the_upstreams(start: Start, served: str) -> None:
    gateway = await start(upstream(served))
    listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
    assert "tiny" in {model.name for model in listed.models}
