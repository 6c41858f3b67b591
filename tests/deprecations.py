"""A pytest plugin: what dependencies deprecate is told at the end of a run, and fails no test.

A dependency may deprecate something on any day, and the laws hold for as long as it works. Our own warnings
are errors all the same; pyproject.toml tells them apart.
"""

import sys
import warnings
from pathlib import Path

import pytest

TITLE = "deprecations of dependencies"
_KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

Key = tuple[bool, str, str, str]


class Deprecations:
    """Collects the deprecations of one run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tests: dict[Key, set[str]] = {}
        self._shown_by_pytest: set[str] = set()

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        warned = warning_message
        if not issubclass(warned.category, _KINDS):
            return
        text, path = str(warned.message), Path(warned.filename)
        said = next(iter(text.strip().splitlines()), "")
        key = (not self._is_ours(path), self._short(path), warned.category.__name__, said)
        self._tests.setdefault(key, set()).add(nodeid)
        shown = warnings.formatwarning(text, warned.category, warned.filename, warned.lineno, warned.line)
        self._shown_by_pytest.add(shown)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> object:
        """Pytest's own summary keeps the other warnings, ours replaces what it says of these."""
        stats = terminalreporter.stats
        if others := [w for w in stats.pop("warnings", []) if w.message not in self._shown_by_pytest]:
            stats["warnings"] = others
        result = yield
        if self._tests:
            terminalreporter.ensure_newline()
            terminalreporter.section(TITLE)
        for (_, path, category, said), tests in sorted(self._tests.items()):
            count = len(tests - {""})
            where = f"{count} test{'s' * (count != 1)}" if count else "on import"
            terminalreporter.write_line(f"{path}: {category}: {said} ({where})")
        return result

    def _is_ours(self, path: Path) -> bool:
        """Below the root, and not in a hidden directory there such as .venv-test."""
        return path.is_relative_to(self._root) and not any(
            part.startswith(".") for part in path.relative_to(self._root).parts
        )

    def _short(self, path: Path) -> str:
        """Relative to the root, or to where its package was imported from."""
        bases = (
            [self._root] if self._is_ours(path) else sorted(map(Path, sys.path), key=lambda p: -len(p.parts))
        )
        return next((str(path.relative_to(base)) for base in bases if path.is_relative_to(base)), str(path))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Deprecations(config.rootpath))
