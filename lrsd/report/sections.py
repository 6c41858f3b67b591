"""What the report says in words and tables, section by section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrsd.checkpoint.card import left_alone, recovery_lines
from lrsd.checkpoint.manifest import Manifest
from lrsd.errors import CheckpointError
from lrsd.evaluate import Divergence, EvalResult
from lrsd.report.facts import Facts
from lrsd.report.words import clipped, megabytes, share

# Lines on layers that were left alone; an adversary, or a large mixture of experts, has thousands.
_MOST_NOTES = 40
# Letters of a name or setting.
_LONGEST = 300


@dataclass(frozen=True)
class Tile:
    """One number on top of the page."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Engine:
    """How a program loads the result. language: of the code."""

    name: str
    code: str
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """A row of what `lrsd eval` measured."""

    model: str
    text: str
    perplexity: str
    kl: str
    agreement: str
    protocol: str


def tiles(manifest: Manifest, facts: Facts, evals: Sequence[EvalResult]) -> list[Tile]:
    """The numbers that one looks for first."""
    dense, stored = manifest.dense_linear_bytes, manifest.linear_bytes
    whole = f"of {megabytes(facts.total * manifest.checkpoint_ratio)} at 16 bit"
    found = [
        Tile("Linear weights", f"{manifest.ratio:.4g}x", f"{megabytes(dense)} → {megabytes(stored)}"),
        Tile("Bits per weight", f"{manifest.bits_per_weight:.3g}", "all that is stored counted"),
        Tile("Whole checkpoint", megabytes(facts.total), f"{whole}, {manifest.checkpoint_ratio:.4g}x"),
    ]
    if facts.measured:
        found.append(Tile("Expected loss", f"{manifest.expected_kl:.3g}", "nats of KL per token, as planned"))
    if (divergence := _first_divergence(evals)) is not None:
        agreement = f"same top token on {divergence.top1_agreement:.1%}"
        found.append(Tile("Measured KL", f"{divergence.kl:.3g}", f"per token; {agreement}"))
    before, after = manifest.dense_macs_per_token, manifest.macs_per_token
    found.append(Tile("Multiply-adds", _millions(after), f"per token, {_millions(before)} dense"))
    return found


def _first_divergence(evals: Sequence[EvalResult]) -> Divergence | None:
    return next((found for result in evals for found in result.divergence), None)


def _millions(count: float) -> str:
    return f"{count / 1e9:.3g} G" if count >= 1e9 else f"{count / 1e6:.3g} M"


def lead(facts: Facts) -> str:
    """In a sentence, how the loss is spread."""
    worst, half, taken = facts.worst, facts.loss / 2, 0.0
    if not facts.loss:
        return "No layer has lost anything that was measured."
    count = 0
    while taken < half:
        taken, count = taken + worst[count].loss, count + 1
    what = "loss" if facts.measured else "error, all layers counted alike,"
    return (
        f"Half of the {what} comes from {count:,} of {len(facts.layers):,} layers; the one that suffered "
        f"most has {share(worst[0].loss, facts.loss)} of it."
    )


def promised(manifest: Manifest, facts: Facts) -> list[tuple[str, str, str]]:
    """What was foreseen and seen while compressing: of what, the number, and what it is. Raises:
    CheckpointError."""
    found = []
    if facts.measured:
        about = "nats of KL per token: sensitivity × error, summed over the layers"
        found += [
            ("Loss of the plan", f"{manifest.expected_kl:.4g}", f"{about}, as planned"),
            ("Loss as fitted", f"{facts.loss:.4g}", f"{about}, with the errors after the fit"),
        ]
    for name, loss in manifest.allocation.items():
        chosen = ", chosen" if name == manifest.allocation_chosen else ""
        found.append(
            (f"Plan “{clipped(name, 40)}”{chosen}", f"{loss:.4g}", "nats of KL per token, held-out text")
        )
    try:
        lines = recovery_lines(manifest)
    except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the manifest's recovery is not as lrsd writes it: {error}") from error
    return found + [("Recovery", "", line.removeprefix("recovered").strip()) for line in lines]


def measured(evals: Sequence[EvalResult]) -> list[Measured]:
    """A row for every model and text, one for accuracy and for speed where they were measured."""
    found = []
    for result in evals:
        model = _short(result.model)
        distances = {distance.text: distance for distance in result.divergence}
        scores = {score.text: score for score in result.perplexity}
        for text in dict.fromkeys([*scores, *distances]):
            score, distance = scores.get(text), distances.get(text)
            tokens = score.scored_tokens if score is not None else distance.scored_tokens  # type: ignore[union-attr]
            windows = f"{score.windows} windows of {score.seqlen}, " if score is not None else ""
            found.append(
                Measured(
                    model, _short(text),
                    "" if score is None else f"{score.perplexity:.4g}",
                    "" if distance is None else f"{distance.kl:.4g}",
                    "" if distance is None else f"{distance.top1_agreement:.1%}",
                    f"{windows}{tokens:,} tokens" + (f"; {score.protocol}" if score is not None else ""),
                )
            )  # fmt: skip
        if (labels := result.accuracy) is not None:
            row = Measured(
                model,
                _short(labels.text),
                "",
                "",
                "",
                f"accuracy {labels.accuracy:.2%} of {labels.texts} texts",
            )
            found.append(row)
        if (speed := result.speed) is not None:
            about = (
                f"prefill {speed.prefill:.1f}, decode {speed.decode:.1f} tokens/s (batch 1, {speed.device}, "
                f"{speed.threads} threads)"
            )
            found.append(Measured(model, "", "", "", "", about))
    return found


def _short(source: str) -> str:
    """A model or text as people call it: a hub id, or the name of a file."""
    return clipped(source if source.count("/") == 1 and source[0] != "/" else Path(source).name or source, 80)


def engines(manifest: Manifest) -> list[Engine]:
    """How the result is loaded, by each program that reads its format."""
    name = manifest.model_class
    # Text that people are going to copy into a program is a name, or another one is given.
    model_class = name if name.isidentifier() and name.isascii() else "AutoModel"
    generates = "CausalLM" in model_class
    load = f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained("OUT")'
    form = manifest.recipe.get("format", "lrsd")
    if form == "gguf":
        return [
            Engine("llama.cpp", "llama-cli -m OUT.gguf\nllama-server -m OUT.gguf"),
            Engine(
                "transformers",
                f"from transformers import {model_class}\n\n"
                f'model = {model_class}.from_pretrained(".", gguf_file="OUT.gguf")',
                "It is expanded to full precision in memory.",
            ),
        ]
    if form == "compressed-tensors":
        return [
            Engine("transformers", load, "Needs the package compressed-tensors, not lrsd."),
            Engine("vLLM", "vllm serve OUT"),
            Engine(
                "SGLang", "python -m sglang.launch_server --model-path OUT", "Widths of 4 and 8 bits only."
            ),
        ]
    found = [Engine("transformers", f"import lrsd  # registers the loader\n{load}")]
    if generates:
        found.append(Engine("vLLM", "vllm serve OUT", "By the plugin that installing lrsd registers."))
    export = "lrsd export OUT --format dense -o DENSE"
    return [*found, Engine("Any runtime", export, "Plain weights, at 16 bit again.")]


def calibration(manifest: Manifest) -> str:
    """What it was fitted to, in a few words."""
    recipe = manifest.recipe
    if recipe.get("train") is not None:
        return f"trained on {_short(str(recipe['train']))}"
    texts = recipe.get("calib") or "self"
    named = ", ".join(_short(str(text)) for text in (texts if isinstance(texts, list) else [texts])[:5])
    return f"calibrated on {named}, up to {recipe.get('samples')} × {recipe.get('seqlen')} tokens"


def recipe_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Settings by name, those that are not set left out."""
    return rows({name: value for name, value in manifest.recipe.items() if value not in (None, [], "")})


def rows(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(clipped(str(name), 60), clipped(_written(value), _LONGEST)) for name, value in content.items()]


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def why_no_alternation(manifest: Manifest) -> str:
    """Instead of a picture of convergence."""
    rounds = manifest.recipe.get("alternations")
    if rounds == 1:
        return "The recipe asks for one round: S is chosen and L fitted once, and nothing alternates."
    return (
        "Nothing alternates here: a layer does only where a low-rank L and S are fitted in turns, and each "
        f"of these {len(manifest.layers):,} layers is of one part, or was solved at once."
    )


def notes(manifest: Manifest) -> list[str]:
    """Layers left dense, experts that few tokens reached, more damping."""
    lines = [clipped(" ".join(line.split()), _LONGEST) for line in left_alone(manifest)]
    more = [f"and {len(lines) - _MOST_NOTES:,} more, see lrsd inspect"] if len(lines) > _MOST_NOTES else []
    return lines[:_MOST_NOTES] + more
