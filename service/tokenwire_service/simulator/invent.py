"""Makes what is not prose out of a prompt's words: choices of tools, JSON that fits a schema."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenwire_service.simulator import prose

_NUMBER: Final = re.compile(r"(?<![\w.])-?\d{1,15}(?:\.\d{1,15})?")
_NAME: Final = re.compile(r"(?<=[a-z] )[A-Z][\w'-]*(?: [A-Z][\w'-]*)*")
_WHOLE_PROMPT: Final = re.compile(r"query|question|text|prompt|input|message|sentence|expression")
_COMMON_IN_TOOL_NAMES: Final = frozenset(
    {"call", "current", "do", "fetch", "function", "get", "lookup", "make", "run", "set", "tool"}
)
_FORMATS: Final = {
    "date": "2026-02-03",
    "time": "04:05:06Z",
    "date-time": "2026-02-03T04:05:06Z",
    "duration": "PT7M",
    "email": "simulator@example.com",
    "uri": "https://example.com/simulated",
    "uuid": "7b3f1c52-0d4e-4a6b-9c8d-1e2f3a4b5c6d",
    "ipv4": "192.0.2.7",
    "hostname": "simulated.example.com",
}
_DEEPEST: Final = 12
# Parts of a schema looked at for one value: schemas may refer to themselves in many ways at once.
_MOST_STEPS: Final = 3000


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool of a request. `custom` tools take text, the others take JSON."""

    name: str
    description: str = ""
    schema: Any = None
    custom: bool = False


def asked_for(tools: Sequence[Tool], prompt: str) -> list[Tool]:
    """The tools a prompt plainly asks for, best match first.

    A word of the tool's name in the prompt is plain, and so are two words of its description.
    A word counts for one tool only, so that `get_weather` and `get_weather_alerts` are not both
    called for one "weather".
    """
    words = _stems(prompt)
    chosen = []
    for tool in sorted(tools, key=lambda tool: -_score(tool, words)):
        if _score(tool, words) < 2:
            continue
        chosen.append(tool)
        words -= _stems(_spaced(tool.name)) | _stems(tool.description)
    return chosen


def best_for(tools: Sequence[Tool], prompt: str) -> Tool:
    """The tool that fits a prompt best; the first one where none does. `tools` is not empty."""
    words = _stems(prompt)
    return max(tools, key=lambda tool: _score(tool, words))


def value_for(schema: Any, prompt: str, *, everything: bool = False) -> Any:
    """A JSON value that fits `schema`, made of the prompt's words and numbers.

    Understands type, properties, required, items, enum, const, anyOf/oneOf/allOf, local $ref,
    format, and the bounds of numbers, strings and arrays; not pattern. Optional properties are
    left out unless `everything`, or unless the prompt names one of their enum values.
    """
    return _Inventor(schema, prompt, everything).make(schema, "", 0)


def _score(tool: Tool, words: set[str]) -> int:
    name = _stems(_spaced(tool.name)) - _COMMON_IN_TOOL_NAMES
    return 2 * len(name & words) + len((_stems(tool.description) - name) & words)


def _spaced(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_\-.]", " ", name)


def _stems(text: str) -> set[str]:
    stems: set[str] = set()
    for word in prose.keywords(text[:4000]):
        if prose.is_chinese(word):
            stems.update(word[i : i + 2] for i in range(max(1, len(word) - 1)))
        else:
            stems.add(re.sub(r"(?:'s|s|ing|ed)$", "", word.lower()) or word)
    return stems


class _Inventor:
    """Walks one schema, and uses up the words and numbers of the prompt as it goes."""

    def __init__(self, root: Any, prompt: str, everything: bool) -> None:
        self._root = root
        self._prompt = prompt[:2000]
        self._everything = everything
        self._numbers = _NUMBER.findall(self._prompt)
        self._steps_left = _MOST_STEPS
        names = [name for name in _NAME.findall(self._prompt) if prose.keywords(name)]
        self._words = [*names, *(w for w in prose.keywords(self._prompt) if w not in names)]
        self._words_left = list(self._words)

    def make(self, schema: Any, name: str, depth: int) -> Any:
        schema = self._resolve(schema, depth)
        if depth > _DEEPEST or self._steps_left <= 0:
            return {"object": {}, "array": [], "string": "", "boolean": True, "null": None}.get(
                self._type(schema), 0
            )
        if "const" in schema:
            return schema["const"]
        if isinstance(options := schema.get("enum"), list) and options:
            named = [option for option in options if self._is_named(option)]
            return (named or options)[0]
        match self._type(schema):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, name, depth)
            case "integer" | "number" as kind:
                return self._number(schema, kind)
            case "boolean":
                return not re.search(r"\b(?:no|not|without|don't)\b", self._prompt)
            case "null":
                return None
            case _:
                return self._string(schema, name)

    def _resolve(self, schema: Any, depth: int) -> Mapping[str, Any]:
        for _ in range(_DEEPEST):
            self._steps_left -= 1
            if not isinstance(schema, dict):
                return {}
            if self._steps_left <= 0:
                return {key: schema[key] for key in ("type",) if key in schema}
            if isinstance(reference := schema.get("$ref"), str):
                schema = self._pointed_at(reference)
            elif isinstance(parts := schema.get("allOf"), list) and parts:
                rest = {key: value for key, value in schema.items() if key != "allOf"}
                for part in parts:
                    resolved = self._resolve(part, depth + 1) if depth < _DEEPEST else {}
                    both = {**_mapping(rest, "properties"), **_mapping(resolved, "properties")}
                    needed = [*_sequence(rest, "required"), *_sequence(resolved, "required")]
                    rest = {**rest, **resolved, "properties": both, "required": needed}
                schema = rest
            elif options := _sequence(schema, "anyOf") or _sequence(schema, "oneOf"):
                usable = [option for option in options if option != {"type": "null"}]
                schema = (usable or options)[0]
            else:
                return schema
        return {}

    def _pointed_at(self, reference: str) -> Any:
        target = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, dict) else None
        return target

    def _type(self, schema: Mapping[str, Any]) -> str:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((item for item in kind if item != "null"), "null")
        if isinstance(kind, str):
            return kind
        if "properties" in schema:
            return "object"
        return "array" if "items" in schema or "prefixItems" in schema else "string"

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties = _mapping(schema, "properties")
        required = _sequence(schema, "required")
        return {
            name: self.make(inner, name, depth + 1)
            for name, inner in properties.items()
            if name in required
            or (self._everything and depth < _DEEPEST // 2)
            or any(self._is_named(option) for option in _sequence(inner, "enum"))
        }

    def _array(self, schema: Mapping[str, Any], name: str, depth: int) -> list[Any]:
        if prefix := _sequence(schema, "prefixItems"):
            return [self.make(item, name, depth + 1) for item in prefix]
        items = schema.get("items", {})
        resolved = self._resolve(items, depth)
        wanted = 1
        if self._type(resolved) in ("integer", "number"):
            wanted = max(1, len(self._numbers))
        least = _whole(schema, "minItems", 0)
        most = _whole(schema, "maxItems", max(wanted, least))
        return [self.make(items, name, depth + 1) for _ in range(min(max(wanted, least), most, 50))]

    def _number(self, schema: Mapping[str, Any], kind: str) -> int | float:
        given = float(self._numbers.pop(0)) if self._numbers else None
        low, high = schema.get("minimum"), schema.get("maximum")
        if isinstance(above := schema.get("exclusiveMinimum"), int | float):
            low = above + 1
        if isinstance(below := schema.get("exclusiveMaximum"), int | float):
            high = below - 1
        value = given if given is not None else 1.0
        if isinstance(low, int | float):
            value = max(value, low)
        if isinstance(high, int | float):
            value = min(value, high)
        step = schema.get("multipleOf")
        if isinstance(step, int | float) and step > 0:
            value = -(-value // step) * step
        return int(value) if kind == "integer" or value == int(value) else value

    def _string(self, schema: Mapping[str, Any], name: str) -> str:
        if (fixed := _FORMATS.get(str(schema.get("format")))) is not None:
            return fixed
        if _WHOLE_PROMPT.search(name.lower()):
            text = prose.shorten(self._prompt, 200)
        elif self._words_left:
            text = self._words_left.pop(0)
        else:
            text = self._words[-1] if self._words else f"simulated {name or 'text'}"
        text = text.ljust(_whole(schema, "minLength", 0), ".")
        return text[: _whole(schema, "maxLength", len(text))]

    def _is_named(self, option: object) -> bool:
        if not isinstance(option, str):
            return False
        edge = r"\b" if option.isascii() else ""
        return bool(re.search(edge + re.escape(option) + edge, self._prompt, re.IGNORECASE))


def _mapping(schema: object, key: str) -> Mapping[str, Any]:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, dict) else {}


def _sequence(schema: object, key: str) -> Sequence[Any]:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, list) else ()


def _whole(schema: Mapping[str, Any], key: str, default: int) -> int:
    value = schema.get(key)
    return min(value, 10_000) if isinstance(value, int) and value >= 0 else default
