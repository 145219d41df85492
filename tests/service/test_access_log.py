"""One line of the log for each RPC, however it ends, with all that an operator asks of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from harness import failing, receive, request, simulate, stream_request
from processes import PROMPT, serve, write_config
from tokenwire.v1 import (
    chat_service_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    tokenizer_service_pb2,
    tokenizer_service_pb2_grpc,
)
from tokenwire_service.simulator import Simulator

TOKEN = ("authorization", "Bearer token-of-search")
ALWAYS = {
    *("time", "level", "event", "request_id", "method", "code", "reason", "caller", "model"),
    *("upstream", "key_id", "attempts", "retries", "seconds", "labels"),
    *("prompt_tokens", "completion_tokens", "usage_estimated"),
}


async def test_every_rpc_has_one_line_with_every_field(tmp_path: Path) -> None:
    async with Simulator(tokens_per_second=0).serving() as url:
        config = write_config(
            tmp_path,
            url,
            admin={"listen": "off"},
            log={"format": "json", "level": "debug"},
            retries={"max_attempts": 2, "backoff": "1ms", "backoff_cap": "1ms"},
            callers={"search": {"tokens": [{"env": "SEARCH_TOKEN"}]}},
        )
        keys = {"TEST_KEY": "sk-test-number-1", "SEARCH_TOKEN": "token-of-search"}
        async with serve("--config", config, **keys) as gateway:

            def by(name: str) -> list[tuple[str, str]]:
                return [TOKEN, ("x-request-id", name)]

            def chat(**directives: Any) -> chat_service_pb2.ChatRequest:
                return request(PROMPT, extra_body_json=simulate(**directives))

            flaky = stream_request(chat(tokens=7, fault="server_error", times=1, id="once"))
            await receive(gateway.chat.StreamChat(flaky, metadata=by("stream")))
            await gateway.chat.Chat(chat(tokens=3), metadata=by("chat"))
            await failing(gateway.chat.Chat(chat(fault="refused"), metadata=by("refused")))
            bad = chat()
            bad.params.temperature = 9
            await failing(gateway.chat.Chat(bad, metadata=by("invalid")))
            await failing(gateway.chat.Chat(chat(), metadata=[("x-request-id", "stranger")]))
            batch = chat_service_pb2.BatchChatRequest()
            batch.items.add(chat=chat(tokens=2))
            async for _ in gateway.chat.BatchChat(batch, metadata=by("batch")):
                pass
            models = model_service_pb2_grpc.ModelServiceStub(gateway.channel)
            await models.ListModels(model_service_pb2.ListModelsRequest(), metadata=by("models"))
            tokens = tokenizer_service_pb2_grpc.TokenizerServiceStub(gateway.channel)
            asked = tokenizer_service_pb2.CountTokensRequest(model="gpt-4o", text=PROMPT)
            await tokens.CountTokens(asked, metadata=by("tokens"))
            gateway.signal(signal.SIGINT)
            assert await gateway.exit_code() == 0
    lines = [json.loads(line) for line in gateway.lines]
    calls = [line for line in lines if line["event"] == "call"]
    names = ["stream", "chat", "refused", "invalid", "stranger", "batch", "models", "tokens"]
    assert sorted(line["request_id"] for line in calls) == sorted(names)
    by_name = {line["request_id"]: line for line in calls}
    for line in calls:
        assert line.keys() >= ALWAYS, line
    stream = by_name["stream"]
    assert stream["method"] == "tokenwire.v1.ChatService/StreamChat"
    assert (stream["code"], stream["reason"]) == ("OK", "")
    assert (stream["caller"], stream["model"], stream["upstream"]) == ("search", "m", "test")
    assert stream["key_id"].startswith("key-")
    assert (stream["attempts"], stream["retries"]) == (2, 1)
    assert stream["completion_tokens"] == 7
    assert 0 < stream["first_token_seconds"] <= stream["seconds"]
    assert by_name["refused"]["reason"] == "INVALID_REQUEST"
    assert by_name["invalid"]["attempts"] == 0
    assert (by_name["stranger"]["code"], by_name["stranger"]["caller"]) == ("UNAUTHENTICATED", "")
    assert by_name["batch"]["completion_tokens"] == 2
    everything = "\n".join(gateway.lines)
    for text in (PROMPT, "sk-test", "token-of-search"):
        assert text not in everything
