"""The gateway in front of `transformers serve`, which never sends [DONE].

The model is a tiny one with random weights, made here: what it says means nothing, and the same
each time.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.process import listening, programs

from harness import Start, failing, receive, request, stream_request, upstream
from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.config import Retries

QUICK = Retries(max_attempts=2, backoff=0.001, backoff_cap=0.001, budget_floor=1000)

pytestmark = pytest.mark.timeout(1200)

_MAKE = """
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
words = Tokenizer(models.BPE(unk_token=None))
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(
    vocab_size=260, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
)
words.train_from_iterator(["hello world"], trainer)
template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\\n{% endfor %}assistant:"
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", eos_token="</s>", chat_template=template
)
tokenizer.save_pretrained(sys.argv[1])
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
    bos_token_id=0, eos_token_id=1,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(base URL, the model's name)."""
    bin_ = programs("transformers")
    folder = tmp_path_factory.mktemp("transformers")
    model = folder / "tiny"
    subprocess.run([bin_ / "python", "-c", _MAKE, model], check=True, capture_output=True)
    command: list[str | Path] = [bin_ / "transformers", "serve", model, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", "{port}"]
    with listening(command, "/health", folder, {}) as url:
        yield url + "/v1", str(model)


def asked(model: str, tokens: int = 6) -> chat_service_pb2.ChatRequest:
    chat = request("hi", model=model)
    chat.params.max_completion_tokens = tokens
    return chat


async def test_a_plain_answer_and_a_stream_without_done(
    start: Start, served: tuple[str, str]
) -> None:
    url, model = served
    gateway = await start(upstream(url))
    answer = await gateway.chat.Chat(asked(model))
    received = await receive(gateway.chat.StreamChat(stream_request(asked(model))))
    assert received.failure is None
    (choice,) = answer.choices
    assert choice.finish_reason == chat_pb2.FINISH_REASON_LENGTH
    assert received.finishes[0].finish_reason == chat_pb2.FINISH_REASON_LENGTH
    assert received.text == choice.message.content != ""
    assert answer.usage.completion_tokens == received.trailer.usage.completion_tokens == 6


@pytest.mark.parametrize("streaming", ["always", "never"])
async def test_answers_fold_both_ways(
    start: Start, served: tuple[str, str], streaming: str
) -> None:
    url, model = served
    gateway = await start(upstream(url, streaming=streaming))
    answer = await gateway.chat.Chat(asked(model))
    received = await receive(gateway.chat.StreamChat(stream_request(asked(model))))
    assert received.failure is None
    assert answer.choices[0].message.content == received.text != ""
    assert answer.usage == received.trailer.usage


async def test_fewer_choices_than_asked_for_are_never_a_whole_stream(
    start: Start, served: tuple[str, str]
) -> None:
    """It ignores `n`, and no [DONE] says that nothing more will come."""
    url, model = served
    gateway = await start(upstream(url), retries=QUICK)
    chat = asked(model)
    chat.params.choice_count = 2
    received = await receive(gateway.chat.StreamChat(stream_request(chat)))
    assert received.failure is not None
    assert received.failure.reason == "UPSTREAM_STREAM_INTERRUPTED"


async def test_a_caller_who_leaves_ends_the_stream(start: Start, served: tuple[str, str]) -> None:
    url, model = served
    gateway = await start(upstream(url))
    call = gateway.chat.StreamChat(stream_request(asked(model, 200)))
    async for event in call:
        if event.WhichOneof("event") == "delta":
            break
    call.cancel()


async def test_an_error_of_the_server_is_one(start: Start, served: tuple[str, str]) -> None:
    url, _ = served
    gateway = await start(upstream(url), retries=QUICK)
    failure = await failing(gateway.chat.Chat(asked("no/such-model"), timeout=60))
    assert failure.code.name in ("UNAVAILABLE", "INVALID_ARGUMENT", "NOT_FOUND")
