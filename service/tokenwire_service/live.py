"""What answers calls, built from a configuration; and built anew from another one while they run.

A new configuration takes effect in one step, between two turns of the event loop. Calls that run
go on with what they began with: their gateway and the clients it had. What is known stays where
its name stays: an upstream's key ring with what it has learned of each key, slots, the retry
budget, what callers have used. An upstream at another address has another ring, which inherits
what is known: calls that run may take keys from theirs yet, and would send them to where they go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from tokenwire_service import keyfiles
from tokenwire_service.admission import Admission
from tokenwire_service.callers import Callers
from tokenwire_service.config import Config, Key, Upstream
from tokenwire_service.counters import Counters
from tokenwire_service.gateway import Gateway
from tokenwire_service.keyfiles import FileUnusable, FileUsable, KeyFiles
from tokenwire_service.keyring import KeyRing
from tokenwire_service.looplag import LoopLag
from tokenwire_service.pool import Pool
from tokenwire_service.relay import HEARTBEAT_SECONDS, Relayed
from tokenwire_service.retry import Backoff
from tokenwire_service.secret import Scrubber
from tokenwire_service.settings import RELOADED
from tokenwire_service.sharedpool import SharedPool
from tokenwire_service.sharing import Shared
from tokenwire_service.telemetry import Observer
from tokenwire_service.tokens import TokenCounter
from tokenwire_service.typed_yaml import file_fields
from tokenwire_service.upstream.client import UpstreamClient
from tokenwire_service.upstream.dialects import chooser


@dataclass(frozen=True)
class Taken:
    """What became of a new configuration. `kept`: settings that it changes, but that stay as they
    are until a restart. `left`: clients of upstreams that have gone or changed, to be closed once
    the calls have ended that run now."""

    kept: tuple[str, ...]
    left: tuple[UpstreamClient, ...]


class Live:
    """`config` is in force now; `gateway` is for calls that begin now. `pools` is always the same
    mapping, by upstream. `scrub`: what keeps keys out of the log; it learns of new ones. `shared`:
    what replicas have in common."""

    def __init__(
        self,
        config: Config,
        observer: Observer,
        counters: Counters,
        scrub: Scrubber,
        logger: logging.Logger,
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        relayed: Relayed | None = None,
        lag: LoopLag | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.config = config
        self._observer = observer
        self._counters = counters
        self._scrub = scrub
        self._logger = logger
        self._heartbeat = heartbeat
        self._relayed = relayed
        self._lag = lag
        self._shared = shared
        self._dialect = chooser()
        self._pools: dict[str, Pool] = {}
        self.files = KeyFiles(config.upstreams)
        self.counter = TokenCounter(config.limits.tokenizer_bytes)
        self.callers = Callers(config.callers, quotas=shared.quotas if shared else None)
        for upstream in config.upstreams:
            self._pools[upstream.name] = self._pool(upstream, config)
            self._count(upstream.name)
        self.gateway = self._gateway(config, None)
        self._hide()

    @property
    def pools(self) -> Mapping[str, Pool]:
        """Of each upstream, as it stands."""
        return self._pools

    async def close(self) -> None:
        """Closes every connection to an upstream, and the threads that count tokens."""
        self.counter.close()
        for pool in self._pools.values():
            await pool.client.close()

    def take(self, config: Config) -> Taken:
        """Another configuration, from now on."""
        config, kept = restrained(self.config, config)
        config = msgspec.structs.replace(config, upstreams=self.files.replace(config.upstreams))
        self._hide(*(key for upstream in config.upstreams for key in upstream.keys))
        left: list[UpstreamClient] = []
        for name in self._pools.keys() - {upstream.name for upstream in config.upstreams}:
            left.append(self._pools.pop(name).client)
            self._counters.leave(name)
            if self._shared is not None:
                self._shared.keys.leave(name)
        for upstream in config.upstreams:
            pool = self._pools.get(upstream.name)
            if pool is None:
                self._pools[upstream.name] = self._pool(upstream, config)
                self._count(upstream.name)
                continue
            if pool.upstream.base_url != upstream.base_url:
                left.append(pool.client)
                if self._shared is not None:
                    self._shared.keys.leave(upstream.name)
                before, pool = pool, self._pool(upstream, config, pool.bulkhead)
                pool.ring.inherit(before.ring)
                self._pools[upstream.name] = pool
            if _reached_otherwise(pool.upstream, upstream) or config.limits != self.config.limits:
                left.append(pool.client)
                pool.client = UpstreamClient(upstream, self._dialect, config.limits)
            pool.bulkhead.resize(_slots(config, upstream), config.limits.queue)
            pool.ring.organize(upstream.organizations)
            pool.replace(upstream.keys)
            self._count(upstream.name)
        self.config = config
        self.callers.replace(config.callers)
        self.counter.max_bytes = config.limits.tokenizer_bytes
        self.gateway = self._gateway(config, self.gateway)
        return Taken(kept, tuple(left))

    def tell(self, change: keyfiles.Change) -> None:
        """Does what a change of the files of keys asks for, and says so."""
        if isinstance(change, FileUnusable):
            fields: dict[str, object] = {
                "file": str(change.path),
                "problem": change.problem,
                "so": "its last good keys stay",
            }
            self._logger.warning("key file unusable", extra={"fields": fields})
            return
        if isinstance(change, FileUsable):
            fields = {"file": str(change.path)}
            self._logger.info("key file usable again", extra={"fields": fields})
            return
        pool = self._pools[change.upstream]
        self._hide(*change.keys)
        pool.replace(change.keys)
        self._count(change.upstream)
        if change.added or change.removed or change.changed:
            fields = {
                "upstream": change.upstream,
                "added": ",".join(change.added),
                "removed": ",".join(change.removed),
                "changed": ",".join(change.changed),
                "keys": len(change.keys),
            }
            self._logger.info("keys changed", extra={"fields": fields})

    def _gateway(self, config: Config, before: Gateway | None) -> Gateway:
        return Gateway(
            config,
            self._pools,
            self._observer,
            backoff=Backoff(config.retries.backoff, config.retries.backoff_cap),
            heartbeat=self._heartbeat,
            relayed=self._relayed,
            lag=self._lag,
            before=before,
        )

    def _pool(self, upstream: Upstream, config: Config, slots: Admission | None = None) -> Pool:
        client = UpstreamClient(upstream, self._dialect, config.limits)
        slots = slots or Admission(_slots(config, upstream), config.limits.queue, time.monotonic)
        if self._shared is None:
            return Pool(client, KeyRing(upstream), slots)
        pool = SharedPool(client, KeyRing(upstream), slots, self._shared.quotas)
        self._shared.keys.join(upstream.name, pool.ring, pool.look)
        return pool

    def _count(self, upstream: str) -> None:
        """Its keys of now are those that are counted, and those in use yet."""
        ring = self._pools[upstream].ring
        self._counters.keep(upstream, (key.id for key in ring.known_keys))

    def _hide(self, *coming: Key) -> None:
        """Keeps every key out of the log, and those that are `coming`."""
        known = (key for pool in self._pools.values() for key in pool.ring.known_keys)
        self._scrub.replace(key.secret for key in (*known, *coming))


def restrained(before: Config, after: Config) -> tuple[Config, tuple[str, ...]]:
    """`after`, but for what cannot change while the gateway runs; and the names of that."""
    kept: list[str] = []

    def merged(old: msgspec.Struct, new: msgspec.Struct, prefix: str) -> msgspec.Struct:
        stay: dict[str, object] = {}
        for name in file_fields(type(new)):
            path, was, would = f"{prefix}{name}", getattr(old, name), getattr(new, name)
            if path in RELOADED or was == would:
                continue
            if isinstance(would, msgspec.Struct) and type(was) is type(would):
                stay[name] = merged(was, would, f"{path}.")
            else:
                kept.append(path)
                stay[name] = was
        return msgspec.structs.replace(new, **stay)

    config = merged(before, after, "")
    assert isinstance(config, Config)
    return config, tuple(kept)


def _slots(config: Config, upstream: Upstream) -> int:
    """Of one upstream: all of them, or three quarters where there are several."""
    slots = config.limits.in_flight
    if upstream.in_flight is not None:
        return upstream.in_flight
    return max(1, slots * 3 // 4) if len(config.upstreams) > 1 else slots


def _reached_otherwise(before: Upstream, after: Upstream) -> bool:
    """Whether anything but the keys is other."""
    same = {"keys": (), "key_entries": ()}
    return msgspec.structs.replace(before, **same) != msgspec.structs.replace(after, **same)
