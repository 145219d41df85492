"""Keys from files change while calls run: nothing fails, nothing leaks, the log says it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web

from harness import (
    Provider,
    Start,
    Stubs,
    chunk,
    completion,
    event_stream,
    failing,
    provider,
    receive,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.admin.v1 import admin_service_pb2, admin_service_pb2_grpc
from tokenwire_service.config import Config, Key, load
from tokenwire_service.secret import Secret
from tokenwire_service.snapshot import State
from tokenwire_service.telemetry import LineFormatter, log_scrubber

A, B, C, D = (f"sk-live-Planted-{name}-0123456789" for name in "ABCD")
SHORT = "10ms"  # between two looks


@pytest.fixture
def log() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """The lines of the log with one event."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(as_json=True, scrub=log_scrubber()))
    logger = logging.getLogger("tokenwire.test")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)

    def lines(event: str) -> list[dict[str, Any]]:
        assert "Planted" not in stream.getvalue()
        found = [json.loads(line) for line in stream.getvalue().splitlines()]
        return [line for line in found if line["event"] == event]

    yield lines
    lines("")
    logger.removeHandler(handler)
    logger.setLevel(level)


def configured(folder: Path, base_url: str, *keys: dict[str, Any], **top: Any) -> Config:
    """A configuration, from a file, of one upstream with these entries of keys."""
    path = folder / "tokenwire.yaml"
    one = {"base_url": base_url, "keys": keys, "passthrough": True}
    settings = {
        "listen": "127.0.0.1:0",
        "admin": {"listen": "127.0.0.1:0"},
        "key_file_interval": SHORT,
        "upstreams": {"test": one},
    }
    path.write_text(json.dumps(settings | top))  # JSON is YAML
    return load(path, {})


def swap(path: Path, *texts: str) -> None:
    """Another file is renamed over it."""
    other = path.with_name(f"{path.name}.new")
    other.write_text("\n".join(texts))
    other.replace(path)


class Mount:
    """A Secret as kubelet mounts it: `keys` leads through `..data` to a folder of its own for each
    version, and an update is a rename over `..data`."""

    def __init__(self, folder: Path, *texts: str) -> None:
        self.folder = folder
        self.file = folder / "keys"
        self._version = 0
        folder.mkdir()
        self.update(*texts)
        self.file.symlink_to(Path("..data") / "keys")

    def update(self, *texts: str) -> None:
        before = self.folder / "..data"
        old = before.resolve() if before.is_symlink() else None
        self._version += 1
        new = self.folder / f"..2026_11_25_{self._version:06}"
        new.mkdir()
        (new / "keys").write_text("\n".join(texts))
        tmp = self.folder / "..data_tmp"
        tmp.symlink_to(new.name)
        tmp.rename(self.folder / "..data")
        if old is not None:
            shutil.rmtree(old)


def bearer(asked: web.Request) -> str:
    return asked.headers["authorization"].removeprefix("Bearer ")


def used(served: Provider) -> list[str]:
    """The keys of the requests so far, in order."""
    return [asked.headers["authorization"].removeprefix("Bearer ") for asked in served.asked]


async def reloaded(gateway: Stubs, *texts: str) -> None:
    """Waits until these are the keys."""
    ring = gateway.running.pools["test"].ring
    await until(lambda: sorted(key.secret.reveal() for key in ring.keys) == sorted(texts))


async def listing(gateway: Stubs) -> admin_service_pb2.ListKeysResponse:
    """What the admin RPC tells."""
    async with grpc.aio.insecure_channel(gateway.running.admin) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        answer: admin_service_pb2.ListKeysResponse = await stub.ListKeys(
            admin_service_pb2.ListKeysRequest(), timeout=10
        )
    assert b"Planted" not in answer.SerializeToString()
    return answer


class Held:
    """An upstream whose streams wait, after their first text, until the test lets them go on."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def answer(self, asked: web.Request) -> web.StreamResponse:
        if not (await asked.json()).get("stream"):
            return completion(bearer(asked)[-12])
        response = await event_stream(asked)
        await response.write(chunk("a"))
        await self.go_on.wait()
        await response.write(chunk("b", finish_reason="stop") + b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def held() -> AsyncIterator[tuple[Held, Provider]]:
    behaviour = Held()
    async with provider(behaviour.answer) as served:
        try:
            yield behaviour, served
        finally:
            behaviour.go_on.set()


async def begin(gateway: Stubs) -> Any:
    """A stream whose first text is there, and the task that reads it to its end."""
    call = gateway.chat.StreamChat(stream_request(request()), timeout=60)
    events = aiter(call)
    assert (await anext(events)).WhichOneof("event") == "header"
    assert (await anext(events)).delta.content == "a"
    return asyncio.ensure_future(receive(call))


# --- a key leaves, a key comes ----------------------------------------------------------

WAYS = ["kubernetes", "renamed", "rewritten"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_stream_of_a_key_that_left_goes_on_while_new_calls_use_the_new_one(
    start: Start, tmp_path: Path, log: Callable[[str], list[dict[str, Any]]], way: str
) -> None:
    if way == "kubernetes":
        mount = Mount(tmp_path / "mount", A)
        file, change = mount.file, mount.update
    else:
        file = tmp_path / "keys"
        file.write_text(A)

        def change(*texts: str) -> None:
            if way == "renamed":
                swap(file, *texts)
            else:
                file.write_text("\n".join(texts))

    async with held() as (behaviour, served):
        gateway = await start(config=configured(tmp_path, served.base_url, {"file": str(file)}))
        (old,) = gateway.running.pools["test"].ring.keys
        stream = await begin(gateway)
        change(B)
        await reloaded(gateway, B)
        (new,) = gateway.running.pools["test"].ring.keys
        for _ in range(3):
            answer = await gateway.chat.Chat(request())
            assert answer.choices[0].message.content == "B"
            assert answer.header.attempts[0].key_id == new.id
        states = {key.id: key.state for key in (await listing(gateway)).upstreams[0].keys}
        assert states == {
            new.id: admin_service_pb2.KEY_STATE_READY,
            old.id: admin_service_pb2.KEY_STATE_LEAVING,
        }
        behaviour.go_on.set()
        received = await stream
        assert received.failure is None
        assert received.events[-1].WhichOneof("event") == "trailer"
        await until(lambda: gateway.running.leases == 0)
        keys = (await listing(gateway)).upstreams[0].keys
        assert [key.id for key in keys] == [new.id]
        # And once more, so that it is no accident of the first time.
        change(B, C)
        await reloaded(gateway, B, C)
        change(C)
        await reloaded(gateway, C)
    assert used(served) == [A, B, B, B]
    told = [(line["added"], line["removed"], line["changed"]) for line in log("keys changed")]
    third = next(added for added, removed, _ in told[1:] if added)
    assert told == [(new.id, old.id, ""), (third, "", ""), ("", new.id, "")]
    assert log("key file unusable") == []


async def test_who_waits_is_served_by_a_key_that_comes(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(A)
    async with held() as (behaviour, served):
        config = configured(tmp_path, served.base_url, {"file": "keys", "in_flight": 1})
        gateway = await start(config=config)
        stream = await begin(gateway)
        waiting = asyncio.ensure_future(gateway.chat.Chat(request(), timeout=60))
        await until(lambda: gateway.running.pools["test"].waiting == 1)
        assert (await listing(gateway)).upstreams[0].waiting == 1
        swap(file, A, B)
        answer = await waiting
        assert answer.choices[0].message.content == "B"
        assert not stream.done()
        behaviour.go_on.set()
        assert (await stream).failure is None


async def test_who_waits_for_a_key_that_cools_is_served_by_the_one_that_replaces_it(
    start: Start, tmp_path: Path
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if bearer(asked) == A:
            return web.json_response({"error": {}}, status=429, headers={"retry-after": "300"})
        return completion()

    file = tmp_path / "keys"
    file.write_text(A)
    async with provider(answer) as served:
        gateway = await start(config=configured(tmp_path, served.base_url, {"file": "keys"}))
        waiting = asyncio.ensure_future(gateway.chat.Chat(request(), timeout=590))
        await until(lambda: gateway.running.pools["test"].waiting == 1)
        swap(file, B)
        await waiting
    assert used(served) == [A, B]


async def test_a_rejected_key_serves_again_as_soon_as_its_secret_changes(
    start: Start, tmp_path: Path, log: Callable[[str], list[dict[str, Any]]]
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if bearer(asked) != B:
            return web.json_response({"error": {"message": "Incorrect API key"}}, status=401)
        return completion()

    file = tmp_path / "keys"
    file.write_text(A)
    async with provider(answer) as served:
        config = configured(tmp_path, served.base_url, {"file": "keys", "id": "team"})
        gateway = await start(config=config)
        for _ in range(2):  # the second is not even sent
            failure = await failing(gateway.chat.Chat(request()))
            assert failure.reason == "UPSTREAM_CREDENTIALS_REJECTED"
        (key,) = (await listing(gateway)).upstreams[0].keys
        assert key.state == admin_service_pb2.KEY_STATE_RETIRED
        (closure,) = key.closures
        assert closure.fault == "key_rejected"
        assert not closure.HasField("opens_in")
        swap(file, B)
        await reloaded(gateway, B)
        assert (await gateway.chat.Chat(request())).header.attempts[0].key_id == "team"
        (key,) = (await listing(gateway)).upstreams[0].keys
        assert key.state == admin_service_pb2.KEY_STATE_READY
        assert (key.id, key.counters.attempts, key.counters.successes) == ("team", 2, 1)
        # Who leaves takes its counts along: its id may come back with another key.
        swap(file, B, C)
        await reloaded(gateway, B, C)
        swap(file, C)
        await reloaded(gateway, C)
        swap(file, B)
        await reloaded(gateway, B)
        (key,) = (await listing(gateway)).upstreams[0].keys
        assert (key.id, key.counters.attempts) == ("team", 0)
        swap(file, A)  # the old one is as bad as it was
        await reloaded(gateway, A)
        await failing(gateway.chat.Chat(request()))
    assert used(served) == [A, B]
    changed = [line["changed"] for line in log("keys changed")]
    assert (changed[0], changed[-1]) == ("team", "team")


async def test_two_upstreams_share_a_file_beside_keys_of_their_own(
    start: Start, tmp_path: Path
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    file = tmp_path / "keys"
    file.write_text(A)
    (tmp_path / "own").write_text(D)
    async with provider(answer) as served:
        upstreams = {
            "test": {"base_url": served.base_url, "keys": [{"file": "keys"}], "passthrough": True},
            "other": {
                "base_url": served.base_url,
                "keys": [{"file": "own"}, {"file": "keys", "id": "shared"}, {"file": "keys"}],
            },
        }
        models = {"m2": {"upstream": "other"}}
        config = configured(tmp_path, served.base_url, upstreams=upstreams, models=models)
        gateway = await start(config=config)
        swap(file, B, C)
        await reloaded(gateway, B, C)
        other = gateway.running.pools["other"].ring
        await until(lambda: len(other.keys) == 3)
        assert [key.secret.reveal() for key in other.keys] == [D, B, C]
        assert [key.id for key in other.keys][1:] == ["shared-1", "shared-2"]
        for _ in range(6):
            await gateway.chat.Chat(request(model="m2"))
        found = await listing(gateway)
    assert Counter(used(served)) == {B: 2, C: 2, D: 2}
    assert [(Path(file.path).name, list(file.upstreams)) for file in found.key_files] == [
        ("keys", ["test", "other"]),
        ("own", ["other"]),
    ]


# --- a broken file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (None, "unreadable (No such file or directory)"),
        ("", "empty"),
        (f"{A}\n{B[:20]}", "it ends within a key that it held before, so it may be half written"),
        (f"{A} {B}", "a key that is too long or has a space or an unprintable character (not"),
    ],
    ids=["missing", "empty", "truncated", "no key"],
)
async def test_a_broken_file_keeps_the_last_good_keys_and_says_so_once(
    start: Start,
    tmp_path: Path,
    log: Callable[[str], list[dict[str, Any]]],
    broken: str | None,
    problem: str,
) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return completion()

    file = tmp_path / "keys"
    file.write_text(f"{A}\n{B}\n")
    async with provider(answer) as served:
        gateway = await start(config=configured(tmp_path, served.base_url, {"file": "keys"}))
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
        await until(lambda: log("key file unusable") != [])
        for _ in range(4):
            await gateway.chat.Chat(request())
        await asyncio.sleep(0.2)  # many looks
        (told,) = log("key file unusable")
        assert told["level"] == "warning"
        assert told["problem"].startswith(problem)
        (shown,) = (await listing(gateway)).key_files
        assert shown.problem == told["problem"]
        file.write_text(f"{B}\n{C}\n")
        await reloaded(gateway, B, C)
        assert [line["level"] for line in log("key file usable again")] == ["info"]
        (changed,) = log("keys changed")
        assert (changed["added"].count("key-"), changed["removed"].count("key-")) == (1, 1)
        assert (await listing(gateway)).key_files[0].problem == ""
    assert Counter(used(served)) == {A: 2, B: 2}
    assert len(log("key file unusable")) == 1


# --- many reloads -----------------------------------------------------------------------


async def traffic(gateway: Stubs, over: asyncio.Event) -> int:
    """Calls and streams, one after the other, until it is over; how many. None may fail."""
    done = 0
    while not over.is_set():
        whole = await gateway.chat.Chat(request(), timeout=60)
        assert whole.choices[0].message.content == "ok"
        received = await receive(gateway.chat.StreamChat(stream_request(request()), timeout=60))
        assert received.failure is None
        assert received.text == "ok"
        done += 2
    return done


async def strict(asked: web.Request) -> web.StreamResponse:
    """Knows four keys, and rejects whatever else it is sent."""
    if bearer(asked) not in (A, B, C, D):
        return web.json_response({"error": {"message": "Incorrect API key"}}, status=401)
    if not (await asked.json()).get("stream"):
        return completion("ok")
    response = await event_stream(asked)
    await response.write(chunk("o"))
    await asyncio.sleep(0.005)
    await response.write(chunk("k", finish_reason="stop") + b"data: [DONE]\n\n")
    return response


SETS = [(A,), (A, B), (B, C, D), (D, D, A), (C,), (D, C, B, A)]


async def test_a_hundred_reloads_a_second_fail_no_call(start: Start) -> None:
    """The ring itself, as often as no file could change it."""
    async with provider(strict) as served:
        gateway = await start(upstream(served.base_url, keys=1))
        pool = gateway.running.pools["test"]

        def keys(*texts: str) -> list[Key]:
            return [Key(id=f"k-{text}", secret=Secret(text)) for text in dict.fromkeys(texts)]

        pool.replace(keys(*SETS[0]))
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            callers = [group.create_task(traffic(gateway, over)) for _ in range(10)]
            for number in range(150):
                pool.replace(keys(*SETS[number % len(SETS)]))
                await asyncio.sleep(0.01)
            over.set()
        assert sum(task.result() for task in callers) > 50
    assert set(used(served)) == {A, B, C, D}
    assert {event.fault for event in gateway.events.attempts} == {""}
    assert pool.ring.known_keys == pool.ring.keys


async def test_a_file_that_changes_a_hundred_times_a_second_fails_no_call(
    start: Start, tmp_path: Path, log: Callable[[str], list[dict[str, Any]]]
) -> None:
    """By every way of writing, half files among them. Now and then it rests until it is taken."""
    mount = Mount(tmp_path / "mount", A)
    file = tmp_path / "keys"
    file.write_text(A)

    def write(number: int) -> None:
        texts = SETS[number % len(SETS)]
        spoilt = "\r\n".join((f"# {number}", "", *(f"  {text} " for text in texts), ""))
        with file.open("w") as stream:  # empty, then half, then whole
            stream.write(spoilt[: len(spoilt) // 2])
            stream.flush()
            stream.write(spoilt[len(spoilt) // 2 :])
        if number % 3 == 0:
            swap(file, f"# {number}", *texts)
        mount.update(f"# {number}", *texts)

    async with provider(strict) as served:
        entries = ({"file": "keys", "id": "f"}, {"file": str(mount.file), "id": "m"})
        gateway = await start(config=configured(tmp_path, served.base_url, *entries))
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            callers = [group.create_task(traffic(gateway, over)) for _ in range(5)]
            for number in range(150):
                write(number)
                await asyncio.sleep(0.01)
                if number % 25 == 24:  # each time with another set
                    await reloaded(gateway, *set(SETS[number % len(SETS)]))
            over.set()
        assert sum(task.result() for task in callers) > 20
        ring = gateway.running.pools["test"].ring
        assert ring.generation >= len(SETS)
    assert set(used(served)) <= {A, B, C, D}
    assert {event.fault for event in gateway.events.attempts} == {""}
    assert log("keys changed") != []
    assert log("defect") == []


# --- looking in -------------------------------------------------------------------------


async def test_what_was_done_with_each_key_is_counted(start: Start, tmp_path: Path) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if bearer(asked) == A:
            error = {"error": {"message": f"slow down, {A}", "code": f"limit {A}"}}
            return web.json_response(error, status=429, headers={"retry-after": "30"})
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        return completion(usage=usage)

    (tmp_path / "a").write_text(A)
    (tmp_path / "b").write_text(B)
    async with provider(answer) as served:
        entries = ({"file": "a", "id": "a"}, {"file": "b", "id": "b", "weight": 2})
        gateway = await start(config=configured(tmp_path, served.base_url, *entries))
        for _ in range(3):
            await gateway.chat.Chat(request(model=f"m of {A}"))
        found = await listing(gateway)
    limited, served_key = found.upstreams[0].keys
    assert limited.state == admin_service_pb2.KEY_STATE_PARTLY
    (closure,) = limited.closures
    assert closure.scope == admin_service_pb2.CLOSURE_SCOPE_GROUP_MODEL
    assert (closure.model, closure.fault) == ("m of ***", "rate_limited")
    assert 20 < closure.opens_in.ToNanoseconds() / 1e9 <= 33
    counts = limited.counters
    assert (counts.attempts, counts.successes) == (1, 0)
    assert [(each.fault, each.count) for each in counts.faults] == [("rate_limited", 1)]
    assert (counts.last_fault.http_status, counts.last_fault.upstream_code) == (429, "limit ***")
    assert (served_key.id, served_key.weight) == ("b", 2.0)
    counts = served_key.counters
    assert (counts.attempts, counts.successes, counts.prompt_tokens) == (3, 3, 21)
    assert counts.completion_tokens == 15
    assert counts.HasField("last_used_ago")
    assert not counts.HasField("last_fault")
    assert [(c.method, c.code, c.count) for c in found.gateway.calls] == [
        ("tokenwire.v1.ChatService/Chat", "OK", 3)
    ]
    assert (found.gateway.slots, found.gateway.in_flight) == (1000, 0)
    assert found.gateway.retry_budget > 9
    assert found.upstreams[0].keys_generation == 1
    groups = {g.quota_group: g for g in found.upstreams[0].quota_groups}
    assert groups["a"].concurrency_limit >= 1
    assert "b" not in groups or not groups["b"].HasField("concurrency_limit")


async def test_an_upstream_that_repeats_a_key_that_came_later_gives_it_to_nobody(
    start: Start, tmp_path: Path
) -> None:
    """Also one that has left while the call that it serves runs on."""
    wait = asyncio.Event()

    async def answer(asked: web.Request) -> web.StreamResponse:
        if bearer(asked) == B and "old" in (await asked.json())["model"]:
            await wait.wait()
        error = {"message": f"no: {A} {B} {C}", "code": bearer(asked), "param": B}
        return web.json_response({"error": error}, status=400)

    file = tmp_path / "keys"
    file.write_text(A)
    async with provider(answer) as served:
        gateway = await start(config=configured(tmp_path, served.base_url, {"file": "keys"}))
        swap(file, B)
        await reloaded(gateway, B)
        old = asyncio.ensure_future(failing(gateway.chat.Chat(request(model="old"))))
        await until(lambda: len(served.asked) == 1)
        swap(file, C)
        await reloaded(gateway, C)
        new = await failing(gateway.chat.Chat(request()))
        assert B not in new.everything + str(new.details)
        assert C not in new.everything + str(new.details)
        wait.set()
        late = await old
        assert B not in late.everything + str(late.details)
        assert C not in late.everything + str(late.details)
    shown = repr(gateway.events.attempts) + repr(gateway.events.calls)
    assert B not in shown
    assert C not in shown


async def test_a_key_that_is_used_up_to_its_limit_is_shown_as_such(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(A)
    async with held() as (behaviour, served):
        config = configured(tmp_path, served.base_url, {"file": "keys", "in_flight": 1})
        gateway = await start(config=config)
        stream = await begin(gateway)
        found = await listing(gateway)
        (key,) = found.upstreams[0].keys
        assert (key.state, key.in_flight) == (admin_service_pb2.KEY_STATE_LIMITED, 1)
        assert (found.gateway.in_flight, found.upstreams[0].in_flight) == (1, 1)
        assert gateway.running.pools["test"].ring.snapshot(0.0).keys[0].state is State.LIMITED
        behaviour.go_on.set()
        assert (await stream).failure is None


async def test_a_defect_does_not_end_the_watch(
    start: Start,
    tmp_path: Path,
    log: Callable[[str], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "keys"
    file.write_text(A)
    gateway = await start(config=configured(tmp_path, "http://127.0.0.1:1", {"file": "keys"}))
    pool = gateway.running.pools["test"]
    replace_keys = pool.replace

    def broken(_keys: object) -> None:
        monkeypatch.setattr(pool, "replace", replace_keys)
        raise ValueError("something internal")

    monkeypatch.setattr(pool, "replace", broken)
    swap(file, B)
    await until(lambda: log("defect") != [])
    swap(file, C)
    await reloaded(gateway, C)
    (line,) = log("defect")
    assert "something internal" in line["trace"]


async def test_a_defect_of_the_admin_rpc_tells_nothing_but_where_to_look(
    start: Start,
    tmp_path: Path,
    log: Callable[[str], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "keys").write_text(A)
    config = configured(tmp_path, "http://127.0.0.1:1", {"file": "keys"})
    gateway = await start(config=config)

    def broken(_now: float) -> None:
        raise ValueError("something internal")

    monkeypatch.setattr(gateway.running.pools["test"].ring, "snapshot", broken)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listing(gateway)
    assert "internal" not in str(caught.value.details())
    assert "its log tells more" in str(caught.value.details())
    (line,) = log("defect")
    assert "something internal" in line["trace"]
