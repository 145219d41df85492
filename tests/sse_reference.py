"""The WHATWG event stream as the standard words it: slow, obvious, and on the whole stream at once.

What the gateway's incremental decoder is compared with, by properties, by fuzzing and in the
corpus. It shares no code with it but the type of an event.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

from tokenwire_service.upstream.sse import Event

BOM = b"\xef\xbb\xbf"
MOST_MS = 10**15  # no reconnection time is longer: some 30,000 years


def reference(stream: bytes) -> tuple[list[Event], int | None]:
    """(the events, the last reconnection time in ms) of section 9.2.6, sentence by sentence."""
    # "If there is a leading BOM, strip it": one, and only at the start.
    if stream.startswith(BOM):
        stream = stream[len(BOM) :]
    # "Lines must be separated by either a CRLF pair, a single LF or a single CR."
    lines: list[bytes] = []
    line = bytearray()
    i = 0
    while i < len(stream):
        if stream[i : i + 2] == b"\r\n":
            lines.append(bytes(line))
            line.clear()
            i += 2
        elif stream[i : i + 1] in (b"\r", b"\n"):
            lines.append(bytes(line))
            line.clear()
            i += 1
        else:
            line += stream[i : i + 1]
            i += 1
    # "Once the end of the file is reached, any pending data must be discarded": so is `line`.
    data, event_type, last_event_id = b"", b"", b""
    events: list[Event] = []
    retry: int | None = None
    for line_ in lines:
        if line_ == b"":
            # "If the data buffer is an empty string, set the data buffer and the event type
            # buffer to the empty string and return."
            if data == b"":
                event_type = b""
                continue
            # "If the data buffer's last character is a LF, remove it."
            data = data[:-1] if data.endswith(b"\n") else data
            events.append(
                Event(
                    event_type.decode("utf-8", "replace") or "message",
                    data,
                    last_event_id.decode("utf-8", "replace"),
                )
            )
            data, event_type = b"", b""
        elif line_.startswith(b":"):
            continue  # "Ignore the line."
        else:
            field, colon, value = line_.partition(b":")
            if colon and value.startswith(b" "):
                value = value[1:]
            if field == b"event":
                event_type = value
            elif field == b"data":
                data += value + b"\n"
            elif field == b"id" and b"\0" not in value:
                last_event_id = value
            elif field == b"retry" and value and all(0x30 <= byte <= 0x39 for byte in value):
                # "If the field value consists of only ASCII digits": so long that Python refuses
                # to read them, too.
                digits = value.lstrip(b"0")[:17] or b"0"
                retry = min(int(digits), MOST_MS)
    return events, retry
