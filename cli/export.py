"""`lrsd export`: parse, call one function of lrsd, print."""

from pathlib import Path

import click

_EXPORT_EXAMPLES = """
\b
Examples:
  lrsd export out --dense out-dense
  lrsd export out --format compressed-tensors -o for-vllm
"""


@click.command(epilog=_EXPORT_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", default="dense", show_default=True, metavar="NAME",
    help="dense: plain weights, which any runtime loads; compressed-tensors: what --method integers made, "
    "for engines.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New directory.")
@click.option("--dense", type=click.Path(path_type=Path), metavar="D", help="Short for --format dense -o D.")
def export(directory: Path, format_: str, output: Path | None, dense: Path | None) -> None:
    """Write a compressed DIRECTORY in a format that other programs read."""
    if (output is None) == (dense is None):
        raise click.UsageError("give a new directory, with -o or --dense")
    target = output or dense
    assert target is not None
    from lrsd.export import EXPORTS

    name = "dense" if dense else format_
    if name not in EXPORTS:
        raise click.BadParameter(
            f"no format {name!r}; available: {', '.join(EXPORTS)}", param_hint="--format"
        )
    total = EXPORTS[name](directory, target, lambda name: None)
    click.echo(f"{total / 1e6:.1f} MB of {name} weights written to {target}")
