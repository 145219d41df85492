"""A request as every dialect reads it: whose turn it is in the upstream's words, and parameters.

Here are the rules of the contract that no provider changes: role templates, the model's defaults
beneath the caller's parameters, caps, and what becomes of parameters an upstream does not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.errors import Violation, invalid
from tokenwire_service.upstream.dialect import Route
from tokenwire_service.upstream.json_text import INT32_MAX, patched, raw_object
from tokenwire_service.validation import KNOWN_ROLES


@dataclass
class Turn:
    """One message in the upstream's role, wrapped by its template and joined with its neighbours.

    `content` and `parts` take the place of the message's own; `message` holds the rest. Each part
    goes with its path in the request, for errors. `path`: of the (first) message.
    """

    role: str
    message: chat_pb2.ChatMessage
    path: str
    content: str | None
    parts: list[tuple[chat_pb2.ContentPart, str]]


@dataclass(frozen=True)
class Parameters:
    """The caller's parameters over the model's defaults, without what the upstream does not take.

    `max_completion_tokens`: the cap in force, 0 for none.
    """

    params: chat_pb2.GenerationParams
    max_completion_tokens: int


class Unsupported:
    """What an upstream does not take of one request: nothing of it is lost in silence."""

    def __init__(self, chat: chat_service_pb2.ChatRequest, route: Route) -> None:
        self._upstream = route.upstream.name
        policy = chat.unsupported_parameter_policy
        self._may_leave_out = policy == chat_service_pb2.UNSUPPORTED_PARAMETER_POLICY_DROP
        self._left_out: list[str] = []
        self._refused: list[Violation] = []

    def leave_out(self, path: str) -> None:
        """A field that shapes the answer: left out where the caller allows it, else refused."""
        if self._may_leave_out:
            self._left_out.append(path)
        else:
            self._refused.append(
                Violation(
                    path,
                    f"upstream {self._upstream} does not take it; "
                    "set unsupported_parameter_policy to DROP to leave it out",
                )
            )

    def note(self, path: str) -> None:
        """A field that is left out without changing what is asked, such as a part of an earlier
        answer that is handed back: never refused."""
        self._left_out.append(path)

    def refuse(self, path: str, expected: str = "") -> None:
        """A field without which the request would be another one: what is said, a tool."""
        why = f"upstream {self._upstream} does not take it"
        self._refused.append(Violation(path, f"{why}, expected {expected}" if expected else why))

    def settle(self) -> tuple[str, ...]:
        """The proto paths of what was left out. Raises UNSUPPORTED_PARAMETER for what was refused,
        all of it at once: to be called when everything has been encoded."""
        if self._refused:
            reason = error_reason_pb2.ERROR_REASON_UNSUPPORTED_PARAMETER
            raise invalid(*self._refused, reason=reason)
        return tuple(self._left_out)


def turns(chat: chat_service_pb2.ChatRequest, route: Route) -> list[Turn]:
    """The messages by the rule at ChatRequest.role_templates. Raises UNKNOWN_ROLE."""
    configured = route.model.role_templates if route.model is not None else ()
    templates = {t.role: t for t in (chat.role_templates or configured)}
    problems: list[Violation] = []
    found: list[Turn] = []
    texts: list[list[str]] = []  # of each turn: what is to be joined, empty if nothing may be
    for i, message in enumerate(chat.messages):
        path = f"messages[{i}]"
        role, template = _role(templates, message.role)
        if not role:
            known = ", ".join(sorted(KNOWN_ROLES | set(templates)))
            problems.append(
                Violation(f"{path}.role", f"got {message.role[:40]!r}, expected one of {known}")
            )
            continue
        turn = _turn(message, role, template, path)
        plain = turn.content is not None and _is_plain(message)
        if templates and plain and found and texts[-1] and found[-1].role == role:
            texts[-1].append(turn.content or "")
            continue
        found.append(turn)
        texts.append([turn.content or ""] if plain else [])
    if problems:
        raise invalid(*problems, reason=error_reason_pb2.ERROR_REASON_UNKNOWN_ROLE)
    for turn, joined in zip(found, texts, strict=True):
        if len(joined) > 1:
            turn.content = "\n".join(joined)
    return found


def parameters(
    chat: chat_service_pb2.ChatRequest,
    route: Route,
    unsupported: Unsupported,
    *,
    never: frozenset[str] = frozenset(),
    usual: frozenset[str] = frozenset(),
    reasoned: frozenset[str] = frozenset(),
) -> Parameters:
    """The parameters to send; what is not goes to `unsupported`.

    Fields of GenerationParams: the dialect has no words for those in `never`, and its providers
    do not take those in `usual` unless the configuration of the upstream says otherwise, nor those
    in `reasoned` when the model is asked to reason.
    """
    params = chat_pb2.GenerationParams()
    if route.model is None and not chat.HasField("params"):
        return Parameters(params, 0)
    if route.model is not None:
        params.CopyFrom(route.model.defaults)
    if chat.params.stop:  # lists and maps are replaced, where MergeFrom would add
        del params.stop[:]
    if chat.params.logit_bias:
        params.logit_bias.clear()
    params.MergeFrom(chat.params)
    spelled = _rename(params, chat, route)
    configured = route.upstream.unsupported_parameters
    if params.reasoning_effort not in ("", "none"):
        usual = usual | reasoned
    without = never | (usual if configured is None else configured)
    if route.model is not None:
        without = without | route.model.unsupported_parameters
    # A default of the configuration is dropped without a word: the caller never named it.
    asked = {descriptor.name for descriptor, _ in chat.params.ListFields()}
    for name in sorted(descriptor.name for descriptor, _ in params.ListFields()):
        if name in without:
            params.ClearField(name)  # type: ignore[arg-type]  # names come from the descriptor
            asked_by = spelled.get(name, name)
            if asked_by in asked:
                unsupported.leave_out(f"params.{asked_by}")
    limit = answer_cap(params, route)
    if "max_completion_tokens" in without and not params.HasField("max_completion_tokens"):
        limit = 0
    return Parameters(params, limit)


def answer_cap(params: chat_pb2.GenerationParams, route: Route) -> int:
    """Most tokens of each choice: what is asked for, else the model's default, within its cap.
    0 where nothing says, as for names that only pass through."""
    if route.model is None:
        return params.max_completion_tokens
    cap = route.model.max_completion_tokens or 0
    asked = params if params.HasField("max_completion_tokens") else route.model.defaults
    if not asked.HasField("max_completion_tokens"):
        return cap
    return min(asked.max_completion_tokens, cap or INT32_MAX)


def extended(
    body: dict[str, Any],
    chat: chat_service_pb2.ChatRequest,
    route: Route,
    typed_only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The body with what no typed field says: the model's `extra_body`, and over it the caller's.
    Raises INVALID_REQUEST for a caller's that sets a field in `typed_only`."""
    if route.model is not None and route.model.extra_body:
        body = patched(body, route.model.extra_body, "extra_body")
    if chat.extra_body_json:
        body = patched(body, chat.extra_body_json, "extra_body_json", typed_only)
    return body


def _rename(
    params: chat_pb2.GenerationParams, chat: chat_service_pb2.ChatRequest, route: Route
) -> dict[str, str]:
    """Sends parameters under the names that the model's configuration gives them; by each of those
    the name it was asked by."""
    spelled: dict[str, str] = {}
    problems: list[Violation] = []
    for source, target in (
        route.model.rename_parameters if route.model is not None else {}
    ).items():
        if not params.HasField(source):  # type: ignore[arg-type]  # names that the configuration checked
            continue
        asked, target_asked = (chat.params.HasField(name) for name in (source, target))  # type: ignore[arg-type]
        if asked and target_asked:
            what = f"is sent as {target} to this model, which is set, too; expected one of them"
            problems.append(Violation(f"params.{source}", what))
        elif not target_asked:  # else the caller's own wins over a default
            setattr(params, target, getattr(params, source))
            spelled[target] = source
        params.ClearField(source)  # type: ignore[arg-type]
    if problems:
        raise invalid(*problems)
    return spelled


def _role(
    templates: Mapping[str, chat_pb2.RoleTemplate], role: str
) -> tuple[str, chat_pb2.RoleTemplate | None]:
    """(role upstream, template to wrap with) of a caller's role; no role when it is unknown, or
    its fallbacks go round in a circle."""
    template = templates.get(role)
    for _ in templates:
        if template is None or not template.fallback_role:
            break
        role = template.fallback_role
        template = templates.get(role)
    if template is not None:
        return ("", None) if template.fallback_role else (template.api_role or role, template)
    if role not in KNOWN_ROLES:
        return "", None
    return ("system" if role == "environment" else role), None


def _turn(
    message: chat_pb2.ChatMessage, role: str, template: chat_pb2.RoleTemplate | None, path: str
) -> Turn:
    begin, end = (template.begin, template.end) if template is not None else ("", "")
    content = begin + message.content + end if message.HasField("content") else None
    parts = [(part, f"{path}.parts[{i}]") for i, part in enumerate(message.parts)]
    if parts and begin:
        parts.insert(0, (chat_pb2.ContentPart(text=begin), path))
    if parts and end:
        parts.append((chat_pb2.ContentPart(text=end), path))
    return Turn(role, message, path, content, parts)


def _is_plain(message: chat_pb2.ChatMessage) -> bool:
    """Whether a message is a role and a text and nothing else."""
    return all(descriptor.name in ("role", "content") for descriptor, _ in message.ListFields())


def openai_format(wanted: chat_pb2.ResponseFormat) -> Any:
    """`response_format` as OpenAI spells it, and DashScope after it."""
    kind = wanted.WhichOneof("format")
    if kind == "raw_json":
        return raw_object(wanted.raw_json, "response_format.raw_json")
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        return {"type": "text"}
    schema: dict[str, Any] = {
        "name": wanted.json_schema.name,
        "schema": raw_object(
            wanted.json_schema.schema_json, "response_format.json_schema.schema_json"
        ),
    }
    if wanted.json_schema.description:
        schema["description"] = wanted.json_schema.description
    if wanted.json_schema.HasField("strict"):
        schema["strict"] = wanted.json_schema.strict
    return {"type": "json_schema", "json_schema": schema}
