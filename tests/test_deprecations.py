"""A dependency that deprecates something fails no test and is told; our own warnings fail."""

import json
from collections.abc import Callable
from pathlib import Path

import deprecations
import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
# What a dependency is: a module that warns of itself, or of the one that called it.
FOREIGN = """
import warnings

def warn(category, stacklevel=1):
    warnings.warn(f"{category.__name__} of mine\\nand its details", category, stacklevel=stacklevel)
"""
Inner = Callable[[str], pytest.RunResult]


@pytest.fixture
def inner(pytester: pytest.Pytester, pytestconfig: pytest.Config) -> Inner:
    """Run a test file with this project's filters and this plugin, beside a package that is not ours."""
    foreign = pytester.mkdir(".packages")
    (foreign / "foreign.py").write_text(FOREIGN)
    pytester.syspathinsert(foreign)
    filters = json.dumps(pytestconfig.getini("filterwarnings"))
    pytester.makepyprojecttoml(f"[tool.pytest.ini_options]\nfilterwarnings = {filters}\n")

    def run(content: str) -> pytest.RunResult:
        pytester.makepyfile(test_inner=content)
        # Hypothesis' plugin would be imported anew in every run, for seven seconds.
        return pytester.runpytest_inprocess("-p", "no:hypothesispytest", plugins=[deprecations])

    return run


def listed(result: pytest.RunResult) -> list[str]:
    """The lines of the section, up to the next title."""
    titles = [n for n, line in enumerate(result.outlines) if deprecations.TITLE in line]
    if not titles:
        return []
    assert len(titles) == 1
    lines = result.outlines[titles[0] + 1 :]
    return lines[: next(n for n, line in enumerate(lines) if line.startswith("=") or " passed" in line)]


@pytest.mark.parametrize("kind", ["DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"])
def test_deprecations_pass_and_are_listed_once_those_of_our_calls_first(inner: Inner, kind: str) -> None:
    result = inner(
        f"""
        import pytest, foreign

        @pytest.mark.parametrize("n", range(3))
        def test_inside(n):
            foreign.warn({kind})
            foreign.warn({kind})

        def test_ours():
            foreign.warn({kind}, stacklevel=2)
        """
    )
    result.assert_outcomes(passed=4)
    assert listed(result) == [
        f"test_inner.py: {kind}: {kind} of mine (1 test)",
        f"foreign.py: {kind}: {kind} of mine (3 tests)",
    ]
    assert "warnings summary" not in result.stdout.str()


def test_a_deprecation_on_import_is_listed(inner: Inner) -> None:
    result = inner("import foreign; foreign.warn(FutureWarning)\ndef test(): pass")
    result.assert_outcomes(passed=1)
    assert listed(result) == ["foreign.py: FutureWarning: FutureWarning of mine (on import)"]


@pytest.mark.parametrize("kind", ["UserWarning", "RuntimeWarning", "ResourceWarning"])
def test_other_warnings_are_errors_where_they_are_ours(inner: Inner, kind: str) -> None:
    result = inner(
        f"""
        import pytest, foreign, warnings

        def test_foreign():
            foreign.warn({kind})

        def test_ours():
            foreign.warn({kind}, stacklevel=2)
        """
    )
    result.assert_outcomes(passed=1, failed=1, warnings=1)
    assert listed(result) == []
    # Not lost: pytest shows them itself.
    result.stdout.fnmatch_lines(["*warnings summary*", f"*foreign.py:*: {kind}: {kind} of mine"])


def modules() -> list[str]:
    """Every module of ours, as its warnings name it."""
    found = []
    for package, name in (("lrsd", "lrsd"), ("cli", "lrsd_cli")):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT / package).with_suffix("").parts
            found.append(".".join((name, *parts)).removesuffix(".__init__"))
    return found + [path.stem for path in (ROOT / "tests").rglob("*.py")]


def test_every_module_of_ours_is_known_as_ours_and_no_other(inner: Inner) -> None:
    result = inner(
        f"""
        import pytest, warnings

        def test_ours():
            for module in {modules()}:
                with pytest.raises(UserWarning):
                    warnings.warn_explicit("of ours", UserWarning, "file.py", 1, module)
                warnings.warn_explicit("of theirs", FutureWarning, "file.py", 1, module)

        def test_theirs():
            for module in ("torch.lrsd", "lrsdx", "x.test_utils", "layersx"):
                warnings.warn_explicit("of theirs", UserWarning, "file.py", 1, module)
        """
    )
    result.assert_outcomes(passed=2, warnings=4)


def test_an_exception_that_nobody_could_catch_is_an_error(inner: Inner) -> None:
    result = inner(
        """
        import threading

        def test_thread():
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
        """
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ZeroDivisionError*"])
