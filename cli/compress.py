"""`lrsd compress`: parse, call one function of lrsd, print."""

import json
from pathlib import Path
from typing import Any

import click
from lrsd_cli.options import given_options, read_recipe, settings_options

_COMPRESS_EXAMPLES = """
\b
Examples:
  lrsd compress HuggingFaceTB/SmolLM2-135M --ratio 4x -o smol-4x
  lrsd compress model.gguf --ratio 80% --calib wiki.txt --samples 64 -o out
  lrsd compress ./my-model --ratio 2x --dry-run
  lrsd compress ./my-model --ratio 1.25x --bits 16 -o low-rank
  lrsd compress ./my-model --ratio 3.8x --format compressed-tensors -o for-vllm
  lrsd compress model-bf16.gguf --size 80MB --format gguf -o model-80.gguf
  lrsd compress ./my-model --ratio 3.5x --method gptq -o peer
  lrsd compress ./my-encoder --ratio 20% --method losparse --train labelled.csv -o trained
  lrsd compress ./my-model --ratio 4x -o out --resume
  torchrun --nproc-per-node gpu --no-python lrsd compress ./my-model --ratio 4x -o out
"""


@click.command(epilog=_COMPRESS_EXAMPLES)
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="New directory for the checkpoint, or NAME.gguf."
)
@settings_options  # type: ignore[untyped-decorator]  # mypy knows this package as `cli`
@click.option(
    "--dry-run", is_flag=True, help="Show the plan per layer, its bytes and a time estimate; write nothing."
)
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    callback=read_recipe,
    help="TOML or JSON file with any of these settings; OUTPUT/recipe.json is one.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory that this may take, e.g. 4GiB; weights that do not fit are paged (streamed from disk).  "
    "[default: the machine's]",
)
@click.option(
    "--calibration",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory in which what the calibration text tells of the model is kept, and taken from by runs of "
    "the same model and text, at other ratios for example.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with what an earlier run of the same command has finished, kept in OUTPUT.partial; the "
    "result is the same to the byte. From the start where there is nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def compress(
    model: str,
    output: Path | None,
    dry_run: bool,
    memory: str | None,
    calibration: Path | None,
    resume: bool,
    as_json: bool,
    recipe: Path | None,
    **options: Any,
) -> None:
    """Compress MODEL (a directory, a hub id, or a .gguf file) into a new checkpoint directory.

    A run that was stopped, by a signal, a full disk or a lost machine, goes on with --resume.
    """
    if output is None and not dry_run:
        raise click.UsageError("give an output directory with -o, or --dry-run")
    from dataclasses import asdict

    from lrsd_cli.process import own_process
    from lrsd_cli.progress import LineProgress, log_header, make_progress

    from lrsd.compress import compress as run
    from lrsd.compress import dry_run as plan_only
    from lrsd.model.load import resolve_device
    from lrsd.recipe import Recipe
    from lrsd.report.page import write_beside
    from lrsd.report.tables import plan_table, summary_lines
    from lrsd.settings import parse_size
    from lrsd.work.world import joined

    asked = Recipe.of(**given_options(click.get_current_context(), options))
    more: dict[str, Any] = {
        "memory": None if memory is None else parse_size(memory), "calibration": calibration
    }  # fmt: skip
    with own_process() as process, joined(asked.run.device) as world:
        progress = make_progress()
        if isinstance(progress, LineProgress) and world.leads:
            progress.note(log_header(asked.run.device, resolve_device(asked.run.device), world.size))
        if dry_run:
            prepared = plan_only(model, asked, progress, process=process, world=world, **more)
            shown = json.dumps(prepared.to_dict(), indent=1) if as_json else plan_table(prepared)
        else:
            assert output is not None
            manifest = run(
                model, output, asked, progress, resume=resume, process=process, world=world, **more
            )
            lines = [*summary_lines(manifest), f"written         {output}"]
            shown = json.dumps(asdict(manifest), indent=1) if as_json else "\n".join(lines)
    if world.leads:
        # The other processes need not wait for it.
        drawn = None if output is None or dry_run else write_beside(output, progress.note)
        click.echo(shown if drawn is None or as_json else f"{shown}\nreport          {drawn}")
