"""docs/from-lagent.md: its examples run, and its tables name everything that lagent has."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from harness import Start
from tokenwire.legacy import ModelStatusCode
from tokenwire.v1 import chat_service_pb2
from tokenwire_service.config import Config, load
from tokenwire_service.simulator import Simulator
from tokenwire_service.upstream.dialect import Route
from tokenwire_service.upstream.request import turns

DOC = Path(__file__).resolve().parents[2] / "docs/from-lagent.md"
TEXT = DOC.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(?:python|yaml) title=\"(\S+)\"\n(.*?)^```", TEXT, re.M | re.S)

# lagent at 16ca689e (August 2025). Arguments of GPTAPI, AsyncGPTAPI and BaseAPILLM.
ARGUMENTS = {
    *("model_type", "retry", "json_mode", "key", "org", "meta_template", "api_base", "proxies"),
    *("template_parser", "max_new_tokens", "top_p", "top_k", "temperature", "repetition_penalty"),
    *("stop_words", "skip_special_tokens", "**gen_params"),
}
# Of their methods, and what these look for in gen_params.
METHOD_ARGUMENTS = {
    *("inputs", "session_ids", "gen_params", "messages", "prompt", "prompts"),
    *("max_tokens", "session_id", "stream"),
}
METHODS = {
    *("chat", "stream_chat", "_chat", "_stream_chat", "generate_request_data", "tokenize"),
    *("generate", "stream_generate", "update_gen_params", "template_parser"),
}
ATTRIBUTES = {
    *("keys", "invalid_keys", "key_ctr", "orgs", "org_ctr", "url", "model_type", "proxies"),
    *("json_mode", "logger", "is_api", "meta_template", "retry", "gen_params"),
}
STATES = {
    "END": 0,
    "STREAM_ING": 1,
    "SERVER_ERR": -1,
    "SESSION_CLOSED": -2,
    "SESSION_OUT_OF_LIMIT": -3,
    "SESSION_INVALID_ARG": -4,
    "SESSION_READY": 2,
}


def rows(title: str, number: int = 0) -> list[list[str]]:
    """The cells of a table below a heading."""
    section = TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.M)
    lines = tables[number].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize(
    ("title", "number", "names"),
    [
        ("Every argument", 0, ARGUMENTS),
        ("Every argument", 1, METHOD_ARGUMENTS),
        ("Every method", 0, METHODS),
        ("Every status", 0, set(STATES)),
    ],
)
def test_the_tables_name_everything_once(title: str, number: int, names: set[str]) -> None:
    found = [row[0].strip("`") for row in rows(title, number)]
    assert sorted(found) == sorted(names)
    assert all(len(row[-1]) > 3 for row in rows(title, number))


def test_attributes_are_told() -> None:
    section = TEXT.split("\nAttributes:", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"`([a-z_]+)`", section)) >= ATTRIBUTES


def test_the_states_have_their_numbers_and_names() -> None:
    assert {state.name: state.value for state in ModelStatusCode} == STATES
    every = {name for name in chat_service_pb2.Snapshot.State.keys()}  # noqa: SIM118, C416
    told = {row[2].strip("`"): (row[0].strip("`"), int(row[1])) for row in rows("Every status")}
    assert set(told) == every - {"STATE_UNSPECIFIED"}
    assert dict(told.values()) == STATES
    comments = (DOC.parents[1] / "protos/tokenwire/v1/chat_service.proto").read_text()
    for name, (_, number) in told.items():
        assert re.search(rf"\({number}\)[^;]*\n\s+{name} = \d;", comments), name


def configuration(base_url: str) -> dict[str, Any]:
    """What the doc's files say together, with the simulator as their upstream."""
    merged: dict[str, Any] = {"listen": "127.0.0.1:0"}
    for title, text in BLOCKS:
        if title == "tokenwire.yaml":
            for name, section in yaml.safe_load(text).items():
                merged[name] = {**merged.get(name, {}), **section}
    merged["upstreams"]["openai"]["base_url"] = base_url
    return merged


@pytest.fixture
def config(simulator: tuple[Simulator, str], tmp_path: Path) -> Config:
    file = tmp_path / "tokenwire.yaml"
    file.write_text(yaml.safe_dump(configuration(simulator[1])))
    return load(file, {"OPENAI_API_KEY": "sk-test-k1,sk-test-k2"})


PRINTED = r"""\{.*\}
2
(?:STREAM_ING True\n)+END True
(?:True )+
True
(?:STREAM_ING True\n)+END True
4096
\d+
"""


async def test_the_examples_run(
    start: Start, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(config=config)
    monkeypatch.setenv("TOKENWIRE_TARGET", gateway.running.address)
    code = [text for title, text in BLOCKS if title == "after"]
    assert len(code) == 6
    out = io.StringIO()

    def run() -> None:
        names: dict[str, Any] = {"__name__": "example"}
        with contextlib.redirect_stdout(out):
            for snippet in code:
                exec(compile(snippet, str(DOC), "exec"), names)
        names["llm"].close()

    await asyncio.to_thread(run)
    assert re.fullmatch(PRINTED, out.getvalue(), re.S), out.getvalue()


def test_the_examples_before_are_what_was_written() -> None:
    for title, text in BLOCKS:
        if title == "before":
            compile(text, str(DOC), "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT


async def test_the_files_say_what_the_tables_say(config: Config) -> None:
    models = {model.name: model for model in config.models}
    old = models["internlm2-chat"]
    assert old.rename_parameters == {"repetition_penalty": "frequency_penalty"}
    assert msgspec.json.decode(old.extra_body) == {"skip_special_tokens": False}
    assert models["gpt-4o-mini"].max_completion_tokens == 4096, "what a model has that names none"


# --- role templates -----------------------------------------------------------------------

DEFAULT = [
    {"role": "system", "api_role": "system"},
    {"role": "user", "api_role": "user"},
    {"role": "assistant", "api_role": "assistant"},
    {"role": "environment", "api_role": "system"},
]
WRAPPED = [
    {"role": "system", "api_role": "system", "begin": "<sys>", "end": "</sys>"},
    {"role": "user", "api_role": "user", "begin": "<|User|>:", "end": "<eoh>\n"},
    {"role": "assistant", "api_role": "assistant", "end": "<eoa>"},
    {"role": "environment", "api_role": "user", "begin": "[env] "},
]

# (meta_template, dialog, what lagent's APITemplateParser returns for it).
PARSED: list[tuple[list[dict[str, str]], list[tuple[str, str]], list[tuple[str, str]]]] = [
    (DEFAULT, [("user", "a")], [("user", "a")]),
    (
        DEFAULT,
        [("system", "s"), ("environment", "e"), ("user", "a"), ("assistant", "b"), ("user", "c")],
        [("system", "s\ne"), ("user", "a"), ("assistant", "b"), ("user", "c")],
    ),
    (DEFAULT, [("user", "a"), ("user", ""), ("user", "b\n")], [("user", "a\n\nb\n")]),
    (
        WRAPPED,
        [("system", "s"), ("user", "a"), ("environment", "e"), ("assistant", ""), ("user", "b")],
        [
            ("system", "<sys>s</sys>"),
            ("user", "<|User|>:a<eoh>\n\n[env] e"),
            ("assistant", "<eoa>"),
            ("user", "<|User|>:b<eoh>\n"),
        ],
    ),
    (WRAPPED, [("environment", " e "), ("environment", "f")], [("user", "[env]  e \n[env] f")]),
]


@pytest.mark.parametrize("number", range(len(PARSED)))
def test_role_templates_write_what_lagent_writes(config: Config, number: int) -> None:
    """The expectations were made with lagent itself."""
    template, dialog, expected = PARSED[number]
    chat = chat_service_pb2.ChatRequest(model="m")
    for each in template:
        chat.role_templates.add(**each)
    for role, content in dialog:
        chat.messages.add(role=role, content=content)
    written = turns(chat, Route(config.upstreams[0], None, "m"))
    assert [(turn.role, turn.content) for turn in written] == expected
