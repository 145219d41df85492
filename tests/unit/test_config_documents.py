"""Configuration: the documents and the example have every field, and say what holds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from configured import UPSTREAM, load_text, make_certificates, write_tokenizer

from tokenwire_service.config import (
    Config,
    ConfigError,
    load,
)
from tokenwire_service.settings import PARAMETERS
from tokenwire_service.typed_yaml import convert, file_fields, unwrap

pytestmark = pytest.mark.usefixtures("own_folder")
ROOT = Path(__file__).parents[2]


def _file_paths(shape: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, bool, Any]]:
    """Every field that can be written: path, type, whether required, default."""
    defaults = {f.name: f for f in msgspec.structs.fields(shape)}
    for name, field in file_fields(shape).items():
        path, want = f"{prefix}{name}", unwrap(field.type)
        yield path, field.type, field.required, defaults[name].default
        element = unwrap(want.args[0]) if want.origin is tuple else None
        if isinstance(want.origin, type) and issubclass(want.origin, msgspec.Struct):
            yield from _file_paths(want.origin, f"{path}.")
        elif element and "source" in element.extra:
            yield from _file_paths(element.extra["source"], f"{path}[].")
        elif element and issubclass(element.origin, msgspec.Struct):
            yield from _file_paths(element.origin, f"{path}.<name>.")


def _documented() -> dict[str, tuple[str, str]]:
    """Fields in docs/configuration.md: path -> value and default, as its tables have them."""
    rows = re.findall(
        r"^\| `([^`]+)` \| (.*?) \| (.*?) \| .+ \|$",
        (ROOT / "docs/configuration.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len({path for path, *_ in rows}) == len(rows)
    return {path: (value, default) for path, value, default in rows}


def test_the_documentation_has_every_field_and_no_other() -> None:
    assert sorted(_documented()) == sorted(path for path, *_ in _file_paths())


@pytest.mark.parametrize(("path", "hint", "required", "default"), list(_file_paths()))
def test_the_documentation_has_ranges_and_defaults(
    path: str, hint: Any, required: bool, default: Any
) -> None:
    value, shown = _documented()[path]
    want = unwrap(hint)
    assert (shown == "required") == required
    for words in (r"from \S+ to \S+$", r"one of .*$"):
        if stated := re.search(words, want.description):
            assert "GenerationParams" in value or stated[0] in value
    if want.origin not in (tuple, frozenset) and shown.startswith("`") and " " not in shown:
        assert convert(yaml.safe_load(shown.strip("`")), hint) == default
    elif not required and "mapping" not in value:
        assert not default or default is msgspec.NODEFAULT


@pytest.mark.parametrize("path", list(PARAMETERS))
def test_the_contract_has_every_range_of_the_defaults(path: str) -> None:
    """A value just inside each stated range loads; one outside does not."""
    proto = (ROOT / "protos/tokenwire/v1/chat.proto").read_text(encoding="utf-8")
    comment = re.search(rf"((?:  //[^\n]*\n)+)  [\w <>,]*\b{path} = \d+;", proto)
    assert comment
    text = re.sub(r"\s*//\s*", " ", comment[1])
    stated = re.search(r"Range(?: of the bias)?: ([\[(])(-?\d+), (-?\d*)([\])])", text)
    if not stated:
        assert path not in ("temperature", "top_p", "top_k", "min_p", "logit_bias")
        return
    low, high = int(stated[2]), int(stated[3] or 2**31 - 1)
    whole = path not in ("temperature", "top_p", "min_p") and "penalty" not in path
    step = 1 if whole else 0.001

    def accepted(value: float) -> bool:
        written: Any = {7: value} if path == "logit_bias" else value
        text = yaml.safe_dump({"models": {"m": {"upstream": "u", "defaults": {path: written}}}})
        try:
            return load_text(UPSTREAM + text).models[0].defaults.ByteSize() > 0
        except ConfigError:
            return False

    assert accepted(low) == (stated[1] == "[")
    assert accepted(low + step)
    assert not accepted(low - step)
    assert accepted(high)
    if stated[3]:
        assert not accepted(high + step)


EXAMPLE = ROOT / "deploy/tokenwire.example.yaml"
EXAMPLE_ENVIRON = {
    "OPENAI_API_KEY": "a,b",
    "OPENAI_API_KEY_TEAM_A": "c",
    "OPENAI_ORG_ID": "org-x",
    "LOCAL_API_KEY": "none",
    "AZURE_API_KEY": "d",
}


def test_the_example_loads() -> None:
    config = load(EXAMPLE, EXAMPLE_ENVIRON)
    assert config.warnings == ()
    assert [len(upstream.keys) for upstream in config.upstreams] == [3, 1, 1]


def test_the_example_has_every_field() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    # What is commented out holds as well.
    text = text.replace("# - {file:", "- {file:").replace("# tokenizer_file:", "tokenizer_file:")
    text = re.sub(r"^# (tls:|callers:|redis:|  )", r"\1", text, flags=re.MULTILINE)
    write_tokenizer()
    Path("secrets").mkdir()
    Path("secrets/openai-keys").write_text("d\ne\n")
    Path("secrets/search-tokens").write_text("search-token-one\n")
    make_certificates(Path("tls"))
    environ = {**EXAMPLE_ENVIRON, "SEARCH_TOKENS": "search-token-two", "REDIS_PASSWORD": "pass"}
    config = load_text(text, environ)
    assert [(caller.name, len(caller.tokens)) for caller in config.callers] == [("search", 2)]
    assert [key.id for key in config.upstreams[0].keys][-2:] == ["team-b-1", "team-b-2"]

    written: set[str] = set()

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                at = "<name>" if path in ("upstreams", "models", "callers") else name
                walk(inner, f"{path}.{at}" if path else at)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, f"{path}[]")
        written.update((path, path.removesuffix("[]")))

    walk(yaml.safe_load(text), "")
    other = re.sub(r"proxy: http\S+", "", text).replace("# proxy_env:", "proxy_env:")
    proxied = load_text(other, {**environ, "LOCAL_PROXY": "http://proxy:3128"})
    assert proxied.upstreams[1].proxy == "http://proxy:3128"
    walk(yaml.safe_load(other), "")
    assert {path for path, *_ in _file_paths()} <= written


def test_what_the_example_calls_defaults_are_defaults() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    shared = text[: text.index("\nupstreams:")].replace("format: json", "format: ~")
    shared = shared.replace("listen: 127.0.0.1:50052", "listen: ~")
    shared = re.sub(r"listen: 127.0.0.1:(?:50053|50054|9464)", "listen: off", shared)
    shared = shared.replace("endpoint: http://127.0.0.1:4317", "endpoint: ~")
    config = load_text(shared, {"OPENAI_API_KEY": "a"})
    assert config == load(None, {"OPENAI_API_KEY": "a"})
