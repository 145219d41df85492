"""Configuration: whatever is given loads or says why, and shows no key."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tokenwire_service.config import (
    Config,
    ConfigError,
    load,
)

pytestmark = pytest.mark.usefixtures("own_folder")


PLANTED = "sk-planted-0123456789abcdef"
WORDS = [
    *("listen", "limits", "upstreams", "models", "u", "base_url", "keys", "env", "file", "K", "id"),
    *("organizations", "passthrough", "headers", "timeouts", "idle", "role_templates", "role"),
    *("fallback_role", "defaults", "stop", "logit_bias", "aliases", "upstream", "http://u/v1"),
    *("30s", "32MiB", "<<", "x-a", "/", ".", "unsupported_parameters", "top_k", "a\ud800", PLANTED),
]
LEAVES = (
    st.sampled_from(WORDS)
    | st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4) | st.integers(), inner)
    ),
    max_leaves=30,
)


def _load_any(text: str) -> Config | None:
    """Load; None where problems say why not. Nothing shows what was planted."""
    Path("any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    config: Config | None = None
    found: tuple[str, ...] = ()
    try:
        config = load(Path("any.yaml"), {"K": PLANTED, "OPENAI_API_KEY": PLANTED})
    except ConfigError as error:
        found = error.problems
    assert (config is None) == bool(found)
    assert all(re.match(r"any\.yaml(:\d+)?: |environment\.", problem) for problem in found)
    assert PLANTED not in repr(config) + "".join(found)
    assert "".join(found).isprintable()
    return config


ANYTHING = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


VALID: dict[str, Any] = {
    "log": {"format": "text"},
    "limits": {"message_bytes": "1MiB"},
    "timeouts": {"total": "3s"},
    "retries": {"budget": 0.5},
    "upstreams": {
        "u": {
            "base_url": "http://u/v1",
            "keys": [{"env": "K", "id": "k", "organization": "o"}],
            "organizations": ["o"],
            "headers": {"X-A": "b"},
            "passthrough": True,
        }
    },
    "models": {
        "m": {
            "upstream": "u",
            "aliases": ["a"],
            "defaults": {"stop": ["x"], "logit_bias": {"5": 1.5}, "seed": 3},
            "role_templates": [{"role": "r", "fallback_role": "s"}, {"role": "s"}],
            "unsupported_parameters": ["top_k"],
        }
    },
}


def _replace_somewhere(tree: Any, draw: Any) -> Any:
    """The tree with one value, at any depth, replaced by anything."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 4)) == 0:
        return draw(LEAVES | TREES)
    if isinstance(tree, list):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], _replace_somewhere(tree[at], draw), *tree[at + 1 :]]
    name = draw(st.sampled_from(list(tree)))
    return {**tree, name: _replace_somewhere(tree[name], draw)}


@st.composite
def almost_valid(draw: Any) -> Any:
    tree: Any = VALID
    for _ in range(draw(st.integers(1, 3))):
        tree = _replace_somewhere(tree, draw)
    return tree


def test_the_tree_to_start_from_is_valid() -> None:
    assert _load_any(json.dumps(VALID).replace('"5":', "5:")) is not None


@ANYTHING
@given(TREES | almost_valid())
@example({"upstreams": {"u": {"base_url": "http://u", "keys": [{"env": "K"}], PLANTED: PLANTED}}})
@example({"upstreams": {"u": {"base_url": "http://u", "keys": [{"file": PLANTED}]}}})
def test_any_structure_loads_or_says_why(tree: Any) -> None:
    _load_any(json.dumps(tree).replace('"5":', "5:"))  # JSON is YAML
    _load_any(yaml.safe_dump(tree).replace("'5':", "5:"))


@ANYTHING
@given(
    st.lists(
        st.sampled_from(
            [
                *WORDS[:20],
                *":-[]{},&*!|>%@#'\"?~\\\n\t ",
                "\n  ",
                "&a",
                "*a",
                "!!int ",
                "!!float ",
                "!!timestamp ",
                "%YAML 1",
                "<<: ",
                '"\\U',
                "---",
                "9999",
            ]
        ),
        max_size=40,
    )
)
@example(["%YAML 1.", "9" * 5000, "\n---\na: 1"])
@example(["!!float ", '""'])
def test_any_text_loads_or_says_why(parts: list[str]) -> None:
    _load_any("".join(parts))


@ANYTHING
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=20), st.text(max_size=20))
def test_any_environment_loads_or_says_why(keys: str, url: str, orgs: str, listen: str) -> None:
    environ = {"OPENAI_API_KEY": keys, "OPENAI_BASE_URL": url, "OPENAI_ORG_ID": orgs}
    config: Config | None = None
    found: tuple[str, ...] = ()
    try:
        config = load(None, {**environ, "TOKENWIRE_LISTEN": listen})
    except ConfigError as error:
        found = error.problems
    assert (config is None) == bool(found)
    for upstream in config.upstreams if config else ():
        assert upstream.keys
        for key in upstream.keys:
            assert re.fullmatch("[!-~]+", key.secret.reveal())
