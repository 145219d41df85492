"""When the configuration file is read again, and what is kept of the one before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness import upstream
from tokenwire_service.config import Caller, Config, Limits, Log, Timeouts
from tokenwire_service.keyfiles import Look
from tokenwire_service.live import restrained
from tokenwire_service.reload import MOST_SKIPPED, ConfigFile, _found
from tokenwire_service.secret import Digest
from tokenwire_service.settings import RELOADED, Connections, Tls
from tokenwire_service.typed_yaml import file_fields

ROOT = Path(__file__).parents[2]
A, B, C = Look(b"a"), Look(b"b"), Look(b"c")
GONE = Look(problem="unreadable")


def seen(file: ConfigFile, *looks: Look) -> list[bool]:
    return [file.see(look) for look in looks]


def test_what_was_read_for_the_start_is_not_read_again() -> None:
    assert seen(ConfigFile(A), A, A, A) == [False] * 3


def test_a_change_is_read_once_two_looks_have_found_it() -> None:
    file = ConfigFile(A)
    assert seen(file, B, B, B) == [False, True, False]
    file.taken()
    assert seen(file, A, A) == [False, True]


def test_a_file_that_is_being_written_is_not_read() -> None:
    assert seen(ConfigFile(A), B, C, B, GONE, C, A, A) == [False] * 7


def test_of_files_of_tokens_nothing_is_kept_and_a_pipe_is_not_watched() -> None:
    there = {Path("f"): A, Path("t"): Look(b"a token"), Path("p"): Look(lasting=True)}
    found = _found(Path("f"), ("t",), there.__getitem__)
    assert found[0] == A
    assert len(found) == 2
    assert b"a token" not in found[1].content
    assert found != _found(Path("f"), ("t",), {**there, Path("t"): B}.__getitem__)
    assert _found(Path("f"), ("t", "p"), there.__getitem__) == (A,)


def test_who_asks_has_it_read_at_once() -> None:
    file = ConfigFile(A)
    assert file.see(A, asked=True)
    assert file.see(B, asked=True)
    assert not file.see(B)  # as it was read


def test_what_is_being_written_is_not_read_either_where_what_was_before_is_tried_again() -> None:
    file = ConfigFile(A)
    assert seen(file, B, B) == [False, True]
    file.refused()
    assert seen(file, C, A, C, C) == [False, False, False, True]


def test_what_was_refused_is_tried_again_more_and_more_seldom() -> None:
    file = ConfigFile(A)
    assert file.see(B, asked=True)
    tries = []
    file.refused()
    for number in range(1, 1000):
        if file.see(B):
            tries.append(number)
            file.refused()
    assert tries[:4] == [1, 3, 7, 15]
    assert tries[-1] - tries[-2] == MOST_SKIPPED


def test_another_content_ends_the_tries_of_the_one_before() -> None:
    file = ConfigFile(A)
    assert file.see(B, asked=True)
    for _ in range(5):
        file.refused()
    assert seen(file, C, C) == [False, True]
    file.taken()
    assert not any(seen(file, *[C] * 100))


# --- what stays until a restart ---------------------------------------------------------


def test_addresses_and_the_like_stay_and_are_named() -> None:
    before = Config(tls=Tls(certificate="a", key="b"))
    after = Config(
        listen="127.0.0.1:1",
        tls=Tls(certificate="a", key="c"),
        reflection=False,
        limits=Limits(message_bytes=2**20, in_flight=7),
        log=Log(format="json", level="debug"),
        connections=Connections(max_age=5.0),
        timeouts=Timeouts(total=5.0),
        callers=(Caller(name="a", tokens=(Digest.of("a-token-of-a"),)),),
        upstreams=(upstream("http://127.0.0.1:1/v1"),),
    )
    config, kept = restrained(before, after)
    assert set(kept) == {
        "listen",
        "tls.key",
        "reflection",
        "limits.message_bytes",
        "log.format",
        "connections.max_age",
    }
    assert config.listen == before.listen
    assert config.tls == before.tls
    assert config.limits == msgspec.structs.replace(before.limits, in_flight=7)
    assert (config.log.format, config.log.level) == (None, "debug")
    assert config.connections == before.connections
    assert config.timeouts == after.timeouts
    assert config.callers == after.callers
    assert config.upstreams == after.upstreams


def test_a_section_that_comes_or_goes_stays_as_it_was() -> None:
    tls = Tls(certificate="a", key="b")
    for before, after in ((Config(), Config(tls=tls)), (Config(tls=tls), Config())):
        assert restrained(before, after) == (before, ("tls",))


def _paths(shape: Any = Config, prefix: str = "") -> set[str]:
    found = set()
    for name, field in file_fields(shape).items():
        path = f"{prefix}{name}"
        found.add(path)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found |= _paths(field.type, f"{path}.")
    return found


def test_what_is_reloaded_exists() -> None:
    assert _paths() >= RELOADED


def test_the_documentation_says_what_takes_effect() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    listed = re.search(r"These take effect: (.*?)\. Every other", text, re.DOTALL)
    assert listed
    assert set(re.findall(r"`(.+?)`", listed[1])) == RELOADED


@pytest.mark.parametrize("same", [Config(), Config(upstreams=(upstream("http://u/v1"),))])
def test_the_same_changes_nothing(same: Config) -> None:
    assert restrained(same, same) == (same, ())
