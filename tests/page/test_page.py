"""The status page as a real browser draws it: headless Chromium, from Debian's packages."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness import receive, request, simulate, stream_request, until
from processes import Program, serve, write_config
from tokenwire_service.simulator import Simulator


@pytest.fixture
def chromium() -> str:
    """The program. Missing, it fails CI."""
    found = shutil.which("chromium")
    if found is None:
        missing = "the status page needs chromium: `make setup-page` installs it, as root"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Program]:
    """One that has worked for three seconds: answers, a rate limit, a key that was rejected."""
    async with Simulator(tokens_per_second=0).serving() as url:
        config = write_config(
            tmp_path,
            url,
            admin={"listen": "off"},
            status_page={"listen": "127.0.0.1:0"},
            retries={"max_attempts": 1},
        )
        keys = ",".join(f"sk-test-number-{n}" for n in range(1, 4))
        async with serve("--config", config, TEST_KEY=keys) as started:
            faults = (
                {"tokens": 40, "tokens_per_second": 100, "first_token_ms": 50},
                {"fault": "rate_limited", "keys": ["er-1"], "retry_after_s": 100},
                {"fault": "invalid_api_key", "keys": ["er-2"]},
            )
            for _ in range(3):
                for fault in faults:
                    for _ in range(3):
                        asked = stream_request(request(extra_body_json=simulate(**fault)))
                        await receive(started.chat.StreamChat(asked))
                await asyncio.sleep(0.5)
            yield started


def page(gateway: Program) -> str:
    found = gateway.event("serving")
    assert found is not None
    return f"http://{found['status_page']}/"


async def browse(chromium: str, folder: Path, *arguments: str) -> tuple[str, str]:
    """(standard output, standard error with the page's own errors)."""
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    browser = await asyncio.create_subprocess_exec(
        chromium,
        *options,
        f"--user-data-dir={folder}/profile",
        "--enable-logging=stderr",
        "--virtual-time-budget=2500",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, told = await browser.communicate()
    finally:
        if browser.returncode is None:
            browser.kill()
            await browser.wait()
    return out.decode(), told.decode()


async def test_it_draws_plots_and_keys_without_a_complaint(
    chromium: str, gateway: Program, tmp_path: Path
) -> None:
    dom, told = await browse(chromium, tmp_path, "--dump-dom", page(gateway))
    assert "CONSOLE" not in told, told
    assert dom.count("<svg") == 6
    drawn = re.findall(r'<path d="(M[^"]+)"', dom)
    assert len(drawn) == 9
    assert "NaN" not in dom
    assert "undefined" not in dom
    assert len(re.findall("<tr>", dom)) == 4  # the names of the columns, and three keys
    for text in (">partly<", "cooling for", ">retired<", ">ready<", "rate_limited", "key_rejected"):
        assert text in dom, text
    assert "Connecting" not in dom
    assert "sk-test" not in dom


async def test_it_says_what_is_wrong_with_the_configuration(
    chromium: str, gateway: Program, tmp_path: Path
) -> None:
    (tmp_path / "tokenwire.yaml").write_text("limits: {in_flight: 0}\nnonsense: 1")
    gateway.signal(signal.SIGHUP)
    await until(lambda: gateway.event("configuration refused") is not None)
    dom, told = await browse(chromium, tmp_path, "--dump-dom", page(gateway))
    assert "CONSOLE" not in told, told
    said = re.findall(r'<p class="lost">(Configuration[^<]+)<', dom)
    assert len(said) == 1
    assert said[0].startswith("Configuration 1 stays in force, its file is refused: ")
    assert "limits.in_flight: got 0" in said[0]
    assert "(and " in said[0]


async def test_it_says_so_when_the_gateway_does_not_answer(chromium: str, tmp_path: Path) -> None:
    """The page's own script, loaded where nobody answers it."""
    saved = tmp_path / "alone.html"
    script = Path(__file__).parents[2] / "service/tokenwire_service/page/page.js"
    saved.write_text(
        f'<p id="gateway">Connecting</p><script type="module">{script.read_text()}</script>'
    )
    dom, _ = await browse(chromium, tmp_path, "--dump-dom", saved.as_uri())
    assert "The gateway does not answer" in dom
    assert 'class="lost"' in dom


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
async def test_a_picture_of_it_is_no_blank(
    chromium: str, gateway: Program, tmp_path: Path, width: int, height: int
) -> None:
    """Also kept for docs/: `make screenshots` names a folder."""
    folder = Path(os.environ.get("TOKENWIRE_SCREENSHOTS") or tmp_path)
    picture = folder / f"status-page-{width}.png"
    size = f"--window-size={width},{height}"
    await browse(chromium, tmp_path, size, f"--screenshot={picture}", page(gateway))
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert int.from_bytes(drawn[16:20]) == width
    assert len(drawn) > 15_000  # a blank one has some 5,000
