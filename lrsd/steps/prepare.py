"""Everything before the first layer is changed: calibration samples, estimates, the calibration pass, the
plan."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lrsd.data.tokens import calibration_samples
from lrsd.errors import InputError
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.steps.embeddings import observe_embeddings
from lrsd.steps.estimate import (
    Division,
    ResourceEstimate,
    Speed,
    TimeEstimate,
    check_resources,
    estimate_resources,
    estimate_time,
    is_entropy_coded,
)
from lrsd.steps.observe import Observation, fitted_samples, observe_model, statistics_records
from lrsd.steps.plan import PLAN_STEP, Plan, choose_plan, may_propagate, needs_sensitivity
from lrsd.steps.source import SourceModel
from lrsd.steps.statistics import StoredStatistics
from lrsd.work.journal import Journal
from lrsd.work.kept import Kept
from lrsd.work.onloading import compute_device

# The journal's first step; and those of a training, which have the number of the last optimizer step behind.
TEXT_STEP, TRAIN_STEP = "text", "train-"


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

    def with_steps(self, journal: Journal) -> dict[str, float]:
        """With those of the journal's steps: of the processes before this one too, as far as they are
        kept."""
        steps = {
            "calibration text": TEXT_STEP, "observe": "observe-", "allocate": PLAN_STEP, "fit": "fit-",
            "train": TRAIN_STEP,
        }  # fmt: skip
        taken = {phase: journal.seconds(step) for phase, step in steps.items() if journal.count(step)}
        return self.seconds | taken


@dataclass(frozen=True)
class Prepared:
    """Everything known before the first layer is changed; what `--dry-run` shows."""

    source: SourceModel
    samples: Samples
    replay: Replay
    observation: Observation
    plan: Plan
    resources: ResourceEstimate
    time: TimeEstimate
    seconds: dict[str, float]

    @property
    def remaining_seconds(self) -> float:
        """A rough guess at the fit, from the calibration pass."""
        return self.time.remaining(self.seconds["observe"], propagate=self.plan.propagate)

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget_bytes": self.source.budget,
            "planned_bytes": self.plan.nbytes,
            "dense_linear_bytes": self.source.linear_bytes,
            "allocation": self.plan.compared,
            "allocation_chosen": self.plan.name,
            "expected_kl": self.plan.expected_kl,
            "propagate": self.plan.propagate,
            "seconds": self.seconds,
            "remaining_seconds": self.remaining_seconds,
            "predicted_memory_bytes": self.resources.memory,
            "predicted_device_memory_bytes": self.resources.device,
            "predicted_disk_bytes": self.resources.disk,
            "layers": {
                name: {"bytes": choice.nbytes, "error": choice.error, "parameters": choice.parameters}
                for name, choice in self.plan.choices.items()
            },
        }


def prepare(
    source: SourceModel,
    recipe: Recipe,
    progress: Progress,
    clock: Clock,
    journal: Journal,
    kept: Kept | None = None,
) -> Prepared:
    """Read calibration text, observe, allocate, where the journal does not have it.

    kept: where what the text tells of the model is, or is to be.
    """
    known = kept if _is_known(kept, journal) else None
    journal.begin(compute_device(source.loaded.model))

    def text() -> Samples:
        if known is not None:
            return known.read(TEXT_STEP, Samples)
        return calibration_samples(source.loaded, source.fingerprint, recipe.calibration, progress)

    samples = journal.made(TEXT_STEP, Samples, text)
    replay, resources, seconds = start_replay(source, samples, recipe, progress, journal)
    if known is not None:
        progress.note(f"calibration is taken from {known.directory}")
    progress.stage("observe", len(source.layout.blocks))
    observation = observe_model(
        replay, samples, recipe.method, source.linear_ratio, probing=needs_sensitivity(recipe),
        progress=progress.step, note=progress.note, workspace=journal,
        statistics=None if known is None else StoredStatistics(known.read, replay),
    )  # fmt: skip
    if kept is not None and known is None and journal.world.leads:
        kept.keep(journal.directory, [TEXT_STEP, *statistics_records(replay)])
    if source.gguf is not None:
        observation = observe_embeddings(
            replay, samples, source.embeddings, recipe.method, observation, journal
        )
        stored = {name: tensor.nbytes for name, tensor in source.gguf.tensors.items()}
        menus = {name: menu.with_dense_bytes(stored[name]) for name, menu in observation.menus.items()}
        observation = replace(observation, menus=menus)
    plan = choose_plan(
        replay, observation, samples, source.budget, source.linear_ratio, recipe, progress, journal
    )
    spent = clock.with_steps(journal)
    return Prepared(source, samples, replay, observation, plan, resources, seconds, spent)


def calibration_identity(source: SourceModel, recipe: Recipe, environment: dict[str, str]) -> dict[str, Any]:
    """All that the calibration samples and a model's statistics depend on."""
    calibration, method = asdict(recipe.calibration), recipe.method
    del calibration["propagate"]
    return {
        "model": source.fingerprint,
        "text": source.text,
        "calibration": calibration,
        "weighs": [method.weighs_rows, method.weighs_tokens],
        "groups": [[spec.name for spec in group.linears] for group in source.layout.groups],
        "environment": environment,
    }


def _is_known(kept: Kept | None, journal: Journal) -> bool:
    """Whether the statistics come from there: in a run that goes on as it began.

    Raises: InputError if they are there no more.
    """
    known = bool(journal.world.tell("known" if kept is not None and kept.complete else ""))
    if journal.begun and "calibration" in journal.claims:
        began = journal.claims["calibration"] == "known"
        if began and not known:
            raise InputError(
                f"{journal.directory} was begun on the calibration in "
                f"{kept.directory if kept else 'a directory of --calibration'}, which is not there any more; "
                "delete the former to start anew"
            )
        return began
    journal.claim(calibration="known" if known else "own")
    return known


def start_replay(
    source: SourceModel, samples: Samples, recipe: Recipe, progress: Progress, journal: Journal
) -> tuple[Replay, ResourceEstimate, TimeEstimate]:
    """The model ready to be run block by block, and what the rest will take; says so.

    Raises: InputError if that is not there.
    """
    loaded, layout, residence = source.loaded, source.layout, source.residence
    # First, since what it loads and compiles stays in memory.
    speed = Speed.measured(compute_device(loaded.model), rounds=is_entropy_coded(recipe))
    world = journal.world
    needs = estimate_resources(loaded.model, layout, samples, recipe, residence, source.budget, world.size)
    onloading = residence.onloading
    check_resources(
        needs, journal.directory, source.memory_limit, None if onloading is None else onloading.limit
    )
    if onloading is not None:
        # What is solved on the host is the same for all processes, though their accelerators may be busy.
        needs = replace(needs, widest=world.least(needs.widest))
        onloading.reserved, onloading.widest = needs.working, needs.widest
    fitted = fitted_samples(len(samples))
    # No batch holds samples of both parts, so that plans can be compared without those held out.
    parts = samples[:fitted], samples[fitted:]
    batches = [batch for part in parts for batch in part.split(recipe.calibration.batch)]
    start = time.perf_counter()
    replay = Replay.start(loaded.model, layout, batches, journal.new_stream, residence.release, world)
    per_batch = (time.perf_counter() - start) / min(len(batches), 2)  # more are not run through all blocks
    division = Division.of(loaded.model, needs, None if onloading is None else onloading.limit)
    per_pass = per_batch * len(batches)
    seconds = estimate_time(loaded.model, layout, samples, recipe, speed, per_pass, division, world.size)
    left = 1 - (journal.count("observe-") + journal.count("fit-")) / (2 * len(layout.blocks))
    minutes = left * seconds.total(propagate=may_propagate(recipe)) / 60
    if loaded.ignored:
        progress.note(
            f"{len(loaded.ignored)} tensors are no part of the model as transformers runs it, and left out, "
            f"{loaded.ignored[0]} among them"
        )
    if loaded.rounded:
        computed = str(loaded.model.dtype).removeprefix("torch.")
        progress.note(
            f"{len(loaded.rounded)} tensors are rounded to {computed} from the type that they are stored in, "
            f"{loaded.rounded[0]} among them; --dtype chooses another one"
        )
    progress.note(
        f"needs about {needs.memory / 1e9:.2f} GB of memory, "
        + f"{needs.device / 1e9:.2f} GB of {replay.device}, " * (onloading is not None)
        + f"for each of {world.size} processes, " * (world.size > 1)
        + f"{needs.disk / 1e9:.2f} GB of disk, {math.ceil(minutes)} min"
        + "; weights are paged (streamed from disk)" * residence.paged
        + f"; layers of more than {needs.widest} inputs are solved on the host" * (needs.widest is not None)
    )
    return replay, needs, seconds
