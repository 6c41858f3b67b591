"""`lrsd report`: parse, call one function of lrsd, print."""

from pathlib import Path

import click

_REPORT_EXAMPLES = """
\b
Examples:
  lrsd report out
  lrsd report out --eval eval.json -o page.html
  lrsd report model-88.gguf
"""


@click.command(epilog=_REPORT_EXAMPLES)
@click.argument("result", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="HTML",
    help="The page.  [default: OUT/report.html, NAME.report.html beside a GGUF file]",
)  # fmt: skip
@click.option(
    "--eval", "evals", multiple=True, type=click.Path(path_type=Path), metavar="JSON",
    help="What lrsd eval --json printed of it, or of others to compare with; repeatable.",
)  # fmt: skip
def report(result: Path, output: Path | None, evals: tuple[Path, ...]) -> None:
    """Draw one HTML page of a compressed directory or GGUF file: bytes, layers, losses, spectra, quality,
    recipe. It needs no network and runs no code."""
    from lrsd.report.page import write_report

    click.echo(f"written         {write_report(result, output, evals)}")
