"""The WHATWG event stream, incrementally: bytes in, events out, no I/O, bounded memory.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

from typing import NamedTuple

_MOST_MS = 10**15  # of `retry`: some 30,000 years


class Event(NamedTuple):
    """One dispatched event. `data` is the raw UTF-8, malformed bytes included."""

    type: str
    data: bytes
    last_id: str


class EventTooLarge(ValueError):
    """A line or an event grew beyond the bound given to the decoder.

    `events` are those that the same bytes had completed before it: they are good.
    """

    def __init__(self, limit: int, events: list[Event]) -> None:
        super().__init__(f"an event exceeds {limit} bytes")
        self.events = events


class Decoder:
    """Feed it bytes as they arrive; it returns the events they complete.

    An unterminated last event is discarded, as the standard says: a stream that was cut
    never yields half an event. `error_field` keeps the value of a field named `error`, which
    the standard ignores and llama.cpp uses to say why it stops.
    """

    __slots__ = (
        "_bom",
        "_data",
        "_id",
        "_limit",
        "_partial",
        "_size",
        "_skip_lf",
        "_type",
        "error_field",
        "retry_ms",
    )

    def __init__(self, max_event_bytes: int) -> None:
        self._limit = max_event_bytes
        self._partial = bytearray()  # the start of a line whose end has not come
        self._bom: bytes | None = b""  # what came so far of a leading BOM; None once decided
        self._skip_lf = False  # the last byte was a CR: a LF now belongs to it
        self._data: list[bytes] = []
        self._size = 0
        self._type = b""
        self._id = b""
        self.error_field: bytes | None = None
        self.retry_ms: int | None = None

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes.

        Raises EventTooLarge, however the bytes are cut, when the data of an event so far and one
        line, comments included, exceed the bound together.
        """
        if self._bom is not None:
            chunk = self._bom + chunk
            if len(chunk) < 3 and b"\xef\xbb\xbf".startswith(chunk):
                self._bom = chunk
                return []
            self._bom = None
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        if not chunk:
            return []
        if self._skip_lf:
            self._skip_lf = False
            if chunk[0] == 0x0A:
                chunk = chunk[1:]
        if b"\r" in chunk:
            self._skip_lf = chunk[-1] == 0x0D
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            self._keep(chunk, [])
            return []
        lines = chunk.split(b"\n")
        if self._partial:
            self._partial += lines[0]
            lines[0] = bytes(self._partial)
            self._partial.clear()
        rest = lines.pop()
        events: list[Event] = []
        for line in lines:
            if len(line) + self._size > self._limit:
                raise EventTooLarge(self._limit, events)
            if not line:
                if self._data:
                    events.append(self._dispatch())
                else:
                    self._type = b""
            else:
                self._line(line)
        if rest or self._size:
            self._keep(rest, events)
        return events

    def _keep(self, piece: bytes, events: list[Event]) -> None:
        if len(self._partial) + len(piece) + self._size > self._limit:
            raise EventTooLarge(self._limit, events)
        self._partial += piece

    def _dispatch(self) -> Event:
        event = Event(
            self._type.decode("utf-8", "replace") if self._type else "message",
            self._data[0] if len(self._data) == 1 else b"\n".join(self._data),
            self._id.decode("utf-8", "replace") if self._id else "",
        )
        self._data.clear()
        self._size = 0
        self._type = b""
        return event

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data: "):  # nearly all of them
            self._data.append(line[6:])
            self._size += len(line) - 5
            return
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif name == b"event":
            self._type = value
        elif name == b"id":
            if b"\0" not in value:
                self._id = value
        elif name == b"retry":
            if value.isdigit():  # of any length: Python reads no more than 4,300
                self.retry_ms = min(int(value.lstrip(b"0")[:16] or b"0"), _MOST_MS)
        elif name == b"error":
            self.error_field = value
