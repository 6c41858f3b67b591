"""`lrsd eval`, `inspect` and `verify`: parse, call one function of lrsd, print."""

import json
from pathlib import Path

import click

_EVAL_EXAMPLES = """
\b
Examples:
  lrsd eval out --ppl wikitext
  lrsd eval out --ppl wiki.test.txt --seqlen 1024 --windows 12 --kl ./my-model
  lrsd eval out --ppl wiki.test.txt --kl ./my-model --fail-above 0.05
  lrsd eval out --ppl wikitext --kl ./my-model --card
  lrsd eval out --tasks arc_easy,hellaswag
  lrsd eval out --tasks items.jsonl --limit 300
  lrsd eval out --speed --json
"""
_INSPECT_EXAMPLES = """
\b
Examples:
  lrsd inspect out
  lrsd inspect out --plot layers.png --memory
  lrsd inspect out --json
"""
_VERIFY_EXAMPLES = """
\b
Examples:
  lrsd verify out
"""


@click.command(name="eval", epilog=_EVAL_EXAMPLES)
@click.argument("model")
@click.option(
    "--ppl",
    multiple=True,
    metavar="TEXT",
    help="Perplexity on wikitext, c4, ptb, a file as of --calib, or a hub data set; repeatable. Default: "
    "wikitext.",
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
    "--fail-above",
    type=click.FloatRange(0),
    metavar="KL",
    help="Exit code 1 if a text's KL is above that: a gate for batch jobs; needs --kl.",
)
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME|FILE",
    help="Tasks of lm-evaluation-harness by name, with commas between them, or a JSON or JSONL file of "
    'multiple choice ("context", "choices", "answer"); repeatable. Needs lrsd[tasks].',
)
@click.option("--limit", type=click.IntRange(1), help="Items of each task.  [default: all]")
@click.option(
    "--batch", default=8, show_default=True, type=click.IntRange(1), help="Requests of a task at once."
)
@click.option(
    "--trust-tasks",
    is_flag=True,
    help="Let --tasks take lm-eval's YAML files, whose functions and templates may run any code.",
)
@click.option(
    "--accuracy",
    metavar="FILE",
    help='Accuracy of a classifier on a CSV or JSONL file of "text" and "label", or of two texts, such as '
    '"premise" and "hypothesis".',
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
@click.option(
    "--card",
    is_flag=True,
    help="Also write the figures into the model card of MODEL, a directory that lrsd compress wrote.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def evaluate(
    model: str,
    ppl: tuple[str, ...],
    seqlen: int | None,
    windows: int | None,
    kl: str | None,
    fail_above: float | None,
    tasks: tuple[str, ...],
    limit: int | None,
    batch: int,
    trust_tasks: bool,
    accuracy: str | None,
    speed: bool,
    dtype: str,
    device: str,
    card: bool,
    as_json: bool,
) -> None:
    """Measure MODEL, compressed or dense: perplexity, divergence from the dense model, tasks, speed."""
    if fail_above is not None and kl is None:
        raise click.UsageError("--fail-above needs --kl DENSE")
    if (limit is not None or trust_tasks) and not tasks:
        raise click.UsageError("--limit and --trust-tasks need --tasks")
    from lrsd_cli.process import own_process
    from lrsd_cli.progress import make_progress

    from lrsd.checkpoint.card import add_metrics, require_card
    from lrsd.errors import QualityError
    from lrsd.evaluate import card_metrics
    from lrsd.evaluate import evaluate as run
    from lrsd.report.tables import evaluation_lines

    if card:
        require_card(Path(model))
    texts = ppl if ppl or speed or accuracy or tasks else ("wikitext",)
    with own_process():
        result = run(
            model, texts, seqlen=seqlen, windows=windows, dense=kl, accuracy=accuracy, with_speed=speed,
            tasks=tasks, limit=limit, batch=batch, trust_tasks=trust_tasks, dtype=dtype,
            device=device, progress=make_progress(),
        )  # fmt: skip
    if card:
        add_metrics(Path(model), card_metrics(result))
    click.echo(json.dumps(result.to_dict(), indent=1) if as_json else "\n".join(evaluation_lines(result)))
    for found in result.divergence:
        if fail_above is not None and found.kl > fail_above:
            raise QualityError(f"KL {found.kl:.4g} on {found.text} is above {fail_above:g} (--fail-above)")


@click.command(epilog=_INSPECT_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Also draw error and bytes per layer into this file.",
)
@click.option(
    "--memory",
    is_flag=True,
    help="Also load every layer, one after the other, and say what it holds in memory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(directory: Path, plot: Path | None, memory: bool, as_json: bool) -> None:
    """Show every layer of a compressed DIRECTORY: rank, kept columns and rows, bits, bytes, error."""
    from dataclasses import asdict

    from lrsd.checkpoint.manifest import read_manifest
    from lrsd.checkpoint.reader import resident_bits
    from lrsd.report.tables import layer_table, plot_layers, summary_lines

    manifest = read_manifest(directory)
    if plot is not None:
        plot_layers(manifest, plot)
    if as_json:
        about = asdict(manifest) | ({"resident_bits": resident_bits(directory)} if memory else {})
        click.echo(json.dumps(about, indent=1))
        return
    lines = [layer_table(manifest), "", *summary_lines(manifest)]
    if memory:
        lines.append(f"in memory       {resident_bits(directory):.3g} bits per weight on this machine's CPU")
    click.echo("\n".join(lines))


@click.command(epilog=_VERIFY_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
def verify(directory: Path) -> None:
    """Compare every file of a compressed DIRECTORY, or the tensors of a GGUF file, with the digests in its
    manifest."""
    from lrsd.checkpoint.verify import verify as run

    manifest = run(directory)
    what = "its tensors are" if directory.is_file() else f"{len(manifest.files)} files are"
    click.echo(f"{what} as lrsd {manifest.lrsd_version} wrote them")
