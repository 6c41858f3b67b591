"""The main job: model and text in, a compressed checkpoint directory out."""

import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lrsd.checkpoint.card import model_card
from lrsd.checkpoint.manifest import (
    CARD_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    LayerRecord,
    Manifest,
    read_manifest,
    write_manifest,
)
from lrsd.checkpoint.reader import stored_bytes
from lrsd.checkpoint.verify import digests
from lrsd.checkpoint.writer import publish, require_free, require_place, write_model
from lrsd.data.tokens import calibration_samples
from lrsd.errors import InputError, LrsdError
from lrsd.model.embedding import embedding_names, pack_embeddings
from lrsd.model.load import (
    LoadedModel,
    copy_processor,
    resolve_device,
)
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.numerics.allocate import LayerCurve, dense_bytes, plan_bytes
from lrsd.progress import Progress
from lrsd.runtimes.transformers import mark_packed
from lrsd.settings import CalibrationSettings, CompressionSettings, plain, recipe
from lrsd.steps.estimate import Needs, foretell, predict, require
from lrsd.steps.fit import Fitted, fit_blocks
from lrsd.steps.observe import Survey, survey_model
from lrsd.steps.plan import PLAN_STEP, Choice, choose_plan
from lrsd.steps.source import Subject, checkpoint_bytes, load_subject
from lrsd.work.files import refusals, sync, write_json
from lrsd.work.journal import Journal, difference, partial_directory
from lrsd.work.process import Process, peak_rss

# Steps of the journal besides those of the blocks; where the checkpoint is written to.
TEXT_STEP, WRITTEN = "text", "written"
_CHECKPOINT = "checkpoint"
# Time of the fit over time of the survey, with propagation and without, as `scripts/bench_time.py` and
# `scripts/bench_peer_time.py` measured it on SmolLM2-135M; for the dry run's guess only.
_FIT_PER_SURVEY = {True: 1.5, False: 0.3}


@dataclass
class Clock:
    """Seconds per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def compress(
    source: str,
    output: Path,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    memory: int | None = None,
    process: Process | None = None,
) -> Manifest:
    """Compress the model at `source` into the new directory `output`.

    Survey the dense model on calibration text, allocate the byte budget among its layers, fit them
    block by block behind the compressed prefix, and write the packed checkpoint. Finished blocks are kept
    beside `output` meanwhile.

    Args: resume: go on with what an earlier run of the same command has finished, if there is anything;
        the result is the same, byte by byte; memory: bytes of it allowed, all of the machine's by default;
        process: what may be changed of it, nothing by default.
    Raises: LrsdError; nothing is left at `output` then.
    """
    progress, clock = progress or Progress(), Clock()
    require_place(output)
    with work_towards(output, resume) as journal, torch.inference_mode(), ExitStack() as undone:
        journal.claim(recipe=recipe(settings, calibration), environment=environment(settings))
        finished = resume and not journal.begun and (output / MANIFEST_NAME).is_file()
        if not finished and WRITTEN not in journal:
            require_free(output)
        with clock("load"):
            subject = load_subject(source, settings, calibration, memory, process)
            undone.callback(subject.residence.close)
        if finished:
            return require_same(output, subject, settings, calibration)
        journal.claim(model=subject.fingerprint, text=subject.text)
        if WRITTEN not in journal:
            prepared = prepare(subject, settings, calibration, progress, clock, journal)
            fitted = fit_blocks(
                prepared.replay,
                prepared.survey,
                prepared.choice,
                prepared.budget,
                settings,
                progress,
                journal,
            )
            write_checkpoint(prepared, fitted, journal, settings, calibration, clock)
        return move_into_place(journal, output)


def require_same(
    output: Path, subject: Subject, settings: CompressionSettings, calibration: CalibrationSettings
) -> Manifest:
    """The manifest of a result that is there already. Raises: InputError if it is another command's."""
    manifest = read_manifest(output)
    found = {"model": manifest.base_fingerprint, "calib": manifest.calibration, **manifest.settings}
    asked = {"model": subject.fingerprint, "calib": _described(calibration, subject), **plain(settings)}
    if differs := difference(found, json.loads(json.dumps(asked))):
        raise InputError(
            f"{output} holds the result of another run: {differs}; choose another output directory"
        )
    return manifest


def _described(calibration: CalibrationSettings, subject: Subject) -> dict[str, Any]:
    return {**asdict(calibration), "text": subject.text}


@contextmanager
def work_towards(output: Path, resume: bool) -> Iterator[Journal]:
    """The journal beside `output`. What it holds outlives an interruption and a full disk, but not an error
    that another try would run into again.

    Raises: InputError if there is unfinished work and it is not to be resumed.
    """
    journal = Journal(partial_directory(output))
    if journal.begun and not resume and not journal.finished_steps:
        journal.remove()  # stopped before anything was finished
        journal = Journal(journal.directory)
    if journal.begun and not resume:
        journal.close()
        raise InputError(
            f"{journal.directory} holds the unfinished work of an earlier run; add --resume to go on with "
            "it, or delete it"
        )
    try:
        yield journal
    except BaseException as error:
        if journal.begun:
            if (isinstance(error, LrsdError) and error.final) or not journal.worth_keeping:
                journal.remove()
            elif not isinstance(error, InputError):  # which says itself what to do
                error.add_note(
                    f"finished work is kept in {journal.directory}; the same command with --resume goes on"
                )
        raise
    finally:
        journal.close()


def move_into_place(journal: Journal, output: Path) -> Manifest:
    """A written checkpoint appears under its name, and the journal goes."""
    if (written := journal.directory / _CHECKPOINT).is_dir():
        publish(written, output)
    manifest = read_manifest(output)
    journal.remove()
    return manifest


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first layer is changed; what `--dry-run` shows."""

    subject: Subject
    samples: Samples
    replay: Replay
    survey: Survey
    choice: Choice
    budget: int
    checkpoint_bytes: int
    needs: Needs
    seconds: dict[str, float]

    @property
    def loaded(self) -> LoadedModel:
        return self.subject.loaded

    @property
    def curves(self) -> dict[str, LayerCurve]:
        return self.survey.curves

    @property
    def remaining_seconds(self) -> float:
        """A rough guess at the fit, from the survey, which runs the same model over the same tokens."""
        return _FIT_PER_SURVEY[self.choice.propagate] * self.seconds["survey"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget_bytes": self.budget,
            "planned_bytes": plan_bytes(self.choice.plan, self.curves),
            "dense_linear_bytes": dense_bytes(self.curves),
            "allocation": self.choice.compared,
            "allocation_chosen": self.choice.name,
            "expected_kl": self.choice.expected_kl,
            "propagate": self.choice.propagate,
            "seconds": self.seconds,
            "remaining_seconds": self.remaining_seconds,
            "predicted_memory_bytes": self.needs.memory,
            "predicted_disk_bytes": self.needs.disk,
            "layers": {
                name: {**asdict(layer), "bytes": layer.nbytes(self.curves[name].shape)}
                for name, layer in self.choice.plan.items()
            },
        }


def dry_run(
    source: str,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    progress: Progress | None = None,
    *,
    memory: int | None = None,
    process: Process | None = None,
) -> Prepared:
    """Survey and allocate only; nothing is left on disk."""
    with (
        tempfile.TemporaryDirectory(prefix="lrsd-") as scratch,
        closing(Journal(Path(scratch))) as journal,
        torch.inference_mode(),
        ExitStack() as undone,
    ):
        clock = Clock()
        with clock("load"):
            subject = load_subject(source, settings, calibration, memory, process)
            undone.callback(subject.residence.close)
        return prepare(subject, settings, calibration, progress or Progress(), clock, journal)


def prepare(
    subject: Subject,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    progress: Progress,
    clock: Clock,
    journal: Journal,
) -> Prepared:
    """Read calibration text, survey, allocate, where the journal does not have it."""
    loaded, layout = subject.loaded, subject.layout
    # From here on the ratio is that of the linear weights, whatever it was asked of.
    linear = sum(spec.shape.dense_bytes for spec in layout.linears.values())
    settings = replace(settings, ratio=linear / subject.budget)
    journal.begin(loaded.model.device)
    if TEXT_STEP not in journal:
        text = calibration_samples(loaded, subject.fingerprint, calibration, progress)
        journal.finish(TEXT_STEP, text)
    samples = journal.read(TEXT_STEP, Samples)
    replay, needs = start_replay(subject, samples, settings, progress, journal)
    progress.stage("survey", len(layout.blocks))
    survey = survey_model(replay, samples, settings, progress.step, journal)
    choice = choose_plan(replay, survey, samples, subject.budget, settings, progress, journal)
    return Prepared(
        subject, samples, replay, survey, choice, subject.budget, checkpoint_bytes(loaded.model), needs,
        spent(clock, journal),
    )  # fmt: skip


def start_replay(
    subject: Subject, samples: Samples, settings: CompressionSettings, progress: Progress, journal: Journal
) -> tuple[Replay, Needs]:
    """The model ready to be run block by block, and what the rest will take; says so.

    Raises: InputError if that is not there.
    """
    loaded, layout, residence = subject.loaded, subject.layout, subject.residence
    needs = predict(loaded.model, layout, samples, settings, residence, subject.budget)
    require(needs, journal.directory, subject.memory_limit)
    batches = list(samples.split(settings.batch))
    start = time.perf_counter()
    replay = Replay.start(loaded.model, layout, batches, journal.new_stream, residence.release)
    per_batch = (time.perf_counter() - start) / min(len(batches), 2)  # more are not run through all blocks
    left = 1 - (journal.count("survey-") + journal.count("fit-")) / (2 * len(layout.blocks))
    minutes = left * foretell(layout, per_batch, len(batches), settings) / 60
    if loaded.ignored:
        progress.note(
            f"{len(loaded.ignored)} tensors are no part of the model, {loaded.ignored[0]} among them"
        )
    progress.note(
        f"needs about {needs.memory / 1e9:.2f} GB of memory, {needs.disk / 1e9:.2f} GB of disk, "
        f"{math.ceil(minutes)} min" + "; weights are paged (streamed from disk)" * residence.paged
    )
    return replay, needs


def spent(clock: Clock, journal: Journal) -> dict[str, float]:
    """Seconds by phase: of this process, and of those before it as far as what they did is kept."""
    steps = {"calibration text": TEXT_STEP, "survey": "survey-", "allocate": PLAN_STEP, "solve": "fit-"}
    return clock.seconds | {phase: journal.seconds(prefix) for phase, prefix in steps.items()}


def write_checkpoint(
    prepared: Prepared,
    fitted: dict[str, Fitted],
    journal: Journal,
    settings: CompressionSettings,
    calibration: CalibrationSettings,
    clock: Clock,
) -> None:
    """The checkpoint directory: packed weights, tokenizer, manifest, model card; within the journal's."""
    loaded, curves = prepared.loaded, prepared.curves
    formats = {name: layer.packing for name, layer in fitted.items() if layer.packing is not None}
    embeddings = embedding_names(loaded.model) if settings.scope == "checkpoint" else ()
    pack_embeddings(loaded.model, embeddings)
    mark_packed(loaded.model, formats, embeddings)
    layers = {name: _record(prepared, name, layer) for name, layer in fitted.items()}
    added = sum(layer.bytes for layer in layers.values())
    total = dense_bytes(curves)
    directory = journal.directory / _CHECKPOINT
    with clock("write"), refusals(directory):
        if directory.exists():  # of a run that was stopped while it wrote
            shutil.rmtree(directory)
        directory.mkdir()
        write_model(loaded.model, directory, settings.shard_size)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(directory)
        copy_processor(loaded.source, directory)
        write_json(directory / RECIPE_NAME, recipe(settings, calibration))
        files = digests(directory)
    manifest = Manifest(
        base_model=Path(prepared.loaded.source).name,
        base_fingerprint=prepared.subject.fingerprint,
        base_stored_as=loaded.stored_as,
        lrsd_version=version("lrsd"),
        environment=environment(settings),
        calibration=_described(calibration, prepared.subject),
        settings=plain(settings),
        ratio=total / added,
        checkpoint_ratio=prepared.checkpoint_bytes / stored_bytes(directory),
        linear_bytes=added,
        dense_linear_bytes=total,
        budget_bytes=prepared.budget,
        bits_per_weight=16 * added / total,
        macs_per_token=sum(_macs(fitted[name], curve) for name, curve in curves.items()),
        dense_macs_per_token=total // 2,
        allocation=prepared.choice.compared,
        allocation_chosen=prepared.choice.name,
        expected_kl=prepared.choice.expected_kl,
        propagated=prepared.choice.propagate,
        layers=layers,
        files=files,
        model_class=type(loaded.model).__name__,
        untouched=prepared.replay.layout.untouched,
        seconds={phase: round(seconds, 2) for phase, seconds in spent(clock, journal).items()},
        memory={"predicted": prepared.needs.memory, "peak": peak_rss()},
    )
    write_manifest(directory, manifest)
    with refusals(directory):
        (directory / CARD_NAME).write_text(model_card(manifest), encoding="utf-8")
        for path in (*directory.rglob("*"), directory):
            sync(path)
    journal.finish(WRITTEN)


def _record(prepared: Prepared, name: str, layer: Fitted) -> LayerRecord:
    shape = prepared.curves[name].shape
    return LayerRecord(
        out_features=shape.out_features,
        in_features=shape.in_features,
        rank=layer.plan.rank,
        coding=None if layer.plan.codes is None else "fixed" if layer.plan.codes.bits else "entropy",
        code_bits=layer.plan.codes.bits if layer.plan.codes else None,
        group=layer.plan.codes.group if layer.plan.codes else 0,
        step=layer.plan.codes.step if layer.plan.codes else 0.0,
        columns=layer.plan.columns,
        rows=layer.plan.rows,
        entries=layer.plan.entries,
        bias=layer.plan.bias,
        bytes=layer.plan.nbytes(shape),
        dense_bytes=shape.dense_bytes,
        error=layer.error,
        predicted_error=layer.plan.error,
        sensitivity=prepared.survey.sensitivity[name],
        blend=layer.blend,
        status=layer.status,
        history=layer.history,
        routed_tokens=prepared.survey.routed.get(name),
    )


def _macs(layer: Fitted, curve: LayerCurve) -> int:
    """Multiply-adds per token: one for every stored value."""
    if layer.packing is None:
        return curve.shape.dense_bytes // 2
    values = sum(
        tensor.numel()
        for name, tensor in layer.tensors.items()
        if tensor.is_floating_point() and name not in ("bias", "scales")
    )
    return values + (curve.shape.dense_bytes // 2 if layer.plan.codes else 0)


def environment(settings: CompressionSettings) -> dict[str, str]:
    """What a result may depend on besides its recipe: the same in all of this is the same to the byte."""
    packages = ("lrsd", "torch", "transformers", "safetensors", "tokenizers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": str(resolve_device(settings.device)),
        "threads": str(torch.get_num_threads()),
    }
