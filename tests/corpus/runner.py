"""Sends recorded provider traffic through a gateway, and says where the caller's view differs.

The corpus lies beside the repository, in ../shared/corpus, with the tool that serves it over
HTTP. Its README defines `expected`; what stands here is how the contract says the same.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from harness import Failure, failure_of, receive, request, stream_request
from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.config import Config, Key, Model, Retries, Upstream
from tokenwire_service.secret import Secret

if TYPE_CHECKING:  # an attribute of the stubs alone
    from tokenwire.v1.chat_service_pb2_grpc import ChatServiceAsyncStub

SHARED = Path(__file__).resolve().parents[3] / "shared"
CORPUS = SHARED / "corpus"

# How an answer is cut on its way, as replay.py spells it.
MODES: Mapping[str, str] = {
    "whole": "in one piece",
    "event1": "event by event, a millisecond apart",
    "byte": "each byte a write of its own",
    "7": "seven bytes at a time",
    "gzip": "compressed",
    "gzipflush": "compressed, flushed after each event",
}
CUTS = tuple(f"cut{percent}" for percent in range(10, 100, 10))
RESETS = ("rst20", "rst50", "rst80")
MODES_OF: Mapping[str, tuple[str, ...]] = {
    "streams": (*MODES, *CUTS, *RESETS),
    "responses": ("whole", "byte", "7", "gzip"),
    "streams_foreign": ("whole", "event1", "byte"),
    "errors": ("whole", "byte", "gzip"),
}

# Calls at once. The upstream is a process of its own, and pauses: others work meanwhile.
_AT_ONCE = 8

_SERVE = """
import runpy, socket, sys
from aiohttp import web
replay = runpy.run_path(sys.argv[1])
listener = socket.socket(fileno=int(sys.argv[2]))
web.run_app(replay["app"], sock=listener, access_log=None, print=None)
"""


@dataclass(frozen=True)
class Item:
    """One recording. `kind` is its folder."""

    kind: str
    id: str

    @property
    def path(self) -> Path:
        """Where it lies."""
        return CORPUS / self.kind / f"{self.id}.json"

    @property
    def data(self) -> dict[str, Any]:
        """The whole file."""
        data: dict[str, Any] = json.loads(self.path.read_bytes())
        return data


@dataclass(frozen=True)
class Run:
    """One recording, cut one way."""

    item: Item
    mode: str

    @property
    def name(self) -> str:
        """Of its model and its upstream; unique in a gateway."""
        return f"{self.item.kind}.{self.item.id}.{self.mode}"


def items(kind: str) -> list[Item]:
    """Every recording of a kind, by name."""
    names = (path.stem for path in sorted((CORPUS / kind).glob("*.json")))
    return [Item(kind, name) for name in names if name != "_index"]


def runs(kind: str, mode: str) -> list[Run]:
    """Every recording of a kind, the largest first: it takes longest."""
    ordered = sorted(items(kind), key=lambda item: -item.path.stat().st_size)
    return [Run(item, mode) for item in ordered]


@contextmanager
def replaying() -> Iterator[str]:
    """Serves the corpus from a process of its own; the base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, SHARED / "tools/replay.py", str(listener.fileno())],
            pass_fds=(listener.fileno(),),
            stderr=subprocess.DEVNULL,  # a traceback for each peer that hangs up after [DONE]
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def config(base_url: str, wanted: Iterable[Run], **settings: Any) -> Config:
    """One upstream with one key, and one model that leads there, for each run. `settings`: of
    every upstream."""
    upstreams = []
    models = []
    for run in wanted:
        url = f"{base_url}/{run.item.kind}/{run.item.id}/{run.mode}"
        keys = (Key(id="k1", secret=Secret("sk-test-corpus")),)
        upstreams.append(Upstream(name=run.name, base_url=url, keys=keys, **settings))
        models.append(Model(name=run.name, upstream=run.name))
    return Config(
        listen="127.0.0.1:0",
        upstreams=tuple(upstreams),
        models=tuple(models),
        # Retries without waiting, and no run may use up what another needs.
        retries=Retries(
            max_attempts=3, backoff=0.001, backoff_cap=0.001, budget=1, budget_floor=1000
        ),
    )


# --- what a caller receives -------------------------------------------------------------


@dataclass
class Choice:
    """One answer, put together from what the caller received."""

    content: str = ""
    content_set: bool = False
    reasoning: str = ""
    refusal: str = ""
    role: str = ""
    tool_calls: dict[int, list[str]] = field(default_factory=dict)  # [id, name, arguments]
    finish_reason: int | None = None
    finish_reason_raw: str = ""
    finishes: int = 0


@dataclass
class Answer:
    """One call as its caller saw it. `events`: what a stream sent, in order."""

    header: chat_service_pb2.ResponseHeader | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: chat_pb2.Usage | None = None
    extra_json: str = ""
    events: list[str] = field(default_factory=list)
    failure: Failure | None = None

    def choice(self, index: int) -> Choice:
        """The choice of that index."""
        return self.choices.setdefault(index, Choice())

    def add(self, event: chat_service_pb2.StreamChatResponse) -> None:
        """Takes one event of a stream. Every text is appended, ids and names too: the contract
        says that they come once."""
        kind = event.WhichOneof("event") or ""
        self.events.append(kind)
        if kind == "header":
            self.header = event.header
        elif kind == "delta":
            choice = self.choice(event.delta.choice_index)
            choice.content += event.delta.content
            choice.reasoning += event.delta.reasoning
            choice.refusal += event.delta.refusal
            for part in event.delta.tool_calls:
                call = choice.tool_calls.setdefault(part.index, ["", "", ""])
                for i, text in enumerate((part.id, part.name, part.arguments)):
                    call[i] += text
        elif kind == "finish":
            choice = self.choice(event.finish.choice_index)
            choice.finishes += 1
            choice.finish_reason = event.finish.finish_reason
            choice.finish_reason_raw = event.finish.finish_reason_raw
        elif kind == "trailer":
            self.usage = event.trailer.usage if event.trailer.HasField("usage") else None
            self.extra_json = event.trailer.extra_json


async def stream(chat: ChatServiceAsyncStub, model: str, timeout: float) -> Answer:
    """What StreamChat brings."""
    received = await receive(chat.StreamChat(stream_request(request(model=model)), timeout=timeout))
    answer = Answer(failure=received.failure)
    for event in received.events:
        answer.add(event)
    return answer


async def whole(chat: ChatServiceAsyncStub, model: str, timeout: float) -> Answer:
    """What Chat brings."""
    try:
        response = await chat.Chat(request(model=model), timeout=timeout)
    except grpc.aio.AioRpcError as error:
        return Answer(failure=failure_of(error))
    answer = Answer(header=response.header)
    answer.usage = response.usage if response.HasField("usage") else None
    for choice in response.choices:
        message = choice.message
        answer.choices[choice.index] = Choice(
            content=message.content,
            content_set=message.HasField("content"),
            reasoning=message.reasoning,
            refusal=message.refusal,
            role=message.role,
            tool_calls={
                i: [call.id, call.function.name, call.function.arguments_json]
                for i, call in enumerate(message.tool_calls)
            },
            finish_reason=choice.finish_reason,
            finish_reason_raw=choice.finish_reason_raw,
            finishes=1,
        )
    return answer


async def call_all(
    chat: ChatServiceAsyncStub,
    wanted: Iterable[Run],
    *,
    unary: bool = False,
    timeout: float = 100.0,
) -> dict[Run, Answer]:
    """What each run brings, by Chat or by StreamChat; `timeout` in seconds for each."""
    slots = asyncio.Semaphore(_AT_ONCE)
    ask = whole if unary else stream

    async def one(run: Run) -> tuple[Run, Answer]:
        async with slots:
            return run, await ask(chat, run.name, timeout)

    return dict(await asyncio.gather(*map(one, wanted)))


# --- what it should be ------------------------------------------------------------------

# Those that stand in the corpus; without one, and for any other, OTHER.
_FINISH_REASONS = {
    "stop": chat_pb2.FINISH_REASON_STOP,
    "eos": chat_pb2.FINISH_REASON_STOP,  # Together
    "length": chat_pb2.FINISH_REASON_LENGTH,
    "tool_calls": chat_pb2.FINISH_REASON_TOOL_CALLS,
    "content_filter": chat_pb2.FINISH_REASON_CONTENT_FILTER,
}
# Answers without a finish_reason that tell by `finish_details` why they ended.
_FINISH_DETAILS = {"openai-09": chat_pb2.FINISH_REASON_LENGTH}


def differences(run: Run, got: Answer) -> list[str]:
    """Where the answer is not what the recording calls for, one line each; none if it is.

    For every kind but errors, which `verdicts` judges.
    """
    judge = {
        "streams": _of_stream if run.mode in MODES else _of_cut,
        "responses": _of_response,
        "streams_foreign": _of_foreign,
    }[run.item.kind]
    return [f"{run.name}: {what}" for what in judge(run, run.item.data["expected"], got)]


def _of_stream(run: Run, expected: Mapping[str, Any], got: Answer) -> Iterator[str]:
    yield from _of_texts(expected, got)
    if expected["outcome"] == "upstream_error_mid_stream":
        yield from _of_failure(got, "UPSTREAM_STREAM_INTERRUPTED")
        yield from unlike("events", set(got.events), {"header", "delta"})
        error = expected["error"]
        said = (error.get("message") or error["detail"])[:100]
        if got.failure is not None and said not in got.failure.message:
            yield f"message: got {got.failure.message!r}, expected {said!r} in it"
        return
    yield from unlike("failure", got.failure, None)
    if not re.fullmatch("header( delta)*( finish)+ trailer", " ".join(got.events)):
        yield f"order of events: {got.events}"
    yield from _of_facts(run, expected, got)
    if wanted := expected.get("x_groq_usage"):
        extra = json.loads(got.extra_json or "{}").get("x_groq", {})
        yield from unlike("x_groq.usage", extra.get("usage"), wanted)


def whole_of_stream(run: Run, expected: Mapping[str, Any], got: Answer) -> Iterator[str]:
    """Where a Chat over a recorded stream is not what the recording says."""
    yield from unlike("failure", got.failure, None)
    yield from _of_texts(expected, got)
    yield from _of_facts(run, expected, got)


def _of_response(run: Run, expected: Mapping[str, Any], got: Answer) -> Iterator[str]:
    yield from unlike("failure", got.failure, None)
    yield from _of_texts(expected, got)
    for choice in expected["choices"]:
        here = got.choice(choice["index"])
        null = choice["content_is_null"] and not choice["content"]  # legacy `text` is content
        yield from unlike("content is null", not here.content_set, null)
        yield from unlike("role", here.role, choice["role"] or "assistant")
    yield from _of_facts(run, expected, got)


def _of_foreign(_run: Run, _expected: Mapping[str, Any], got: Answer) -> Iterator[str]:
    yield from _of_failure(got, "UPSTREAM_PROTOCOL_ERROR")
    yield from unlike("events", got.events, [])
    if got.failure is not None:
        yield from unlike("attempts", got.failure.metadata["attempts"], "2")


def _of_failure(got: Answer, *reasons: str) -> Iterator[str]:
    """Differences from UNAVAILABLE with one of these reasons and no use in trying again."""
    if got.failure is None:
        yield "OK"
        return
    yield from unlike("code", got.failure.code, grpc.StatusCode.UNAVAILABLE)
    if got.failure.reason not in reasons:
        yield f"reason: got {got.failure.reason}, expected {' or '.join(reasons)}"
    yield from unlike("pushback", got.failure.pushback, "-1")


def _of_texts(expected: Mapping[str, Any], got: Answer) -> Iterator[str]:
    wanted = expected["choices"]
    yield from unlike("choices", sorted(got.choices), sorted(c["index"] for c in wanted))
    for choice in wanted:
        here = got.choice(choice["index"])
        for name in ("content", "reasoning", "refusal"):
            yield from unlike(name, getattr(here, name), choice[name])
        calls = [[c["id"] or "", c["name"], c["arguments"]] for c in choice["tool_calls"]]
        yield from unlike("tool calls", here.tool_calls, dict(enumerate(calls)))


def _of_facts(run: Run, expected: Mapping[str, Any], got: Answer) -> Iterator[str]:
    for choice in expected["choices"]:
        here = got.choice(choice["index"])
        raw = choice["finish_reason"] or ""
        reason = _FINISH_REASONS.get(raw, chat_pb2.FINISH_REASON_OTHER)
        if run.item.kind == "responses":
            reason = _FINISH_DETAILS.get(run.item.id, reason)
        yield from unlike("finishes", here.finishes, 1)
        yield from unlike("finish_reason_raw", here.finish_reason_raw, raw)
        yield from unlike("finish_reason", here.finish_reason, reason)
    header = got.header or chat_service_pb2.ResponseHeader()
    yield from unlike("id", header.id, expected["id"] or "")
    yield from unlike("model", header.model, expected["model"] or run.name)
    yield from unlike("upstream", header.upstream, run.name)
    trail = [(a.upstream, a.key_id, a.http_status, a.error_reason) for a in header.attempts]
    yield from unlike("attempts", trail, [(run.name, "k1", 200, 0)])
    yield from unlike("usage", _told_usage(got.usage), _recorded_usage(expected["usage"]))


_TOTALS = ("prompt_tokens", "completion_tokens", "total_tokens")
_PARTS = ("cached_prompt_tokens", "cache_write_tokens", "reasoning_tokens")


def _recorded_usage(raw: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Usage under the contract's names, what it does not name beside it."""
    if raw is None:
        return None
    prompt = raw.get("prompt_tokens_details") or {}
    completion = raw.get("completion_tokens_details") or {}
    cached = prompt.get("cached_tokens")
    if cached is None:  # DeepSeek, Moonshot
        cached = raw.get("prompt_cache_hit_tokens", raw.get("cached_tokens"))
    written = prompt.get("cache_write_tokens")
    reasoning = completion.get("reasoning_tokens", raw.get("reasoning_tokens"))
    return {
        **{name: raw[name] for name in _TOTALS},
        **dict(zip(_PARTS, (cached, written, reasoning), strict=True)),
        "extra": {k: v for k, v in raw.items() if k not in _TOTALS and v not in (None, {}, [])},
    }


def _told_usage(usage: chat_pb2.Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        **{name: getattr(usage, name) for name in _TOTALS},
        **{name: getattr(usage, name) if usage.HasField(name) else None for name in _PARTS},  # type: ignore[arg-type]
        "extra": json.loads(usage.extra_json or "{}"),
    }


def unlike(what: str, got: object, wanted: object) -> Iterator[str]:
    """One line unless both are equal."""
    if got != wanted:
        yield f"{what}: got {str(got)[:300]!r}, expected {str(wanted)[:300]!r}"


# --- streams that end early -------------------------------------------------------------


def _of_cut(run: Run, expected: Mapping[str, Any], got: Answer) -> Iterator[str]:
    body = run.item.data["body"].encode()
    arrived = body[: len(body) * int(re.sub(r"\D", "", run.mode)) // 100]
    yield from of_cut(arrived, expected, got, reset=run.mode in RESETS)


def of_cut(
    arrived: bytes, expected: Mapping[str, Any], got: Answer, *, reset: bool
) -> Iterator[str]:
    """Where a stream of which only `arrived` was sent is told as more, or as something else."""
    proven, texts = _proof(arrived)
    if got.failure is None and not proven:
        yield "OK without proof that the answer is complete"
    if got.failure is not None:
        if proven and not reset:
            yield f"{got.failure.reason} though the answer is complete"
        reasons = ["UPSTREAM_STREAM_INTERRUPTED"]
        if not got.events:  # not even one chunk may have come
            reasons += ["UPSTREAM_PROTOCOL_ERROR", "UPSTREAM_ERROR"]  # nothing was delivered
        yield from _of_failure(got, *reasons)
        if not set(got.events) <= {"header", "delta"}:
            yield f"events before a failure: {got.events}"
    for choice in expected["choices"]:
        here = got.choice(choice["index"])
        for name in ("content", "reasoning", "refusal"):
            if not choice[name].startswith(getattr(here, name)):
                yield f"{name} is no prefix: {getattr(here, name)[-200:]!r}"
        for index, parts in here.tool_calls.items():
            call = choice["tool_calls"][index]
            whole_call = (call["id"] or "", call["name"], call["arguments"])
            if not all(map(str.startswith, whole_call, parts)):
                yield f"tool call {index} is no prefix: {parts}"
        if not reset:  # which may take with it what was on its way
            yield from unlike("content", here.content, texts.get(choice["index"], ""))


def proven(arrived: bytes) -> bool:
    """Whether the events that arrived whole prove that the answer is complete."""
    return _proof(arrived)[0]


def _proof(arrived: bytes) -> tuple[bool, dict[int, str]]:
    """(whether the events that arrived whole prove completion, the content they hold)."""
    done = failed = False
    ended: dict[int, bool] = {}
    texts: dict[int, str] = {}
    text = re.sub("\r\n?", "\n", arrived.decode("utf-8", "ignore"))
    for line in text.rpartition("\n\n")[0].split("\n"):
        data = line.removeprefix("data:").strip()
        failed = failed or line.startswith("error:")  # llama.cpp
        if not line.startswith("data:") or not data or done:
            continue
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        failed = failed or bool(chunk.get("error"))
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            ended[index] = ended.get(index, False) or bool(choice.get("finish_reason"))
            content = (choice.get("delta") or {}).get("content") or ""
            if isinstance(content, list):  # Mistral
                content = "".join(part.get("text", "") for part in content)
            texts[index] = texts.get(index, "") + content
    return not failed and (done or (bool(ended) and all(ended.values()))), texts
