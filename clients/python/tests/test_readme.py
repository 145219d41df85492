"""Every Python snippet of the README and every example runs, against a fake gateway."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenwire.testing import FakeGateway, tool_call

HERE = Path(__file__).parent.parent

WEATHER = tool_call("weather", {"city": "Rome"})

# Per section: the script of the gateway, and what all its snippets together print.
SECTIONS: dict[str, tuple[Callable[[FakeGateway], Any], str]] = {
    "Connect": (lambda gateway: gateway, ""),
    "Ask": (
        lambda gateway: (
            gateway.reply("Rayleigh.")
            .reply("Short waves.")
            .reply("Long way.")
            .reply('{"city": "Oslo", "degrees": -3}')
            .reply('{"city": "Rome", "degrees": 21.5}')
        ),
        "Rayleigh.\nstop 6 fake\nLong way.\n-3\nRome 21.5\n",
    ),
    "Stream": (
        lambda gateway: gateway.reply("Once", " upon").reply("a", " time"),
        "Once upon\n0.00 s, 2 tokens\na time",
    ),
    "asyncio": (lambda gateway: gateway.reply("Rayleigh.").reply("Red", "."), "Rayleigh.\nRed."),
    "Tools": (lambda gateway: gateway.reply(WEATHER).reply("Yes."), "Yes.\n"),
    "Cancel": (
        lambda gateway: gateway.hang("one two three ", "four five six"),
        "one two three four five six\n",
    ),
    "Errors": (
        lambda gateway: gateway.fail(
            "RATE_LIMITED", retry_after=1.5, metadata={"requestId": "r"}
        ).fail("UPSTREAM_STREAM_INTERRUPTED", after=["Once"]),
        "StatusCode.RESOURCE_EXHAUSTED\nRATE_LIMITED\n1.5\nr\n"
        "Once\n[UPSTREAM_STREAM_INTERRUPTED after 4 characters]\n",
    ),
    "Retries": (
        lambda gateway: gateway.fail("RATE_LIMITED", retry_after=0.01).reply("Hi!"),
        "Hi!\n",
    ),
    "Batch": (
        lambda gateway: (
            gateway.reply("2").reply("Oslo").reply("old pond").reply("2").reply("Oslo").reply("o")
        ),
        "2 haiku old pond\n1  Oslo\n0  2\n2\nOslo\no\n",
    ),
    "Tokens": (
        lambda gateway: gateway,
        "3\n[0, 1, 2] [b'How', b'many', b'tokens?']\n['gpt-4o-mini']\n",
    ),
    "Test your code": (lambda gateway: gateway, ""),
}


def snippets() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for part in re.split(r"^#{2,3} ", text, flags=re.MULTILINE)[1:]:
        title = part.splitlines()[0]
        code = re.findall(r"^```python\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
        if code:
            found[title] = code
    return found


def test_every_section_has_its_script() -> None:
    assert set(snippets()) == set(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_readme(
    title: str,
    gateway: FakeGateway,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOKENWIRE_TARGET", gateway.target)
    script, printed = SECTIONS[title]
    script(gateway)
    names: dict[str, Any] = {}
    exec(snippets()["Connect"][-1], names)
    for snippet in snippets()[title]:
        exec(compile(snippet, f"README.md, {title}", "exec"), names)
    names["client"].close()
    shown = re.sub(r"\d\.\d\d s", "0.00 s", capsys.readouterr().out)
    assert shown == printed


def run(name: str, gateway: FakeGateway, stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(HERE / "examples" / name)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TOKENWIRE_TARGET": gateway.target},
    )
    return done.returncode, done.stdout, done.stderr


def test_example_conversation(gateway: FakeGateway) -> None:
    gateway.reply("Hel", "lo").fail("CONTENT_FILTERED", message="no", after=["Wel"]).reply("Bye")
    code, out, err = run("conversation.py", gateway, "Hi\nWhat?\nBye\n")
    assert (code, err) == (0, "")
    assert out.startswith("> Hello\n> Wel [CONTENT_FILTERED: no (request ")
    assert out.endswith(")]\n> Bye\n> ")
    said = [message.content for message in gateway.calls[2].request.chat.messages]
    assert said == ["Hi", "Hello", "What?", "Wel", "Bye"]


def test_example_tools(gateway: FakeGateway) -> None:
    gateway.reply(WEATHER, tool_call("weather", '{"ci', id="c2", index=1)).reply("In Rome.")
    code, out, err = run("tools.py", gateway)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == '[weather {"city": "Rome"} -> 21]'
    assert out.endswith("In Rome.\n")
    assert "is not JSON" in gateway.calls[1].request.chat.messages[-1].content


def test_example_batch(gateway: FakeGateway) -> None:
    gateway.reply("one").fail("CONTENT_FILTERED", message="no").reply("three")
    code, out, err = run("batch.py", gateway, "1\n\n2\n3\n")
    assert (code, out) == (1, "2\t'three'\n0\t'one'\n")
    assert err.startswith("1\tCONTENT_FILTERED: no (request ")


def test_every_example_is_run() -> None:
    assert {path.stem for path in (HERE / "examples").glob("*.py")} == {
        "batch",
        "conversation",
        "tools",
    }
