"""`tokenwire top`, as a person and as a pipe see it, beside a gateway on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console

from harness import receive, request, simulate, stream_request, until
from processes import COMMAND, Program, ended, environment, serve, write_config
from tokenwire.admin.v1 import admin_service_pb2
from tokenwire_service.simulator import Simulator
from tokenwire_service.top import sparkline, view


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Program]:
    """One that has answered and refused."""
    async with Simulator(tokens_per_second=0).serving() as url:
        config = write_config(tmp_path, url, admin={"listen": "127.0.0.1:0"})
        async with serve("--config", config, TEST_KEY="sk-test-k1,sk-test-k2") as started:
            for fault in ({}, {"fault": "rate_limited", "keys": ["t-k1"], "retry_after_s": 60}):
                asked = request(extra_body_json=simulate(tokens=3, **fault))
                for _ in range(2):
                    await receive(started.chat.StreamChat(stream_request(asked)))
            yield started


def admin(gateway: Program) -> str:
    found = gateway.event("serving")
    assert found is not None
    return str(found["admin"])


async def test_one_view_goes_into_a_pipe(gateway: Program) -> None:
    await asyncio.sleep(1.1)
    top = await ended("top", "--once", "--target", admin(gateway), COLUMNS="140")
    assert await top.exit_code() == 0
    assert "\x1b" not in top.out
    assert "calls running" in top.out
    assert "test  0 of 1000 slots" in top.out
    assert "cooling for" in top.out
    assert "(rate_limited)" in top.out
    assert "sk-test" not in top.out


async def test_it_lives_in_a_terminal_until_ctrl_c_and_leaves_it_as_it_was(
    gateway: Program,
) -> None:
    ours, theirs = pty.openpty()
    top = subprocess.Popen(
        [COMMAND, "top", "--interval", "0.1", "--target", admin(gateway)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm-256color", COLUMNS="100", LINES="30"),
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = b""

    def shown(*texts: bytes) -> bool:
        nonlocal seen
        with contextlib.suppress(OSError):  # nothing to read, or the other end is closed
            seen += os.read(ours, 1 << 16)
        return all(text in seen for text in texts)

    try:
        await until(lambda: shown(b"\x1b[?1049h", b"calls running", b"cooling"))
        frames = seen.count(b"calls running")
        await until(lambda: shown() and seen.count(b"calls running") > frames)
        top.send_signal(signal.SIGINT)
        await until(lambda: (shown() or True) and top.poll() is not None)
        assert top.returncode == 0
        shown()
        assert b"\x1b[?1049l" in seen
        assert b"\x1b[?25h" in seen
        assert b"Traceback" not in seen
    finally:
        if top.poll() is None:
            top.kill()
        top.wait()
        os.close(ours)


async def test_it_says_that_the_gateway_has_ended(gateway: Program) -> None:
    command = [COMMAND, "top", "--interval", "0.1", "--target", admin(gateway)]
    top = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(COLUMNS="80")
    )
    await asyncio.sleep(1.5)
    gateway.signal(signal.SIGINT)
    async with asyncio.timeout(20):
        _, told = await top.communicate()
    assert top.returncode == 1
    assert told.decode() == f"tokenwire top: the gateway at {admin(gateway)} has ended\n"


async def test_where_nobody_answers_one_line_says_so() -> None:
    top = await ended("top", "--once", "--target", "127.0.0.1:1")
    assert await top.exit_code() == 1
    assert top.out == ""
    assert len(top.lines) == 1
    assert top.lines[0].startswith("tokenwire top: no gateway answers at 127.0.0.1:1")


@pytest.mark.parametrize("interval", ["0", "0.05", "61", "nan"])
async def test_an_interval_out_of_range_is_refused(interval: str) -> None:
    top = await ended("top", "--interval", interval)
    assert await top.exit_code() == 2
    assert "--interval takes 0.1 to 60 seconds" in top.lines[0]


def listing(keys: int, upstreams: int = 1) -> admin_service_pb2.ListKeysResponse:
    return admin_service_pb2.ListKeysResponse(
        gateway=admin_service_pb2.Gateway(version="1", slots=10),
        upstreams=[
            admin_service_pb2.Upstream(
                name=f"u{number}",
                keys=[
                    admin_service_pb2.Key(
                        id=f"key-{number}-{n}[red]", state=admin_service_pb2.KEY_STATE_READY
                    )
                    for n in range(keys)
                ],
            )
            for number in range(upstreams)
        ],
    )


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("height", [10, 24, 60])
@pytest.mark.parametrize(("keys", "upstreams"), [(1, 1), (100, 1), (3, 30)])
def test_it_fits_the_window_and_says_what_it_leaves_out(
    width: int, height: int, keys: int, upstreams: int
) -> None:
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    seconds = [admin_service_pb2.Second(number=n, in_flight=n, deltas=n) for n in range(300)]
    console.print(view(listing(keys, upstreams), seconds, width, height))
    lines = console.export_text().splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    whole = "\n".join(lines)
    if f"key-{upstreams - 1}-{keys - 1}[red]" not in whole:
        assert "more keys" in whole or "more upstreams" in whole


def test_bars_tell_the_last_values_by_their_height() -> None:
    assert sparkline([], 4) == "    "
    assert sparkline([0, 1, 2, 4, 8], 4) == "▁▂▄█"
    assert sparkline([0, 0], 3) == "   "
    assert sparkline([5], 0) == ""
    assert sys.getsizeof(sparkline([1] * 10_000, 60)) < 1000
