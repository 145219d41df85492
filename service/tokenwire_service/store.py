"""One Redis (or Valkey): commands in their order, whether it is there, and what follows its return.

All commands of a replica go over one connection, those that gather meanwhile as one batch. So they
are done in the order in which they were given, which is what makes it enough to *post* what ends a
call: nobody waits for it, and no cancel loses it. A Redis that does not answer within the timeout,
or answers with an error, is away from then on and costs nobody anything: whoever asks is told at
once. One task alone tries to reach it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenwire_service.secret import Scrubber
from tokenwire_service.settings import Redis
from tokenwire_service.timer import Within

if TYPE_CHECKING:
    from redis.asyncio import Redis as Client

_BATCH = 500  # commands in one round trip
_FIRST_PAUSE = 0.05  # seconds between two tries to reach it; doubles
_LONGEST_PAUSE = 0.5
_BEAT = 0.25  # seconds until it is asked again whether it is there, with what it held

Value: TypeAlias = str | int | float
_Ask: TypeAlias = tuple["Script", Sequence[str], Sequence[Value]]


class AwayError(Exception):
    """Redis is not there. What was asked may have been done, or not."""


class _ForgottenError(Exception):
    """What Redis held is gone."""


class Script:
    """Lua that Redis runs as one step."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# Whether Redis still holds what it held: the mark goes with the data.
_MARK = Script(
    """
    redis.call('SET', KEYS[1], ARGV[1], 'NX')
    return redis.call('GET', KEYS[1])
    """
)


@dataclass(eq=False, slots=True)
class _Command:
    script: Script
    keys: Sequence[str]
    arguments: Sequence[Value]
    answer: asyncio.Future[Any] | None = None  # None: nobody waits for it


class Store:
    """The connection to one Redis. `run` must run for anything to happen.

    `scripts`: all that will be used. `now`: monotonic seconds.
    """

    def __init__(
        self,
        settings: Redis,
        scripts: Iterable[Script],
        logger: logging.Logger,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
    ) -> None:
        self.settings = settings
        self._scripts = (_MARK, *scripts)
        self._logger = logger
        self._scrub = Scrubber(filter(None, [settings.password]))
        self._now = now
        self._sleep = sleep
        self._random = random
        self._queue: deque[_Command] = deque()
        self._sent: list[_Command] = []  # the batch that is under way
        self._wake = asyncio.Event()
        self._here = False
        self._tried = asyncio.Event()
        self._away_since: float | None = None  # told so already
        self._mark = ""
        self._ask_at = 0.0  # when to look for it again
        self._restorers: list[Callable[[bool], Iterable[_Ask]]] = []

    @property
    def here(self) -> bool:
        """Whether commands are taken now."""
        return self._here

    def key(self, name: str) -> str:
        """How a key is called in Redis, which others may use as well."""
        return f"{self.settings.prefix}:{name}"

    def on_return(self, restore: Callable[[bool], Iterable[_Ask]]) -> None:
        """`restore(lost)` gives what is to be done first whenever Redis is there again; `lost`: it
        has forgotten what it held, or is another one."""
        self._restorers.append(restore)

    async def call(self, script: Script, keys: Sequence[str], arguments: Sequence[Value]) -> Any:
        """What the script answers. Raises AwayError: at once, or after the timeout at most twice,
        since a batch that is under way comes first."""
        if not self._here:
            raise AwayError
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(_Command(script, keys, arguments, answer))
        return await answer

    def post(self, script: Script, keys: Sequence[str], arguments: Sequence[Value]) -> None:
        """Has a script run after everything given before. While Redis is away it is dropped."""
        if self._here:
            self._put(_Command(script, keys, arguments))

    async def run(self) -> None:
        """Reaches Redis, serves, and reaches it again, until cancelled."""
        pause = _FIRST_PAUSE
        while True:
            reached = math.inf
            client = self._client()
            try:
                await self._reach(client)
                reached = self._now()
                while True:
                    await self._something()
                    await self._serve(client)
            except asyncio.CancelledError:
                self._leave("the gateway ends", tell=False)
                raise
            except Exception as error:  # noqa: BLE001  # whatever it is, calls must go on without
                # Redis quotes what it does not understand, its password too.
                self._leave(self._scrub(f"{type(error).__name__}: {error}".rstrip(": ")))
            finally:
                with contextlib.suppress(Exception):
                    await client.aclose()
            if self._now() - reached > _LONGEST_PAUSE:  # it was no flicker
                pause = _FIRST_PAUSE
            await self._sleep(pause * (0.5 + self._random() / 2))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def tried(self) -> None:
        """Waits until Redis is there, or is known not to be."""
        await self._tried.wait()

    async def drain(self) -> None:
        """Waits until all that was posted is done, or Redis is away."""
        with contextlib.suppress(AwayError):
            await self.call(_MARK, (self.key("mark"),), (uuid.uuid4().hex,))

    # --- inside -------------------------------------------------------------------------

    def _put(self, command: _Command) -> None:
        self._queue.append(command)
        self._wake.set()

    async def _reach(self, client: Client) -> None:
        """Connects, makes the scripts known, and gives back what Redis should hold."""
        async with Within(self.settings.timeout):
            pipe = client.pipeline(transaction=False)
            for script in self._scripts:
                pipe.script_load(script.text)
            await pipe.execute()
            mark = await client.evalsha(_MARK.sha, 1, self.key("mark"), uuid.uuid4().hex)
        lost, self._mark = mark != self._mark, mark
        # No await from here on: what comes meanwhile comes after what is given back.
        for restore in self._restorers:
            self._queue.extend(_Command(*each) for each in restore(lost))
        self._here = True
        self._tried.set()
        self._wake.set()
        fields: dict[str, object] = {"redis": self.settings.url}
        if self._away_since is not None:
            fields["away_seconds"] = round(self._now() - self._away_since, 3)
        self._logger.info("redis is here", extra={"fields": fields})
        self._away_since = None

    async def _something(self) -> None:
        """Waits for commands. Now and then the question whether Redis is there is one of them, also
        among others: a connection may outlive what Redis held."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEAT):
                await self._wake.wait()
        if not self._queue or self._now() >= self._ask_at:
            self._ask_at = self._now() + _BEAT
            self._queue.append(_Command(_MARK, (self.key("mark"),), (uuid.uuid4().hex,)))

    async def _serve(self, client: Client) -> None:
        """One batch there and back."""
        batch = self._sent
        while self._queue and len(batch) < _BATCH:
            batch.append(self._queue.popleft())
        if not self._queue:
            self._wake.clear()
        if not batch:
            return
        pipe = client.pipeline(transaction=False)
        for each in batch:
            pipe.evalsha(each.script.sha, len(each.keys), *each.keys, *map(str, each.arguments))
        async with Within(self.settings.timeout):
            answers = await pipe.execute(raise_on_error=False)
        error: Exception | None = None
        for command, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                error = error or answer
            elif command.answer is not None and not command.answer.done():
                command.answer.set_result(answer)
            if command.script is _MARK and answer != self._mark:
                error = error or _ForgottenError()
        if error is not None:
            raise error  # who waits for an answer that failed is told with those of the queue
        batch.clear()

    def _leave(self, why: str, *, tell: bool = True) -> None:
        """Redis is away: whoever waits hears so."""
        self._here = False
        self._tried.set()
        for command in (*self._sent, *self._queue):
            if command.answer is not None and not command.answer.done():
                command.answer.set_exception(AwayError())
        self._sent.clear()
        self._queue.clear()
        self._wake.clear()
        if tell and self._away_since is None:
            self._away_since = self._now()
            fields = {"redis": self.settings.url, "why": why, "so": _SO[self.settings.on_failure]}
            self._logger.warning("redis is away", extra={"fields": fields})

    def _client(self) -> Client:
        # Not loaded where no Redis is configured.
        from redis.asyncio import ConnectionPool, SSLConnection, UnixDomainSocketConnection
        from redis.asyncio import Redis as Client
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        settings = self.settings
        options: dict[str, Any] = {
            "username": settings.username,
            "password": settings.password.reveal() if settings.password is not None else None,
            "decode_responses": True,
            "protocol": 2,
            "socket_connect_timeout": settings.timeout,
            "socket_timeout": None,  # Within has it
            "retry": Retry(NoBackoff(), 0),  # what is repeated would be counted twice
            "max_connections": 1,
        }
        url = settings.url
        if url.startswith("unix:"):
            options |= {"connection_class": UnixDomainSocketConnection, "path": url[5:]}
            return Client.from_pool(ConnectionPool(**options))
        if url.startswith("rediss:"):
            options |= {"connection_class": SSLConnection}
            options |= {
                "ssl_ca_certs": settings.certificate_authorities,
                "ssl_cert_reqs": "required",
            }
            options |= {"ssl_check_hostname": True}
        return Client.from_pool(ConnectionPool(**options, **_address(url)))


_SO = {
    "open": "each replica keeps to the limits by itself",
    "closed": "who has limits is refused",
}


def _address(url: str) -> dict[str, Any]:
    """Host, port and number of the database."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return {
        "host": parts.hostname,
        "port": parts.port or 6379,
        "db": int(parts.path.strip("/") or 0),
    }
