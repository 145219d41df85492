"""What each key and each method has done, counted from the events that the log is written from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tokenwire_service.telemetry import ABANDONED, AttemptEvent, CallEvent


@dataclass
class KeyCount:
    """Attempts with one key that have ended. `at` and `error_at`: monotonic seconds."""

    attempts: int = 0
    successes: int = 0
    abandoned: int = 0  # ended by the caller or the deadline: nobody's fault
    faults: Counter[str] = field(default_factory=Counter)  # by Fault.value
    prompt_tokens: int = 0
    completion_tokens: int = 0
    at: float = 0.0  # when the last one ended
    error: str = ""  # the last one's fault
    error_status: int = 0  # HTTP; 0 if there was no answer
    error_code: str = ""  # the upstream's own
    error_at: float = 0.0


class Counters:
    """An observer that counts, for the keys that `keep` names. Since the start; a key that gets a
    new secret counts on, one that leaves takes its counts with it, and so does an upstream."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._keys: dict[str, dict[str, KeyCount]] = {}  # by upstream, then by id
        self._calls: Counter[tuple[str, str]] = Counter()

    @property
    def calls(self) -> Mapping[tuple[str, str], int]:
        """Calls that have ended, by method and status code."""
        return self._calls

    def key(self, upstream: str, key_id: str) -> KeyCount:
        """The counts of one key, to be read."""
        return self._keys.get(upstream, {}).get(key_id) or KeyCount()

    def keep(self, upstream: str, key_ids: Iterable[str]) -> None:
        """Counts these keys of an upstream from now on and forgets its others: ids may come and go
        for ever."""
        before = self._keys.get(upstream, {})
        self._keys[upstream] = {key_id: before.get(key_id) or KeyCount() for key_id in key_ids}

    def leave(self, upstream: str) -> None:
        """Forgets an upstream, and does not count what ends there yet."""
        self._keys.pop(upstream, None)

    def attempt(self, event: AttemptEvent) -> None:
        """Counts it for its key."""
        count = self._keys.get(event.upstream, {}).get(event.key_id)
        if count is None:
            return  # it outlived its key, or its upstream
        count.attempts += 1
        count.prompt_tokens += event.prompt_tokens
        count.completion_tokens += event.completion_tokens
        count.at = self._now()
        if not event.fault:
            count.successes += 1
        elif event.fault == ABANDONED:
            count.abandoned += 1
        else:
            count.faults[event.fault] += 1
            count.error, count.error_at = event.fault, count.at
            count.error_status, count.error_code = event.http_status, event.upstream_code

    def call(self, event: CallEvent) -> None:
        """Counts it for its method."""
        self._calls[event.method, event.code] += 1
