"""The model card: README.md of a checkpoint directory."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lrsd.checkpoint.manifest import CARD_NAME, Manifest, holds_manifest
from lrsd.errors import CheckpointError
from lrsd.work.files import refusals

# What of a card's header is carried over, and how large a card is read at most: the hub's own limit is below.
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LARGEST_CARD = 2**23
_ENGINES = {
    "lrsd": "transformers after `import lrsd`, vLLM by lrsd's plugin",
    "compressed-tensors": "transformers, vLLM, SGLang, without lrsd",
    "gguf": "llama.cpp and what is built on it, transformers",
}


def result_lines(manifest: Manifest) -> list[str]:
    """A few lines: ratios, bits, multiply-adds."""
    kinds = _kinds(manifest)
    whole = manifest.recipe.get("scope") == "checkpoint"
    what = "linear weights"
    kept = "embeddings and head in 8 bit" if whole else "embeddings, head and norms are kept"
    if whole and manifest.recipe.get("format") == "gguf":
        what, kept = "matrices", "embeddings and head among them"
    return [
        f"{what:<15} {_mb(manifest.dense_linear_bytes)} -> {_mb(manifest.linear_bytes)}, "
        f"{manifest.ratio:.4g}x, {manifest.bits_per_weight:.3g} bits per weight",
        f"checkpoint      {manifest.checkpoint_ratio:.4g}x as a whole ({kept})",
        f"multiply-adds   {manifest.macs_per_token / 1e6:.1f} M per token in the linear weights, "
        f"dense {manifest.dense_macs_per_token / 1e6:.1f} M",
        f"layers          {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
        f"runs in         {_ENGINES[manifest.recipe.get('format', 'lrsd')]}",
        *left_alone(manifest),
        *recovery_lines(manifest),
    ]


def recovery_lines(manifest: Manifest) -> list[str]:
    """On a distillation after the compression: what was held out, before and after."""
    done, lines = manifest.recovery, []
    if blocks := done.get("blocks"):
        better = [losses for losses in blocks.values() if min(losses) < losses[0]]
        shares = [min(losses) / losses[0] for losses in better]
        kept = f", on average to {sum(shares) / len(shares):.0%}" if shares else ""
        lines.append(f"recovered       error of {len(better)} of {len(blocks)} blocks lowered{kept}")
    if kl := done.get("kl"):
        lines.append(f"recovered       KL from the dense model {kl[0]:.4g} -> {min(kl):.4g} on held-out text")
    return lines


def left_alone(manifest: Manifest) -> list[str]:
    """Lines on linear layers that stayed as they were and on experts that few tokens reached."""
    lines = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in manifest.untouched.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"left dense      {shown} ({reason})")
    reasons = {name: layer.reason for name, layer in manifest.layers.items() if layer.reason}
    lines += [f"left dense      {name} ({reason})" for name, reason in reasons.items()]
    if damped := [name for name, layer in manifest.layers.items() if layer.damping]:
        lines.append(f"more damping    {len(damped)} layers, {damped[0]} among them; see lrsd inspect")
    starved = {
        name: layer.routed_tokens
        for name, layer in manifest.layers.items()
        if layer.routed_tokens is not None and layer.routed_tokens < layer.in_features
    }
    for name, tokens in starved.items():
        lines.append(f"few tokens      {name} saw {tokens}; made up with those of all experts of its block")
    return lines


def model_card(manifest: Manifest, base: Path | None = None) -> str:
    """README.md of the checkpoint directory: a header that the hub reads, and how to use the model.

    base: the card of the model that was compressed, whose licence, languages and task hold on.
    """
    lines = "\n".join(f"    {line}" for line in result_lines(manifest))
    recipe = manifest.recipe
    carried = _carried(base)
    about = ModelCardData(
        **(carried or {}),
        base_model=manifest.base_model,
        library_name="transformers",
        tags=["lrsd", "low-rank", "sparse", "compressed"],
    )
    if recipe.get("format", "lrsd") == "lrsd":
        imports, more = (
            "import lrsd  # registers the loader\n",
            ", `lrsd export --dense` writes plain weights",
        )
        also = ""
    else:
        imports, more = "", ""
        also = f"\nThe package {recipe['format']} is needed; vLLM and SGLang serve the directory as it is.\n"
    if carried is None:
        also += "\nThe header of the original's card cannot be read: see there for its licence.\n"
    return f"""---
{about.to_yaml()}
---
# {manifest.base_model}, compressed {manifest.ratio:.3g}x by lrsd {manifest.lrsd_version}

{_how(recipe)}
The source held its weights as {manifest.base_stored_as}.{_recovery(manifest)}

{lines}

Load it with

```python
{imports}from transformers import {manifest.model_class}

model = {manifest.model_class}.from_pretrained("this directory")
```
{also}
`lrsd eval` measures it, `lrsd inspect` shows every layer{more}.
"""


def _carried(path: Path | None) -> dict[str, Any] | None:
    """What a card says of a model that is true of a compressed one too. None: it cannot be read."""
    if path is None or not path.is_file():
        return {}
    try:
        if path.stat().st_size > _LARGEST_CARD:
            return None
        said = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, RecursionError, OSError, yaml.YAMLError):
        return None
    texts = {name: said[name] for name in _CARRIED if isinstance(said.get(name), str)}
    language = said.get("language")
    if isinstance(language, list) and all(isinstance(one, str) for one in language):
        texts["language"] = language
    return texts


class CardMetric(NamedTuple):
    """A figure of a model. text: or task that it was measured on; how: by what protocol, or on how much."""

    text: str
    metric: str
    value: float
    how: str = ""


def require_card(directory: Path) -> ModelCard:
    """The card of a checkpoint. Raises: CheckpointError if the directory has none that can be read."""
    path = directory / CARD_NAME
    if not directory.is_dir() or not holds_manifest(directory):  # a model of somebody else's has a card too
        raise CheckpointError(f"{directory} is no directory that lrsd compress wrote, whose card is added to")
    try:
        return ModelCard.load(path)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is no model card that can be added to ({line}); restore the one that was there"
        ) from error


def add_metrics(directory: Path, measured: Sequence[CardMetric]) -> None:
    """Put what was measured into the card of a checkpoint, as the model-index that the hub shows; in the
    place of earlier figures of the same metric on the same text.

    Raises: CheckpointError if the directory has no card that can be read, StorageError.
    """
    path, card = directory / CARD_NAME, require_card(directory)
    data: ModelCardData = card.data  # type: ignore[assignment]  # of a ModelCard always
    found = [
        EvalResult(
            # By the type, not the name, texts are told apart.
            task_type="text-generation", dataset_type=Path(text).name or text,
            dataset_name=Path(text).name or text,
            metric_type=metric, metric_name=f"{metric} ({how})" if how else metric, metric_value=value,
        )
        for text, metric, value, how in measured
    ]  # fmt: skip
    new = {(one.dataset_name, one.metric_type) for one in found}
    before = data.eval_results or []
    kept = [one for one in before if (one.dataset_name, one.metric_type) not in new]
    data.model_name = data.model_name or directory.name
    data.eval_results = [*kept, *found]
    with refusals(path):
        card.save(path)


def _how(recipe: dict[str, Any]) -> str:
    """How the weights were come by."""
    if recipe.get("train") is not None:
        length = f"{recipe['train_steps']} steps" if recipe["train_steps"] else f"{recipe['epochs']} epochs"
        return (
            "Each linear weight is stored as low rank + kept rows, both trained with the rest of the model\n"
            f"(LoSparse, ICML 2023) for {length} on {Path(recipe['train']).name}."
        )
    return (
        "Each linear weight is stored as low rank + kept columns or rows + integer codes, fitted to its "
        f"outputs on\nup to {recipe['samples']} x {recipe['seqlen']} tokens of calibration text "
        f"({_listed(recipe['calib'])})."
    )


def _recovery(manifest: Manifest) -> str:
    if not (done := manifest.recovery.get("settings")):
        return ""
    return (
        "\nIts factors, kept values, scales, biases and norms were then trained to give the dense model's "
        f"outputs, on up to\n{done['samples']} x {done['seqlen']} tokens of text ({_listed(done['text'])})."
    )


def _listed(sources: str | list[str]) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources)


def _kinds(manifest: Manifest) -> dict[str, int]:
    """Layers by the parts that they are stored as, without the numbers of these."""
    counts: dict[str, int] = {}
    for layer in manifest.layers.values():
        kind = re.sub(r"\d[\d,]* (entries|columns|rows)", r"\1", layer.stored_as)
        kind = re.sub(r"rank \d+", "low rank", kind)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
