"""The way out of one stream: the contract's order, coalescing, snapshots, heartbeats.

What arrives from the upstream in one read leaves as few messages as it can: adjacent deltas of
one choice are joined. While a message is being written nothing is read, so what piles up
meanwhile comes as one read: the slower the caller, the larger the messages. There is no queue.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.errors import TIMER, GatewayError
from tokenwire_service.folding import Growing
from tokenwire_service.timer import Alarm

StreamChatResponse = chat_service_pb2.StreamChatResponse
Snapshot = chat_service_pb2.Snapshot
Write = Callable[[StreamChatResponse], Awaitable[None]]
# Told how many deltas came at once; with a stream's first ones the seconds since it began, with all
# others those since the ones before.
Relayed = Callable[[int, float | None, float | None], None]

# What is joined or held grows no further: a message must stay sendable, and memory bounded,
# however much text comes at once. Half of the smallest limits.message_bytes.
_JOIN_BYTES = 32 * 1024
_HOLD_BYTES = 256 * 1024

HEARTBEAT_SECONDS = 15.0  # of silence, after the first delta: see StreamChat in the contract


class Outbox:
    """Sends one answer to one caller. `committed` is true from the first message on.

    A header alone is held back: it would commit the call though no text has come yet.
    """

    def __init__(
        self,
        write: Write,
        *,
        cumulative: bool,
        max_delay: float,
        started: float,
        now: Callable[[], float],
        write_timeout: float = math.inf,
        heartbeat: float = HEARTBEAT_SECONDS,
        relayed: Relayed | None = None,
    ) -> None:
        self._write = write
        self._write_timeout = write_timeout
        self._snapshots: dict[int, Growing] | None = {} if cumulative else None
        self._max_delay = max_delay
        self._started = started
        self._now = now
        self._heartbeat = heartbeat
        self._relayed = relayed
        self._alarm = Alarm(now)
        self._writable = True  # not while a write is under way, nor after one that broke off
        self._pending: list[StreamChatResponse] = []
        self._joined_bytes = 0  # of the last one
        self._held_bytes = 0  # of all, at most
        self._delta_at = started  # when the last one came
        self._flush_at = math.inf
        self._written_at = math.inf
        self.committed = False
        self.delivered_bytes = 0  # of text, reasoning and tool calls, as UTF-8
        self.first_delta_at: float | None = None

    @property
    def wake_at(self) -> float:
        """When to call `tick` though nothing arrived."""
        if not self.committed:
            return self._flush_at
        return min(self._flush_at, self._written_at + self._heartbeat)

    async def send(self, events: Iterable[StreamChatResponse], pieces: int = 1) -> None:
        """Takes what arrived; writes it now, or at most `max_delay` later. `pieces`: of how many
        the upstream's deltas in it were made."""
        begun = self.first_delta_at is not None
        for event in events:
            self._queue(event)
        if self.first_delta_at is None:
            return
        if self._relayed is not None and pieces:
            now = self._now()
            if begun:
                self._relayed(pieces, None, now - self._delta_at)
            else:
                self._relayed(pieces, self.first_delta_at - self._started, None)
            self._delta_at = now
        if self._max_delay <= 0 or not self.committed or self._held_bytes >= _HOLD_BYTES:
            await self.flush()
        elif self._pending and self._flush_at == math.inf:
            self._flush_at = self._now() + self._max_delay

    async def tick(self) -> None:
        """Called at `wake_at`: flushes what is due, or beats once."""
        if self._now() < self.wake_at:
            return
        if self._pending:
            await self.flush()
        else:
            await self._send(StreamChatResponse())

    async def finish(self, events: Iterable[StreamChatResponse]) -> None:
        """The finishes and the trailer, after everything else."""
        tail: list[StreamChatResponse] = []
        for event in events:
            kind = event.WhichOneof("event")
            if kind not in ("finish", "trailer"):
                self._queue(event)
                continue
            if kind == "finish" and self._snapshots is not None:
                self._begin(event.finish.choice_index)
                self._queue(self._snapshot(event.finish.choice_index, Snapshot.STATE_ENDED))
            elif kind == "trailer" and self.first_delta_at is not None:
                elapsed = max(0.0, self.first_delta_at - self._started)
                event.trailer.time_to_first_token.FromNanoseconds(int(elapsed * 1e9))
            tail.append(event)
        self._pending += tail
        await self.flush()

    async def fail(self, error: GatewayError) -> None:
        """In cumulative mode, the last snapshots carry the legacy error state. Before the commit
        only where a retry would not help (see `refusal`). Never after a write that the deadline or
        the caller broke off: gRPC takes no other until it is done."""
        if not self._writable:
            return
        if not self.committed:
            if self._snapshots is not None and (last := refusal(error)) is not None:
                await self._send(last)
            return
        await self.flush()
        if self._snapshots is None:
            return
        for index in sorted(self._snapshots):
            await self._send(self._snapshot(index, _state(error)))

    def close(self) -> None:
        """Nothing more is written."""
        self._alarm.close()

    async def flush(self) -> None:
        """Writes everything that is held."""
        self._flush_at = math.inf
        self._held_bytes = 0
        pending, self._pending = self._pending, []
        for message in pending:
            self.committed = True
            await self._send(message)

    async def _send(self, message: StreamChatResponse) -> None:
        self._writable = False
        try:
            with self._alarm.until(self._now() + self._write_timeout):
                await self._write(message)
        except TimeoutError:
            if not self._alarm.expired:
                raise
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_CALLER_STALLED,
                f"the caller read nothing for {self._write_timeout:g} s",
                metadata={TIMER: "write"},
            ) from None
        self._writable = True
        self._written_at = self._now()

    def _queue(self, event: StreamChatResponse) -> None:
        kind = event.WhichOneof("event")
        if kind == "header":
            self._pending = [event]  # any other is of an attempt that failed before its first text
            return
        grows = False  # a snapshot takes the place of the one before
        if kind == "delta":
            self.delivered_bytes += text_bytes(event.delta)
            if self.first_delta_at is None:
                self.first_delta_at = self._now()
            if self._snapshots is None:
                grows = True
            else:
                index = event.delta.choice_index
                self._begin(index)
                self._snapshots[index].add(event.delta)
                event = self._snapshot(index, Snapshot.STATE_STREAMING)
        size = event.ByteSize()
        room = not grows or self._joined_bytes + size <= _JOIN_BYTES
        if self._pending and room and _join(self._pending[-1], event):
            self._joined_bytes += size
            self._held_bytes += size if grows else 0
        else:
            self._pending.append(event)
            self._joined_bytes = size
            self._held_bytes += size

    def _begin(self, index: int) -> None:
        """The first snapshot of a choice says that it is there, with nothing generated. Not before
        its upstream has begun to answer: a message, once sent, ends all retries."""
        assert self._snapshots is not None
        if index not in self._snapshots:
            self._snapshots[index] = Growing()
            self._queue(self._snapshot(index, Snapshot.STATE_READY))

    def _snapshot(self, index: int, state: Snapshot.State.ValueType) -> StreamChatResponse:
        assert self._snapshots is not None
        return _snapshot(index, state, self._snapshots[index].message())


# Legacy integer states of lagent: OUT_OF_LIMIT -3, INVALID_ARG -4, CLOSED -2, else SERVER_ERR -1.
LEGACY_STATES = {
    "CONTEXT_LENGTH_EXCEEDED": Snapshot.STATE_OUT_OF_LIMIT,
    "INVALID_REQUEST": Snapshot.STATE_INVALID_ARGUMENT,
    "UNSUPPORTED_PARAMETER": Snapshot.STATE_INVALID_ARGUMENT,
    "UNKNOWN_ROLE": Snapshot.STATE_INVALID_ARGUMENT,
    "CANCELLED": Snapshot.STATE_CLOSED,
    "DEADLINE_EXCEEDED": Snapshot.STATE_CLOSED,
    "GATEWAY_DRAINING": Snapshot.STATE_CLOSED,
}


def refusal(error: GatewayError) -> StreamChatResponse | None:
    """The one snapshot of a cumulative stream that fails before its first text: the error's legacy
    state. None where trying again may help: the status alone leaves the caller free to do so."""
    if error.retry_helps:
        return None
    return _snapshot(0, _state(error), chat_pb2.ChatMessage(role="assistant"))


def _state(error: GatewayError) -> Snapshot.State.ValueType:
    return LEGACY_STATES.get(error.reason_name, Snapshot.STATE_SERVER_ERROR)


def _snapshot(
    index: int, state: Snapshot.State.ValueType, message: chat_pb2.ChatMessage
) -> StreamChatResponse:
    return StreamChatResponse(snapshot=Snapshot(state=state, choice_index=index, message=message))


def text_bytes(delta: chat_service_pb2.Delta) -> int:
    """Of text, reasoning, refusal and tool calls, as UTF-8."""
    text = delta.content + delta.reasoning + delta.refusal
    for part in delta.tool_calls:
        text += part.name + part.arguments
    return len(text) if text.isascii() else len(text.encode())


def _join(last: StreamChatResponse, event: StreamChatResponse) -> bool:
    """Makes one message of both where that says the same; extra_json cannot be appended."""
    kind = last.WhichOneof("event")
    if kind != event.WhichOneof("event"):
        return False
    if kind == "snapshot":
        before, after = last.snapshot, event.snapshot
        if before.choice_index != after.choice_index or before.state == Snapshot.STATE_READY:
            return False
        last.CopyFrom(event)  # it says all of `last` and more
        return True
    if kind != "delta":
        return False
    into, delta = last.delta, event.delta
    if into.choice_index != delta.choice_index or into.extra_json or delta.extra_json:
        return False
    into.content += delta.content
    into.reasoning += delta.reasoning
    into.refusal += delta.refusal
    for part in delta.tool_calls:
        if into.tool_calls and into.tool_calls[-1].index == part.index and not part.id + part.name:
            into.tool_calls[-1].arguments += part.arguments
        else:
            into.tool_calls.append(part)
    into.logprobs.extend(delta.logprobs)
    into.annotations.extend(delta.annotations)
    return True
