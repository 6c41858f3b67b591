"""The report: one HTML file on what was done, with pictures; it loads nothing and runs nothing."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from lrsd.checkpoint.manifest import REPORT_NAME, Manifest, read_manifest
from lrsd.checkpoint.reader import stored_bytes
from lrsd.errors import InputError
from lrsd.evaluate import EvalResult
from lrsd.intake.json import read_json
from lrsd.report.facts import Facts, facts_of
from lrsd.report.spectra import Spectrum, spectra_of
from lrsd.report.words import breakable, clipped, megabytes, share
from lrsd.work.files import written
from lrsd.work.records import decode

_INSTALL = "pip install 'lrsd[report]'"
# Near the beginning of every report: a file without it is none of ours, and is not overwritten.
_MARK = '<meta name="generator" content="lrsd report">'
# Layers in the list, and in the longer one that is unfolded.
_LISTED, _UNFOLDED = 10, 200


def report_path(result: Path) -> Path:
    """Where the report of a directory or a GGUF file is, if nothing else is said."""
    return result / REPORT_NAME if result.is_dir() else result.with_suffix(f".{REPORT_NAME}")


def write_report(result: Path, target: Path | None = None, evals: Sequence[Path] = ()) -> Path:
    """Draw the report of a directory or a GGUF file that lrsd has written, from its manifest and weights: the
    same file for the same result, whatever it is called. An earlier report is replaced.

    evals: what `lrsd eval --json` printed. Returns: where it is. Raises: InputError if a library is missing,
    for an evaluation that is none, and a file that is there and no report; CheckpointError; StorageError.
    """
    _require_libraries()
    manifest = read_manifest(result)
    results = [_evaluation(path) for path in evals]
    target = target or report_path(result)
    if target.exists() and not _is_report(target):
        raise InputError(f"{target} is there already and is no report; choose another file with -o")
    facts = facts_of(manifest, result.stat().st_size if result.is_file() else stored_bytes(result))
    text = page(manifest, facts, spectra_of(facts, result), results)
    with written(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def write_beside(result: Path, note: Callable[[str], None]) -> Path | None:
    """The report of a result that is finished, unless there is one. What goes wrong is a line of its own,
    since nothing may cost the result. Returns: where it is."""
    path = report_path(result)
    try:
        return path if path.exists() else write_report(result)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        note(f"no report beside {result}: {reason}; then `lrsd report {result}` draws it")
        return None
    except BaseException as stop:
        stop.add_note(f"{result} is complete but for its report, which `lrsd report {result}` draws")
        raise


def page(
    manifest: Manifest, facts: Facts, spectra: Sequence[Spectrum] = (), evals: Sequence[EvalResult] = ()
) -> str:
    """The HTML. Everything in it that is of the manifest is text, never markup."""
    from jinja2 import Environment, StrictUndefined

    from lrsd.report import sections

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False
    )
    environment.filters |= {"size": megabytes, "name": clipped, "breakable": breakable}
    environment.globals["share"] = share
    template = environment.from_string(
        files("lrsd.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    with _quiet_matplotlib():
        content = _content(manifest, facts, spectra, evals, sections)
    return template.render(mark=_MARK, **content)


def _content(
    manifest: Manifest, facts: Facts, spectra: Sequence[Spectrum], evals: Sequence[EvalResult], sections: Any
) -> dict[str, Any]:
    from lrsd.report import figures, heat

    worst = [layer for layer in facts.worst if layer.loss > 0]
    return {
        "manifest": manifest,
        "gguf": manifest.recipe.get("format") == "gguf",
        "facts": facts,
        "tiles": sections.tiles(manifest, facts, evals),
        "lead": sections.lead(facts),
        "bytes_figure": figures.bytes_figure(facts) if facts.layers else None,
        "maps": heat.heat_maps(facts),
        "maps_note": heat.note_on_maps(facts),
        "loss_figure": figures.loss_figure(facts),
        "depth_figure": figures.depth_figure(facts),
        "convergence": figures.convergence_figure(facts),
        "no_convergence": sections.why_no_alternation(manifest),
        "spectra": figures.spectra_figure(spectra),
        "worst": worst[:_LISTED],
        "unfolded": worst[_LISTED:_UNFOLDED],
        "promised": sections.promised(manifest, facts),
        "measured": sections.measured(evals),
        "engines": sections.engines(manifest),
        "recipe": sections.recipe_rows(manifest),
        "environment": sections.rows(manifest.environment),
        "calibration": sections.calibration(manifest),
        "notes": sections.notes(manifest),
    }


def _require_libraries() -> None:
    """Raises: InputError."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"a report needs {error.name}: {_INSTALL}") from error


def _evaluation(path: Path) -> EvalResult:
    """Raises: InputError for what `lrsd eval --json` has not printed."""
    content = read_json(path)
    try:
        return decode(EvalResult, content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not what lrsd eval --json prints: {error}") from error


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(500)


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Without its words on fonts and caches, which are no business of a compression's log."""
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
