"""What happened, as frozen records: one per attempt and one per call, for whoever observes.

The log is one observer. A tracer is told of the beginning, too, for what it makes goes to
upstreams. Records hold key ids, never key material, and no prompt or answer text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TextIO

import msgspec

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.secret import Scrubber, Secret
from tokenwire_service.upstream.dialect import Encoded, Route

# The `fault` of an attempt whose end is not its upstream's doing: the caller left, did not read, or
# its time was over.
ABANDONED = "abandoned"


class AttemptEvent(msgspec.Struct, frozen=True):
    """One request to one upstream with one key ended. Times are seconds.

    `fault` is empty when it answered, `abandoned` when the call ended it, else a value of
    errors.Fault, with `reason` as ErrorInfo would spell it alone.
    """

    request_id: str
    upstream: str
    model: str  # as the upstream calls it
    key_id: str
    http_status: int  # 0: none arrived
    fault: str
    upstream_code: str  # the upstream's own, without key material
    seconds: float  # from the request sent to the end of the answer
    prompt_tokens: int = 0  # as the upstream told them, or where it was cut off an estimate, or 0
    completion_tokens: int = 0
    usage_estimated: bool = False
    number: int = 1  # among the attempts of its call, fallbacks included
    reason: str = ""
    committed: bool = False  # the caller was told something of its answer
    reused_connection: bool = False
    key_seconds: float = 0.0  # waiting for its key, before `seconds`
    first_byte_seconds: float | None = None  # until the answer's head; None: it never came
    first_token_seconds: float | None = None  # until the first delta of a stream
    trace_id: str = ""  # 32 hexadecimal digits; empty where traces are off


class CallEvent(msgspec.Struct, frozen=True):
    """One RPC ended. `reason` is empty for OK. Times are seconds; of a batch, numbers and times are
    sums over its items, and so may exceed `seconds`."""

    request_id: str
    method: str  # package.Service/Method
    code: str
    reason: str
    message: str
    model: str  # as the caller spelt it; empty for a batch
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    usage_estimated: bool  # at least a part of the tokens
    seconds: float
    # The caller's own, for accounting.
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    caller: str = ""  # as configured; empty where there are no callers
    upstream: str = ""  # that was asked last; empty if none was
    key_id: str = ""  # of the last attempt
    retries: int = 0  # attempts after the first one of a call
    queue_seconds: float = 0.0  # waiting for slots
    key_seconds: float = 0.0  # waiting for keys
    backoff_seconds: float = 0.0  # between attempts
    first_token_seconds: float | None = None  # until the first delta of a stream
    trace_id: str = ""  # as of its attempts


class Observer(Protocol):
    """Told of every event, in the event loop: it must not block."""

    def attempt(self, event: AttemptEvent) -> None:
        """An attempt ended."""

    def call(self, event: CallEvent) -> None:
        """A call ended."""


# What becomes of a span: handed to the collector, refused or not reached by it, or never handed
# over because too many were waiting.
SPANS = ("sent", "failed", "dropped")


class AttemptSpan(Protocol):
    """One attempt in a distributed trace."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the request to the upstream, which may go on with the trace."""

    def answered(self, header: chat_service_pb2.ResponseHeader) -> None:
        """The upstream has begun to answer."""

    def finished(self, reasons: Iterable[chat_pb2.FinishReason.ValueType]) -> None:
        """Why each choice of the answer ended."""

    def end(self, event: AttemptEvent) -> None:
        """It ended."""


class CallSpan(Protocol):
    """One RPC in a distributed trace."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""

    def attempt(
        self, route: Route, encoded: Encoded, chat: chat_service_pb2.ChatRequest, streams: bool
    ) -> AttemptSpan:
        """An attempt begins. `streams`: whether the upstream is asked for a stream."""

    def end(self, event: CallEvent) -> None:
        """It ended."""


class Tracer(Protocol):
    """Told of every RPC's beginning."""

    def call(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> CallSpan:
        """An RPC begins. `method`: package.Service/Method. `metadata`: the caller's."""


class LogObserver:
    """Writes each event as one line of the log: attempts that fail, and every call."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def attempt(self, event: AttemptEvent) -> None:
        """Logs a failed attempt as a warning, others for debugging: one that its own call ended
        is nobody's fault, and callers who leave are many."""
        level = logging.DEBUG if event.fault in {"", ABANDONED} else logging.WARNING
        self._log(level, "attempt", event)

    def call(self, event: CallEvent) -> None:
        """Logs the call: an error of the gateway's own as such, all others as information."""
        level = logging.ERROR if event.code == "INTERNAL" else logging.INFO
        self._log(level, "call", event)

    def _log(self, level: int, name: str, event: AttemptEvent | CallEvent) -> None:
        if self._logger.isEnabledFor(level):
            # Not Logger.log, which looks for its caller's line in every frame of the stack.
            record = self._logger.makeRecord(
                self._logger.name,
                level,
                "",
                0,
                name,
                (),
                None,
                extra={"fields": msgspec.structs.asdict(event)},
            )
            self._logger.handle(record)


class Observers:
    """Several observers as one: each is told of every event, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def attempt(self, event: AttemptEvent) -> None:
        """Tells all."""
        for observer in self._observers:
            observer.attempt(event)

    def call(self, event: CallEvent) -> None:
        """Tells all."""
        for observer in self._observers:
            observer.call(event)


# Characters. Shorter ones are placeholders for upstreams without keys, and may be plain words.
_SHORTEST_KEY = 8


def log_scrubber(secrets: Iterable[Secret] = ()) -> Scrubber:
    """One that leaves words alone which only stand where a key should."""
    return Scrubber(secrets, _SHORTEST_KEY)


class LineFormatter(logging.Formatter):
    """One line per record: JSON, or `time level name key=value ...` for people.

    What `scrub` knows never shows, whoever wrote it: the text of an exception may quote a header.
    """

    def __init__(self, as_json: bool, scrub: Scrubber | None = None) -> None:
        super().__init__()
        self._as_json = as_json
        self._scrub = scrub or log_scrubber()

    def format(self, record: logging.LogRecord) -> str:
        """The line. Line breaks in values are escaped, so that no value can forge a line."""
        given: dict[str, object] = getattr(record, "fields", {})
        fields, texts = _as_json(given)
        # One look at all texts together: nearly never is there anything to be found.
        if self._scrub.finds("\n".join(texts)):
            fields = {name: self._scrubbed(value) for name, value in fields.items()}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        at = f"{stamp}.{int(record.msecs):03d}Z"
        message = self._scrub(record.getMessage())
        trace = self._scrub(self.formatException(record.exc_info)) if record.exc_info else ""
        if self._as_json:
            line = {"time": at, "level": record.levelname.lower(), "event": message, **fields}
            if trace:
                line["trace"] = trace
            return _escaped(_dumps(line))
        shown = " ".join(f"{k}={_plain(v)}" for k, v in fields.items() if v not in ("", {}))
        text = _escaped(f"{at} {record.levelname.lower():7} {message} {shown}".rstrip())
        return f"{text}\n{trace}" if trace else text

    def _scrubbed(self, value: object) -> object:
        if isinstance(value, dict):
            return {self._scrub(name): self._scrubbed(each) for name, each in value.items()}
        return self._scrub(value) if isinstance(value, str) else value


_encoder = msgspec.json.Encoder()


def _as_json(given: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Fields as JSON has them: numbers and maps stay what they are, all else is text, nothing is
    left out; and every text that is in them, names of inner maps included."""
    fields: dict[str, object] = {}
    texts: list[str] = []
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, float):
            value = round(value, 4)
        elif not isinstance(value, int):
            if isinstance(value, Mapping):
                value, inner = _as_json({str(each): value[each] for each in value})
                texts += (*value, *inner)
            else:
                value = str(value)
                texts.append(value)
        fields[name] = value
    return fields, texts


def _dumps(line: object) -> str:
    try:
        return _encoder.encode(line).decode()
    except (ValueError, OverflowError):  # half a surrogate pair; an integer of more than 64 bits
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    else:
        text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=False)


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _escaped(line: str) -> str:
    """JSON leaves some line breaks, terminal controls and half surrogates as they are."""
    # str.isprintable looks every character up: 35 us for a line where this takes one.
    if line.isascii():
        if not _CONTROL.search(line):
            return line
    elif line.isprintable():
        return line
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


_HELD_SECONDS = 0.05
_MOST_HELD = 256  # lines


class _LineHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of an event loop a moment later, many at once.

    A line that is written between two calls takes 88 us (two thirds of it to find its own code and
    data again, and a write); in a row with others 41. An error is written at once, with all that
    came before it, and so is whatever is logged outside of a loop.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._held: list[logging.LogRecord] = []
        self._loop: asyncio.AbstractEventLoop | None = None  # that is to write what is held

    def emit(self, record: logging.LogRecord) -> None:
        """Holds the record, or writes all. Called under the handler's lock."""
        self._held.append(record)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None or record.levelno >= logging.ERROR or len(self._held) >= _MOST_HELD:
            self.flush()
        elif self._loop is not loop:
            self._loop = loop
            loop.call_later(_HELD_SECONDS, self.flush)

    def flush(self) -> None:
        """Writes what is held: also called by `logging` when the process ends."""
        with self.lock or contextlib.nullcontext():
            held, self._held, self._loop = self._held, [], None
            lines: list[str] = []
            for record in held:
                try:
                    lines += (self.format(record), self.terminator)
                except Exception:  # noqa: BLE001  # as logging's own handlers
                    self.handleError(record)
            try:
                self.stream.write("".join(lines))
                super().flush()
            except Exception:  # noqa: BLE001
                if held:
                    self.handleError(held[-1])


# Libraries whose warnings would else go to stderr in a form, and with secrets, of their own.
_LIBRARIES = ("aiohttp", "asyncio", "grpc", "opentelemetry")
# They warn of what is wrong with a caller's traceparent and tracestate, and quote it, many times a
# call: whoever reaches the port could fill the log.
_OF_CALLERS = ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext")


def configure_logging(
    level: str, as_json: bool, stream: TextIO | None = None, scrub: Scrubber | None = None
) -> logging.Logger:
    """The gateway's logger, writing lines to `stream` (stderr), none of which shows a secret that
    `scrub` knows. What the libraries beneath have to warn of goes the same way."""
    # What no line shows need not be looked up for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    stream = stream or sys.stderr
    # A person who reads along has no lines to wait for.
    handler = _LineHandler(stream) if as_json else logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(as_json, scrub))
    for name in ("tokenwire", *_LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel("WARNING" if name in _LIBRARIES else level.upper())
    for name in _OF_CALLERS:
        logging.getLogger(name).setLevel("ERROR")
    return logging.getLogger("tokenwire")
