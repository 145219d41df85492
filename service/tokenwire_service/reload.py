"""The configuration file, watched: when it is read again, and what has come of that.

Files of callers' tokens are watched with it, since who may call is part of it.

It is polled by content, as files of keys are, and for the same reasons: a mounted ConfigMap changes
by the swap of a symbolic link. Content is read once two looks in a row have found it, so that a
file which is being written is not; SIGHUP reads it at once. It is taken as a whole or not at all:
with any problem the last good one stays in force. What is refused is tried again, more and more
seldom, because a problem may be elsewhere: a key file that it names may come a moment later.
`ConfigFile.see` decides, without I/O, clock or await; `watch` looks and reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tokenwire_service.config import Config, ConfigError
from tokenwire_service.keyfiles import Look, look_at
from tokenwire_service.thread import in_thread

MOST_SKIPPED = 64  # looks between two tries of what was refused: a minute, as the default has it


@dataclass
class Revision:
    """Which configuration is in force."""

    generation: int = 1  # 1 for that of the start; one more with each that was taken
    failures: int = 0  # how many were not taken since the start
    problem: str = ""  # of the last one, line by line; empty once one was taken


@dataclass(frozen=True)
class Source:
    """Where the configuration comes from: its file, how that is read again, and what it held when
    it was first read. Whoever sets `asked` has it read at once."""

    path: Path
    load: Callable[[], Config]
    first: Look
    asked: asyncio.Event = field(default_factory=asyncio.Event)


class ConfigFile:
    """How the file was found, and what is watched with it. `first`: when it was read for the start.
    What was found is compared and not looked into."""

    def __init__(self, first: object) -> None:
        self._last = self._tried = first
        self._skip = 0  # looks until what was refused is tried again; 0 if nothing was
        self._skipped = 0

    def see(self, look: object, *, asked: bool = False) -> bool:
        """Whether the file should be read now."""
        settled = look == self._last
        self._last = look
        if asked or (settled and look != self._tried):
            self._tried, self._skip = look, 0
            return True
        if self._skip:
            self._skipped += 1
            return settled and self._skipped >= self._skip
        return False

    def refused(self) -> None:
        """What was read was not taken: it is tried again, after twice as many looks each time."""
        self._skip = min(max(1, 2 * self._skip), MOST_SKIPPED)
        self._skipped = 0

    def taken(self) -> None:
        """What was read is in force."""
        self._skip = 0


async def watch(
    source: Source,
    loaded: Config,
    take: Callable[[Config], tuple[str, ...]],
    revision: Revision,
    logger: logging.Logger,
    *,
    interval: Callable[[], float],
    look: Callable[[Path], Look] = look_at,
) -> None:
    """Looks every `interval` seconds, and at once when asked, for ever. `loaded`: what was made of
    the file for the start. `take` puts a configuration in force and returns the settings that stay
    as they are until a restart."""
    # Of files of tokens it is not known how they were when they were read: they are read once more.
    file = ConfigFile((source.first,))
    read = source.first
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval()):
                await source.asked.wait()
        asked = source.asked.is_set()
        source.asked.clear()
        try:
            looking = partial(_found, source.path, loaded.token_files, look)
            found = await in_thread(looking, "configuration")
            if not file.see(found, asked=asked):
                continue
            try:
                config = await in_thread(source.load, "configuration")
                _stay_closed(loaded, config, source.path)
            except ConfigError as error:
                file.refused()
                _refused(error, revision, logger, asked=asked)
                continue
            file.taken()
            edited, read = found[0] != read, found[0]
            if config == loaded:
                mended, revision.problem = revision.problem, ""
                if asked or edited or mended:
                    logger.info("configuration unchanged", extra={"fields": {}})
                continue
            kept = take(config)
            loaded = config
        except Exception:
            # Neither may it end the watch in silence, nor is it known what a second try would do.
            revision.failures += 1
            revision.problem = "a defect of the gateway, which its log tells"
            logger.exception("defect", extra={"fields": {"where": "configuration"}})
            continue
        revision.generation += 1
        revision.problem = ""
        _taken(config, kept, revision, logger)


def _found(path: Path, tokens: tuple[str, ...], look: Callable[[Path], Look]) -> tuple[Look, ...]:
    """The file, and digests of those of tokens: what these hold is kept nowhere. None of them where
    one is a pipe, which can be read only once."""
    beside = [look(Path(each)) for each in tokens]
    if any(each.lasting for each in beside):
        beside = []
    return (
        look(path),
        *(replace(each, content=hashlib.sha256(each.content).digest()) for each in beside),
    )


def _stay_closed(before: Config, after: Config, path: Path) -> None:
    """Raises ConfigError where only callers were served, and everyone would be: a file that lost
    its end says so, too, and who means it can restart."""
    if before.callers and not after.callers:
        expected = "at least one, as before; a restart with this file serves everyone"
        raise ConfigError((f"{path}: callers: got nothing, expected {expected}",))


def _refused(
    error: ConfigError, revision: Revision, logger: logging.Logger, *, asked: bool
) -> None:
    problem = str(error)
    if problem == revision.problem and not asked:
        return  # the same, tried again
    revision.failures += 1
    revision.problem = problem
    fields = {"problem": "; ".join(error.problems), "so": "the last good one stays in force"}
    logger.warning("configuration refused", extra={"fields": fields})


def _taken(
    config: Config, kept: tuple[str, ...], revision: Revision, logger: logging.Logger
) -> None:
    for warning in config.warnings:
        logger.warning("configuration", extra={"fields": {"warning": warning}})
    if kept:
        fields = {"settings": ",".join(kept), "so": "they stay as they are until a restart"}
        logger.warning("configuration needs a restart", extra={"fields": fields})
    logger.info("configuration taken", extra={"fields": {"generation": revision.generation}})
