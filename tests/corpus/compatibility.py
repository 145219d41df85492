"""Writes docs/compatibility.md: what the gateway makes of every recording of the corpus."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import uvloop

from corpus import runner, verdicts
from corpus.runner import Item, Run
from harness import Recorder
from tokenwire.v1 import chat_service_pb2_grpc
from tokenwire_service.server import serving

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/compatibility.md"

# By kind of recording: whether Chat and StreamChat are asked.
_UNARY = {
    "streams": (False,),
    "responses": (True,),
    "streams_foreign": (False, True),
    "errors": (False, True),
}
_TITLES = {
    "streams": (
        "Streams",
        "`StreamChat` gives the recorded text, reasoning, refusal, tool calls, finish reasons, "
        "usage, id and model. A stream that carries an error, or is cut before it proved that "
        "it is complete, ends with UNAVAILABLE `UPSTREAM_STREAM_INTERRUPTED` after exactly the "
        "text that came before.",
    ),
    "responses": ("Plain answers", "`Chat` gives the same of an answer in one piece."),
    "streams_foreign": (
        "Other dialects",
        "`Chat` and `StreamChat` end with UNAVAILABLE `UPSTREAM_PROTOCOL_ERROR` and no text; the "
        "key goes on serving.",
    ),
    "errors": (
        "Errors",
        "`Chat` and `StreamChat` tell the caller what stands here, with one key and nothing else "
        "to turn to.",
    ),
}


async def measure(base_url: str, runs: list[Run], *, unary: bool) -> dict[Run, list[str]]:
    """The differences of each run, through a gateway of their own."""
    logger = logging.getLogger("tokenwire.compatibility")
    timeout = verdicts.TIMEOUT_SECONDS if runs[0].item.kind == "errors" else 100.0
    async with (
        serving(runner.config(base_url, runs), logger, observer=Recorder()) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        chat = chat_service_pb2_grpc.ChatServiceStub(channel)
        answers = await runner.call_all(chat, runs, unary=unary, timeout=timeout)
        found = {}
        for run, answer in answers.items():
            if run.item.kind == "errors":
                found[run] = verdicts.differences(run, answer, running.pools[run.name].ring)
            else:
                found[run] = runner.differences(run, answer)
        return found


async def measure_all() -> tuple[dict[Item, list[str]], list[str]]:
    """(the modes that each recording passed, every difference found)."""
    passed: dict[Item, list[str]] = defaultdict(list)
    wrong: list[str] = []
    with runner.replaying() as base_url:
        for kind in runner.MODES_OF:
            for mode in runner.MODES_OF[kind]:
                differing: dict[Item, list[str]] = defaultdict(list)
                for unary in _UNARY[kind]:
                    runs = runner.runs(kind, mode)
                    for run, lines in (await measure(base_url, runs, unary=unary)).items():
                        differing[run.item] += lines
                for item, lines in differing.items():
                    wrong += lines
                    if not lines:
                        passed[item].append(mode)
    return passed, wrong


def outcome(item: Item) -> str:
    """What the recording is, in a few words."""
    data = item.data
    if item.kind == "errors":
        told = verdicts.told(item)
        return f"{data['status']}: {told.code} `{told.reason}`; the key {verdicts.stands(item)}"
    if item.kind == "streams_foreign":
        return str(data["dialect"])
    return str(data["expected"]["outcome"]).replace("_", " ")


def document(passed: dict[Item, list[str]]) -> Iterator[str]:
    """The lines of the page."""
    count = sum(len(runner.items(kind)) for kind in runner.MODES_OF)
    yield "# Compatibility"
    yield ""
    yield (
        f"{count} recordings of real provider traffic, sent through a running gateway over "
        "sockets, and what its caller receives compared with what was recorded. The recordings "
        "are not part of this repository. `make compatibility` makes this page, and "
        "`tests/corpus` runs the same."
    )
    yield ""
    yield "Each recording is delivered in several ways:"
    yield ""
    for mode, meaning in runner.MODES.items():
        yield f"- `{mode}`: {meaning}"
    yield (
        f"- `cut`: ended cleanly after 10, 20, ... 90 % of its bytes, so {len(runner.CUTS)} times"
    )
    yield f"- `rst`: the connection reset after 20, 50 and 80 %, so {len(runner.RESETS)} times"
    for kind, (title, meaning) in _TITLES.items():
        items = runner.items(kind)
        yield from ("", f"## {title} ({len(items)})", "", meaning, "")
        if kind == "errors":
            yield "Where the corpus suggests something else:"
            yield ""
            yield from (f"- {what}: {why}." for what, why in verdicts.ARGUED.items())
            yield ""
        told = "what the caller hears" if kind == "errors" else "what it is"
        yield f"| recording | provider | {told} | passed |"
        yield "|---|---|---|---|"
        for item in items:
            modes = ", ".join(_shortened(passed[item]))
            yield f"| {item.id} | {item.data['provider']} | {outcome(item)} | {modes} |"


def _shortened(modes: Iterable[str]) -> Iterator[str]:
    modes = list(modes)
    yield from (mode for mode in modes if mode in runner.MODES)
    cuts = len(set(modes) & set(runner.CUTS))
    resets = len(set(modes) & set(runner.RESETS))
    if cuts:
        yield f"cut ({cuts})"
    if resets:
        yield f"rst ({resets})"


def main() -> int:
    """Writes the page; 1 if anything differs."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as event_loop:
        passed, wrong = event_loop.run(measure_all())
    DOCUMENT.write_text("\n".join((*document(passed), "")))
    sys.stdout.write("\n".join((*wrong, f"{len(wrong)} differences", "")))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
