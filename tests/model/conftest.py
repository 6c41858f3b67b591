"""One line per family under the tests' own summary."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        value
        for report in terminalreporter.getreports("passed")
        for key, value in getattr(report, "user_properties", [])
        if key == "family" and report.when == "call"
    ]
    if lines:
        terminalreporter.section("families")
        for line in lines:
            terminalreporter.write_line(line)
