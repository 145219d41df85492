"""`tokenwire demo`: a gateway from start to end, told step by step to whoever watches."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack

import msgspec

from tokenwire import Client, TokenwireError
from tokenwire.v1 import error_reason_pb2
from tokenwire_service import terminal
from tokenwire_service.config import Admin, Config, ConfigError, load
from tokenwire_service.server import serving
from tokenwire_service.simulated import with_simulator

_QUESTION = "In three sentences: why does a gateway stream tokens instead of waiting?"
_BATCH = ("What is the capital of France?", "Count to five.", "用一句话介绍你自己。")


def run_demo(environ: Mapping[str, str]) -> int:
    """Shows every step and returns 0, or says what failed and returns 1.

    The upstream is the one of OPENAI_API_KEY if that is set, else the built-in simulator. The
    last step needs an upstream that fails on request, and so the simulator in any case.
    """
    try:
        config = load(None, {k: v for k, v in environ.items() if k.startswith("OPENAI_")})
    except ConfigError as error:
        _say(*error.problems)
        return 1
    model = "simulated-large" if config.needs_simulator else environ.get("TOKENWIRE_MODEL")
    try:
        return asyncio.run(_demo(config, model or terminal.DEFAULT_MODEL))
    except KeyboardInterrupt:
        return terminal.CANCELLED


async def _demo(config: Config, model: str) -> int:
    quiet = logging.getLogger("tokenwire.demo")
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    async with AsyncExitStack() as stack:
        apart = msgspec.structs.replace(config, listen="127.0.0.1:0", admin=Admin(listen="off"))
        complete = await with_simulator(apart, stack)
        running = await stack.enter_async_context(serving(complete, quiet))
        _say(f"Tokenwire serves gRPC on {running.address}.")
        if config.needs_simulator:
            _say("Its upstream is the built-in simulator: the answers are made up.")
        else:
            _say("Its upstream is the one of your OPENAI_API_KEY.")
        # In a thread, because the steps use the blocking client, as most callers do.
        return await asyncio.to_thread(_steps, running.address, model)


def _steps(address: str, model: str) -> int:
    with Client(address, token="", timeout=60) as client:
        try:
            if _stream(address, model):
                return 1
            _batch(client, model)
            _count(client, model)
            _absorbed_rate_limit(client)
        except TokenwireError as error:
            _say("", f"That failed: {error}")
            return 1
    _say(
        "",
        "That is all. To go on:",
        "  .venv/bin/tokenwire serve                 run a gateway; OPENAI_API_KEY makes it real",
        '  .venv/bin/tokenwire chat "Hello there"    ask it, in another terminal',
        "  README.md                                 call it from your own code",
    )
    return 0


def _stream(address: str, model: str) -> int:
    _step(1, "A chat, streamed: each token is shown when it arrives")
    _say(f"> {_QUESTION}", "")
    parser = argparse.ArgumentParser()
    terminal.add_chat_arguments(parser)
    return terminal.run_chat(
        parser.parse_args(["--target", address, "--model", model, "--timeout", "60", _QUESTION])
    )


def _batch(client: Client, model: str) -> None:
    _step(2, "A batch: independent conversations at once, each answer sent when it is ready")
    for result in client.batch(_BATCH, model=model, timeout=60):
        _say(f"> {_BATCH[result.index]}")
        _say(_indented(result.unwrap().text))


def _count(client: Client, model: str) -> None:
    _step(3, "A token count: no model is called, nothing leaves this machine")
    counted = client.count_tokens(_QUESTION, model=model)
    exactly = "" if counted.exact else "about "
    _say(
        f"The question of step 1 has {exactly}{counted.total_tokens} tokens ({counted.tokenizer}).",
        "An upstream may count otherwise: it wraps messages, and has a tokenizer of its own.",
    )


def _absorbed_rate_limit(client: Client) -> None:
    _step(4, "A rate limit: the first key gets a 429, the second one answers")
    reply = client.chat(
        "Did you notice anything?",
        model="simulated",
        extra_body={"simulate": {"fault": "rate_limited", "times": 1, "id": "demo"}},
        timeout=60,
    )
    for number, attempt in enumerate(reply.header.attempts, 1):
        outcome = "answered"
        if attempt.error_reason:
            name = error_reason_pb2.ErrorReason.Name(attempt.error_reason)
            outcome = name.removeprefix("ERROR_REASON_")
        took = attempt.duration.ToMilliseconds()
        where = f"key {attempt.key_id}, HTTP {attempt.http_status}, {took} ms"
        _say(f"attempt {number}: {where}: {outcome}")
    if len(reply.header.attempts) != 2:
        raise AssertionError("the rate limit was not met")
    _say("The caller saw no error, and this trail came with the answer.")


def _step(number: int, title: str) -> None:
    _say("", f"[{number}/4] {title}", "")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)
