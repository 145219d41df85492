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
    """An observer that counts. Since the start; a key that gets a new secret counts on, one that
    leaves takes its counts with it."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._keys: dict[tuple[str, str], KeyCount] = {}
        self._calls: Counter[tuple[str, str]] = Counter()

    @property
    def calls(self) -> Mapping[tuple[str, str], int]:
        """Calls that have ended, by method and status code."""
        return self._calls

    def key(self, upstream: str, key_id: str) -> KeyCount:
        """The counts of one key, to be read."""
        return self._keys.get((upstream, key_id)) or KeyCount()

    def keep(self, upstream: str, key_ids: Iterable[str]) -> None:
        """Forgets the other keys of this upstream: ids may come and go for ever."""
        kept = set(key_ids)
        for name in [n for n in self._keys if n[0] == upstream and n[1] not in kept]:
            del self._keys[name]

    def attempt(self, event: AttemptEvent) -> None:
        """Counts it for its key."""
        count = self._keys.setdefault((event.upstream, event.key_id), KeyCount())
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
