"""Runs the conformance cases with the Python client: tests/conformance/README.md.

python clients/python/conformance.py [--asyncio] < lines
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc

from tokenwire import AsyncClient, Client, Reply, TokenwireError
from tokenwire.v1.chat_service_pb2 import Snapshot

_PLAIN = frozenset(
    {
        "temperature",
        "top_k",
        "max_completion_tokens",
        "choice_count",
        "stop",
        "tools",
        "tool_choice",
        "json_schema",
        "role_templates",
        "unsupported_parameters",
        "extra_body",
        "labels",
    }
)

Line = dict[str, Any]


def main() -> None:
    """One case for each line of standard input."""
    with asyncio.Runner() as loop:  # one for all cases: gRPC's own thread outlives a case
        _answer_all((lambda *case: loop.run(_arun(*case))) if "--asyncio" in sys.argv else _run)


def _answer_all(run: Callable[[Mapping[str, Any], Mapping[str, str]], Line]) -> None:
    for text in sys.stdin:
        asked = json.loads(text)
        case = asked["case"]
        try:
            line = run(case, asked["connect"])
        except TokenwireError as error:
            line = {"ok": False, "error": _error(error)}
        except Exception as error:
            line = {"defect": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": case["name"], **line}), flush=True)


# --- what both clients are told -----------------------------------------------------


def _connection(connect: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"target": connect["target"], "token": connect.get("token", "")}
    if "cert_file" in connect:
        options["tls"] = grpc.ssl_channel_credentials(
            Path(connect["ca_file"]).read_bytes(),
            Path(connect["key_file"]).read_bytes(),
            Path(connect["cert_file"]).read_bytes(),
        )
    elif "ca_file" in connect:
        options["tls"] = connect["ca_file"]
    return options


def _call_options(case: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "timeout_ms" in case:
        options["timeout"] = case["timeout_ms"] / 1000
    if "request_id" in case:
        options["request_id"] = case["request_id"]
    if "metadata" in case:
        options["metadata"] = case["metadata"]
    return options


def _chat_options(request: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name in _PLAIN}


def _prompt(request: Mapping[str, Any]) -> Any:
    if "prompt_bytes" in request:
        return "a" * request["prompt_bytes"]
    return request.get("messages") or request["prompt"]


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    own = {"messages": _prompt(item), "model": item["model"], "custom_id": item["custom_id"]}
    return {**own, **_chat_options(item)}


# --- what both clients say -------------------------------------------------------------


def _answer(case: Mapping[str, Any], reply: Reply) -> Line:
    line: Line = {
        "ok": True,
        "choices": [
            {
                "index": choice.index,
                "text": choice.text,
                "reasoning": choice.reasoning,
                "finish_reason": choice.finish_reason.upper(),
                "tool_calls": [
                    {"id": call.id, "name": call.name, "arguments": call.arguments}
                    for call in choice.tool_calls
                ],
            }
            for choice in reply.choices
        ],
        "usage": {
            "prompt": reply.usage.prompt_tokens,
            "completion": reply.usage.completion_tokens,
            "total": reply.usage.total_tokens,
            "estimated": reply.usage.estimated,
        },
        "header": {
            "model": reply.header.model,
            "upstream": reply.header.upstream,
            "attempts": len(reply.header.attempts),
            "dropped": list(reply.header.dropped_parameters),
        },
        "request_id": bool(reply.request_id),
    }
    if "json_schema" in case["request"]:
        line["json"] = reply.json()
    return line


def _error(error: TokenwireError) -> Line:
    return {
        "code": error.code.name,
        "reason": error.reason,
        "retry_after_ms": None if error.retry_after is None else round(error.retry_after * 1000),
        "retryable": error.is_retryable,
        "attempts": error.attempts,
        "request_id": bool(error.request_id),
        "partial_text": error.partial_text,
        "fields": [violation.field for violation in error.field_violations],
    }


def _results(results: Any) -> Line:
    rows = []
    for result in sorted(results, key=lambda each: each.index):
        row: Line = {"index": result.index, "custom_id": result.custom_id}
        if result.error is not None:
            row["error"] = _error(result.error)
        else:
            row["text"] = result.reply.text
        rows.append(row)
    return {"ok": True, "results": rows}


class _Seen:
    """What the events of a stream were, repetitions in a row counted once."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.states: list[str] = []

    def add(self, event: Any) -> None:
        """One event."""
        if self.kinds[-1:] != [event.kind]:
            self.kinds.append(event.kind)
        if event.kind == "snapshot":
            state = Snapshot.State.Name(event.proto.snapshot.state).removeprefix("STATE_")
            if self.states[-1:] != [state]:
                self.states.append(state)

    def line(self) -> Line:
        """As the line tells it."""
        return {"kinds": self.kinds, **({"states": self.states} if self.states else {})}


# --- the blocking client ----------------------------------------------------------------


def _run(case: Mapping[str, Any], connect: Mapping[str, str]) -> Line:
    earlier = 0
    with Client(**_connection(connect)) as client:
        for _ in range(case.get("repeat", 1) - 1):
            earlier += bool(_once(client, case)["ok"])
            time.sleep(case["gap_ms"] / 1000)
        return {**_once(client, case), "earlier": earlier}


def _once(client: Client, case: Mapping[str, Any]) -> Line:
    request, options = case["request"], _call_options(case)
    match case["op"]:
        case "chat":
            return _chat(client, case, {**_chat_options(request), **options})
        case "stream":
            return _stream(client, case, {**_chat_options(request), **options})
        case "batch":
            with client.batch(map(_item, request["items"]), **_batch_options(case)) as results:
                return _results(results)
        case "batch_ordered":
            return _results(
                client.batch_ordered(map(_item, request["items"]), **_batch_options(case))
            )
        case "count_tokens":
            count = client.count_tokens(_prompt(request), model=request["model"], **options)
            return {"ok": True, "tokens": count.total_tokens, "tokenizer": count.tokenizer}
        case "tokenize":
            return _tokens(client.tokenize(request["texts"], model=request["model"], **options))
        case "models":
            return {"ok": True, "models": [model.name for model in client.models(**options)]}
    raise ValueError(f"no op {case['op']!r}")


def _batch_options(case: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "max_concurrency": case["request"].get("max_concurrency", 0),
        **_call_options(case),
    }


def _tokens(lists: Any) -> Line:
    return {
        "ok": True,
        "ids": [list(tokens.ids) for tokens in lists],
        "pieces": [[piece.hex() for piece in tokens.pieces] for tokens in lists],
    }


def _chat(client: Client, case: Mapping[str, Any], options: dict[str, Any]) -> Line:
    request, after = case["request"], case.get("leave", {}).get("after_ms")
    if after is None:
        reply = client.chat(_prompt(request), model=request["model"], **options)
        return _answer(case, reply)
    # A blocking call is left by closing its client from another thread.
    with _later(after, client.close):
        return _answer(case, client.chat(_prompt(request), model=request["model"], **options))


def _stream(client: Client, case: Mapping[str, Any], options: dict[str, Any]) -> Line:
    request, leave = case["request"], case.get("leave", {})
    stream = client.stream(
        _prompt(request), model=request["model"], mode=case.get("mode", "delta"), **options
    )
    seen, pause = _Seen(), case.get("pause_ms", 0)
    with stream, _later(leave.get("after_ms"), stream.close):
        for event in stream:
            seen.add(event)
            time.sleep((case.get("read_delay_ms", 0) + pause) / 1000)
            pause = 0
            if "after_text" in leave and len(stream.text) >= leave["after_text"]:
                break
        else:
            return {**_answer(case, stream.reply()), **seen.line()}
    return {"ok": True, "left": True, "partial_text": stream.text}


@contextmanager
def _later(milliseconds: float | None, do: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer((milliseconds or 0) / 1000, do)
    if milliseconds is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- the asyncio client -------------------------------------------------------------------


async def _arun(case: Mapping[str, Any], connect: Mapping[str, str]) -> Line:
    earlier = 0
    async with AsyncClient(**_connection(connect)) as client:
        for _ in range(case.get("repeat", 1) - 1):
            earlier += bool((await _aonce(client, case))["ok"])
            await asyncio.sleep(case["gap_ms"] / 1000)
        return {**await _aonce(client, case), "earlier": earlier}


async def _aonce(client: AsyncClient, case: Mapping[str, Any]) -> Line:
    request, options = case["request"], _call_options(case)
    match case["op"]:
        case "chat":
            async with _closing_later(case, client.close):
                reply = await client.chat(
                    _prompt(request), model=request["model"], **_chat_options(request), **options
                )
            return _answer(case, reply)
        case "stream":
            return await _astream(client, case, {**_chat_options(request), **options})
        case "batch":
            results = client.batch(map(_item, request["items"]), **_batch_options(case))
            return _results([result async for result in results])
        case "batch_ordered":
            ordered = client.batch_ordered(map(_item, request["items"]), **_batch_options(case))
            return _results(await ordered)
        case "count_tokens":
            count = await client.count_tokens(_prompt(request), model=request["model"], **options)
            return {"ok": True, "tokens": count.total_tokens, "tokenizer": count.tokenizer}
        case "tokenize":
            lists = await client.tokenize(request["texts"], model=request["model"], **options)
            return _tokens(lists)
        case "models":
            return {"ok": True, "models": [model.name for model in await client.models(**options)]}
    raise ValueError(f"no op {case['op']!r}")


async def _astream(client: AsyncClient, case: Mapping[str, Any], options: dict[str, Any]) -> Line:
    request, leave = case["request"], case.get("leave", {})
    stream = client.stream(
        _prompt(request), model=request["model"], mode=case.get("mode", "delta"), **options
    )
    seen, pause = _Seen(), case.get("pause_ms", 0)
    async with stream, _closing_later(case, stream.close):
        async for event in stream:
            seen.add(event)
            await asyncio.sleep((case.get("read_delay_ms", 0) + pause) / 1000)
            pause = 0
            if "after_text" in leave and len(stream.text) >= leave["after_text"]:
                break
        else:
            return {**_answer(case, stream.reply()), **seen.line()}
    return {"ok": True, "left": True, "partial_text": stream.text}


@asynccontextmanager
async def _closing_later(case: Mapping[str, Any], close: Callable[[], Any]) -> AsyncIterator[None]:
    after = case.get("leave", {}).get("after_ms")

    async def do() -> None:
        await asyncio.sleep(after / 1000)
        await close()

    task = asyncio.create_task(do()) if after is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


if __name__ == "__main__":
    main()
