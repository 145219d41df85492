"""The keys that the entries of an upstream's `keys` come to, each with an id that stays.

Pure: `config` uses it once, `keyfiles` again whenever a file has changed. An id is what logs and
answers call a key, so a key that stays keeps its own, whatever comes and goes around it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tokenwire_service.secret import Secret
from tokenwire_service.settings import Key, KeyEntry, KeySource
from tokenwire_service.textfile import UnreadableError, decoded

NOT_A_KEY = "a key that is too long or has a space or an unprintable character (not shown)"
A_KEY = "up to 4096 visible ASCII characters"


class UnusableError(Exception):
    """Why a file gives no keys, in a few words that quote nothing of it."""


def split(text: str) -> list[str]:
    """Split what commas and line breaks separate; parts may be empty."""
    return [part.strip() for part in re.split(r"[,\r\n]", text)]


def file_texts(text: str) -> list[str]:
    """The texts in a file of keys, without its comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines())
    return [part for line in lines for part in split(line) if part]


def are_keys(texts: Iterable[str]) -> bool:
    """Whether each can be sent in a header."""
    return all(re.fullmatch(r"[!-~]{1,4096}", text) for text in texts)


def secrets_in(data: bytes) -> tuple[Secret, ...]:
    """The keys in the bytes of a file, at least one. Raises UnusableError."""
    try:
        texts = file_texts(decoded(data))
    except UnreadableError as error:
        raise UnusableError(str(error)) from None
    if not texts:
        raise UnusableError("empty")
    if not are_keys(texts):
        raise UnusableError(NOT_A_KEY)
    return tuple(map(Secret, texts))


def looks_cut(before: Sequence[Secret], after: Sequence[Secret]) -> bool:
    """Whether `after` is `before` up to somewhere inside one of its keys: half a file."""
    last = len(after) - 1
    if last >= len(before) or tuple(after[:last]) != tuple(before[:last]):
        return False
    whole, part = before[last].reveal(), after[last].reveal()
    return whole != part and whole.startswith(part)


@dataclass
class Named:
    """What one entry comes to. `repeated` has the ids of keys that stood there before, `clashes`
    those that a key would have had if another did not have it already."""

    keys: list[Key] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)


class Naming:
    """Turns the entries of one upstream into keys, in turn. Those that `stay` keep their ids."""

    def __init__(self, stay: Iterable[Key] = ()) -> None:
        self._ids = {(key.secret, key.organization): key.id for key in stay}
        self._taken = set(self._ids.values())
        self._placed: set[tuple[Secret, str | None]] = set()

    def name(self, entry: KeyEntry) -> Named:
        """The keys of the next entry."""
        source, named = entry.source, Named()
        several = len(set(entry.secrets)) > 1
        for secret in entry.secrets:
            pair = (secret, source.organization)
            if pair in self._placed:
                named.repeated.append(self._ids[pair])
                continue
            self._placed.add(pair)
            if pair not in self._ids:
                base = source.id or _fingerprint(secret, source.organization)
                number = len(named.keys) + 1
                key_id = f"{base}-{number}" if source.id and several else base
                if key_id in self._taken:
                    named.clashes.append(key_id)
                    numbered = (f"{base}-{n}" for n in itertools.count(1))
                    key_id = next(name for name in numbered if name not in self._taken)
                self._ids[pair] = key_id
                self._taken.add(key_id)
            named.keys.append(_key(self._ids[pair], secret, source))
        return named


def resolved(entries: Sequence[KeyEntry], before: Iterable[Key] = ()) -> tuple[Key, ...]:
    """All keys of an upstream, where it had those `before`."""
    wanted = {(secret, e.source.organization) for e in entries for secret in e.secrets}
    naming = Naming(key for key in before if (key.secret, key.organization) in wanted)
    return tuple(key for entry in entries for key in naming.name(entry).keys)


def _key(key_id: str, secret: Secret, source: KeySource) -> Key:
    return Key(
        id=key_id,
        secret=secret,
        organization=source.organization,
        weight=source.weight,
        quota_group=source.quota_group or "",
        requests_per_minute=source.requests_per_minute,
        tokens_per_minute=source.tokens_per_minute,
        in_flight=source.in_flight,
    )


def shared_name(upstream: str, key: Key) -> str:
    """What replicas call a key among themselves, whose ids may differ: a digest of 128 bits, from
    which no key can be told."""
    parts = ("tokenwire shared key v1", upstream, key.secret.reveal(), key.organization or "")
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _fingerprint(secret: Secret, organization: str | None) -> str:
    parts = ["tokenwire key id v1", secret.reveal(), *filter(None, [organization])]
    return "key-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
