"""The simulator's HTTP surface: who may ask, what was asked, who answers."""

import asyncio
import math
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Final, TypeVar

from aiohttp import web

from tokenwire_service.simulator.answer import Answer
from tokenwire_service.simulator.delivery import Delivery, Sleep
from tokenwire_service.simulator.faults import (
    FAULTS,
    Canned,
    Directives,
    Fault,
    Slip,
    canned_answer,
    encode,
    error_body,
    mask,
)
from tokenwire_service.simulator.request import Call, RefusedError, read_request

_Value = TypeVar("_Value")

_JSON: Final = "application/json"
_MODELS: Final = ("simulated-small", "simulated-large", "simulated-thinker")
_MODELS_CREATED: Final = 1767225600  # 2026-01-01, Unix seconds
_MAX_BODY_BYTES: Final = 64 * 1024 * 1024
_REQUEST_LIMIT: Final = 10_000
_TOKEN_LIMIT: Final = 2_000_000
# Ids and key suffixes remembered: callers choose them, so there must be an end.
_MOST_REMEMBERED: Final = 1024
_SHUTDOWN_S: Final = 1.0


@dataclass(slots=True)
class Stats:
    """What the simulator has seen since it started, or since the last reset.

    Requests are chat requests, whether they were answered or refused. Aborted ones are those
    whose client left first. by_key goes by the last four characters of the API key, by_id by
    `simulate.id`; both keep the latest 1024.
    """

    requests: int = 0
    open_requests: int = 0
    open_streams: int = 0
    max_concurrent: int = 0
    aborted_requests: int = 0
    aborted_streams: int = 0
    redirects_followed: int = 0
    by_fault: dict[str, int] = field(default_factory=dict)
    by_key: OrderedDict[str, int] = field(default_factory=OrderedDict)
    by_id: OrderedDict[str, dict[str, int]] = field(default_factory=OrderedDict)

    def reset(self) -> None:
        """Forgets everything but what is open right now."""
        fresh = Stats(
            open_requests=self.open_requests,
            open_streams=self.open_streams,
            max_concurrent=self.open_requests,
        )
        for name in self.__slots__:
            setattr(self, name, getattr(fresh, name))


class Simulator:
    """An OpenAI-compatible upstream with made-up answers and faults on request.

    keys: the API keys it accepts; None accepts any. tokens_per_second: pace of every answer that
    does not ask for another; 0 is as fast as possible. sleep and now (Unix seconds) are for
    tests. Raises ValueError for a negative or infinite pace.
    """

    def __init__(
        self,
        *,
        keys: frozenset[str] | None = None,
        tokens_per_second: float = 60,
        sleep: Sleep = asyncio.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        if not 0 <= tokens_per_second < math.inf:
            raise ValueError(f"tokens_per_second: got {tokens_per_second}, expected [0, )")
        self.stats = Stats()
        self._keys = keys
        self._tokens_per_second = tokens_per_second
        self._sleep = sleep
        self._now = now
        self._served = 0
        self._open: set[asyncio.Task[Any]] = set()

    def app(self) -> web.Application:
        """The simulator as an aiohttp application.

        Run it with `handler_cancellation=True`, as `serving` does: otherwise a client that leaves
        is noticed at the next write only. Applications of one simulator share their state.
        """
        app = web.Application(middlewares=[self._speak_openai], client_max_size=_MAX_BODY_BYTES)
        chat = "/chat/completions"
        app.add_routes(
            [
                web.post("/v1" + chat, self._chat),
                web.post(chat, self._chat),
                web.post("/openai/deployments/{deployment}" + chat, self._chat),
                web.post("/openai/v1" + chat, self._chat),
                web.post("/v1/moved" + chat, self._moved),
                web.get("/v1/models", self._list_models),
                web.get("/models", self._list_models),
                web.get("/v1/models/{id:.+}", self._get_model),
                web.get("/models/{id:.+}", self._get_model),
                web.get("/healthz", self._health),
                web.get("/_simulator/stats", self._show_stats),
                web.post("/_simulator/reset", self._reset),
            ]
        )
        app.on_shutdown.append(self._dismiss)
        return app

    @asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
        """Serves inside the running event loop; yields the base URL, `http://HOST:PORT/v1`.

        port 0 takes a free one. Leaving ends every open answer at once. Raises OSError when the
        address cannot be bound.
        """
        runner = web.AppRunner(
            self.app(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_S,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            bound = runner.addresses[0]
            shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound[0], bound[0])  # noqa: S104
            yield f"http://{f'[{shown}]' if ':' in shown else shown}:{bound[1]}/v1"
        finally:
            await runner.cleanup()

    async def _dismiss(self, _app: web.Application) -> None:
        # Emptied first: a task that is no longer in the set did not lose its client.
        tasks, self._open = self._open, set()
        for task in tasks:
            task.cancel()

    @web.middleware
    async def _speak_openai(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except RefusedError as error:
            response = _json(error.body, error.status)
            response.headers["x-request-id"] = f"req_{self._new_id()}"
            return response
        except web.HTTPRequestEntityTooLarge:
            return _json(error_body("Request too large.", code="request_too_large"), 413)
        except web.HTTPMethodNotAllowed:
            message = f"Not allowed to {request.method} on {request.path}."
            return _json(error_body(message, code="method_not_supported"), 405)
        except web.HTTPNotFound:
            return _json(error_body(f"Invalid URL ({request.method} {request.path})"), 404)

    async def _health(self, _request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _show_stats(self, _request: web.Request) -> web.Response:
        return _json(asdict(self.stats))

    async def _reset(self, _request: web.Request) -> web.Response:
        self.stats.reset()
        return _json(asdict(self.stats))

    async def _moved(self, request: web.Request) -> web.Response:
        self.stats.redirects_followed += 1
        raise web.HTTPNotFound

    async def _list_models(self, request: web.Request) -> web.Response:
        self._admit(_key_of(request))
        return _json({"object": "list", "data": [_model(name) for name in _MODELS]})

    async def _get_model(self, request: web.Request) -> web.Response:
        self._admit(_key_of(request))
        name = request.match_info["id"]
        if name not in _MODELS:
            message = f"The model '{name}' does not exist"
            body = error_body(message, param="model", code="model_not_found")
            raise RefusedError(404, body)
        return _json(_model(name))

    def _admit(self, key: str) -> None:
        if not key:
            message = (
                "You didn't provide an API key. You need to provide your API key in an "
                "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise RefusedError(401, error_body(message))
        if self._keys is not None and key not in self._keys:
            message = f"Incorrect API key provided: {mask(key)}."
            raise RefusedError(401, error_body(message, code="invalid_api_key"))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        """Counts one chat request from its arrival to its end, however it ends."""
        task = asyncio.current_task()
        assert task is not None
        stats = self.stats
        stats.requests += 1
        stats.open_requests += 1
        stats.max_concurrent = max(stats.max_concurrent, stats.open_requests)
        self._open.add(task)
        stream = False
        try:
            azure = "deployment" in request.match_info
            if azure and "api-version" not in request.query:
                raise RefusedError(404, {"error": {"code": "404", "message": "Resource not found"}})
            key = _key_of(request)
            _touch(stats.by_key, key[-4:], 0)
            stats.by_key[key[-4:]] += 1
            self._admit(key)
            deployment = request.match_info.get("deployment")
            call = read_request(await request.read(), deployment)
            stream = call.stream
            stats.open_streams += stream
            return await self._converse(request, call, key, azure=azure)
        except (asyncio.CancelledError, ConnectionError) as error:
            if task in self._open:
                stats.aborted_requests += 1
                stats.aborted_streams += stream
            if isinstance(error, asyncio.CancelledError):
                raise
            return web.Response()  # nobody is there to read it
        finally:
            self._open.discard(task)
            stats.open_requests -= 1
            stats.open_streams -= stream

    async def _converse(
        self, request: web.Request, call: Call, key: str, *, azure: bool
    ) -> web.StreamResponse:
        ident = self._new_id()
        answer = Answer(call, ident=f"chatcmpl-{ident}", created=int(self._now()), azure=azure)
        headers = {
            "content-type": "text/event-stream; charset=utf-8" if call.stream else _JSON,
            "x-request-id": f"req_{ident}",
            "openai-version": "2020-10-01",
            "x-ratelimit-limit-requests": str(_REQUEST_LIMIT),
            "x-ratelimit-remaining-requests": str(_REQUEST_LIMIT - 1),
            "x-ratelimit-reset-requests": "6ms",
            "x-ratelimit-limit-tokens": str(_TOKEN_LIMIT),
            "x-ratelimit-remaining-tokens": str(max(0, _TOKEN_LIMIT - answer.prompt_tokens)),
            "x-ratelimit-reset-tokens": "0s",
        }
        fault = self._fault_for(call.directives, key)
        behaviour = None if fault is None else FAULTS[fault]
        if isinstance(behaviour, Canned):
            delay = call.directives.retry_after_s
            status, changed, body = canned_answer(behaviour, call.model, key, delay)
            return web.Response(status=status, headers=headers | changed, body=body)
        if isinstance(behaviour, Slip):
            answer.with_piece(behaviour.piece, call.directives.at)
            behaviour = None
        delivery = Delivery(
            request,
            headers,
            call.directives,
            tokens_per_second=self._tokens_per_second,
            sleep=self._sleep,
        )
        return await delivery.send(answer, stream=call.stream, fault=behaviour)

    def _new_id(self) -> str:
        self._served += 1
        # Unique among simulators too: two of them may stand behind one gateway.
        return blake2b(
            f"{id(self)}/{self._now()}/{self._served}".encode(), digest_size=14
        ).hexdigest()

    def _fault_for(self, directives: Directives, key: str) -> Fault | None:
        """Decides whether the fault strikes this request, and counts it if it does."""
        seen = {"requests": 0, "faults": 0}
        if directives.id is not None:
            seen = _touch(self.stats.by_id, directives.id, seen)
            seen["requests"] += 1
        if directives.fault is None:
            return None
        if directives.keys is not None and key[-4:] not in directives.keys:
            return None
        if directives.times is not None and seen["faults"] >= directives.times:
            return None
        seen["faults"] += 1
        name = directives.fault.value
        self.stats.by_fault[name] = self.stats.by_fault.get(name, 0) + 1
        return directives.fault


def _model(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _MODELS_CREATED,
        "owned_by": "tokenwire-simulator",
    }


def _json(value: Mapping[str, Any], status: int = 200) -> web.Response:
    return web.Response(status=status, body=encode(value), content_type=_JSON)


def _key_of(request: web.Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else ""
    return key or request.headers.get("api-key", "").strip()


def _touch(memory: OrderedDict[str, _Value], name: str, fresh: _Value) -> _Value:
    """What is known under a name; the name not heard of for longest is forgotten."""
    value = memory.setdefault(name, fresh)
    memory.move_to_end(name)
    if len(memory) > _MOST_REMEMBERED:
        memory.popitem(last=False)
    return value


async def run(
    host: str = "127.0.0.1",
    port: int = 8081,
    *,
    keys: frozenset[str] | None = None,
    tokens_per_second: float = 60,
) -> None:
    """Serves until SIGINT or SIGTERM, after one line on stdout that says where and how to try it.

    Raises OSError when the address cannot be bound.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    stopping = (signal.SIGINT, signal.SIGTERM)
    simulator = Simulator(keys=keys, tokens_per_second=tokens_per_second)
    async with simulator.serving(host, port) as url:
        for number in stopping:
            loop.add_signal_handler(number, stop.set)
        try:
            sys.stdout.write(
                f"Simulated upstream on {url} - try: curl -N {url}/chat/completions"
                " -H 'Authorization: Bearer demo' -H 'Content-Type: application/json'"
                ' -d \'{"model":"simulated-small","stream":true,'
                '"messages":[{"role":"user","content":"Why is the sky blue?"}]}\'\n'
            )
            sys.stdout.flush()
            await stop.wait()
        finally:
            for number in stopping:
                loop.remove_signal_handler(number)
