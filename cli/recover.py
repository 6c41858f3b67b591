"""`lrsd recover`: parse, call one function of lrsd, print."""

import os
from pathlib import Path
from typing import Any

import click
from lrsd_cli.options import given_options, options_of

from lrsd.training.settings import Recovery

_RECOVER_EXAMPLES = """
\b
Examples:
  lrsd recover out --dense HuggingFaceTB/SmolLM2-135M --text wikitext -o recovered
  lrsd recover out --dense ./my-model --text train.txt --stage both -o recovered
  lrsd recover out --dense ./my-model --text train.txt -o recovered --resume
"""


@click.command(epilog=_RECOVER_EXAMPLES)
@click.argument("directory", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--dense", required=True, metavar="MODEL", help="The model that OUT was compressed from.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New directory.")
@options_of(Recovery)  # type: ignore[untyped-decorator]  # mypy knows this package as `cli`
@click.option("--memory", metavar="SIZE", help="Memory that this may take.  [default: the machine's]")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with what an earlier run of the same command has finished, kept in OUTPUT.partial; the "
    "result is the same to the byte. From the start where there is nothing.",
)
def recover(
    directory: Path, dense: str, output: Path, memory: str | None, resume: bool, **options: Any
) -> None:
    """Distill the dense MODEL into the compressed directory OUT: codes stay, low-rank factors, kept values,
    scales, biases and gains of norms are trained. The result has OUT's bytes."""
    from lrsd_cli.process import own_process
    from lrsd_cli.progress import make_progress

    from lrsd.checkpoint.card import recovery_lines
    from lrsd.errors import InputError
    from lrsd.report.page import write_beside
    from lrsd.settings import parse_size
    from lrsd.training.recover import recover as run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but one process recovers a checkpoint; start it "
            "without torchrun"
        )
    settings = Recovery.of(**given_options(click.get_current_context(), options))
    limit = None if memory is None else parse_size(memory)
    with own_process() as process:
        progress = make_progress()
        manifest = run(
            directory, dense, output, settings, progress, resume=resume, memory=limit, process=process
        )
    drawn = write_beside(output, progress.note)
    lines = [*recovery_lines(manifest), f"written         {output}"]
    click.echo("\n".join(lines if drawn is None else [*lines, f"report          {drawn}"]))
