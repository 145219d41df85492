"""Reads a chat completion request, as strictly as OpenAI does."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenwire_service.simulator.faults import Directives, error_body, read_directives
from tokenwire_service.simulator.invent import Tool

_ROLES: Final = ("system", "assistant", "user", "function", "tool", "developer")
_EFFORTS: Final = {"none": 0, "minimal": 1, "low": 1, "medium": 2, "high": 3, "xhigh": 4, "max": 4}
_TOOL_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# Parameter: (kind, lowest, highest); None means no bound.
_NUMBERS: Final[Mapping[str, tuple[str, float | None, float | None]]] = {
    "temperature": ("decimal", 0, 2),
    "top_p": ("decimal", 0, 1),
    "presence_penalty": ("decimal", -2, 2),
    "frequency_penalty": ("decimal", -2, 2),
    "n": ("integer", 1, 128),
    "max_tokens": ("integer", 1, None),
    "max_completion_tokens": ("integer", 1, None),
    "top_logprobs": ("integer", 0, 20),
    "seed": ("integer", None, None),
}


class RefusedError(Exception):
    """The request is answered with this status and OpenAI error object."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(body["error"]["message"])
        self.status = status
        self.body = body


def refuse(message: str, param: str | None = None, code: str | None = None) -> RefusedError:
    """A 400 of type invalid_request_error."""
    return RefusedError(400, error_body(message, param=param, code=code))


@dataclass(frozen=True, slots=True)
class Call:
    """A valid request, with defaults filled in.

    tool_mode is `auto`, `none` or `required`; `tools` holds only those that may be called.
    schema is the JSON Schema the answer has to fit, {} for any object, None for free text.
    effort is the number of sentences to think aloud, 0 for none. `source` is all that the text
    of the answer depends on.
    """

    model: str
    messages: Sequence[Mapping[str, Any]]
    source: bytes
    stream: bool
    include_usage: bool
    include_obfuscation: bool
    n: int
    max_tokens: int | None
    stop: Sequence[str]
    tools: Sequence[Tool]
    offered: Any
    tool_mode: str
    parallel: bool
    schema: Any
    logprobs: bool
    top_logprobs: int
    effort: int
    directives: Directives


def read_request(body: bytes, deployment: str | None) -> Call:
    """Reads a body. `deployment` is the model of Azure's path. Raises RefusedError."""
    try:
        # Not msgspec: it refuses the lone surrogates that tests script.
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise refuse("We could not parse the JSON body of your request.") from None
    if not isinstance(data, dict):
        raise refuse(f"Invalid body: expected an object, but got {_describe(data)} instead.")
    data = {key: value for key, value in data.items() if value is not None}
    model = data.get("model", deployment)
    if model is None:
        raise refuse("you must provide a model parameter")
    if not isinstance(model, str) or not model:
        raise _wrong_type("model", "a string", model)
    try:
        directives = read_directives(data.get("simulate", {}))
    except ValueError as error:
        raise refuse(str(error), "simulate", "invalid_value") from None
    messages = _messages(data)
    for name, (kind, low, high) in _NUMBERS.items():
        if name in data:
            _check_number(name, data[name], kind, low, high)
    if "max_tokens" in data and "max_completion_tokens" in data:
        raise refuse(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            "max_tokens",
            "invalid_parameter_combination",
        )
    stream = _flag(data, "stream")
    options = data.get("stream_options", {})
    if not isinstance(options, dict):
        raise _wrong_type("stream_options", "an object", options)
    if options and not stream:
        raise refuse(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            "stream_options",
        )
    logprobs = _flag(data, "logprobs")
    if "top_logprobs" in data and not logprobs:
        raise refuse(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
            "top_logprobs",
        )
    tools = _tools(data)
    mode, callable_tools = _tool_choice(data.get("tool_choice"), tools)
    told = (model, messages, data.get("tools"), data.get("response_format"), data.get("seed"))
    return Call(
        model=model,
        messages=messages,
        source=json.dumps(told).encode(),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        include_obfuscation=bool(options.get("include_obfuscation")),
        n=data.get("n", 1),
        max_tokens=data.get("max_completion_tokens", data.get("max_tokens")),
        stop=_stop(data.get("stop", [])),
        tools=callable_tools,
        offered=data.get("tools"),
        tool_mode=mode,
        parallel=data.get("parallel_tool_calls", True) is not False,
        schema=_schema(data.get("response_format")),
        logprobs=logprobs,
        top_logprobs=data.get("top_logprobs", 0),
        effort=_effort(data, model),
        directives=directives,
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _describe(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a decimal"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _wrong_type(param: str, expected: str, value: object) -> RefusedError:
    return refuse(
        f"Invalid type for '{param}': expected {expected}, but got {_describe(value)} instead.",
        param,
        "invalid_type",
    )


def _missing(param: str) -> RefusedError:
    return refuse(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


def _unsupported(param: str, value: object, supported: Sequence[str]) -> RefusedError:
    listed = ", ".join(f"'{item}'" for item in supported[:-1]) + f", and '{supported[-1]}'"
    return refuse(
        f"Invalid value: '{value}'. Supported values are: {listed}.", param, "invalid_value"
    )


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name, False)
    if not isinstance(value, bool):
        raise _wrong_type(name, "a boolean", value)
    return value


def _check_number(
    name: str, value: object, kind: str, low: float | None, high: float | None
) -> None:
    fits = isinstance(value, int) or (kind == "decimal" and isinstance(value, float))
    if not fits or isinstance(value, bool):
        raise _wrong_type(name, "an integer" if kind == "integer" else "a decimal", value)
    assert isinstance(value, int | float)
    if low is not None and value < low:
        raise refuse(
            f"Invalid '{name}': {kind} below minimum value. "
            f"Expected a value >= {low}, but got {value} instead.",
            name,
            f"{kind}_below_min_value",
        )
    if high is not None and value > high:
        raise refuse(
            f"Invalid '{name}': {kind} above maximum value. "
            f"Expected a value <= {high}, but got {value} instead.",
            name,
            f"{kind}_above_max_value",
        )


def _messages(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "messages" not in data:
        raise _missing("messages")
    messages = data["messages"]
    if not isinstance(messages, list):
        raise _wrong_type("messages", "an array of objects", messages)
    if not messages:
        raise refuse(
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an "
            "empty array instead.",
            "messages",
            "empty_array",
        )
    called: set[object] = set()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _wrong_type(where, "an object", message)
        role, content = message.get("role"), message.get("content")
        if role is None:
            raise _missing(f"{where}.role")
        if role not in _ROLES:
            raise _unsupported(f"{where}.role", role, _ROLES)
        if content is None and role != "assistant":
            raise refuse(
                f"Invalid value for 'content': expected a string, got null. ({where})",
                f"{where}.content",
            )
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None) or not all(
            isinstance(part, dict) and isinstance(part.get("type"), str) for part in parts
        ):
            raise _wrong_type(f"{where}.content", "a string or an array of objects", content)
        for call in message.get("tool_calls") or ():
            if isinstance(call, dict):
                called.add(str(call.get("id")))
        if role == "tool" and str(message.get("tool_call_id")) not in called:
            raise refuse(
                "Invalid parameter: messages with role 'tool' must be a response to a preceding "
                "message with 'tool_calls'.",
                f"{where}.role",
            )
    return messages


def _tools(data: Mapping[str, Any]) -> list[Tool]:
    listed = data.get("tools", [])
    if not isinstance(listed, list):
        raise _wrong_type("tools", "an array of objects", listed)
    tools = []
    for index, entry in enumerate(listed):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind not in ("function", "custom"):
            raise _unsupported(f"tools[{index}].type", kind, ("function", "custom"))
        where = f"tools[{index}].{kind}"
        body = entry.get(kind)
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            raise _missing(f"{where}.name")
        if not _TOOL_NAME.fullmatch(body["name"]):
            raise refuse(
                f"Invalid '{where}.name': string does not match pattern. Expected a string that "
                "matches the pattern '^[a-zA-Z0-9_-]+$'.",
                f"{where}.name",
                "invalid_value",
            )
        description = body.get("description")
        tools.append(
            Tool(
                name=body["name"],
                description=description if isinstance(description, str) else "",
                schema=body.get("parameters"),
                custom=kind == "custom",
            )
        )
    return tools


def _tool_choice(choice: object, tools: list[Tool]) -> tuple[str, list[Tool]]:
    if choice is None:
        return ("auto" if tools else "none"), tools
    if not tools:
        raise refuse(
            "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are "
            "specified.",
            "tool_choice",
        )
    match choice:
        case "auto" | "none" | "required":
            return str(choice), tools
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(entries)}}:
            names = [name for entry in entries if (name := _chosen_name(entry))]
            allowed = [tool for tool in tools if tool.name in names]
            if mode in ("auto", "required") and allowed:
                return str(mode), allowed
        case dict() if name := _chosen_name(choice):
            named = [tool for tool in tools if tool.name == name]
            if not named:
                raise refuse(f"Tool choice '{name}' not found in 'tools' parameter.", "tool_choice")
            return "required", named
        case _:
            pass
    raise refuse(
        "Invalid value for 'tool_choice': expected 'none', 'auto', 'required', or an object that "
        "names tools.",
        "tool_choice",
        "invalid_value",
    )


def _chosen_name(entry: object) -> str | None:
    match entry:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
        case {"type": "custom", "custom": {"name": str(name)}}:
            return name
    return None


def _stop(stop: object) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise _wrong_type("stop", "a string or an array of strings", stop)
    if len(stops) > 4:
        raise refuse(
            "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an "
            f"array with length {len(stops)} instead.",
            "stop",
            "array_above_max_length",
        )
    return [item for item in stops if item]


def _schema(response_format: object) -> Any:
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
        case {"type": "json_schema"}:
            raise _missing("response_format.json_schema.schema")
        case {"type": kind}:
            raise _unsupported("response_format.type", kind, ("text", "json_object", "json_schema"))
    raise _wrong_type("response_format", "an object", response_format)


def _effort(data: Mapping[str, Any], model: str) -> int:
    effort = data.get("reasoning_effort")
    if effort is not None:
        if not isinstance(effort, str) or effort not in _EFFORTS:
            raise _unsupported("reasoning_effort", effort, tuple(_EFFORTS))
        return _EFFORTS[effort]
    template = data.get("chat_template_kwargs")
    asked = data.get("enable_thinking")
    if asked is None and isinstance(template, dict):
        asked = template.get("enable_thinking")
    return 2 if asked or (asked is None and model == "simulated-thinker") else 0
