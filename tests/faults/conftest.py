"""The fault wall: how long its cases last, and what they measured."""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from harness import Figures

_HANGS_AFTER = 100.0  # seconds
_LONG_HANGS_AFTER = 3600.0

_FIGURES = pytest.StashKey[defaultdict[tuple[str, str], list[float]]]()


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, as `tokenwire serve`."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long versions have the time they need."""
    if config.getoption("long"):
        for item in items:
            item.add_marker(pytest.mark.timeout(_LONG_HANGS_AFTER))


@pytest.fixture
def long(pytestconfig: pytest.Config) -> bool:
    """Whether this is `make faults`: minutes where CI has seconds."""
    return bool(pytestconfig.getoption("long"))


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> Figures:
    """`figures(what, value, unit)` notes what was measured; the end of the run tells it."""
    noted = pytestconfig.stash.setdefault(_FIGURES, defaultdict(list))

    def note(what: str, value: float, unit: str) -> None:
        noted[what, unit].append(value)

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Median and maximum of everything that was measured."""
    noted = config.stash.get(_FIGURES, None)
    if not noted:
        return
    terminalreporter.section("figures of the fault wall")
    for (what, unit), values in sorted(noted.items()):
        median, most = statistics.median(values), max(values)
        terminalreporter.write_line(
            f"{what}: median {median:.1f} {unit}, most {most:.1f} {unit}, of {len(values)}"
        )


@pytest.fixture(autouse=True)
async def watchdog(long: bool) -> AsyncIterator[None]:
    """Ends a case that hangs: on uvloop the signal of pytest-timeout interrupts nothing."""

    def bite() -> None:
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "").startswith("test_"):  # not those of gRPC
                task.cancel("the case hangs")

    seconds = _LONG_HANGS_AFTER if long else _HANGS_AFTER
    timer = asyncio.get_running_loop().call_later(seconds, bite)
    yield
    timer.cancel()
