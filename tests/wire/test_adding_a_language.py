"""docs/clients/adding-a-language.md: all that stands there runs, and its client conforms."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc
import pytest

from conformance import driver
from processes import serve
from tokenwire.v1 import chat_service_pb2, chat_service_pb2_grpc
from wire.programs import ROOT, missing, run

PAGE = ROOT / "docs/clients/adding-a-language.md"
EXAMPLE = ROOT / "docs/clients/ruby"
LANES = 4  # most cases wait
RUBY = ("ruby", "-W", "-I", "build/ruby/gen", "-I", "docs/clients/ruby")


class Block(NamedTuple):
    """A fenced block of the page."""

    language: str
    file: str  # what it quotes; empty where it is to be run
    text: str


def blocks() -> list[Block]:
    fences = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*fence) for fence in fences]


def joined(language: str) -> str:
    """What is to be run, in the order of the page."""
    return "".join(b.text for b in blocks() if b.language == language and not b.file)


@pytest.fixture
def ruby() -> None:
    """Debian's packages."""
    if driver._make(EXAMPLE, "available").returncode:
        missing("gRPC for Ruby")


def test_every_block_is_run_or_a_quotation() -> None:
    found = blocks()
    assert PAGE.read_text().count("```") == 2 * len(found)
    for block in found:
        if block.file:
            assert block.text in (ROOT / block.file).read_text(), block
        else:
            assert block.language in ("sh", "ruby", "text", "console"), block
    console = [block.text for block in found if block.language == "console"]
    assert console == [".venv/bin/tokenwire serve\n"]  # run below


@pytest.mark.usefixtures("ruby")
async def test_its_commands_and_snippets_run() -> None:
    ran = await run("bash", "-euo", "pipefail", "-c", joined("sh"), MAKEFLAGS="")
    assert ran.code == 0, ran.out + ran.err
    assert "1 passed, 0 failed" in ran.out
    async with serve() as gateway:
        serving = gateway.event("serving")
        assert serving is not None
        ran = await run(*RUBY, "-e", joined("ruby"), TOKENWIRE_TARGET=serving["address"])
    assert ran.code == 0, ran.err
    assert ran.out == joined("text")


# The case `silence` waits for minutes. The driver names what hangs after 310 s, while pytest's own
# limit would kill whatever runs just then and name nobody.
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ruby")
async def test_its_client_conforms() -> None:
    """Debian's gRPC is years older than the gateway's, and in a language no client of ours has."""
    language = await asyncio.to_thread(driver.Language("ruby", folder=EXAMPLE).built)
    cases = driver.cases()
    alone = [case for case in cases if case["gateway"] == "broken"]  # it breaks the whole process
    others = [case for case in cases if case not in alone]
    said: list[str] = []
    lanes = [others[lane::LANES] for lane in range(LANES)]
    outcomes = await asyncio.gather(*(driver.run([language], lane, said.append) for lane in lanes))
    outcomes.append(await driver.run([language], alone, said.append))
    assert said == []
    assert sum(len(lane) for lane in outcomes) == len(cases)


class HalfAnswers(chat_service_pb2_grpc.ChatServiceServicer):
    """Ends in the middle without a reason: with OK, as a proxy may and the gateway never
    does, or as a connection that breaks.
    """

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    async def StreamChat(  # noqa: N802
        self, request: chat_service_pb2.StreamChatRequest, context: Any
    ) -> AsyncIterator[chat_service_pb2.StreamChatResponse]:
        header, delta = chat_service_pb2.ResponseHeader(), chat_service_pb2.Delta(content="half")
        yield chat_service_pb2.StreamChatResponse(header=header)
        yield chat_service_pb2.StreamChatResponse(delta=delta)
        if self._code is not grpc.StatusCode.OK:
            await context.abort(self._code, "Socket closed")


HALF = """
require "tokenwire"
begin
  client = Tokenwire::Client.new(ENV.fetch("TOKENWIRE_TARGET"))
  client.stream(Tokenwire::V1::ChatRequest.new).each { |event| event }
  puts "taken for an answer"
rescue Tokenwire::Error => e
  puts e.reason, e.partial.text
end
"""


@pytest.mark.usefixtures("ruby")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.OK, "STREAM_INCOMPLETE"),
        (grpc.StatusCode.UNAVAILABLE, "UPSTREAM_STREAM_INTERRUPTED"),
    ],
)
async def test_half_an_answer_has_a_reason_whoever_ends_it(
    code: grpc.StatusCode, reason: str
) -> None:
    made = await asyncio.to_thread(driver._make, EXAMPLE, "generate")
    assert made.returncode == 0, made.stdout
    server = grpc.aio.server()
    chat_service_pb2_grpc.add_ChatServiceServicer_to_server(HalfAnswers(code), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        ran = await run(*RUBY, "-e", HALF, TOKENWIRE_TARGET=f"127.0.0.1:{port}")
    finally:
        await server.stop(None)
    assert ran.code == 0, ran.err
    assert ran.out == f"{reason}\nhalf\n"
