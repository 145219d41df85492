"""`tokenwire chat`, as a person and as a pipe see it, against a gateway on a real socket."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import pytest

from tokenwire.testing import FakeGateway, tool_call
from tokenwire.v1.chat_pb2 import Usage
from tokenwire.v1.chat_service_pb2 import (
    Delta,
    ResponseHeader,
    StreamChatResponse,
    UpstreamAttempt,
)
from tokenwire_service.terminal import add_chat_arguments, run_chat

PROGRAM = (
    "import argparse, sys; from tokenwire_service.terminal import *;"
    "parser = argparse.ArgumentParser(); add_chat_arguments(parser);"
    "sys.exit(run_chat(parser.parse_args()))"
)


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with FakeGateway() as gateway:
        yield gateway


class Keyboard(io.StringIO):
    """Standard input of a person who types nothing."""

    def isatty(self) -> bool:
        return True


def chat(
    gateway: FakeGateway | str,
    *words: str,
    stdin: io.StringIO | None = None,
    environ: Mapping[str, str] | None = None,
    times: Iterator[float] | None = None,
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a chat with pipes."""
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    target = gateway if isinstance(gateway, str) else gateway.target
    out, err = io.StringIO(), io.StringIO()
    more: dict[str, Any] = {} if times is None else {"now": lambda: next(times)}
    code = run_chat(
        parser.parse_args(["--target", target, *words]),
        stdin=stdin or Keyboard(),
        stdout=out,
        stderr=err,
        environ=environ or {},
        **more,
    )
    return code, out.getvalue(), err.getvalue()


# --- what is asked ------------------------------------------------------------------


def test_the_request(gateway: FakeGateway) -> None:
    gateway.reply("ok")
    code, _, _ = chat(
        gateway,
        *("Why", "blue?", "--model", "m", "--system", "Be brief.", "--temperature", "0"),
        *("--max-tokens", "9", "--timeout", "30", "--token-env", "MY_TOKEN"),
        environ={"MY_TOKEN": "secret", "TOKENWIRE_TOKEN": "other"},
    )
    assert code == 0
    [call] = gateway.calls
    request = call.request.chat
    assert request.model == "m"
    assert [(m.role, m.content) for m in request.messages] == [
        ("system", "Be brief."),
        ("user", "Why blue?"),
    ]
    assert (request.params.temperature, request.params.HasField("temperature")) == (0, True)
    assert request.params.max_completion_tokens == 9
    assert call.metadata["authorization"] == "Bearer secret"


def test_defaults(gateway: FakeGateway) -> None:
    gateway.reply("ok").reply("ok")
    chat(gateway, "Hi")
    chat(gateway, "Hi", environ={"TOKENWIRE_MODEL": "mine"})
    first, second = gateway.calls
    assert (first.request.chat.model, second.request.chat.model) == ("gpt-4o-mini", "mine")
    assert not first.request.chat.HasField("params")
    assert "authorization" not in first.metadata


@pytest.mark.parametrize("words", [[], ["-"]])
def test_the_question_may_come_from_a_pipe(gateway: FakeGateway, words: list[str]) -> None:
    gateway.reply("ok")
    code, _, _ = chat(gateway, *words, stdin=io.StringIO("  Why\nblue?\n"))
    assert code == 0
    assert gateway.calls[0].request.chat.messages[0].content == "Why\nblue?"


@pytest.mark.parametrize(
    ("stdin", "text"),
    [(Keyboard(), "what is the question?"), (io.StringIO(" \n"), "has no question")],
)
def test_no_question(gateway: FakeGateway, stdin: io.StringIO, text: str) -> None:
    code, out, err = chat(gateway, stdin=stdin)
    assert (code, out) == (2, "")
    assert err.startswith("tokenwire chat: ")
    assert text in err
    assert gateway.calls == []


# --- what is printed into a pipe ----------------------------------------------------


def test_plain_lines(gateway: FakeGateway) -> None:
    attempts = [UpstreamAttempt(upstream="openai", http_status=429), UpstreamAttempt()]
    gateway.reply(
        StreamChatResponse(
            header=ResponseHeader(model="gpt-x", upstream="openai", attempts=attempts)
        ),
        Delta(reasoning="Let me think."),
        "Hello",
        " world",
        finish_reason="length",
        usage=Usage(prompt_tokens=12, completion_tokens=30, reasoning_tokens=4),
    )
    # The clock is read at each of the three pieces.
    code, out, err = chat(gateway, "Hi", times=iter([1.0, 1.2, 1.5]))

    assert (code, out) == (0, "Hello world\n")
    seconds, rest = err.split(" ", 1)
    assert float(seconds) >= 0
    assert rest == (
        "s to first token · 60 tokens/s · 12 prompt + 30 answer tokens (4 reasoning) · "
        "gpt-x via openai · 2 attempts · ended by length\n"
    )


def test_estimates_are_marked_and_a_single_piece_has_no_speed(gateway: FakeGateway) -> None:
    gateway.reply(
        "Hello world\n", usage=Usage(prompt_tokens=1, completion_tokens=2, estimated=True)
    )
    code, out, err = chat(gateway, "Hi", times=iter([1.0]))
    assert (code, out) == (0, "Hello world\n")
    assert err.endswith("s to first token · ~1 prompt + ~2 answer tokens · gpt-4o-mini via fake\n")


def test_json(gateway: FakeGateway) -> None:
    gateway.reply("Hel", "lo", usage=Usage(total_tokens=3))
    code, out, err = chat(gateway, "--json", "Hi")
    answer = json.loads(out)
    assert code == 0
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["usage"] == {"totalTokens": 3}
    assert "to first token" in err


def test_only_a_tool_call(gateway: FakeGateway) -> None:
    gateway.reply(tool_call("f", {}))
    code, out, err = chat(gateway, "Hi")
    assert (code, out) == (0, "")
    assert "ended by tool_calls" in err


# --- failures -----------------------------------------------------------------------


def test_nothing_listens() -> None:
    with FakeGateway() as gone:
        pass
    code, out, err = chat(gone.target, "Hi")
    assert (code, out) == (1, "")
    assert err == (
        f"UNAVAILABLE: nothing listens at {gone.target}; start one with `tokenwire serve`\n"
    )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "errors resolving gate:1: [field:hostname lookup error: Domain name not found]",
            "cannot find the host of {target}; check --target",
        ),
        (
            "Socket closed",
            "lost the connection to {target}, or never had one: Socket closed; "
            "check --target, and --tls if the gateway has a certificate",
        ),
    ],
)
def test_what_grpc_itself_says(gateway: FakeGateway, said: str, shown: str) -> None:
    gateway.fail("", code=grpc.StatusCode.UNAVAILABLE, message=said, pushback_ms=-1)
    code, out, err = chat(gateway, "Hi")
    assert (code, out) == (1, "")
    assert err == f"UNAVAILABLE: {shown.format(target=gateway.target)}\n"


def test_tls_to_a_plaintext_port(gateway: FakeGateway) -> None:
    code, _, err = chat(gateway, "Hi", "--tls")
    assert code == 1
    assert f"lost the connection to {gateway.target}, or never had one" in err
    assert err.endswith("check --target, and --tls if the gateway has a certificate\n")


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("CALLER_UNAUTHENTICATED", "put the token into $TOKENWIRE_TOKEN"),
        ("MODEL_NOT_FOUND", "choose another with --model"),
        ("CONTEXT_LENGTH_EXCEEDED", "shorten the question"),
        ("UPSTREAM_CREDENTIALS_REJECTED", "check the gateway's upstream keys"),
    ],
)
def test_what_to_do(gateway: FakeGateway, reason: str, line: str) -> None:
    gateway.fail(reason, message="so it is", metadata={"requestId": "r1"})
    code, out, err = chat(gateway, "Hi")
    assert (code, out) == (1, "")
    assert err == f"{reason}: so it is; {line} (request r1)\n"


def test_when_to_try_again(gateway: FakeGateway) -> None:
    gateway.fail(
        "RATE_LIMITED", message="slow down", retry_after=58.3617, metadata={"requestId": "r"}
    )
    assert chat(gateway, "Hi")[2] == ("RATE_LIMITED: slow down; try again in 58.4 s (request r)\n")


def test_which_fields(gateway: FakeGateway) -> None:
    wrong = {"chat.params.temperature": "got 3", "chat.model": "got ''"}
    gateway.fail(
        "INVALID_REQUEST",
        message="chat.params.temperature: got 3, and 1 more",
        field_violations=wrong,
        metadata={"requestId": "r"},
    )
    assert chat(gateway, "Hi", "--temperature", "3")[2] == (
        "INVALID_REQUEST: chat.params.temperature: got 3, and 1 more (request r)\n"
        "  chat.model: got ''\n"
    )


@pytest.mark.parametrize("reason", ["UPSTREAM_STREAM_INTERRUPTED", "GATEWAY_DRAINING", ""])
def test_an_answer_that_breaks_off(gateway: FakeGateway, reason: str) -> None:
    unavailable = grpc.StatusCode.UNAVAILABLE
    gateway.fail(reason, message="cut", after=["Once upon"], code=unavailable)
    code, out, err = chat(gateway, "Hi")
    assert (code, out) == (1, "Once upon\n")
    assert "cut; what is above is only the beginning; ask again" in err
    assert "--target" not in err


def test_a_gateway_that_leaves(gateway: FakeGateway) -> None:
    gateway.fail("GATEWAY_DRAINING", message="shutting down", pushback_ms=-1)
    assert "GATEWAY_DRAINING: shutting down; ask again (request" in chat(gateway, "Hi")[2]


def test_too_slow(gateway: FakeGateway) -> None:
    gateway.hang("Once")
    code, out, err = chat(gateway, "Hi", "--timeout", "0.5")
    assert (code, out) == (1, "Once\n")
    assert err == "DEADLINE_EXCEEDED: no whole answer within --timeout; allow more time\n"


def test_the_token_never_shows(gateway: FakeGateway) -> None:
    code, _, err = chat(gateway, "Hi", environ={"TOKENWIRE_TOKEN": "my secret\n"})
    assert code == 2
    assert "token: holds a space" in err
    assert "secret" not in err


# --- as a process -------------------------------------------------------------------


def start(gateway: FakeGateway, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--target", gateway.target, "Hi"],
        env={**os.environ, "TERM": "xterm-256color"} | {"NO_COLOR": ""},
        **streams,
    )


def test_text_arrives_as_it_is_written_and_ctrl_c_cancels(gateway: FakeGateway) -> None:
    gateway.hang("Once ", "upon")
    with start(gateway, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(9) == b"Once upon"  # while the gateway is still silent
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout.read() == b"\n"
        assert process.stderr.read() == b"cancelled\n"
    assert gateway.calls[0].wait_cancelled()


def test_a_reader_that_goes_away(gateway: FakeGateway) -> None:
    gateway.reply(*["line\n"] * 20_000)
    with start(gateway, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""


def test_on_a_terminal(gateway: FakeGateway) -> None:
    gateway.reply(
        Delta(reasoning="Hmm. "),
        Delta(reasoning="Well."),
        "Hello \x1b[31mred\x1b]0;title\x07 ",
        "[bold]wörld[/bold] 👋",
    )
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # so that "\n" arrives as "\n"
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    with start(gateway, stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        shown = read_all(ours)
        assert process.wait(20) == 0
    os.close(ours)

    assert shown.startswith("\x1b[2;3mHmm. \x1b[0m\x1b[2;3mWell.\x1b[0m\n\n")
    # What the model wrote reaches the terminal as text, not as commands.
    assert "\nHello [31mred]0;title [bold]wörld[/bold] 👋\n" in shown
    last = shown.splitlines()[-1]
    assert last.startswith("\x1b[2m")
    assert last.endswith("via fake\x1b[0m")
    assert "to first token" in last


def read_all(terminal: int) -> str:
    shown = b""
    while select.select([terminal], [], [], 20)[0]:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    return shown.decode()
