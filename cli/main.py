"""`lrsd`: the commands and their options. lrsd itself is imported only when a command runs."""

import json
import re
import signal
import sys
import tomllib
from pathlib import Path
from types import FrameType
from typing import Any

import click

CALIBRATION_KEYS = ("samples", "seqlen", "seed")
SETTINGS_KEYS = (
    "scope", "method", "structure", "bits", "coding", "group", "allocation", "rank", "propagate",
    "mean_correction", "alternations", "include", "exclude", "min_weights", "shard_size", "dtype",
    "device", "batch",
)  # fmt: skip

# What is not a setting, and so is no part of a recipe.
_NOT_IN_RECIPES = ("model", "output", "recipe", "resume", "memory", "dry_run", "as_json")
_LARGEST_RECIPE = 2**20

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


def main() -> None:
    """Entry point. Every expected failure ends as one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = commands.main(prog_name="lrsd", standalone_mode=False)
    except click.exceptions.Abort as abort:
        click.echo(f"interrupted; {_kept(abort.__cause__ or abort)}", err=True)
        code = 130
    except click.ClickException as error:
        code = _wrong_usage(error)
    except SystemExit as stop:
        click.echo(f"terminated; {_kept(stop)}", err=True)
        code = stop.code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        code = _report(error)
    sys.exit(code)


def _wrong_usage(error: click.ClickException) -> int:
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or error.message == context.get_help():  # a bare `lrsd` is answered by the help
        error.show()
    else:
        message = error.format_message().rstrip(".")
        click.echo(f"lrsd: {message}; see {context.command_path} --help", err=True)
    return error.exit_code


def _kept(stopped: BaseException) -> str:
    """What is left of a run that was stopped, and how to go on."""
    return "; ".join(getattr(stopped, "__notes__", ["nothing was written"]))


def _report(error: Exception) -> int:
    from lrsd.errors import LrsdError

    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, LrsdError):
        click.echo(f"lrsd: {error}{notes}", err=True)
        return error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        click.echo(f"lrsd: {error.strerror}: {error.filename or 'no file named'}{notes}", err=True)
        return 1
    raise error


def _terminated(number: int, frame: FrameType | None) -> None:
    """Says nothing itself: the signal may have come in the middle of a line to stderr, and Python's
    streams refuse a second writer."""
    raise SystemExit(128 + number)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lrsd")
def commands() -> None:
    """Compress language models without training: low rank + column-structured sparse + quantised."""


def _read_recipe(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Make the recipe's values the defaults of the options; what is typed still wins."""
    if path is None:
        return None
    if not path.is_file() or path.stat().st_size > _LARGEST_RECIPE:
        raise click.BadParameter(f"{path} is no file of at most {_LARGEST_RECIPE:,} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        recipe = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path} is neither TOML nor JSON: {error}") from error
    known = {p.name for p in context.command.params if p.name not in _NOT_IN_RECIPES}
    unknown = sorted(set(recipe) - known) if isinstance(recipe, dict) else ["(no table at the top)"]
    if unknown:
        raise click.BadParameter(
            f"{path}: unknown setting {unknown[0]!r}; available: {', '.join(sorted(known))}"
        )
    defaults = {}
    for name, value in recipe.items():
        if name in ("include", "exclude"):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise click.BadParameter(f"{path}: {name} must be a list of patterns, got {value!r:.80}")
        elif not isinstance(value, str | int | float | None):
            raise click.BadParameter(f"{path}: {name} must be a text or a number, got {value!r:.80}")
        if value is not None:
            defaults[name] = value if isinstance(value, bool | list) else str(value)
    recipe = defaults
    context.default_map = {**(context.default_map or {}), **recipe}
    return path


@commands.command(epilog=_COMPRESS_EXAMPLES)
@click.argument("model")
@click.option(
    "--ratio",
    required=True,
    metavar="R",
    help="16-bit bytes before / after: 4x, 1.25, or 80% kept.",
)
@click.option(
    "--scope",
    default="linear",
    show_default=True,
    type=click.Choice(["linear", "checkpoint"]),
    help="What --ratio is of: the linear weights, or the whole checkpoint, embeddings and head then "
    "being stored in 8 bit.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New directory for the checkpoint.")
@click.option(
    "--calib",
    default="self",
    show_default=True,
    metavar="SOURCE",
    help="Calibration text: self (sampled from the model), wikitext, c4, a text or JSONL file, "
    "or a hub data set.",
)
@click.option("--samples", default=128, show_default=True, help="Calibration samples.")
@click.option("--seqlen", default=512, show_default=True, help="Tokens per calibration sample.")
@click.option("--seed", default=0, show_default=True, help="Seed of the calibration text.")
@click.option(
    "--method",
    default="lrsd",
    show_default=True,
    type=click.Choice(["lrsd", "ssd", "svd-llm", "asvd", "svd", "gptq", "columns"]),
    help="lrsd, or a published method to compare with.",
)
@click.option(
    "--structure",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "column", "row", "unstructured", "none"]),
    help="What S keeps beside the low rank: input channels (column), output channels (row), "
    "single entries (unstructured), or per layer the better of column and row (auto).",
)
@click.option(
    "--bits",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "16", "8", "6", "5", "4", "3", "2"]),
    help="auto: as many per layer as pay; 16: no rounding, low rank and kept channels only; others: codes "
    "of this width, and kept columns beside them.",
)
@click.option(
    "--coding",
    default="entropy",
    show_default=True,
    type=click.Choice(["entropy", "fixed"]),
    help="How --bits auto stores codes: entropy coded (best quality per byte), or at a width per layer "
    "that kernels can read in place.",
)
@click.option(
    "--group", default=64, show_default=True, help="Columns per scale and zero of fixed-width codes."
)
@click.option(
    "--allocation",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "kl", "uniform", "energy"]),
    help="How layers share the bytes: by their effect on the output (kl), equally, or by one energy "
    "threshold; auto: kl, checked against equal shares on held-out text (published methods: their own rule).",
)
@click.option(
    "--rank",
    default="auto",
    show_default=True,
    metavar="auto|energy|N",
    help="auto: by --allocation; energy: one energy threshold; N: this rank everywhere.",
)
@click.option(
    "--propagate/--no-propagate",
    default=None,
    help="Fit each layer behind the compressed ones before it.  [default: method lrsd does at 16 bit, and "
    "where the expected loss is not small]",
)
@click.option(
    "--mean-correction/--no-mean-correction",
    default=False,
    show_default=True,
    help="Buy a bias that restores each layer's mean output.",
)
@click.option(
    "--alternations", default=5, show_default=True, help="Rounds of choosing S and fitting L; 1 is none."
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Compress only linear layers whose name matches, e.g. '*.mlp.*'; repeatable.",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave matching linear layers dense; repeatable."
)
@click.option(
    "--min-weights", default=0, show_default=True, help="Leave linear layers of fewer weights dense."
)
@click.option("--shard-size", default="5GB", show_default=True, help="Largest file of the checkpoint.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "bfloat16", "float16"]),
    help="16-bit type of what is stored.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto: an accelerator with float64 (not mps), else cpu.",
)
@click.option("--batch", default=8, show_default=True, help="Calibration samples per forward pass.")
@click.option(
    "--dry-run", is_flag=True, help="Show the plan per layer, its bytes and a time estimate; write nothing."
)
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    callback=_read_recipe,
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
    from lrsd.report import plan_table, summary_lines
    from lrsd.settings import parse_size

    settings, calibration = _settings(options)
    progress = make_progress()
    allowed = None if memory is None else parse_size(memory)
    if dry_run:
        with _own_process() as process:
            prepared = plan_only(model, settings, calibration, progress, memory=allowed, process=process)
        click.echo(json.dumps(prepared.to_dict(), indent=1) if as_json else plan_table(prepared))
        return
    assert output is not None
    with _own_process() as process:
        manifest = run(
            model, output, settings, calibration, progress, resume=resume, memory=allowed, process=process
        )
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


def _settings(options: dict[str, Any]) -> tuple[Any, Any]:
    from lrsd.errors import SettingsError
    from lrsd.settings import CalibrationSettings, CompressionSettings, parse_ratio

    rank = str(options["rank"])
    if rank == "energy":
        options["allocation"] = "energy"
    if rank not in ("auto", "energy") and not re.fullmatch("[0-9]{1,9}", rank):
        raise SettingsError(f"rank must be auto, energy or a whole number, got {rank!r:.40}")
    options["rank"] = None if rank in ("auto", "energy") else int(rank)
    settings = CompressionSettings(
        ratio=parse_ratio(str(options["ratio"])), **{key: options[key] for key in SETTINGS_KEYS}
    )
    calibration = CalibrationSettings(
        source=options["calib"], **{key: options[key] for key in CALIBRATION_KEYS}
    )
    return settings, calibration


@commands.command(name="eval", epilog=_EVAL_EXAMPLES)
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
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto: an accelerator with float64 (not mps), else cpu.",
)
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


@commands.command(epilog=_INSPECT_EXAMPLES)
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


@commands.command(epilog=_VERIFY_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
def verify(directory: Path) -> None:
    """Compare every file of a compressed DIRECTORY with the digest that its manifest holds."""
    from lrsd.checkpoint.verify import verify as run

    manifest = run(directory)
    click.echo(f"{len(manifest.files)} files are as lrsd {manifest.lrsd_version} wrote them")


@commands.command(epilog=_EXPORT_EXAMPLES)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--dense",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    metavar="D",
    help="New directory for plain dense weights.",
)
def export(directory: Path, target: Path) -> None:
    """Write a compressed DIRECTORY as plain dense weights, which any runtime loads."""
    from lrsd.export.dense import export_dense

    total = export_dense(directory, target)
    click.echo(f"{total / 1e6:.1f} MB of dense weights written to {target}")


if __name__ == "__main__":
    main()
