"""Prints what was simulated, whichever process of the test run has done it."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The reports that tests have recorded as `simulated`."""
    for reports in list(terminalreporter.stats.values()):
        for each in reports:
            for name, text in getattr(each, "user_properties", ()):
                if name == "simulated" and getattr(each, "when", "") == "call":
                    terminalreporter.write_line(str(text))
