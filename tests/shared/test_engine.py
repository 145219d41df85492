"""The Redis of the simulated worlds answers as a real one does, whatever the scripts are asked."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from redis.asyncio import Redis as Client
from simulation.engine import EPOCH, Engine

from redis_server import RedisServer, both
from tokenwire_service import quotas, sharedkeys
from tokenwire_service.quotas import _FINISH, _RENEW, _RESERVE, _RESTORE
from tokenwire_service.sharedkeys import _NEWS, _TELL
from tokenwire_service.store import _MARK, Script

CLOCK = "clock"  # where both look for the time, which a real one would not let us set
TIME = "redis.call('TIME')"
CLOCK_READ = f"{{redis.call('HGET', '{CLOCK}', 's'), redis.call('HGET', '{CLOCK}', 'us')}}"
SUBJECTS = ("a", "b")


def timed(script: Script) -> Script:
    """With the clock of a test; and nothing goes before a script looks at it."""
    text = script.text.replace(TIME, CLOCK_READ)
    return Script(
        re.sub(r"redis\.call\('P?EXPIRE', ([^,()]+), [^()]+\)", r"redis.call('EXISTS', \1)", text)
    )


def call(chance: random.Random) -> tuple[Script, list[str], list[Any]]:
    """One call of a script, as a replica makes them."""
    name = chance.choice(SUBJECTS)
    keys = [f"{name}:{suffix}" for suffix in quotas._SUFFIXES]
    closures = list(sharedkeys._SUFFIXES)
    replica = chance.choice("pqr")
    lease = f"{replica}:{chance.randint(1, 8)}"
    bucket = int((EPOCH + chance.uniform(0, 2)) / quotas.BUCKET)
    day = int(EPOCH // 86_400)
    match chance.randrange(9):
        case 0 | 1 | 2:
            limits = [chance.choice([0, 3, 20]) for _ in range(4)]
            limits[3] *= 100
            return _RESERVE, keys, [lease, 500, 1000, chance.choice([1, 5, 50]), *limits]
        case 3 | 4:
            at = chance.choice([0, bucket])
            return _FINISH, keys, [lease, at, chance.randint(0, 900), day, chance.randint(-5, 5)]
        case 5:
            return _RENEW, keys, [500, lease]
        case 6:
            buckets = [
                number
                for i in range(chance.randint(0, 4))
                for number in (i, chance.randint(0, 900), chance.randint(-2, 3), i)
            ]
            told = [f"{name}:told:{replica}"]
            spent, turn = chance.randint(-3, 9), chance.randint(1, 9)
            return (
                _RESTORE,
                keys + told,
                [f"{replica}:", 500, 1000, day, spent, 1, lease, turn, *buckets],
            )
        case 7:
            closed = [f"k{chance.randint(1, 4)} key ", chance.choice([100, 300, 2000])]
            return _TELL, closures, [*closed, "rate_limited", chance.randint(1, 3)]
        case _:
            return _NEWS, closures, [chance.randint(0, 6)]


async def contents(client: Client) -> dict[str, Any]:
    held: dict[str, Any] = {}
    async for key in client.scan_iter():
        if key == CLOCK:
            continue
        match await client.type(key):
            case "hash":
                held[key] = await client.hgetall(key)
            case "zset":
                held[key] = dict(await client.zrange(key, 0, -1, withscores=True))
            case _:
                held[key] = await client.get(key)
    return held


@both
@pytest.mark.parametrize("seed", range(3))
async def test_it_answers_as_a_real_one(redis: RedisServer, seed: int) -> None:
    chance = random.Random(seed)
    at = 0.0
    engine = Engine(lambda: at, chance)
    asked = [timed(each) for each in (_MARK, *quotas.SCRIPTS, *sharedkeys.SCRIPTS)]
    known = dict(zip((_MARK, *quotas.SCRIPTS, *sharedkeys.SCRIPTS), asked, strict=True))
    answers = 0

    async def ask(script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> None:
        nonlocal answers
        words = [str(each) for each in arguments]
        here = engine.run(engine.load(script.text), keys, words)
        assert here == await client.eval(script.text, len(keys), *keys, *words)
        answers += here not in (None, 1)

    async with Client(port=redis.port, decode_responses=True, protocol=2) as client:
        set_clock = Script(f"redis.call('HSET', '{CLOCK}', 's', ARGV[1], 'us', ARGV[2])")
        for _ in range(400):
            at += chance.choice([0.0, 0.0, 0.01, 0.3])
            seconds, micros = engine._time()
            await ask(set_clock, [], [seconds, micros])
            script, keys, arguments = call(chance)
            await ask(known[script], keys, arguments)
            await ask(known[_MARK], ["mark"], [str(chance.random())])
        held = {key: value for key, value in engine._data.items() if key != CLOCK}
        assert held == await contents(client)
    assert answers > 100
