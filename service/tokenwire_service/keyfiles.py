"""Files of keys, watched: when what they hold has changed, and what that means for each upstream.

They are polled, by content: a mounted Kubernetes Secret changes by the swap of a symbolic link
two folders up, others rewrite the file or rename a new one over it, and content is what all of
these change. A file is taken only as two looks in a row have found it, so that one which is
being written is not; a file that gives no keys changes nothing but what is said about it.
`KeyFiles.see` decides, without I/O, clock or await; `watch` looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from tokenwire_service.config import Key, KeyEntry, Upstream
from tokenwire_service.keyset import UnusableError, looks_cut, resolved, secrets_in
from tokenwire_service.secret import Secret
from tokenwire_service.textfile import NotRegularError, UnreadableError, read
from tokenwire_service.thread import in_thread

RESTLESS_LOOKS = 30  # in a row, each unlike the one before: somebody should know
RESTLESS = "it changes all the time, so it may be half written"
CUT = "it ends within a key that it held before, so it may be half written"


@dataclass(frozen=True)
class Look:
    """What a file holds, or why that cannot be read."""

    content: bytes = b""
    problem: str = ""
    lasting: bool = False  # it is nothing that can be watched: a pipe, a folder


@dataclass(frozen=True)
class KeysChanged:
    """An upstream has other keys. The ids of what is new, what has left, and what has a new
    secret under its old id."""

    upstream: str
    keys: tuple[Key, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True)
class FileUnusable:
    """A file gives no keys any more, or for another reason than before: the last stay."""

    path: Path
    problem: str


@dataclass(frozen=True)
class FileUsable:
    """A file that was unusable gives keys again."""

    path: Path


Change: TypeAlias = KeysChanged | FileUnusable | FileUsable


@dataclass(frozen=True)
class FileState:
    """One file as it stands. `problem`: why it gives no keys; empty if it does."""

    path: Path
    upstreams: tuple[str, ...]
    problem: str


class _File:
    """One file: how it was found, and what was made of that."""

    def __init__(self, secrets: tuple[Secret, ...]) -> None:
        self.secrets = secrets  # the last good ones
        self.problem = ""
        self._last: Look | None = None
        self._settled: Look | None = None  # the last that was found twice
        self._restless = 0

    @property
    def unseen(self) -> bool:
        """Whether nobody has looked yet."""
        return self._last is None

    def see(self, look: Look) -> bool:
        """Whether this look changes `secrets` or `problem`."""
        if look != self._last:
            self._last = look
            self._settled = None
            self._restless += 1
            return self._restless > RESTLESS_LOOKS and self._unusable(RESTLESS)
        self._restless = 0
        if look == self._settled:
            return False
        self._settled = look
        try:
            if look.problem:
                raise UnusableError(look.problem)
            secrets = secrets_in(look.content)
            if looks_cut(self.secrets, secrets):
                raise UnusableError(CUT)
        except UnusableError as error:
            return self._unusable(str(error))
        same = secrets == self.secrets and not self.problem
        self.secrets, self.problem = secrets, ""
        return not same

    def _unusable(self, problem: str) -> bool:
        same = problem == self.problem
        self.problem = problem
        return not same


class KeyFiles:
    """The files of keys of all upstreams. Two that name the same file share its looks."""

    def __init__(self, upstreams: Iterable[Upstream]) -> None:
        self._upstreams: dict[str, Upstream] = {}
        self._files: dict[Path, _File] = {}
        self.replace(upstreams)

    def replace(self, upstreams: Iterable[Upstream]) -> tuple[Upstream, ...]:
        """Takes others, as they were just read, and returns them with the keys they have. A file
        that was watched before holds what was settled, since it may be half written just now; and
        a key that stays keeps its id, unless its entry names another now."""
        before, known = self._upstreams, self._files
        self._upstreams, self._files = {}, {}
        for upstream in upstreams:
            for entry in upstream.key_entries:
                if entry.path is not None:
                    self._files[entry.path] = known.get(entry.path) or _File(entry.secrets)
            entries = self._settled(upstream)
            if entries and before:
                was = before.get(upstream.name, upstream)
                stay = [key for key in was.keys if _ids(key, was.key_entries) & _ids(key, entries)]
                upstream = msgspec.structs.replace(
                    upstream, keys=resolved(entries, stay), key_entries=entries
                )
            self._upstreams[upstream.name] = upstream
        return tuple(self._upstreams.values())

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those that are worth looking at."""
        return tuple(self._files)

    @property
    def states(self) -> tuple[FileState, ...]:
        """How each stands."""
        return tuple(
            FileState(path, self._users(path), file.problem) for path, file in self._files.items()
        )

    def see(self, looks: Mapping[Path, Look]) -> list[Change]:
        """What a look at all files changes, in an order in which it can be told. A file that is
        no regular one when it is first looked at was read once and is left alone from then on."""
        changes: list[Change] = []
        affected: dict[str, None] = {}  # in order
        for path, look in looks.items():
            file = self._files.get(path)
            if file is None:
                continue
            if look.lasting and file.unseen:
                del self._files[path]
                continue
            was_unusable = bool(file.problem)
            if not file.see(look):
                continue
            if file.problem:
                changes.append(FileUnusable(path, file.problem))
                continue
            if was_unusable:
                changes.append(FileUsable(path))
            affected |= dict.fromkeys(self._users(path))
        changes += filter(None, map(self._resolved, affected))
        return changes

    def _users(self, path: Path) -> tuple[str, ...]:
        return tuple(
            name
            for name, upstream in self._upstreams.items()
            if any(entry.path == path for entry in upstream.key_entries)
        )

    def _settled(self, upstream: Upstream) -> tuple[KeyEntry, ...]:
        """Its entries as the files were last seen."""
        return tuple(
            msgspec.structs.replace(entry, secrets=self._files[entry.path].secrets)
            if entry.path in self._files
            else entry
            for entry in upstream.key_entries
        )

    def _resolved(self, name: str) -> KeysChanged | None:
        upstream = self._upstreams[name]
        entries = self._settled(upstream)
        before = {key.id: key.secret for key in upstream.keys}
        keys = resolved(entries, upstream.keys)
        after = {key.id: key.secret for key in keys}
        if keys == upstream.keys:
            return None
        self._upstreams[name] = msgspec.structs.replace(upstream, keys=keys, key_entries=entries)
        return KeysChanged(
            name,
            keys,
            added=tuple(key_id for key_id in after if key_id not in before),
            removed=tuple(key_id for key_id in before if key_id not in after),
            changed=tuple(i for i, secret in after.items() if before.get(i, secret) != secret),
        )


def _ids(key: Key, entries: Iterable[KeyEntry]) -> set[str | None]:
    """What the entries that hold a key call it; None: by its fingerprint."""
    return {
        entry.source.id
        for entry in entries
        if entry.source.organization == key.organization and key.secret in entry.secrets
    }


def look_at(path: Path) -> Look:
    """Reads one file."""
    try:
        return Look(read(path, regular=True))
    except UnreadableError as error:
        return Look(problem=str(error), lasting=isinstance(error, NotRegularError))


async def look_in_thread(paths: tuple[Path, ...]) -> Mapping[Path, Look]:
    """Reads all, off the event loop."""
    return await in_thread(lambda: {path: look_at(path) for path in paths}, "key files")


async def watch(
    files: KeyFiles,
    tell: Callable[[Change], None],
    *,
    interval: float,
    look: Callable[[tuple[Path, ...]], Awaitable[Mapping[Path, Look]]] = look_in_thread,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Looks every `interval` seconds as long as there are files, and tells what changes: two looks
    after it has changed at the latest."""
    while files.paths:
        for change in files.see(await look(files.paths)):
            tell(change)
        await sleep(interval)
