"""`tokenwire chat`: one question to a gateway, its answer on the terminal as it arrives."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import grpc
from google.protobuf.json_format import MessageToJson

from tokenwire import Client, Reply, TokenwireError

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_MODEL = "gpt-4o-mini"
DEFAULT_TARGET = "localhost:50051"
CANCELLED = 130  # what shells expect of a program that Ctrl-C ended

# Models write what they like, and a terminal obeys escape codes: they could move the
# cursor, set the title or the clipboard. Only line ends and tabs pass.
_CONTROLS = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if code not in (9, 10)}


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run_chat` reads."""
    parser.add_argument(
        "prompt", nargs="*", help="the question; '-' or a pipe reads it from standard input"
    )
    parser.add_argument(
        "--target",
        metavar="HOST:PORT",
        help=f"the gateway (default: $TOKENWIRE_TARGET or {DEFAULT_TARGET})",
    )
    parser.add_argument(
        "--model", "-m", help=f"model to ask (default: $TOKENWIRE_MODEL or {DEFAULT_MODEL})"
    )
    parser.add_argument("--system", "-s", metavar="TEXT", help="system message before the question")
    parser.add_argument("--temperature", "-t", type=float, metavar="T", help="0 to 2")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens to generate, reasoning included"
    )
    parser.add_argument(
        "--token-env",
        metavar="VAR",
        default="TOKENWIRE_TOKEN",
        help="environment variable that holds the caller's token (default: %(default)s)",
    )
    parser.add_argument("--tls", action="store_true", help="encrypt the connection")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after this long (default: never)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the whole answer as one JSON object at the end"
    )


def run_chat(
    args: argparse.Namespace,
    *,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Ask and print; returns the exit code.

    0: the whole answer was printed. 1: the call failed. 2: the question makes no sense.
    130: cancelled with Ctrl-C. The answer goes to `stdout`; everything else to `stderr`.
    """
    stdin, stdout, stderr = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
    notes = _screen(stderr)
    target = args.target or environ.get("TOKENWIRE_TARGET") or DEFAULT_TARGET
    model = args.model or environ.get("TOKENWIRE_MODEL") or DEFAULT_MODEL
    try:
        with Client(target, token=environ.get(args.token_env, ""), tls=args.tls) as client:
            return _ask(client, model, args, stdin, _screen(stdout), notes, now)
    except KeyboardInterrupt:
        notes.line("cancelled")
        return CANCELLED
    except BrokenPipeError:
        # The reader has gone, as after `| head`. Python would complain when it flushes
        # at exit, so give it somewhere to flush to.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return 1
    except TokenwireError as error:
        for line in _explained(error, target, args.token_env):
            notes.line(line)
        return 1
    except (TypeError, ValueError) as error:
        notes.line(f"tokenwire chat: {error}")
        return 2


def _ask(
    client: Client,
    model: str,
    args: argparse.Namespace,
    stdin: TextIO,
    screen: _Screen,
    notes: _Screen,
    now: Callable[[], float],
) -> int:
    prompt = _prompt(args.prompt, stdin)
    messages = [{"role": "user", "content": prompt}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    stream = client.stream(
        messages,
        model=model,
        temperature=args.temperature,
        max_completion_tokens=args.max_tokens,
        timeout=args.timeout,
    )
    first = last = None
    with stream, _ended_line(screen):
        for event in stream:
            delta = event.proto.delta
            if event.text or delta.reasoning or delta.refusal:
                last = now()
                first = first if first is not None else last
            if not args.json:
                screen.reasoning(delta.reasoning)
                screen.text(event.text or delta.refusal)
    reply = stream.reply()
    if args.json:
        screen.text(MessageToJson(reply.proto, preserving_proto_field_name=False, indent=2))
        screen.end_line()
    writing = last - first if first is not None and last is not None else 0.0
    notes.dim(_summary(reply, stream.time_to_first_token, writing))
    return 0


def _prompt(words: list[str], stdin: TextIO) -> str:
    if words and words != ["-"]:
        prompt = " ".join(words)
        if not prompt.strip():
            raise ValueError("the question is empty")
        return prompt
    if not words and stdin.isatty():
        raise ValueError('what is the question? For example: tokenwire chat "Why is the sky blue?"')
    prompt = stdin.read().strip()
    if not prompt:
        raise ValueError("standard input has no question")
    return prompt


# --- what is said about the answer --------------------------------------------------


def _summary(reply: Reply, time_to_first_token: float | None, writing: float) -> str:
    usage, header = reply.usage, reply.header
    about = "~" if usage.estimated else ""
    facts = []
    if time_to_first_token is not None:
        facts.append(f"{time_to_first_token:.2f} s to first token")
    # An answer that came in one piece took no time to write, which says nothing.
    if writing >= 0.05 and usage.completion_tokens > 1:
        facts.append(f"{about}{usage.completion_tokens / writing:.0f} tokens/s")
    reasoning = f" ({usage.reasoning_tokens} reasoning)" if usage.reasoning_tokens else ""
    facts.append(
        f"{about}{usage.prompt_tokens} prompt + "
        f"{about}{usage.completion_tokens} answer tokens{reasoning}"
    )
    facts.append(f"{header.model} via {header.upstream}" if header.upstream else header.model)
    if len(header.attempts) > 1:
        facts.append(f"{len(header.attempts)} attempts")
    if reply.finish_reason not in ("stop", ""):
        facts.append(f"ended by {reply.finish_reason}")
    return " · ".join(facts)


def _explained(error: TokenwireError, target: str, token_env: str) -> Iterator[str]:
    """One line that says what happened and what to do; then one per refused field, if several."""
    what = error.message
    advice = _ADVICE.get(error.reason, "")
    if error.reason == "GATEWAY_DRAINING" and error.partial_text:
        advice = _BEGINNING  # the stream outlived the grace
    if not error.reason and error.code is grpc.StatusCode.UNAVAILABLE:
        # Without a reason no gateway has spoken: this is the local gRPC's own text.
        if "refused" in what:
            what, advice = f"nothing listens at {target}", "start one with `tokenwire serve`"
        elif "DNS" in what or "resol" in what.lower():
            what, advice = f"cannot find the host of {target}", "check --target"
        else:
            what = f"lost the connection to {target}, or never had one: {what}"
            advice = "check --target, and --tls if the gateway has a certificate"
    elif not error.reason and error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        what, advice = "no whole answer within --timeout", "allow more time"
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        advice = f"put the token into ${token_env}"
    if error.retry_after is not None:
        advice = f"try again in {math.ceil(error.retry_after * 10) / 10:g} s"
    line = f"{error.reason or error.code.name}: {what}"
    line += f"; {advice}" if advice else ""
    # Without a reason the gateway never logged the call: its id would lead nowhere.
    yield f"{line} (request {error.request_id})" if error.reason else line
    for violation in error.field_violations:
        if str(violation) not in error.message:
            yield f"  {violation}"


_BEGINNING = "what is above is only the beginning; ask again"
_ADVICE = {
    "MODEL_NOT_FOUND": "choose another with --model",
    "CONTEXT_LENGTH_EXCEEDED": "shorten the question",
    "UPSTREAM_CREDENTIALS_REJECTED": "check the gateway's upstream keys",
    "UPSTREAM_QUOTA_EXHAUSTED": "the gateway's upstream account needs credit",
    "UPSTREAM_STREAM_INTERRUPTED": _BEGINNING,
    "STREAM_INCOMPLETE": _BEGINNING,
    "GATEWAY_DRAINING": "ask again",
    "DEADLINE_EXCEEDED": "allow more time with --timeout",
}


# --- the terminal -------------------------------------------------------------------


class _Screen(Protocol):
    """Where lines go: a terminal with styles, or a pipe without."""

    def text(self, text: str) -> None:
        """Part of the answer."""

    def reasoning(self, text: str) -> None:
        """Part of the reasoning."""

    def dim(self, line: str) -> None:
        """A remark."""

    def line(self, line: str) -> None:
        """A whole line."""

    def end_line(self) -> None:
        """End the line, if one is begun."""


class _Pipe:
    """Plain text; reasoning is left out, so that what is piped on is the answer alone."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._column = 0

    def text(self, text: str) -> None:
        if text:
            self._file.write(text)
            self._file.flush()  # per piece: `| tee` shows the answer growing, too
            self._column = 0 if text.endswith("\n") else 1

    def reasoning(self, text: str) -> None:
        pass

    def dim(self, line: str) -> None:
        self.line(line)

    def line(self, line: str) -> None:
        self.end_line()
        self.text(line + "\n")

    def end_line(self) -> None:
        if self._column:
            self.text("\n")


class _Terminal:
    """Styled text, printed as it arrives: nothing is ever drawn twice."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0
        self._in_reasoning = False

    def text(self, text: str) -> None:
        if text and self._in_reasoning:
            self._in_reasoning = False
            self.end_line()
            self._print("\n", "")
        self._print(text, "")

    def reasoning(self, text: str) -> None:
        if text:
            self._in_reasoning = True
        self._print(text, "dim italic")

    def dim(self, line: str) -> None:
        self.end_line()
        self._print(line, "dim")
        self._print("\n", "")

    def line(self, line: str) -> None:
        self.end_line()
        self._print(line + "\n", "")

    def end_line(self) -> None:
        if self._column:
            self._print("\n", "")

    def _print(self, text: str, style: str) -> None:
        text = text.translate(_CONTROLS)
        if text:
            # `out` rather than `print`: no wrapping, which the terminal does itself and
            # can undo when it is resized, and no markup in what a model wrote.
            self._console.out(text, style=style or None, end="", highlight=False)
            self._console.file.flush()
            self._column = 0 if text.endswith("\n") else 1


def _screen(file: TextIO) -> _Screen:
    reconfigure: Any = getattr(file, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a locale without emoji must not lose the answer
    if not file.isatty():
        return _Pipe(file)
    from rich.console import Console  # only here: a pipe has no use for it

    return _Terminal(Console(file=file, highlight=False, soft_wrap=True))


@contextlib.contextmanager
def _ended_line(screen: _Screen) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            screen.end_line()
