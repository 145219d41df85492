"""The RPCs of tokenwire.v1: validate, call, map. It speaks gRPC and holds no policy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from tokenwire.v1 import (
    chat_service_pb2,
    error_reason_pb2,
    model_service_pb2,
    tokenizer_service_pb2,
)
from tokenwire_service.attempts import Call
from tokenwire_service.config import Config
from tokenwire_service.errors import TIMER, GatewayError, bare
from tokenwire_service.gateway import Gateway
from tokenwire_service.interceptors import (
    CallContext,
    callers_cancel,
    internal_error,
    rpc_status,
)
from tokenwire_service.quotas import Grant
from tokenwire_service.relay import refusal
from tokenwire_service.tokens import TokenCounter, tokenizer_for
from tokenwire_service.upstream.request import answer_cap, turns
from tokenwire_service.validation import check

_DEFAULT_PAGE = 100


class ChatServicer:
    """Chat, StreamChat, BatchChat. `current`: the gateway for calls that begin now; each goes on
    with the one it began with, whatever is configured meanwhile."""

    def __init__(
        self,
        current: Callable[[], Gateway],
        logger: logging.Logger,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._current = current
        self._logger = logger
        self._now = now

    async def Chat(  # noqa: N802  # the contract's name
        self, request: chat_service_pb2.ChatRequest, context: CallContext
    ) -> chat_service_pb2.ChatResponse:
        """One whole answer."""
        context.model, context.labels = request.model, dict(request.labels)
        check(request)
        gateway = self._current()
        call = begin(request, context, gateway.config, self._now)
        with admitted(call, context, await reserved(call, context, gateway)):
            return await gateway.chat(call)

    async def StreamChat(  # noqa: N802
        self, request: chat_service_pb2.StreamChatRequest, context: CallContext
    ) -> None:
        """One answer as it grows."""
        context.model, context.labels = request.chat.model, dict(request.chat.labels)
        cumulative = request.mode == chat_service_pb2.STREAM_MODE_CUMULATIVE
        try:
            check(request)
            gateway = self._current()
            call = begin(request.chat, context, gateway.config, self._now)
            has = await reserved(call, context, gateway)
        except GatewayError as error:
            if cumulative and (last := refusal(error)) is not None:
                await context.write(last)
            raise
        try:
            with admitted(call, context, has):
                await gateway.stream(
                    call,
                    context.write,
                    cumulative=cumulative,
                    max_delay=request.max_delay.ToNanoseconds() / 1e9,
                )
        except GatewayError as error:
            raise _under("chat.", error) from None

    async def BatchChat(  # noqa: N802
        self, request: chat_service_pb2.BatchChatRequest, context: CallContext
    ) -> None:
        """Every item, at most so many at once, each sent when it is ready.

        A worker takes its next item only when its last answer was written: a caller that does
        not read stops the work.
        """
        check(request)
        gateway = self._current()
        gateway.refuse_if_draining()
        gateway.refuse_if_late()  # its items are accepted with it
        limit = gateway.config.limits.batch_items_at_once
        workers = min(request.max_concurrency or limit, limit, len(request.items))
        waiting = iter(enumerate(request.items))
        writing = asyncio.Lock()  # one message at a time on one stream

        async def work() -> None:
            for index, item in waiting:
                answer = await self._item(index, item, context, gateway)
                async with writing:
                    await self._send(answer, context, gateway.config.timeouts.write)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work())
        except asyncio.CancelledError as cancelled:
            raise bare(cancelled) from None  # the group's own frame keeps it
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _send(
        self, answer: chat_service_pb2.BatchChatResponse, context: CallContext, seconds: float
    ) -> None:
        """A batch as such has no deadline: a caller that stopped reading would hold it forever."""
        timer = asyncio.timeout(seconds)
        try:
            async with timer:
                await context.write(answer)
        except TimeoutError:
            if not timer.expired():
                raise
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_CALLER_STALLED,
                f"the caller read nothing for {seconds:g} s",
                metadata={TIMER: "write"},
            ) from None

    async def _item(
        self,
        index: int,
        item: chat_service_pb2.BatchChatItem,
        context: CallContext,
        gateway: Gateway,
    ) -> chat_service_pb2.BatchChatResponse:
        answer = chat_service_pb2.BatchChatResponse(index=index, custom_id=item.custom_id)
        call = begin(item.chat, context, gateway.config, self._now)
        call.accepted = True
        try:
            check(item.chat)
            with admitted(call, context, await reserved(call, context, gateway)):
                answer.response.CopyFrom(await gateway.chat(call))
            context.pack(answer)
        except GatewayError as error:
            error = bare(_under(f"items[{index}].chat.", error))
            answer.error.CopyFrom(rpc_status(error, context.request_id))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            # A stray CancelledError would end this item's worker without a word.
            if isinstance(error, asyncio.CancelledError) and callers_cancel():
                raise
            self._logger.exception(
                "defect", extra={"fields": {"request_id": context.request_id, "item": index}}
            )
            answer.error.CopyFrom(rpc_status(internal_error(), context.request_id))
        return answer


class TokenizerServicer:
    """CountTokens, Tokenize: the model is not called."""

    def __init__(self, current: Callable[[], Gateway], counter: TokenCounter) -> None:
        self._current = current
        self._counter = counter

    async def CountTokens(  # noqa: N802
        self, request: tokenizer_service_pb2.CountTokensRequest, context: CallContext
    ) -> tokenizer_service_pb2.CountTokensResponse:
        """Tokens of a text, or of a call as the model sees it."""
        context.model = request.model
        check(request)
        context.tenant.check(request.model)
        route = self._current().route(request.model)
        tokenizer = tokenizer_for(route.model_name, route.model)
        if request.WhichOneof("input") == "text":
            total = await self._counter.count_text(tokenizer, request.text)
            exact = tokenizer.exact
        else:
            try:
                seen = turns(request.chat, route)
            except GatewayError as error:
                raise _under("chat.", error) from None
            total, exact = await self._counter.count_chat(tokenizer, request.chat, seen)
            # A default of the model's may change the prompt, as thinking does.
            exact = exact and (route.model is None or not route.model.defaults.ListFields())
        return tokenizer_service_pb2.CountTokensResponse(
            total_tokens=total, tokenizer=tokenizer.name, exact=exact
        )

    async def Tokenize(  # noqa: N802
        self, request: tokenizer_service_pb2.TokenizeRequest, context: CallContext
    ) -> tokenizer_service_pb2.TokenizeResponse:
        """The tokens of each text."""
        context.model = request.model
        check(request)
        context.tenant.check(request.model)
        route = self._current().route(request.model)
        tokenizer = tokenizer_for(route.model_name, route.model)
        lists = await self._counter.tokenize(tokenizer, list(request.texts))
        return tokenizer_service_pb2.TokenizeResponse(lists=lists, tokenizer=tokenizer.name)


class ModelServicer:
    """ListModels, GetModel."""

    def __init__(
        self, current: Callable[[], Gateway], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._current = current
        self._now = now

    async def ListModels(  # noqa: N802
        self, request: model_service_pb2.ListModelsRequest, context: CallContext
    ) -> model_service_pb2.ListModelsResponse:
        """One page. The token is the position: the list changes with the configuration, and
        where the upstream is asked, as often as the upstream's own."""
        check(request)
        models = await self._models(context)
        start = int(request.page_token or 0)
        end = start + (request.page_size or _DEFAULT_PAGE)
        return model_service_pb2.ListModelsResponse(
            models=models[start:end],
            next_page_token=str(end) if end < len(models) else "",
        )

    async def GetModel(  # noqa: N802
        self, request: model_service_pb2.GetModelRequest, context: CallContext
    ) -> model_service_pb2.GetModelResponse:
        """One model by name or alias."""
        context.model = request.name
        check(request)
        context.tenant.check(request.name)
        configured = self._current().configured(request.name)
        if configured is not None:  # whatever becomes of the upstream
            return model_service_pb2.GetModelResponse(model=_with_tokenizer(configured))
        for model in await self._models(context):
            if request.name == model.name:
                return model_service_pb2.GetModelResponse(model=model)
        raise GatewayError(
            error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND,
            f"no model {request.name[:80]!r}",
            resource=("model", request.name[:200]),
        )

    async def _models(self, context: CallContext) -> list[model_service_pb2.Model]:
        gateway = self._current()
        call = begin(chat_service_pb2.ChatRequest(), context, gateway.config, self._now)
        try:
            return [
                _with_tokenizer(model)
                for model in await gateway.models(call)
                if any(map(context.tenant.may_ask, (model.name, *model.aliases)))
            ]
        finally:
            context.account(call)


def _with_tokenizer(model: model_service_pb2.Model) -> model_service_pb2.Model:
    model.tokenizer = model.tokenizer or tokenizer_for(model.upstream_model).name
    return model


def begin(
    chat: chat_service_pb2.ChatRequest,
    context: CallContext,
    config: Config,
    now: Callable[[], float],
) -> Call:
    """A call whose deadline is the caller's, or the server's maximum if that is sooner."""
    remaining = context.time_remaining()
    at = now()
    total = config.timeouts.total
    callers = remaining is not None and remaining <= total
    seconds = remaining if callers and remaining is not None else total
    deadline = at + max(0.0, seconds)
    return Call(chat, context.request_id, context.started, deadline, callers, span=context.span)


class Reserved(NamedTuple):
    """What one chat is expected to cost, and what it has of the limits that replicas share."""

    tokens: int
    grant: Grant | None


async def reserved(call: Call, context: CallContext, gateway: Gateway) -> Reserved:
    """What `admitted` needs, which must follow at once. An answer counts as long as its model
    lets it be: many chats at once must not take many times what is left.

    Raises CALLER_FORBIDDEN, CALLER_QUOTA_EXCEEDED; MODEL_NOT_FOUND where tokens count;
    GATEWAY_OVERLOADED where what is shared is away.
    """
    context.tenant.check(call.chat.model)
    cost = 0
    if context.tenant.counts_tokens:
        params = call.chat.params
        answer = answer_cap(params, gateway.route(call.chat.model))
        cost = call.prompt_tokens + answer * max(1, params.choice_count)
    return Reserved(cost, await context.tenant.reserve(cost))


@contextmanager
def admitted(call: Call, context: CallContext, has: Reserved) -> Iterator[None]:
    """Holds one chat to the limits of its caller, and accounts for it when it has ended.

    Raises CALLER_QUOTA_EXCEEDED. What a chat cost that its caller left before anything was known
    stays as expected: leaving early must not be a way to spend nothing.
    """
    with context.tenant.admitted(has.tokens, has.grant) as spending:
        try:
            yield
        except GatewayError as error:
            if error.reason != error_reason_pb2.ERROR_REASON_DEADLINE_EXCEEDED:
                spending.settle(0)
            raise
        finally:
            context.account(call)
            if call.usage is not None:
                usage = call.usage
                total = usage.prompt_tokens + usage.completion_tokens
                spending.settle(max(usage.total_tokens, total))


def _under(prefix: str, error: GatewayError) -> GatewayError:
    """The same error with field paths as the outer request spells them."""
    if error.violations and not error.violations[0].field.startswith(prefix):
        if error.message.startswith(error.violations[0].field):
            error.message = prefix + error.message
        error.violations = tuple(replace(v, field=prefix + v.field) for v in error.violations)
    return error
