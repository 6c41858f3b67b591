"""The commands: parse, call one function of lrsd, print."""

import json
from pathlib import Path
from typing import Any

import click
from lrsd_cli.options import given_options, read_recipe, settings_options

from lrsd.export import EXPORTS

_COMPRESS_EXAMPLES = """
\b
Examples:
  lrsd compress HuggingFaceTB/SmolLM2-135M --ratio 4x -o smol-4x
  lrsd compress model.gguf --ratio 80% --calib wiki.txt --samples 64 -o out
  lrsd compress ./my-model --ratio 2x --dry-run
  lrsd compress ./my-model --ratio 1.25x --bits 16 -o low-rank
  lrsd compress ./my-model --ratio 3.5x --method gptq -o peer
  lrsd compress ./my-model --ratio 4x -o out --resume
"""
_EVAL_EXAMPLES = """
\b
Examples:
  lrsd eval out --ppl wikitext
  lrsd eval out --ppl wiki.test.txt --seqlen 1024 --windows 12 --kl ./my-model
  lrsd eval out --speed --json
"""
_INSPECT_EXAMPLES = """
\b
Examples:
  lrsd inspect out
  lrsd inspect out --plot layers.png
  lrsd inspect out --json
"""
_VERIFY_EXAMPLES = """
\b
Examples:
  lrsd verify out
"""
_EXPORT_EXAMPLES = """
\b
Examples:
  lrsd export out --dense out-dense
"""


@click.command(epilog=_COMPRESS_EXAMPLES)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New directory for the checkpoint.")
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

    from lrsd_cli.progress import make_progress

    from lrsd.compress import compress as run
    from lrsd.compress import dry_run as plan_only
    from lrsd.recipe import Recipe
    from lrsd.report import plan_table, summary_lines
    from lrsd.settings import parse_size

    asked = Recipe.of(**given_options(click.get_current_context(), options))
    progress = make_progress()
    allowed = None if memory is None else parse_size(memory)
    if dry_run:
        with _own_process() as process:
            prepared = plan_only(model, asked, progress, memory=allowed, process=process)
        click.echo(json.dumps(prepared.to_dict(), indent=1) if as_json else plan_table(prepared))
        return
    assert output is not None
    with _own_process() as process:
        manifest = run(model, output, asked, progress, resume=resume, memory=allowed, process=process)
    click.echo(
        json.dumps(asdict(manifest), indent=1)
        if as_json
        else "\n".join([*summary_lines(manifest), f"written         {output}"])
    )


def _own_process() -> Any:
    """The one place where lrsd changes more than its own: this process is the command's."""
    from lrsd.model.load import gguf_parsed_once, without_bars
    from lrsd.work.process import own_process

    return own_process(gguf_parsed_once(), without_bars())


@click.command(name="eval", epilog=_EVAL_EXAMPLES)
@click.argument("model")
@click.option(
    "--ppl",
    multiple=True,
    metavar="TEXT",
    help="Perplexity on wikitext, a text file or a hub data set; repeatable. Default: wikitext.",
)
@click.option(
    "--seqlen",
    default=None,
    type=click.IntRange(2),
    help="Window length.  [default: 2048, or the model's if shorter]",
)
@click.option(
    "--windows", default=None, type=click.IntRange(1), help="Number of windows.  [default: the whole text]"
)
@click.option(
    "--kl", metavar="DENSE", help="Mean KL from this dense model and top-1 agreement, on the same windows."
)
@click.option(
    "--accuracy",
    metavar="FILE",
    help='Accuracy of a classifier on a CSV or JSONL file of "text" and "label".',
)
@click.option("--speed", is_flag=True, help="Prefill and decode tokens per second, batch 1.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    help="Arithmetic to evaluate in.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate(
    model: str,
    ppl: tuple[str, ...],
    seqlen: int | None,
    windows: int | None,
    kl: str | None,
    accuracy: str | None,
    speed: bool,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure MODEL, compressed or dense: perplexity, divergence from the dense model, speed."""
    from lrsd_cli.progress import make_progress

    from lrsd.evaluate import evaluate as run
    from lrsd.report import evaluation_lines

    texts = ppl if ppl or speed or accuracy else ("wikitext",)
    with _own_process():
        result = run(
            model, texts, seqlen=seqlen, windows=windows, dense=kl, accuracy=accuracy, with_speed=speed,
            dtype=dtype, device=device, progress=make_progress(),
        )  # fmt: skip
    click.echo(json.dumps(result.to_dict(), indent=1) if as_json else "\n".join(evaluation_lines(result)))


@click.command(epilog=_INSPECT_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Also draw error and bytes per layer into this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(directory: Path, plot: Path | None, as_json: bool) -> None:
    """Show every layer of a compressed DIRECTORY: rank, kept columns and rows, bits, bytes, error."""
    from dataclasses import asdict

    from lrsd.checkpoint.manifest import read_manifest
    from lrsd.report import layer_table, plot_layers, summary_lines

    manifest = read_manifest(directory)
    if plot is not None:
        plot_layers(manifest, plot)
    click.echo(
        json.dumps(asdict(manifest), indent=1)
        if as_json
        else "\n".join([layer_table(manifest), "", *summary_lines(manifest)])
    )


@click.command(epilog=_VERIFY_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
def verify(directory: Path) -> None:
    """Compare every file of a compressed DIRECTORY with the digest that its manifest holds."""
    from lrsd.checkpoint.verify import verify as run

    manifest = run(directory)
    click.echo(f"{len(manifest.files)} files are as lrsd {manifest.lrsd_version} wrote them")


@click.command(epilog=_EXPORT_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", type=click.Choice(list(EXPORTS)), default="dense", show_default=True,
    help="dense: plain weights, which any runtime loads.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New directory.")
@click.option("--dense", type=click.Path(path_type=Path), metavar="D", help="Short for --format dense -o D.")
def export(directory: Path, format_: str, output: Path | None, dense: Path | None) -> None:
    """Write a compressed DIRECTORY in a format that other programs read."""
    if (output is None) == (dense is None):
        raise click.UsageError("give a new directory, with -o or --dense")
    target = output or dense
    assert target is not None
    total = EXPORTS["dense" if dense else format_](directory, target, lambda name: None)
    click.echo(f"{total / 1e6:.1f} MB of {'dense' if dense else format_} weights written to {target}")


COMMANDS = {"compress": compress, "eval": evaluate, "inspect": inspect, "verify": verify, "export": export}
