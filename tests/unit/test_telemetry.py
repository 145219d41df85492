"""One record, one line, whatever stands in it."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from tokenwire_service.secret import Scrubber, Secret
from tokenwire_service.telemetry import (
    ABANDONED,
    AttemptEvent,
    CallEvent,
    LineFormatter,
    LogObserver,
    configure_logging,
    log_scrubber,
)

ROOT = Path(__file__).resolve().parents[2]

ATTEMPT = AttemptEvent(
    "r1",
    "openai",
    "m",
    "k1",
    429,
    "rate_limited",
    "slow_down",
    0.123456,
    number=2,
    reason="RATE_LIMITED",
    key_seconds=1.5,
    first_byte_seconds=0.25,
    first_token_seconds=0.5,
)
CALL = CallEvent("r1", "tokenwire.v1.ChatService/Chat", "OK", "", "", "m", 1, 7, 9, False, 1.5)


def record(fields: dict[str, Any], message: str = "call") -> logging.LogRecord:
    made = logging.LogRecord("tokenwire", logging.INFO, __file__, 1, message, None, None)
    made.created, made.msecs = 1_700_000_000.25, 250
    made.fields = fields
    return made


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the gateway's logger writes; all loggers are as before afterwards."""
    loggers = [logging.getLogger(name) for name in ("tokenwire", "aiohttp", "asyncio", "grpc")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield io.StringIO()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


# --- lines ------------------------------------------------------------------------------


def test_a_line_for_people_has_time_level_name_and_fields() -> None:
    line = LineFormatter(as_json=False).format(
        record({"model": "m", "reason": "", "none": None, "attempts": 0, "message": "two words"})
    )
    assert line == ('2023-11-14T22:13:20.250Z info    call model=m attempts=0 message="two words"')


def test_a_line_of_json_has_every_field() -> None:
    line = LineFormatter(as_json=True).format(record({"model": "模型", "reason": "", "n": 1}))
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "event": "call",
        "model": "模型",
        "reason": "",
        "n": 1,
    }
    assert "模型" in line


def test_a_map_is_an_object_in_json_and_one_word_for_people() -> None:
    labels = {"team": "search", "n": 2, "of": {"key": KEY}}
    made = record({"labels": labels, "none": {}})
    scrub = log_scrubber([Secret(KEY)])
    written = json.loads(LineFormatter(as_json=True, scrub=scrub).format(made))
    assert written["labels"] == {**labels, "of": {"key": scrub(KEY)}} != labels
    assert written["none"] == {}
    line = LineFormatter(as_json=False).format(record({"labels": {"team": "search"}, "none": {}}))
    assert line.endswith(' labels={"team":"search"}')
    line = LineFormatter(as_json=False).format(record({"labels": {"team": "a b=c"}}))
    assert json.loads(line.partition("labels=")[2]) == '{"team":"a b=c"}'


# Line breaks and terminal controls that JSON leaves as they are, beside those it does not.
NASTY = ["\n", "\r", "\x0b", "\x1b[2J", "\x7f", "\x85", "\x9b2J", "\u2028", "\u2029", "\ud83d"]
values = st.lists(st.one_of(st.text(max_size=5), st.sampled_from([*NASTY, " ", "=", '"'])))


@given(values.map("".join), st.booleans(), st.booleans())
def test_no_value_can_forge_a_line_or_reach_the_terminal(
    value: str, as_json: bool, in_message: bool
) -> None:
    made = (
        record({"v": value}, message=value.replace("%", "")) if in_message else record({"v": value})
    )
    line = LineFormatter(as_json).format(made)
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode()
    if as_json:
        assert json.loads(line)["v"] == value


@given(st.text(max_size=20))
def test_no_value_can_pose_as_another_field(value: str) -> None:
    line = LineFormatter(as_json=False).format(record({"v": value, "last": "x"}))
    shown = line.partition(" call ")[2].removesuffix("last=x").rstrip()
    if shown:
        text = shown.removeprefix("v=")
        assert text in (value, json.dumps(value, ensure_ascii=False)) or json.loads(text) == value
        assert " " not in text or text.startswith('"')


def test_what_json_cannot_write_is_written_as_text() -> None:
    line = LineFormatter(as_json=True).format(record({"v": {1}, "w": ValueError("x")}))
    assert json.loads(line)["v"] == "{1}"
    assert json.loads(line)["w"] == "x"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_trace_comes_with_its_record(as_json: bool) -> None:
    made = record({}, message="defect")
    try:
        raise ValueError("what went wrong")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    text = LineFormatter(as_json).format(made)
    trace = json.loads(text)["trace"] if as_json else text.partition("\n")[2]
    assert trace.startswith("Traceback")
    assert trace.endswith("ValueError: what went wrong")
    assert as_json == ("\n" not in text)


# --- secrets ----------------------------------------------------------------------------

KEY = "sk-\"1'\\n-hidden"  # visible ASCII, with all that JSON and Python write in another way


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("quoted", [KEY, json.dumps(KEY), repr(KEY), str([KEY]), f"x{KEY}y{KEY}"])
def test_no_secret_shows_whoever_wrote_it(quoted: str, as_json: bool) -> None:
    made = record({"v": quoted, "w": [KEY], "n": 1}, message=f"with {quoted}".replace("%", ""))
    try:
        raise ValueError(quoted)
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    text = LineFormatter(as_json, log_scrubber([Secret("other-secret"), Secret(KEY)])).format(made)
    assert "***" in text
    assert "hidden" not in text
    assert "sk-" not in text


def test_the_longest_secret_is_found_first() -> None:
    scrub = Scrubber([Secret("key-1"), Secret("key-12"), Secret("")])
    assert scrub("key-12 key-1 key") == "*** *** key"


def test_words_too_short_for_keys_stay() -> None:
    secrets = [Secret("none"), Secret("sk-12345")]
    line = LineFormatter(as_json=False, scrub=log_scrubber(secrets)).format(
        record({"v": "none/sk-12345"})
    )
    assert line.endswith("v=none/***")
    assert Scrubber(secrets, shortest=5)("none/sk-12345") == "none/***"


def test_what_libraries_warn_of_goes_the_same_way(log: io.StringIO) -> None:
    configure_logging("error", as_json=True, stream=log, scrub=log_scrubber([Secret("sk-12345")]))
    for name in ("aiohttp.client", "asyncio", "grpc._cython"):
        logging.getLogger(name).info("nothing to tell")
        logging.getLogger(name).warning("about sk-12345")
    assert [json.loads(line)["event"] for line in log.getvalue().splitlines()] == ["about ***"] * 3


# --- events -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "title"), [(AttemptEvent, "attempt"), (CallEvent, "call")])
def test_the_page_on_events_tells_every_field(
    kind: type[AttemptEvent | CallEvent], title: str
) -> None:
    page = (ROOT / "docs/events.md").read_text(encoding="utf-8")
    part = page.partition(f"## {title}\n")[2].partition("## ")[0]
    told = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", part, re.MULTILINE)))
    assert sorted(told) == sorted(kind.__struct_fields__)


@pytest.mark.parametrize("event", [ATTEMPT, CALL])
def test_what_was_recorded_does_not_change(event: AttemptEvent | CallEvent) -> None:
    with pytest.raises(AttributeError):
        event.seconds = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (ATTEMPT, "warning"),
        (replace(ATTEMPT, fault="", upstream_code=""), "debug"),
        (replace(ATTEMPT, fault=ABANDONED), "debug"),
        (CALL, "info"),
        (replace(CALL, code="UNAVAILABLE", reason="UPSTREAM_ERROR"), "info"),
        (replace(CALL, code="INTERNAL", reason="INTERNAL"), "error"),
    ],
)
def test_an_event_is_logged_at_the_level_of_its_weight(
    log: io.StringIO, event: AttemptEvent | CallEvent, level: str
) -> None:
    observer = LogObserver(configure_logging("debug", as_json=True, stream=log))
    if isinstance(event, AttemptEvent):
        observer.attempt(event)
    else:
        observer.call(event)
    [line] = log.getvalue().splitlines()
    written = json.loads(line)
    assert written["level"] == level
    assert written["event"] == ("attempt" if isinstance(event, AttemptEvent) else "call")
    assert written["request_id"] == "r1"


def test_every_field_of_an_event_is_in_its_line(log: io.StringIO) -> None:
    LogObserver(configure_logging("info", as_json=True, stream=log)).attempt(ATTEMPT)
    written = json.loads(log.getvalue())
    assert {k: written[k] for k in asdict(ATTEMPT)} == {**asdict(ATTEMPT), "seconds": 0.1235}


def test_what_is_below_the_level_is_not_written(log: io.StringIO) -> None:
    observer = LogObserver(configure_logging("warning", as_json=False, stream=log))
    observer.call(CALL)
    observer.attempt(replace(ATTEMPT, fault=""))
    assert log.getvalue() == ""
    observer.attempt(ATTEMPT)
    assert "fault=rate_limited" in log.getvalue()


def messages(log: io.StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in log.getvalue().splitlines()]


async def test_lines_of_a_running_loop_are_written_a_moment_later_in_their_order() -> None:
    log = Writes()
    logger = configure_logging("info", as_json=True, stream=log)
    logger.info("one")
    logging.getLogger("aiohttp").warning("two")
    logger.info("three")
    assert log.writes == 0
    while not log.writes:
        await asyncio.sleep(0.01)
    assert messages(log) == ["one", "two", "three"]
    assert log.writes == 1
    logger.info("four")  # another moment begins
    while log.writes == 1:
        await asyncio.sleep(0.01)
    assert messages(log)[3:] == ["four"]


async def test_an_error_is_written_at_once_with_all_that_was_held() -> None:
    log = Writes()
    logger = configure_logging("info", as_json=True, stream=log)
    logger.info("before")
    logger.error("defect")
    assert messages(log) == ["before", "defect"]


async def test_what_is_held_is_bounded() -> None:
    log = Writes()
    logger = configure_logging("info", as_json=True, stream=log)
    for number in range(1000):
        logger.info("%d", number)
        assert number - len(messages(log)) < 256
    assert log.writes == 1000 // 256


async def test_another_thread_writes_at_once() -> None:
    log = Writes()
    logger = configure_logging("info", as_json=True, stream=log)
    logger.info("held")
    await asyncio.to_thread(logger.info, "at once")
    assert messages(log) == ["held", "at once"]


async def test_a_line_for_people_is_not_held() -> None:
    log = io.StringIO()
    configure_logging("info", as_json=False, stream=log).info("now")
    assert "now" in log.getvalue()


async def test_what_is_held_is_written_when_the_process_ends() -> None:
    log = Writes()
    logger = configure_logging("info", as_json=True, stream=log)
    logger.info("last")
    logger.handlers[0].flush()  # as logging.shutdown, which Python calls
    assert messages(log) == ["last"]


async def test_the_time_of_a_line_is_that_of_its_event() -> None:
    log = Writes()
    logger = configure_logging("info", as_json=True, stream=log)
    logger.info("held")
    [record] = logger.handlers[0]._held  # type: ignore[attr-defined]
    record.created, record.msecs = 1_700_000_000.25, 250
    logger.handlers[0].flush()
    assert json.loads(log.getvalue())["time"] == "2023-11-14T22:13:20.250Z"


async def test_a_record_that_cannot_be_written_costs_no_other_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log = Writes()
    logger = configure_logging("info", as_json=True, stream=log)
    logger.info("%d", "no number")
    logger.info("good")
    logger.handlers[0].flush()
    assert messages(log) == ["good"]


class Writes(io.StringIO):
    """Counts writes that say something."""

    writes = 0

    def write(self, text: str) -> int:
        self.writes += bool(text)
        return super().write(text)


def test_configuring_again_does_not_write_twice(log: io.StringIO) -> None:
    configure_logging("info", as_json=False, stream=io.StringIO())
    logger = configure_logging("info", as_json=False, stream=log)
    logger.info("once")
    assert log.getvalue().count("once") == 1
    assert not logger.propagate


def test_a_scrubber_learns_new_secrets_and_remembers_the_last_old_ones() -> None:
    scrub = Scrubber([Secret("old-key")])
    scrub.replace([Secret("new-key")])
    assert scrub("old-key new-key") == "*** ***"
    for number in range(999):
        scrub.replace([Secret(f"key-{number}.")])
    assert scrub("old-key new-key key-0. key-998.") == "*** *** *** ***"
    for number in range(2):
        scrub.replace([Secret("back"), Secret(f"more-{number}.")])
    assert scrub("old-key new-key key-0. key-998.") == "old-key new-key *** ***"
    scrub.replace([])
    assert scrub("back more-1.") == "*** ***"
