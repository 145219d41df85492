"""Writes docs/tokenizers.md: how CountTokens compares with what providers reported.

Each recording that has its request and the provider's `prompt_tokens` is sent to CountTokens of a
running gateway, as a client would, with the model's name alone to tell the tokenizer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvloop

from corpus import runner
from corpus.runner import Item
from harness import upstream
from tokenwire.requests import count_request
from tokenwire.v1 import tokenizer_service_pb2_grpc
from tokenwire_service.config import Config
from tokenwire_service.layouts import family_of
from tokenwire_service.server import serving

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/tokenizers.md"
_BEGIN = "<!-- written by make token-accuracy -->"

# What a request may say besides its prompt, without a trace in the prompt.
_NO_TEXT = {
    *("model", "messages", "stream", "stream_options", "n", "seed", "temperature", "top_p"),
    *("max_tokens", "max_completion_tokens", "parallel_tool_calls", "user", "store"),
    *("frequency_penalty", "presence_penalty", "stop", "logprobs", "top_logprobs"),
    *("reasoning_format", "tools", "tool_choice", "response_format", "reasoning_effort"),
}
# Also written into the text itself, as data URLs.
_MEDIA = ("image_url", "input_audio", '"type": "file"', "data:image/")
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")

# Known families whose recording says something else than the text, and why.
EXPLAINED: Mapping[str, str] = {
    "streams/local-5002-01": "a proxy answered with DeepSeek's model under this name: its usage "
    "has `prompt_cache_hit_tokens`",
}


@dataclass(frozen=True)
class Counted:
    """One recording. `group`: text, tools or other."""

    item: Item
    model: str
    group: str
    tokenizer: str
    counted: int
    reported: int
    exact: bool

    @property
    def name(self) -> str:
        """As the corpus has it."""
        return f"{self.item.kind}/{self.item.id}"

    @property
    def hit(self) -> bool:
        """Whether it is the provider's number, to the token."""
        return self.counted == self.reported


def _model(item: Item) -> str:
    """The name an operator would configure: what was asked for, or else what answered."""
    asked = str((item.data.get("request_json") or {}).get("model") or "")
    answered = str(item.data["expected"].get("model") or "")
    known = [name for name in (asked, answered) if family_of(name).exact]
    return (known or [asked or answered])[0]


def candidates() -> Iterator[tuple[Item, dict[str, Any], int]]:
    """(recording, its request, what the provider counted), where text alone decides that."""
    for kind in ("streams", "responses"):
        for item in runner.items(kind):
            asked = item.data.get("request_json") or {}
            usage = item.data["expected"].get("usage") or {}
            if not asked.get("messages") or not usage.get("prompt_tokens"):
                continue
            if "web_search_options" in asked:
                continue
            if any(media in json.dumps(asked) for media in _MEDIA):
                continue
            yield item, asked, int(usage["prompt_tokens"])


async def measure() -> list[Counted]:
    """Every candidate, counted."""
    found = []
    config = Config(listen="127.0.0.1:0", upstreams=(upstream("http://127.0.0.1:9/v1"),))
    async with (
        serving(config, logging.getLogger("tokenwire.accuracy")) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        tokens = tokenizer_service_pb2_grpc.TokenizerServiceStub(channel)
        for item, asked, reported in candidates():
            model = _model(item)
            messages = [{k: m[k] for k in _MESSAGE_FIELDS if k in m} for m in asked["messages"]]
            options = {
                k: asked[k] for k in ("tools", "tool_choice", "response_format") if k in asked
            }
            if not options.get("tools"):
                options.pop("tool_choice", None)
            if options.get("tool_choice") == "any":  # as Mistral says it
                options["tool_choice"] = "required"
            rest = {k: v for k, v in asked.items() if k not in _NO_TEXT}
            if rest:
                options["extra_body"] = rest
            if "reasoning_effort" in asked:
                options["reasoning_effort"] = asked["reasoning_effort"]
            request = count_request(messages, model, **options)
            answer = await tokens.CountTokens(request)
            group = "other"
            if family_of(model).exact:
                group = "tools" if "tools" in asked else "text"
            found.append(
                Counted(
                    *(item, model, group, answer.tokenizer, answer.total_tokens, reported),
                    answer.exact,
                )
            )
    return found


# --- the page ---------------------------------------------------------------------------


def _rate(counted: Iterable[Counted]) -> str:
    counted = list(counted)
    hits = sum(each.hit for each in counted)
    return f"{hits} of {len(counted)}"


def _table(counted: Iterable[Counted]) -> Iterator[str]:
    yield "| recording | provider | model | tokenizer | counted | reported | off by | `exact` |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in counted:
        off = each.counted - each.reported
        yield (
            f"| {each.name} | {each.item.data['provider']} | {each.model} | {each.tokenizer} | "
            f"{each.counted} | {each.reported} | {off:+d} | {'yes' if each.exact else 'no'} |"
            if off
            else f"| {each.name} | {each.item.data['provider']} | {each.model} | "
            f"{each.tokenizer} | {each.counted} | {each.reported} | | "
            f"{'yes' if each.exact else 'no'} |"
        )


def section(counted: list[Counted]) -> Iterator[str]:
    """What the command writes, below the part that people write."""
    groups = {name: [c for c in counted if c.group == name] for name in ("text", "tools", "other")}
    text = groups["text"]
    yield f"{_BEGIN}"
    yield ""
    yield (
        f"{len(counted)} recordings of real provider traffic have their request, the provider's "
        "own `prompt_tokens`, and nothing but text in them. The recordings are not part of this "
        "repository. `make token-accuracy` makes this section, and a test in `tests/corpus` "
        "compares it."
    )
    yield from ("", f"### Known models, text alone: {_rate(text)}", "")
    by_provider = sorted({c.item.data["provider"] for c in text})
    yield "| provider | right to the token |"
    yield "|---|---|"
    for provider in by_provider:
        rate = _rate(c for c in text if c.item.data["provider"] == provider)
        yield f"| {provider} | {rate} |"
    yield from ("", *_table(text), "")
    for each in text:
        if not each.hit:
            yield f"- {each.name}: {EXPLAINED.get(each.name, 'not explained')}."
    yield from ("", f"### Known models, with tools: {_rate(groups['tools'])}", "")
    yield (
        "How providers write tools into the prompt is official for gpt-oss and Qwen only, and "
        "servers differ even there: `exact` is false for all of these."
    )
    yield from ("", *_table(groups["tools"]))
    yield from (
        "",
        f"### Models whose tokenizer the gateway does not have: {_rate(groups['other'])}",
    )
    yield ""
    yield (
        "The count is an approximation, with o200k_base and OpenAI's layout; `exact` is false. "
        "Many of these providers count a system prompt or a text for tools of their own."
    )
    yield from ("", "| model | recordings | tools | counted minus reported |", "|---|---|---|---|")
    rows = sorted(
        {(each.model, "tools" in each.item.data["request_json"]) for each in groups["other"]}
    )
    for model, tools in rows:
        off = [
            each.counted - each.reported
            for each in groups["other"]
            if (each.model, "tools" in each.item.data["request_json"]) == (model, tools)
        ]
        spread = f"{off[0]:+d}" if len(set(off)) == 1 else f"{min(off):+d} to {max(off):+d}"
        yield f"| {model} | {len(off)} | {'yes' if tools else 'no'} | {spread} |"


def page(counted: list[Counted]) -> str:
    """The whole page: what stands in front of the section is kept."""
    head = DOCUMENT.read_text(encoding="utf-8").split(_BEGIN)[0]
    return head + "\n".join((*section(counted), ""))


def main() -> int:
    """Writes the page; 1 if a count that says it is exact is not, and nobody knows why."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as event_loop:
        counted = event_loop.run(measure())
    DOCUMENT.write_text(page(counted), encoding="utf-8")
    for name in ("text", "tools", "other"):
        group = [each for each in counted if each.group == name]
        sys.stdout.write(f"{name}: {_rate(group)} right to the token\n")
        for each in group:
            if not each.hit and name != "other":
                provider = each.item.data["provider"]
                sys.stdout.write(
                    f"  {each.name} ({provider}, {each.model}): "
                    f"counted {each.counted}, reported {each.reported}\n"
                )
    return 1 if wrongly_exact(counted) else 0


def wrongly_exact(counted: Iterable[Counted]) -> list[Counted]:
    """Those that must not be: said to be exact, wrong, and not explained."""
    return [c for c in counted if c.exact and not c.hit and c.name not in EXPLAINED]


if __name__ == "__main__":
    sys.exit(main())
