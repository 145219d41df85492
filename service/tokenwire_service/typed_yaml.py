"""YAML text into msgspec Structs, with every problem found at once and placed by line.

Types drive the walk:

- a Struct, or an `Annotated` protobuf message with `extra={"fields": {name: Field}}`, is a
  mapping; fields whose Meta has `extra={"internal": True}` cannot be written;
- `tuple[S, ...]`, where S is a Struct with an internal field `name`, is a mapping from
  name to S;
- any other `tuple[T, ...]` or `frozenset[T]` is a list; where T's Meta has
  `extra={"source": <Struct>}`, an element may be a mapping that `expand` turns into any
  number of T;
- `Mapping[K, V]` is a mapping with free keys;
- a text whose Meta has `extra={"json": True}` is any mapping, read into the JSON that says the
  same;
- anything else is a leaf, converted strictly by msgspec. Its Meta says in `description` what
  is expected, may carry `extra={"parse": function}` that reads text first (ValueError:
  wrong), and with `extra={"hidden": True}` keeps the value out of problems.

Leaves follow YAML 1.1 but for two surprises: `1:30` is text, not 90, and there are no dates.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec
import yaml
from msgspec import UNSET, Meta, Struct
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_DEPTH = 32  # nesting of the text; the deepest schema needs 6
MAX_VALUES = 50_000  # values walked with aliases expanded: 1,000 models need some 20,000

Place = tuple[str | int, ...]
"""Where a value stands: names and list positions from the top."""

_Entries = dict[str, tuple[ScalarNode, Node]]  # key and value nodes by the key's text
_TAG = "tag:yaml.org,2002:"


class Field(NamedTuple):
    """One key a mapping may have."""

    type: Any
    required: bool


@cache
def file_fields(shape: type[Struct]) -> Mapping[str, Field]:
    """Return the fields of a Struct that can be written, by name."""
    return {
        f.name: Field(f.type, f.required)
        for f in msgspec.structs.fields(shape)
        if not unwrap(f.type).extra.get("internal")
    }


class Unwrapped(NamedTuple):
    """A type hint taken apart: `Annotated[tuple[T, ...], Meta(...)] | None` and the like."""

    type: Any  # with its Metas, without `| None`
    origin: Any
    args: tuple[Any, ...]
    optional: bool
    description: str
    extra: Mapping[str, Any]
    lengths: tuple[int, int | None]  # least and most elements


@cache
def unwrap(hint: Any) -> Unwrapped:
    """Take a type hint apart; where there are several Metas, the outer ones win."""
    metas: list[Meta] = []
    optional, bare = False, hint
    while True:
        origin = get_origin(bare)
        if origin is Annotated:
            bare, *more = get_args(bare)
            metas = [m for m in more if isinstance(m, Meta)] + metas
        elif origin in (Union, UnionType):
            optional = True
            (bare,) = (arg for arg in get_args(bare) if arg is not NoneType)
            hint = bare
        else:
            break
    return Unwrapped(
        type=hint,
        origin=origin or bare,
        args=get_args(bare),
        optional=optional,
        description=next((m.description for m in reversed(metas) if m.description), ""),
        extra={name: value for m in metas for name, value in (m.extra or {}).items()},
        lengths=(
            next((m.min_length for m in metas if m.min_length), 0),
            next((m.max_length for m in metas if m.max_length), None),
        ),
    )


def convert(value: object, hint: Any) -> Any:
    """Convert one leaf. Raises ValueError whose text is what was expected."""
    want = unwrap(hint)
    try:
        if isinstance(value, str):
            value.encode()  # a lone surrogate fits neither a protobuf string nor a header
        if parse := want.extra.get("parse"):
            value = parse(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("no range covers it")
        return msgspec.convert(value, want.type, strict=True)
    except (ValueError, OverflowError):  # msgspec.ValidationError is a ValueError
        raise ValueError(_expectation(want)) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean x?)`, or nothing where no known name is close."""
    plain = {re.sub("[_-]", "", word).lower(): word for word in known}  # fooBar is foo_bar
    wanted = re.sub("[_-]", "", name[:64]).lower()
    close = difflib.get_close_matches(wanted, list(plain), n=1, cutoff=0.6)
    return f" (did you mean {plain[close[0]]}?)" if close else ""


def path_text(place: Place) -> str:
    """Write a place as `upstreams.openai.keys[0]`, quoting names with dots or spaces."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if re.fullmatch(r"[\w/:-]{1,64}", part) else quoted(part)
            text += f".{shown}" if text else shown
    return text


class Reader:
    """Reads one document and collects what is wrong with it.

    `source` names the document in problems. `expand(value, place)` turns an element written
    as a mapping (see "source" above) into the elements it stands for. `secret_text` matches
    what must not stand in the document: such text is a problem, and is masked everywhere.

    `positions` has line and column of what was read, and may be added to: line 0 is outside
    the document. `elements` has, for each list, the places its elements came from.
    """

    def __init__(
        self,
        source: str,
        *,
        expand: Callable[[Any, Place], Iterable[Any]],
        secret_text: re.Pattern[str],
    ) -> None:
        self.problems: list[tuple[int, int, str]] = []  # line from 1, column, text
        self.positions: dict[Place, tuple[int, int]] = {(): (1, 0)}
        self.elements: dict[Place, list[Place]] = {}
        self._source = source
        self._expand = expand
        self._secret_text = secret_text
        self._entries_of: dict[int, _Entries] = {}
        self._values_left = MAX_VALUES

    # --- problems -------------------------------------------------------------------

    def where(self, place: Place) -> str:
        """Return `file:line: path`, with the line of the nearest value around it."""
        return self._where(self._position(place)[0], place)

    def _where(self, line: int, place: Place) -> str:
        document = f"{self._source}:{line}" if line else ""
        return ": ".join(filter(None, (document, path_text(place))))

    def problem(self, place: Place, got: str, expected: str, node: Node | None = None) -> None:
        """Report what is wrong at one place, on the line of `node` where that is nearer."""
        line, column = _mark(node) if node else self._position(place)
        where = self._where(line, place)
        self.report(line, column, f"{where}: got {got}, expected {expected}")

    def report(self, line: int, column: int, text: str) -> None:
        """Report a problem worded by the caller."""
        self.problems.append((line, column, self._secret_text.sub("***", text)))

    def _position(self, place: Place) -> tuple[int, int]:
        while place not in self.positions:
            place = place[:-1]
        return self.positions[place]

    # --- text to nodes --------------------------------------------------------------

    def _compose(self, text: str) -> Node | None:
        """Parse without building values. None: an empty document."""
        line, column = 1, 0
        try:
            root = yaml.compose(text, Loader=_BoundedLoader)
        except yaml.MarkedYAMLError as error:
            if mark := error.problem_mark or error.context_mark:
                line, column = mark.line + 1, mark.column
            got = (error.problem or error.context or "what cannot be parsed")[:200]
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            got = f"the unprintable character U+{error.character:04X}"
        except (ValueError, OverflowError):  # PyYAML on "\UFFFFFFFF" and on huge versions
            got = "an escape or a version number out of range"
        else:
            if root is not None:
                self._refuse_secrets(root)
            return root
        self.report(line, column, f"{self._source}:{line}: got {got}, expected YAML")
        raise _NotYamlError

    def _refuse_secrets(self, root: Node) -> None:
        seen, pending = set[int](), [root]
        while pending:
            node = pending.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, MappingNode):
                pending.extend(child for pair in node.value for child in pair)
            elif isinstance(node, SequenceNode):
                pending.extend(node.value)
            elif self._secret_text.search(node.value):
                self.problem(
                    (),
                    "what looks like a key",
                    "no secret in this file: name the environment variable or file that holds it",
                    node,
                )

    # --- nodes to values ------------------------------------------------------------

    def read(self, text: str, shape: type[Struct]) -> Any:
        """Read one document. Returns UNSET, with a problem, where it is no YAML or no mapping.

        Fields that could not be read have their default, or UNSET where there is none.
        """
        try:
            root = self._compose(text)
        except _NotYamlError:
            return UNSET
        try:
            return shape() if root is None else self._read(root, shape, ())
        except _TooManyValuesError:
            self.problem((), f"more than {MAX_VALUES} values, aliases expanded", "fewer")
            return UNSET

    def _read(self, node: Node, hint: Any, place: Place) -> Any:
        self._spend(1)
        want = unwrap(hint)
        message_fields = want.extra.get("fields")
        if message_fields or _is_struct(want):
            entries = self._mapping(node, want, place)
            if entries is None:
                return UNSET
            if not message_fields:
                return want.origin(**self._fields(entries, file_fields(want.origin), place))
            values = self._fields(entries, message_fields, place)
            return want.origin(**{name: v for name, v in values.items() if v is not UNSET})
        if want.extra.get("json"):
            return self._json_mapping(node, want, place)
        if want.origin is Mapping:
            return self._free_mapping(node, want, place)
        if want.origin in (tuple, frozenset):
            element = unwrap(want.args[0])
            if _is_struct(element) and "source" not in element.extra:
                return self._named(node, want, element.origin, place)
            return self._list(node, want, element, place)
        return self._leaf(node, hint, place)

    def _leaf(self, node: Node, hint: Any, place: Place) -> Any:
        want = unwrap(hint)
        if not isinstance(node, ScalarNode):
            self.problem(place, _kind(node), _expectation(want))
            return UNSET
        value = _scalar(node)
        if value is None and want.optional:
            return None
        try:
            return convert(value, hint)
        except ValueError as error:
            got = "a value that is not shown" if want.extra.get("hidden") else _show(node)
            self.problem(place, got, str(error))
            return UNSET

    def _fields(
        self, entries: _Entries, fields: Mapping[str, Field], place: Place
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, (key, node) in entries.items():
            inner = (*place, name)
            self.positions[inner] = _mark(node if isinstance(node, ScalarNode) else key)
            if name in fields:
                value = self._read(node, fields[name].type, inner)
                if value is not UNSET:
                    values[name] = value
            elif place or not name.startswith("x-"):
                expected = f"one of {', '.join(fields)}{did_you_mean(name, fields)}"
                self.problem(inner, "an unknown key", expected, key)
        for name, field in fields.items():
            if field.required and name not in values:
                values[name] = UNSET
                if name not in entries:
                    self.problem((*place, name), "nothing", _expectation(unwrap(field.type)))
        return values

    def _named(self, node: Node, want: Unwrapped, shape: type[Struct], place: Place) -> Any:
        entries = self._mapping(node, want, place)
        if entries is None:
            return UNSET
        name_hint = next(f.type for f in msgspec.structs.fields(shape) if f.name == "name")
        values = []
        for name, (key, child) in entries.items():
            inner = (*place, name)
            self.positions[inner] = _mark(key)
            self._leaf(key, name_hint, inner)
            fields = self._mapping(child, unwrap(shape), inner)
            if fields is not None:
                values.append(shape(name=name, **self._fields(fields, file_fields(shape), inner)))
        return tuple(values)

    def _free_mapping(self, node: Node, want: Unwrapped, place: Place) -> Any:
        entries = self._mapping(node, want, place)
        if entries is None:
            return UNSET
        values = {}
        for name, (key, child) in entries.items():
            inner = (*place, name)
            self.positions[inner] = _mark(key)
            read_key = self._leaf(key, want.args[0], inner)
            self.positions[inner] = _mark(child if isinstance(child, ScalarNode) else key)
            value = self._read(child, want.args[1], inner)
            if read_key is not UNSET and value is not UNSET:
                values[read_key] = value
        return values

    def _json_mapping(self, node: Node, want: Unwrapped, place: Place) -> Any:
        entries = self._mapping(node, want, place)
        if entries is None:
            return UNSET
        found = len(self.problems)
        values = self._json_members(entries, place)
        return json.dumps(values, ensure_ascii=False) if len(self.problems) == found else UNSET

    def _json_members(self, entries: _Entries, place: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, (key, child) in entries.items():
            inner = (*place, name)
            self.positions[inner] = _mark(child if isinstance(child, ScalarNode) else key)
            if not _is_text(name):
                self.problem(inner, quoted(name), "a name of Unicode characters", key)
            values[name] = self._json(child, inner)
        return values

    def _json(self, node: Node, place: Place) -> Any:
        """Any value as JSON has it; None, with a problem, for what JSON does not have."""
        self._spend(1)
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._json_members(self._entries(node, place), place)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self._json(child, (*place, i)) for i, child in enumerate(node.value)]
        value = _scalar(node) if isinstance(node, ScalarNode) else ...
        no_number = isinstance(value, float) and not math.isfinite(value)
        if value is ... or no_number or (isinstance(value, str) and not _is_text(value)):
            got = _show(node) if isinstance(node, ScalarNode) else _kind(node)
            self.problem(place, got, "a value that JSON has")
            return None
        return value

    def _list(self, node: Node, want: Unwrapped, element: Unwrapped, place: Place) -> Any:
        if not isinstance(node, SequenceNode) or node.tag != _TAG + "seq":
            if not _is_null(node):
                self.problem(place, _kind(node), "a list, each " + _expectation(element))
                return UNSET
            node = SequenceNode(_TAG + "seq", [], node.start_mark)
        self._spend(len(node.value))
        source = element.extra.get("source")
        values: list[Any] = []
        places = self.elements[place] = []
        for index, child in enumerate(node.value):
            inner = (*place, index)
            self.positions[inner] = _mark(child)
            more: list[Any]
            if source and isinstance(child, MappingNode):
                value = self._read(child, source, inner)
                more = [] if value is UNSET else list(self._expand(value, inner))
            elif _is_struct(element):
                self.problem(inner, _kind(child), _expectation(element))
                more = []
            else:
                value = self._read(child, want.args[0], inner)
                more = [] if value is UNSET else [value]
            values += more
            places += [inner] * len(more)
        least, most = want.lengths
        if len(node.value) < least or (most is not None and len(node.value) > most):
            expected = f"at least {least}" if len(node.value) < least else f"at most {most}"
            self.problem(place, f"{len(node.value)} elements", expected)
        return want.origin(values)

    def _mapping(self, node: Node, want: Unwrapped, place: Place) -> _Entries | None:
        if _is_null(node):  # a section whose lines are all commented out
            return {}
        if not isinstance(node, MappingNode) or node.tag != _TAG + "map":
            self.problem(place, _kind(node), _expectation(want))
            return None
        entries = self._entries(node, place)
        self._spend(len(entries))
        return entries

    def _entries(self, node: MappingNode, place: Place, merges: int = 0) -> _Entries:
        """Return key and value nodes by key, `<<` merged in: own keys win, then the first."""
        if id(node) in self._entries_of:
            return self._entries_of[id(node)]
        # Known before it is filled: a mapping merged into itself adds nothing.
        entries = self._entries_of[id(node)] = {}
        merged: dict[int, Node] = {}
        for key, value in node.value:
            self._spend(1)
            if key.tag == _TAG + "merge":
                parts = value.value if isinstance(value, SequenceNode) else [value]
                merged.update((id(part), part) for part in parts)
                self._spend(len(parts))
            elif not isinstance(key, ScalarNode):
                self.problem(place, f"{_kind(key)} as a key", "a name", key)
            elif key.value in entries:
                again = f"this key again, after line {_mark(entries[key.value][0])[0]}"
                self.problem((*place, key.value), again, "it once", key)
            else:
                entries[key.value] = (key, value)
        for part in merged.values():
            if not isinstance(part, MappingNode):
                self.problem(place, f"{_kind(part)} after <<", "a mapping", part)
            elif merges == MAX_DEPTH:
                self.problem(place, f"more than {MAX_DEPTH} merges in a row", "fewer", part)
            else:
                more = self._entries(part, place, merges + 1)
                self._spend(len(more))
                for name, pair in more.items():
                    entries.setdefault(name, pair)
        return entries

    def _spend(self, values: int) -> None:
        self._values_left -= values
        if self._values_left < 0:
            raise _TooManyValuesError


class _NotYamlError(Exception):
    pass


class _TooManyValuesError(Exception):
    pass


class _BoundedLoader(yaml.SafeLoader):
    """Composes nodes without recursing deeper than MAX_DEPTH."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]  # so in types-PyYAML
            raise yaml.composer.ComposerError(
                problem=f"more than {MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _is_struct(want: Unwrapped) -> bool:
    return isinstance(want.origin, type) and issubclass(want.origin, Struct)


def _mark(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column


def _expectation(want: Unwrapped) -> str:
    if want.description:
        return want.description
    if want.origin is Literal:
        return f"one of {', '.join(want.args)}"
    if want.origin in (tuple, frozenset):
        return "a list"
    return {bool: "true or false", str: "text (in quotes if it looks like something else)"}.get(
        want.origin, "a mapping"
    )


def _scalar(node: ScalarNode) -> object:
    """Return the Python value; the tag stands for a value that has none here."""
    build = yaml.constructor.SafeConstructor()
    try:
        match node.tag.removeprefix(_TAG):
            case "str" | "value":
                return node.value
            case "null":
                return None
            case "bool":
                return build.construct_yaml_bool(node)
            case "int" if ":" not in node.value:
                return build.construct_yaml_int(node)
            case "float" if ":" not in node.value:
                return build.construct_yaml_float(node)
            case "int" | "float":
                return node.value
    except (ValueError, KeyError, IndexError):
        pass  # an explicit tag over text that is no such thing, or 5,000 digits
    return ...


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and _scalar(node) is None


def _is_text(text: str) -> bool:
    """Whether it can be sent: a lone surrogate cannot."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _kind(node: Node) -> str:
    if isinstance(node, MappingNode):
        return "a mapping" if node.tag == _TAG + "map" else "a mapping with a tag"
    if isinstance(node, SequenceNode):
        return "a list" if node.tag == _TAG + "seq" else "a list with a tag"
    return "nothing" if _is_null(node) else "a single value"


def _show(node: ScalarNode) -> str:
    if _is_null(node) and not node.value:
        return "nothing"
    shown = quoted(node.value)
    return shown if node.tag == _TAG + "str" else shown.strip('"')


def quoted(text: str) -> str:
    """Write a text for a problem, if it is short and surely no URL with a password.

    It is whole or not there, so that who knows a secret can find and mask it.
    """
    if "@" in text or "?" in text:
        return "text that is not shown"
    if len(text) > 200:
        return f"a text of {len(text)} characters"
    return json.dumps(text, ensure_ascii=False)
