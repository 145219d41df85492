"""How families of models write a call: the text they see, and the tokens between the texts.

A provider counts not the JSON it gets but the prompt it makes of it. Four layouts are known:

- `OPENAI`, up to GPT-4.1: three tokens around each message, its role, one more for a name.
  https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken
- `GPT5`: harmony's messages (https://github.com/openai/harmony), where only an assistant's names a
  channel. The system message that OpenAI puts before them is not counted.
- `HARMONY`, gpt-oss: the same after the system message that its chat template writes.
- `CHATML`, Qwen.

How OpenAI writes *tools* was never published; it is taken to be as gpt-oss' chat template has it,
which agrees with what was recorded. docs/tokenizers.md tells how often all this is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.upstream.json_text import INT32_MAX
from tokenwire_service.upstream.request import Turn

_BYTES_PER_TOKEN = 4  # see `estimate`
_MAX_SCHEMA_DEPTH = 16  # of what is written as a type; deeper ones are rare, and are `any`


@dataclass(frozen=True)
class Layout:
    """Tokens around the texts of a call, and the shape of call for which they are proven.

    `message` includes the role where `spells_role` is False. `exact_roles`: calls of plain
    messages in these roles were found to be counted to the token.
    """

    message: int
    reply: int
    exact_roles: frozenset[str] = frozenset()
    spells_role: bool = False
    assistant: int = 0  # on top, of an assistant's message
    name: int | None = None  # of a name, beside its text; None: names are in no proven call
    preamble: str = ""  # a message that the provider puts before the others
    typed_tools: bool = True  # tools written as TypeScript; else as JSON


class Laid(NamedTuple):
    """A call in a layout: its texts, and the tokens between them."""

    texts: list[str]
    between: int


OPENAI = Layout(
    message=3,
    reply=3,
    exact_roles=frozenset({"system", "developer", "user", "assistant"}),
    spells_role=True,
    name=1,
)
# Not proven for any model, and the best guess for those nobody knows.
UNKNOWN = Layout(message=3, reply=3, spells_role=True, name=1, typed_tools=False)
GPT5 = Layout(message=4, reply=2, exact_roles=frozenset({"user", "assistant"}), assistant=2)
HARMONY = Layout(
    message=4,
    reply=2,
    exact_roles=frozenset({"user"}),
    assistant=2,
    # Any date has as many tokens.
    preamble="You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
)
CHATML = Layout(message=5, reply=3, exact_roles=frozenset({"user"}), typed_tools=False)

_TOOL_SYSTEM_MESSAGE = 3  # where tools stand in a message of their own
_FORCED_TOOL = 4  # a call that must use one tool, beside the tool's name
_TOOL_CALL = 5  # who calls what, on which channel


def lay(layout: Layout, chat: chat_service_pb2.ChatRequest, turns: Sequence[Turn]) -> Laid:
    """The call as `layout` has it. `turns` are its messages in the upstream's roles."""
    texts: list[str] = []
    between = layout.reply
    if layout.preamble:
        texts.append(layout.preamble)
        between += layout.message
    for turn in turns:
        between += layout.message
        if layout.spells_role:
            texts.append(turn.role)
        texts += _texts(turn)
        if turn.message.name:
            between += layout.name or 1
            texts.append(turn.message.name)
        if turn.role == "assistant":
            between += layout.assistant
        for call in turn.message.tool_calls:
            between += _TOOL_CALL
            texts += _call_texts(call)
    if chat.tools:
        if not any(turn.role in ("system", "developer") for turn in turns):
            between += _TOOL_SYSTEM_MESSAGE
        texts += [typed(chat.tools)] if layout.typed_tools else _tool_texts(chat.tools)
        for name in chat.tool_choice.tool_names[:1]:
            between += _FORCED_TOOL
            texts.append(name)
    if chat.HasField("response_format"):
        texts.append(chat.response_format.json_schema.schema_json)
    return Laid([text for text in texts if text], between)


def is_proven(layout: Layout, chat: chat_service_pb2.ChatRequest, turns: Sequence[Turn]) -> bool:
    """Whether calls of this shape were found to be counted to the token."""
    return _is_plain(chat) and all(_is_proven_turn(layout, turn) for turn in turns)


def as_written(chat: chat_service_pb2.ChatRequest) -> list[Turn]:
    """The messages in the caller's roles, for a guess that needs no more."""
    return [
        Turn(
            message.role,
            message,
            "",
            message.content if message.HasField("content") else None,
            [(part, "") for part in message.parts],
        )
        for message in chat.messages
    ]


def texts_to_parse(chat: chat_service_pb2.ChatRequest) -> list[str]:
    """What `lay` reads as JSON: to be bounded before it does."""
    return [text for tool in chat.tools for text in _schemas(tool)]


def _texts(turn: Turn) -> Iterator[str]:
    if turn.content is not None:
        yield turn.content
    texts = [part.text for part, _ in turn.parts if part.WhichOneof("part") == "text"]
    if texts:
        yield "\n".join(texts)


def _call_texts(call: chat_pb2.ToolCall) -> list[str]:
    if call.WhichOneof("call") == "custom":
        return [call.custom.name, call.custom.input]
    return [call.function.name, call.function.arguments_json]


def _is_plain(chat: chat_service_pb2.ChatRequest) -> bool:
    """Whether nothing but messages makes the prompt."""
    return not (
        chat.tools
        or chat.HasField("tool_choice")
        or chat.HasField("response_format")
        or chat.extra_body_json
        or chat.params.reasoning_effort
        or chat.params.verbosity
        or chat.params.HasField("enable_thinking")
    )


def _is_proven_turn(layout: Layout, turn: Turn) -> bool:
    message = turn.message
    if message.name and layout.name is None:
        return False
    fields = {descriptor.name for descriptor, _ in message.ListFields()}
    return turn.role in layout.exact_roles and fields <= {"role", "content", "name"}


# --- tools ------------------------------------------------------------------------------


def _schemas(tool: chat_pb2.Tool) -> Iterator[str]:
    yield tool.raw_json
    yield tool.function.parameters_schema_json


def _tool_texts(tools: Iterable[chat_pb2.Tool]) -> list[str]:
    texts = []
    for tool in tools:
        texts += [*_schemas(tool), tool.function.name, tool.function.description]
        texts += [tool.custom.name, tool.custom.description]
    return texts


def typed(tools: Iterable[chat_pb2.Tool]) -> str:
    """Tools as gpt-oss' chat template writes them: TypeScript types in a namespace."""
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for tool in tools:
        if tool.WhichOneof("tool") != "function":
            lines += [text for text in _tool_texts([tool]) if text] + [""]
            continue
        if tool.function.description:
            lines.append(f"// {tool.function.description}")
        schema = _parsed(tool.function.parameters_schema_json)
        fields = "\n".join(_fields(schema, 0)) if isinstance(schema, dict) else ""
        if fields:
            lines += [f"type {tool.function.name} = (_: {{", fields, "}) => any;", ""]
        else:
            lines += [f"type {tool.function.name} = () => any;", ""]
    lines.append("} // namespace functions")
    return "\n".join(lines)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):  # the upstream will say so; here it is but a text
        return None


def _fields(schema: dict[str, Any], depth: int) -> Iterator[str]:
    properties = schema.get("properties")
    required = schema.get("required")
    for name, inner in (properties if isinstance(properties, dict) else {}).items():
        if not isinstance(inner, dict):
            continue
        if isinstance(description := inner.get("description"), str) and description:
            yield f"// {description}"
        optional = "" if isinstance(required, list) and name in required else "?"
        yield f"{name}{optional}: {_type(inner, depth + 1)},"


def _type(schema: Any, depth: int) -> str:
    if not isinstance(schema, dict) or depth > _MAX_SCHEMA_DEPTH:
        return "any"
    if isinstance(schema.get("enum"), list):
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    match schema.get("type"):
        case "object":
            fields = "\n".join(_fields(schema, depth))
            return f"{{\n{fields}\n}}" if fields else "object"
        case "array":
            return f"{_type(schema.get('items'), depth + 1)}[]"
        case "integer" | "number":
            return "number"
        case "string" | "boolean" | "null" as name:
            return str(name)
        case _:
            return "any"


# --- whose layout ------------------------------------------------------------------------

# What stands before a model's own name: a path, a vendor with a dash or a dot, a fine-tune's mark.
_PREFIX = re.compile(r"^(?:.*/)?(?:(?:ft:|openai[.-])+)?")


@dataclass(frozen=True)
class Family:
    """Models that share a tokenizer and a layout, by how their names begin.

    `exact`: whether the names are enough to know the tokenizer. `proven`: whether the layout was
    found to hold for them.
    """

    name: re.Pattern[str]
    tokenizer: str
    layout: Layout
    exact: bool = True
    proven: bool = True


def _family(
    name: str, tokenizer: str, layout: Layout, *, exact: bool = True, proven: bool = True
) -> Family:
    return Family(re.compile(rf"(?:{name})(?![a-z0-9])"), tokenizer, layout, exact, proven)


# The first that fits counts.
FAMILIES: Sequence[Family] = (
    _family("gpt-oss", "o200k_harmony", HARMONY),
    _family("gpt-5", "o200k_base", GPT5),
    # Searches before it answers, and does not count what it searched with.
    _family("gpt-4o-(?:mini-)?search", "o200k_base", OPENAI, proven=False),
    _family("gpt-4o|gpt-4\\.1|chatgpt-4o", "o200k_base", OPENAI),
    _family("o[134]|gpt-4\\.5|codex-mini", "o200k_base", OPENAI, proven=False),
    _family("gpt-3\\.5-turbo-instruct|gpt-35-turbo-instruct", "cl100k_base", OPENAI, proven=False),
    _family("gpt-4|gpt-3\\.5|gpt-35", "cl100k_base", OPENAI),
    _family("text-davinci-00[23]|code-davinci-00[12]", "p50k_base", UNKNOWN, proven=False),
    _family("davinci-002|babbage-002|text-embedding", "cl100k_base", UNKNOWN, proven=False),
    _family("code-cushman-00[12]", "p50k_base", UNKNOWN, proven=False),
    _family("qwen-?3(?!\\.)", "qwen", CHATML),
    _family("qwen(?:-?[12](?:\\.5)?)?(?=-\\d)|qwq-32b", "qwen", CHATML, proven=False),
    _family("qwen-?[12](?:\\.5)?", "qwen", CHATML, proven=False),
)
# Other models of these makers: the nearest there is.
_LIKELY: Sequence[Family] = (
    Family(re.compile(r"qwen|qwq"), "qwen", CHATML, exact=False, proven=False),
    Family(re.compile(r"(?:text-|code-)?davinci|p50k"), "p50k_base", UNKNOWN, False, False),
)
_NOBODY = Family(re.compile(""), "o200k_base", UNKNOWN, exact=False, proven=False)


def family_of(model: str) -> Family:
    """The family that a model's name tells; one that is exact in nothing where it tells none."""
    name = _PREFIX.sub("", model.lower())
    found = (family for family in (*FAMILIES, *_LIKELY) if family.name.match(name))
    return next(found, _NOBODY)


def estimate(chat: chat_service_pb2.ChatRequest, delivered_bytes: int) -> chat_pb2.Usage:
    """Usage of an answer whose upstream never said it: by bytes of text, marked as estimated.
    Four bytes a token is OpenAI's own rule of thumb for English; it is near for others."""
    prompt = prompt_tokens(chat)
    completion = _tokens_in(delivered_bytes)
    return chat_pb2.Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        estimated=True,
    )


def prompt_tokens(chat: chat_service_pb2.ChatRequest) -> int:
    """Of a call's prompt, estimated."""
    laid = lay(UNKNOWN, chat, as_written(chat))
    size = sum(len(text if text.isascii() else text.encode()) for text in laid.texts)
    return laid.between + size // _BYTES_PER_TOKEN


def so_far(told: chat_pb2.Usage, delivered_bytes: int) -> chat_pb2.Usage:
    """Usage of a stream that was cut off after its upstream had `told` some: Anthropic tells the
    prompt's and the first token before any text. What was delivered cost its estimate at least."""
    usage = chat_pb2.Usage()
    usage.CopyFrom(told)
    usage.completion_tokens = max(told.completion_tokens, _tokens_in(delivered_bytes))
    more = usage.completion_tokens - told.completion_tokens
    total = max(told.total_tokens, told.prompt_tokens + told.completion_tokens) + more
    usage.total_tokens = min(total, INT32_MAX)  # whatever the upstream told
    usage.estimated = True
    return usage


def _tokens_in(delivered_bytes: int) -> int:
    return -(-delivered_bytes // _BYTES_PER_TOKEN)
