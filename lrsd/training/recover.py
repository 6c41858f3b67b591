"""The recovery of a compressed checkpoint: what is continuous in it is distilled from the dense model, codes
and all other integers being fixed. Gradients of weights are computed here.

Source: the optional fine-tuning of the SSD paper; see `training.blocks` and `training.whole`.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrsd.checkpoint.card import model_card
from lrsd.checkpoint.manifest import (
    BASE_CARD_NAME,
    CARD_NAME,
    REPORT_NAME,
    Manifest,
    holds_manifest,
    read_manifest,
    write_manifest,
)
from lrsd.checkpoint.verify import digests, verify
from lrsd.checkpoint.writer import require_free, require_place, rewrite_shards
from lrsd.data.tokens import calibration_samples
from lrsd.errors import CheckpointError, InputError
from lrsd.model.load import LoadedModel, load_model
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.steps.output import WRITTEN, move_into_place, work_towards, written_place
from lrsd.steps.proof import require_usable
from lrsd.steps.source import SourceModel, load_source
from lrsd.steps.write import environment
from lrsd.training.blocks import recover_blocks
from lrsd.training.settings import Recovery
from lrsd.training.whole import recover_model, require_logits
from lrsd.work.files import refusals, sync
from lrsd.work.journal import Journal, difference
from lrsd.work.onloading import compute_device
from lrsd.work.process import Process
from lrsd.work.residency import Residence
from lrsd.work.streams import Stream
from lrsd.work.world import World

# The journal's first step.
_TEXT_STEP = "text"
# One in so many samples is held out: it chooses what is kept.
_HELD_OUT = 8


@dataclass(frozen=True)
class Pair:
    """The dense model, what was compressed from it, and the checkpoint that this is read from."""

    source: SourceModel
    compressed: LoadedModel
    directory: Path
    manifest: Manifest


def recover(
    directory: Path,
    dense: str,
    output: Path,
    settings: Recovery,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    memory: int | None = None,
    process: Process | None = None,
) -> Manifest:
    """Distill the model at `dense` into the checkpoint at `directory`; the new directory `output` has the
    same tensors, types and bytes, but other values where these are continuous.

    Each block is fitted to the dense one's output, then all of them to its logits, as `settings.stage` says;
    what does not lower the loss on held-out samples is not taken. Finished blocks are kept beside `output`
    meanwhile.

    Args: dense: directory, hub id or .gguf file of the model that was compressed; resume: go on with what an
        earlier run of the same command has finished, if there is anything; the result is the same, byte by
        byte; memory: bytes of it allowed; process: what may be changed of it, nothing by default.
    Raises: LrsdError; nothing is left at `output` then.
    """
    progress = progress or Progress()
    manifest = _require_own_format(directory)
    require_place(output)
    with work_towards(output, resume, World()) as journal, torch.no_grad(), ExitStack() as undone:
        journal.claim(recovery=asdict(settings), checkpoint=manifest.files)
        finished = resume and not journal.begun and holds_manifest(output)
        if not finished and WRITTEN not in journal:
            require_free(output)
        pair = _load(directory, dense, manifest, settings, memory, process)
        undone.callback(pair.source.residence.close)
        about = {
            "settings": json.loads(json.dumps(asdict(settings))),
            "text": pair.source.text,
            "checkpoint": manifest.files,
            "environment": environment(_recipe(manifest, settings)),
        }
        if finished:
            return _require_same(output, about)
        journal.claim(text=pair.source.text, environment=about["environment"])
        if WRITTEN not in journal:
            losses, samples = _recovered(pair, settings, progress, journal)
            written = written_place(journal, output)
            _write(pair, written, about | losses)
            note = require_usable(_as_source(pair, memory, process), samples, written)
            if note is not None:
                progress.note(note)
            journal.finish(WRITTEN)
        return move_into_place(journal, output)


def _require_own_format(directory: Path) -> Manifest:
    """Raises: InputError or CheckpointError for what is no whole checkpoint in lrsd's own format."""
    manifest = read_manifest(directory)
    found = manifest.recipe.get("format", "lrsd")
    if directory.is_file() or found != "lrsd":
        raise InputError(
            f"{directory} is in format {found}; expected lrsd's own, which alone is recovered: compress "
            "without --format"
        )
    return verify(directory)


def _recipe(manifest: Manifest, settings: Recovery) -> Recipe:
    """That of the compression, on the text and device of the recovery."""
    calibration = asdict(settings.calibration) | {"device": settings.device, "device_memory": None}
    return Recipe.of(**manifest.recipe | calibration)


def _load(
    directory: Path,
    dense: str,
    manifest: Manifest,
    settings: Recovery,
    memory: int | None,
    process: Process | None,
) -> Pair:
    """Raises: InputError if `dense` is not the model that was compressed."""
    with _named_as_here():
        source = load_source(dense, _recipe(manifest, settings), memory, process)
    if source.fingerprint != manifest.base_fingerprint:
        raise InputError(
            f"{dense} has fingerprint {source.fingerprint}, expected {manifest.base_fingerprint}, that of "
            f"{manifest.base_model}, which {directory} was compressed from; give that model as --dense"
        )
    model = source.loaded.model
    dtype, device = str(model.dtype).removeprefix("torch."), str(compute_device(model))
    compressed = load_model(str(directory), dtype=dtype, device=device, memory=memory)
    compressed.model.requires_grad_(False)
    return Pair(source, compressed, directory, manifest)


@contextmanager
def _named_as_here() -> Iterator[None]:
    """What is wrong with a text, in the words of this command."""
    try:
        yield
    except InputError as error:
        raise type(error)(str(error).replace("--calib", "--text")) from error


def _recovered(
    pair: Pair, settings: Recovery, progress: Progress, journal: Journal
) -> tuple[dict[str, Any], Samples]:
    """The model in memory, recovered. Returns: losses of the manifest, and the samples."""
    loaded, layout = pair.source.loaded, pair.source.layout
    classes = require_logits(loaded) if settings.stage != "blocks" else 0
    journal.begin(compute_device(loaded.model))

    def text() -> Samples:
        with _named_as_here():
            return calibration_samples(loaded, pair.source.fingerprint, settings.calibration, progress)

    samples = journal.made(_TEXT_STEP, Samples, text)
    if len(samples) < 2:
        raise InputError(
            f"--text holds {len(samples)} sample, expected at least 2, one of them to hold out; give more"
        )
    trained = len(samples) - max(1, len(samples) // _HELD_OUT)
    parts = samples[:trained], samples[trained:]
    batches = [batch for part in parts for batch in part.split(settings.batch)]
    losses: dict[str, Any] = {"samples": len(samples), "held_out": len(samples) - trained}
    if settings.stage != "model":
        dense = Replay.start(
            loaded.model, layout, batches, _streams(journal, "dense"), pair.source.residence.release
        )
        compressed = Replay.start(pair.compressed.model, layout, batches, _streams(journal, "compressed"))
        ends = list(accumulate(map(len, batches))).index(trained) + 1
        blocks = recover_blocks(dense, compressed, batches, ends, settings, progress, journal)
        losses["blocks"] = {name: block.losses for name, block in blocks.items()}
        if unchanged := [name for name, block in blocks.items() if not block.values]:
            progress.note(f"{len(unchanged)} blocks are kept as they were, {unchanged[0]} among them")
    if settings.stage != "blocks":
        whole = recover_model(
            loaded.model, pair.compressed.model, samples, trained, classes, settings, progress, journal
        )
        losses["kl"] = whole.losses
        if not whole.values:
            progress.note("the model as a whole is kept as it was: no epoch lowered the divergence")
    return losses, samples


def _streams(journal: Journal, model: str) -> Callable[[str], Stream]:
    """Both models' hidden states are in one journal."""
    return lambda name: journal.new_stream(f"{model}-{name}")


def _write(pair: Pair, target: Path, about: Mapping[str, Any]) -> None:
    """The checkpoint again, with the tensors of the recovered model, and have all of it on disk.

    Raises: StorageError; CheckpointError if a tensor is not what the checkpoint has.
    """
    state = pair.compressed.model.state_dict()
    with refusals(target):
        if target.exists():  # of a run that was stopped while it wrote
            shutil.rmtree(target)
        shutil.copytree(pair.directory, target, ignore=_without_report(pair.directory))
    rewrite_shards(target, lambda name, stored: _recovered_tensor(name, stored, state))
    manifest = replace(pair.manifest, recovery=dict(about), files=digests(target, pair.manifest.files))
    write_manifest(target, manifest)
    with refusals(target):
        card = model_card(manifest, target / BASE_CARD_NAME)
        (target / CARD_NAME).write_text(card, encoding="utf-8")
        for path in (*target.rglob("*"), target):
            sync(path)


def _without_report(directory: Path) -> Callable[[str, list[str]], list[str]]:
    """For copytree: the report on what it was before is not copied."""
    return lambda folder, names: [REPORT_NAME] if Path(folder) == directory and REPORT_NAME in names else []


def _recovered_tensor(name: str, stored: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Raises: CheckpointError."""
    value = state.get(name)
    if value is None or not stored.is_floating_point():
        return stored
    if (value.shape, value.dtype) != (stored.shape, stored.dtype):
        raise CheckpointError(
            f"{name} is {stored.dtype} {tuple(stored.shape)} in the checkpoint, {value.dtype} "
            f"{tuple(value.shape)} in the model; nothing was written"
        )
    return value.cpu().contiguous()


def _as_source(pair: Pair, memory: int | None, process: Process | None) -> SourceModel:
    """The recovered model where the dense one was, which is not needed any more."""
    pair.source.residence.close()
    model = pair.compressed.model
    residence = Residence(model, pair.source.memory_limit if memory is None else memory, process)
    return replace(pair.source, loaded=pair.compressed, residence=residence)


def _require_same(output: Path, about: Mapping[str, Any]) -> Manifest:
    """The manifest of a result that is there already. Raises: InputError if it is another command's."""
    manifest = read_manifest(output)
    if differs := difference(manifest.recovery, json.loads(json.dumps(dict(about)))):
        raise InputError(
            f"{output} holds the result of another run: {differs}; choose another output directory"
        )
    return manifest
